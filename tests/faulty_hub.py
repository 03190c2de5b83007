"""A local hub on which things go wrong, as a test orders them: `hub.faults.append(Fault("POST /api/v1/jobs/", …))`."""

import asyncio
import collections
import fnmatch
import math
import os
import re
import threading
import time
from dataclasses import dataclass

import h5py
from aiohttp import web

from hub_server import LocalHub, routes
from hub_server.compiled_models import binary_of
from hub_server.job_life import INLINE_SECONDS
from hub_server.records import EmulatedJobError, RefusedError, pb, timestamp

# a proxy of the machine is not for the hub on it; scripts inherit this
os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"127.0.0.1,localhost,{os.environ.get('NO_PROXY', '')}"


def devices_of_ai_hub():
    """The local hub's devices without the word that they are emulated, for `routes.DEVICES`."""
    devices = [pb.Device.FromString(device.SerializeToString()) for device in routes.DEVICES]
    for device in devices:
        device.attributes.remove("emulated:cpu")
    return devices


@dataclass(eq=False)
class Fault:
    """Something that goes wrong.

    where: a request as "METHOD /path", `*` matching anything ("GET /api/v1/jobs/*", "PUT /blob/*"), or the kind of a
        job: "compile", "quantize", "link", "inference" or "profile"; or "dataset": it has expired when it is created.
    skip, times: the first `skip` matches pass, the next `times` are hit.
    options: for a job, only those whose options contain this text, say "--target_runtime qnn_context_binary".
    """

    where: str
    status: int = 0  # HTTP status: the request, or the submission of the job, is refused with it
    message: str = "ordered by a test"  # of the refusal, or the reason why the job fails
    delay: float = 0  # s before the answer, or that a job takes longer
    drop: str = ""  # "request": the connection closes, nothing was done; "answer": done, but the answer is lost
    fail: bool = False  # the job ends as failed
    outputs: str = ""  # an inference job's: "missing", "short" (a sample too few), "shape" (a class too few), "expired"
    options: str = ""
    skip: int = 0
    times: int = 1

    def hits(self, text, options=""):
        """Whether this fault strikes here; counts `skip` and `times` down."""
        if self.times < 1 or self.options not in options or not fnmatch.fnmatchcase(text, self.where):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


NO_FAULT = Fault("", message="")


class FaultyHub(LocalHub):
    """A LocalHub with `faults`, `job_seconds` that every job takes longer than it does, and `quirks`.

    max_requests: in `window` seconds; more are refused with status 429. keep_data: what jobs have used stays.

    quirks, ways in which the service may differ from what the scripts hope: "no scale" (it does not tell scales and
    zero points), "no spec" (nor anything else of what a model takes and gives), "no shapes" (nor do jobs that ran),
    "silent" (jobs fail without a reason), "by size" (a clip of another shape and the right size runs).
    """

    def __init__(self, job_seconds=0.0, quirks=(), keep_data=True, max_requests=6000, **options):
        super().__init__(**options)
        self.faults, self.job_seconds, self.fault_of = [], job_seconds, {}
        self.quirks, self.keep_data = set(quirks), keep_data
        self.times, self.window = collections.deque(maxlen=max_requests), 60
        self.lock = threading.Lock()

    def take_fault(self, text, options=""):
        """The first ordered fault that strikes here, or NO_FAULT."""
        with self.lock:
            return next((fault for fault in self.faults if fault.hits(text, options)), NO_FAULT)

    def expire_dataset(self, dataset_id):
        """Let a dataset be older than its 30 days."""
        self.datasets[dataset_id].message.expiration_time.CopyFrom(timestamp(-60))

    def delete_used_data(self):
        if not self.keep_data:
            super().delete_used_data()

    async def answer(self, request):
        if not request.path.startswith("/blob/"):
            self.times.append(time.monotonic())
            if len(self.times) == self.times.maxlen and self.times[-1] - self.times[0] < self.window:
                raise RefusedError(429, f"more than {self.times.maxlen} requests a minute; slow down")
        fault = self.take_fault(f"{request.method} {request.path}")
        await asyncio.sleep(fault.delay)
        response = web.Response()
        if fault.drop != "request":
            if fault.status:
                await request.read()
                raise RefusedError(fault.status, fault.message)
            response = await super().answer(request)
            if request.method == "GET" and self.quirks:
                self.leave_out(request.path, response)
        if fault.drop:
            request.transport.close()
        return response

    def leave_out(self, path, response):
        """Take out of an answer what the hub's quirks keep to themselves."""
        if re.fullmatch("/api/v1/models/[a-z0-9]+/", path):
            message = model = pb.Model.FromString(response.body)
        elif re.fullmatch("/api/v1/jobs/[a-z0-9]+/", path):
            message = pb.Job.FromString(response.body)
            details = getattr(message, message.WhichOneof("job"))
            model = details.target_model if hasattr(details, "target_model") else details.model
            if "no shapes" in self.quirks and hasattr(details, "tensor_type_list"):
                details.ClearField("tensor_type_list")
            if "silent" in self.quirks:
                details.failure_reason = ""
        else:
            return
        for spec in (model.input_spec, model.output_spec):
            if "no spec" in self.quirks:
                spec.Clear()
            for tensor in spec.types if "no scale" in self.quirks else []:
                tensor.tensor_type.ClearField("scale")
                tensor.tensor_type.ClearField("zero_point")
        response.body = message.SerializeToString()

    def add_dataset(self, name):
        message = super().add_dataset(name)
        if not name.startswith("outputs of") and self.take_fault("dataset") is not NO_FAULT:
            self.expire_dataset(message.dataset_id)
        return message

    def submit(self, job, inline_seconds=INLINE_SECONDS):
        self.fault_of[job.id] = fault = self.take_fault(job.kind, job.options)
        if fault.status:
            raise RefusedError(fault.status, fault.message)
        super().submit(job, 0 if self.job_seconds or fault.delay else inline_seconds)

    def run(self, job):
        fault = self.fault_of[job.id]
        time.sleep(self.job_seconds + fault.delay)
        if fault.fail:
            raise EmulatedJobError(fault.message)
        if "by size" in self.quirks and job.kind == "inference":
            self.reshape_samples(job)
        super().run(job)
        if fault.outputs:
            self.damage_outputs(job, fault.outputs)

    def reshape_samples(self, job):
        """Give samples of another shape and the right size the model's, as a device that takes them for raw memory."""
        shape = tuple(binary_of(self.models[job.model_id])[0]["inputs"][0]["shape"])
        with h5py.File(self.datasets[job.dataset_id].path, "r+") as file:
            for group in file["data"].values():
                for name, sample in list(group.items()):
                    if sample.size == math.prod(shape) and sample.shape != shape:
                        values = sample[()].reshape(shape)
                        del group[name]
                        group[name] = values

    def damage_outputs(self, job, how):
        if how == "missing":
            job.output_dataset_id = job.result.inference_job_result.output_dataset_id = ""
        elif how == "expired":
            self.expire_dataset(job.output_dataset_id)
        else:
            with h5py.File(self.datasets[job.output_dataset_id].path, "r+") as file:
                for group in file["data"].values():
                    if how == "short":
                        group.attrs["batch_count"] -= 1
                        del group[f"batch_{group.attrs['batch_count']}"]
                    else:
                        arrays = {name: sample[..., :-1] for name, sample in group.items()}
                        for name, array in arrays.items():
                            del group[name]
                            group[name] = array
