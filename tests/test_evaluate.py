"""evaluate.py: every figure against a case worked out by hand, every refusal, the three kinds of file, the report."""

import base64
import csv
import hashlib
import html.parser
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
import warnings

import common
from common import calibration

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from aihub import tensors
from conftest import REPO
from report import figures, page, predictions, two_models
from torchvision_patches.clip import of_network

CLASSES = ["squats", "lunges", "arm_circles", "high_knees", "toe_touch", "jabs"]
# true class and logits of six clips; Top-1 right: 0, 2, 3; Top-5 wrong: 4 (its class comes last)
CASE = [
    (0, [4, 0, 0, 0, 0, 0]),
    (0, [0, 3, 0, 0, 0, 0]),
    (1, [0, 2, 1, 0, 0, 0]),
    (2, [0, 0, 9, 0, 0, 0]),
    (3, [5, 1, 1, 0, 1, 1]),
    (3, [1, 2, 0, 1, 0, 0]),
]
TENSORS = [f"{CLASSES[label]}/{i:08d}.npy" for i, (label, _) in enumerate(CASE)]


def write_inputs(folder, case=CASE, tensors=TENSORS):
    """class_map.json and manifest.jsonl in the folder where the script runs."""
    (folder / "class_map.json").write_text(json.dumps({name: i for i, name in enumerate(CLASSES)}))
    rows = [
        {"video_path": f"val/{tensor[:-4]}.mp4", "label": CLASSES[label], "tensor_path": tensor, "fps": 30.0}
        for (label, _), tensor in zip(case, tensors)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_h5(path, scores, paths=TENSORS, **attributes):
    """As run_inference.py writes it; paths None leaves them out."""
    with common.new_hdf5(path) as file:
        for i, row in enumerate(scores):
            file.create_dataset(f"data/0/batch_{i}", data=np.array([row], np.float32), compression="gzip")
        file["data/0"].attrs.update({"name": "class_logits", "order": 0, "batch_count": len(scores)})
        if paths is not None:
            file.create_dataset("tensor_paths", data=paths, dtype=h5py.string_dtype())
        file.attrs.update(attributes)


@pytest.fixture
def folder(tmp_path):
    write_inputs(tmp_path)
    write_h5(tmp_path / "dataset-export.h5", [scores for _, scores in CASE], output_kind="logits")
    return tmp_path


INPUTS = ["--h5", "dataset-export.h5", "--manifest", "manifest.jsonl", "--class_map", "class_map.json"]


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run(*flags, code=0) -> (its stdout and stderr, its last line as a dict), on the files of `folder`.

    The script runs in this process, so that its imports are paid for once.
    """

    def run(*flags, code=0):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["evaluate.py", *INPUTS, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / "tools/evaluate.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert end.value.code == code, f"exit code {end.value.code} instead of {code}\n{out}\n{err}"
        return types.SimpleNamespace(stdout=out, stderr=err), json.loads(out.splitlines()[-1]) if code < 2 else None

    return run


def test_class_names_are_printed_escaped(folder, run):
    odd = {name: f"{name}\x1b[31m" for name in CLASSES}
    for file in "class_map.json", "manifest.jsonl":
        text = (folder / file).read_text()
        for name, escape in odd.items():
            text = text.replace(json.dumps(name), json.dumps(escape))
        (folder / file).write_text(text)
    out = run("--verbose")[0].stdout
    assert f"{CLASSES[0]}\\x1b[31m" in out and "taken for" in out and "\x1b" not in out, out


def read_report(folder):
    return json.loads((folder / "report/report.json").read_text(encoding="utf-8"))


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_main_figures_by_hand(run_script, folder):
    result = run_script("tools/evaluate.py", *INPUTS, "--verbose", cwd=folder)
    last = json.loads(result.stdout.splitlines()[-1])
    # per class: squats 1 of 2, lunges 1 of 1, arm_circles 1 of 1, high_knees 0 of 2
    assert (last["top1"], last["top5"], last["mean_class_accuracy"]) == (50.0, 83.333, 62.5), last
    z = 1.959964
    half = z * np.sqrt(0.5 * 0.5 / 6 + z**2 / (4 * 6**2)) / (1 + z**2 / 6)  # Wilson 1927, at p = 1/2
    assert last["ci95_low"] == pytest.approx(100 * (0.5 - half), abs=0.001)
    assert last["ci95_high"] == pytest.approx(100 * (0.5 + half), abs=0.001)
    assert (last["n"], last["num_videos"], last["partial"]) == (6, 6, False)
    assert "6 of 6 videos\nTop-1 50 %\nTop-5 83 %\n" in result.stdout, "as many digits as six videos carry"
    probability = 100 * np.exp(4) / (np.exp(4) + 5)
    assert f"val/squats/00000000.mp4: label squats, right; top 5: squats {probability:.2f} %" in result.stdout

    report = read_report(folder)
    assert report["figures"] == last
    table = {row["class"]: row for row in report["per_class"]}
    assert (table["squats"]["n"], table["squats"]["accuracy"]) == (2, 50.0)
    assert (table["squats"]["most_frequent_mistake"], table["squats"]["times"]) == ("lunges", 1)
    assert (table["jabs"]["n"], table["jabs"]["accuracy"]) == (0, None)
    pairs = [tuple(pair.values()) for pair in report["confused_pairs"]]
    by_hand = [("squats", "lunges"), ("high_knees", "squats"), ("high_knees", "lunges")]
    assert pairs == [(label, predicted, 1, 50.0) for label, predicted in by_hand]
    assert [m["video_path"][-6:-4] for m in report["mistakes"]] == ["04", "01", "05"], "most confident mistake first"


def test_ties_go_to_the_lower_index():
    scores = np.array([[1, 1, 0], [1, 1, 0], [0, 2, 2], [3, 3, 3]], np.float32)
    labels = np.array([0, 1, 2, 2])
    assert predictions.rank_of_label(scores, labels).tolist() == [0, 1, 1, 2]
    assert (scores.argmax(1) == labels).tolist() == [True, False, False, False], "rank 0 must be what is predicted"


def test_calibration_error_by_hand():
    # 15 bins of 1/15: 0.95 and 0.99 share the last, 0.5 and 0.52 the 8th, (7/15, 8/15]
    confidence, right = np.array([0.95, 0.99, 0.5, 0.52]), np.array([True, False, True, True])
    by_hand = 2 / 4 * abs(0.5 - 0.97) + 2 / 4 * abs(1 - 0.51)
    assert calibration.expected_calibration_error(confidence, right) == pytest.approx(by_hand)
    # bins are (a, b]: 0.2 shares (2/15, 3/15] with 0.19; 0.05 and 0.1 share none
    on_boundary = calibration.expected_calibration_error(np.array([0.19, 0.2]), np.array([False, True]))
    assert on_boundary == pytest.approx(abs(1 - 0.39) / 2)
    apart = calibration.expected_calibration_error(np.array([0.05, 0.1]), np.array([False, True]))
    assert apart == pytest.approx((0.05 + 0.9) / 2)
    ends = calibration.expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True]))
    assert ends == pytest.approx(0)


def test_confidence_curve_by_hand(run, folder):
    """Clips 5, 1 and 4 are wrong at 46.7, 80.1 and 92.6 %; 2, 0 and 3 are right at 52.4, 91.6 and 99.9 %."""
    run()
    curve = read_report(folder)["confidence_curve"]
    assert [(round(15 * point["above"]), point["n"], point["accuracy"]) for point in curve] == [
        (7, 2, 50.0), (12, 1, 0.0), (13, 2, 50.0), (14, 1, 100.0)
    ]  # fmt: skip
    assert [(point["surer_n"], point["surer_accuracy"]) for point in curve] == [
        (6, 50.0), (4, 50.0), (3, 66.667), (1, 100.0)
    ]  # fmt: skip
    shares = np.exp(4) / (np.exp(4) + 5), np.exp(5) / (np.exp(5) + 4 * np.e + 1)
    assert curve[2]["confidence"] == pytest.approx(sum(shares) / 2, abs=1e-4)


def test_confidence_of_logits():
    logits = np.array([[0, np.log(3)], [1000, 0]], np.float32)
    assert calibration.confidence(logits) == pytest.approx([0.75, 1])


def test_same_digits_as_training_prints():
    """train.py's own arithmetic: softmax and topk in float64, the mean of right or wrong times 100, three decimals."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for n in (7, 192, 1001):
        scores, labels = rng.normal(size=(n, 92)).astype(np.float32), rng.integers(0, 92, n)
        scores[np.arange(n), labels] += 2
        right = torch.from_numpy(scores).double().softmax(1).topk(5).indices == torch.from_numpy(labels)[:, None]
        rank = predictions.rank_of_label(scores, labels)
        for k in (1, 5):
            theirs = 100 * right[:, :k].sum(1).double().mean().item()
            assert f"{figures.percent((rank < k).sum(), n):.3f}" == f"{theirs:.3f}", (n, k)


# --- three kinds of file ---------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_joins_by_path_not_by_order(run, folder):
    order = [3, 0, 5, 1, 4, 2]
    write_h5(folder / "dataset-export.h5", [CASE[i][1] for i in order], [TENSORS[i] for i in order])
    assert run()[1]["top1"] == 50.0, "the predictions were shuffled together with their paths"


def test_file_of_the_real_client(run, folder):
    """What AI Hub's web page gives: the client's own layout, no paths, so the manifest's order."""
    from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5

    scores = [np.array([row], np.float32) for _, row in CASE]
    with h5py.File(folder / "dataset-export.h5", "w") as file:
        dataset_entries_to_h5({"class_logits": scores}, file)
    result, last = run()
    assert last["top1"] == 50.0
    assert "names no tensors: its predictions were matched to the manifest by order" in result.stdout
    # two predictions too few: no way to know which
    with h5py.File(folder / "dataset-export.h5", "w") as file:
        dataset_entries_to_h5({"class_logits": scores[:4]}, file)
    assert "it has 4 (batch_0 to batch_3) for the 6 of manifest.jsonl" in run("--allow-partial", code=2)[0].stderr


def test_file_of_the_original_solution(run, folder):
    """Bare vectors, no attributes, more than ten: batch_10 must not come before batch_2."""
    tensors = [f"lunges/{i:02d}.npy" for i in range(12)]
    write_inputs(folder, [(1, None)] * 12, tensors)
    with h5py.File(folder / "dataset-export.h5", "w") as file:
        for i in range(12):
            row = np.zeros(6, np.float32)
            row[1 if i != 2 else 4] = 5
            file[f"data/0/batch_{i}"] = row
    last = run()[1]
    assert last["top1"] == round(100 * 11 / 12, 3)
    report = read_report(folder)
    assert [m["tensor_path"] for m in report["mistakes"]] == ["lunges/02.npy"]


def test_single_tensor_meets_its_own_label(run, folder):
    write_h5(folder / "dataset-export.h5", [CASE[3][1]], [TENSORS[3]])
    result, last = run("--verbose")
    assert (last["top1"], last["n"], last["num_videos"], last["partial"]) == (100.0, 1, 6, True)
    assert "val/arm_circles/00000003.mp4: label arm_circles, right; top 5: arm_circles 99." in result.stdout
    assert "holds one prediction (USE_SINGLE_TENSOR)" in result.stdout


def test_probabilities_are_told_from_logits(run, folder):
    def kind():
        run()
        return read_report(folder)["about"]["output_kind"]

    logits = np.array([scores for _, scores in CASE], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    write_h5(folder / "dataset-export.h5", logits)
    assert kind() == "logits"
    ece = read_report(folder)["figures"]["ece"]
    write_h5(folder / "dataset-export.h5", probabilities)
    assert kind() == "probabilities"
    assert read_report(folder)["figures"]["ece"] == ece
    write_h5(folder / "dataset-export.h5", probabilities, output_kind="logits")
    assert "says it holds logits, but they look like probabilities" in run()[0].stdout
    write_h5(folder / "dataset-export.h5", logits, output_kind="probabilities")
    assert "says it holds probabilities, but its values lie between 0 and 9" in run(code=2)[0].stderr


# --- refusals --------------------------------------------------------------------------------------------------------


def damage_missing(scores, paths):
    return scores[:4], paths[:4]


def damage_extra(scores, paths):
    return scores + [[1] * 6], paths + ["jabs/unknown.npy"]


def damage_duplicate(scores, paths):
    return scores + [scores[0]], paths + [paths[0]]


def damage_nan(scores, paths):
    return scores[:1] + [[np.nan] * 6] + scores[2:], paths


def damage_shape(scores, paths):
    return scores[:1] + [[1] * 400] + scores[2:], paths


@pytest.mark.parametrize(
    "damage, sentence, n, top1",
    [
        (damage_missing, "clips without a prediction: 2 (high_knees/00000004.npy, high_knees/00000005.npy)", 4, 75.0),
        (damage_extra, "predictions without a clip in the manifest: 1 (jabs/unknown.npy)", 6, 50.0),
        (damage_duplicate, "second predictions for one clip: 1 (squats/00000000.npy)", 6, 50.0),
        (damage_nan, "predictions with NaN or infinite values: 1 (squats/00000001.npy)", 5, 60.0),
        (damage_shape, "predictions of shape (1, 400) for 6 classes: 1 (squats/00000001.npy)", 5, 60.0),
    ],
)
def test_what_does_not_fit_is_refused_or_said(run, folder, damage, sentence, n, top1):
    scores, paths = damage([scores for _, scores in CASE], TENSORS)
    write_h5(folder / "dataset-export.h5", scores, paths)
    refused = run(code=2)[0].stderr
    assert sentence in refused and f"--allow-partial to evaluate the {n} of 6 clips" in refused, refused
    assert not (folder / "report").exists(), "a refused evaluation must write nothing"
    result, last = run("--allow-partial", code=1)
    assert f"note: left out of dataset-export.h5: {sentence}" in result.stdout
    assert (last["n"], last["top1"], last["partial"]) == (n, top1, n < 6)
    left_out = read_report(folder)["left_out"]
    assert [entry["count"] for entry in left_out.values()] == [2 if damage is damage_missing else 1]


def test_label_that_is_not_in_the_class_map(run, folder):
    lines = (folder / "manifest.jsonl").read_text().replace('"label": "lunges"', '"label": "yoga"')
    (folder / "manifest.jsonl").write_text(lines)
    sentence = "labels that are no class of the model: 1 (lunges/00000002.npy: yoga)"
    assert sentence in run(code=2)[0].stderr
    assert run("--allow-partial", code=1)[1]["n"] == 5


def test_missing_and_later_batches(run, folder):
    """A hole among the batches is a missing prediction, a batch beyond the paths an extra one."""
    with h5py.File(folder / "dataset-export.h5", "a") as file:
        file.move("data/0/batch_2", "data/0/batch_9")
    refused = run(code=2)[0].stderr
    assert "clips without a prediction: 1 (lunges/00000002.npy)" in refused
    assert "predictions without a clip in the manifest: 1 (batch_9, which has no path)" in refused


def write_quantised(path):
    with h5py.File(path, "w") as file:
        for i in range(6):
            file[f"data/0/batch_{i}"] = np.zeros((1, 6), np.uint8)


def write_two_outputs(path):
    write_h5(path, [[0] * 6] * 6)
    with h5py.File(path, "a") as file:
        file["data/1/batch_0"] = np.zeros((1, 6))


def write_one_array(path):
    with h5py.File(path, "w") as file:
        file["data/0"] = np.zeros((6, 6))


def write_numbers_for_paths(path):
    write_h5(path, [[0] * 6] * 6, paths=None)
    with h5py.File(path, "a") as file:
        file["tensor_paths"] = np.arange(6)


@pytest.mark.parametrize(
    "write, sentence",
    [
        (lambda path: path.unlink(), "there is no dataset-export.h5; run tools/run_inference.py first"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is not a complete HDF5 file"),
        (lambda path: h5py.File(path, "w").close(), "holds no prediction"),
        (lambda path: write_h5(path, [[1] * 400] * 6), "predictions of shape (1, 400) for 6 classes: 6"),
        (lambda path: write_h5(path, [[np.nan] * 6] * 6), "Nothing is left to evaluate"),
        (lambda path: write_h5(path, [[1] * 6] * 6, output_kind="scores"), "its output_kind is 'scores'"),
        (write_quantised, "holds uint8 values, a quantised output without its scale"),
        (write_two_outputs, "holds 2 model outputs"),
        (write_one_array, "is an HDF5 file, but not laid out as AI Hub's"),
        (write_numbers_for_paths, "is an HDF5 file, but not laid out as AI Hub's"),
        (lambda path: write_h5(path, [[0] * 6] * 6, classes="a, b"), "is an HDF5 file, but not laid out as AI Hub's"),
    ],
)
def test_files_that_are_refused_whatever_the_flags(run, folder, write, sentence):
    write(folder / "dataset-export.h5")
    refused = run("--allow-partial", code=2)[0].stderr
    assert sentence in refused and "Traceback" not in refused, refused


def test_file_that_is_being_written(run_script, folder):
    with h5py.File(folder / "dataset-export.h5", "a"):
        refused = run_script("tools/evaluate.py", *INPUTS, cwd=folder, code=2).stderr
    assert "error: dataset-export.h5 is in use by another process" in refused


def test_folder_in_place_of_a_file(run, folder):
    (folder / "dataset-export.h5").unlink()
    (folder / "dataset-export.h5").mkdir()
    assert "dataset-export.h5 cannot be read: Is a directory" in run(code=2)[0].stderr


def test_manifest_that_names_a_tensor_twice(run, folder):
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines + lines[:1]))
    assert "manifest.jsonl names a tensor_path twice" in run(code=2)[0].stderr


def test_a_class_map_that_was_replaced_changes_nothing(run, folder):
    """The names and their order are the model's own; a map that says otherwise is named, a label it lacks counted."""
    scores = [scores for _, scores in CASE]
    before = write_h5(folder / "dataset-export.h5", scores, classes=json.dumps(CLASSES)) or run()[1]
    (folder / "class_map.json").write_text(json.dumps({name: i for i, name in enumerate(["planks", *CLASSES[::-1]])}))
    result, last = run()
    assert last == before
    assert "class_map.json has other classes, or another order, than the model of dataset-export.h5" in result.stdout
    assert [row["class"] for row in read_report(folder)["per_class"]] == CLASSES
    write_h5(folder / "dataset-export.h5", scores, classes=json.dumps(["planks", *CLASSES[1:]]))
    assert "labels that are no class of the model: 2 (squats/00000000.npy: squats, " in run(code=2)[0].stderr


def test_labels_meet_classes_however_their_accents_are_written(run, folder):
    """Folders of a Mac hold decomposed names, most class maps composed ones."""
    text = (folder / "manifest.jsonl").read_text().replace('"label": "lunges"', '"label": "fente arrie\\u0300re"')
    (folder / "manifest.jsonl").write_text(text)
    names = [name.replace("lunges", "fente arri\u00e8re") for name in CLASSES]
    (folder / "class_map.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    assert run()[1]["top1"] == 50.0


def test_drive_without_locks(folder, without_locks):
    """Its file is read and that is said; a file that somebody locks is refused, as the test above shows."""
    opening = f"import sys; sys.path += {[str(REPO / 'tools')]}; from report import predictions as p; "
    opening += "print(*p.open_h5('dataset-export.h5')[1])"
    whole = [REPO / "tools/evaluate.py", *INPUTS]
    for number, command in (37, whole), (95, ["-c", opening]), (5, ["-c", opening]):  # ENOLCK, EOPNOTSUPP, EIO
        options = dict(cwd=folder, env=os.environ | without_locks(number), capture_output=True, text=True)
        result = subprocess.run([sys.executable, *command], **options)
        assert result.returncode == 0, result.stderr
        assert f"the drive of dataset-export.h5 has no locks ({os.strerror(number)})" in result.stdout


def test_ctrl_c(run_script, folder):
    pressed = "import json\ndef loads(*_): raise KeyboardInterrupt\njson.loads = loads\n"  # it reads with it
    (folder / "sitecustomize.py").write_text(pressed)
    stopped = run_script("tools/evaluate.py", *INPUTS, cwd=folder, code=130, PYTHONPATH=folder)
    assert stopped.stderr == "\ninterrupted; run the same command again to go on\n"


# --- comparison ------------------------------------------------------------------------------------------------------


def test_comparison_by_hand(run, folder):
    """The other file loses clips 0, 2, 3, wins clip 1 and errs differently on clip 5: McNemar of 3 against 1."""
    other = [list(scores) for _, scores in CASE]
    for clip, predicted in {0: 5, 2: 5, 3: 5, 1: 0, 5: 4}.items():
        other[clip][predicted] = 20
    write_h5(folder / "other.h5", other)
    result, last = run("--compare", "other.h5")
    assert last["agreement"] == round(100 / 6, 3), "only clip 4 keeps its class"
    assert last["mcnemar_p"] == pytest.approx(2 * binom.cdf(1, 4, 0.5)) == pytest.approx(0.625)
    against = read_report(folder)["comparison"]
    assert (against["right_to_wrong"], against["wrong_to_right"], against["wrong_to_other_wrong"]) == (3, 1, 1)
    assert (against["top1"], against["other_top1"]) == (50.0, round(100 / 6, 3))
    assert [flip["video_path"][-5] for flip in against["flips"]] == list("01235")
    assert against["flips"][1] == {
        "video_path": "val/squats/00000001.mp4", "label": "squats", "predicted": "lunges", "other_predicted": "squats"
    }  # fmt: skip
    assert "McNemar's exact p = 0.625" in result.stdout
    result, same = run("--compare", "dataset-export.h5")
    assert (same["agreement"], same["mcnemar_p"]) == (100.0, 1.0) and "bit for bit: they are of one" in result.stdout


def test_comparison_with_a_partial_file_says_so(run, folder):
    write_h5(folder / "other.h5", [scores for _, scores in CASE[:5]], TENSORS[:5])
    assert "other.h5 and manifest.jsonl do not fit" in run("--compare", "other.h5", code=2)[0].stderr
    result, last = run("--compare", "other.h5", "--allow-partial", code=1)
    assert "left out of other.h5: clips without a prediction: 1" in result.stdout
    assert (last["n"], last["agreement"]) == (6, 100.0)


def test_a_manifest_of_other_clips_is_refused(run, folder):
    """Its paths are the same; the pictures of the report would be of clips that the model never saw."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines = (json.dumps(row | {"shape": [1, 3, 16, 112, 112]}) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text("".join(lines))
    scores = [scores for _, scores in CASE]
    for shape in [1, 8, 112, 112, 3], [1, 3, 8, 112, 112]:
        write_h5(folder / "dataset-export.h5", scores, io=json.dumps({"input": {"shape": shape}}))
        error = run(code=2)[0].stderr
        assert "was made of clips of 8 frames, manifest.jsonl lists clips of 16; name the manifest" in error
    taken = {"io": json.dumps({"input": {"shape": [1, 3, 16, 112, 112]}}), "clip": json.dumps(of_network().as_dict())}
    write_h5(folder / "dataset-export.h5", scores, **taken)
    (folder / "settings.json").write_text(json.dumps({"frame_rate": 8.0}))
    error = run(code=2)[0].stderr
    assert "the model of dataset-export.h5 takes clips of frame_rate 4, not 8 as the tensors in . are" in error
    (folder / "settings.json").write_text(json.dumps({"frame_rate": 4.0}))
    run()
    write_h5(folder / "other.h5", scores, io=json.dumps({"input": {"shape": [1, 3, 8, 112, 112]}}))
    for shape in [1, 16, 112, 112, 3], [1, 3, 16, 112, 112], [1, 48]:
        write_h5(folder / "dataset-export.h5", scores, io=json.dumps({"input": {"shape": shape}}))
        run("--compare", "other.h5")


@pytest.mark.parametrize("n, lost_share, won_share", [(100, 0.1, 0.1), (200, 0.08, 0.12), (11_452, 0.04, 0.045)])
def test_the_interval_of_a_difference_holds(n, lost_share, won_share):
    """2,000 draws of two models whose difference is known; what holds for 95 % of them lies in 94 to 96 %."""
    counts = np.random.default_rng(0).multinomial(n, [lost_share, won_share, 1 - lost_share - won_share], 2000)
    ends = [two_models.tango_interval(int(lost), int(won), n) for lost, won, _ in counts]
    share = np.mean([low <= won_share - lost_share <= high for low, high in ends])
    assert 0.94 <= share <= 0.96, f"{100 * share:.1f} % of 2,000 intervals hold the difference"


def test_difference_of_two_models_at_its_ends():
    z2 = 1.959964**2
    by_hand = z2 / (10 + z2)  # no clip differs: the score interval of nothing in n
    assert two_models.tango_interval(0, 0, 10) == pytest.approx((-by_hand, by_hand), abs=1e-4)
    assert two_models.tango_interval(0, 10, 10)[1] == 1 and two_models.tango_interval(10, 0, 10)[0] == -1
    low, high = two_models.tango_interval(3, 1, 6)
    assert two_models.tango_interval(1, 3, 6) == pytest.approx((-high, -low)), "the other way round"


def test_whether_two_models_can_be_told_apart_and_by_how_many_clips():
    """10 of 200 against 16: by Connor's formula, here with the quantiles of 5 % and 80 % as tables have them."""
    close = two_models.difference(10, 16, 200) | {"n": 200}
    discordant, delta = 26 / 200, 6 / 200
    by_hand = ((1.959964 * np.sqrt(discordant) + 0.841621 * np.sqrt(discordant - delta**2)) / delta) ** 2
    assert close["clips_to_tell"] == np.ceil(by_hand) == 1132
    assert two_models.can_be_told(close).startswith("The two cannot be told apart on 200 clips; some 1,132 would tell")
    assert close["difference_low"] < 0 < close["difference_high"]
    far = two_models.difference(2, 24, 200) | {"n": 200}
    assert two_models.can_be_told(far) == "The two can be told apart." and far["difference_low"] > 0
    assert "each is right on as many" in two_models.can_be_told(two_models.difference(5, 5, 200) | {"n": 200})


def test_models_that_number_their_classes_differently_are_compared_by_name(run, folder):
    """The other has a class more, another order and, as its labels, the same names."""
    names = ["planks", *reversed(CLASSES)]
    scores = [[-9.0] + list(reversed(scores)) for _, scores in CASE]
    write_h5(folder / "other.h5", scores, classes=json.dumps(names))
    result, last = run("--compare", "other.h5")
    assert (last["agreement"], last["difference"]) == (100.0, 0.0), "tied scores aside, the same model"
    assert PageReader(folder).data["classes"] == [*CLASSES, "planks"]


# --- what is odd about a result --------------------------------------------------------------------------------------


def test_model_that_says_nothing(run, folder):
    never = "3 of 6 classes are never predicted (high_knees, toe_touch, jabs); 2 videos show 1 of them"
    assert never in run()[0].stdout
    write_h5(folder / "dataset-export.h5", np.zeros((6, 6)))
    assert "dataset-export.h5: 6 of 6 predictions give all classes the same score" in run()[0].stdout
    write_h5(folder / "dataset-export.h5", [[0, 1, 2, 3, 4, 5]] * 6)
    notes = run()[0].stdout
    assert "all 6 predictions are the same to the last digit" in notes
    assert "100 % of the predictions are jabs, which 0 % of the videos show" in notes
    assert "5 of 6 classes are never predicted (squats, high_knees, lunges, … and 2 more); 6 videos show" in notes
    write_h5(folder / "other.h5", np.zeros((6, 6)))
    assert "note: other.h5: 6 of 6 predictions give all" in run("--compare", "other.h5")[0].stdout


def test_classes_that_never_come_though_fewer_videos_than_classes_are_judged(run, folder):
    """Only those that several videos show: with four videos two of the six classes cannot come."""
    write_inputs(folder, [(1, None), (2, None), (2, None), (3, None)], TENSORS[:4])
    write_h5(folder / "dataset-export.h5", [[0, 9, 0, 0, 0, 0]] * 2 + [[9, 0, 0, 0, 0, 0]] * 2, TENSORS[:4])
    said = "1 of 6 classes are never predicted, though several videos show each (arm_circles); 2 videos show them"
    assert said in run()[0].stdout


def test_one_class_is_not_odd_where_most_videos_show_it(run, folder):
    write_inputs(folder, [(1, None)] * 6)
    write_h5(folder / "dataset-export.h5", [[0, 5 + i, 0, 0, 0, 0] for i in range(6)])
    result, last = run()
    assert last["top1"] == 100.0 and "of the predictions are" not in result.stdout


def test_result_that_is_older_than_its_model_or_clips(run, folder):
    """By the times of the files; the same model made anew, or a manifest written anew over the same clips, is none."""
    model = folder / "resnet_2plus1d.bin"
    model.write_bytes(b"a model")
    about = {"model_path": str(model), "model_sha256": hashlib.sha256(b"a model").hexdigest()}
    write_h5(folder / "dataset-export.h5", [scores for _, scores in CASE], **about)
    tensors = [folder / tensor for tensor in TENSORS]
    for tensor in tensors:
        tensor.parent.mkdir(exist_ok=True)
        tensor.touch()

    def notes(**ages):
        """Lines about age, the files being so many seconds older than the HDF5."""
        written = (folder / "dataset-export.h5").stat().st_mtime
        for name, age in ages.items():
            for path in {"model": [model], "manifest": [folder / "manifest.jsonl"], "clips": tensors}[name]:
                os.utime(path, (written - age, written - age))
        words = "is older than", "is not of its model"
        return [line for line in run()[0].stdout.splitlines() if any(word in line for word in words)]

    assert notes(model=9, manifest=9, clips=9) == []
    assert notes(model=-9, manifest=-9) == []
    model.write_bytes(b"another")
    (line,) = notes(model=-9)
    assert f"note: dataset-export.h5 is not of its model {model} as it is now (2" in line
    assert len(notes(model=9)) == 1, "an older one that was put back"
    model.write_bytes(b"a model")
    (line,) = notes(model=9, clips=-9)
    assert "is older than 6 of the clips" in line
    for tensor in tensors:
        tensor.unlink()
    tensors.clear()
    (line,) = notes()
    assert "is older than manifest.jsonl" in line


def test_a_copied_folder_of_the_same_clips_is_not_newer(run, folder):
    """By the hashes that run_inference.py keeps of them; one that is another is named."""
    examined = {}
    for number, tensor in enumerate(TENSORS):
        (folder / tensor).parent.mkdir(exist_ok=True)
        np.save(folder / tensor, np.full((1, 3, 2, 4, 4), number / 10, np.float32))
        examined[tensor] = [1, 1, *tensors.look_into(folder, tensor)]
    with h5py.File(folder / "dataset-export.h5", "a") as file:
        file["examined"] = np.frombuffer(json.dumps(examined).encode(), np.uint8)
    later = (folder / "dataset-export.h5").stat().st_mtime + 9
    for path in folder / "manifest.jsonl", *(folder / tensor for tensor in TENSORS):
        os.utime(path, (later, later))
    assert "is older than" not in run()[0].stdout
    np.save(folder / TENSORS[0], np.full((1, 3, 2, 4, 4), 0.9, np.float32))
    os.utime(folder / TENSORS[0], (later, later))
    assert "is older than 6 of the clips" in run()[0].stdout


def test_result_of_an_older_checkpoint_and_clips_of_other_videos(run, folder):
    """By what export wrote beside the model, and by the sizes and times of videos in the manifest."""
    model, checkpoint = folder / "resnet_2plus1d.bin", folder / "checkpoint.pth"
    model.write_bytes(b"a model")
    checkpoint.write_bytes(b"weights")
    of_model, of_weights = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (model, checkpoint))
    description = {"sha256": of_model, "checkpoint": str(checkpoint), "checkpoint_sha256": of_weights}
    model.with_suffix(".json").write_text(json.dumps(description))
    video = folder / "video.mp4"
    video.write_bytes(b"a video")
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows[0] |= {"video_path": str(video), "source_size": 7, "source_mtime_ns": video.stat().st_mtime_ns}
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"model_path": str(model), "model_sha256": of_model}
    write_h5(folder / "dataset-export.h5", [scores for _, scores in CASE], **about)

    def lines():
        printed = run()[0].stdout.splitlines()
        return [line for line in printed if "not of its checkpoint" in line or "another size" in line]

    later = model.stat().st_mtime + 9
    os.utime(checkpoint, (later, later))
    assert lines() == [], "the same weights written anew"
    checkpoint.write_bytes(b"others")
    os.utime(checkpoint, (later, later))
    (line,) = lines()
    assert f"note: dataset-export.h5 is of a model that is not of its checkpoint {checkpoint} as it is now (2" in line
    os.utime(checkpoint, (1, 1))
    assert len(lines()) == 1, "others that are older, as a copy that was put back"
    video.write_bytes(b"another")
    os.utime(video, (later, later))
    said = f"1 videos have another size or time than when their clips in manifest.jsonl were made ({video})"
    assert said in lines()[1]


def test_a_model_that_saw_val_is_said_beside_its_figure(run, folder):
    model = folder / "resnet_2plus1d.bin"
    model.write_bytes(b"a model")
    digest = hashlib.sha256(b"a model").hexdigest()
    for splits in ["train"], ["train", "val"]:
        model.with_suffix(".json").write_text(json.dumps({"sha256": digest, "train_splits": splits}))
        scores = [scores for _, scores in CASE]
        write_h5(folder / "dataset-export.h5", scores, model_path=str(model), model_sha256=digest)
        result, last = run()
        said = "trained on val, too: of other videos this says nothing"
        assert (said in result.stdout) == last["trained_on_val"] == ("val" in splits)
        assert (said in (folder / "report/report.html").read_text(encoding="utf-8")) == ("val" in splits)


# --- the report ------------------------------------------------------------------------------------------------------


class PageReader(html.parser.HTMLParser):
    """What a browser makes of the page: its elements as (name, attributes), and the texts of its scripts by id."""

    def __init__(self, folder):
        super().__init__()
        self.elements, self.scripts = [], {}
        self.feed((folder / "report/report.html").read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts["data"])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script":
            self.scripts.setdefault(attributes.get("id"), text)


def mean_colour(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[-1])))).mean(axis=(0, 1))


def write_clip(path, colour, frames=16, side=112):
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.broadcast_to(np.float32(colour).reshape(1, 3, 1, 1, 1), (1, 3, frames, side, side)))


def test_report_folder(run, folder):
    """Four complete files; the page holds its pictures and asks for nothing else, and no name leaves its place."""
    write_clip(folder / TENSORS[4], (1, 0, 0))
    write_clip(folder / TENSORS[0], (0, np.nan, 1), side=224)
    (folder / TENSORS[5]).write_bytes(b"not a tensor")
    hostile = "</script><script>alert(1)</script>&$x$"
    (folder / "manifest.jsonl").write_text((folder / "manifest.jsonl").read_text().replace("val/squats", hostile))
    run()
    names = ["confusion.png", "per_class.csv", "report.html", "report.json"]
    assert sorted(path.name for path in (folder / "report").iterdir()) == names
    shown = PageReader(folder)
    assert [attributes.get("id") for tag, attributes in shown.elements if tag == "script"] == ["data", "names", None]
    addresses = [a.get("src") or a.get("href") for _, a in shown.elements if "src" in a or "href" in a]
    assert [a for a in addresses if not a.startswith(("data:image/webp;base64,", "data:image/png;base64,", "#"))] == []
    drawn = np.asarray(Image.open(folder / "report/confusion.png").convert("RGB")).astype(int)
    cells = [a for tag, a in shown.elements if tag == "rect" and "class" not in a]
    corners = [(round(float(a["x"]) + 4), round(float(a["y"]) + 4)) for a in cells]
    assert len(cells) == 6 and all(drawn[y, x, 2] > drawn[y, x, 0] + 20 for x, y in corners), "each lies on a blue cell"
    strips = [a["src"] for tag, a in shown.elements if tag == "img"]
    assert len(strips) == 1 and mean_colour(strips[0]) == pytest.approx([255, 0, 0], abs=8), "the red clip's frames"
    assert Image.open(io.BytesIO(base64.b64decode(strips[0].split(",")[1]))).size == (4 * 112, 112)
    with open(folder / "report/per_class.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == CLASSES and rows[0]["accuracy"] == "50.0" and rows[5]["accuracy"] == ""

    videos = shown.data["videos"]
    assert [v[0][-5] for v in videos] == list("415203"), "mistakes first, the surest first, then right and least sure"
    by_number = {v[0][-5]: v for v in videos}
    assert by_number["0"][0] == f"{hostile}/00000000.mp4" and by_number["5"][4] == by_number["1"][4] == ""
    assert [v[1:3] for _, v in sorted(by_number.items())] == [[0, 0], [0, 1], [1, 1], [2, 2], [3, 0], [3, 1]]
    assert mean_colour(by_number["0"][4]) == pytest.approx([0, 0, 255], abs=8), "NaN is drawn as 0"
    assert by_number["4"][3] == pytest.approx(100 * np.exp(5) / (np.exp(5) + 4 * np.e + 1), abs=0.05)


def test_page_with_more_videos_than_it_lists(run, folder, monkeypatch):
    """Each class gets an equal part of the list, what is wrong first."""
    monkeypatch.setattr(page, "LISTED_VIDEOS", 4)
    run()
    videos = PageReader(folder).data["videos"]
    assert [v[0][-5] for v in videos] == list("4123"), "one of each of four classes"
    assert "The list holds 4 of 6 videos" in (folder / "report/report.html").read_text(encoding="utf-8")


def test_page_of_two_models(run, folder):
    """The second model wins clip 1, loses clip 2, has no clip 5; what only it gets wrong comes after our mistakes."""
    other = [list(scores) for _, scores in CASE[:5]]
    other[1][0], other[2][5] = 20, 20
    write_h5(folder / "w8a8.h5", other, TENSORS[:5])
    run("--compare", "w8a8.h5", "--allow-partial", code=1)
    shown = PageReader(folder)
    assert json.loads(shown.scripts["names"]) == ["dataset-export", "w8a8"]
    assert [(v[0][-5], *v[5:]) for v in shown.data["videos"]] == [
        ("4", 0, pytest.approx(92.6, abs=0.1)), ("1", 0, 100.0), ("5", None, None),
        ("2", 5, 100.0), ("0", 0, pytest.approx(91.6, abs=0.1)), ("3", 2, pytest.approx(99.9, abs=0.1)),
    ]  # fmt: skip
    links = {a["href"] for tag, a in shown.elements if tag == "a"}
    assert {"#videos&show=flips", "#videos&show=lost", "#videos&show=won", "#videos&label=0&show=flips"} <= links
    changed = [(c["class"], c["accuracy"], c["other_accuracy"]) for c in read_report(folder)["comparison"]["per_class"]]
    assert changed == [("lunges", 100.0, 0.0), ("squats", 50.0, 100.0)], "the class that loses most first"


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER or "snap" in os.path.realpath(BROWSER), reason="no Chromium that reads any folder")
def test_page_in_a_browser(run, folder):
    """Its links lead to the videos they promise."""
    write_clip(folder / TENSORS[5], (0, 1, 0))
    run()
    flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    address = (folder / "report/report.html").as_uri() + "#videos&label=3&predicted=1"
    command = [BROWSER, *flags.split(), f"--user-data-dir={folder / 'profile'}", address]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "1 videos: 0 right, 1 wrong" in seen, seen[-2000:]
    listed = seen[seen.index('id="list"') : seen.index('id="more"')]
    assert listed.count("<figure") == 1 and "✗&nbsp;lunges" in listed and 'src="data:image/webp' in listed, listed


def test_thousand_classes_cost_what_their_clips_do(run, folder):
    """The matrix shows those mistaken most often; a picture of all would have 28,000 pixels a side."""
    names = [f"class {i:04d}" for i in range(1000)]
    (folder / "class_map.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    tensors = [f"{name}/0.npy" for name in names]
    rows = ({"video_path": tensor, "label": tensor[:-6], "tensor_path": tensor} for tensor in tensors)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = np.random.default_rng(0).normal(size=(1000, 1000))
    scores[np.arange(500, 1000), np.arange(500, 1000)] = 9
    with h5py.File(folder / "dataset-export.h5", "w") as file:
        for i, row in enumerate(scores):
            file[f"data/0/batch_{i}"] = np.float32(row)
    result, last = run()
    assert last["top1"] == pytest.approx(50, abs=1)
    assert "the matrix shows 100 of 1,000 classes: those mistaken most often" in result.stdout
    assert max(Image.open(folder / "report/confusion.png").size) < 4000
    assert len(read_report(folder)["per_class"]) == 1000


def test_characters_that_no_font_has_are_said(run, folder, monkeypatch):
    """And a font that has them is used: here one that is made for the test, with a single glyph."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    text = (folder / "class_map.json").read_text(encoding="utf-8")
    (folder / "class_map.json").write_text(text.replace("jabs", "\u6df1\u8e72"), encoding="utf-8")
    lines = (folder / "manifest.jsonl").read_text().replace('"label": "lunges"', '"label": "\u6df1\u8e72"')
    (folder / "manifest.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    assert "no font of this machine has 2 characters of the class names (\u6df1\u8e72)" in run()[0].stdout

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((0, 900))
    pen.lineTo((900, 0))
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "squat"])
    builder.setupCharacterMap({0x6DF1: "squat", 0x8E72: "squat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "squat": pen.glyph()})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", "squat")})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "One Glyph", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / "one.ttf")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(folder / "one.ttf")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that it does not find
        assert "no font of this machine" not in run()[0].stdout


def write_calibrated(folder, n, boldness):
    """n clips whose labels are drawn from the softmax of their logits; the file holds these times `boldness`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2.5, (n, 6))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = [int(rng.choice(6, p=share)) for share in shares]
    tensors = [f"{CLASSES[label]}/{i:08d}.npy" for i, label in enumerate(labels)]
    write_inputs(folder, [(label, None) for label in labels], tensors)
    write_h5(folder / "dataset-export.h5", boldness * logits, tensors)
    return np.float32(boldness * logits), np.array(labels)


def test_temperature_and_threshold(run, folder):
    """A model three times too bold: the temperature is 3, the error goes, and the promise is kept on other clips."""
    logits, labels = write_calibrated(folder, 1500, 3)
    result, last = run()
    found = read_report(folder)["not_sure"]
    assert found["temperature"] == pytest.approx(3, rel=0.15)
    assert last["ece"] > 0.1 > 2 * found["ece_after"], found
    low, high = figures.wilson(found["answered_right"], found["answered"])
    assert low <= 95 <= high and 10 < found["coverage"] < 90, found
    assert f'"not sure" below {100 * found["threshold"]:.0f} % answers' in result.stdout
    temperature, threshold = calibration.fit_calibration(logits, labels)
    assert (found["temperature"], found["threshold"]) == pytest.approx((temperature, threshold), abs=1e-4)
    curve = [point["accuracy"] for point in found["curve"]]
    assert curve[0] > curve[-1] == pytest.approx(last["top1"]), "of all videos as many are right as without a threshold"


def test_threshold_by_hand():
    """The lowest such that 19 of 20 answers are right; equal confidences are answered together or not at all."""
    confidence = np.linspace(0.99, 0.5, 40)
    right = np.array([True] * 19 + [False] + [True] * 2 + [False] * 18)
    assert calibration.fit_threshold(confidence, right) == pytest.approx(confidence[21])
    confidence[21:25] = confidence[21]
    assert calibration.fit_threshold(confidence, right) == pytest.approx(confidence[20])
    assert calibration.fit_threshold(confidence[:19], right[:19]) is None, "too few to promise 95 %"
    assert calibration.fit_threshold(confidence, ~right) is None


def test_report_without_a_mistake(run, folder):
    write_h5(folder / "dataset-export.h5", [10 * np.eye(6)[label] for label, _ in CASE])
    assert run()[1]["top1"] == 100.0
    assert "No class was taken for another." in (folder / "report/report.html").read_text(encoding="utf-8")


def test_report_that_cannot_be_written(run, folder):
    (folder / "report").write_text("a file")
    assert "error: the report cannot be written into ./report: File exists" in run(code=2)[0].stderr
