"""What can be compiled: a network by its name, a checkpoint, an ONNX file, a binary of the local hub; as an ONNX graph.

Definitions only, no constant that a user edits. Each source knows the hash of what it was made of, so that what is
compiled already is not compiled again.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common

from aihub import model_io, onnx_graphs

BITS = {"w8a8": (8, 8), "w8a16": (8, 16)}  # of weights and activations
NETWORKS = ("r2plus1d_18", "r3d_18", "mc3_18", "s3d", "swin3d_t", "swin3d_s", "swin3d_b")  # of torchvision


@dataclass
class UncompiledNetwork:
    """A network to compile. `torch_model` takes a float32 clip `shape` and gives logits; None where it is not known.

    `graph` is the ONNX model of a file, with `io`, as model_io.io_of has it, where it is as deployed already.
    """

    name: str  # of the files that are made
    made_from: str  # in words
    sha256: str
    precision: str  # "float" or one of BITS
    shape: tuple  # of the input, a clip as NCTHW
    network: str = ""  # torchvision's name, "" unknown
    classes: list | None = None
    torch_model: object = None
    graph: object = None
    io: dict | None = None

    @property
    def frames(self):
        return self.shape[2] if len(self.shape) == 5 else 0

    @property
    def is_quantised(self):
        """Whether its graph is 8-bit already, so that there is nothing to calibrate."""
        return self.graph is not None and any(node.op_type == "QuantizeLinear" for node in self.graph.graph.node)


def ncthw(shape):
    """The shape of a clip with its channels first; other shapes as they are."""
    shape = tuple(shape)
    return (shape[0], shape[4], *shape[1:4]) if model_io.layout_of(shape) == "NTHWC" else shape


def check_network(name):
    """Exit with code 2 and one sentence unless it is a network that can be compiled by its name."""
    if name not in NETWORKS:
        hint = "; the export of mvit needs more than 16 GB of memory" if name.startswith("mvit") else ""
        common.refuse(f"there is no network {name!r} to compile; there are {', '.join(NETWORKS)}{hint}")


def untrained(name, frames, classes, precision):
    """A torchvision video network with random weights, at the frame size that torchvision gives it.

    `frames` and `classes` 0 mean 16 and as many as class_map.json has.
    """
    from torchvision.models import get_model_weights

    from qevd_r2plus1d import model as recipe

    voter = recipe.untrained(name, frames, classes)
    frames, weights = voter.description.clip_len, get_model_weights(name).DEFAULT
    if frames < (least := weights.meta.get("min_temporal_size") or 1):
        common.refuse(f"{name} takes {least} frames a clip or more, not {frames}")
    return UncompiledNetwork(
        name=f"{name}-untrained-{frames}-frames", made_from=f"{name} with random weights",
        sha256=f"{voter.num_classes} classes",
        precision=precision or "float", shape=(1, 3, frames, *voter.description.crop_size), network=name,
        torch_model=recipe.QevdR2Plus1D([voter]),
    )  # fmt: skip


def trained(checkpoint, frames, classes, precision):
    """The deployed network of a checkpoint, by the recipe that example_export.py exports."""
    from qevd_r2plus1d import Model

    deployed = Model.from_pretrained(checkpoint, num_classes=classes, num_frames=frames, data_dir="")
    return UncompiledNetwork(
        name="qevd_r2plus1d", made_from=checkpoint, sha256=common.sha256_of(checkpoint),
        precision=precision or "float", shape=deployed.get_input_spec()["video"].shape,
        network=deployed.description.model_name, classes=deployed.classes, torch_model=deployed,
    )  # fmt: skip


def from_local_hub(path):
    """The graph inside a model that the local hub compiled; layout and quantised ends are those that are deployed.

    Its line of JSON names inputs and outputs; the description beside it, the classes and the checkpoint.
    """
    import onnx

    content = onnx_graphs.read_hub_binary(path)
    if content is None:
        common.refuse(
            f"{path} was not made by the local hub, it is compiled for a device already: name what it was made of, by "
            f"--checkpoint or as an .onnx file"
        )
    head, graph = content
    io = {"input": head["inputs"][0], "output": head["outputs"][0]}
    description = read_description(path)
    network, torch_model = checkpoint_of(description, ncthw(io["input"]["shape"]))
    return UncompiledNetwork(
        name="qevd_r2plus1d", made_from=str(path), sha256=hashlib.sha256(graph).hexdigest(),
        precision=precision_of(io["input"]["dtype"]), shape=ncthw(io["input"]["shape"]), network=network,
        classes=description.get("classes"), torch_model=torch_model,
        graph=onnx.load_from_string(graph), io=io,
    )  # fmt: skip


def read_description(path):
    """What stands beside a compiled model, <name>.json; {} without one or if it describes another file."""
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return description if description["sha256"] == common.sha256_of(path) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def checkpoint_of(description, shape):
    """(network's name, deployed torch model) of the checkpoint that an export was made of; ("", None) if it is gone."""
    from qevd_r2plus1d import Model

    path = description.get("checkpoint") or ""
    if not Path(path).is_file():
        return "", None
    deployed = Model.from_pretrained(path, num_frames=shape[2], data_dir="")
    return deployed.description.model_name, deployed


def from_onnx(path, frames, precision):
    """An ONNX file, or a folder with one, float or QDQ; open dimensions of its input become those of a clip."""
    try:
        proto = onnx_graphs.load_with_weights(path)
    except ValueError as e:
        common.refuse(str(e))
    inputs = onnx_graphs.graph_inputs(proto.graph)
    if len(inputs) != 1 or len(proto.graph.output) != 1:
        names = ", ".join(value.name for value in (*inputs, *proto.graph.output))
        common.refuse(f"{path} has the inputs and outputs {names}; one clip in and one tensor out is needed")
    try:
        proto = onnx_graphs.fix_open_dimensions(proto, (1, 3, frames or 16, 112, 112))
    except ValueError as e:
        common.refuse(f"{path}: {e}")
    (value,) = onnx_graphs.graph_inputs(proto.graph)
    uncompiled = UncompiledNetwork(
        name=path.stem, made_from=str(path), sha256=common.sha256_of(path), precision=precision or "float",
        shape=ncthw(onnx_graphs.dims_of(value)), graph=proto,
    )  # fmt: skip
    if uncompiled.is_quantised:
        types = {weight.name: onnx_graphs.dtype_name(weight.data_type) for weight in proto.graph.initializer}
        quantizer = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
        uncompiled.precision = precision_of(types.get(quantizer.input[-1], "uint8"))  # uint8 without a zero point
    return uncompiled


def precision_of(dtype):
    """The precision of a network whose activations are of this type."""
    return {"uint8": "w8a8", "int8": "w8a8", "uint16": "w8a16", "int16": "w8a16"}.get(dtype, "float")


def deployed_graph(uncompiled, samples=()):
    """(ONNX model, {"input", "output"} as model_io.io_of has them) of an UncompiledNetwork as a device takes it.

    Channel last and, unless it is float, with integer ends; `samples`, NCTHW clips, calibrate what is float so far. The
    graph of `uncompiled` is changed.
    """
    if uncompiled.io:
        return uncompiled.graph, uncompiled.io
    proto = uncompiled.graph
    if proto is None:
        proto = onnx_graphs.torch_to_onnx(uncompiled.torch_model, uncompiled.shape)
    if uncompiled.precision != "float" and not uncompiled.is_quantised:
        proto = quantised(proto, samples, *BITS[uncompiled.precision])
    quantizers = onnx_graphs.expose_quantized_io(proto.graph)
    (value,) = onnx_graphs.graph_inputs(proto.graph)
    if model_io.layout_of(onnx_graphs.dims_of(value)) == "NCTHW":
        onnx_graphs.channel_last_input(proto.graph, value)
    try:
        return proto, onnx_graphs.io_of_graph(proto.graph, quantizers)
    except ValueError as e:
        common.refuse(f"{uncompiled.made_from}: {e}")


def quantised(proto, samples, weight_bits, activation_bits):
    """An onnx.ModelProto in integers, calibrated with NCTHW clips, as the local hub quantises it."""
    import onnx

    (value,) = onnx_graphs.graph_inputs(proto.graph)
    logging.disable(logging.WARNING)  # onnxruntime's quantiser warns on the root logger of what is meant
    try:
        with tempfile.TemporaryDirectory() as folder:
            named = ({value.name: sample} for sample in samples)
            onnx_graphs.quantize_onnx(proto, f"{folder}/model.onnx", named, weight_bits, activation_bits)
            return onnx.load(f"{folder}/model.onnx")
    finally:
        logging.disable(logging.NOTSET)
