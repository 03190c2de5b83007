"""common.py: flags from constants, files that are whole or absent, refusals in one sentence, shares of the work."""

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import common
from common import environment, finding, flags, machine

import pytest

from aihub import logits_file

pytestmark = pytest.mark.quick

SCRIPT = '''"""Show what the flags made of the constants.

More text.
"""

import json
import math
import sys

sys.path.append(TOOLS)
from common import flags

BEFORE = 1  # not a constant of the user
# ----------------------------------------------------------------------------------------------------------------------
CLIP_LEN = 16  # frames a clip
data_path = "./clips"  # folder, 100 % of it is read
SCALE = 0.5  # a factor
SHUFFLE = False  # true: in any order
skip_profiling = True  # no measuring
parts = [  # folders
    "a",
    "b",
]
T, H = 16, 112  # frames, pixels
# ----------------------------------------------------------------------------------------------------------------------
AFTER = 1


def main():
    flags.set_constants_from_flags(globals())
    print(json.dumps([CLIP_LEN, data_path, SCALE, SHUFFLE, skip_profiling, parts, T, H]))


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def run_with_flags(tmp_path):
    """run_with_flags("--clip-len", "8", …) -> the CompletedProcess of a script with the constants above."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("TOOLS", repr(str(common.REPO / "tools"))))

    def run(*arguments):
        variables = os.environ | {"COLUMNS": "200"}
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(("arguments", "position", "value"), [
    ([], slice(None), [16, "./clips", 0.5, False, True, ["a", "b"], 16, 112]),
    (["--clip-len", "8"], 0, 8),
    (["--clip_len=8"], 0, 8),
    (["--data-path", "x y"], 1, "x y"),
    (["--scale", "2"], 2, 2.0),
    (["--shuffle"], 3, True),
    (["--shuffle", "TRUE"], 3, True),
    (["--skip-profiling", "false"], 4, False),
    (["--skip_profiling"], 4, True),
    (["--do-profiling"], 4, False),
    (["--parts", "c", "d", "e"], 5, ["c", "d", "e"]),
    (["--parts"], 5, []),
    (["--h", "224"], 7, 224),
])  # fmt: skip
def test_flags_replace_constants(run_with_flags, arguments, position, value):
    result = run_with_flags(*arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[position] == value


@pytest.mark.parametrize(("arguments", "parts", "shuffle"), [
    ([], ["a", "b"], False),
    (["c", "--clip-len", "8", "d"], ["c", "d"], False),
    (["--shuffle", "c"], ["c"], True),
    (["--shuffle", "false", "c"], ["c"], False),
    (["c", "--shuffle"], ["c"], True),
])  # fmt: skip
def test_words_without_a_flag(tmp_path, arguments, parts, shuffle):
    script = SCRIPT.replace("TOOLS", repr(str(common.REPO / "tools")))
    (tmp_path / "script.py").write_text(script.replace("globals())", 'globals(), words="parts")'))
    command = [sys.executable, tmp_path / "script.py", *arguments]
    printed = subprocess.check_output(command)
    assert json.loads(printed)[3] is shuffle and json.loads(printed)[5] == parts


@pytest.mark.parametrize("arguments", [["--clip-len", "8.5"], ["--shuffle", "maybe"], ["--colour", "red"], ["8"],
                                       ["--before", "2"], ["--after", "2"], ["--data-path"], ["--clip-len", "-8"],
                                       ["--scale=-0.5"], ["--scale", "nan"], ["--scale", "inf"]])  # fmt: skip
def test_bad_flags_exit_with_2(run_with_flags, arguments):
    result = run_with_flags(*arguments)
    assert result.returncode == 2 and "error:" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_help_shows_values_and_comments(run_with_flags):
    shown = run_with_flags("--help").stdout
    for text in ("Show what the flags made", "frames a clip (now: 16)", "folder, 100 % of it is read (now: './clips')",
                 "--clip-len CLIP_LEN", "true|false", "folders (now: ['a', 'b'])", "frames, pixels (now: 112)"):
        assert text in shown, f"{text!r} is not in\n{shown}"
    assert "More text" not in shown and "--before" not in shown and "--after" not in shown, shown


@pytest.mark.skipif(sys.version_info < (3, 11), reason="venv takes any folder before Python 3.11")
def test_where_python_makes_no_environment_the_folder_is_named(tmp_path, monkeypatch, capfd):
    folder = tmp_path / f"a{os.pathsep}b"
    folder.mkdir()
    monkeypatch.setattr(environment, "REPO", folder)
    with pytest.raises(SystemExit) as end:
        environment.make_environment(common.REPO / "requirements.txt")
    assert end.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"below a folder with {os.pathsep!r} in its name: {folder}. Rename it" in error and "ln -s" in error


@pytest.mark.parametrize(
    "script", ["tools/split_videos.py", "tools/predict.py", "references/video_classification/train.py"]
)
def test_a_script_outside_its_environment_says_how_to_enter_it(tmp_path, script):
    """-S leaves out what is installed; train.py would import torch before anything else."""
    command = [sys.executable, "-S", str(common.REPO / script), "video.mp4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and "is not installed for" in result.stderr
    assert "source .venv/bin/activate" in result.stderr


def test_class_maps_that_scripts_know(tmp_path, monkeypatch):
    """Those that hold the labels, and those of exactly a model's classes; a damaged one is none."""
    monkeypatch.chdir(tmp_path)
    official = common.load_class_map(common.REPO / "class_map.json")
    assert common.class_map_with(["squats"]) == common.REPO / "class_map.json"
    assert common.class_map_with(sorted(official, key=official.get), only_these=True) == common.REPO / "class_map.json"
    assert common.class_map_with(["squats", "mine"]) == common.class_map_with(["squats"], only_these=True) == ""
    for text, found in ('{"mine": 0, "squats": 1}', Path("my_class_map.json")), ("[1]", ""), ("{", ""):
        Path("my_class_map.json").write_text(text)
        assert common.class_map_with(["squats", "mine"]) == found
        assert common.class_map_with(["mine", "squats"], only_these=True) == found
        assert common.class_map_with(["squats", "mine"], only_these=True) == ""
        own = found or "YOUR_CLASS_MAP"
        assert logits_file.evaluate_command("a.h5", "b", ["mine", "squats"]).endswith(f" --class-map {own}")
    for classes in [], None, sorted(official, key=official.get):
        assert "class-map" not in logits_file.evaluate_command("a.h5", "b", classes)


def test_the_next_command_starts_a_local_hub_where_there_is_no_account(tmp_path, monkeypatch):
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "client.ini"))
    hub = "python tools/local_hub.py "
    for script in "example_export.py", "run_inference.py":
        assert flags.next_command(script, Path("x")) == f"{hub}python tools/{script}"
    assert flags.next_command("preprocess_and_save.py", Path("x")) == "python tools/preprocess_and_save.py"
    (tmp_path / "client.ini").touch()
    assert flags.next_command("example_export.py", Path("x")) == "python tools/example_export.py"


def test_written_then_renamed(tmp_path):
    """Whole or as before, also when the writing fails half-way; nothing is left behind."""
    path = tmp_path / "file"
    path.write_text("old")
    with common.written_then_renamed(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old", "the file changed before it was whole"
        assert temporary.parent == path.parent, "a rename from another folder may cross file systems"
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), common.written_then_renamed(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def refused(capsys, function, *arguments):
    """The sentence that `function` refuses its arguments with."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_the_class_map_of_the_repository():
    """92 classes, numbered in the order of their folder names."""
    class_map = common.load_class_map(common.REPO / "class_map.json")
    assert len(class_map) == 92 and list(class_map) == sorted(class_map)
    assert list(class_map.values()) == list(range(92))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": 1}', '{"a": 0, "b": 0}', '{"a": 0, "b": 2}', '{"a": "0"}',
                                  '{"a": [0]}', '{"a": 0, "b": true}', '{"a": 0.0}', "\udcff"])  # fmt: skip
def test_bad_class_maps(tmp_path, capsys, text):
    path = tmp_path / "map.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert str(path) in refused(capsys, common.load_class_map, path)


def test_no_class_map(tmp_path, capsys):
    assert "there is no class map" in refused(capsys, common.load_class_map, tmp_path / "map.json")
    assert "cannot read the class map" in refused(capsys, common.load_class_map, tmp_path)


ROW = {"video_path": "squats/1.mp4", "label": "squats", "tensor_path": "squats/1.npy", "shape": [1, 3, 16, 112, 112]}


def test_read_manifest(tmp_path):
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    assert common.read_manifest(tmp_path / "manifest.jsonl") == [ROW, ROW]


@pytest.mark.parametrize(("second", "words"), [
    (b'{"video_path": "squats', "line 2"),
    (b'{"video_path": "a", "label": "squats"}', "line 2"),
    (b'["video_path"]', "line 2"),
    (b"\xff\xfe", "line 2"),
    (None, "is empty"),
])  # fmt: skip
def test_bad_manifests(tmp_path, capsys, second, words):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"" if second is None else json.dumps(ROW).encode() + b"\n" + second + b"\n")
    assert words in refused(capsys, common.read_manifest, path)


def test_no_manifest(tmp_path, capsys):
    assert "there is no manifest" in refused(capsys, common.read_manifest, tmp_path / "manifest.jsonl")


def array(task, first, last, step, count):
    numbers = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


def test_shares():
    """No launcher, torchrun (also inside a SLURM array), and arrays that start anywhere and count in steps."""
    assert machine.launcher({}) == (0, 1, 0, 1)
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert machine.launcher(torchrun | array(1, 0, 1, 1, 2)) == (3, 8, 1, 2)
    assert machine.launcher({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8, 3, 8), "LOCAL_RANK need not be set"
    srun = {"SLURM_PROCID": "9", "SLURM_NTASKS": "20", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert machine.launcher(srun | {"SLURM_TASKS_PER_NODE": "8(x2),4"}) == (9, 20, 1, 8)
    assert machine.launcher({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}) == (1, 2, 1, 2)
    for tasks in (range(8), range(1, 9), range(0, 16, 2), range(5, 12, 3)):
        settings = (tasks[0], tasks[-1], tasks.step, len(tasks))
        shares = [machine.launcher(array(task, *settings))[:2] for task in tasks]
        assert shares == [(i, len(tasks)) for i in range(len(tasks))], f"--array {tasks}"
    inside = array(1, 0, 1, 1, 2) | {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1"}
    inside["SLURM_STEP_ID"] = "0"
    assert machine.launcher(inside)[:2] == (4, 6), "an srun of 3 processes in the second of two array tasks"
    assert machine.launcher(inside, array=False)[:2] == (1, 3), "training: each task of an array is a run by itself"


def test_launcher_variables_that_make_no_sense_are_refused(capsys):
    assert "WORLD_SIZE is None" in refused(capsys, machine.launcher, {"RANK": "0"})
    assert "'two'" in refused(capsys, machine.launcher, {"RANK": "0", "WORLD_SIZE": "two"})
    for sizes in {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}:
        assert "WORLD_SIZE is '0'" in refused(capsys, machine.launcher, {"RANK": "0"} | sizes)
    step = array(1, 0, 3, 0, 4)
    assert "SLURM_ARRAY_TASK_STEP is '0'" in refused(capsys, machine.launcher, step)
    assert "process 8 of 8" in refused(capsys, machine.launcher, {"RANK": "8", "WORLD_SIZE": "8"})


def test_a_batch_script_without_srun_is_refused(capsys, monkeypatch):
    """It would do an eighth, or train alone; what does not share its work runs there, with all cores."""
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}
    for more in {}, array(1, 0, 3, 1, 4):
        assert "has 8 tasks" in refused(capsys, machine.launcher, batch | more)
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    assert "has 8 tasks" in refused(capsys, machine.launcher, batch | shell)
    assert machine.launcher(batch | shell | {"SLURM_STEP_NUM_TASKS": "8"}) == (0, 8, 0, 8)
    assert machine.launcher(batch | {"SLURM_NTASKS": "1"}) == (0, 1, 0, 1)
    assert machine.launcher({"SLURM_NTASKS": "8"}) == (0, 1, 0, 1), "a shell of salloc"
    for name, value in batch.items():
        monkeypatch.setenv(name, value)
    assert machine.num_workers() == machine.num_cores()


def test_mpirun_is_refused(capsys):
    for name in machine.OF_MPI:
        assert "mpirun started 4 processes" in refused(capsys, machine.launcher, {name: "4"})
        assert machine.launcher({name: "1"}) == (0, 1, 0, 1)
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "PMI_SIZE": "2"}
    assert machine.launcher(srun)[:2] == (1, 2), "srun --mpi=pmi2"


def test_an_array_with_gaps_is_noticed(capsys):
    """Its last task would take a share that does not exist, and another one would be nobody's."""
    assert "--array 0-2" in refused(capsys, machine.launcher, array(6, 1, 6, 1, 3))


@pytest.mark.parametrize(
    "own, files, cores",
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, math.inf),
        ("0::/a\n", {}, math.inf),
    ],
)
def test_a_containers_share_of_the_cores_is_seen(tmp_path, own, files, cores):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cgroup_quota(tmp_path, tmp_path / "own") == cores


def test_cores_are_counted_where_no_system_call_tells(monkeypatch):
    """macOS and Windows have no affinity and no cgroups."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(machine, "cgroup_quota", lambda: math.inf)
    assert machine.num_cores() == 6
    monkeypatch.setattr(machine, "launcher", lambda: machine.Launcher(0, 4, 0, 4))
    assert (machine.num_workers(), machine.num_workers(5)) == (1, 5)


@pytest.fixture
def tree(tmp_path):
    """A folder of two classes, one of them a link, with all that a walk has to leave out."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in root / "squats/deeper", root / ".hidden", root / "__MACOSX/squats", root / "empty", elsewhere:
        folder.mkdir(parents=True)
    for name in ("b.MP4", "a.mp4", "._a.mp4", "notes.txt", "README", "deeper/c.mkv"):
        (root / "squats" / name).touch()
    for path in root / "top.mov", root / ".hidden/x.mp4", root / "__MACOSX/squats/x.mp4", elsewhere / "1.mp4":
        path.touch()
    (root / "jabs").symlink_to(elsewhere)
    (root / "squats/loop").symlink_to(root)
    (root / "squats/linked.mp4").symlink_to(elsewhere / "1.mp4")
    return root


def test_one_walk_finds_what_is_a_video(tree):
    (tree / "squats/gone.mp4").symlink_to("nowhere")
    os.mkfifo(tree / "squats/pipe.mp4")
    (tree / "squats/device.mp4").symlink_to("/dev/zero")
    found = finding.find_videos(tree)
    assert found.videos == ["jabs/1.mp4", "squats/a.mp4", "squats/b.MP4", "squats/linked.mp4"]
    assert found.misplaced == ["squats/deeper/c.mkv", "top.mov"]
    assert found.other_endings == {".txt": 1, "": 1}
    assert {path: why.partition(" or ")[0] for path, why in found.failures.items()} == {
        "squats/gone.mp4": "it is a link to nothing",
        "squats/pipe.mp4": "it is a pipe, a socket",
        "squats/device.mp4": "it is a pipe, a socket",
    }
    assert finding.class_folders(tree) == ["empty", "jabs", "squats"]
    assert finding.find_videos(tree, {".txt"}).videos == ["squats/notes.txt"]
    assert "cannot be read" in finding.find_videos(tree / "nowhere").failures["."]


def test_a_folder_goes_by_its_own_name_and_not_by_that_of_a_link_to_it(tree):
    (tree / "a_link").symlink_to(tree / "squats")
    assert [path for path in finding.find_videos(tree).videos if path.endswith("a.mp4")] == ["squats/a.mp4"]


def test_one_writer_at_a_time_also_where_there_are_no_locks(tmp_path, monkeypatch, capsys):
    has_locks = common.has_locks(tmp_path)
    with common.only_writer(tmp_path / "new/out.h5", "--output-h5"):
        if not has_locks:
            pytest.skip("the file system has no locks: set TMPDIR to one that has")
        with pytest.raises(SystemExit) as stopped, common.only_writer(tmp_path / "new/out.h5", "--output-h5"):
            pass
        assert stopped.value.code == 2 and "pass another --output-h5" in capsys.readouterr().err
    with common.only_writer(tmp_path / "new/out.h5", "--output-h5"):
        """The first has let it go."""

    for number in errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS:

        def no_locks(file, operation, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with common.only_writer(tmp_path / "out.h5", "--output-h5"):
            assert "has no locks" in capsys.readouterr().out
