"""The pictures of a report."""

import numpy as np

import common
from report.figures import taken_for

FRAMES_PER_MISTAKE = 4


def new_figure(width, height):
    """A matplotlib Figure of width x height inches; without pyplot, so no display is ever looked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def save_figure(figure, path):
    with common.written_then_renamed(path) as temporary:
        figure.savefig(temporary, format="png")


def say_instead(path, sentence):
    """A picture that says why there is nothing to show, so that no older picture stays in its place."""
    figure = new_figure(6, 1)
    figure.text(0.5, 0.5, sentence, ha="center", va="center")
    save_figure(figure, path)


def draw_confusion(path, confusion, classes):
    """Confusion matrix in percent of each true class, over the classes that occur as label or prediction."""
    shown = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    totals = confusion.sum(axis=1)[shown, None]
    share = 100 * confusion[np.ix_(shown, shown)] / np.maximum(totals, 1)
    side = 3.5 + max(0.28 * len(shown), 2.5)
    figure = new_figure(side, side)
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
    save_figure(figure, path)


def draw_confused_pairs(path, pairs):
    """Bars of the most frequent (true class, predicted class)."""
    if not pairs:
        return say_instead(path, "no class was taken for another")
    figure = new_figure(10, 1.2 + 0.32 * len(pairs))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(pairs)), [pair["times"] for pair in pairs], color="#2a6fb0")
    axes.bar_label(bars, [f"{pair['times']:,} ({pair['share']:.0f} %)" for pair in pairs], padding=4, size=9)
    axes.set_yticks(range(len(pairs)), [f"{pair['label']} → {pair['predicted']}" for pair in pairs])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="videos (percent of the true class)", title="Most confused: true class → predicted class")
    save_figure(figure, path)


def draw_mistakes(path, mistakes, tensors):
    """Contact sheet: some frames of each clip under the folder `tensors`, what it shows and what it was taken for."""
    if not mistakes:
        return say_instead(path, "no video was taken for another class")
    columns = min(3, len(mistakes))
    figure = new_figure(5 * columns, 2.05 * -(-len(mistakes) // columns))
    for axes, mistake in zip(figure.subplots(-(-len(mistakes) // columns), columns, squeeze=False).flat, mistakes):
        strip = frames_of(tensors / mistake["tensor_path"])
        if isinstance(strip, str):
            axes.text(0.5, 0.5, strip, ha="center", va="center", color="0.4", transform=axes.transAxes)
            strip = np.full((112, 112 * FRAMES_PER_MISTAKE, 3), 0.93)
        axes.imshow(strip)
        axes.set_title(taken_for(mistake).replace(" taken", "\ntaken", 1), size=9, loc="left")
        axes.text(0, -0.05, shortened(mistake["video_path"]), size=7, color="0.4", va="top", transform=axes.transAxes)
    for axes in figure.axes:
        axes.axis("off")
    save_figure(figure, path)


def frames_of(tensor_path):
    """Some frames side by side, float32 (H, about frames x W, 3) in [0, 1], or a sentence why there are none."""
    try:
        clip = np.load(tensor_path, mmap_mode="r")  # (1, 3, T, H, W)
    except FileNotFoundError:
        return "tensor not found"
    except (OSError, ValueError, EOFError):
        return "tensor cannot be read"
    if clip.ndim != 5 or clip.shape[1] != 3:
        return f"tensor of shape {clip.shape}"
    picked = np.linspace(0, clip.shape[2] - 1, FRAMES_PER_MISTAKE).round().astype(int)
    gap = ((0, 0), (0, 3), (0, 0))
    frames = [np.pad(clip[0, :, t].transpose(1, 2, 0), gap, constant_values=1) for t in picked]
    return np.concatenate(frames, axis=1)[:, :-3].clip(0, 1)


def shortened(text, longest=70):
    return text if len(text) <= longest else f"…{text[-longest + 1 :]}"
