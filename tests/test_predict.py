"""predict.py: right labels, the logits of run_inference.py, every kind of file, and timelines of recordings."""

import csv
import faulthandler
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import calibration, flags, fonts
from common.names import shortened

import av
import matplotlib
import numpy as np
import onnx
import pytest
import torch
import torchvision
from matplotlib import font_manager
from PIL import Image

import live
import predict
from conftest import REPO
from drawn_exercises import CLASSES, without_torch, write_exercises, write_onnx
from make_videos import write_still
from qevd_r2plus1d import Model
from see import annotated_copy, classifier, drawing, timeline
from torchvision_patches import clip as clip_module
from torchvision_patches.clip import first_clip, of_network

SCRIPT = "tools/predict.py"
SQUATS = str(CLASSES.index("squats"))


@pytest.fixture(scope="module")
def exercises(tmp_path_factory):
    """tiny.onnx, and a folder in/ with a drawn video a class, the first of them turned by players, and odd files."""
    folder = tmp_path_factory.mktemp("exercises")
    write_onnx(folder / "tiny.onnx")
    (folder / "in/deeper").mkdir(parents=True)
    for k, name in enumerate(CLASSES):
        place = folder / "in/deeper" if k else folder / "in"
        write_exercises(place / f"{name}.mp4", [name], seconds=4 if k else 3, seed=20 + k, rotation=0 if k else 90)
    (folder / "in/broken.mp4").write_bytes(b"no video")
    (folder / "in/empty.avi").write_bytes(b"")
    (folder / "in/notes.txt").write_text("no video either")
    (folder / "in/gone.mov").symlink_to("nowhere")
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("a.mp4", …, code=0, CONSTANT=value) runs the script in this process and in `tmp_path`; returns its output."""

    def run(*arguments, code=0, **constants):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
            for name in flags.constants_of(Path(predict.__file__).read_text()):
                patch.setattr(predict, name, constants.get(name, getattr(predict, name)))  # flags change them
            predict.main()
        printed = capsys.readouterr()
        assert stop.value.code == code, printed.out + printed.err
        return printed.out + printed.err

    return run


def jsonl(path):
    return {Path(row["video"]).name: row for row in map(json.loads, Path(path).read_text().splitlines())}


# --- one prediction a video -------------------------------------------------------------------------------------------


def test_a_folder_of_all_kinds_of_files(exercises, run_script, tmp_path):
    """As a user runs it: right labels, pictures, tables; bad files are a line each, and the counts add up."""
    options = ("--csv", "all.csv", "--jsonl", "all.jsonl", "--checkpoint", exercises / "tiny.onnx")
    printed = run_script(SCRIPT, exercises / "in", "absent*.mp4", *options, code=1).stdout
    assert "7 videos = 3 classified + 4 failed" in printed, printed
    for why in ("broken.mp4: ", "empty.avi: ", "gone.mov: it is a link to nothing"):
        assert f"failed: {exercises / 'in'}/{why}" in printed, printed
    assert "failed: absent*.mp4: there is no such file" in printed
    rows = jsonl(tmp_path / "all.jsonl")
    with open(tmp_path / "all.csv", newline="") as file:
        table = {Path(row["video"]).name: row for row in csv.DictReader(file)}
    assert rows.keys() == table.keys() and len(rows) == 7
    for name in CLASSES:
        video = f"{name}.mp4"
        assert rows[video]["classes"][0][0] == table[video]["class_1"] == name, f"{video} is taken for another class"
        assert f"\n  {name} " in printed and (tmp_path / f"predictions/{name}.png").exists()
    turned = rows[f"{CLASSES[0]}.mp4"]
    assert turned["rotation"] == 90 and "players turn it by 90° clockwise" in printed
    assert turned["frame_indices"] == [int(i * 10 / 6) for i in range(16)], "3 s: sampled at ceil(16 / 3) = 6 fps"
    printed = run_script(SCRIPT, exercises / f"in/{CLASSES[0]}.mp4", *options, "--rotate").stdout
    assert "players turn it" not in printed, "the clip is turned as players do"
    upright = jsonl(tmp_path / "all.jsonl")[f"{CLASSES[0]}.mp4"]
    assert upright["rotation"] == 90 and upright["logits"] != turned["logits"]
    assert turned["times"][-1] == 2.5 and rows["broken.mp4"]["error"] and not table[f"{CLASSES[0]}.mp4"]["error"]


def test_the_picture_shows_what_the_model_saw(exercises, run, tmp_path):
    video = exercises / "in/deeper" / f"{CLASSES[1]}.mp4"
    run(video, CHECKPOINT=[str(exercises / "tiny.onnx")])
    clip = first_clip(str(video), of_network())
    image = Image.open(tmp_path / f"predictions/{CLASSES[1]}.png")
    shown = np.asarray(image).astype(float)
    for i, frame in enumerate(drawing.images_of(clip.pixels, 160)):
        x, y = 32 + i % 8 * 168, 76 + i // 8 * 194
        assert np.array_equal(shown[y : y + 160, x : x + 160], np.asarray(frame)), f"frame {i} is not at ({x}, {y})"
    assert image.width == 1400 and (shown[:, :31] == 255).all() and (shown[:, -31:] == 255).all(), "something overflows"


def test_logits_are_those_of_run_inference(exercises, run_script, run, tmp_path):
    """Through the local hub's binary, w8a8 and channel last: its input is quantised, its classes are beside it."""
    (tmp_path / "val").mkdir()
    shutil.copytree(exercises / "in/deeper", tmp_path / "val/any")
    run_script("tools/preprocess_and_save.py", "--data-root", "val", "--out-root", "tensors", "--num-workers", 1)
    for name in ("tiny.onnx", "tiny.json"):
        shutil.copy(exercises / name, tmp_path)
    (tmp_path / "compile.py").write_text(f"import sys; sys.path.append({str(REPO / 'tools')!r})" """
import glob, json
import numpy as np, onnx, qai_hub as hub
import common
from aihub import model_io
clips = [np.load(path) for path in glob.glob("tensors/*/*.npy")]
device, shape = hub.Device("Dragonwing IQ-9075 EVK"), (1, 3, 16, 112, 112)
quantize = hub.submit_quantize_job(onnx.load("tiny.onnx"), {"video": clips}, hub.QuantizeDtype.INT8,
                                   hub.QuantizeDtype.INT8)
job = hub.submit_compile_job(quantize.get_target_model(), device, input_specs={"video": (shape, "float32")},
    options="--target_runtime qnn_context_binary --force_channel_last_input video --quantize_io")
job.get_target_model().download("w8a8.bin")
description = model_io.io_of(job.get_target_model()) | {"sha256": common.sha256_of("w8a8.bin")}
json.dump(description | {"classes": json.load(open("tiny.json"))["classes"]}, open("w8a8.json", "w"))
""")
    python = shlex.quote(sys.executable)
    infer = f"{python} {shlex.quote(str(REPO))}/tools/run_inference.py --data-path tensors"
    commands = [f"{python} compile.py", f"{infer} --dlc-path w8a8.bin --output-h5 w8a8.h5",
                f"{infer} --dlc-path '' --onnx-dir . --video-onnx-name tiny.onnx"]  # fmt: skip
    run_script("tools/local_hub.py", "bash", "-c", " && ".join(commands))
    for model, h5 in (("tiny.onnx", "dataset-export.h5"), ("w8a8.bin", "w8a8.h5")):
        run("val", CHECKPOINT=[model], JSONL="rows.jsonl", PICTURES=False)
        rows, expected = jsonl(tmp_path / "rows.jsonl"), logits_of(tmp_path / h5)
        assert len(expected) == 2
        for tensor, logits in expected.items():
            name = Path(tensor).stem
            assert rows[f"{name}.mp4"]["classes"][0][0] == name
            np.testing.assert_allclose(rows[f"{name}.mp4"]["logits"], logits, atol=1e-4, err_msg=f"{model}, {name}")


def logits_of(path):
    import h5py

    with h5py.File(path) as file:
        return {name.decode(): file[f"data/0/batch_{i}"][0] for i, name in enumerate(file["tensor_paths"])}


def test_a_checkpoint_gives_the_deployed_networks_logits(exercises, run, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.get_model("mc3_18", num_classes=3)
    checkpoint = {"model": network.state_dict(), "model_name": "mc3_18", "clip_len": 8, "classes": ["a", "b", "c d"]}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    video = exercises / f"in/{CLASSES[0]}.mp4"
    printed = run(video, video, JSONL="rows.jsonl")
    assert "3 classes, 8 frames at 4 fps" in printed and "1 videos = 1 classified" in printed
    with torch.inference_mode():
        clip = torch.from_numpy(first_clip(str(video), of_network(clip_len=8)).pixels)[None]
        expected = Model.from_pretrained(str(tmp_path / "checkpoint.pth"))(clip)[0]
    row = jsonl(tmp_path / "rows.jsonl")[video.name]
    np.testing.assert_allclose(row["logits"], expected, atol=1e-4)
    assert {name for name, _ in row["classes"]} == {"a", "b", "c d"}


def test_a_compiled_network_needs_no_torch(run_script, tmp_path):
    """As on a board; the logits are the same, bit for bit."""
    network = write_onnx(tmp_path / "tiny.onnx", clip=of_network().as_dict())
    video = write_exercises(tmp_path / "video.mp4", ["squats"], seed=50)
    rows = []
    for number, environment in enumerate(({}, without_torch(tmp_path))):
        flags = ("--checkpoint", network, "--jsonl", f"{number}.jsonl", "--num-workers", 1)
        run_script(SCRIPT, video, *flags, **environment)
        rows.append(json.loads((tmp_path / f"{number}.jsonl").read_text()))
    assert rows[0] == rows[1] and rows[0]["classes"][0][0] == "squats"


def test_below_the_threshold_it_is_not_sure(exercises, run, tmp_path):
    """Of probabilities after the temperature: in print, tables and picture; without a threshold nothing changes."""
    squats, others = exercises / "in/deeper/squats.mp4", exercises / "in/jumping_jacks.mp4"
    write_onnx(tmp_path / "plain.onnx")
    run(squats, others, CHECKPOINT=["plain.onnx"], JSONL="plain.jsonl", CSV="plain.csv")
    logits = {name: np.array(row["logits"]) for name, row in jsonl(tmp_path / "plain.jsonl").items()}
    after = {name: calibration.softmax(row / 3).max() for name, row in logits.items()}
    less = min(after, key=after.get)
    assert {row["sure"] for row in jsonl(tmp_path / "plain.jsonl").values()} == {""}, "there is no threshold"
    before = Image.open(tmp_path / "predictions" / f"{Path(less).stem}.png").height
    write_onnx(tmp_path / "tiny.onnx", temperature=3.0, threshold=float(np.mean(list(after.values()))))
    printed = run(squats, others, CHECKPOINT=["tiny.onnx"], JSONL="rows.jsonl", CSV="rows.csv")
    rows = jsonl(tmp_path / "rows.jsonl")
    assert {name: row["sure"] for name, row in rows.items()} == {name: "no" if name == less else "yes" for name in rows}
    for name, row in rows.items():
        assert row["classes"][0][1] == pytest.approx(after[name], abs=1e-4), "not after the temperature"
        np.testing.assert_allclose(row["logits"], logits[name], atol=1e-5, err_msg="logits stay the network's")
    assert printed.count("; not sure\n") == 1 and "not sure: 1 of 2 videos" in printed, printed
    with open(tmp_path / "rows.csv", newline="") as file:
        assert {row["sure"] for row in csv.DictReader(file)} == {"yes", "no"}
    assert Image.open(tmp_path / "predictions" / f"{Path(less).stem}.png").height == before + 38, "its line is missing"


def without_numbers(path, value):
    """The network of write_onnx with a last layer that has `value` in it."""
    proto = onnx.load(write_onnx(path))
    bias = next(tensor for tensor in proto.graph.initializer if tensor.dims == [len(CLASSES)])
    bias.raw_data = np.full(len(CLASSES), value, np.float32).tobytes()
    path.with_suffix(".json").unlink()
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_no_class(exercises, run, tmp_path, value):
    """Each video, and a recording, has failed, with the reason; the live page does not start."""
    model, video = without_numbers(tmp_path / "broken.onnx", value), exercises / f"in/{CLASSES[0]}.mp4"
    printed = run(video, CHECKPOINT=[str(model)], CSV="rows.csv", code=1)
    assert f"{video}: the network's logits of it are no numbers" in printed and "1 failed" in printed, printed
    with open(tmp_path / "rows.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert "no numbers" in row["error"] and not row["class_1"], row
    assert "no numbers" in run(video, "--timeline", CHECKPOINT=[str(model)], code=1)
    with pytest.raises(SystemExit) as stopped:
        live.warm_up(classifier.load(model))
    assert stopped.value.code == 2


def test_models_that_cannot_run_here_are_refused(exercises, run, tmp_path):
    video = exercises / f"in/{CLASSES[0]}.mp4"
    (tmp_path / "text.bin").write_text("a binary of another maker")
    (tmp_path / "text.onnx").write_text("no model")
    shutil.copy(exercises / "tiny.onnx", tmp_path / "other.onnx")
    (tmp_path / "other.json").write_text(json.dumps({"sha256": "0", "classes": CLASSES}))
    for model, sentence in {
        "absent.pth": "there is no absent.pth",
        "text.bin": "nothing beside text.bin says what its graph is called",
        "text.onnx": "onnxruntime cannot run text.onnx",
        "other.onnx": "other.json describes another file",
    }.items():
        refused = run(video, CHECKPOINT=[model], code=2)
        assert sentence in refused and "Traceback" not in refused, refused
    assert "name videos, folders or patterns" in run(code=2)
    assert "no video found: nowhere.mp4: there is no such file" in run("nowhere.mp4", code=2)
    assert "a timeline writes its segments into OUT" in run(video, "--timeline", CSV="x.csv", code=2)
    (tmp_path / "bare").mkdir()
    assert "no video in this folder" in run("bare", code=2)
    (tmp_path / "predictions").write_text("in the way")
    assert "cannot be written" in run(video, CHECKPOINT=[str(exercises / "tiny.onnx")], code=2)


def test_the_best_checkpoint_instead_of_the_last(exercises, run, tmp_path):
    """The same sentence where there is none for predict.py and example_export.py, of whatever kind the model is."""
    torch.manual_seed(0)
    network = torchvision.models.get_model("mc3_18", num_classes=2)
    saved = {"model": network.state_dict(), "model_name": "mc3_18", "clip_len": 4, "frame_rate": 2.0}
    for name in ("checkpoint", "model_best"):
        torch.save(saved | {"classes": [f"{name}_a", f"{name}_b"]}, tmp_path / f"{name}.pth")
    video = exercises / f"in/{CLASSES[0]}.mp4"
    assert "checkpoint_a" in run(video, PICTURES=False)
    printed = run(video, "--best", "--frame-rate", 2, PICTURES=False)
    assert "model_best_a" in printed and "model_best.pth on the" in printed and "checkpoint_a" not in printed, printed
    (tmp_path / "model_best.pth").unlink()
    for model in ("checkpoint.pth", exercises / "tiny.onnx"):
        refused = run(video, "--best", "--checkpoint", model, code=2)
        assert "there is no " in refused and f"without --best {model} is taken" in refused, refused


def test_several_checkpoints_and_their_mirror_image_vote(exercises, run, tmp_path):
    video = exercises / f"in/{CLASSES[0]}.mp4"
    for name in ("one", "two"):
        network = torchvision.models.get_model("mc3_18", num_classes=2)
        saved = {"model": network.state_dict(), "model_name": "mc3_18", "clip_len": 4, "classes": ["a", "b"]}
        torch.save(saved, tmp_path / f"{name}.pth")
    votes, logits = (("one.pth",), ("two.pth",), ("one.pth", "two.pth"), ("two.pth", "--mirror")), []
    for words in votes:
        run(video, "--jsonl", "rows.jsonl", "--checkpoint", *words, PICTURES=False)
        logits.append(np.array(jsonl(tmp_path / "rows.jsonl")[video.name]["logits"]))
    np.testing.assert_allclose(logits[2], (logits[0] + logits[1]) / 2, atol=1e-5)
    assert np.abs(logits[3] - logits[1]).max() > 1e-4, "the mirror image has no vote"
    for words, said in {
        ("one.pth", "one.pth"): "one.pth is one.pth once more",
        ("one.pth", exercises / "tiny.onnx"): "tiny.onnx is no checkpoint (.pth)",
        (exercises / "tiny.onnx", "--checkpoint-weights", "2"): "tiny.onnx is no checkpoint (.pth)",
        ("one.pth", "two.pth", "--checkpoint-weights", "1", "nan"): "one above 0 for each is needed",
        (): "name a checkpoint",
    }.items():
        assert said in run(video, "--checkpoint", *words, code=2)
    assert "before --checkpoint, which takes several" in run("--checkpoint", "one.pth", video, code=2)


def test_classes_without_names_are_numbered(exercises, run, tmp_path):
    shutil.copy(exercises / "tiny.onnx", tmp_path)
    printed = run(exercises / f"in/deeper/{CLASSES[2]}.mp4", CHECKPOINT=["tiny.onnx"])
    assert "does not name its 3 classes" in printed and f"  class {SQUATS}" in printed


READ_CLIP = first_clip


def hang_if_broken(video, **rest):
    if "broken" in str(video):
        time.sleep(60)
    return READ_CLIP(video, **rest)


def crash_if_broken(video, **rest):
    if "broken" in str(video):
        faulthandler.disable()  # pytest's would print a page about what is meant to happen
        os.kill(os.getpid(), signal.SIGSEGV)
    return READ_CLIP(video, **rest)


@pytest.mark.parametrize(
    ("fault", "reason"), [(hang_if_broken, "did not finish"), (crash_if_broken, "decoder crashed")]
)
def test_a_decoder_that_hangs_or_crashes_fails_one_video_only(exercises, run, monkeypatch, fault, reason):
    monkeypatch.setattr(predict, "TIMEOUT", 5)
    monkeypatch.setattr(clip_module, "first_clip", fault)
    videos = [exercises / "in/broken.mp4", exercises / f"in/{CLASSES[0]}.mp4"]
    printed = run(*videos, code=1, CHECKPOINT=[str(exercises / "tiny.onnx")], PICTURES=False)
    assert reason in printed and "2 videos = 1 classified + 1 failed" in printed, printed


def test_a_long_recording_where_the_script_has_used_torchs_threads(run_script, tmp_path):
    """10 minutes at 30 fps: its table of clips is large enough that torch would share the work between threads."""
    torch.manual_seed(0)
    network = torchvision.models.get_model("mc3_18", num_classes=2)
    torch.save({"model": network.state_dict(), "model_name": "mc3_18", "classes": ["a", "b"]}, tmp_path / "two.pth")
    write_still(tmp_path / "long.mp4", 18_000, height=48, width=64)
    printed = run_script(SCRIPT, "long.mp4", "--checkpoint", "two.pth", "--timeout", 30, OMP_NUM_THREADS=2).stdout
    assert "long.mp4: 600.0 s, 30 fps" in printed and "1 videos = 1 classified" in printed


def test_names_of_pictures_are_different():
    names = predict.output_names(["a/x.mp4", "b/x.mp4", "b/X.mov", "b/y.mp4", "/c/b/x.mp4"])
    assert names["b/y.mp4"] == "y" and names["a/x.mp4"] == "a__x.mp4"
    assert len({name.lower() for name in names.values()}) == 5, names


def test_names_that_are_long_or_no_text_or_look_like_a_flag(exercises, run, tmp_path):
    """Each has a row with its exact name, and a picture; the folder names the class of all but one."""
    folder = tmp_path / "squats"
    folder.mkdir()
    video = exercises / "in/deeper/squats.mp4"
    long = "深" * 83 + "蹲.mp4"  # 256 bytes with .png
    for name in (long[:80] + ".mp4", long[1:], "-x.mp4"):
        os.link(video, folder / name)
    os.link(video, os.fsencode(folder) + b"/caf\xe9.mp4")
    os.link(video, tmp_path / "-x.mp4")
    options = ("--csv", "p.csv", "--jsonl", "p.jsonl", "--checkpoint", exercises / "tiny.onnx")
    printed = run(folder, *options, "--", "-x.mp4")
    assert "5 videos = 5 classified + 0 failed" in printed and "caf\\xe9.mp4: 4.0 s, 10 fps; right" in printed, printed
    assert "right: 4 of 4 videos whose folder names a class, 100.0 %" in printed
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 5
    with open(tmp_path / "p.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    listed = {os.fsencode(row["video"]) for row in rows}
    assert listed == {b"-x.mp4", *(os.fsencode(path) for path in folder.iterdir())}
    assert sorted(row["right"] for row in rows) == ["", "yes", "yes", "yes", "yes"]
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert {row["video"] for row in map(json.loads, lines)} == {row["video"] for row in rows}
    wrong = tmp_path / CLASSES[0]
    folder.rename(wrong)
    printed = run(wrong / "-x.mp4", *options[4:])
    assert f"; wrong: its folder is {CLASSES[0]}" in printed and "right: 0 of 1" in printed


def test_a_models_own_rate_is_taken_and_another_refused(exercises, run, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.get_model("mc3_18", num_classes=2)
    checkpoint = {"model": network.state_dict(), "model_name": "mc3_18", "clip_len": 8, "classes": ["a", "b"]}
    torch.save(checkpoint | {"frame_rate": 2.5, "rotate": True}, tmp_path / "checkpoint.pth")
    video = exercises / f"in/{CLASSES[0]}.mp4"
    run(video, JSONL="rows.jsonl", PICTURES=False)
    assert jsonl(tmp_path / "rows.jsonl")[video.name]["frame_indices"] == [int(i * 10 / 3) for i in range(8)]
    refused = run(video, "--frame-rate", 4, code=2)
    assert "checkpoint.pth was trained on clips of frame_rate 2.5, and frame_rate 4 is asked for" in refused
    assert "rotate True, and rotate False is asked for" in run(video, "--rotate", "false", code=2)


# --- timelines --------------------------------------------------------------------------------------------------------


def test_a_recording_of_three_exercises(exercises, run, tmp_path):
    """Segments, strip and annotated copy; turned upright, with its sound, packet for packet."""
    order = [CLASSES[2], CLASSES[1], CLASSES[2]]
    video = write_exercises(tmp_path / "session.mp4", order, seconds=6, seed=40, sound="aac", rotation=90)
    printed = run("--timeline", video, CHECKPOINT=[str(exercises / "tiny.onnx")])
    assert "0:18.0, 15 clips, one every 1 s; players turn it by 90° clockwise" in printed
    with open(tmp_path / "predictions/session-segments.csv", newline="") as file:
        segments = [(row["label"], float(row["start_s"]), float(row["end_s"])) for row in csv.DictReader(file)]
    assert [label for label, *_ in segments] == order, segments
    assert segments[0][1] == 0 and segments[-1][2] == 18
    for number, (before, after) in enumerate(zip(segments, segments[1:]), 1):
        assert before[2] == after[1] and abs(before[2] - 6 * number) <= 1, segments
    assert Image.open(tmp_path / "predictions/session-timeline.png").width == 1400
    frames, sound = content_of(video)
    copied, copied_sound = content_of(tmp_path / "predictions/session-annotated.mp4")
    assert copied_sound == sound and len(sound) > 100
    assert [seconds for seconds, *_ in copied] == pytest.approx([seconds for seconds, *_ in frames])
    assert copied[0][1].shape == (340 + 28, 256, 3), "players show it upright: 256 wide, 340 high, and the strip"
    for (_, before), (_, after) in zip(frames[::20], copied[::20]):
        assert np.abs(np.rot90(before, -1).astype(int) - after[:340]).mean() < 6
    assert not np.array_equal(copied[0][1][340:], copied[90][1][340:]), "the strip says the same for two exercises"


def content_of(path, sound=True):
    """([(seconds, RGB)], [sound packets as bytes]) of a file."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        return frames, [bytes(packet) for packet in container.demux(audio=0) if packet.size] if sound else []


@pytest.mark.parametrize("num_frames", [1, 2, 15])
def test_a_recording_shorter_than_a_clip_is_one_segment(exercises, run, tmp_path, num_frames):
    write_still(tmp_path / "short.mp4", num_frames, height=48, width=64)
    run("--timeline", tmp_path / "short.mp4", CHECKPOINT=[str(exercises / "tiny.onnx")])
    (segment,) = (tmp_path / "predictions/short-segments.csv").read_text().splitlines()[1:]
    assert segment.startswith(f"0.00,{num_frames / 30:.2f},")
    frames, _ = content_of(tmp_path / "predictions/short-annotated.mp4", sound=False)
    assert len(frames) == num_frames and (tmp_path / "predictions/short-timeline.png").exists()


@pytest.mark.parametrize("codec, rate", [("pcm_s16le", 192_000), ("pcm_s16le", 37_800), ("libmp3lame", 8_000)])
def test_sound_that_an_mp4_file_cannot_hold_as_it_is(tmp_path, codec, rate):
    """It becomes AAC at the rate next to its own: a second of it stays a second."""
    with av.open(str(tmp_path / "in.mov"), "w") as container:
        picture, sound = container.add_stream("mpeg4", rate=10), container.add_stream(codec, rate=rate)
        picture.width, picture.height, picture.pix_fmt, sound.codec_context.layout = 64, 48, "yuv420p", "mono"
        for _ in range(10):
            grey = np.full((72, 64), 128, np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(grey, format="yuv420p")))
        wave = (20_000 * np.sin(np.arange(rate) * 0.1)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux([*sound.encode(frame), *sound.encode(), *picture.encode()])
    segments = [drawing.Segment(0, 1, "squats", 0.9)]
    assert annotated_copy.annotate(tmp_path / "in.mov", tmp_path / "out.mp4", segments) == ""
    with av.open(str(tmp_path / "out.mp4")) as copy:
        seconds = sum(frame.samples / frame.sample_rate for frame in copy.decode(audio=0))
    assert seconds == pytest.approx(1, abs=0.2)


def test_runners_up_have_a_lane(tmp_path):
    moments = np.array([[0.7, 0.25, 0.05], [0.6, 0.35, 0.05], [np.nan] * 3])
    segments = timeline.segments_of(np.arange(4), moments, ["a", "b", "c"])
    assert drawing.lanes_of(segments, moments, ["a", "b", "c"]) == ["a", "b"]


def test_an_avi_without_times_and_with_uncompressed_sound(exercises, run, tmp_path):
    video = write_exercises(tmp_path / "old.avi", ["squats"], seconds=5, sound="pcm_s16le", codec="mpeg4")
    run("--timeline", video, CHECKPOINT=[str(exercises / "tiny.onnx")])
    with av.open(str(tmp_path / "predictions/old-annotated.mp4")) as copy:
        assert copy.streams.audio[0].codec_context.name == "aac" and copy.streams.video[0].frames == 50
        assert sum(frame.samples for frame in copy.decode(audio=0)) == pytest.approx(40000, rel=0.1)
    (segment,) = (tmp_path / "predictions/old-segments.csv").read_text().splitlines()[1:]
    assert segment.startswith("0.00,5.00,squats,")


def test_a_damaged_part_is_named_and_the_rest_is_labelled(exercises, run, tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "CHUNK", 8)
    video = write_exercises(tmp_path / "damaged.mp4", ["squats"], seconds=14)
    content = bytearray(video.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    video.write_bytes(content)
    printed = run("--timeline", video, CHECKPOINT=[str(exercises / "tiny.onnx")], code=1)
    assert "failed: " in printed and "from 0:0" in printed, printed
    lines = (tmp_path / "predictions/damaged-segments.csv").read_text().splitlines()
    labels = [line.split(",")[2] for line in lines[1:]]
    assert "squats" in labels and "" in labels and "no label" in printed
    assert (tmp_path / "predictions/damaged-annotated.mp4").exists()


def write_noise(path, num_frames):
    """A small recording at 5 fps of one picture that moves."""
    noise = np.random.default_rng(0).integers(0, 255, (48 * 3 // 2, 64), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, i, axis=1), format="yuv420p")))
        container.mux(stream.encode())
    return path


def test_ten_minutes_in_bounded_memory(exercises, tmp_path):
    """Peak memory of the script and of its largest child; all frames that it samples would take 361 MB."""
    code = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path[:0] = [sys.argv[0].rpartition("/")[0], sys.argv[0].rpartition("/")[0] + "/.."]
import matplotlib, onnxruntime, see.classifier, see.timeline, torchvision_patches.spatial, torchvision_patches.clip
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        peaks.append(resource.getrusage(who).ru_maxrss / 1024)
    print("peaks", *peaks)
"""
    video = write_noise(tmp_path / "long.mp4", 10 * 60 * 5)
    command = [sys.executable, "-c", code, str(REPO / SCRIPT), str(video), "--timeline", "--stride", "2"]
    command += ["--checkpoint", str(exercises / "tiny.onnx"), "--num-workers", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "10:00.0, 299 clips" in result.stdout, result.stdout
    imports, own, child = (float(word) for word in result.stdout.splitlines()[-1].split()[1:])
    assert max(own, child) < imports + 200, f"MiB after imports {imports}, of the script {own}, of a child {child}"


def test_moments_and_segments():
    """A clip lasts until its next frame would come; a moment takes the mean of the clips that show it."""
    sampled = timeline.SampledFrames(np.arange(24), np.arange(24), np.arange(24) / 4, 6.0)
    starts = timeline.starts_of(24, 16, 4)
    assert starts == [0, 4, 8] and timeline.starts_of(16, 16, 4) == [0] and timeline.starts_of(19, 16, 2) == [0, 2, 3]
    rows = np.array([[1, 0], [0.4, 0.6], [0, 1]], np.float32)
    edges, moments = timeline.moments_of(rows, np.array(starts), sampled, 16, 1.0)
    assert edges.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert moments[:, 0] == pytest.approx([1, 0.7, 1.4 / 3, 1.4 / 3, 0.2, 0])
    segments = timeline.segments_of(edges, moments, ["a", "b"])
    assert [(s.start, s.end, s.label) for s in segments] == [(0, 2, "a"), (2, 6, "b")]
    rows[1:] = np.nan
    segments = timeline.segments_of(*timeline.moments_of(rows, np.array(starts), sampled, 16, 1.0), ["a", "b"])
    assert [(s.start, s.end, s.label) for s in segments] == [(0, 4, "a"), (4, 6, "")]


def test_moments_of_frames_that_come_at_no_steady_rate():
    """A hole in the times has no label, whichever clips lie over it; what far clips leave out has the nearest one's."""
    seconds = np.r_[np.arange(20) / 4, 60 + np.arange(20) / 4]
    sampled, starts = timeline.SampledFrames(np.arange(40), np.arange(40), seconds, 65.0), np.arange(0, 37, 4)
    edges, moments = timeline.moments_of(np.ones((10, 2), np.float32), starts, sampled, 4, 1.0)
    assert edges[:-1][np.isnan(moments[:, 0])].tolist() == list(range(5, 60))
    seconds = np.r_[np.arange(8) / 4, 2 + 1.1 * np.arange(8)]  # as many frames a clip, which is then 4 s long
    sampled = timeline.SampledFrames(np.arange(16), np.arange(16), seconds, 10.8)
    rows = np.array([[1, 0], [0, 1]], np.float32)
    _, moments = timeline.moments_of(rows, np.array([0, 12]), sampled, 4, 1.0)
    assert moments[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], "3.2 s is as far from one as from the other"


def test_moments_below_the_threshold_are_a_segment_of_their_own(tmp_path):
    """Two classes in turn, neither sure: one stretch, grey in the picture; a moment as sure as the threshold counts."""
    moments = np.array([[0.9, 0.1], [0.55, 0.45], [0.4, 0.6], [0.3, 0.7], [np.nan] * 2])
    segments = timeline.segments_of(np.arange(6.0), moments, ["a", "b"], threshold=0.7)
    assert [(s.end, *s.in_words) for s in segments] == [
        (1, "a", "90 %"), (3, calibration.NOT_SURE, ""), (4, "b", "70 %"), (5, "no label", ""),
    ]  # fmt: skip
    assert segments[1].probability == pytest.approx(0.575)
    assert drawing.lanes_of(segments, moments, ["a", "b"]) == ["a", "b"]
    thumbnails = [(0.5, np.zeros((3, 1, 112, 112), np.float32))]
    drawing.draw_timeline(tmp_path / "x.png", ("x", "y"), np.arange(6.0), moments, segments, thumbnails, ["a", "b"])
    strip = drawing.draw_strip(segments[1], drawing.colours_of(segments), 300, 28)
    assert strip.getpixel((10, 14)) == (0x9A, 0xA5, 0xB1), "the square of what is not sure is grey"


def test_a_copy_shows_the_recordings_colours(tmp_path):
    """A full-range file, tagged BT.709, of odd size: grey stays grey, within the encoder's loss."""
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 98, 66, "yuvj420p"
        stream.codec_context.colorspace = 1
        for _ in range(10):
            planes = np.concatenate([np.full((66, 98), 77, np.uint8), np.full((33, 98), 128, np.uint8)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuvj420p")))
        container.mux(stream.encode())
    segments = [drawing.Segment(0, 0.5, "a_very_long_name_of_a_class_that_cannot_fit", 0.9)]
    segments.append(drawing.Segment(0.5, 1, "", 0))
    assert not annotated_copy.annotate(tmp_path / "in.mp4", tmp_path / "out.mp4", segments)
    frames, _ = content_of(tmp_path / "out.mp4", sound=False)
    assert len(frames) == 10 and frames[0][1].shape == (66 + 28, 98, 3)
    assert np.abs(frames[0][1][:60].astype(int) - 77).max() <= 3


def test_a_name_in_another_script_has_a_font_of_its_own(monkeypatch, capsys):
    """The installed font that has what DejaVu Sans lacks; where none has it, that is said once."""
    other, letter = str(Path(matplotlib.get_data_path(), "fonts/ttf/STIXGeneral.ttf")), "\u1d84"
    assert letter in fonts.characters_of(other), "this matplotlib brings another STIXGeneral"
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [other])
    assert drawing.font(20, f"squats {letter}").path == other
    assert drawing.font(20, "café").path.endswith("DejaVuSans.ttf") and not capsys.readouterr().out
    for name in ("squats_\U00013000.mp4", "\U00013000 again"):
        image = Image.new("RGB", (300, 40), "white")
        drawing.draw_text(drawing.ImageDraw.Draw(image), (0, 0), name, "black", 20, 300)
        assert np.asarray(image).min() == 0, "nothing is drawn"
    printed = capsys.readouterr().out
    assert printed.count("no font here has \U00013000") == 1, printed


def test_names_that_no_picture_can_hold_are_shortened():
    for name in ("x" * 500, "日本" * 200, "line\nbreak", ""):
        assert drawing.font(20).getlength(drawing.text_that_fits(name, 20, 300)) <= 300
    assert calibration.best(np.array([0.2, 0.5, 0.2, 0.1]), list("abcd"), 3) == [("b", 0.5), ("a", 0.2), ("c", 0.2)]
    assert shortened(map(str, range(30)), 3) == "0, 1, 2, … and 27 more"
