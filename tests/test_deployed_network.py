"""The deployed network: every network of the registry, several that vote, the mirrored look, tensors of other clips."""

import json

from common import calibration

import numpy as np
import pytest
import torch
from torchvision.models import get_model

from aihub import description, onnx_graphs, tensors
from faulty_hub import FaultyHub
from qevd_r2plus1d import Model
from see import classifier
from small_models import read_h5, write_clips
from test_export import CLASSES, write_checkpoint
from torchvision_patches import clip, mirror

SIDES = ["jab_left", "squats", "jab_right", "hook_left", "lunges"]


def logits_of(name, path, video):
    """torchvision's own logits of a checkpoint for clips in [0, 1], normalised as its description says."""
    saved = torch.load(path, weights_only=True)
    network = get_model(name, num_classes=len(saved["classes"])).eval()
    network.load_state_dict(saved["model"])
    mean, std = (torch.tensor(saved[key]).view(1, 3, 1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return network((video - mean) / std)


@pytest.fixture(scope="module")
def voters(tmp_path_factory):
    """Three checkpoints of one clip: two networks, of which one in two seeds."""
    folder, paths = tmp_path_factory.mktemp("voters"), {}
    for name, network in (("a", "mc3_18"), ("b", "r3d_18")):
        paths[network] = write_checkpoint(folder / f"{name}.pth", network, crop_size=[32, 32], resize_size=[36, 48])
    return paths


@pytest.fixture
def video():
    return torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def refused(capsys, **arguments):
    with pytest.raises(SystemExit) as stop:
        Model.from_pretrained(**arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_vote_is_the_mean_of_the_logits(voters, video):
    """Different networks of one clip; weights count."""
    singles = [logits_of(name, path, video) for name, path in voters.items()]
    model = Model.from_pretrained(list(voters.values()), data_dir="")
    with torch.no_grad():
        torch.testing.assert_close(model(video), sum(singles) / 2, atol=1e-5, rtol=0)
        weighted = Model.from_pretrained(list(voters.values()), weights=["3", "1"], data_dir="")
        torch.testing.assert_close(weighted(video), (3 * singles[0] + singles[1]) / 4, atol=1e-5, rtol=0)
    assert model.bundle_id == "qevd_mc3_18_r3d_18_of_2" and len(model.about()["checkpoint_sha256"]) == 2


def test_who_cannot_vote_together(voters, tmp_path, capsys):
    first = voters["mc3_18"]
    content = torch.load(first, weights_only=True)
    torch.save(content | {"epoch": 1}, tmp_path / "again.pth")
    assert "once more" in refused(capsys, checkpoint=[first, tmp_path / "again.pth"])
    for change, words in (
        ({"clip_len": 8}, "clip_len 4, not 8"), ({"frame_rate": 8.0}, "frame_rate 4, not 8"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean"), ({"classes": ["jab", "squats", "lunges", "x", "y"]}, "class 3 is"),
    ):  # fmt: skip
        torch.save(content | change, tmp_path / "other.pth")
        assert words in refused(capsys, checkpoint=[first, tmp_path / "other.pth"])
    write_checkpoint(tmp_path / "fewer.pth", "mc3_18", crop_size=[32, 32], resize_size=[36, 48])
    fewer = torch.load(tmp_path / "fewer.pth", weights_only=True)
    fewer["classes"] = fewer["classes"][:4]
    fewer["model"] |= {key: fewer["model"][key][:4] for key in ("fc.weight", "fc.bias")}
    torch.save(fewer, tmp_path / "fewer.pth")
    assert "has 5 classes" in refused(capsys, checkpoint=[first, tmp_path / "fewer.pth"])
    both = list(voters.values())
    assert "2 checkpoints" in refused(capsys, checkpoint=both, weights=["1"])
    assert "numbers" in refused(capsys, checkpoint=both, weights=["1", "x"])
    for weight in ("0", "-1", "nan", "inf"):
        assert "one above 0 for each is needed" in refused(capsys, checkpoint=both, weights=["1", weight])
    (tmp_path / "linked.pth").symlink_to(first)
    assert "once more" in refused(capsys, checkpoint=[first, tmp_path / "linked.pth"])
    torch.save(content | {"classes": None}, tmp_path / "silent.pth")
    assert "silent.pth does not name its classes" in refused(capsys, checkpoint=[first, tmp_path / "silent.pth"])


def test_the_mirrored_look(voters, video, tmp_path):
    """Both sides are swapped; a side whose other is no class is left to the clip as it is; others are averaged."""
    path = tmp_path / "sides.pth"
    torch.save(torch.load(voters["mc3_18"], weights_only=True) | {"classes": SIDES}, path)
    plain, image = logits_of("mc3_18", path, video), logits_of("mc3_18", path, video.flip(-1))
    expected = (plain + image[:, [2, 1, 0, 3, 4]]) / 2
    expected[:, 3] = plain[:, 3]
    with torch.no_grad():
        mirrored = Model.from_pretrained(path, mirrored=True, data_dir="")(video)
    torch.testing.assert_close(mirrored, expected, atol=1e-5, rtol=0)


def test_what_a_mirror_makes_of_names():
    assert mirror.seen_in_mirror(SIDES) == [2, 1, 0, None, 4]
    assert mirror.seen_in_mirror(["Left_jab", "right_jab", "upright", "cross_+_hook_right"]) == [1, 0, 2, None]
    assert mirror.seen_in_mirror(["Squats", "squats"]) == [0, 1], "they differ in case only, and name no side"


@pytest.mark.parametrize("name", ["s3d", "swin3d_t", "r2plus1d_18", "r3d_18"])
def test_networks_of_the_registry(name, tmp_path):
    """With their own sizes, mean and std, whatever their last layer is called."""
    path = write_checkpoint(tmp_path / "checkpoint.pth", name, frames=16 if name == "s3d" else 2)
    model = Model.from_pretrained(path, data_dir="")
    shape = model.get_input_spec()["video"].shape
    assert shape[3:] == tuple(clip.of_network(name).crop_size) and model.num_classes == len(CLASSES)
    if name != "s3d":  # whose pool takes 7 x 7 at least
        shape = (*shape[:3], 64, 64)
    video = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(video), logits_of(name, path, video), atol=1e-4, rtol=0)


class WritesParts(torch.nn.Module):
    """What MViT and Swin do: adds to a part in place, marks parts of a mask, splits at a place."""

    def forward(self, x):
        y, mask = x * 2, x.new_zeros(6, 6)
        y[:, 1:].add_(x[:, 1:])
        y[:, 1:].view(1, 5, 2, 3).add_(x[:, 1:].view(1, 5, 2, 3))
        mask[:4, 2:] = 3
        mask[-2:] = 1
        first, rest = torch.tensor_split(y, (1,), 1)
        return torch.cat([rest, first], 1) @ mask


def test_what_a_program_writes_in_place_is_not_lost():
    """By the tracing exporter, on the way to the local hub and to the compiler on this machine."""
    x = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = WritesParts()(x).numpy()
        program = torch.export.export(WritesParts(), (x,))
    of_program = onnx_graphs.program_to_onnx(program, (torch.zeros(1, 6, 6),), input_names=["video"])
    for proto in of_program, onnx_graphs.torch_to_onnx(WritesParts(), (1, 6, 6)):
        (found,) = onnx_graphs.cpu_session(proto.SerializeToString()).run(None, {"video": x.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [
    ("frame_rate", 0.0), ("frame_rate", float("nan")), ("frame_rate", "fast"), ("clip_len", 0), ("clip_len", [8]),
    ("resize_size", "128"), ("resize_size", [24, 48]), ("crop_size", [32]), ("crop_size", [999, 32]),
    ("std", [0.5, 0.5, 0.0]), ("mean", [0.5]),
])  # fmt: skip
def test_a_clip_that_there_is_not(voters, tmp_path, capsys, field, value):
    """A checkpoint of others may say anything; a frame rate of 0 gave a class."""
    saved = torch.load(voters["mc3_18"], weights_only=True)
    torch.save(saved | {field: value}, tmp_path / "odd.pth")
    said = refused(capsys, checkpoint=[tmp_path / "odd.pth"])
    assert "odd.pth holds no network that can be used here" in said and said.count("\n") == 1, said


def test_tensors_of_other_clips(tmp_path, capsys):
    """Both values are named; a folder without settings is taken."""
    mine = clip.of_network("r2plus1d_18")
    tensors.check_tensors(tmp_path, "model.bin", mine)
    (tmp_path / "settings.json").write_text(json.dumps(mine.as_dict()))
    tensors.check_tensors(tmp_path, "model.bin", mine)
    for change, words in (({"frame_rate": 4.0}, "frame_rate 8, not 4"), ({"rotate": True}, "rotate False, not True")):
        other = mine._replace(frame_rate=8.0) if "frame_rate" in change else mine
        (tmp_path / "settings.json").write_text(json.dumps(other.as_dict() | change))
        with pytest.raises(SystemExit):
            tensors.check_tensors(tmp_path, "model.bin", other)
        assert words in capsys.readouterr().err


def test_temperature_and_threshold_travel(voters, tmp_path):
    """Into what stands beside a model, and to who shows its labels; of several that vote, where all agree."""
    sure, first, second = {"temperature": 1.5, "threshold": 0.6}, *voters.values()
    calibrated = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path, source in zip(calibrated, (first, second)):
        torch.save(torch.load(source, weights_only=True) | sure, path)
    about = [
        Model.from_pretrained(paths, data_dir="").about()
        for paths in (calibrated[0], first, calibrated, [calibrated[0], second])
    ]
    assert sure.items() <= about[0].items() and sure.items() <= about[2].items()
    assert not sure.keys() & about[1].keys() and not sure.keys() & about[3].keys()
    (tmp_path / "model.dlc").write_bytes(b"x")
    (tmp_path / "clip.json").write_text(json.dumps(about[0]))  # in a bundle
    assert sure.items() <= description.read_description(tmp_path / "model.dlc").items()
    network = classifier.load(calibrated[0])
    assert (network.temperature, network.threshold) == (1.5, 0.6)
    probabilities, logits = network.probabilities(np.zeros((1, 3, 4, 32, 32), np.float32))
    np.testing.assert_allclose(probabilities, calibration.softmax(logits / 1.5), atol=1e-6)
    assert classifier.load(first)[-2:] == (1.0, None)


def test_a_checkpoint_newer_than_its_export(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "checkpoint.pth")
    about = Model.from_pretrained(path, data_dir="").about()
    description.check_age(about, "resnet_2plus1d.bin")
    assert not capsys.readouterr().out
    write_checkpoint(path, epoch=2)
    description.check_age(about, "resnet_2plus1d.bin")
    assert f"{path} is not the one that the export resnet_2plus1d.bin was made of" in capsys.readouterr().out


def test_several_and_their_mirror_image_deployed(voters, tmp_path, run_script):
    """In one binary, float and w8a8: the device's logits agree with the vote; tensors at 8 fps are refused."""
    paths = write_clips(tmp_path / "clips", 8, frames=4, size=32, labels=CLASSES)
    settings = clip.described(torch.load(voters["mc3_18"], weights_only=True))[0].as_dict()
    (tmp_path / "clips/settings.json").write_text(json.dumps({key: settings[key] for key in clip.OF_PIXELS}))
    with FaultyHub() as hub:
        hub.write_client_ini(tmp_path / "client.ini")
        environment = {"QAIHUB_CLIENT_INI": tmp_path / "client.ini"}
        export = ("tools/example_export.py", "--checkpoint", *voters.values(), "--mirror", "--data-dir", "clips")
        quantised = ("--precision", "w8a8", "--calibration-dir", "clips", "--output-dir")
        model = Model.from_pretrained(list(voters.values()), mirrored=True, data_dir="")
        clips = [torch.from_numpy(np.load(tmp_path / "clips" / path)) for path in paths]
        with torch.no_grad():
            expected = np.concatenate([model(clip).numpy() for clip in clips])
        for folder, flags, tolerance in (("float", ("--output-dir",), 1e-4), ("w8a8", quantised, 0.15)):
            printed = run_script(*export, *flags, folder, **environment).stdout
            (bundle,) = (tmp_path / folder).glob("qevd_*_of_2-*/")
            assert "2 networks vote" in printed
            assert bundle.stat().st_mode & 0o055, "others cannot read it"
            binary = f"{folder}/resnet_2plus1d.bin"
            infer = ("tools/run_inference.py", "--dlc-path", binary, "--data-path", "clips", "--output-h5")
            run_script(*infer, f"{folder}.h5", **environment)
            logits, written = read_h5(tmp_path / f"{folder}.h5")
            assert written == paths
            np.testing.assert_allclose(logits, expected, atol=tolerance * max(1, np.abs(expected).max()))
        described = json.loads((tmp_path / "float/resnet_2plus1d.json").read_text())
        assert described["clip"] == settings and described["mirrored"] and described["weights"] == [0.5, 0.5]
        (tmp_path / "clips/settings.json").write_text(json.dumps(settings | {"frame_rate": 8.0}))
        assert "frame_rate 4, not 8" in run_script(*infer, "other.h5", code=2, **environment).stderr
        assert "frame_rate 4, not 8" in run_script(*export, code=2, **environment).stderr
