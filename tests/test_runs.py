"""--run NAME: a chain of all steps in a folder of its own, and two runs that leave each other's files untouched."""

import json
import shlex
from pathlib import Path

import common
from common import flags

import pytest

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
    tensors = "python tools/preprocess_and_save.py --run float --checkpoint runs/float/checkpoint.pth --data-root"
    assert f"next: {tensors}" in out
    assert out.endswith(f"then {HUB}python tools/example_export.py --run float\n"), out
    assert "  left: 0 min of the run  " in out
    assert "runs/float holds the checkpoint" in run_script(TRAIN, *data, *small, *run, code=2).stderr
    out = run_script("tools/preprocess_and_save.py", *run, "--clip-len", 4).stdout
    assert "space     at most 2.4 MB are needed in" in out
    assert f"next: {HUB}python tools/example_export.py --run float\n" in out
    out = run_script(*hub, "tools/example_export.py", *run).stdout
    assert "next: python tools/local_hub.py python tools/run_inference.py --run float\n" in out
    assert "python tools/compile_offline.py --run float\n" in out
    out = run_script(*hub, "tools/run_inference.py", *run).stdout
    assert out.splitlines()[-1] == "next: python tools/evaluate.py --run float --class-map my_class_map.json"
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


@pytest.mark.parametrize(("written", "words"), [
    ("checkpoint.pth", ""),
    ("runs/x/checkpoint.pth", " --run x"),
    ("./runs/x/other.pth", " --run x --checkpoint runs/x/other.pth"),
    ("a/checkpoint.pth", " --checkpoint a/checkpoint.pth"),
    ("runs/checkpoint.pth", " --checkpoint runs/checkpoint.pth"),
    ("runs/no name/checkpoint.pth", " --checkpoint 'runs/no name/checkpoint.pth'"),
    ("/runs/x/checkpoint.pth", " --checkpoint /runs/x/checkpoint.pth"),
])  # fmt: skip
def test_the_next_command_goes_on_in_the_run(written, words):
    path = Path(written)
    command = flags.next_command("example_export.py", path, checkpoint=path)
    assert command == f"{HUB}python tools/example_export.py{words}"


def test_the_next_command_has_the_clips_that_were_trained_on():
    """Numbers and booleans, too; the next script takes what is printed."""
    made = dict(CLIP_LEN=8, FRAME_RATE=10.0, ROTATE=True)
    command = flags.next_command("preprocess_and_save.py", Path("checkpoint.pth"), **made)
    assert command == "python tools/preprocess_and_save.py --clip-len 8 --frame-rate 10 --rotate True"
    assert flags.boolean("True") is True
    usual = dict(CLIP_LEN=16, FRAME_RATE=4.0, ROTATE=False)
    assert flags.next_command("preprocess_and_save.py", Path("checkpoint.pth"), **usual) == command.split(" --")[0]
