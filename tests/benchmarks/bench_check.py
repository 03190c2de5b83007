"""Speed of check_videos.py at --jobs 2 against a bare PyAV decode of the same files with two processes.

Writes healthy H.264 videos of 4 to 6 s into a temporary folder. Both sides decode every frame, one thread a process;
what is timed is from the first file to the last, with the processes started and PyAV imported, on both sides.

    $ python tests/benchmarks/bench_check.py [number of files] [rounds]

Prints a table of rounds, taken in turn, and their medians; the last line is one JSON object.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO / "tools"), str(REPO / "tests")]

import av

import check_videos
from make_videos import write_video
from videos.journal import Journal

NUM_DIFFERENT = 12  # videos that are drawn; the others are copies


def write_dataset(root, num_files):
    (root / "train/a").mkdir(parents=True)
    paths = [root / f"train/a/{i:04}.mp4" for i in range(num_files)]
    for i, path in enumerate(paths):
        if i < NUM_DIFFERENT:
            write_video(path, num_frames=120 + 5 * i, height=360, width=480, seed=i)
        else:
            path.write_bytes(paths[i % NUM_DIFFERENT].read_bytes())
    return paths


def decode_bare(path):
    """All a decode needs, and no more: returns the number of frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def seconds_bare(paths):
    """Two processes that take the next file when they are free."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(decode_bare, paths[:2], chunksize=1)  # started and imported
        start = time.perf_counter()
        sum(pool.imap_unordered(decode_bare, paths, chunksize=1))
        return time.perf_counter() - start


def seconds_checked(paths):
    """check_videos.py's own pool, report rows included, timed from its first row on like the bare decode."""
    check_videos.JOBS = 2
    with tempfile.TemporaryDirectory() as folder:
        check_videos.ROOT, check_videos.QUARANTINE = str(paths[0].parents[2]), folder + "/bad"
        start = time.perf_counter()
        check_videos.check_and_record(paths, {}, Journal(folder + "/progress"), folder)
        return time.perf_counter() - start


def main(num_files=120, rounds=5):
    bare, checked = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_dataset(Path(folder), num_files)
        print(f"{num_files} videos, 480 x 360, 4.0 to 5.8 s; {os.cpu_count()} cores")
        print(f"{'round':>6}{'bare':>10}{'checked':>10}{'ratio':>8}")
        for i in range(rounds):
            bare.append(num_files / seconds_bare(paths))
            checked.append(num_files / seconds_checked(paths))
            print(f"{i:6}{bare[-1]:10.2f}{checked[-1]:10.2f}{checked[-1] / bare[-1]:8.2f}  files/s", flush=True)
    ratio = statistics.median(c / b for b, c in zip(bare, checked))
    figures = {
        "bare_files_per_s": statistics.median(bare),
        "checked_files_per_s": statistics.median(checked),
        "ratio": ratio,
    }
    print(json.dumps({"num_files": num_files, "jobs": 2} | {key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
