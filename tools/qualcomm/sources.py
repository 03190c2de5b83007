"""What can be compiled: networks by name, checkpoints, an ONNX file, a binary of the local hub; as an ONNX graph.

Each source knows the hash of what it was made of, so that what is compiled already is not compiled again.
"""

import hashlib
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import common
from common.calibration import Calibration

from aihub import description, model_io, onnx_graphs, own_onnx


@dataclass
class UncompiledNetwork:
    """A network to compile. `torch_model` takes a float32 clip `shape` and gives logits; None where it is not known.

    `graph` is the ONNX model of a file, with `io`, as model_io.io_of has it, where it is as deployed already.
    """

    name: str  # of the files that are made
    made_from: str  # in words
    sha256: str
    precision: str  # of own_onnx.PRECISIONS
    shape: tuple  # of the input, a clip as NCTHW
    network: str = ""  # torchvision's name, "" unknown
    about: dict = field(default_factory=dict)  # "clip", "classes", "checkpoint" … as example_export.py writes them
    torch_model: object = None
    graph: object = None
    io: dict | None = None

    @property
    def classes(self):
        return self.about.get("classes")

    @property
    def frames(self):
        return self.shape[2] if len(self.shape) == 5 else 0

    @property
    def is_quantised(self):
        """Whether its graph is 8-bit already, so that there is nothing to calibrate."""
        return self.graph is not None and any(node.op_type == "QuantizeLinear" for node in self.graph.graph.node)


def untrained_source(names, frames, classes, precision, side=0):
    """A video network of the registry with random weights, or several that vote.

    `frames` and `classes` 0 mean 16 and as many as class_map.json has; `side` 0 the frame size that is theirs.
    """
    from torchvision.models import get_model_weights

    from qevd_r2plus1d import model as recipe

    voters = [recipe.untrained(name, frames, classes, seed) for seed, name in enumerate(names)]
    if side:
        voters = [voter._replace(description=at_size(voter.description, side)) for voter in voters]
    clips = voters[0].description
    for name, voter in zip(names, voters):
        least = get_model_weights(name).DEFAULT.meta.get("min_temporal_size") or 1
        if clips.clip_len < least:
            common.refuse(f"{name} takes {least} frames a clip or more, not {clips.clip_len}")
        if differences := clips.differences(voter.description, recipe.WHAT_VOTERS_SHARE):
            common.refuse(f"{names[0]} and {name} take different clips, so they cannot vote: {', '.join(differences)}")
    name = names[0] if len(names) == 1 else f"{'_'.join(dict.fromkeys(names))}-{len(names)}-networks"
    return UncompiledNetwork(
        name=f"{name}-untrained-{clips.clip_len}-frames" + f"-of-{side}" * bool(side),
        made_from=f"{' + '.join(names)} with random weights",
        sha256=f"{voters[0].num_classes} classes", precision=precision or "float",
        shape=(1, 3, clips.clip_len, *clips.crop_size), network=" + ".join(names), about={"clip": clips.as_dict()},
        torch_model=recipe.QevdR2Plus1D(voters, recipe.shares_of([], voters)),
    )  # fmt: skip


def at_size(clips, side):
    """A ClipDescription of frames of another size, of which the crop cuts off as much."""
    resized = tuple(round(length * side / clips.crop_size[0]) for length in clips.resize_size)
    return clips._replace(resize_size=resized, crop_size=(side, side))


def trained(checkpoints, frames, classes, precision, **vote):
    """The deployed network of checkpoints, by the recipe that example_export.py exports.

    vote: `weights` and `mirrored`, as the recipe has them.
    """
    from qevd_r2plus1d import Model

    deployed = Model.from_pretrained(checkpoints, num_classes=classes, num_frames=frames, data_dir="", **vote)
    about = deployed.about()
    made_of = [about["checkpoint_sha256"], about["weights"], about["vote_with"], about["mirrored"]]
    return UncompiledNetwork(
        name=deployed.bundle_id, made_from=" + ".join(map(str, checkpoints)),
        sha256=common.json_hash(made_of), precision=precision or "float",
        shape=deployed.get_input_spec()["video"].shape, network=" + ".join(networks_of(deployed, about)), about=about,
        torch_model=deployed,
    )  # fmt: skip


def networks_of(deployed, about):
    """torchvision's names of the deployed networks; without the checkpoints, what stands beside the model, or []."""
    if deployed:
        return [voter.description.model_name for voter in deployed.voters]
    is_one = isinstance(about.get("checkpoint"), str)  # of several that vote, the clip is that of the first
    return [about["clip"]["model_name"]] if is_one and about.get("clip") else []


def from_local_hub(path):
    """The graph inside a model that the local hub compiled; layout and quantised ends are those that are deployed.

    Its line of JSON names inputs and outputs; the description beside it, the classes and the checkpoint.
    """
    import onnx

    from qevd_r2plus1d.model import bundle_of

    content = onnx_graphs.read_hub_binary(path)
    if content is None:
        common.refuse(
            f"{path} was not made by the local hub, it is compiled for a device already: name what it was made of, by "
            f"--checkpoint or as an .onnx file"
        )
    head, graph = content
    io = {"input": head["inputs"][0], "output": head["outputs"][0]}
    about, shape = description.read_description(path), model_io.ncthw(io["input"]["shape"])
    deployed = deployed_of(about, shape)
    networks = networks_of(deployed, about)
    return UncompiledNetwork(
        name=bundle_of(networks) if networks else path.stem, made_from=str(path),
        sha256=hashlib.sha256(graph).hexdigest(), precision=precision_of(io["input"]["dtype"]), shape=shape,
        network=" + ".join(networks), about=about_of(about), torch_model=deployed,
        graph=onnx.load_from_string(graph), io=io,
    )  # fmt: skip


def about_of(described):
    """What a description beside a model says of its clips and what it was made of, without its tensors and jobs."""
    kept = ("clip", "classes", "checkpoint", "checkpoint_sha256", "weights", "vote_with", "mirrored")
    kept += Calibration._fields
    return {key: described[key] for key in kept if key in described}


def deployed_of(about, shape):
    """The deployed torch model of the checkpoints that an export was made of; None if one is gone or another now."""
    from qevd_r2plus1d import Model

    made_of = description.checkpoints_of(about)
    for path, sha256 in made_of:
        if not Path(path).is_file() or common.sha256_of(path) != sha256:
            print(f"{path} is gone or newer than what was made of it: logits are not compared with torch's")
            return None
    vote = {"weights": about.get("weights") or [], "mirrored": about.get("mirrored", False)}
    paths = [path for path, _ in made_of]
    return Model.from_pretrained(paths, num_frames=shape[2], data_dir="", **vote) if paths else None


def from_onnx(path, frames, precision):
    """An ONNX file, or a folder with one, float or QDQ; open dimensions of its input become those of a clip."""
    from torchvision_patches import clip

    try:
        proto = onnx_graphs.load_with_weights(path)
    except ValueError as e:
        common.refuse(str(e))
    onnx_graphs.only_input(proto.graph, path)
    about = about_of(description.read_description(path))
    try:
        clips, _ = clip.described(about.get("clip") or {})
        proto = onnx_graphs.fix_open_dimensions(proto, (1, 3, frames or clips.clip_len, *clips.crop_size))
    except ValueError as e:
        common.refuse(f"{path}: {e}")
    (value,) = onnx_graphs.graph_inputs(proto.graph)
    uncompiled = UncompiledNetwork(
        name=path.stem, made_from=str(path), sha256=common.sha256_of(path), precision=precision or "float",
        shape=model_io.ncthw(onnx_graphs.dims_of(value)),
        about=about, graph=proto,
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
        proto = quantised_here(proto, samples, *own_onnx.PRECISIONS[uncompiled.precision])
    quantizers = onnx_graphs.expose_quantized_io(proto.graph)
    (value,) = onnx_graphs.graph_inputs(proto.graph)
    if model_io.layout_of(onnx_graphs.dims_of(value)) == "NCTHW":
        onnx_graphs.channel_last_input(proto.graph, value)
    try:
        return proto, onnx_graphs.io_of_graph(proto.graph, quantizers)
    except ValueError as e:
        common.refuse(f"{uncompiled.made_from}: {e}")


def quantised_here(proto, samples, weight_bits, activation_bits):
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
