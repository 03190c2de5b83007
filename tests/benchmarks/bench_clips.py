"""How fast is the first clip of a video, ready for the model, against the original's way and against decoding alone?

Writes 6 H.264 videos (B-frames, 30 fps, 5 and 10 s, 1280x720, 640x360 and 340x256) to a temporary folder. For each, in
turn and in one thread, with its frame times known: decoding the span of the first 16 frames at 4 fps and doing nothing;
the straightforward way (every frame of the span to RGB, stack, pick 16, to float, resize, crop); ours. Medians of
ROUNDS. Prints a table, and as its last line one JSON object.

    $ python tests/benchmarks/bench_clips.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

import av
import numpy as np
import torch
from torchvision.transforms import functional as F

from make_videos import write_video
from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.video_utils import VideoClips, frame_times, read_frames

# ----------------------------------------------------------------------------------------------------------------------
SIZES = {"1280x720": (720, 1280), "640x360": (360, 640), "340x256": (256, 340)}  # height, width in pixels
SECONDS = (5, 10)  # length of the videos
ROUNDS = 7  # times each is read, each way
# ----------------------------------------------------------------------------------------------------------------------


def first_clip(path):
    """Times and numbers of the frames of the first 16-frame clip at 4 fps: two int64 (16,)."""
    pts, fps = frame_times(path)
    clips, indices = VideoClips.compute_clips_for_video(torch.from_numpy(pts), 16, 1, fps, 4)
    return clips[0].numpy(), indices[0].numpy()


def decode_span(path, last):
    """Decode from the start to the frame at time `last`, in one thread; yields the frames."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            yield frame
            if frame.pts >= last:
                return


def decode_only(path, pts, indices):
    for _ in decode_span(path, pts[-1]):
        pass


def straightforward(path, pts, indices):
    frames = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in decode_span(path, pts[-1])])
    clip = F.convert_image_dtype(frames[indices].permute(0, 3, 1, 2), torch.float32)
    return F.center_crop(F.resize(clip, [128, 171], antialias=False), [112, 112]).permute(1, 0, 2, 3).contiguous()


def ours(path, pts, indices):
    return resize_and_crop(torch.from_numpy(read_frames(path, pts, indices)), (128, 171), (112, 112))


def seconds_of(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def peak_of_one_clip(folder):
    """MiB that one clip of a 1920x1080 file adds to the peak memory of a process that has imported all it needs."""
    path = write_video(Path(folder, "1080.mp4"), 150, 30, 1080, 1920, options={"bf": "3"})
    code = "import bench_clips as b; m = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); "
    code += f"p = {str(path)!r}; c = b.first_clip(p); before = m(); b.ours(p, *c); print((m() - before) / 1024)"
    return float(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent))


def main():
    torch.set_num_threads(1)
    figures, ways = {}, (decode_only, straightforward, ours)
    print("    video  Mbit/s  decode only  original way       ours   original / ours   ours / decode only")
    with tempfile.TemporaryDirectory() as folder:
        for size, (height, width) in SIZES.items():
            times, rates = {way: [] for way in ways}, []
            for seconds in SECONDS:
                path = str(Path(folder, f"{size}-{seconds}.mp4"))
                write_video(path, 30 * seconds, 30, height, width, seconds, options={"bf": "3", "g": "250"})
                rates.append(Path(path).stat().st_size * 8e-6 / seconds)
                clip = (path, *first_clip(path))
                assert np.abs(ours(*clip).numpy() - straightforward(*clip).numpy()).max() < 1e-4, path
                for _ in range(ROUNDS):
                    for way in ways:
                        times[way].append(seconds_of(way, *clip))
            bare, original, mine = (statistics.median(times[way]) for way in ways)
            figures[size] = {"speedup": round(original / mine, 2), "of_decoding": round(mine / bare, 2)}
            print(f"{size:>9s} {statistics.mean(rates):7.1f} {bare * 1e3:9.1f} ms {original * 1e3:10.1f} ms", end="")
            print(f" {mine * 1e3:7.1f} ms   {original / mine:15.2f}   {mine / bare:18.2f}", flush=True)
        memory = peak_of_one_clip(folder)
    mean = statistics.geometric_mean(figure["of_decoding"] for figure in figures.values())
    print(f"geometric mean of ours / decode only: {mean:.2f}; one clip of a 1080p file needs {memory:.0f} MiB")
    print(json.dumps(figures | {"of_decoding_mean": round(mean, 2), "peak_mib_1080p": round(memory)}))


if __name__ == "__main__":
    main()
