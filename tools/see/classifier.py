"""A trained network that runs on this machine, whatever file it comes as: clips in, logits and class names out.

`load` reads a checkpoint of train.py, or several (torch, on the GPU if there is one), an ONNX file or folder, or a
binary of the local hub (onnxruntime, on the CPU), or one made for Qualcomm's chips (on the NPU of this machine, or in
Qualcomm's emulator).
"""

import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import common
from common import checkpoints, machine
from common.calibration import Calibration, calibration_of, softmax

import numpy as np

from aihub import description, model_io, onnx_graphs
from qualcomm import binary_runs


class Classifier(NamedTuple):
    """What `load` returns."""

    about: str  # what runs where, for people
    classes: list  # names in index order
    description: object  # a clip.ClipDescription: how the clip is made that the network takes
    batch_size: int  # clips that one call of `logits` takes best
    logits: object  # function: float32 (B, 3, T, H, W), RGB in [0, 1] -> float32 (B, num_classes)
    latency: object = None  # function: what clips took on a chip or in its emulator, in words; None elsewhere
    temperature: float = 1.0  # logits are divided by it before they become probabilities
    threshold: float | None = None  # the lowest probability with which a class is named; None: there is none

    def in_words(self):
        """What runs where, how many classes it tells apart, and what a clip is."""
        clip = self.description
        return f"{self.about}: {len(self.classes)} classes, {clip.clip_len} frames at {clip.frame_rate:g} fps"

    def probabilities(self, clips):
        """(probabilities after the temperature, logits) of clips as `logits` takes them, float32 (B, num_classes).

        Where a clip's logits are no numbers, its probabilities are NaN.
        """
        logits = self.logits(clips)
        sound = np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits, np.float32("nan"))
        return softmax(sound / self.temperature), logits

    def calibrated(self, known):
        """This Classifier with the temperature and threshold that a checkpoint or description holds, if it does."""
        return self._replace(**(calibration_of(known) or Calibration(1.0, None))._asdict())


def load(path, weights=(), mirrored=False):
    """The Classifier in a checkpoint (.pth, .pt), several that vote, an ONNX file or folder, or a local hub's binary.

    path: one, or a list of checkpoints; weights of their votes and `mirrored` as example_export.py has them. Exits with
    code 2 and one sentence if there is none, it is damaged, or it cannot run here.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    if not paths:
        common.refuse("name a checkpoint or a compiled model with --checkpoint")
    for path in paths:
        if not path.exists():
            common.refuse(
                f"there is no {path} (looked in {path.absolute().parent}); train.py writes a checkpoint, --checkpoint "
                f"names it, or a compiled model"
            )
    others = [path for path in paths if path.suffix not in checkpoints.ENDINGS]
    if not others:
        return load_torch(paths, weights, mirrored)
    if len(paths) > 1 or mirrored or weights:
        common.refuse(f"{others[0]} is no checkpoint (.pth): only checkpoints vote, have weights or are mirrored here")
    if binary := binary_runs.binary_at(paths[0]):
        return load_for_chip(binary)
    return load_in_onnxruntime(paths[0])


def load_torch(paths, weights, mirrored):
    """The networks of checkpoints as they are deployed, normalisation included."""
    import torch

    from qevd_r2plus1d import Model
    from torchvision_patches import networks

    device = networks.device()
    torch.backends.cudnn.allow_tf32 = False  # logits would differ from the CPU's by a thousandth
    model = Model.from_pretrained(paths, weights=weights, mirrored=mirrored, data_dir="").eval()
    networks.channels_last(model.to(device))

    @torch.inference_mode()
    def logits(clips):
        clips = torch.from_numpy(clips).to(device, memory_format=torch.channels_last_3d)
        return model(clips).float().cpu().numpy()

    names = " + ".join(map(str, paths)) + ", mirrored, too" * mirrored
    classes = model.classes or numbered(names, model.num_classes)
    about = f"{names} on the {'GPU ' + torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
    found = Classifier(about, list(classes), model.description, 16 if device == "cuda" else 1, logits)
    return found.calibrated(model.about())


def load_in_onnxruntime(path):
    """An ONNX model, or the one in a binary of the local hub, in onnxruntime."""
    content, known = read_model(path)
    try:
        session = onnx_graphs.cpu_session(content, machine.num_cores())
    except Exception as e:  # onnxruntime's errors have no base class of their own
        common.refuse(f"onnxruntime cannot run {path}: {str(e).splitlines()[0]}")
    given, made = session.get_inputs(), session.get_outputs()
    layout = model_io.layout_of(given[0].shape)
    if len(given) != 1 or len(made) != 1 or not layout:
        shapes = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in (*given, *made))
        common.refuse(f"{path} takes and gives {shapes}; one RGB clip of 5 axes in and one tensor out is needed")
    if any(type(size) is not int for size in given[0].shape[1:]):
        common.refuse(f"{path} takes {given[0].shape}, with open dimensions; export it with fixed ones")
    tensors = [io_of_tensor(tensor, known.get(key)) for key, tensor in (("input", given[0]), ("output", made[0]))]

    gives_probabilities = known.get("output_kind", onnx_graphs.output_kind(graph_of(content))) == "probabilities"

    def logits(clips):
        inputs = [{given[0].name: model_io.as_model_input(clip[None], tensors[0])} for clip in clips]
        rows = [session.run(None, named)[0] for named in inputs]
        rows = np.concatenate([model_io.as_logits(row.reshape(1, -1), tensors[1]) for row in rows])
        return np.log(rows.clip(min=1e-9)) if gives_probabilities else rows

    num_classes = int(np.prod(made[0].shape))
    classes = known.get("classes") or numbered(path, num_classes)
    if len(classes) != num_classes:
        common.refuse(f"{path} gives {num_classes} logits, but beside it stand the names of {len(classes)} classes")
    clips = description.clip_of_model(known, path, model_io.ncthw(given[0].shape))
    return Classifier(f"{path} on the CPU, in onnxruntime", classes, clips, 1, logits).calibrated(known)


def load_for_chip(binary):
    """A CompiledBinary, as a session that stays open."""
    session = binary_runs.BinarySession(binary, common.REPO / ".qnn")
    if not binary.description.get("clip") and not importlib.util.find_spec("torchvision"):
        common.refuse(
            f"nothing beside {binary.path} says how its clips are made: compile it from its checkpoint, and keep the "
            f".json that tools/compile_offline.py writes beside it"
        )
    num_classes = int(np.prod(binary.description["output"]["shape"]))
    classes = binary.description.get("classes") or numbered(binary.path, num_classes)
    clips = description.clip_of_model(binary.description, binary.path, session.clip_shape)
    found = Classifier(session.about, classes, clips, 1, session.logits, session.latency)
    return found.calibrated(binary.description)


def read_model(path):
    """Returns (the path or the bytes of an ONNX file, what description.read_description knows of it).

    Exits with code 2 and one sentence for a file of another kind.
    """
    binary = onnx_graphs.read_hub_binary(path)
    onnx = [str(file) for file in (sorted(path.glob("*.onnx")) if path.is_dir() else [path]) if file.suffix == ".onnx"]
    if not binary and not onnx:
        common.refuse(
            f"{path} is no checkpoint (.pth), ONNX model or binary of the local hub or of compile_offline.py: name the "
            f"checkpoint, or export with --target-runtime onnx"
        )
    if not binary:
        return onnx[0], description.read_description(path)
    head, content = binary
    known = {"input": head["inputs"][0], "output": head["outputs"][0]}
    return content, known | description.read_description(path)


def graph_of(content):
    """The graph of an ONNX file by its path or bytes, without weights beside it."""
    import onnx

    file = content if isinstance(content, str) else io.BytesIO(content)
    return onnx.load(file, load_external_data=False).graph


def io_of_tensor(tensor, known):
    """A tensor of onnxruntime as model_io.io_of has it, with scale and zero point where they are known."""
    own = {"name": tensor.name, "shape": tensor.shape, "dtype": onnx_graphs.dtype_in_session(tensor)}
    own |= {key: (known or {}).get(key) for key in ("scale", "zero_point")}
    model_io.check_scale(own)
    return own


def numbered(path, number):
    """Names for classes that nothing names: QEVD's if there are as many, numbers otherwise."""
    if official := common.official_classes(number):
        return official
    print(f"{path} does not name its {number} classes: they are numbered")
    return [f"class {i}" for i in range(number)]
