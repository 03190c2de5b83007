"""The local hub, spoken to by the real qai_hub client: every call the AI Hub tools make, layouts, quantised inputs and
outputs, what it refuses, and each fault that a test can order (faulty_hub.py).

    $ python -m pytest tests/test_local_hub.py
"""

import http.client
import io
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import qai_hub
import requests
import torch
from qai_hub import public_api_pb2 as pb
from qai_hub.client import RateLimitedError, UserError
from torch import nn

from aihub import onnx_graphs
from conftest import REPO
from faulty_hub import Fault, FaultyHub
from hub_server.job_life import RUNNERS

SHAPE = (1, 3, 4, 8, 10)  # NCTHW, every dimension another size, so that a wrong layout cannot pass
NTHWC = (1, 4, 8, 10, 3)
CLASSES = 5
DEVICE = qai_hub.Device("Dragonwing IQ-9075 EVK")
SPECS = {"video": (SHAPE, "float32")}
BINARY = "--target_runtime qnn_context_binary --output_names class_probs"
CHANNEL_LAST = " --force_channel_last_input video"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class SmallNet(nn.Module):
    """The parts of R(2+1)D that matter for conversion: normalisation, 3-d convolution, batch norm, residual, mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.43, 0.39, 0.38]).reshape(1, 3, 1, 1, 1))
        self.conv, self.norm = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.again, self.fc = nn.Conv3d(8, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, video):
        x = torch.relu(self.norm(self.conv((video - self.mean) / 0.22)))
        return self.fc(torch.relu(x + self.again(x)).mean((2, 3, 4)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = SmallNet()
    net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [rng.random(SHAPE, dtype=np.float32) * (i + 1) / 6 for i in range(6)]


@pytest.fixture(scope="module")
def logits(net, clips):
    with torch.no_grad():
        return np.concatenate([net(torch.from_numpy(clip)).numpy() for clip in clips])


@pytest.fixture(scope="module")
def onnx_model(net):
    return to_onnx(net)


def to_onnx(net, shape=SHAPE, **options):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(shape),), file, dynamo=False, input_names=["video"], output_names=["out"],
                          **options)
    return onnx.load_from_string(file.getvalue())


@pytest.fixture(autouse=True)
def hasty_client(monkeypatch):
    """The real client, with short waits: it asks every 0.25 s and retries once, soon."""
    monkeypatch.setattr(qai_hub.client.Job, "_polling_interval", 0.25)
    monkeypatch.setattr("qai_hub.util.session.BACKOFF_FACTOR", 0.01)
    monkeypatch.setattr("qai_hub.util.session.MAX_RETRIES", 1)


@pytest.fixture
def hub():
    with FaultyHub() as hub:
        yield hub


def client_of(hub, token=None):
    config = qai_hub.ClientConfig(api_url=hub.url, web_url=hub.url, api_token=token or hub.token, verbose=False)
    return qai_hub.Client(config)


@pytest.fixture
def client(hub):
    return client_of(hub)


def compiled(client, model, options=BINARY, specs=SPECS):
    """Compile and wait; the target model, after showing why the job failed if it did."""
    job = client.submit_compile_job(model, DEVICE, input_specs=specs, options=options)
    status = job.wait()
    assert status.success, status.message
    return job.get_target_model()


def inferred(client, model, samples, **options):
    """Run samples through a model; its first output as one array (samples, …)."""
    job = client.submit_inference_job(model, DEVICE, {"video": samples}, profile=False, **options)
    status = job.wait()
    assert status.success, status.message
    return np.concatenate(next(iter(job.download_output_data().values())))


def channel_last(clips):
    return [np.moveaxis(clip, 1, -1) for clip in clips]


def failure_of(job):
    """The reason why a job failed; a job that did not fail fails the test."""
    status = job.wait()
    assert status.failure, f"the job should fail, it ended as {status}"
    return status.message


# --- compile and infer ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("runtime", ["onnx", "precompiled_qnn_onnx", "qnn_dlc", "qnn_context_binary", "tflite"])
def test_onnx_runs_on_every_runtime_in_both_layouts(client, onnx_model, clips, logits, runtime):
    options = f"--target_runtime {runtime} --output_names class_probs"
    first = compiled(client, onnx_model, options)
    assert first.input_spec[None][0].shape == SHAPE
    np.testing.assert_allclose(inferred(client, first, clips), logits, atol=1e-5)
    last = compiled(client, onnx_model, options + CHANNEL_LAST)
    assert (last.input_spec[None][0].shape, last.output_spec[None][0].name) == (NTHWC, "class_probs")
    np.testing.assert_allclose(inferred(client, last, channel_last(clips)), logits, atol=1e-5)


def save_onnx_folder(onnx_model, folder):
    folder.mkdir()
    copy = onnx.ModelProto.FromString(onnx_model.SerializeToString())
    onnx.save_model(copy, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    assert (folder / "model.data").stat().st_size > 1000, "this test is about weights outside the .onnx file"
    return folder


def test_other_sources(client, net, onnx_model, clips, logits, tmp_path):
    """An exported program, an .onnx file, and a folder with external weights give torch's logits."""
    onnx.save(onnx_model, tmp_path / "single.onnx")
    sources = {
        "exported program": torch.export.export(net, (torch.zeros(SHAPE),)),
        "onnx file": tmp_path / "single.onnx",
        "onnx folder": save_onnx_folder(onnx_model, tmp_path / "folder.onnx"),
    }
    for name, source in sources.items():
        model = compiled(client, source, BINARY + CHANNEL_LAST)
        outputs = inferred(client, model, channel_last(clips))
        np.testing.assert_allclose(outputs, logits, atol=1e-5, err_msg=name)


def test_exported_program_needs_no_input_specs(client, net, clips, logits):
    model = compiled(client, torch.export.export(net, (torch.zeros(SHAPE),)), specs=None)
    assert (model.input_spec[None][0].name, model.input_spec[None][0].shape) == ("video", SHAPE)
    np.testing.assert_allclose(inferred(client, model, clips), logits, atol=1e-5)


def test_open_dimensions_are_fixed_by_input_specs(client, net, clips, logits):
    model = to_onnx(net, dynamic_axes={"video": {2: "T"}})
    assert "open dimensions" in failure_of(client.submit_compile_job(model, DEVICE, options=BINARY))
    np.testing.assert_allclose(inferred(client, compiled(client, model), clips), logits, atol=1e-5)


def test_upload_in_parts(client, onnx_model, clips, logits):
    with FaultyHub(max_part_bytes=1000) as hub:
        client = client_of(hub)
        uploaded = client.upload_model(onnx_model)
        parts = [path for method, path in hub.requests if method == "PUT"]
        assert len(parts) == -(-len(onnx_model.SerializeToString()) // 1000) > 3
        np.testing.assert_allclose(inferred(client, compiled(client, uploaded), clips), logits, atol=1e-5)


# --- link, binaries ---------------------------------------------------------------------------------------------------


def test_dlc_is_linked_and_the_binary_runs_on_another_hub(client, onnx_model, clips, logits, tmp_path):
    dlc = compiled(client, onnx_model, "--target_runtime qnn_dlc --output_names class_probs" + CHANNEL_LAST)
    job = client.submit_link_job([dlc], DEVICE, options="--qairt_version 2.50")
    assert job.wait().success
    linked = job.get_target_model()
    assert linked.model_type == qai_hub.SourceModelType.QNN_CONTEXT_BINARY
    assert linked.input_spec[None][0].shape == NTHWC
    path = linked.download(str(tmp_path / "model.bin"))
    with open(path, "rb") as file:
        assert file.readline() == onnx_graphs.HUB_TAG and b"NOT A QUALCOMM BINARY" in onnx_graphs.HUB_TAG
    with FaultyHub() as other:
        outputs = inferred(client_of(other), path, channel_last(clips))
    np.testing.assert_allclose(outputs, logits, atol=1e-5)


def test_foreign_binary_is_refused(client, clips, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x02\x00\x00\x00 as a real context binary might start" * 100)
    job = client.submit_inference_job(str(tmp_path / "model.bin"), DEVICE, {"video": clips}, profile=False)
    assert "was not made by the local hub" in failure_of(job)


def test_answers_say_that_they_are_emulated(client, onnx_model):
    model = compiled(client, onnx_model)
    producer = model.get_producer()
    assert "emulated" in producer.hub_version
    assert "emulated" in model.metadata[qai_hub.ModelMetadataKey.QAIRT_SDK_VERSION]
    assert "emulated:cpu" in producer.device.attributes


# --- quantised models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["INT8", "INT16"])
def quantized(request, onnx_model, clips):
    """(client, quantized ONNX model, job record, dtype of its activations), calibrated with the clips."""
    with FaultyHub() as hub:
        client = client_of(hub)
        types = dict(weights_dtype=qai_hub.QuantizeDtype.INT8, activations_dtype=qai_hub.QuantizeDtype[request.param])
        # the official pipeline compiles to ONNX first, with --quantize_io although nothing is quantised yet
        source = compiled(client, onnx_model, "--target_runtime onnx --output_names class_probs --quantize_io")
        assert source.input_spec[None][0].dtype == "float32"
        job = client.submit_quantize_job(source, {"video": clips}, **types)
        status = job.wait()
        assert status.success, status.message
        yield client, job.get_target_model(), hub.jobs[job.job_id], "u" + request.param.lower()


def test_quantized_model_with_float_io(quantized, clips, logits):
    client, model, record, _ = quantized
    assert (record.kind, record.num_samples) == ("quantize", len(clips))
    model = compiled(client, model, BINARY + CHANNEL_LAST)
    assert (model.input_spec[None][0].dtype, model.output_spec[None][0].scale) == ("float32", None)
    outputs = inferred(client, model, channel_last(clips))
    assert 0 < abs(outputs - logits).max() < 0.05 * np.ptp(logits), "quantisation shows, and is small"


def test_quantize_io(quantized, clips, logits):
    """Stored values in, stored values out; real values in, real values out: both mean the same."""
    client, model, _, dtype = quantized
    model = compiled(client, model, BINARY + CHANNEL_LAST + " --quantize_io")
    (video,), (class_probs,) = model.input_spec[None], model.output_spec[None]
    assert (video.dtype, video.shape, class_probs.dtype, class_probs.name) == (dtype, NTHWC, dtype, "class_probs")
    limit = np.iinfo(dtype).max
    stored = [np.clip(np.rint(clip / video.scale + video.zero_point), 0, limit) for clip in channel_last(clips)]
    outputs = inferred(client, model, [sample.astype(dtype) for sample in stored])
    assert outputs.dtype == dtype
    outputs = (outputs.astype(np.float32) - class_probs.zero_point) * class_probs.scale
    assert abs(outputs - logits).max() < 0.05 * np.ptp(logits)
    from_real_values = inferred(client, model, channel_last(clips))
    np.testing.assert_allclose(from_real_values, outputs, atol=1.01 * class_probs.scale)
    job = client.submit_inference_job(model, DEVICE, {"video": [s.astype(np.int32) for s in stored]}, profile=False)
    assert f"sample 0 of the dataset is video {NTHWC} int32" in failure_of(job)


def test_calibration_samples_are_checked(client, onnx_model, clips):
    job = client.submit_quantize_job(onnx_model, {"video": channel_last(clips)})
    assert f"{NTHWC}" in failure_of(job)


# --- profile, records, sharing ----------------------------------------------------------------------------------------


def test_profile_job_needs_no_inputs_and_reports_the_cpu(hub, client, onnx_model):
    job = client.submit_inference_job(compiled(client, onnx_model), DEVICE, profile=True)
    profile = job.download_profile()
    assert profile["execution_summary"]["estimated_inference_time"] > 0
    assert {layer["compute_unit"] for layer in profile["execution_detail"]} == {"CPU"}
    assert job.download_output_data() is None
    assert (hub.jobs[job.job_id].kind, hub.jobs[job.job_id].profiling) == ("profile", True)


def test_inference_job_can_profile_as_well(client, onnx_model, clips):
    job = client.submit_inference_job(compiled(client, onnx_model), DEVICE, {"video": clips}, profile=True)
    assert len(job.download_output_data()["class_probs"]) == len(clips)
    assert len(job.download_profile()["execution_summary"]["all_inference_times"]) == len(clips)


def test_records_tell_what_was_asked(hub, client, onnx_model, clips):
    model = compiled(client, onnx_model, BINARY + CHANNEL_LAST)
    dataset = client.upload_dataset({"video": channel_last(clips)})
    job = client.submit_inference_job(model, DEVICE, dataset, profile=False, options="--compute_unit npu")
    compiling, inference = hub.jobs.values()
    assert (compiling.kind, compiling.options, compiling.state) == ("compile", BINARY + CHANNEL_LAST, "done")
    assert compiling.target_id == inference.model_id == model.model_id
    assert (inference.id, inference.kind, inference.dataset_id) == (job.job_id, "inference", dataset.dataset_id)
    assert (inference.details.device.name, inference.profiling) == (DEVICE.name, False)
    assert (inference.num_samples, inference.options) == (len(clips), "--compute_unit npu")
    assert inference.details.failure_reason == ""
    assert hub.requests.count(("POST", "/api/v1/datasets/")) == 1
    assert client.get_job(job.job_id).get_status().success


def test_sharing(client, onnx_model):
    job = compiled(client, onnx_model).get_producer()
    job.modify_sharing(add_emails=["a@example.org", "b@example.org"])
    job.modify_sharing(add_emails=["a@example.org"], delete_emails=["b@example.org"])
    assert list(job.get_sharing()) == ["a@example.org"]
    job.disable_sharing()
    assert list(job.get_sharing()) == []


def test_job_seconds_let_a_job_be_seen_running(onnx_model, clips):
    with FaultyHub(job_seconds=1) as hub:
        client = client_of(hub)
        job = client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=BINARY)
        assert job.get_status().running and hub.jobs[job.job_id].state == "optimizing_model"
        # the target model's handle can be used at once; the inference job waits for it
        run = client.submit_inference_job(job.get_target_model(), DEVICE, {"video": clips}, profile=False)
        assert not run.get_status().finished
        assert len(run.download_output_data()["class_probs"]) == len(clips)


# --- what is refused --------------------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "shape": ({"video": ((1, 3, 8, 8, 10), "float32")}, "", "contradict"),
    "name": ({"clip": (SHAPE, "float32")}, "", "name other inputs"),
    "dtype": ({"video": (SHAPE, "uint8")}, "", "contradict"),
    "channel-last name": (SPECS, " --force_channel_last_input clip", "names clip, the model has video"),
    "output names": (SPECS.copy(), " --output_names a,b", "2 names, the model has 1 outputs"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_compile_job_fails_on_contradictions(client, onnx_model, case):
    specs, options, reason = CONTRADICTIONS[case]
    job = client.submit_compile_job(onnx_model, DEVICE, input_specs=specs, options="--target_runtime onnx" + options)
    assert reason in failure_of(job)


def test_exported_program_of_another_length_is_refused(client, net):
    program = torch.export.export(net, (torch.zeros(1, 3, 8, 8, 10),))
    assert "contradict" in failure_of(client.submit_compile_job(program, DEVICE, input_specs=SPECS, options=BINARY))


@pytest.mark.parametrize("options, sentence", [
    ("--target_runtime qnn_context_binary --no_such_option 1", "unknown option --no_such_option"),
    ("--target_runtime hexagon", "hexagon is not known here; known are onnx, "),
    ("--target_runtime qnn_dlc --output_names", "--output_names needs a value"),
    ("--target_runtime qnn_dlc --qairt_version 1.0", "QAIRT version 1.0 is not available"),
])
def test_bad_options_are_refused_at_submission(hub, client, onnx_model, options, sentence):
    with pytest.raises(UserError, match=sentence):
        client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=options)
    assert not hub.jobs


def test_unreadable_models_are_refused(client, tmp_path):
    for suffix in (".onnx", ".pt2"):
        (tmp_path / f"broken{suffix}").write_bytes(b"this is no model")
        path = str(tmp_path / f"broken{suffix}")
        assert "no readable" in failure_of(client.submit_compile_job(path, DEVICE, input_specs=SPECS, options=BINARY))


def test_inference_inputs_are_checked(client, onnx_model, clips):
    model = compiled(client, onnx_model)
    wrong = {
        "sample 1": {"video": [clips[0], clips[1][:, :, :2]]},
        "float16": {"video": [clip.astype(np.float16) for clip in clips]},
        "the inputs clip, the model video": {"clip": clips},
        f"{NTHWC}": {"video": channel_last(clips)},
    }
    for reason, inputs in wrong.items():
        assert reason in failure_of(client.submit_inference_job(model, DEVICE, inputs, profile=False))


def test_blob_addresses_reach_only_blobs(hub):
    hub.write_client_ini(hub.folder / "client.ini")
    for path in ("client.ini", f"../{hub.folder.name}/client.ini", f"{hub.folder}/client.ini"):
        connection = http.client.HTTPConnection(*hub.socket.getsockname())  # requests would tidy the path up
        connection.request("GET", f"/blob/{path}")
        assert connection.getresponse().status == 404, path
    assert requests.put(f"{hub.url}/blob/m12345678", data=b"not announced").status_code == 403


def test_unknown_ids_and_devices(client):
    for get in (client.get_job, client.get_model, client.get_dataset):
        with pytest.raises(UserError, match="could not be found"):
            get("x0000")
    assert client.get_devices("Dragonwing IQ-9075 EVK")
    assert not client.get_devices("No Such Phone")


def test_wrong_token_is_refused(hub):
    with pytest.raises(UserError, match="Failed to authenticate"):
        client_of(hub, token="wrong").get_devices()


def test_the_token_is_of_this_run_and_a_web_page_cannot_ask(hub):
    with FaultyHub() as other:
        assert other.token != hub.token and len(hub.token) >= 32
    for host in ("evil.example", f"evil.example:{hub.port}", "127.0.0.1:80"):
        headers = {"Host": host, "Authorization": f"token {hub.token}"}
        assert requests.get(f"{hub.url}/api/v1/users/auth/user/", headers=headers).status_code == 403, host
    assert requests.get(f"http://localhost:{hub.port}/api/v1/devices/").status_code == 401


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewritten(program, path, change):
    """Save an exported program to `path` with `change(name, content)` applied to each file in it."""
    torch.export.save(program, path.with_suffix(".original.pt2"))
    with zipfile.ZipFile(path.with_suffix(".original.pt2")) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return str(path)


def test_an_uploaded_program_cannot_run_code(client, net, tmp_path):
    """Pickles in any place of the archive, and an expression that sympy would evaluate."""
    program, pickled = torch.export.export(net, (torch.zeros(SHAPE),)), io.BytesIO()
    torch.save(Attack(tmp_path / "owned"), pickled)

    def pickled_inputs(name, content):
        return pickled.getvalue() if "sample_inputs" in name else content

    def pickled_weights(name, content):
        if name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return pickled.getvalue() if "/weights/weight_" in name else content

    def expression(name, content):
        return content.replace(b'"as_int": 4', b'"as_expr": {"expr_str": "touch()"}') if "/models/" in name else content

    for change in (pickled_inputs, pickled_weights, expression):
        path = rewritten(program, tmp_path / f"{change.__name__}.pt2", change)
        job = client.submit_compile_job(path, DEVICE, options=BINARY)
        assert "no readable torch.export program" in failure_of(job), change.__name__
    assert not (tmp_path / "owned").exists()


def test_large_dataset_is_refused(onnx_model, clips):
    with FaultyHub(max_dataset_bytes=1000) as hub, pytest.raises(UserError, match="the limit is 1,000"):
        client_of(hub).upload_dataset({"video": clips})


# --- faults -----------------------------------------------------------------------------------------------------------


def test_http_errors(hub, client):
    for status, error, text in [
        (400, UserError, "ordered by a test"),
        (401, UserError, "Failed to authenticate"),
        (413, UserError, "ordered by a test"),
        (429, qai_hub.client.Error, "reported errors"),  # on a GET the client's own retries end like this
        (500, qai_hub.client.InternalError, "reported errors"),
        (503, qai_hub.client.InternalError, "unavailable"),
    ]:
        hub.faults[:] = [Fault("GET /api/v1/devices/", status=status, times=9)]
        with pytest.raises(error, match=text):
            client.get_devices()


def test_rate_limit_at_submission(hub, client, onnx_model, clips):
    model = compiled(client, onnx_model)
    hub.faults.append(Fault("POST /api/v1/jobs/", status=429, message="too many jobs", times=9))
    with pytest.raises(RateLimitedError, match="too many jobs"):
        client.submit_inference_job(model, DEVICE, {"video": clips}, profile=False, retry=False)


def test_a_fault_ends_after_its_times_and_starts_after_its_skip(hub, client):
    hub.faults.append(Fault("GET /api/v1/d*", status=400, skip=1, times=2))
    seen = []
    for _ in range(5):
        try:
            seen.append(bool(client.get_devices()))
        except UserError:
            seen.append(False)
    assert seen == [True, False, False, True, True]


def test_dropped_connections(hub, client, onnx_model, clips):
    """A submission whose answer is lost has made a job; the real client then submits once more."""
    model = compiled(client, onnx_model)
    dataset = client.upload_dataset({"video": clips})
    for drop, num_jobs in (("request", 0), ("answer", 2)):
        hub.jobs.clear()
        hub.faults[:] = [Fault("POST /api/v1/jobs/", drop=drop, times=9)]
        with pytest.raises(qai_hub.client.Error, match="connect"):
            client.submit_inference_job(model, DEVICE, dataset, profile=False)
        assert len(hub.jobs) == num_jobs


def test_interrupted_transfers_are_repeated_by_the_client(hub, client, onnx_model, clips, logits):
    hub.faults += [Fault("PUT /blob/*", drop="request"), Fault("POST /blob/*", status=503),
                   Fault("GET /blob/*", drop="answer")]
    np.testing.assert_allclose(inferred(client, compiled(client, onnx_model), clips), logits, atol=1e-5)
    assert not any(fault.times for fault in hub.faults), "every fault struck"


def test_delays(hub, client, onnx_model):
    hub.faults += [Fault("GET /api/v1/frameworks/", delay=0.5), Fault("compile", delay=1)]
    start = time.monotonic()
    client.get_frameworks()
    assert time.monotonic() - start > 0.4
    job = client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=BINARY)
    assert job.get_status().running
    assert job.wait().success


def test_failing_jobs(hub, client, onnx_model, clips):
    model = compiled(client, onnx_model)
    hub.faults.append(Fault("inference", fail=True, message="the device caught fire", skip=1))
    jobs = [client.submit_inference_job(model, DEVICE, {"video": clips}, profile=False) for _ in range(3)]
    assert [job.wait().success for job in jobs] == [True, False, True]
    assert "the device caught fire" in failure_of(jobs[1])
    assert jobs[1].download_output_data() is None
    assert [job.state for job in hub.jobs.values()] == ["done", "done", "failed", "done"]
    assert "the device caught fire" in hub.jobs[jobs[1].job_id].details.failure_reason


@pytest.mark.parametrize("status", [0, 400])
def test_direct_context_binary_can_be_refused(hub, client, onnx_model, status):
    """As a failed job, or at submission; a DLC still compiles and links."""
    hub.faults.append(Fault("compile", options="--target_runtime qnn_context_binary", status=status, fail=True,
                            message="use a link job", times=9))
    if status:
        with pytest.raises(UserError, match="use a link job"):
            client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=BINARY)
    else:
        job = client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=BINARY)
        assert "use a link job" in failure_of(job)
    dlc = compiled(client, onnx_model, "--target_runtime qnn_dlc")
    assert client.submit_link_job(dlc, DEVICE).wait().success


def test_a_binary_runs_with_the_version_that_made_it(onnx_model, clips):
    """Of QAIRT: jobs that name another, or none where the default is another, fail; so does a link job."""
    with FaultyHub(qairt_versions=["2.54", "2.52"]) as hub:
        client = client_of(hub)
        assert {f.api_version: list(f.api_tags) for f in client.get_frameworks() if f.name == "QAIRT"} == {
            "2.54": ["default", "latest"], "2.52": []
        }
        with pytest.raises(UserError, match="2.50 is not available; there are 2.54, 2.52"):
            client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=f"{BINARY} --qairt_version 2.50")
        model = compiled(client, onnx_model, f"{BINARY} --qairt_version 2.52")
        assert model.metadata[qai_hub.ModelMetadataKey.QAIRT_SDK_VERSION].startswith("2.52.")
        for inputs in ({"video": clips}, None):
            job = client.submit_inference_job(model, DEVICE, inputs, profile=inputs is None)
            assert "QNN_VERSION_MISMATCH: the binary was made with QAIRT 2.52, the job runs 2.54" in failure_of(job)
            options = dict(profile=inputs is None, options="--qairt_version 2.52")
            assert client.submit_inference_job(model, DEVICE, inputs, **options).wait().success
        dlc = compiled(client, onnx_model, "--target_runtime qnn_dlc --qairt_version 2.52")
        assert "QNN_VERSION_MISMATCH" in failure_of(client.submit_link_job(dlc, DEVICE))
        inferred(client, dlc, clips)


def test_more_requests_than_are_allowed():
    with FaultyHub(max_requests=3) as hub:
        status = [
            requests.get(f"{hub.url}/api/v1/devices/", headers={"Authorization": f"token {hub.token}"}).status_code
            for _ in range(4)
        ]
        assert status == [200, 200, 429, 429]


def test_data_of_finished_jobs_is_deleted(onnx_model, clips):
    """When the next dataset comes: what is in flight is there, what was used has expired, results stay."""
    with FaultyHub(keep_data=False) as hub:
        client = client_of(hub)
        model, jobs = compiled(client, onnx_model), []
        for _ in range(3):
            jobs.append(client.submit_inference_job(model, DEVICE, {"video": clips}, profile=False))
        inputs = [hub.datasets[job.inputs.dataset_id] for job in jobs]
        assert [record.path is not None for record in inputs] == [False, False, True]
        assert len(list(hub.folder.glob("d*.h5"))) == 1 + 3
        assert client.get_dataset(jobs[0].inputs.dataset_id).is_expired() and len(jobs[0].download_output_data()) == 1


def test_samples_by_size_and_silent_failures(onnx_model, clips):
    """Ways of a device: bytes of the right number run in the wrong order; what is refused may say nothing."""
    with FaultyHub(quirks=("by size", "silent")) as hub:
        client = client_of(hub)
        model = compiled(client, onnx_model)
        assert inferred(client, model, channel_last(clips)).shape == (len(clips), CLASSES)
        job = client.submit_inference_job(model, DEVICE, {"video": [clip[:, :, :2] for clip in clips]}, profile=False)
        assert not failure_of(job)


def test_failure_reaches_the_jobs_that_need_the_model(hub, client, onnx_model, clips):
    hub.faults.append(Fault("compile", fail=True, delay=0.5))
    job = client.submit_compile_job(onnx_model, DEVICE, input_specs=SPECS, options=BINARY)
    run = client.submit_inference_job(job.get_target_model(), DEVICE, {"video": clips}, profile=False)
    assert f"compile job {job.job_id}" in failure_of(run)


def test_bad_outputs(hub, client, onnx_model, clips):
    model = compiled(client, onnx_model)

    def run(outputs):
        hub.faults.append(Fault("inference", outputs=outputs))
        job = client.submit_inference_job(model, DEVICE, {"video": clips}, profile=False)
        assert job.wait().success
        return job.download_output_data()

    assert run("missing") is None
    assert len(run("short")["class_probs"]) == len(clips) - 1
    assert run("shape")["class_probs"][0].shape == (1, CLASSES - 1)
    with pytest.raises(UserError, match="expired"):
        run("expired")


def test_expired_datasets(hub, client, onnx_model, clips):
    model = compiled(client, onnx_model)
    dataset = client.upload_dataset({"video": clips})
    hub.expire_dataset(dataset.dataset_id)
    assert client.get_dataset(dataset.dataset_id).is_expired()
    with pytest.raises(UserError, match=f"{dataset.dataset_id} has expired"):
        client.submit_inference_job(model, DEVICE, dataset, profile=False)
    hub.faults.append(Fault("dataset"))
    assert client.upload_dataset({"video": clips}).is_expired()
    assert not client.upload_dataset({"video": clips}).is_expired()


# --- the server and the command line ----------------------------------------------------------------------------------


def test_loopback_only_and_nothing_left_behind():
    with FaultyHub() as hub:
        assert hub.socket.getsockname()[0] == "127.0.0.1"
        assert hub.folder.is_dir()
    assert not hub.folder.exists()


def test_errors_of_the_hub_itself_are_one_line_each(hub, client, onnx_model, capfd, monkeypatch):
    model = client.upload_model(onnx_model)
    assert requests.get(
        f"{hub.url}/api/v1/models/{model.model_id}/multipart_upload/", headers={"Authorization": f"token {hub.token}"}
    ).status_code == 500  # it lacks file_size
    monkeypatch.setitem(RUNNERS, "compile", (lambda hub, job: 1 / 0, pb.JOB_STATE_OPTIMIZING_MODEL))
    assert "cannot run this job" in failure_of(client.submit_compile_job(model, DEVICE, options=BINARY))
    of_request, of_job = capfd.readouterr().err.splitlines()
    assert "KeyError" in of_request and "routes.py:" in of_request
    assert "ZeroDivisionError" in of_job and "compile job" in of_job


SCRIPT = """
import os, sys
print("arguments", sys.argv[1:])
import qai_hub
print(len(qai_hub.get_devices()), "devices")
print(os.environ["QAIHUB_CLIENT_INI"])
sys.exit(3)
"""


def test_command_runs_against_the_hub(run_script, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run_script("tools/local_hub.py", "python", "script.py", "--help", "-x", code=3)
    arguments, devices, client_ini = result.stdout.splitlines()
    assert (arguments, devices) == ("arguments ['--help', '-x']", "2 devices")
    assert not os.path.exists(client_ini)
    assert "emulated on the CPU" in result.stderr and len(result.stderr.splitlines()) == 1


PROFILE = """
import io, qai_hub, torch
file = io.BytesIO()
torch.onnx.export(torch.nn.Conv3d(3, 8, 3), (torch.zeros(1, 3, 4, 8, 10),), file, dynamo=False)
open("model.onnx", "wb").write(file.getvalue())
device = qai_hub.Device("Samsung Galaxy S25")
print([f.api_version for f in qai_hub.get_frameworks() if f.name == "QAIRT"])
job = qai_hub.submit_compile_job("model.onnx", device, options="--target_runtime qnn_dlc")
job = qai_hub.submit_inference_job(job.get_target_model(), device)
assert job.wait().success, job.get_status()
"""


def test_behind_a_proxy_without_the_module_resource_and_with_other_versions(run_script, tmp_path):
    """A proxy that is not there, as in many companies; no `resource`, as on Windows; flags before the command."""
    (tmp_path / "script.py").write_text(PROFILE)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['resource'] = None\n")
    dead = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    flags = ("--qairt-versions", "2.54 2.52")
    result = run_script("tools/local_hub.py", *flags, "python", "script.py", PYTHONPATH=tmp_path, **dead, NO_PROXY="",
                        no_proxy="")  # fmt: skip
    assert "['2.54', '2.52']" in result.stdout


TWO_EXPORTED_PROGRAMS = """
import qai_hub, torch
program = torch.export.export(torch.nn.Conv3d(3, 8, 3), (torch.zeros(1, 3, 4, 8, 10),))
for _ in range(2):
    job = qai_hub.submit_compile_job(program, qai_hub.Device("Samsung Galaxy S25"), options="--target_runtime qnn_dlc")
    assert job.wait().success
"""


def test_a_hub_alone_compiles_several_exported_programs(run_script, tmp_path):
    """Loading them in threads that end crashed the hub's process, unless its main thread had used torch before."""
    (tmp_path / "script.py").write_text(TWO_EXPORTED_PROGRAMS)
    run_script("tools/local_hub.py", "python", "script.py")


def test_usage(run_script):
    assert "python tools/local_hub.py" in run_script("tools/local_hub.py", "--help").stdout
    assert "cannot run no-such-command" in run_script("tools/local_hub.py", "no-such-command", code=2).stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_stopped(stop):
    command = [sys.executable, str(REPO / "tools/local_hub.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        printed = process.stdout.readline().strip()
        assert "export NO_PROXY=127.0.0.1,localhost" in printed
        client_ini = printed.partition("QAIHUB_CLIENT_INI=")[2]
        code = "import qai_hub; print(qai_hub.get_devices()[0].name)"
        environment = os.environ | {"QAIHUB_CLIENT_INI": client_ini}
        output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
        process.send_signal(stop)
        assert process.wait(20) == 0
        assert (output.strip(), os.path.exists(client_ini)) == (DEVICE.name, False)
        assert "Traceback" not in process.stderr.read()
