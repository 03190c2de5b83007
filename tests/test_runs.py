"""--run NAME: a chain of all steps in a folder of its own, and two runs that leave each other's files untouched."""

import csv
import importlib
import json
import shlex
import shutil
from pathlib import Path

import common
from common import flags

import pytest
import torch

from make_videos import write_video
from test_readme import FLOAT_AND_W8A8

pytestmark = pytest.mark.slow

TRAIN = "references/video_classification/train.py"
HUB = "python tools/local_hub.py "  # conftest.py leaves the tests without an account
LABELS = {"jab": 0, "squats": 1}


@pytest.fixture
def videos(tmp_path):
    """QEVD_organized with a video of each of two classes to train on and two to validate on, and their class map."""
    for split, count in ("train", 1), ("val", 2):
        for label, k in LABELS.items():
            (tmp_path / "QEVD_organized" / split / label).mkdir(parents=True)
            for i in range(count):
                write_video(tmp_path / "QEVD_organized" / split / label / f"{i}.mp4", num_frames=40, seed=10 * i + k)
    (tmp_path / "my_class_map.json").write_text(json.dumps(LABELS))
    return tmp_path / "QEVD_organized"


def content_of(folder):
    """{path: (bytes, time of the last change)} of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_with_a_name_and_float_and_w8a8_side_by_side(tmp_path, videos, run_script):
    data = ("--data-path", videos, "--class-map", "my_class_map.json", "--device", "cpu", "--workers", 0)
    small = ("--model", "mc3_18", "--clip-len", 4, "--epochs", 1, "--batch-size", 2, "--bn-clips", 0)
    hub, run = ("tools/local_hub.py", "python"), ("--run", "float")
    (tmp_path / "tools").symlink_to(common.REPO / "tools")
    kept = {"tools", "my_class_map.json", "QEVD_organized"}

    out = run_script(TRAIN, *data, *small, *run).stdout
    checkpoint = "runs/float/checkpoint.pth"
    tensors = f"python tools/preprocess_and_save.py --run float --checkpoint {checkpoint} --data-root"
    assert f"next: {tensors}" in out
    assert out.endswith(f"then {HUB}python tools/example_export.py --run float --checkpoint {checkpoint}\n"), out
    assert "  left: 0 min of the run  " in out
    assert "runs/float holds the checkpoint" in run_script(TRAIN, *data, *small, *run, code=2).stderr
    out = run_script("tools/preprocess_and_save.py", *run, "--clip-len", 4).stdout
    assert "space     at most 2.4 MB are needed in" in out
    clips = "runs/float/preprocessed_tensors"
    assert f"next: {HUB}python tools/example_export.py --run float --data-dir {clips}\n" in out
    out = run_script(*hub, "tools/example_export.py", *run).stdout
    model = "runs/float/export_assets/resnet_2plus1d.bin"
    infer = f"python tools/run_inference.py --run float --dlc-path {model} --data-path {clips}"
    assert f"next: python tools/local_hub.py {infer}\n" in out
    assert f"python tools/compile_offline.py --run float --source {model}\n" in out
    out = run_script(*hub, "tools/run_inference.py", *run).stdout
    of_these = f"--h5 runs/float/dataset-export.h5 --manifest {clips}/manifest.jsonl --class-map my_class_map.json"
    assert out.splitlines()[-1] == f"next: python tools/evaluate.py --run float {of_these}"
    out = run_script("tools/evaluate.py", *run, "--class_map", "my_class_map.json").stdout
    assert "runs/float/report/report.html" in out and json.loads(out.splitlines()[-1])["n"] == 4
    run_script("tools/predict.py", videos / "val/jab/0.mp4", *run)
    made = {path.name for path in (tmp_path / "runs/float").iterdir()}
    assert made >= {"checkpoint.pth", "metrics.jsonl", "preprocessed_tensors", "export_assets", "report", "predictions"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"runs"}, "something lies outside of the run"

    for path in list((tmp_path / "runs/float").iterdir()):  # as a run without a name leaves them
        path.rename(tmp_path / path.name)
    before = content_of(tmp_path)
    more = {"preprocess_and_save.py": " --clip-len 4", "evaluate.py": " --class_map my_class_map.json"}
    for command in FLOAT_AND_W8A8:
        words = shlex.split(command + "".join(flags for script, flags in more.items() if script in command))
        printed = run_script(*words[1:]).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["n"] == 4 and "agreement" in figures, printed
    after = {path: state for path, state in content_of(tmp_path).items() if not path.startswith(("runs/w8a8", "calib"))}
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path.split("/")[0] for path in changed} == {"report"}, changed
    description = json.loads((tmp_path / "runs/w8a8/export_assets/resnet_2plus1d.json").read_text())
    assert (description["precision"], description["checkpoint"]) == ("w8a8", "checkpoint.pth")

    two = ("--checkpoints", "checkpoint.pth", "checkpoint.pth")
    out = run_script("tools/average_checkpoints.py", "--run", "soup", *two).stdout
    assert f"next: {HUB}python tools/example_export.py --run soup --checkpoint runs/soup/soup.pth\n" in out
    assert (tmp_path / "runs/soup/soup.pth").exists()

    out = run_script("tools/runs.py", ".", "--score", "w8a8", "62.5").stdout
    assert "3 runs: runs/table.csv, runs/table.html" in out, out
    rows = read_table(tmp_path)
    own, w8a8 = rows["."], rows["w8a8"]
    assert own["checkpoint"] == w8a8["checkpoint"] != "", "w8a8 was exported from the run without a name"
    assert bool(own["commit"]) == bool(shutil.which("git"))
    assert own["validated_on"] == "val" and own["val_videos"] == "4"
    assert own["compile_job"] and w8a8["compile_job"] and own["compile_job"] != w8a8["compile_job"]
    assert own["w8a8_top1"] == w8a8["w8a8_top1"] != "", "what evaluate.py --compare said of the second model"
    assert own["float_top1"] == w8a8["float_top1"] != "", "and of the first, of the same checkpoint"
    difference = float(w8a8["local_minus_leaderboard"])
    assert w8a8["leaderboard"] == "62.5" and difference == pytest.approx(float(w8a8["w8a8_top1"]) - 62.5)


def read_table(folder):
    """{run: its row as a dict} of runs/table.csv."""
    with open(folder / "runs/table.csv", newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def write_run(folder, name, right, export=None, report=None, **args):
    """The files of a run as its steps write them, of 200 validation videos."""
    folder = folder / "runs" / name
    (folder / "export_assets").mkdir(parents=True)
    (folder / "report").mkdir()
    git = {"commit": "0123456789abcdef" + 24 * "0", "clean": name == "a"}
    saved = {"model": {"fc.weight": torch.zeros(2, 2) + right}, "args": {"lr": 0.01, "output_dir": name} | args}
    saved |= {"epoch": 14, "metrics": {"video_acc1": right / 2, "num_videos": 200}, "git": git}
    torch.save(saved, folder / "checkpoint.pth")
    digest = common.sha256_of(folder / "checkpoint.pth")
    if export:
        described = {"sha256": "m", "checkpoint_sha256": digest, "compile_job": f"j{name}", "precision": "float"}
        described |= export
        (folder / "export_assets/resnet_2plus1d.json").write_text(json.dumps(described))
    if report:
        (folder / "report/report.json").write_text(json.dumps(report))
    return folder


def test_a_table_of_runs(tmp_path, run_script):
    """Flags that differ, float and w8a8 of one checkpoint, what does not belong together, and what cannot be read."""
    about = {"model_sha256": "m", "precision": "float"}
    deployed = {"figures": {"top1": 88.5, "n": 200, "ci95_low": 83.3, "ci95_high": 92.2}, "about": about}
    deployed["comparison"] = {"about": {"precision": "w8a8"}, "other_top1": 87.0, "n": 200}
    first = write_run(tmp_path, "a", 180, {"profiled_ms": 4.5, "shared": "2026-03-01"}, deployed, model_ema=0.999)
    (first / "export_assets/qevd_r2plus1d-v73.json").write_text('{"estimated_ms": [4.1, 4.4, 4.7]}')
    write_run(tmp_path, "b", 170, {"checkpoint_sha256": "other"}, {"about": {"model_sha256": "n"}}, hold_out=0.1)
    (tmp_path / "runs/c").mkdir()
    (tmp_path / "runs/c/checkpoint.pth").write_bytes(b"cut")
    result = run_script("tools/runs.py", "--score", "a", "85", code=1)
    assert "the checkpoints of 1 cannot be read: c" in result.stdout and "runs/c/checkpoint.pth" in result.stderr
    rows = read_table(tmp_path)
    a, b, c = rows["a"], rows["b"], rows["c"]
    flags = [column for column in a if column.startswith("--")]
    assert flags == ["--model-ema", "--hold-out"], "the others are the same, or no part of the recipe"
    assert (a["--model-ema"], b["--model-ema"], b["--hold-out"]) == ("0.999", "", "0.1")
    assert (a["commit"], b["commit"]) == ("0123456789", "0123456789, changed")
    assert (a["val_top1"], a["val_low"], a["validated_on"]) == ("90.0", "85.059", "val"), "Wilson's, of 180 of 200"
    assert b["validated_on"] == "held out of train (10 % wanted)"
    assert (a["float_top1"], a["w8a8_top1"], a["estimated_ms"], a["profiled_ms"]) == ("88.5", "87.0", "4.4", "4.5")
    assert (a["compile_job"], a["shared"], a["leaderboard"], a["local_minus_leaderboard"]) == (
        "ja", "2026-03-01", "85.0", "3.5")  # fmt: skip
    assert b["notes"] == "the export is of another checkpoint; the report is of another model than the export"
    assert c["notes"] == "the checkpoint cannot be read"
    page = (tmp_path / "runs/table.html").read_text(encoding="utf-8")
    assert "http" not in page and page.count("<tr>") == 4, "it asks for nothing and has a row for each run"


def test_scores_that_are_refused(tmp_path, run_script):
    assert "there is no run in" in run_script("tools/runs.py", code=2).stderr
    (tmp_path / "runs/a/export_assets").mkdir(parents=True)
    for words, said in (["a", "high"], "takes a run and a percentage"), (["b", "80"], "there is no run b; there are a"):
        assert said in run_script("tools/runs.py", "--score", *words, code=2).stderr
    assert not (tmp_path / "runs/a/leaderboard.json").exists()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "/tmp", "a b", ".hidden", "-x", "a\\b"])
def test_names_that_are_no_folder_are_refused(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        flags.run_folder(name)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --run is {name!r}: a name of letters, digits, _ . + - is needed")


def test_a_refused_name_is_one_sentence_of_the_script(tmp_path, run_script):
    for script, *words in ("tools/evaluate.py", "--run", ".."), (TRAIN, "--data-path", "x", "--run", ""):
        error = run_script(script, *words, code=2).stderr
        assert error.startswith("error: --run is") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_who_takes_a_run(tmp_path, run_script):
    """Not those who make datasets, nor the hub, before whose command it would move nothing."""
    for script in "refactor_dataset", "local_hub":
        assert "unrecognized arguments: --run" in run_script(f"tools/{script}.py", "--run", "x", code=2).stderr
    error = run_script(TRAIN, "--data-path", "x", "--run", "x", "--output-dir", "y", code=2).stderr
    assert "--output-dir: not allowed with argument --run" in error
    assert "sets: h5, manifest, report_dir" in run_script("tools/evaluate.py", "--help", COLUMNS=200).stdout


def test_help_of_training_begins_with_what_one_needs_first(run_script):
    first = run_script(TRAIN, "--help").stdout.split("what one needs first:")[1].split("\n\n")[0]
    # Python 3.13 writes "-b, --batch-size", earlier ones "-b BATCH_SIZE, --batch-size BATCH_SIZE"
    assert [line.split()[0].rstrip(",") for line in first.splitlines() if line.startswith("  -")] == [
        "--data-path", "--class-map", "--weights", "--trainable-layers", "--epochs", "-b", "--lr", "--amp",
        "--output-dir", "--run", "--resume",
    ]  # fmt: skip


@pytest.mark.quick
def test_what_belongs_to_a_run():
    """What steps write by default, in whatever way it is written; no path that only starts alike."""
    for path in "./checkpoint.pth", "dataset-export.h5", "preprocessed_tensors/manifest.jsonl", "./report":
        assert flags.in_run("runs/x", path) == f"runs/x/{path.removeprefix('./')}"
    assert flags.in_run("runs/x", ["./checkpoint.pth", "a.pth"]) == ["runs/x/checkpoint.pth", "a.pth"]
    for other in "", "./class_map.json", "./QEVD_organized", "./reports", "../report", "/report", "a/report", 4, True:
        assert flags.in_run("runs/x", other) == other


def constants_after(script, *words):
    """What `set_constants_from_flags` makes of a script's constants, as if it were started with these words."""
    values = dict(vars(importlib.import_module(script)))
    flags.set_constants_from_flags(values, words)
    return values


def test_what_a_run_writes_lies_where_its_later_steps_look(monkeypatch):
    """Under whatever of a run's names; what is named to be read, and any other place, stays. The run goes on."""
    monkeypatch.setattr(flags, "named_run", "")
    for name, folder in ("calibration_tensors", "runs/r8/calibration_tensors"), ("mine/tensors", "mine/tensors"):
        words = ("--out-root", name, "--run", "r8", "--checkpoint", "checkpoint.pth")
        made = constants_after("preprocess_and_save", *words)
        assert (made["OUT_ROOT"], made["CHECKPOINT"]) == (folder, "checkpoint.pth")
        words = {"precision": "w8a8", "CALIBRATION_DIR": made["OUT_ROOT"]}
        command = flags.next_command("example_export.py", made["OUT_ROOT"], **words).removeprefix(HUB)
        *_, script, run, r8, precision, w8a8 = command.split(" --calibration-dir")[0].split()
        assert (run, r8, precision, w8a8) == ("--run", "r8", "--precision", "w8a8"), command
        exported = constants_after("example_export", *command.split()[2:])
        assert Path(exported["CALIBRATION_DIR"]) == Path(folder), "the printed command looks elsewhere"
    assert constants_after("evaluate", "--report-dir", "./report", "--run", "r8")["report_dir"] == "runs/r8/report"
    without = constants_after("preprocess_and_save", "--out-root", "calibration_tensors")
    assert without["OUT_ROOT"] == "calibration_tensors" and "--run" not in flags.next_command("evaluate.py", "x")


@pytest.mark.parametrize(("written", "words"), [
    ("checkpoint.pth", " --checkpoint checkpoint.pth"),
    ("runs/x/checkpoint.pth", " --run x --checkpoint runs/x/checkpoint.pth"),
    ("./runs/x/other.pth", " --run x --checkpoint runs/x/other.pth"),
    ("a/checkpoint.pth", " --checkpoint a/checkpoint.pth"),
    ("runs/checkpoint.pth", " --checkpoint runs/checkpoint.pth"),
    ("runs/no name/checkpoint.pth", " --checkpoint 'runs/no name/checkpoint.pth'"),
    ("/runs/x/checkpoint.pth", " --checkpoint /runs/x/checkpoint.pth"),
])  # fmt: skip
def test_the_next_command_goes_on_in_the_run(written, words):
    path = Path(written)
    for paths in (path,), ("held_out", path):
        command = flags.next_command("example_export.py", *paths, checkpoint=path)
        assert command == f"{HUB}python tools/example_export.py{words}"


def test_the_next_command_has_the_clips_that_were_trained_on():
    """Numbers and booleans, too; the next script takes what is printed."""
    made = dict(CLIP_LEN=8, FRAME_RATE=10, ROTATE=True)
    command = flags.next_command("preprocess_and_save.py", Path("checkpoint.pth"), **made)
    assert command == "python tools/preprocess_and_save.py --clip-len 8 --frame-rate 10 --rotate True"
    assert flags.boolean("True") is True
