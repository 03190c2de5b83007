"""Turn a folder of videos into the tensors that the deployed model takes, and a manifest that says which is which.

Reads  DATA_ROOT/<class>/<video>. Writes OUT_ROOT/<class>/<video>.npy, float32 (1, 3, T, H, W) NCTHW, RGB in [0, 1],
not normalised: the first clip by the official frame rule, the same that `train.py --test-only` scores. In float16, half
the size, logits of the sample dataset moved by 0.002 and one prediction of 48 changed: not offered.
Writes OUT_ROOT/manifest.jsonl (video_path, label, tensor_path, shape, dtype, frame_indices, num_frames, fps,
frame_rate, rotation and the source's size and mtime; sorted by video path), OUT_ROOT/failures.jsonl (video_path, error)
and OUT_ROOT/settings.json (how all clips are made).

It can be killed and started again: finished tensors of unchanged videos are kept. Several processes share the work
through a journal, which videos/journal.py explains:

    $ python tools/preprocess_and_save.py
    $ torchrun --nproc-per-node 4 -- tools/preprocess_and_save.py
    $ sbatch --array 0-7 --wrap "python tools/preprocess_and_save.py"
"""

import hashlib
import io
import json
import math
import os
import sys
from collections import deque
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import common
from common import finding, flags, json_lines, machine, names
from common.checkpoints import load_checkpoint
from common.held_out import read_held_out

import numpy as np

from videos.journal import Journal

# ----------------------------------------------------------------------------------------------------------------------
DATA_ROOT = "./QEVD_organized/val"  # folder with <class>/<video>
OUT_ROOT = "./preprocessed_tensors"  # where tensors, manifest.jsonl and failures.jsonl go
CHECKPOINT = ""  # make the clips that this checkpoint of train.py was trained on ("": by the next three lines)
CLIP_LEN = 16  # frames a clip
FRAME_RATE = 4  # frames per second at which a video is sampled
ROTATE = False  # true: turn videos upright as their files ask players to; the official pipeline does not
HELD_OUT = False  # true: only the videos that CHECKPOINT was kept from (--hold-out); false: none of these
MAX_PER_CLASS = 0  # at most so many videos of each class, chosen by a hash of their names; 0: all
NUM_WORKERS = 0  # processes; 0: one a core that this process may use
TIMEOUT = 120  # seconds after which a video that does not finish decoding has failed
# ----------------------------------------------------------------------------------------------------------------------

CURE = "delete it, or choose another with --out-root"


def videos_to_preprocess():
    """The sorted paths <class>/<video> below DATA_ROOT that get tensors, and {path: error} of what cannot."""
    found = finding.find_videos(DATA_ROOT)
    if others := finding.about_other_endings(found):
        print(others)
    failures = found.failures | dict.fromkeys(found.misplaced, "it does not lie at DATA_ROOT/<class>/<video>")
    taken = {}
    for video in found.videos:
        if taken.setdefault(tensor_path(video), video) != video:
            failures[video] = f"its tensor would overwrite that of {taken[tensor_path(video)]}: rename one of the two"
    return [video for video in found.videos if video not in failures], failures


def some_of_each_class(videos):
    """At most MAX_PER_CLASS of the sorted `videos` of each class, the same ones however many others are there."""
    chosen = []
    for _, of_class in groupby(videos, os.path.dirname):
        by_hash = sorted(of_class, key=lambda video: hashlib.sha256(os.fsencode(video)).digest())
        chosen += sorted(by_hash[: MAX_PER_CLASS or None])
    return chosen


def tensor_path(video):
    """Where the tensor of <class>/<video>.<extension> goes, relative to OUT_ROOT."""
    label, name = os.path.split(os.path.splitext(video)[0])
    return os.path.join(label, names.file_name(name, ".npy"))


def source_of(path):
    """What tells whether a video has changed: its size in bytes and mtime in ns, -1 for a file that is not there."""
    from torchvision_patches.decoding import stamp

    return dict(zip(("source_size", "source_mtime_ns"), stamp(path)))


def of_hold_out(videos, saved):
    """Of the `videos` <class>/<video> those that CHECKPOINT, whose keys are `saved`, was kept from, or the others.

    Exits with code 2 and one sentence if the list of them is missing, or HELD_OUT asks for what there is not.
    """
    listed = set(read_held_out(saved, CHECKPOINT).videos) if CHECKPOINT else set()
    if HELD_OUT and not listed:
        common.refuse("HELD_OUT needs a CHECKPOINT that was trained with --hold-out: none of its videos is known")
    split = Path(os.path.abspath(DATA_ROOT)).name  # the list has <split>/<class>/<video>
    taken = [video for video in videos if (f"{split}/{video}" in listed) == HELD_OUT]
    if listed:
        which = "those that were held out of training" if HELD_OUT else "not those that were held out of training"
        print(f"{len(taken):,} of {len(videos):,} videos are taken: {which}")
    return taken


def clip_of_tensors(saved, given):
    """The ClipDescription of the tensors: CHECKPOINT's, or the official one with CLIP_LEN, FRAME_RATE and ROTATE.

    saved: the checkpoint's keys. given: the names of the constants that a flag set. Exits with code 2 if one of them
    contradicts the checkpoint.
    """
    from torchvision_patches import clip

    wanted = {"clip_len": CLIP_LEN, "frame_rate": float(FRAME_RATE), "rotate": ROTATE}
    if not CHECKPOINT:
        return clip.of_network()._replace(**wanted)
    asked = {field: value for field, value in wanted.items() if field.upper() in given}
    try:
        told, untold = clip.described(saved, saved["args"])
        description = clip.agreed(told, untold, asked, CHECKPOINT)
    except ValueError as e:
        common.refuse(str(e))
    if assumed := [field for field in clip.OF_PIXELS[:-1] if field in untold and field not in asked]:
        print(f"{CHECKPOINT} does not say all of how its clips are made; assumed: {description.says(assumed)}")
    return description


def note_settings(description):
    """Remember in OUT_ROOT/settings.json how the clips are made; refuse an OUT_ROOT that was filled with others."""
    from torchvision_patches.clip import OF_PIXELS

    file = Path(OUT_ROOT, "settings.json")
    if not file.exists() and Path(OUT_ROOT, "manifest.jsonl").exists():
        common.refuse(f"{OUT_ROOT} holds tensors of unknown settings (no settings.json); {CURE}")
    common.same_settings(file, {key: description.as_dict()[key] for key in OF_PIXELS}, CURE)


def bytes_of_tensor(shape):
    """Bytes of a .npy file of float32: a header of 128 bytes, then the values."""
    return 128 + 4 * math.prod(shape)


def is_whole(tensor, shape):
    """Whether a .npy file of float32 is there and not cut off."""
    try:
        return os.path.getsize(tensor) == bytes_of_tensor(shape)
    except OSError:
        return False


def read_progress(videos, journal, clip_len):
    """What earlier runs and the other processes have finished: (table, {video: error of this launch}).

    table: one record a video, 40 bytes and 4 for each frame, zeros for what is not finished; 200,000 rows as dicts
    would take 280 MB in each process. What was written counts if its source is unchanged and its tensor is whole.
    """
    columns = [("frame_indices", np.int32, (clip_len,)), ("num_frames", np.int64), ("fps", np.float64)]
    columns += [("rotation", np.int64)]
    table = np.zeros(len(videos), [*columns, ("source_size", np.int64), ("source_mtime_ns", np.int64)])
    position, failed = {video: i for i, video in enumerate(videos)}, {}
    # in this order: a process that merges meanwhile replaces the manifest before it clears the journal
    earlier = ((row, False, 0) for row in json_lines.read_rows(Path(OUT_ROOT, "manifest.jsonl")))
    for row, current, _ in chain(journal.rows(), earlier):
        video = "/".join(Path(row["video_path"]).parts[-2:])  # DATA_ROOT may have moved
        path = os.path.join(DATA_ROOT, video)
        if video not in position or any(row.get(key) != value for key, value in source_of(path).items()):
            continue
        if "error" in row:
            failed |= {video: row["error"]} if current else {}
        elif is_whole(Path(OUT_ROOT, row["tensor_path"]), row["shape"]):
            table[position[video]] = tuple(row[column] for column in table.dtype.names)
    return table, {video: error for video, error in failed.items() if not table["num_frames"][position[video]]}


def manifest_row(video, record, description):
    """The line of manifest.jsonl, as a dict, of a video with this record of `read_progress`'s table."""
    row = {"video_path": os.path.join(DATA_ROOT, video), "label": os.path.dirname(video)}
    row |= {"tensor_path": tensor_path(video), "shape": shape_of(description), "dtype": "float32"}
    frame_indices, num_frames, fps, rotation, size, mtime_ns = record
    row |= {"frame_indices": np.asarray(frame_indices).tolist(), "num_frames": num_frames, "fps": fps}
    row |= {"frame_rate": description.frame_rate, "rotation": rotation}
    return row | {"source_size": size, "source_mtime_ns": mtime_ns}


def shape_of(description):
    """The shape of a tensor, (1, 3, T, H, W), as a list."""
    return [1, 3, description.clip_len, *description.crop_size]


def preprocess(data_root, out_root, description, video):
    """Read and save the first clip of one video. Returns its record for `read_progress`'s table.

    Raises UnreadableVideo if the clip cannot be decoded, OSError if the tensor cannot be written.
    """
    from torchvision_patches.clip import first_clip

    path = os.path.join(data_root, video)
    source = source_of(path)  # before it is read: a video that is replaced meanwhile is done again next time
    clip = first_clip(path, description)
    content = io.BytesIO()
    np.save(content, clip.pixels[None])  # to a file, it would hide the reason when that cannot be written
    with common.written_then_renamed(Path(out_root, tensor_path(video))) as temporary:
        temporary.write_bytes(content.getbuffer())
    return clip.frame_indices, clip.num_frames, clip.fps, clip.rotation, *source.values()


def results_of(videos, description, num_workers):
    """Preprocess `videos` in worker processes; yields (video, record or None, why not) as they finish.

    A video that hangs or crashes its decoder fails alone. Raises OSError if a tensor cannot be written.
    """
    from torchvision_patches.clip import resize_function
    from torchvision_patches.pool import outcomes_of

    resize_function()  # once, before the processes are forked, not in each of them

    work = partial(preprocess, DATA_ROOT, OUT_ROOT, description)
    for outcome in outcomes_of(work, deque(videos), num_workers, TIMEOUT):
        yield outcome.item, outcome.value, outcome.why_not()


def run_share(videos, description, journal, num_kept):
    """Preprocess `videos`, what is left of this process's share, and write a row for each into the journal."""
    from tqdm import tqdm

    for label in {os.path.dirname(video) for video in videos}:
        Path(OUT_ROOT, label).mkdir(exist_ok=True)
    with tqdm(total=num_kept + len(videos), initial=num_kept, unit="clip", desc="preprocessing") as bar:
        for video, record, error in results_of(videos, description, machine.num_workers(NUM_WORKERS)):
            path = os.path.join(DATA_ROOT, video)
            failure = {"video_path": path, "error": error} | source_of(path)
            journal.append(failure if error else manifest_row(video, record, description))
            bar.update()


def write_manifest(videos, table, failures, description, journal):
    """Write manifest.jsonl and failures.jsonl, sorted by video path; clear the journal, and drop what kills left."""
    failures = sorted(failures.items())
    errors = ({"video_path": os.path.join(DATA_ROOT, video), "error": error} for video, error in failures)
    done = ((video, record.tolist()) for video, record in zip(videos, table) if record["num_frames"])
    rows = (manifest_row(video, record, description) for video, record in done)
    for name, lines in (("failures.jsonl", errors), ("manifest.jsonl", rows)):
        with common.written_then_renamed(Path(OUT_ROOT, name)) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    journal.clear()
    # another process may be writing what looks left over
    for file in Path(OUT_ROOT).rglob(".*.tmp") if journal.world_size == 1 else []:
        file.unlink(missing_ok=True)


def main():
    given = flags.set_constants_from_flags(globals())
    if not os.path.isdir(DATA_ROOT):
        common.refuse(f"there is no folder DATA_ROOT = {DATA_ROOT}; it must hold <class>/<video>")
    saved = load_checkpoint(CHECKPOINT) if CHECKPOINT else {}
    found, failures = videos_to_preprocess()
    found = of_hold_out(found, saved)
    videos = some_of_each_class(found)
    if not videos:
        others = "".join(f"; {names.printable(path)}: {error}" for path, error in sorted(failures.items())[:3])
        common.refuse(f"no video lies at {DATA_ROOT}/<class>/<video>, which DATA_ROOT must hold{others}")
    if len(videos) < len(found):
        print(f"{len(videos):,} of {len(found):,} videos are taken: at most {MAX_PER_CLASS} of each class")
    description = clip_of_tensors(saved, given)
    try:
        preprocess_all(videos, failures, description)
    except OSError as e:
        common.refuse(f"{OUT_ROOT} cannot be written ({e}); what is finished is kept, mend this and start again")


def preprocess_all(videos, failures, description):
    """Do this process's share of `videos`; the process that ends last writes the manifest. Exits with 0 or 1."""
    journal = Journal(Path(OUT_ROOT, "progress"))
    Path(OUT_ROOT).mkdir(parents=True, exist_ok=True)
    note_settings(description)
    before = read_progress(videos, journal, description.clip_len)[0]["num_frames"] > 0
    if needed := int((~before).sum()) * bytes_of_tensor(shape_of(description)):
        common.check_space(OUT_ROOT, needed, "make room, or choose another OUT_ROOT; no tensor was written")
    mine = np.array([journal.is_mine(video) for video in videos])
    todo = [videos[i] for i in np.flatnonzero(mine & ~before)]
    run_share(todo, description, journal, int((mine & before).sum()))
    table, errors = read_progress(videos, journal, description.clip_len)
    after = table["num_frames"] > 0
    missing = [video for video, is_done in zip(videos, after) if not is_done and video not in errors]
    if journal.world_size == 1:  # no other process is at work on them
        errors |= dict.fromkeys(missing, "it was changed after it was read: start again")
        missing = []
    if missing:
        journal.say_missing(len(missing), "manifest.jsonl")
    else:
        write_manifest(videos, table, failures | errors, description, journal)
        report_tensors(table[after], failures | errors, description)
        what_for = {"checkpoint": CHECKPOINT} if CHECKPOINT else {}
        what_for["data_dir"] = OUT_ROOT
        if MAX_PER_CLASS:
            scored = Path(OUT_ROOT).with_name("preprocessed_tensors")
            scored = scored if Path(scored, "manifest.jsonl").exists() else "SCORED_CLIPS"
            what_for |= {"precision": "w8a8", "CALIBRATION_DIR": OUT_ROOT, "data_dir": scored}
        print(f"next: {flags.next_command('example_export.py', OUT_ROOT, CHECKPOINT, **what_for)}")
    saved, kept = int((mine & after & ~before).sum()), int((mine & after & before).sum())
    failed = int(mine.sum()) - saved - kept + (len(failures) if journal.rank == 0 else 0)
    print(f"share {journal.rank} of {journal.world_size}: " if journal.world_size > 1 else "", end="")
    print(f"found {saved + kept + failed:,} = saved {saved:,} + kept {kept:,} + failed {failed:,}")
    # of several processes only the one that merges says so: torchrun would end the others at the first exit code 1
    sys.exit(1 if not missing and failures | errors else 0)


def report_tensors(table, failures, description):
    """Print how many clips there are, how many of short or rotated videos, and the first failures."""
    short = int((table["num_frames"] * description.frame_rate / table["fps"] < description.clip_len).sum())
    print(f"{len(table):,} clips in {OUT_ROOT}/manifest.jsonl, {short:,} of them of short videos, sampled faster")
    if rotated := np.count_nonzero(table["rotation"]):
        how = "are taken as they lie, as the official pipeline does (see ROTATE)"
        how = "are turned upright" if description.rotate else how
        print(f"{rotated:,} are of videos that ask players to turn them; they {how}")
    for video, error in sorted(failures.items())[:10]:
        print(f"failed: {names.printable(os.path.join(DATA_ROOT, video))}: {error}")
    if failures:
        print(f"{len(failures):,} failed, all in {OUT_ROOT}/failures.jsonl")


if __name__ == "__main__":
    main()
