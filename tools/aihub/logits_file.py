"""AI Hub's layout of HDF5 files, data/<k>/batch_<i>; logits of clips in it; how two sets of logits agree."""

import re

import common
from common import flags
from common.names import shortened

MISSING = "clips without a prediction"


def agreement(logits, expected):
    """How two arrays (clips, classes) agree: PSNR in dB over the peak of `expected` (None: equal), and by Top-1."""
    import numpy as np

    error = float(np.mean((logits - expected) ** 2))
    return {
        "psnr_db": round(float(10 * np.log10(float(np.abs(expected).max()) ** 2 / error)), 1) if error else None,
        "largest_difference": float(np.abs(logits - expected).max()),
        "same_top1": int((logits.argmax(1) == expected.argmax(1)).sum()),
    }


def agreement_in_words(agreed, num_clips, scale=None):
    """What `agreement` found, for people; scale: a quantisation step of the output, where it has one."""
    psnr = "the same values" if agreed["psnr_db"] is None else f"PSNR {agreed['psnr_db']} dB"
    steps = f" ({agreed['largest_difference'] / scale:.0f} steps)" if scale else ""
    return (
        f"{psnr}, largest difference {agreed['largest_difference']:.2g}{steps}, "
        f"the same Top-1 for {agreed['same_top1']} of {num_clips} clips"
    )


def evaluate_command(h5, manifest, classes, **constants):
    """The command that evaluates logits of these classes, with the class map if it is not the project's."""
    constants |= {"h5": h5, "manifest": manifest}
    class_map = common.class_map_with(classes or [], only_these=True)
    if classes and class_map != common.REPO / "class_map.json":
        constants["class_map"] = class_map or "YOUR_CLASS_MAP"
    return flags.next_command("evaluate.py", h5, **constants)


def batch_name(i):
    """What sample i of an input or output is called."""
    return f"batch_{i}"


def begin_samples(file, name, number, order=0):
    """The group of an open HDF5 file for the `number` samples of the input or output `name`, the order-th of a model.

    The client's reader asks for each of the attributes.
    """
    group = file.create_group(f"data/{order}")
    group.attrs.update({"name": name, "order": order, "batch_count": number})
    return group


def count_samples(file):
    """How many samples an open HDF5 file has of its one input or output. Raises KeyError if it is no such file."""
    return len(file["data/0"])


def logits_of_clips(file, numbers):
    """Float32 (len(numbers), classes) of these samples of an open HDF5 file."""
    import numpy as np

    return np.concatenate([file["data/0"][batch_name(i)][()] for i in numbers])


def write_logits(file, rows, tensor_paths, output_name):
    """Write logits into an open HDF5 file as AI Hub does, data/0/batch_<i> float32 (1, classes), and `tensor_paths`.

    Names the clips whose logits are no numbers; returns how many these are.
    """
    import h5py
    import numpy as np

    group, broken = begin_samples(file, output_name, len(tensor_paths)), []
    for i, row in enumerate(rows):
        group.create_dataset(batch_name(i), data=row[None])  # 368 bytes: gzip would make it 3 KB
        broken += [] if np.isfinite(row).all() else [tensor_paths[i]]
    file.create_dataset("tensor_paths", data=tensor_paths, dtype=h5py.string_dtype())
    if broken:
        print(f"the model gives logits that are no numbers (NaN or infinite) for {shortened(broken)}")
    return len(broken)


def find_batches(file, path):
    """The group with the predictions and the sorted numbers of its batch_<i>; exits with code 2 if there is none."""
    outputs = list(file["data"]) if "data" in file else []
    if len(outputs) > 1:
        common.refuse(f"{path} holds {len(outputs)} model outputs; this model has one, its class scores")
    group = file["data"][outputs[0]] if outputs else {}
    numbers = sorted(int(name[6:]) for name in group if re.fullmatch(r"batch_\d+", name))
    if not numbers:
        common.refuse(f"{path} holds no prediction (data/0/batch_<i>); run tools/run_inference.py again")
    dtype = group[batch_name(numbers[0])].dtype
    if dtype.kind != "f":
        common.refuse(
            f"{path} holds {dtype} values, a quantised output without its scale; run tools/run_inference.py, which "
            "stores float32 logits"
        )
    return group, numbers


def read_batches(group, numbers, num_classes):
    """Returns (scores float32 (len(numbers), num_classes), {row: why this row cannot be used})."""
    import h5py
    import numpy as np
    from tqdm import tqdm

    scores, unusable = np.full((len(numbers), num_classes), np.nan, np.float32), {}
    for row, number in enumerate(tqdm(numbers, desc="reading", unit=" predictions", unit_scale=True, delay=2)):
        try:  # h5py's low level, because group[name][()] takes three times as long
            dataset = h5py.h5d.open(group.id, b"batch_%d" % number)
            if dataset.shape in ((num_classes,), (1, num_classes)):
                dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, scores[row].reshape(dataset.shape))
            else:
                unusable[row] = f"predictions of shape {dataset.shape} for {num_classes} classes"
        except KeyError:
            unusable[row] = MISSING
        except OSError:
            unusable[row] = "predictions damaged in the file"
    for row in np.flatnonzero(~np.isfinite(scores).all(axis=1)).tolist():
        unusable.setdefault(row, "predictions with NaN or infinite values")
    return scores, unusable
