"""What three or more tools share: definitions only, no constant that a user edits, standard library only.

Every tool starts with `import common`, which also makes `torchvision_patches` importable.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# `python tools/<script>.py` puts only tools/ on the path; appended, so that nothing here can shadow a package.
sys.path.append(str(REPO))


def refuse(message):
    """Print one sentence that says what is wrong, where and what to do; exit with code 2 (usage or configuration)."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- constants and flags -----------------------------------------------------------------------------------------


def constants_of(source):
    """The constants of a script: the single-name assignments between its first two ruled lines (`# ----…`).

    Returns {name: comment on its line}. Constants of several lines carry their comment on the first.
    """
    lines = source.splitlines()
    rules = [i for i, line in enumerate(lines, 1) if line.startswith("# -----")]
    comments = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and rules[0] < node.lineno < rules[1] and isinstance(node.targets[0], ast.Name):
            comments[node.targets[0].id] = lines[node.lineno - 1].rpartition("  # ")[2].strip()
    return comments


def boolean(text):
    """`true` or `false`, in any case, as a bool. Raises ValueError for anything else."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def set_constants_from_flags(script, argv=None):
    """Let flags replace the constants of a script for one run.

    `script` is the script's `globals()`. The constant `CLIP_LEN` becomes the flag `--clip-len` (`--clip_len` works
    too); a list takes several values; a boolean takes `true` or `false`, and the bare flag means true. `--help`
    shows each constant's value and the comment on its line. An unknown flag or a bad value exits with code 2.
    """
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    summary = script["__doc__"].strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in constants_of(source).items():
        value = script[name]
        options = dict(dest=name, default=value, metavar=name.upper())
        options["help"] = f"{comment} (now: {value!r})".replace("%", "%%")
        if isinstance(value, bool):
            options.update(type=boolean, nargs="?", const=True, metavar="true|false")
        elif isinstance(value, (list, tuple)):
            options.update(nargs="*", type=type(value[0]) if value else str)
        else:
            options["type"] = type(value)
        flag = "--" + name.lower()
        parser.add_argument(*dict.fromkeys([flag.replace("_", "-"), flag]), **options)
    script.update(vars(parser.parse_args(argv)))


# --- files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_then_renamed(path):
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends well, delete it otherwise.

    So `path` is complete or absent at every moment, whatever kills the process.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_class_map(path):
    """Read {class folder name: index} and check that the indices are 0 … n-1, each once.

    Exits with code 2 and one sentence if the file is missing, is not such a map, or skips an index.
    """
    try:
        class_map = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(f"there is no class map {path}; it is a JSON object {{class folder name: index}}, as class_map.json")
    except ValueError as e:
        refuse(f"{path} is not JSON ({e}); it must be an object {{class folder name: index}}")
    if not isinstance(class_map, dict) or sorted(map(str, class_map.values())) != sorted(map(str, range(len(class_map)))):
        refuse(f"{path} must map class folder names to the indices 0 … n-1, each index once")
    return class_map


def read_manifest(path):
    """Read the rows of a manifest.jsonl, as preprocess_and_save.py writes it: one JSON object a line.

    Returns a list of dicts with at least `video_path`, `label` and `tensor_path` (relative to the manifest's folder).
    Exits with code 2 and one sentence if the file is missing, empty or damaged.
    """
    path, rows = Path(path), []
    if not path.is_file():
        refuse(f"there is no manifest {path}; run tools/preprocess_and_save.py first, it writes one into OUT_ROOT")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append(row | {key: row[key] for key in ("video_path", "label", "tensor_path")})
            except (ValueError, KeyError, TypeError) as e:
                refuse(f"{path}, line {number}, is no manifest row ({e!r}); run tools/preprocess_and_save.py again")
    if not rows:
        refuse(f"the manifest {path} is empty; run tools/preprocess_and_save.py first")
    return rows


# --- several processes -------------------------------------------------------------------------------------------


def rank_and_world_size(environ=os.environ):
    """This process's share of the work, as its launcher says: (rank, world size); (0, 1) without a launcher.

    `torchrun` sets RANK and WORLD_SIZE; a SLURM array sets SLURM_ARRAY_TASK_ID, _MIN and _COUNT. Items
    `sorted_items[rank::world_size]` are this process's.
    """
    if "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_COUNT" in environ:
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
        return int(environ["SLURM_ARRAY_TASK_ID"]) - first, int(environ["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1


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
    if not python.exists():
        print(f"creating {home.relative_to(REPO)} …", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)]).returncode:
            refuse("this Python cannot create environments; on Debian or Ubuntu: apt install python3-venv")
    print("installing packages (some 6 GB with the CUDA build of torch; 2 to 10 minutes) …", flush=True)
    requirements = [part for file in requirement_files for part in ("-r", str(file))]
    if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements]).returncode:
        refuse("pip could not install requirements.txt; its message stands above")
    stamp.touch()
    return python
