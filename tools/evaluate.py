"""Accuracy of predictions from AI Hub, and where the model goes wrong.

Reads   an HDF5 of predictions (run_inference.py's, one downloaded from AI Hub's web page, or the original sample
        solution's), the manifest.jsonl of preprocess_and_save.py; for its pictures the .npy clips too
Writes  report_dir/: report.html (one file that shows everything), report.json, per_class.csv, confusion.png.
        The last line of output is one JSON object with the main figures.

$ python tools/evaluate.py --h5 dataset-export.h5 --manifest /path/manifest.jsonl --class_map class_map.json
$ python tools/evaluate.py --compare dataset-export-w8a8.h5      # agreement, the clips that flip, McNemar's test

Exit code 0: every clip of the manifest was evaluated (or the one of USE_SINGLE_TENSOR); 1: --allow-partial left
something out; 2: the files do not fit together, or a wrong flag; 130: Ctrl-C.
"""

import json
from pathlib import Path

import common
from common import flags
from common.names import printable

from report import figures, not_sure, page, predictions, thumbnails, two_models

# ----------------------------------------------------------------------------------------------------------------------
h5 = "dataset-export.h5"  # predictions: OUTPUT_H5 of run_inference.py, or a download from AI Hub's web page
manifest = "./preprocessed_tensors/manifest.jsonl"  # label and tensor path of every clip, from preprocess_and_save.py
class_map = str(common.REPO / "class_map.json")  # {class folder name: index}, for an h5 that does not name its classes
verbose = False  # true: also print every clip with its label and its five best classes
allow_partial = False  # true: where the files do not fit together, evaluate what does and say what was left out
compare = ""  # a second HDF5 of predictions for the same clips, say of a w8a8 model ("": none)
report_dir = "./report"  # folder that gets the report
# ----------------------------------------------------------------------------------------------------------------------


def main():
    flags.set_constants_from_flags(globals())
    rows = predictions.rows_of_manifest(manifest)
    ours, other = read_with_notes(h5, rows), read_with_notes(compare, rows) if compare else None
    predictions.refuse_other_clips(ours, manifest, rows)  # a model to compare with may take other clips of the videos
    if other:  # two models may number their classes differently, or not have all in common
        classes = ours.classes + [name for name in other.classes if name not in ours.classes]
        ours, other = ours.in_classes(classes), other.in_classes(classes)
        if ours.scores.tobytes() == other.scores.tobytes():
            ours.notes.append(f"{h5} and {compare} hold the same predictions, bit for bit: they are of one network")
    pairs = figures.confusions(ours)
    matrix = thumbnails.draw_confusion(pairs, ours.classes)
    report = {
        "figures": figures.main_figures(ours, len(rows)),
        "about": ours.about | {"manifest": manifest, "class_map": class_map},
        "notes": ours.notes + predictions.videos_that_changed(manifest, rows) + matrix.notes,
        "left_out": figures.counts_and_examples(ours.left_out),
        "per_class": figures.per_class(ours, pairs),
        "confidence_curve": figures.confidence_curve(ours),
        "not_sure": not_sure.fitted(ours, rows),
        "confused_pairs": figures.confused_pairs(ours, pairs),
        "mistakes": figures.worst_mistakes(ours, rows),
    }
    if other:
        report["comparison"] = two_models.comparison(ours, other, rows)

    if verbose:
        print_clips(ours, rows)
    print_summary(report)
    try:
        write_report(report, matrix, ours, other, rows)
    except OSError as e:
        common.refuse(f"the report cannot be written into {report_dir}: {e.strerror or e}; see --report-dir")
    print(f"\nthe whole report: {Path(report_dir) / 'report.html'}")
    shown = "agreement", "difference", "difference_low", "difference_high", "mcnemar_p"
    print(json.dumps(report["figures"] | ({key: report["comparison"][key] for key in shown} if other else {})))
    raise SystemExit(1 if ours.left_out or (other and other.left_out) else 0)


def read_with_notes(path, rows):
    """The Predictions of an HDF5, with notes on what is odd about them."""
    these = predictions.load_predictions(path, manifest, rows, class_map, allow_partial)
    these.notes.extend(figures.oddities(these) + predictions.what_is_newer(these, manifest, rows))
    return these


# --- text ------------------------------------------------------------------------------------------------------------


def print_clips(ours, rows):
    for position, clip in enumerate(ours.clips):
        best = ", ".join(f"{name} {100 * p:.2f} %" for name, p in figures.best_classes(ours, position))
        verdict = "right" if ours.rank[position] == 0 else "wrong"
        print(printable(f"{rows[clip]['video_path']}: label {rows[clip]['label']}, {verdict}; top 5: {best}"))


def print_summary(report):
    of, hidden = report["figures"], ("model_sha256", "checkpoint_sha256", "io", "clip")
    print(", ".join(f"{key} {value}" for key, value in report["about"].items() if key not in hidden))
    for remark in figures.remarks(report):
        print(f"note: {printable(remark)}")
    n, places = of["n"], figures.digits(of["n"])
    print(f"\n{n:,} of {of['num_videos']:,} videos")
    for key, metric in figures.METRICS.items():
        print(f"{metric.words} {metric.shown(of[key], n)}")
    if said := figures.trained_on_them(of):
        print(said)
    print(f"95 % interval of Top-1 {of['ci95_low']:.{places}f} to {of['ci95_high']:.{places}f} % (Wilson)")
    print(not_sure.sentence(report["not_sure"]))
    if compare:
        print(two_models.comparison_sentence(report["comparison"]))
    for pair in report["confused_pairs"][:5]:
        often = f"{pair['times']:,}, {pair['share']:.0f} % of the class"
        print(f"  {printable(pair['label'])} taken for {printable(pair['predicted'])}: {often}")
    for mistake in report["mistakes"][:5]:
        sure = f"taken for {mistake['predicted']}, {100 * mistake['confidence']:.1f} % sure"
        print(printable(f"  {mistake['video_path']}: {mistake['label']} {sure}"))


# --- the report folder -----------------------------------------------------------------------------------------------


def write_report(report, matrix, ours, other, rows):
    """Write the four files of the report, each complete or not at all."""
    folder = Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with common.written_then_renamed(folder / "confusion.png") as temporary:
        temporary.write_bytes(matrix.png)
    common.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    common.write_csv(folder / "per_class.csv", list(report["per_class"][0]), report["per_class"])
    text = page.render(report, matrix, ours, other, rows, Path(manifest).parent)
    common.write_text(folder / "report.html", text)


if __name__ == "__main__":
    main()
