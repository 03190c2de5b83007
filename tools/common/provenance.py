"""Which code made a file: the project's commit, and whether the files were as it has them."""

import subprocess

from common import REPO


def git_state():
    """{"commit": 40 hex digits, "clean": bool} of the project's folder; {} without git, or outside of a repository.

    Files that git does not know change nothing.
    """

    def said(*words):
        return subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": said("rev-parse", "HEAD").strip(), "clean": not said("status", "--porcelain", "-uno").strip()}
    except (OSError, subprocess.CalledProcessError):
        return {}
