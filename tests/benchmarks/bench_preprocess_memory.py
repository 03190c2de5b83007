"""Peak memory of preprocess_and_save.py, which must not grow with the number of videos, and what its bookkeeping costs.

Writes a few videos of 32x32 pixels to a temporary folder, under NUM_VIDEOS names, and runs the tool over each number
with 2 processes: once, and once more, which finds everything done. CLIP_LEN is 1, so that 10,000 tensors fit into
1.6 GB of the temporary folder's disk. Prints a table, and as its last line one JSON object.

    $ python tests/benchmarks/bench_preprocess_memory.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from make_videos import write_video

# ----------------------------------------------------------------------------------------------------------------------
NUM_VIDEOS = (1000, 10_000)
CLIP_LEN = 1
# ----------------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "preprocess_and_save.py"


def memory_of(process):
    """What a process holds now, MiB, less the files it has mapped (torch's libraries); 0 when it has ended."""
    try:
        return int(Path(f"/proc/{process}/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0


def children_of(process):
    return [child for file in Path(f"/proc/{process}/task").glob("*/children") for child in file.read_text().split()]


def run(root, out):
    """One run of the tool: (MiB of the main process at its peak, MiB of the largest worker, seconds)."""
    command = [sys.executable, SCRIPT, "--data-root", root, "--out-root", out, "--num-workers", "2"]
    start, main, worker = time.perf_counter(), 0, 0
    tool = subprocess.Popen([*command, "--clip-len", str(CLIP_LEN)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while tool.poll() is None:
        main = max(main, memory_of(tool.pid))
        worker = max([worker, *map(memory_of, children_of(tool.pid))])
        time.sleep(0.05)
    printed = tool.stdout.read().decode()
    assert tool.returncode == 0, printed
    return main, worker, time.perf_counter() - start


def main():
    figures = {}
    print("  videos   run  main process   a worker   seconds")
    for number in NUM_VIDEOS:
        with tempfile.TemporaryDirectory() as folder:
            root, out = Path(folder, "videos"), Path(folder, "out")
            for k in range(number):
                video = root / f"class {k % 10}" / f"{k:08d}.mp4"
                if k < 10:
                    video.parent.mkdir(parents=True)
                    write_video(video, 20 + k, 30, 32, 32, k)
                else:
                    os.link(root / f"class {k % 10}" / f"{k % 10:08d}.mp4", video)
            for name in ("first", "again"):
                main, worker, seconds = run(root, out)
                print(f"{number:8,d} {name:>5s} {main:9.0f} MiB {worker:6.0f} MiB {seconds:9.1f}", flush=True)
                figures[f"{name}_{number}"] = {"main": round(main), "worker": round(worker), "s": round(seconds, 1)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
