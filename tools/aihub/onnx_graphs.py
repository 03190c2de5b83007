"""ONNX graphs as devices take them: traced from torch, channel last, integers at both ends; their sessions on a CPU.

What Qualcomm's compiler and the local hub do alike with a graph. torch, onnx and onnxruntime are imported inside the
functions.
"""

import io
import json
import os
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import common

from aihub import model_io
from aihub.service import is_emulated


def torch_to_onnx(module, shape):
    """Trace a torch module on zeros, float32 `shape`; returns an onnx.ModelProto with one input `video`.

    Opset 17 and the tracing exporter, as AI Hub's own packages do; the graph's nodes carry the modules' names. Of a
    module that writes to parts of a tensor they do not: it is traced as `program_to_onnx` does it.
    """
    import torch

    module, inputs = module.eval(), (torch.zeros(shape),)
    with torch.no_grad():
        program = torch.export.export(module, inputs)
    names = dict(input_names=["video"], output_names=["class_probs"])
    if writes_parts(program):
        return program_to_onnx(program, inputs, **names)
    return traced_to_onnx(module, inputs, **names)


def traced_to_onnx(module, inputs, **names):
    """Trace a torch module on `inputs`; returns an onnx.ModelProto. names: input_names and output_names."""
    import onnx
    import torch

    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes are fixed here
        torch.onnx.export(module, inputs, content, opset_version=17, dynamo=False, **names)
    return onnx.load_from_string(content.getvalue())


def program_to_onnx(program, inputs, **names):
    """A torch.export program as an onnx.ModelProto. names: as `traced_to_onnx` has them.

    Two things get lost in the tracing exporter and are put into other words: it cannot look into the list that
    tensor_split gives (MViT), and it forgets what is written in place to a part of a tensor (MViT, Swin).
    """
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, as in traced_to_onnx, and of torch's own ways
        traced = torch.jit.trace(in_plain_operations(program), inputs, check_trace=False)
    return traced_to_onnx(traced, inputs, **names)


def in_plain_operations(program):
    """The module of a torch.export program, with what gets lost on the way in other words."""
    import torch

    if writes_parts(program):
        program = program.run_decompositions({})  # nothing is in place any more
    module = program.module()
    aten = torch.ops.aten
    others = {aten.tensor_split.indices: slices_of, aten.slice_scatter.default: with_slice}
    others |= {aten._unsafe_view.default: aten.reshape.default, aten.copy.default: copied}
    others |= dict.fromkeys((aten.full_like.default, aten.fill.Scalar, aten.fill.Tensor), filled)
    for node in module.graph.nodes:
        node.target = others.get(node.target, node.target)
    module.recompile()
    return module


def writes_parts(program):
    """Whether a node of a torch.export program writes in place to a slice or to another view of a tensor."""
    import torch

    views = (torch.ops.aten.slice.Tensor, torch.ops.aten.view.default, torch.ops.aten.select.int)

    def writes(node):
        in_place = str(node.target).startswith("aten.") and str(node.target).split(".")[1].endswith("_")
        return in_place and getattr(node.args[0], "target", None) in views

    return any(map(writes, program.graph.nodes))


def with_slice(tensor, source, dim=0, start=None, end=None, step=1):
    """What torch.slice_scatter gives, for a step of 1: the tensor with `source` in place of a slice."""
    import torch

    size = tensor.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    parts = [tensor.narrow(dim, 0, start), source, tensor.narrow(dim, end, size - end)]
    return torch.cat([part for part in parts if part.shape[dim]], dim)


def filled(tensor, value, **_):
    """What torch.full_like gives, whose value cannot be traced where it is a tensor."""
    return tensor.new_zeros(tensor.shape) + value


def copied(tensor, source, *_):
    """What `tensor.copy_(source)` leaves in the tensor."""
    return source.expand_as(tensor).to(tensor.dtype)


def slices_of(tensor, indices, dim=0):
    """What torch.tensor_split gives."""
    ends = [*indices, tensor.shape[dim]]
    return [tensor.narrow(dim, start, end - start) for start, end in zip([0, *indices], ends)]


BINARY_NODE = "EPContext"  # a node that stands for a binary of a device
QUANTISING = ("QuantizeLinear", "DequantizeLinear")

# --- inputs and outputs -----------------------------------------------------------------------------------------------


def graph_inputs(graph):
    """The inputs that are not weights (files of old exporters list those, too)."""
    weights = {weight.name for weight in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def only_input(graph, path):
    """The one input of a graph that has one output, too; exits with code 2 and one sentence for any other graph."""
    inputs = graph_inputs(graph)
    if len(inputs) != 1 or len(graph.output) != 1:
        names = ", ".join(value.name for value in (*inputs, *graph.output))
        common.refuse(f"{path} has the inputs and outputs {names}; one clip in and one tensor out is needed")
    return inputs[0]


def clip_that_fits(dims, clip_shape):
    """`clip_shape`, an RGB clip as NCTHW, in the layout that the `dims` of an input allow; None if they allow none."""
    for wanted in (model_io.shape_in(layout, clip_shape) for layout in model_io.LAYOUTS):
        if len(dims) == 5 and all(a in (None, b) for a, b in zip(dims, wanted)):
            return wanted
    return None


def dims_of(value):
    """A shape with None where a dimension is not fixed."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value or None for dim in dims)


def dtype_of(value):
    """The numpy name of a graph input's or output's type, say "float32"."""
    return dtype_name(value.type.tensor_type.elem_type)


def dtype_name(elem_type):
    """The numpy name of an ONNX type."""
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(elem_type).name


def rename_tensor(graph, old, new):
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def channel_last_input(graph, value):
    """Let an input be (N, …, C) instead of (N, C, …), as AI Hub's --force_channel_last_input: a Transpose in front.

    To be done after quantising: a Transpose that is quantised, too, would be one more step.
    """
    from onnx import helper

    n, c, *rest = dims_of(value)
    inner = f"{value.name}/channel_first"
    rename_tensor(graph, value.name, inner)
    perm = [0, len(rest) + 1, *range(1, len(rest) + 1)]
    graph.node.insert(0, helper.make_node("Transpose", [value.name], [inner], name=inner, perm=perm))
    value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, (n, *rest, c)))


def expose_quantized_io(graph):
    """Take off the QuantizeLinear at each input and the DequantizeLinear at each output, as AI Hub's --quantize_io.

    Returns {tensor name: (scale, zero point)}. A float model has none and stays as it is.
    """
    from onnx import numpy_helper

    weights = {weight.name: weight for weight in graph.initializer}
    quantizers = {}

    def take_off(node, value, inner):
        scale, zero_point = (numpy_helper.to_array(weights[name]) for name in node.input[1:3])
        graph.node.remove(node)
        rename_tensor(graph, inner, value.name)
        value.type.tensor_type.elem_type = weights[node.input[2]].data_type
        quantizers[value.name] = (float(scale), int(zero_point))

    for value in graph_inputs(graph):
        readers = [node for node in graph.node if value.name in node.input]
        if [node.op_type for node in readers] == ["QuantizeLinear"]:
            take_off(readers[0], value, readers[0].output[0])
    for value in graph.output:
        readers = [node for node in graph.node if value.name in node.input]
        (producer,) = (node for node in graph.node if value.name in node.output)
        if producer.op_type == "DequantizeLinear" and not readers:
            take_off(producer, value, producer.input[0])
    return quantizers


def output_kind(graph):
    """"probabilities" where a graph's one output comes of a softmax, "logits" otherwise."""
    made_by = {name: node for node in graph.node for name in node.output}
    node = made_by.get(graph.output[0].name)
    while node is not None and node.op_type in ("Identity", "Cast", "Reshape", "Squeeze", "Flatten", *QUANTISING):
        node = made_by.get(node.input[0])
    return "probabilities" if node is not None and node.op_type == "Softmax" else "logits"


def fix_open_dimensions(proto, clip_shape):
    """Let the open dimensions of the one input be those of an RGB clip, `clip_shape` as NCTHW. Returns the model.

    Raises ValueError with one sentence if it has open dimensions and is not such a clip.
    """
    import onnx

    (value,) = graph_inputs(proto.graph)
    own = dims_of(value)
    if None in own:
        if not (fixed := clip_that_fits(own, clip_shape)):
            raise ValueError(f"its input has the shape {own}, with open dimensions that are not those of a clip "
                             f"{clip_shape}; export it with fixed ones")  # fmt: skip
        for dim, size in zip(value.type.tensor_type.shape.dim, fixed):
            dim.dim_value = size
        del proto.graph.value_info[:]
        for output in proto.graph.output:
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto)


def io_of_graph(graph, quantizers):
    """{"input", "output"} of a graph with one of each, as model_io.io_of has it.

    `quantizers`: {name: (scale, zero point)}.
    Raises ValueError with one sentence if the shape of the output is not known.
    """
    io = {}
    for key, value in (("input", graph_inputs(graph)[0]), ("output", graph.output[0])):
        scale, zero_point = quantizers.get(value.name, (None, None))
        io[key] = {"name": value.name, "dtype": dtype_of(value), "shape": list(dims_of(value))}
        io[key] |= {"scale": scale, "zero_point": zero_point}
    if None in io["output"]["shape"]:
        raise ValueError(f"the shape of the output {io['output']['name']} is not fixed; export it with fixed shapes")
    return io


def around_binary(io, binary_name, graph_name, **attributes):
    """An ONNX model of one node that names a context binary beside it, as onnxruntime's QNN provider wants it.

    io: [[(name, numpy name of the type, shape)] of the inputs, the same of the outputs]. attributes: more of the node.
    """
    import numpy as np
    from onnx import helper

    values = [
        [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
         for name, dtype, shape in tensors] for tensors in io
    ]  # fmt: skip
    node = helper.make_node(
        BINARY_NODE, *([value.name for value in tensors] for tensors in values), domain="com.microsoft", embed_mode=0,
        ep_cache_context=binary_name, **attributes,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], graph_name, *values), opset_imports=opsets)


def binary_named_in(graph):
    """What the one node of `around_binary` names beside it: a file's name, "" where it holds the binary itself.

    None for a graph without such a node. Raises ValueError for one with several.
    """
    (node,) = [node for node in graph.node if node.op_type == BINARY_NODE] or [None]
    if node is None:
        return None
    attributes = {attribute.name: attribute for attribute in node.attribute}
    beside = "embed_mode" in attributes and not attributes["embed_mode"].i
    return attributes["ep_cache_context"].s.decode() if beside and "ep_cache_context" in attributes else ""


# --- running on this CPU ----------------------------------------------------------------------------------------------


def cpu_session(content, num_threads=0):
    """An onnxruntime session on the CPU for the bytes of an ONNX file; raises onnxruntime's error for no such file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or min(4, os.cpu_count())
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the CPU to others meanwhile
    # CPUs without VNNI would cut sums of 8-bit products off at 16 bits: wrong logits, by a third of their range
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def dtype_in_session(argument):
    """The numpy name of the type of a session's input or output: onnxruntime writes "tensor(float)" for float32."""
    name = argument.type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def load_with_weights(path):
    """The onnx.ModelProto of an .onnx file, weights beside it included, or of a folder that holds just one such file.

    Raises ValueError with one sentence if it is not one.
    """
    import onnx

    path = Path(path)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if len(files) != 1:
        raise ValueError(f"the folder {path} holds {len(files)} .onnx files instead of one")
    try:
        return onnx.load(files[0])
    except Exception as e:  # protobuf's DecodeError, onnx's ValidationError, a missing weights file
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{files[0]} is no readable ONNX model ({reason})") from e


# First line of every binary that the local hub makes: no program can take it for one of Qualcomm's.
HUB_TAG = b"LOCAL HUB: EMULATED ON THE CPU, NOT A QUALCOMM BINARY\n"


def load_onnx(path, shape):
    """Read an ONNX file (weights beside it included) and check that it takes one float32 clip and gives one tensor.

    `shape` is (BATCH, C, T, H, W) of the user's constants; the file may have it as NCTHW, as NTHWC, or leave dimensions
    open. Returns (onnx model, {input name: (shape as the file has it, "float32")}). Exits with code 2 and one sentence
    for a file that does not fit.
    """
    import onnx

    if not Path(path).is_file():
        common.refuse(
            f"there is no ONNX file {path} (looked in {Path(path).absolute()}); set ONNX_DIR to its folder and "
            f"VIDEO_ONNX_NAME to its name"
        )
    try:
        onnx.checker.check_model(str(path))  # by path, so that weights in a second file are checked, too
        model = load_with_weights(path)
    except Exception as e:  # protobuf's DecodeError, onnx's ValidationError, a missing weights file
        common.refuse(f"{path} is not a valid ONNX model: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 11:
        common.refuse(f"{path} has opset {opset}; export it with 11 or newer, say torch.onnx.export(opset_version=17)")
    value = only_input(model.graph, path)
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        common.refuse(
            f"the input {value.name} of {path} is not float32; a quantised model is compiled by "
            f"tools/example_export.py --precision w8a8, from the checkpoint"
        )
    if wanted := clip_that_fits(dims_of(value), shape):
        return model, {value.name: (wanted, "float32")}
    common.refuse(
        f"the input {value.name} of {path} has shape {dims_of(value)}, but BATCH, C, T, H, W are {tuple(shape)}; set "
        f"them to what the model takes"
    )


def read_hub_binary(path):
    """(head, ONNX model as bytes) of a binary that the local hub made; None if `path` is any other file.

    `path` is what example_export.py saves: a .bin, .dlc or .tflite file, or a folder <name>.onnx with a binary in it.
    head: {"runtime", "qairt_version", "inputs", "outputs"}.
    """
    path = Path(path)
    if path.is_dir():
        path = next(path.glob("*.bin"), None)
    if path is None:
        return None
    with open(path, "rb") as file:
        if file.read(len(HUB_TAG)) != HUB_TAG:
            return None
        return json.loads(file.readline()), file.read()


def check_hub_binary(path, device):
    """Exit with code 2 and one sentence where a binary that the local hub made would be sent to a real device."""
    if read_hub_binary(path) and not is_emulated(device):
        common.refuse(
            f"{path} was made by the local hub and runs there alone: export it again with AI Hub, or make a binary for "
            f"the chip of it with tools/compile_offline.py --source {path}"
        )


QUANTIZATION_VERSION = 1  # of what quantize_onnx does: to be raised when it gives other integers for the same samples


def quantize_onnx(model, path, samples, weight_bits=8, activation_bits=8):
    """Quantise a float ONNX model (onnx.ModelProto) statically and write it to `path`, with QDQ nodes.

    `samples` yields calibration samples {input name: float32 array}; ranges are the smallest and largest values seen.
    Weights become signed integers of `weight_bits`, a scale a channel; activations unsigned ones of `activation_bits`.
    Both are 8 or 16. Every operation is quantised, as by AI Hub, so that inputs and outputs are, too.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = iter(samples)
    with tempfile.TemporaryDirectory() as folder:
        prepared = f"{folder}/prepared.onnx"
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        operations = {node.op_type for node in onnx.load(prepared).graph.node} - {"Constant", "Shape"}
        quantize_static(
            prepared, str(path), SimpleNamespace(get_next=lambda: next(samples, None)), quant_format=QuantFormat.QDQ,
            per_channel=True, op_types_to_quantize=sorted(operations),
            activation_type=QuantType[f"QUInt{activation_bits}"], weight_type=QuantType[f"QInt{weight_bits}"],
        )
