"""The pictures of a report: the confusion matrix as a PNG, frames of clips as WebP."""

import base64
import io
import warnings
from typing import NamedTuple

from common import fonts
from common.names import printable

import numpy as np

MATRIX_CLASSES = 100  # drawn at most: QEVD's 92 do, 1,000 would take 3 GB
NAME_LENGTH = 48  # characters of a class name in the picture; longer ones leave no room for the matrix
SIDE = 112  # pixels of a thumbnail, at most
QUALITY = 40  # of WebP: 1.2 KB a frame of real video; JPEG takes 2.0 KB to look as good


class Matrix(NamedTuple):
    """A drawn confusion matrix."""

    png: bytes
    width: int  # pixels
    height: int
    cells: list  # of {x, y, side in pixels, label, predicted: class indices, times, share in percent}
    notes: list  # what the picture does not show, as sentences


def draw_confusion(pairs, classes):
    """The Matrix of `figures.confusions`, in percent of each true class, over the classes that occur."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot no display is ever looked for

    shown, totals, notes = shown_classes(pairs, len(classes))
    names = [printable(classes[i]) for i in shown]
    names = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name in names]
    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is a dollar sign
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *families_for("".join(names), notes)]
    place = {index: k for k, index in enumerate(shown)}
    part = [(place[i], place[j], times) for i, j, times in pairs.tolist() if i in place and j in place]
    share = np.zeros((len(shown), len(shown)))
    for i, j, times in part:
        share[i, j] = 100 * times / totals[shown[i]]
    side = 3.5 + max(0.28 * len(shown), 2.5)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    # colours by square root, so that a few percent can be seen
    axes.pcolormesh(np.sqrt(share), cmap="Blues", vmin=0, vmax=10, edgecolors="0.88", linewidth=0.5)
    for i, j in np.argwhere(share >= 0.5):
        color = "white" if share[i, j] > 40 else "black"
        axes.text(j + 0.5, i + 0.5, f"{share[i, j]:.0f}", ha="center", va="center", size=7, color=color)
    middles = np.arange(len(shown)) + 0.5
    axes.set_xticks(middles, names, rotation=90, size=8)
    axes.set_yticks(middles, [f"{name} ({totals[i]:,})" for name, i in zip(names, shown)], size=8)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.tick_params(length=0, labeltop=len(shown) > 30)
    axes.set(xlabel="predicted class", ylabel="true class (number of videos)")
    axes.set_title("Predictions in percent of each true class")
    content = io.BytesIO()
    with warnings.catch_warnings(record=bool(notes)):  # each glyph that no font has; `notes` says it once
        figure.savefig(content, format="png")
    width, height = figure.canvas.get_width_height()
    corners = axes.transData.transform([(j, i) for i, j, _ in part])
    step = float(np.diff(axes.transData.transform([(0, 0), (1, 0)])[:, 0])[0])
    cells = [
        {"x": round(float(x), 1), "y": round(float(height - y), 1), "side": round(step, 1), "label": shown[i],
         "predicted": shown[j], "times": times, "share": share[i, j]}
        for (i, j, times), (x, y) in zip(part, corners)
    ]  # fmt: skip
    return Matrix(content.getvalue(), width, height, cells, notes)


def shown_classes(pairs, num_classes):
    """(the classes to draw, as sorted indices, the videos of all classes, notes): those that occur.

    Of more than MATRIX_CLASSES, those that most videos are mistaken from or for: a picture's side grows with classes.
    """
    totals = np.bincount(pairs[:, 0], pairs[:, 2], num_classes).astype(int)
    occurring, mistaken = np.unique(pairs[:, :2]), np.zeros(num_classes, int)
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    for column in 0, 1:
        np.add.at(mistaken, wrong[:, column], wrong[:, 2])
    shown = occurring[np.argsort(-mistaken[occurring], kind="stable")][:MATRIX_CLASSES]
    notes = []
    if len(shown) < len(occurring):
        notes.append(f"the matrix shows {len(shown)} of {len(occurring):,} classes: those mistaken most often")
    return sorted(shown.tolist()), totals, notes


def families_for(text, notes):
    """Names of the font families that matplotlib needs for a text; what no font has becomes a note."""
    from matplotlib import font_manager, ft2font

    files, missing = fonts.fonts_with(text)
    if missing:
        notes.append(
            f"no font of this machine has {len(missing)} characters of the class names ({missing[:10]}): confusion.png "
            "has boxes in their place; on Debian and Ubuntu, fonts-noto-cjk has Chinese, Japanese and Korean"
        )
    for file in files:
        font_manager.fontManager.addfont(file)
    return [ft2font.FT2Font(file).family_name for file in files]


def thumbnail(tensor, num_frames):
    """Frames of a clip side by side, evenly picked from its middle outwards, as base64 of a WebP.

    `tensor` is the path of a .npy, float (1, 3, T, H, W) in [0, 1]. Returns "" where there is none that can be read.
    """
    from PIL import Image

    try:
        clip = np.load(tensor, mmap_mode="r")
        batch, channels, length, height, width = clip.shape
        picked = ((np.arange(num_frames) + 0.5) / num_frames * length).astype(int)
        frames = np.concatenate(clip[0][:, picked].transpose(1, 2, 3, 0), axis=1)  # (H, num_frames x W, 3)
        image = Image.fromarray((np.nan_to_num(frames).clip(0, 1) * 255).astype(np.uint8))
    except (OSError, ValueError, EOFError, TypeError):
        return ""
    image.thumbnail((SIDE * num_frames, SIDE))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=QUALITY, method=2)
    return base64.b64encode(content.getvalue()).decode()
