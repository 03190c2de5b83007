"""Videos per second of tools/preprocess_and_save.py against the original's way and against decoding alone.

Writes NUM_VIDEOS H.264 videos (B-frames, 30 fps; 1280x720, 640x360, 340x256; 5 to 10 s) to a temporary folder and
preprocesses them, ROUNDS times in turn: the straightforward way in one process (list the packets, decode the span to
RGB, stack, pick 16 frames, float, resize, crop, save); ours with 1 and with 2 processes, as a user runs it, less the
start of the program, which is measured on one video; decoding the same spans and doing nothing with 1 and 2 processes.
Prints medians, and as its last line one JSON object.

    $ python tests/benchmarks/bench_preprocess.py
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1, 2)]

import numpy as np
import torch
from bench_clips import decode_only, first_clip, straightforward
from bench_index import list_packets

from make_videos import write_video

# ----------------------------------------------------------------------------------------------------------------------
NUM_VIDEOS = 24  # a third of each size
ROUNDS = 3
# ----------------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "preprocess_and_save.py"
SIZES = ((720, 1280), (360, 640), (256, 340))


def seconds_of(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def original_way(clips, out):
    """clips: (path, pts, frame indices), known beforehand: what the original needs to list the packets for."""
    torch.set_num_threads(1)
    for clip in clips:
        list_packets(clip[0])
        np.save(out / (Path(clip[0]).stem + ".npy"), straightforward(*clip)[None].numpy())


def decode_all(clips, processes):
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(decode_only, *zip(*clips)))


def ours(root, processes):
    """Seconds of one run of the tool, into a new folder."""
    out = root.parent / "out"
    command = [sys.executable, SCRIPT, "--data-root", root, "--out-root", out, "--num-workers", str(processes)]
    seconds = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))
    shutil.rmtree(out)
    return seconds


def main():
    with tempfile.TemporaryDirectory() as folder:
        all_of_them, single = Path(folder, "all", "class"), Path(folder, "single", "class")
        all_of_them.mkdir(parents=True)
        single.mkdir(parents=True)
        for k in range(NUM_VIDEOS):
            num_frames = 150 + 150 * k // (NUM_VIDEOS - 1)
            write_video(all_of_them / f"{k:02d}.mp4", num_frames, 30, *SIZES[k % 3], k, options={"bf": "3"})
        clips = [(str(path), *first_clip(path)) for path in sorted(all_of_them.glob("*.mp4"))]
        write_video(single / "0.mp4", 20, 30, 64, 64)
        times = {name: [] for name in ("original, 1", "decode, 1", "decode, 2", "ours, 1", "ours, 2")}
        for _ in range(ROUNDS):
            start_up = ours(single.parent, 1)
            times["original, 1"].append(seconds_of(original_way, clips, Path(folder)))
            for processes in (1, 2):
                times[f"decode, {processes}"].append(seconds_of(decode_all, clips, processes))
                times[f"ours, {processes}"].append(ours(all_of_them.parent, processes) - start_up)
    rates = {name: NUM_VIDEOS / statistics.median(seconds) for name, seconds in times.items()}
    for name, rate in rates.items():
        print(f"{name:12s} {rate:6.2f} videos/s")
    figures = {
        "speedup_1": rates["ours, 1"] / rates["original, 1"],
        "of_decoding_1": rates["ours, 1"] / rates["decode, 1"],
        "of_decoding_2": rates["ours, 2"] / rates["decode, 2"],
        "two_processes": rates["ours, 2"] / rates["ours, 1"],
    }
    print(json.dumps({name: round(figure, 2) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
