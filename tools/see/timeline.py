"""What happens when in a long recording: sliding clips, segments, a strip, and a copy with the label burnt in.

Clips are those of the official frame rule, `stride` seconds apart, and one that ends with the recording. The label of a
moment is the best class of the mean probabilities of all clips that show it. Memory does not grow with the length.
"""

import itertools
from collections import deque
from functools import partial
from typing import NamedTuple

import common
from common import names
from common.calibration import NO_NUMBERS, NOT_SURE, best, label_of

import numpy as np
from tqdm import tqdm

from see import drawing
from see.annotated_copy import annotate
from torchvision_patches.clip import frames_to_read, resize_function, resized_and_cropped
from torchvision_patches.decoding import UnreadableVideo, facts_of, frames_and_rotation
from torchvision_patches.pool import outcomes_of

CHUNK = 64  # sampled frames that are read at once: 16 s, and 10 MB as R(2+1)D takes them
THUMBNAILS = 10


class SampledFrames(NamedTuple):
    """The frames that the clips of a recording are made of: every one at the rate of the official rule."""

    pts: np.ndarray  # int64 (n,), as `read_frames` takes them
    frame_indices: np.ndarray  # int64 (n,)
    seconds: np.ndarray  # float (n,), from the first frame
    duration: float  # s, of the whole


class ClassifiedClips(NamedTuple):
    """The clips of a recording and what the network says of them."""

    starts: np.ndarray  # int (num_clips,), the number of each clip's first frame among the sampled ones
    probabilities: np.ndarray  # float (num_clips, num_classes), NaN where frames are missing
    missing: dict  # {number of a sampled frame: why nothing can be read from there on}
    thumbnails: list  # some frames for a picture, (s, float32 (3, 1, H, W))
    rotation: int  # degrees clockwise by which players turn the recording


# --- reading (in worker processes) ------------------------------------------------------------------------------------


def frames_of_recording(path, description):
    """The SampledFrames of a recording. Raises UnreadableVideo."""
    facts = facts_of(path)
    pts, numbers = frames_to_read(facts, description)
    duration = float((facts.pts[-1] - facts.pts[0]) * facts.tick + 1 / facts.fps)
    return SampledFrames(pts, numbers, (pts - facts.pts[0]) * facts.tick, duration)


def read_sampled(path, description, some):
    """(frames float32 (n, 3, H, W) as the network takes them, rotation), of (pts, frame indices), some sampled frames.

    Raises UnreadableVideo.
    """

    def convert(frame):  # one at a time, because full frames of 16 s may be large; as bytes, which are kept as they are
        return resized_and_cropped(frame[None], description)[:, 0].copy().view(np.uint8)

    frames, rotation = frames_and_rotation(path, *some, convert, description.rotate)
    return frames.view(np.float32), rotation


# --- clips -> probabilities -> segments -------------------------------------------------------------------------------


def starts_of(num_frames, clip_len, step):
    """Where clips start among the sampled frames: every `step` frames, and the last one that is possible."""
    last = num_frames - clip_len
    return [*range(0, last, step), last]


def classify_all(path, sampled, classifier, step, limits):
    """The ClassifiedClips of a recording, `step` sampled frames apart, classified as its frames come in.

    limits: (number of worker processes, seconds that reading a part may take).
    """
    clip_len, size = classifier.description.clip_len, classifier.description.crop_size
    starts, number = starts_of(len(sampled.pts), clip_len, step), len(sampled.pts)
    shown = set(np.linspace(0, number - 1, THUMBNAILS).round().astype(int).tolist())
    parts = deque((sampled.pts[i : i + CHUNK], sampled.frame_indices[i : i + CHUNK]) for i in range(0, number, CHUNK))
    frames, first, waiting, rows = np.empty((0, 3, *size), np.float32), 0, [], []
    missing, thumbnails, rotation = {}, [], 0
    todo = iter([*starts, None])
    start = next(todo)
    read = partial(read_sampled, path, classifier.description)
    with tqdm(total=number, unit="frame", desc="classifying", leave=False, disable=None) as bar:
        for i, part in zip(range(0, number, CHUNK), outcomes_of(read, parts, *limits, in_order=True)):
            if why := part.why_not():
                missing[i] = why
                chunk = np.full((len(part.item[0]), 3, *size), np.nan, np.float32)
            else:
                chunk, rotation = part.value
            thumbnails += [(sampled.seconds[k], chunk[k - i][:, None]) for k in range(i, i + len(chunk)) if k in shown]
            frames = np.concatenate([frames, chunk])
            while start is not None and start + clip_len <= first + len(frames):
                waiting.append(frames[start - first :][:clip_len].transpose(1, 0, 2, 3))
                start = next(todo)
                if len(waiting) == classifier.batch_size or start is None:
                    rows.append(classify(waiting, classifier))
                    waiting = []
            drop = min(len(frames), (start if start is not None else first) - first)
            frames, first = frames[drop:], first + drop
            bar.update(len(chunk))
    return ClassifiedClips(np.array(starts), np.concatenate(rows), missing, thumbnails, rotation)


def classify(clips, classifier):
    """Probabilities (B, num_classes) of clips float32 (3, T, H, W); NaN for those with missing frames."""
    good = [not np.isnan(clip).any() for clip in clips]
    rows = np.full((len(clips), len(classifier.classes)), np.nan, np.float32)
    if any(good):
        rows[good], _ = classifier.probabilities(np.stack(list(itertools.compress(clips, good))))
    return rows


def moments_of(probabilities, starts, sampled, clip_len, stride):
    """Mean probabilities of the clips that show each moment: (edges in s (S + 1,), probabilities (S, num_classes)).

    Where frames come at no steady rate, clips `stride` apart may leave out moments, which the nearest one stands for.
    NaN in a hole, a time without a frame that is longer than a clip.
    """
    begin, times = sampled.seconds[starts], np.append(sampled.seconds, sampled.duration)
    end = times[starts + clip_len]  # a clip lasts until its next frame would come
    longest = clip_len * np.median(np.diff(times))
    edges = np.array([0, *np.arange(stride, sampled.duration - 0.5 * stride, stride), sampled.duration])
    rows = np.full((len(edges) - 1, probabilities.shape[1]), np.nan, np.float32)
    for s, (left, right) in enumerate(itertools.pairwise(edges)):
        first, last = np.searchsorted(times, [left, right])
        if first == last and times[last] - times[first - 1] > longest:
            continue
        shown = (begin < right) & (end > left)
        showing = probabilities[shown if shown.any() else [np.abs(begin - left).argmin()]]
        showing = showing[~np.isnan(showing).any(axis=1)]
        if len(showing):
            rows[s] = showing.mean(axis=0)
    return edges, rows


def segments_of(edges, rows, classes, threshold=None):
    """Neighbouring moments with the same label, the best class or, below the threshold, NOT_SURE, joined: [Segment]."""
    read = ~np.isnan(rows).any(axis=1)
    labels = [label_of(best(row, classes, 1)[0], threshold) if is_read else "" for row, is_read in zip(rows, read)]
    segments, s = [], 0
    for label, group in itertools.groupby(labels):
        count = len(list(group))
        probability = float(rows[s : s + count].max(axis=1).mean()) if label else 0.0
        segments.append(drawing.Segment(float(edges[s]), float(edges[s + count]), label, probability))
        s += count
    return segments


# --- files ------------------------------------------------------------------------------------------------------------


def label_recording(path, base, classifier, stride, num_workers, time_limit):
    """Write <base>-segments.csv, -timeline.png and -annotated.mp4 of a recording, and print its segments.

    stride: s between two clips. time_limit: s that reading a part may take. Returns why it, or parts of it, failed; ""
    if all went well.
    """
    description = classifier.description
    resize_function()  # once, before the processes are forked, not in each of them
    step = max(1, round(stride * description.frame_rate))
    stride = step / description.frame_rate
    read = partial(frames_of_recording, description=description)
    [outcome] = outcomes_of(read, deque([path]), num_workers, time_limit)
    if why := outcome.why_not():
        return why
    sampled = outcome.value
    clips = classify_all(path, sampled, classifier, step, (num_workers, time_limit))
    edges, moments = moments_of(clips.probabilities, clips.starts, sampled, description.clip_len, stride)
    segments = segments_of(edges, moments, classifier.classes, classifier.threshold)
    about = f"{clock(sampled.duration)}, {len(clips.starts):,} clips"
    turned = "" if description.rotate else drawing.about_rotation(clips.rotation)
    print(f"\n{names.printable(path)}: {about}, one every {stride:g} s{turned}")
    for segment in segments:
        print(f"  {clock(segment.start)} to {clock(segment.end)}  {' '.join(segment.in_words).rstrip()}")

    def place(ending):
        return base.with_name(names.file_name(base.name, ending))

    rows = ([f"{s.start:.2f}", f"{s.end:.2f}", s.label, f"{s.probability:.4f}"] for s in segments)
    common.write_csv(place("-segments.csv"), ["start_s", "end_s", "label", "probability"], rows)
    grey = f"; grey: {NOT_SURE}" * any(segment.label == NOT_SURE for segment in segments)
    lines = path, f"{about}, {classifier.about}{grey}"
    pictures = edges, moments, segments, clips.thumbnails
    drawing.draw_timeline(place("-timeline.png"), lines, *pictures, classifier.classes)
    reasons = [f"from {clock(sampled.seconds[i])} on {why}" for i, why in clips.missing.items()]
    if not clips.missing and np.isnan(clips.probabilities).any():
        reasons.append(NO_NUMBERS)
    try:
        if remark := annotate(path, place("-annotated.mp4"), segments):
            print(f"  {remark}")
    except UnreadableVideo as e:
        reasons.append(f"no annotated copy: {e.reason}")
    return "; ".join(reasons)


def clock(seconds):
    """Minutes, seconds and tenths, as 3:07.5."""
    minutes, seconds = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{seconds:04.1f}"
