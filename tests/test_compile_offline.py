"""compile_offline.py with Qualcomm's real compiler and emulator; skipped where there is no wheel for this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
from common import flags

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import compile_offline
from aihub import logits_file, onnx_graphs
from faulty_hub import FaultyHub
from qualcomm import binary_runs, compiler, latency
from see import classifier
from small_models import client_of, compile_binary, expected_logits, read_h5, small_onnx, write_clips
from test_export import write_checkpoint

pytestmark = pytest.mark.slow

SCRIPT = "tools/compile_offline.py"


def install_wheels():
    """Install Qualcomm's wheels by the script's own function, unless they are there; returns why they cannot be."""
    if reason := compiler.missing_wheel():
        return f"Qualcomm has no wheel of its compiler for {reason}"
    try:
        compiler.install(compile_offline.qnn_dir)
    except SystemExit:
        if compiler.is_installed(compile_offline.qnn_dir):
            return compiler.why_not_loaded(compile_offline.qnn_dir)
        return "Qualcomm's wheels could not be installed: no network?"


@pytest.fixture(scope="session")
def wheels():
    """The folder of Qualcomm's wheels."""
    if reason := install_wheels():
        pytest.skip(reason)
    return compile_offline.qnn_dir


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory):
    """A folder with a small network and its clips, float32 (1, 3, 8, 16, 16)."""
    folder = tmp_path_factory.mktemp("offline")
    onnx.save(small_onnx(), folder / "small.onnx")
    write_clips(folder / "clips", 12)
    return folder


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """run_here(flags …) -> CompletedProcess: the script's `main` in this process, which has torch imported already."""
    monkeypatch.chdir(tmp_path)
    constants = flags.constants_of(Path(compile_offline.__file__).read_text(encoding="utf-8"))
    for name in constants:  # to be restored afterwards
        monkeypatch.setattr(compile_offline, name, getattr(compile_offline, name))
    before = {name: getattr(compile_offline, name) for name in constants}
    handler = signal.getsignal(signal.SIGTERM)

    def run(*flags, code=0):
        for name, value in before.items():
            setattr(compile_offline, name, value)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            compile_offline.main()
        said = capsys.readouterr()
        assert stop.value.code == code, f"exit code {stop.value.code} instead of {code}\n{said.out}\n{said.err}"
        return subprocess.CompletedProcess(flags, code, said.out, said.err)

    yield run
    signal.signal(signal.SIGTERM, handler)


def last_line(result):
    return json.loads(result.stdout.splitlines()[-1])


# --- the real compiler ------------------------------------------------------------------------------------------------


def test_r2plus1d_float_and_w8a8_two_at_a_time(wheels, tmp_path):
    """Estimates inside bands around those of QAIRT 2.50.40 (19.35 and 4.49 ms), both under the gate; NTHWC."""
    processes = {
        precision: subprocess.Popen(
            [sys.executable, str(common.REPO / SCRIPT), "--model", "r2plus1d_18", "--precision", precision],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for precision in ("float", "w8a8")
    }  # fmt: skip
    outputs = {precision: process.communicate(timeout=600) for precision, process in processes.items()}
    for precision, (lowest, highest), dtype in (("float", (17, 22), "float32"), ("w8a8", (4, 5), "uint8")):
        assert processes[precision].returncode == 0, outputs[precision][1]
        lines = outputs[precision][0].splitlines()
        figures = json.loads(lines[-1])
        low, estimate, high = figures["estimated_ms"]
        assert lowest < low < estimate < high < highest + 1, figures
        assert figures["gate"] == "meets" and figures["qairt"].startswith("2.50")
        assert any(line.startswith("published") and latency.DEVICE in line for line in lines), "AI Hub's figure"
        binary = tmp_path / figures["binary"]
        description = json.loads(binary.with_suffix(".json").read_text())
        assert description["input"]["shape"] == [1, 16, 112, 112, 3] and description["layout"] == "NTHWC"
        assert description["input"]["dtype"] == description["output"]["dtype"] == dtype
        assert description["sha256"] == common.sha256_of(binary) and figures["bytes"] == binary.stat().st_size
        assert (description["chip"], description["hexagon"]) == ("QCS9100", "v73")


def test_the_emulators_float_logits_are_torchs(wheels, own_folder, tmp_path, run_here, run_script):
    """Within 60 dB of torch, in a file that evaluate.py reads; a run of more clips runs the missing ones only."""
    flags = ("--source", own_folder / "small.onnx", "--data-dir", own_folder / "clips", "--num-clips")
    figures = last_line(run_here(*flags, 3))
    assert figures["num_clips"] == 3 and figures["against_onnxruntime"]["same_top1"] == 3
    logits, paths = read_h5(tmp_path / "dataset-export-htp.h5")
    agreed = logits_file.agreement(logits, expected_logits(own_folder / "clips", paths))
    assert agreed["psnr_db"] > 60 and agreed["same_top1"] == 3, agreed

    (journal,) = (tmp_path / "dataset-export-htp.h5.state").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])  # the third line as a kill leaves it
    result = run_here(*flags, 4)
    assert "is compiled already" in result.stdout and last_line(result)["num_clips"] == 4
    assert "2/4" in result.stderr, "the two clips that were whole are not emulated again"
    np.testing.assert_array_equal(read_h5(tmp_path / "dataset-export-htp.h5")[0][:3], logits)

    (tmp_path / "class_map.json").write_text(json.dumps({label: i for i, label in enumerate("abcd")}))
    flags = ("--h5", "dataset-export-htp.h5", "--manifest", own_folder / "clips/manifest.jsonl", "--allow-partial")
    report = last_line(run_script("tools/evaluate.py", *flags, "--class_map", "class_map.json", code=1))
    assert (report["n"], report["num_videos"]) == (4, 12)


def test_a_binary_runs_here_by_every_tool(wheels, own_folder, tmp_path, run_here, run_script):
    """run_inference.py --local and predict.py's classifier give the logits of compile_offline.py's own emulator run."""
    shutil.copytree(own_folder / "clips", tmp_path / "clips")
    rows = (tmp_path / "clips/manifest.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "clips/manifest.jsonl").write_text("".join(rows))
    flags = ("--source", own_folder / "small.onnx", "--data-dir", "clips", "--num-clips", 3)
    binary = tmp_path / last_line(run_here(*flags))["binary"]
    expected = dict(zip(*reversed(read_h5(tmp_path / "dataset-export-htp.h5"))))
    # as on a board, where these are not installed
    left_out = ("torch", "torchvision", "qai_hub", "qai_hub_models", "scipy", "matplotlib")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({left_out})\n")
    flags = ("--local", "--dlc-path", binary, "--data-path", "clips")
    result = run_script("tools/run_inference.py", *flags, PYTHONPATH=tmp_path)
    assert "Qualcomm's HTP emulator for QCS9100" in result.stdout and "s a clip in the emulator" in result.stdout
    assert "the compiler's estimate is" in result.stdout and "next: python tools/evaluate.py" in result.stdout
    logits, paths = read_h5(tmp_path / "dataset-export.h5")
    assert set(paths) == set(expected) and all((row == expected[path]).all() for row, path in zip(logits, paths))

    # the form in which AI Hub hands out a binary with its graph's name: an ONNX file of one node, the binary beside it
    context = tmp_path / "context.onnx"
    context.mkdir()
    compiled = binary_runs.CompiledBinary(binary, json.loads(binary.with_suffix(".json").read_text()))
    binary_runs.write_context(compiled, context)
    for path in (binary, context):
        loaded = classifier.load(path)
        assert "HTP emulator for QCS9100" in loaded.about and loaded.latency() == ""
        logits = loaded.logits(np.load(tmp_path / "clips" / paths[0]))
        assert (logits[0] == expected[paths[0]]).all() and "says nothing about the chip's" in loaded.latency()


def test_what_cannot_run_on_a_chip_is_refused(wheels, own_folder, tmp_path, run_script):
    """No other file, and no binary of which nobody knows the graph, falls back to the CPU."""
    (tmp_path / "foreign.bin").write_bytes(b"a binary" * 100)
    (tmp_path / "v.mp4").write_bytes(b"")
    result = run_script("tools/predict.py", "v.mp4", "--checkpoint", "foreign.bin", code=2)
    assert "nothing beside foreign.bin says what its graph is called" in result.stderr
    flags = ("--local", "--data-path", own_folder / "clips", "--dlc-path", own_folder / "small.onnx")
    assert "is not made for a Qualcomm chip" in run_script("tools/run_inference.py", *flags, code=2).stderr


def test_latency_of_a_chip_is_set_beside_gate_and_estimate():
    described = {"estimated_ms": [4.0, 4.49, 5.0]}
    said = latency.measured([0.004] * 95 + [0.02] * 5, described, is_native=True)
    assert "4.00 ms, the median of 100 clips" in said and "meets the 34 ms gate" in said and "4.49 ms (4.00" in said
    assert "MISSES" in latency.measured([0.05], {}, is_native=True)
    assert "too close to call" in latency.measured([0.03] * 9 + [0.04] * 9 + [0.03], {}, is_native=True)
    assert latency.measured([], described, is_native=True) == ""


def test_w8a8_in_the_emulator_is_within_one_step_of_onnxruntime(wheels, own_folder, tmp_path, run_here):
    clips = ("--data-dir", own_folder / "clips", "--calibration-dir", own_folder / "clips", "--num-clips", 4)
    figures = last_line(run_here("--source", own_folder / "small.onnx", "--precision", "w8a8", *clips))
    description = json.loads((tmp_path / figures["binary"]).with_suffix(".json").read_text())
    assert description["input"]["dtype"] == "uint8" and description["input"]["scale"] == pytest.approx(1 / 255, 0.01)
    assert figures["against_onnxruntime"]["largest_difference"] <= 1.01 * description["output"]["scale"]
    logits, paths = read_h5(tmp_path / "dataset-export-htp.h5")
    assert logits_file.agreement(logits, expected_logits(own_folder / "clips", paths))["psnr_db"] > 25


def test_what_the_local_hub_made_is_compiled_as_it_is_deployed(wheels, own_folder, tmp_path, run_here):
    """Layout and quantised ends are the hub's. The real binary is refused by the hub, and by the script as a source."""
    clips = [np.load(path) for path in sorted((own_folder / "clips").rglob("*.npy"))[:3]]
    with FaultyHub() as hub:
        compile_binary(hub, tmp_path / "resnet_2plus1d.bin", channel_last=True, w8a8=True, calibration=clips)
        flags = ("--source", "resnet_2plus1d.bin", "--data-dir", own_folder / "clips", "--num-clips", 2)
        figures = last_line(run_here(*flags))
        assert figures["binary"] == "export_assets/resnet_2plus1d-w8a8-v73.bin" and figures["precision"] == "w8a8"
        description = json.loads((tmp_path / figures["binary"]).with_suffix(".json").read_text())
        theirs = json.loads((tmp_path / "resnet_2plus1d.json").read_text())
        for tensor in ("input", "output"):
            assert {**description[tensor], "shape": tuple(description[tensor]["shape"])} == {
                **theirs[tensor], "shape": tuple(theirs[tensor]["shape"])}  # fmt: skip
        assert figures["against_onnxruntime"]["largest_difference"] <= 1.01 * description["output"]["scale"]

        client = client_of(hub)
        device = client.get_devices("Dragonwing IQ-9075 EVK")[0]
        model = client.upload_model(str(tmp_path / figures["binary"]))
        job = client.submit_inference_job(model, device, profile=True)
        assert "was not made by the local hub: it runs on a Qualcomm device" in job.wait().message
    result = run_here("--source", figures["binary"], code=2)
    assert "was not made by the local hub, it is compiled for a device already" in result.stderr


def test_what_the_local_hub_made_is_not_sent_to_ai_hub(own_folder, tmp_path, run_script):
    """run_inference.py refuses it where the devices do not say that they are emulated."""
    tools = str(common.REPO / "tools")
    patch = f"import sys\nsys.path.append({tools!r})\n"
    patch += "from aihub import onnx_graphs\nonnx_graphs.is_emulated = lambda _: False\n"
    (tmp_path / "sitecustomize.py").write_text(patch)
    with FaultyHub() as hub:
        hub.write_client_ini(tmp_path / "client.ini")
        compile_binary(hub, tmp_path / "hubs.bin")
        flags = ("--dlc-path", "hubs.bin", "--data-path", own_folder / "clips")
        environment = {"PYTHONPATH": tmp_path, "QAIHUB_CLIENT_INI": tmp_path / "client.ini"}
        result = run_script("tools/run_inference.py", *flags, code=2, **environment)
    assert "was made by the local hub and runs there alone" in result.stderr and "Traceback" not in result.stderr


def unsupported_onnx():
    """A convolution, then a 3-D max pool, which the provider does not take; named as torch's exporter names them."""
    pool = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.MaxPool3d((1, 2, 2)), torch.nn.Conv3d(4, 2, 3))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = pool

        def forward(self, clip):
            return self.features(clip).mean((2, 3, 4))

    return onnx_graphs.torch_to_onnx(Network(), (1, 3, 8, 16, 16))


def test_an_operation_that_is_not_taken_is_named_with_its_layer(wheels, tmp_path, run_here):
    """Exit code 1, no traceback, no file."""
    onnx.save(unsupported_onnx(), tmp_path / "pool.onnx")
    result = run_here("--source", "pool.onnx", code=1)
    assert "it does not take MaxPool" in result.stderr and "MaxPool of features.1" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "export_assets").exists()


def children_of(pid):
    """The process numbers of a process's children and theirs (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [grand for child in children for grand in children_of(child)]


@pytest.fixture(scope="module")
def larger_onnx(tmp_path_factory):
    """A network whose compilation takes seconds."""
    path = tmp_path_factory.mktemp("larger") / "larger.onnx"
    network = torch.nn.Sequential(*(torch.nn.Conv3d(3 if i == 0 else 64, 64, 3, padding=1) for i in range(6)))
    onnx.save(onnx_graphs.torch_to_onnx(network, (1, 3, 8, 56, 56)), path)
    return path


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_compile_leaves_nothing(wheels, larger_onnx, tmp_path, with_signal):
    """No temporary folder, no process, no binary, whichever way it is ended."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, str(common.REPO / SCRIPT), "--source", str(larger_onnx)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(children := children_of(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the compiler never started"
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(with_signal)
    errors = process.communicate(timeout=60)[1].decode()
    assert "Traceback" not in errors
    while any(tmp_path.iterdir()) or any(map(is_alive, children)):
        assert time.monotonic() < deadline, f"left: {[path.name for path in tmp_path.iterdir()]}, {children}"
        time.sleep(0.05)


def is_alive(pid):
    """Whether a process works: the number may belong to one that ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:  # it has just ended
        return False


def test_other_chips_compile_and_have_no_estimate(wheels, own_folder, tmp_path, run_here):
    """SoC 69: no figure of another chip is shown."""
    result = run_here("--source", own_folder / "small.onnx", "--soc", 69)
    figures = last_line(result)
    assert (figures["chip"], figures["estimated_ms"], figures["gate"]) == ("SM8750", None, "not known")
    assert figures["binary"] == "export_assets/small-v79-soc69.bin" and (tmp_path / figures["binary"]).exists()
    assert "no model of time for this chip" in result.stdout


def test_a_comparison_goes_on_where_it_was_killed(wheels, tmp_path, run_here, monkeypatch):
    """Sorted by latency, with what is known of accuracy; what was compiled is not compiled again."""
    flags = ("--compare", "mc3_18", "--compare-frames", 2, "--compare-precisions", "float", "w8a16")
    first = run_here(*flags, "--results", "mc3_18/2/w8a16=88.5")
    rows = last_line(first)["networks"]
    assert sorted((row["precision"], row["top1"], row["gate"]) for row in rows) == [
        ("float", None, "meets"), ("w8a16", 88.5, "meets")]  # fmt: skip
    assert rows[0]["estimated_ms"][1] <= rows[1]["estimated_ms"][1]
    assert (tmp_path / "export_assets/latency.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(compiler, "Process", None)  # nothing is compiled again
    again = last_line(run_here(*flags))["networks"]
    assert [row["estimated_ms"] for row in again] == [row["estimated_ms"] for row in rows]


# --- without the compiler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "machine", "python", "libc", "said"), [
    ("Darwin", "arm64", (3, 12), ("", ""), "Darwin on arm64"),
    ("Linux", "x86_64", (3, 10), ("glibc", "2.39"), "Python 3.10"),
    ("Linux", "x86_64", (3, 12), ("glibc", "2.31"), "glibc 2.31"),
    ("Linux", "x86_64", (3, 12), ("", ""), "other than glibc"),
    ("Linux", "aarch64", (3, 10), ("glibc", "2.39"), "3.11 to 3.14"),
    ("Linux", "aarch64", (3, 11), ("glibc", "2.36"), ""),
    ("Linux", "x86_64", (3, 11), ("glibc", "2.35"), ""),
])  # fmt: skip
def test_where_there_is_no_wheel(monkeypatch, tmp_path, capsys, system, machine, python, libc, said):
    """One sentence with the way out, before anything is fetched."""
    monkeypatch.setattr(compiler.platform, "system", lambda: system)
    monkeypatch.setattr(compiler.platform, "machine", lambda: machine)
    monkeypatch.setattr(compiler.platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(compiler.sys, "version_info", (*python, 0))
    assert said in compiler.missing_wheel() and bool(said) == bool(compiler.missing_wheel())
    if said:
        with pytest.raises(SystemExit) as stop:
            compiler.install(tmp_path / ".qnn")
        assert stop.value.code == 2 and "example_export.py" in capsys.readouterr().err
        assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Qualcomm's provider needs Python 3.11: use a newer one")
def test_a_machine_without_the_chip_says_so(tmp_path):
    """On a board whose driver is missing the provider's library can be loaded, and offers nothing."""
    offered = "register_execution_provider_library = max\nget_ep_devices = lambda: []\n"
    (tmp_path / "onnxruntime.py").write_text(offered)
    (tmp_path / "onnxruntime_qnn.py").write_text("EP_NAME = 'QNN'\nget_library_path = str\n")
    binary = binary_runs.CompiledBinary(tmp_path / "own.onnx", {"soc": 77})
    binary.path.touch()
    with pytest.raises(compiler.CompilerError, match="finds no NPU"), binary_runs.running(binary, tmp_path):
        pass


def with_library(wheels, folder, change):
    """A copy of the wheels' folder, by links, in which one library of the provider has other bytes."""
    (folder / "onnxruntime_qnn").mkdir(parents=True)
    for path in Path(wheels).resolve().iterdir():
        if path.name != "onnxruntime_qnn":
            (folder / path.name).symlink_to(path)
    for path in Path(wheels).resolve().joinpath("onnxruntime_qnn").iterdir():
        target = folder / "onnxruntime_qnn" / path.name
        if path.name == "libQnnSystem.so":
            target.write_bytes(change(path.read_bytes()))
        else:
            target.symlink_to(path)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="asks the loader of Linux")
def test_a_library_that_the_system_lacks_is_named_with_its_package(wheels, own_folder, tmp_path, run_here):
    """Before anything is compiled, by the real loader: a library asks for one that is nowhere, or is cut short."""
    other = (b"libatomic.so.1", b"libatomic.so.9")
    lacking = with_library(wheels, tmp_path / "lacking", lambda content: content.replace(*other))
    flags = ("--source", own_folder / "small.onnx", "--qnn-dir")
    said = run_here(*flags, lacking, code=2).stderr
    assert "needs libatomic.so.9" in said and "apt install libatomic9" in said and "refuses the network" not in said
    cut = with_library(wheels, tmp_path / "cut", lambda content: content[: len(content) // 2])
    assert f"delete {cut}" in run_here(*flags, cut, code=2).stderr


def test_wheels_in_a_folder_with_a_colon(wheels, own_folder, tmp_path, run_here):
    """Which PYTHONPATH could not name."""
    (tmp_path / "a:b c").symlink_to(Path(wheels).resolve())
    result = run_here("--source", own_folder / "small.onnx", "--qnn-dir", tmp_path / "a:b c")
    assert last_line(result)["estimated_ms"]


def test_the_install_says_what_and_is_whole_or_absent(monkeypatch, tmp_path, capsys):
    """Exactly the pinned wheels, without dependencies, into a folder that appears at once; a failure leaves nothing."""
    monkeypatch.setattr(compiler, "missing_wheel", lambda: "")
    monkeypatch.setattr(compiler, "why_not_loaded", lambda folder: "")  # they are empty here
    commands = []

    def pip(code):
        def run(command, **_):
            commands.append(command)
            folder = Path(command[command.index("--target") + 1])
            for name, version in list(compiler.WHEELS.items())[: None if code == 0 else 1]:
                (folder / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
            return subprocess.CompletedProcess(command, code)

        return run

    monkeypatch.setattr(compiler.subprocess, "run", pip(1))
    with pytest.raises(SystemExit):
        compiler.install(tmp_path / ".qnn")
    assert not any(tmp_path.iterdir()), "a half installation is left"
    monkeypatch.setattr(compiler.subprocess, "run", pip(0))
    compiler.install(tmp_path / ".qnn")
    compiler.install(tmp_path / ".qnn")
    assert len(commands) == 2 and [path.name for path in tmp_path.iterdir()] == [".qnn"]
    assert {"--no-deps", *(f"{name}=={version}" for name, version in compiler.WHEELS.items())} <= set(commands[1])
    assert (tmp_path / ".qnn").stat().st_mode & 0o777 == 0o755, "other users of the project's folder may read it"
    said = capsys.readouterr().out
    assert "Qualcomm Technologies" in said and "Qualcomm_LICENSE.pdf" in said and "MIT" in said


def test_wrong_usage(tmp_path, own_folder, run_here):
    """One sentence each, with exit code 2, before the compiler is asked or installed."""

    def refused(*flags):
        result = run_here("--qnn-dir", "wheels", *flags, code=2)
        assert "Traceback" not in result.stderr and not (tmp_path / "wheels").exists()
        return result.stderr

    assert "example_export.py" in refused()
    assert "the precision is 'int4', possible are" in refused("--model", "r3d_18", "--precision", "int4")
    assert "mvit_v2_s, r2plus1d_18, r3d_18" in refused("--model", "x3d_m")
    assert "different clips" in refused("--model", "mc3_18", "s3d", "--num-frames", 16)
    assert "name them with --checkpoint" in refused("--model", "mc3_18", "--mirror")
    assert "69 (SM8750)" in refused("--model", "r3d_18", "--soc", 1)
    for nothing in ["--compare-precisions"], ["--compare-frames"], ["--compare-frames", 0, 8]:
        assert "each need a value or more" in refused("--compare", "r3d_18", *nothing)
    assert "exclude one another" in refused("--model", "r3d_18", "--checkpoint", "checkpoint.pth")
    assert "s3d takes 14 frames a clip or more" in refused("--model", "s3d", "--num-frames", 8)
    assert "no checkpoint none.pth" in refused("--checkpoint", "none.pth")
    write_checkpoint(tmp_path / "c.pth", clip_len=8, resize_size=[36, 48], crop_size=[32, 32])
    assert "num_frames is 16, but c.pth was trained with 8" in refused("--checkpoint", "c.pth", "--num-frames", 16)
    assert "crop_size is 112, but c.pth takes frames of 32" in refused("--checkpoint", "c.pth", "--crop-size", 112)
    assert "num_classes is 4, but c.pth was trained with 5" in refused("--checkpoint", "c.pth", "--num-classes", 4)
    assert "there is none in nowhere" in refused("--model", "r3d_18", "--num-clips", 1, "--data-dir", "nowhere")
    small = ("--source", own_folder / "small.onnx")
    assert "takes 8 frames" in refused(*small, "--num-frames", 16)
    assert "calibrated with clips" in refused(*small, "--precision", "w8a8", "--calibration-dir", "nowhere")
    (tmp_path / "own.onnx").write_bytes((own_folder / "small.onnx").read_bytes())
    clip = {"clip_len": 8, "resize_size": [20, 20], "crop_size": [16, 16], "rotate": True}
    described = {"sha256": common.sha256_of(tmp_path / "own.onnx"), "clip": clip, "classes": list("abcd")}
    (tmp_path / "own.json").write_text(json.dumps(described))
    assert "crop_size is 112, but own.onnx takes frames of 16" in refused("--source", "own.onnx", "--crop-size", 112)
    assert "num_classes is 5, but own.onnx tells 4" in refused("--source", "own.onnx", "--num-classes", 5)
    write_clips(tmp_path / "clips", 2)
    (tmp_path / "clips/settings.json").write_text(json.dumps({"rotate": False}))
    said = refused("--source", "own.onnx", "--precision", "w8a8", "--calibration-dir", "clips")
    assert "own.onnx takes clips of rotate" in said and "as the tensors in clips are" in said
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert "is no readable ONNX model" in refused("--source", "broken.onnx")
    (tmp_path / "two.onnx").write_bytes(two_inputs().SerializeToString())
    assert "one clip in and one tensor out" in refused("--source", "two.onnx")
    assert "as r2plus1d_18/16/float=" in refused("--compare", "r3d_18", "--results", "r3d_18=90")


def two_inputs():
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "two", values[:2], values[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("estimated_ms", "ops", "precision", "said"), [
    ([17.2, 19.3, 21.9], 1, "float", "meets"),
    ([34.7, 39.0, 44.0], 1, "float", "misses"),
    ([27.0, 30.5, 34.5], 1, "float", "too close to call"),
    ([37.0, 41.0, 46.0], 0, "w8a8", "too close to call"),  # w8a8 estimates were up to a quarter too high
    ([290.0, 330.0, 360.0], 80, "float", "not known"),
    (None, None, "float", "not known"),
])  # fmt: skip
def test_the_verdict_allows_for_the_errors_of_estimates(estimated_ms, ops, precision, said):
    figures = {"estimated_ms": estimated_ms, "ops_without_cost": ops, "soc": 77}
    assert latency.verdict(figures, precision) == said
    assert latency.verdict(figures | {"soc": 52}, precision) == "not known"  # the gate is another chip's
    if said == "misses":  # each of six that vote may have as many operations without a known cost
        six = {"ops_without_cost": 6, "network": " + ".join(["r2plus1d_18"] * 6)}
        assert latency.verdict(figures | six, precision) == said
        assert latency.verdict(figures | six | {"network": "r2plus1d_18"}, precision) == "not known"


def test_published_figures_are_the_packages():
    """Read from qai_hub_models as it is installed: float and w8a8, many devices, 16 frames only."""
    for network in latency.PUBLISHED_AS:
        published = latency.published_latencies(network, "w8a8", 16)
        milliseconds, qairt = published[latency.DEVICE]
        assert 0 < milliseconds < 34 and qairt.startswith("2.") and len(published) > 10
    assert latency.published_latencies("r3d_18", "float", 8) == latency.published_latencies("s3d", "float", 16) == {}


def test_layers_are_named_as_modules():
    names = {
        "/model/features/features.5/branch3/branch3.0/MaxPool": "features.5.branch3.0",
        "/layer1/layer1.0/conv1/conv1.0/Conv": "layer1.0.conv1.0",
        "/model.0/features/features.1/MaxPool": "features.1",
        "/model.1/fc/Gemm": "1.fc",
        "node_conv3d_7": "node_conv3d_7",
        "": "(no name)",
    }
    assert {name: compile_offline.module_of(name) for name in names} == names

