"""Multinomial logistic regression on features of a frozen network, and how well it does on videos that it never saw."""

import contextlib
from typing import NamedTuple

import numpy as np
import torch

STRENGTHS = 1.0, 0.1, 0.01, 0.001  # of the L2 penalty on whitened features, tried from the strongest on
FOLDS = 5
MANY_PRODUCTS = 1e8  # a pass over all rows, from which on several threads gain more than they cost
SHRINKAGE = 0.01  # of the covariance within a class towards a sphere: with few videos most directions are not seen


class LinearLayer(NamedTuple):
    """Logits = features @ weight.T + bias."""

    weight: np.ndarray  # float64 (num_classes, features)
    bias: np.ndarray  # float64 (num_classes,)

    def logits(self, features):
        return features @ self.weight.T + self.bias


def fit_layers(features, labels, shares, num_classes, strengths):
    """[LinearLayer of each strength] with the least weighted cross entropy plus strength / 2 times the penalty.

    features: float (n, features). labels: int (n,). shares: float (n,), the weight of each row in the mean. The penalty
    is the sum of squared weights on features that are whitened: what videos of one class differ in, people and rooms,
    counts the less the more they differ. By L-BFGS; the problem is convex, so order does not matter.
    """
    with as_many_threads_as_pay(features.size * num_classes):
        shares = torch.from_numpy(shares / shares.sum())
        x, y = torch.from_numpy(np.ascontiguousarray(features)), torch.from_numpy(labels)
        mean, root = mean_and_root(x, y, shares)
        x = torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T.contiguous()
        weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        layers, to_the_end = [], dict(max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")
        for strength in strengths:
            optimizer = torch.optim.LBFGS([weight, bias], **to_the_end)

            def loss(strength=strength, optimizer=optimizer):
                optimizer.zero_grad()
                each = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="none")
                value = (shares * each).sum() + strength / 2 * weight.square().sum()
                value.backward()
                return value

            optimizer.step(loss)
            unwhitened = torch.linalg.solve_triangular(root.T, weight.detach().T, upper=True).T
            layers.append(LinearLayer(unwhitened.numpy(), (bias.detach() - unwhitened @ mean).numpy()))
    return layers


@contextlib.contextmanager
def as_many_threads_as_pay(products):
    """One thread of torch for few products a pass: on a busy machine two take ten times as long, by waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if products > MANY_PRODUCTS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mean_and_root(features, labels, shares):
    """(mean of all rows, a root of their covariance within a class): float64 (features,) and (features, features)."""
    apart = features.clone()
    for label in labels.unique():
        of_class = labels == label
        apart[of_class] -= shares[of_class] @ features[of_class] / shares[of_class].sum()
    covariance = (apart * shares[:, None]).T @ apart
    sphere = torch.eye(len(covariance), dtype=torch.float64) * (covariance.trace() / len(covariance) + 1e-12)
    return shares @ features, torch.linalg.cholesky((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere)


def balanced(labels, rows_of_video):
    """Weights of rows such that all classes count alike, and within a class all videos. float64 (n,)."""
    per_class = np.bincount(labels[np.unique(rows_of_video, return_index=True)[1]])
    return 1 / (np.bincount(rows_of_video)[rows_of_video] * per_class[labels])


def folds_of(groups, labels):
    """The fold of each video, int (videos,): no group in two of them, each class in as many as it has groups.

    -1: the only group of its class, which is always learned from, never judged. groups: a hashable a video.
    """
    groups_of_class, fold = {}, {}
    for group, label in zip(groups, labels):
        groups_of_class.setdefault(label, {})[group] = None
    place = 0
    for label in sorted(groups_of_class, key=lambda label: len(groups_of_class[label])):
        for group in groups_of_class[label]:
            if group not in fold:
                fold[group] = -1 if len(groups_of_class[label]) == 1 else place % FOLDS
                place += 1
    return np.array([fold[group] for group in groups])


class Judged(NamedTuple):
    """What `cross_validate` found."""

    strength: float  # of the penalty, the one with the least cross entropy on videos that were left out
    logits: np.ndarray  # float64 (videos, num_classes) of each video by a layer that never saw its group, or NaN


def cross_validate(features, labels, groups, num_classes):
    """Choose the penalty by leaving out groups of videos in turn. Returns Judged.

    features: a list of float (views, features) a video, row 0 the view that is scored; labels: int (videos,).
    """
    folds = folds_of(groups, labels)
    rows_of_video = np.repeat(np.arange(len(features)), [len(rows) for rows in features])
    stacked, first = np.concatenate(features).astype(np.float64), np.stack([rows[0] for rows in features])
    judged = {strength: np.full((len(features), num_classes), np.nan) for strength in STRENGTHS}
    for fold in range(FOLDS):
        held = folds == fold
        if not held.any():
            continue
        learned = ~held[rows_of_video]
        of_video = np.unique(rows_of_video[learned], return_inverse=True)[1]
        own = labels[rows_of_video[learned]]
        layers = fit_layers(stacked[learned], own, balanced(own, of_video), num_classes, STRENGTHS)
        for strength, layer in zip(STRENGTHS, layers):
            judged[strength][held] = layer.logits(first[held])
    counted = folds >= 0
    if not counted.any():
        return Judged(STRENGTHS[1], judged[STRENGTHS[1]])
    own = torch.from_numpy(labels[counted])
    losses = {
        strength: torch.nn.functional.cross_entropy(torch.from_numpy(logits[counted]), own).item()
        for strength, logits in judged.items()
    }
    strength = min(losses, key=losses.get)
    return Judged(strength, judged[strength])


def fit_all(features, labels, num_classes, strength):
    """The LinearLayer of all views of all videos; a class without a video is never the answer."""
    rows_of_video = np.repeat(np.arange(len(features)), [len(rows) for rows in features])
    stacked, own = np.concatenate(features).astype(np.float64), labels[rows_of_video]
    (layer,) = fit_layers(stacked, own, balanced(own, rows_of_video), num_classes, [strength])
    absent = np.setdiff1d(np.arange(num_classes), labels)
    if len(absent):
        layer.weight[absent], layer.bias[absent] = 0, layer.logits(stacked).min() - 5
    return layer
