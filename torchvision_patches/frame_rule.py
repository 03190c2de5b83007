"""Which frames of a video make its clips: the official rule of LPCVC 2026 Track 2 and its version.

In numpy, so that a Qualcomm board which runs a compiled network needs no torch.
"""

import math

import numpy as np

# one more whenever the frames that the rule picks change: tensors, frame caches and teachers' logits made by another
# version are refused, not mixed
RULE_VERSION = 1


def sampled_frames(num_video_frames, clip_len, fps, frame_rate):
    """The numbers of the frames that clips are windows of, int64 (number,), ascending.

    num_video_frames: of the video, at least 1. fps: its average. clip_len, frame_rate: frames a clip and frames per
    second that are wanted. A video that is too short for one clip is sampled faster: at the least whole rate that gives
    `clip_len` frames.

    150 frames at 30 fps, 16 at 4 fps wanted: there are 150 * 4 / 30 = 20 frames, 30 / 4 = 7.5 apart: 0, 7, 15, 22,
    …, 142; five windows of 16. 75 frames at 30 fps would give 10: the rate becomes ceil(16 / 2.5 s) = 7, frames
    30 / 7 apart: 0, 4, 8, 12, …, 64; one window.
    """
    total = num_video_frames * frame_rate / fps
    if total < clip_len:
        frame_rate, total = math.ceil(clip_len / (num_video_frames / fps)), clip_len
    apart = fps / frame_rate
    if float(apart).is_integer():
        return np.arange(num_video_frames)[:: int(apart)]
    # in float32, as torchvision's own _resample_video_idx: some frames are others in float64
    numbers = np.floor(np.arange(math.floor(total), dtype=np.float32) * np.float32(apart)).astype(np.int64)
    return np.arange(num_video_frames)[numbers]


def spread(num_windows, number):
    """Which windows of a video stand for it: `number` of them, evenly spread; a single one is the first, as is scored.

    num_windows: of one video, or of each of several, int64 (videos,). Returns int64 (number,) or (videos, number).
    """
    return np.arange(number) * (np.asarray(num_windows)[..., None] - 1) // max(1, number - 1)
