"""Predictions of one HDF5 file, matched to the labels of a manifest."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import common
from common import calibration
from common.names import composed, looks_like, shortened

import numpy as np

from aihub import description, logits_file, model_io, state, tensors
from torchvision_patches import clip
from torchvision_patches.decoding import stamp

LOOKED_INTO = 100  # clips at most whose hashes are compared where many have another time; a folder was copied

OF_MODEL = ("precision", "checkpoint", "checkpoint_sha256", "train_splits", "compile_job")  # and its model's .json
ABOUT = ("model", "model_path", "model_sha256", "device", "job_ids", "output_kind")  # what an HDF5 may say of itself


@dataclass
class Predictions:
    """The predictions of one HDF5 that fit the manifest, in the manifest's order."""

    about: dict  # what the file says of itself: h5, output_kind, model, device, job_ids
    notes: list  # sentences a reader of the figures must know
    left_out: dict  # {what: [name, …]}
    classes: list  # class names, in the order of the scores
    clips: np.ndarray  # int64 (n,): indices of manifest rows, ascending
    labels: np.ndarray  # int64 (n,): true class
    scores: np.ndarray  # float32 (n, num_classes): logits or probabilities

    def __post_init__(self):
        self.predicted = self.scores.argmax(axis=1)  # int64 (n,); of equal scores the first
        self.rank = rank_of_label(self.scores, self.labels)  # int64 (n,)
        self.confidence = self.scores.max(axis=1).astype(float)  # float64 (n,): probability of the best class
        if self.about["output_kind"] == "logits":
            self.confidence = calibration.confidence(self.scores)

    def logits(self):
        """Logits float (n, num_classes); of probabilities their logarithms, which have the same softmax."""
        if self.about["output_kind"] == "logits":
            return self.scores
        return np.log(np.clip(self.scores, 1e-9, None))

    def only(self, positions):
        """The same of the clips at these positions alone."""
        parts = (self.clips[positions], self.labels[positions], self.scores[positions])
        return Predictions(self.about, self.notes, self.left_out, self.classes, *parts)

    def in_classes(self, classes):
        """The same with scores and labels in the order of `classes`, which has all of these and may have more."""
        if classes == self.classes:
            return self
        place = np.array([classes.index(name) for name in self.classes])
        lowest = -np.inf if self.about["output_kind"] == "logits" else 0
        scores = np.full((len(self.scores), len(classes)), lowest, np.float32)
        scores[:, place] = self.scores
        return Predictions(self.about, self.notes, self.left_out, classes, self.clips, place[self.labels], scores)


def rank_of_label(scores, labels):
    """How many classes stand before the true one, int64 (n,): right at Top-k is `rank < k`.

    Of equal scores the class with the lower index stands first, as in argmax. NaN must have been left out before.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def rows_of_manifest(manifest):
    """The manifest's rows without their lists of frame indices, which need 200 MB for 200,000 clips."""
    kept = "video_path", "label", "tensor_path", "shape", "source_size", "source_mtime_ns"
    rows = [{k: row[k] for k in kept if k in row} for row in common.read_manifest(manifest)]
    if len({row["tensor_path"] for row in rows}) < len(rows):
        common.refuse(f"{manifest} names a tensor_path twice; run tools/preprocess_and_save.py again")
    return rows


def load_predictions(path, manifest, rows, class_map, allow_partial=False):
    """Predictions of the HDF5 `path` for the `rows` of the manifest; exits with code 2 where the two do not fit.

    Class names are those that the file has of its model; a file that has none goes by the file `class_map`.
    `allow_partial` keeps what fits and says what was left out.
    """
    about, classes, paths, scores, unusable, notes = read_predictions(path, rows, manifest, class_map)
    if paths is None:
        notes.append(f"{path} names no tensors: its predictions were matched to the manifest by order")
        paths = [row["tensor_path"] for row in rows]
    index_of = {composed(name): index for index, name in enumerate(classes)}
    labels = [index_of.get(row["label"]) for row in rows]
    kept, left_out = match(paths, unusable, rows, labels, classes)
    if len(paths) == len(kept) == 1 < len(rows):
        left_out = {}
        notes.append(f"{path} holds one prediction (USE_SINGLE_TENSOR): the figures are those of this clip alone")
    if left_out and not (allow_partial and kept):
        refuse_mismatch(path, manifest, left_out, len(kept), len(rows))
    clips = np.array(sorted(kept))
    scores = scores[[kept[clip] for clip in clips]]
    notes += settle_output_kind(about, scores)
    about |= {key: value for key, value in description_of(about).items() if key in OF_MODEL and value}
    return Predictions(about, notes, left_out, classes, clips, np.array([labels[clip] for clip in clips]), scores)


def refuse_other_clips(predictions, manifest, rows):
    """Exit with code 2 where the model took other clips than the manifest's, whose paths may be the same."""
    described, told = predictions.about["io"], predictions.about["clip"]
    if told:
        model = f"the model of {predictions.about['h5']}"
        tensors.check_tensors(Path(manifest).parent, model, clip.described(told)[0])
    shape = json.loads(described)["input"]["shape"] if described else ()
    if len(shape) != 5:
        return
    frames = model_io.ncthw(shape)[2]
    others = {row["shape"][2] for row in rows if "shape" in row} - {frames}
    if others:
        common.refuse(
            f"{predictions.about['h5']} was made of clips of {frames} frames, {manifest} lists clips of {min(others)}; "
            f"name the manifest of those clips with --manifest"
        )


# --- the HDF5 --------------------------------------------------------------------------------------------------------


def read_predictions(path, rows, manifest, class_map):
    """Read an HDF5 in AI Hub's layout, each sample (num_classes,) or (1, num_classes).

    Returns (about, class names, tensor paths, scores float32 (n, num_classes), unusable, notes): row i of the scores is
    that of path i, and `unusable` is {row: why}. The paths are None if the file has none; then its batches are
    0 … len(rows)-1. Exits with code 2 and one sentence if the file is no such HDF5.
    """
    file, notes = open_h5(path)
    with file:
        try:
            about, classes = read_attributes(file, path), classes_of(file, path, class_map, notes)
            group, numbers = logits_file.find_batches(file, path)
            paths, numbers = paths_of(file, path, numbers, rows, manifest)
            return about, classes, paths, *logits_file.read_batches(group, numbers, len(classes)), notes
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:  # whatever else an HDF5 may hold
            common.refuse(
                f"{path} is an HDF5 file, but not laid out as AI Hub's, with a dataset data/0/batch_<i> for each clip "
                f"({e}); run tools/run_inference.py, or download the job's outputs again"
            )


def open_h5(path):
    """(the HDF5 `path`, open for reading, notes about it); exits with code 2 and one sentence if it cannot be."""
    try:
        file, because = common.open_hdf5(path)
    except FileNotFoundError:
        common.refuse(f"there is no {path}; run tools/run_inference.py first, or name another file")
    except OSError as e:
        if "unable to lock" in str(e):
            common.refuse(f"{path} is in use by another process, which writes to it; wait for it, or close it there")
        if e.errno:
            common.refuse(f"{path} cannot be read: {os.strerror(e.errno)}")
        common.refuse(f"{path} is not a complete HDF5 file ({e}); run tools/run_inference.py again")
    note = f"the drive of {path} has no locks ({because}): nothing would tell if a run were writing to it"
    return file, [note] * bool(because)


def read_attributes(file, path):
    """What the HDF5 says of itself, as far as it does, as text."""
    words = {key: str(file.attrs[key]) for key in ABOUT if key in file.attrs}
    if words.get("output_kind", "logits") not in ("logits", "probabilities"):
        common.refuse(f'{path} says its output_kind is {words["output_kind"]!r}; known: "logits", "probabilities"')
    told = json.loads(file.attrs.get("clip", "null"))
    told = clip.described(told)[0].as_dict() if told else None
    return {"h5": str(path), "io": file.attrs.get("io"), "clip": told} | words


def classes_of(file, path, class_map, notes):
    """The class names in index order: the model's own, or the class map's; a map that says otherwise is noted."""
    known = common.load_class_map(class_map)
    mapped = sorted(known, key=known.get)
    if "classes" not in file.attrs:
        return mapped
    classes = json.loads(file.attrs["classes"])
    if not isinstance(classes, list) or len(set(classes)) != len(classes):
        raise ValueError("its attribute classes is no list of different names")
    if classes != mapped and Path(class_map).resolve() != common.REPO / "class_map.json":
        notes.append(
            f"{class_map} has other classes, or another order, than the model of {path}: names and order are the "
            f"model's own"
        )
    return classes


def paths_of(file, path, numbers, rows, manifest):
    """The tensor paths of the HDF5, None if it has none, and the numbers of its batches in their order."""
    if "tensor_paths" in file:
        paths = file["tensor_paths"].asstr()[:].tolist()
        beyond = [number for number in numbers if number >= len(paths)]
        numbers = [*range(len(paths)), *beyond]
        return paths + [f"batch_{number}, which has no path" for number in beyond], numbers
    if numbers == list(range(len(rows))):
        return None, numbers
    common.refuse(
        f"{path} names no tensors, so only their order can match predictions to clips, and it has "
        f"{len(numbers):,} (batch_{numbers[0]} to batch_{numbers[-1]}) for the {len(rows):,} of {manifest}; "
        "give the manifest of exactly these clips, or run tools/run_inference.py, which stores the paths"
    )


# --- what fits -------------------------------------------------------------------------------------------------------


def match(paths, unusable, rows, labels, classes):
    """Join predictions to the manifest by tensor path; `labels` are the rows' indices in `classes`, None for none.

    Returns ({manifest row: prediction row} of what can be evaluated, {what is left out: [name, …]}).
    """
    clip_of = {row["tensor_path"]: clip for clip, row in enumerate(rows)}
    prediction_of, left_out = {}, {}
    for prediction, path in enumerate(paths):
        clip = clip_of.get(path)
        if clip is None:
            left_out.setdefault("predictions without a clip in the manifest", []).append(path)
        elif clip in prediction_of:
            left_out.setdefault("second predictions for one clip", []).append(path)
        else:
            prediction_of[clip] = prediction
    kept = {}
    for clip, row in enumerate(rows):
        if labels[clip] is None:
            name = f"{row['tensor_path']}: {row['label']}{looks_like(row['label'], classes)}"
            left_out.setdefault("labels that are no class of the model", []).append(name)
        elif clip not in prediction_of:
            left_out.setdefault(logits_file.MISSING, []).append(row["tensor_path"])
        elif prediction_of[clip] in unusable:
            left_out.setdefault(unusable[prediction_of[clip]], []).append(row["tensor_path"])
        else:
            kept[clip] = prediction_of[clip]
    return kept, left_out


def refuse_mismatch(path, manifest, left_out, fitting, total):
    """Exit with code 2, naming what does not fit with counts and examples."""
    lines = [f"{path} and {manifest} do not fit together:"]
    for what, names in left_out.items():
        lines.append(f"  {what}: {len(names):,} ({shortened(names, 3)})")
    if fitting:
        lines.append(
            "Run tools/run_inference.py again on this manifest (tools/example_export.py before it, if the network is "
            "another by now); tools/evaluate.py takes --allow-partial to evaluate "
            f"the {fitting:,} of {total:,} clips that fit."
        )
    else:
        lines.append("Nothing is left to evaluate; give the files of one and the same run.")
    common.refuse("\n".join(lines))


def settle_output_kind(about, scores):
    """Set about["output_kind"] to the file's own word, else to what the values look like; returns notes about it.

    Probabilities lie in [0, 1] and each clip's sum to 1; the margins leave room for 8-bit outputs.
    """
    looks_like = "probabilities"
    if scores.min() < -0.02 or scores.max() > 1.02 or abs(scores.sum(axis=1, dtype=np.float64).mean() - 1) > 0.05:
        looks_like = "logits"
    said = about.setdefault("output_kind", looks_like)
    if said == looks_like:
        return []
    if said == "probabilities":
        common.refuse(
            f"{about['h5']} says it holds probabilities, but its values lie between {scores.min():g} and "
            f"{scores.max():g} or do not sum to 1; run tools/run_inference.py again"
        )
    return [f"{about['h5']} says it holds logits, but they look like probabilities: calibration would then be wrong"]


# --- what was made of what -------------------------------------------------------------------------------------------


def description_of(about):
    """What example_export.py wrote beside the model of an HDF5; {} if the model is gone or another one by now."""
    beside = common.read_json(Path(about.get("model_path") or "nowhere").with_suffix(".json"))
    return beside if beside.get("sha256", "") == about.get("model_sha256") else {}


def what_is_newer(predictions, manifest, rows):
    """Sentences on the checkpoint, the model, the clips or the videos, where they changed after what was made of them.

    By the hashes, sizes and times that earlier steps wrote down; where there is a hash, the time says nothing: a file
    that is put back keeps its old one, a copy gets a new one.
    """
    about, lines = predictions.about, []
    path, model = about["h5"], about.get("model_path", "")
    if is_another(model, about.get("model_sha256"), path):
        times = f"({when(path)}, {when(model)})"
        lines.append(f"{path} is not of its model {model} as it is now {times}: run inference again")
    for checkpoint, sha256 in description.checkpoints_of(about):
        if is_another(checkpoint, sha256, model):
            lines.append(
                f"{path} is of a model that is not of its checkpoint {checkpoint} as it is now ({when(checkpoint)}): "
                f"export and run inference again"
            )
    if newer(manifest, path):
        folder, clips = Path(manifest).parent, [rows[clip]["tensor_path"] for clip in predictions.clips]
        changed = [clip for clip in clips if newer(folder / clip, path)]
        if changed and not are_copies(folder, changed, path):
            lines.append(f"{path} is older than {len(changed):,} of the clips ({when(path)}): run inference again")
        elif not any((folder / clip).exists() for clip in clips):
            lines.append(f"{path} is older than {manifest} ({when(path)}, {when(manifest)}): are the clips the same?")
    return lines


def are_copies(folder, clips, h5):
    """Whether clips of another time are those that inference saw: by the hashes in its HDF5, of some of many clips."""
    known = state.read_result(h5).get("examined", {})
    try:
        seen = [(clip, tensors.look_into(folder, clip)) for clip in clips[:: -(-len(clips) // LOOKED_INTO)]]
    except (OSError, ValueError, EOFError):
        return False
    return all([*known.get(clip, ())][2:3] == [digest] for clip, (digest, *_) in seen)


def videos_that_changed(manifest, rows):
    """A sentence, in a list, on videos that are others than when their clips were made, by size and time."""

    def changed(row):
        gone = -1, -1  # moved, or on another machine
        return stamp(row["video_path"]) not in (gone, (row["source_size"], row["source_mtime_ns"]))

    names = [row["video_path"] for row in rows if row.get("source_size") is not None and changed(row)]
    if not names:
        return []
    return [f"{len(names):,} videos have another size or time than when their clips in {manifest} were made "
            f"({shortened(names, 3)}): preprocess and run inference again"]  # fmt: skip


def is_another(path, sha256, made):
    """Whether a file that is there is another than what was made of it saw: by its hash or, without one, its time."""
    return os.path.isfile(path) and (common.sha256_of(path) != sha256 if sha256 else newer(path, made))


def newer(path, other):
    return os.path.isfile(path) and os.path.isfile(other) and os.path.getmtime(path) > os.path.getmtime(other)


def when(path):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(path)))
