"""What a compiled model takes and gives: layout, type and scale of its tensors; clips and logits in that form.

numpy is imported inside the functions that need it, so that `--help` stays fast.
"""

import hashlib
import json
from pathlib import Path

import common

# in which models take their clips: the dimensions in their order; tensors lie in the first one
OURS, *_ = LAYOUTS = ("NCTHW", "NTHWC")


def layout_of(shape):
    """The one of LAYOUTS that an RGB clip's five dimensions have; None for any other shape."""
    if shape is None or len(shape) != 5:
        return None
    return next((layout for layout in reversed(LAYOUTS) if shape[layout.index("C")] == 3), None)


def shape_in(layout, shape):
    """The shape of a clip, as NCTHW, in a layout."""
    return tuple(shape[OURS.index(dimension)] for dimension in layout)


def ncthw(shape):
    """The shape of a clip as NCTHW; other shapes as they are."""
    layout = layout_of(shape)
    return tuple(shape[layout.index(dimension)] for dimension in OURS) if layout else tuple(shape)


def in_layout(clip, shape):
    """A clip (1, 3, T, H, W) in the layout of `shape`, as a view."""
    return clip.transpose([OURS.index(dimension) for dimension in layout_of(shape) or OURS])


def io_of(model):
    """What a hub model takes and gives: {"input": {name, dtype, shape, scale, zero_point}, "output": the same}.

    None where the hub does not say, as for uploaded binaries. Exits with code 2 and one sentence if the model has not
    exactly one input and one output, or its input is no RGB clip.
    """
    inputs, outputs = ([t._asdict() for tensors in spec.values() for t in tensors]
                       for spec in (model.input_spec, model.output_spec))  # fmt: skip
    if not inputs or not outputs or not inputs[0]["shape"]:
        return None
    if len(inputs) != 1 or len(outputs) != 1:
        common.refuse(f"the model {model.name} has {len(inputs)} inputs and {len(outputs)} outputs, not one of each")
    if not layout_of(inputs[0]["shape"]):
        common.refuse(f"the model's input {inputs[0]['name']} has shape {inputs[0]['shape']}, which is no RGB clip")
    return {"input": inputs[0], "output": outputs[0]}


def io_of_bundle(bundle, name):
    """What metadata.json in a bundle folder of qai_hub_models says of its model `name`, as `io_of` has it, or None."""
    try:
        metadata = json.loads(Path(bundle, "metadata.json").read_text(encoding="utf-8"))
        entry, io = metadata["model_files"][str(name)], {}
        for key in ("input", "output"):
            ((name, tensor),) = entry[f"{key}s"].items()
            unscaled = {"scale": None, "zero_point": None}
            io[key] = {"name": name, "dtype": tensor["dtype"], "shape": tensor["shape"], **unscaled}
            io[key] |= tensor.get("quantization_parameters") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or of another model or program
        return None
    return io if layout_of(io["input"]["shape"]) else None


def describe(tensor):
    """A tensor of `io_of` in words: name, type, shape, layout, quantisation."""
    words = [f"{tensor['name']}: {tensor['dtype']} {tuple(tensor['shape'] or ())}", layout_of(tensor["shape"])]
    if tensor["scale"] is not None:
        words.append(f"scale {tensor['scale']:.6g}, zero point {tensor['zero_point']:.0f}")
    return ", ".join(filter(None, words))


def check_scale(tensor):
    """Exit with code 2 and one sentence if an output of `io_of` holds integers without a scale: no logits are in it."""
    if not tensor["dtype"].startswith("float") and tensor["scale"] is None:
        common.refuse(
            f"the model gives {describe(tensor)} and does not say its scale, so its logits cannot be read; export it "
            f"for another runtime, or with --precision float"
        )


def sent_dtype(tensor):
    """The type in which clips are sent to an input of `io_of`: float32 for an integer without a scale.

    So does qai_hub_models; the service quantises what it is sent.
    """
    return "float32" if tensor["scale"] is None and not tensor["dtype"].startswith("float") else tensor["dtype"]


def bytes_of_clip(tensor):
    """Of a clip as it is sent to an input of `io_of`, before compression."""
    import numpy as np

    return int(np.prod(tensor["shape"])) * np.dtype(sent_dtype(tensor)).itemsize


def as_model_input(clip, tensor):
    """Float32 (1, 3, T, H, W) in [0, 1] as the layout and type of a model's input (`io_of(model)["input"]`).

    An integer input is quantised: round(value / scale) + zero point, clipped to the type's range.
    """
    import numpy as np

    clip = in_layout(clip, tensor["shape"])
    if tensor["scale"] is not None:
        limits = np.iinfo(tensor["dtype"])
        clip = (np.rint(clip / tensor["scale"]) + tensor["zero_point"]).clip(limits.min, limits.max)
    return np.ascontiguousarray(clip, dtype=sent_dtype(tensor))


def clip_digest(clip):
    """A hash of a clip's values, as float32 in C order; 32 hex digits."""
    import numpy as np

    return hashlib.blake2b(np.ascontiguousarray(clip, dtype=np.float32), digest_size=16).hexdigest()


def as_logits(output, tensor):
    """A model's output as float32; integers are (value - zero point) * scale of `io_of(model)["output"]`.

    Raises ValueError for integers without a scale.
    """
    import numpy as np

    if output.dtype.kind == "f":
        return output.astype(np.float32)
    if tensor["scale"] is None:
        raise ValueError(f"the outputs are {output.dtype} and the model does not say their scale")
    return ((output.astype(np.float32) - tensor["zero_point"]) * tensor["scale"]).astype(np.float32)
