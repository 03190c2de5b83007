"""Sort the parts of QEVD into the folders that training reads: dest/{train,val}/<class>/<video>.mp4.

Reads   the parts as they were unpacked (`srcs`), the labels (`labels_json`) and class_map.json.
Writes  the videos under `dest`: copies, links, or the files themselves (MODE);
        missing.csv: one row for every record whose video is not under `dest`, with the reason.

$ python tools/refactor_dataset.py --dry-run      # what would happen
$ python tools/refactor_dataset.py

A video is found by its name, wherever in the parts it lies. Killed at any moment and started again, it goes on where
it stopped. A video that check_videos.py repaired or quarantined is replaced by, or comes back as, the original in the
sources: run check_videos.py again after each run that follows it.

Exit code 1: videos are missing or records were refused; all of them stand in missing.csv.
"""

import csv
import errno
import filecmp
import functools
import json
import os
import shutil
import stat
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import common
from common import flags
from common.names import shortened

from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
srcs = [  # folders the parts of QEVD were unpacked into, doubled folders too; the first that has a video wins
    "./dataset/QEVD-FIT-300k-Part-1",
    "./dataset/QEVD-FIT-300k-Part-2",
    "./dataset/QEVD-FIT-300k-Part-3",
    "./dataset/QEVD-FIT-300k-Part-4",
]
dest = "./QEVD_organized"  # folder that gets train/<class>/ and val/<class>/
labels_json = "./dataset/fine_grained_labels_release.json"  # list of {"video_path", "label", "split"}
CLASS_MAP = str(common.REPO / "class_map.json")  # {class folder name: index}; other labels are refused
MODE = "copy"  # copy, hardlink (same file system, no space), symlink (no space, needs srcs to stay) or move
DRY_RUN = False  # true: show what would happen and touch nothing
MISSING_CSV = "missing.csv"  # rows: record, video, label, split, outcome, reason
# ----------------------------------------------------------------------------------------------------------------------

MODES = ("copy", "hardlink", "symlink", "move")
SPLITS = ("train", "val")
KEYS = ("video_path", "label", "split")  # of a record
RAW_KEYS = {"labels", "labels_descriptive"}  # of a record in the label file that comes with QEVD's videos
WANTED = (
    "labels_json wants fine_grained_labels_release.json of the organisers' repository, or a file like it: one JSON list"
    ' of {"video_path": "./00000000.mp4", "label": "elbow plank", "split": "train"}, split train or val'
)
OUTCOMES = ("placed", "already there", "missing", "refused")
LISTED = 20  # names shown of a long list
# the next video would meet them, too; EPERM: the file system knows no hard links, or the files are another user's
STOPPING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EXDEV, errno.EPERM)

NotThere = namedtuple("NotThere", "record video label split outcome reason")  # a row of missing.csv


@dataclass(slots=True)
class Video:
    """A video that the labels name, and what became of it."""

    name: str
    split: str
    folder: str  # of its class
    records: list = field(default_factory=list)  # numbers of the records that name it; more than one if they repeat
    source: str | None = None
    link: str | None = None  # the linked file or folder through which the source was reached
    outcome: str = "missing"
    reason: str = "in no source"


# --- labels --------------------------------------------------------------------------------------------------------


def why_refused(record, class_map):
    """One clause that says why a record of the labels cannot be placed; None for a good one."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in KEYS):
        return "is no object with the strings video_path, label and split"
    label, path = record["label"], PureWindowsPath(record["video_path"])  # splits at / and \, knows drive letters
    if record["split"] not in SPLITS:
        return f"unknown split {record['split']!r}, not train or val"
    if "/" in label or "\\" in label:
        return f"label {label!r} contains a path separator"
    if label.replace(" ", "_") not in class_map:
        return f"label {label!r} is not in the class map"
    if path.anchor or ".." in path.parts:
        return f"video_path {record['video_path']!r} leaves the source folder"
    if not path.name or not path.name.isprintable():
        return f"video_path {record['video_path']!r} names no file"
    return None


def read_labels(path, class_map):
    """Read the labels; a record's number is its place in the file's list, from 0.

    Returns ({name: Video}, [NotThere of each refused record]). A record that repeats another one (same name, label and
    split) joins its video. Exits with code 2 if the file cannot be used, or if a video is in both splits.
    """
    try:
        records = json.loads(Path(path).read_bytes())
    except OSError as e:
        common.refuse(f"cannot read the labels {path} ({e.strerror}); set labels_json to QEVD's label file")
    except ValueError as e:
        if is_json_lines(path):
            common.refuse(f"the labels {path} are JSON lines, one object a line; {WANTED}")
        common.refuse(f"the labels {path} are not JSON ({e}); get the file again")
    if not isinstance(records, list) or not records:
        common.refuse(f"the labels {path} must be a list of {{video_path, label, split}}, with at least one record")
    if not any(isinstance(record, dict) and "label" in record for record in records):
        raw = isinstance(records[0], dict) and records[0].keys() & RAW_KEYS
        which = f"are QEVD's own raw form, with {' and '.join(sorted(raw))}" if raw else "have no record with a label"
        common.refuse(f"the labels {path} {which}; {WANTED}")

    videos, refused, overlap = {}, [], {}
    for number, record in enumerate(records):
        reason = why_refused(record, class_map)
        if not reason:
            name, folder = PureWindowsPath(record["video_path"]).name, record["label"].replace(" ", "_")
            video = videos.setdefault(name, Video(name, record["split"], folder))
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


def is_json_lines(path):
    """Whether the first line of a file is a JSON object by itself."""
    try:
        with open(path, "rb") as lines:
            return isinstance(json.loads(lines.readline()), dict)
    except ValueError:
        return False


# --- folders -------------------------------------------------------------------------------------------------------


def find_sources(folders, videos):
    """Set each video's `source` to its path in the first of `folders` that has it; nearest level first within one.

    Returns {name: the first other path} of those that are there more than once. Says what each folder holds.
    """
    doubled, seen = {}, set()
    for top in folders:
        found = Counter()
        for name, path, link in files_below(top, seen):
            found["files"] += 1
            if name in videos:
                found["wanted"] += 1
                video = videos[name]
                if video.source is None:
                    video.source, video.link = path, link
                if video.source != path:
                    doubled.setdefault(name, path)
        if os.path.isdir(top):
            content = f"{found['files']:,} files, {found['wanted']:,} of them in the labels" if found else "is empty"
            print(f"source {top}: {content}")
    return doubled


def files_below(top, seen):
    """Yield (name, path without symbolic links, link or None) of every file in `top` and its folders, nearest first.

    `link` is the linked file or folder below `top` through which the file was reached; `top` itself may be one.
    `seen` is the set of folders that were read before, which are left out.
    """
    level = [(os.path.realpath(top), None)]
    for folder, way in level:  # grows while it is read
        if folder in seen:
            continue
        seen.add(folder)
        inner = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    linked = entry.is_symlink()
                    path = os.path.realpath(entry.path) if linked else entry.path
                    link = entry.path if linked else way
                    if os.path.isdir(path) if linked else entry.is_dir():
                        inner.append((path, link))
                    elif os.path.isfile(path) if linked else entry.is_file():
                        yield entry.name, path, link
        except OSError as e:
            print(f"source {folder} cannot be read: {e.strerror}")
        level += sorted(inner, key=lambda pair: pair[0])


def list_placed(dest):
    """What lies under `dest` by now: ({(split, class folder): set of names}, paths that a killed run left behind)."""
    placed, leftovers = {}, []
    for split in SPLITS:
        for folder in (dest / split).glob("*"):
            names = os.listdir(folder) if folder.is_dir() else []
            leftovers += [folder / name for name in names if common.LEFTOVER.fullmatch(name)]
            placed[split, folder.name] = {name for name in names if not name.startswith(".")}
    return placed, leftovers


def check_strays(placed, videos, dest):
    """Name files under `dest` that the labels do not put there. Exits with code 2 if one belongs elsewhere there."""
    strays, leaks = [], []
    for (split, folder), names in placed.items():
        for name in names:
            video = videos.get(name)
            if video is None or (video.split, video.folder) != (split, folder):
                (leaks if video else strays).append(f"{split}/{folder}/{name}")
    if leaks:
        common.refuse(f"{len(leaks):,} videos under {dest} belong to another split or class by these labels; move them"
                      " there, or delete them if the sources have them; nothing was done:"
                      f" {shortened(sorted(leaks))}")
    if strays:
        listed = shortened(sorted(strays))
        print(f"{len(strays):,} files under {dest} are none of these labels', they stay: {listed}")


@functools.cache
def device_of(folder):
    """Number of the file system that a folder lies on, or will lie on once it is made."""
    return os.stat(nearest_existing(folder)).st_dev


def nearest_existing(folder):
    """The folder itself or the nearest of its parents that exists."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def size_of(path):
    """Size of a file in bytes; 0 if it cannot be read, which placing it will report."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


# --- one video -----------------------------------------------------------------------------------------------------


def is_same(source, target):
    """Whether the file `target` is what placing `source` would give: equal size, and equal time or content.

    Before a move, which deletes the source, only the content counts.
    """
    there, here = os.lstat(target), os.stat(source)
    if stat.S_ISLNK(there.st_mode):
        return MODE == "symlink" and os.path.realpath(target) == source
    if os.path.samestat(there, here):
        return True
    if there.st_size != here.st_size or not stat.S_ISREG(there.st_mode):
        return False
    return (there.st_mtime_ns == here.st_mtime_ns and MODE != "move") or filecmp.cmp(source, target, shallow=False)


def place(source, target):
    """Put `source` at `target`, replacing what is there; `target` is whole or as before at every moment."""
    if MODE == "move" and device_of(os.path.dirname(source)) == device_of(os.path.dirname(target)):
        os.replace(source, target)
        return
    with common.written_then_renamed(target) as temporary:
        if MODE == "hardlink":
            os.link(source, temporary)
        elif MODE == "symlink":
            os.symlink(source, temporary)
        else:
            shutil.copy2(source, temporary)
        if MODE == "move":  # the only copy from here on: on the disk before the source goes
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
    if MODE == "move":
        os.unlink(source)


# --- the whole dataset ---------------------------------------------------------------------------------------------


class DatasetRefactorer:
    """Sorts videos from the folders `srcs` into `dest`/{train,val}/<class>/ by the labels in `labels_json`."""

    def __init__(self, srcs, dest, labels_json):
        self.srcs = [Path(src) for src in srcs]
        self.dest = Path(dest)
        self.labels_json = Path(labels_json)

    def refactor_dataset(self):
        """Place every video as MODE says, unless DRY_RUN; print the table and write missing.csv.

        Returns {split: Counter of "placed", "already there", "missing" and "refused" records}; records that name no
        known split are counted under "other". Exits with code 2, nothing done, if settings or labels cannot be used.
        """
        start = time.perf_counter()
        self.check_settings()
        videos, refused = read_labels(self.labels_json, common.load_class_map(CLASS_MAP))
        doubled = find_sources(self.srcs, videos)
        placed, leftovers = list_placed(self.dest)
        check_strays(placed, videos, self.dest)
        todo = self.plan(videos, placed, doubled)
        self.check_file_systems(todo)
        print(f"planned {len(videos):,} videos in {time.perf_counter() - start:.1f} s")
        if DRY_RUN:
            print("DRY_RUN: nothing is touched; 'placed' is what would be placed")
        else:
            for path in leftovers:
                path.unlink(missing_ok=True)
            self.place_all(todo)
            if MODE == "move":
                self.finish_moves(videos)
        return report(videos, refused)

    def target(self, video):
        return os.path.join(self.dest, video.split, video.folder, video.name)

    def check_settings(self):
        """Exit with code 2 for a mode that does not exist, and for folders that lie within one another."""
        if MODE not in MODES:
            common.refuse(f"MODE is {MODE!r}; it must be one of {', '.join(MODES)}")
        if self.dest.exists() and not self.dest.is_dir():
            common.refuse(f"dest {self.dest} is a file; it must be a folder, or not exist yet")
        for src in self.srcs:
            for split in SPLITS:
                inner, outer = src.resolve(), (self.dest / split).resolve()
                if inner.is_relative_to(outer) or outer.is_relative_to(inner):
                    common.refuse(f"the source {src} and {self.dest / split} lie within one another; set another dest")

    def plan(self, videos, placed, doubled):
        """Set each video's `outcome` and `reason`; returns those to place. Exits with code 2 if no source exists."""
        todo, kept, replaced, newer = [], 0, 0, 0
        for video in tqdm(videos.values(), "planning", unit="video", disable=None):
            there = video.name in placed.get((video.split, video.folder), ())
            try:
                if MODE == "move" and video.name in doubled:
                    video.outcome = "refused"
                    video.reason = f"is {video.source} and {doubled[video.name]}; delete one of them, then move"
                elif MODE == "move" and video.link:
                    video.outcome = "refused"
                    video.reason = f"{video.link} is a link to {os.path.realpath(video.link)}; use copy"
                elif video.source is None and there and os.path.isfile(self.target(video)):
                    video.outcome = "already there"
                    kept += 1
                elif video.source and there and is_same(video.source, self.target(video)):
                    video.outcome = "already there"
                elif video.source:
                    video.outcome = "placed"
                    replaced += there
                    newer += there and os.lstat(self.target(video)).st_mtime_ns > os.stat(video.source).st_mtime_ns
                    todo.append(video)
            except OSError as e:
                video.outcome, video.reason = "refused", f"could not be compared: {e}"
        if not (kept or any(src.is_dir() for src in self.srcs)):
            common.refuse("none of the source folders exists; set srcs to the unpacked parts of QEVD")
        if doubled and MODE != "move":
            print(f"{len(doubled):,} videos are in the sources more than once; the first in the order of srcs is taken:"
                  f" {shortened(f'{videos[name].source}, not {path}' for name, path in doubled.items())}")
        if kept:
            print(f"{kept:,} videos under {self.dest} are in no source any more; they stay as they are")
        if replaced:
            print(f"{replaced:,} videos under {self.dest} differ from their sources (half copies?); they are replaced")
        if newer:
            print(f"{newer:,} videos are newer than their sources (repaired?), which replace them: run check_videos"
                  " again afterwards")
        return todo

    def check_file_systems(self, todo):
        """Exit with code 2 if hard links would cross file systems or copies would not fit on the disk."""
        folders = sorted({os.path.dirname(video.source) for video in todo})
        foreign = {folder for folder in folders if device_of(folder) != device_of(self.dest)}
        if MODE == "hardlink" and foreign:
            common.refuse(f"hard links cannot cross file systems, and dest {self.dest} lies on another one than"
                          f" {shortened(sorted(foreign))}; use MODE symlink or copy, or another dest")
        if MODE in ("hardlink", "symlink"):
            return
        copied = [v.source for v in todo if MODE == "copy" or os.path.dirname(v.source) in foreign]
        if copied:
            advice = f"{len(copied):,} videos need them; make room, or use MODE hardlink, symlink or move"
            common.check_space(nearest_existing(self.dest), sum(map(size_of, copied)), advice)

    def place_all(self, todo):
        """Place the planned videos; one that fails is refused with the reason, a full disk ends the run."""
        try:
            for folder in {os.path.dirname(self.target(video)) for video in todo}:
                os.makedirs(folder, exist_ok=True)
        except OSError as e:
            common.refuse(f"cannot make the class folders: {e}")
        for count, video in enumerate(tqdm(todo, MODE, unit="video", disable=None)):
            try:
                place(video.source, self.target(video))
            except OSError as e:
                if e.errno in STOPPING_ERRORS:
                    common.refuse(f"stopped after {count:,} videos: {e}; put that right and start again")
                video.outcome, video.reason = "refused", f"could not be placed: {e}"

    def finish_moves(self, videos):
        """After a move: delete the sources whose equal copy was there already, as of a move that was killed."""
        for video in videos.values():
            if video.outcome != "already there" or not video.source:
                continue
            try:
                if not os.path.samefile(video.source, self.target(video)):
                    os.unlink(video.source)
            except OSError as e:
                print(f"{video.source} is in place, but its source could not be deleted: {e.strerror}")


# --- the end -------------------------------------------------------------------------------------------------------


def count_records(videos, refused):
    """Returns {split: Counter of OUTCOMES}; a record that repeats a placed one counts as already there."""
    counts = {split: Counter() for split in SPLITS}
    for video in videos.values():
        repeats = len(video.records) - 1
        counts[video.split][video.outcome] += 1
        counts[video.split]["already there" if video.outcome == "placed" else video.outcome] += repeats
    for row in refused:
        counts.setdefault(row.split if row.split in SPLITS else "other", Counter())["refused"] += 1
    return counts


def report(videos, refused):
    """Print the table, the smallest and largest classes and what is not there; returns the counts."""
    counts = count_records(videos, refused)
    repeats = sum(len(video.records) - 1 for video in videos.values())
    if repeats:
        print(f"{repeats:,} records repeat an earlier one; they count as it does, or as already there if it was placed")
    print(f"\n{'split':8}{'records':>15}" + "".join(f"{outcome:>15}" for outcome in OUTCOMES))
    for split, row in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        print(f"{split:8}{row.total():>15,}" + "".join(f"{row[outcome]:>15,}" for outcome in OUTCOMES))
    print()
    for split in SPLITS:
        report_classes(split, videos)

    rows = list(refused)
    for v in videos.values():
        if v.outcome in ("missing", "refused"):
            rows += [NotThere(number, v.name, v.folder, v.split, v.outcome, v.reason) for number in v.records]
    rows.sort()
    report_not_there(rows)
    return counts


def report_classes(split, videos):
    """Print the smallest and largest classes of a split by the videos that are in place."""
    sizes = Counter(v.folder for v in videos.values() if v.split == split and v.outcome in ("placed", "already there"))
    ranked = [f"{folder} {size:,}" for folder, size in sorted(sizes.items(), key=lambda item: (item[1], item[0]))]
    if ranked:
        smallest, largest = ", ".join(ranked[:3]), ", ".join(ranked[:-4:-1])
        print(f"{split}: {len(ranked)} classes; smallest: {smallest}; largest: {largest}")


def report_not_there(rows):
    """Print the first records that are missing or refused, and write all of them to missing.csv unless DRY_RUN."""
    for row in rows[:LISTED]:
        print(f"{row.outcome}: record {row.record}, {row.video!r}: {row.reason}")
    if len(rows) > LISTED:
        print(f"… and {len(rows) - LISTED:,} more")
    if not DRY_RUN:
        Path(MISSING_CSV).absolute().parent.mkdir(parents=True, exist_ok=True)
        with (
            common.written_then_renamed(MISSING_CSV) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            # NUL is spelled out as what UTF-8 cannot hold is: the csv module of Python 3.10 neither writes nor reads it
            table = [[str(value).replace("\0", "\\x00") for value in row] for row in [NotThere._fields, *rows]]
            csv.writer(file).writerows(table)
        print(f"{len(rows):,} records that are not there are listed in {MISSING_CSV}")


def main():
    flags.set_constants_from_flags(globals())
    counts = DatasetRefactorer(srcs, dest, labels_json).refactor_dataset()
    if not DRY_RUN:
        print(f"next: {flags.next_command('check_videos.py', dest, ROOT=dest)}")
    raise SystemExit(1 if any(row["missing"] or row["refused"] for row in counts.values()) else 0)


if __name__ == "__main__":
    main()
