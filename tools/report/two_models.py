"""Two models on the same clips: figures of each, the difference of their accuracies, every clip that flips."""

import math

import common

import numpy as np

from report import figures

LEVEL = 0.05  # 95 % intervals, and the p below which two models count as different
POWER = 0.8  # chance of telling two models apart that the number of clips needed is computed for


def comparison(predictions, other, rows):
    """`other` against `predictions`, Predictions of the same classes, on the clips that both have."""
    classes = predictions.classes
    clips, *positions = np.intersect1d(predictions.clips, other.clips, assume_unique=True, return_indices=True)
    if not len(clips):
        paths = f"{predictions.about['h5']} and {other.about['h5']}"
        common.refuse(f"{paths} have no clip in common; compare two runs over the same manifest")
    ours, theirs = predictions.only(positions[0]), other.only(positions[1])
    right, other_right = ours.rank == 0, theirs.rank == 0
    lost, won = int((right & ~other_right).sum()), int((~right & other_right).sum())
    flips = np.flatnonzero(ours.predicted != theirs.predicted)
    both = [(figures.main_figures(ours, len(rows)), ""), (figures.main_figures(theirs, len(rows)), "other_")]
    return {
        "h5": other.about["h5"],
        "about": other.about,
        "notes": other.notes,
        "left_out": figures.counts_and_examples(other.left_out),
        "n": len(clips),
        "agreement": figures.percent(len(clips) - len(flips), len(clips)),
        **{who + key: of[key] for key in figures.METRICS for of, who in both},
        "both_right": int((right & other_right).sum()),
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "wrong_to_other_wrong": len(flips) - lost - won,
        **difference(lost, won, len(clips)),
        "other_confidence_curve": figures.confidence_curve(theirs),
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


def difference(lost, won, n):
    """The second model's Top-1 minus the first's, in percentage points, of n clips: interval, p, clips that would tell.

    lost, won: clips that only the first, only the second gets right. McNemar's test asks how likely a split at least
    as uneven as lost : won is if both models were equally good: a binomial test with p = 1/2.
    """
    from scipy.stats import binomtest

    low, high = tango_interval(lost, won, n)
    return {
        "difference": figures.percent(won - lost, n),
        "difference_low": round(100 * low, 3),
        "difference_high": round(100 * high, 3),
        "mcnemar_p": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
        "clips_to_tell": clips_to_tell(lost, won, n),
    }


def tango_interval(lost, won, n):
    """The 95 % score interval (low, high) in [-1, 1] of a difference of paired shares, (won - lost) / n.

    Tango 1998, Statistics in Medicine 17, 891-908: all differences at which the score test does not reject. Unlike
    Wald's interval it holds at small numbers and is not empty where no clip, or every one, differs.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    estimate, limit = (won - lost) / n, norm.ppf(1 - LEVEL / 2)

    def score(delta):  # falls with delta, and is 0 at the estimate
        if delta == estimate:
            return 0.0
        # the most likely share of `lost` clips, given that the true difference is delta
        b, c = -won - lost + (2 * n - won + lost) * delta, -lost * delta * (1 - delta)
        share = max((math.sqrt(max(b * b - 8 * n * c, 0)) - b) / (4 * n), 0)
        variance = max(n * (2 * share + delta * (1 - delta)), 1e-12)
        return (won - lost - n * delta) / math.sqrt(variance)

    ends = []
    for side in -1, 1:  # the lower end and the upper
        outermost = side * (1 - 1e-9)
        rejected = side * estimate < 1 and -side * score(outermost) > limit
        root = brentq(lambda delta, side=side: -side * score(delta) - limit, outermost, estimate) if rejected else side
        ends.append(float(root))
    return tuple(ends)


def clips_to_tell(lost, won, n):
    """Clips on which McNemar's test would tell the two apart with POWER, were their shares as seen; None if equal.

    Connor 1987, Biometrics 43, 207-211, after Miettinen 1968.
    """
    from scipy.stats import norm

    if lost == won:
        return None
    discordant, delta = (lost + won) / n, abs(won - lost) / n
    spread = norm.ppf(1 - LEVEL / 2) * math.sqrt(discordant)
    spread += norm.ppf(POWER) * math.sqrt(max(discordant - delta**2, 0))
    return math.ceil((spread / delta) ** 2)


def changes(labels, right, other_right, classes):
    """The classes of which the other file gets more or fewer clips right, those that lose most first."""
    n, ours, theirs = (np.bincount(labels, weights, len(classes)).astype(int) for weights in (None, right, other_right))
    return [
        {
            "class": classes[i],
            "index": int(i),
            "n": int(n[i]),
            "accuracy": figures.percent(ours[i], n[i]),
            "other_accuracy": figures.percent(theirs[i], n[i]),
        }
        for i in np.argsort(theirs - ours, kind="stable")
        if ours[i] != theirs[i]
    ]


def can_be_told(against):
    """Whether the difference counts as one, and how many clips would tell, as a sentence."""
    if against["mcnemar_p"] < LEVEL:
        return "The two can be told apart."
    wanted = against["clips_to_tell"]
    if not wanted:
        return "The two cannot be told apart: each is right on as many clips."
    wanted = max(wanted, against["n"] + 1)
    return (
        f"The two cannot be told apart on {against['n']:,} clips; some {wanted:,} would tell, {100 * POWER:.0f} times "
        "in 100, were the difference as seen."
    )


def interval_in_words(against):
    """The difference of the accuracies with its interval."""
    places = max(1, figures.digits(against["n"]))
    low, high, seen = (f"{against[key]:+.{places}f}" for key in ("difference_low", "difference_high", "difference"))
    return f"difference of Top-1 {seen} points, 95 % interval {low} to {high} (Tango's score interval)"


def comparison_sentence(against):
    n = against["n"]
    scores = ", ".join(
        f"{metric.words} {metric.shown(against[key], n)} against {metric.shown(against['other_' + key], n)}"
        for key, metric in figures.METRICS.items()
    )
    return (
        f"against {against['h5']} on {n:,} clips: the same class for {against['agreement']:.{figures.digits(n)}f} %; "
        f"{scores}; only this file is right on {against['right_to_wrong']:,}, only the other on "
        f"{against['wrong_to_right']:,}, both wrong but differently on {against['wrong_to_other_wrong']:,}; "
        f"{interval_in_words(against)}; McNemar's exact p = {against['mcnemar_p']:.3g}. {can_be_told(against)}"
    )
