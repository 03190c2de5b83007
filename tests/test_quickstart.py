"""tools/quickstart.py: the whole pipeline as a newcomer runs it, in small, with every socket watched."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common import environment

import pytest

import quickstart
from conftest import REPO
from test_compile_offline import install_wheels

pytestmark = pytest.mark.slow

# Found by every Python that starts with it on PYTHONPATH: writes down each address that a socket connects or sends to,
# and each host name that is looked up.
WATCHER = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        family, address = arguments[0].family.name, arguments[1]
    elif event == "socket.getaddrinfo":
        family, address = "name", arguments[0]
    else:
        return
    with open(os.environ["SOCKET_LOG"], "a") as log:
        log.write(f"{family} {address!r} {sys.argv[:1]}\\n")

sys.addaudithook(watch)
"""
LOCAL = ("AF_UNIX ", "AF_INET ('127.0.0.1', ", "name '127.0.0.1'", "name 'localhost'", "name b'127.0.0.1'", "name None")


def project_files():
    """{path: time of the last change} of the project's files; hidden folders and __pycache__ are left out."""
    files = {}
    for folder, folders, names in os.walk(REPO):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        files |= {path: path.stat().st_mtime_ns for path in (Path(folder, name) for name in names)}
    return files


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Where a small run goes, its arguments and its environment."""
    environment.make_environment(REPO / "requirements.txt")
    install_wheels()  # tests beside this one do, and quickstart has a step more where they are
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "sitecustomize.py").write_text(WATCHER)
    arguments = ["--folder", folder / "sample", "--train-videos-per-class", 1, "--val-videos-per-class", 1]
    variables = {"PYTHONPATH": folder, "SOCKET_LOG": folder / "sockets", "TORCH_HOME": folder / "no weights"}
    return folder, [*arguments, "--epochs", 1], variables


@pytest.fixture(scope="module")
def result(small_run):
    _, arguments, environment = small_run
    before = project_files()
    completed = subprocess.run(
        [sys.executable, REPO / "tools/quickstart.py", *map(str, arguments)],
        env=os.environ | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stdout[-5000:] + completed.stderr[-5000:]
    assert project_files() == before, "files outside FOLDER changed"
    return completed.stdout


def test_a_folder_with_a_space_is_quoted(monkeypatch):
    """Each command has as many words as with another name, and works as it is printed."""
    parts = [shlex.split(command) for _, command in [*quickstart.steps(), quickstart.offline_step()]]
    monkeypatch.setattr(quickstart, "FOLDER", "my sample's")
    others = [shlex.split(command) for _, command in [*quickstart.steps(), quickstart.offline_step()]]
    for words, again in zip(parts, others, strict=True):
        assert again == [re.sub("^sample(?=/|$)", "my sample's", word) for word in words]


def test_every_step_runs_and_the_two_accuracies_agree(small_run, result):
    folder = small_run[0] / "sample"
    figures = json.loads(result.splitlines()[-1])
    named = {"val_acc1", "deployed_acc1", "deployed_acc5", "num_val_videos", "seconds"}
    assert figures.keys() - {"estimated_ms"} == named, "estimated_ms comes where Qualcomm's compiler is installed"
    assert figures["num_val_videos"] == 6 and abs(figures["val_acc1"] - figures["deployed_acc1"]) < 0.001, figures
    assert result.count("\n$ python ") >= 10 and "training starts from scratch" in result
    assert "Of so few videos (1 a class, 1 epoch) about 16.7 % Top-1, chance, is expected" in result
    made = ("dataset/contact_sheet.png", "training/checkpoint.pth", "training/curves.png", "report/report.html")
    assert len(list((folder / "predictions").glob("*.png"))) == 1, "one video of the exercise, one picture"
    for file in (*made, "preprocessed_tensors/manifest.jsonl", "export_assets/resnet_2plus1d.bin", "dataset-export.h5"):
        assert (folder / file).stat().st_size > 1000, f"{file} is missing or empty"


def test_every_logit_is_torchs(small_run, result, run_script):
    """Each clip's row of dataset-export.h5 against torchvision's network on the checkpoint, within 1e-4."""
    checked = run_script("tests/benchmarks/check_sample.py", small_run[0] / "sample").stdout
    figures = json.loads(checked.splitlines()[-1])
    assert figures["clips"] == 6 and 0 <= figures["max_difference"] <= 1e-4, checked
    assert round(figures["float_top1"], 2) == round(json.loads(result.splitlines()[-1])["deployed_acc1"], 2)


def test_no_socket_leaves_this_machine(small_run, result):
    lines = (small_run[0] / "sockets").read_text().splitlines()
    assert any("AF_INET (" in line for line in lines), "not even the local hub was seen: the watcher is blind"
    outside = [line for line in lines if not line.startswith(LOCAL)]
    assert not outside, "\n".join(outside[:20])


def test_a_second_run_changes_nothing(small_run, result, run_script):
    folder, arguments, environment = small_run
    files = {path: path.stat().st_mtime_ns for path in (folder / "sample").rglob("*") if path.is_file()}
    again = run_script("tools/quickstart.py", *arguments, **environment).stdout
    assert again.count("done before") >= 10 and "\n$ python tools/predict" not in again
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "sample").rglob("*") if path.is_file()}


def test_another_number_of_videos_is_not_mixed_in(small_run, result, run_script):
    _, arguments, environment = small_run
    more = run_script("tools/quickstart.py", *arguments, "--val-videos-per-class", 2, code=2, **environment)
    assert "holds another number of videos" in more.stderr and "\n$ " not in more.stdout


@pytest.mark.quick
def test_what_is_expected_of_few_videos(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / "QEVD_organized/val" / name).mkdir(parents=True)
    monkeypatch.setattr(quickstart, "FOLDER", str(tmp_path))
    assert quickstart.about_so_few() == "", "the usual number learns"
    for videos, epochs, seen in (1, 1, "1 a class, 1 epoch"), (2, 2, "2 a class, 2 epochs"):
        monkeypatch.setattr(quickstart, "TRAIN_VIDEOS_PER_CLASS", videos)
        monkeypatch.setattr(quickstart, "EPOCHS", epochs)
        assert f"({seen}) about 25.0 % Top-1" in quickstart.about_so_few()


@pytest.mark.quick
def test_the_readme_teaches_the_commands_that_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # with pre-trained weights there, one command would name them
    readme = (REPO / "README.md").read_text() + (REPO / "tools/README.md").read_text()
    for what, command in [*quickstart.steps(), quickstart.offline_step()]:
        assert f"\n{command}\n" in readme, f"README.md does not hold the command to {what}:\n{command}"
    assert Path(quickstart.FOLDER).name in (REPO / ".gitignore").read_text()


def test_weights_in_torchs_cache_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not any("--weights" in command for _, command in quickstart.steps())
    quickstart.pretrained_weights().parent.mkdir(parents=True)
    quickstart.pretrained_weights().touch()
    assert sum("--weights KINETICS400_V1" in command for _, command in quickstart.steps()) == 1


def test_a_step_that_fails_stops_the_run_with_its_exit_code(capfd):
    with pytest.raises(SystemExit) as stop:
        quickstart.run("python -c print(7);exit(3)", sys.executable)
    assert stop.value.code == 3
    printed = capfd.readouterr().out
    assert "$ python -c print(7);exit(3)\n7\n" in printed and "mend what it says and start again" in printed
