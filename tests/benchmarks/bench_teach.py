"""How well, and how fast, a new last layer on a frozen network tells new drawn exercises apart; when it is "not sure".

    $ python tests/benchmarks/bench_teach.py --backbone sample/training/checkpoint.pth

Draws the exercises into FOLDER, looks at each video once, then fits on PER_CLASS videos of a class, drawn SEEDS times,
and counts the held-out videos, of other people in other rooms, that are named right. The backbone must not know them.
Then each class in turn is left out of the teaching, and its held-out videos are exercises that no class knows.
"""

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "tools"))
import common
from common import calibration, finding, flags, machine

import numpy as np

from report.figures import wilson
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


class Lesson(NamedTuple):
    """What one draw of videos taught."""

    layer: fitting.LinearLayer
    trusted: calibration.Calibration  # of videos left out in turn, as in teach.py; (1, None) where they are few
    seconds: float


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
        folder, start = Path(FOLDER, "videos", side), time.perf_counter()
        files = [str(folder / path) for path in finding.find_videos(folder).videos]
        views = {file: (common.sha256_of(file), num_clips, side == "train") for file in files}
        seen[side] = {name: [] for name in CLASSES}
        for file, rows, why in features.compute(views, backbone, Path(FOLDER, "features"), machine.num_workers()):
            if why:
                common.refuse(f"{file}: {why}")
            seen[side][Path(file).parent.name].append(rows)
        seconds[side] = (time.perf_counter() - start) / len(views)
    return seen, seconds


def teach(videos, number, seed, names):
    """The Lesson of so many videos of each class of `names`; videos: {class: [features of each]}."""
    rows = sum([random.Random(seed).sample(videos[name], number) for name in names], [])
    labels, start = np.repeat(np.arange(len(names)), number), time.perf_counter()
    judged = fitting.cross_validate(rows, labels, list(range(len(rows))), len(names))
    layer = fitting.fit_all(rows, labels, len(names), judged.strength)
    trusted = calibration.fit_if_told(judged.logits, labels) or calibration.Calibration(1.0, None)
    return Lesson(layer, trusted, time.perf_counter() - start)


def logits_of(lesson, videos):
    """Float64 (videos, classes) of the first view of each video."""
    return lesson.layer.logits(np.stack([rows[0] for rows in videos]))


def are_sure(lesson, logits):
    """Whether an answer is given, bool (videos,)."""
    return calibration.confidence(logits, lesson.trusted.temperature) >= (lesson.trusted.threshold or 0)


def in_words(flags_of_videos):
    """A share as 12 of 96, 12 % (7 to 21)."""
    right, total = int(flags_of_videos.sum()), len(flags_of_videos)
    return f"{right} of {total}, " + "{:.0f} % ({:.0f} to {:.0f})".format(100 * right / total, *wilson(right, total))


def report_known(seen, number):
    """Accuracy, seconds and trust on held-out videos of all classes."""
    labels = np.repeat(np.arange(len(CLASSES)), [len(seen["val"][name]) for name in CLASSES])
    lessons = [teach(seen["train"], number, seed, CLASSES) for seed in range(SEEDS)]
    logits = [logits_of(lesson, sum(seen["val"].values(), [])) for lesson in lessons]
    right = np.stack([values.argmax(1) == labels for values in logits])
    times = [lesson.seconds for lesson in lessons]
    each = " ".join(f"{100 * share:.1f}" for share in right.mean(1))
    print(f"{number:3} videos a class: {each} % right of {len(labels)}, mean {100 * right.mean():.1f}; "
          f"fitted in {min(times):.1f} to {max(times):.1f} s")  # fmt: skip
    told = [k for k, lesson in enumerate(lessons) if lesson.trusted.threshold is not None]
    errors = [[calibration.expected_calibration_error(calibration.confidence(values, temperature), of_draw)
               for temperature in (1, lesson.trusted.temperature)]
              for values, lesson, of_draw in zip(logits, lessons, right)]  # fmt: skip
    print("    calibration error {:.3f}, with the temperature {:.3f}".format(*np.mean(errors, 0)), end="; ")
    if not told:
        return print("no draw tells a threshold")
    sure = np.concatenate([are_sure(lessons[k], logits[k]) for k in told])
    print(f"{len(told)} of {SEEDS} draws tell a threshold: answers {in_words(sure)}, right of them "
          f"{in_words(np.concatenate(right[told])[sure])}")  # fmt: skip


def report_unknown(seen, number):
    """How many videos of a class that was not taught are "not sure", and of those that were."""
    for name in CLASSES:
        others = [other for other in CLASSES if other != name]
        lessons = [teach(seen["train"], number, seed, others) for seed in range(SEEDS)]
        lessons = [lesson for lesson in lessons if lesson.trusted.threshold is not None]
        if not lessons:
            print(f"    {name} left out: no draw tells a threshold")
            continue
        unknown, known = (
            np.concatenate([~are_sure(lesson, logits_of(lesson, videos)) for lesson in lessons])
            for videos in (seen["val"][name], sum((seen["val"][other] for other in others), []))
        )
        print(f'    {name} left out, {len(lessons)} draws: "not sure" {in_words(unknown)}; others {in_words(known)}')


def main():
    flags.set_constants_from_flags(globals())
    draw()
    backbone = features.load_backbone(BACKBONE, "r2plus1d_18", len(CLASSES), False, False)
    seen, seconds = look(backbone)
    print(f"looking: {seconds['train']:.2f} s a video to learn from, {seconds['val']:.2f} s a held-out one")
    for number in PER_CLASS:
        report_known(seen, number)
    for number in PER_CLASS:
        print(f"{number:3} videos a class, exercises that no class knows:")
        report_unknown(seen, number)


if __name__ == "__main__":
    main()
