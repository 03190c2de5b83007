"""Set up `.venv` beside the README, then check the code style and run all tests: the project's one test command.

    $ python3 tests/run.py            # everything
    $ python3 tests/run.py -k clips   # arguments go to pytest
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
sys.path.append(str(REPO / "tools"))

from common import make_environment  # noqa: E402 (tools/ has to be on the path first)

python = make_environment(REPO / "requirements.txt", TESTS / "requirements.txt")
style = subprocess.run([python, "-m", "ruff", "check", REPO])
tests = subprocess.run([python, "-m", "pytest", TESTS, "--durations=10", *sys.argv[1:]], cwd=REPO)
sys.exit(style.returncode or tests.returncode)
