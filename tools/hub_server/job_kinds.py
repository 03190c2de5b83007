"""What each kind of job does: compile, quantize, link, inference, profile."""

import contextlib
import sys
import tempfile
import time
from pathlib import Path

import common

import numpy as np

from aihub import logits_file, onnx_graphs

from . import source_models
from .compiled_models import binary_of, check_same_qairt, inputs_and_outputs, make_session, session_of, write_target
from .records import EMULATED, EmulatedJobError, Tensor, pb, tensors_from_message, tensors_to_message, tool_versions

PROFILE_RUNS = 5  # timed runs of a profile job, after one that is not timed


def check_goes_on(hub):
    """Raise EmulatedJobError if the hub stops."""
    if hub.stopping:
        raise EmulatedJobError("the local hub was stopped")


# --- compile, quantize and link jobs ----------------------------------------------------------------------------------


def run_compile_job(hub, job):
    """Source model -> ONNX with the inputs and outputs that the options ask for -> the target runtime's form."""
    options = job.parsed_options
    runtime = options.get("target_runtime", "tflite")
    specs = tensors_from_message(job.details.tensor_type_list)
    proto = source_models.load_as_onnx(hub.models[job.model_id], specs)
    if any(not dims or None in dims for dims in map(onnx_graphs.dims_of, proto.graph.output)):
        import onnx

        proto = onnx.shape_inference.infer_shapes(proto)
    source_models.rename_outputs(proto.graph, options.get("output_names"))
    if "quantize_io" in options:
        source_models.honour_quantize_io(proto)
    source_models.move_channels_last(proto.graph, options.get("force_channel_last_input"))
    write_target(hub, job, runtime, proto.SerializeToString())
    job.details.target_tensor_type_list.CopyFrom(hub.models[job.target_id].message.input_spec)
    job.result.compile_job_result.compile_job_id = job.id
    job.result.compile_job_result.compile_detail.tool_versions.extend(tool_versions(job, runtime))


def run_quantize_job(hub, job):
    """Static QDQ quantization by onnxruntime with the uploaded calibration samples."""
    bits = {pb.QUANTIZE_DTYPE_INT8: 8, pb.QUANTIZE_DTYPE_INT16: 16}
    weights, activations = bits.get(job.details.weights_dtype), bits.get(job.details.activations_dtype)
    if not weights or not activations:
        raise EmulatedJobError("the local hub quantizes weights and activations to int8 or int16")
    proto = source_models.onnx_of_upload(hub.models[job.model_id].path)
    source_models.fix_input_shapes(proto, [])
    inputs, _ = inputs_and_outputs(make_session(proto.SerializeToString()))

    def read_each(samples):
        for i in range(samples.num_samples):
            check_goes_on(hub)
            job.num_samples += 1
            yield samples.read(i)

    with tempfile.TemporaryDirectory(dir=hub.folder) as folder, open_dataset(hub, job) as samples:
        samples.check(inputs)
        quantized = Path(folder, "quantized.onnx")
        onnx_graphs.quantize_onnx(proto, quantized, read_each(samples), weights, activations)
        write_target(hub, job, "onnx", quantized.read_bytes())
    job.result.quantize_job_result.quantize_job_id = job.id


def run_link_job(hub, job):
    """DLC -> context binary: the same content under another head."""
    if len(job.model_ids) > 1:
        raise EmulatedJobError("the local hub links one model at a time")
    source = hub.models[job.model_id]
    if source.message.model_type != pb.MODEL_TYPE_QNN_DLC:
        raise EmulatedJobError("only a QNN DLC can be linked")
    head, content = binary_of(source)
    check_same_qairt(head, job)
    write_target(hub, job, "qnn_context_binary", content)
    job.result.link_job_result.link_job_id = job.id


# --- inference and profile jobs ---------------------------------------------------------------------------------------


class Samples:
    """The samples of a dataset's HDF5 file, read one at a time: {input name: array}."""

    def __init__(self, path):
        self.file, _ = common.open_hdf5(path)
        groups = sorted(self.file["data"].values(), key=lambda group: group.attrs.get("order", 0))
        self.groups = {group.attrs["name"]: group for group in groups}
        self.num_samples = int(groups[0].attrs["batch_count"]) if groups else 0

    def close(self):
        self.file.close()

    def check(self, inputs):
        """Raise EmulatedJobError unless every sample has exactly these inputs, in this order."""
        names = [t.name for t in inputs]
        if list(self.groups) != names:
            raise EmulatedJobError(f"the dataset has the inputs {', '.join(self.groups)}, the model {', '.join(names)}")
        for tensor in inputs:
            group = self.groups[tensor.name]
            if group.attrs["batch_count"] != self.num_samples:
                raise EmulatedJobError("the dataset has not the same number of samples for every input")
            for i in range(self.num_samples):
                sample = group[logits_file.batch_name(i)]
                if sample.shape != tensor.shape or sample.dtype.name not in tensor.accepted_dtypes:
                    given = Tensor(tensor.name, sample.shape, sample.dtype.name)
                    raise EmulatedJobError(f"sample {i} of the dataset is {given}, the model expects {tensor}")

    def read(self, i):
        return {name: group[logits_file.batch_name(i)][()] for name, group in self.groups.items()}


def open_dataset(hub, job):
    """The Samples of a job's dataset, as a context. Raises EmulatedJobError if it is no dataset."""
    try:
        return contextlib.closing(Samples(hub.datasets[job.dataset_id].path))
    except (OSError, KeyError) as e:
        raise EmulatedJobError(f"dataset {job.dataset_id} is not of AI Hub's layout: {e}") from e


def run_inference_job(hub, job):
    """Run the model on every sample, one at a time in memory, and write the outputs as a new dataset.

    A quantised input takes stored or real (float32) values; outputs are then real, too, if an input was.
    """
    session = session_of(hub, job)
    inputs, outputs = inputs_and_outputs(session)
    job.details.tensor_type_list.CopyFrom(tensors_to_message(inputs))
    result = job.result.inference_job_result
    result.inference_job_id = job.id
    dataset = hub.add_dataset(f"outputs of {job.id}")
    path = hub.folder / f"{dataset.dataset_id}.h5"
    microseconds = []
    with open_dataset(hub, job) as samples, common.new_hdf5(path) as file:
        samples.check(inputs)
        groups = [logits_file.begin_samples(file, t.name, samples.num_samples, k) for k, t in enumerate(outputs)]
        for i in range(samples.num_samples):
            check_goes_on(hub)
            sample = samples.read(i)
            feeds = {t.name: t.quantize(sample[t.name]) for t in inputs}
            start = time.perf_counter()
            arrays = session.run(None, feeds)
            microseconds.append(round((time.perf_counter() - start) * 1e6))
            if any(sample[name].dtype != feeds[name].dtype for name in feeds):
                arrays = [t.dequantize(array) for t, array in zip(outputs, arrays)]
            for group, array in zip(groups, arrays):
                group.create_dataset(logits_file.batch_name(i), data=array, compression="gzip")
            job.num_samples += 1
    hub.datasets[dataset.dataset_id].path = path
    dataset.file_upload_complete = True
    job.output_dataset_id = result.output_dataset_id = dataset.dataset_id
    if job.profiling:
        fill_in_profile(hub, job, microseconds)


def run_profile_job(hub, job):
    """Time the model on random inputs."""
    session = session_of(hub, job)
    inputs, _ = inputs_and_outputs(session)
    job.details.tensor_type_list.CopyFrom(tensors_to_message(inputs))
    job.result.inference_job_result.inference_job_id = job.id
    random = np.random.default_rng(0)
    sample = {t.name: (random.random(t.shape) * (1 if t.dtype == "float32" else 255)).astype(t.dtype) for t in inputs}
    microseconds = []
    for _ in range(1 + PROFILE_RUNS):
        start = time.perf_counter()
        session.run(None, sample)
        microseconds.append(round((time.perf_counter() - start) * 1e6))
    fill_in_profile(hub, job, microseconds[1:])


def peak_memory():
    """Most memory that this process held, in bytes; 0 where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fill_in_profile(hub, job, microseconds):
    """Latency and memory as measured here; every layer is on the CPU."""
    import onnx

    detail = job.result.inference_job_result.detail
    detail.major_version, detail.minor_version = 1, 2
    detail.execution_time = int(np.median(microseconds))
    detail.all_execution_times.extend(microseconds)
    peak = peak_memory()
    detail.after_execution_peak_memory = peak
    detail.execution_memory.peak.lower = detail.execution_memory.peak.upper = peak
    detail.execution_memory.increase.lower = detail.execution_memory.increase.upper = 0
    model = hub.models[job.model_id]
    proto = onnx.load_from_string(binary_of(model)[1])
    for node in proto.graph.node:
        layer = detail.layer_details.add(name=node.name or node.output[0], layer_type_name=node.op_type)
        layer.compute_unit, layer.delegate_name = pb.COMPUTE_UNIT_CPU, f"onnxruntime, {EMULATED}"
    runtime = {pb.MODEL_TYPE_ONNX: "onnx", pb.MODEL_TYPE_TFLITE: "tflite"}.get(model.message.model_type, "qnn")
    if pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION in model.message.metadata.entries:
        runtime = "qnn"
    detail.tool_versions.extend(tool_versions(job, runtime))
    job.details.execution_time = detail.execution_time
