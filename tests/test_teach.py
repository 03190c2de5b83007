"""teach.py: a new last layer on a frozen network, from one's own folders to a checkpoint that later steps take."""

import json
import re
from pathlib import Path

from common import calibration, checkpoints

import av
import numpy as np
import pytest
import torch
import torchvision

import teach
from teaching import features, fitting
from torchvision_patches import clip

SCRIPT = "tools/teach.py"
COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 40, 40)}  # RGB; even random layers see them


def write_colour(path, colour, seed, rotation=0):
    """A video of 2 s of one noisy colour."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for _ in range(20):
            picture = np.array(colour) + rng.normal(0, 25, (48, 64, 3)) + rng.normal(0, 15, 3)
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def backbone(tmp_path):
    """A checkpoint of five other classes, with a clip of its own."""
    torch.manual_seed(0)
    network = torchvision.models.get_model("mc3_18", num_classes=5)
    own = clip.of_network("mc3_18", clip_len=4, frame_rate=5)._replace(resize_size=(32, 43), crop_size=(28, 28))
    state = {"model": network.state_dict(), "classes": list("abcde"), "args": {}, **own.as_dict()}
    torch.save(state, tmp_path / "backbone.pth")
    return "backbone.pth"


def draw(folder, colours=COLOURS, number=5):
    for colour in colours:
        for seed in range(number):
            write_colour(folder / colour / f"{seed}.mp4", COLOURS[colour], seed)


def test_own_classes_in_a_minute(tmp_path, run_script, backbone):
    draw(tmp_path / "my_videos", ("blue", "red"))
    out = run_script(SCRIPT, "--backbone", backbone).stdout
    assert "videos left out in turn: 8 of 8 right, 100%" in out and "videos of ./my_dataset/val: 2 of 2 right" in out
    before, taught = (checkpoints.load_checkpoint(tmp_path / name) for name in (backbone, "checkpoint.pth"))
    moved = [name for name, value in before["model"].items() if not torch.equal(value, taught["model"][name])]
    assert sorted({name.split(".")[0] for name in moved}) == ["fc"], "more than the last layer was changed"
    assert taught["classes"] == ["blue", "red"] and taught["model"]["fc.weight"].shape == (2, 512)
    description, untold = clip.described(taught)
    assert not untold and description.differences(clip.described(before)[0]) == ["rotate True, not False"]

    seen = sorted(len(np.load(path)) for path in (tmp_path / "features").iterdir())
    assert seen == [1] * 2 + [14] * 8, "val: the clip that is scored; train: 3 clips, 4 edges, all mirrored, too"

    # a class and a video more: what has been seen is not looked at again
    seen = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    draw(tmp_path / "my_videos", ("green",))
    write_colour(tmp_path / "my_videos/red/new.mp4", COLOURS["red"], 77)
    out = run_script(SCRIPT, "--backbone", backbone).stdout
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert len(now) == len(seen) + 6 and all(now[name] == time for name, time in seen.items())
    assert json.loads((tmp_path / "my_class_map.json").read_text()) == {"blue": 0, "red": 1, "green": 2}
    assert "not sure" not in out, "a threshold of 13 videos promises nothing"

    # a run of its own, in a folder that is made
    run_script(SCRIPT, "--backbone", backbone, "--run", "again")
    assert checkpoints.load_checkpoint(tmp_path / "runs/again/checkpoint.pth")["classes"] == ["blue", "red", "green"]

    # later steps take it
    write_colour(tmp_path / "other.mp4", COLOURS["green"], 99)
    (name_one,) = re.findall("python (tools/predict.py VIDEO .*) names a video", out)
    shown = run_script(*name_one.replace("VIDEO", "other.mp4").split()).stdout
    assert "green" in shown.split("blue")[0].split("red")[0], shown


def test_what_cannot_be_taught(tmp_path, run_script, backbone):
    draw(tmp_path / "my_videos", ("blue", "red"), 2)
    Path(tmp_path, "checkpoint.pth").write_bytes(Path(tmp_path, backbone).read_bytes())
    error = run_script(SCRIPT, "--backbone", backbone, code=2).stderr
    assert "./checkpoint.pth was not written by this script: name another with --output" in error
    error = run_script(SCRIPT, "--backbone", "nothing.pth", "--output", "new.pth", code=2).stderr
    assert "there is no checkpoint nothing.pth" in error and len(error.splitlines()) == 1
    error = run_script(SCRIPT, "--backbone", backbone, "--output", "new.pth", "--model", "r3d_18", code=2).stderr
    assert "MODEL is r3d_18, but backbone.pth holds a network mc3_18: leave it out" in error
    (tmp_path / "my_videos/red/web.mp4").write_bytes(b"<html>" * 100)
    out = run_script(SCRIPT, "--backbone", backbone, "--output", "new.pth", code=1).stdout
    assert "failed: " in out and "web.mp4" in out and "new.pth is written" in out


def test_a_repaired_video_is_another_one(tmp_path, monkeypatch):
    """split.csv tells a file's content, so that thousands are not read at each run; not that of a repaired one."""
    monkeypatch.setattr(teach, "DEST", str(tmp_path))
    file = tmp_path / "train/red/monday__1.mp4"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"video")
    there = file.stat()
    now, before = f"ann,print,look,{there.st_size},{there.st_mtime_ns}", "bob,old,look,0,0"
    rows = [f"red/monday/1.mp4,train,{row}" for row in (now, before)]
    (tmp_path / "split.csv").write_text("\n".join(["video,side,group,fingerprint,appearance,size,mtime_ns", *rows]))
    (video,) = teach.videos_of_both_sides()
    assert (video.group, video.content) == ("ann", "print"), "the row of what it was before counts"
    file.write_bytes(b"repaired")
    (video,) = teach.videos_of_both_sides()
    assert (video.group, video.content) == ("ann", teach.common.sha256_of(file))


def test_what_is_seen_of_a_video(tmp_path):
    """The centre of each clip; of the first one the crops at the four edges, too, where there is room for them."""
    write_colour(tmp_path / "red.mp4", COLOURS["red"], 0)
    description = clip.of_network(clip_len=4, frame_rate=5)._replace(resize_size=(48, 64), crop_size=(28, 28))
    views = features.clips_of((tmp_path / "red.mp4", 3, True), description)
    whole = features.clips_of((tmp_path / "red.mp4", 3, False), description._replace(crop_size=(48, 64)))
    at = [(0, 10, 18), (0, 0, 18), (0, 20, 18), (0, 10, 0), (0, 10, 36), (1, 10, 18), (2, 10, 18)]
    expected = [whole[k, :, :, top : top + 28, left : left + 28] for k, top, left in at]
    np.testing.assert_allclose(views, expected, atol=1e-6)
    assert np.array_equal(views[0], clip.first_clip(tmp_path / "red.mp4", description).pixels)
    no_room = description._replace(crop_size=(48, 64))
    assert len(features.clips_of((tmp_path / "red.mp4", 3, True), no_room)) == 3, "the same crop several times"


def test_the_layer_is_the_best_one():
    """Its gradient is 0: cross entropy of all classes alike, and the penalty on whitened features."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 10 + [2] * 5)
    features = rng.normal(size=(45, 6)) * [1, 2, 3, 4, 5, 6] + labels[:, None]
    shares = fitting.balanced(labels, np.arange(45))
    assert np.allclose([shares[labels == k].sum() for k in range(3)], 1)
    for strength, layer in zip((0.1, 0.01), fitting.fit_layers(features, labels, shares, 3, (0.1, 0.01))):
        apart = features - np.stack([features[labels == k].mean(0) for k in range(3)])[labels]
        within = (apart * shares[:, None]).T @ apart / shares.sum()
        within = 0.99 * within + 0.01 * np.trace(within) / 6 * np.eye(6)
        powers = np.exp(layer.logits(features))
        error = (powers / powers.sum(1, keepdims=True) - np.eye(3)[labels]) * shares[:, None] / shares.sum()
        gradient = error.T @ features + strength * layer.weight @ within
        assert abs(gradient).max() < 1e-4 and abs(error.sum(0)).max() < 1e-5


def test_what_videos_of_a_class_differ_in_counts_less():
    """Both features say mostly who it is; their difference says what he does. Four videos a class tell."""

    def drawn(number, seed):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1], number)
        people, noise = rng.normal(size=(2 * number, 1)) * 5, rng.normal(size=(2 * number, 2)) * 0.1
        return labels, people + noise + labels[:, None] * [0.5, -0.5]

    labels, features = drawn(4, 0)
    (layer,) = fitting.fit_layers(features, labels, np.ones(8), 2, [0.1])
    labels, features = drawn(500, 1)
    assert (layer.logits(features).argmax(1) == labels).mean() > 0.95


def test_no_mistake_tells_no_temperature():
    """Nor a threshold: the least sure of twenty right answers would be the limit."""
    labels = np.arange(24) % 3
    assert calibration.fit_if_told(1000.0 * np.eye(3)[labels], labels) is None
    assert calibration.fit_if_told(np.eye(3)[np.where(np.arange(24), labels, 1)], labels) is not None


def test_no_group_is_on_both_sides():
    groups = ["a", "a", "b", "c", "c", "d", "e"]
    labels = np.array([0, 1, 0, 0, 1, 1, 2])
    folds = fitting.folds_of(groups, labels)
    assert folds[0] == folds[1] and folds[3] == folds[4] and folds[6] == -1, "the only video of its class is judged"
    assert len({folds[0], folds[2], folds[3]}) == 3, "a class of three groups is judged in three parts"
