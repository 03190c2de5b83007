"""Weights as others write them, and files that are no weights.

$ python -m pytest tests/test_checkpoints.py
"""

import argparse
import io
import pickle
import zipfile

from common import checkpoints

import pytest
import torch
import torchvision
from safetensors.torch import save, save_file
from torch.optim import SGD, lr_scheduler


class Network(torch.nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 1), torch.nn.BatchNorm3d(4))
        self.fc = torch.nn.Linear(4, classes)


WEIGHTS = Network().state_dict()


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


averaged = torch.optim.swa_utils.AveragedModel(Network())
averaged.module.load_state_dict(WEIGHTS)
COMPILED = {name.replace("stem.", "stem._orig_mod."): value for name, value in WEIGHTS.items()}
FORMS = {
    "as train.py writes it": ({"model": WEIGHTS, "epoch": 3}, ""),
    "bare": (WEIGHTS, ""),
    "state_dict": ({"state_dict": WEIGHTS, "epoch": 3}, "under state_dict"),
    "data parallel": ({"model": prefixed("module.")}, '"module." before each name is taken off'),
    "compiled": ({"model": prefixed("_orig_mod.")}, '"_orig_mod." is taken out'),
    "stacked": ({"model": prefixed("_orig_mod.module.")}, '"_orig_mod." is taken out; "module." before'),
    "stacked the other way": ({"model": prefixed("module._orig_mod.backbone.")}, '"module." before each name is taken'),
    "a part compiled": (COMPILED, '"_orig_mod." is taken out'),
    "lightning": (
        {"state_dict": prefixed("model.") | {"loss.weight": torch.ones(3)}, "hyper_parameters": {"lr": 0.1}},
        'under state_dict; "model." before each name is taken off; loss.weight left out',
    ),
    "backbone and head": (
        {("" if name.startswith("fc") else "backbone.") + name: value for name, value in WEIGHTS.items()},
        '"backbone." before each name',
    ),
    "averaged": ({"ema": averaged.state_dict()}, 'under ema; "module." before each name is taken off; n_averaged left'),
    "nested": ({"model_ema": {"module": WEIGHTS, "decay": 0.9}}, "under module in model_ema"),
    "half": ({"model": {k: v.half() if v.is_floating_point() else v for k, v in WEIGHTS.items()}}, "half precision"),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_and_what_was_stripped_is_said(tmp_path, form):
    content, said = FORMS[form]
    path, words = tmp_path / "weights.pth", []
    torch.save(content, path)
    loaded = checkpoints.load_checkpoint(path, say=words.append)
    network = Network()
    network.load_state_dict(loaded["model"])
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, WEIGHTS[name], rtol=1e-3 if form == "half" else 0, atol=0)
    assert all(value.dtype == WEIGHTS[name].dtype for name, value in loaded["model"].items())
    assert bool(words) == bool(said) and (not said or (said in words[0] and str(path) in words[0])), words
    assert loaded["args"] == {} and ("epoch" not in content or loaded["epoch"] == 3)


def test_safetensors_are_told_by_their_content(tmp_path):
    save_file(prefixed("model."), tmp_path / "weights.pth")
    words = []
    loaded = checkpoints.load_checkpoint(tmp_path / "weights.pth", say=words.append)["model"]
    assert loaded.keys() == WEIGHTS.keys() and all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    assert '"model." before each name' in words[0] and checkpoints.num_outputs(loaded) == 3


def test_bare_weights_tell_their_network(tmp_path):
    """Whatever their classes; what a checkpoint says of its network counts, though."""
    weights = torchvision.models.get_model("mc3_18", num_classes=7).state_dict()
    for content, said in (
        ({"state_dict": weights}, "the network is mc3_18 by its weights"),
        (weights, "the network is mc3_18 by its weights"),
        ({"model": weights, "args": {"model": "other"}}, ""),
    ):
        words = []
        torch.save(content, tmp_path / "bare.ckpt")
        loaded = checkpoints.load_checkpoint(tmp_path / "bare.ckpt", say=words.append)
        assert said in "".join(words) and loaded.get("model_name") == ("mc3_18" if said else None)


def test_the_winners_published_form(tmp_path):
    """torchvision's own keys, with a Namespace, the states of a stepped optimizer and of a schedule in two parts."""
    network = Network()
    optimizer = SGD(network.parameters(), 0.005, momentum=0.9, weight_decay=1e-4)
    parts = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1), lr_scheduler.MultiStepLR(optimizer, [20, 30, 40])
    schedule = lr_scheduler.SequentialLR(optimizer, list(parts), [1])
    network.fc(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    args = argparse.Namespace(model="r2plus1d_18", clip_len=16, frame_rate=4, val_crop_size=(112, 112), gpu=0)
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 29, "args": args}
    content |= {"lr_scheduler": schedule.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()}
    torch.save(content, tmp_path / "winner.pth")
    words = []
    loaded = checkpoints.load_checkpoint(tmp_path / "winner.pth", say=words.append)
    assert not words and loaded.keys() == content.keys() and loaded["args"] == vars(args) and loaded["epoch"] == 29
    Network().load_state_dict(loaded["model"])


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return file.getvalue()


MODERN, OLD = saved({"model": WEIGHTS}), saved({"model": WEIGHTS}, _use_new_zipfile_serialization=False)
DAMAGED = {
    "a web page": (b"\n<!DOCTYPE html><html>quota exceeded</html>", "it is a web page"),
    "empty": (b"", "it is empty"),
    "cut": (MODERN[: len(MODERN) // 2], "it is cut off"),
    "cut in the old form": (OLD[: len(OLD) // 2], ""),
    "cut at once": (OLD[:10], ""),
    "cut safetensors": (save(WEIGHTS)[:-20], ""),
    "cut head of safetensors": (save(WEIGHTS)[:30], ""),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "an answer in JSON": (b'{"message": "not found"}', ""),
    "zeros, as a full disk leaves": (bytes(5000), ""),
    "another archive": (zipped(), ""),
    "another pickle": (pickle.dumps({"a": 1}), ""),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_weights_is_one_sentence(tmp_path, capsys, kind):
    content, said = DAMAGED[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        checkpoints.load_checkpoint(path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert f"{path} is damaged, or no weights of torch" in error and said in error and "delete it" in error


def test_files_without_weights(tmp_path, capsys):
    broken = WEIGHTS | {"fc.bias": torch.full((3,), torch.nan)}
    for name, content, said in (
        ("broken", {"model": broken}, "has weights that are no numbers (fc.bias)"),
        ("epoch", {"epoch": 3, "args": {}}, "has no weights"),
        ("list", [1, 2], "has no weights"),
        ("scripted", None, "is TorchScript, which holds code"),
        ("network", Network(), "holds a "),
    ):
        path = tmp_path / f"{name}.pth"
        if content is None:
            torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
        else:
            torch.save(content, path)
        with pytest.raises(SystemExit):
            checkpoints.load_checkpoint(path)
        error = capsys.readouterr().err
        assert str(path) in error and said in error and len(error.splitlines()) == 1, error
    with pytest.raises(SystemExit):
        checkpoints.load_checkpoint(tmp_path)
    assert "cannot be read (Is a directory)" in capsys.readouterr().err
