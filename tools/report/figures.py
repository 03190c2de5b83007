"""What a report says in figures: accuracies, calibration, confusions, mistakes, two models against each other."""

from dataclasses import dataclass

import common

import numpy as np

CALIBRATION_BINS = 15  # as in Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599
LISTED_PAIRS = 20
LISTED_MISTAKES = 24
ALMOST_ALL = 0.9  # this share of the predictions for one class, and its videos are a tenth of all fewer: said


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

    def only(self, positions):
        """The same of the clips at these positions alone."""
        parts = (self.clips[positions], self.labels[positions], self.scores[positions])
        return Predictions(self.about, self.notes, self.left_out, *parts)


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


def wilson(right, n):
    """The 95 % interval (low, high) of an accuracy, in percent (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(int(right), int(n)).proportion_ci(0.95, method="wilson")
    return round(100 * interval.low, 3), round(100 * interval.high, 3)


def main_figures(predictions, num_videos):
    """The main figures: accuracies in percent, ece in [0, 1]."""
    n, right = len(predictions.clips), predictions.rank == 0
    low, high = wilson(right.sum(), n)
    share_right = [right[predictions.labels == label].mean() for label in np.unique(predictions.labels)]
    return {
        "top1": percent(right.sum(), n),
        "top5": percent((predictions.rank < 5).sum(), n),
        "mean_class_accuracy": round(100 * float(np.mean(share_right)), 3),
        "ci95_low": low,
        "ci95_high": high,
        "ece": round(expected_calibration_error(predictions.confidence, right), 4),
        "n": n,
        "num_videos": num_videos,
        "partial": n < num_videos,
    }


def calibration_bins(confidence):
    """The bin of each confidence, int64 (n,) in 0 … CALIBRATION_BINS - 1; equally wide, (a, b]."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def expected_calibration_error(confidence, right):
    """Mean over clips of |accuracy - mean confidence| of the clip's bin (Guo et al. 2017, equation 3)."""
    bins = calibration_bins(confidence)
    return float(np.abs(np.bincount(bins, right) - np.bincount(bins, confidence)).sum() / len(right))


def confidence_curve(predictions):
    """Accuracy by confidence: one dict for each calibration bin with clips, the least sure first.

    `confidence` is the bin's mean, in [0, 1]; accuracies are in percent; surer_… is of this bin and all above it.
    """
    right, bins, curve = predictions.rank == 0, calibration_bins(predictions.confidence), []
    for number in np.unique(bins):
        inside, surer = bins == number, bins >= number
        low, high = wilson(right[inside].sum(), inside.sum())
        curve.append({
            "above": round(int(number) / CALIBRATION_BINS, 4),
            "confidence": round(float(predictions.confidence[inside].mean()), 4),
            "n": int(inside.sum()),
            "accuracy": percent(right[inside].sum(), inside.sum()),
            "ci95_low": low,
            "ci95_high": high,
            "surer_n": int(surer.sum()),
            "surer_accuracy": percent(right[surer].sum(), surer.sum()),
        })
    return curve


def confusion_matrix(labels, predicted, num_classes):
    """Counts int64 (num_classes, num_classes): row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def occurring(confusion):
    """Indices of the classes that occur as label or as prediction, int64 (k,)."""
    return np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))


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
    """Two files on the clips that both have: figures of each, McNemar's exact test, every clip that flips.

    McNemar's test asks how likely a split at least as uneven as the one seen is, among the clips that only one of the
    two gets right, if both were equally good: a binomial test with p = 1/2.
    """
    from scipy.stats import binomtest

    clips, *positions = np.intersect1d(predictions.clips, other.clips, assume_unique=True, return_indices=True)
    if not len(clips):
        paths = f"{predictions.about['h5']} and {other.about['h5']}"
        common.refuse(f"{paths} have no clip in common; compare two runs over the same manifest")
    ours, theirs = predictions.only(positions[0]), other.only(positions[1])
    right, other_right = ours.rank == 0, theirs.rank == 0
    lost, won = int((right & ~other_right).sum()), int((~right & other_right).sum())
    flips = np.flatnonzero(ours.predicted != theirs.predicted)
    both = [(main_figures(ours, len(rows)), ""), (main_figures(theirs, len(rows)), "other_")]
    return {
        "h5": other.about["h5"],
        "about": other.about,
        "notes": other.notes,
        "left_out": counts_and_examples(other.left_out),
        "n": len(clips),
        "agreement": percent(len(clips) - len(flips), len(clips)),
        **{who + key: of[key] for key in ("top1", "top5", "mean_class_accuracy", "ece") for of, who in both},
        "both_right": int((right & other_right).sum()),
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "wrong_to_other_wrong": len(flips) - lost - won,
        "mcnemar_p": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
        "other_confidence_curve": confidence_curve(theirs),
        "per_class": changes(ours.labels, right, other_right, classes),
        "flips": [
            {
                "video_path": rows[clips[i]]["video_path"],
                "label": rows[clips[i]]["label"],
                "predicted": classes[ours.predicted[i]],
                "other_predicted": classes[theirs.predicted[i]],
            }
            for i in flips
        ],
    }


def changes(labels, right, other_right, classes):
    """The classes of which the other file gets more or fewer clips right, those that lose most first."""
    n, ours, theirs = (np.bincount(labels, weights, len(classes)).astype(int) for weights in (None, right, other_right))
    return [
        {
            "class": classes[i],
            "index": int(i),
            "n": int(n[i]),
            "accuracy": percent(ours[i], n[i]),
            "other_accuracy": percent(theirs[i], n[i]),
        }
        for i in np.argsort(theirs - ours, kind="stable")
        if ours[i] != theirs[i]
    ]


def counts_and_examples(left_out):
    return {what: {"count": len(names), "first": names[:20]} for what, names in left_out.items()}


def some(names, count):
    """The first three of `count` names."""
    return ", ".join(names[:3]) + (", …" if count > 3 else "")


# --- sentences -------------------------------------------------------------------------------------------------------


def oddities(predictions, classes):
    """What hardly any sound model does, as sentences: equal scores, one class for all, classes that never come."""
    scores, h5, n = predictions.scores, predictions.about["h5"], len(predictions.clips)
    predicted, shown = (np.bincount(of, minlength=len(classes)) for of in (predictions.predicted, predictions.labels))
    lines, flat = [], int((scores.max(axis=1) == scores.min(axis=1)).sum())
    if flat:
        lines.append(f"{h5}: {flat:,} of {n:,} predictions give all classes the same score, so they say nothing")
    if flat == n:
        return lines
    if n > 1 and (scores == scores[0]).all():
        lines.append(f"{h5}: all {n:,} predictions are the same to the last digit, whatever the video shows")
    most = predicted.argmax()
    if n > 1 and predicted[most] >= ALMOST_ALL * n and predicted[most] > shown[most] + n / 10:
        lines.append(
            f"{h5}: {100 * predicted[most] / n:.1f} % of the predictions are {classes[most]}, which "
            f"{100 * shown[most] / n:.1f} % of the videos show: the model has not learnt, or its input is not what it "
            "was trained on (layout, range, normalisation)"
        )
    never = sorted(np.flatnonzero(predicted == 0).tolist(), key=lambda i: -shown[i])
    how = ""
    if n < len(classes):  # then some class cannot come
        never, how = [i for i in never if shown[i] > 1], ", though several videos show each"
    if never:
        names = some([classes[i] for i in never], len(never))
        videos, those = shown[never].sum(), np.count_nonzero(shown[never])
        which = f"{videos:,} videos show {'them' if those == len(never) else f'{those} of them'}"
        lines.append(f"{h5}: {len(never)} of {len(classes)} classes are never predicted{how} ({names}); {which}")
    return lines


def remarks(report):
    """Everything a reader must know before the figures, as sentences."""
    lines, parts = [], [report] + ([report["comparison"]] if "comparison" in report else [])
    for part in parts:
        lines += part["notes"]
        for what, these in part["left_out"].items():
            count, examples = these["count"], some(these["first"], these["count"])
            lines.append(f"left out of {part['about']['h5']}: {what}: {count:,} ({examples})")
    return lines


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
