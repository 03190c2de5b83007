"""What the hub remembers: models, datasets and jobs, each with the protobuf message that the client reads; tensors."""

import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from qai_hub import public_api_pb2 as pb

EMULATED = "emulated on the CPU by tools/local_hub.py"
DTYPES = {
    "float32": pb.TENSOR_DTYPE_FLOAT32,
    "float16": pb.TENSOR_DTYPE_FLOAT16,
    "int32": pb.TENSOR_DTYPE_INT32,
    "int64": pb.TENSOR_DTYPE_INT64,
    "int8": pb.TENSOR_DTYPE_INT8,
    "uint8": pb.TENSOR_DTYPE_UINT8,
    "int16": pb.TENSOR_DTYPE_INT16,
    "uint16": pb.TENSOR_DTYPE_UINT16,
    "bool": pb.TENSOR_DTYPE_BOOL,
}
DTYPE_NAMES = {value: name for name, value in DTYPES.items()}


class RefusedError(Exception):
    """A request is answered with this HTTP status and sentence; the client shows it."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class EmulatedJobError(Exception):
    """A job ends as failed with this sentence as its reason."""


def full_qairt_version(version):
    """The version as metadata shows it; its flavour says that it is none of Qualcomm's."""
    return f"{version}.0.000000-emulated-on-the-cpu"


def tool_versions(job, runtime):
    """What a job's model was made or run with, as messages."""
    import onnx
    import onnxruntime

    versions = {"ONNX": onnx.__version__, "ONNX Runtime": onnxruntime.__version__}
    if "qnn" in runtime:
        versions["QAIRT"] = full_qairt_version(job.parsed_options["qairt_version"])
    if runtime == "tflite":
        versions["TensorFlow Lite"] = "emulated"
    return [pb.ToolVersion(name=name, version=version) for name, version in versions.items()]


def timestamp(seconds_from_now=0):
    return Timestamp(seconds=int(time.time() + seconds_from_now))


def new_id(letter):
    """An id as the service's: a letter for the kind, then letters and digits."""
    return letter + secrets.token_hex(4)


@dataclass
class ModelRecord:
    """A model: uploaded (`path` is there once its upload is complete) or made by a job (once the job is done)."""

    message: pb.Model
    path: Path | None = None
    shared_with: list = field(default_factory=list)  # e-mail addresses


@dataclass
class DatasetRecord:
    """A dataset: an HDF5 file at `path`, uploaded or made by an inference job."""

    message: pb.Dataset
    path: Path | None = None
    shared_with: list = field(default_factory=list)

    @property
    def expired(self):
        return self.message.expiration_time.seconds < time.time()


@dataclass
class JobRecord:
    """A job as submitted and what became of it. `details` is the message of its kind, say pb.CompileJob."""

    id: str
    kind: str  # "compile", "quantize", "link", "inference", or "profile": an inference job without inputs
    message: pb.Job
    details: object
    parsed_options: dict = field(default_factory=dict)
    target_id: str = ""  # model that it makes
    output_dataset_id: str = ""
    num_samples: int = 0  # that it ran on or calibrated with
    result: pb.JobResult = field(default_factory=pb.JobResult)
    finished: threading.Event = field(default_factory=threading.Event)
    shared_with: list = field(default_factory=list)

    @property
    def options(self):
        return self.details.options

    @property
    def model_ids(self):
        models = self.details.models.models if self.kind == "link" else [self.details.model]
        return [model.model_id for model in models]

    @property
    def model_id(self):
        return self.model_ids[0]

    @property
    def dataset_id(self):
        """The input or calibration dataset, "" without one."""
        if self.kind in ("link", "profile"):
            return ""
        name = "dataset" if self.kind == "inference" else "calibration_dataset"
        return getattr(self.details, name).dataset_id

    @property
    def profiling(self):
        return self.kind in ("inference", "profile") and self.details.is_profiling_on

    @property
    def state(self):
        """What it is doing, say "running_inference"; before that "created", in the end "done" or "failed"."""
        return pb.JobState.Name(self.details.job_state).removeprefix("JOB_STATE_").lower()


@dataclass
class Tensor:
    """An input or output of a model; scale and zero point if it is quantised: real = (stored - zero_point) * scale."""

    name: str
    shape: tuple
    dtype: str
    scale: float | None = None
    zero_point: int | None = None

    def __str__(self):
        return f"{self.name} {self.shape} {self.dtype}"

    @property
    def accepted_dtypes(self):
        """Of samples: its own, and float32 if it is quantised (qai_hub_models sends float32 there, too)."""
        return (self.dtype,) if self.scale is None else (self.dtype, "float32")

    def quantize(self, array):
        """Real values as stored; what is stored already passes."""
        if array.dtype.name == self.dtype:
            return array
        limits = np.iinfo(self.dtype)
        return np.clip(np.rint(array / self.scale) + self.zero_point, limits.min, limits.max).astype(self.dtype)

    def dequantize(self, array):
        if self.scale is None:
            return array
        return (array.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def to_message(self):
        tensor_type = pb.TensorType(shape=self.shape, dtype=DTYPES[self.dtype])
        if self.scale is not None:
            tensor_type.scale, tensor_type.zero_point = self.scale, self.zero_point
        return pb.NamedTensorType(name=self.name, tensor_type=tensor_type)


def tensors_to_message(tensors):
    return pb.NamedTensorTypeList(types=[tensor.to_message() for tensor in tensors])


def tensors_from_message(message):
    return [Tensor(t.name, tuple(t.tensor_type.shape), DTYPE_NAMES[t.tensor_type.dtype]) for t in message.types]


def listed(tensors):
    return ", ".join(map(str, tensors)) or "none"
