"""The recipe and example_export.py: what a checkpoint may be, the pipeline against a local hub, and its result."""

import argparse
import collections
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PosixPath

import common
from common import flags

import h5py
import numpy as np
import pytest
import qai_hub
import torch
from torchvision.models import get_model

import example_export
from aihub import model_io, service
from aihub.tensors import class_balanced
from conftest import REPO
from faulty_hub import Fault, FaultyHub, devices_of_ai_hub
from hub_server import routes
from qevd_r2plus1d import Model
from qevd_r2plus1d.model import read_trained
from small_models import DEVICE, SmallNetwork, client_of, compile_binary, hasty_client, read_h5, small_onnx, write_clips
from torchvision_patches import clip as clip_description

pytestmark = pytest.mark.slow

SCRIPT = "tools/example_export.py"
CLASSES = ["jab", "squats", "lunges", "cross_+_hook_right", "cross-legged_hamstring_stretch"]


def write_checkpoint(path, model_name="mc3_18", frames=4, **changes):
    """A checkpoint as train.py writes it, untrained; mc3_18 is the smallest network that the recipe takes."""
    torch.manual_seed(0)
    network = get_model(model_name, weights=None, num_classes=len(CLASSES))
    content = {"model": network.state_dict(), "optimizer": {}, "lr_scheduler": {}, "epoch": 1, "args": {},
               "classes": CLASSES, **clip_description.of_network(model_name, frames).as_dict()}  # fmt: skip
    torch.save(content | changes, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth")


def refused(capsys, **arguments):
    """The sentence with which the recipe refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        Model.from_pretrained(**arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_frames_classes_and_names_come_from_the_checkpoint(checkpoint):
    model = Model.from_pretrained(str(checkpoint))
    assert (model.classes, model.get_input_spec()["video"].shape) == (CLASSES, (1, 3, 4, 112, 112))
    assert not model.get_output_spec()["class_probs"].softmax_applied


@pytest.mark.quick
def test_the_network_normalises_and_gives_logits(checkpoint):
    """The same as torchvision's network on a clip normalised with the published numbers, without softmax."""
    weights = torch.load(checkpoint, weights_only=True)["model"]
    network = get_model("mc3_18", weights=None, num_classes=len(CLASSES)).eval()
    network.load_state_dict(weights)
    clip = torch.rand(1, 3, 4, 112, 112, generator=torch.Generator().manual_seed(1))
    mean, std = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    normalised = (clip - torch.tensor(mean).view(1, 3, 1, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1, 1)
    with torch.no_grad():
        expected = network(normalised)
    torch.testing.assert_close(Model.from_pretrained(str(checkpoint))(clip), expected, atol=1e-5, rtol=0)


def test_contradictions_and_missing_checkpoints_are_refused(checkpoint, tmp_path, capsys):
    given = {"checkpoint": str(checkpoint)}
    assert "trained with 5 classes" in refused(capsys, **given, num_classes=92)
    assert "trained with 4 frames" in refused(capsys, **given, num_frames=16)
    assert "--random-weights" in refused(capsys, checkpoint=str(tmp_path / "none.pth"))
    write_checkpoint(tmp_path / "names.pth", classes=CLASSES[:3])
    assert "names 3 classes but its last layer has 5" in refused(capsys, checkpoint=str(tmp_path / "names.pth"))
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"model_name": "r3d_18"}, tmp_path / "other.pth")
    assert "do not fit r3d_18" in refused(capsys, checkpoint=str(tmp_path / "other.pth"))
    torch.save(content | {"model_name": "swin3d_t"}, tmp_path / "other.pth")
    assert "no weights of swin3d_t's last layer" in refused(capsys, checkpoint=str(tmp_path / "other.pth"))
    torch.save(content | {"model_name": "resnet3d_1000"}, tmp_path / "other.pth")
    assert "resnet3d_1000" in refused(capsys, checkpoint=str(tmp_path / "other.pth"))
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    assert "page.pth" in refused(capsys, checkpoint=str(tmp_path / "page.pth"))


def test_random_weights_are_asked_for(tmp_path):
    """Then no checkpoint is needed; 16 frames and the 92 official classes unless told otherwise."""
    model = Model.from_pretrained(str(tmp_path / "none.pth"), random_weights=True)
    assert (model.num_frames, len(model.classes), model.num_classes) == (16, 92, 92)
    other = Model.from_pretrained(str(tmp_path / "none.pth"), num_classes=7, num_frames=8, random_weights=True)
    assert (other.num_frames, other.classes, other.num_classes) == (8, None, 7)


def test_a_checkpoint_of_the_original_solution_loads(tmp_path, capsys):
    """Its args is an argparse.Namespace, and it names neither classes nor network."""
    weights = get_model("r2plus1d_18", weights=None, num_classes=2).state_dict()
    content = {"model": weights, "epoch": 3, "args": argparse.Namespace(model="r2plus1d_18", clip_len=16)}
    torch.save(content, tmp_path / "original.pth")
    loaded = read_trained(tmp_path / "original.pth")
    assert (loaded.description.model_name, loaded.description.clip_len, loaded.classes) == ("r2plus1d_18", 16, None)
    assert "assumed: frame_rate 4, rotate False, resize_size 128 x 171" in capsys.readouterr().out


def test_the_originals_clip_len_yields_to_num_frames(checkpoint, tmp_path, capsys):
    """Its --clip-len is 8 unless given, though the organisers export with 16 frames."""
    content = torch.load(checkpoint, weights_only=True)
    content = {key: content[key] for key in ("model", "epoch", "model_name", "frame_rate")}
    torch.save(content | {"args": argparse.Namespace(clip_len=8)}, tmp_path / "original.pth")
    assert Model.from_pretrained(str(tmp_path / "original.pth")).num_frames == 8
    assert Model.from_pretrained(str(tmp_path / "original.pth"), num_frames=16).num_frames == 16
    *_, line, assumed = capsys.readouterr().out.splitlines()
    assert "assumed" in assumed and "--clip-len 8, exported with num_frames = 16" in line


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"model": {}, "extra": Attack(tmp_path / "owned")}, tmp_path / "evil.pth")
    assert "is not loaded" in refused(capsys, checkpoint=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "owned").exists()


def test_a_wrong_exported_program_is_not_uploaded(checkpoint, tmp_path, capsys, monkeypatch):
    """The saved program is run before upload; a logit that differs stops the export."""
    model = Model.from_pretrained(str(checkpoint), data_dir="")
    load = torch.export.load

    def load_changed(path):
        program = load(path)
        return argparse.Namespace(module=lambda: lambda clip: program.module()(clip) + 0.001)

    monkeypatch.setattr(torch.export, "load", load_changed)
    with pytest.raises(SystemExit):
        model.serialize(tmp_path)
    assert "differ from torch's by 0.001" in capsys.readouterr().err


def test_calibration_clips_are_class_balanced(tmp_path):
    """Unequal classes: as many of each as can be had, the same for any order of the manifest."""
    labels = ["a"] * 9 + ["b"] * 2 + ["c"] * 5
    rows = [{"label": label, "tensor_path": f"{label}/{i}.npy"} for i, label in enumerate(labels)]
    chosen = class_balanced(rows, 9)
    assert collections.Counter(row["label"] for row in chosen) == {"a": 4, "b": 2, "c": 3}
    assert class_balanced(rows[::-1], 9) == chosen and len(class_balanced(rows, 100)) == 16


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    with FaultyHub() as hub:
        hub.write_client_ini(tmp_path / "client.ini")
        yield hub


SEND_AUDIT = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = args[1] if event == "socket.connect" else args[0]
        host = address[0] if isinstance(address, tuple) else address
        with open(os.environ["AUDIT_FILE"], "a") as file:
            file.write(f"{host}\\n")
sys.addaudithook(note)
"""


def audited(folder):
    """Environment that lets every Python process write the hosts it connects to or looks up to folder/hosts."""
    (folder / "sitecustomize.py").write_text(SEND_AUDIT)
    return {"PYTHONPATH": folder, "AUDIT_FILE": folder / "hosts", "HOME": folder}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """R(2+1)D-18 of 4 frames exported in float with the seed's flags: (folder, hub, what was printed, paths)."""
    folder = tmp_path_factory.mktemp("exported")
    write_checkpoint(folder / "model.pth", "r2plus1d_18", frames=4)  # the name that the manual gives it
    paths = write_clips(folder / "preprocessed_tensors", 10, frames=4, size=112, labels=CLASSES)
    (folder / "export_assets/.export-killed/qevd").mkdir(parents=True)
    with FaultyHub() as hub:
        hub.write_client_ini(folder / "client.ini")
        environment = os.environ | {key: str(value) for key, value in audited(folder).items()}
        flags = ["--device", "Samsung Galaxy S25", "--skip-profiling", "false", "--do-inferencing"]
        result = subprocess.run(
            [sys.executable, REPO / SCRIPT, *flags], cwd=folder, text=True,
            env=environment | {"QAIHUB_CLIENT_INI": str(folder / "client.ini")}, capture_output=True,
        )  # fmt: skip
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        yield folder, hub, result.stdout, paths


def test_jobs_of_the_real_network(exported):
    _, hub, printed, _ = exported
    compile_job, link_job, profile_job, inference_job = list(hub.jobs.values())[:4]
    assert [job.kind for job in list(hub.jobs.values())[:4]] == ["compile", "link", "profile", "inference"]
    assert all(job.details.device.name == "Samsung Galaxy S25" for job in hub.jobs.values())
    for option in ("--target_runtime qnn_dlc", "--force_channel_last_input video", "--output_names class_probs"):
        assert option in compile_job.options
    assert (profile_job.profiling, inference_job.profiling, inference_job.num_samples) == (True, False, 8)
    assert "--qairt_version 2.50" in profile_job.options and "--qairt_version 2.50" in inference_job.options
    for words in ("exporting ./model.pth", "against torch on a real clip", "PSNR", "the same Top-1 for 8 of 8 clips",
                  "latency", "34 ms gate", "MiB at the peak", "layers    CPU",
                  "video: float32 (1, 4, 112, 112, 3), NTHWC",
                  "next: python tools/local_hub.py python tools/run_inference.py --dlc-path ",
                  "export_assets/resnet_2plus1d.bin --data-path ./preprocessed_tensors\n"):  # fmt: skip
        assert words in printed, f"{words!r} was not reported:\n{printed}"
    assert f"compile job {compile_job.id} (local hub)\n" in printed
    assert hub.url not in printed and "Downloaded model to" not in printed, "of no use when the hub has ended"
    assert "NOT ON THE NPU" not in printed, "an emulated device has none"


def test_files_of_the_real_network(exported):
    folder, hub, _, paths = exported
    binary = folder / "export_assets/resnet_2plus1d.bin"
    description = json.loads(binary.with_suffix(".json").read_text())
    assert "profiled_ms" not in description, "this CPU's latency is no device's"
    assert description["sha256"] == hashlib.sha256(binary.read_bytes()).hexdigest()
    assert description["input"]["shape"] == [1, 4, 112, 112, 3] and description["classes"] == CLASSES
    assert (description["qairt_version"], len(description["probe"]["logits"])) == ("2.50", 5)
    (bundle,) = (folder / "export_assets").glob("qevd_r2plus1d-*/")
    assert (bundle / "labels.txt").read_text().split("\n")[:-1] == CLASSES
    assert (bundle / "qevd_r2plus1d.bin").read_bytes() == binary.read_bytes()
    outputs = json.loads((bundle / "metadata.json").read_text())["model_files"]["qevd_r2plus1d.bin"]["outputs"]
    assert not outputs["class_probs"].get("softmax_applied")
    assert not list((folder / "export_assets").glob(".*")), "something temporary is left"


def test_the_real_network_gives_torchs_logits(exported, run_script):
    """By the printed command, without an upload of the model: the hub's own is used, and checked with one clip."""
    folder, hub, _, paths = exported
    uploads = hub.requests.count(("POST", "/api/v1/models/"))
    environment = audited(folder) | {"QAIHUB_CLIENT_INI": folder / "client.ini"}
    flags = ("--device-name", "Samsung Galaxy S25", "--max-chunk", 6)
    result = run_script("tools/run_inference.py", *flags, cwd=folder, **environment)
    assert "its logits, at most" in result.stdout and "it is not uploaded again" in result.stdout
    assert hub.requests.count(("POST", "/api/v1/models/")) == uploads
    logits, written = read_h5(folder / "dataset-export.h5")
    model = Model.from_pretrained(str(folder / "model.pth"))
    clips = [torch.from_numpy(np.load(folder / "preprocessed_tensors" / path)) for path in paths]
    expected = np.concatenate([model(clip).numpy() for clip in clips])
    assert written == paths
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    with h5py.File(folder / "dataset-export.h5") as file:
        assert json.loads(file.attrs["classes"]) == CLASSES
    hosts = set((folder / "hosts").read_text().split())
    assert hosts == {"127.0.0.1"}, f"the export or the inference talked to {hosts}"


QAIRT_FLAGS = tuple(f"--{job}-options=--qairt_version=default" for job in ("compile", "link", "inference"))


def test_w8a8_is_calibrated_with_training_clips_on_a_hub_of_tomorrow(tmp_path, run_script, checkpoint, monkeypatch):
    """2 clips of each class of another folder than the scored one. The hub offers no QAIRT that the package knows: one
    sentence names the flags, and they work. Jobs are shared, but not of a local hub. The model is saved before a
    profile job fails, and runs on uint8."""
    paths = write_clips(tmp_path / "clips", 5, frames=4, size=112, labels=CLASSES)
    training = write_clips(tmp_path / "calibration_tensors", 15, frames=4, size=112, labels=CLASSES)
    by_content = {np.load(tmp_path / "calibration_tensors" / path).tobytes(): path.split("/")[0] for path in training}
    with FaultyHub(qairt_versions=["2.54", "2.52"]) as hub:
        hub.write_client_ini(tmp_path / "client.ini")
        environment = audited(tmp_path) | {"QAIHUB_CLIENT_INI": tmp_path / "client.ini"}
        hub.faults.append(Fault("profile", fail=True, message="the device caught fire"))
        flags = ("--checkpoint", checkpoint, "--data-dir", "clips", "--precision", "w8a8", "--do-profiling")
        flags += ("--num-calibration-samples", 10, "--zip-assets")
        refused = run_script(SCRIPT, *flags, code=2, QAIHUB_CLIENT_INI=tmp_path / "client.ini").stderr.splitlines()[-1]
        assert "2.54, 2.52" in refused and refused.endswith(" ".join(QAIRT_FLAGS)) and not hub.jobs
        flags += (*QAIRT_FLAGS, "--share", "jury@example.org")
        refused = run_script(SCRIPT, *flags, code=2, **environment).stderr
        assert "nobody else sees the jobs of a local hub" in refused and not hub.jobs
        with monkeypatch.context() as patch:
            patch.setattr(routes, "DEVICES", devices_of_ai_hub())
            result = run_script(SCRIPT, *flags, code=1, **environment)
        assert "caught fire" in result.stderr and "Traceback" not in result.stderr
        kinds = [job.kind for job in hub.jobs.values()]
        assert kinds == ["compile", "quantize", "compile", "link", "profile"]
        _, quantize_job, shared, *_ = hub.jobs.values()
        assert shared.shared_with == ["jury@example.org"] and f"quote compile job {shared.id}" in result.stdout
        description = json.loads((tmp_path / "export_assets/resnet_2plus1d.json").read_text())
        assert description["shared"][:2] == "20" and description["compile_job"] == shared.id
        with h5py.File(hub.datasets[quantize_job.dataset_id].path) as file:
            labels = collections.Counter(by_content[clip[()].tobytes()] for clip in file["data/0"].values())
        assert labels == dict.fromkeys(CLASSES, 2), f"calibration is not class-balanced: {labels}"
        assert "calibrating with 10 clips of 5 classes from ./calibration_tensors\n" in result.stdout
        (bundle,) = (tmp_path / "export_assets").glob("qevd_mc3_18-*")
        assert bundle.suffix == ".zip" and zipfile.is_zipfile(bundle)

        (command,) = (line for line in result.stdout.splitlines() if line.startswith("next: "))
        model = "export_assets/resnet_2plus1d.bin"
        assert command.endswith(f"tools/run_inference.py --dlc-path {model} --data-path clips")
        run_script("tools/run_inference.py", "--data-path", "clips", **environment)
        logits, _ = read_h5(tmp_path / "dataset-export.h5")
        model = Model.from_pretrained(str(checkpoint))
        clips = [torch.from_numpy(np.load(tmp_path / "clips" / path)) for path in paths]
        expected = np.concatenate([model(clip).numpy() for clip in clips])
        assert np.abs(logits - expected).max() < 0.15 * np.abs(expected).max()
        job = list(hub.jobs.values())[-1]
        assert "--qairt_version 2.54" in job.options
        with h5py.File(hub.datasets[job.dataset_id].path) as file:
            assert file["data/0/batch_0"].dtype == np.uint8
    assert set((tmp_path / "hosts").read_text().split()) == {"127.0.0.1"}


def test_the_best_of_each_checkpoint(tmp_path, monkeypatch, capsys):
    paths = [tmp_path / f"{seed}/checkpoint.pth" for seed in (1, 2)]
    for path in paths:
        path.parent.mkdir()
        path.with_name("model_best.pth").write_bytes(b"x")
    monkeypatch.setattr(example_export, "checkpoint", list(map(str, paths)))
    assert example_export.checkpoint_paths() == list(map(str, paths))
    monkeypatch.setattr(example_export, "best", True)
    assert example_export.checkpoint_paths() == [str(path.with_name("model_best.pth")) for path in paths]
    paths[1].with_name("model_best.pth").unlink()
    with pytest.raises(SystemExit) as stop:
        example_export.checkpoint_paths()
    assert stop.value.code == 2 and f"there is no {tmp_path}/2/model_best.pth" in capsys.readouterr().err


@pytest.mark.parametrize(("path", "folder", "emulated", "flags"), [
    ("export_assets/resnet_2plus1d.bin", "./preprocessed_tensors", False, " --data-path ./preprocessed_tensors"),
    ("export_assets/resnet_2plus1d.onnx", "", False, ""),
    ("a b/resnet_2plus1d.bin", "x", True, " --data-path x"),
])  # fmt: skip
def test_the_next_command_names_the_model_and_its_clips(capsys, monkeypatch, path, folder, emulated, flags):
    monkeypatch.setattr(example_export, "data_dir", folder)
    example_export.print_next(Path(path), emulated)
    hub = "python tools/local_hub.py " if emulated else ""
    first, *more = capsys.readouterr().out.splitlines()
    assert first == f"next: {hub}python tools/run_inference.py --dlc-path {shlex.quote(path)}{flags}"
    assert [line.endswith(f"--source '{path}'") for line in more] == [True] * emulated, "Qualcomm's compiler"


def test_every_runtime_of_the_package_but_those_for_language_and_speech():
    from qai_hub_models import TargetRuntime

    others = {runtime.value for runtime in TargetRuntime} - set(example_export.RUNTIMES)
    assert others == {"genie", "geniex_qairt", "geniex_llamacpp", "voice_ai"}


def test_the_last_export_wins(tmp_path, monkeypatch):
    """A folder, a file and a folder again under one name; the description is of the last."""
    monkeypatch.setattr(example_export, "output_dir", str(tmp_path))
    for name in ("small_onnx/small.onnx", "small.onnx", "small_onnx/small.onnx"):
        bundle = tmp_path / f"bundle-{name.count('/')}"
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(name)
        (bundle / "metadata.json").write_text(json.dumps({"model_files": {name: {}}}))
        path = example_export.save_beside(bundle, {})
        assert path.name == "resnet_2plus1d.onnx" and path.is_dir() == ("/" in name)
        assert json.loads((tmp_path / "resnet_2plus1d.json").read_text())["sha256"] == common.sha256_of(path)


def test_an_earlier_bundle_of_the_name_is_replaced(tmp_path, monkeypatch):
    """Whether a folder or a .zip; nothing of it stays."""
    monkeypatch.setattr(example_export, "output_dir", str(tmp_path))
    for zipped in (False, True, True, False):
        made = tmp_path / ".export-x/qevd"
        made.mkdir(parents=True)
        (made / f"model-{zipped}").write_text("new")
        bundle = example_export.save_bundle(made, "qevd")
        if zipped:
            bundle = example_export.zip_bundle(bundle)
        shutil.rmtree(tmp_path / ".export-x")
        assert list(tmp_path.iterdir()) == [bundle] and bundle.name == ("qevd.zip" if zipped else "qevd")
        if not zipped:
            assert [path.name for path in bundle.iterdir()] == ["model-False"]


def test_clips_of_other_classes_do_not_calibrate(checkpoint, tmp_path, capsys):
    write_clips(tmp_path / "others", 5, frames=4, size=8, labels=[*CLASSES[:2], "ballet"])
    model = Model.from_pretrained(str(checkpoint), calibration=(str(tmp_path / "others"), 100))
    with pytest.raises(SystemExit):
        model.get_calibration_dataset_cls()
    assert "of other classes than the 5 of the model, say 'ballet'" in capsys.readouterr().err
    write_clips(tmp_path / "few", 3, frames=4, size=8, labels=CLASSES)
    model = Model.from_pretrained(str(checkpoint), calibration=(str(tmp_path / "few"), 100))
    model.get_calibration_dataset_cls()("train")
    assert "calibrating with 3 clips of 3 classes" in (line := capsys.readouterr().out)
    assert "100 were asked for, there are no more" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize(("value", "name"), [
    (np.float64(1.5), "numpy._core.multiarray.scalar"), (PosixPath("x"), f"{PosixPath.__module__}.PosixPath"),
])  # fmt: skip
def test_what_makes_a_checkpoint_unsafe_is_named(tmp_path, capsys, value, name):
    """On one line, with the cure, which cures, without torch's colours."""
    torch.save({"model": {}, "best": value}, tmp_path / "checkpoint.pth")
    error = refused(capsys, checkpoint=str(tmp_path / "checkpoint.pth"))
    assert name in error and len(error.splitlines()) == 1 and "\x1b" not in error
    _, option, cure = shlex.split(error[error.index("python -c") :])
    subprocess.run([sys.executable, option, cure], cwd=tmp_path, check=True)
    assert torch.load(tmp_path / "clean.pth", weights_only=True) == {"model": {}}


def test_the_seeds_constants():
    """The names and values that the user's manual gives."""
    import compile_and_profile
    import run_inference

    for module, constants in {
        example_export: {"device": DEVICE, "target_runtime": "qnn_context_binary", "skip_profiling": True,
                         "skip_inferencing": True, "skip_downloading": False, "output_dir": "./export_assets"},
        compile_and_profile: {"VIDEO_ONNX_NAME": "model.onnx", "DEVICE_NAME": DEVICE,
                              "BATCH": 1, "C": 3, "T": 16, "H": 112, "W": 112},
        run_inference: {"DLC_PATH": "./export_assets/resnet_2plus1d.bin", "ONNX_DIR": "", "MAX_CHUNK": 538,
                        "OUTPUT_H5": "dataset-export.h5", "IS_DLC_CHANNEL_LAST": False, "USE_SINGLE_TENSOR": False,
                        "SINGLE_TENSOR_INDEX": 0, "BATCH": 1, "C": 3, "T": 16, "H": 112, "W": 112},
    }.items():  # fmt: skip
        assert {name: getattr(module, name) for name in constants} == constants
    for name in ("num_classes", "data_dir", "num_frames", "precision", "checkpoint", "share", "random_weights"):
        assert hasattr(example_export, name)


def test_a_model_that_the_hub_does_not_describe(tmp_path):
    """Then the bundle's metadata.json says what it takes; without that, nobody does."""
    tensor = {"shape": [1, 4, 112, 112, 3], "dtype": "uint8"}
    scale = {"quantization_parameters": {"scale": 0.004, "zero_point": 0}}
    entry = {"inputs": {"video": tensor | scale}, "outputs": {"scores": {"shape": [1, 5], "dtype": "float32"}}}
    silent = argparse.Namespace(input_spec={}, output_spec={})
    result = argparse.Namespace(
        compile_job=argparse.Namespace(get_target_model=lambda: silent), download_path=tmp_path
    )
    for content, expected in ((entry, "scores"), ({"inputs": {}, "outputs": {}}, None)):
        (tmp_path / "metadata.json").write_text(json.dumps({"model_files": {"model.bin": content}}))
        io = example_export.find_io(silent, result)
        assert io == expected or io["output"]["name"] == expected
        if expected:
            assert io["input"] == {"name": "video", **tensor, "scale": 0.004, "zero_point": 0}


def test_outputs_of_another_name_are_compared(tmp_path, hub, capsys):
    """The bundle may call the output otherwise than the device does; it is the only one."""
    compile_binary(hub, tmp_path / "model.bin", frames=4)
    (job,) = hub.jobs.values()
    client, paths = client_of(hub), write_clips(tmp_path / "clips", 2, frames=4)
    clips = [np.load(tmp_path / "clips" / path) for path in paths]
    target = client.get_model(job.target_id)
    io = model_io.io_of(target)
    io["output"]["name"] = "scores"

    class Network(SmallNetwork):
        def sample_inputs(self, use_channel_last_format):
            return {"video": clips}

    with torch.no_grad():
        example_export.compare_on_device(client, client.get_devices(DEVICE)[0], Network(4).eval(), target, io)
    assert "the same Top-1 for 2 of 2 clips" in capsys.readouterr().out


def test_a_failed_job_ends_the_export(hub):
    """Message and job, no job after it; the pipeline alone would go on with the failed job's handle."""
    hub.faults.append(Fault("compile", fail=True, message="op Foo is unknown"))
    client = client_of(hub)
    failing = pytest.raises(service.JobFailedError, match=r"op Foo is unknown.* see j\w+ \(local hub\)")
    with failing, example_export.each_job_waited_for(client):
        client.submit_compile_job(small_onnx(), qai_hub.Device(DEVICE), options="--target_runtime qnn_dlc")


def test_wrong_usage(tmp_path, run_script, checkpoint):
    """One sentence each, before the network is built or AI Hub is asked."""

    def refused(*flags):
        return run_script(SCRIPT, *flags, code=2).stderr

    assert "possible are float, w8a8, w8a16" in refused("--precision", "int4")
    assert "qnn_context_binary, qnn_dlc, tflite" in refused("--target-runtime", "genie")
    assert f"looked in {tmp_path}/checkpoint.pth" in refused()
    assert "'jury' in share is no e-mail" in refused("--checkpoint", checkpoint, "--data-dir", "", "--share", "jury")
    assert "no manifest.jsonl in nowhere" in refused("--checkpoint", checkpoint, "--data-dir", "nowhere")
    error = refused("--checkpoint", checkpoint, "--data-dir", "", "--precision", "w8a16")
    assert "w8a16 is calibrated with clips of training videos" in error and "--max-per-class 2" in error


def flags_of(script, folder, checkpoint):
    """Flags with which each script gets as far as asking AI Hub, in a folder that it is prepared in."""
    from onnx import save

    write_clips(folder / "clips", 2)
    save(small_onnx(), folder / "model.onnx")
    shape = ("--t", 8, "--h", 16, "--w", 16)
    return {
        "example_export": ("--checkpoint", checkpoint, "--data-dir", ""),
        "compile_and_profile": shape,
        "run_inference": ("--dlc-path", "", "--onnx-dir", ".", "--data-path", "clips", *shape),
    }[script]


@pytest.mark.parametrize("script", ["example_export", "compile_and_profile", "run_inference"])
def test_without_a_token_and_without_a_service(tmp_path, run_script, checkpoint, script):
    """Exit 2: where the token goes, and how to run without one. Exit 1: where nobody answered. One sentence each."""
    command = (f"tools/{script}.py", *flags_of(script, tmp_path, checkpoint))
    result = run_script(*command, code=2, QAIHUB_CLIENT_INI=tmp_path / "none.ini")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "none.ini" in line and f"python tools/local_hub.py python tools/{script}.py" in line
    closed = FaultyHub()
    closed.socket.close()
    closed.write_client_ini(tmp_path / "client.ini")
    environment = hasty_client(tmp_path) | {"QAIHUB_CLIENT_INI": tmp_path / "client.ini"}
    result = run_script(*command, code=1, **environment)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: AI Hub: ") and "Could not connect" in line and closed.url in line
    assert "Traceback" not in result.stderr and closed.token not in result.stdout + result.stderr


@pytest.mark.parametrize(("words", "value"), [
    ([], True), (["--skip-profiling"], True), (["--skip-profiling", "false"], False), (["--do-profiling"], False),
    (["--skip-profiling", "true"], True),
])  # fmt: skip
def test_the_three_ways_to_skip(words, value):
    script = {"__file__": str(common.REPO / SCRIPT), "__doc__": "An export."}
    exec(compile((common.REPO / SCRIPT).read_text(), SCRIPT, "exec"), script | {"__name__": "example_export"}, script)
    script |= {"__file__": str(common.REPO / SCRIPT)}
    flags.set_constants_from_flags(script, words)
    assert script["skip_profiling"] is value


@pytest.mark.skipif(
    not (os.environ.get("TEST_REAL_AI_HUB") and Path("~/.qai_hub/client.ini").expanduser().is_file()),
    reason="opt-in: set TEST_REAL_AI_HUB=1 with a token in ~/.qai_hub/client.ini; uses minutes of a real device",
)
def test_the_real_service(tmp_path, run_script):
    """A small ONNX network is compiled, profiled and run on two clips on the real device; logits within float16."""
    from onnx import save

    from small_models import expected_logits

    save(small_onnx(), tmp_path / "model.onnx")
    paths = write_clips(tmp_path / "clips", 2)
    shape = ("--t", 8, "--h", 16, "--w", 16)
    run_script("tools/compile_and_profile.py", *shape, timeout=3600)
    flags = ("--dlc-path", "", "--onnx-dir", ".", "--data-path", "clips", *shape)
    run_script("tools/run_inference.py", *flags, timeout=3600)
    logits, written = read_h5(tmp_path / "dataset-export.h5")
    assert written == paths
    np.testing.assert_allclose(logits, expected_logits(tmp_path / "clips", paths), atol=0.02)
