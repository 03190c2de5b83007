"""Compiled models: the files that jobs make of them, and the onnxruntime sessions that run them on the CPU."""

import json
import zipfile

from aihub import onnx_graphs

from .records import EMULATED, EmulatedJobError, Tensor, full_qairt_version, pb, tensors_to_message
from .source_models import onnx_of_upload, unzipped

CACHED_SESSIONS = 2  # models kept loaded between inference jobs
RUNTIMES = {
    "onnx": pb.MODEL_TYPE_ONNX,
    "precompiled_qnn_onnx": pb.MODEL_TYPE_ONNX,
    "qnn_dlc": pb.MODEL_TYPE_QNN_DLC,
    "qnn_context_binary": pb.MODEL_TYPE_QNN_CONTEXT_BINARY,
    "tflite": pb.MODEL_TYPE_TFLITE,
}
EXTENSIONS = {
    pb.MODEL_TYPE_ONNX: ".onnx",
    pb.MODEL_TYPE_TORCH_EXPORTED_PROGRAM: ".pt2",
    pb.MODEL_TYPE_QNN_DLC: ".dlc",
    pb.MODEL_TYPE_QNN_CONTEXT_BINARY: ".bin",
    pb.MODEL_TYPE_TFLITE: ".tflite",
}


def write_target(hub, job, runtime, content):
    """Store ONNX bytes as the job's target model in the form of `runtime`, and describe its inputs and outputs."""
    target = hub.models[job.target_id]
    message = target.message
    path = hub.folder / (job.target_id + EXTENSIONS[message.model_type])
    inputs, outputs = inputs_and_outputs(make_session(content))
    version = job.parsed_options.get("qairt_version", "")
    head = {"runtime": runtime, "qairt_version": version if "qnn" in runtime else ""}
    head |= {"inputs": [vars(t) for t in inputs], "outputs": [vars(t) for t in outputs]}
    binary = onnx_graphs.HUB_TAG + json.dumps(head).encode() + b"\n" + content
    if runtime == "onnx":
        write_zip(path, {"model.onnx": content})
    elif runtime == "precompiled_qnn_onnx":
        tensors = [[(t.name, t.dtype, t.shape) for t in side] for side in (inputs, outputs)]
        around = onnx_graphs.around_binary(tensors, "model.bin", "emulated", notes=EMULATED)
        write_zip(path, {"model.onnx": around.SerializeToString(), "model.bin": binary})
    else:
        path.write_bytes(binary)
    message.input_spec.CopyFrom(tensors_to_message(inputs))
    message.output_spec.CopyFrom(tensors_to_message(outputs))
    if "qnn" in runtime:
        message.metadata.entries[pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION] = full_qairt_version(version)
    message.file_upload_complete = True
    target.path = path
    job.details.target_model.CopyFrom(message)


def write_zip(path, files):
    """The form in which the service hands out ONNX models: a zip with one folder <model>.onnx."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"model.onnx/{name}", content)


def binary_of(model):
    """(what its first lines say, its ONNX bytes) of a compiled model. Raises EmulatedJobError for one not made here."""
    with unzipped(model.path) as path:
        if head_and_graph := onnx_graphs.read_hub_binary(path):
            return head_and_graph
    if model.message.model_type == pb.MODEL_TYPE_ONNX:
        return {"runtime": "onnx"}, onnx_of_upload(model.path).SerializeToString()
    kind = pb.ModelType.Name(model.message.model_type).removeprefix("MODEL_TYPE_")
    raise EmulatedJobError(
        f"this {kind} was not made by the local hub: it runs on a Qualcomm device, or in Qualcomm's emulator "
        f"(tools/predict.py --checkpoint, tools/compile_offline.py --num-clips)"
    )


def check_same_qairt(head, job):
    """Raise EmulatedJobError if a job runs another version of QAIRT than the one that made a binary."""
    made_with, runs = head.get("qairt_version"), job.parsed_options["qairt_version"]
    if made_with and made_with != runs:
        raise EmulatedJobError(
            f"QNN_VERSION_MISMATCH: the binary was made with QAIRT {made_with}, the job runs {runs}; --qairt_version "
            f"{made_with} names it"
        )


def make_session(content):
    """An onnxruntime session on the CPU. Raises EmulatedJobError if the bytes are no model that it can run."""
    try:
        return onnx_graphs.cpu_session(content)
    except Exception as e:
        raise EmulatedJobError(f"onnxruntime cannot run the model: {e}") from e


def session_of(hub, job):
    """The session of a job's model, kept for the next job on it. Raises EmulatedJobError."""
    head, session = hub.sessions.pop(job.model_id, None) or (None, None)
    if session is None:
        head, content = binary_of(hub.models[job.model_id])
        session = make_session(content)
    hub.sessions[job.model_id] = head, session
    while len(hub.sessions) > CACHED_SESSIONS:
        del hub.sessions[next(iter(hub.sessions))]
    if head["runtime"] != "qnn_dlc":  # any version loads one
        check_same_qairt(head, job)
    return session


def inputs_and_outputs(session):
    """The inputs and the outputs of a session as two lists of Tensor; scales as expose_quantized_io noted them."""
    quantizers = json.loads(session.get_modelmeta().custom_metadata_map.get("quantizers", "{}"))
    lists = []
    for arguments in (session.get_inputs(), session.get_outputs()):
        lists.append([])
        for argument in arguments:
            dtype = onnx_graphs.dtype_in_session(argument)
            quantizer = quantizers.get(argument.name, (None, None))
            lists[-1].append(Tensor(argument.name, tuple(argument.shape), dtype, *quantizer))
    return lists
