"""Decode every frame of every video, report what is wrong, repair what can be repaired and quarantine the rest.

Reads   ROOT/{train,val}/<class>/<video>.mp4
Writes  REPORT, a CSV with one row a video, at the end; until then its rows are in REPORT.progress/, as they come.
        Moves damaged videos to QUARANTINE/{train,val}/<class>/

    $ python tools/check_videos.py --root ./full_dataset --quarantine ./bad_videos --remux --replace --ext mp4 \
          --jobs 8 --report bad_videos.csv

After a run every video under ROOT decodes completely, and every damaged original lies in QUARANTINE, where nothing is
ever overwritten. What happens to a damaged video:

    (no flag)           it moves to QUARANTINE
    --remux             it moves to QUARANTINE; a repair that works goes beside it as <name>.repaired.mp4
    --remux --replace   if it can be repaired, the repaired file takes its place and the original goes to QUARANTINE
    --reencode          (with --remux) what remuxing cannot repair is encoded anew, lost picture parts concealed
    --dry-run           the same is tried and reported, but nothing under ROOT or QUARANTINE is touched

A repair counts only if the repaired file then decodes completely. A file that cannot be read (no permission, a broken
link, a failing disk, no memory) is reported and left where it is. A changed bit that still decodes to legal pictures
cannot be seen by any decoder.

Stopped or killed at any moment, run the same command again: healthy videos whose size and mtime are unchanged are
skipped, and rows of other datasets in REPORT stay. `torchrun` and SLURM share the videos between processes, as
videos/journal.py says; whichever finishes last writes REPORT. videos/judging.py judges a video, repairs.py mends it.

Exit codes: 0 all healthy, 1 faults found (listed), 2 wrong usage or a broken package, 130 stopped.
"""

import contextlib
import filecmp
import itertools
import os
import re
import shlex
import shutil
import signal
import tempfile
import zlib
from collections import Counter, deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
from common import finding, flags, machine
from common.names import printable

from torchvision_patches.pool import WorkerLost, outcomes_of
from videos.check_report import COLUMNS, print_reasons, read_report
from videos.journal import Journal
from videos.judging import examine, report_row
from videos.repairs import REPAIRABLE, preserve, repair

# ----------------------------------------------------------------------------------------------------------------------
ROOT = "./QEVD_organized"  # dataset: ROOT/{train,val}/<class>/<video>
QUARANTINE = "./bad_videos"  # where damaged videos go; not inside ROOT/train or ROOT/val
REPORT = "bad_videos.csv"  # CSV, one row a video
EXT = sorted(ending[1:] for ending in finding.VIDEO_ENDINGS)  # endings of video files, in any case
REMUX = False  # try to repair: copy the streams into a new file, then the same without corrupt packets
REPLACE = False  # put a repaired file in the place of the original
REENCODE = False  # with REMUX: encode anew what remuxing cannot repair
DRY_RUN = False  # report only
TIMEOUT = 300.0  # seconds a video may take to decode, and again to repair
JOBS = 0  # processes; 0: one a core that this process may use
# ----------------------------------------------------------------------------------------------------------------------

# --- worker processes ------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What a worker does with one video: examine it or, where its row is known, repair it."""

    video: Path
    row: dict = None
    temporary: Path = None  # where the repaired file goes
    again: bool = False  # whether a worker was lost on it before


def examine_or_repair(reencode, job):
    """The row of a video or, for a repair, what repairs.repair returns; in a worker process."""
    return repair(str(job.video), job.temporary, job.row, reencode) if job.row else examine(str(job.video))


def why_failed(error):
    """(reason code, figures) of a job that gave no result: it hung, crashed or got no memory.

    Exits with code 2 if the worker could not import a package: no video is to blame for that.
    """
    if isinstance(error, ImportError):
        common.refuse(f"a child process cannot import what it needs ({error}); install those of requirements.txt")
    if isinstance(error, MemoryError):
        return "unreadable", "not enough memory"
    if not isinstance(error, WorkerLost):
        return "decoder_crash", repr(error)  # whatever a mangled file made the bindings raise
    if error.exit_code is None:
        return "timeout", f"{TIMEOUT:g} s"
    if error.exit_code == -signal.SIGKILL:
        return "unreadable", "its process was killed from outside, as the system does when memory is short"
    return "decoder_crash", f"exit code {error.exit_code}"


def is_worth_repairing(row):
    """Whether the flags ask for a repair of this video; one that decodes as it is can only be replaced."""
    return REMUX and row["reason"] in REPAIRABLE and (REPLACE or row["decodes"] == "no")


def examined_and_repaired(videos, num_workers, temporary_of):
    """Yield (video, row, temporary path of the repaired file or None) for each video, in the order in which they end.

    Every check and every repair has TIMEOUT seconds; a decoder that hangs or crashes costs its own video only. Either
    is tried once more: the system may have ended the worker for lack of memory, a file server may have stalled.
    """
    jobs, work = deque(map(Job, videos)), partial(examine_or_repair, REENCODE)
    for job, result, error in outcomes_of(work, jobs, num_workers, TIMEOUT):
        video, row, temporary, again = job
        failure = why_failed(error) if error else None
        if failure and not again:
            jobs.appendleft(job._replace(again=True))
        elif row is None:
            result = report_row(*failure) if failure else result
            if is_worth_repairing(result):
                jobs.appendleft(Job(video, result, temporary_of(video)))
            else:
                yield video, result, None
        elif failure or "tried" in result:
            tried = ", ".join(failure) if failure else result["tried"]
            temporary.unlink(missing_ok=True)
            yield video, row | {"detail": f"{row['detail']}; not repaired ({tried})"}, None
        else:
            yield video, result | {key: row[key] for key in ("reason", "detail")}, temporary


# --- files: nothing is lost ------------------------------------------------------------------------------------------


def name_below_root(video):
    """A video's path relative to ROOT, by which processes share the work."""
    return Path(video).relative_to(ROOT)


def videos_to_check():
    """All videos under ROOT/train and ROOT/val, sorted, and {path: why} of what cannot be read there."""
    endings = {"." + ending.lower().lstrip(".") for ending in EXT}
    videos, unreadable, others, misplaced = [], {}, Counter(), 0
    for split in "train", "val":
        folder = Path(ROOT, split)
        found = finding.find_videos(folder, endings)
        videos += [folder / name for name in found.videos + found.misplaced]
        unreadable |= {folder / name: why for name, why in found.failures.items() if folder.exists()}
        others += found.other_endings
        misplaced += len(found.misplaced)
    if others:
        named = ", ".join(f"{ending or 'none'} {count:,}" for ending, count in others.most_common())
        print(f"files with other endings are not checked ({named}); --ext names the endings of videos")
    if misplaced:
        print(f"{misplaced:,} videos do not lie at <class>/<video>: they are checked, but no later step takes them")
    if not videos:
        common.refuse(f"no {' or '.join(sorted(endings))} file in {ROOT}/train or {ROOT}/val; --ext names others")
    return sorted(videos), unreadable


def delete_leftovers(folders, journal):
    """Delete the half-written repairs of this process's videos that a killed run left beside them."""
    for file in (file for folder in folders for file in folder.iterdir()):
        leftover = re.fullmatch(r"\.(.+)\.\d+\.repairing", file.name, re.DOTALL)  # as temporary_path() names them
        if leftover and journal.is_mine(name_below_root(file.with_name(leftover[1]))):
            file.unlink()


def temporary_path(video, scratch):
    """Where a repair of `video` is written: beside it, so that a rename puts it in place; in a dry run in `scratch`."""
    folder = Path(scratch, str(zlib.crc32(os.fsencode(video)))) if DRY_RUN else video.parent
    folder.mkdir(exist_ok=True)
    return folder / f".{video.name}.{os.getpid()}.repairing"


def plan(video, row, temporary):
    """Complete a row: what to do with the video, size and mtime of what then stands in its place."""
    row = {"video": str(video), "action": "kept"} | row
    stands = temporary if temporary and REPLACE else video
    with contextlib.suppress(OSError):  # a broken link has no size
        stat = os.stat(stands)
        row |= {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if row["reason"] != "unreadable" and (temporary or row.get("decodes") != "yes"):
        action = "replaced" if temporary and REPLACE else "quarantined"
        row["action"] = f"would be {action}" if DRY_RUN else action
    return row


def copy_to_quarantine(video, row, temporary):
    """Bring what the row says into quarantine and note where the original came to lie; the dataset stays as it is."""
    if row["action"] in ("quarantined", "replaced"):
        place = preserve(video, Path(QUARANTINE) / video.relative_to(ROOT))
        row["quarantined_to"] = str(place)
        if temporary and row["action"] == "quarantined":
            preserve(temporary, place.with_name(f"{place.stem}.repaired{place.suffix}"))


def change_dataset(video, row, temporary):
    """Do what the row says under ROOT; the original lies in quarantine, too, by now."""
    if row["action"] == "replaced":
        os.replace(temporary, video)
    elif row["action"] == "quarantined":
        video.unlink()


# --- the report ------------------------------------------------------------------------------------------------------


def mtime_of(path):
    """mtime of a file in ns, None without one."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def known_rows(journal, report_before):
    """The newest row of each video, {video: (row, whether it is of this launch)}; of other ROOTs too.

    `report_before` is the mtime that REPORT had when this process started: a newer one is of this launch.
    """
    newest = {}

    def take(row, current, mtime):
        video = spelled_from_root(row["video"]) or row["video"]
        if video not in newest or newest[video][2] <= mtime:
            columns = {column: str(row.get(column, "")) for column in COLUMNS}
            newest[video] = columns | {"video": video}, current, mtime

    for row, current, mtime in journal.rows():  # first: who merges replaces REPORT before it clears the journal
        take(row, current, mtime)
    with contextlib.suppress(FileNotFoundError):
        mtime = os.stat(REPORT).st_mtime_ns
        for row in read_report(Path(REPORT)).values():
            take(row, mtime != report_before, mtime)
    return {video: (row, current) for video, (row, current, _) in newest.items()}


def spelled_from_root(video):
    """The path as this run writes it, if it lies under ROOT, in whatever spelling of ROOT; None for another's."""
    if video.startswith(f"{Path(ROOT)}{os.sep}"):  # in the same one: there may be 200,000
        return video
    with contextlib.suppress(ValueError):
        return str(Path(ROOT) / Path(os.path.abspath(video)).relative_to(os.path.abspath(ROOT)))
    return None


def row_to_keep(row):
    """What an earlier row says for this run: the row of a video that need not be looked at again, or None.

    That is a video found or made healthy whose size and mtime are unchanged, or one that has moved to quarantine.
    """
    video = Path(row["video"])
    if not os.path.lexists(video):
        return row | {"action": "quarantined earlier"} if row["action"].startswith("quarantined") else None
    if row["decodes"] != "yes" or row["action"] not in ("kept", "replaced"):
        return None
    stat = os.stat(video)
    if (str(stat.st_size), str(stat.st_mtime_ns)) != (row["size_bytes"], row["mtime_ns"]):
        return None
    if row["action"] == "replaced":
        return row | {"reason": "healthy", "action": "kept", "detail": f"repaired in an earlier run: {row['detail']}"}
    return row


def final_rows(known, kept):
    """Rows of the report by video: of other ROOTs, of this launch, and of earlier ones what `row_to_keep` keeps."""
    rows = {}
    for video, (row, current) in known.items():
        if not current and spelled_from_root(video):
            row = kept.get(video) or row_to_keep(row)
        if row:
            rows[video] = row
    return rows


# --- the run ---------------------------------------------------------------------------------------------------------


def check_usage():
    """Exit with code 2 and one sentence if the constants contradict one another or there is no dataset."""
    folders = [Path(ROOT, split) for split in ("train", "val")]
    if not any(folder.is_dir() for folder in folders):
        common.refuse(f"{ROOT} has neither train/ nor val/; --root names the folder of {{train,val}}/<class>/<video>")
    places = [Path(QUARANTINE), *(Path(QUARANTINE, folder.name) for folder in folders)]
    if any(place.resolve().is_relative_to(folder.resolve()) for place in places for folder in folders):
        common.refuse(f"the quarantine {QUARANTINE} lies in the dataset; name a folder outside of train/ and val/")
    if (REPLACE or REENCODE) and not REMUX:
        common.refuse("--replace and --reencode say what to do with a repair; give --remux with them")
    if TIMEOUT == 0 or not EXT:
        common.refuse("--timeout must be more than 0 s, and --ext name at least one ending")


def check_and_record(videos, unreadable, journal, scratch):
    """Check, repair and move the videos, and write a row of each to the journal.

    A row is written between the copy to quarantine and the change of the dataset. So a change never lacks its row; a
    row whose change a kill prevented is out of date, which the next run sees.
    """
    from tqdm import tqdm

    results = ((video, report_row("unreadable", why), None) for video, why in unreadable.items())
    if videos:
        jobs = machine.num_workers(JOBS)
        of_children = examined_and_repaired(videos, jobs, lambda video: temporary_path(video, scratch))
        results = itertools.chain(results, of_children)
    for video, row, temporary in tqdm(results, total=len(videos) + len(unreadable), unit="video", smoothing=0):
        try:
            row = plan(video, row, temporary)
            copy_to_quarantine(video, row, temporary)
            journal.append(row)
            change_dataset(video, row, temporary)
        except OSError as e:
            row |= {"action": "failed", "detail": f"{row['detail']}; could not be moved or replaced: {e}"}
            journal.append(row)
        if temporary:
            temporary.unlink(missing_ok=True)
        if row["reason"] != "healthy":
            tqdm.write(printable(f"{row['reason']}: {video}: {row['detail']} -> {row['action']}"))


def check_share(videos, unreadable, journal):
    """Check those videos of this process's share that need it. Returns {video: row} of the others, healthy before."""
    known = known_rows(journal, mtime_of(REPORT))
    mine = [video for video in videos if journal.is_mine(name_below_root(video))]
    kept = {str(video): row_to_keep(known[str(video)][0]) for video in mine if str(video) in known}
    kept = {video: row for video, row in kept.items() if row}
    todo = [video for video in mine if str(video) not in kept]
    share = f" in share {journal.rank} of {journal.world_size}" if journal.world_size > 1 else ""
    unchanged = f"{len(kept):,} unchanged since an earlier run and skipped"
    print(f"{len(mine):,} videos under {ROOT}{share}, {unchanged}")
    if not DRY_RUN:
        delete_leftovers({video.parent for video in videos}, journal)
    with tempfile.TemporaryDirectory() as scratch:
        of_mine = {path: why for path, why in unreadable.items() if journal.is_mine(name_below_root(path))}
        check_and_record(todo, of_mine, journal, scratch)
    return kept


def next_training():
    """The command that trains on ROOT as the README has it: with QEVD's classes, with others, without a GPU."""
    folders = [folder for folder in (Path(ROOT, "train"), Path(ROOT, "val")) if folder.is_dir()]
    kept, mine = Path(ROOT, "class_map.json"), Path("my_class_map.json")  # split_videos.py's copy, and its map
    if kept.exists():
        own = mine if mine.exists() and filecmp.cmp(mine, kept, shallow=False) else kept
    else:
        own = common.class_map_with(label for folder in folders for label in finding.class_folders(folder))
    with_map = f" --class-map {shlex.quote(str(own))}" if own and own.parent != common.REPO else ""
    train = f"python references/video_classification/train.py --data-path {shlex.quote(ROOT)}{with_map}"
    contest = own and own.parent == common.REPO
    if not shutil.which("nvidia-smi"):  # few videos, as one has them without a GPU
        own_videos = "" if contest else " --rotate --overwrite"
        return (
            f"{train}{own_videos} --clip-len 8 --trainable-layers layer3 layer4 fc --epochs 15 --batch-size 4 "
            "--opt adamw --lr 0.0005 --lr-head 0.005 --lr-scheduler onecycle --eval-every 5 --save-every 0"
        )
    if contest:
        return f"{train} --weights KINETICS400_V1 --cache-dataset --epochs 15 --batch-size 24 --lr 0.01"
    return f"{train} --weights KINETICS400_V1 --rotate --amp --overwrite"


def main():
    flags.set_constants_from_flags(globals())
    check_usage()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is clean, too
    journal = Journal(f"{REPORT}.progress")
    report_before = mtime_of(REPORT)
    videos, unreadable = videos_to_check()
    try:
        kept = check_share(videos, unreadable, journal)
        rows = final_rows(known_rows(journal, report_before), kept)
        missing = [path for path in [*videos, *unreadable] if str(path) not in rows]
        if missing and journal.world_size > 1:
            journal.say_missing(len(missing), REPORT)
            return
        Path(REPORT).absolute().parent.mkdir(parents=True, exist_ok=True)
        common.write_csv(REPORT, COLUMNS, (rows[video] for video in sorted(rows)))
        journal.clear()
    except OSError as e:
        common.refuse(f"a file cannot be read or written ({e}); what is finished is kept: mend this and start again")
    rows = [row for video, row in rows.items() if spelled_from_root(video)]
    print_reasons(rows)
    print(f"report: {REPORT}; quarantine: {QUARANTINE}")
    print(f"next: {next_training()}")
    if any(row["reason"] != "healthy" and row["action"] != "quarantined earlier" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
