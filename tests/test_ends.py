"""How scripts start and end where something outside of them is odd: Ctrl-C, users, file systems, packages."""

import fcntl
import os
import subprocess
import sys

import common

import pytest

from conftest import REPO

# on PYTHONPATH: presses Ctrl-C when the file that CTRL_C_AT names is opened
PRESSES = """
import os, signal, sys

def watch(event, arguments):
    if event == "open" and os.environ["CTRL_C_AT"] in str(arguments[0]):
        signal.raise_signal(signal.SIGINT)

sys.addaudithook(watch)
"""


def python(code, *arguments, **options):
    code = f"import sys; sys.path.append({str(REPO / 'tools')!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize(("script", "at", "arguments"), [
    ("tools/evaluate.py", "manifest.jsonl", ["--manifest", "manifest.jsonl", "--h5", "a.h5"]),
    ("tools/refactor_dataset.py", "labels.json", ["--labels-json", "labels.json", "--srcs", "part"]),
    ("tools/make_sample_dataset.py", "settings.json", ["--out", "sample", "--num-workers", "1"]),
    ("tools/quickstart.py", "requirements.txt", []),
])  # fmt: skip
def test_ctrl_c_is_one_sentence(tmp_path, run_script, script, at, arguments):
    (tmp_path / "sitecustomize.py").write_text(PRESSES)
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    (tmp_path / "part").mkdir()
    (tmp_path / "labels.json").write_text("[]")
    (tmp_path / "a.h5").touch()
    error = run_script(script, *arguments, code=130, PYTHONPATH=tmp_path, CTRL_C_AT=at).stderr
    assert error.endswith("interrupted; run the same command again to go on\n") and "Traceback" not in error, error


def test_ctrl_c_while_a_worker_is_forked(tmp_path):
    """Python prints what is raised in such a moment, and goes on."""
    code = """import common, os, signal, time
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
if not os.fork():
    os._exit(0)
time.sleep(20)
print("went on")
"""
    ended = python(code)
    assert (ended.returncode, ended.stdout) == (130, ""), ended
    # before it, from Python 3.12 on, a warning of the fork, where numpy's library has threads
    assert ended.stderr.endswith("\ninterrupted; run the same command again to go on\n"), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr


def test_a_file_system_that_refuses_is_one_sentence(tmp_path):
    """Also one that a script did not think of, such as a full disk; what is a fault of ours stays a traceback."""
    ended = python("import common; open('/dev/full', 'w').write('x' * 10**6)")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1) and "No space left on device" in ended.stderr, ended
    ended = python("import common, sys; open(sys.argv[1])", str(tmp_path / ("a" * 300)))
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and "too long" in ended.stderr, ended
    ended = python("import common; open('absent')")
    assert ended.returncode == 1 and "Traceback" in ended.stderr, ended


def test_a_script_goes_on_where_nobody_reads_it(tmp_path):
    """`| head -1` and closed streams; what is not printed is done all the same."""
    work = "import common, pathlib; print('one', flush=True); {}; pathlib.Path('done').touch(); print('two')"
    many = work.format("[print('more' * 9999) for _ in range(9)]")
    for shell in "{} | head -1", "{} 2>&1 | head -1", "{} >&-", "{} >&- 2>&-", "{} 2>&- | head -1", "{} <&-":
        for flag in "", "-u":
            script = shell.format(f'"{sys.executable}" {flag} -c "{many}"') + '; echo "${PIPESTATUS[0]}"'
            options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO / "tools")}, text=True)
            ended = subprocess.run(["bash", "-c", script], **options, capture_output=True)
            assert (tmp_path / "done").exists() and ended.stdout.endswith("0\n") and not ended.stderr, (shell, ended)
            (tmp_path / "done").unlink()


def test_the_patch_goes_to_a_reader_that_ends():
    shown = f'"{sys.executable}" {REPO}/torchvision_patches/video_utils.py'
    ended = subprocess.run(["bash", "-c", f"{shown} | head -1"], capture_output=True, text=True)
    assert "VideoClips._compute_frame_pts" in ended.stdout and not ended.stderr, ended.stderr


def test_a_new_hdf5_file_needs_no_locks(tmp_path):
    """A network drive may have none, and then h5py cannot make a file."""
    with common.new_hdf5(tmp_path / "new.h5"), open(tmp_path / "new.h5") as other:
        if common.has_locks(tmp_path):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_odd_settings_of_python_and_matplotlib(tmp_path):
    """What a kernel leaves to what `!` starts, and -OO, which takes the text of --help away."""
    environment = os.environ | {"MPLBACKEND": "module://not_installed_here"}
    ended = python("import common; from matplotlib import pyplot; pyplot.figure()", env=environment)
    assert ended.returncode == 0, ended.stderr
    command = [sys.executable, "-OO", REPO / "tools/preprocess_and_save.py", "--help"]
    assert "Turn a folder of videos" in subprocess.run(command, capture_output=True, text=True).stdout


needs_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be another user")


@needs_root
def test_a_file_of_another_user_says_whose_it_is(tmp_path):
    (tmp_path / "theirs").touch(mode=0o600)
    code = "import common, os, sys; os.setgid(4321); os.setuid(4321); open(sys.argv[1])"
    ended = python(code, str(tmp_path / "theirs"))
    assert ended.returncode == 2 and "belongs to user 0, this is user 4321" in ended.stderr, ended.stderr


# as pwd is for `docker --user 4321`
NAMELESS = """
import pwd

def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = getpwuid
"""


def test_a_user_without_a_name_can_import_torchvision(tmp_path):
    unnamed = {key: value for key, value in os.environ.items() if key not in ("USER", "LOGNAME", "USERNAME", "LNAME")}
    ended = python(NAMELESS + "import common, torchvision; print(7)", env=unnamed)
    assert ended.stdout == "7\n", ended.stderr
