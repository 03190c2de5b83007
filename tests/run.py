"""Set up `.venv` beside the README, then check the code style and run all tests: the project's one test command.

    $ python3 tests/run.py            # everything
    $ python3 tests/run.py --quick    # the main path of each part, for the loop while developing: two minutes
    $ python3 tests/run.py -k clips   # arguments go to pytest
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
sys.path.append(str(REPO / "tools"))

from common.environment import make_environment  # noqa: E402 (tools/ has to be on the path first)
from common.machine import num_cores  # noqa: E402

python = make_environment(REPO / "requirements.txt", TESTS / "requirements.txt")
arguments = [*sys.argv[1:]]
if "--quick" in arguments:
    arguments[arguments.index("--quick")] = "-mquick"
chosen = [] if any(word.split("::")[0].endswith(".py") for word in arguments) else [TESTS]
style = subprocess.run([python, "-m", "ruff", "check", REPO])
# a file's tests share what it made; one process more than cores, since many tests wait
shared = ["-n", str(min(4, num_cores() + 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
tests = subprocess.run([python, "-m", "pytest", *chosen, *shared, "--durations=10", *arguments], cwd=REPO)
sys.exit(style.returncode or tests.returncode)
