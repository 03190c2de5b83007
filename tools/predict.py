"""Classify videos that no one has labelled: the five best classes of each, and a picture of what the model saw.

Reads   VIDEOS: files, folders (searched to the bottom) and patterns; CHECKPOINT. No labels, no class folders.
Writes  OUT/<name>.png for each video: the frames that the model saw, with their times, and the five best classes;
        CSV and JSONL, one row a video, if they are named. With --timeline, for each recording:
        OUT/<name>-timeline.png, -segments.csv and -annotated.mp4 (the label burnt in, sound kept)

    $ python tools/predict.py squats.mp4 more_videos/ --checkpoint checkpoint.pth
    $ python tools/predict.py session.mp4 --timeline

A video is judged by its first clip of the official frame rule, read by the code of training and preprocessing, and a
timeline by all clips of that rule that start STRIDE seconds apart.

Exit codes: 0 all videos are classified, 1 some cannot be (listed), 2 wrong usage, unusable model, full disk.
"""

import contextlib
import csv
import glob
import json
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
from common import finding, flags, machine

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
VIDEOS = []  # files, folders, patterns such as 'clips/*.mp4'
CHECKPOINT = "./checkpoint.pth"  # of train.py; or an ONNX file or folder, or a binary made by the local hub
OUT = "./predictions"  # folder for the pictures
PICTURES = True  # false: no pictures
CSV = ""  # a file for one row a video ("": none)
JSONL = ""  # the same with all logits, one JSON object a line ("": none)
TIMELINE = False  # true: label every moment of long recordings
STRIDE = 1.0  # seconds between the clips of a timeline
FRAME_RATE = 4  # frames per second at which a video is sampled; what the model was trained on
ROTATE = False  # true: turn videos upright as their files ask players to; the official pipeline does not
NUM_WORKERS = 0  # processes that decode; 0: one a core
TIMEOUT = 120  # seconds after which a video that does not finish decoding has failed
# ----------------------------------------------------------------------------------------------------------------------

BAR = 30  # characters of the longest bar in the terminal
WITH_BARS = 10  # with more videos than these, each gets one line


class Clip(NamedTuple):
    """The first clip of a video as the model takes it."""

    pixels: np.ndarray  # float32 (3, T, 112, 112), RGB in [0, 1]
    frame_indices: list  # T numbers of frames
    times: list  # T times in seconds, from the first frame of the video
    num_frames: int  # of the video
    fps: float
    rotation: int  # degrees clockwise by which players turn the video, and it was not turned


def find_videos():
    """The files that VIDEOS names: ([path], {path: why not}), each once, in the order of VIDEOS."""
    videos, failed = {}, {}
    for word in VIDEOS:
        paths = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not paths:
            failed[word] = "there is no such file"
        for path in paths:
            if os.path.isdir(path):
                found = finding.find_videos(path)
                inside = sorted(found.videos + found.misplaced)
                videos |= dict.fromkeys(os.path.join(path, video) for video in inside)
                failed |= {os.path.join(path, video): why for video, why in found.failures.items()}
                if not inside:
                    failed.setdefault(path, f"no video in this folder ({', '.join(sorted(finding.VIDEO_ENDINGS))})")
            else:
                videos[path] = None
    return list(videos), failed


def names_of(videos):
    """{video: name of its files in OUT}: the file's, with ending, folder and number where two have the same."""
    names, taken = {}, set()
    stems = Counter(Path(video).stem.lower() for video in videos)
    for video in videos:
        path = Path(video)
        name = path.stem if stems[path.stem.lower()] == 1 else f"{path.absolute().parent.name}__{path.name}"
        number = 1
        while name.lower() in taken:  # on Windows and macOS A.png is a.png
            number += 1
            name = f"{name.rpartition(' ')[0] if number > 2 else name} {number}"
        taken.add(name.lower())
        names[video] = name
    return names


# --- reading (in child processes) ------------------------------------------------------------------------------------


def read_clip(path, clip_len, frame_rate, rotate=False):
    """The Clip of a video, as preprocess_and_save.py reads it. Raises UnreadableVideo."""
    import torch

    from torchvision_patches.decoding import facts_of, has_times, opened, read_frames
    from torchvision_patches.spatial import resize_and_crop
    from torchvision_patches.video_utils import VideoClips

    pts, fps, _, rotation, _ = facts_of(path)
    clips, indices = VideoClips.compute_clips_for_video(torch.from_numpy(pts), clip_len, 1, fps, frame_rate)
    frames = read_frames(path, clips[0].numpy(), indices[0].numpy(), rotate=rotate)  # (T, H, W, 3)
    with opened(path) as (_, stream):
        tick = float(stream.time_base) if has_times(pts) else 1 / fps
    seconds = (clips[0].numpy() - pts[0]) * tick
    pixels = resize_and_crop(torch.from_numpy(frames)).numpy()
    return Clip(pixels, indices[0].tolist(), seconds.round(6).tolist(), len(pts), fps, 0 if rotate else rotation)


def results_of(function, arguments):
    """Call `function(*each of arguments)` in worker processes; yields (arguments, result or None, why not) in order."""
    import torchvision_patches.video_utils  # noqa: F401 (once, before the processes are forked, not in each of them)
    from torchvision_patches.decoding import UnreadableVideo
    from torchvision_patches.pool import WorkerLost, outcomes_of

    work, num_workers = partial(called, function), machine.num_workers(NUM_WORKERS)
    for each, result, error in outcomes_of(work, deque(arguments), num_workers, TIMEOUT, in_order=True):
        if isinstance(error, (UnreadableVideo, WorkerLost)):
            yield each, None, error.reason
        elif isinstance(error, (OSError, MemoryError)):
            yield each, None, str(error) or "it does not fit into memory"
        elif error:
            raise error
        else:
            yield each, result, ""


def called(function, arguments):
    return function(*arguments)


# --- one prediction a video -------------------------------------------------------------------------------------------


def predictions_of(videos, classifier):
    """Yields (video, Clip or None, logits float32 (num_classes,) or None, why not), in order, as they come."""
    waiting = []
    arguments = [(video, classifier.description.clip_len, FRAME_RATE, ROTATE) for video in videos]
    for (video, *_), clip, why in results_of(read_clip, arguments):
        waiting.append((video, clip, why))
        if sum(1 for _, clip, _ in waiting if clip) == classifier.batch_size:
            yield from classified(waiting, classifier)
            waiting = []
    yield from classified(waiting, classifier)


def classified(waiting, classifier):
    clips = [clip.pixels for _, clip, _ in waiting if clip]
    rows = iter(classifier.logits(np.stack(clips)) if clips else ())
    for video, clip, why in waiting:
        yield video, clip, next(rows) if clip else None, why


def predict_all(videos, failed, names, classifier):
    """Classify each video by its first clip; print, draw and list it. Videos that fail go to `failed`."""
    from common.calibration import best, softmax

    from tqdm import tqdm

    from see.drawing import draw_clip

    few = len(videos) <= WITH_BARS
    with (
        table_of_videos() as write,
        tqdm(total=len(videos), unit="video", disable=few or None) as bar,
        ThreadPoolExecutor(1) as painter,  # draws while the network classifies the next
    ):
        drawing = None
        for video, clip, logits, why in predictions_of(videos, classifier):
            bar.update()
            if why:
                failed[video] = why
                write({"video": video, "error": why})
                continue
            five = best(softmax(logits), classifier.classes)
            bar.write(lines_of(video, clip, five) if few else line_of(video, five))
            if PICTURES:
                if drawing:
                    drawing.result()  # one at a time: each holds a clip
                picture = Path(OUT, names[video] + ".png")
                drawing = painter.submit(draw_clip, picture, video, clip, five, classifier.about)
            row = {"video": video, "error": "", "classes": five, "logits": logits.tolist()}
            write(row | {key: value for key, value in clip._asdict().items() if key != "pixels"})
        for video, why in failed.items():
            if video not in names:  # what names no file at all
                write({"video": video, "error": why})
        if drawing:
            drawing.result()


@contextlib.contextmanager
def table_of_videos():
    """Yields a function that writes one row, a dict, to CSV and JSONL; both are complete at the end, or absent."""
    columns = ["video", "error", *(f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability"))]
    columns += ["num_frames", "fps", "rotation"]
    with contextlib.ExitStack() as stack:
        files = {}
        for name in filter(None, (CSV, JSONL)):
            Path(name).absolute().parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(common.written_then_renamed(name))
            files[name] = stack.enter_context(
                open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace")
            )
        if CSV:
            table = csv.DictWriter(files[CSV], columns, extrasaction="ignore")
            table.writeheader()

        def write(row):
            if JSONL:
                files[JSONL].write(json.dumps(row) + "\n")
            if CSV:
                cells = [cell for name, p in row.get("classes", []) for cell in (name, f"{p:.4f}")]
                table.writerow(row | dict(zip(columns[2:], cells)))

        yield write


def lines_of(video, clip, five):
    """What is printed of a video: its file, what is odd about it, and its five best classes with bars."""
    from see.drawing import about_rotation

    width = max(len(name) for name, _ in five)
    lines = [f"\n{video}: {clip.num_frames / clip.fps:.1f} s, {clip.fps:.3g} fps{about_rotation(clip.rotation)}"]
    lines += [f"  {name:{width}}  {'█' * round(BAR * p):{BAR}} {100 * p:5.1f} %" for name, p in five]
    return "\n".join(lines)


def line_of(video, five):
    return f"{video}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in five[:2])


# --- the end ----------------------------------------------------------------------------------------------------------


def report(videos, failed):
    for video, why in failed.items():
        print(f"failed: {video}: {why}")
    done = sum(video not in failed for video in videos)
    print(f"\n{done + len(failed):,} videos = {done:,} classified + {len(failed):,} failed")
    written = [f"pictures in {OUT}/"] * (PICTURES or TIMELINE) + list(filter(None, (CSV, JSONL)))
    if done and written:
        print("see: " + ", ".join(written))


def main():
    flags.set_constants_from_flags(globals(), words="VIDEOS")
    if not VIDEOS:
        common.refuse("name videos, folders or patterns: python tools/predict.py squats.mp4 more_videos/")
    if TIMELINE and (CSV or JSONL):
        common.refuse("CSV and JSONL list one prediction a video; a timeline writes its segments into OUT")
    videos, failed = find_videos()
    if not videos:
        common.refuse("no video found: " + "; ".join(f"{path}: {why}" for path, why in list(failed.items())[:3]))
    from see.classifier import load

    classifier = load(CHECKPOINT)
    frames = classifier.description.clip_len
    print(f"{classifier.about}: {len(classifier.classes)} classes, {frames} frames at {FRAME_RATE} fps")
    names = names_of(videos)
    try:
        Path(OUT).mkdir(parents=True, exist_ok=True)
        if TIMELINE:
            from see import timeline

            rates = STRIDE, FRAME_RATE, ROTATE
            for video, why in timeline.label_all(videos, names, classifier, results_of, OUT, *rates):
                failed |= {video: why} if why else {}
        else:
            predict_all(videos, failed, names, classifier)
    except OSError as e:
        common.refuse(f"{e.filename or OUT} cannot be written ({e.strerror}); mend this and start again")
    if classifier.latency:
        print(classifier.latency())
    report(videos, failed)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
