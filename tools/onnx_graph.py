"""ONNX graphs as devices take them: traced from torch, channel last, integers at both ends; their sessions on a CPU.

Definitions only, no constant that a user edits: what Qualcomm's compiler and the local hub do alike with a graph, but
for quantising, which is aihub.quantize_onnx's. torch, onnx and onnxruntime are imported inside the functions.
"""

import io
import os
import warnings
from pathlib import Path


def torch_to_onnx(module, shape, name="video"):
    """Trace a torch module on zeros, float32 `shape`; returns an onnx.ModelProto with one input `name`.

    Opset 17 and the tracing exporter, as AI Hub's own packages do; the graph's nodes carry the modules' names.
    """
    import onnx
    import torch

    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes are fixed here
        torch.onnx.export(module.eval(), (torch.zeros(shape),), content, input_names=[name],
                          output_names=["class_probs"], opset_version=17, dynamo=False)  # fmt: skip
    return onnx.load_from_string(content.getvalue())


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def graph_inputs(graph):
    """The inputs that are not weights (files of old exporters list those, too)."""
    weights = {weight.name for weight in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def dims_of(value):
    """A shape with None where a dimension is not fixed."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


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


def fix_open_dimensions(proto, clip_shape):
    """Let the open dimensions of the one input be those of an RGB clip, `clip_shape` as NCTHW. Returns the model.

    Raises ValueError with one sentence if it has open dimensions and is not such a clip.
    """
    import onnx

    (value,) = graph_inputs(proto.graph)
    own = dims_of(value)
    if None in own:
        n, c, *rest = clip_shape
        layouts = [wanted for wanted in ((n, c, *rest), (n, *rest, c))
                   if len(own) == 5 and all(a in (None, b) for a, b in zip(own, wanted))]  # fmt: skip
        if not layouts:
            raise ValueError(f"its input has the shape {own}, with open dimensions that are not those of a clip "
                             f"{clip_shape}; export it with fixed ones")  # fmt: skip
        for dim, size in zip(value.type.tensor_type.shape.dim, layouts[0]):
            dim.dim_value = size
        del proto.graph.value_info[:]
        for output in proto.graph.output:
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto)


def io_of_graph(graph, quantizers):
    """{"input", "output"} of a graph with one of each, as aihub.io_of has it; `quantizers` {name: (scale, zero point)}.

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
