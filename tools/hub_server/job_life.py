"""The life of a job: its options, its submission, waiting for the models that it needs, its end."""

import shlex
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

from . import job_kinds
from .compiled_models import RUNTIMES
from .records import EMULATED, EmulatedJobError, JobRecord, ModelRecord, RefusedError, new_id, pb, timestamp

INLINE_SECONDS = 15  # s; a shorter job is done when its submission is answered (the client gives up after 28 s)
# Jobs compute one at a time, all in one thread that lives as long as the process: torch.export.load keeps something of
# the first thread that called it and crashes the process when that thread has ended (torch 2.11 without a GPU).
COMPUTER = ThreadPoolExecutor(max_workers=1)

RUNNERS = {
    "compile": (job_kinds.run_compile_job, pb.JOB_STATE_OPTIMIZING_MODEL),
    "quantize": (job_kinds.run_quantize_job, pb.JOB_STATE_QUANTIZING_MODEL),
    "link": (job_kinds.run_link_job, pb.JOB_STATE_LINKING_MODELS),
    "inference": (job_kinds.run_inference_job, pb.JOB_STATE_RUNNING_INFERENCE),
    "profile": (job_kinds.run_profile_job, pb.JOB_STATE_MEASURING_PERFORMANCE),
}

# The options of each kind of job: a flag, one that takes any value, or the values that it takes. Options about how a
# Qualcomm chip computes (qnn_options, compute_unit …) change nothing here; one that would change numbers and is not
# emulated is not known.
FLAG, ANY = (), None
RUN_OPTIONS = {"qairt_version": ANY, "qnn_options": ANY, "compute_unit": ANY, "onnx_options": ANY,
               "tflite_options": ANY, "max_profiler_iterations": ANY, "max_profiler_time": ANY}
OPTIONS = {
    "compile": {"target_runtime": tuple(RUNTIMES), "output_names": ANY, "force_channel_last_input": ANY,
                "quantize_io": FLAG, "quantize_io_type": ("uint8",), "qairt_version": ANY, "qnn_options": ANY,
                "qnn_graph_name": ANY, "compute_unit": ANY},
    "quantize": {"range_scheme": ("min_max",)},
    "link": {"qairt_version": ANY, "qnn_options": ANY},
    "inference": RUN_OPTIONS,
    "profile": RUN_OPTIONS,
}

def chosen_qairt_version(hub, version_or_tag):
    """One of the versions on offer, or RefusedError 400."""
    if version_or_tag in ("default", "latest"):
        return hub.qairt_versions[0]
    if version_or_tag not in hub.qairt_versions:
        offered = ", ".join(hub.qairt_versions)
        raise RefusedError(400, f"QAIRT version {version_or_tag} is not available; there are {offered}")
    return version_or_tag


def parse_options(hub, kind, text):
    """The options in `text` as {name: value}, "" for a flag; with "qairt_version" where that kind has one.

    Raises RefusedError 400 for what a job does not take.
    """
    options, words = {}, shlex.split(text)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in OPTIONS[kind]:
            raise RefusedError(400, f"unknown option {flag} of a {kind} job (or the local hub does not emulate it)")
        choices = OPTIONS[kind][name]
        if choices != FLAG and not equals:
            if not words or words[0].startswith("--"):
                raise RefusedError(400, f"option {flag} needs a value")
            value = words.pop(0)
        if choices and value not in choices:
            raise RefusedError(400, f"{flag} {value} is not known here; known are {', '.join(choices)}")
        options[name] = value
    if "qairt_version" in OPTIONS[kind]:
        options["qairt_version"] = chosen_qairt_version(hub, options.get("qairt_version", "default"))
    return options


# --- the API's calls --------------------------------------------------------------------------------------------------


def create_job(hub, query, body):
    message = pb.Job.FromString(body)
    field_name = message.WhichOneof("job")
    if field_name not in ("compile_job", "quantize_job", "link_job", "inference_job"):
        raise RefusedError(400, f"the local hub runs no {field_name}")
    details = getattr(message, field_name)
    kind = field_name.removesuffix("_job")
    if kind == "inference" and not details.dataset.dataset_id:
        kind = "profile"
    job = JobRecord(new_id("j"), kind, message, details, parse_options(hub, kind, details.options))
    fill_in_job(hub, job)
    hub.submit(job)
    return pb.CreateUpdateResponse(id=job.id, creation_time=details.creation_time)


def get_job(hub, query, body, job_id):
    return hub.find("jobs", job_id).message


def get_job_result(hub, query, body, job_id):
    return hub.find("jobs", job_id).result


# --- from submission to end -------------------------------------------------------------------------------------------


def fill_in_job(hub, job):
    """Check what the job refers to and complete its message. Raises RefusedError."""
    for model_id in job.model_ids:
        model = hub.find("models", model_id)
        if model.path is None and not model.message.producer_id:
            raise RefusedError(400, f"the upload of model {model_id} is not complete")
    if job.dataset_id:
        dataset = hub.find("datasets", job.dataset_id)
        if dataset.path is None or dataset.expired:
            raise RefusedError(400, f"dataset {job.dataset_id} has expired or its upload is not complete")
    job.message.hub_version = f"local hub, {EMULATED}"
    details = job.details
    setattr(details, f"{job.message.WhichOneof('job')}_id", job.id)
    details.job_state = pb.JOB_STATE_CREATED
    details.creation_time.CopyFrom(timestamp())
    if job.kind != "link":
        details.model.CopyFrom(hub.models[job.model_id].message)
    if job.kind == "compile":
        details.device.CopyFrom(details.devices.devices[0])


def add_target_model(hub, job):
    """The handle of the model that the job will make: the client holds it from submission on."""
    runtime = {"quantize": "onnx", "link": "qnn_context_binary"}.get(job.kind)
    runtime = runtime or job.parsed_options.get("target_runtime", "tflite")
    job.target_id = new_id("m")
    target = pb.Model(model_id=job.target_id, name=job.details.name, model_type=RUNTIMES[runtime], producer_id=job.id)
    target.creation_time.CopyFrom(timestamp())
    target.is_directory = target.model_type == pb.MODEL_TYPE_ONNX
    hub.models[job.target_id] = ModelRecord(target)
    job.details.target_model.CopyFrom(target)


def start(hub, job, inline_seconds):
    """Let a job run in a thread of its own; waits up to `inline_seconds` for its end."""
    if job.kind in ("compile", "quantize", "link"):
        add_target_model(hub, job)
    hub.jobs[job.id] = job
    threading.Thread(target=run_to_end, args=(hub, job), daemon=True).start()
    job.finished.wait(inline_seconds)


def run_to_end(hub, job):
    """Run a job until it is done or failed; the body of its thread."""
    state = pb.JOB_STATE_FAILED
    try:
        wait_for_models(hub, job)
        job.details.job_state = RUNNERS[job.kind][1]
        hub.run(job)
        state = pb.JOB_STATE_DONE
    except EmulatedJobError as e:
        job.details.failure_reason = f"{e} (local hub)"
    except Exception as e:
        job.details.failure_reason = f"the local hub cannot run this job: {type(e).__name__}: {e}"[:1000]
        if not hub.stopping:
            hub.report(f"{job.kind} job {job.id}", e)
    job.details.completion_time.CopyFrom(timestamp())
    job.details.job_state = state
    job.finished.set()


def run_in_turn(hub, job):
    """Do what the job asks for, in the one thread that computes. Raises EmulatedJobError."""

    def in_that_thread():
        job_kinds.check_goes_on(hub)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            RUNNERS[job.kind][0](hub, job)

    COMPUTER.submit(in_that_thread).result()


def wait_for_models(hub, job):
    """Block until the jobs that make this job's models are done. Raises EmulatedJobError if one failed."""
    for model_id in job.model_ids:
        producer = hub.jobs.get(hub.models[model_id].message.producer_id)
        if producer:
            producer.finished.wait()
            if producer.state == "failed":
                raise EmulatedJobError(f"{producer.kind} job {producer.id}, which makes model {model_id}, failed")
