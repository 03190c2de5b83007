"""When a model should rather say "not sure": a temperature and a threshold, and what they leave."""

import zlib

from common import calibration

import numpy as np

STEPS = 20  # points of the curve of coverage against accuracy
FEWEST = 2 * calibration.FEWEST_ANSWERS  # clips; half of them must be able to keep the promise


def halves(rows, clips):
    """Which half each clip is in, bool (n,): by a checksum of its video's name, so that it is the same every time."""
    names = (rows[clip]["video_path"].encode("utf-8", "surrogateescape") for clip in clips)
    return np.array([zlib.crc32(name) % 2 == 1 for name in names])


def fitted(predictions, rows):
    """Temperature and threshold of all clips, and what they are worth, found on one half and used on the other.

    Returns a dict for report.json: `threshold` is None where none keeps the promise `wanted`; shares in percent.
    None for fewer clips than FEWEST. `curve` tells coverage and accuracy over all thresholds.
    """
    n, right, logits = len(predictions.clips), predictions.rank == 0, predictions.logits()
    if n < FEWEST:
        return None
    temperature, threshold = calibration.fit_calibration(logits, predictions.labels)
    half, sure, answered = halves(rows, predictions.clips), np.zeros(n), np.zeros(n, bool)
    for fit_on, use_on in (half, ~half), (~half, half):
        if not fit_on.any() or not use_on.any():
            continue
        of_half = calibration.fit_calibration(logits[fit_on], predictions.labels[fit_on])
        sure[use_on] = calibration.confidence(logits[use_on], of_half.temperature)
        answered[use_on] = of_half.threshold is not None and sure[use_on] >= (of_half.threshold or 0)
    order = np.argsort(-calibration.confidence(logits, temperature), kind="stable")
    counts = np.unique(np.ceil(np.arange(1, STEPS + 1) * n / STEPS).astype(int))
    return {
        "temperature": round(temperature, 4),
        "threshold": threshold if threshold is None else round(threshold, 4),
        "wanted": 100 * calibration.WANTED,
        "ece": round(calibration.expected_calibration_error(predictions.confidence, right), 4),
        "ece_after": round(calibration.expected_calibration_error(sure, right), 4),
        "coverage": round(100 * float(answered.mean()), 3),
        "answered": int(answered.sum()),
        "answered_right": int(right[answered].sum()),
        "curve": [
            {"coverage": round(100 * int(count) / n, 3), "accuracy": round(100 * float(right[order[:count]].mean()), 3)}
            for count in counts
        ],
    }


def sentence(report):
    """What `fitted` found, for people."""
    if report is None:
        return f"too few clips to say when the model should not be sure: {FEWEST} are needed"
    said = f"temperature {report['temperature']:.2f}: expected calibration error {report['ece_after']:.4f} after it"
    if report["threshold"] is None:
        return f"{said}; no threshold leaves answers of which {report['wanted']:.0f} % are right"
    said += f"; \"not sure\" below {100 * report['threshold']:.0f} %"
    if not report["answered"]:
        return f"{said}, but half of the clips are too few to try it on the others"
    share = 100 * report["answered_right"] / report["answered"]
    return (
        f"{said} answers {report['coverage']:.0f} % of the videos, of which {share:.0f} % are right (fitted on one "
        "half, tried on the other)"
    )
