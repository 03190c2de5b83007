"""Source models as ONNX, and what compile options do to the inputs and outputs of an ONNX graph."""

import contextlib
import json
import os
import tempfile
import zipfile
from pathlib import Path

from aihub import onnx_graphs
from aihub.onnx_graphs import channel_last_input, dims_of, dtype_of, graph_inputs, rename_tensor

from .records import EmulatedJobError, Tensor, listed, pb

# --- source models as ONNX --------------------------------------------------------------------------------------------


def load_as_onnx(model, specs):
    """Any source model as one onnx.ModelProto with its weights inside and the inputs of `specs` (list of Tensor).

    Without specs its own inputs count. Raises EmulatedJobError if model and specs contradict each other.
    """
    model_type = model.message.model_type
    if model_type == pb.MODEL_TYPE_ONNX:
        proto = onnx_of_upload(model.path)
    elif model_type == pb.MODEL_TYPE_TORCH_EXPORTED_PROGRAM:
        proto = exported_program_to_onnx(model.path, specs)
    else:
        raise EmulatedJobError(f"a {pb.ModelType.Name(model_type)} is no source model")
    fix_input_shapes(proto, specs)
    return proto


@contextlib.contextmanager
def unzipped(path):
    """Yield the folder that is zipped in a file (an ONNX model with what lies beside it), or the file itself."""
    if not zipfile.is_zipfile(path):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        zipfile.ZipFile(path).extractall(folder)
        (onnx_path,) = (path for path in Path(folder).rglob("*.onnx") if path.is_file())
        yield onnx_path.parent


def onnx_of_upload(path):
    """The onnx.ModelProto of an .onnx file, or of a zipped folder with one .onnx file and its external weights."""
    try:
        with unzipped(path) as file_or_folder:
            return onnx_graphs.load_with_weights(file_or_folder)
    except (ValueError, OSError) as e:
        raise EmulatedJobError(f"the model is no readable ONNX model: {e}") from e


def load_exported_program(path):
    """torch.export.load, for a file of anyone: nothing in it is executed. Raises ValueError and what torch raises."""
    import torch

    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            # a pickled object, and an expression that sympy would evaluate
            if "custom_obj" in name or (name.endswith(".json") and b'"expr_str"' in archive.read(name)):
                raise ValueError("only programs of plain tensors with fixed shapes are loaded")
    # torch.export.load passes weights_only=False, which this variable overrules; only the thread that computes is here
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        return torch.export.load(path)
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]


def exported_program_to_onnx(path, specs):
    """A torch.export program, traced on zeros, with the inputs of `specs`, or without any with its own."""
    import torch

    try:
        program = load_exported_program(path)
    except Exception as e:
        raise EmulatedJobError(f"the model is no readable torch.export program: {e}") from e
    own = [
        Tensor(node.name, tuple(node.meta["val"].shape), str(node.meta["val"].dtype).removeprefix("torch."))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if specs and [(t.shape, t.dtype) for t in specs] != [(t.shape, t.dtype) for t in own]:
        raise EmulatedJobError(f"input_specs {listed(specs)} contradict the exported program's {listed(own)}")
    specs = specs or own
    inputs = tuple(torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in specs)
    try:
        return onnx_graphs.program_to_onnx(program, inputs, input_names=[t.name for t in specs])
    except Exception as e:
        raise EmulatedJobError(f"the model does not run on inputs {listed(specs)}: {e}") from e


def fix_input_shapes(proto, specs):
    """Write the shapes of `specs` into open dimensions of the model. Raises EmulatedJobError if they do not fit."""
    from onnx import helper

    values = graph_inputs(proto.graph)
    own = [Tensor(v.name, dims_of(v), dtype_of(v)) for v in values]
    if not specs and any(None in t.shape for t in own):
        raise EmulatedJobError(f"the model's inputs have open dimensions ({listed(own)}): input_specs must fix them")
    by_name = {t.name: t for t in specs or own}
    if set(by_name) != {t.name for t in own}:
        raise EmulatedJobError(f"input_specs {listed(specs)} name other inputs than the model's: {listed(own)}")
    for value, tensor in zip(values, own):
        wanted = by_name[tensor.name]
        fits = len(wanted.shape) == len(tensor.shape) and wanted.dtype == tensor.dtype
        if not fits or any(a not in (None, b) for a, b in zip(tensor.shape, wanted.shape)):
            raise EmulatedJobError(f"input_specs {wanted} contradict the model's input {tensor}")
        elem_type = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, elem_type, wanted.shape))


# --- changing the inputs and outputs of an ONNX graph -----------------------------------------------------------------


def rename_outputs(graph, names):
    """Honour --output_names."""
    new_names = names.split(",") if names else [value.name for value in graph.output]
    if len(new_names) != len(graph.output):
        raise EmulatedJobError(f"--output_names has {len(new_names)} names, the model has {len(graph.output)} outputs")
    for value, name in zip(graph.output, new_names):
        rename_tensor(graph, value.name, name)
        value.name = name


def move_channels_last(graph, names):
    """Honour --force_channel_last_input (comma-separated names or None): (N, C, …) becomes (N, …, C) outside."""
    by_name = {value.name: value for value in graph_inputs(graph)}
    for name in names.split(",") if names else []:
        if name not in by_name:
            raise EmulatedJobError(f"--force_channel_last_input names {name}, the model has {', '.join(by_name)}")
        channel_last_input(graph, by_name[name])


def honour_quantize_io(proto):
    """Honour --quantize_io; {tensor name: (scale, zero point)} becomes the model's metadata `quantizers`."""
    if quantizers := onnx_graphs.expose_quantized_io(proto.graph):
        proto.metadata_props.add(key="quantizers", value=json.dumps(quantizers))
