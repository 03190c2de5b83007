"""run_inference.py against a local hub in this process: layouts, types, chunks, resuming, failures of the service."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import onnx
import pytest
from qai_hub import public_api_pb2 as pb
from qai_hub.util.dataset_entries_converters import h5_to_dataset_entries

import run_inference
from conftest import REPO
from faulty_hub import Fault, FaultyHub
from hub_server import routes
from small_models import (
    DEVICE,
    compile_and_save,
    compile_binary,
    expected_logits,
    hasty_client,
    read_h5,
    small_onnx,
    write_clips,
)

SCRIPT = "tools/run_inference.py"


@pytest.fixture
def hub():
    with FaultyHub() as hub:
        yield hub


@pytest.fixture
def place(tmp_path, hub):
    """12 clips of 8 frames under tmp_path/clips and a float NTHWC binary for them."""
    place = Place(tmp_path, hub)
    place.paths = write_clips(tmp_path / "clips", 12)
    compile_binary(hub, tmp_path / "model.bin", channel_last=True)
    place.forget_setup()
    return place


class Place:
    """Where a run happens, its command line, and what the hub recorded since the set-up."""

    def __init__(self, folder, hub):
        self.folder, self.hub = folder, hub
        self.environment = {"QAIHUB_CLIENT_INI": str(hub.write_client_ini(folder / "client.ini"))}

    def forget_setup(self):
        self.hub.requests.clear()
        self.old_jobs = set(self.hub.jobs)

    def flags(self, *more):
        paths = ("--dlc-path", "model.bin", "--data-path", "clips", "--output-h5", "out.h5")
        return [str(part) for part in (*paths, *more)]

    def jobs(self, kind="inference"):
        return [job for key, job in self.hub.jobs.items() if key not in self.old_jobs and job.kind == kind]

    def uploads(self):
        return sum(method == "POST" and path == "/api/v1/datasets/" for method, path in self.hub.requests)

    def check_output(self):
        """Every clip exactly once, in the manifest's order, with torch's logits."""
        logits, paths = read_h5(self.folder / "out.h5")
        assert paths == self.paths
        np.testing.assert_allclose(logits, expected_logits(self.folder / "clips", paths), atol=1e-4)
        assert not (self.folder / "out.h5.state").exists()


# --- right numbers ----------------------------------------------------------------------------------------------------


def test_chunks_order_and_form_of_the_output(place, run_script):
    """5 + 5 + 2 clips, not profiled, in the manifest's order; the file can be read by the client's own reader."""
    result = run_script(SCRIPT, *place.flags("--max-chunk", 5), **place.environment)
    place.check_output()
    assert [job.num_samples for job in place.jobs()] == [5, 5, 2]
    assert not any(job.profiling for job in place.jobs())
    assert place.uploads() == 3
    with h5py.File(place.folder / "out.h5") as file:
        entries = h5_to_dataset_entries(file)
        assert json.loads(file.attrs["job_ids"]) == [job.id for job in place.jobs()]
        assert (file.attrs["output_kind"], file.attrs["model"]) == ("logits", "model.bin")
        assert file["data/0/batch_0"].compression is None, "gzip makes a file of small rows four times as large"
    assert list(entries) == ["logits"] and len(entries["logits"]) == 12
    assert place.hub.token not in result.stdout + result.stderr
    again = run_script(SCRIPT, *place.flags("--max-chunk", 5), **place.environment)
    assert "complete" in again.stdout and len(place.jobs()) == 3, "a finished run must not be repeated"


@pytest.mark.parametrize("w8a8", [False, True], ids=["float", "w8a8"])
@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize("channel_last", [False, True], ids=["NCTHW", "NTHWC"])
def test_table_of_layouts_and_types(tmp_path, hub, run_script, channel_last, frames, w8a8):
    """Right logits for clips that fit the binary, a refusal before any upload for clips with another T."""
    place = Place(tmp_path, hub)
    paths = write_clips(tmp_path / "clips", 6, frames)
    calibration = [np.load(tmp_path / "clips" / path) for path in paths]
    compile_binary(hub, tmp_path / "model.bin", frames, channel_last, w8a8, calibration)
    place.forget_setup()
    run_script(SCRIPT, *place.flags("--t", 16), **place.environment)
    logits, written = read_h5(tmp_path / "out.h5")
    expected = expected_logits(tmp_path / "clips", paths, frames)
    assert written == paths
    (dataset,) = {job.dataset_id for job in place.jobs()}
    with h5py.File(hub.datasets[dataset].path) as file:
        clip = file["data/0/batch_0"]
        assert clip.shape == ((1, frames, 16, 16, 3) if channel_last else (1, 3, frames, 16, 16))
        assert clip.dtype == (np.uint8 if w8a8 else np.float32)
    tolerance = 0.1 * np.abs(expected).max() if w8a8 else 1e-4
    np.testing.assert_allclose(logits, expected, atol=tolerance)

    write_clips(tmp_path / "clips", 6, 24 - frames)
    (tmp_path / "out.h5").unlink()
    place.forget_setup()
    refused = run_script(SCRIPT, *place.flags(), code=2, **place.environment)
    assert f"(1, 3, {24 - frames}, 16, 16)" in refused.stderr and not hub.requests
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize("w8a8", [False, True], ids=["float", "w8a8"])
@pytest.mark.parametrize("runtime", ["onnx", "precompiled_qnn_onnx", "qnn_dlc", "tflite"])
def test_models_of_every_runtime(tmp_path, hub, run_script, runtime, w8a8):
    """What example_export.py saves for the other runtimes runs as it is, an ONNX model with a second file, too."""
    place = Place(tmp_path, hub)
    place.paths = write_clips(tmp_path / "clips", 6)
    calibration = [np.load(tmp_path / "clips" / path) for path in place.paths]
    model = compile_and_save(hub, tmp_path, runtime, channel_last=runtime != "onnx", w8a8=w8a8, calibration=calibration)
    assert model.is_dir() == (runtime == "precompiled_qnn_onnx")
    place.forget_setup()
    run_script(SCRIPT, *place.flags("--dlc-path", model), **place.environment)
    assert not place.jobs("compile"), "a compiled model was compiled again"
    logits, written = read_h5(tmp_path / "out.h5")
    expected = expected_logits(tmp_path / "clips", written)
    assert written == place.paths
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max() if w8a8 else 1e-4)


def test_onnx_source_is_compiled_first(place, run_script):
    """Option B, in the layout of the file; where the direct way is refused, a DLC is made and linked."""
    onnx.save(small_onnx(channel_last=True, name="another_name"), place.folder / "model.onnx")
    place.hub.faults.append(Fault("compile", fail=True, message="no such runtime", options="qnn_context_binary"))
    flags = ("--dlc-path", "", "--onnx-dir", ".", "--t", 8, "--h", 16, "--w", 16)
    result = run_script(SCRIPT, *place.flags(*flags), **place.environment)
    place.check_output()
    compile_options = [job.options for job in place.jobs("compile")]
    assert compile_options == ["--target_runtime qnn_context_binary", "--target_runtime qnn_dlc"]
    assert len(place.jobs("link")) == 1 and "no such runtime" in result.stdout


def test_onnx_weights_in_a_second_file_belong_to_the_run(place, run_script):
    """They travel along; other weights under the same model.onnx are another run; wrong clips are refused first."""
    flags = place.flags("--dlc-path", "", "--onnx-dir", ".", "--t", 8, "--h", 16, "--w", 16)
    model, logits = small_onnx(), []
    for scale in (1, 2):
        for weight in model.graph.initializer:
            weight.CopyFrom(onnx.numpy_helper.from_array(scale * onnx.numpy_helper.to_array(weight), weight.name))
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        (place.folder / "w.data").unlink(missing_ok=True)  # onnx would append, and so change the offsets in model.onnx
        onnx.save(copy, place.folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
        assert "complete" not in run_script(SCRIPT, *flags, **place.environment).stdout
        logits.append(read_h5(place.folder / "out.h5")[0])
    np.testing.assert_allclose(logits[0], expected_logits(place.folder / "clips", place.paths), atol=1e-4)
    assert np.abs(logits[1] - logits[0]).max() > 0.1
    np.save(place.folder / "clips" / place.paths[3], np.zeros((1, 3, 16, 16, 16), np.float32))
    place.forget_setup()
    assert place.paths[3] in run_script(SCRIPT, *flags, code=2, **place.environment).stderr
    assert not place.hub.requests


def test_chunks_in_flight(place, run_script):
    """Six chunks: three run together, never more."""
    place.hub.job_seconds = 0.4
    run_script(SCRIPT, *place.flags("--max-chunk", 2, "--chunks-in-flight", 3), **place.environment)
    place.check_output()
    in_flight = [0]
    for method, path in place.hub.requests:
        if (method, path) == ("POST", "/api/v1/jobs/"):
            in_flight.append(in_flight[-1] + 1)
        if path.endswith("/result/"):
            in_flight.append(in_flight[-1] - 1)
    assert (max(in_flight), in_flight[-1], len(place.jobs())) == (3, 0, 6), in_flight


def test_a_binary_that_nothing_describes(place, run_script):
    """The constants are all there is: the wrong layout is the service's refusal, the right one gives the logits."""
    compile_binary(place.hub, place.folder / "model.bin", channel_last=True, name="video")
    (place.folder / "model.json").unlink()
    place.forget_setup()
    shape = ("--t", 8, "--h", 16, "--w", 16, "--attempts", 1)
    refused = run_script(SCRIPT, *place.flags(*shape), code=1, **place.environment)
    assert "float32 (1, 3, 8, 16, 16)" in refused.stdout and not (place.folder / "out.h5").exists()
    assert "expects video (1, 8, 16, 16, 3)" in refused.stdout, f"refused for another reason: {refused.stdout}"
    run_script(SCRIPT, *place.flags(*shape, "--is-dlc-channel-last"), **place.environment)
    shutil.rmtree(place.folder / "out.h5.state")
    place.check_output()


def test_one_clip(place, run_script):
    """As the user's manual has it, with evaluate.py's defaults; neither a full result nor its chunks are lost."""
    run_script(SCRIPT, *place.flags("--use-single-tensor", "--single-tensor-index", 12), code=2, **place.environment)
    place.hub.faults.append(Fault("inference", fail=True, skip=1))
    full = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 1)
    run_script(SCRIPT, *full, code=1, **place.environment)
    one = place.flags("--use-single-tensor", "--single-tensor-index", 7)
    run_script(SCRIPT, *one, **place.environment)
    logits, paths = read_h5(place.folder / "out.h5")
    assert paths == [place.paths[7]] and logits.shape == (1, 4)
    classes = place.folder / "map.json"
    classes.write_text(json.dumps(dict(zip("abcd", range(4)))))
    flags = ("--h5", "out.h5", "--manifest", "clips/manifest.jsonl", "--class-map", classes, "--verbose")
    assert "one prediction (USE_SINGLE_TENSOR)" in run_script("tools/evaluate.py", *flags).stdout
    place.forget_setup()
    run_script(SCRIPT, *full, **place.environment)
    assert [job.num_samples for job in place.jobs()] == [6], "the chunk that had arrived was lost"
    place.check_output()
    refused = run_script(SCRIPT, *one, code=2, **place.environment)
    assert "--output-h5 out-single.h5" in refused.stderr
    place.check_output()


@pytest.mark.parametrize(("name", "content"), [
    ("model.json", "{broken"), ("model.json", "[1]"), ("model.json", '{"notes": "mine"}'),
    ("metadata.json", "{broken"), ("metadata.json", '{"model_files": {"model.bin": {"inputs": [], "outputs": 1}}}'),
])  # fmt: skip
def test_a_foreign_file_beside_the_model_is_ignored(tmp_path, capsys, name, content):
    (tmp_path / "model.bin").write_bytes(b"binary")
    (tmp_path / name).write_text(content)
    assert run_inference.read_description(tmp_path / "model.bin") == {}
    assert ("is ignored" in capsys.readouterr().out) == (name == "model.json")


def test_without_a_manifest_files_are_sorted(place, run_script):
    (place.folder / "clips/manifest.jsonl").unlink()
    result = run_script(SCRIPT, *place.flags(), **place.environment)
    assert "no manifest.jsonl" in result.stdout
    assert read_h5(place.folder / "out.h5")[1] == sorted(place.paths)


def test_chunks_are_limited_in_bytes(place, run_script):
    """A clip is 24,576 bytes as it is sent; 100,000 bytes hold four."""
    run_script(SCRIPT, *place.flags("--max-chunk-bytes", 100_000), **place.environment)
    assert [job.num_samples for job in place.jobs()] == [4, 4, 4]


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_refusals_before_any_upload(place, run_script):
    """Wrong constants and clips that are not what the model takes: exit 2, one sentence, nothing sent."""
    compile_binary(place.hub, place.folder / "first.bin", channel_last=False)
    place.forget_setup()

    def refused(*flags):
        result = run_script(SCRIPT, *place.flags(*flags), code=2, **place.environment)
        assert not any(method == "POST" for method, _ in place.hub.requests), "something was uploaded"
        return result.stderr.strip().splitlines()[-1]

    assert "IS_DLC_CHANNEL_LAST" in refused("--dlc-path", "first.bin", "--is-dlc-channel-last")
    assert "one of DLC_PATH" in refused("--onnx-dir", ".")
    assert "no model" in refused("--dlc-path", "missing.bin")
    assert "no device 'Toaster'" in refused("--device-name", "Toaster")
    (place.folder / "first.json").write_text((place.folder / "model.json").read_text())
    assert "describes another file" in refused("--dlc-path", "first.bin")
    description = json.loads((place.folder / "model.json").read_text())
    description["input"] |= {"dtype": "uint8", "scale": None, "zero_point": None}
    (place.folder / "integers.bin").write_bytes((place.folder / "model.bin").read_bytes())
    (place.folder / "integers.json").write_text(json.dumps(description))
    assert "clip: uint8 (1, 8, 16, 16, 3), NTHWC and does not say its scale" in refused("--dlc-path", "integers.bin")
    np.save(place.folder / "clips" / place.paths[3], np.zeros((1, 3, 8, 16, 17), np.float32))
    assert place.paths[3] in refused()


def test_normalised_clips_are_refused(place, run_script):
    np.save(place.folder / "clips" / place.paths[3], np.full((1, 3, 8, 16, 16), -1.5, np.float32))
    assert "instead of [0, 1]" in run_script(SCRIPT, *place.flags(), code=2, **place.environment).stderr
    assert not place.jobs()


def test_unreadable_clips_are_left_out_and_listed(place, run_script):
    """A cut-off and a missing file: the others arrive, exit code 1."""
    cut, missing = place.paths[2], place.paths[5]
    os.truncate(place.folder / "clips" / cut, 1000)
    (place.folder / "clips" / missing).unlink()
    result = run_script(SCRIPT, *place.flags(), code=1, **place.environment)
    assert cut in result.stdout and missing in result.stdout and "2 clips left out" in result.stdout
    place.paths = [path for path in place.paths if path not in (cut, missing)]
    place.check_output()
    again = run_script(SCRIPT, *place.flags(), code=1, **place.environment)
    assert "is complete" not in again.stdout and "2 clips left out" in again.stdout


# --- failures of the service ------------------------------------------------------------------------------------------


def test_service_errors_are_waited_out(place, run_script):
    """503 twice for a submission, 429 once for an upload: the client tries again, every clip arrives exactly once."""
    place.hub.faults += [
        Fault("POST /api/v1/jobs/", status=503, times=2),
        Fault("POST /api/v1/datasets/", status=429, skip=1),
    ]
    run_script(SCRIPT, *place.flags("--max-chunk", 6), **place.environment)
    place.check_output()
    assert not any(fault.times for fault in place.hub.faults) and len(place.jobs()) == 2


def test_failed_and_empty_and_wrong_results_are_repeated(place, run_script):
    """A failed job, no outputs, one too few, a wrong shape, expired outputs: the job runs again, nothing is resent."""
    place.hub.faults += [Fault("inference", fail=True, message="the device caught fire")]
    place.hub.faults += [Fault("inference", outputs=kind) for kind in ("missing", "short", "shape", "expired")]
    flags = place.flags("--max-chunk", 3, "--retry-seconds", 0.1)
    result = run_script(SCRIPT, *flags, **place.environment)
    place.check_output()
    for words in ("caught fire (local hub); see http", "no outputs", "2 outputs", "(1, 3)", "expired"):
        assert words in result.stdout, f"{words!r} was not reported:\n{result.stdout}"
    assert (place.uploads(), len(place.jobs())) == (4, 9)


def test_a_chunk_that_keeps_failing_is_named_and_the_rest_kept(place, run_script):
    """k tries, exit 1, no HDF5 file; the second run repeats that chunk only and uploads nothing."""
    place.hub.faults.append(Fault("inference", fail=True, message="out of memory", skip=1, times=2))
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 2, "--retry-seconds", 0.1)
    result = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert "chunk 1 failed 2 times (6 clips" in result.stdout, result.stdout
    assert "out of memory (local hub); see http" in result.stdout, result.stdout
    assert not (place.folder / "out.h5").exists()
    place.forget_setup()
    run_script(SCRIPT, *flags, **place.environment)
    assert (len(place.jobs()), place.uploads()) == (1, 0)
    place.check_output()


@pytest.mark.parametrize(("fault", "words"), [
    ({"drop": "request"}, "Could not connect to Qualcomm AI Hub"), ({"status": 500}, "Qualcomm AI Hub reported errors"),
    ({"status": 503}, "unavailable right now"), ({"status": 429}, "Could not create a job after retrying for 10 min"),
    ({"status": 404}, "ordered by a test"),
], ids=["dropped", "500", "503", "429", "404"])  # fmt: skip
def test_a_service_that_stays_down(place, run_script, fault, words):
    """Exit 1 with one sentence; what had arrived is kept and not sent again."""
    fault = Fault("POST /api/v1/jobs/", skip=1, times=10**6, **fault)
    place.hub.faults.append(fault)
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 2, "--retry-seconds", 0.1)
    result = run_script(SCRIPT, *flags, code=1, **place.environment, **hasty_client(place.folder))
    last = result.stderr.splitlines()[-1]
    assert words in last and "run the same command again" in last and "Traceback" not in result.stderr
    fault.times = 0
    run_script(SCRIPT, *flags, **place.environment)
    assert (place.uploads(), len(place.jobs())) == (2, 2)
    place.check_output()


def test_the_connection_is_lost_while_jobs_run(place, run_script):
    """Nothing answers any more: one sentence with a job's URL; the second run takes the jobs up, nothing is resent."""
    flags = place.flags("--max-chunk", 2, "--chunks-in-flight", 6, "--attempts", 1)
    place.hub.job_seconds = 0.3
    place.hub.faults.append(Fault("inference", delay=3, skip=1, times=5))
    process, *_ = start_and_wait(place, flags, 1, stderr=subprocess.PIPE, text=True)
    outage = Fault("*", drop="request", times=10**6)
    place.hub.faults.append(outage)
    errors = process.communicate(timeout=120)[1]
    last = errors.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors and not (place.folder / "out.h5").exists()
    assert last.startswith("error: chunk ") and f"{place.hub.url}/jobs/j" in last and "same command again" in last
    outage.times = 0
    run_script(SCRIPT, *flags, **place.environment)
    assert (place.uploads(), len(place.jobs())) == (6, 6)
    place.check_output()


def test_a_bad_token_is_refused_and_never_shown(place, run_script):
    place.hub.write_client_ini(place.folder / "client.ini", token="S3CRET-T0KEN")
    result = run_script(SCRIPT, *place.flags(), code=2, **place.environment)
    assert "does not accept the token" in result.stderr and "S3CRET" not in result.stdout + result.stderr
    good = (place.folder / "client.ini").read_text()
    percent, two_lines = good.replace("S3CRET", "S3CRET%"), good.replace("T0KEN", "T0KEN\n S3CRET")
    for damaged in (f"{good}S3CRET-T0KEN\n", percent, two_lines):
        (place.folder / "client.ini").write_text(damaged)
        result = run_script(SCRIPT, *place.flags(), code=2, **place.environment)
        assert "client.ini" in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr, damaged
        assert "S3CRET" not in result.stdout + result.stderr
    written = [path for path in place.folder.rglob("*") if path.is_file() and path.name != "client.ini"]
    assert not any(b"S3CRET" in path.read_bytes() for path in written)


@pytest.mark.parametrize("where", ["POST /api/v1/models/", "GET /api/v1/devices/"])
def test_a_refused_request_is_one_sentence(place, run_script, where):
    place.hub.faults.append(Fault(where, status=404, message="gone for good", times=99))
    result = run_script(SCRIPT, *place.flags(), code=1, **place.environment)
    assert "gone for good" in result.stderr and "Traceback" not in result.stderr


# --- resuming ---------------------------------------------------------------------------------------------------------


def start_and_wait(place, flags, arrived, **options):
    """Start the script and wait until `arrived` chunks are there while others run.

    Returns (process, state of the chunks by number, numbers that arrived, numbers whose job was running).
    """
    environment = os.environ | place.environment | hasty_client(place.folder)
    process = subprocess.Popen([sys.executable, REPO / SCRIPT, *flags], cwd=place.folder, env=environment, **options)
    deadline = time.monotonic() + 120
    done, unfinished = set(), []
    while len(done) < arrived or not unfinished:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
        done = {int(path.stem[6:]) for path in place.folder.glob("out.h5.state/*/chunk_*.npy")}
        states = list(place.folder.glob("out.h5.state/*/state.json"))
        chunks = json.loads(states[0].read_text())["chunks"] if states else {}
        unfinished = [int(i) for i, chunk in chunks.items() if chunk["job"] and int(i) not in done]
    return process, chunks, done, unfinished


def start_and_kill(place, flags, arrived):
    """SIGKILL it then; returns what `start_and_wait` does, but for the process."""
    process, *found = start_and_wait(place, flags, arrived)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place.folder / "out.h5").exists()
    return found


def test_killed_and_started_again(place, run_script):
    """Running jobs are taken up again; expired datasets and unknown jobs are replaced; nothing else is sent twice."""
    flags = place.flags("--max-chunk", 2, "--chunks-in-flight", 2)
    place.hub.job_seconds = 0.7
    chunks, arrived, unfinished = start_and_kill(place, flags, 2)
    lost = chunks[str(unfinished[0])]
    time.sleep(1)
    del place.hub.jobs[lost["job"]]
    place.hub.expire_dataset(lost["dataset"])
    before = {job.id for job in place.jobs()}
    place.hub.requests.clear()
    result = run_script(SCRIPT, *flags, **place.environment)
    place.check_output()
    assert f"no longer has {lost['job']}" in result.stdout and f"no longer has {lost['dataset']}" in result.stdout
    new = [job for job in place.jobs() if job.id not in before]
    expected = 6 - len(arrived) - len(unfinished) + 1
    assert (len(new), place.uploads()) == (expected, expected)
    assert not any(path == "/api/v1/models/" for method, path in place.hub.requests if method == "POST")


def test_killed_and_resumed_on_a_hub_that_knows_nothing(place, run_script):
    """A fresh local hub: what had arrived stays, the rest goes there again."""
    flags = place.flags("--max-chunk", 2, "--chunks-in-flight", 2)
    place.hub.job_seconds = 0.5
    _, arrived, _ = start_and_kill(place, flags, 2)
    with FaultyHub() as fresh:
        fresh.write_client_ini(place.folder / "client.ini")
        result = run_script(SCRIPT, *flags, **place.environment)
        assert len(fresh.jobs) == 6 - len(arrived) and "no longer has" in result.stdout
    place.check_output()


def test_another_model_starts_afresh(place, run_script):
    place.hub.faults.append(Fault("inference", fail=True, skip=1))
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 1)
    run_script(SCRIPT, *flags, code=1, **place.environment)
    compile_binary(place.hub, place.folder / "model.bin", channel_last=False)
    result = run_script(SCRIPT, *flags, **place.environment)
    assert "also keeps 1 unfinished for another model" in result.stdout
    assert len(list(place.folder.glob("out.h5.state/*/chunk_*.npy"))) == 1, "another run's chunk was deleted"
    shutil.rmtree(place.folder / "out.h5.state")
    place.check_output()


def test_a_clip_that_becomes_readable_moves_no_other(place, run_script):
    """Same size and time, as after a lost mount: the chunks are cut anew, no prediction lands on another clip."""
    path = place.folder / "clips" / place.paths[1]
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=times)
    place.hub.faults.append(Fault("inference", fail=True, skip=1))
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 1)
    run_script(SCRIPT, *flags, code=1, **place.environment)
    path.write_bytes(content)
    os.utime(path, ns=times)
    run_script(SCRIPT, *flags, **place.environment)
    shutil.rmtree(place.folder / "out.h5.state")
    place.check_output()


def test_another_hub_is_another_run(place, run_script, monkeypatch):
    """An ONNX file that ran emulated runs again on a device that is not; the file says which it was."""
    onnx.save(small_onnx(), place.folder / "model.onnx")
    flags = place.flags("--dlc-path", "", "--onnx-dir", ".", "--t", 8, "--h", 16, "--w", 16)
    names = []
    for emulated in (True, False):
        if not emulated:
            device = pb.Device()
            device.CopyFrom(routes.DEVICES[0])
            device.attributes.remove("emulated:cpu")
            monkeypatch.setattr(routes, "DEVICES", [device])
        assert "complete" not in run_script(SCRIPT, *flags, **place.environment).stdout
        with h5py.File(place.folder / "out.h5") as file:
            names.append(file.attrs["device"])
            assert "output_kind" not in file.attrs, "nothing says what this model's outputs are"
    assert names == [f"{DEVICE} (emulated on a CPU)", DEVICE] and len(place.jobs()) == 2


def test_what_is_said_of_the_model_belongs_to_the_run(place, run_script):
    """A corrected description or another IS_DLC_CHANNEL_LAST: the same binary runs again."""
    run_script(SCRIPT, *place.flags(), **place.environment)
    run_script(SCRIPT, *place.flags("--is-dlc-channel-last"), **place.environment)
    description = json.loads((place.folder / "model.json").read_text())
    (place.folder / "model.json").write_text(json.dumps(description | {"classes": list("abcd")}))
    run_script(SCRIPT, *place.flags("--is-dlc-channel-last"), **place.environment)
    assert len(place.jobs()) == 3
    with h5py.File(place.folder / "out.h5") as file:
        assert json.loads(file.attrs["classes"]) == list("abcd")
