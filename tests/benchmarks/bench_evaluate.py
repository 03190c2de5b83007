"""Time and memory of evaluate.py at two sizes; the baseline is reading the file the way h5py's manual does.

Reads nothing, writes made-up runs of 92 classes into a temporary folder: NUM_CLIPS clips without their tensors, and
QEVD's validation set of NUM_PICTURED clips with them, links to NUM_DRAWN drawn ones (1 GB), for the page's pictures.
Prints a table and, as its last line, one JSON object.

$ python tests/benchmarks/bench_evaluate.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

REPO = Path(__file__).resolve().parent.parent.parent
NUM_CLIPS = 200_000
NUM_PICTURED = 11_452
NUM_DRAWN = 400
RUNS = 3
# runs the script and prints the most memory it held, in MB (ru_maxrss counts KB on Linux)
RUN_AND_MEASURE = """
import resource, subprocess, sys
rc = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(rc, used.ru_maxrss / 1024, used.ru_utime + used.ru_stime)
"""


def write_run(folder, num_clips):
    """dataset-export.h5 as run_inference.py writes it, and its manifest.jsonl; returns the clips' paths."""
    folder.mkdir()
    classes = list(json.loads((REPO / "class_map.json").read_text(encoding="utf-8")))
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, len(classes), num_clips))
    tensors = [f"{classes[label]}/{i:08d}.npy" for i, label in enumerate(labels)]
    with h5py.File(folder / "dataset-export.h5", "w") as file:
        group = file.create_group("data/0")
        for i, label in enumerate(labels):
            logits = rng.normal(0, 1, (1, len(classes))).astype(np.float32)
            logits[0, label] += 3
            group.create_dataset(f"batch_{i}", data=logits)
        group.attrs.update({"name": "class_logits", "order": 0, "batch_count": num_clips})
        file.create_dataset("tensor_paths", data=tensors, dtype=h5py.string_dtype())
        file.attrs["output_kind"] = "logits"
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as file:
        for tensor in tensors:
            row = {"video_path": f"/data/val/{tensor[:-4]}.mp4", "label": tensor.split("/")[0], "tensor_path": tensor}
            row |= {"shape": [1, 3, 16, 112, 112], "dtype": "float32", "fps": 29.97}
            file.write(json.dumps(row | {"frame_indices": list(range(0, 112, 7)), "num_frames": 150}) + "\n")
    return [folder / tensor for tensor in tensors]


def draw_clips(paths):
    """A float32 (1, 3, 16, 112, 112) at each path: coloured squares, which pack about as well as video."""
    rng = np.random.default_rng(0)
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        if i < NUM_DRAWN:
            frame = rng.random((3, 14, 14)).repeat(8, axis=1).repeat(8, axis=2)
            np.save(path, np.repeat(frame[None, :, None], 16, axis=2).astype(np.float32))
        else:
            path.hardlink_to(paths[i % NUM_DRAWN])


def read_plainly(path):
    """Seconds to read every prediction with h5py's high-level interface."""
    start = time.perf_counter()
    with h5py.File(path) as file:
        group = file["data/0"]
        for i in range(NUM_CLIPS):
            group[f"batch_{i}"][()]
    return time.perf_counter() - start


def evaluate(folder):
    """(seconds, most memory in MB, CPU seconds) of one run of the script."""
    script = [sys.executable, str(REPO / "tools/evaluate.py"), "--h5", str(folder / "dataset-export.h5")]
    script += ["--manifest", str(folder / "manifest.jsonl"), "--report-dir", str(folder / "report")]
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN_AND_MEASURE, *script]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    rc, memory, cpu = map(float, measured.stdout.split())
    assert rc == 0, f"evaluate.py ended with exit code {rc:.0f}"
    return time.perf_counter() - start, memory, cpu


def medians(runs):
    return [statistics.median(column) for column in zip(*runs)]


def main():
    with tempfile.TemporaryDirectory() as folder:
        many, pictured = Path(folder, "many"), Path(folder, "pictured")
        write_run(many, NUM_CLIPS)
        draw_clips(write_run(pictured, NUM_PICTURED))
        baselines, runs, pictured_runs = [], [], []
        for _ in range(RUNS):
            baselines.append(read_plainly(many / "dataset-export.h5"))
            runs.append(evaluate(many))
            pictured_runs.append(evaluate(pictured))
        page_mb = (pictured / "report/report.html").stat().st_size / 1e6
    (seconds, memory, cpu), (page_seconds, page_memory, page_cpu) = medians(runs), medians(pictured_runs)
    baseline = statistics.median(baselines)
    print(f"92 classes, median of {RUNS} runs: seconds, CPU seconds, MB of memory")
    print(f"{NUM_CLIPS:,} clips, reading alone, h5py's high level  {baseline:6.1f}")
    print(f"{NUM_CLIPS:,} clips, evaluate.py with its whole report {seconds:6.1f} {cpu:6.1f} {memory:6.0f}")
    print(f"{NUM_PICTURED:,} clips, with a picture of each, {page_mb:4.1f} MB   {page_seconds:6.1f} {page_cpu:6.1f} "
          f"{page_memory:6.0f}")  # fmt: skip
    figures = {"num_clips": NUM_CLIPS, "seconds": round(seconds, 1), "baseline_seconds": round(baseline, 1)}
    figures |= {"ratio": round(seconds / baseline, 2), "cpu_seconds": round(cpu, 1), "max_mb": round(memory)}
    figures |= {"num_pictured": NUM_PICTURED, "pictured_seconds": round(page_seconds, 1)}
    figures |= {"pictured_cpu_seconds": round(page_cpu, 1), "pictured_max_mb": round(page_memory)}
    print(json.dumps(figures | {"page_mb": round(page_mb, 1)}))


if __name__ == "__main__":
    main()
