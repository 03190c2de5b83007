"""compile_and_profile.py against a local hub in this process."""

import zipfile
from argparse import Namespace

import numpy as np
import onnx
import pytest
import qai_hub
from onnx import TensorProto, helper

from aihub import onnx_graphs, service
from faulty_hub import Fault, FaultyHub, devices_of_ai_hub
from hub_server import routes
from small_models import DEVICE, client_of, hasty_client, small_onnx, write_clips

pytestmark = pytest.mark.quick

SCRIPT = "tools/compile_and_profile.py"
SHAPE = ("--t", 8, "--h", 16, "--w", 16)


@pytest.fixture
def hub(tmp_path):
    with FaultyHub() as hub:
        hub.write_client_ini(tmp_path / "client.ini")
        yield hub


@pytest.fixture
def run(run_script, tmp_path, hub):
    return lambda *flags, **more: run_script(SCRIPT, *flags, QAIHUB_CLIENT_INI=tmp_path / "client.ini", **more)


def uploads(hub):
    return hub.requests.count(("POST", "/api/v1/models/"))


def test_where_a_job_is_seen():
    """At AI Hub on its page; the local hub has none, and its address means nothing when it has ended."""
    at_ai_hub = Namespace(url="https://workbench.aihub.qualcomm.com/jobs/jabc123/")
    assert service.page_of(at_ai_hub) == at_ai_hub.url
    for host in "127.0.0.1:41955", "localhost:1":
        assert service.page_of(Namespace(url=f"http://{host}/jobs/jabc123/")) == "jabc123 (local hub)"


@pytest.mark.parametrize("channel_last", [False, True], ids=["NCTHW", "NTHWC"])
def test_compiles_as_the_seed_says_and_profiles(tmp_path, hub, run, channel_last):
    """One compile job to a QNN context binary in the file's own layout, one profile job; latency is reported."""
    onnx.save(small_onnx(channel_last=channel_last, name="any_name"), tmp_path / "model.onnx")
    result = run(*SHAPE)
    compile_job, profile_job = hub.jobs.values()
    assert (compile_job.kind, compile_job.options) == ("compile", "--target_runtime qnn_context_binary")
    assert (profile_job.kind, profile_job.profiling) == ("profile", True)
    assert uploads(hub) == 1
    shape = "(1, 8, 16, 16, 3), NTHWC" if channel_last else "(1, 3, 8, 16, 16), NCTHW"
    assert result.stdout.count(f"any_name: float32 {shape}") == 2, result.stdout
    assert "latency" in result.stdout and "layers    CPU" in result.stdout and compile_job.id in result.stdout


def test_weights_in_a_second_file_travel_along(tmp_path, hub, run):
    weights = {"save_as_external_data": True, "location": "model.data", "size_threshold": 0}
    onnx.save(small_onnx(), tmp_path / "model.onnx", **weights)
    run(*SHAPE)
    assert [job.state for job in hub.jobs.values()] == ["done", "done"]


def test_options_and_a_chipset(tmp_path, hub, run):
    """They reach their jobs; a binary of another version than the default's is profiled with its own."""
    onnx.save(small_onnx(), tmp_path / "model.onnx")
    hub.faults.append(Fault("compile", status=400, message="use a DLC", options="qnn_context_binary"))
    flags = ("--chipset", "qualcomm-snapdragon-8-elite-for-galaxy", "--inference-options=--compute_unit npu",
             "--compile-options=--qairt_version 2.48", "--link-options=--qairt_version=2.48")  # fmt: skip
    run(*SHAPE, *flags)
    compiling, linking, profiling = hub.jobs.values()
    assert compiling.options == "--target_runtime qnn_dlc --qairt_version 2.48"
    assert linking.options == "--qairt_version=2.48" and profiling.details.device.name == "Samsung Galaxy S25"
    assert profiling.options == "--qairt_version 2.48 --compute_unit npu"
    assert "no device with the chipset 'abacus'" in run(*SHAPE, "--chipset", "abacus", code=2).stderr


def test_a_quantised_onnx_model_is_valid_and_the_way_for_it_is_named(tmp_path, hub, run):
    """As example_export.py --precision w8a8 --target-runtime onnx makes it, with --quantize_io at both compilations."""
    client, name = client_of(hub), "video"
    shape = (1, 3, 8, 16, 16)
    samples = {name: [np.random.default_rng(i).random(shape, dtype=np.float32) for i in range(4)]}
    options = "--target_runtime onnx --quantize_io"
    device, specs = qai_hub.Device(DEVICE), {name: (shape, "float32")}
    model = client.submit_compile_job(small_onnx(name=name), device, input_specs=specs, options=options)
    model = client.submit_quantize_job(model.get_target_model(), samples).get_target_model()
    model = client.submit_compile_job(model, device, input_specs=specs, options=options).get_target_model()
    with zipfile.ZipFile(model.download(str(tmp_path / "model"))) as archive:
        (path,) = archive.namelist()
        (tmp_path / "model.onnx").write_bytes(archive.read(path))
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert [entry.key for entry in onnx.load(tmp_path / "model.onnx").metadata_props].count("quantizers") == 1
    refused = run(*SHAPE, code=2).stderr
    assert "a quantised model is compiled by tools/example_export.py --precision w8a8" in refused


def test_own_onnx_in_integers_and_shared(tmp_path, hub, run, monkeypatch):
    """Quantised with clips of training videos; the hub's model takes stored values; AI Hub's compile job is shared."""
    onnx.save(small_onnx(), tmp_path / "model.onnx")
    flags = (*SHAPE, "--precision", "w8a8", "--num-calibration-clips", 8)
    assert "no manifest.jsonl in ./calibration_tensors" in run(*flags, code=2).stderr
    write_clips(tmp_path / "calibration_tensors", 12)
    flags += ("--share", "jury@example.org")
    assert "nobody else sees the jobs of a local hub" in run(*flags, code=2).stderr and not hub.jobs
    monkeypatch.setattr(routes, "DEVICES", devices_of_ai_hub())
    result = run(*flags)
    assert "calibrating with 8 clips of 4 classes" in result.stdout
    assert [job.kind for job in hub.jobs.values()] == ["compile", "quantize", "compile", "profile"]
    assert "clip: uint8 (1, 3, 8, 16, 16), NCTHW, scale" in result.stdout
    compiling = list(hub.jobs.values())[2]
    assert compiling.shared_with == ["jury@example.org"] and f"quote compile job {compiling.id}" in result.stdout
    assert "possible are float, w8a8, w8a16" in run(*SHAPE, "--precision", "int4", code=2).stderr


@pytest.mark.parametrize(("last", "kind"), [
    ("Softmax", "probabilities"), ("Identity", "logits"), ("Softmax Identity", "probabilities"),
    ("Softmax LogSoftmax", "logits"),
])  # fmt: skip
def test_whether_a_graph_gives_probabilities(last, kind):
    model = small_onnx()
    for number, operation in enumerate(last.split()):
        before = model.graph.output[0].name
        model.graph.node.append(helper.make_node(operation, [before], [f"out{number}"]))
        model.graph.output[0].name = f"out{number}"
    assert onnx_graphs.output_kind(model.graph) == kind


def test_falls_back_to_a_dlc_that_is_linked(tmp_path, hub, run):
    onnx.save(small_onnx(), tmp_path / "model.onnx")
    hub.faults.append(Fault("compile", status=400, message="use a DLC", options="qnn_context_binary"))
    result = run(*SHAPE)
    assert [job.kind for job in hub.jobs.values()] == ["compile", "link", "profile"] and uploads(hub) == 1
    assert "use a DLC" in result.stdout and "compiling to a DLC and linking" in result.stdout


def test_failed_jobs_are_reported(tmp_path, hub, run):
    """Message and URL of the job on stderr, exit code 1, no job after it."""
    onnx.save(small_onnx(), tmp_path / "model.onnx")
    hub.faults.append(Fault("compile", fail=True, message="op Foo is unknown", times=2))
    result = run(*SHAPE, code=1)
    last = list(hub.jobs.values())[-1]
    assert "op Foo is unknown" in result.stderr and last.id in result.stderr and len(hub.jobs) == 2


def test_the_connection_is_lost_while_a_job_runs(tmp_path, hub, run):
    """One sentence with the job; it is no reason to compile once more in another way."""
    onnx.save(small_onnx(), tmp_path / "model.onnx")
    hub.faults.append(Fault("GET /api/v1/jobs/*", drop="request", skip=1, times=10**6))
    result = run(*SHAPE, code=1, **hasty_client(tmp_path))
    (job,) = hub.jobs.values()
    line = result.stderr.splitlines()[-1]
    assert "Could not connect" in line and f"{job.id} (local hub)" in line and "Traceback" not in result.stderr


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, service.hub_errors_in_one_sentence():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err.startswith("\ninterrupted; jobs")


@pytest.mark.parametrize("storage", ["BotoCoreError", "ClientError"])
def test_errors_of_the_services_storage_are_one_sentence(capsys, storage):
    from botocore import exceptions

    arguments = ({"Error": {"Code": "SlowDown", "Message": "later"}}, "PutObject") if storage == "ClientError" else ()
    with pytest.raises(SystemExit) as stop, service.hub_errors_in_one_sentence():
        raise getattr(exceptions, storage)(*arguments)
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: AI Hub: An ")


@pytest.mark.parametrize(("microseconds", "words"), [
    (33_900, "33.90 ms on Dragonwing IQ-9075 EVK: meets the 34 ms"),
    (34_000, "34.00 ms on Dragonwing IQ-9075 EVK: MISSES the 34 ms"),
])  # fmt: skip
def test_the_gate_of_a_real_device(capsys, microseconds, words):
    layers = [{"name": "conv", "compute_unit": "NPU"}] * 3 + [{"name": "/fc/Softmax", "compute_unit": "CPU"}]
    summary = {"estimated_inference_time": microseconds, "inference_memory_peak_range": (1 << 20, 3 << 20)}
    profile = {"execution_summary": summary, "execution_detail": layers}
    device = Namespace(name=DEVICE, attributes=["chipset:qualcomm-qcs9075"])
    done = Namespace(finished=True, success=True)
    job = Namespace(download_profile=lambda: profile, get_status=lambda: done, url="https://a/j", job_type="profile")
    service.profile(Namespace(submit_inference_job=lambda *_, **__: job), device, None, "n", "")
    printed = capsys.readouterr().out
    assert words in printed and "1 to 3 MiB" in printed and "CPU 1, NPU 3" in printed
    assert "NOT ON THE NPU, which costs time: 1 of 4 layers: /fc/Softmax (CPU)" in printed


def write_onnx(path, shape=(1, 3, 8, 16, 16), elem_type=TensorProto.FLOAT, opset=17, inputs=1):
    values = [helper.make_tensor_value_info(f"x{i}", elem_type, shape) for i in range(inputs)]
    node = helper.make_node("Identity", ["x0"], ["y"])
    output = helper.make_tensor_value_info("y", elem_type, shape)
    graph = helper.make_graph([node], "g", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)


@pytest.mark.parametrize(("change", "words"), [
    ({"shape": (1, 3, 16, 16, 16)}, "has shape (1, 3, 16, 16, 16), but BATCH, C, T, H, W are (1, 3, 8, 16, 16)"),
    ({"shape": (1, 3, 16, 16)}, "has shape (1, 3, 16, 16)"),
    ({"elem_type": TensorProto.DOUBLE}, "is not float32"),
    ({"opset": 9}, "has opset 9"),
    ({"inputs": 2}, "x0, x1, y"),
    (None, "not a valid ONNX model"),
], ids=lambda value: "")  # fmt: skip
def test_files_that_do_not_fit_are_refused_before_upload(tmp_path, hub, run, change, words):
    if change is None:
        (tmp_path / "model.onnx").write_bytes(b"<html>not found</html>")
    else:
        write_onnx(tmp_path / "model.onnx", **change)
    assert words in run(*SHAPE, code=2).stderr
    assert not hub.requests


def test_no_file(tmp_path, run):
    refused = run("--onnx-dir", "nowhere", code=2).stderr
    assert "there is no ONNX file" in refused and f"looked in {tmp_path}/nowhere/model.onnx" in refused
