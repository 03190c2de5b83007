"""Sort the parts of QEVD into the folders that training reads: dest/{train,val}/<class>/<video>.mp4.

Reads   the parts as they were unpacked (`srcs`), the labels (`labels_json`) and class_map.json.
Writes  the videos under `dest`: copies or links (MODE);
        missing.csv: one row for every record whose video is not under `dest`, with the reason.

    $ python tools/refactor_dataset.py --dry-run      # what would happen
    $ python tools/refactor_dataset.py

A video is found by its name, wherever in the parts it lies. Killed at any moment and started again, it goes on where
it stopped. A video that check_videos.py repaired or quarantined is replaced by, or comes back as, the original in the
sources: run check_videos.py again after each run that follows it.

    $ python tools/refactor_dataset.py --raw-labels   # more videos, for train.py's --extra-data

sorts what only the raw labels name, fine_grained_labels.json in each part, into `dest_of_raw`/train/<class>/. The class
of a video is what its labels say before " - ", if class_map.json has that name. This is not the organisers' own choice
of labels, which is not known. Videos of the release file, of the raw labels' split `test` (its people may be those of
the release file's val) and of exercises that class_map.json lacks are left out, counted and listed.

Exit code 1: videos are missing or records were refused; all of them stand in missing.csv.
"""

import os
import time
from collections import Counter
from pathlib import Path, PureWindowsPath

import common
from common import finding, flags
from common.names import printable, shortened

from tqdm import tqdm

from videos import placing
from videos.qevd_labels import SPLITS, NotThere, read_raw, read_release

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
RAW_LABELS = False  # true: sort what only the raw labels in the parts name, into dest_of_raw
dest_of_raw = "./QEVD_extra"  # folder that gets train/<class>/ of the raw labels, for train.py's --extra-data
MODE = "copy"  # copy, hardlink (same file system, no space) or symlink (no space, needs srcs to stay)
DRY_RUN = False  # true: show what would happen and touch nothing
MISSING_CSV = "missing.csv"  # rows: record, video, label, split, outcome, reason
# ----------------------------------------------------------------------------------------------------------------------

OUTCOMES = ("placed", "already there", "missing", "refused")
OUTCOMES_OF_RAW = (*OUTCOMES, "in release", "split test", "other exercise")
LISTED = 20  # names shown of a long list

# --- folders -------------------------------------------------------------------------------------------------------


def find_sources(folders, videos):
    """Set each video's `source` to its path in the first of `folders` that has it; there, to the least deep one.

    Returns {name: the first other path} of those that are there more than once. Says what each folder holds.
    """
    doubled = {}
    for top in folders:
        found, wanted = finding.find_videos(top), 0
        names = sorted(found.videos + found.misplaced, key=lambda name: (name.count("/"), name))
        for path in (os.path.join(top, name) for name in names if os.path.basename(name) in videos):
            video = videos[os.path.basename(path)]
            video.source, wanted = video.source or path, wanted + 1
            if video.source != path and not os.path.samefile(video.source, path):
                doubled.setdefault(video.name, path)
        for place, why in found.failures.items():
            print(f"source {printable(os.path.normpath(os.path.join(top, place)))}: {why}")
        if os.path.isdir(top):
            number = len(names) + found.other_endings.total()
            content = f"{number:,} files, {wanted:,} of them in the labels" if number else "is empty"
            print(f"source {top}: {content}")
    return doubled


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


# --- the whole dataset ---------------------------------------------------------------------------------------------


class DatasetRefactorer:
    """Sorts videos from the folders `srcs` into `dest`/{train,val}/<class>/ by the labels in `labels_json`."""

    def __init__(self, srcs, dest, labels_json):
        self.srcs = [Path(src) for src in srcs]
        self.dest = Path(dest)
        self.labels_json = Path(labels_json)

    def refactor_dataset(self):
        """Place every video as MODE says, unless DRY_RUN; print the table and write missing.csv.

        Returns {split: Counter of outcomes of records}; records that name no known split are counted under "other".
        Exits with code 2, nothing done, if settings or labels cannot be used.
        """
        start = time.perf_counter()
        self.check_settings()
        class_map = common.load_class_map(CLASS_MAP)
        videos, others = read_release(self.labels_json, class_map)
        if RAW_LABELS:
            release = videos.keys() | {PureWindowsPath(str(row.video)).name for row in others}
            videos, others = read_raw(self.srcs, release, class_map)
        doubled = find_sources(self.srcs, videos)
        placed, leftovers = list_placed(self.dest)
        check_strays(placed, videos, self.dest)
        todo = self.plan(videos, placed, doubled)
        print(f"planned {len(videos):,} videos in {time.perf_counter() - start:.1f} s")
        if DRY_RUN:
            print("DRY_RUN: nothing is touched; 'placed' is what would be placed")
        else:
            placing.check_disk(todo, self.dest, MODE)
            for path in leftovers:
                path.unlink(missing_ok=True)
            for video, failure in placing.place_all(todo, MODE):
                if failure:
                    video.outcome, video.reason = "refused", failure
        return report_placed(videos, others)

    def check_settings(self):
        """Exit with code 2 for a mode that does not exist, and for folders that lie within one another."""
        placing.check_mode(MODE)
        if self.dest.exists() and not self.dest.is_dir():
            common.refuse(f"dest {self.dest} is a file; it must be a folder, or not exist yet")
        for src in self.srcs:
            for split in SPLITS:
                inner, outer = src.resolve(), (self.dest / split).resolve()
                if inner.is_relative_to(outer) or outer.is_relative_to(inner):
                    common.refuse(f"the source {src} and {self.dest / split} lie within one another; set another dest")

    def plan(self, videos, placed, doubled):
        """Set each video's `target`, `outcome` and `reason`; returns those to place."""
        todo, counts = [], Counter()
        for video in tqdm(videos.values(), "planning", unit="video", disable=None):
            video.target = os.path.join(self.dest, video.split, video.folder, video.name)
            there = video.name in placed.get((video.split, video.folder), ())
            try:
                if video.source is None:
                    if there and os.path.isfile(video.target):
                        video.outcome = "already there"
                        counts["kept"] += 1
                elif there and placing.is_placed(video.source, video.target, MODE):
                    video.outcome = "already there"
                else:
                    video.outcome = "placed"
                    counts["replaced"] += there
                    newer = there and os.lstat(video.target).st_mtime_ns > os.stat(video.source).st_mtime_ns
                    counts["newer"] += newer and not os.path.islink(video.target)
                    todo.append(video)
            except OSError as e:
                video.outcome, video.reason = "refused", f"could not be compared: {e}"
        if not (counts["kept"] or any(src.is_dir() for src in self.srcs)):
            common.refuse("none of the source folders exists; set srcs to the unpacked parts of QEVD")
        if doubled:
            print(f"{len(doubled):,} videos are in the sources more than once; the first in the order of srcs is taken:"
                  f" {shortened(f'{videos[name].source}, not {path}' for name, path in doubled.items())}")
        for what, sentence in {
            "kept": "are in no source any more; they stay as they are",
            "replaced": f"are not what MODE {MODE} makes of their sources (half copies?); they are replaced",
            "newer": "are newer than their sources (repaired?), which replace them: run check_videos again afterwards",
        }.items():
            if counts[what]:
                print(f"{counts[what]:,} videos under {self.dest} {sentence}")
        return todo


# --- the end -------------------------------------------------------------------------------------------------------


def count_records(videos, others):
    """Returns {split: Counter of outcomes}; a record that repeats a placed one counts as already there."""
    counts = {split: Counter() for split in SPLITS}
    for video in videos.values():
        repeats = len(video.records) - 1
        counts[video.split][video.outcome] += 1
        counts[video.split]["already there" if video.outcome == "placed" else video.outcome] += repeats
    for row in others:
        counts.setdefault(row.split if row.split in SPLITS else "other", Counter())[row.outcome] += 1
    return counts


def report_placed(videos, others):
    """Print the table, the smallest and largest classes and what is not there; returns the counts."""
    counts, outcomes = count_records(videos, others), OUTCOMES_OF_RAW if RAW_LABELS else OUTCOMES
    repeats = sum(len(video.records) - 1 for video in videos.values())
    if repeats:
        print(f"{repeats:,} records repeat an earlier one; they count as it does, or as already there if it was placed")
    print(f"\n{'split':8}{'records':>15}" + "".join(f"{outcome:>15}" for outcome in outcomes))
    for split, row in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        print(f"{split:8}{row.total():>15,}" + "".join(f"{row[outcome]:>15,}" for outcome in outcomes))
    print()
    for split in SPLITS:
        report_classes(split, videos)
    if exercises := Counter(row.label for row in others if row.outcome == "other exercise"):
        listed = shortened(f"{exercise} {count:,}" for exercise, count in exercises.most_common())
        print(f"{exercises.total():,} records of {len(exercises):,} exercises that {CLASS_MAP} lacks: {listed}")

    rows = list(others)
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
        smallest, largest = (printable(", ".join(some)) for some in (ranked[:3], ranked[:-4:-1]))
        print(f"{split}: {len(ranked)} classes; smallest: {smallest}; largest: {largest}")


def report_not_there(rows):
    """Print the first records that are missing or refused, and write all that are not there to missing.csv."""
    bad = [row for row in rows if row.outcome in ("missing", "refused")]
    for row in bad[:LISTED]:
        print(f"{row.outcome}: record {row.record}, {row.video!r}: {printable(row.reason)}")
    if len(bad) > LISTED:
        print(f"… and {len(bad) - LISTED:,} more")
    if not DRY_RUN:
        # with escapes: names may be any text here, and the csv module of Python 3.10 neither writes nor reads NUL
        common.write_csv(MISSING_CSV, NotThere._fields, (map(printable, row) for row in rows))
        print(f"{len(rows):,} records that are not there are listed in {MISSING_CSV}")


def main():
    flags.set_constants_from_flags(globals())
    into = dest_of_raw if RAW_LABELS else dest
    counts = DatasetRefactorer(srcs, into, labels_json).refactor_dataset()
    if RAW_LABELS:
        print("the classes are the exercises that the raw labels name, not the organisers' own choice of labels")
    if not DRY_RUN:
        print(f"next: {flags.next_command('check_videos.py', ROOT=into)}")
    raise SystemExit(1 if any(row["missing"] or row["refused"] for row in counts.values()) else 0)


if __name__ == "__main__":
    main()
