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
    """The rows of a file, a list of dicts; [] if there is none. A line that a kill cut off does not count."""
    rows, path = [], Path(path)
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
