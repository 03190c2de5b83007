"""A local hub on which things go wrong, as a test orders them: `hub.faults.append(Fault("POST /api/v1/jobs/", …))`."""

import asyncio
import fnmatch
import threading
import time
from dataclasses import dataclass

import h5py
from aiohttp import web

from hub_server import LocalHub
from hub_server.jobs import INLINE_SECONDS
from hub_server.records import JobFailedError, RefusedError, timestamp


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
    """A LocalHub with `faults`, and `job_seconds` that every job takes longer than it does."""

    def __init__(self, job_seconds=0.0, **limits):
        super().__init__(**limits)
        self.faults, self.job_seconds, self.fault_of = [], job_seconds, {}
        self.lock = threading.Lock()

    def take_fault(self, text, options=""):
        """The first ordered fault that strikes here, or NO_FAULT."""
        with self.lock:
            return next((fault for fault in self.faults if fault.hits(text, options)), NO_FAULT)

    def expire_dataset(self, dataset_id):
        """Let a dataset be older than its 30 days."""
        self.datasets[dataset_id].message.expiration_time.CopyFrom(timestamp(-60))

    async def answer(self, request):
        fault = self.take_fault(f"{request.method} {request.path}")
        await asyncio.sleep(fault.delay)
        response = web.Response()
        if fault.drop != "request":
            if fault.status:
                await request.read()
                raise RefusedError(fault.status, fault.message)
            response = await super().answer(request)
        if fault.drop:
            request.transport.close()
        return response

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
            raise JobFailedError(fault.message)
        super().run(job)
        if fault.outputs:
            self.damage_outputs(job, fault.outputs)

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
