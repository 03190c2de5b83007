"""Split a folder of your own videos into train and val: no video, and no group, is ever on both sides or changes side.

Reads   SOURCE/<class>/<video>, also in folders below <class>
Writes  DEST/{train,val}/<class>/<video>, links or copies (MODE); DEST/split.csv, the side of each video, for good;
        CLASS_MAP, {class: index}; a class that comes later gets the next index

    $ python tools/split_videos.py
    $ python tools/split_videos.py --groups 'person(\\d+)'     # all videos of a person go to one side

The side is decided once, by a hash of the group's name or, without a group, of the content, and read from split.csv
ever after: add, delete, rename or relabel videos in SOURCE and run it again. Copies of one video stay together, also
those that were encoded again or mirrored; what may be parts of one recording is named. What check_videos.py repaired in
DEST stays as long as the source is the same, what it took away stays away. The copy of a video that is deleted in
SOURCE stays; its link goes. A new VAL_SHARE counts for new videos; GROUPS that join videos of both sides are refused.

Exit codes: 0 all videos are in place, 1 some cannot be read or placed (listed), 2 wrong usage, full disk.
"""

import csv
import hashlib
import json
import os
import re
import stat
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import common
from common import finding, flags, machine
from common.groups import read_groups
from common.names import class_name, look_alikes, printable, shortened

from tqdm import tqdm

from videos import placing, sides
from videos.appearance import UNREADABLE, alike, appearance_of

# ----------------------------------------------------------------------------------------------------------------------
SOURCE = "./my_videos"  # folder of class folders: SOURCE/<class>/<video>
DEST = "./my_dataset"  # gets train/<class>/ and val/<class>/
CLASS_MAP = "./my_class_map.json"  # {class: index}, written, later extended; train.py's --class-map
VAL_SHARE = 0.2  # share of the videos of a class that go to val, between 0 and 1
GROUPS = ""  # what stays together: a regular expression whose match in <class>/<video> names the group, or a file
MODE = "symlink"  # symlink (no space, needs SOURCE to stay), hardlink (same file system, no space) or copy
# ----------------------------------------------------------------------------------------------------------------------

SIDES = ("train", "val")
OUTCOMES = ("placed", "already there", "kept as repaired", "taken out before")
COLUMNS = ["video", "side", "group", "fingerprint", "appearance", "size", "mtime_ns"]  # of split.csv
PIECE = 1 << 16  # bytes
TIME_LIMIT = 60  # s, in which a video must show what it looks like


@dataclass(slots=True)
class Video:
    """A video of SOURCE, or a row of split.csv. `size` and `mtime_ns` of a row are the source's when it was placed."""

    video: str  # path below SOURCE, with "/"
    side: str = ""
    group: str = ""  # "": none
    fingerprint: str = ""
    appearance: str = ""  # of videos.appearance; "": not looked at yet
    size: int = 0  # bytes; 0 in a row: not placed yet
    mtime_ns: int = 0
    shows: str = ""  # the least fingerprint of its twins and its own

    @property
    def label(self):
        return class_name(self.video.split("/")[0])

    @property
    def decodes(self):
        return self.appearance != UNREADABLE

    @property
    def target(self):
        """Where it goes; folders below the class become part of the name, which training wants directly there."""
        return os.path.join(DEST, self.side, self.label, "__".join(self.video.split("/")[1:]))

    @property
    def source(self):
        return os.path.join(SOURCE, self.video)

    @property
    def keys(self):
        """What holds videos together: equal content, equal pictures, equal group."""
        contents = dict.fromkeys([self.fingerprint, self.shows or self.fingerprint])
        return [("content", content) for content in contents] + [("group", self.group)] * bool(self.group)

    @property
    def decision(self):
        return self.video, self.fingerprint, self.group


# --- what is there ----------------------------------------------------------------------------------------------------


def check_settings():
    """Exit with code 2 and one sentence for settings that cannot be meant."""
    placing.check_mode(MODE)
    if not 0 < VAL_SHARE < 1:
        common.refuse(f"VAL_SHARE is {VAL_SHARE:g}; it must lie between 0 and 1, say 0.2")
    if not os.path.isdir(SOURCE):
        common.refuse(f"there is no folder SOURCE = {SOURCE}; it must hold <class>/<video>: name yours with --source")
    source, dest = Path(SOURCE).resolve(), Path(DEST).resolve()
    if source.is_relative_to(dest) or dest.is_relative_to(source):
        common.refuse(f"SOURCE {SOURCE} and DEST {DEST} lie within one another; name a DEST elsewhere")
    held = [side for side in SIDES if os.path.isdir(Path(DEST, side)) and os.listdir(Path(DEST, side))]
    if held and not Path(DEST, "split.csv").exists():
        common.refuse(f"{DEST} holds {' and '.join(held)} but no split.csv that says how it was split; name a new DEST")


def videos_of_source():
    """All videos at SOURCE/<class>/…/<video>. Returns ([Video], {path below SOURCE: why it is none}).

    Says by name which folders are no classes. Exits with code 2 if none is one, if SOURCE is split already, or if two
    classes would get one name.
    """
    found, labels, taken = finding.find_videos(SOURCE), {}, {}
    for video in map(Video, sorted(found.videos + [path for path in found.misplaced if "/" in path])):
        other = taken.setdefault(video.target.lower(), video)  # on Windows and macOS, A.mp4 is a.mp4
        if other is not video:
            found.failures[video.video] = f"it would lie where {other.video} does; rename one of the two"
        folder = video.video.split("/")[0]
        if labels.setdefault(video.label, folder) != folder:
            common.refuse(f"{labels[video.label]!r} and {folder!r} in {SOURCE} would be one class; rename one of them")
    if twice := look_alikes(set(labels.values())):
        common.refuse(f"{shortened(twice)} in {SOURCE} look like one class under two names; rename one of them")
    classes = finding.class_folders(SOURCE)
    for folder in sorted(entry.name for entry in os.scandir(SOURCE) if entry.is_dir()):
        if folder not in labels.values() and folder not in {path.split("/")[0] for path in found.failures}:
            why = "no video in it" if folder in classes else "not a folder of yours"
            print(f"left out: {printable(folder)}/, {why}")
    others = [f"{number:,} x {ending or 'no ending'}" for ending, number in found.other_endings.most_common()]
    lost = [path for path in found.misplaced if "/" not in path]
    others += [f"{len(lost):,} that lie in no class: {shortened(lost, 3)}"] * bool(lost)
    if others:
        print(f"left out: {', '.join(others)}")
    if not taken:
        hint = "; if it is one of your classes, name the folder above" if lost else ""
        common.refuse(f"no video lies at {SOURCE}/<class>/<video>, which SOURCE must hold{hint}")
    if labels.keys() <= {"train", "val", "test"}:
        common.refuse(f"{SOURCE} is split into {', '.join(labels)} already; SOURCE must hold class folders")
    return list(taken.values()), found.failures


def read_split():
    """All rows of DEST/split.csv, those of former contents and groups too: [Video]. Exits with code 2 if damaged."""
    path = Path(DEST, "split.csv")
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [Video(**row) for row in csv.DictReader(file)]
        for row in rows:
            row.size, row.mtime_ns = int(row.size), int(row.mtime_ns)
            if row.side not in SIDES:
                raise ValueError(f"{row.side!r} is no side")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, csv.Error) as e:
        common.refuse(f"{path} is damaged ({e}); it keeps the sides apart: restore it, or start with a new DEST")
    return rows


def placed_of(rows):
    """{video: row} of the rows that say what lies in DEST."""
    return {row.video: row for row in rows if row.size}


def write_split(rows, placed):
    """Write split.csv: the decisions of `rows`, and what lies in DEST, `placed`, as {name: Video}."""
    table = {row.decision: replace(row, size=0, mtime_ns=0) for row in rows}
    table |= {row.decision: row for row in placed.values()}
    rows = ([getattr(row, column) for column in COLUMNS] for _, row in sorted(table.items()))
    common.write_csv(Path(DEST, "split.csv"), COLUMNS, rows)


def set_fingerprint(video, row):
    """Fill in size, mtime and fingerprint of a video, the last from its row if it has not changed; why not, or ""."""
    try:
        status = os.stat(video.source)
        video.size, video.mtime_ns = status.st_size, status.st_mtime_ns
        if not video.size or not stat.S_ISREG(status.st_mode):
            return "it is empty" if stat.S_ISREG(status.st_mode) else "it is no file"
        if row and (row.size, row.mtime_ns) == (video.size, video.mtime_ns):
            video.fingerprint, video.appearance = row.fingerprint, row.appearance
            return ""
        # start, middle and end: whole files would take hours, and no two recordings agree in these and the size
        digest = hashlib.sha256(str(video.size).encode())
        with open(video.source, "rb") as file:
            for start in (0, video.size // 2, max(0, video.size - PIECE)):
                file.seek(start)
                digest.update(file.read(PIECE))
    except OSError as e:
        return e.strerror
    video.fingerprint = digest.hexdigest()[:32]
    return ""


def look_for_twins(videos):
    """Set each video's `appearance` and `shows`; name copies that are not equal byte for byte, and parts of recordings.

    A decoder that hangs or crashes costs its own video only, which counts as one that does not decode.
    """
    from torchvision_patches.pool import outcomes_of

    todo = defaultdict(list)
    for video in videos:
        video.shows = video.fingerprint
        if not video.appearance:
            todo[video.source].append(video)
    if todo:
        looks = outcomes_of(appearance_of, deque(todo), min(len(todo), machine.num_workers()), TIME_LIMIT)
        for source, appearance, _ in tqdm(looks, "looking", len(todo), unit="video", disable=None):
            for video in todo[source]:
                video.appearance = appearance or UNREADABLE
    by_name = {video.video: video for video in videos}
    first, shows = {}, {}
    for video in videos:  # copies look alike anyway
        first.setdefault(video.fingerprint, video)
    twins, parts = alike({video.video: video.appearance for video in first.values()})

    def least(fingerprint):
        return least(shows[fingerprint]) if fingerprint in shows else fingerprint

    for pair in twins:
        one, other = sorted(least(by_name[name].fingerprint) for name in pair)
        if one != other:
            shows[other] = one
    for video in videos:
        video.shows = least(video.fingerprint)
    if bad := [video.video for video in videos if not video.decodes]:
        print(f"{len(bad):,} videos show no picture and count in no share; see check_videos.py: {shortened(bad, 5)}")
    if twins:
        print(f"{len(twins):,} pairs show the same, encoded again or mirrored, and share their side: {pairs(twins)}")
    apart = [pair for pair in parts if not by_name[pair[0]].group or by_name[pair[0]].group != by_name[pair[1]].group]
    if apart:
        print(f"{len(apart):,} pairs may be parts of one recording: {pairs(apart)}; --groups would keep them together")


def pairs(names):
    """Some pairs of names as text."""
    return shortened([" and ".join(pair) for pair in names], 5)


# --- groups -----------------------------------------------------------------------------------------------------------


def set_groups(videos):
    """Give each video its group by GROUPS, and say how many have one. Exits with code 2 where GROUPS cannot be used."""
    if not GROUPS:
        return
    names = [video.video for video in videos]
    if os.path.exists(GROUPS) or GROUPS.lower().endswith((".csv", ".json")):
        groups = read_groups(GROUPS, names)
    else:
        groups = groups_by_pattern(names)
    for video in videos:
        video.group = groups.get(video.video, "")
    print(f"{len(groups):,} of {len(videos):,} videos have a group, of {len(set(groups.values())):,} groups")
    if alone := [name for name in names if name not in groups]:
        print(f"{len(alone):,} videos are in no group, each is one of its own: {shortened(alone)}")


def groups_by_pattern(names):
    """{video: group} by the regular expression GROUPS, whose brackets give the group, or else all that it matches."""
    try:
        pattern = re.compile(GROUPS)
    except re.error as e:
        common.refuse(f"GROUPS = {GROUPS!r} is no file, and no regular expression ({e})")
    matches = {name: pattern.search(name) for name in names}
    groups = {name: "/".join(part or "" for part in found.groups() or [found[0]])
              for name, found in matches.items() if found}  # fmt: skip
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        common.refuse(f"GROUPS = {GROUPS!r} finds a group for none of {len(names):,} videos, as {printable(names[0])}")
    return groups


# --- placing ----------------------------------------------------------------------------------------------------------


def what_happens_to(video, row):
    """What is to happen to a video, one of OUTCOMES. `row` is its row of split.csv or an empty one."""
    same = row.fingerprint in ("", video.fingerprint)
    if not os.path.lexists(video.target):
        return "taken out before" if row.size and same and row.target == video.target else "placed"
    if same and placing.is_placed(video.source, video.target, MODE):
        return "already there"
    there = os.lstat(video.target)
    is_copy = there.st_size == row.size and abs(there.st_mtime_ns - row.mtime_ns) <= 2e9  # FAT keeps times to 2 s
    unchanged = os.path.islink(video.target) or is_copy
    return "placed" if unchanged or not same else "kept as repaired"


def follow_renames(videos, placed):
    """Rename copies and repaired files with their videos, and take away what stands for a video no more."""
    wanted, names = {video.target for video in videos}, {video.video for video in videos}
    renamed = {video.fingerprint: video for video in videos if video.video not in placed}
    for row in [row for row in placed.values() if row.target not in wanted]:
        video, is_link = renamed.pop(row.fingerprint, None), os.path.islink(row.target)
        if not video and not is_link and row.video not in names and os.path.exists(row.target):
            continue  # perhaps it is the last copy that there is
        del placed[row.video]
        if video and not is_link:
            placed[video.video] = replace(video, size=row.size, mtime_ns=row.mtime_ns)
            if os.path.exists(row.target) and not os.path.lexists(video.target):
                os.makedirs(os.path.dirname(video.target), exist_ok=True)
                os.replace(row.target, video.target)
        Path(row.target).unlink(missing_ok=True)


def place_missing(videos, rows, failed):
    """Place what is missing and write split.csv, before and after. Returns a Counter of OUTCOMES.

    Exits with code 2 and one sentence if the disk is full or links cannot be made; what is placed stays.
    """
    for leftover in Path(DEST).glob("*/*/.*.tmp"):  # of a run that was killed
        leftover.unlink()
    placed, done, todo, rows = placed_of(rows), Counter(), [], rows + videos
    follow_renames(videos, placed)
    for video in videos:
        outcome = what_happens_to(video, placed.get(video.video) or Video(video.video))
        done[outcome] += 1
        if outcome == "placed":
            todo.append(video)
        else:
            placed[video.video] = video
    placing.check_disk(todo, DEST, MODE)
    write_split(rows, placed)  # before the first link: a run that is killed must not decide anew
    try:
        for video, failure in placing.place_all(todo, MODE):
            if failure:
                failed[video.video] = failure
                done["placed"] -= 1
            else:
                placed[video.video] = video
    finally:
        write_split(rows, placed)
    if gone := len(placed.keys() - {video.video for video in videos}):
        print(f"{gone:,} copies in {DEST} stay though their videos are gone from {SOURCE}")
    return done


# --- the end ----------------------------------------------------------------------------------------------------------


def write_class_map(labels, first_run):
    """Write CLASS_MAP, old classes with their indices, new ones behind them; returns {class: index}.

    DEST keeps a copy, so that an index never gets another meaning. Exits with code 2 if CLASS_MAP disagrees with it, or
    if on the first run there is a CLASS_MAP that lacks one of the classes: it is someone else's.
    """
    kept = Path(DEST, "class_map.json")
    before = common.load_class_map(kept) if kept.exists() else {}
    known = common.load_class_map(CLASS_MAP) if os.path.exists(CLASS_MAP) else before
    if others := [f"{index} is {label}, not {known.get(label)}" for label, index in before.items()
                  if known.get(label) != index]:  # fmt: skip
        common.refuse(f"in {DEST} {shortened(others, 3)} as in {CLASS_MAP}; name another CLASS_MAP")
    new = sorted(labels - known.keys())
    if new and known and first_run:
        common.refuse(f"{CLASS_MAP} is there already and lacks {shortened(new)}; name another CLASS_MAP")
    known |= {label: index for index, label in enumerate(new, len(known))}
    for path in (Path(CLASS_MAP).absolute(), kept):
        if not path.exists() or common.load_class_map(path) != known:
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_text(path, json.dumps(known, indent=4) + "\n")
    return known


def report_sides(videos, class_map, done, failed):
    """Print the videos of each class and side in DEST, what a class lacks, what was done, and what failed."""
    there = [video for video in videos if os.path.lexists(video.target)]
    counts = {side: Counter(video.label for video in there if video.side == side) for side in SIDES}
    width = max(5, *(len(printable(label)) for label in class_map))
    print(f"\n{'class':{width}}  {'train':>9}{'val':>9}")
    for label in filter(lambda label: counts["train"][label] + counts["val"][label], class_map):
        print(f"{printable(label):{width}}  {counts['train'][label]:>9,}{counts['val'][label]:>9,}")
    train, val = counts["train"].total(), counts["val"].total()
    print(f"{'all':{width}}  {train:>9,}{val:>9,}   {val / max(1, train + val):.1%} val\n")
    if gone := [label for label in class_map if not any(counts[side][label] for side in SIDES)]:
        print(f"no video at all, yet in {CLASS_MAP}: {shortened(gone)}; the network keeps the class, unseen. "
              "If it was renamed or is unwanted, name a new DEST and CLASS_MAP; sides are drawn anew then")  # fmt: skip
    for side, other, rest in (("train", "val", "it cannot be learned"), ("val", "train", "it is not judged")):
        if lacking := [label for label in class_map if counts[other][label] and not counts[side][label]]:
            print(f"no {side} video, so {rest}: {shortened(lacking)}; add videos of another group and run again")
    equal = defaultdict(list)
    for video in videos:
        equal[video.fingerprint].append(video)
    if copies := [video.video for first, *others in equal.values() for video in others]:
        print(f"{len(copies):,} videos are copies of others and share their side: {shortened(copies, 5)}")
    if wrong := [" and ".join(video.video for video in same)
                 for same in equal.values() if len({video.label for video in same}) > 1]:  # fmt: skip
        print(f"{len(wrong):,} videos lie in two classes, one of which is wrong: {shortened(wrong, 5)}")
    if done["taken out before"]:
        print("what was taken out of DEST stays out; set its size in split.csv to 0 to have it back")
    for video, why in sorted(failed.items()):
        print(f"failed: {printable(os.path.join(SOURCE, video))}: {why}")
    total = sum(done[outcome] for outcome in OUTCOMES) + len(failed)
    parts = [f"{outcome} {done[outcome]:,}" for outcome in OUTCOMES if done[outcome] or outcome == "placed"]
    print(f"found {total:,} = {' + '.join(parts)} + failed {len(failed):,}")


def main():
    flags.set_constants_from_flags(globals())
    check_settings()
    rows = read_split()
    videos, failed = videos_of_source()
    placed = placed_of(rows)
    with ThreadPoolExecutor(8) as pool:  # it is the disk, or the network, that they wait for
        looks = pool.map(lambda video: set_fingerprint(video, placed.get(video.video)), videos)
        reasons = list(tqdm(looks, "reading", len(videos), unit="video", disable=None))
    failed |= {video.video: why for video, why in zip(videos, reasons) if why}
    videos = [video for video, why in zip(videos, reasons) if not why]
    if not videos:
        common.refuse(f"none of the {len(failed):,} videos in {SOURCE} can be read: {next(iter(failed.values()))}")
    set_groups(videos)
    look_for_twins(videos)
    known = {("name", name): row.side for name, row in placed.items()}
    sides.set_sides(videos, known | {key: row.side for row in rows for key in row.keys}, VAL_SHARE)
    class_map = write_class_map({video.label for video in videos}, first_run=not rows)
    done = place_missing(videos, rows, failed)
    report_sides(videos, class_map, done, failed)
    print(f"next: {flags.next_command('check_videos.py', ROOT=DEST)}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
