"""Fixtures of all tests: scripts are run as a user runs them, from a folder of the test's own."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# started in the background of a shell, Python and all that it starts would ignore Ctrl-C, which some tests press
signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # as many tests run at once as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests import the project's modules by the names that its scripts use
sys.path[:0] = [str(REPO), str(REPO / "tools"), str(REPO / "tests")]

import common  # noqa: E402, I001
import warm_python  # noqa: E402
from odd_videos import sources, zoo  # noqa: E402, F401  (fixtures of several rooms)

if not common.has_locks(tempfile.gettempdir()):
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"  # tests use the client here, as scripts do in processes of their own
os.environ["QAIHUB_CLIENT_INI"] = "no.ini"  # no test may reach the account of whoever runs them


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: the main path of a part, for `tests/run.py --quick`")
    config.addinivalue_line("markers", "slow: a file of a minute and more")


def pytest_collection_modifyitems(items):
    # slow files first, so that no process is left alone with one at the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """End with what was skipped, why, and the command that would run it: a reason ends in its cure after a colon."""
    skipped = {}
    for report in terminalreporter.stats.get("skipped", []):
        skipped.setdefault(report.longrepr[2].removeprefix("Skipped: "), []).append(report.nodeid.split("::")[0])
    for reason, files in skipped.items():
        number = f"{len(files)} test{'s' * (len(files) > 1)}"
        again = " ".join(sorted(set(files)))
        terminalreporter.write_line(f"skipped, {number}: {reason}; then: python3 tests/run.py {again}")


WITHOUT_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("ERRNO")); return -1; }
"""


def makes_links(folder):
    """Whether the file system of a folder makes both kinds of links."""
    try:
        Path(folder, "soft").symlink_to("nowhere")
        os.link(Path(folder, "soft"), Path(folder, "hard"), follow_symlinks=False)
        return True
    except OSError:
        return False


with tempfile.TemporaryDirectory() as tried:
    NO_LINKS = "" if makes_links(tried) else "the file system makes no links: set TMPDIR to one that does"


class NoLinkError(OSError, pytest.skip.Exception):
    """What a test that makes a link ends with there: it is skipped; pytest, which makes some as well, goes on."""

    def __init__(self):
        OSError.__init__(self, errno.EOPNOTSUPP, NO_LINKS)
        pytest.skip.Exception.__init__(self, NO_LINKS)


def make_no_link(*_, **__):
    raise NoLinkError


if NO_LINKS:
    os.symlink = os.link = make_no_link


@pytest.fixture
def without_locks(tmp_path):
    """without_locks(37) -> variables for a process to which every file system answers a lock with this errno."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc, to make a drive without locks: apt install gcc")
    (tmp_path / "locks.c").write_text(WITHOUT_LOCKS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "locks.so", "locks.c"], cwd=tmp_path, check=True)
    return lambda number: {"LD_PRELOAD": str(tmp_path / "locks.so"), "ERRNO": str(number)}


@pytest.fixture
def run_script(tmp_path, tmp_path_factory):
    """run_script("tools/evaluate.py", "--h5", path, …) -> CompletedProcess with text output, run in `tmp_path`.

    Fails the test, showing the script's output, unless the exit code is `code`. The first run of a script of tools/ is
    a process of its own; others are forks of one that has imported torch, where that makes no difference.
    """
    own = tmp_path_factory.getbasetemp()
    of_all = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def is_first(script):
        try:
            (of_all / f"ran {Path(script).name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def run(script, *arguments, code=0, cwd=tmp_path, timeout=600, **environment):
        command = [sys.executable, str(REPO / script), *map(str, arguments)]
        fresh = any(key.startswith(("PYTHON", "OMP", "LD_")) for key in environment)
        fresh = fresh or ("tools" in Path(script).parts and is_first(script))
        environment = os.environ | {key: str(value) for key, value in environment.items()}
        if fresh:
            result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        else:
            (result,) = warm_python.run(REPO / script, arguments, [environment], cwd)
        shown = f"$ {' '.join(command)}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == code, f"exit code {result.returncode} instead of {code}\n{shown}"
        return result

    return run
