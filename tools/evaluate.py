"""Accuracy of predictions from AI Hub, and where the model goes wrong.

Reads   an HDF5 of predictions (run_inference.py's, one downloaded from AI Hub's web page, or the original sample
        solution's), the manifest.jsonl of preprocess_and_save.py, the class map; for its pictures the .npy clips too
Writes  report_dir/: report.html (one file that shows everything), report.json, per_class.csv, confusion.png.
        The last line of output is one JSON object with the main figures.

$ python tools/evaluate.py --h5 dataset-export.h5 --manifest /path/manifest.jsonl --class_map class_map.json
$ python tools/evaluate.py --compare dataset-export-w8a8.h5      # agreement, the clips that flip, McNemar's test

Exit code 0: every clip of the manifest was evaluated (or the one of USE_SINGLE_TENSOR); 1: --allow-partial left
something out; 2: the files do not fit together, or a wrong flag.
"""

import csv
import io
import json
import os
import re
import time
from pathlib import Path

import common
from common import flags

import numpy as np

from report import figures, page, thumbnails

# ----------------------------------------------------------------------------------------------------------------------
h5 = "dataset-export.h5"  # predictions: OUTPUT_H5 of run_inference.py, or a download from AI Hub's web page
manifest = "./preprocessed_tensors/manifest.jsonl"  # label and tensor path of every clip, from preprocess_and_save.py
class_map = str(common.REPO / "class_map.json")  # {class folder name: index in the model's output}
verbose = False  # true: also print every clip with its label and its five best classes
allow_partial = False  # true: where the files do not fit together, evaluate what does and say what was left out
compare = ""  # a second HDF5 of predictions for the same clips, say of a w8a8 model ("": none)
report_dir = "./report"  # folder that gets the report
# ----------------------------------------------------------------------------------------------------------------------

ABOUT = ("model", "model_path", "model_sha256", "device", "job_ids", "output_kind")  # what an HDF5 may say of itself
MISSING = "clips without a prediction"


def main():
    flags.set_constants_from_flags(globals())
    class_index = common.load_class_map(class_map)
    classes = sorted(class_index, key=class_index.get)
    rows = read_rows()
    predictions = load(h5, rows, class_index)
    other = load(compare, rows, class_index) if compare else None
    for these in filter(None, (predictions, other)):
        these.notes.extend(figures.oddities(these, classes) + what_is_newer(these, rows))

    confusion = figures.confusion_matrix(predictions.labels, predictions.predicted, len(classes))
    report = {
        "figures": figures.main_figures(predictions, len(rows)),
        "about": predictions.about | {"manifest": manifest, "class_map": class_map},
        "notes": predictions.notes,
        "left_out": figures.counts_and_examples(predictions.left_out),
        "per_class": figures.per_class(confusion, classes),
        "confidence_curve": figures.confidence_curve(predictions),
        "confused_pairs": figures.confused_pairs(confusion, classes),
        "mistakes": figures.worst_mistakes(predictions, rows, classes),
    }
    if compare:
        report["comparison"] = figures.comparison(predictions, other, rows, classes)

    if verbose:
        print_clips(predictions, rows, classes)
    print_summary(report)
    try:
        write_report(report, confusion, predictions, other, rows, classes)
    except OSError as e:
        common.refuse(f"the report cannot be written into {report_dir}: {e.strerror or e}; see --report-dir")
    print(f"\nthe whole report: {Path(report_dir) / 'report.html'}")
    compared = {key: report["comparison"][key] for key in ("agreement", "mcnemar_p")} if compare else {}
    print(json.dumps(report["figures"] | compared))
    raise SystemExit(1 if predictions.left_out or (compare and other.left_out) else 0)


# --- reading and matching --------------------------------------------------------------------------------------------


def read_rows():
    """The manifest's rows with video_path, label, tensor_path and shape: 200,000 lists of frame indices need 200 MB."""
    kept = "video_path", "label", "tensor_path", "shape"
    rows = [{k: row[k] for k in kept if k in row} for row in common.read_manifest(manifest)]
    if len({row["tensor_path"] for row in rows}) < len(rows):
        common.refuse(f"{manifest} names a tensor_path twice; run tools/preprocess_and_save.py again")
    return rows


def load(path, rows, class_index):
    """Predictions of the HDF5 `path`; exits with code 2 where it does not fit the manifest or the class map."""
    about, paths, scores, unusable = read_predictions(path, rows, class_index)
    described = about.pop("io", None)
    if path == h5:  # a model to compare with may take other clips of the same videos
        refuse_other_clips(path, described, rows)
    notes = []
    if paths is None:
        notes.append(f"{path} names no tensors: its predictions were matched to the manifest by order")
        paths = [row["tensor_path"] for row in rows]
    kept, left_out = match(paths, unusable, rows, class_index)
    if len(paths) == len(kept) == 1 < len(rows):
        left_out = {}
        notes.append(f"{path} holds one prediction (USE_SINGLE_TENSOR): the figures are those of this clip alone")
    if left_out and not (allow_partial and kept):
        refuse_mismatch(path, left_out, len(kept), len(rows))
    clips = np.array(sorted(kept))
    labels = np.array([class_index[rows[clip]["label"]] for clip in clips])
    scores = scores[[kept[clip] for clip in clips]]
    notes += settle_output_kind(about, scores)
    return figures.Predictions(about, notes, left_out, clips, labels, scores)


def refuse_other_clips(path, described, rows):
    """Exit with code 2 where the model took clips of another number of frames than the manifest's: paths may agree."""
    shape = json.loads(described)["input"]["shape"] if described else ()
    if len(shape) != 5:
        return
    frames = shape[1] if shape[4] == 3 else shape[2]  # NTHWC or NCTHW
    others = {row["shape"][2] for row in rows if "shape" in row} - {frames}
    if others:
        common.refuse(
            f"{path} was made of clips of {frames} frames, {manifest} lists clips of {min(others)}; name the manifest "
            f"of those clips with --manifest"
        )


def read_predictions(path, rows, class_index):
    """Read an HDF5 in AI Hub's layout: data/0/batch_<i>, each (num_classes,) or (1, num_classes).

    Returns (about, tensor paths, scores float32 (n, num_classes), unusable): row i is that of path i, and `unusable` is
    {row: why}. The paths are None if the file has none; then its batches are 0 … len(rows)-1. Exits with code 2 and one
    sentence if the file is no such HDF5 or says that it is for other classes.
    """
    with open_h5(path) as file:
        try:
            about = read_attributes(file, path, class_index)
            group, numbers = find_batches(file, path)
            paths, numbers = paths_of(file, path, numbers, rows)
            return about, paths, *read_batches(group, numbers, len(class_index))
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:  # whatever else an HDF5 may hold
            common.refuse(
                f"{path} is an HDF5 file, but not laid out as AI Hub's, with a dataset data/0/batch_<i> for each clip "
                f"({e}); run tools/run_inference.py, or download the job's outputs again"
            )


def paths_of(file, path, numbers, rows):
    """The tensor paths of the HDF5, None if it has none, and the numbers of its batches in their order."""
    if "tensor_paths" in file:
        paths = file["tensor_paths"].asstr()[:].tolist()
        beyond = [number for number in numbers if number >= len(paths)]
        numbers = [*range(len(paths)), *beyond]
        return paths + [f"batch_{number}, which has no path" for number in beyond], numbers
    if numbers == list(range(len(rows))):
        return None, numbers
    common.refuse(
        f"{path} names no tensors, so only their order can match predictions to clips, and it has "
        f"{len(numbers):,} (batch_{numbers[0]} to batch_{numbers[-1]}) for the {len(rows):,} of {manifest}; "
        "give the manifest of exactly these clips, or run tools/run_inference.py, which stores the paths"
    )


def open_h5(path):
    """The HDF5 `path`, open for reading; exits with code 2 and one sentence if it cannot be."""
    import h5py

    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        common.refuse(f"there is no {path}; run tools/run_inference.py first, or name another file")
    except OSError as e:
        if "unable to lock" in str(e):
            common.refuse(f"{path} is in use by another process, which writes to it; wait for it, or close it there")
        if e.errno:
            common.refuse(f"{path} cannot be read: {os.strerror(e.errno)}")
        common.refuse(f"{path} is not a complete HDF5 file ({e}); run tools/run_inference.py again")


def read_attributes(file, path, class_index):
    """What the HDF5 says of itself, as far as it does; exits with code 2 if its classes are not the class map's."""
    words = {key: str(file.attrs[key]) for key in ABOUT if key in file.attrs}
    if words.get("output_kind", "logits") not in ("logits", "probabilities"):
        common.refuse(f'{path} says its output_kind is {words["output_kind"]!r}; known: "logits", "probabilities"')
    if "classes" in file.attrs:
        theirs, ours = json.loads(file.attrs["classes"]), sorted(class_index, key=class_index.get)
        differing = [i for i in range(max(len(theirs), len(ours))) if theirs[i : i + 1] != ours[i : i + 1]]
        if differing:
            first = differing[0]
            common.refuse(
                f"{path} is of a model with {len(theirs)} classes, {class_map} has {len(ours)}; they differ at "
                f"{len(differing)} indices (at {first}: {theirs[first : first + 1]} and {ours[first : first + 1]}); "
                "give the class map that the model was trained with"
            )
    return {"h5": str(path), "io": file.attrs.get("io")} | words


def find_batches(file, path):
    """The group with the predictions and the sorted numbers of its batch_<i>; exits with code 2 if there is none."""
    outputs = list(file["data"]) if "data" in file else []
    if len(outputs) > 1:
        common.refuse(f"{path} holds {len(outputs)} model outputs; this model has one, its class scores")
    group = file["data"][outputs[0]] if outputs else {}
    numbers = sorted(int(name[6:]) for name in group if re.fullmatch(r"batch_\d+", name))
    if not numbers:
        common.refuse(f"{path} holds no prediction (data/0/batch_<i>); run tools/run_inference.py again")
    dtype = group[f"batch_{numbers[0]}"].dtype
    if dtype.kind != "f":
        common.refuse(
            f"{path} holds {dtype} values, a quantised output without its scale; run tools/run_inference.py, which "
            "stores float32 logits"
        )
    return group, numbers


def read_batches(group, numbers, num_classes):
    """Returns (scores float32 (len(numbers), num_classes), {row: why this row cannot be used})."""
    import h5py
    from tqdm import tqdm

    scores, unusable = np.full((len(numbers), num_classes), np.nan, np.float32), {}
    for row, number in enumerate(tqdm(numbers, desc="reading", unit=" predictions", unit_scale=True, delay=2)):
        try:  # h5py's low level, because group[name][()] takes three times as long
            dataset = h5py.h5d.open(group.id, b"batch_%d" % number)
            if dataset.shape in ((num_classes,), (1, num_classes)):
                dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, scores[row].reshape(dataset.shape))
            else:
                unusable[row] = f"predictions of shape {dataset.shape} for {num_classes} classes"
        except KeyError:
            unusable[row] = MISSING
        except OSError:
            unusable[row] = "predictions damaged in the file"
    for row in np.flatnonzero(~np.isfinite(scores).all(axis=1)).tolist():
        unusable.setdefault(row, "predictions with NaN or infinite values")
    return scores, unusable


def match(paths, unusable, rows, class_index):
    """Join predictions to the manifest by tensor path.

    Returns ({manifest row: prediction row} of what can be evaluated, {what is left out: [name, …]}).
    """
    clip_of = {row["tensor_path"]: clip for clip, row in enumerate(rows)}
    found, left_out = {}, {}
    for prediction, path in enumerate(paths):
        clip = clip_of.get(path)
        if clip is None:
            left_out.setdefault("predictions without a clip in the manifest", []).append(path)
        elif clip in found:
            left_out.setdefault("second predictions for one clip", []).append(path)
        else:
            found[clip] = prediction
    kept = {}
    for clip, row in enumerate(rows):
        if row["label"] not in class_index:
            name = f"{row['tensor_path']}: {row['label']}"
            left_out.setdefault("labels that are not in the class map", []).append(name)
        elif clip not in found:
            left_out.setdefault(MISSING, []).append(row["tensor_path"])
        elif found[clip] in unusable:
            left_out.setdefault(unusable[found[clip]], []).append(row["tensor_path"])
        else:
            kept[clip] = found[clip]
    return kept, left_out


def refuse_mismatch(path, left_out, fitting, total):
    """Exit with code 2, naming what does not fit with counts and examples."""
    lines = [f"{path}, {manifest} and {class_map} do not fit together:"]
    for what, names in left_out.items():
        lines.append(f"  {what}: {len(names):,} ({figures.some(names, len(names))})")
    if fitting:
        lines.append(
            "Run tools/run_inference.py again on this manifest, or pass --allow-partial to evaluate the "
            f"{fitting:,} of {total:,} clips that fit."
        )
    else:
        lines.append("Nothing is left to evaluate; give the files of one and the same run.")
    common.refuse("\n".join(lines))


def settle_output_kind(about, scores):
    """Set about["output_kind"] to the file's own word, else to what the values look like; returns notes about it.

    Probabilities lie in [0, 1] and each clip's sum to 1; the margins leave room for 8-bit outputs.
    """
    looks_like = "probabilities"
    if scores.min() < -0.02 or scores.max() > 1.02 or abs(scores.sum(axis=1, dtype=np.float64).mean() - 1) > 0.05:
        looks_like = "logits"
    said = about.setdefault("output_kind", looks_like)
    if said == looks_like:
        return []
    if said == "probabilities":
        common.refuse(
            f"{about['h5']} says it holds probabilities, but its values lie between {scores.min():g} and "
            f"{scores.max():g} or do not sum to 1; run tools/run_inference.py again"
        )
    return [f"{about['h5']} says it holds logits, but they look like probabilities: calibration would then be wrong"]


def what_is_newer(predictions, rows):
    """Sentences on the model or the clips, where they were made anew after the HDF5 was written."""
    path, lines = predictions.about["h5"], []
    written = os.path.getmtime(path)

    def newer(file):
        return os.path.isfile(file) and os.path.getmtime(file) > written

    model = predictions.about.get("model_path", "")
    if newer(model) and common.sha256_of(model) != predictions.about.get("model_sha256"):
        lines.append(f"{path} is older than its model {model} ({when(path)}, {when(model)}): run inference again")
    if newer(manifest):
        tensors = [Path(manifest).parent / rows[clip]["tensor_path"] for clip in predictions.clips]
        if changed := sum(map(newer, tensors)):
            lines.append(f"{path} is older than {changed:,} of the clips ({when(path)}): run inference again")
        elif not any(map(os.path.exists, tensors)):
            lines.append(f"{path} is older than {manifest} ({when(path)}, {when(manifest)}): are the clips the same?")
    return lines


def when(path):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(path)))


# --- text ------------------------------------------------------------------------------------------------------------


def print_clips(predictions, rows, classes):
    for position, clip in enumerate(predictions.clips):
        best = ", ".join(f"{name} {100 * p:.2f} %" for name, p in figures.best_classes(predictions, position, classes))
        verdict = "right" if predictions.rank[position] == 0 else "wrong"
        print(f"{rows[clip]['video_path']}: label {rows[clip]['label']}, {verdict}; top 5: {best}")


def print_summary(report):
    of = report["figures"]
    print(", ".join(f"{key} {value}" for key, value in report["about"].items() if key != "model_sha256"))
    for remark in figures.remarks(report):
        print(f"note: {remark}")
    print(f"\nTop-1 {of['top1']:.3f} %, Top-5 {of['top5']:.3f} % of {of['n']:,} of {of['num_videos']:,} videos")
    print(f"95 % interval of Top-1 {of['ci95_low']:.3f} to {of['ci95_high']:.3f} % (Wilson)")
    print(f"mean per-class accuracy {of['mean_class_accuracy']:.3f} %, expected calibration error {of['ece']:.4f}")
    if compare:
        print(figures.comparison_sentence(report["comparison"]))
    for pair in report["confused_pairs"][:5]:
        print(f"  {pair['label']} taken for {pair['predicted']}: {pair['times']:,}, {pair['share']:.1f} % of the class")
    for mistake in report["mistakes"][:5]:
        print(f"  {mistake['video_path']}: {figures.taken_for(mistake)}")


# --- the report folder -----------------------------------------------------------------------------------------------


def write_report(report, confusion, predictions, other, rows, classes):
    """Write the four files of the report, each complete or not at all."""
    folder = Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    thumbnails.draw_confusion(folder / "confusion.png", confusion, classes)
    common.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, report["per_class"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["per_class"])
    common.write_text(folder / "per_class.csv", table.getvalue())
    text = page.render(report, confusion, predictions, other, rows, classes, Path(manifest).parent)
    common.write_text(folder / "report.html", text)


if __name__ == "__main__":
    main()
