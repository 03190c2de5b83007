"""What happens when in a long recording: sliding clips, segments, a strip, and a copy with the label burnt in.

Clips are those of the official frame rule, `stride` seconds apart, and one that ends with the recording. The label of a
moment is the best class of the mean probabilities of all clips that show it. Memory does not grow with the length.
"""

import csv
import itertools
from pathlib import Path
from typing import NamedTuple

import common
from common.calibration import softmax

import numpy as np

from see import drawing
from see.annotated_copy import annotate

CHUNK = 64  # sampled frames that are read at once: 16 s, and 10 MB as the network takes them
THUMBNAILS = 10


class Plan(NamedTuple):
    """The frames that the clips of a recording are made of: every one at the rate of the official rule."""

    pts: np.ndarray  # int64 (n,), as `read_frames` takes them
    frame_indices: np.ndarray  # int64 (n,)
    seconds: np.ndarray  # float (n,), from the first frame
    duration: float  # s, of the whole
    rotation: int  # degrees clockwise by which players turn it


class Segment(NamedTuple):
    """A stretch of a recording with one label; "" where nothing could be read."""

    start: float  # s
    end: float  # s
    label: str
    probability: float  # mean over the stretch


# --- reading (in child processes) ------------------------------------------------------------------------------------


def plan_of(path, clip_len, frame_rate):
    """The Plan of a recording. Raises UnreadableVideo."""
    import torch

    from torchvision_patches.decoding import facts_of, has_times, opened
    from torchvision_patches.video_utils import VideoClips

    pts, fps, _, rotation, _ = facts_of(path)
    clips, indices = VideoClips.compute_clips_for_video(torch.from_numpy(pts), clip_len, 1, fps, frame_rate)
    sampled, numbers = (np.concatenate([rows[:, 0].numpy(), rows[-1, 1:].numpy()]) for rows in (clips, indices))
    with opened(path) as (_, stream):
        tick = float(stream.time_base) if has_times(pts) else 1 / fps
    return Plan(sampled, numbers, (sampled - pts[0]) * tick, float((pts[-1] - pts[0]) * tick + 1 / fps), rotation)


def read_chunk(path, pts, frame_indices, rotate):
    """Some frames of a recording as the network takes them: float32 (n, 3, 112, 112). Raises UnreadableVideo."""
    import torch

    from torchvision_patches.decoding import read_frames
    from torchvision_patches.spatial import resize_and_crop

    def convert(frame):  # one at a time, because full frames of 16 s may be large; as bytes, which `read_frames` keeps
        return resize_and_crop(torch.from_numpy(frame)[None]).numpy()[:, 0].view(np.uint8)

    return read_frames(path, pts, frame_indices, convert, rotate).view(np.float32)


# --- clips -> probabilities -> segments -------------------------------------------------------------------------------


def starts_of(num_frames, clip_len, step):
    """Where clips start among the sampled frames: every `step` frames, and the last one that is possible."""
    last = num_frames - clip_len
    return [*range(0, last, step), last]


def probabilities_of(path, plan, classifier, results_of, step, rotate, bar):
    """Classify the clips of a recording as its frames come in.

    Returns (starts int (W,), probabilities float (W, num_classes), NaN where frames are missing, {chunk: why}, some
    frames for a picture [(seconds, float32 (3, 1, 112, 112))]).
    """
    starts = starts_of(len(plan.pts), classifier.description.clip_len, step)
    shown = set(np.linspace(0, len(plan.pts) - 1, THUMBNAILS).round().astype(int).tolist())
    edges = range(0, len(plan.pts), CHUNK)
    chunks = ((path, plan.pts[i : i + CHUNK], plan.frame_indices[i : i + CHUNK], rotate) for i in edges)
    frames, first, waiting, rows, missing, thumbnails = np.empty((0, 3, 112, 112), np.float32), 0, [], [], {}, []
    todo = iter([*starts, None])
    start = next(todo)
    for i, (_, chunk, why) in zip(edges, results_of(read_chunk, chunks)):
        if why:
            missing[i] = why
            chunk = np.full((min(CHUNK, len(plan.pts) - i), 3, 112, 112), np.nan, np.float32)
        thumbnails += [(plan.seconds[k], chunk[k - i][:, None]) for k in range(i, i + len(chunk)) if k in shown]
        frames = np.concatenate([frames, chunk])
        while start is not None and start + classifier.description.clip_len <= first + len(frames):
            waiting.append(frames[start - first :][: classifier.description.clip_len].transpose(1, 0, 2, 3))
            start = next(todo)
            if len(waiting) == classifier.batch_size or start is None:
                rows.append(classify(waiting, classifier))
                waiting = []
        drop = min(len(frames), (start if start is not None else first) - first)
        frames, first = frames[drop:], first + drop
        bar.update(len(chunk))
    return np.array(starts), np.concatenate(rows), missing, thumbnails


def classify(clips, classifier):
    """Probabilities (B, num_classes) of clips float32 (3, T, 112, 112); NaN for those with missing frames."""
    good = [not np.isnan(clip).any() for clip in clips]
    rows = np.full((len(clips), len(classifier.classes)), np.nan, np.float32)
    if any(good):
        rows[good] = softmax(classifier.logits(np.stack(list(itertools.compress(clips, good)))))
    return rows


def moments_of(probabilities, starts, plan, clip_len, stride):
    """Mean probabilities of the clips that show each moment: (edges in s (S + 1,), probabilities (S, num_classes))."""
    begin = plan.seconds[starts]
    end = np.append(plan.seconds, plan.duration)[starts + clip_len]  # a clip lasts until its next frame would come
    edges = np.append(np.arange(0, plan.duration - 0.5 * stride, stride), plan.duration)
    rows = np.full((len(edges) - 1, probabilities.shape[1]), np.nan, np.float32)
    for s, (left, right) in enumerate(itertools.pairwise(edges)):
        showing = probabilities[(begin < right) & (end > left)]
        showing = showing[~np.isnan(showing).any(axis=1)]
        if len(showing):
            rows[s] = showing.mean(axis=0)
    return edges, rows


def segments_of(edges, rows, classes):
    """Neighbouring moments with the same best class, joined: [Segment]."""
    labels = ["" if np.isnan(row).any() else classes[row.argmax()] for row in rows]
    segments, s = [], 0
    for label, group in itertools.groupby(labels):
        count = len(list(group))
        probability = float(rows[s : s + count, classes.index(label)].mean()) if label else 0.0
        segments.append(Segment(float(edges[s]), float(edges[s + count]), label, probability))
        s += count
    return segments


# --- files ------------------------------------------------------------------------------------------------------------


def label_all(videos, names, classifier, results_of, out, stride, frame_rate, rotate):
    """Write segments, strip and annotated copy of each recording to the folder `out`; yields (video, why it failed).

    results_of: runs functions of this file in child processes, as predict.py's does.
    """
    from tqdm import tqdm

    step = max(1, round(stride * frame_rate))
    stride = step / frame_rate
    for video in videos:
        [(_, plan, why)] = results_of(plan_of, [(video, classifier.description.clip_len, frame_rate)])
        if why:
            yield video, why
            continue
        with tqdm(total=len(plan.pts), unit="frame", desc="classifying", leave=False, disable=None) as bar:
            starts, rows, missing, shown = probabilities_of(video, plan, classifier, results_of, step, rotate, bar)
        edges, moments = moments_of(rows, starts, plan, classifier.description.clip_len, stride)
        segments = segments_of(edges, moments, classifier.classes)
        turned = "" if rotate else drawing.about_rotation(plan.rotation)
        print(f"\n{video}: {clock(plan.duration)}, {len(starts):,} clips, one every {stride:g} s{turned}")
        for segment in segments:
            label = f"{segment.label} {100 * segment.probability:.0f} %" if segment.label else "cannot be read"
            print(f"  {clock(segment.start)} to {clock(segment.end)}  {label}")
        base = Path(out, names[video])
        write_segments(Path(f"{base}-segments.csv"), segments)
        about = f"{video}", f"{clock(plan.duration)}, {len(starts):,} clips, {classifier.about}"
        drawing.draw_timeline(Path(f"{base}-timeline.png"), about, edges, moments, segments, shown, classifier.classes)
        reasons = [f"from {clock(plan.seconds[i])} on {why}" for i, why in missing.items()]
        reasons += annotate(video, Path(f"{base}-annotated.mp4"), segments)
        yield video, "; ".join(reasons)


def clock(seconds):
    """Minutes, seconds and tenths, as 3:07.5."""
    minutes, seconds = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{seconds:04.1f}"


def write_segments(path, segments):
    with common.written_then_renamed(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["start_s", "end_s", "label", "probability"])
        table.writerows([f"{s.start:.2f}", f"{s.end:.2f}", s.label, f"{s.probability:.4f}"] for s in segments)
