"""Accuracy of predictions from AI Hub, and where the model goes wrong.

Reads   an HDF5 of predictions (run_inference.py's, one downloaded from AI Hub's web page, or the original sample
        solution's), the manifest.jsonl of preprocess_and_save.py, the class map; for its pictures the .npy clips too
Writes  report_dir/: report.html (one file that shows everything), report.json, per_class.csv, confusion.png,
        confused_pairs.png, mistakes.png. The last line of output is one JSON object with the main figures.

$ python tools/evaluate.py --h5 dataset-export.h5 --manifest /path/manifest.jsonl --class_map class_map.json
$ python tools/evaluate.py --compare dataset-export-w8a8.h5      # agreement, the clips that flip, McNemar's test

Exit code 0: every clip of the manifest was evaluated (or the one of USE_SINGLE_TENSOR); 1: --allow-partial left
something out; 2: the files do not fit together, or a wrong flag.
"""

import base64
import csv
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common

# ----------------------------------------------------------------------------------------------------------------------
h5 = "dataset-export.h5"  # predictions: OUTPUT_H5 of run_inference.py, or a download from AI Hub's web page
manifest = "./preprocessed_tensors/manifest.jsonl"  # label and tensor path of every clip, from preprocess_and_save.py
class_map = str(common.REPO / "class_map.json")  # {class folder name: index in the model's output}
verbose = False  # true: also print every clip with its label and its five best classes
allow_partial = False  # true: where the files do not fit together, evaluate what does and say what was left out
compare = ""  # a second HDF5 of predictions for the same clips, say of a w8a8 model ("": none)
report_dir = "./report"  # folder that gets the report
# ----------------------------------------------------------------------------------------------------------------------

CALIBRATION_BINS = 15  # as in Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599
LISTED_PAIRS = 20
LISTED_MISTAKES = 24
FRAMES_PER_MISTAKE = 4
MISSING = "clips without a prediction"


@dataclass
class Predictions:
    """The predictions of one HDF5 that fit the manifest, in the manifest's order."""

    about: dict  # what the file says of itself: h5, output_kind, model, device, job_ids
    notes: list  # sentences a reader of the figures must know
    left_out: dict  # {what: [name, …]}
    clips: np.ndarray  # int64 (n,): indices of manifest rows, ascending
    labels: np.ndarray  # int64 (n,): true class
    scores: np.ndarray  # float32 (n, num_classes): logits or probabilities

    def __post_init__(self):
        self.predicted = self.scores.argmax(axis=1)  # int64 (n,); of equal scores the first
        self.rank = rank_of_label(self.scores, self.labels)  # int64 (n,)
        self.confidence = confidence(self.scores, self.about["output_kind"])  # float64 (n,)


def main():
    common.set_constants_from_flags(globals())
    class_index = common.load_class_map(class_map)
    classes = sorted(class_index, key=class_index.get)
    rows = read_rows()
    predictions = load(h5, rows, class_index)
    other = load(compare, rows, class_index) if compare else None

    confusion = confusion_matrix(predictions.labels, predictions.predicted, len(classes))
    report = {
        "figures": figures(predictions, len(rows)),
        "about": predictions.about | {"manifest": manifest, "class_map": class_map},
        "notes": predictions.notes,
        "left_out": counts_and_examples(predictions.left_out),
        "per_class": per_class(confusion, classes),
        "confused_pairs": confused_pairs(confusion, classes),
        "mistakes": worst_mistakes(predictions, rows, classes),
    }
    if compare:
        report["comparison"] = comparison(predictions, other, rows, classes)

    if verbose:
        print_clips(predictions, rows, classes)
    print_summary(report)
    write_report(report, confusion, classes)
    print(json.dumps(report["figures"] | comparison_figures(report)))
    raise SystemExit(1 if predictions.left_out or (compare and other.left_out) else 0)


# --- reading and matching --------------------------------------------------------------------------------------------


def read_rows():
    """The manifest's rows with video_path, label and tensor_path alone: 200,000 lists of frame indices need 200 MB."""
    rows = [{k: row[k] for k in ("video_path", "label", "tensor_path")} for row in common.read_manifest(manifest)]
    if len({row["tensor_path"] for row in rows}) < len(rows):
        common.refuse(f"{manifest} names a tensor_path twice; run tools/preprocess_and_save.py again")
    return rows


def load(path, rows, class_index):
    """The Predictions of the HDF5 `path`; exits with code 2 where it does not fit the manifest or the class map."""
    about, paths, scores, unusable = read_predictions(path, rows, class_index)
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
    return Predictions(about, notes, left_out, clips, labels, scores)


def read_predictions(path, rows, class_index):
    """Read an HDF5 in AI Hub's layout: data/0/batch_<i>, each (num_classes,) or (1, num_classes).

    Returns (about, tensor paths, scores float32 (n, num_classes), unusable): row i is that of path i, and `unusable` is
    {row: why}. The paths are None if the file has none; then its batches are 0 … len(rows)-1. Exits with code 2 and one
    sentence if the file is no such HDF5 or says that it is for other classes.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        common.refuse(f"there is no {path}; run tools/run_inference.py first, or name the file with --h5")
    except OSError as e:
        common.refuse(f"{path} is not a complete HDF5 file ({e}); run tools/run_inference.py again")
    with file:
        about = read_attributes(file, path, class_index)
        group, numbers = find_batches(file, path)
        if "tensor_paths" in file:
            paths = file["tensor_paths"].asstr()[:].tolist()
            paths += [f"batch_{number}, which has no path" for number in numbers if number >= len(paths)]
            numbers = list(range(len(file["tensor_paths"]))) + [n for n in numbers if n >= len(file["tensor_paths"])]
        elif numbers == list(range(len(rows))):
            paths = None
        else:
            common.refuse(
                f"{path} names no tensors, so only their order can match predictions to clips, and it has "
                f"{len(numbers):,} (batch_{numbers[0]} to batch_{numbers[-1]}) for the {len(rows):,} of {manifest}; "
                "give the manifest of exactly these clips, or run tools/run_inference.py, which stores the paths"
            )
        return about, paths, *read_batches(group, numbers, len(class_index))


def read_attributes(file, path, class_index):
    """What the HDF5 says of itself, as far as it does; exits with code 2 if its classes are not the class map's."""
    words = {key: str(file.attrs[key]) for key in ("model", "device", "job_ids", "output_kind") if key in file.attrs}
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
    return {"h5": str(path)} | words


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
        lines.append(f"  {what}: {len(names):,} ({some(names, len(names))})")
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


# --- figures ---------------------------------------------------------------------------------------------------------


def rank_of_label(scores, labels):
    """How many classes stand before the true one, int64 (n,): right at Top-k is `rank < k`.

    Of equal scores the class with the lower index stands first, as in argmax. NaN must have been left out before.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def confidence(scores, output_kind):
    """Probability of the best class, float64 (n,)."""
    best = scores.max(axis=1, keepdims=True)
    if output_kind == "probabilities":
        return best[:, 0].astype(np.float64)
    return 1 / np.exp(scores - best).sum(axis=1, dtype=np.float64)


def percent(count, total):
    """With the three decimals of train.py's output, in the order of its operations."""
    return round(100 * (int(count) / int(total)), 3)


def figures(predictions, num_videos):
    """The main figures: accuracies in percent, ece in [0, 1]."""
    from scipy.stats import binomtest

    n, right = len(predictions.clips), predictions.rank == 0
    interval = binomtest(int(right.sum()), n).proportion_ci(0.95, method="wilson")
    share_right = [right[predictions.labels == label].mean() for label in np.unique(predictions.labels)]
    return {
        "top1": percent(right.sum(), n),
        "top5": percent((predictions.rank < 5).sum(), n),
        "mean_class_accuracy": round(100 * float(np.mean(share_right)), 3),
        "ci95_low": round(100 * interval.low, 3),
        "ci95_high": round(100 * interval.high, 3),
        "ece": round(expected_calibration_error(predictions.confidence, right), 4),
        "n": n,
        "num_videos": num_videos,
        "partial": n < num_videos,
    }


def expected_calibration_error(confidence, right):
    """Mean over clips of |accuracy - mean confidence| of the clip's bin (Guo et al. 2017, equation 3); bins (a, b]."""
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bins, right) - np.bincount(bins, confidence)).sum() / len(right))


def confusion_matrix(labels, predicted, num_classes):
    """Counts int64 (num_classes, num_classes): row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class(confusion, classes):
    """One dict a class, in index order; accuracy is None for a class without clips."""
    table = []
    for index, (name, row) in enumerate(zip(classes, confusion)):
        n, right, mistakes = int(row.sum()), int(row[index]), row.copy()
        mistakes[index] = 0
        times = int(mistakes.max())
        table.append({
            "class": name,
            "index": index,
            "n": n,
            "right": right,
            "accuracy": percent(right, n) if n else None,
            "most_frequent_mistake": classes[mistakes.argmax()] if times else "",
            "times": times,
        })
    return table


def confused_pairs(confusion, classes):
    """The most frequent (true class, predicted class), most frequent first; share is of the true class's clips."""
    mistakes = confusion * (1 - np.eye(len(classes), dtype=confusion.dtype))
    worst = np.argsort(-mistakes, axis=None, kind="stable")[:LISTED_PAIRS]
    pairs = []
    for i, j in zip(*np.unravel_index(worst, mistakes.shape)):
        if times := int(mistakes[i, j]):
            share = percent(times, confusion[i].sum())
            pairs.append({"label": classes[i], "predicted": classes[j], "times": times, "share": share})
    return pairs


def best_classes(predictions, position, classes):
    """The five best [class, probability in [0, 1]] of one clip."""
    scores = predictions.scores[position].astype(np.float64)
    if predictions.about["output_kind"] == "logits":
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    order = np.argsort(-predictions.scores[position], kind="stable")[:5]
    return [[classes[i], round(float(scores[i]), 4)] for i in order]


def worst_mistakes(predictions, rows, classes):
    """The wrong clips, most confident first."""
    wrong = np.flatnonzero(predictions.rank > 0)
    worst = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:LISTED_MISTAKES]
    mistakes = []
    for position in worst:
        best = best_classes(predictions, position, classes)
        row = rows[predictions.clips[position]]
        mistakes.append(row | {"predicted": best[0][0], "confidence": best[0][1], "top5": best})
    return mistakes


def comparison(predictions, other, rows, classes):
    """Two files on the clips that both have: agreement in percent, McNemar's exact test, every clip that flips.

    McNemar's test asks how likely a split at least as uneven as the one seen is, among the clips that only one of the
    two gets right, if both were equally good: a binomial test with p = 1/2.
    """
    from scipy.stats import binomtest

    clips, ours, theirs = np.intersect1d(predictions.clips, other.clips, assume_unique=True, return_indices=True)
    if not len(clips):
        common.refuse(f"{h5} and {compare} have no clip in common; compare two runs over the same manifest")
    right, other_right = predictions.rank[ours] == 0, other.rank[theirs] == 0
    lost, won = int((right & ~other_right).sum()), int((~right & other_right).sum())
    flips = np.flatnonzero(predictions.predicted[ours] != other.predicted[theirs])
    return {
        "h5": compare,
        "about": other.about,
        "notes": other.notes,
        "left_out": counts_and_examples(other.left_out),
        "n": len(clips),
        "agreement": percent(len(clips) - len(flips), len(clips)),
        "top1": percent(right.sum(), len(clips)),
        "other_top1": percent(other_right.sum(), len(clips)),
        "top5": percent((predictions.rank[ours] < 5).sum(), len(clips)),
        "other_top5": percent((other.rank[theirs] < 5).sum(), len(clips)),
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "wrong_to_other_wrong": len(flips) - lost - won,
        "mcnemar_p": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
        "flips": [
            {
                "video_path": rows[clips[i]]["video_path"],
                "label": rows[clips[i]]["label"],
                "predicted": classes[predictions.predicted[ours[i]]],
                "other_predicted": classes[other.predicted[theirs[i]]],
            }
            for i in flips
        ],
    }


def comparison_figures(report):
    return {key: report["comparison"][key] for key in ("agreement", "mcnemar_p")} if compare else {}


def counts_and_examples(left_out):
    return {what: {"count": len(names), "first": names[:20]} for what, names in left_out.items()}


def some(names, count):
    """The first three of `count` names."""
    return ", ".join(names[:3]) + (", …" if count > 3 else "")


# --- text ------------------------------------------------------------------------------------------------------------


def print_clips(predictions, rows, classes):
    for position, clip in enumerate(predictions.clips):
        best = ", ".join(f"{name} {100 * p:.2f} %" for name, p in best_classes(predictions, position, classes))
        verdict = "right" if predictions.rank[position] == 0 else "wrong"
        print(f"{rows[clip]['video_path']}: label {rows[clip]['label']}, {verdict}; top 5: {best}")


def remarks(report):
    """Everything a reader must know before the figures, as sentences."""
    lines, parts = [], [report] + ([report["comparison"]] if compare else [])
    for part in parts:
        lines += part["notes"]
        for what, these in part["left_out"].items():
            count, examples = these["count"], some(these["first"], these["count"])
            lines.append(f"left out of {part['about']['h5']}: {what}: {count:,} ({examples})")
    return lines


def print_summary(report):
    of = report["figures"]
    print(", ".join(f"{key} {value}" for key, value in report["about"].items()))
    for remark in remarks(report):
        print(f"note: {remark}")
    print(f"\nTop-1 {of['top1']:.3f} %, Top-5 {of['top5']:.3f} % of {of['n']:,} of {of['num_videos']:,} videos")
    print(f"95 % interval of Top-1 {of['ci95_low']:.3f} to {of['ci95_high']:.3f} % (Wilson)")
    print(f"mean per-class accuracy {of['mean_class_accuracy']:.3f} %, expected calibration error {of['ece']:.4f}")
    if compare:
        print(comparison_sentence(report["comparison"]))
    for pair in report["confused_pairs"][:5]:
        print(f"  {pair['label']} taken for {pair['predicted']}: {pair['times']:,}, {pair['share']:.1f} % of the class")
    for mistake in report["mistakes"][:5]:
        print(f"  {mistake['video_path']}: {taken_for(mistake)}")
    print(f"\nthe whole report: {Path(report_dir) / 'report.html'}")


def taken_for(mistake):
    return f"{mistake['label']} taken for {mistake['predicted']}, {100 * mistake['confidence']:.1f} % sure"


def comparison_sentence(against):
    return (
        f"against {against['h5']} on {against['n']:,} clips: the same class for {against['agreement']:.3f} %; Top-1 "
        f"{against['top1']:.3f} against {against['other_top1']:.3f} %, Top-5 {against['top5']:.3f} against "
        f"{against['other_top5']:.3f} %; only this file is right on {against['right_to_wrong']:,}, only the other on "
        f"{against['wrong_to_right']:,}, both wrong but differently on {against['wrong_to_other_wrong']:,}; "
        f"McNemar's exact p = {against['mcnemar_p']:.3g}"
    )


# --- the report folder -----------------------------------------------------------------------------------------------


def write_report(report, confusion, classes):
    """Write the six files of the report, each complete or not at all."""
    import matplotlib

    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is a dollar sign
    folder = Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw_confusion(folder / "confusion.png", confusion, classes)
    draw_confused_pairs(folder / "confused_pairs.png", report["confused_pairs"])
    draw_mistakes(folder / "mistakes.png", report["mistakes"])
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, report["per_class"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["per_class"])
    write_text(folder / "per_class.csv", table.getvalue())
    write_text(folder / "report.html", html_report(report, folder))


def write_text(path, text):
    with common.written_then_renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def new_figure(width, height):
    """A matplotlib Figure of width x height inches; without pyplot, so no display is ever looked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def save_figure(figure, path):
    with common.written_then_renamed(path) as temporary:
        figure.savefig(temporary, format="png")


def say_instead(path, sentence):
    """A picture that says why there is nothing to show, so that no older picture stays in its place."""
    figure = new_figure(6, 1)
    figure.text(0.5, 0.5, sentence, ha="center", va="center")
    save_figure(figure, path)


def draw_confusion(path, confusion, classes):
    """Confusion matrix in percent of each true class, over the classes that occur as label or prediction."""
    shown = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    totals = confusion.sum(axis=1)[shown, None]
    share = 100 * confusion[np.ix_(shown, shown)] / np.maximum(totals, 1)
    side = 3.5 + max(0.28 * len(shown), 2.5)
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    # colours by square root, so that a few percent can be seen
    axes.pcolormesh(np.sqrt(share), cmap="Blues", vmin=0, vmax=10, edgecolors="0.88", linewidth=0.5)
    for i, j in np.argwhere(share >= 0.5):
        color = "white" if share[i, j] > 40 else "black"
        axes.text(j + 0.5, i + 0.5, f"{share[i, j]:.0f}", ha="center", va="center", size=7, color=color)
    middles = np.arange(len(shown)) + 0.5
    axes.set_xticks(middles, [classes[i] for i in shown], rotation=90, size=8)
    axes.set_yticks(middles, [f"{classes[i]} ({n:,})" for i, n in zip(shown, totals[:, 0])], size=8)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.tick_params(length=0, labeltop=len(shown) > 30)
    axes.set(xlabel="predicted class", ylabel="true class (number of videos)")
    axes.set_title("Predictions in percent of each true class")
    save_figure(figure, path)


def draw_confused_pairs(path, pairs):
    """Bars of the most frequent (true class, predicted class)."""
    if not pairs:
        return say_instead(path, "no class was taken for another")
    figure = new_figure(10, 1.2 + 0.32 * len(pairs))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(pairs)), [pair["times"] for pair in pairs], color="#2a6fb0")
    axes.bar_label(bars, [f"{pair['times']:,} ({pair['share']:.0f} %)" for pair in pairs], padding=4, size=9)
    axes.set_yticks(range(len(pairs)), [f"{pair['label']} → {pair['predicted']}" for pair in pairs])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="videos (percent of the true class)", title="Most confused: true class → predicted class")
    save_figure(figure, path)


def draw_mistakes(path, mistakes):
    """Contact sheet: some frames of each clip, what it shows and what it was taken for."""
    if not mistakes:
        return say_instead(path, "no video was taken for another class")
    columns = min(3, len(mistakes))
    figure = new_figure(5 * columns, 2.05 * -(-len(mistakes) // columns))
    for axes, mistake in zip(figure.subplots(-(-len(mistakes) // columns), columns, squeeze=False).flat, mistakes):
        strip = frames_of(Path(manifest).parent / mistake["tensor_path"])
        if isinstance(strip, str):
            axes.text(0.5, 0.5, strip, ha="center", va="center", color="0.4", transform=axes.transAxes)
            strip = np.full((112, 112 * FRAMES_PER_MISTAKE, 3), 0.93)
        axes.imshow(strip)
        axes.set_title(taken_for(mistake).replace(" taken", "\ntaken", 1), size=9, loc="left")
        axes.text(0, -0.05, shortened(mistake["video_path"]), size=7, color="0.4", va="top", transform=axes.transAxes)
    for axes in figure.axes:
        axes.axis("off")
    save_figure(figure, path)


def frames_of(tensor_path):
    """Some frames side by side, float32 (H, about frames x W, 3) in [0, 1], or a sentence why there are none."""
    try:
        clip = np.load(tensor_path, mmap_mode="r")  # (1, 3, T, H, W)
    except FileNotFoundError:
        return "tensor not found"
    except (OSError, ValueError, EOFError):
        return "tensor cannot be read"
    if clip.ndim != 5 or clip.shape[1] != 3:
        return f"tensor of shape {clip.shape}"
    picked = np.linspace(0, clip.shape[2] - 1, FRAMES_PER_MISTAKE).round().astype(int)
    gap = ((0, 0), (0, 3), (0, 0))
    frames = [np.pad(clip[0, :, t].transpose(1, 2, 0), gap, constant_values=1) for t in picked]
    return np.concatenate(frames, axis=1)[:, :-3].clip(0, 1)


def shortened(text, longest=70):
    return text if len(text) <= longest else f"…{text[-longest + 1 :]}"


# --- report.html -----------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f5f6f8; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 24px }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 19px; margin: 36px 0 8px }
p.about { color: #5a6675; margin: 0 }
.note { background: #fff4d6; border-left: 4px solid #d99a00; padding: 8px 12px; margin: 12px 0 }
.note, p { overflow-wrap: anywhere }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.figures div { background: white; border: 1px solid #dde1e7; border-radius: 8px; padding: 12px 18px; flex: 1 }
.figures b { display: block; font-size: 24px; white-space: nowrap } .figures span { color: #5a6675; font-size: 13px }
table { border-collapse: collapse; background: white; width: 100%; font-size: 14px }
th, td { padding: 4px 10px; border: 1px solid #dde1e7; text-align: left; overflow-wrap: anywhere }
th { background: #eceff3 } td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
summary { cursor: pointer; margin-bottom: 8px }
label { display: block; overflow: auto; border: 1px solid #dde1e7; background: white; cursor: zoom-in }
label input { display: none } label img { max-width: 100%; display: block; margin: 0 auto }
label input:checked + img { max-width: none; cursor: zoom-out }
"""


def html_report(report, folder):
    """The whole report as one HTML document that needs no other file and no network."""
    of, about = report["figures"], report["about"]
    seen = sorted((row for row in report["per_class"] if row["n"]), key=lambda row: row["accuracy"])
    unseen = len(report["per_class"]) - len(seen)
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>',
        f"<style>{STYLE}</style></head><body><main><h1>Evaluation</h1>",
        f'<p class="about">{html.escape(" · ".join(f"{key} {value}" for key, value in about.items()))}</p>',
        *(f'<div class="note">{html.escape(remark)}</div>' for remark in remarks(report)),
        '<div class="figures">',
        tile(f"{of['top1']:.3f} %", f"Top-1; 95 % interval {of['ci95_low']:.1f} to {of['ci95_high']:.1f} % (Wilson)"),
        tile(f"{of['top5']:.3f} %", "Top-5"),
        tile(f"{of['mean_class_accuracy']:.3f} %", f"mean of the accuracies of {len(seen)} classes"),
        tile(f"{of['ece']:.4f}", f"expected calibration error, {CALIBRATION_BINS} bins"),
        tile(f"{of['n']:,}", f"of {of['num_videos']:,} videos"),
        "</div>",
        *html_comparison(report),
        "<h2>Most confused classes</h2>",
        picture(folder / "confused_pairs.png", "most confused classes"),
        "<h2>Most confident mistakes</h2>",
        picture(folder / "mistakes.png", "frames of the most confident mistakes"),
        html_table(
            ["video", "class", "taken for", "confidence"],
            [[m["video_path"], m["label"], m["predicted"], f"{m['confidence']:.1%}"] for m in report["mistakes"]],
        ),
        "<h2>Confusion matrix</h2><p>Click a picture to see it in full size.</p>",
        picture(folder / "confusion.png", "confusion matrix"),
        "<h2>Every class, the weakest first</h2>",
        f"<p>{unseen} classes of the class map have no video here.</p>" if unseen else "",
        html_table(
            ["class", "videos", "accuracy, %", "most often taken for", "times"],
            [[r["class"], r["n"], r["accuracy"], r["most_frequent_mistake"], r["times"] or ""] for r in seen],
        ),
        "</main></body></html>\n",
    ])


def html_comparison(report):
    if not compare:
        return []
    against = report["comparison"]
    flips = [list(flip.values()) for flip in against["flips"]]
    return [
        "<h2>Comparison</h2>",
        f"<p>{html.escape(comparison_sentence(against))}.</p>",
        f"<details><summary>{len(flips):,} videos flip; {len(flips[:50])} are shown, report.json has all</summary>",
        html_table(["video", "class", "taken for", f"by {against['h5']} taken for"], flips[:50]),
        "</details>",
    ]


def tile(value, words):
    return f"<div><b>{html.escape(value)}</b><span>{html.escape(words)}</span></div>"


def picture(path, words):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<label><input type="checkbox"><img alt="{words}" src="data:image/png;base64,{data}"></label>'


def html_table(header, rows):
    """Numbers right-aligned, every text escaped; nothing for no rows."""
    if not rows:
        return ""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    for row in rows:
        cells = ""
        for cell in row:
            is_number = isinstance(cell, (int, float))
            cells += f'<td class="number">{cell:,}</td>' if is_number else f"<td>{html.escape(cell)}</td>"
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join(lines) + "</table>"


if __name__ == "__main__":
    main()
