"""A trained network that runs on this machine, whatever file it comes as: clips in, logits and class names out.

`load` reads a checkpoint of train.py (torch, on the GPU if there is one), an ONNX file or folder, or a binary of the
local hub (onnxruntime, on the CPU). Definitions only, no constant that a user edits.
"""

import json
from pathlib import Path
from typing import NamedTuple

import common
from common import machine

import numpy as np

from aihub import model_io, onnx_graphs

CROP = (112, 112)  # (height, width) that torchvision_patches.spatial makes


class Classifier(NamedTuple):
    """What `load` returns."""

    about: str  # what runs where, for people
    classes: list  # names in index order
    clip_len: int  # frames a clip
    batch_size: int  # clips that one call of `logits` takes best
    logits: object  # function: float32 (B, 3, T, 112, 112), RGB in [0, 1] -> float32 (B, num_classes)


def load(path):
    """The Classifier in a checkpoint (.pth, .pt), an ONNX file or folder, or a binary of the local hub.

    Exits with code 2 and one sentence if there is none, it is damaged, or it cannot run here.
    """
    path = Path(path)
    if not path.exists():
        common.refuse(
            f"there is no {path} (looked in {path.absolute().parent}); train.py writes a checkpoint, --checkpoint "
            f"names it, or a compiled model"
        )
    return load_torch(path) if path.suffix in (".pth", ".pt") else load_onnx(path)


def load_torch(path):
    """The network of a checkpoint as it is deployed, normalisation included."""
    import torch

    from qevd_r2plus1d import Model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # logits would differ from the CPU's by a thousandth
    model = Model.from_pretrained(str(path)).eval().to(device, memory_format=torch.channels_last_3d)
    model.input_mean, model.input_std = model.input_mean.to(device), model.input_std.to(device)

    @torch.inference_mode()
    def logits(clips):
        clips = torch.from_numpy(clips).to(device, memory_format=torch.channels_last_3d)
        return model(clips).float().cpu().numpy()

    classes = model.classes or numbered(path, model.model.fc.out_features)
    about = f"{path} on the {'GPU ' + torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
    return Classifier(about, list(classes), model.num_frames, 16 if device == "cuda" else 1, logits)


def load_onnx(path):
    """An ONNX model, or the one in a binary of the local hub, in onnxruntime."""
    import onnxruntime

    content, description = read_model(path)
    options = onnxruntime.SessionOptions()
    # CPUs without VNNI would cut sums of 8-bit products off at 16 bits: wrong logits, by a third of their range
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = machine.num_cores()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors have no base class of their own
        common.refuse(f"onnxruntime cannot run {path}: {str(e).splitlines()[0]}")
    given, made = session.get_inputs(), session.get_outputs()
    layout = model_io.layout_of(given[0].shape)
    if len(given) != 1 or len(made) != 1 or not layout:
        shapes = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in (*given, *made))
        common.refuse(f"{path} takes and gives {shapes}; one RGB clip of 5 axes in and one tensor out is needed")
    clip_len, *size = given[0].shape[2:] if layout == "NCTHW" else given[0].shape[1:4]
    if tuple(size) != CROP:
        common.refuse(f"{path} takes frames of {size[0]} x {size[1]} pixels, {CROP[0]} x {CROP[1]} are made here")
    tensors = [described(tensor, description.get(key)) for key, tensor in (("input", given[0]), ("output", made[0]))]

    def logits(clips):
        inputs = [{given[0].name: model_io.as_model_input(clip[None], tensors[0])} for clip in clips]
        rows = [session.run(None, named)[0] for named in inputs]
        return np.concatenate([model_io.as_logits(row.reshape(1, -1), tensors[1]) for row in rows])

    num_classes = int(np.prod(made[0].shape))
    classes = description.get("classes") or numbered(path, num_classes)
    if len(classes) != num_classes:
        common.refuse(f"{path} gives {num_classes} logits, but beside it stand the names of {len(classes)} classes")
    return Classifier(f"{path} on the CPU, in onnxruntime", classes, int(clip_len), 1, logits)


def read_model(path):
    """What onnxruntime loads, the path of an ONNX file or its bytes, and what is known of it.

    The latter as {"input", "output": as model_io.io_of has them, "classes": names}, as far as it is there: from the
    file that example_export.py writes beside a model, the binary itself, the labels.txt in a bundle of qai_hub_models.
    """
    binary = onnx_graphs.read_hub_binary(path)
    onnx = [str(file) for file in (sorted(path.glob("*.onnx")) if path.is_dir() else [path]) if file.suffix == ".onnx"]
    if not binary and not onnx:
        common.refuse(
            f"{path} is no checkpoint (.pth), ONNX model or binary of the local hub; a binary of Qualcomm's runs on its"
            f" device only: name the checkpoint, or export with --target-runtime onnx"
        )
    if binary:
        head, content = binary
        description = {"input": head["inputs"][0], "output": head["outputs"][0]}
    else:
        content, description = onnx[0], {}
    labels, own = path.parent / "labels.txt", path.with_suffix(".json")
    try:
        if labels.is_file():
            description["classes"] = labels.read_text(encoding="utf-8").splitlines()
        if own.is_file():
            beside = json.loads(own.read_text(encoding="utf-8"))
            if beside["sha256"] != common.sha256_of(path):
                common.refuse(f"{own} describes another file than {path}; export the model again")
            description |= {key: beside[key] for key in ("input", "output", "classes") if beside.get(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        print(f"{own} is not what example_export.py writes beside a model, it is ignored")
    return content, description


def described(tensor, known):
    """A tensor of onnxruntime as model_io.io_of has it, with scale and zero point where they are known."""
    name = tensor.type.removeprefix("tensor(").removesuffix(")")
    own = {"name": tensor.name, "shape": tensor.shape, "dtype": "float32" if name == "float" else name}
    own |= {key: (known or {}).get(key) for key in ("scale", "zero_point")}
    model_io.check_scale(own)
    return own


def numbered(path, number):
    """Names for classes that nothing names: QEVD's if there are as many, numbers otherwise."""
    class_map = common.load_class_map(common.REPO / "class_map.json")
    if len(class_map) == number:
        return sorted(class_map, key=class_map.get)
    print(f"{path} does not name its {number} classes: they are numbered")
    return [f"class {i}" for i in range(number)]


def softmax(logits):
    """Probabilities of logits float (…, num_classes)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def best(probabilities, classes, number=5):
    """[(class, probability)] of the most probable classes; of equal ones the first."""
    order = np.argsort(-probabilities, kind="stable")[:number]
    return [(classes[i], float(probabilities[i])) for i in order]
