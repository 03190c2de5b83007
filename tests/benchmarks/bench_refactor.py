"""How long and how much memory does sorting QEVD take, against the bare system calls?

Writes empty stand-ins for videos and their label records to a temporary folder, 4 parts and 92 classes as in QEVD, and
runs tools/refactor_dataset.py as a user does: the plan of all RECORDS (--dry-run), placing LINKED of them as hard
links, and once more with everything there. The baseline is a loop of os.link over the same LINKED files in this
process. Medians of ROUNDS. Prints a table, and as its last line one JSON object.

    $ python tests/benchmarks/bench_refactor.py
"""

import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------
RECORDS = 200_000  # records in the larger label file, and stand-ins on the disk
LINKED = 100_000  # of them in the smaller one, which is placed
ROUNDS = 3  # times each is run
# ----------------------------------------------------------------------------------------------------------------------

REPO = Path(__file__).resolve().parents[2]


def path_of(root, i):
    return root / f"QEVD-FIT-300k-Part-{i % 4 + 1}" / f"{i * 3:08d}.mp4"


def write_dataset(root):
    """Write the stand-ins, `labels.json` of LINKED records and `all_labels.json` of RECORDS."""
    classes = [name.replace("_", " ") for name in json.loads((REPO / "class_map.json").read_text())]
    rng, records = random.Random(0), []
    for part in range(4):
        (root / f"QEVD-FIT-300k-Part-{part + 1}").mkdir()
    for i in range(RECORDS):
        path = path_of(root, i)
        path.touch()
        split = "train" if rng.random() < 0.94 else "val"
        records.append({"video_path": f"./{path.name}", "label": rng.choice(classes), "split": split})
    (root / "all_labels.json").write_text(json.dumps(records))
    (root / "labels.json").write_text(json.dumps(records[:LINKED]))


def link_all(root, dest):
    """Seconds that a bare loop of os.link takes."""
    start = time.perf_counter()
    dest.mkdir()
    for i in range(LINKED):
        path = path_of(root, i)
        os.link(path, dest / path.name)
    return time.perf_counter() - start


def refactor(root, labels, *flags):
    """Run the tool; returns (seconds, peak memory in MB)."""
    parts = sorted(root.glob("QEVD-*"))
    command = [sys.executable, REPO / "tools/refactor_dataset.py", "--srcs", *parts, "--dest", root / "organized",
               "--labels-json", root / labels, "--mode", "hardlink", *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"refactor_dataset.py ended with {os.waitstatus_to_exitcode(status)}"
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main():
    names = f"plan {RECORDS:,} records (dry run)", f"plan and hard-link {LINKED:,} videos", "the same, all there now"
    runs = {name: [] for name in names}
    bare = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        # in a process of its own: the peak memory of a started process begins with that of the one that starts it
        writer = multiprocessing.Process(target=write_dataset, args=(root,))
        writer.start()
        writer.join()
        for _ in range(ROUNDS):
            bare.append(link_all(root, root / "bare"))
            runs[names[0]].append(refactor(root, "all_labels.json", "--dry-run"))
            for name in names[1:]:
                runs[name].append(refactor(root, "labels.json"))
            placed = sum(len(files) for _, _, files in os.walk(root / "organized"))
            assert placed == LINKED, f"{placed:,} videos were placed, not {LINKED:,}"
            shutil.rmtree(root / "bare")
            shutil.rmtree(root / "organized")

    seconds = {name: statistics.median(s for s, _ in results) for name, results in runs.items()}
    megabytes = {name: max(mb for _, mb in results) for name, results in runs.items()}
    baseline = statistics.median(bare)
    print(f"{'':42}{'seconds':>10}{'peak MB':>10}{'x os.link':>11}")
    print(f"{f'os.link of {LINKED:,} files, nothing else':42}{baseline:>10.1f}{'':>10}{1:>11.1f}")
    for name in names:
        print(f"{name:42}{seconds[name]:>10.1f}{megabytes[name]:>10.0f}{seconds[name] / baseline:>11.1f}")
    print(json.dumps({
        "plan_seconds": round(seconds[names[0]], 2), "plan_peak_mb": round(megabytes[names[0]]),
        "hardlink_seconds": round(seconds[names[1]], 2), "hardlink_peak_mb": round(megabytes[names[1]]),
        "again_seconds": round(seconds[names[2]], 2), "times_bare_links": round(seconds[names[1]] / baseline, 2),
    }))


if __name__ == "__main__":
    main()
