"""What a report says in figures: accuracies, calibration, confusions, mistakes."""

from typing import Any, NamedTuple

from common import calibration
from common.names import digits, shortened

import numpy as np

LISTED_PAIRS = 20
LISTED_MISTAKES = 24
ALMOST_ALL = 0.9  # this share of the predictions for one class, and its videos are a tenth of all fewer: said


class Metric(NamedTuple):
    """A main figure: report.json, the printed summary, the page's tiles and its two models take it from METRICS."""

    words: str
    of: Any  # function: Predictions -> float
    is_percent: bool = True

    def shown(self, value, n, sign=""):
        """The value as text; a percentage of n clips with as many digits as they carry."""
        return f"{value:{sign}.{digits(n)}f} %" if self.is_percent else f"{value:{sign}.4f}"


def share_right(predictions, k):
    return percent(np.count_nonzero(predictions.rank < k), len(predictions.rank))


def mean_class_accuracy(predictions):
    clips, right = np.bincount(predictions.labels), np.bincount(predictions.labels, predictions.rank == 0)
    return round(100 * float((right[clips > 0] / clips[clips > 0]).mean()), 3)


def calibration_error(predictions):
    return round(calibration.expected_calibration_error(predictions.confidence, predictions.rank == 0), 4)


METRICS = {  # key in report.json: what it is
    "top1": Metric("Top-1", lambda predictions: share_right(predictions, 1)),
    "top5": Metric("Top-5", lambda predictions: share_right(predictions, 5)),
    "mean_class_accuracy": Metric("mean of the classes' accuracies", mean_class_accuracy),
    "ece": Metric("expected calibration error", calibration_error, is_percent=False),
}


def percent(count, total):
    """With the three decimals of train.py's output, in the order of its operations."""
    return round(100 * (int(count) / int(total)), 3)


def wilson(right, n):
    """The 95 % interval (low, high) of an accuracy, in percent (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(int(right), int(n)).proportion_ci(0.95, method="wilson")
    return round(100 * interval.low, 3), round(100 * interval.high, 3)


def main_figures(predictions, num_videos):
    """The main figures: those of METRICS, the interval of Top-1 in percent, and the number of clips."""
    n = len(predictions.clips)
    low, high = wilson(np.count_nonzero(predictions.rank == 0), n)
    return {key: metric.of(predictions) for key, metric in METRICS.items()} | {
        "ci95_low": low,
        "ci95_high": high,
        "n": n,
        "num_videos": num_videos,
        "partial": n < num_videos,
        "trained_on_val": "val" in predictions.about.get("train_splits", []),
    }


def confidence_curve(predictions):
    """Accuracy by confidence: one dict for each calibration bin with clips, the least sure first.

    `confidence` is the bin's mean, in [0, 1]; accuracies are in percent; surer_… is of this bin and all above it.
    """
    right, bins, curve = predictions.rank == 0, calibration.calibration_bins(predictions.confidence), []
    for number in np.unique(bins):
        inside, surer = bins == number, bins >= number
        low, high = wilson(right[inside].sum(), inside.sum())
        curve.append({
            "above": round(int(number) / calibration.BINS, 4),
            "confidence": round(float(predictions.confidence[inside].mean()), 4),
            "n": int(inside.sum()),
            "accuracy": percent(right[inside].sum(), inside.sum()),
            "ci95_low": low,
            "ci95_high": high,
            "surer_n": int(surer.sum()),
            "surer_accuracy": percent(right[surer].sum(), surer.sum()),
        })
    return curve


def confusions(predictions):
    """int64 (k, 3): [true class, predicted class, clips] of each pair that occurs, by class; k is at most the clips."""
    num_classes = len(predictions.classes)
    pairs, times = np.unique(predictions.labels * num_classes + predictions.predicted, return_counts=True)
    return np.column_stack([*np.divmod(pairs, num_classes), times])


def mistakes_of(pairs):
    """The pairs of different classes as lists, most frequent first; of equal ones by class."""
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    return wrong[np.argsort(-wrong[:, 2], kind="stable")].tolist()


def per_class(predictions, pairs):
    """One dict a class, in index order; accuracy is None for a class without clips."""
    labels, classes, worst = predictions.labels, predictions.classes, {}
    clips, right = (np.bincount(of, minlength=len(classes)) for of in (labels, labels[predictions.rank == 0]))
    for label, predicted, times in mistakes_of(pairs):
        worst.setdefault(label, (classes[predicted], times))
    return [
        {
            "class": name,
            "index": index,
            "n": int(clips[index]),
            "right": int(right[index]),
            "accuracy": percent(right[index], clips[index]) if clips[index] else None,
            "most_frequent_mistake": worst.get(index, ("", 0))[0],
            "times": worst.get(index, ("", 0))[1],
        }
        for index, name in enumerate(classes)
    ]


def confused_pairs(predictions, pairs):
    """The most frequent (true class, predicted class), most frequent first; share is of the true class's clips."""
    clips, classes = np.bincount(predictions.labels), predictions.classes
    return [
        {"label": classes[i], "predicted": classes[j], "times": times, "share": percent(times, clips[i])}
        for i, j, times in mistakes_of(pairs)[:LISTED_PAIRS]
    ]


def best_classes(predictions, position):
    """The five best [class, probability in [0, 1]] of one clip."""
    scores = calibration.softmax(predictions.logits()[position].astype(np.float64))
    return [[name, round(share, 4)] for name, share in calibration.best(scores, predictions.classes)]


def worst_mistakes(predictions, rows):
    """The wrong clips, most confident first."""
    wrong = np.flatnonzero(predictions.rank > 0)
    worst = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:LISTED_MISTAKES]
    mistakes = []
    for position in worst:
        best = best_classes(predictions, position)
        row = rows[predictions.clips[position]]
        mistakes.append(row | {"predicted": best[0][0], "confidence": best[0][1], "top5": best})
    return mistakes


def trained_on_them(figures):
    """What stands beside the accuracy of a model that saw val, "" for any other."""
    return "trained on val, too: of other videos this says nothing" if figures["trained_on_val"] else ""


def counts_and_examples(left_out):
    return {what: {"count": len(names), "first": names[:20]} for what, names in left_out.items()}


# --- sentences -------------------------------------------------------------------------------------------------------


def oddities(predictions):
    """What hardly any sound model does, as sentences: equal scores, one class for all, classes that never come."""
    scores, h5, n, classes = predictions.scores, predictions.about["h5"], len(predictions.clips), predictions.classes
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
            f"{h5}: {100 * predicted[most] / n:.{digits(n)}f} % of the predictions are {classes[most]}, which "
            f"{100 * shown[most] / n:.{digits(n)}f} % of the videos show: the model has not learnt, or its input is "
            "not what it was trained on (layout, range, normalisation)"
        )
    never = sorted(np.flatnonzero(predicted == 0).tolist(), key=lambda i: -shown[i])
    how = ""
    if n < len(classes):  # then some class cannot come
        never, how = [i for i in never if shown[i] > 1], ", though several videos show each"
    if never:
        names = shortened([classes[i] for i in never], 3)
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
            examples = ", ".join(these["first"][:3]) + (", …" if these["count"] > 3 else "")
            lines.append(f"left out of {part['about']['h5']}: {what}: {these['count']:,} ({examples})")
    return lines
