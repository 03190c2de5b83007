"""What training starts from: checkpoints of other classes, files of others, damaged ones, Hugging Face's Hub.

$ python -m pytest tests/test_weights.py
"""

import http.server
import json
import sys
import threading

from common.weights import start_from

import pytest
import torch
import torchvision
from safetensors.torch import save, save_file

import test_videomae
from test_train import CLASSES, load, train
from test_training_run import FLAGS, reference, small_args, videos  # noqa: F401
from torchvision_patches import videomae


@pytest.fixture(scope="module")
def starting(reference):  # noqa: F811
    return sys.modules["starting"]


def mc3_18(classes):
    torch.manual_seed(3)
    return torchvision.models.get_model("mc3_18", num_classes=classes).state_dict()


def test_all_but_a_head_of_other_classes_is_taken(videos, tmp_path):  # noqa: F811
    """A checkpoint of three others, by --resume and by --weights; its clips' description comes along."""
    (tmp_path / "map.json").write_text(json.dumps({name: i for i, name in enumerate(CLASSES)}))
    other = {"model": mc3_18(3), "classes": ["a", "b", "c"], "model_name": "mc3_18", "clip_len": 4, "frame_rate": 8}
    torch.save(other, tmp_path / "other.pth")
    flags = ["--data-path", videos, "--class-map", tmp_path / "map.json", *FLAGS, "--batch-size", 4, "--lr", 0]
    flags += ["--bn-clips", 0, "--lr-warmup-epochs", 0, "--output-dir", tmp_path, "--overwrite"]
    flags = [flag for i, flag in enumerate(flags) if "--model" not in flags[max(0, i - 1) : i + 1]]
    for start in (
        ["--resume", tmp_path / "other.pth", "--resume-weights-only"],
        ["--weights", tmp_path / "other.pth"],
    ):
        out, _ = train(*flags, *start)
        assert "other.pth knows other classes, or another order: all but its head is taken" in out
        assert "other.pth loaded; new: fc.weight, fc.bias\n" in out
        checkpoint = load(tmp_path / "checkpoint.pth")
        assert (checkpoint["frame_rate"], checkpoint["model_name"]) == (8, "mc3_18")
        assert torch.equal(checkpoint["model"]["layer4.0.conv1.0.weight"], other["model"]["layer4.0.conv1.0.weight"])
        assert not torch.equal(checkpoint["model"]["fc.weight"], other["model"]["fc.weight"])
    _, err = train(*flags, "--resume", tmp_path / "other.pth", "--test-only", code=2)
    assert "trained with other classes (3), or another order, than the 3 of" in err and "--class-map" in err
    _, err = train(*flags, *start, "--resume", tmp_path / "other.pth", "--resume-weights-only", code=2)
    assert "name one of them" in err


def test_a_head_of_another_size_is_refused_or_replaced(reference, starting, tmp_path, capsys):  # noqa: F811
    args = small_args(reference)
    save_file(mc3_18(400), tmp_path / "bare.safetensors")
    args.weights = str(tmp_path / "bare.safetensors")
    model = reference.models.make_model(args, starting.starting_point(args))
    assert torch.equal(model.stem[0].weight, mc3_18(400)["stem.0.weight"])
    text = "bare.safetensors loaded; new: fc.weight, fc.bias (its head has 400 classes, the class map 5)"
    assert text in capsys.readouterr().out
    args.resume, args.test_only = args.weights, True
    with pytest.raises(SystemExit):
        reference.models.make_model(args, starting.starting_point(args))
    assert "bare.safetensors has 400 classes, the class map 5" in capsys.readouterr().err
    # a detector's trunk, and another network
    r3d = torchvision.models.get_model("r3d_18", num_classes=5).state_dict()
    for state, said in (
        (r3d, "its layer2.0.conv1.0.weight is (128, 64, 3, 3, 3)"),
        ({"a.b": torch.ones(1)}, "only 0 of the"),
    ):
        with pytest.raises(SystemExit):
            start_from(model, state, "x.pth")
        assert f"x.pth has the weights of another network ({said}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"<html>", b"", "cut"])
def test_damaged_weights_in_the_cache(videos, tmp_path, content):  # noqa: F811
    path = tmp_path / "hub/checkpoints/mc3_18-a90a0ba3.pth"
    path.parent.mkdir(parents=True)
    if content == "cut":
        torch.save(mc3_18(400), path)
        content = path.read_bytes()[:5_000_000]
    path.write_bytes(content)
    flags = ["--data-path", videos, *FLAGS, "--output-dir", tmp_path, "--weights", "KINETICS400_V1"]
    _, err = train(*flags, code=2, TORCH_HOME=str(tmp_path))
    assert f"{path} is damaged" in err and "delete it and get it again" in err and "Traceback" not in err


class OneFile(http.server.BaseHTTPRequestHandler):
    """Hugging Face's Hub, as far as huggingface_hub asks for one file: someone/some-videomae's model.safetensors."""

    content = b""

    def do_GET(self):
        there = self.path == "/someone/some-videomae/resolve/main/model.safetensors"
        self.send_response(200 if there else 404)
        if there:
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if "some-videomae" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(self.content) if there else 0))
        self.end_headers()
        if there and self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of one file on this machine, which huggingface_hub asks; its cache is the test's own."""
    from huggingface_hub import constants, file_download

    OneFile.content = save(test_videomae.hugging_face_state())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for module in constants, file_download:
            for name, value in (
                ("ENDPOINT", address),
                ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
                ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ):
                monkeypatch.setattr(module, name, value, raising=False)
        yield address
        server.shutdown()


def test_a_name_on_the_hub_is_fetched_once(reference, starting, hub, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    args = small_args(reference)
    args.weights = "someone/some-videomae"
    checkpoint = starting.starting_point(args)
    assert "a VideoMAE of Hugging Face's form" in capsys.readouterr().out
    ours = videomae.from_hugging_face(test_videomae.hugging_face_state())[0]
    assert checkpoint["model"].keys() == ours.keys()
    OneFile.content = b""
    assert starting.starting_point(args)["model"].keys() == ours.keys(), "it is not taken from the cache"
    args.weights = "someone/other-videomae"
    with pytest.raises(SystemExit):
        starting.starting_point(args)
    error = capsys.readouterr().err
    assert f"someone/other-videomae is no file here and could not be had from {hub}" in error
    assert "put it at someone/other-videomae/model.safetensors" in error and len(error.splitlines()) == 1
    # where the sentence says that it belongs, it is found
    folder = tmp_path / args.weights
    folder.mkdir(parents=True)
    with pytest.raises(SystemExit):
        starting.starting_point(args)
    assert "holds no model.safetensors or pytorch_model.bin" in capsys.readouterr().err
    torch.save(test_videomae.hugging_face_state(pretraining=True), folder / "pytorch_model.bin")
    assert "head.weight" not in starting.starting_point(args)["model"]
    assert "videomae.layernorm.weight, mask_token, decoder.head.bias not used" in capsys.readouterr().out
