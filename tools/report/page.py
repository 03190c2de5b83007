"""report.html: the whole report as one document that needs no other file and no network."""

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import numpy as np
from tqdm import tqdm

from report import figures, not_sure, thumbnails, two_models

LISTED_VIDEOS = 20_000  # with a picture each the page holds 2 KB a video; of more, each class gets an equal part
FRAMES_PER_MISTAKE = 4
READERS = 8  # threads: a clip that is not in memory is mostly waited for


def render(report, matrix, predictions, other, rows, tensors):
    """The text of report.html, around thumbnails.draw_confusion's Matrix.

    `tensors` is the folder of the clips, `other` a second file's Predictions or None.
    """
    classes = predictions.classes
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    mistakes = [tensors / mistake["tensor_path"] for mistake in report["mistakes"]]
    return environment.get_template("report.html").render(
        report=report,
        trained=figures.trained_on_them(report["figures"]),
        remarks=figures.remarks(report),
        metrics=figures.METRICS,
        digits=figures.digits,
        two_models=two_models,
        not_sure=not_sure,
        names=names_of_files(predictions, other),
        index={name: i for i, name in enumerate(classes)},
        matrix=matrix,
        strips=[thumbnails.thumbnail(path, FRAMES_PER_MISTAKE) for path in mistakes],
        data={"classes": classes, "videos": videos(predictions, other, rows, tensors)},
        num_videos=len(predictions.clips),
    )


def names_of_files(predictions, other):
    """What the page calls the one or two files."""
    paths = [these.about["h5"] for these in (predictions, other) if these]
    short = [Path(path).stem for path in paths]
    return short if len(set(short)) == len(short) else paths


def videos(predictions, other, rows, tensors):
    """The clips of the page's list, mistakes first: [video, label, predicted, confidence in percent, picture, …].

    Labels and predictions are class indices, the picture is base64 of a WebP; with `other`, its prediction and
    confidence follow, None for a clip that it lacks.
    """
    listed = listed_first(predictions, other)
    with ThreadPoolExecutor(READERS) as pool:
        paths = [tensors / rows[predictions.clips[i]]["tensor_path"] for i in listed]
        found = pool.map(thumbnails.thumbnail, paths, [1] * len(paths))
        frames = list(tqdm(found, desc="pictures", total=len(paths), unit="clip", delay=2))
    table = []
    for i, frame in zip(listed.tolist(), frames):
        label, predicted = int(predictions.labels[i]), int(predictions.predicted[i])
        row = [rows[predictions.clips[i]]["video_path"], label, predicted, round(100 * predictions.confidence[i], 1)]
        table.append([*row, frame])
    if other:
        place = {clip: k for k, clip in enumerate(other.clips.tolist())}
        for row, i in zip(table, listed):
            k = place.get(int(predictions.clips[i]))
            row += [None, None] if k is None else [int(other.predicted[k]), round(100 * other.confidence[k], 1)]
    return table


def listed_first(predictions, other):
    """Positions of at most LISTED_VIDEOS clips: mistakes first, the most confident first, then the least sure.

    What only `other` gets wrong comes between. Of more clips, each class gets its first ones, an equal part.
    """
    wrong = predictions.rank > 0
    group = np.where(wrong, 0, 2)
    if other:
        group[~wrong & np.isin(predictions.clips, other.clips[other.rank > 0])] = 1
    order = np.lexsort((np.where(wrong, -1, 1) * predictions.confidence, group))
    if len(order) <= LISTED_VIDEOS:
        return order
    labels = predictions.labels[order]
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    part = LISTED_VIDEOS // len(np.unique(labels))
    return order[np.sort(by_class[np.arange(len(order)) - starts < part])]
