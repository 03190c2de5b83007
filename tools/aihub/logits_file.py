"""Logits of clips: the HDF5 file that evaluate.py reads, and how two sets of them agree."""

import common
from common import flags


def agreement(logits, expected):
    """How two arrays (clips, classes) agree: PSNR in dB over the peak of `expected` (None: equal), and by Top-1."""
    import numpy as np

    error = float(np.mean((logits - expected) ** 2))
    return {
        "psnr_db": round(float(10 * np.log10(float(np.abs(expected).max()) ** 2 / error)), 1) if error else None,
        "largest_difference": float(np.abs(logits - expected).max()),
        "same_top1": int((logits.argmax(1) == expected.argmax(1)).sum()),
    }


def in_words(agreed, num_clips, scale=None):
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


def write_logits(file, rows, tensor_paths, output_name):
    """Write logits into an open HDF5 file as AI Hub does, data/0/batch_<i> float32 (1, classes), and `tensor_paths`."""
    import h5py

    group = file.create_group("data/0")
    for i, row in enumerate(rows):
        group.create_dataset(f"batch_{i}", data=row[None])  # 368 bytes: gzip would make it 3 KB
    group.attrs.update({"name": output_name, "order": 0, "batch_count": len(tensor_paths)})
    file.create_dataset("tensor_paths", data=tensor_paths, dtype=h5py.string_dtype())
