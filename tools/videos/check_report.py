"""The report of check_videos.py: its columns, reading it, and the summary of a run."""

import csv
import io

import common

from videos.judging import REASONS

COLUMNS = ["video", "reason", "action", "detail", "quarantined_to", "repaired_by", "frames", "corrupt_frames"]
COLUMNS += ["fps", "variable_frame_rate", "duration_s", "shorter_than_4_s", "width", "height", "codec", "rotation"]
COLUMNS += ["size_bytes", "mtime_ns", "decodes", "header_fps", "longest_gap_s", "video_streams"]


def read_report(path):
    """Rows of a report by video; the last row of a video counts. Leaves out a row that a kill cut off.

    Raises FileNotFoundError. Exits with code 2 if the file is no report of this script, so that nothing else is
    overwritten.
    """
    text = path.read_bytes().decode("utf-8", errors="surrogateescape").replace("\0", "")
    lines = csv.reader(io.StringIO(text, newline=""))
    columns = next(lines, None) if text else COLUMNS
    if columns != COLUMNS:
        common.refuse(f"{path} is no report of this check_videos.py; move it away or name another file with --report")
    lines = list(lines)[: None if text.endswith("\n") else -1]
    rows = [dict(zip(COLUMNS, line)) for line in lines if len(line) == len(COLUMNS)]
    return {row["video"]: row for row in rows}


PECULIARITIES = {  # of healthy videos, counted in the summary: a sentence, and whether it is true of a row
    "are shorter than 4 s": lambda row: row["shorter_than_4_s"] == "yes",
    "have a variable frame rate": lambda row: row["variable_frame_rate"] == "yes",
    "have a header whose frame rate, which the frame rule takes, is off by more than 10 %": lambda row: (
        abs(float(row["header_fps"]) - float(row["fps"])) > 0.1 * float(row["fps"])
    ),
    "have more than 10 s between two frames (a clock that jumps)": lambda row: float(row["longest_gap_s"]) > 10,
    "are to be rotated, which the official pipeline ignores": lambda row: row["rotation"] != "0",
    "have several video streams, of which the first is taken": lambda row: int(row["video_streams"]) > 1,
}


def print_reasons(rows):
    """Print a table of reasons and what was done, whose counts add up to the number of videos, and peculiarities."""
    earlier = [row for row in rows if row["action"] == "quarantined earlier"]
    now = [row for row in rows if row["action"] != "quarantined earlier"]
    print()
    for reason in REASONS:
        actions = [row["action"] for row in now if row["reason"] == reason]
        if actions:
            done = ", ".join(f"{actions.count(action):,} {action}" for action in sorted(set(actions)))
            print(f"  {reason:20}{len(actions):9,}   {done}")
    print(f"  {'sum':20}{len(now):9,}")
    stay = [row for row in now if row["decodes"] == "yes" and row["action"] in ("kept", "replaced")]
    print(f"of the {len(stay):,} that stay:")
    for what, is_so in PECULIARITIES.items():
        print(f"  {sum(map(is_so, stay)):9,} {what}")
    print(f"{len(earlier):,} were quarantined in earlier runs" if earlier else "none was quarantined in an earlier run")
