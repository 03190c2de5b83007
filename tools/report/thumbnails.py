"""The pictures of a report: the confusion matrix as a PNG, frames of clips as WebP."""

import base64
import io

import common

import numpy as np

from report.figures import occurring

SIDE = 112  # pixels of a thumbnail, at most
QUALITY = 40  # of WebP: 1.2 KB a frame of real video; JPEG takes 2.0 KB to look as good


def draw_confusion(path, confusion, classes):
    """Confusion matrix in percent of each true class, over the classes that occur."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot no display is ever looked for

    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is a dollar sign
    shown = occurring(confusion)
    totals = confusion.sum(axis=1)[shown, None]
    share = 100 * confusion[np.ix_(shown, shown)] / np.maximum(totals, 1)
    side = 3.5 + max(0.28 * len(shown), 2.5)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=100)
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
    with common.written_then_renamed(path) as temporary:
        figure.savefig(temporary, format="png")


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
