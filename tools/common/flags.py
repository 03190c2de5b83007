"""Constants of a script as flags, the runs that have a name, and the command of the next step."""

import argparse
import ast
import math
import os
import re
import shlex
import sys
from pathlib import Path

from common import refuse


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


def number(text):
    """A number as text, as an int where it is whole, else as a float. Raises ValueError for anything else."""
    value = float(text)
    return int(value) if value.is_integer() else value


def set_constants_from_flags(script, argv=None, words=None):
    """Let flags replace the constants of a script for one run.

    `script` is the script's `globals()`. The constant `CLIP_LEN` becomes the flag `--clip-len` (`--clip_len` works
    too); a list takes several values; a boolean, or None for one that a file tells, takes `true` or `false`, and the
    bare flag means true; a rate may have decimals; `skip_x` can also be turned off with `--do-x`. `words` names the
    list whose values may stand without a flag, as file names do; what stands behind `--` belongs to it as it is.
    `--run NAME` moves constants that no flag sets as `in_run` says, and those of WRITTEN whatever sets them, so that a
    run's later steps find them; a script that has none to move does not take it.
    `--help` shows each constant's value and the comment on its line. An unknown flag or a bad value exits with code 2.
    Returns the names of the constants that a flag set.
    """
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    summary = ast.get_docstring(ast.parse(source)).splitlines()[0]  # python -OO keeps no __doc__
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
        is_boolean = value is None or isinstance(value, bool)
        if is_boolean:
            options.update(type=boolean, nargs="?", const=True, metavar="true|false")
        elif isinstance(value, (list, tuple)):
            options.update(nargs="*", type=type(value[0]) if value else str)
        else:
            options["type"] = number if name.upper().endswith("_RATE") else type(value)
        flag = "--" + name.lower()
        if name == words:
            parser.add_argument(name, nargs="*", default=value, metavar=name.upper(), help=options["help"])
            continue
        flags = dict.fromkeys([flag.replace("_", "-"), flag])
        booleans |= flags.keys() if is_boolean else set()
        parser.add_argument(*flags, **options)
        if flag.startswith("--skip_"):
            opposite = dict(dest=name, action="store_false", default=argparse.SUPPRESS)
            parser.add_argument(flag.replace("--skip_", "--do-"), **opposite)
    as_they_are = []
    if words and "--" in argv:
        as_they_are, argv = argv[argv.index("--") + 1 :], argv[: argv.index("--")]
    if words:  # in `--timeline squats.mp4` the word is no value of the flag
        bare = [not re.fullmatch("true|false|-.*", after.lower()) for after in [*argv[1:], "-"]]
        argv = [w for part, alone in zip(argv, bare) for w in (part, "true")[: 1 + (alone and part in booleans)]]
    given = vars(parser.parse_intermixed_args(argv))
    if as_they_are:
        given[words] = [*given[words], *as_they_are]
    global named_run
    named_run = given.pop("run", None) or ""
    if named_run:
        script.update({name: in_run(named_run, script[name]) for name in moved})
        written = [name for name in given if name.upper().startswith(WRITTEN)]
        given |= {name: in_run(named_run, given[name]) for name in written}
    script.update(given)
    check_numbers(script, constants)
    return set(given)


def check_numbers(script, constants):
    """Exit with code 2 if one of these holds a number below 0, infinite or NaN: no constant has a use for one."""
    for name in constants:
        values = script[name] if isinstance(script[name], (list, tuple)) else [script[name]]
        if any(isinstance(value, (int, float)) and not 0 <= value < math.inf for value in values):
            refuse(f"{name} is {script[name]}: it must be a number from 0 on")


RUNS = "runs"  # folder of the runs that have a name
RUN_NAME = re.compile(r"\w[\w.+-]*")
# what a run writes and its later steps read: where scripts are started or, with --run NAME, in runs/NAME
OF_A_RUN = {"checkpoint.pth", "soup.pth", "preprocessed_tensors", "calibration_tensors", "export_assets"}
OF_A_RUN |= {"dataset-export.h5", "dataset-export-htp.h5", "report", "predictions", "recordings"}
WRITTEN = "OUT", "REPORT_DIR", "RECORDINGS"  # how the names of constants begin that say where a script writes
named_run = ""  # the folder of the run that --run named for this script, "" for none


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


def next_command(script, *of_run, **constants):
    """The command of the next step, `python tools/SCRIPT`, with a flag for each of these constants.

    script: its name, with the words that stand before its flags.
    of_run: paths that this step wrote or read; the run of the first that lies in a run's folder goes on, else the one
    that --run named.
    """
    parts = [Path(path).parts for path in of_run]
    runs = [p[1] for p in parts if len(p) > 2 and p[0] == RUNS and RUN_NAME.fullmatch(p[1])]
    run = runs[0] if runs else Path(named_run).name
    words = ["python", *f"tools/{script}".split(), *(["--run", run] if run else [])]
    for name, value in constants.items():
        words += ["--" + name.lower().replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    account = Path(os.environ.get("QAIHUB_CLIENT_INI", "~/.qai_hub/client.ini")).expanduser().exists()
    hub = "" if account or script not in ("example_export.py", "run_inference.py") else LOCAL_HUB
    return hub + shlex.join(words)
