"""check_videos.py on videos damaged and odd in every way we know: run as a user runs it, killed, stopped, shared out.

$ python -m pytest tests/test_check_videos.py
"""

import csv
import errno
import faulthandler
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common

import av
import pytest

import check_videos
from conftest import REPO
from make_videos import write_still, write_video
from odd_videos import (
    ENCODED,
    REMUXED,
    ROTATION,
    SHORTER,
    VP8,
    middle,
    with_a_size_change,
    with_times,
    with_two_streams,
    write_with_sound,
)
from videos import check_report, journal, judging, repairs

SCRIPT = "tools/check_videos.py"

# --- help ------------------------------------------------------------------------------------------------------------


def contents(*folders):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


def report(path="bad_videos.csv"):
    """{file name: row}"""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {Path(row["video"]).name: row for row in csv.DictReader(file)}


def decodes(path):
    return judging.examine(path)["decodes"] == "yes"


def cut_videos(sources, folder, num_cut, num_empty=0, num_healthy=0):
    """Small truncated, empty and healthy videos; every one of its own content."""
    folder.mkdir(parents=True)
    data = sources["mpeg4.mp4"]
    for i in range(num_cut):
        (folder / f"cut_{i:02}.mp4").write_bytes(data[: len(data) // 2 + 50 * i])
    for i in range(num_empty):
        (folder / f"page_{i:02}.mp4").write_bytes(b"<html>%d</html>" % i)
    for i in range(num_healthy):
        (folder / f"good_{i:02}.mp4").write_bytes(data + bytes(i))


def processes_with(marker):
    """Ids of live processes whose environment holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (
                    marker.encode() in (entry / "environ").read_bytes()
                    and "Z" not in (entry / "stat").read_text().split()[2]
                ):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
    return found


def wait_until(condition, seconds=60):
    for _ in range(seconds * 100):
        if condition():
            return True
        time.sleep(0.01)
    return False


# --- every fault in every mode ---------------------------------------------------------------------------------------

SEED = ["--root", "full_dataset", "--quarantine", "bad_videos", "--ext", "mp4", "avi", "mkv", "--jobs", "2"]
SEED += ["--report", "bad_videos.csv"]
MODES = {
    "quarantine": [],
    "remux": ["--remux"],
    "replace": ["--remux", "--replace"],
    "reencode": ["--remux", "--replace", "--reencode"],
    "dry": ["--remux", "--replace", "--dry-run"],
}


@pytest.mark.quick
@pytest.mark.parametrize("mode", MODES)
def test_every_fault_is_found_and_no_healthy_file_flagged(zoo, mode, run_script, tmp_path, monkeypatch):
    root, damaged, odd = zoo
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, "full_dataset")
    before = contents("full_dataset")
    result = run_script(SCRIPT, *SEED, *MODES[mode], code=1)
    rows = report()
    assert len(damaged) >= 14 and len(odd) >= 8
    assert {name: rows[name]["reason"] for name in odd} == dict.fromkeys(odd, "healthy"), "a healthy file was flagged"
    assert {name: rows[name]["reason"] for name in damaged} == {name: reason for name, (reason, _) in damaged.items()}
    assert len(rows) == len(damaged) + len(odd)

    repairs = {"quarantine": [], "remux": [REMUXED], "reencode": [REMUXED, SHORTER, ENCODED]}
    repairs = repairs.get(mode, [REMUXED, SHORTER])
    for name, (reason, step) in damaged.items():
        path, place = Path("full_dataset/train/damaged", name), Path("bad_videos/train/damaged", name)
        copy = place.with_name(f"{place.stem}.repaired{place.suffix}")
        told = f"{name} ({reason}): {rows[name]}"
        repaired = step in repairs
        expected = "replaced" if repaired and mode != "remux" else "kept" if step == SHORTER else "quarantined"
        assert rows[name]["action"] == ("would be " if mode == "dry" else "") + expected, told
        assert bool(rows[name]["repaired_by"]) == repaired, told
        if mode == "dry":
            continue
        if expected == "kept":
            assert path.read_bytes() == before[path] and decodes(path), told
            continue
        assert place.read_bytes() == before[path], f"the original is not in quarantine: {told}"
        assert path.exists() == (expected == "replaced") and copy.exists() == (repaired and mode == "remux"), told
        if repaired:
            assert decodes(path if expected == "replaced" else copy), told
    for name in odd:
        assert Path("full_dataset/val/odd", name).read_bytes() == before[Path("full_dataset/val/odd", name)]
    assert not [path for path in contents(".") if ".repairing" in path.name or ".tmp" in path.name]
    assert f"sum{len(rows):26,}" in result.stdout, result.stdout
    if mode == "dry":
        assert contents("full_dataset") == before and not Path("bad_videos").exists()
        return
    result = run_script(SCRIPT, *SEED, *MODES[mode], code=int(mode in ("quarantine", "remux")))
    left = len(contents("full_dataset"))
    assert f"{left:,} videos under full_dataset, {left:,} unchanged" in result.stdout, result.stdout
    assert {name: row["action"] for name, row in report().items() if name in odd} == dict.fromkeys(odd, "kept")


def test_properties_of_a_video_are_reported(zoo, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zoo[0] / "val", "full_dataset/val")
    run_script(SCRIPT, *SEED)
    rows = report()
    keys = ["frames", "fps", "variable_frame_rate", "duration_s", "shorter_than_4_s", "width", "height", "codec"]
    assert [rows["three_frames.mp4"][key] for key in keys] == ["3", "30.000", "no", "0.100", "yes", "128", "96", "h264"]
    assert rows["variable_rate.mp4"]["variable_frame_rate"] == "yes"
    assert rows["av1.mp4"]["codec"] == "av1" and rows["hevc_10_bit.mp4"]["codec"] == "hevc"
    assert rows["sound_cover_and_rotation.mp4"]["rotation"] == str(-ROTATION % 360), "clockwise"
    assert rows["lying_duration.mp4"]["duration_s"] == "2.000" and rows["lying_header.avi"]["frames"] == "60"


def test_a_repair_keeps_sound_rotation_and_metadata(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("full_dataset/train/a")
    folder.mkdir(parents=True)
    data = write_with_sound(folder / "a.mp4", num_frames=90, rotation=ROTATION).read_bytes()
    for name, flags in ("a", []), ("b", ["--reencode"]):
        (folder / f"{name}.mp4").write_bytes(middle(data, 2000, bytes) if flags else data[: len(data) * 8 // 10])
        run_script(SCRIPT, *SEED, "--remux", "--replace", *flags, code=1)
        with av.open(str(folder / f"{name}.mp4")) as repaired:
            assert [stream.type for stream in repaired.streams] == ["video", "audio"], name
            assert sum(packet.size > 0 for packet in repaired.demux(audio=0)) > 15, name  # of 25, 64 ms each
            repaired.seek(0)
            assert next(repaired.decode(video=0)).rotation == ROTATION, name


def test_pictures_of_changing_size_are_encoded_anew_and_no_path_is_a_url(run_script, tmp_path, monkeypatch):
    """Under a root whose name FFmpeg would take for a protocol."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my:set/train/a"
    folder.mkdir(parents=True)
    for ending in "mp4", "mkv", "webm", "ts":
        with_a_size_change(folder / f"change.{ending}", "libvpx" if ending == "webm" else "libx264")
    write_video(folder / "good.mp4", 20)
    endings = ["--ext", "mp4", "mkv", "webm", "ts"]
    run_script(SCRIPT, *SEED, "--root", "my:set", *endings, "--dry-run", "--remux", "--replace", code=1)
    assert {row["action"] for name, row in report().items() if name != "good.mp4"} == {"would be quarantined"}
    run_script(SCRIPT, *SEED, "--root", "my:set", *endings, "--remux", "--replace", "--reencode", code=1)
    rows = report()
    assert rows.pop("good.mp4")["reason"] == "healthy"
    for name, row in rows.items():
        assert (row["reason"], row["action"], row["repaired_by"]) == ("size_change", "replaced", "re-encoding"), row
        assert "96 x 64, 192 x 128" in row["detail"] and decodes(folder / name), row
        assert (row["width"], row["height"], row["frames"]) == ("96", "64", "40"), row


def test_what_is_peculiar_about_healthy_videos_is_counted(zoo, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("full_dataset/val/a")
    folder.mkdir(parents=True)
    with_times(folder / "jumps.mp4", [33 * i + 3_600_000 * (i >= 15) for i in range(30)], options={"bf": "0"})
    with_times(folder / "browser.webm", [42 * i for i in range(30)], **VP8, rate=1000)
    with_two_streams(folder / "two.mp4")
    shutil.copy(zoo[0] / "val/odd/sound_cover_and_rotation.mp4", folder / "turned.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "deeper").mkdir()
    shutil.copy(folder / "two.mp4", folder / "deeper/two_too.mp4")
    result = run_script(SCRIPT, *SEED, "--ext", "mp4", "webm", code=1)
    shown = " ".join(result.stdout.split())
    for line in (
        "of the 5 that stay:",
        "1 have a header whose frame rate, which the frame rule takes, is off by more than 10 %",
        "1 have more than 10 s between two frames",
        f"{bool(ROTATION):d} are to be rotated",
        "2 have several video streams",
        "1 videos do not lie at <class>/<video>",
        "unreadable 1 1 kept",
    ):
        assert line in shown, f"{line!r} is not in\n{result.stdout}"
    rows = report()
    assert rows["browser.webm"]["header_fps"] == "1000.000" and float(rows["browser.webm"]["fps"]) < 24
    assert float(rows["jumps.mp4"]["longest_gap_s"]) > 3600 and rows["two.mp4"]["video_streams"] == "2"
    assert "a pipe" in rows["pipe.mp4"]["detail"]


# --- nothing is lost -------------------------------------------------------------------------------------------------


def test_nothing_in_quarantine_is_overwritten(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_empty=1)
    place = Path("bad_videos/train/a/page_00.mp4")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"another one")
    run_script(SCRIPT, *SEED, code=1)
    assert place.read_bytes() == b"another one"
    assert place.with_name("page_00.1.mp4").read_bytes() == b"<html>0</html>"


def test_a_link_moves_as_a_link_and_its_source_stays(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("part"), num_cut=1, num_empty=1)
    before = contents("part")
    Path("full_dataset/train/a").mkdir(parents=True)
    for name in "cut_00.mp4", "page_00.mp4", "gone.mp4":
        Path("full_dataset/train/a", name).symlink_to(Path("part", name).resolve())
    run_script(SCRIPT, *SEED, "--remux", "--replace", code=1)
    assert contents("part") == before
    assert decodes("full_dataset/train/a/cut_00.mp4") and not Path("full_dataset/train/a/cut_00.mp4").is_symlink()
    assert Path("bad_videos/train/a/page_00.mp4").resolve() == Path("part/page_00.mp4").resolve()
    row = report()["gone.mp4"]
    assert (row["reason"], row["action"]) == ("unreadable", "kept") and os.path.lexists("full_dataset/train/a/gone.mp4")


def test_quarantine_on_another_file_system(tmp_path, monkeypatch):
    def refuse_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "x.mp4").write_bytes(b"content")
    monkeypatch.setattr(os, "link", refuse_link)
    repairs.preserve(tmp_path / "x.mp4", tmp_path / "bad/train/a/x.mp4")
    assert (tmp_path / "bad/train/a/x.mp4").read_bytes() == b"content" and (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_name_taken_meanwhile_by_another_process_is_not_overwritten(tmp_path, monkeypatch, links):
    """The other file appears after the name was found free, with hard links and on a file system without."""
    place, link, copy2 = tmp_path / "bad/train/a/x.mp4", os.link, shutil.copy2
    (tmp_path / "x.mp4").write_bytes(b"content")

    def take_the_name():
        if not place.exists():
            place.write_bytes(b"another one")

    def late_link(source, target):
        if not links:
            raise OSError(errno.EPERM, "Operation not permitted")
        take_the_name()
        link(source, target)

    def late_copy(source, target):
        take_the_name()
        copy2(source, target)

    monkeypatch.setattr(os, "link", late_link)
    monkeypatch.setattr(shutil, "copy2", late_copy)
    repairs.preserve(tmp_path / "x.mp4", place)
    assert {path.name: data for path, data in contents(place.parent).items()} == {
        "x.mp4": b"another one",
        "x.1.mp4": b"content",
    }


def test_a_name_taken_after_the_plan_keeps_the_original(sources, tmp_path, monkeypatch):
    """Another process fills the place just before the original is brought there; the report says where it lies."""
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_empty=1)
    place, preserve = Path("bad_videos/train/a/page_00.mp4"), check_videos.preserve

    def late_preserve(file, wanted):
        place.parent.mkdir(parents=True)
        place.write_bytes(b"another one")
        return preserve(file, wanted)

    monkeypatch.setattr(check_videos, "preserve", late_preserve)
    monkeypatch.setattr(sys, "argv", ["check_videos.py", *SEED])
    with pytest.raises(SystemExit):
        check_videos.main()
    assert place.read_bytes() == b"another one"
    assert Path(report()["page_00.mp4"]["quarantined_to"]).read_bytes() == b"<html>0</html>"


def test_a_link_in_quarantine_to_the_video_is_no_copy_of_it(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_empty=1)
    Path("bad_videos/train/a").mkdir(parents=True)
    Path("bad_videos/train/a/page_00.mp4").symlink_to(Path("full_dataset/train/a/page_00.mp4").resolve())
    run_script(SCRIPT, *SEED, code=1)
    assert Path("bad_videos/train/a/page_00.1.mp4").read_bytes() == b"<html>0</html>"


def test_a_quarantine_that_cannot_be_written_leaves_every_video(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=1, num_empty=1)
    before = contents("full_dataset")
    Path("bad_videos").write_text("a file, no folder")
    run_script(SCRIPT, *SEED, "--remux", "--replace", code=1)
    assert contents("full_dataset") == before
    assert {row["action"] for row in report().values()} == {"failed"}


def test_a_full_disk_ends_the_run_in_one_sentence_and_moves_nothing(sources, tmp_path):
    """A limit on the size of files stops the writing of the first row."""
    cut_videos(sources, tmp_path / "full_dataset/train/a", num_cut=0, num_empty=3)
    command = f"ulimit -f 0; exec {shlex.join([sys.executable, str(REPO / SCRIPT), *SEED])}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "\nerror: a file cannot be" in "\n" + result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(list(tmp_path.rglob("full_dataset/**/page_*"))) == 3


def check_nothing_lost(originals):
    """Every original is in its place, or in quarantine with its place empty or taken by a video that decodes."""
    quarantined = set(contents("bad_videos").values())
    for path, data in originals.items():
        if path.exists() and path.read_bytes() == data:
            continue
        assert data in quarantined, f"{path} is neither in its place nor in quarantine"
        assert path.exists() or not path.name.startswith("cut"), f"{path} can be repaired and its place is empty"
        assert not path.exists() or decodes(path), f"{path} was replaced by a video that does not decode"


def test_killed_at_any_moment_nothing_is_lost_and_the_next_run_finishes(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, interrupted, torn = random.Random(0), 0, 0
    command = [sys.executable, str(REPO / SCRIPT), *SEED, "--remux", "--replace"]
    originals = {}
    marker = f"KILLED_TEST_OF={tmp_path}"
    for moment in range(12):
        if all(not path.exists() or path.read_bytes() != data for path, data in originals.items()):
            for folder in "full_dataset", "bad_videos":
                shutil.rmtree(folder, ignore_errors=True)
            cut_videos(sources, Path("full_dataset/train/a"), num_cut=70, num_empty=10)
            originals = contents("full_dataset")
        started = time.time_ns()
        with open("output.txt", "w") as output:
            run = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | dict([marker.split("=")]))
        if moment % 4:  # while it repairs and moves; every fourth kill comes at any time
            wait_until(lambda run=run, started=started: run.poll() is not None or has_moved_since(started), 30)
            time.sleep(rng.uniform(0, 0.25))
        else:
            time.sleep(rng.uniform(0.05, 0.6))
        interrupted += run.poll() is None
        run.kill()
        run.wait()
        for progress in Path("bad_videos.csv.progress").glob("*"):
            torn += len(progress.read_bytes()) > 0
            progress.write_bytes(progress.read_bytes()[:-7])  # as if the disk lost half a row
        check_nothing_lost(originals)
    assert interrupted >= 6, "most runs had ended before they were killed"
    assert torn, "no run was killed after it had written a row"
    assert wait_until(lambda: not processes_with(marker), 30), "children outlive a killed run"
    subprocess.run(command, capture_output=True, check=False)
    check_nothing_lost(originals)
    for path in originals:
        assert path.exists() == path.name.startswith("cut") and (not path.exists() or decodes(path)), path
    assert not list(Path("full_dataset").rglob(".*")), "half-written repairs were left"
    assert "unchanged" in run_script(SCRIPT, *SEED, "--remux", "--replace", code=0).stdout


def has_moved_since(time_ns):
    """Whether anything came to quarantine since then."""
    folder = Path("bad_videos/train/a")
    return folder.exists() and folder.stat().st_mtime_ns > time_ns


def rows_so_far():
    """Lines that a run which is at work has written."""
    return [line for file in Path("bad_videos.csv.progress").glob("*") for line in file.read_bytes().splitlines()]


# --- hangs, crashes, stops -------------------------------------------------------------------------------------------


def examine_badly(path):
    """Stands in for verdict.examine in the children: a decoder that crashes, hangs, or crashes only once."""
    faulthandler.disable()  # pytest's, which would print where all threads are
    if "crash_once" in path and not Path(path + ".crashed").exists():
        Path(path + ".crashed").touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    if "error" in path:
        raise ZeroDivisionError("a rate of 1/0")
    if "always_crash" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "killed" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "memory" in path:
        raise MemoryError
    if "no_package" in path:
        raise ImportError("libavcodec.so: cannot open shared object file")
    if "stall_once" in path and not Path(path + ".stalled").exists():
        Path(path + ".stalled").touch()
        time.sleep(3600)
    if "hang" in path:
        Path(path + ".hangs").touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as a loop in C, which never looks at signals
        time.sleep(3600)
    return judging.examine(path)


def test_a_decoder_that_hangs_or_crashes_costs_its_own_video_only(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=1, num_healthy=6)
    for name in "always_crash", "crash_once", "error", "hang", "killed", "memory", "stall_once":
        Path(f"full_dataset/train/a/{name}.mp4").write_bytes(sources["mpeg4.mp4"])
    monkeypatch.setattr(check_videos, "examine", examine_badly)
    monkeypatch.setattr(sys, "argv", ["check_videos.py", *SEED, "--timeout", "4", "--jobs", "4"])
    with pytest.raises(SystemExit) as stop:
        check_videos.main()
    assert stop.value.code == 1
    reasons = {name: row["reason"] for name, row in report().items()}
    assert reasons.pop("always_crash.mp4") == "decoder_crash" and reasons.pop("hang.mp4") == "timeout"
    assert reasons.pop("error.mp4") == "decoder_crash" and "a rate of 1/0" in report()["error.mp4"]["detail"]
    assert reasons.pop("cut_00.mp4") == "truncated"
    for name in "memory.mp4", "killed.mp4":  # as the system does it when memory is short
        assert reasons.pop(name) == "unreadable" and report()[name]["action"] == "kept", name
    assert set(reasons.values()) == {"healthy"} and len(reasons) == 8, reasons
    assert Path("bad_videos/train/a/hang.mp4").read_bytes() == sources["mpeg4.mp4"]


def test_a_missing_package_stops_the_run_and_moves_nothing(sources, run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_healthy=2)
    Path("full_dataset/train/a/no_package.mp4").write_bytes(sources["mpeg4.mp4"])
    before = contents("full_dataset")
    Path("broken/av").mkdir(parents=True)
    Path("broken/av/__init__.py").write_text("raise ImportError('libavcodec.so: no such file')")
    result = run_script(SCRIPT, *SEED, code=2, PYTHONPATH=tmp_path / "broken")
    assert "libavcodec.so" in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not Path("bad_videos.csv").exists()

    monkeypatch.setattr(check_videos, "examine", examine_badly)  # the same in a child only
    monkeypatch.setattr(sys, "argv", ["check_videos.py", *SEED])
    with pytest.raises(SystemExit) as stop:
        check_videos.main()
    assert stop.value.code == 2 and "libavcodec.so" in capsys.readouterr().err
    assert contents("full_dataset") == before


def test_a_child_that_hangs_ends_with_a_killed_parent(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0)
    Path("full_dataset/train/a/hang.mp4").write_bytes(sources["mpeg4.mp4"])
    program = f"import sys; sys.path[:0] = {[str(REPO), str(REPO / 'tools'), str(REPO / 'tests')]}\n"
    program += "import check_videos, test_check_videos\n"
    program += "check_videos.examine = test_check_videos.examine_badly; check_videos.main()"
    marker = f"ORPHAN_TEST_OF={tmp_path}"
    run = subprocess.Popen([sys.executable, "-c", program, *SEED], env=os.environ | dict([marker.split("=")]))
    assert wait_until(Path("full_dataset/train/a/hang.mp4.hangs").exists), "the child never began"
    run.kill()
    run.wait()
    assert wait_until(lambda: not processes_with(marker), 30), "a child that hangs outlives its killed parent"


def test_a_video_that_takes_too_long_is_a_row(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full_dataset/val/a").mkdir(parents=True)
    write_still("full_dataset/val/a/long.mp4", 1000)
    run_script(SCRIPT, *SEED, "--remux", "--replace", "--timeout", "0.2", code=1)
    assert report()["long.mp4"]["reason"] == "timeout" and Path("bad_videos/val/a/long.mp4").exists()


def test_files_with_other_endings_are_counted(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=1)
    for name in ("x.MOV", "y.mov", "notes"):
        Path("full_dataset/train/a", name).touch()
    assert "(.mov 2, none 1)" in run_script(SCRIPT, *SEED, "--dry-run", code=1).stdout
    assert "(none 1)" in run_script(SCRIPT, *SEED, "--ext", "mp4", "mov", "--dry-run", code=1).stdout


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_children_too_and_keeps_the_report(sources, stop, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=3)
    write_still("full_dataset/train/a/long_0.mp4")
    for i in range(1, 8):
        os.link("full_dataset/train/a/long_0.mp4", f"full_dataset/train/a/long_{i}.mp4")
    marker = f"STOPPED_TEST_OF={tmp_path}"
    command = [sys.executable, str(REPO / SCRIPT), *SEED]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | dict([marker.split("=")])
    )
    assert wait_until(lambda: sum(b"cut_" in row for row in rows_so_far()) == 3), "not all cut ones have a row"
    os.killpg(run.pid, stop) if stop == signal.SIGINT else run.terminate()
    errors = run.communicate(timeout=30)[1]
    assert run.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors, errors
    assert wait_until(lambda: not processes_with(marker), 10), "children outlive the run"
    assert 3 <= len(rows_so_far()) < 11
    run_script(SCRIPT, *SEED)
    assert not Path("bad_videos.csv.progress").exists() and len(report()) == 11
    assert sum(row["reason"] == "healthy" for row in report().values()) == 8


# --- the report ------------------------------------------------------------------------------------------------------


def test_only_what_changed_is_checked_again(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_healthy=5)
    run_script(SCRIPT, *SEED)
    whole = Path("bad_videos.csv").read_bytes()
    Path("bad_videos.csv").write_bytes(whole[:-9])  # a kill cut off the last row
    Path("full_dataset/train/a/good_01.mp4").write_bytes(sources["mpeg4.mp4"][:-3000])
    result = run_script(SCRIPT, *SEED, code=1)
    assert "5 videos under full_dataset, 3 unchanged" in result.stdout, result.stdout
    assert report()["good_01.mp4"]["reason"] == "truncated" and len(report()) == 5


@pytest.mark.parametrize("together", [False, True])
def test_shares_of_several_processes_merge_into_the_same_report(together, zoo, run_script, tmp_path, monkeypatch):
    def comparable():
        return {name: {k: v for k, v in row.items() if k != "mtime_ns"} for name, row in report().items()}

    for name in "one", "three":
        shutil.copytree(zoo[0], tmp_path / name / "full_dataset")
    flags = [*SEED, "--remux", "--replace", "--jobs", "1"]
    run_script(SCRIPT, *flags, code=1, cwd=tmp_path / "one")
    monkeypatch.chdir(tmp_path / "one")
    alone = comparable()
    monkeypatch.chdir(tmp_path / "three")
    command = [sys.executable, str(REPO / SCRIPT), *flags]
    if together:  # as torchrun does
        environments = [{"RANK": str(r), "WORLD_SIZE": "3"} for r in range(3)]
    else:  # as a SLURM array does that starts at 1, and whose second task was lost at first
        environments = [
            {"SLURM_ARRAY_TASK_ID": str(r + 1), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
            for r in (0, 2, 1)
        ]
    runs = []
    for environment in environments:
        runs.append(
            subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
        if not together:
            runs[-1].wait()
    codes = [run.wait() for run in runs]
    assert set(codes) <= {0, 1} and 1 in codes, "only a process that finds all shares done reports the faults"
    assert together or codes == [0, 0, 1]
    assert comparable() == alone
    assert [path.name for path in Path().glob("*.csv")] == ["bad_videos.csv"], "share files were left"


def test_the_report_does_not_forget_where_originals_went(sources, run_script, tmp_path, monkeypatch):
    """Neither by a run of another ROOT in the same REPORT, nor by the same ROOT spelled otherwise."""
    monkeypatch.chdir(tmp_path)
    for root in "full_dataset", "other":
        cut_videos(sources, Path(root, "train/a"), num_cut=0, num_empty=1, num_healthy=1)
        Path(root, "train/a/page_00.mp4").rename(Path(root, f"train/a/{root}.mp4"))
        Path(root, "train/a/good_00.mp4").rename(Path(root, f"train/a/{root}_good.mp4"))
    run_script(SCRIPT, *SEED, code=1)
    row = report()["full_dataset.mp4"]
    result = run_script(SCRIPT, *SEED, "--root", "other", code=1)
    assert f"sum{2:26}" in result.stdout, f"rows of another dataset are counted\n{result.stdout}"
    assert report()["full_dataset.mp4"] == row and Path(row["quarantined_to"]).read_bytes() == b"<html>0</html>"
    result = run_script(SCRIPT, *SEED, "--root", tmp_path / "full_dataset")
    assert "1 unchanged" in result.stdout and "1 were quarantined in earlier runs" in result.stdout, result.stdout
    assert report()["full_dataset.mp4"]["quarantined_to"] == row["quarantined_to"] and len(report()) == 4


def journals():
    return sorted(Path("bad_videos.csv.progress").glob("*"))


def test_what_an_interrupted_launch_left_does_not_override_newer_rows(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_healthy=12)
    for rank in 0, 1:
        run_script(SCRIPT, *SEED, RANK=rank, WORLD_SIZE=3)
    stale = {path: path.read_bytes() for path in journals()}
    assert len(stale) == 2
    for i in range(3):
        Path(f"full_dataset/train/a/good_{i:02}.mp4").write_bytes(b"<html>")
    run_script(SCRIPT, *SEED, code=1)
    assert not journals(), "progress was left"
    for path, data in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (1, 1))
    run_script(SCRIPT, *SEED)
    assert [row["action"] for row in report().values()] == ["quarantined earlier"] * 3 + ["kept"] * 9


def test_what_an_earlier_launch_left_undone_is_done_by_any_later_one(sources, run_script, tmp_path, monkeypatch):
    """A task of an array that failed is started again alone; what another launch could not read is tried again."""
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_healthy=8)
    gone = Path("full_dataset/train/a/gone.mp4")
    gone.symlink_to("nowhere")

    def task(job, rank, code=0):
        array = {"SLURM_ARRAY_TASK_ID": rank, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_COUNT": 2}
        return run_script(SCRIPT, *SEED, SLURM_ARRAY_JOB_ID=job, **array, code=code).stdout

    monkeypatch.setattr(journal.machine, "launcher", lambda: (0, 2))
    share = 0 if journal.Journal("progress").is_mine("train/a/gone.mp4") else 1
    assert "process" in task(1, share) and not Path("bad_videos.csv").exists()
    assert "1 videos of others are not yet" in task(2, 1 - share), "a row of another launch was taken for this one's"
    gone.unlink()
    assert "9 videos" not in task(2, share) and len(report()) == 8 and not journals()


def test_a_second_merge_at_the_same_moment_changes_nothing(sources, run_script, tmp_path, monkeypatch):
    """Another process of this launch has merged, and cleared the journal, while this one was reading it."""
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=1, num_empty=2, num_healthy=2)
    known_rows, seen = check_videos.known_rows, []

    def late(journal, report_before):
        seen.append(1)
        if len(seen) == 2:
            rows = check_videos.final_rows(known_rows(journal, report_before), {})
            common.write_csv("bad_videos.csv", check_report.COLUMNS, rows.values())
            journal.clear()
        return known_rows(journal, report_before)

    monkeypatch.setattr(check_videos, "known_rows", late)
    monkeypatch.setattr(sys, "argv", ["check_videos.py", *SEED])
    with pytest.raises(SystemExit):
        check_videos.main()
    actions = [row["action"] for row in report().values()]
    assert len(seen) == 2 and sorted(actions) == ["kept"] * 2 + ["quarantined"] * 3, actions


def test_a_name_that_is_no_text_is_shown_escaped_and_written_exactly(sources, run_script, tmp_path, monkeypatch):
    """Bytes that are not UTF-8, a line break, a sign that turns the direction of writing; on any terminal."""
    monkeypatch.chdir(tmp_path)
    folder = Path("full_dataset/train/a")
    names = [os.fsdecode(b"caf\xe9.mp4"), "new\nline.mp4", "\u202ename.mp4", "\u6df1\u8e72" * 30 + ".mp4"]
    cut_videos(sources, folder, num_cut=0, num_healthy=1)
    for name in names:
        (folder / name).write_bytes(b"no video")
    result = run_script(SCRIPT, *SEED, code=1, LC_ALL="C", PYTHONIOENCODING="ascii")
    for shown in "caf\\xe9.mp4", "new\\nline.mp4", "\\u202ename.mp4":
        assert f"not_a_video: full_dataset/train/a/{shown}" in result.stderr + result.stdout, result.stderr
    rows = report()
    for name in names:
        assert rows[name]["action"] == "quarantined" and Path("bad_videos/train/a", name).read_bytes() == b"no video"
    assert "5 were quarantined" not in run_script(SCRIPT, *SEED).stdout


def test_a_share_that_no_launcher_gave_is_refused(sources, run_script, tmp_path, monkeypatch):
    """SLURM's variables of a batch script, without srun: one process would do an eighth and write no report."""
    monkeypatch.chdir(tmp_path)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=0, num_healthy=2)
    error = run_script(SCRIPT, *SEED, code=2, SLURM_PROCID=0, SLURM_NTASKS=8, SLURM_JOB_ID=1).stderr
    assert "srun" in error and error.count("\n") == 1, error


def test_the_next_command_is_that_of_the_readme(monkeypatch):
    readme = (REPO / "README.md").read_text()
    monkeypatch.setattr(check_videos, "ROOT", "my_dataset")
    monkeypatch.setattr(check_videos.common, "class_map_with", lambda labels: Path("my_class_map.json"))
    for gpu in True, False:
        monkeypatch.setattr(shutil, "which", lambda name, gpu=gpu: gpu)
        assert f"\n{check_videos.next_training()}\n" in readme, check_videos.next_training()
    monkeypatch.setattr(check_videos, "ROOT", "my data")
    assert "--data-path 'my data' " in check_videos.next_training()


def test_wrong_usage_is_told_in_one_sentence(sources, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("classes_only/squats").mkdir(parents=True)
    cut_videos(sources, Path("full_dataset/train/a"), num_cut=1)
    Path("notes.csv").write_text("my,own,table\n1,2,3\n")
    for flags, words in (
        (["--root", "classes_only"], "neither train/ nor val/"),
        (["--ext", "webm"], "no .webm file"),
        (["--replace"], "give --remux"),
        (["--quarantine", "full_dataset/train/bad"], "lies in the dataset"),
        (["--quarantine", "full_dataset"], "lies in the dataset"),
        (["--report", "notes.csv"], "no report of this check_videos.py"),
        (["--jobs", "-1"], "JOBS is -1: it must be a number from 0 on"),
    ):
        result = run_script(SCRIPT, *SEED, *flags, code=2)
        assert words in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert len(contents("full_dataset")) == 1
    assert Path("notes.csv").read_text() == "my,own,table\n1,2,3\n"
