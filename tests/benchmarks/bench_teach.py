"""How well, and how fast, a new last layer on a frozen network tells new drawn exercises apart.

    $ python tests/benchmarks/bench_teach.py --backbone sample/training/checkpoint.pth

Draws the exercises into FOLDER, looks at each video once, then fits on PER_CLASS videos of a class, drawn SEEDS times,
and counts the held-out videos, of other people in other rooms, that are named right. The backbone must not know them.
"""

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "tools"))
import common
from common import finding, flags, machine

import numpy as np

from teaching import features, fitting

# ----------------------------------------------------------------------------------------------------------------------
BACKBONE = "sample/training/checkpoint.pth"  # trained on other exercises
CLASSES = ["high_knees", "arm_circles", "lunges", "jabs"]  # what is taught
FOLDER = "./bench_teach"  # drawn videos and features
PER_CLASS = [4, 8, 16]  # videos of a class to learn from
HELD_OUT = 24  # videos of a class to judge on
CLIPS_PER_VIDEO = 3  # as in teach.py
SEEDS = 5  # draws of the videos to learn from
# ----------------------------------------------------------------------------------------------------------------------


def draw():
    """FOLDER/videos/{train,val}/<class>/<video>."""
    dataset, counts = Path(FOLDER, "dataset"), (max(PER_CLASS), HELD_OUT)
    commands = [
        ["make_sample_dataset.py", "--out", dataset, "--classes", *CLASSES, "--seed", 1, "--train-videos-per-class",
         counts[0], "--val-videos-per-class", counts[1]],
        ["refactor_dataset.py", "--srcs", *(dataset / f"QEVD-FIT-300k-Part-{k}" for k in (1, 2, 3, 4)), "--dest",
         Path(FOLDER, "videos"), "--labels-json", dataset / "fine_grained_labels_release.json", "--missing-csv",
         Path(FOLDER, "missing.csv"), "--mode", "hardlink"],
    ]  # fmt: skip
    for script, *arguments in commands:
        subprocess.run([sys.executable, str(REPO / "tools" / script), *map(str, arguments)], check=True)


def look(backbone):
    """{side: {class: [features of each video]}} and the seconds that each side took, what is kept not counted."""
    seen, seconds = {}, {}
    for side, num_clips in ("train", CLIPS_PER_VIDEO), ("val", 1):
        folder = Path(FOLDER, "videos", side)
        views = {str(folder / path): (num_clips, side == "train") for path in finding.find_videos(folder).videos}
        start, seen[side] = time.perf_counter(), {name: [] for name in CLASSES}
        for file, rows, why in features.compute(views, backbone, Path(FOLDER, "features"), machine.num_workers()):
            if why:
                common.refuse(f"{file}: {why}")
            seen[side][Path(file).parent.name].append(rows)
        seconds[side] = (time.perf_counter() - start) / len(views)
    return seen, seconds


def taught(seen, number, seed):
    """(share of held-out videos that are named right, seconds of fitting) with so many videos of each class."""
    chosen = [random.Random(seed).sample(seen["train"][name], number) for name in CLASSES]
    rows, labels = sum(chosen, []), np.repeat(np.arange(len(CLASSES)), number)
    start = time.perf_counter()
    judged = fitting.cross_validate(rows, labels, list(range(len(rows))), len(CLASSES))
    layer = fitting.fit_all(rows, labels, len(CLASSES), judged.strength)
    seconds = time.perf_counter() - start
    right = [layer.logits(rows[0][None]).argmax() == i for i, name in enumerate(CLASSES) for rows in seen["val"][name]]
    return statistics.mean(map(float, right)), seconds


def main():
    flags.set_constants_from_flags(globals())
    draw()
    backbone = features.load_backbone(BACKBONE, "r2plus1d_18", len(CLASSES), False, False)
    seen, seconds = look(backbone)
    print(f"looking: {seconds['train']:.2f} s a video to learn from, {seconds['val']:.2f} s a held-out one")
    for number in PER_CLASS:
        results = [taught(seen, number, seed) for seed in range(SEEDS)]
        shares, times = zip(*results)
        each = " ".join(f"{100 * share:.1f}" for share in shares)
        print(f"{number:3} videos a class: {each} % right of {HELD_OUT * len(CLASSES)}, mean "
              f"{100 * statistics.mean(shares):.1f}; fitted in {min(times):.1f} to {max(times):.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
