"""Videos per second of tools/preprocess_and_save.py against the original's way and against decoding alone.

Writes 6 H.264 videos (B-frames, 30 fps; 1280x720, 640x360, 340x256; 5 and 10 s), each under COPIES names, to a
temporary folder and preprocesses them, ROUNDS times in turn: the straightforward way in one process (list the packets,
decode the span to RGB, stack, pick 16 frames, float, resize, crop, save); decoding the same spans and doing nothing
with 1 and 2 processes; ours with 1 and 2, as a user runs it, timed from settings.json, which it writes when its
modules are imported, to manifest.jsonl, which it writes last. Prints medians, and as its last line one JSON object.

    $ python tests/benchmarks/bench_preprocess.py
"""

import json
import os
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
SIZES = {"1280x720": (720, 1280), "640x360": (360, 640), "340x256": (256, 340)}  # height, width in pixels
SECONDS = (5, 10)  # length of the videos
COPIES = 6  # of each size and length; the original's way, which takes long, reads one of them
ROUNDS = 3
# ----------------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "preprocess_and_save.py"


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
    """Seconds of one run of the tool into a new folder, less the start of the program."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [sys.executable, SCRIPT, "--data-root", root, "--out-root", out, "--num-workers", str(processes)]
        subprocess.run(command, check=True, capture_output=True)
        return (out / "manifest.jsonl").stat().st_mtime - (out / "settings.json").stat().st_mtime


def write_copies(root, size, seconds):
    first = write_video(root / f"{size}-{seconds}-0.mp4", 30 * seconds, 30, *SIZES[size], seconds, options={"bf": "3"})
    for copy in range(1, COPIES):
        os.link(first, root / f"{size}-{seconds}-{copy}.mp4")


def main():
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        root = Path(folder, "videos", "class")
        root.mkdir(parents=True)
        kinds = [(root, size, seconds) for size in SIZES for seconds in sorted(SECONDS, reverse=True)]
        list(pool.map(write_copies, *zip(*kinds)))
        clips = [(str(path), *first_clip(path)) for path in sorted(root.glob("*.mp4"))]
        for_original = [clip for clip in clips if clip[0].endswith("-0.mp4")]
        times = {name: [] for name in ("original, 1", "decode, 1", "decode, 2", "ours, 1", "ours, 2")}
        for _ in range(ROUNDS):
            times["original, 1"].append(COPIES * seconds_of(original_way, for_original, Path(folder)))
            for processes in (1, 2):
                times[f"decode, {processes}"].append(seconds_of(decode_all, clips, processes))
                times[f"ours, {processes}"].append(ours(root.parent, processes))
    rates = {name: len(clips) / statistics.median(seconds) for name, seconds in times.items()}
    for name, rate in rates.items():
        print(f"{name:12s} {rate:6.2f} videos/s")
    figures = {
        "speedup_1": rates["ours, 1"] / rates["original, 1"],
        "of_decoding_1": rates["ours, 1"] / rates["decode, 1"],
        "of_decoding_2": rates["ours, 2"] / rates["decode, 2"],
        "two_processes": rates["ours, 2"] / rates["ours, 1"],
        "two_processes_decode": rates["decode, 2"] / rates["decode, 1"],
    }
    print(json.dumps({name: round(figure, 2) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
