"""How well, and how fast, a new last layer on a frozen network tells new drawn exercises apart; when it is "not sure".

    $ python tests/benchmarks/bench_teach.py --backbone sample/training/checkpoint.pth

Draws the exercises into FOLDER, looks at each video once, then fits on PER_CLASS videos of a class, drawn SEEDS times,
and counts the held-out videos, of other people in other rooms, that are named right. The backbone must not know them.
Then each class in turn is left out of the teaching, and its held-out videos are exercises that no class knows: without
and with a class of their own for other exercises, three videos of each in OTHERS. With `--train-on 4 8 16` train.py
learns from the same draws, too, from the backbone on and from scratch: 2 to 15 minutes of CPU time each.
"""

import json
import random
import resource
import shutil
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
OTHERS = "sample/QEVD_organized/val"  # class folders, what none of CLASSES is
FOLDER = "./bench_teach"  # drawn videos and features
PER_CLASS = [4, 8, 16]  # videos of a class to learn from
HELD_OUT = 24  # videos of a class to judge on
CLIPS_PER_VIDEO = 3  # as in teach.py
SEEDS = 5  # draws of the videos to learn from
TRAIN_ON = []  # videos of a class that train.py learns from, too
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


def look(backbone, folder, num_clips, learned, most=None):
    """{class: [features of each video]} of a folder, of `most` videos a class, and prints the seconds a video took."""
    seen, files, start = {}, {}, time.perf_counter()
    for path in finding.find_videos(folder).videos:
        files.setdefault(path.split("/")[0], []).append(str(Path(folder, path)))
    wanted = sum((of_class[:most] for of_class in files.values()), [])
    views = {file: (common.sha256_of(file), num_clips, learned, learned) for file in wanted}
    for file, rows, why in features.compute_features(views, backbone, Path(FOLDER, "features"), machine.num_workers()):
        if why:
            common.refuse(f"{file}: {why}")
        seen[file] = rows
    print(f"looking at {folder}: {(time.perf_counter() - start) / len(views):.2f} s a video, what is kept included")
    return {name: [seen[file] for file in of_class[:most]] for name, of_class in files.items()}


def teach(videos, number, seed, names, others=()):
    """The Lesson of so many videos of each class of `names`, and of `others`, if there are any, as the last class.

    videos: {class: [features of each]}; others: [features of each].
    """
    rows = sum([random.Random(seed).sample(videos[name], number) for name in names], list(others))
    labels, start = np.repeat(np.arange(len(names)), number), time.perf_counter()
    labels = np.concatenate([np.full(len(others), len(names)), labels])
    num_classes = len(names) + bool(others)
    judged = fitting.cross_validate(rows, labels, list(range(len(rows))), num_classes)
    layer = fitting.fit_all(rows, labels, num_classes, judged.strength)
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
    logits = [logits_of(lesson, sum((seen["val"][name] for name in CLASSES), [])) for lesson in lessons]
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


def report_unknown(seen, number, others):
    """How many videos of a class that was not taught get no name, "not sure" or that of others; and of those taught."""
    for name in CLASSES:
        taught = [other for other in CLASSES if other != name]
        lessons = [teach(seen["train"], number, seed, taught, others) for seed in range(SEEDS)]
        told = sum(lesson.trusted.threshold is not None for lesson in lessons)
        unnamed = [[], []]
        for lesson in lessons:
            for videos, found in zip((seen["val"][name], sum((seen["val"][other] for other in taught), [])), unnamed):
                logits = logits_of(lesson, videos)
                found.append(~are_sure(lesson, logits) | (logits.argmax(1) == len(taught)))
        unknown, known = (in_words(np.concatenate(found)) for found in unnamed)
        print(f"    {name} left out, {told} of {SEEDS} draws tell a threshold: {unknown}; of the others {known}")


def train(number, seed, start):
    """(share of the held-out videos named right, seconds of CPU time) of train.py on one draw, as README's last resort.

    start: flags of what to start from, a list.
    """
    data, output = Path(FOLDER, "draw"), Path(FOLDER, "trained")
    for folder in data, output:
        shutil.rmtree(folder, ignore_errors=True)
    drawn = {}
    for path in finding.find_videos(Path(FOLDER, "videos/train")).videos:
        drawn.setdefault(path.split("/")[0], []).append(path)
    for path in sum((random.Random(seed).sample(paths, number) for paths in drawn.values()), []):
        link = data / "train" / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(FOLDER, "videos/train", path).resolve())
    (data / "val").symlink_to(Path(FOLDER, "videos/val").resolve())
    (data / "class_map.json").write_text(json.dumps({name: index for index, name in enumerate(sorted(drawn))}))
    recipe = "--clip-len 8 --trainable-layers layer3 layer4 fc --epochs 15 --batch-size 4 --opt adamw --lr 0.0005"
    recipe += " --lr-head 0.005 --lr-scheduler onecycle --eval-every 15 --save-every 0 --device cpu --workers 1"
    script = REPO / "references/video_classification/train.py"
    command = [sys.executable, str(script), *recipe.split(), *start, "--data-path", str(data), "--class-map",
               str(data / "class_map.json"), "--output-dir", str(output), "--seed", str(seed)]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (*_, last) = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return last["video_acc1"], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    flags.set_constants_from_flags(globals())
    draw()
    backbone = features.load_backbone(BACKBONE, "r2plus1d_18", len(CLASSES), False, False)
    seen = {"train": look(backbone, Path(FOLDER, "videos/train"), CLIPS_PER_VIDEO, True)}
    seen["val"] = look(backbone, Path(FOLDER, "videos/val"), 1, False)
    others = sum(look(backbone, OTHERS, 1, True, most=3).values(), [])
    for number in PER_CLASS:
        report_known(seen, number)
    for number in TRAIN_ON:
        for how, start in ("trained on", ["--resume", BACKBONE, "--resume-weights-only"]), ("from scratch", []):
            runs = [train(number, seed, start) for seed in range(SEEDS)]
            each = " ".join(f"{share:.1f}" for share, _ in runs)
            print(f"{number:3} videos a class, {how}: {each} % right, mean {np.mean(runs, 0)[0]:.1f}; "
                  f"{min(run[1] for run in runs):.0f} to {max(run[1] for run in runs):.0f} s of CPU time")  # fmt: skip
    for number in PER_CLASS:
        for of_others in [], others:
            print(f"{number:3} videos a class, {len(of_others)} of others; what no class knows gets no name:")
            report_unknown(seen, number, of_others)


if __name__ == "__main__":
    main()
