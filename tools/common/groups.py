"""Who is in which video: the one reader of the file that `--groups` names, for train.py and split_videos.py."""

import csv
import io
import json
import os
import unicodedata

from common import read_text, refuse
from common.finding import VIDEO_ENDINGS
from common.names import shortened

FORMS = "a table with the head `video,group`, or QEVD's fine_grained_labels_with_worker_ids.json"


def read_groups(path, videos):
    """The group, a person say, of each video that the file `path` names.

    path: a CSV file with the columns `video` and `group`, or QEVD's list of {"video_path", "worker_id"}, as shipped.
    videos: paths with "/" relative to the folder of the class folders, as `squats/1.mp4`.
    A row is of the video whose path has most parts in common with it, counted from the last part, whose ending may
    differ; so `./1.mp4`, `videos/squats/1.mp4` and `1` all name `squats/1.mp4`, if no other video is named `1`.
    Returns {video: group}; a video without a group is left out. Exits with code 2 and one sentence if the file cannot
    be read, a row is of several videos, a video is in two groups, or no row is of any video.
    """
    of_name, best, rows = {}, {}, rows_of(path)
    for video in videos:
        of_name.setdefault(parts_of(video)[-1], []).append(video)
    for name, group in rows:
        named = of_name.get(parts_of(name)[-1], [])
        alike = [likeness(name, video) for video in named]
        closest = [video for video, value in zip(named, alike) if value == max(alike)]
        if len(closest) > 1:
            refuse(f"{path}: {name!r} may be each of {shortened(closest, 3)}; write it there with its class folder")
        for video in closest:
            known = best.setdefault(video, (max(alike), name, group))
            if known[0] == max(alike) and known[2] != group:
                refuse(f"{path} puts {video} into {known[2]!r} as {known[1]!r} and into {group!r} as {name!r}")
            best[video] = max(known, (max(alike), name, group))
    if not best:
        example = f", as {rows[0][0]!r}, and the videos are named as {videos[0]!r}" if rows and videos else ""
        refuse(f"{path} names none of the {len(videos):,} videos; it has {len(rows):,} rows with a group{example}")
    return {video: group for video, (_, _, group) in best.items()}


def parts_of(path):
    """Parts of a path, composed (NFC) and without the ending of a video."""
    path = unicodedata.normalize("NFC", path.replace("\\", "/"))
    stem, ending = os.path.splitext(path)
    return (stem if ending.lower() in VIDEO_ENDINGS else path).split("/")


def likeness(name, video):
    """(Number of parts that two paths have in common, counted from the last; whether the endings are equal, too)."""
    common_parts = 0
    for a, b in zip(reversed(parts_of(name)), reversed(parts_of(video))):
        if a.replace(" ", "_") != b.replace(" ", "_"):  # a class folder is a label with spaces as "_"
            break
        common_parts += 1
    return common_parts, os.path.splitext(name)[1].lower() == os.path.splitext(video)[1].lower()


def rows_of(path):
    """[(name of a video, group)] of a file of groups, without the rows that have no group."""
    try:
        text = read_text(path)
        if text.lstrip().startswith("["):
            # what pandas writes where some are not known: 71.0 for 71, NaN for none
            numbers = dict(parse_float=lambda text: text.removesuffix(".0"), parse_constant=lambda _: None)
            rows = [(row["video_path"], row["worker_id"]) for row in json.loads(text, **numbers)]
        else:
            head = text.partition("\n")[0].strip()
            table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
            if not {"video", "group"} <= set(table.fieldnames or ()):
                refuse(f"the first line of {path} is {head!r}; it must be {FORMS}")
            rows = list(table)
            if long := next((row for row in rows if None in row), None):
                refuse(f"{path} has more in the row of {long['video']!r} than in its head: quote names with commas")
            rows = [(row["video"], row["group"]) for row in rows]
        return [(name.strip(), str(group).strip()) for name, group in rows if str(group or "").strip() or group == 0]
    except OSError as e:
        refuse(f"cannot read the groups {path}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as e:
        refuse(f"{path} is no file of groups ({e!r}); it must be {FORMS}")
