"""refactor_dataset.py sorts what the labels name, refuses what it must, and can be killed at any moment."""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import refactor_dataset
from conftest import NO_LINKS

pytestmark = pytest.mark.quick

SCRIPT = "tools/refactor_dataset.py"
OTHER_FILE_SYSTEM = Path("/dev/shm")


@pytest.fixture
def qevd(tmp_path):
    """Four parts as they arrive, in tmp_path/dataset: part 2 is empty, part 3 missing, part 4 unpacked doubled."""
    part = tmp_path / "dataset" / "QEVD-FIT-300k-Part-{}"
    add_video(Path(str(part).format(1)) / "00000007.mp4", b"seven")
    add_video(Path(str(part).format(1)) / "00000003.mp4", b"three")
    Path(str(part).format(2)).mkdir()
    add_video(Path(str(part).format(4)) / "QEVD-FIT-300k-Part-4" / "00000001.mp4", b"one")
    add_video(Path(str(part).format(4)) / "unlabelled.mp4", b"-")
    write_labels(tmp_path, [record(7, "elbow plank"), record(3, "elbow plank"), record(1, "cross + hook right", "val")])
    return tmp_path


@pytest.fixture(params=["copy", "hardlink", "symlink"])
def mode(request):
    if NO_LINKS and request.param != "copy":
        pytest.skip(NO_LINKS)
    return request.param


PLACED = {
    "train/elbow_plank/00000007.mp4": b"seven",
    "train/elbow_plank/00000003.mp4": b"three",
    "val/cross_+_hook_right/00000001.mp4": b"one",
}


def record(number, label, split="train"):
    return {"video_path": f"./{number:08d}.mp4", "label": label, "split": split}


def write_labels(root, records):
    (root / "dataset/fine_grained_labels_release.json").write_text(json.dumps(records))


def add_video(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1_600_000_000, 1_600_000_000.25))


def tree(folder):
    """{path below `folder`: content} of every file, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def state(folder):
    """What a run must not touch: names, contents, times and kinds of everything below `folder`."""
    return {str(p): (os.lstat(p).st_mtime_ns, os.lstat(p).st_mode, p.is_file() and p.read_bytes())
            for p in sorted(folder.rglob("*"))}


def table(output):
    """{split: [records, placed, already there, missing, refused]} of the printed table; each row must add up."""
    rows = re.findall(r"^(train|val|other|all) +([\d,]+(?: +[\d,]+){4})$", output, re.MULTILINE)
    counts = {split: [int(n.replace(",", "")) for n in numbers.split()] for split, numbers in rows}
    assert counts, f"no table in\n{output}"
    for split, (records, *outcomes) in counts.items():
        assert records == sum(outcomes), f"the row of {split} does not add up\n{output}"
    assert counts["all"] == [sum(column) for column in zip(*(v for k, v in counts.items() if k != "all"))], output
    return counts


def missing_rows(root):
    with open(root / "missing.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_parts_are_sorted_and_named(qevd, run_script):
    """Found by name in any part and in a doubled folder; missing and empty parts are named."""
    output = run_script(SCRIPT).stdout
    assert tree(qevd / "QEVD_organized") == PLACED
    assert re.search(r"Part-2: is empty", output), output
    assert re.search(r"Part-3: this folder cannot be read: No such file", output), output
    assert re.search(r"Part-4: 2 files, 1 of them in the labels", output), output
    assert table(output) == {"train": [2, 2, 0, 0, 0], "val": [1, 1, 0, 0, 0], "all": [3, 3, 0, 0, 0]}
    assert "train: 1 classes; smallest: elbow_plank 2" in output, output
    assert missing_rows(qevd) == []


def test_the_printed_usage_works(qevd, monkeypatch):
    """The README's lines, in Python, with Path arguments and with text."""
    monkeypatch.chdir(qevd)
    srcs = []
    srcs.append(Path("./dataset/QEVD-FIT-300k-Part-1"))
    srcs.append(Path("./dataset/QEVD-FIT-300k-Part-4"))
    dest = Path("./QEVD_organized")
    refactor = refactor_dataset.DatasetRefactorer(srcs, dest, Path("./dataset/fine_grained_labels_release.json"))
    refactor.refactor_dataset()
    assert tree(dest) == PLACED

    texts = [str(src) for src in srcs], str(dest), "./dataset/fine_grained_labels_release.json"
    counts = refactor_dataset.DatasetRefactorer(*texts).refactor_dataset()
    assert counts["train"] == {"already there": 2} and counts["val"] == {"already there": 1}


def test_modes(qevd, run_script, mode):
    """Each mode places the same tree; a second run changes nothing and says that all is there."""
    source = qevd / "dataset/QEVD-FIT-300k-Part-1/00000007.mp4"
    before = source.stat()
    run_script(SCRIPT, "--mode", mode)
    target = qevd / "QEVD_organized/train/elbow_plank/00000007.mp4"
    assert tree(qevd / "QEVD_organized") == PLACED
    assert target.stat().st_mtime_ns == before.st_mtime_ns, "the time of the video is not kept"
    assert target.is_symlink() == (mode == "symlink")
    assert source.exists()
    assert (target.stat().st_ino == before.st_ino) == (mode != "copy"), f"{mode} made the wrong kind of file"

    placed = state(qevd / "QEVD_organized")
    assert table(run_script(SCRIPT, "--mode", mode).stdout)["all"] == [3, 0, 3, 0, 0]
    assert state(qevd / "QEVD_organized") == placed


def test_only_the_same_file_is_skipped(qevd, run_script):
    """Half copies, other content of equal size and old links are replaced; equal content is kept, whatever its time."""
    folder = qevd / "QEVD_organized/train/elbow_plank"
    run_script(SCRIPT)
    (folder / "00000007.mp4").write_bytes(b"sev")  # a half copy
    (folder / "00000003.mp4").write_bytes(b"THREE")  # equal size, other time and content
    kept = qevd / "QEVD_organized/val/cross_+_hook_right/00000001.mp4"
    os.utime(kept, (5, 5))  # equal content, other time
    output = run_script(SCRIPT).stdout
    assert tree(qevd / "QEVD_organized") == PLACED
    assert table(output)["all"] == [3, 2, 1, 0, 0]
    assert kept.stat().st_mtime == 5, "an equal file was placed again"
    assert "2 videos under QEVD_organized are not what MODE copy makes of their sources" in output

    (folder / "00000007.mp4").unlink()
    (folder / "00000007.mp4").symlink_to(qevd / "dataset/QEVD-FIT-300k-Part-1/00000007.mp4")
    assert table(run_script(SCRIPT).stdout)["all"] == [3, 1, 2, 0, 0]
    assert not (folder / "00000007.mp4").is_symlink(), "MODE copy left a link of an earlier run"


REFUSED = [
    (record(10, "elbow plnk"), "label 'elbow plnk' is not in the class map"),
    (record(11, "squats", "test"), "unknown split 'test'"),
    (record(3, "squats"), "00000003.mp4 is elbow_plank in record 1 already"),
    ({"video_path": "../00000012.mp4", "label": "squats", "split": "train"}, "leaves the source folder"),
    ({"video_path": "a/../../00000012.mp4", "label": "squats", "split": "train"}, "leaves the source folder"),
    ({"video_path": "/etc/00000013.mp4", "label": "squats", "split": "train"}, "leaves the source folder"),
    ({"video_path": "C:\\00000013.mp4", "label": "squats", "split": "train"}, "leaves the source folder"),
    (record(14, "../squats"), "label '../squats' contains a path separator"),
    (record(15, "a\\b", "val"), "contains a path separator"),
    ({"video_path": "./", "label": "squats", "split": "train"}, "names no file"),
    ({"video_path": "\ud800\0.mp4", "label": "squats", "split": "train"}, "names no file"),
    ({"video_path": "00000016.mp4", "split": "train"}, "is no object with the strings"),
    ({"video_path": 16, "label": ["squats"], "split": ["val"]}, "is no object with the strings"),
    ("00000017.mp4", "is no object with the strings"),
]


def test_names_of_classes_are_printed_with_escapes(qevd, run_script):
    """A label that the class map has, too, may hold a sequence that moves the cursor."""
    (qevd / "map.json").write_text(json.dumps({"\x1b[2Jplank": 0, "squats": 1}))
    write_labels(qevd, [record(7, "\x1b[2Jplank"), record(3, "squats"), record(1, "\x1b[2Kother")])
    output = run_script(SCRIPT, "--class-map", "map.json", code=1).stdout
    assert "\x1b" not in output and "\\x1b[2Jplank 1" in output, output


def test_bad_records_are_refused_with_their_number(qevd, run_script):
    """Everything refused is named by number and reason, on the screen and in missing.csv; the rest goes on."""
    labels = json.loads((qevd / "dataset/fine_grained_labels_release.json").read_text())
    write_labels(qevd, labels + [bad for bad, _ in REFUSED] + [record(99, "squats")])
    for number in (10, 11, 12, 13, 14, 15, 16, 17):
        add_video(qevd / f"dataset/QEVD-FIT-300k-Part-1/{number:08d}.mp4", b"wanted by a bad record only")
    output = run_script(SCRIPT, code=1).stdout
    assert tree(qevd / "QEVD_organized") == PLACED
    for number, (bad, reason) in enumerate(REFUSED, len(labels)):
        line = next((line for line in output.splitlines() if line.startswith(f"refused: record {number},")), "")
        assert reason in line, f"record {number}, {bad}: {reason!r} expected\n{output}"
    assert table(output)["all"] == [len(labels) + len(REFUSED) + 1, 3, 0, 1, len(REFUSED)]
    assert "missing: record 17, '00000099.mp4': in no source" in output, output

    rows = missing_rows(qevd)
    assert [int(row["record"]) for row in rows] == list(range(3, 18))
    assert [row["outcome"] for row in rows] == ["refused"] * len(REFUSED) + ["missing"]
    assert rows[-1]["video"] == "00000099.mp4" and rows[-1]["split"] == "train" and rows[-1]["label"] == "squats"
    for row, (_, reason) in zip(rows, REFUSED):
        assert reason in row["reason"], row


def test_repeated_records(qevd, run_script):
    """A record that repeats another counts as already there if that was placed, as missing if that is missing."""
    labels = json.loads((qevd / "dataset/fine_grained_labels_release.json").read_text())
    write_labels(qevd, labels + [record(7, "elbow plank"), record(99, "squats", "val"), record(99, "squats", "val")])
    output = run_script(SCRIPT, code=1).stdout
    assert table(output) == {"train": [3, 2, 1, 0, 0], "val": [3, 1, 0, 2, 0], "all": [6, 3, 1, 2, 0]}
    assert "2 records repeat an earlier one" in output, output
    assert [row["record"] for row in missing_rows(qevd)] == ["4", "5"]


def test_a_video_in_both_splits_stops_the_run(qevd, run_script):
    labels = json.loads((qevd / "dataset/fine_grained_labels_release.json").read_text())
    write_labels(qevd, labels + [record(7, "squats", "val"), record(1, "squats")])
    before = state(qevd)
    error = run_script(SCRIPT, code=2).stderr
    assert "00000007.mp4 (records 0 and 3)" in error and "00000001.mp4 (records 2 and 4)" in error, error
    assert state(qevd) == before, "something was placed"


def test_a_video_of_an_earlier_run_in_the_other_split_stops_the_run(qevd, run_script):
    """New labels that move a video from train to val must not leave it in both."""
    add_video(qevd / "QEVD_organized/val/elbow_plank/00000007.mp4", b"seven")
    add_video(qevd / "QEVD_organized/train/squats/mine.mp4", b"-")
    before = state(qevd)
    assert "val/elbow_plank/00000007.mp4" in run_script(SCRIPT, code=2).stderr
    assert state(qevd) == before, "something was placed"

    (qevd / "QEVD_organized/val/elbow_plank/00000007.mp4").unlink()
    output = run_script(SCRIPT).stdout
    assert "1 files under QEVD_organized are none of these labels', they stay: train/squats/mine.mp4" in output, output
    assert tree(qevd / "QEVD_organized") == PLACED | {"train/squats/mine.mp4": b"-"}


def test_a_video_of_an_earlier_run_in_another_class_stops_the_run(qevd, run_script):
    """A label corrected within its split must not leave the video under the old one, too."""
    run_script(SCRIPT)
    write_labels(qevd, [record(7, "squats"), record(3, "elbow plank"), record(1, "cross + hook right", "val")])
    before = state(qevd)
    error = run_script(SCRIPT, code=2).stderr
    assert "another split or class" in error and "train/elbow_plank/00000007.mp4" in error, error
    assert "00000003" not in error and state(qevd) == before, "something was placed"


def test_a_run_after_repairs_says_what_it_undoes(qevd, run_script):
    """A file newer than its source may be a repaired one; the source replaces it, and that is said."""
    assert "are newer than their sources" not in run_script(SCRIPT).stdout
    (qevd / "QEVD_organized/train/elbow_plank/00000007.mp4").write_bytes(b"seven, repaired")
    output = run_script(SCRIPT).stdout
    assert "1 videos under QEVD_organized are newer than their sources" in output, output
    assert "run check_videos again afterwards" in output, output


def test_a_name_in_two_parts(qevd, run_script):
    """The first of srcs wins, and it is said."""
    second = qevd / "dataset/QEVD-FIT-300k-Part-4/00000007.mp4"
    add_video(second, b"another seven")
    output = run_script(SCRIPT).stdout
    assert tree(qevd / "QEVD_organized") == PLACED
    assert re.search(r"1 videos are in the sources more than once.*Part-1/00000007.mp4, not .*Part-4/00000007", output)

    assert second.exists() and (qevd / "dataset/QEVD-FIT-300k-Part-1/00000007.mp4").exists()


def test_linked_sources(qevd, run_script):
    """Linked folders and files are followed once; links in circles and broken ones do no harm."""
    part = qevd / "dataset/QEVD-FIT-300k-Part-1"
    add_video(qevd / "elsewhere/00000003.mp4", b"three")
    (part / "00000003.mp4").unlink()
    (part / "00000003.mp4").symlink_to(qevd / "elsewhere/00000003.mp4")
    (part / "circle").symlink_to(part)
    (part / "broken").symlink_to("nothing")
    (part / "itself").symlink_to("itself")
    for mode in ("hardlink", "symlink", "copy"):
        shutil.rmtree(qevd / "QEVD_organized", ignore_errors=True)
        output = run_script(SCRIPT, "--mode", mode).stdout
        assert tree(qevd / "QEVD_organized") == PLACED, mode
        assert "more than once" not in output, output


def test_dry_run_touches_nothing(qevd, run_script, mode):
    """It shows the table of the real run, also over an earlier run's half copy and leftovers."""
    labels = json.loads((qevd / "dataset/fine_grained_labels_release.json").read_text())
    write_labels(qevd, labels + [record(99, "squats"), record(3, "squats")])
    add_video(qevd / "QEVD_organized/train/elbow_plank/00000007.mp4", b"sev")
    add_video(qevd / "QEVD_organized/train/elbow_plank/.00000007.mp4.123.tmp", b"se")
    before = state(qevd)
    shown = run_script(SCRIPT, "--dry-run", "--mode", mode, code=1).stdout
    assert state(qevd) == before, "a dry run changed something"
    assert "DRY_RUN: nothing is touched" in shown
    assert table(shown) == table(run_script(SCRIPT, "--mode", mode, code=1).stdout)
    assert tree(qevd / "QEVD_organized") == PLACED


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--mode", "link"], "MODE is 'link'; it must be one of copy, hardlink, symlink"),
    (["--labels-json", "labels.json"], "cannot read the labels labels.json"),
    (["--labels-json", "broken.json"], "are not JSON"),
    (["--labels-json", "object.json"], "must be a list"),
    (["--labels-json", "empty.json"], "must be a list"),
    (["--labels-json", "raw.json"], "QEVD's own raw form, with labels and labels_descriptive; labels_json wants fine_"),
    (["--labels-json", "lines.jsonl"], "are JSON lines, one object a line; labels_json wants fine_grained_labels_rel"),
    (["--labels-json", "other.json"], "have no record with a label; labels_json wants fine_grained_labels_release.js"),
    (["--class-map", "nowhere.json"], "there is no class map nowhere.json"),
    (["--dest", "object.json"], "is a file"),
    (["--srcs", "nowhere", "nothing"], "none of the source folders exists"),
    (["--dest", "dataset/QEVD-FIT-300k-Part-1/organized"], "lie within one another"),
    (["--srcs", "QEVD_organized/train/squats"], "lie within one another"),
    (["--colour", "red"], "unrecognized arguments"),
])  # fmt: skip
def test_unusable_settings(qevd, run_script, arguments, sentence):
    raw = {"video_path": "./00000001.mp4", "labels": ["squats"], "labels_descriptive": ["squats"], "split": "test"}
    texts = {"broken.json": "[{", "object.json": "{}", "empty.json": "[]", "raw.json": json.dumps([raw, raw])}
    texts |= {"lines.jsonl": 2 * (json.dumps(record(7, "squats")) + "\n"), "other.json": '[{"video": "1.mp4"}, 3]'}
    for name, text in texts.items():
        (qevd / name).write_text(text)
    before = state(qevd)
    result = run_script(SCRIPT, *arguments, code=2)
    assert sentence in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert state(qevd) == before, "something was touched"


@pytest.fixture
def other_file_system():
    """A folder on another file system than the test's."""
    if not OTHER_FILE_SYSTEM.is_dir() or not os.access(OTHER_FILE_SYSTEM, os.W_OK):
        pytest.skip(f"no {OTHER_FILE_SYSTEM} here, hence no second file system to test with")
    folder = OTHER_FILE_SYSTEM / f"test_refactor_dataset-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_hard_links_across_file_systems_are_refused_first(qevd, run_script, other_file_system):
    if other_file_system.stat().st_dev == qevd.stat().st_dev:
        pytest.skip(f"{OTHER_FILE_SYSTEM} and the tests' folder are on one file system")
    error = run_script(SCRIPT, "--mode", "hardlink", "--dest", other_file_system / "new/dest", code=2).stderr
    assert "no hardlink can be made" in error and "Part-" in error and "use --mode copy" in error, error
    assert not list(other_file_system.iterdir()) and not (qevd / "missing.csv").exists()


def refactorer(root):
    parts = [root / f"dataset/QEVD-FIT-300k-Part-{part}" for part in (1, 2, 3, 4)]
    labels = root / "dataset/fine_grained_labels_release.json"
    return refactor_dataset.DatasetRefactorer(parts, root / "QEVD_organized", labels)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EXDEV])
@pytest.mark.parametrize("mode", ["hardlink", "symlink"])
def test_a_drive_without_links_is_told_before_anything_is_placed(qevd, monkeypatch, capsys, mode, number):
    """Whatever error a network drive gives; on a full disk another mode is no cure."""

    def refuse_link(source, target):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.chdir(qevd)
    monkeypatch.setattr(refactor_dataset, "MODE", mode)
    monkeypatch.setattr(os, "link" if mode == "hardlink" else "symlink", refuse_link)
    before = state(qevd)
    with pytest.raises(SystemExit) as stopped:
        refactorer(qevd).refactor_dataset()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"no {mode} can be made in" in error and "use --mode copy" in error, error
    assert state(qevd) == before
    number = errno.ENOSPC
    with pytest.raises(SystemExit):
        refactorer(qevd).refactor_dataset()
    assert "No space left on device; put that right" in capsys.readouterr().err


def test_disk_space_is_checked_first(qevd, monkeypatch, capsys):
    """13 bytes are to be copied: a disk with 12 is refused before anything is done, one with 13 is enough."""
    monkeypatch.chdir(qevd)
    free = 12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100 - free, free))
    with pytest.raises(SystemExit) as stopped:
        refactorer(qevd).refactor_dataset()
    assert stopped.value.code == 2
    assert "3 videos need them" in capsys.readouterr().err
    assert not (qevd / "QEVD_organized").exists()
    free = 13
    refactorer(qevd).refactor_dataset()
    assert tree(qevd / "QEVD_organized") == PLACED


def test_one_failing_video_does_not_stop_the_rest(qevd, run_script):
    """A folder stands where a video should go: that record is refused, the others are placed."""
    (qevd / "QEVD_organized/train/elbow_plank/00000007.mp4").mkdir(parents=True)
    output = run_script(SCRIPT, code=1).stdout
    assert "refused: record 0, '00000007.mp4': it could not be placed: Is a directory" in output, output
    assert tree(qevd / "QEVD_organized") == {k: v for k, v in PLACED.items() if "00000007" not in k}
    assert table(output)["all"] == [3, 2, 0, 0, 1]


def test_a_full_disk_stops_the_run(qevd, monkeypatch, capsys):
    """The disk fills while copying: one sentence, no half file, and the next run ends it."""
    monkeypatch.chdir(qevd)

    def fill_up(source, target):
        Path(target).write_bytes(b"hal")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    with pytest.raises(SystemExit) as stopped:
        refactorer(qevd).refactor_dataset()
    assert stopped.value.code == 2
    assert "stopped after 0 videos: [Errno 28] No space left on device" in capsys.readouterr().err
    assert tree(qevd / "QEVD_organized") == {}
    monkeypatch.undo()
    monkeypatch.chdir(qevd)
    refactorer(qevd).refactor_dataset()
    assert tree(qevd / "QEVD_organized") == PLACED


def test_killed_at_any_moment(tmp_path, run_script):
    """SIGKILL at random moments of the placing; no half file is ever in place, and the last run ends as one would."""
    folder = tmp_path / "organized"
    rng, records, expected = random.Random("copy"), [], {}
    for i in range(200):
        content = rng.randbytes(200_000)
        add_video(tmp_path / f"dataset/QEVD-FIT-300k-Part-{i % 4 + 1}/{i:08d}.mp4", content)
        records.append(record(i, rng.choice(["squats", "burpee"]), rng.choice(["train", "val"])))
        expected[f"{records[-1]['split']}/{records[-1]['label']}/{i:08d}.mp4"] = content
    write_labels(tmp_path, records)

    command = [sys.executable, refactor_dataset.__file__, "--dest", str(folder)]
    kills_in_the_middle = 0
    for _ in range(4):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        before = sum(1 for _ in folder.rglob("*.mp4"))
        # wait for the placing itself to begin, so that the kill does not fall into the start of Python
        while process.poll() is None and sum(1 for _ in folder.rglob("*.mp4")) == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        kills_in_the_middle += process.wait() == -signal.SIGKILL
        placed = {name: content for name, content in tree(folder).items() if not name.endswith(".tmp")}
        for name, content in placed.items():
            assert content == expected[name], f"{name} is not whole after a kill"
    assert kills_in_the_middle >= 1, "no kill fell into a run; make the videos larger"

    run_script(SCRIPT, "--dest", folder)
    assert tree(folder) == expected, "the run after the kills ends otherwise than one that was never killed"
    assert len(tree(tmp_path / "dataset")) == 201
    assert table(run_script(SCRIPT, "--dest", folder).stdout)["all"] == [200, 0, 200, 0, 0]


def test_help_is_there_without_heavy_imports(run_script):
    shown = run_script(SCRIPT, "--help").stdout
    for flag in ("--srcs", "--dest", "--labels-json", "--class-map", "--mode", "--dry-run", "--missing-csv"):
        assert flag in shown, f"{flag} is not in\n{shown}"


# --- the raw labels ---------------------------------------------------------------------------------------------------


def raw(number, *labels, split="train"):
    return {"video_path": f"./{number:08d}.mp4", "labels": list(labels), "labels_descriptive": [], "split": split}


def write_raw(root, part, records, inner="", **how):
    folder = root / f"dataset/QEVD-FIT-300k-Part-{part}" / inner
    (folder / "fine_grained_labels.json").write_text(json.dumps(records), **how)
    for row in records:
        if isinstance(row, dict) and "video_path" in row:
            add_video(folder / row["video_path"], row["video_path"].encode())


def test_raw_labels_give_more_videos_and_never_one_of_val(qevd, run_script):
    """Joined by the exercise before " - "; what is not in the map, in the release file, of split test: kept apart."""
    many = [raw(100 + k, "squats - stopping early", "squats - rom=5") for k in range(3)]
    many += [raw(1, "squats - fast"), raw(7, "elbow plank"), raw(200, "squats", split="test")]
    many += [raw(201, "yodelling - a")]
    write_raw(qevd, 1, [*many, raw(202, "yodelling"), raw(203, "squats - fast", "burpee - slow"), raw(204)])
    write_raw(qevd, 4, [raw(300, "cross + hook right - rom=2"), raw(205, "squatss"), "text"], "QEVD-FIT-300k-Part-4",
              encoding="utf-16")  # fmt: skip
    (qevd / "dataset/QEVD-FIT-300k-Part-1/00000102.mp4").unlink()
    output = run_script(SCRIPT, "--raw-labels", code=1).stdout
    assert tree(qevd / "QEVD_extra") == {
        "train/squats/00000100.mp4": b"./00000100.mp4",
        "train/squats/00000101.mp4": b"./00000101.mp4",
        "train/cross_+_hook_right/00000300.mp4": b"./00000300.mp4",
    }
    assert not (qevd / "QEVD_organized").exists()
    assert totals(output) == [13, 3, 0, 1, 3, 2, 1, 3], output  # records, outcomes in their order
    assert "3 records of 2 exercises that" in output and "lacks: yodelling 2, squatss 1" in output, output
    assert "source dataset/QEVD-FIT-300k-Part-2 has no fine_grained_labels.json" in output
    assert "record 8, '00000203.mp4': 00000203.mp4 shows 2 exercises: burpee, squats" in output
    assert "record 9, '00000204.mp4': 00000204.mp4 shows 0 exercises: none" in output
    assert "not the organisers' own choice of labels" in output
    outcomes = {row["record"]: row["outcome"] for row in missing_rows(qevd)}
    assert outcomes == {"2": "missing", "3": "in release", "4": "in release", "5": "split test", "6": "other exercise",
                        "7": "other exercise", "8": "refused", "9": "refused", "11": "other exercise", "12": "refused"}
    assert totals(run_script(SCRIPT, "--raw-labels", code=1).stdout) == [13, 0, 3, 1, 3, 2, 1, 3]


def totals(output):
    return [int(n) for n in re.search(r"^all +(.*)$", output, re.MULTILINE)[1].split()]


def test_a_release_record_of_no_use_keeps_its_video_out_of_the_raw_ones_too(qevd, run_script):
    """The video of a val record with a misspelled label must not be learned from by way of the raw labels."""
    labels = json.loads((qevd / "dataset/fine_grained_labels_release.json").read_text())
    write_labels(qevd, [*labels, record(400, "sqats", "val"), record(401, "squats", "vall")])
    write_raw(qevd, 1, [raw(400, "squats"), raw(401, "squats"), raw(402, "squats")])
    run_script(SCRIPT, "--raw-labels")
    assert tree(qevd / "QEVD_extra").keys() == {"train/squats/00000402.mp4"}


def test_raw_labels_need_the_release_file_and_a_part_with_labels(qevd, run_script):
    assert "no fine_grained_labels.json lies in the source folders" in run_script(SCRIPT, "--raw-labels", code=2).stderr
    (qevd / "dataset/fine_grained_labels_release.json").unlink()
    write_raw(qevd, 1, [raw(402, "squats")])
    assert "cannot read the labels" in run_script(SCRIPT, "--raw-labels", code=2).stderr
    assert not (qevd / "QEVD_extra").exists()


def test_stopped_by_ctrl_c_it_says_one_sentence(qevd, monkeypatch, run_script):
    (qevd / "sitecustomize.py").write_text("import os\ndef link(*a): raise KeyboardInterrupt\nos.link = link\n")
    result = run_script(SCRIPT, "--mode", "hardlink", code=130, PYTHONPATH=qevd)
    assert result.stderr.strip().endswith("run the same command again to go on") and "Traceback" not in result.stderr
