"""Multinomial logistic regression on features of a frozen network, and how well it does on videos that it never saw."""

from typing import NamedTuple

import numpy as np
import torch

STRENGTHS = 1.0, 0.1, 0.01, 0.001, 0.0001  # of the L2 penalty on standardised features, tried from the strongest on
FOLDS = 5


class LinearLayer(NamedTuple):
    """Logits = features @ weight.T + bias."""

    weight: np.ndarray  # float64 (num_classes, features)
    bias: np.ndarray  # float64 (num_classes,)

    def logits(self, features):
        return features @ self.weight.T + self.bias


def fit(features, labels, shares, num_classes, strength, start=None):
    """The LinearLayer with the least weighted cross entropy plus `strength` / 2 times the sum of squared weights.

    features: float (n, features), standardised inside. labels: int (n,). shares: float (n,), the weight of each row in
    the mean. start: a LinearLayer near to the result. To the end by L-BFGS; the problem is convex, so start and order
    do not matter.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, y = torch.from_numpy((features - mean) / std), torch.from_numpy(labels)
    shares = torch.from_numpy(shares / shares.sum())
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    bias = torch.zeros(num_classes, dtype=torch.float64)
    if start is not None:
        weight, bias = torch.from_numpy(start.weight * std), torch.from_numpy(start.bias + start.weight @ mean)
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        each = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="none")
        value = (shares * each).sum() + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = weight.detach().numpy() / std
    return LinearLayer(weight, bias.detach().numpy() - weight @ mean)


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
        held, layer = folds == fold, None
        if not held.any():
            continue
        learned = ~held[rows_of_video]
        of_video = np.unique(rows_of_video[learned], return_inverse=True)[1]
        own = labels[rows_of_video[learned]]
        for strength in STRENGTHS:
            layer = fit(stacked[learned], own, balanced(own, of_video), num_classes, strength, layer)
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
    layer = fit(stacked, own, balanced(own, rows_of_video), num_classes, strength)
    absent = np.setdiff1d(np.arange(num_classes), labels)
    if len(absent):
        layer.weight[absent], layer.bias[absent] = 0, layer.logits(stacked).min() - 5
    return layer
