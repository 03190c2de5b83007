"""Small networks and clips for the tests of the AI Hub scripts, and binaries that the local hub makes of them."""

import functools
import io
import json
import warnings
from pathlib import Path

import common

import numpy as np
import onnx
import pytest
import qai_hub
import torch
from torch import nn

DEVICE = "Dragonwing IQ-9075 EVK"
NUM_CLASSES = 4


class SmallNetwork(nn.Module):
    """(1, 3, T, 16, 16) in [0, 1] -> 4 logits that depend on where in the clip a value stands, so on its layout."""

    def __init__(self, frames, channel_last=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv3d(3, 6, 3, stride=2), nn.Linear(6 * ((frames - 1) // 2) * 7 * 7, NUM_CLASSES)
        self.channel_last = channel_last

    def forward(self, clip):
        if self.channel_last:
            clip = clip.permute(0, 4, 1, 2, 3)
        return self.fc(torch.relu(self.conv((clip - 0.4) / 0.2)).flatten(1))


def small_onnx(frames=8, channel_last=False, name="clip"):
    """A SmallNetwork as an ONNX model."""
    return onnx.load_from_string(exported(frames, channel_last, name))


@functools.cache
def exported(frames, channel_last, name):
    shape = (1, frames, 16, 16, 3) if channel_last else (1, 3, frames, 16, 16)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(SmallNetwork(frames, channel_last).eval(), (torch.zeros(shape),), file, dynamo=False,
                          opset_version=17, input_names=[name], output_names=["logits"])  # fmt: skip
    return file.getvalue()


def write_clips(folder, number, frames=8, size=16, labels=("a", "b", "c", "d")):
    """`number` clips float32 (1, 3, T, size, size) and their manifest.jsonl; returns their tensor paths, in its order.

    The order of the manifest is not the order of the file names, as in real data.
    """
    random, rows = np.random.default_rng(0), []
    for i in range(number):
        label = labels[i % len(labels)]
        path = f"{label}/{(7 * i) % 10007:04d}.npy"
        (folder / label).mkdir(parents=True, exist_ok=True)
        np.save(folder / path, random.random((1, 3, frames, size, size), dtype=np.float32))
        rows.append({"video_path": f"/videos/{path[:-4]}.mp4", "label": label, "tensor_path": path})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["tensor_path"] for row in rows]


def expected_logits(folder, paths, frames=8):
    """What torch gives for the clips: float32 (clips, 4)."""
    network = SmallNetwork(frames).eval()
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(np.load(folder / path))).numpy() for path in paths])


HASTY = """
import time, types
import qai_hub.client, qai_hub.util.session
qai_hub.util.session.BACKOFF_FACTOR = 0.001
qai_hub.client.time = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
"""


def hasty_client(folder):
    """Environment in which a script's qai_hub client tries as often as ever, without its waits of up to 60 s."""
    (folder / "sitecustomize.py").write_text(HASTY)
    return {"PYTHONPATH": str(folder)}


def client_of(hub):
    """A real qai_hub client in this process that talks to the local hub."""
    return qai_hub.Client(qai_hub.ClientConfig(api_token=hub.token, api_url=hub.url, web_url=hub.url))


def compile_on(hub, frames=8, channel_last=False, w8a8=False, calibration=(), name="clip",
               runtime="qnn_context_binary", options=""):
    """The hub's model of a SmallNetwork, compiled by the local hub."""
    client, device = client_of(hub), qai_hub.Device(DEVICE)
    model, options = small_onnx(frames, name=name), f"--target_runtime {runtime} {options}"
    if w8a8:
        quantize_job = client.submit_quantize_job(
            model, {name: list(calibration)}, qai_hub.QuantizeDtype.INT8, qai_hub.QuantizeDtype.INT8
        )
        assert quantize_job.wait().success
        model, options = quantize_job.get_target_model(), options + " --quantize_io"
    if channel_last:
        options += f" --force_channel_last_input {name}"
    shape = (1, 3, frames, 16, 16)
    job = client.submit_compile_job(model, device, input_specs={name: (shape, "float32")}, options=options)
    assert job.wait().success, job.get_status().message
    return job.get_target_model()


def compile_binary(hub, path, *args, **options):
    """Let a FaultyHub, at its most talkative, compile a SmallNetwork to a binary at `path`, with its description."""
    import common

    from aihub import model_io

    quirks, hub.quirks = hub.quirks, set()
    target = compile_on(hub, *args, **options)
    target.download(str(path))
    description = model_io.io_of(target) | {"sha256": common.sha256_of(path), "output_kind": "logits"}
    path.with_suffix(".json").write_text(json.dumps(description), encoding="utf-8")
    hub.quirks = quirks
    return path


def compile_and_save(hub, folder, runtime, **options):
    """Compile for any runtime and save as example_export.py does, from a bundle as qai_hub_models makes it.

    Returns the model's path, a folder for an ONNX model with a second file.
    """
    from qai_hub_models.utils.onnx.helpers import download_and_unzip_workbench_onnx_model

    import example_export
    from aihub import model_io

    target, bundle = compile_on(hub, runtime=runtime, **options), folder / "bundle"
    bundle.mkdir()
    if target.model_type == qai_hub.SourceModelType.ONNX:
        path = download_and_unzip_workbench_onnx_model(target, bundle, "small").onnx_graph_path
    else:
        path = Path(target.download(str(bundle / "small")))
    (bundle / "metadata.json").write_text(json.dumps({"model_files": {str(path.relative_to(bundle)): {}}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_export, "output_dir", str(folder))
        return example_export.save_beside(bundle, model_io.io_of(target) | {"output_kind": "logits"})


def read_h5(path):
    """(logits float32 (clips, classes), tensor paths) of run_inference.py's output."""
    with common.open_hdf5(path)[0] as file:
        group = file["data/0"]
        assert set(group) == {f"batch_{i}" for i in range(group.attrs["batch_count"])}
        logits = np.concatenate([group[f"batch_{i}"][()] for i in range(group.attrs["batch_count"])])
        return logits, [path.decode() for path in file["tensor_paths"]]
