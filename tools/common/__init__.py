"""What all scripts share, those of references/video_classification too: refusing, files, class maps.

Every script starts with `import common`, which also makes `torchvision_patches` importable, and says what to do where a
package is not installed. It imports nothing but the standard library, so that `--help` is fast and quickstart.py runs
before anything is installed. No constant that a user edits.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# `python tools/<script>.py` puts only tools/ on the path; appended, so that nothing here can shadow a package.
sys.path.append(str(REPO))


def refuse(message):
    """Print one sentence that says what is wrong, where and what to do; exit with code 2 (usage or configuration)."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def say_what_is_not_installed(kind, error, traceback):
    """Stands in for sys.excepthook: a script that is run outside of its environment ends with one sentence."""
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, traceback)
    refuse(
        f"{error.name} is not installed for {sys.executable}; `source .venv/bin/activate` where tools/quickstart.py or "
        f"tests/run.py has made .venv, otherwise `pip install -r requirements.txt` (README, section 0)"
    )


sys.excepthook = say_what_is_not_installed


LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # names of what `written_then_renamed` leaves when it is killed


@contextlib.contextmanager
def only_writer(path, flag):
    """Hold a lock, which ends with the process, on an output that `flag` names. Exits with code 2 if another has it."""
    import filelock

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        refuse(f"another run writes {path}; wait for it, or pass another {flag}")
    except NotImplementedError:  # some network file systems
        print(f"the file system of {path} has no locks: start no second run that writes it")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def written_then_renamed(path):
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends well, delete it otherwise.

    So `path` is complete or absent at every moment, whatever kills the process. The temporary path ends in `.tmp`,
    so that nothing that looks for videos, tensors or weights meets half of one.
    """
    path = Path(path)
    # not the process's number: on two machines, or in two containers, it may be the same
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**9)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small file at once; `path` is complete or absent at every moment."""
    with written_then_renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 as Windows programs write it, without its byte-order mark."""
    data = Path(path).read_bytes()
    return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")


def class_map_with(labels, only_these=False):
    """The class map that has all labels, or exactly these in order: class_map.json, split_videos.py's, or ""."""
    labels = list(labels)
    for path in (REPO / "class_map.json", Path("my_class_map.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            known = json.loads(read_text(path))
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


def sha256_of(path):
    """The SHA-256 of a file's content, or of the files of a folder in the order of their names, as 64 hex digits."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def load_class_map(path):
    """Read {class folder name: index} and check that the indices are 0 … n-1, each once.

    Exits with code 2 and one sentence if the file is missing, is not such a map, or skips an index.
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
    if not indices or any(type(i) is not int for i in indices) or sorted(indices) != list(range(len(indices))):
        refuse(f"{path} must map class folder names to the indices 0 … n-1, each index once")
    return class_map


def read_manifest(path):
    """Read the rows of a manifest.jsonl, as preprocess_and_save.py writes it: one JSON object a line.

    Returns a list of dicts with at least `video_path`, `label` and `tensor_path` (relative to the manifest's folder).
    Exits with code 2 and one sentence if the file is missing, empty or damaged.
    """
    path, rows = Path(path), []
    if not path.is_file():
        refuse(f"there is no manifest {path}; run tools/preprocess_and_save.py first, or name another with --manifest")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)  # of bytes: text that is not UTF-8 is a ValueError, too
                rows.append(row | {key: row[key] for key in ("video_path", "label", "tensor_path")})
            except (ValueError, KeyError, TypeError) as e:
                refuse(f"{path}, line {number}, is no manifest row ({e!r}); run tools/preprocess_and_save.py again")
    if not rows:
        refuse(f"the manifest {path} is empty; run tools/preprocess_and_save.py first")
    return rows
