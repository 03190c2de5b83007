"""The label files of QEVD: the contest's release file, and the raw labels that come with each part of the videos."""

import itertools
import json
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import common
from common.names import class_name, looks_like, printable, shortened

SPLITS = ("train", "val")
KEYS = ("video_path", "label", "split")  # of a record of the release file
RAW_FILE = "fine_grained_labels.json"  # in each part
WANTED = (
    "labels_json wants fine_grained_labels_release.json of the organisers' repository, or a file like it: one JSON list"
    ' of {"video_path": "./00000000.mp4", "label": "elbow plank", "split": "train"}, split train or val'
)

NotThere = namedtuple("NotThere", "record video label split outcome reason")  # a row of missing.csv


@dataclass(slots=True)
class LabelledVideo:
    """A video that the labels name, and what became of it."""

    name: str
    split: str
    folder: str  # of its class
    records: list = field(default_factory=list)  # numbers of the records that name it; more than one if they repeat
    source: str | None = None
    target: str = ""
    outcome: str = "missing"
    reason: str = "in no source"


def read_list(path, example):
    """The JSON list of a label file, with at least one item. Exits with code 2 and one sentence if it is none."""
    text = ""
    try:
        text = common.read_text(path)
        records = json.loads(text)
    except OSError as e:
        common.refuse(f"cannot read the labels {path} ({e.strerror}); set labels_json to QEVD's label file")
    except ValueError as e:
        if is_object(text.partition("\n")[0]):
            common.refuse(f"the labels {path} are JSON lines, one object a line; {WANTED}")
        common.refuse(f"the labels {path} are not JSON ({e}); get the file again")
    if not isinstance(records, list) or not records:
        common.refuse(f"the labels {path} must be a list of {example}, with at least one record")
    return records


def is_object(text):
    """Whether a text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def name_of(video_path):
    """The file name of a record's video_path, or (None, why there is none)."""
    path = PureWindowsPath(video_path)  # splits at / and \, knows drive letters
    if path.anchor or ".." in path.parts:
        return None, f"video_path {video_path!r} leaves the source folder"
    if not path.name or not path.name.isprintable():
        return None, f"video_path {video_path!r} names no file"
    return path.name, None


# --- the release file ------------------------------------------------------------------------------------------------


def why_refused(record, class_map):
    """One clause that says why a record of the release file cannot be placed; None for a good one."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in KEYS):
        return "is no object with the strings video_path, label and split"
    label = record["label"]
    if record["split"] not in SPLITS:
        return f"unknown split {record['split']!r}, not train or val"
    if "/" in label or "\\" in label:
        return f"label {label!r} contains a path separator"
    if class_name(label) not in class_map:
        return f"label {label!r} is not in the class map{looks_like(label, class_map)}"
    return name_of(record["video_path"])[1]


def read_release(path, class_map):
    """Read the release file; a record's number is its place in the file's list, from 0.

    Returns ({name: LabelledVideo}, [NotThere of each refused record]). A record that repeats another one (same name,
    label and split) joins its video. Exits with code 2 if the file cannot be used, or if a video is in both splits.
    """
    records = read_list(path, "{video_path, label, split}")
    if not any(isinstance(record, dict) and "label" in record for record in records):
        raw = isinstance(records[0], dict) and records[0].keys() & {"labels", "labels_descriptive"}
        which = f"are QEVD's own raw form, with {' and '.join(sorted(raw))}" if raw else "have no record with a label"
        common.refuse(f"the labels {path} {which}; {WANTED}{'; --raw-labels sorts the raw ones' if raw else ''}")
    videos, refused, overlap = {}, [], {}
    for number, record in enumerate(records):
        reason = why_refused(record, class_map)
        if not reason:
            (name, _), folder = name_of(record["video_path"]), class_name(record["label"])
            video = videos.setdefault(name, LabelledVideo(name, record["split"], folder))
            if video.split != record["split"]:
                overlap[name] = f"{name} (records {video.records[0]} and {number})"
            elif video.folder != folder:
                reason = f"{name} is {video.folder} in record {video.records[0]} already"
            else:
                video.records.append(number)
        if reason:
            given = record if isinstance(record, dict) else {}
            refused.append(NotThere(number, *(given.get(key, "") for key in KEYS), "refused", reason))
    if overlap:
        common.refuse(f"train and val must have no video in common, {path} has {len(overlap):,}; nothing was done:"
                      f" {shortened(overlap.values())}")
    return videos, refused


# --- the raw labels --------------------------------------------------------------------------------------------------


def raw_files(folders):
    """Paths of the parts' raw label files; says which part has none. Exits with code 2 if there is none at all."""
    files = []
    for folder in map(Path, folders):
        own = [path for path in (folder / RAW_FILE, *sorted(folder.glob(f"*/{RAW_FILE}"))) if path.is_file()]
        files += own[:1]
        if not own:
            print(f"source {folder} has no {RAW_FILE}: its videos are left out")
    if not files:
        common.refuse(f"no {RAW_FILE} lies in the source folders; it comes with each part of QEVD: set srcs")
    return files


def read_raw(folders, release, class_map):
    """Read the raw labels of all parts: videos to train on that the release file says nothing about.

    folders: the unpacked parts. release: names of the release file's videos. class_map: {class: index}.
    The class is what a label says before " - ", if the class map has exactly that name. Numbers of records count on
    through all files. Returns ({name: LabelledVideo}, [NotThere]); outcomes of the latter are "refused" (of no use, or
    several exercises), "in release", "split test" and "other exercise".
    """
    videos, others = {}, []
    files = (read_list(path, "{video_path, labels, split}") for path in raw_files(folders))
    for number, record in enumerate(itertools.chain.from_iterable(files)):
        name, exercises, outcome, reason = judged(record, release, class_map)
        if not reason:
            video = videos.setdefault(name, LabelledVideo(name, "train", *exercises))
            if [video.folder] == exercises:
                video.records.append(number)
                continue
            outcome, reason = "refused", f"{name} is {video.folder} in record {video.records[0]} already"
        split = str(record.get("split", "")) if isinstance(record, dict) else ""
        others.append(NotThere(number, name, ", ".join(exercises), split, outcome, reason))
    return videos, others


def judged(record, release, class_map):
    """(name, [classes], outcome, why it is not to be placed) of a raw record; the last two are "" for a good one."""
    labels = record.get("labels") if isinstance(record, dict) else None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in [*labels, record.get("video_path")]):
        return "", [], "refused", "is no object with the text video_path and a list of texts labels"
    exercises = sorted({class_name(label.partition(" - ")[0]) for label in labels})
    name, reason = name_of(record["video_path"])
    if reason:
        return "", exercises, "refused", reason
    if name in release:
        return name, exercises, "in release", "the release file has it"
    if record.get("split") != "train":  # the same people as in the release file's val, perhaps
        return name, exercises, "split test", f"its split is {record.get('split')!r}, not 'train'"
    if len(exercises) != 1:
        return name, exercises, "refused", f"{name} shows {len(exercises)} exercises: {', '.join(exercises) or 'none'}"
    if exercises[0] not in class_map:
        return name, exercises, "other exercise", f"{printable(exercises[0])!r} is not in the class map"
    return name, exercises, "", ""
