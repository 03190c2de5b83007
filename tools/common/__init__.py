"""What all scripts share, those of references/video_classification too: refusing, files, class maps.

Every script starts with `import common`, which also makes `torchvision_patches` importable, and says what to do where a
package is not installed. It imports nothing but the standard library, so that `--help` is fast and quickstart.py runs
before anything is installed.
"""

import contextlib
import csv
import errno
import getpass
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# `python tools/<script>.py` puts only tools/ on the path; appended, so that nothing here can shadow a package.
sys.path.append(str(REPO))

from common import names  # noqa: E402 (standard library only, as all here)


def refuse(message):
    """Print one sentence that says what is wrong, where and what to do; exit with code 2 (usage or configuration)."""
    lines = map(names.printable, str(message).split("\n"))  # names of files in it may be any bytes
    print("error: " + "\n".join(lines), file=sys.stderr, flush=True)
    raise SystemExit(2)


def interrupted(advice="run the same command again to go on"):
    """The end of a script by Ctrl-C: one sentence, exit code 130."""
    print(f"\ninterrupted; {advice}", file=sys.stderr, flush=True)
    raise SystemExit(130) from None


# what a file system answers where a person has to do something: no right, read-only, full, over quota, too long a name,
# a file where a folder should be, a broken disk
OF_THE_FILE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
OF_THE_FILE_SYSTEM |= {errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def end_in_a_sentence(kind, error, traceback):
    """Stands in for sys.excepthook: what lies outside of the program ends it with a sentence, all else as usual.

    That is Ctrl-C, a package that is not there for this Python or broken, and a file system that refuses.
    """
    if issubclass(kind, KeyboardInterrupt):
        interrupted()
    if issubclass(kind, ModuleNotFoundError):
        refuse(
            f"{error.name} is not installed for {sys.executable}; `source .venv/bin/activate` where tools/quickstart.py"
            f" or tests/run.py has made .venv, otherwise `pip install -r requirements.txt` (README, section 0)"
        )
    if issubclass(kind, ImportError) and "cannot import name" not in str(error):  # that is a fault of ours
        refuse(f"a package cannot be imported ({error}); install those of requirements.txt anew")
    if issubclass(kind, OSError) and error.errno in OF_THE_FILE_SYSTEM:
        place = names.printable(error.filename or "a file")  # an open file that is written has no name here
        refuse(f"{place} cannot be written or read: {error.strerror}{whose(error.filename)}; mend it and start again")
    sys.__excepthook__(kind, error, traceback)


def press_again(ignored):
    """Stands in for sys.unraisablehook: Ctrl-C while a worker is forked would be printed and forgotten, all else is."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        # a moment later, since in here it would be forgotten again; a lock that is waited for needs a real signal
        again = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(ignored)


def whose(path):
    """Who owns the nearest existing folder or file of `path`, as text, if that is another user than this one."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows knows no numbers of users
        while not os.path.lexists(path):
            path = os.path.dirname(path) or "."
        if (owner := os.lstat(path).st_uid) != os.geteuid():
            return f" ({names.printable(path)} belongs to user {owner}, this is user {os.geteuid()})"
    return ""


class ReadOrNot(io.FileIO):
    """A stream that goes on into nothing where its reader has ended, as in `… | head -1`: the work is done."""

    def write(self, data):
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def for_any_text(stream, number):
    """Standard output or error, of the descriptor `number`, so that no name stops a script, nor a reader that ends."""
    if stream is None:  # closed by whoever started this; the next file that is opened must not become it
        return open(os.devnull, "w")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    if type(stream) is not io.TextIOWrapper:  # a kernel's, or a test's
        return stream
    raw = ReadOrNot(number, "w", closefd=False)
    flushed = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    buffer = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **flushed)


def prepare_process():
    """What every script needs of its process: a sentence at its end, a terminal that takes any name, a user's name."""
    # a kernel (Jupyter, Colab, Spyder) shows errors by itself, and its streams take every text; what it starts by `!`
    # inherits the name of its window for pictures, which need not be installed in this environment
    if "ipykernel" not in sys.modules:
        sys.excepthook = end_in_a_sentence
        os.environ["MPLBACKEND"] = "agg"
    if sys.unraisablehook is sys.__unraisablehook__ and hasattr(signal, "pthread_kill"):  # pytest has its own
        sys.unraisablehook = press_again
    sys.stdout, sys.stderr = for_any_text(sys.stdout, 1), for_any_text(sys.stderr, 2)
    # importing torchvision asks for the user's name; in a container (docker --user) a user may be a number only
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


prepare_process()


LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # names of what `written_then_renamed` leaves when it is killed


def has_locks(folder):
    """Whether the file system of a folder has locks; NFS without its lock service and Colab's Drive have none."""
    try:
        import fcntl
    except ImportError:  # Windows always has
        return True
    probe = Path(folder, f".{secrets.randbelow(10**9)}.tmp")
    with open(probe, "w") as file:
        probe.unlink()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else knows this file
        except OSError:
            return False
    return True


@contextlib.contextmanager
def only_writer(path, flag):
    """Hold a lock, which ends with the process, on an output that `flag` names. Exits with code 2 if another has it.

    Where the file system has no locks, a sentence says that nothing watches over it.
    """
    import filelock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not has_locks(path.parent):
        print(f"the file system of {names.printable(path)} has no locks: start no second run that writes it")
        yield
        return
    lock = filelock.FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        refuse(f"another run writes {names.printable(path)}; wait for it, or pass another {flag}")
    try:
        yield
    finally:
        lock.release()


def open_hdf5(path):
    """(an h5py.File open for reading, why nothing tells if another process writes it, "" if something does).

    A drive may have no locks. Raises OSError as h5py does, "unable to lock" in it where another process has the file.
    """
    import h5py

    try:
        return h5py.File(path, "r"), ""
    except OSError as e:
        reason = re.search(r"unable to lock file, errno = (\d+)", str(e))
        if not reason or (because := os.strerror(int(reason[1]))) == os.strerror(errno.EAGAIN):
            raise
    return h5py.File(path, "r", locking=False), because


def new_hdf5(path):
    """A new h5py.File to write that nobody else knows yet: it needs no lock, which a network drive may refuse."""
    import h5py

    return h5py.File(path, "w", locking=False)


@contextlib.contextmanager
def written_then_renamed(path):
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends well, delete it otherwise.

    The folder of `path` is made.
    So `path` is complete or absent at every moment, whatever kills the process. The temporary path ends in `.tmp`,
    so that nothing that looks for videos, tensors or weights meets half of one.
    """
    path = Path(path)
    # not the process's number: on two machines, or in two containers, it may be the same
    # and only the start of a long name: with what is appended, it may be too long
    temporary = path.with_name(f".{path.name[:50]}.{secrets.randbelow(10**9)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small file at once; `path` is complete or absent at every moment."""
    with written_then_renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # names are bytes


def write_csv(path, columns, rows):
    """Write a table at once: its head, then each row, values in the order of `columns` or a dict of them."""
    exact = dict(newline="", encoding="utf-8", errors="surrogateescape")  # names are bytes
    with written_then_renamed(path) as temporary, open(temporary, "w", **exact) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(map(row.get, columns) if isinstance(row, dict) else row for row in rows)


def same_settings(file, settings, cure):
    """Note in `file`, a JSON object, what the files beside it are made with; refuse a folder that holds others.

    settings: {name: plain value}. cure: what to do about others, as the end of a sentence. Of processes that start at
    once the first one's are noted. Exits with code 2 and names each setting that differs, with both values.
    """
    file = Path(file)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_name(f".{secrets.randbelow(10**9)}.tmp")
        own.write_text(json.dumps(settings, indent=2) + "\n")
        try:
            os.link(own, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(own, file)
        own.unlink(missing_ok=True)
    try:
        before = json.loads(file.read_bytes())
        changed = [key for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key)]
    except (ValueError, AttributeError):
        refuse(f"{names.printable(file)} is damaged; {cure}")
    if changed := [f"{key}: {before.get(key)}, now {settings.get(key)}" for key in changed]:
        refuse(f"{names.printable(file.parent)} was made with other settings ({'; '.join(changed)}); {cure}")


def read_text(path):
    """The text of a file in UTF-8, UTF-16 or UTF-32, with a byte-order mark or without, as Windows programs write it.

    Raises ValueError, a clause with the cure, for other bytes; which code page they are of, nothing tells.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        raise ValueError("its text is in none of Unicode's encodings: save it as UTF-8") from None


def read_json(path):
    """The object in a JSON file, a dict; {} if there is none that can be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def class_map_with(labels, only_these=False):
    """The path of a class map that has all labels: class_map.json's, else that of split_videos.py; "" if neither has.

    only_these: it must have no others, and these in the order of its indices.
    """
    labels = [names.composed(label) for label in labels]
    for path in (REPO / "class_map.json", Path("my_class_map.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            known = {names.composed(name): index for name, index in json.loads(read_text(path)).items()}
            if sorted(known, key=known.get) == labels if only_these else set(labels) <= known.keys():
                return path
    return ""


def check_space(folder, needed, advice):
    """Say how many bytes a folder will take; exits with code 2, and the advice, if its disk has less than that free."""
    sizes = needed, shutil.disk_usage(folder).free
    needed, free = (f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB" for n in sizes)
    text = f"at most {needed} are needed in {Path(folder).absolute()}, {free} are free"
    if sizes[0] > sizes[1]:
        refuse(f"{text}: {advice}")
    print(f"space     {text}", flush=True)


def official_classes(number):
    """The classes of class_map.json in index order, if it has as many; else None."""
    class_map = load_class_map(REPO / "class_map.json")
    return sorted(class_map, key=class_map.get) if len(class_map) == number else None


def sha256_of(path):
    """The SHA-256 of a file's content, or of the files of a folder in the order of their names, as 64 hex digits."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def json_hash(value):
    """A hash of a value that JSON can hold, 64 hex digits; of dicts, the order counts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def load_class_map(path):
    """Read {class folder name: index} and check that the indices are 0 … n-1, each once.

    Names are composed (names.composed), as a label has to be that is looked up. Exits with code 2 and one sentence if
    the file is missing, is not such a map, or skips an index.
    """
    try:
        class_map = json.loads(read_text(path))
    except FileNotFoundError:
        refuse(f"there is no class map {path}; it is a JSON object {{class folder name: index}}, as class_map.json")
    except OSError as e:
        refuse(f"cannot read the class map {path}: {e.strerror}")
    except ValueError as e:
        refuse(f"{path} is not JSON ({e}); it must be an object {{class folder name: index}}")
    indices = list(class_map.values()) if isinstance(class_map, dict) else []
    if look_alikes := names.look_alikes(class_map) if indices else []:
        print(f"{names.printable(path)} has classes of almost one name: {names.shortened(look_alikes, 5)}")
    class_map = {names.composed(name): index for name, index in class_map.items()} if indices else {}
    numbers = all(type(i) is int for i in indices) and sorted(indices) == list(range(len(indices)))
    if not numbers or not 0 < len(indices) == len(class_map):
        refuse(f"{path} must map class folder names to the indices 0 … n-1, each index once")
    return class_map


def read_manifest(path):
    """Read the rows of a manifest.jsonl, as preprocess_and_save.py writes it: one JSON object a line.

    Returns a list of dicts with at least `video_path`, `label`, composed (names.composed), and `tensor_path`, relative
    to the manifest's folder.
    Exits with code 2 and one sentence if the file is missing, empty or damaged.
    """
    path, rows = Path(path), []
    if not path.is_file():
        refuse(f"there is no manifest {path}; run tools/preprocess_and_save.py first, or name another with --manifest")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)  # of bytes: text that is not UTF-8 is a ValueError, too
                kept = {key: row[key] for key in ("video_path", "tensor_path")}
                rows.append(row | kept | {"label": names.composed(row["label"])})
            except (ValueError, KeyError, TypeError) as e:
                refuse(f"{path}, line {number}, is no manifest row ({e!r}); run tools/preprocess_and_save.py again")
    if not rows:
        refuse(f"the manifest {path} is empty; run tools/preprocess_and_save.py first")
    return rows
