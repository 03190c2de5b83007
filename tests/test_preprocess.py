"""tools/preprocess_and_save.py: values, resuming, sharing the work, and every kind of bad input."""

import faulthandler
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

from common import flags
from common.held_out import HeldOut

import av
import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import functional as F

import preprocess_and_save
from conftest import REPO
from make_videos import write_video
from qevd_r2plus1d import Model
from torchvision_patches.clip import OF_PIXELS
from videos.journal import Journal

SCRIPT = "tools/preprocess_and_save.py"
SIZES = ((96, 128), (120, 90), (256, 340), (64, 64))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of 13 videos in 3 classes: long, short and odd ones, with names that are hard to write down."""
    root = tmp_path_factory.mktemp("videos")
    names = ["a b.mp4", "ü#é.mp4", "new\nline.mp4", "00000001.mp4", "x.y.mp4", "three.mp4", "one.mkv", "m.avi", "v.mp4"]
    for k, name in enumerate([*names, "late.mp4", "ntsc.mp4", "hevc.mp4", "z.mp4"]):
        folder = root / ("squats", "jab_+_cross", "side-plank")[k % 3]
        folder.mkdir(exist_ok=True)
        odd = {
            "three.mp4": {"num_frames": 3},
            "one.mkv": {"num_frames": 1},
            "m.avi": {"codec": "mpeg4"},
            "v.mp4": {"pts": [i + i // 9 * 4 for i in range(60)]},
            "late.mp4": {"num_frames": 150, "pts": range(40, 190)},
            "ntsc.mp4": {"num_frames": 140, "fps": Fraction(30000, 1001)},
            "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
        }.get(name, {})
        height, width = SIZES[k % 4]
        write_video(folder / name, **{"num_frames": 60, "height": height, "width": width, "seed": k} | odd)
    return root


def decoded(path):
    """All frames of a video, uint8 (n, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def literal_tensor(path, num_frames=16, rate=4, frames=None, fps=None, resized=(128, 171), cropped=(112, 112)):
    """The original's preprocessing, word by word: decode all, pick, float, resize, crop; (1, 3, T, H, W)."""
    if frames is None:
        with av.open(str(path)) as container:
            fps = float(container.streams.video[0].average_rate)
        frames = decoded(path)
    if len(frames) * rate / fps < num_frames:
        rate = int(np.ceil(num_frames / (len(frames) / fps)))
    step = fps / rate
    picked = [int(i * step) if step == int(step) else int(np.float32(i) * np.float32(step)) for i in range(num_frames)]
    clip = torch.from_numpy(frames[picked]).permute(0, 3, 1, 2)
    clip = F.resize(F.convert_image_dtype(clip, torch.float32), list(resized), antialias=False)
    return F.center_crop(clip, list(cropped)).permute(1, 0, 2, 3)[None].numpy()


def assert_values_are_the_original_s(out, row):
    tensor = np.load(out / row["tensor_path"])
    assert list(tensor.shape) == row["shape"] == [1, 3, 16, 112, 112]
    assert str(tensor.dtype) == row["dtype"] == "float32"
    difference = np.abs(tensor - literal_tensor(row["video_path"])).max()
    assert difference < 1e-4, f"{row['video_path']} differs from the original's preprocessing by {difference}"
    assert tensor.min() >= 0 and tensor.max() <= 1 and tensor.std() > 0.05


def content_of(folder):
    """{relative path: bytes} of all that a run leaves in OUT_ROOT; fails on leftovers."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    leftovers = [name for name in files if name.endswith(".tmp") or name.startswith("progress/")]
    assert not leftovers, f"left in {folder}: {leftovers}"
    return files


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here("--data-root", path, …, code=0, RANK=1) -> what the tool prints, in this process, which has torch."""

    def run(*arguments, code=0, **environment):
        with monkeypatch.context() as patch:
            for name in flags.constants_of(Path(preprocess_and_save.__file__).read_text()):
                patch.setattr(preprocess_and_save, name, getattr(preprocess_and_save, name))  # flags set it: put back
            for name, value in environment.items():
                patch.setenv(name, str(value))
            patch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                preprocess_and_save.main()
        printed = "".join(capsys.readouterr())
        assert stop.value.code == code, f"exit code {stop.value.code} instead of {code}\n{printed}"
        return printed

    return run


@pytest.fixture(scope="module")
def reference(videos, tmp_path_factory):
    """What one undisturbed process writes for `videos`: (OUT_ROOT, its stdout)."""
    out = tmp_path_factory.mktemp("reference") / "out"
    command = [sys.executable, REPO / SCRIPT, "--data-root", videos, "--out-root", out, "--num-workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


@pytest.mark.quick
def test_values_manifest_and_counts(videos, reference):
    out, printed = reference
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["video_path"] for row in rows] == sorted(str(path) for path in videos.rglob("*.*"))
    assert "found 13 = saved 13 + kept 0 + failed 0" in printed
    short = sum(row["num_frames"] * 4 / row["fps"] < 16 for row in rows)
    assert f"13 clips in {out}/manifest.jsonl, {short} of them of short videos" in printed and 0 < short < 13
    for row in rows:
        assert row["label"] == Path(row["video_path"]).parent.name
        assert_values_are_the_original_s(out, row)
    assert (out / "failures.jsonl").read_bytes() == b""


def test_values_of_the_sample_dataset(run_script, run_here, tmp_path):
    """One video a class of each split, drawn as the README's; the download's parts stand for classes."""
    few = ("--train-videos-per-class", 1, "--val-videos-per-class", 1)
    run_script("tools/make_sample_dataset.py", "--out", tmp_path / "sample", *few)
    run_here("--data-root", tmp_path / "sample", "--out-root", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    for row in rows:
        assert_values_are_the_original_s(tmp_path / "out", row)


def test_two_processes_and_a_second_run(videos, reference, run_here, tmp_path):
    arguments = ("--data-root", videos, "--out-root", tmp_path / "out", "--num-workers", 2)
    run_here(*arguments)
    first = content_of(tmp_path / "out")
    assert first == content_of(reference[0])
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*.npy"))]
    assert "found 13 = saved 0 + kept 13 + failed 0" in run_here(*arguments)
    assert content_of(tmp_path / "out") == first
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*.npy"))]
    assert times == again, "tensors were written again"


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_shares_of_the_work_end_in_one_manifest(videos, reference, run_here, tmp_path, launcher):
    arguments = ("--data-root", videos, "--out-root", tmp_path / "out", "--num-workers", 1)
    saved = 0
    for rank in (2, 0, 1):
        if launcher == "torchrun":
            environment = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
        else:
            environment = {"SLURM_ARRAY_TASK_ID": rank + 5, "SLURM_ARRAY_TASK_MIN": 5, "SLURM_ARRAY_TASK_COUNT": 3}
        printed = run_here(*arguments, **environment)
        assert (tmp_path / "out/manifest.jsonl").exists() == (rank == 1), f"after rank {rank}: {printed}"
        saved += int(re.search(r"saved (\d+) \+ kept 0 \+ failed 0", printed)[1])
    assert saved == 13
    assert content_of(tmp_path / "out") == content_of(reference[0])


def test_torchrun_itself_and_a_bad_video_that_ends_none_of_its_processes(videos, reference, tmp_path):
    shutil.copytree(videos, tmp_path / "in")
    (tmp_path / "in/squats/00.mp4").write_bytes(b"no video")
    (tmp_path / "in/top.mp4").write_bytes(b"no video")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", REPO / SCRIPT]
    command += ["--data-root", tmp_path / "in", "--out-root", tmp_path / "out", "--num-workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    found, expected = content_of(tmp_path / "out"), content_of(reference[0])
    assert len(found.pop("failures.jsonl").splitlines()) == 2 and not expected.pop("failures.jsonl")
    assert len(found.pop("manifest.jsonl").splitlines()) == 13 and expected.pop("manifest.jsonl")
    assert found == expected


def test_killed_three_times(videos, reference, run_script, tmp_path):
    out = tmp_path / "out"
    arguments = ["--data-root", videos, "--out-root", out, "--num-workers", "2"]
    rng, killed = np.random.default_rng(0), 0
    while killed < 3:
        process = subprocess.Popen(
            [sys.executable, REPO / SCRIPT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        before = len(list(out.rglob("*.npy")))
        while process.poll() is None and len(list(out.rglob("*.npy"))) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        if (out / "manifest.jsonl").exists():  # it was done before it could be killed: give it work again
            for tensor in list(out.rglob("*.npy"))[::2]:
                tensor.unlink()
    printed = run_script(SCRIPT, *arguments).stdout
    assert content_of(out) == content_of(reference[0]), printed


def test_a_changed_video_is_done_again_and_changed_settings_are_refused(run_here, tmp_path):
    (tmp_path / "in/squats").mkdir(parents=True)
    video = write_video(tmp_path / "in/squats/a.mp4", 60, height=32, width=32)
    arguments = ("--data-root", tmp_path / "in", "--out-root", tmp_path / "out")
    run_here(*arguments)
    before = np.load(tmp_path / "out/squats/a.npy")
    write_video(video, 60, height=32, width=32, seed=5)
    assert "saved 1 + kept 0" in run_here(*arguments)
    assert not np.array_equal(before, np.load(tmp_path / "out/squats/a.npy"))
    whole = (tmp_path / "out/squats/a.npy").read_bytes()
    for content in (None, whole[:-1]):  # deleted, or cut off
        (tmp_path / "out/squats/a.npy").unlink()
        if content:
            (tmp_path / "out/squats/a.npy").write_bytes(content)
        assert "saved 1 + kept 0" in run_here(*arguments)
        assert (tmp_path / "out/squats/a.npy").read_bytes() == whole
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings.keys() == set(OF_PIXELS)
    (tmp_path / "out/settings.json").write_text(json.dumps(settings | {"rule_version": 0}))
    assert "rule_version: 0, now 1" in run_here(*arguments, code=2)
    (tmp_path / "out/settings.json").write_text(json.dumps(settings))
    for flag, value in (("--clip-len", 8), ("--frame-rate", 5), ("--rotate", "true")):
        refused = run_here(*arguments, flag, value, code=2)
        assert flag[2:].replace("-", "_") in refused and "choose another with --out-root" in refused


def test_the_clip_of_a_checkpoint(run_here, tmp_path):
    """Frames, rate and sizes are its own; a flag that contradicts it is refused, what it does not say is free."""
    (tmp_path / "in/squats").mkdir(parents=True)
    video = write_video(tmp_path / "in/squats/a.mp4", 90, height=40, width=60)
    weights = {"model": {"fc.weight": torch.zeros(2, 2)}, "model_name": "mc3_18"}
    description = {"clip_len": 8, "frame_rate": 7.5, "resize_size": [48], "crop_size": [40, 32]}
    torch.save(weights | description, tmp_path / "c.pth")
    arguments = ("--data-root", tmp_path / "in", "--out-root", tmp_path / "out", "--checkpoint", tmp_path / "c.pth")
    refused = run_here(*arguments, "--frame-rate", 4, code=2)
    assert "frame_rate 7.5, and frame_rate 4 is asked for" in refused and not (tmp_path / "out").exists()
    assert f"--checkpoint {tmp_path / 'c.pth'}" in run_here(*arguments, "--frame-rate", 7.5, "--rotate", "false")
    (row,) = map(json.loads, (tmp_path / "out/manifest.jsonl").read_text().splitlines())
    assert row["shape"] == [1, 3, 8, 40, 32] and row["frame_rate"] == 7.5 and row["frame_indices"] == [*range(0, 32, 4)]
    clip = torch.from_numpy(decoded(video)[row["frame_indices"]]).permute(0, 3, 1, 2)
    clip = F.resize(F.convert_image_dtype(clip, torch.float32), 48, antialias=False)  # the shorter side: 48 x 72
    expected = F.center_crop(clip, [40, 32]).permute(1, 0, 2, 3)[None]
    assert np.abs(np.load(tmp_path / "out/squats/a.npy") - expected.numpy()).max() < 1e-4
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["resize_size"] == [48] and settings["frame_rate"] == 7.5
    held_out = HeldOut(("in/squats/a.mp4",), share=0.5)
    held_out.write(tmp_path)
    torch.save(weights | description | {"held_out": held_out.key()}, tmp_path / "c.pth")
    os.link(video, tmp_path / "in/squats/b.mp4")
    for value, name in (("false", "b"), ("true", "a")):
        arguments_of_it = (*arguments[:3], tmp_path / name, *arguments[4:], "--held-out", value)
        assert "1 of 2 videos are taken" in run_here(*arguments_of_it)
        assert [path.stem for path in (tmp_path / name / "squats").iterdir()] == [name]
    (tmp_path / "in/squats/b.mp4").unlink()
    torch.save(weights, tmp_path / "c.pth")  # as it was without a description
    assert "needs a CHECKPOINT that was trained with --hold-out" in run_here(*arguments, "--held-out", code=2)
    assert "was made with other settings" in run_here(*arguments, code=2)
    run_here(*arguments[:3], tmp_path / "other", *arguments[4:], "--frame-rate", 2.5)
    assert json.loads((tmp_path / "other/settings.json").read_text())["frame_rate"] == 2.5


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV 17 cannot write it")
def test_rotated_videos_are_counted_and_turned_only_if_asked(run_here, tmp_path):
    (tmp_path / "in/squats").mkdir(parents=True)
    write_video(tmp_path / "in/squats/lying.mp4", 20, height=32, width=64, rotation=90)
    write_video(tmp_path / "in/squats/plain.mp4", 20, height=32, width=64)
    tensors = {}
    for rotate in "false", "true":
        arguments = ("--data-root", tmp_path / "in", "--out-root", tmp_path / rotate, "--rotate", rotate)
        printed = run_here(*arguments)
        how = {"false": "as they lie", "true": "turned upright"}[rotate]
        assert re.search(f"1 are of videos that ask players to turn them.*{how}", printed), printed
        tensors[rotate] = {name: np.load(tmp_path / rotate / f"squats/{name}.npy") for name in ("lying", "plain")}
        rows = [json.loads(line) for line in (tmp_path / rotate / "manifest.jsonl").read_text().splitlines()]
        assert [row["rotation"] for row in rows] == [270, 0]
    as_it_lies = literal_tensor(tmp_path / "in/squats/lying.mp4")
    assert np.abs(tensors["false"]["lying"] - as_it_lies).max() < 1e-4, "it was turned"
    assert np.array_equal(tensors["true"]["plain"], tensors["false"]["plain"])
    frames = np.rot90(decoded(tmp_path / "in/squats/lying.mp4"), axes=(1, 2))  # counter-clockwise
    assert np.abs(tensors["true"]["lying"] - literal_tensor(None, frames=frames, fps=30)).max() < 1e-4


def test_some_of_each_class_are_always_the_same(run_here, tmp_path):
    for label in "squats", "jabs":
        (tmp_path / "in" / label).mkdir(parents=True)
    first = write_video(tmp_path / "in/squats/00.mp4", 20, height=32, width=32)
    for k in range(1, 9):
        os.link(first, tmp_path / f"in/squats/{k:02d}.mp4")
    os.link(first, tmp_path / "in/jabs/0.mp4")
    arguments = ("--data-root", tmp_path / "in", "--max-per-class")

    def chosen(number, out):
        printed = run_here(*arguments, number, "--out-root", tmp_path / out)
        rows = [json.loads(line) for line in (tmp_path / out / "manifest.jsonl").read_text().splitlines()]
        return printed, {row["video_path"][len(str(tmp_path / "in/")) :] for row in rows}

    printed, three = chosen(3, "a")
    assert "4 of 10 videos are taken: at most 3 of each class" in printed and len(three) == 4
    os.link(first, tmp_path / "in/squats/09.mp4")
    _, four = chosen(4, "b")
    assert len(four) == 5 and len(three - four) <= 1, "one more video changes one of the chosen at most"
    assert "found 11 = saved 6 + kept 5" in chosen(0, "b")[0]


def test_bad_input_is_listed_and_the_rest_goes_on(run_here, tmp_path):
    root = tmp_path / "in"
    for folder in ("squats", "jabs/deeper"):
        (root / folder).mkdir(parents=True)
    good = write_video(root / "squats/good.mp4", 40, height=32, width=32)
    os.link(good, root / "squats/good.avi")
    os.link(good, root / "top.mp4")
    long_name = "x" * 252 + ".ts"  # 255 bytes; with .npy it would be longer
    os.link(good, root / "squats" / long_name)
    os.link(good, root / "jabs/deeper/x.mp4")
    os.symlink(root, root / "jabs/loop")
    (root / "squats/broken.mp4").write_bytes(b"no video")
    (root / "squats/cut.mp4").write_bytes(good.read_bytes()[:900])
    (root / "squats/notes.txt").write_text("not a video at all")
    os.symlink(root / "nowhere.mp4", root / "squats/dangling.mp4")
    os.makedirs(os.fsencode(root) + b"/jabs2")
    os.link(good, os.fsencode(root) + b"/jabs2/\xff\xfe.mp4")
    arguments = ("--data-root", root, "--out-root", tmp_path / "out")
    os.link(good, root / "squats/x.wtv")
    for counts in ("saved 3 + kept 0 + failed 6", "saved 0 + kept 3 + failed 6"):
        printed = run_here(*arguments, code=1)
        assert f"found 9 = {counts}" in printed, printed
        assert "2 files have endings that no step takes for videos (.txt 1, .wtv 1)" in printed
    failures = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    errors = {Path(row["video_path"]).relative_to(root).as_posix(): row["error"] for row in failures}
    assert set(errors) == {
        "jabs/deeper/x.mp4", "squats/broken.mp4", "squats/cut.mp4", "squats/dangling.mp4", "squats/good.mp4", "top.mp4",
    }  # fmt: skip
    assert "would overwrite that of squats/good.avi" in errors["squats/good.mp4"]
    assert "DATA_ROOT/<class>/<video>" in errors["top.mp4"] and "DATA_ROOT/<class>" in errors["jabs/deeper/x.mp4"]
    rows = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and sum(Path(row["video_path"]).name == long_name for row in rows) == 1


def test_wrong_folders_are_refused(run_here, tmp_path):
    assert "there is no folder" in run_here("--data-root", tmp_path / "nowhere", code=2)
    out = ("--out-root", tmp_path / "out")
    assert "no video lies at" in run_here("--data-root", tmp_path, *out, code=2)
    (tmp_path / "val/squats").mkdir(parents=True)
    write_video(tmp_path / "val/squats/a.mp4", 20, height=32, width=32)
    refused = run_here("--data-root", tmp_path, *out, code=2)
    assert "val/squats/a.mp4: it does not lie at DATA_ROOT/<class>/<video>" in refused
    (tmp_path / "file").write_text("in the way")
    for unwritable in (tmp_path / "file/out", "/proc/out"):  # root may write anywhere but into /proc
        arguments = ("--data-root", tmp_path / "val", "--out-root", unwritable)
        assert f"{unwritable} cannot be written" in run_here(*arguments, code=2)


def test_tensors_are_what_train_py_validates_on(videos, reference, tmp_path):
    """The clip of `train.py --test-only` is the saved tensor, normalised, and the deployed network's logits are its."""
    torch.manual_seed(0)
    network = torchvision.models.get_model("mc3_18", num_classes=5)
    checkpoint = {"model": network.state_dict(), "model_name": "mc3_18", "clip_len": 16}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    code = """
import json, sys
import numpy as np
import train, datasets, presets, transforms, torch, torchvision
from torchvision_patches.clip import of_network
from torchvision_patches.video_utils import VideoClips
videos, out, folder = sys.argv[1:]
network = torchvision.models.get_model("mc3_18", num_classes=5)
network.load_state_dict(torch.load(folder + "/checkpoint.pth", weights_only=True)["model"])
network.eval().to(memory_format=torch.channels_last_3d)
rows = {row["video_path"]: row for row in map(json.loads, open(out + "/manifest.jsonl"))}
samples = [(path, 0) for path in sorted(rows)]
preset = presets.VideoClassificationPresetEval(resize_size=(128, 171), crop_size=(112, 112))
metadata = datasets.index_videos([path for path, _ in samples], progress=False)
clips = VideoClips(metadata["video_paths"], 16, 1, 4, metadata)
dataset = datasets.KineticsWithVideoId(videos, samples, clips, preset)
about = of_network()
normalize, logits = transforms.Normalize(about.mean, about.std), {}
for clip in datasets.val_clips(dataset, 1):
    item = dataset[clip]
    validated, video = item.clip, item.video_idx
    saved = torch.from_numpy(np.load(out + "/" + rows[samples[video][0]]["tensor_path"]))
    difference = (normalize(validated[None]) - normalize(saved)).abs().max().item()
    assert difference < 1e-6, (samples[video][0], difference)
    if not logits:
        with torch.inference_mode():
            clips = normalize(validated[None]).to(memory_format=torch.channels_last_3d)
            logits[rows[samples[video][0]]["tensor_path"]] = network(clips).tolist()
print(json.dumps(logits))
print("equal", len(samples))
"""
    folder = REPO / "references/video_classification"
    command = [sys.executable, "-c", code, videos, reference[0], tmp_path]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.stdout.endswith("equal 13\n"), result.stdout + result.stderr
    logits = json.loads(result.stdout.splitlines()[-2])
    deployed = Model.from_pretrained(str(tmp_path / "checkpoint.pth"))
    assert len(logits) == 1 and np.ptp(list(logits.values())) > 0.1
    for tensor, expected in logits.items():
        with torch.inference_mode():
            ours = deployed(torch.from_numpy(np.load(reference[0] / tensor)))
        torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.fixture
def one_video(tmp_path, monkeypatch):
    """The module set to one video, run in this process."""
    (tmp_path / "in/squats").mkdir(parents=True)
    write_video(tmp_path / "in/squats/a.mp4", 40, height=32, width=32)
    monkeypatch.setattr(sys, "argv", ["preprocess_and_save.py"])
    monkeypatch.setattr(preprocess_and_save, "DATA_ROOT", str(tmp_path / "in"))
    monkeypatch.setattr(preprocess_and_save, "OUT_ROOT", str(tmp_path / "out"))
    monkeypatch.setattr(preprocess_and_save, "NUM_WORKERS", 1)
    return tmp_path


def test_too_little_disk_space_is_refused_before_anything_is_decoded(one_video, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit) as stop:
        preprocess_and_save.main()
    assert stop.value.code == 2 and "2.4 MB are needed in" in capsys.readouterr().err
    assert not list((one_video / "out").rglob("*.npy"))


def hang(*_):
    time.sleep(60)


def crash(*_):
    faulthandler.disable()  # pytest's would print a page about what is meant to happen
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_disk_that_fills_up_stops_the_run_and_fails_no_video(one_video, run_here):
    """A limit on the size of files stops the writing of the tensor half-way, as a full disk does."""
    command = f"ulimit -f 1000; exec {shlex.join([sys.executable, str(REPO / SCRIPT)])} --data-root in --out-root out"
    result = subprocess.run(["bash", "-c", command], cwd=one_video, capture_output=True, text=True)
    assert result.returncode == 2 and "out cannot be written ([Errno 27]" in result.stderr, result.stderr
    assert not list((one_video / "out").rglob("*.npy*")) and not (one_video / "out/failures.jsonl").exists()
    assert "saved 1 + kept 0 + failed 0" in run_here()


def test_a_folder_that_cannot_be_read_is_listed(one_video, monkeypatch, capsys):
    (one_video / "in/locked").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "locked":  # what root, who may read all, does not meet
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(SystemExit) as stop:
        preprocess_and_save.main()
    assert stop.value.code == 1 and "found 2 = saved 1 + kept 0 + failed 1" in capsys.readouterr().out
    (failure,) = map(json.loads, (one_video / "out/failures.jsonl").read_text().splitlines())
    assert failure["video_path"].endswith("in/locked") and "cannot be read: Permission denied" in failure["error"]


def test_progress_survives_a_merge_by_another_process_and_changes_meanwhile_are_said(one_video, monkeypatch, capsys):
    """After the first of four videos another process merges, after the last that video is replaced."""
    for name in "bcd":
        write_video(one_video / f"in/squats/{name}.mp4", 40, height=32, width=32)
    results_of = preprocess_and_save.results_of

    def with_faults(videos, description, num_workers):
        for number, result in enumerate(results_of(videos, description, num_workers)):
            yield result
            if number == 0:
                names = [f"squats/{name}.mp4" for name in "abcd"]
                journal = Journal(one_video / "out/progress")
                progress = preprocess_and_save.read_progress(names, journal, 16)
                preprocess_and_save.write_manifest(names, *progress, description, journal)
            if number == 3:
                os.utime(one_video / "in/squats/d.mp4", (1, 1))

    monkeypatch.setattr(preprocess_and_save, "results_of", with_faults)
    for counts, code in (("saved 3 + kept 0 + failed 1", 1), ("saved 1 + kept 3 + failed 0", 0)):
        with pytest.raises(SystemExit) as stop:
            preprocess_and_save.main()
        assert stop.value.code == code and f"found 4 = {counts}" in capsys.readouterr().out
        monkeypatch.setattr(preprocess_and_save, "results_of", results_of)


def be_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(hang, "did not finish"), (crash, "decoder crashed"), (be_killed, "as the system does when memory is short")],
)
def test_a_decoder_that_hangs_or_crashes_fails_one_video_only(one_video, monkeypatch, capsys, fault, reason):
    monkeypatch.setattr(preprocess_and_save, "preprocess", fault)
    monkeypatch.setattr(preprocess_and_save, "TIMEOUT", 1)
    with pytest.raises(SystemExit) as stop:
        preprocess_and_save.main()
    assert stop.value.code == 1 and "found 1 = saved 0 + kept 0 + failed 1" in capsys.readouterr().out
    assert reason in (one_video / "out/failures.jsonl").read_text()
