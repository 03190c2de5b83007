"""Talking to AI Hub through the real qai_hub client: connecting, devices, jobs that are waited for, its errors.

qai_hub is imported inside the functions that need it, so that `--help` stays fast.
"""

import collections
import configparser
import contextlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import common

LATENCY_GATE_MS = 34  # LPCVC 2026, track 2: a valid entry is faster than this on the Dragonwing IQ-9075 EVK


class JobFailedError(Exception):
    """A job of AI Hub ended without success; the message is one sentence with its reason and its URL."""


def sentence_of(error):
    """What an error of the qai_hub client says, on one line and without the box that it draws."""
    return " ".join(re.sub(r"[┌─┐└┘|]", " ", str(error)).split())


def hub_errors():
    """What the qai_hub client raises when AI Hub refuses a request or does not answer it.

    With what botocore raises: the service may let the client up- and download from its storage without going between.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from qai_hub.client import APIException, Error
    from s3transfer.exceptions import RetriesExceededError

    return (Error, APIException, BotoCoreError, ClientError, RetriesExceededError)


def is_passing(error):
    """Whether one of `hub_errors` comes of a service that is away or asks to slow down; False for what it refuses."""
    from qai_hub.client import APIException, UserError

    if isinstance(error, APIException):
        return error.status_code == 429 or (error.status_code or 0) >= 500
    return not isinstance(error, UserError)


@contextlib.contextmanager
def hub_errors_in_one_sentence():
    """Turn a failed job or an error of the qai_hub client into one sentence on stderr and exit code 1; Ctrl-C, 130."""
    try:
        yield
    except KeyboardInterrupt:
        common.interrupted("jobs that were submitted go on at AI Hub")
    except JobFailedError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    except hub_errors() as e:
        print(f"error: AI Hub: {sentence_of(e)}", file=sys.stderr)
        raise SystemExit(1) from None


def connect_to_hub():
    """Import the qai_hub client and ask AI Hub for something, so that a bad configuration shows at once.

    Returns the module. Exits with one sentence: code 2 if no token is configured, the file with it is damaged or the
    token is not accepted, code 1 if the service does not answer (the client tries for 46 s).
    """
    if not common.has_locks(tempfile.gettempdir()):
        # the client makes and reads HDF5 files there; heard only if nothing has imported h5py before
        os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    import qai_hub as hub
    from qai_hub.client import UserError

    client_ini = os.environ.get("QAIHUB_CLIENT_INI", "~/.qai_hub/client.ini")
    script = Path(sys.argv[0]).name
    with hub_errors_in_one_sentence():
        try:
            hub.get_frameworks()
        except UserError as e:
            if "Failed to load" in str(e):
                common.refuse(
                    f"no AI Hub token is configured in {client_ini}: get one at https://workbench.aihub.qualcomm.com "
                    f"(Account), then `qai-hub configure --api_token TOKEN` writes that file; or run without an "
                    f"account on this machine: python tools/local_hub.py python tools/{script}"
                )
            if "Failed to authenticate" in str(e):
                common.refuse(
                    f"AI Hub does not accept the token in {client_ini}: copy the current one from "
                    f"https://workbench.aihub.qualcomm.com (Account) and run `qai-hub configure --api_token TOKEN`"
                )
            raise
        except (configparser.Error, ValueError):  # its text quotes the file, and with it the token
            common.refuse(
                f"{client_ini} cannot be read as the client's configuration: delete it and run `qai-hub configure "
                f"--api_token TOKEN`, which writes it anew"
            )
    hub.set_verbose(False)
    return hub


def find_device(hub, name, chipset=""):
    """The hub's newest device of this name or with this chipset, with its attributes. Exits with code 2 without one."""
    devices = hub.get_devices(attributes=f"chipset:{chipset}") if chipset else hub.get_devices(name=name)
    if not devices:
        what = f"with the chipset {chipset!r}" if chipset else repr(name)
        common.refuse(f"AI Hub has no device {what}; `qai-hub list-devices` shows names and chipsets")
    return devices[-1]


def is_emulated(device):
    """Whether a device of the hub says that it is emulated, as those of local_hub.py do."""
    return any(attribute.startswith("emulated") for attribute in device.attributes)


def page_of(job):
    """Where people see a job, or a model: its address at AI Hub; of the local hub, which has no pages, the id alone."""
    address = urlsplit(job.url)
    if address.hostname in ("127.0.0.1", "localhost"):
        return f"{Path(address.path).name} (local hub)"
    return job.url


def wait_for(job):
    """Wait until a job has ended; where it can be seen is printed first. Raises JobFailedError if it did not succeed.

    If AI Hub stops answering, the client's InternalError says so, and where the job can be seen that goes on there.
    """
    from qai_hub.client import InternalError

    page, seconds = page_of(job), 0.5
    print(f"{job.job_type} job {page}", flush=True)
    try:
        while not (status := job.get_status()).finished:
            time.sleep(seconds)
            seconds = min(10, 1.5 * seconds)
    except hub_errors() as e:
        raise InternalError(f"{sentence_of(e)} The {job.job_type} job goes on there: {page}") from e
    if not status.success:
        raise JobFailedError(f"the {job.job_type} job failed: {status.message or 'no reason given'}; see {page}")


def qairt_version_of(model):
    """The version of QAIRT that a hub model was compiled with, say "2.50"; "" where the hub does not say it."""
    from qai_hub import ModelMetadataKey

    version = re.match(r"\d+\.\d+", model.metadata.get(ModelMetadataKey.QAIRT_SDK_VERSION, ""))
    return version[0] if version else ""


def job_options(qairt_version, options=""):
    """Options of a job on a model that was compiled with this version of QAIRT; the user's own ones win."""
    if not qairt_version or "--qairt_version" in options:
        return options
    return f"--qairt_version {qairt_version} {options}".strip()


def target_model_of(hub, described):
    """The hub's own model that the jobs named in a description made, or None: no job, unknown here, or failed."""
    from qai_hub.client import UserError

    try:
        job_id = described.get("link_job") or described.get("compile_job")
        return hub.get_job(job_id).get_target_model() if job_id else None
    except UserError:
        return None


def profile(hub, device, model, name, options):
    """Print what a profile job, called `name`, measures: latency against the gate, memory, where the layers run.

    Returns the latency in ms. Raises JobFailedError.
    """
    job = hub.submit_inference_job(model, device, profile=True, name=name, options=options)
    wait_for(job)
    measured = job.download_profile()
    if not measured:
        raise JobFailedError(f"the {job.job_type} job brought no profile; see {page_of(job)}")
    summary, layers = measured["execution_summary"], measured["execution_detail"]
    units = collections.Counter(layer["compute_unit"] for layer in layers)
    milliseconds = summary["estimated_inference_time"] / 1000
    if is_emulated(device):
        print(f"latency   {milliseconds:.2f} ms on this CPU, which says nothing about the {LATENCY_GATE_MS} ms gate")
    else:
        verdict = "meets" if milliseconds < LATENCY_GATE_MS else "MISSES"
        print(f"latency   {milliseconds:.2f} ms on {device.name}: {verdict} the {LATENCY_GATE_MS} ms gate")
    peak = summary.get("inference_memory_peak_range")
    if isinstance(peak, tuple):
        print(f"memory    {peak[0] / 2**20:.0f} to {peak[1] / 2**20:.0f} MiB at the peak of inference")
    print(f"layers    {', '.join(f'{unit} {count}' for unit, count in sorted(units.items())) or 'not reported'}")
    elsewhere = [f"{layer['name']} ({layer['compute_unit']})" for layer in layers if layer["compute_unit"] != "NPU"]
    if elsewhere and not is_emulated(device):
        print(f"NOT ON THE NPU, which costs time: {len(elsewhere)} of {len(layers)} layers: {', '.join(elsewhere[:20])}"
              + (" …" if len(elsewhere) > 20 else ""))  # fmt: skip
    return milliseconds
