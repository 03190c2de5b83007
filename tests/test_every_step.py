"""Any network from the checkpoint to the chip: what its clips are is said once, and every step makes just those.

$ python -m pytest tests/test_every_step.py
"""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import live
import warm_python
from conftest import REPO
from faulty_hub import FaultyHub
from make_videos import write_video
from qualcomm import sources
from see import classifier
from small_models import read_h5
from test_deployed_network import logits_of
from test_export import CLASSES, write_checkpoint
from test_preprocess import decoded, literal_tensor
from torchvision_patches import clip

pytestmark = pytest.mark.slow

TRAIN = "references/video_classification/train.py"
TURNS = hasattr(av.video.stream.VideoStream, "set_display_rotation")
SMALL = {"resize_size": [36, 48], "crop_size": [32, 32]}
# network: what of its clips is not as officially, and a flag that contradicts it, with the sentence of train.py
FORMS = {
    "r2plus1d_18": (
        SMALL | {"clip_len": 24, "frame_rate": 8.0},
        {
            "--frame-rate": ("4", "--frame-rate 4, but c.pth has 8; leave out the flag"),
            "--clip-len": ("16", "--clip-len 16, but c.pth has 24; leave out the flag"),
        },
    ),
    "r3d_18": (SMALL | {"clip_len": 4, "rotate": True}, {"--no-rotate": ("", "--rotate False, but c.pth has True")}),
    "mc3_18": (
        {"clip_len": 4, "resize_size": [110, 147], "crop_size": [96, 96]},
        {"--val-crop-size": ("112 112", "--val-crop-size 112 x 112, but c.pth has 96 x 96")},
    ),
    "videomae_small": (
        {"clip_len": 2},
        {"--val-resize-size": ("128 171", "--val-resize-size 128 x 171, but c.pth has 224; leave out the flag")},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder val/ with three videos of two classes: wide, tall, and one that players turn."""
    val = tmp_path_factory.mktemp("videos") / "val"
    for label in CLASSES[:2]:
        (val / label).mkdir(parents=True)
    write_video(val / CLASSES[0] / "wide.mp4", 100, fps=30, height=48, width=80)
    write_video(val / CLASSES[1] / "tall.mp4", 80, fps=25, height=64, width=40, seed=1)
    write_video(val / CLASSES[1] / "turned.mp4", 60, fps=30, height=40, width=64, seed=2, rotation=90 * TURNS)
    return val


def own_clip(path, about):
    """The clip float32 (1, 3, T, H, W) that a ClipDescription asks for, decoded, picked and resized here."""
    frames = decoded(path)
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
    if about.rotate and path.stem == "turned":
        frames = np.rot90(frames, axes=(1, 2))  # counter-clockwise
    sizes = list(about.resize_size), list(about.crop_size)
    return literal_tensor(None, about.clip_len, about.frame_rate, frames, fps, *sizes)


def stems(paths):
    return [Path(path).stem for path in paths]


@pytest.mark.parametrize("name", FORMS)
def test_every_step_feeds_a_network_its_own_clips(name, videos, run_script, tmp_path):
    """Tensors, the local hub, prediction, live page and validation, by a network's description of a clip alone."""
    changes, contradictions = FORMS[name]
    if "rotate" in changes and not TURNS:
        pytest.skip("this PyAV cannot write videos that players turn: pip install 'av>=18'")
    path = write_checkpoint(tmp_path / "c.pth", name, **changes)
    about, _ = clip.described(torch.load(path, weights_only=True))
    files = sorted(videos.glob("*/*.mp4"))
    clips = {file.stem: own_clip(file, about) for file in files}
    expected = {stem: logits_of(name, path, torch.from_numpy(pixels))[0].numpy() for stem, pixels in clips.items()}
    labels = {file.stem: CLASSES.index(file.parent.name) for file in files}
    right = sum(row.argmax() == labels[stem] for stem, row in expected.items())

    def check(rows, what):
        assert rows.keys() == expected.keys()
        for stem, row in rows.items():
            np.testing.assert_allclose(row, expected[stem], atol=1e-4, rtol=1e-4, err_msg=f"{what}, {stem}")

    run_script("tools/preprocess_and_save.py", "--checkpoint", "c.pth", "--data-root", videos, "--num-workers", 1)
    for stem, pixels in clips.items():
        (tensor,) = tmp_path.glob(f"preprocessed_tensors/*/{stem}.npy")
        np.testing.assert_allclose(np.load(tensor), pixels, atol=1e-4, err_msg=stem)
    with FaultyHub() as hub:
        hub.write_client_ini(tmp_path / "client.ini")
        environment = {"QAIHUB_CLIENT_INI": tmp_path / "client.ini"}
        run_script("tools/example_export.py", "--checkpoint", "c.pth", **environment)
        run_script("tools/run_inference.py", **environment)
    logits, written = read_h5(tmp_path / "dataset-export.h5")
    check(dict(zip(stems(written), logits)), "run_inference.py")
    options = ("--checkpoint", "c.pth", "--jsonl", "rows.jsonl", "--pictures", "false", "--num-workers", 1)
    run_script("tools/predict.py", videos, *options)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    check({Path(row["video"]).stem: row["logits"] for row in rows}, "predict.py")
    binary = tmp_path / "export_assets/resnet_2plus1d.bin"
    assert sources.from_local_hub(binary).network == name, "where its checkpoint is gone, its description says it"
    for model in path, binary:
        network = classifier.load(model)
        check({f.stem: live.answer_to_file(network, f.read_bytes())["logits"] for f in files}, f"live.py of {model}")
    figures = json.loads(run_script("tools/evaluate.py").stdout.splitlines()[-1])
    assert figures["n"] == 3 and figures["top1"] == pytest.approx(100 * right / 3, abs=1e-3)
    (tmp_path / "map.json").write_text(json.dumps({name: i for i, name in enumerate(CLASSES)}))
    validate = (TRAIN, "--data-path", videos.parent, "--class-map", "map.json", "--resume", "c.pth", "--test-only")
    validate += ("--device", "cpu", "--workers", 0)
    figures = json.loads(run_script(*validate).stdout.splitlines()[-1])
    log_probabilities = [torch.from_numpy(row).log_softmax(0)[labels[stem]] for stem, row in expected.items()]
    assert figures["val_loss"] == pytest.approx(-float(sum(log_probabilities)) / 3, abs=2e-4)
    assert figures["video_acc1"] == pytest.approx(100 * right / 3)
    for flag, (value, sentence) in contradictions.items():
        assert sentence in run_script(*validate, flag, *value.split(), code=2).stderr


EIGHTH = """
from functools import partial

import torch
from torch import nn
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.transforms._presets import VideoClassification


class Eighth_Weights(WeightsEnum):
    colours = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    DEFAULT = Weights("", partial(VideoClassification, crop_size=(24, 24), resize_size=(28,), **colours), {})


class Eighth(nn.Module):
    def __init__(self, num_classes=400):
        super().__init__()
        self.stem, self.classify = nn.Conv3d(3, 8, 3, 2), nn.Linear(8, num_classes)

    def forward(self, clips):
        return self.classify(self.stem(clips).relu().mean((2, 3, 4)))


@register_model()
def eighth(*, weights=None, progress=True, **kwargs):
    return Eighth(**kwargs)


eighth.__annotations__["weights"] = Eighth_Weights | None
"""


def test_an_eighth_network_is_one_file(videos, tmp_path):
    """Registered as torchvision_patches/videomae.py does it, a network that nothing here names goes the whole way."""
    (tmp_path / "eighth.py").write_text(EIGHTH)
    (tmp_path / "train").symlink_to(videos)
    (tmp_path / "val").symlink_to(videos)
    (tmp_path / "map.json").write_text(json.dumps({name: i for i, name in enumerate(CLASSES)}))

    def run(script, *arguments, **environment):
        first = f"import sys; sys.path.append({str(tmp_path)!r}); import eighth"
        (result,) = warm_python.run(REPO / script, arguments, [os.environ | environment], tmp_path, first)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(TRAIN, "--data-path", ".", "--class-map", "map.json", "--model", "eighth", "--clip-len", 4, "--epochs", 1,
        "--device", "cpu", "--workers", 0, "--lr-warmup-epochs", 0, "--batch-size", 1)  # fmt: skip
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (saved["model_name"], saved["crop_size"], saved["mean"]) == ("eighth", [24, 24], [0.5, 0.4, 0.3])
    run("tools/preprocess_and_save.py", "--checkpoint", "checkpoint.pth", "--data-root", "val", "--num-workers", 1)
    with FaultyHub() as hub:
        environment = {"QAIHUB_CLIENT_INI": str(hub.write_client_ini(tmp_path / "client.ini"))}
        printed = run("tools/example_export.py", **environment)
        run("tools/run_inference.py", **environment)
    assert "qevd_eighth-qnn_context_binary-float" in printed
    logits, written = read_h5(tmp_path / "dataset-export.h5")
    run("tools/predict.py", "val", "--jsonl", "rows.jsonl", "--pictures", "false", "--num-workers", 1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    predicted = {Path(row["video"]).stem: row["logits"] for row in rows}
    mean, std = (np.array(saved[key], np.float32).reshape(3, 1, 1, 1) for key in ("mean", "std"))
    weights = {name: value.double() for name, value in saved["model"].items()}
    about, _ = clip.described(saved)
    for file in sorted(videos.glob("*/*.mp4")):
        x = torch.from_numpy((own_clip(file, about) - mean) / std).double()
        x = torch.nn.functional.conv3d(x, weights["stem.weight"], weights["stem.bias"], 2).relu().mean((2, 3, 4))
        expected = (x @ weights["classify.weight"].T + weights["classify.bias"])[0].numpy()
        np.testing.assert_allclose(predicted[file.stem], expected, atol=1e-4)
        np.testing.assert_allclose(logits[stems(written).index(file.stem)], expected, atol=1e-4)
