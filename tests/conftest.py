"""Fixtures of all tests: scripts are run as a user runs them, from a folder of the test's own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# started in the background of a shell, Python and all that it starts would ignore Ctrl-C, which some tests press
signal.signal(signal.SIGINT, signal.default_int_handler)
# the tests import the project's modules by the names that its scripts use
sys.path[:0] = [str(REPO), str(REPO / "tools"), str(REPO / "tests")]

from odd_videos import sources, zoo  # noqa: E402, F401  (fixtures of several rooms)


@pytest.fixture
def run_script(tmp_path):
    """run_script("tools/evaluate.py", "--h5", path, …) -> CompletedProcess with text output, run in `tmp_path`.

    Fails the test, showing the script's output, unless the exit code is `code`.
    """

    def run(script, *arguments, code=0, cwd=tmp_path, timeout=600, **environment):
        command = [sys.executable, str(REPO / script), *map(str, arguments)]
        environment = os.environ | {key: str(value) for key, value in environment.items()}
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        shown = f"$ {' '.join(command)}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == code, f"exit code {result.returncode} instead of {code}\n{shown}"
        return result

    return run
