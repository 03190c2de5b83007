"""What a teacher's logits give a small student: Top-1 on held-out drawn exercises, with and without them, seed by seed.

Draws the videos, trains the teacher, saves its logits, then trains the student twice a seed, from the same weights and
in the same order: by the labels alone, and by labels and teacher (--distill-alpha 0.5, --distill-temperature 2, those
of the 2026 winner). Both see the same videos; the teacher is deeper, sees larger frames, and trains longer. All of it
with train.py as a user runs it. What is finished in FOLDER is not done again; a run that was stopped continues. The
last line is one JSON object. Takes half an hour to an hour of one core.

    $ python tests/benchmarks/bench_distillation.py
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tools"))

import common
from common import flags

# ----------------------------------------------------------------------------------------------------------------------
FOLDER = "./sample/distillation"  # for videos, checkpoints and figures
CLASSES = ["jumping_jacks", "squats", "high_knees", "arm_circles", "toe_touch",  # those that can be drawn
           "standing_kicks", "lunges", "pushups", "leg_lifts"]
TRAIN_VIDEOS_PER_CLASS = 24  # videos
VAL_VIDEOS_PER_CLASS = 20  # videos
SEEDS = [0, 1, 2, 3, 4]  # of the student
# ----------------------------------------------------------------------------------------------------------------------

# 4 frames at 2 fps; three clips of each video an epoch
CLIPS = """
    --clip-len 4 --frame-rate 2 --clips-per-video 3 --batch-size 8 --device cpu --workers 0 --cache-dataset
    --print-freq 20 --trainable-layers all --opt adamw --lr-scheduler onecycle --save-every 0
""".split()  # noqa: SIM905
TEACHER = """
    --model r2plus1d_18 --val-resize-size 54 72 --val-crop-size 48 48 --epochs 4 --eval-every 4 --lr 0.0005
""".split()  # noqa: SIM905
STUDENT = """
    --model mc3_18 --val-resize-size 36 48 --val-crop-size 32 32 --epochs 2 --eval-every 2 --lr 0.0005
""".split()  # noqa: SIM905


def run(script, *arguments):
    """A script of the project, with its output shown; a failure ends the benchmark."""
    print(f"$ python {script} {' '.join(map(str, arguments))}", flush=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([sys.executable, str(REPO / script), *map(str, arguments)], check=True, env=environment)


def train(*arguments):
    run("references/video_classification/train.py", "--data-path", Path(FOLDER, "videos"), *CLIPS, *arguments)


def trained(output_dir, *flags):
    """Video Acc@1 in percent on the held-out videos after the last epoch of a run."""
    figures, start = Path(output_dir, "top1.json"), time.monotonic()
    if not figures.exists():
        train("--output-dir", output_dir, "--resume", "auto", *flags)
        last = json.loads(Path(output_dir, "metrics.jsonl").read_text().splitlines()[-1])
        with common.written_then_renamed(figures) as temporary:
            temporary.write_text(json.dumps(last))
        print(f"{output_dir}: {last['video_acc1']:.1f} % after {time.monotonic() - start:.0f} s", flush=True)
    return json.loads(figures.read_text())["video_acc1"]


def draw_videos():
    dataset, per_class = Path(FOLDER, "dataset"), (TRAIN_VIDEOS_PER_CLASS, VAL_VIDEOS_PER_CLASS)
    counts = zip(("--train-videos-per-class", "--val-videos-per-class"), per_class)
    run(
        "tools/make_sample_dataset.py", "--out", dataset, "--classes", *CLASSES, "--num-workers", 1,
        *(word for pair in counts for word in pair),
    )  # fmt: skip
    run(
        "tools/refactor_dataset.py", "--srcs", *(dataset / f"QEVD-FIT-300k-Part-{k}" for k in (1, 2, 3, 4)),
        "--dest", Path(FOLDER, "videos"), "--labels-json", dataset / "fine_grained_labels_release.json",
        "--missing-csv", Path(FOLDER, "missing.csv"), "--mode", "hardlink",
    )  # fmt: skip


def summary(name, values):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    each = " ".join(f"{value:7.1f}" for value in values)
    mean, least, most = statistics.mean(values), min(values), max(values)
    print(f"{name:20}{each}   mean {mean:5.1f}  from {least:5.1f} to {most:5.1f}  std {spread:4.1f}", flush=True)


def main():
    flags.set_constants_from_flags(globals())
    draw_videos()
    teacher, logits = Path(FOLDER, "teacher"), Path(FOLDER, "teacher.npy")
    top1_of_teacher = trained(teacher, *TEACHER, "--cache-frames", Path(FOLDER, "frames_of_teacher"))
    ask = "--test-only", "--resume", teacher / "checkpoint.pth", "--save-logits", logits
    train(*ask, "--cache-frames", Path(FOLDER, "frames_of_teacher"))
    labels_alone, with_teacher = [], []
    for seed in SEEDS:
        for found, name, more in (labels_alone, "labels", ()), (with_teacher, "teacher", ("--teacher-logits", logits)):
            output_dir = Path(FOLDER, f"student_{name}_{seed}")
            words = [*STUDENT, "--seed", seed, "--cache-frames", Path(FOLDER, "frames_of_student"), *more]
            found.append(trained(output_dir, *words))
            for checkpoint in output_dir.glob("*.pth"):
                checkpoint.unlink()  # 140 MB
    count = len(CLASSES) * VAL_VIDEOS_PER_CLASS
    print(f"Top-1 in percent on {count} held-out videos of {len(CLASSES)} exercises, chance {100 / len(CLASSES):.1f};")
    print(f"teacher {top1_of_teacher:.1f}; student, seed by seed ({', '.join(map(str, SEEDS))}):")
    summary("labels alone", labels_alone)
    summary("labels and teacher", with_teacher)
    summary("difference", [b - a for a, b in zip(labels_alone, with_teacher)])
    rows = {"labels alone": labels_alone, "labels and teacher": with_teacher}
    print(json.dumps({"videos": count, "seeds": SEEDS, "teacher": top1_of_teacher, **rows}))


if __name__ == "__main__":
    main()
