"""Probabilities of logits, and how far they can be trusted: a temperature, and a threshold below which to say nothing.

`fit_calibration` finds both, for training, teach.py and evaluate.py; whoever shows a label divides logits by the
temperature and lets `label_of` say "not sure" below the threshold. A checkpoint, and what stands beside a model made of
it, keeps them as `temperature` (above 0; 1 changes nothing) and `threshold` (a probability, or None where none keeps
the promise).
"""

from typing import NamedTuple

import numpy as np

BINS = 15  # of the expected calibration error, as in Guo et al. 2017, arXiv 1706.04599
WANTED = 0.95  # share of right ones among the answers given that the threshold promises
FEWEST_ANSWERS = 20  # a share of 95 % can first be told from a perfect one where one mistake in 20 is allowed
MOST_FITTED = 20_000  # clips, evenly picked: one number needs no more, and it is found in a second
NOT_SURE = "not sure"  # the label of a clip whose best class is below the threshold
NO_NUMBERS = "the network's logits of it are no numbers (NaN or infinite)"  # why a clip has no label
TEMPERATURES = 0.05, 20.0  # a fit that ends here has run away: few clips, or none of them wrong


class Calibration(NamedTuple):
    """What `fit_calibration` returns."""

    temperature: float  # logits are divided by it
    threshold: float | None  # the lowest probability of an answer, after the temperature; None: no promise can be kept


def calibration_of(known):
    """The Calibration that a checkpoint, or the description beside a model, holds, a dict; None where it holds none."""
    if known.get("temperature") is None or "threshold" not in known:
        return None
    return Calibration(float(known["temperature"]), known["threshold"])


def label_of(best, threshold):
    """What to say of a clip whose best class is `best`, (class, probability after the temperature).

    Returns that class, or NOT_SURE where the probability is below the threshold; a threshold of None is never missed.
    """
    name, probability = best
    return NOT_SURE if threshold is not None and probability < threshold else name


def softmax(logits):
    """Probabilities of logits float (…, num_classes)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def best(probabilities, classes, number=5):
    """[(class, probability)] of the most probable classes; of equal ones the first."""
    order = np.argsort(-probabilities, kind="stable")[:number]
    return [(classes[i], float(probabilities[i])) for i in order]


def confidence(logits, temperature=1.0):
    """Probability of the best class, float64 (n,), of logits (n, num_classes)."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    return 1 / np.exp(scaled).sum(axis=1, dtype=np.float64)


def fit_temperature(logits, labels):
    """The temperature with the least negative log likelihood of the labels int (n,) (Guo et al. 2017, section 4.2)."""
    from scipy.optimize import minimize_scalar

    step = -(-len(labels) // MOST_FITTED)
    logits, labels = logits[::step], labels[::step]
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    own = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature):
        temperature = np.exp(log_temperature)
        return (np.log(np.exp(shifted / temperature).sum(axis=1)) - own / temperature).mean()

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def fit_threshold(confidence, right):
    """The lowest confidence such that of the answers as sure or surer at least the share WANTED is right.

    confidence: float (n,); right: bool (n,). Returns None if no threshold that leaves FEWEST_ANSWERS answers does.
    """
    order = np.argsort(-confidence, kind="stable")
    surer = confidence[order]
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last_of_equals = np.append(surer[1:] != surer[:-1], True)
    kept = np.flatnonzero(last_of_equals & (share >= WANTED) & (np.arange(1, len(order) + 1) >= FEWEST_ANSWERS))
    return float(surer[kept[-1]]) if len(kept) else None


def fit_calibration(logits, labels):
    """The Calibration of validation logits float (n, num_classes) and their labels int (n,)."""
    temperature = fit_temperature(logits, labels)
    return Calibration(temperature, fit_threshold(confidence(logits, temperature), logits.argmax(1) == labels))


def fit_if_told(logits, labels):
    """The Calibration, or None where the clips tell no temperature: they are few, none is wrong, it runs away."""
    low, high = TEMPERATURES
    told = len(labels) >= FEWEST_ANSWERS and (logits.argmax(1) != labels).any()  # sharp and right, any one would do
    found = fit_calibration(logits, labels) if told else None
    return found if found and 1.1 * low < found.temperature < high / 1.1 else None


def calibration_bins(confidence):
    """The bin of each confidence, int64 (n,) in 0 … BINS - 1; equally wide, (a, b]."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def expected_calibration_error(confidence, right):
    """Mean over clips of |accuracy - mean confidence| of the clip's bin (Guo et al. 2017, equation 3)."""
    bins = calibration_bins(confidence)
    return float(np.abs(np.bincount(bins, right) - np.bincount(bins, confidence)).sum() / len(right))
