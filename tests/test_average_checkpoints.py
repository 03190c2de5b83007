"""Soups: equal checkpoints give themselves, a greedy one is never below the best, what does not fit is refused.

$ python -m pytest tests/test_average_checkpoints.py
"""

import json

import pytest
import torch

from conftest import REPO
from make_videos import write_video
from test_train import CLASSES, FAST, load, train

SCRIPT = "tools/average_checkpoints.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(dataset root, two checkpoints of runs that differ in seed and rate)."""
    root = tmp_path_factory.mktemp("soup")
    for split, count in ("train", 4), ("val", 6):
        for i in range(count):
            folder = root / "data" / split / CLASSES[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{i:08d}.mp4", num_frames=30, height=48, width=64, seed=i)
    paths = []
    for number, rate in enumerate((0.01, 3.0)):
        flags = [*FAST, "--batch-size", 2, "--epochs", 1, "--save-every", 0, "--lr", rate, "--seed", number]
        train("--data-path", root / "data", *flags, "--output-dir", root / str(number))
        paths.append(root / str(number) / "checkpoint.pth")
    return root / "data", paths


def test_equal_checkpoints_and_means(trained, run_script, tmp_path):
    _, (one, two) = trained
    run_script(SCRIPT, "--checkpoints", one, one, one, "--output", tmp_path / "same.pth")
    before, after = load(one), load(tmp_path / "same.pth")
    assert all(torch.equal(after["model"][key], value) for key, value in before["model"].items())
    assert (after["classes"], after["clip_len"], after["model_name"]) == (before["classes"], 4, "mc3_18")
    run_script(SCRIPT, "--checkpoints", one, two, "--output", tmp_path / "mean.pth")
    mean, other = load(tmp_path / "mean.pth")["model"], load(two)["model"]
    for key in ("fc.weight", "layer4.0.conv1.1.running_mean"):
        torch.testing.assert_close(mean[key], (before["model"][key] + other[key]) / 2)


def test_a_greedy_soup_is_never_below_the_best(trained, run_script, tmp_path):
    data, paths = trained
    flags = ["--checkpoints", *paths, "--data-path", data, "--output", tmp_path / "soup.pth", "--device", "cpu"]
    out = run_script(SCRIPT, *flags, "--greedy", "--class-map", REPO / "class_map.json").stdout
    single = [float(line.rpartition(" ")[2]) for line in out.splitlines()[: len(paths)]]
    result = json.loads(out.splitlines()[-1])
    assert result["video_acc1"] >= max(single) - 1, "6 videos are printed without decimals"
    test = ["--data-path", data, "--resume", tmp_path / "soup.pth", "--test-only", "--device", "cpu"]
    again = json.loads(train(*test)[0].splitlines()[-1])
    assert again.pop("val_loss") == pytest.approx(result.pop("val_loss"), rel=1e-5) and again == result


def test_what_does_not_fit_is_refused(trained, run_script, tmp_path):
    _, (one, two) = trained
    checkpoint = load(one)
    torch.save(checkpoint | {"clip_len": 8}, tmp_path / "other.pth")
    refused = run_script(SCRIPT, "--checkpoints", one, tmp_path / "other.pth", code=2).stderr
    assert "differ: clip_len 8, not 4; there is no average of them" in refused
    assert "needs two checkpoints or more" in run_script(SCRIPT, "--checkpoints", one, code=2).stderr
    assert "--data-path" in run_script(SCRIPT, "--checkpoints", one, two, "--greedy", code=2).stderr
