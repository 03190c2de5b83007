"""run_inference.py against a local hub in this process: layouts, types, chunks, resuming, failures of the service."""

import json
import os
import re
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

from aihub import description, model_io
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

pytestmark = pytest.mark.slow

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
        self.old_jobs, self.old_datasets = set(self.hub.jobs), set(self.hub.datasets)

    def flags(self, *more):
        paths = ("--dlc-path", "model.bin", "--data-path", "clips", "--output-h5", "out.h5")
        return [str(part) for part in (*paths, *more)]

    def jobs(self, kind="inference"):
        """Those of chunks, or of the other kinds; the jobs of one clip that go first are `probes`."""
        jobs = [job for key, job in self.hub.jobs.items() if key not in self.old_jobs and job.kind == kind]
        return [job for job in jobs if not job.details.name.endswith("probe")]

    def sent(self):
        """What reached the hub but questions."""
        return [request for request in self.hub.requests if request[0] != "GET"]

    def probes(self):
        jobs = [job for key, job in self.hub.jobs.items() if key not in self.old_jobs]
        return [job for job in jobs if job.details.name.endswith("probe")]

    def uploads(self):
        """How many datasets of chunks were uploaded."""
        new = [record for key, record in self.hub.datasets.items() if key not in self.old_datasets]
        return sum(record.path is not None and record.message.name.startswith("chunk") for record in new)

    def check_output(self):
        """Every clip exactly once, in the manifest's order, with torch's logits."""
        logits, paths = read_h5(self.folder / "out.h5")
        assert paths == self.paths
        np.testing.assert_allclose(logits, expected_logits(self.folder / "clips", paths), atol=1e-4)
        assert not (self.folder / "out.h5.state").exists()


# --- right numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
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


def test_a_drive_without_locks(place, run_script, without_locks):
    """Not even for the files that the client makes of a chunk."""
    run_script(SCRIPT, *place.flags("--max-chunk", 5), **place.environment, **without_locks(37))
    place.check_output()


@pytest.mark.parametrize("w8a8", [False, True], ids=["float", "w8a8"])
@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize("channel_last", [False, True], ids=["NCTHW", "NTHWC"])
def test_table_of_layouts_and_types(tmp_path, hub, run_script, channel_last, frames, w8a8):
    """Right logits for clips that fit the binary."""
    place = Place(tmp_path, hub)
    paths = write_clips(tmp_path / "clips", 6, frames)
    calibration = [np.load(tmp_path / "clips" / path) for path in paths]
    compile_binary(hub, tmp_path / "model.bin", frames, channel_last, w8a8, calibration)
    place.forget_setup()
    run_script(SCRIPT, *place.flags(), **place.environment)
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


def test_clips_without_numbers_are_named(place, run_script):
    """The first clip, which is probed, has numbers; of the others some have none: said, with exit code 1."""
    least = expected_logits(place.folder / "clips", place.paths).min(axis=1)
    limit = float(least[0] + least.min()) / 2  # the logarithm of what lies below is none
    model = small_onnx()
    graph, last = model.graph, model.graph.output[0].name
    graph.initializer.append(onnx.helper.make_tensor("limit", onnx.TensorProto.FLOAT, [1], [limit]))
    graph.node.append(onnx.helper.make_node("Sub", [last, "limit"], ["above"]))
    graph.node.append(onnx.helper.make_node("Log", ["above"], ["logarithm"]))
    graph.output[0].name = "logarithm"
    onnx.save(model, place.folder / "model.onnx")
    flags = place.flags("--dlc-path", "", "--onnx-dir", ".", "--t", 8, "--h", 16, "--w", 16)
    said = run_script(SCRIPT, *flags, code=1, **place.environment).stdout
    broken = [path for path, value in zip(place.paths, least) if value < limit]
    assert broken and f"no numbers (NaN or infinite) for {', '.join(broken)}\n" in said, said
    assert f"; {len(broken)} clips of them without numbers" in said


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
    assert not place.sent()


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


UNDESCRIBED = ("--t", 8, "--h", 16, "--w", 16)


@pytest.mark.parametrize("channel_last", [False, True], ids=["NCTHW", "NTHWC"])
def test_the_probe_tells_what_an_undescribed_binary_takes(place, run_script, channel_last):
    """Shapes are known once a job ran on it: one clip is sent in the wrong form, no chunk is."""
    compile_binary(place.hub, place.folder / "model.bin", channel_last=channel_last, name="frames")
    (place.folder / "model.json").unlink()
    place.forget_setup()
    result = run_script(SCRIPT, *place.flags(*UNDESCRIBED), **place.environment)
    shape = "(1, 8, 16, 16, 3), NTHWC" if channel_last else "(1, 3, 8, 16, 16), NCTHW"
    assert f"the probe says that the model takes frames: float32 {shape}" in result.stdout
    assert (len(place.probes()), len(place.jobs()), place.uploads()) == (2, 1, 1)
    place.check_output()
    assert "is complete" in run_script(SCRIPT, *place.flags(*UNDESCRIBED), **place.environment).stdout


def test_a_binary_of_which_nobody_says_the_layout_is_refused(tmp_path, run_script):
    """A device that takes any bytes of the right size would give logits of nonsense."""
    with FaultyHub(quirks=("no shapes", "by size")) as hub:
        place = Place(tmp_path, hub)
        place.paths = write_clips(tmp_path / "clips", 4)
        compile_binary(hub, tmp_path / "model.bin", channel_last=True, name="video")
        (tmp_path / "model.json").unlink()
        place.forget_setup()
        refused = run_script(SCRIPT, *place.flags(*UNDESCRIBED), code=2, **place.environment)
        assert "set LAYOUT to NCTHW or NTHWC" in refused.stderr and not place.jobs()
        run_script(SCRIPT, *place.flags(*UNDESCRIBED, "--layout", "NTHWC"), **place.environment)
        shutil.rmtree(tmp_path / "out.h5.state")
        place.check_output()


def test_one_clip(place, run_script):
    """As the user's manual has it, with evaluate.py's defaults; neither a full result nor its chunks are lost."""
    run_script(SCRIPT, *place.flags("--use-single-tensor", "--single-tensor-index", 12), code=2, **place.environment)
    place.hub.faults.append(Fault("inference", fail=True, skip=2))
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
    assert description.read_description(tmp_path / "model.bin") == {}
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
    assert "T is 16, but the model takes clip: float32 (1, 8, 16, 16, 3)" in refused("--t", 16)
    assert "H is 112, but the model takes" in refused("--t", 8, "--h", 112)
    (place.folder / "first.json").write_text((place.folder / "model.json").read_text())
    assert "describes another file" in refused("--dlc-path", "first.bin")
    description = json.loads((place.folder / "model.json").read_text())
    description["output"] |= {"dtype": "uint8", "scale": None, "zero_point": None}
    (place.folder / "integers.bin").write_bytes((place.folder / "model.bin").read_bytes())
    (place.folder / "integers.json").write_text(json.dumps(description))
    assert "logits: uint8 (1, 4) and does not say its scale" in refused("--dlc-path", "integers.bin")
    np.save(place.folder / "clips" / place.paths[3], np.zeros((1, 3, 8, 16, 17), np.float32))
    assert place.paths[3] in refused()
    write_clips(place.folder / "clips", 12, frames=16)
    assert "(1, 3, 16, 16, 16)" in refused() and not (place.folder / "out.h5").exists()


def test_clips_that_cannot_be_used_are_left_out_and_listed(place, run_script):
    """A cut-off file, a missing one, one out of range, one of no numbers: the others arrive, exit code 1."""
    cut, missing, normalised, nan = bad = place.paths[2], place.paths[5], place.paths[7], place.paths[11]
    clips = place.folder / "clips"
    whole = {path: (clips / path).read_bytes() for path in bad}
    os.truncate(clips / cut, 1000)
    (clips / missing).unlink()
    np.save(clips / normalised, np.full((1, 3, 8, 16, 16), -1.5, np.float32))
    np.save(clips / nan, np.full((1, 3, 8, 16, 16), np.nan, np.float32))
    flags, everything = place.flags("--max-chunk", 3), place.paths
    result = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert all(f"left out {path}: " in result.stdout for path in bad) and "4 clips left out" in result.stdout
    assert "-1.5 instead of [0, 1]" in result.stdout
    place.paths = [path for path in place.paths if path not in bad]
    place.check_output()
    place.forget_setup()
    again = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert "4 clips left out" in again.stdout and not place.jobs() and not place.uploads(), "something ran twice"
    (clips / normalised).write_bytes(whole[normalised])
    run_script(SCRIPT, *flags, code=1, **place.environment)
    assert [job.num_samples for job in place.jobs()] == [3], "one repaired clip repeats its own chunk"
    for path, content in whole.items():
        (clips / path).write_bytes(content)
    place.paths = everything
    run_script(SCRIPT, *flags, **place.environment)
    place.check_output()


def test_normalised_clips_are_refused(place, run_script):
    """All of them: then it is no damage but the wrong folder."""
    for path in place.paths:
        np.save(place.folder / "clips" / path, np.full((1, 3, 8, 16, 16), -1.5, np.float32))
    refused = run_script(SCRIPT, *place.flags(), code=2, **place.environment).stderr
    assert "none of the 12 clips" in refused and "instead of [0, 1]" in refused and not place.sent()


def test_a_file_name_that_is_not_utf8_is_refused_at_the_start(place, run_script):
    path = os.fsencode(place.folder / "clips/a") + b"/\xff.npy"
    shutil.copyfile(place.folder / "clips" / place.paths[0], path)
    (place.folder / "clips/manifest.jsonl").unlink()
    refused = run_script(SCRIPT, *place.flags(), code=2, **place.environment)
    assert "is not UTF-8" in refused.stderr and not place.sent()


# --- failures of the service ------------------------------------------------------------------------------------------


def test_service_errors_are_waited_out(place, run_script):
    """503 twice for a submission, 429 once for an upload: the client tries again, every clip arrives exactly once."""
    place.hub.faults += [
        Fault("POST /api/v1/jobs/", status=503, times=2),
        Fault("POST /api/v1/datasets/", status=429, skip=1),
        Fault("POST /api/v1/jobs/", status=429, skip=1),
    ]
    flags = place.flags("--max-chunk", 6, "--retry-seconds", 0.1)
    run_script(SCRIPT, *flags, **place.environment, **hasty_client(place.folder))
    place.check_output()
    assert not any(fault.times for fault in place.hub.faults) and len(place.jobs()) == 2


def test_failed_and_empty_and_wrong_results_are_repeated(place, run_script):
    """A failed job, no outputs, one too few, a wrong shape, expired outputs: the job runs again, nothing is resent."""
    place.hub.faults += [Fault("inference", fail=True, message="the device caught fire", skip=1)]
    place.hub.faults += [Fault("inference", outputs=kind, skip=1) for kind in ("missing", "short", "shape", "expired")]
    flags = place.flags("--max-chunk", 3, "--retry-seconds", 0.1)
    result = run_script(SCRIPT, *flags, **place.environment)
    place.check_output()
    for words in ("caught fire (local hub); see j", "no outputs", "2 outputs", "[3] values", "expired"):
        assert words in result.stdout, f"{words!r} was not reported:\n{result.stdout}"
    assert (place.uploads(), len(place.jobs())) == (4, 9)


def test_a_chunk_that_keeps_failing_is_named_and_the_rest_kept(place, run_script):
    """k tries, exit 1, no HDF5 file; the second run repeats that chunk only and uploads nothing."""
    place.hub.faults.append(Fault("inference", fail=True, message="out of memory", skip=2, times=2))
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 2, "--retry-seconds", 0.1)
    result = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert "chunk 1 failed 2 times (6 clips" in result.stdout, result.stdout
    assert "out of memory (local hub); see j" in result.stdout, result.stdout
    assert not (place.folder / "out.h5").exists()
    place.forget_setup()
    run_script(SCRIPT, *flags, **place.environment)
    assert (len(place.jobs()), place.uploads()) == (1, 0)
    place.check_output()


@pytest.mark.parametrize(("fault", "words"), [
    ({"drop": "request"}, "Could not connect to Qualcomm AI Hub"), ({"status": 500}, "Qualcomm AI Hub reported errors"),
    ({"status": 503}, "unavailable right now"), ({"status": 429}, "ordered by a test"),
    ({"status": 404}, "ordered by a test"),
], ids=["dropped", "500", "503", "429", "404"])  # fmt: skip
def test_a_service_that_stays_down(place, run_script, fault, words):
    """Exit 1 with one sentence; what had arrived is kept and not sent again."""
    fault = Fault("POST /api/v1/jobs/", skip=2, times=10**6, **fault)
    place.hub.faults.append(fault)
    patience = ("--retry-seconds", 0.1, "--patience-seconds", 0.5)
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, *patience)
    result = run_script(SCRIPT, *flags, code=1, **place.environment, **hasty_client(place.folder))
    last = result.stderr.splitlines()[-1]
    assert words in last and "run the same command again" in last and "Traceback" not in result.stderr
    fault.times = 0
    run_script(SCRIPT, *flags, **place.environment)
    assert (place.uploads(), len(place.jobs())) == (2, 2)
    place.check_output()


def test_the_connection_is_lost_while_jobs_run(place, run_script):
    """Nothing answers any more: one sentence with a job's URL; the second run takes the jobs up, nothing is resent."""
    flags = place.flags("--max-chunk", 2, "--chunks-in-flight", 6, "--retry-seconds", 0.1, "--patience-seconds", 0.5)
    place.hub.job_seconds = 0.3
    place.hub.faults.append(Fault("inference", delay=5, skip=2, times=5))
    process = start_and_wait(place, flags, 1, stderr=subprocess.PIPE, text=True)
    outage = Fault("*", drop="request", times=10**6)
    place.hub.faults.append(outage)
    errors = process.communicate(timeout=120)[1]
    last = errors.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors and not (place.folder / "out.h5").exists()
    assert last.startswith("error: chunk ") and re.search(r" j\w+ \(local hub\)", last) and "same command again" in last
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


def test_blips_with_answers_between_them_are_forgotten(place, run_script):
    """Twelve, at every kind of call, more than a chunk has tries; every clip arrives, nothing is sent twice."""
    place.hub.faults += [Fault("* /api/v1/jobs/*", status=503, skip=5, times=3) for _ in range(3)]
    place.hub.faults += [Fault("POST /api/v1/datasets/", status=429, skip=i) for i in range(3)]
    flags = place.flags("--max-chunk", 3, "--attempts", 1, "--retry-seconds", 0.05)
    run_script(SCRIPT, *flags, **place.environment, **hasty_client(place.folder))
    assert not any(fault.times for fault in place.hub.faults), "every fault struck"
    place.check_output()
    assert (len(place.jobs()), place.uploads()) == (4, 4)


def test_what_is_wrong_with_the_model_costs_one_small_job(place, run_script):
    """All jobs fail alike: one probe, no chunk; so do outputs of other sizes, of no numbers, of another model."""
    fault = Fault("inference", fail=True, message="cannot load the model", times=10**6)
    place.hub.faults.append(fault)
    flags = place.flags("--max-chunk", 1)
    result = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert "cannot load the model" in result.stderr
    assert (len(place.probes()), len(place.jobs()), place.uploads()) == (1, 0, 0)
    fault.times = 0
    place.hub.faults.append(Fault("inference", outputs="shape"))
    assert "[3] values" in run_script(SCRIPT, *flags, code=1, **place.environment).stderr
    description = json.loads((place.folder / "model.json").read_text())
    clip = np.load(place.folder / "clips" / place.paths[4])
    logits = expected_logits(place.folder / "clips", [place.paths[4]])[0]
    description["probe"] = {"digest": model_io.clip_digest(clip), "logits": (-logits).tolist()}
    (place.folder / "model.json").write_text(json.dumps(description))
    result = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert f"the logits of {place.paths[4]} are not those of the model that was exported" in result.stderr
    assert (len(place.probes()), len(place.jobs())) == (3, 0)
    assert place.hub.requests.count(("POST", "/api/v1/models/")) == 1, "the model was uploaded again"
    description["probe"]["logits"] = logits.tolist()
    (place.folder / "model.json").write_text(json.dumps(description))
    assert "differ by" in run_script(SCRIPT, *flags, **place.environment).stdout
    place.check_output()


def test_a_first_chunk_that_keeps_failing_ends_the_run(place, run_script):
    """The probe went through, but jobs of many clips run into the service's limit: nothing else is tried."""
    place.hub.faults.append(Fault("inference", fail=True, message="took too long", skip=1, times=10**6))
    flags = place.flags("--max-chunk", 1, "--chunks-in-flight", 2, "--attempts", 2, "--retry-seconds", 0)
    result = run_script(SCRIPT, *flags, code=1, **place.environment)
    assert "failed 2 times, none has succeeded" in result.stderr and "took too long" in result.stderr
    assert len(place.jobs()) <= 4 and place.uploads() <= 3, "of 12 chunks"


def test_partial_results_are_written_only_on_request(place, run_script):
    """What is missing is said; the next run fetches it, and only it."""
    place.hub.faults.append(Fault("inference", fail=True, skip=2, times=2))
    flags = place.flags("--max-chunk", 5, "--chunks-in-flight", 1, "--attempts", 1)
    result = run_script(SCRIPT, *flags, "--allow-partial", code=1, **place.environment)
    assert "7 clips of failed chunks missing" in result.stdout
    logits, paths = read_h5(place.folder / "out.h5")
    assert paths == place.paths[:5] and logits.shape == (5, 4)
    place.forget_setup()
    run_script(SCRIPT, *flags, **place.environment)
    assert sorted(job.num_samples for job in place.jobs()) == [2, 5]
    place.check_output()


def test_two_runs_on_one_output(place, run_script):
    """The second is refused with one sentence; the first goes on."""
    place.hub.job_seconds = 1
    process = start_and_wait(place, place.flags("--max-chunk", 4, "--chunks-in-flight", 1), 1)
    refused = run_script(SCRIPT, *place.flags(), code=2, **place.environment)
    assert "another run writes out.h5" in refused.stderr.splitlines()[-1]
    assert process.wait(60) == 0
    place.check_output()
    assert len(place.jobs()) == 3


def test_the_model_of_a_known_job_is_not_uploaded(place, run_script):
    """Its description names the job that compiled it; a hub that does not know it gets the file."""
    (job,) = (job for job in place.hub.jobs.values() if job.kind == "compile")
    description = json.loads((place.folder / "model.json").read_text()) | {"compile_job": job.id, "link_job": ""}
    (place.folder / "model.json").write_text(json.dumps(description))
    result = run_script(SCRIPT, *place.flags(), **place.environment)
    assert "it is not uploaded again" in result.stdout
    assert ("POST", "/api/v1/models/") not in place.hub.requests
    assert {job.model_id for job in place.jobs()} == {job.target_id}
    (place.folder / "out.h5").unlink()
    with FaultyHub() as other:
        other.write_client_ini(place.folder / "client.ini")
        run_script(SCRIPT, *place.flags(), **place.environment)
        assert other.requests.count(("POST", "/api/v1/models/")) == 1
    place.check_output()


def test_the_same_bytes_exported_again_repeat_nothing(place, run_script):
    """Other job ids in the description and another time of the file are no other model; tensors written again, no
    other clips."""
    run_script(SCRIPT, *place.flags(), **place.environment)
    description = json.loads((place.folder / "model.json").read_text()) | {"compile_job": "jnew"}
    (place.folder / "model.json").write_text(json.dumps(description))
    for path in (place.folder / "clips").rglob("*.npy"):
        os.utime(path, (1, 1))
    assert "is complete" in run_script(SCRIPT, *place.flags(), **place.environment).stdout
    assert len(place.jobs()) == 1


def test_a_full_disk_is_one_sentence(place, run_script, monkeypatch):
    """Too little space is found before anything is written; space that runs out later ends the run, exit code 2."""
    no_space = "import errno, shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)\n"
    (place.folder / "sitecustomize.py").write_text(no_space)
    environment = place.environment | {"PYTHONPATH": place.folder}
    result = run_script(SCRIPT, *place.flags(), code=2, **environment)
    assert "lower --max-chunk-bytes" in result.stderr and not place.jobs()
    (place.folder / "sitecustomize.py").write_text(
        "import zlib\ndef full(*_): raise OSError(28, 'No space left on device')\nzlib.compress = full\n"
    )
    result = run_script(SCRIPT, *place.flags(), code=2, **environment)
    assert "no space is left" in result.stderr and "Traceback" not in result.stderr


# --- another service than the one hoped for ---------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_the_version_of_qairt_is_that_of_the_binary(tmp_path, run_script, named):
    """Jobs name the version that the description has, or the hub's metadata; others would fail with a mismatch."""
    with FaultyHub(qairt_versions=["2.54", "2.52"]) as hub:
        place = Place(tmp_path, hub)
        place.paths = write_clips(tmp_path / "clips", 4)
        compile_binary(hub, tmp_path / "model.bin", options="--qairt_version 2.52")
        description = json.loads((tmp_path / "model.json").read_text())
        description |= {"qairt_version": "2.52"} if named else {"compile_job": next(iter(hub.jobs))}
        (tmp_path / "model.json").write_text(json.dumps(description))
        place.forget_setup()
        run_script(SCRIPT, *place.flags(), **place.environment)
        assert {job.options for job in [*place.probes(), *place.jobs()]} == {"--qairt_version 2.52"}
        place.check_output()
        (tmp_path / "out.h5").unlink()
        flags = place.flags("--inference-options=--qairt_version 2.54")
        assert "QNN_VERSION_MISMATCH" in run_script(SCRIPT, *flags, code=1, **place.environment).stderr


@pytest.mark.parametrize("quirks", [(), ("no scale",), ("no spec",), ("no spec", "no shapes"), ("silent",)],
                         ids=lambda quirks: ", ".join(quirks) or "none")  # fmt: skip
@pytest.mark.parametrize("described", [True, False], ids=["described", "alone"])
def test_a_service_that_says_less(tmp_path, run_script, quirks, described):
    """The export's description is enough; without it the job that compiled the model, or its own run, must tell."""
    with FaultyHub(quirks=quirks) as hub:
        place = Place(tmp_path, hub)
        place.paths = write_clips(tmp_path / "clips", 4)
        compile_binary(hub, tmp_path / "model.bin", channel_last=True)
        if not described:
            (tmp_path / "model.json").unlink()
        place.forget_setup()
        if not described and "no shapes" in quirks:
            assert "set LAYOUT" in run_script(SCRIPT, *place.flags(*UNDESCRIBED), code=2, **place.environment).stderr
            return
        run_script(SCRIPT, *place.flags(*UNDESCRIBED), **place.environment)
        place.check_output()


def test_integers_without_a_scale(tmp_path, run_script):
    """An integer input takes real values then, as qai_hub_models sends them; its outputs are real, too."""
    with FaultyHub(quirks=("no scale",)) as hub:
        place = Place(tmp_path, hub)
        paths = write_clips(tmp_path / "clips", 6)
        calibration = [np.load(tmp_path / "clips" / path) for path in paths]
        compile_binary(hub, tmp_path / "model.bin", w8a8=True, calibration=calibration)
        description = json.loads((tmp_path / "model.json").read_text())
        assert description["input"].pop("scale") and description["output"].pop("scale")
        description["input"]["scale"] = description["output"]["scale"] = None
        (tmp_path / "model.json").write_text(json.dumps(description))
        place.forget_setup()
        assert "does not say its scale" in run_script(SCRIPT, *place.flags(), code=2, **place.environment).stderr
        description["output"] |= {"dtype": "float32"}
        (tmp_path / "model.json").write_text(json.dumps(description))
        run_script(SCRIPT, *place.flags(), **place.environment)
        (dataset,) = {job.dataset_id for job in place.jobs()}
        with h5py.File(hub.datasets[dataset].path) as file:
            assert file["data/0/batch_0"].dtype == np.float32
        logits, _ = read_h5(tmp_path / "out.h5")
        expected = expected_logits(tmp_path / "clips", paths)
        np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())


def test_a_hub_that_throttles(tmp_path, run_script):
    """It answers so many requests a minute, then asks to slow down: slower, but every clip arrives once."""
    with FaultyHub(max_requests=60) as hub:
        place = Place(tmp_path, hub)
        place.paths = write_clips(tmp_path / "clips", 12)
        compile_binary(hub, tmp_path / "model.bin")
        place.forget_setup()
        flags = place.flags("--max-chunk", 1, "--retry-seconds", 2)
        hub.window = 4  # s instead of a minute
        result = run_script(SCRIPT, *flags, **place.environment, **hasty_client(tmp_path))
        assert "slow down" in result.stdout + result.stderr or "reported errors" in result.stdout + result.stderr
        place.check_output()
        assert (len(place.jobs()), place.uploads()) == (12, 12)


# --- resuming ---------------------------------------------------------------------------------------------------------


def state_of(place):
    """What the script has noted: (state of the chunks by key, keys that arrived, keys whose job was running)."""
    done = {path.stem for path in place.folder.glob("out.h5.state/[0-9a-f]*.npy")}
    chunks = {path.stem: json.loads(path.read_text()) for path in place.folder.glob("out.h5.state/[0-9a-f]*.json")}
    return chunks, done, [key for key, chunk in chunks.items() if chunk.get("job") and key not in done]


def start_and_wait(place, flags, arrived, **options):
    """Start the script and wait until `arrived` chunks are there while others run; returns the process."""
    environment = os.environ | place.environment | hasty_client(place.folder)
    process = subprocess.Popen([sys.executable, REPO / SCRIPT, *flags], cwd=place.folder, env=environment, **options)
    deadline = time.monotonic() + 120
    done, unfinished = set(), []
    while len(done) < arrived or not unfinished:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
        _, done, unfinished = state_of(place)
    return process


def start_and_kill(place, flags, arrived):
    """SIGKILL it then; returns what `state_of` does."""
    process = start_and_wait(place, flags, arrived)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place.folder / "out.h5").exists()
    return state_of(place)


@pytest.mark.quick
def test_killed_and_started_again(place, run_script):
    """Running jobs are taken up again; expired datasets and unknown jobs are replaced; nothing else is sent twice."""
    flags = place.flags("--max-chunk", 2, "--chunks-in-flight", 2)
    place.hub.job_seconds = 0.7
    chunks, arrived, unfinished = start_and_kill(place, flags, 2)
    lost = chunks[unfinished[0]]
    time.sleep(1)
    del place.hub.jobs[lost["job"]]
    place.hub.expire_dataset(lost["dataset"])
    before, uploads = {job.id for job in place.jobs()}, place.uploads()
    place.hub.requests.clear()
    result = run_script(SCRIPT, *flags, **place.environment)
    place.check_output()
    assert f"no longer has {lost['job']}" in result.stdout and f"no longer has {lost['dataset']}" in result.stdout
    new = [job for job in place.jobs() if job.id not in before]
    expected = 6 - len(arrived) - len(unfinished) + 1
    uploaded = sum("dataset" in chunk and not chunk.get("job") for chunk in chunks.values())  # killed before its job
    assert (len(new), place.uploads() - uploads) == (expected, expected - uploaded)
    assert not any(path == "/api/v1/models/" for method, path in place.hub.requests if method == "POST")


KILLED_AT = """
import importlib, os, sys
sys.path.insert(0, os.environ["TOOLS"])
module, owner, name, number = os.environ["KILL_AFTER"].split()
owner = getattr(importlib.import_module(module), owner) if owner != "-" else importlib.import_module(module)
original, calls = getattr(owner, name), []
def call_and_die(*arguments, **keywords):
    result = original(*arguments, **keywords)
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), 9)
    return result
setattr(owner, name, call_and_die)
import run_inference
run_inference.main()
"""


def test_killed_at_each_stage(place, run_script):
    """Right after a step, before it is noted: only that step is repeated, the next stage goes on from there."""
    stages = ["qai_hub - upload_model 1", "aihub.jobs - write_dataset 2",
              "qai_hub - upload_dataset 2", "qai_hub - submit_inference_job 2",
              "aihub.state State save_logits 1", "h5py Group create_dataset 8"]  # fmt: skip
    flags = place.flags("--max-chunk", 4, "--chunks-in-flight", 1)
    uploads = []
    for stage in stages:
        environment = os.environ | place.environment | {"TOOLS": str(REPO / "tools"), "KILL_AFTER": stage}
        command = [sys.executable, "-c", KILLED_AT, *flags]
        killed = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, f"{stage}: {killed.stdout}\n{killed.stderr}"
        assert not (place.folder / "out.h5").exists(), stage
        uploads.append(place.uploads())
    run_script(SCRIPT, *flags, **place.environment)
    place.check_output()
    assert place.hub.requests.count(("POST", "/api/v1/models/")) == 2, "once more than needed: it was not noted"
    assert place.uploads() <= 3 + 2 and len(place.jobs()) <= 3 + 2, (uploads, len(place.jobs()))
    assert [path.name for path in place.folder.glob("*out*")] == ["out.h5"], "something temporary is left"


def test_one_repaired_clip_of_many(place, run_script):
    """200 clips in 20 chunks, one of them damaged; when it is repaired, one chunk of 10 travels, and one clip first."""
    paths = place.paths = write_clips(place.folder / "clips", 200)
    path = place.folder / "clips" / paths[117]
    content = path.read_bytes()
    path.write_bytes(content[:5000])
    flags = place.flags("--max-chunk", 10)
    assert "1 clips left out" in run_script(SCRIPT, *flags, code=1, **place.environment).stdout
    sent = sum(record.path.stat().st_size for record in place.hub.datasets.values() if "chunk" in record.message.name)
    assert (len(place.jobs()), place.uploads()) == (20, 20)
    path.write_bytes(content)
    place.forget_setup()
    run_script(SCRIPT, *flags, **place.environment)
    assert ([job.num_samples for job in place.jobs()], len(place.probes())) == ([10], 1)
    new = [record for key, record in place.hub.datasets.items() if key not in place.old_datasets]
    sent_again = [record for record in new if record.message.name.startswith(("chunk", "probe"))]
    assert sum(record.path.stat().st_size for record in sent_again) < sent / 15
    place.check_output()


def test_killed_and_resumed_on_a_hub_that_knows_nothing(place, run_script):
    """A fresh local hub: what had arrived stays, the rest goes there again."""
    flags = place.flags("--max-chunk", 2, "--chunks-in-flight", 2)
    place.hub.job_seconds = 0.5
    _, arrived, _ = start_and_kill(place, flags, 2)
    with FaultyHub() as fresh:
        fresh.write_client_ini(place.folder / "client.ini")
        result = run_script(SCRIPT, *flags, **place.environment)
        chunks = [job for job in fresh.jobs.values() if not job.details.name.endswith("probe")]
        assert len(chunks) == 6 - len(arrived) and "no longer has" in result.stdout
    place.check_output()


def test_another_model_starts_afresh(place, run_script):
    """What an unfinished run of the first has paid for is kept; a complete result of it is not replaced."""
    place.hub.faults.append(Fault("inference", fail=True, skip=2))
    flags = place.flags("--max-chunk", 6, "--chunks-in-flight", 1, "--attempts", 1)
    run_script(SCRIPT, *flags, code=1, **place.environment)
    first = (place.folder / "model.bin").read_bytes(), (place.folder / "model.json").read_bytes()
    compile_binary(place.hub, place.folder / "model.bin", channel_last=False)
    result = run_script(SCRIPT, *flags, **place.environment)
    assert "still keeps" in result.stdout and "for another model" in result.stdout
    assert len(list(place.folder.glob("out.h5.state/*.npy"))) == 1, "another run's chunk was deleted"
    second = (place.folder / "out.h5").read_bytes()
    (place.folder / "model.bin").write_bytes(first[0])
    (place.folder / "model.json").write_bytes(first[1])
    place.forget_setup()
    result = run_script(SCRIPT, *flags, **place.environment)
    assert "out.h5 held a result of another model; it is now out-before-1.h5" in result.stdout
    assert (place.folder / "out-before-1.h5").read_bytes() == second
    assert [job.num_samples for job in place.jobs()] == [6], "the chunk that had arrived was lost"
    place.check_output()


def test_a_clip_that_becomes_readable_moves_no_other(place, run_script):
    """Same size and time, as after a lost mount: no prediction lands on another clip, its own chunk runs again."""
    path = place.folder / "clips" / place.paths[1]
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=times)
    place.hub.faults.append(Fault("inference", fail=True, skip=2))
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
            assert file.attrs["output_kind"] == "logits", "its graph ends in no softmax"
    assert names == [f"{DEVICE} (emulated on a CPU)", DEVICE] and len(place.jobs()) == 2


def test_what_is_said_of_the_model_belongs_to_the_run(place, run_script):
    """Other classes in the description are written without a job; another scale of the outputs is another result."""
    run_script(SCRIPT, *place.flags(), **place.environment)
    description = json.loads((place.folder / "model.json").read_text()) | {"classes": list("abcd")}
    (place.folder / "model.json").write_text(json.dumps(description))
    run_script(SCRIPT, *place.flags(), **place.environment)
    with h5py.File(place.folder / "out.h5") as file:
        assert json.loads(file.attrs["classes"]) == list("abcd")
    assert len(place.jobs()) == 1
    description["output"]["name"] = "scores"
    (place.folder / "model.json").write_text(json.dumps(description))
    run_script(SCRIPT, *place.flags(), **place.environment)
    assert len(place.jobs()) == 2
    place.check_output()
