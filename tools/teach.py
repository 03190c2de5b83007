"""Teach a trained network exercises of your own in a minute: its last layer is fitted anew, all others stay.

Reads   SOURCE/<class>/<video>, and BACKBONE, a checkpoint of whatever classes or the name of weights of torchvision
Writes  DEST/{train,val}/<class>/<video>, DEST/split.csv and CLASS_MAP, by split_videos.py;
        FEATURES/, what the network sees in each video, computed once;
        OUTPUT, a checkpoint that every later step takes

    $ python tools/teach.py --source my_videos --backbone checkpoint.pth

It prints how many videos are named right that the network did not learn from: by cross-validation of the training
videos, and those of DEST/val. Add videos or a class and run it again: only what is new is looked at, in seconds.

Exit codes: 0 done, 1 some videos cannot be read (listed), 2 wrong usage, configuration or environment.
"""

import csv
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import common
from common import calibration, checkpoints, finding, flags, machine
from common.names import class_name, printable, shortened

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
SOURCE = "./my_videos"  # folder of class folders: SOURCE/<class>/<video>
BACKBONE = "KINETICS400_V1"  # a checkpoint of any classes (.pth, .safetensors), or weights of torchvision for MODEL
MODEL = ""  # network of a BACKBONE that does not say it; "": r2plus1d_18
DEST = "./my_dataset"  # gets train/ and val/; see split_videos.py
CLASS_MAP = "./my_class_map.json"  # {class: index}, written, later extended
GROUPS = ""  # what stays on one side, a person say; see split_videos.py
OUTPUT = "./checkpoint.pth"  # checkpoint to write
FEATURES = "./features"  # keeps what the network has seen; may be deleted
CLIPS_PER_VIDEO = 3  # clips to learn from in each video, evenly spread
ROTATE = True  # turn videos upright as phones ask; QEVD's official pipeline does not
KEEP_ASPECT = False  # true: resize the shorter side and crop the middle, instead of squeezing all of it to 4:3
NUM_WORKERS = 0  # processes that decode; 0: one a core that this process may use
OVERWRITE = False  # replace an OUTPUT that this script did not write
# ----------------------------------------------------------------------------------------------------------------------

MANY_VIDEOS = 50  # a class: from here on training more than the last layer is worth a try


@dataclass
class TeachingVideo:
    """A video of DEST and what is known of it."""

    file: str
    side: str  # "train" or "val"
    label: str
    group: str  # a video without one is a group of its own, with its copies
    content: str  # a hash of it
    features: np.ndarray = None  # float32 (views, features), as features.compute_features gives them


def split():
    """Let split_videos.py decide which videos are learned from. Returns whether it could not take some."""
    command = [sys.executable, str(common.REPO / "tools/split_videos.py"), "--source", SOURCE, "--dest", DEST]
    command += ["--class-map", CLASS_MAP, "--groups", GROUPS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace") as process:
        for line in process.stdout:
            if not line.startswith("next:"):
                print(line, end="", flush=True)
    if process.returncode not in (0, 1):
        raise SystemExit(process.returncode)
    return process.returncode == 1


def placed_by_split():
    """{<class>/<name> below a side: its row of split.csv, a dict} of the videos that split_videos.py has placed."""
    with open(Path(DEST, "split.csv"), newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [(row["video"].split("/"), row) for row in csv.DictReader(file) if row["size"] != "0"]
    return {f"{class_name(label)}/{'__'.join(rest)}": row for (label, *rest), row in rows}


def content_of(file, row):
    """A hash of a file's content: that of split.csv's row if the file is the one it tells of, not a repaired one."""
    there = os.stat(file)
    if row and (row["size"], row["mtime_ns"]) == (str(there.st_size), str(there.st_mtime_ns)):
        return row["fingerprint"]
    return common.sha256_of(file)


def videos_of_both_sides():
    """The TeachingVideos of both sides."""
    placed, videos = placed_by_split(), []
    for side in ("train", "val"):
        for path in finding.find_videos(Path(DEST, side)).videos if Path(DEST, side).is_dir() else ():
            file, row = str(Path(DEST, side, path)), placed.get(path)
            content = content_of(file, row)
            group = (row and row["group"]) or content
            videos.append(TeachingVideo(file, side, path.split("/")[0], group, content))
    return videos


def check_output():
    """Exit with code 2 if OUTPUT is a checkpoint of another script."""
    if OVERWRITE or not Path(OUTPUT).exists():
        return
    if "taught_from" not in checkpoints.load_checkpoint(OUTPUT)["args"]:
        common.refuse(f"{OUTPUT} was not written by this script: name another with --output, or add --overwrite")


def set_features(videos, backbone):
    """Give the videos their features; returns those that can be read, and prints why the others cannot."""
    from teaching import features
    from torchvision_patches.mirror import names_a_side

    by_file = {video.file: video for video in videos}
    views = {}
    for video in videos:
        learned = video.side == "train"
        mirrored = learned and not names_a_side(video.label)
        views[video.file] = video.content, CLIPS_PER_VIDEO if learned else 1, learned, mirrored
    workers = machine.num_workers(NUM_WORKERS)
    failed = {}
    for file, rows, why in features.compute_features(views, backbone, FEATURES, workers):
        by_file[file].features = rows
        if why:
            failed[file] = why
    for file, why in sorted(failed.items()):
        print(f"failed: {printable(file)}: {why}")
    return [video for video in videos if video.features is not None]


def print_accuracy(what, logits, labels, names):
    """Print how many videos are named right, with the 95 % interval, and which class is taken for which.

    logits: float (videos, classes); labels: int (videos,), their classes.
    """
    from report.figures import wilson

    named = logits.argmax(1)
    right = int((named == labels).sum())
    low, high = wilson(right, len(labels))
    share = f"{right / len(labels):.0%} (95 % interval {low:.0f} to {high:.0f} %)"
    print(f"{what}: {right:,} of {len(labels):,} right, {share}")
    taken = Counter((names[a], names[b]) for a, b in zip(labels, named) if a != b)
    for (label, other), number in taken.most_common(10):
        of = int((labels == names.index(label)).sum())
        print(f"  {printable(label)} taken for {printable(other)}: {number} of {of}")


def judge(train, val, names):
    """Fit the last layer on the videos to train on, and print how it does on others.

    Returns (fitting.LinearLayer, calibration.Calibration of what was left out in turn).
    """
    from teaching import fitting

    index = {name: i for i, name in enumerate(names)}
    labels, val_labels = (np.array([index[video.label] for video in side]) for side in (train, val))
    rows = [video.features for video in train]
    judged = fitting.cross_validate(rows, labels, [video.group for video in train], len(names))
    counted = ~np.isnan(judged.logits[:, 0])
    trusted = calibration.Calibration(1.0, None)
    if counted.any():
        print_accuracy("videos left out in turn", judged.logits[counted], labels[counted], names)
        trusted = calibration.fit_if_told(judged.logits[counted], labels[counted]) or trusted
    if not counted.all():
        alone = sorted({video.label for video, is_counted in zip(train, counted) if not is_counted})
        print(f"not judged, for want of a second video or group to train on: {shortened(alone)}")
    layer = fitting.fit_all(rows, labels, len(names), judged.strength)
    if val:
        print_accuracy(f"videos of {DEST}/val", layer.logits(np.stack([v.features[0] for v in val])), val_labels, names)
    return layer, trusted


def save_taught(backbone, layer, trusted, names):
    """Write OUTPUT: the backbone with its new last layer, as train.py writes a checkpoint."""
    import torch

    weight, bias = backbone.last.parameters()
    with torch.no_grad():
        weight.copy_(torch.from_numpy(layer.weight).reshape(weight.shape))
        bias.copy_(torch.from_numpy(layer.bias))
    state = {name: value.cpu() for name, value in backbone.network.state_dict().items()}
    args = {"model": backbone.description.model_name, "taught_from": BACKBONE, "backbone": backbone.digest}
    saved = {"model": state, "epoch": 0, "args": args, "classes": names, **backbone.description.as_dict()}
    with common.written_then_renamed(OUTPUT) as temporary:
        torch.save(saved | trusted._asdict(), temporary)


def print_what_is_possible(train, val):
    """The commands of what can be done now."""
    new = flags.next_command("preprocess_and_save.py", OUTPUT, DATA_ROOT=str(Path(DEST, "val")), CHECKPOINT=OUTPUT)
    print(f"{OUTPUT} is written: {flags.next_command('predict.py VIDEO', OUTPUT, CHECKPOINT=OUTPUT)} names a video")
    if val:
        print(f"next: {new}\nthen: {flags.next_command('example_export.py', OUTPUT, checkpoint=OUTPUT)}")
    fewest = min(Counter(video.label for video in train).values())
    if fewest >= MANY_VIDEOS:
        tune = ["python", "references/video_classification/train.py", "--data-path", DEST, "--class-map", CLASS_MAP]
        tune += ["--amp", "--output-dir", "fine_tuned", "--resume", OUTPUT, "--resume-weights-only", "--lr", "0.001"]
        print(f"each class has {fewest} videos or more: with a GPU, training more layers may give more: ", end="")
        print(shlex.join(tune))


def main():
    flags.set_constants_from_flags(globals())
    check_output()
    some_failed = split()
    class_map = common.load_class_map(CLASS_MAP)
    names = sorted(class_map, key=class_map.get)
    from teaching import features

    backbone = features.load_backbone(BACKBONE, MODEL, len(names), ROTATE, KEEP_ASPECT)
    videos = videos_of_both_sides()
    readable = set_features(videos, backbone)
    train, val = ([video for video in readable if video.side == side] for side in ("train", "val"))
    if len({video.label for video in train}) < 2:
        common.refuse(f"{DEST}/train has readable videos of fewer than two classes; put more into {SOURCE}/<class>/")
    layer, trusted = judge(train, val, names)
    if trusted.threshold is not None:
        print(f'"not sure" below {trusted.threshold:.0%}: of surer answers {calibration.WANTED:.0%} were right')
    save_taught(backbone, layer, trusted, names)
    print_what_is_possible(train, val)
    raise SystemExit(1 if some_failed or len(readable) < len(videos) else 0)


if __name__ == "__main__":
    main()
