"""Tensors of preprocess_and_save.py for a model: examined, chosen by class, read, of the right kind.

numpy is imported inside the functions that need it, so that `--help` stays fast.
"""

import json
import random
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import common
from common import machine, names

from aihub import model_io


def class_balanced(rows, number):
    """`number` of the manifest rows (all, if there are fewer), as equally many of each label as can be had.

    The same rows for the same manifest, in any order of its lines.
    """
    by_label = {}
    for row in sorted(rows, key=lambda row: row["tensor_path"]):
        by_label.setdefault(row["label"], []).append(row)
    for rows_of_label in by_label.values():
        random.Random(0).shuffle(rows_of_label)
    rounds = range(max(map(len, by_label.values()), default=0))
    labels = sorted(by_label)
    return [by_label[label][i] for i in rounds for label in labels if i < len(by_label[label])][:number]


def read_clip(data_dir, row, shape):
    """The clip of a manifest row as float32 `shape` = (1, 3, T, H, W), RGB in [0, 1].

    Exits with code 2 and one sentence if the file is missing or has another shape.
    """
    import numpy as np

    path = Path(data_dir, row["tensor_path"])
    try:
        clip = np.load(path)
    except (OSError, ValueError) as e:
        common.refuse(f"the clip {path} cannot be read ({e}); run tools/preprocess_and_save.py again")
    if clip.shape != tuple(shape):
        common.refuse(
            f"the clip {path} has shape {clip.shape}, the network takes {tuple(shape)}; preprocess with its "
            f"--checkpoint, into a folder of its own (--out-root)"
        )
    return clip.astype(np.float32)


def rows_for(model, folder, number, classes=None, description=None):
    """(`number` rows of the manifest in a folder, as many of each label; how many it has).

    model: its name, for sentences; classes: the names of its classes, description: its ClipDescription, where they are
    known. Exits with code 2 and one sentence if the clips are of other classes, or were made otherwise.
    """
    rows = common.read_manifest(Path(folder, "manifest.jsonl"))
    unknown = {row["label"] for row in rows} - set(map(names.composed, classes or [row["label"] for row in rows]))
    if unknown:
        common.refuse(
            f"the clips in {folder} are of other classes than the {len(classes)} of {model}, say {min(unknown)!r}: "
            f"take clips of videos of those that it was trained on"
        )
    if description:
        check_tensors(folder, model, description)
    return class_balanced(rows, number), len(rows)


def calibration_rows(folder, number, classes=None, description=None):
    """The rows of `rows_for` that a model is calibrated with; prints how many there are."""
    rows, _ = rows_for("the model", folder, number, classes, description)
    labels = {row["label"] for row in rows}
    fewer = f"; {number} were asked for, there are no more" if len(rows) < number else ""
    print(f"calibrating with {len(rows)} clips of {len(labels)} classes from {folder}{fewer}")
    return rows


class Examined(NamedTuple):
    """What was seen of a clip's file, as plain values that JSON holds."""

    size: int  # bytes
    mtime_ns: int
    digest: str  # model_io.clip_digest; "" for another type than a float's
    shape: list
    dtype: str


def examine_all(folder, clips, known):
    """Read every clip of a folder: ({clip: Examined}, {clip: why it is left out}), in the clips' order.

    known: {clip: values of an Examined} of an earlier run; these are not read again unless size or time have changed.
    Exits with code 2 and one sentence if none is good.
    """
    from tqdm import tqdm

    good, bad = {}, {}

    def examine_one(clip):
        try:
            status = Path(folder, clip).stat()
            seen = [status.st_size, status.st_mtime_ns]
            return Examined(*(known[clip] if known.get(clip, [])[:2] == seen else [*seen, *look_into(folder, clip)]))
        except (OSError, ValueError, EOFError) as e:
            return str(e)

    with ThreadPool(machine.num_workers()) as pool, tqdm(total=len(clips), unit="clip", desc="reading") as bar:
        for clip, result in zip(clips, pool.imap(examine_one, clips, chunksize=8)):
            bar.update()
            (bad if isinstance(result, str) else good)[clip] = result
    if not good:
        common.refuse(f"none of the {len(clips):,} clips in {folder} can be used: {next(iter(bad.values()))}")
    return good, bad


def look_into(folder, clip):
    """(digest, shape, type) of a clip. Raises ValueError and what numpy raises where it is no clip in [0, 1]."""
    import numpy as np

    values, digest = np.load(Path(folder, clip)), ""
    if values.dtype in ("float32", "float16"):
        if not (values.min() >= -0.01 and values.max() <= 1.01):
            raise ValueError(
                f"values from {values.min():.3g} to {values.max():.3g} instead of [0, 1]: normalisation is inside the "
                f"model; run tools/preprocess_and_save.py again"
            )
        digest = model_io.clip_digest(values)
    return digest, list(values.shape), str(values.dtype)


def check_fit(good, tensor):
    """Exit with code 2 and one sentence if a clip has another shape than the model takes: it is not cut or padded.

    good: {clip: Examined}; tensor: the model's input, as model_io.io_of has it.
    """
    shape = model_io.ncthw(tensor["shape"])
    others = [f"{clip} is {its.dtype} {tuple(its.shape)}" for clip, its in good.items()
              if tuple(its.shape) != shape or not its.digest]  # fmt: skip
    if others:
        common.refuse(
            f"{len(others):,} of {len(good):,} clips do not fit the model, which takes float32 {shape}: "
            f"{'; '.join(others[:3])}{' …' if len(others) > 3 else ''}; preprocess with the model's CHECKPOINT"
        )


def check_tensors(folder, model, description):
    """Exit with code 2 and one sentence if a folder's tensors were made otherwise than the clips that a model takes.

    Compares settings.json in `folder`; a folder without one is taken as it is. model: its name, for the sentence.
    description: its ClipDescription.
    """
    from torchvision_patches import clip

    path = Path(folder, "settings.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        told = {key: settings[key] for key in clip.OF_PIXELS if key in settings}
        tensors, _ = clip.described(description.as_dict() | told)
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as e:
        common.refuse(f"{path} cannot be read ({e}); run tools/preprocess_and_save.py again, into an empty folder")
    if differences := description.differences(tensors):
        common.refuse(
            f"{model} takes clips of {', '.join(differences)} as the tensors in {folder} are; make them with "
            f"tools/preprocess_and_save.py --checkpoint for this model, into a folder of their own (--out-root)"
        )
