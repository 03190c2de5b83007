"""A journal of work that processes share: what each writes as it finishes videos, until one of them merges it all.

check_videos.py and preprocess_and_save.py keep theirs in a folder beside what they write in the end. A process appends
one JSON line a finished video to a file of its own there. Whether all is done is told by the videos that have rows,
not by counting processes, so that a run may be killed, started again and split otherwise at any moment. Whichever
process ends last finds nothing missing; it writes the result, then deletes what it has merged.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from pathlib import Path

from common import json_lines, machine

LAUNCH_IDS = "TORCHELASTIC_RUN_ID", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"  # what tells one launch from the next


class Journal:
    """The rows, as dicts, of all processes that work on one result; `mine` are those of this process's videos."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.rank, self.world_size, *_ = machine.launcher()
        launch = next((os.environ[name] for name in LAUNCH_IDS if os.environ.get(name)), "")
        self.launch = f"launch-{re.sub(r'[^A-Za-z0-9]', '-', launch)}-of-{self.world_size}."
        self.me = f"{self.launch}{self.rank}."
        self.file = self.folder / f"{self.me}{secrets.randbelow(10**9)}.jsonl"
        self.merged = {}  # {file: bytes of it that `rows` has read}

    def is_mine(self, name):
        """Whether the video of this name, a path relative to the dataset, is in this process's share of the work.

        Told by a hash of the name, not by its place in a sorted list: files may come and go while processes start.
        """
        return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % self.world_size == self.rank

    def append(self, row):
        """Write a row; it is the system's when this returns. Opened anew: another process may have merged the file."""
        json_lines.append_row(self.file, row)

    def rows(self):
        """Yield (row, whether it is of this launch, mtime of its file in ns); remember for `clear` what was read."""
        self.merged = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            # Launches without an id cannot be told apart: files of other shares count as this launch's. This process's
            # share has one file of this launch, its own; others of the same share are of earlier launches.
            current = file == self.file or file.name.startswith(self.launch) and not file.name.startswith(self.me)
            with contextlib.suppress(FileNotFoundError), open(file, "rb") as lines:  # another process has merged it
                mtime = os.fstat(lines.fileno()).st_mtime_ns
                for line in lines:
                    self.merged[file] = self.merged.get(file, 0) + len(line)
                    with contextlib.suppress(ValueError):  # the line that a kill cut off
                        yield json.loads(line), current, mtime

    def clear(self):
        """Delete the files that `rows` has read to their ends, and the folder with the last of them."""
        for file, size in self.merged.items():
            with contextlib.suppress(OSError):
                if file.stat().st_size == size:
                    file.unlink()
        with contextlib.suppress(OSError):  # it holds what another process has just written
            self.folder.rmdir()

    def say_missing(self, count, result):
        """Print that `count` videos of other processes have no rows yet."""
        print(f"process {self.rank} of {self.world_size} is done, {count:,} videos of others are not yet; ", end="")
        print(f"the last one to finish writes {result}")
