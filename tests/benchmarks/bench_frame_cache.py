"""In which form should the frame cache keep its frames? Raw bytes, read or mapped, against JPEG and against the video.

Draws VIDEOS videos as those of the sample dataset, 340 x 256, 24 to 30 fps, 3 to 6 s, resizes the frames that clips of
16 at 4 fps can use to 128 x 171 and stores them in each form in a temporary folder. Then reads the first clip of each
video, cropped to 112 x 112, ROUNDS times, in one thread, with all files in memory; medians. The last line is one JSON
object.

    $ python tests/benchmarks/bench_frame_cache.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import numpy as np
import torch
from torchvision.io import decode_jpeg, encode_jpeg

from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.video_utils import VideoClips, frame_times, read_frames

# ----------------------------------------------------------------------------------------------------------------------
VIDEOS = 12
ROUNDS = 7
QUALITIES = (90, 95)
QEVD_VIDEOS, QEVD_FRAMES = 201_706, 20  # in train and val; frames at 4 fps, estimated: 5 s each
# ----------------------------------------------------------------------------------------------------------------------

SHAPE = (16, 128, 171, 3)


def read(path):
    clip = np.empty(SHAPE, np.uint8)
    with open(path, "rb") as file:
        file.readinto(clip)
    return torch.from_numpy(clip)


def mapped(path):
    frames = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    return frames.view(-1, *SHAPE[1:])[:16]


def jpeg(frames):
    return torch.stack([decode_jpeg(frame) for frame in frames[:16]]).permute(0, 2, 3, 1)


def video(path):
    tables = all_clips(path)
    return torch.from_numpy(read_frames(path, *(table[0].numpy() for table in tables)))


def all_clips(path):
    pts, fps = frame_times(path)
    return VideoClips.compute_clips_for_video(torch.from_numpy(pts), 16, 1, fps, 4)


def seconds_a_clip(function, sources):
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for source in sources:
            clip = function(source)
            if clip.shape[1:] == SHAPE[1:]:
                clip[:, 8:120, 30:142].contiguous()
            else:
                resize_and_crop(clip, SHAPE[1:3], (112, 112))
        rounds.append((time.perf_counter() - start) / len(sources))
    return statistics.median(rounds)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, REPO / "tools/make_sample_dataset.py", "--out", folder, "--classes", "squats"]
        command += ["--train-videos-per-class", str(VIDEOS - 1), "--val-videos-per-class", "1"]
        subprocess.run(command, check=True, capture_output=True)
        videos = sorted(Path(folder).rglob("*.mp4"))
        files, jpegs, difference = [path.with_suffix(".rgb") for path in videos], {q: [] for q in QUALITIES}, {}
        for path, file in zip(videos, files):
            pts, numbers = (torch.cat([table[:, 0], table[-1, 1:]]).numpy() for table in all_clips(path))
            frames = resize_and_crop(torch.from_numpy(read_frames(path, pts, numbers)), SHAPE[1:3], SHAPE[1:3])
            frames = frames.permute(1, 0, 2, 3).mul(255).round().byte()  # (frames, 3, 128, 171)
            frames.permute(0, 2, 3, 1).numpy().tofile(file)
            for quality in QUALITIES:
                jpegs[quality].append([encode_jpeg(frame.contiguous(), quality) for frame in frames])
                back = torch.stack([decode_jpeg(frame) for frame in jpegs[quality][-1]])
                difference.setdefault(quality, []).append((back.float() - frames).abs().mean().item())
        forms = {"video": (video, videos), "raw, read": (read, files), "raw, mapped": (mapped, files)}
        forms |= {f"jpeg {quality}": (jpeg, jpegs[quality]) for quality in QUALITIES}
        figures, bytes_a_frame = {}, {"raw, read": 128 * 171 * 3, "raw, mapped": 128 * 171 * 3}
        for quality, of_videos in jpegs.items():
            bytes_a_frame[f"jpeg {quality}"] = statistics.mean(len(frame) for frames in of_videos for frame in frames)
        print(f"{'form':14}{'clips/s':>10}{'kB a frame':>12}{'GB for QEVD':>13}{'mean error, grey levels':>25}")
        for name, (function, sources) in forms.items():
            rate, size = 1 / seconds_a_clip(function, sources), bytes_a_frame.get(name, 0)
            error = statistics.mean(difference[int(name[-2:])]) if "jpeg" in name else 0.0
            gigabytes = size * QEVD_FRAMES * QEVD_VIDEOS / 1e9
            print(f"{name:14}{rate:>10.1f}{size / 1e3 or '':>12.4}{gigabytes or '':>13.4}{error:>25.2f}")
            figures[name] = {"clips_per_s": round(rate, 1), "bytes_a_frame": round(size), "error": round(error, 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
