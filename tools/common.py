"""What all scripts share, those of references/video_classification too: no constant that a user edits.

Every script starts with `import common`, which also makes `torchvision_patches` importable, and says what to do where a
package is not installed. It imports nothing but the standard library, so that `--help` is fast and quickstart.py runs
before anything is installed.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
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


def shortened(names, most=20):
    """The first names of many, as text: "a, b, … and 1,234 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … and {len(names) - most:,} more" if len(names) > most else "")


# --- constants and flags -----------------------------------------------------------------------------------------


def constants_of(source):
    """The constants of a script: the assignments between its first two ruled lines (`# ----…`).

    Returns {name: comment on its line}. Constants of several lines carry their comment on the first.
    """
    lines = source.splitlines()
    rules = [i for i, line in enumerate(lines, 1) if line.startswith("# -----")]
    comments = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and rules[0] < node.lineno < rules[1]:
            # `T, H, W = …` is one assignment of several names
            names = [part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)]
            comments |= dict.fromkeys(names, lines[node.lineno - 1].rpartition("  # ")[2].strip())
    return comments


def boolean(text):
    """`true` or `false`, in any case, as a bool. Raises ValueError for anything else."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def set_constants_from_flags(script, argv=None, words=None):
    """Let flags replace the constants of a script for one run.

    `script` is the script's `globals()`. The constant `CLIP_LEN` becomes the flag `--clip-len` (`--clip_len` works
    too); a list takes several values; a boolean takes `true` or `false`, and the bare flag means true; `skip_x` can
    also be turned off with `--do-x`. `words` names the list whose values may stand without a flag, as file names do.
    `--run NAME` moves constants that no flag sets as `in_run` says; a script that has none to move does not take it.
    `--help` shows each constant's value and the comment on its line. An unknown flag or a bad value exits with code 2.
    """
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    summary = script["__doc__"].strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    argv, booleans = list(sys.argv[1:] if argv is None else argv), set()
    constants = constants_of(source)
    moved = [name for name in constants if in_run(RUNS, script[name]) != script[name]]
    if moved:
        text = f"move into {RUNS}/NAME what of these no flag sets: {', '.join(moved)}"
        parser.add_argument("--run", type=run_folder, metavar="NAME", help=text)
    for name, comment in constants.items():
        value = script[name]
        options = dict(dest=name, default=argparse.SUPPRESS, metavar=name.upper())
        options["help"] = f"{comment} (now: {value!r})".replace("%", "%%")
        if isinstance(value, bool):
            options.update(type=boolean, nargs="?", const=True, metavar="true|false")
        elif isinstance(value, (list, tuple)):
            options.update(nargs="*", type=type(value[0]) if value else str)
        else:
            options["type"] = type(value)
        flag = "--" + name.lower()
        if name == words:
            parser.add_argument(name, nargs="*", default=value, metavar=name.upper(), help=options["help"])
            continue
        flags = dict.fromkeys([flag.replace("_", "-"), flag])
        booleans |= flags.keys() if isinstance(value, bool) else set()
        parser.add_argument(*flags, **options)
        if flag.startswith("--skip_"):
            opposite = dict(dest=name, action="store_false", default=argparse.SUPPRESS)
            parser.add_argument(flag.replace("--skip_", "--do-"), **opposite)
    if words:  # in `--timeline squats.mp4` the word is no value of the flag
        bare = [not re.fullmatch("true|false|-.*", after.lower()) for after in [*argv[1:], "-"]]
        argv = [w for part, alone in zip(argv, bare) for w in (part, "true")[: 1 + (alone and part in booleans)]]
    given = vars(parser.parse_intermixed_args(argv))
    if folder := given.pop("run", None):
        script.update({name: in_run(folder, script[name]) for name in moved})
    script.update(given)


# --- runs --------------------------------------------------------------------------------------------------------


RUNS = "runs"  # folder of the runs that have a name
RUN_NAME = re.compile(r"\w[\w.+-]*")
# what a run writes and its later steps read: where scripts are started or, with --run NAME, in runs/NAME
OF_A_RUN = {"checkpoint.pth", "soup.pth", "preprocessed_tensors", "calibration_tensors", "export_assets"}
OF_A_RUN |= {"dataset-export.h5", "dataset-export-htp.h5", "report", "predictions", "recordings"}


def run_folder(name):
    """The folder of the run NAME; exits with code 2 and one sentence if that cannot be the name of a folder."""
    if not RUN_NAME.fullmatch(name):
        refuse(f"--run is {name!r}: a name of letters, digits, _ . + - is needed, which becomes the folder {RUNS}/NAME")
    return f"{RUNS}/{name}"


def in_run(folder, value):
    """A constant's default value, moved into a run's folder if it is, or lies in, something that a run writes."""
    if isinstance(value, list):
        return [in_run(folder, part) for part in value]
    of_a_run = isinstance(value, str) and value.removeprefix("./").split("/")[0] in OF_A_RUN
    return str(Path(folder, value)) if of_a_run else value


LOCAL_HUB = "python tools/local_hub.py "  # before a command that needs AI Hub


def next_command(script, written, **constants):
    """The command of the next step, `python tools/SCRIPT`, with flags for those constants that it has otherwise.

    written: a path that this step wrote; if it lies in a run's folder, that run goes on.
    """
    parts = Path(written).parts
    in_one = len(parts) > 2 and parts[0] == RUNS and RUN_NAME.fullmatch(parts[1])
    folder, run = (Path(*parts[:2]), ["--run", parts[1]]) if in_one else (Path(), [])
    words = ["python", f"tools/{script}", *run]
    nodes = ast.parse((REPO / "tools" / script).read_text(encoding="utf-8")).body
    nodes = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    defaults = {getattr(node.targets[0], "id", ""): node.value.value for node in nodes}
    for name, value in constants.items():
        default = in_run(folder, defaults.get(name, ""))
        if (Path(value) != Path(default)) if isinstance(default, str) else (value != default):
            words += ["--" + name.lower().replace("_", "-"), f"{value:g}" if isinstance(value, float) else str(value)]
    account = Path(os.environ.get("QAIHUB_CLIENT_INI", "~/.qai_hub/client.ini")).expanduser().exists()
    hub = "" if account or script not in ("example_export.py", "run_inference.py") else LOCAL_HUB
    return hub + shlex.join(words)


# --- files -------------------------------------------------------------------------------------------------------


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


def class_map_with(labels, only_these=False):
    """The class map that has all labels, or exactly these in order: class_map.json, split_videos.py's, or ""."""
    labels = list(labels)
    for path in (REPO / "class_map.json", Path("my_class_map.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            known = json.loads(path.read_text(encoding="utf-8"))
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
        class_map = json.loads(Path(path).read_text(encoding="utf-8"))
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


def load_checkpoint(path, where_else="name one that train.py wrote"):
    """Read a checkpoint of train.py, of the original sample solution, or bare weights. Nothing in it is executed.

    Returns what it holds, on the CPU, with the weights under `model` and `args` as a dict. Exits with code 2 and one
    sentence if the file is missing (`where_else` says what to do then), damaged, no checkpoint, or holds more than
    weights, plain values and the original's argparse.Namespace.
    """
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        refuse(f"there is no checkpoint {path} (looked in {Path(path).absolute()}); {where_else}")
    except pickle.UnpicklingError as e:
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        if not foreign:
            refuse(f"{path} is damaged, or no checkpoint of torch")
        clean = f"c = torch.load({str(path)!r}, weights_only=False); torch.save({{'model': c['model']}}, 'clean.pth')"
        refuse(
            f"{path} holds a {foreign[1]} beside weights and plain values and is not loaded, because such a file could "
            f'run code; if you made it, save plain values (float(x), str(path)), or: python -c "import torch; {clean}"'
        )
    except (RuntimeError, EOFError, ValueError, OSError) as e:
        refuse(f"the checkpoint {path} cannot be read ({str(e).splitlines()[0]})")
    if isinstance(checkpoint, dict) and checkpoint and all(map(torch.is_tensor, checkpoint.values())):
        checkpoint = {"model": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        refuse(f'{path} is no checkpoint of train.py: it has no weights under "model"')
    args = checkpoint.get("args") or {}
    return checkpoint | {"args": args if isinstance(args, dict) else vars(args)}


# --- folders of videos -------------------------------------------------------------------------------------------


VIDEO_ENDINGS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"}  # what every step takes for a video, in any case
# folders of an unpacked archive, a network drive or a file manager, none of them a class; hidden ones count, too
JUNK = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


class Found(NamedTuple):
    """What `find_videos` found: paths relative to the folder, with "/", sorted."""

    videos: list  # of paths <class>/<video>, of regular files
    misplaced: list  # of paths of videos at another depth: they have no class
    failures: dict  # {path: why it cannot be read} of links to nothing, pipes, sockets, devices, locked folders
    other_endings: Counter  # {ending in lower case, "" for none: number of files}


def class_folders(root):
    """The sorted names of the folders in `root` that stand for classes: not hidden, no junk, links to folders too."""
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not (e.name.startswith(".") or e.name in JUNK))


def find_videos(root, endings=VIDEO_ENDINGS):
    """Walk the folder `root`, links to folders included, each folder once; hidden files and folders and junk are left.

    check_videos.py, training and preprocessing all find their videos by this walk. No file is opened, so that a pipe
    or a stalled drive under a video's name stops nothing. Returns Found; a `root` that cannot be read is a failure ".".
    """
    found, folders, links, visited = Found([], [], {}, Counter()), [""], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder goes by its own name if it has one
        place = os.path.realpath(os.path.join(root, folder))
        if place in visited:
            continue
        visited.add(place)
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as e:
            found.failures[folder or "."] = f"this folder cannot be read: {e.strerror}"
            continue
        for entry in entries:
            path, linked = f"{folder}/{entry.name}".lstrip("/"), entry.is_symlink()
            if entry.name.startswith(".") or entry.name in JUNK:
                continue
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                (links if linked else folders).append(path)
            elif (ending := os.path.splitext(entry.name)[1].lower()) not in endings:
                found.other_endings[ending] += 1
            elif os.path.isfile(entry.path) if linked else entry.is_file():
                (found.videos if path.count("/") == 1 else found.misplaced).append(path)
            else:
                to_nothing = linked and not os.path.exists(entry.path)
                found.failures[path] = "it is a link to nothing" if to_nothing else "it is a pipe, a socket or a device"
    found.videos.sort()
    found.misplaced.sort()
    return found


# --- several processes -------------------------------------------------------------------------------------------


class Launcher(NamedTuple):
    """This process among those that one launcher started; items `sorted_items[rank::world_size]` are its share."""

    rank: int  # 0 … world_size - 1
    world_size: int
    local_rank: int  # among the processes of this machine
    local_world_size: int  # processes on this machine


def launcher(environ=os.environ, array=True):
    """Read from the environment who started this process: Launcher(0, 1, 0, 1) where it stands alone.

    `torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; `srun` sets SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID and SLURM_TASKS_PER_NODE; a SLURM array sets SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT, and each of
    its tasks may hold an `srun` of its own. `array=False` takes each task of an array for a run by itself, as training
    does. Exits with code 2 and one sentence where the variables contradict one another.
    """

    def number(name, default=None):
        value = environ.get(name, default)
        try:
            return int(value)
        except (TypeError, ValueError):
            refuse(f"{name} is {value!r} in the environment, a number is needed; torchrun and srun set it")

    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank, world_size = number("RANK"), number("WORLD_SIZE")
        local_world_size = number("LOCAL_WORLD_SIZE", world_size)
        local_rank = number("LOCAL_RANK", rank % local_world_size)
    else:
        rank, world_size = number("SLURM_PROCID", 0), 1
        if "SLURM_PROCID" in environ:
            world_size = number("SLURM_NTASKS", 1)
        # "8(x2),4" says: 8 processes on each of two machines, 4 on the third; machines are mostly filled alike
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
        most = max(map(int, re.findall(r"(?:^|,)(\d+)", per_node)), default=1)
        local_rank, local_world_size = number("SLURM_LOCALID", rank), min(world_size, most)
        if array and "SLURM_ARRAY_TASK_COUNT" in environ:
            count = number("SLURM_ARRAY_TASK_COUNT")
            step = number("SLURM_ARRAY_TASK_STEP", 1)
            task = (number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN", 0)) // step
            if task >= count:
                refuse(f"task {task} of the SLURM array has no share: use a range, as --array 0-{count - 1}")
            rank, world_size = task * world_size + rank, count * world_size
    if not 0 <= rank < world_size:
        refuse(f"the launcher says that this is process {rank} of {world_size}; numbers go from 0 to {world_size - 1}")
    return Launcher(rank, world_size, local_rank, local_world_size)


def num_cores():
    """CPU cores that this process may use: by its affinity and by the quota of its cgroup (containers, SLURM)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_quota())))


def cgroup_quota(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """CPU cores by the quotas of this process's cgroup and those above it, version 2 or 1; infinite without one."""
    quota = math.inf
    with contextlib.suppress(OSError, ValueError):  # no Linux, or no cgroups
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            base = root / ("cpu" if controllers else "")
            for folder in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
                if not folder.is_relative_to(base):
                    break
                with contextlib.suppress(OSError, ValueError):
                    if controllers:
                        most, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                    else:
                        most, period = (folder / "cpu.max").read_text().split()
                    if float(most) > 0:  # "max" is a ValueError; version 1 says -1
                        quota = min(quota, float(most) / float(period))
    return quota


def num_workers(wanted=0):
    """How many worker processes to start: `wanted`, or for 0 this process's part of the cores of its machine."""
    return wanted or max(1, num_cores() // launcher().local_world_size)


# --- the environment of quickstart.py and tests/run.py --------------------------------------------------------------


def make_environment(*requirement_files):
    """Create `.venv` beside the README with what the requirement files name; returns the path of its Python.

    Runs on any Python 3.10 to 3.13 with nothing installed. Done once: a stamp remembers the files' content. Exits
    with code 2 and one sentence if this Python is too old or new, has no venv module, or pip cannot install.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        refuse(f"Python 3.10 to 3.13 is needed (qai_hub_models 0.65), this is {sys.version.split()[0]}")
    home = REPO / ".venv"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(b"".join(Path(f).read_bytes() for f in requirement_files)).hexdigest()
    stamp = home / f"installed-{wanted[:16]}"
    if stamp.exists():
        return python
    # pip comes last: without it, making the environment was interrupted
    if not python.exists() or subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode:
        print(f"creating {home.relative_to(REPO)} …", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)]).returncode:
            refuse("this Python cannot create environments; on Debian or Ubuntu: apt install python3-venv")
    print("installing packages (some 6 GB with the CUDA build of torch; 2 to 10 minutes) …", flush=True)
    requirements = [part for file in requirement_files for part in ("-r", str(file))]
    if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements]).returncode:
        refuse("pip could not install requirements.txt; its message stands above")
    stamp.touch()
    return python
