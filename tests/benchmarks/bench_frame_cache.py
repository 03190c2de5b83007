"""In which form should the frame cache keep its frames? Raw bytes, read or mapped, against JPEG and against the video.

Makes VIDEOS videos of 1280 x 720, 5 s at 30 fps, resizes the 20 frames at 4 fps of each to 128 x 171 and stores them in
each form in a temporary folder. Then reads one clip of 16 frames of each video, cropped to 112 x 112, ROUNDS times, in
one thread, with all files in memory; medians. The last line is one JSON object.

    $ python tests/benchmarks/bench_frame_cache.py
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

import numpy as np
import torch
from torchvision.io import decode_jpeg, encode_jpeg

from make_videos import write_video
from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.video_utils import VideoClips, frame_times, read_frames

# ----------------------------------------------------------------------------------------------------------------------
VIDEOS = 12
ROUNDS = 7
QUALITIES = (90, 95)
QEVD_VIDEOS = 201_706  # in train and val; their frames are estimated at 20 each
# ----------------------------------------------------------------------------------------------------------------------

SHAPE = (16, 128, 171, 3)


def read(path):
    clip = np.empty(SHAPE, np.uint8)
    with open(path, "rb") as file:
        file.seek(2 * clip[0].nbytes)
        file.readinto(clip)
    return torch.from_numpy(clip)


def mapped(path):
    frames = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    return frames.view(-1, *SHAPE[1:])[2:18]


def jpeg(frames):
    return torch.stack([decode_jpeg(frame) for frame in frames[2:18]]).permute(0, 2, 3, 1)


def video(path):
    pts, fps = frame_times(path)
    clips, indices = VideoClips.compute_clips_for_video(torch.from_numpy(pts), 16, 1, fps, 4)
    return torch.from_numpy(read_frames(path, clips[2].numpy(), indices[2].numpy()))


def seconds_a_clip(function, sources):
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for source in sources:
            clip = function(source)
            if clip.shape[1:] == SHAPE[1:]:
                clip[:, 8:120, 30:142].contiguous()
            else:
                resize_and_crop(clip)
        rounds.append((time.perf_counter() - start) / len(sources))
    return statistics.median(rounds)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        videos = [Path(folder, f"{i}.mp4") for i in range(VIDEOS)]
        files, jpegs, difference = [path.with_suffix(".rgb") for path in videos], {q: [] for q in QUALITIES}, {}
        for i, (path, file) in enumerate(zip(videos, files)):
            write_video(path, 150, 30, 720, 1280, i, options={"bf": "3"})
            pts, _ = frame_times(path)
            numbers = np.floor(np.arange(20) * 7.5).astype(int)
            frames = resize_and_crop(torch.from_numpy(read_frames(path, pts[numbers], numbers)), SHAPE[1:3], SHAPE[1:3])
            frames = frames.permute(1, 0, 2, 3).mul(255).round().byte()  # (20, 3, 128, 171)
            frames.permute(0, 2, 3, 1).numpy().tofile(file)
            for quality in QUALITIES:
                jpegs[quality].append([encode_jpeg(frame.contiguous(), quality) for frame in frames])
                back = torch.stack([decode_jpeg(frame) for frame in jpegs[quality][-1]])
                difference.setdefault(quality, []).append((back.float() - frames).abs().mean().item())
        forms = {"video": (video, videos), "raw, read": (read, files), "raw, mapped": (mapped, files)}
        sizes = {"video": [p.stat().st_size for p in videos]}
        sizes["raw, read"] = sizes["raw, mapped"] = [p.stat().st_size for p in files]
        for quality in QUALITIES:
            forms[f"jpeg {quality}"] = jpeg, jpegs[quality]
            sizes[f"jpeg {quality}"] = [sum(map(len, frames)) for frames in jpegs[quality]]
        figures = {}
        print(f"{'form':14}{'clips/s':>10}{'kB a video':>12}{'GB for QEVD':>13}{'mean error, grey levels':>25}")
        for name, (function, sources) in forms.items():
            rate, size = 1 / seconds_a_clip(function, sources), statistics.mean(sizes[name])
            error = statistics.mean(difference[int(name[-2:])]) if "jpeg" in name else 0.0
            print(f"{name:14}{rate:>10.1f}{size / 1e3:>12.0f}{size * QEVD_VIDEOS / 1e9:>13.0f}{error:>25.2f}")
            figures[name] = {"clips_per_s": round(rate, 1), "bytes": round(size), "mean_error": round(error, 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
