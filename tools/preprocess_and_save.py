"""Turn a folder of videos into the tensors that the deployed model takes, and a manifest that says which is which.

Reads  DATA_ROOT/<class>/<video>. Writes OUT_ROOT/<class>/<video>.npy, float32 (1, 3, T, 112, 112) NCTHW, RGB in
[0, 1], not normalised: the first clip by the official frame rule, the same that `train.py --test-only` scores. In
float16, half the size, logits of the sample dataset moved by 0.002 and one prediction of 48 changed: not offered.
Writes OUT_ROOT/manifest.jsonl (video_path, label, tensor_path, shape, dtype, frame_indices, num_frames, fps and the
source's size and mtime; sorted by video path) and OUT_ROOT/failures.jsonl (video_path, error).

It can be killed and started again: finished tensors of unchanged videos are kept. Several processes share the work,
as journal.py says:

    $ python tools/preprocess_and_save.py
    $ torchrun --nproc-per-node 4 -- tools/preprocess_and_save.py
    $ sbatch --array 0-7 --wrap "python tools/preprocess_and_save.py"
"""

import contextlib
import errno
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
from common import finding, flags, machine

import numpy as np

from videos.journal import Journal

# ----------------------------------------------------------------------------------------------------------------------
DATA_ROOT = "./QEVD_organized/val"  # folder with <class>/<video>
OUT_ROOT = "./preprocessed_tensors"  # where tensors, manifest.jsonl and failures.jsonl go
CLIP_LEN = 16  # frames a clip; what the model was trained on
FRAME_RATE = 4  # frames per second at which a video is sampled
ROTATE = False  # true: turn videos upright as their files ask players to; the official pipeline does not
MAX_PER_CLASS = 0  # at most so many videos of each class, chosen by a hash of their names; 0: all
NUM_WORKERS = 0  # processes; 0: one a core that this process may use
TIMEOUT = 120  # seconds after which a video that does not finish decoding has failed
# ----------------------------------------------------------------------------------------------------------------------

CURE = "delete it, or choose another with --out-root"


def list_videos():
    """The sorted paths <class>/<video> below DATA_ROOT that get tensors, and {path: error} of what cannot."""
    found = finding.find_videos(DATA_ROOT)
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
    return os.path.splitext(video)[0] + ".npy"


def source_of(path):
    """What tells whether a video has changed: its size in bytes and mtime in ns, None for a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return {"source_size": None, "source_mtime_ns": None}
    return {"source_size": status.st_size, "source_mtime_ns": status.st_mtime_ns}


def check_settings():
    """Remember the settings in OUT_ROOT/settings.json; refuse an OUT_ROOT that was filled with others."""
    from torchvision_patches.spatial import PRESET

    settings = {"clip_len": CLIP_LEN, "frame_rate": FRAME_RATE, "rotate": ROTATE}
    settings |= {"resize_size": list(PRESET.resize_size), "crop_size": list(PRESET.crop_size)}
    file = Path(OUT_ROOT, "settings.json")
    if not file.exists() and Path(OUT_ROOT, "manifest.jsonl").exists():
        common.refuse(f"{OUT_ROOT} holds tensors of unknown settings (no settings.json); {CURE}")
    if not file.exists():
        common.write_text(file, json.dumps(settings, indent=2) + "\n")
    before = {"rotate": False} | json.loads(file.read_text())  # the version before could not rotate
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
    if changed:
        common.refuse(f"{OUT_ROOT} was filled with other settings ({', '.join(changed)}); {CURE}")


def is_whole(tensor, shape):
    """Whether a float32 .npy file is there and not cut off: it has a header of 128 bytes, then the values."""
    try:
        return os.path.getsize(tensor) == 128 + 4 * math.prod(shape)
    except OSError:
        return False


def manifest_rows():
    """Yield the rows of manifest.jsonl, as those of an earlier launch, if there is one."""
    with contextlib.suppress(FileNotFoundError), open(Path(OUT_ROOT, "manifest.jsonl"), "rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line), False, 0


def read_progress(videos, journal):
    """What earlier runs and the other processes have finished: (table, {video: error of this launch}).

    table: one record a video, 40 bytes and 4 for each frame, zeros for what is not finished; 200,000 rows as dicts
    would take 280 MB in each process. What was written counts if its source is unchanged and its tensor is whole.
    """
    columns = [("frame_indices", np.int32, (CLIP_LEN,)), ("num_frames", np.int64), ("fps", np.float64)]
    columns += [("rotation", np.int64)]
    table = np.zeros(len(videos), [*columns, ("source_size", np.int64), ("source_mtime_ns", np.int64)])
    position, failed = {video: i for i, video in enumerate(videos)}, {}
    # in this order: a process that merges meanwhile replaces the manifest before it clears the journal
    for row, current, _ in chain(journal.rows(), manifest_rows()):
        video = "/".join(Path(row["video_path"]).parts[-2:])  # DATA_ROOT may have moved
        path = os.path.join(DATA_ROOT, video)
        if video not in position or any(row.get(key) != value for key, value in source_of(path).items()):
            continue
        if "error" in row:
            failed |= {video: row["error"]} if current else {}
        elif is_whole(Path(OUT_ROOT, row["tensor_path"]), row["shape"]):
            row = {"rotation": 0} | row  # the version before did not tell it
            table[position[video]] = tuple(row[column] for column in table.dtype.names)
    return table, {video: error for video, error in failed.items() if not table["num_frames"][position[video]]}


def manifest_row(video, record):
    """The line of manifest.jsonl, as a dict, of a video with this record of `read_progress`'s table."""
    from torchvision_patches.spatial import PRESET

    row = {"video_path": os.path.join(DATA_ROOT, video), "label": os.path.dirname(video)}
    row |= {"tensor_path": tensor_path(video), "shape": [1, 3, CLIP_LEN, *PRESET.crop_size], "dtype": "float32"}
    frame_indices, num_frames, fps, rotation, size, mtime_ns = record
    row |= {"frame_indices": np.asarray(frame_indices).tolist(), "num_frames": num_frames, "fps": fps}
    row |= {"rotation": rotation}
    return row | {"source_size": size, "source_mtime_ns": mtime_ns}


def preprocess(data_root, out_root, clip_len, frame_rate, rotate, video):
    """Decode, resize, crop and save the first clip of one video. Returns its record for `read_progress`'s table.

    Raises UnreadableVideo if the clip cannot be decoded, OSError if the tensor cannot be written.
    """
    import torch

    from torchvision_patches.decoding import facts_of, read_frames
    from torchvision_patches.spatial import resize_and_crop
    from torchvision_patches.video_utils import VideoClips

    path = os.path.join(data_root, video)
    source = source_of(path)  # before it is read: a video that is replaced meanwhile is done again next time
    facts = facts_of(path)
    pts = torch.from_numpy(facts.pts)
    clips, frame_indices = VideoClips.compute_clips_for_video(pts, clip_len, 1, facts.fps, frame_rate)
    frames = read_frames(path, clips[0].numpy(), frame_indices[0].numpy(), rotate=rotate)  # (T, H, W, 3)
    tensor = resize_and_crop(torch.from_numpy(frames))[None].numpy()  # (1, 3, T, 112, 112)
    content = io.BytesIO()
    np.save(content, tensor)  # to a file, it would hide the reason when that cannot be written
    with common.written_then_renamed(Path(out_root, tensor_path(video))) as temporary:
        temporary.write_bytes(content.getbuffer())
    return frame_indices[0].tolist(), len(pts), facts.fps, facts.rotation, *source.values()


def results_of(videos, num_workers):
    """Preprocess `videos` in worker processes; yields (video, record or None, error or None) as they finish.

    A video that hangs or crashes its decoder fails alone. Raises OSError if a tensor cannot be written.
    """
    from torchvision_patches.decoding import UnreadableVideo
    from torchvision_patches.pool import WorkerLost, outcomes_of

    work = partial(preprocess, DATA_ROOT, OUT_ROOT, CLIP_LEN, FRAME_RATE, ROTATE)
    for video, record, error in outcomes_of(work, deque(videos), num_workers, TIMEOUT):
        if isinstance(error, (UnreadableVideo, WorkerLost)):
            yield video, None, error.reason
        elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            yield video, None, "its name is too long for that of its tensor: shorten it"
        elif error:
            raise error
        else:
            yield video, record, None


def run_share(videos, journal, num_kept):
    """Preprocess `videos`, what is left of this process's share, and write a row for each into the journal."""
    from tqdm import tqdm

    for label in {os.path.dirname(video) for video in videos}:
        Path(OUT_ROOT, label).mkdir(exist_ok=True)
    with tqdm(total=num_kept + len(videos), initial=num_kept, unit="clip", desc="preprocessing") as bar:
        for video, record, error in results_of(videos, machine.num_workers(NUM_WORKERS)):
            path = os.path.join(DATA_ROOT, video)
            failure = {"video_path": path, "error": error} | source_of(path)
            journal.append(failure if error else manifest_row(video, record))
            bar.update()


def write_manifest(videos, table, failures, journal):
    """Write manifest.jsonl and failures.jsonl, sorted by video path; clear the journal, and drop what kills left."""
    failures = sorted(failures.items())
    errors = ({"video_path": os.path.join(DATA_ROOT, video), "error": error} for video, error in failures)
    rows = (manifest_row(video, record.tolist()) for video, record in zip(videos, table) if record["num_frames"])
    for name, lines in (("failures.jsonl", errors), ("manifest.jsonl", rows)):
        with common.written_then_renamed(Path(OUT_ROOT, name)) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    journal.clear()
    # another process may be writing what looks left over
    for file in Path(OUT_ROOT).rglob(".*.tmp") if journal.world_size == 1 else []:
        file.unlink(missing_ok=True)


def main():
    flags.set_constants_from_flags(globals())
    if not os.path.isdir(DATA_ROOT):
        common.refuse(f"there is no folder DATA_ROOT = {DATA_ROOT}; it must hold <class>/<video>")
    found, failures = list_videos()
    videos = some_of_each_class(found)
    if not videos:
        others = "".join(f"; {path}: {error}" for path, error in sorted(failures.items())[:3])
        common.refuse(f"no video lies at {DATA_ROOT}/<class>/<video>, which DATA_ROOT must hold{others}")
    if len(videos) < len(found):
        print(f"{len(videos):,} of {len(found):,} videos are taken: at most {MAX_PER_CLASS} of each class")
    try:
        preprocess_all(videos, failures)
    except OSError as e:
        common.refuse(f"{OUT_ROOT} cannot be written ({e}); what is finished is kept, mend this and start again")


def preprocess_all(videos, failures):
    """Do this process's share of `videos`; the process that ends last writes the manifest. Exits with 0 or 1."""
    journal = Journal(Path(OUT_ROOT, "progress"))
    Path(OUT_ROOT).mkdir(parents=True, exist_ok=True)
    check_settings()
    before = read_progress(videos, journal)[0]["num_frames"] > 0
    if needed := int((~before).sum()) * 4 * 3 * CLIP_LEN * 112 * 112:
        common.check_space(OUT_ROOT, needed, "make room, or choose another OUT_ROOT; no tensor was written")
    mine = np.array([journal.is_mine(video) for video in videos])
    run_share([videos[i] for i in np.flatnonzero(mine & ~before)], journal, int((mine & before).sum()))
    table, errors = read_progress(videos, journal)
    after = table["num_frames"] > 0
    missing = [video for video, is_done in zip(videos, after) if not is_done and video not in errors]
    if journal.world_size == 1:  # no other process is at work on them
        errors |= dict.fromkeys(missing, "it was changed after it was read: start again")
        missing = []
    if missing:
        journal.say_missing(len(missing), "manifest.jsonl")
    else:
        write_manifest(videos, table, failures | errors, journal)
        report(table[after], failures | errors)
        what_for = {"precision": "w8a8", "CALIBRATION_DIR": OUT_ROOT} if MAX_PER_CLASS else {"data_dir": OUT_ROOT}
        print(f"next: {flags.next_command('example_export.py', OUT_ROOT, **what_for)}")
    saved, kept = int((mine & after & ~before).sum()), int((mine & after & before).sum())
    failed = int(mine.sum()) - saved - kept + (len(failures) if journal.rank == 0 else 0)
    print(f"share {journal.rank} of {journal.world_size}: " if journal.world_size > 1 else "", end="")
    print(f"found {saved + kept + failed:,} = saved {saved:,} + kept {kept:,} + failed {failed:,}")
    # of several processes only the one that merges says so: torchrun would end the others at the first exit code 1
    sys.exit(1 if not missing and failures | errors else 0)


def report(table, failures):
    """Print how many clips there are, how many of short or rotated videos, and the first failures."""
    short = int((table["num_frames"] * FRAME_RATE / table["fps"] < CLIP_LEN).sum())
    print(f"{len(table):,} clips in {OUT_ROOT}/manifest.jsonl, {short:,} of them of short videos, sampled faster")
    if rotated := np.count_nonzero(table["rotation"]):
        how = "are turned upright" if ROTATE else "are taken as they lie, as the official pipeline does (see ROTATE)"
        print(f"{rotated:,} are of videos that ask players to turn them; they {how}")
    for video, error in sorted(failures.items())[:10]:
        print(f"failed: {os.path.join(DATA_ROOT, video)}: {error}")
    if failures:
        print(f"{len(failures):,} failed, all in {OUT_ROOT}/failures.jsonl")


if __name__ == "__main__":
    main()
