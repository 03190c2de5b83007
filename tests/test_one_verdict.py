"""One verdict on every file: check_videos.py, the index, training and preprocessing take the same ones.

Each step is run on a folder of files of all kinds, so that every frame of each file matters to it. Prints the table:

    $ python -m pytest tests/test_one_verdict.py -s
"""

import csv
import json
import subprocess
import sys

from common import finding

import pytest

from conftest import REPO
from odd_videos import write_bad, write_healthy
from torchvision_patches.video_utils import UnreadableVideo, index_videos, read_frames

CLIP_LEN, FRAME_RATE = 59, 30  # so that every frame of a file of 59 or fewer is in its one clip; most have fewer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, sources):
    """(root, names below root/train that every step takes, names that none does)"""
    root = tmp_path_factory.mktemp("verdicts")
    for folder in "good", "bad":
        (root / "train" / folder).mkdir(parents=True)
    good = [f"good/{name}" for name in write_healthy(root / "train/good", sources)]
    return root, good, [f"bad/{name}" for name in write_bad(root / "train/bad", sources)]


def taken_by_check(root, folder):
    """Names that decode by the report of a dry run; what would be moved is what does not decode or is no file."""
    command = [sys.executable, REPO / "tools/check_videos.py", "--root", root, "--dry-run", "--report", "report.csv"]
    result = subprocess.run([*command, "--jobs", "2"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    with open(folder / "report.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert (row["decodes"] == "yes") == (row["action"] == "kept" and row["reason"] != "unreadable"), row
    return {row["video"].partition("train/")[2] for row in rows if row["decodes"] == "yes"}


def taken_by_index(root):
    """Names that the walk finds, the index takes, and of which `read_frames` then gives every frame."""
    names = finding.find_videos(root / "train").videos
    paths = [str(root / "train" / name) for name in names]
    index, taken = index_videos(paths, 2, progress=False), set()
    for name, path, pts in zip(names, paths, index["video_pts"]):
        if path not in index["unreadable"]:
            try:
                read_frames(path, pts.numpy(), range(len(pts)), convert=lambda pixels: pixels[:1, :1])
                taken.add(name)
            except UnreadableVideo:
                pass
    return taken


TRAIN = """
import json, os, sys
import train  # it puts tools/ on the path
import datasets, splits
from torchvision_patches.video_utils import VideoClips, index_videos
root, clip_len, frame_rate, num_workers = sys.argv[1], *map(int, sys.argv[2:])
sys.stdout.reconfigure(errors="surrogateescape")
samples = splits.list_videos(root, "train", {"good": 0, "bad": 1}, "map")
metadata = index_videos([path for path, _ in samples], num_workers, progress=False)
clips = VideoClips(metadata["video_paths"], clip_len, 1, frame_rate, metadata)
dataset = datasets.KineticsWithVideoId(root, samples, clips, lambda clip: clip)
taken = []
for number, (path, _) in enumerate(samples):
    count = len(clips.clips[number])
    first = clips.cumulative_sizes[number] - count
    if count and not any(dataset[first + k, 0].failures for k in {0, count // 2, count - 1}):
        taken.append(os.path.relpath(path, root + "/train"))
print(json.dumps(taken))
"""


def taken_by_training(root):
    """Names of which training's dataset gives the first, a middle and the last clip."""
    command = [sys.executable, "-c", TRAIN, root, str(CLIP_LEN), str(FRAME_RATE), "2"]
    folder = REPO / "references/video_classification"
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="surrogateescape")
    assert result.returncode == 0, result.stdout + result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def taken_by_preprocessing(root, folder, run_script):
    """Names that have a row in the manifest."""
    flags = ("--data-root", root / "train", "--out-root", folder / "out")
    flags += ("--clip-len", CLIP_LEN, "--frame-rate", FRAME_RATE)
    run_script("tools/preprocess_and_save.py", *flags, code=1)
    rows = map(json.loads, (folder / "out/manifest.jsonl").read_text().splitlines())
    return {row["video_path"].partition("train/")[2] for row in rows}


def test_every_step_has_the_same_verdict_on_every_kind_of_file(dataset, run_script, tmp_path):
    root, good, bad = dataset
    assert len(good) >= 40 and len(bad) >= 35
    taken = {
        "check": taken_by_check(root, tmp_path),
        "index": taken_by_index(root),
        "train": taken_by_training(str(root)),
        "preprocess": taken_by_preprocessing(root, tmp_path, run_script),
    }
    different = []
    print(f"\n{'file':50}" + "".join(f"{step:>12}" for step in taken))
    for name in good + bad:
        verdicts = ["takes" if name in taken[step] else "-" for step in taken]
        line = f"{name[:49]!a:50}" + "".join(f"{verdict:>12}" for verdict in verdicts)
        print(line)
        if set(verdicts) != {"takes" if name in good else "-"}:
            different.append(line)
    assert not different, "\n".join(different)
