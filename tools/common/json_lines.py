"""Files to which finished work is appended, one JSON object a line, so that a kill loses none of it."""

import contextlib
import json
from pathlib import Path


def append_row(path, row):
    """Append a row, a dict; on a line of its own also after one that a kill cut off."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row) + "\n")


def read_rows(path):
    """Yield the rows of a file, dicts; none if there is no file. A line that a kill cut off does not count."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)
