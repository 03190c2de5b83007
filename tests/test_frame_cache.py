"""--cache-frames of train.py: the same values and results as from videos, whatever happens to videos, cache and run.

$ python -m pytest tests/test_frame_cache.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from conftest import REPO
from make_videos import write_video
from test_train import CLASSES, FAST, LOSE_THE_RIGHT_TO_WRITE_ANYWHERE, break_off, command, environment, train
from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.video_utils import UnreadableVideo, VideoClips, index_videos

NUM_VIDEOS = 12  # of a split
RECIPE = ["--epochs", 2, "--batch-size", 4, "--color-jitter", 0.3, "--lr-warmup-epochs", 0, "--lr", 0.001]


@pytest.fixture(scope="module")
def frame_cache():
    """The module, which finds its siblings by bare name."""
    sys.path.insert(0, str(REPO / "references/video_classification"))
    import frame_cache

    yield frame_cache
    sys.path.remove(str(REPO / "references/video_classification"))
    del sys.modules["frame_cache"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """12 training and 12 validation videos of 3 classes, 1 to 3 s long."""
    root = tmp_path_factory.mktemp("videos")
    for split in "train", "val":
        for i in range(NUM_VIDEOS):
            folder = root / split / CLASSES[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{i:08d}.mp4", num_frames=30 + 5 * i, height=64, width=64, seed=i)
    return root


@pytest.fixture
def copy(videos, tmp_path):
    """A copy of `videos` that a test may change; times are kept."""
    return shutil.copytree(videos, tmp_path / "videos")


def flags(data, cache, *more):
    return ["--data-path", data, "--cache-frames", cache, *FAST, *more]


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    """Two epochs without and with a cache, colours changed at random: (their folders, the cache, stdout with it)."""
    without, with_cache, cache = (tmp_path_factory.mktemp(name) for name in ("without", "with", "cache"))
    train("--data-path", videos, *FAST, *RECIPE, "--output-dir", without)
    out, err = train(*flags(videos, cache), *RECIPE, "--output-dir", with_cache)
    assert "Warning" not in err, err
    return without, with_cache, cache, out


def contents(cache):
    """{path: (bytes, mtime)} of the frames of all videos."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(cache.rglob("*.rgb"))}


def clips_of(frame_cache, paths, root, cache, resize_size=(128, 171)):
    metadata = index_videos([str(path) for path in paths], progress=False)
    clips = frame_cache.CachedVideoClips(metadata, 16, 4, root, cache, resize_size)
    frame_cache.prepare_cache(clips, "test")
    return clips, VideoClips(metadata["video_paths"], 16, 1, 4, metadata)


@pytest.mark.quick
def test_values_are_those_of_decoding_within_half_a_grey_level(frame_cache, tmp_path):
    """Every clip of short, long, odd and AVI videos; from the file alone the second time."""
    paths = [
        write_video(tmp_path / "short.mp4", 50, height=90, width=160),
        write_video(tmp_path / "long.mp4", 180, height=256, width=340, options={"bf": "3", "g": "60"}),
        write_video(tmp_path / "three.mp4", 3, height=64, width=48),
        write_video(tmp_path / "counted.avi", 150, fps=25, codec="mpeg4", options={"bf": "2"}),
        write_video(tmp_path / "as large.mp4", 130, height=128, width=170),
    ]
    cached, decoded = clips_of(frame_cache, paths, tmp_path, tmp_path / "cache")
    expected = [decoded.get_clip(i)[0] for i in range(decoded.num_clips())]
    assert len(expected) > 15 and {cached.get_clip_location(i)[0] for i in range(len(expected))} == set(range(5))
    first = [cached.get_clip(i) for i in range(len(expected))]
    for path in paths:
        path.unlink()
    for i, video in enumerate(expected):
        clip, audio, info, video_idx = cached.get_clip(i)
        assert torch.equal(clip, first[i][0]) and clip.shape == (16, 128, 171, 3) and clip.dtype == torch.uint8
        assert audio.shape == (1, 0) and info == {"video_fps": 4} and video_idx == decoded.get_clip_location(i)[0]
        for top, left in (0, 0), (8, 30), (16, 59):
            crop = clip[:, top : top + 112, left : left + 112].permute(3, 0, 1, 2)
            difference = (crop - 255 * resize_and_crop(video, (128, 171), (112, 112), top, left)).abs().max().item()
            assert difference < 0.5 + 1e-3, f"clip {i} of {paths[video_idx].name}: {difference} grey levels"


def test_a_frame_is_stored_once_however_many_clips_show_it(frame_cache, tmp_path):
    """The clock of a recording jumps by an hour: 60 frames, 14,000 clips, nearly all of which show one frame."""
    times = [i + 108_000 * (i >= 30) for i in range(60)]
    path = write_video(tmp_path / "jump.mp4", 60, height=32, width=48, options={"bf": "0"}, pts=times)
    cached, decoded = clips_of(frame_cache, [path], tmp_path, tmp_path / "cache", resize_size=(32, 48))
    count = decoded.num_clips()
    assert count > 14_000 and cached.missing == 60 * 32 * 48 * 3
    clips = [0, 1, count // 3, count // 2, count - 1]
    expected = {i: decoded.get_clip(i)[0] for i in clips}
    for name in "as it is filled", "from the file":
        for i in clips:
            assert torch.equal(cached.get_clip(i)[0], expected[i]), f"clip {i} {name}"
    (file,) = contents(tmp_path / "cache")
    assert file.stat().st_size == cached.missing
    assert clips_of(frame_cache, [path], tmp_path, tmp_path / "cache", resize_size=(32, 48))[0].missing == 0


def test_upright_frames_have_a_cache_of_their_own(frame_cache, tmp_path, capsys):
    path = write_video(tmp_path / "a.mp4", 60, height=32, width=48)
    cached, _ = clips_of(frame_cache, [path], tmp_path, tmp_path / "cache")
    cached.rotate = True
    with pytest.raises(SystemExit):
        frame_cache.prepare_cache(cached, "test")
    assert "was made with other settings (rotate: False, now True); name another folder" in capsys.readouterr().err


def test_training_and_validation_are_the_same_as_without(videos, trained):
    without, with_cache, cache, out = trained
    assert out.count(f"the frames of 0 of {NUM_VIDEOS} videos are in {cache}") == 2
    assert len(contents(cache)) == 2 * NUM_VIDEOS
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (without, with_cache)]
    for ours, theirs in zip(*rows):
        # training takes grey levels either way; validation takes them from the cache only, and a near tie may turn
        for key in ("train_loss", "train_acc1", "bad_clips", "num_clips", "num_videos"):
            assert ours[key] == theirs[key], f"{key} differs: {ours} {theirs}"
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.01), (ours, theirs)
    before = contents(cache)
    for processes in None, 2:
        test = "--resume", with_cache / "checkpoint.pth", "--test-only", "--device", "cpu"
        out, _ = train("--data-path", videos, "--cache-frames", cache, *test, processes=processes)
        assert f"the frames of {NUM_VIDEOS} of {NUM_VIDEOS} videos are in {cache}/val" in out
        result = json.loads(out.splitlines()[-1])
        for key in ("clip_acc1", "clip_acc5", "video_acc1", "num_clips"):
            assert result[key] == rows[1][-1][key], f"{key} from a complete cache is not that of its first use"
    assert contents(cache) == before, "a complete cache was written to"


def test_a_run_with_a_cache_is_resumed_only_with_one(videos, trained, tmp_path):
    without, with_cache, cache, _ = trained
    resume = [*RECIPE, "--output-dir", tmp_path, "--resume"]
    _, err = train("--data-path", videos, *FAST, *resume, with_cache / "checkpoint.pth", code=2)
    assert "has cache_frames True, not False" in err
    assert "0 to go" in train(*flags(videos, cache), *resume, with_cache / "checkpoint.pth")[0]


def test_killed_while_filling(videos, trained, tmp_path):
    """Whatever is there is complete and is kept; what is missing is added; the bytes are those of a quiet run."""
    cache, reference = tmp_path / "cache", contents(trained[2])
    run = flags(videos, cache, "--epochs", 1, "--output-dir", tmp_path, "--save-every", 0)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(*run), env=environment(), stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while not list(cache.rglob("*.rgb")):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.001)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    early = contents(cache)
    finished = {path: v for path, v in early.items() if not path.name.startswith(".")}
    assert len(finished) < 2 * NUM_VIDEOS, "the run was killed too late to show anything"
    abandoned = cache / "train/squats/.00000002.mp4.1-2.rgb.123.tmp"
    abandoned.write_bytes(b"half a file")
    os.utime(abandoned, (time.time() - 7200,) * 2)
    train(*run)
    after = {path: v for path, v in contents(cache).items() if not path.name.startswith(".")}
    assert not abandoned.exists(), "what a run killed hours ago had begun is still there"
    assert {path.relative_to(cache): v[0] for path, v in after.items()} == {
        path.relative_to(trained[2]): v[0] for path, v in reference.items()
    }
    assert all(after[path] == v for path, v in finished.items()), "finished files were written again"


def test_changed_videos_moved_dataset_damaged_files_and_other_settings(copy, trained, tmp_path):
    cache = shutil.copytree(trained[2], tmp_path / "cache")
    moved = copy.rename(tmp_path / "moved")
    test = ["--data-path", moved, "--resume", trained[1] / "checkpoint.pth", "--test-only", "--device", "cpu"]
    test += ["--cache-frames", cache]
    before = contents(cache)
    assert f"the frames of {NUM_VIDEOS} of {NUM_VIDEOS} videos" in train(*test)[0]
    assert contents(cache) == before, "moving the dataset must not fill the cache anew"

    changed, cut, lost, *_ = sorted(path for path in before if path.parts[-3] == "val")
    write_video(moved / "val" / changed.parent.name / changed.name[:12], 40, height=64, width=64, seed=99)
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    assert f"the frames of {NUM_VIDEOS - 3} of {NUM_VIDEOS} videos" in train(*test)[0]
    after = contents(cache)
    assert not changed.exists(), "frames of a video that is no longer there are kept"
    (new,) = after.keys() - before.keys()
    assert new.name.startswith(changed.name[:12]) and len(after) == len(before)
    assert after[cut][0] == before[cut][0] and after[lost][0] == before[lost][0], "they were not repaired"
    assert all(after[path] == v for path, v in before.items() if path not in (changed, cut, lost))

    other = flags(moved, cache, "--frame-rate", 8, "--epochs", 1, "--output-dir", tmp_path)
    _, err = train(*other, code=2)
    assert f"{cache}/val was made with other settings (frame_rate: 4.0, now 8.0); name another" in err
    assert contents(cache) == after
    cache.joinpath("val/settings.json").write_text("{")
    assert "settings.json is damaged; name another folder" in train(*test, code=2)[1]
    before = json.loads((cache / "train/settings.json").read_text())
    cache.joinpath("val/settings.json").write_text(json.dumps(before | {"rule_version": 0}))
    assert "(rule_version: 0, now 1); name another folder, or delete this one" in train(*test, code=2)[1]


def test_a_video_of_which_a_part_decodes(frame_cache, tmp_path):
    """Its good clips are read, the others fail as they do without a cache, and nothing of it is stored."""
    path = write_video(tmp_path / "a.mp4", 210, height=48, width=64, options={"g": "15", "bf": "0"})
    data = bytearray(path.read_bytes())
    middle = len(data) * 7 // 10
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    cached, decoded = clips_of(frame_cache, [path], tmp_path, tmp_path / "cache")
    outcomes = []
    for i in range(decoded.num_clips()):
        results = []
        for clips in cached, decoded:
            try:
                results.append(clips.get_clip(i)[0].shape[0])
            except UnreadableVideo as e:
                results.append(str(e))
        assert results[0] == results[1]
        outcomes.append(results[0])
    assert 16 in outcomes and len(set(outcomes)) > 1, outcomes
    assert not contents(tmp_path / "cache")


def test_what_is_not_the_caches_own_stays(frame_cache, videos, tmp_path):
    """Even in a folder of videos."""
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for path, video in zip(paths, sorted((videos / "val").rglob("*.mp4"))):
        shutil.copy(video, path)
    others = [tmp_path / name for name in ("0.mp4.md5.txt", "1.mp4.en.vtt", "2.mp4.orig.mp4", "2.mp4.1-2.rgb.bak")]
    stale = tmp_path / "2.mp4.1-2.rgb"
    for path in (*others, stale):
        path.write_text("mine")
    clips_of(frame_cache, paths, tmp_path, tmp_path)
    assert all(path.exists() for path in (*paths, *others)) and not stale.exists()


def test_a_run_that_starts_while_another_fills(frame_cache, videos, tmp_path):
    paths = sorted((videos / "val").rglob("*.mp4"))
    cached, _ = clips_of(frame_cache, paths, videos / "val", tmp_path / "cache")
    file, _ = cached.file_of(0)
    frames, stop = cached.fill(0), threading.Event()

    def fill():
        while not stop.is_set():
            cached.store(0, file, frames)

    writer = threading.Thread(target=fill)
    writer.start()
    try:
        for _ in range(100):
            clips_of(frame_cache, paths, videos / "val", tmp_path / "cache")
    finally:
        stop.set()
        writer.join()
    assert cached.can_write and not cached.given_up


def test_videos_that_cannot_be_stored_cost_nothing_else(frame_cache, videos, tmp_path, capsys):
    """A name too long for its frames, and a video that was changed after it was indexed."""
    source = sorted((videos / "val").rglob("*.mp4"))
    paths = [tmp_path / f"{'n' * 250}.mp4", tmp_path / "changed.mp4", tmp_path / "ordinary.mp4"]
    for path, video in zip(paths, source):
        shutil.copy(video, path)
    cached, decoded = clips_of(frame_cache, paths, tmp_path, tmp_path / "cache")
    os.utime(paths[1], (1, 1))
    for _ in range(2):
        assert [len(cached.get_clip(i)[0]) for i in range(decoded.num_clips())] == [16] * decoded.num_clips()
    printed = capsys.readouterr().out
    assert printed.count("are not stored (File name too long)\n") == 1
    assert printed.count(f"{paths[1]} is not the file that was indexed") == 1
    assert [path.name.partition(".")[0] for path in contents(tmp_path / "cache")] == ["ordinary"]


def test_two_processes_fill_one_cache(videos, trained, tmp_path):
    cache = tmp_path / "cache"
    run = flags(videos, cache, "--epochs", 1, "--output-dir", tmp_path, "--save-every", 0)
    out, _ = train(*run, processes=2)
    assert out.count("are decoded once, when first asked for") == 2, "each split says so once"
    ours, theirs = (
        {p.relative_to(folder): v[0] for p, v in contents(folder).items()} for folder in (cache, trained[2])
    )
    assert ours == theirs


def test_bad_videos_are_replaced_and_counted(copy, tmp_path):
    break_off(copy / "train" / CLASSES[0] / "00000000.mp4")
    out, _ = train(*flags(copy, tmp_path / "cache", "--epochs", 1, "--output-dir", tmp_path, "--save-every", 0))
    assert "12 clips in" in out and "1 that did not decode replaced" in out
    assert len(contents(tmp_path / "cache" / "train")) == NUM_VIDEOS - 1


def test_full_and_read_only_disks(frame_cache, videos, tmp_path, monkeypatch, capsys):
    paths = sorted((videos / "val").rglob("*.mp4"))
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**20))
        clips_of(frame_cache, paths, videos / "val", tmp_path / "cache")
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "needs 0.0" in printed.err and "0.0 GB are free" in printed.err
    with pytest.raises(SystemExit):  # what another split will take is not free
        cached, _ = clips_of(frame_cache, paths, videos / "val", tmp_path / "cache")
        frame_cache.prepare_cache(cached, "train", promised=shutil.disk_usage(tmp_path).free - cached.missing // 2)
    capsys.readouterr()
    # the disk is full before the calculation says so: the run goes on without storing
    cached, decoded = clips_of(frame_cache, paths, videos / "val", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for i in range(decoded.num_clips()):
            difference = cached.get_clip(i)[0] - 255 * resize_and_crop(
                decoded.get_clip(i)[0], (128, 171), (128, 171)
            ).permute(1, 2, 3, 0)
            assert difference.abs().max() < 0.51
    assert capsys.readouterr().out.count("No space left on device") == 1 and not contents(tmp_path / "cache")


def test_read_only_caches(videos, trained, tmp_path):
    cache = shutil.copytree(trained[2], tmp_path / "cache")
    test = ["--data-path", videos, "--resume", trained[1] / "checkpoint.pth", "--test-only", "--device", "cpu"]
    test += ["--cache-frames", cache]
    one = next((cache / "val").rglob("*.rgb"))
    for folder in cache, *cache.rglob("*/"):
        folder.chmod(0o555)
    out, _ = train(*test, first=LOSE_THE_RIGHT_TO_WRITE_ANYWHERE)
    assert f"the frames of {NUM_VIDEOS} of {NUM_VIDEOS}" in out
    one.parent.chmod(0o755)
    one.unlink()
    one.parent.chmod(0o555)
    out, _ = train(*test, first=LOSE_THE_RIGHT_TO_WRITE_ANYWHERE)
    assert (
        f"decoded each time: {cache}/val is not writable" in out and f"{NUM_VIDEOS} videos, {NUM_VIDEOS} clips" in out
    )
    assert not one.exists()
    for folder in cache, *cache.rglob("*/"):
        folder.chmod(0o755)
