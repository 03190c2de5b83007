"""The drawn dataset: QEVD's layout, videos as filmed ones are, the same every time, safe to kill and start again."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.groups import read_groups

import av
import numpy as np
import pytest
from PIL import Image

import make_sample_dataset
from conftest import REPO

FEW = ["--classes", "squats", "arm_circles", "--train-videos-per-class", 2, "--val-videos-per-class", 1]
FEW += ["--extra-videos-per-class", 0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Every class with its default settings but two videos a split; returns (folder, last printed line)."""
    out = tmp_path_factory.mktemp("sample") / "dataset"
    command = [sys.executable, REPO / "tools/make_sample_dataset.py", "--out", out,
               "--train-videos-per-class", "2", "--val-videos-per-class", "1"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out, result.stdout.splitlines()[-2]


def content_of(folder):
    """{path inside the folder: bytes} of everything in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.quick
def test_layout_is_that_of_a_qevd_download(dataset):
    out, last_line = dataset
    labels = json.loads((out / "fine_grained_labels_release.json").read_text())
    videos = {p.name: p.parent.name for p in out.glob("*/*.mp4")}
    num_classes = len(make_sample_dataset.CLASSES)

    assert set(videos.values()) == {f"QEVD-FIT-300k-Part-{i}" for i in (1, 2, 3, 4)}
    workers = json.loads((out / make_sample_dataset.WORKERS).read_text())
    assert sorted(row["video_path"] for row in workers) == sorted("./" + name for name in videos)
    assert {label["video_path"] for label in labels} < {"./" + name for name in videos}
    assert all(len(name) == len("00000000.mp4") and name[:8].isdigit() for name in videos), sorted(videos)
    ids = sorted(int(name[:8]) for name in videos)
    assert any(b - a > 1 for a, b in itertools.pairwise(ids)), "QEVD's ids have gaps, these have none"
    classes = json.loads((REPO / "class_map.json").read_text())
    assert {label["label"].replace(" ", "_") for label in labels} == set(make_sample_dataset.CLASSES) <= set(classes)
    assert not any("_" in label["label"] for label in labels), "QEVD's labels have spaces"
    for split, count in (("train", 2), ("val", 1)):
        assert sum(label["split"] == split for label in labels) == count * num_classes
    n, shown = 4 * num_classes, num_classes
    assert last_line == (f"{out}: {n} videos = {n} drawn + 0 already there = {2 * shown} train + {shown} val + "
                         f"{shown} of raw labels alone, {shown} classes")


def test_people_are_in_several_videos_of_one_split_and_look_alike(dataset):
    out, _ = dataset
    videos = {path.name: path for path in out.glob("*/*.mp4")}
    split_of = {row["video_path"]: row["split"] for row in json.loads((out / make_sample_dataset.LABELS).read_text())}
    people = {}
    for row in json.loads((out / make_sample_dataset.WORKERS).read_text()):
        people.setdefault(row["worker_id"], []).append(row["video_path"])
    assert any(len(paths) >= 3 for paths in people.values()), people
    for person, paths in people.items():
        assert len({split_of.get(path, "extra") for path in paths}) == 1, f"{person} is in two splits"

    def colours(path):
        """The brightest colours of a video, as clothes are, to 8 levels."""
        with av.open(str(videos[path[2:]])) as container:
            pixels = next(container.decode(video=0)).to_ndarray(format="rgb24").reshape(-1, 3)
        return {tuple(c) for c in (pixels[pixels.max(1) > 200] // 32).tolist()}

    def alike(a, b):
        return len(colours(a) & colours(b)) / len(colours(a) | colours(b))

    first, *_, second = [paths for paths in people.values() if len(paths) > 1]
    assert alike(*first[:2]) > alike(first[0], second[0]), "one person looks less alike than two do"


def test_the_raw_labels_make_a_root_of_extra_videos(dataset, run_script, tmp_path):
    """As the README says: refactor_dataset.py --raw-labels on what is drawn; --groups takes the file of workers."""
    out, _ = dataset
    parts = [out / f"QEVD-FIT-300k-Part-{k}" for k in (1, 2, 3, 4)]
    labels = ("--labels-json", out / make_sample_dataset.LABELS, "--dest-of-raw", "extra", "--mode", "symlink")
    n = len(make_sample_dataset.CLASSES)
    run_script("tools/refactor_dataset.py", "--raw-labels", "--srcs", *parts, *labels)
    videos = [path.relative_to(tmp_path / "extra/train").as_posix() for path in tmp_path.glob("extra/train/*/*.mp4")]
    assert sorted(video.split("/")[0] for video in videos) == sorted(make_sample_dataset.CLASSES)
    assert not (tmp_path / "extra/val").exists()
    groups = read_groups(out / make_sample_dataset.WORKERS, videos)
    assert len(groups) == n and len(set(groups.values())) < n


def test_contact_sheet_has_two_filled_rows_of_frames_a_class(dataset):
    with Image.open(dataset[0] / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"), float)
    rows = np.array_split(pixels, len(make_sample_dataset.CLASSES))
    for name, row in zip(make_sample_dataset.CLASSES, rows):
        white = (row[30:-10] > 250).all(0).mean()
        assert white < 0.05, f"{100 * white:.0f} % of the width of the row of {name} is empty"


def test_videos_are_encoded_as_filmed_ones_are(dataset):
    seconds = []
    for path in sorted(dataset[0].glob("*/*.mp4")):
        with av.open(str(path)) as container:
            assert [s.type for s in container.streams] == ["video"], path
            stream = container.streams.video[0]
            fps, codec = stream.average_rate, stream.codec_context
            assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 340, 256), path
            assert 24 <= fps <= 30, f"{path}: {fps} fps"
            frames = list(container.decode(stream))
        assert len(frames) == stream.frames, f"{path} declares {stream.frames} frames and has {len(frames)}"
        assert any(f.pict_type == av.video.frame.PictureType.B for f in frames), f"{path} has no B-frames"
        seconds.append(float(len(frames) / fps))
        assert 2.9 <= seconds[-1] <= 6.1, f"{path} lasts {seconds[-1]:.2f} s"
    assert min(seconds) < 4 < max(seconds), f"some must be too short for 16 frames at 4 fps: {seconds}"


def test_the_figure_moves_in_every_video(dataset):
    for path in sorted(dataset[0].glob("*/*.mp4")):
        with av.open(str(path)) as container:
            frames = np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)][::6]).astype(float)
        moving = np.abs(frames - np.median(frames, 0)).max(0) > 40
        assert 0.005 < moving.mean() < 0.4, f"{100 * moving.mean():.1f} % of the pixels of {path} change"
        assert moving[:, 60:276].sum() > 0.9 * moving.sum(), f"the movement in {path} is not near the centre"


def test_exercises_differ_in_their_motion():
    def motion(name):
        """Places of hips, shoulders, hands and feet over one repetition, (24, 8, 3)."""
        bodies = [make_sample_dataset.EXERCISES[name][0](i / 24, 1.0) for i in range(24)]
        return np.array([[b["hips"], b["chest"], *b["shoulders"], *b["hands"], *b["feet"]] for b in bodies])

    motions = {name: motion(name) for name in make_sample_dataset.EXERCISES}
    for name, places in motions.items():
        assert np.ptp(places, axis=0).max() > 0.2, f"nothing moves far in {name}"
        assert places[..., 1].min() > 0, f"a joint goes through the floor in {name}"
    for a, b in itertools.combinations(motions, 2):
        # wherever the repetition starts, some joint must be a fifth of a body height away
        apart = min(np.linalg.norm(motions[a] - np.roll(motions[b], k, 0), axis=2).max() for k in range(24))
        assert apart > 0.2, f"{a} and {b} are at most {apart:.2f} body heights apart"


def test_files_depend_on_the_seed_and_not_on_the_number_of_processes(run_script, tmp_path):
    for out, *flags in (("one", "--num-workers", 1), ("three", "--num-workers", 3), ("other", "--seed", 1)):
        run_script("tools/make_sample_dataset.py", "--out", out, *FEW, *flags)
    one, three, other = (content_of(tmp_path / name) for name in ("one", "three", "other"))
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name]] == []
    assert not {p for p in one if p.endswith(".mp4")} & other.keys(), "another seed gave the same ids"


def test_killed_run_is_completed_and_leaves_no_process(run_script, tmp_path):
    run_script("tools/make_sample_dataset.py", "--out", "whole", *FEW)
    command = [sys.executable, REPO / "tools/make_sample_dataset.py", "--out", "killed", *FEW, "--num-workers", 2]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: list(tmp_path.glob("killed/*/*.mp4")), "a first video")
    finally:
        process.send_signal(signal.SIGKILL)  # the parent alone: its pool must notice
        process.wait()
    wait_for(lambda: not group_is_alive(process.pid), "the pool's processes to end")

    finished = sorted(Path(tmp_path).glob("killed/*/*.mp4"))
    assert len(finished) < 6, "the run ended before it was killed; this test shows nothing"
    finished[0].write_bytes(finished[0].read_bytes()[:-500])  # half a file, as a full disk leaves it
    finished[0].with_name(f".{finished[0].name}.123.tmp").write_bytes(b"half")
    result = run_script("tools/make_sample_dataset.py", "--out", "killed", *FEW)
    left = len(finished) - 1
    assert f"6 videos = {6 - left} drawn + {left} already there = 4 train + 2 val" in result.stdout
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")

    result = run_script("tools/make_sample_dataset.py", "--out", "killed", *FEW)
    assert "6 videos = 0 drawn + 6 already there" in result.stdout


def wait_for(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.01)


def group_is_alive(group):
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def test_wrong_settings_are_refused_and_nothing_is_touched(run_script, tmp_path):
    run_script("tools/make_sample_dataset.py", "--out", "out", "--classes", "squats", "--train-videos-per-class", 1,
               "--val-videos-per-class", 1)
    before = content_of(tmp_path / "out")
    result = run_script("tools/make_sample_dataset.py", "--out", "out", code=2)
    assert "was made with other settings" in result.stderr
    assert content_of(tmp_path / "out") == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    result = run_script("tools/make_sample_dataset.py", "--out", "mine", code=2)
    assert "did not write" in result.stderr
    result = run_script("tools/make_sample_dataset.py", "--out", "new", "--classes", "squats", "yodelling", code=2)
    assert "yodelling" in result.stderr and "jumping_jacks" in result.stderr
    result = run_script("tools/make_sample_dataset.py", "--out", "new", "--val-videos-per-class", 0, code=2)
    assert "VAL_VIDEOS_PER_CLASS" in result.stderr
    assert content_of(tmp_path / "mine") == {"notes.txt": b"mine"} and not (tmp_path / "new").exists()
