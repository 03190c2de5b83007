"""An AI Hub on this machine: the real qai_hub client talks to it, models run on the CPU with onnxruntime.

    $ python tools/local_hub.py python tools/run_inference.py   # run a command against it, exit with its exit code
    $ python tools/local_hub.py                                 # serve until Ctrl-C; prints what to set

No account, no network: it listens on 127.0.0.1 and answers the REST calls of qai_hub 0.56 with the messages of
`qai_hub.public_api_pb2`. A command finds it through QAIHUB_CLIENT_INI, which names a temporary client.ini. Compile,
quantize, link, inference and profile jobs are emulated: numbers are those of this CPU, not of a Qualcomm device, and
the binaries it makes start with a line that says so. It reads what clients upload and writes into a temporary folder
that goes when it stops. Tests start a `LocalHub` themselves, look at what it recorded and order faults of it.
"""

import contextlib
import fnmatch
import hashlib
import io
import json
import logging
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from qai_hub import public_api_pb2 as pb

from common import refuse

# ----------------------------------------------------------------------------------------------------------------------
NUM_THREADS = min(4, os.cpu_count())  # CPU threads of onnxruntime
INLINE_SECONDS = 15  # s; a shorter job is done when its submission is answered (the client gives up after 28 s)
MAX_PART_BYTES = 64 << 20  # a model is uploaded in parts of at most this many bytes
MAX_DATASET_BYTES = 2 << 30  # a larger dataset is refused with status 413
PROFILE_RUNS = 5  # timed runs of a profile job, after one that is not timed
CACHED_SESSIONS = 2  # models kept loaded between inference jobs
# ----------------------------------------------------------------------------------------------------------------------

EMULATED = "emulated on the CPU by tools/local_hub.py"
# First line of every binary made here: no program can take it for one of Qualcomm's.
TAG = b"LOCAL HUB: EMULATED ON THE CPU, NOT A QUALCOMM BINARY\n"
# Jobs compute one at a time, all in one thread that lives as long as the process: torch.export.load keeps something of
# the first thread that called it and crashes the process when that thread has ended (torch 2.11 without a GPU).
COMPUTER = ThreadPoolExecutor(max_workers=1)


class RefusedError(Exception):
    """A request is answered with this HTTP status and sentence; the client shows it."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class JobFailedError(Exception):
    """A job ends as failed with this sentence as its reason."""


@dataclass(eq=False)
class Fault:
    """Something that goes wrong, ordered by a test: `hub.faults.append(Fault("POST /api/v1/jobs/", status=503))`.

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


# --- what the hub remembers -------------------------------------------------------------------------------------------


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
    fault: Fault = NO_FAULT
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
    def device(self):
        return self.details.device.name if self.kind != "quantize" else ""

    @property
    def profiling(self):
        return self.kind in ("inference", "profile") and self.details.is_profiling_on

    @property
    def state(self):
        """What it is doing, say "running_inference"; before that "created", in the end "done" or "failed"."""
        return pb.JobState.Name(self.details.job_state).removeprefix("JOB_STATE_").lower()

    @property
    def failure(self):
        return self.details.failure_reason


class LocalHub:
    """The server, started and stopped by `with LocalHub() as hub:`.

    `url`, `token`: what a client.ini needs (`write_client_ini` writes one). `requests`: (method, path) as received.
    `models`, `datasets`, `jobs`: records by id, in the order of creation. `faults`: what shall go wrong, see Fault.
    job_seconds: s that every job takes longer; its submission is then answered before the job runs.
    """

    def __init__(self, token="local-hub", max_part_bytes=MAX_PART_BYTES, max_dataset_bytes=MAX_DATASET_BYTES,
                 job_seconds=0.0):
        self.token, self.job_seconds = token, job_seconds
        self.max_part_bytes, self.max_dataset_bytes = max_part_bytes, max_dataset_bytes
        self.requests, self.faults = [], []
        self.models, self.datasets, self.jobs = {}, {}, {}
        self.upload_keys, self.sessions = {}, {}
        self.faults_lock = threading.Lock()
        self.stopping = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="local-hub-"))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        self.server.shutdown()
        self.server.server_close()
        COMPUTER.submit(shutil.rmtree, self.folder).result()  # after the job that computes: it sees `stopping` and ends

    def write_client_ini(self, path, token=None):
        """Write a client.ini for QAIHUB_CLIENT_INI that points here; returns `path`."""
        lines = ["[api]", f"api_url = {self.url}", f"web_url = {self.url}", f"api_token = {token or self.token}"]
        Path(path).write_text("\n".join([*lines, "verbose = False", ""]), encoding="utf-8")
        return path

    def take_fault(self, text, options=""):
        """The first ordered fault that strikes here, or NO_FAULT."""
        with self.faults_lock:
            return next((fault for fault in self.faults if fault.hits(text, options)), NO_FAULT)

    def expire_dataset(self, dataset_id):
        """Let a dataset be older than its 30 days."""
        self.datasets[dataset_id].message.expiration_time.CopyFrom(timestamp(-60))

    def find(self, table, key):
        """`self.<table>[key]`, or RefusedError 404."""
        if key not in getattr(self, table):
            raise RefusedError(404, f"there is no {table[:-1]} {key}")
        return getattr(self, table)[key]


# --- server and transport ---------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One request: its fault if there is one, else a blob transfer or an API call of ROUTES."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing goes to the user's screen."""

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client may hang up, or be killed
            super().handle()

    def handle_request(self):
        url = urllib.parse.urlsplit(self.path)
        hub = self.server.hub
        hub.requests.append((self.command, url.path))
        self.pieces = self.body_pieces()
        fault = hub.take_fault(f"{self.command} {url.path}")
        try:
            time.sleep(fault.delay)
            if fault.drop == "request":
                self.close_connection = True
                return
            try:
                answer = self.answer(hub, url, fault)
            except RefusedError as e:
                answer = (e.status, json.dumps({"detail": str(e)}).encode(), {"Content-Type": "application/json"})
            for _ in self.pieces:  # an unread rest would reset the connection before the answer arrives
                pass
            if fault.drop == "answer":
                self.close_connection = True
                return
            self.reply(*answer)
        except ConnectionError:
            self.close_connection = True
        except Exception as e:
            report(f"{self.command} {url.path}", e)
            self.close_connection = True
            self.reply(500, f"{type(e).__name__}: {e}".encode(), {})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

    def answer(self, hub, url, fault):
        """(status, bytes or path of a file, headers). Raises RefusedError."""
        if fault.status:
            raise RefusedError(fault.status, fault.message)
        if url.path.startswith("/blob/"):
            return self.transfer_blob(hub, url.path.removeprefix("/blob/"))
        if self.headers.get("Authorization") != f"token {hub.token}":
            raise RefusedError(401, "Invalid token.")
        query = dict(urllib.parse.parse_qs(url.query))
        for method, pattern, function in ROUTES:
            match = re.fullmatch(f"/api/v1/{pattern}/".replace("ID", "([a-z0-9]+)"), url.path)
            if method == self.command and match:
                message = function(hub, query, b"".join(self.pieces), *match.groups())
                return 200, message.SerializeToString(), {"Content-Type": "application/x-protobuf"}
        raise RefusedError(404, f"the local hub does not know {self.command} {url.path}")

    def body_pieces(self):
        """Yield the request's body in pieces. Raises ConnectionResetError if it ends early."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"-1", 16):
                piece = self.rfile.read(size) if size > 0 else b""
                if not piece or len(piece) < size:
                    raise ConnectionResetError
                yield piece
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 1 << 20))
            if not piece:
                raise ConnectionResetError
            left -= len(piece)
            yield piece

    def transfer_blob(self, hub, key):
        """Take in an upload or give out a file, as a storage service does behind pre-signed addresses."""
        if not re.fullmatch(r"[mdu][0-9a-f]{8}[-.\w]*", key):  # the name of a model, dataset or part, no path
            raise RefusedError(404, f"there is no file {key}")
        if self.command == "GET":
            path = hub.folder / key
            if not path.is_file():
                raise RefusedError(404, f"there is no file {key}")
            return 200, path, {"Content-Type": "application/octet-stream"}
        if key not in hub.upload_keys:
            raise RefusedError(403, "this upload address is not valid")
        with open(hub.folder / key, "wb") as file:
            if self.command == "PUT":
                md5 = hashlib.md5()
                for piece in self.pieces:
                    md5.update(piece)
                    file.write(piece)
                hub.upload_keys[key] = md5.hexdigest()
                return 200, b"", {"ETag": md5.hexdigest()}
            write_form_file(self.headers["Content-Type"], self.pieces, file)
        return 204, b"", {}

    def reply(self, status, content, headers):
        """Send bytes or the file at a path."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as source:
            shutil.copyfileobj(source, self.wfile, 1 << 20)


def write_form_file(content_type, pieces, file):
    """Write the content of the last part of a multipart/form-data body, which is the uploaded file, to `file`."""
    boundary = b"--" + re.search("boundary=([^;]+)", content_type)[1].strip('"').encode()
    head = b""
    for piece in pieces:
        head += piece
        header = head.find(b"filename=")
        start = head.find(b"\r\n\r\n", header)
        if header >= 0 and start >= 0:
            file.write(head[start + 4 :])
            break
    for piece in pieces:
        file.write(piece)
    file.truncate(file.tell() - len(b"\r\n" + boundary + b"--\r\n"))


def report(what, error):
    """One line to stderr about an error of the hub itself."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"local hub: {what}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    print(" ".join(text.split()), file=sys.stderr)


def timestamp(seconds_from_now=0):
    return Timestamp(seconds=int(time.time() + seconds_from_now))


def new_id(letter):
    """An id as the service's: a letter for the kind, then letters and digits."""
    return letter + secrets.token_hex(4)


# --- catalogue: user, frameworks, devices -----------------------------------------------------------------------------


def make_device(name, os_version, chipset, *attributes):
    frameworks = ["framework:tflite", "framework:qnn", "framework:onnx"]
    common = ["vendor:qualcomm", "htp-supports-fp16:true", "emulated:cpu"]
    attributes = [f"chipset:{chipset}", *attributes, *frameworks, *common]
    return pb.Device(name=name, os=os_version, attributes=attributes, soc_description=EMULATED)


DEVICES = [
    make_device("Dragonwing IQ-9075 EVK", "1.9", "qualcomm-qcs9075", "os:qc_linux", "format:iot", "hexagon:v73",
                "soc-model:77"),
    make_device("Samsung Galaxy S25", "15", "qualcomm-snapdragon-8-elite-for-galaxy", "os:android", "format:phone",
                "hexagon:v79", "soc-model:69"),
]
# version: tags. qai_hub_models 0.65 asks for 2.50.
QAIRT_VERSIONS = {"2.50": ["latest"], "2.48": ["default"]}


def full_qairt_version(version_or_tag="default"):
    """The version as metadata shows it; its flavour says that it is none of Qualcomm's. Raises RefusedError 400."""
    for version, tags in QAIRT_VERSIONS.items():
        if version_or_tag == version or version_or_tag in tags:
            return f"{version}.0.000000-emulated-on-the-cpu"
    raise RefusedError(400, f"QAIRT version {version_or_tag} is not available; there are {', '.join(QAIRT_VERSIONS)}")


def get_user(hub, query, body):
    return pb.User(id=1, email="you@localhost", first_name="local", last_name="hub")


def list_frameworks(hub, query, body):
    frameworks = [
        pb.Framework(name="QAIRT", api_version=version, full_version=full_qairt_version(version), api_tags=tags)
        for version, tags in QAIRT_VERSIONS.items()
    ]
    return pb.FrameworkList(frameworks=frameworks, total_query_count=len(frameworks))


def list_devices(hub, query, body):
    name, os_version = query.get("name", [""])[0], query.get("os", [""])[0]
    attributes = set(query.get("attributes", []))
    devices = [
        device
        for device in DEVICES
        if name in ("", device.name) and os_version in ("", device.os) and attributes <= set(device.attributes)
    ]
    if query.get("select") == ["True"]:
        devices = devices[:1]
    return pb.DeviceList(devices=devices, total_query_count=len(devices))


# --- models -----------------------------------------------------------------------------------------------------------

EXTENSIONS = {
    pb.MODEL_TYPE_ONNX: ".onnx",
    pb.MODEL_TYPE_TORCHSCRIPT: ".pt",
    pb.MODEL_TYPE_TORCH_EXPORTED_PROGRAM: ".pt2",
    pb.MODEL_TYPE_QNN_DLC: ".dlc",
    pb.MODEL_TYPE_QNN_CONTEXT_BINARY: ".bin",
    pb.MODEL_TYPE_TFLITE: ".tflite",
}


def create_model(hub, query, body):
    model = pb.Model.FromString(body)
    if model.model_type not in EXTENSIONS:
        raise RefusedError(400, f"the local hub takes no {pb.ModelType.Name(model.model_type)}")
    model.model_id = new_id("m")
    model.creation_time.CopyFrom(timestamp())
    hub.models[model.model_id] = ModelRecord(model)
    return pb.CreateUpdateResponse(id=model.model_id, creation_time=model.creation_time)


def get_model(hub, query, body, model_id):
    return hub.find("models", model_id).message


def start_model_upload(hub, query, body, model_id):
    hub.find("models", model_id)
    num_parts = max(1, -(-int(query["file_size"][0]) // hub.max_part_bytes))
    upload_id = new_id("u")
    keys = [f"{upload_id}-{part}" for part in range(num_parts)]
    hub.upload_keys.update(dict.fromkeys(keys))
    urls = [f"{hub.url}/blob/{key}" for key in keys]
    upload = pb.FileMultipartUploadURL(urls=urls, upload_id=upload_id, max_part_size=hub.max_part_bytes)
    return pb.FileUploadResponse(multipart_url=upload)


def complete_model_upload(hub, query, body, model_id):
    model, upload = hub.find("models", model_id), pb.FileMultipartUploadComplete.FromString(body)
    keys = [f"{upload.upload_id}-{part}" for part in range(len(upload.etags))]
    if [hub.upload_keys.get(key) for key in keys] != list(upload.etags):
        raise RefusedError(400, "a part of the model did not arrive as it was sent; upload it again")
    path = hub.folder / f"{model_id}{EXTENSIONS[model.message.model_type]}"
    os.replace(hub.folder / keys[0], path)
    with open(path, "ab") as whole:
        for key in keys[1:]:
            with open(hub.folder / key, "rb") as part:
                shutil.copyfileobj(part, whole)
            os.remove(hub.folder / key)
    model.path = path
    model.message.file_upload_complete = True
    return pb.CreateUpdateResponse(id=model_id)


def download_model(hub, query, body, model_id):
    model = hub.find("models", model_id)
    if model.path is None:
        raise RefusedError(404, f"model {model_id} has no file")
    filename = model_id + EXTENSIONS[model.message.model_type] + (".zip" if model.message.is_directory else "")
    url = pb.FileDownloadURL(url=f"{hub.url}/blob/{model.path.name}", filename=filename)
    return pb.FileDownloadResponse(url=url)


# --- datasets ---------------------------------------------------------------------------------------------------------


def add_dataset(hub, name, expired=False):
    dataset = pb.Dataset(dataset_id=new_id("d"), name=name, creation_time=timestamp())
    dataset.expiration_time.CopyFrom(timestamp(-60 if expired else 30 * 24 * 3600))
    hub.datasets[dataset.dataset_id] = DatasetRecord(dataset)
    return dataset


def create_dataset(hub, query, body):
    expired = hub.take_fault("dataset") is not NO_FAULT
    dataset = add_dataset(hub, pb.Dataset.FromString(body).name, expired)
    return pb.CreateUpdateResponse(
        id=dataset.dataset_id, creation_time=dataset.creation_time, expiration_time=dataset.expiration_time
    )


def get_dataset(hub, query, body, dataset_id):
    return hub.find("datasets", dataset_id).message


def start_dataset_upload(hub, query, body, dataset_id):
    hub.find("datasets", dataset_id)
    size = int(query.get("file_size", ["0"])[0])
    if size > hub.max_dataset_bytes:
        raise RefusedError(413, f"the dataset has {size:,} bytes, the limit is {hub.max_dataset_bytes:,}. ")
    key = f"{dataset_id}.h5"
    hub.upload_keys[key] = None
    return pb.FileUploadResponse(url=pb.FileUploadURL(url=f"{hub.url}/blob/{key}", file_field_name="file"))


def complete_dataset_upload(hub, query, body, dataset_id):
    dataset, path = hub.find("datasets", dataset_id), hub.folder / f"{dataset_id}.h5"
    if not h5py.is_hdf5(path):
        raise RefusedError(400, f"what was uploaded as dataset {dataset_id} is no HDF5 file")
    dataset.path = path
    dataset.message.file_upload_complete = True
    return pb.CreateUpdateResponse(id=dataset_id)


def download_dataset(hub, query, body, dataset_id):
    dataset = hub.find("datasets", dataset_id)
    if dataset.path is None or dataset.expired:
        raise RefusedError(404, f"dataset {dataset_id} has no data or has expired")
    url = pb.FileDownloadURL(url=f"{hub.url}/blob/{dataset.path.name}", filename=f"dataset-{dataset_id}.h5")
    return pb.FileDownloadResponse(url=url)


# --- sharing ----------------------------------------------------------------------------------------------------------


def get_sharing(hub, query, body, table, key):
    return pb.SharedAccess(email=hub.find(table, key).shared_with)


def change_sharing(hub, query, body, table, key):
    record, change = hub.find(table, key), pb.SharedAccessChange.FromString(body)
    kept = [email for email in record.shared_with if email not in change.remove_email]
    record.shared_with = list(dict.fromkeys([*kept, *change.add_email]))
    return pb.SharedAccess(email=record.shared_with)


def stop_sharing(hub, query, body, table, key):
    hub.find(table, key).shared_with = []
    return pb.SharedAccess()


# --- jobs -------------------------------------------------------------------------------------------------------------

RUNTIMES = {
    "onnx": pb.MODEL_TYPE_ONNX,
    "precompiled_qnn_onnx": pb.MODEL_TYPE_ONNX,
    "qnn_dlc": pb.MODEL_TYPE_QNN_DLC,
    "qnn_context_binary": pb.MODEL_TYPE_QNN_CONTEXT_BINARY,
    "tflite": pb.MODEL_TYPE_TFLITE,
}
# The options of each kind of job: a flag, one that takes any value, or the values that it takes. Options about how a
# Qualcomm chip computes (qnn_options, compute_unit …) change nothing here; one that would change numbers and is not
# emulated is not known.
FLAG, ANY = (), None
RUN_OPTIONS = {"qairt_version": ANY, "qnn_options": ANY, "compute_unit": ANY, "onnx_options": ANY,
               "tflite_options": ANY, "max_profiler_iterations": ANY, "max_profiler_time": ANY}
OPTIONS = {
    "compile": {"target_runtime": tuple(RUNTIMES), "output_names": ANY, "force_channel_last_input": ANY,
                "force_channel_last_output": ANY, "quantize_io": FLAG, "quantize_io_type": ("uint8",),
                "truncate_64bit_io": FLAG, "truncate_64bit_tensors": FLAG, "qairt_version": ANY, "qnn_options": ANY,
                "qnn_graph_name": ANY, "compute_unit": ANY},
    "quantize": {"range_scheme": ("min_max",)},
    "link": {"qairt_version": ANY, "qnn_options": ANY},
    "inference": RUN_OPTIONS,
    "profile": RUN_OPTIONS,
}


def parse_options(kind, text):
    """The options in `text` as {name: value}, "" for a flag. Raises RefusedError 400 for what a job does not take."""
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
    full_qairt_version(options.get("qairt_version", "default"))
    return options


def create_job(hub, query, body):
    message = pb.Job.FromString(body)
    field_name = message.WhichOneof("job")
    if field_name not in ("compile_job", "quantize_job", "link_job", "inference_job"):
        raise RefusedError(400, f"the local hub runs no {field_name}")
    details = getattr(message, field_name)
    kind = field_name.removesuffix("_job")
    if kind == "inference" and not details.dataset.dataset_id:
        kind = "profile"
    job = JobRecord(new_id("j"), kind, message, details, parse_options(kind, details.options))
    job.fault = hub.take_fault(kind, details.options)
    if job.fault.status:
        raise RefusedError(job.fault.status, job.fault.message)
    fill_in_job(hub, job)
    hub.jobs[job.id] = job
    threading.Thread(target=run_job, args=(hub, job), daemon=True).start()
    if not hub.job_seconds and not job.fault.delay:
        job.finished.wait(INLINE_SECONDS)
    return pb.CreateUpdateResponse(id=job.id, creation_time=details.creation_time)


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
    if job.kind in ("compile", "quantize", "link"):
        add_target_model(hub, job)


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


def get_job(hub, query, body, job_id):
    return hub.find("jobs", job_id).message


def get_job_result(hub, query, body, job_id):
    return hub.find("jobs", job_id).result


def rename_job(hub, query, body, job_id):
    hub.find("jobs", job_id).details.name = pb.JobPublicUpdate.FromString(body).name
    return pb.CreateUpdateResponse(id=job_id)


def run_job(hub, job):
    """Run a job to its end, done or failed; the body of its thread."""
    state = pb.JOB_STATE_FAILED
    try:
        wait_for_models(hub, job)
        function, running_state = RUNNERS[job.kind]
        job.details.job_state = running_state
        time.sleep(hub.job_seconds + job.fault.delay)
        if job.fault.fail:
            raise JobFailedError(job.fault.message)
        COMPUTER.submit(compute, function, hub, job).result()
        state = pb.JOB_STATE_DONE
    except JobFailedError as e:
        job.details.failure_reason = f"{e} (local hub)"
    except Exception as e:
        job.details.failure_reason = f"the local hub cannot run this job: {type(e).__name__}: {e}"[:1000]
        if not hub.stopping:
            report(f"{job.kind} job {job.id}", e)
    job.details.completion_time.CopyFrom(timestamp())
    job.details.job_state = state
    job.finished.set()


def compute(function, hub, job):
    check_not_stopping(hub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(hub, job)


def wait_for_models(hub, job):
    """Block until the jobs that make this job's models are done. Raises JobFailedError if one failed."""
    for model_id in job.model_ids:
        producer = hub.jobs.get(hub.models[model_id].message.producer_id)
        if producer:
            producer.finished.wait()
            if producer.state == "failed":
                raise JobFailedError(f"{producer.kind} job {producer.id}, which makes model {model_id}, failed")


def check_not_stopping(hub):
    if hub.stopping:
        raise JobFailedError("the local hub was stopped")


ROUTES = [
    ("GET", "users/auth/user", get_user),
    ("GET", "frameworks", list_frameworks),
    ("GET", "devices", list_devices),
    ("POST", "models", create_model),
    ("GET", "models/ID", get_model),
    ("GET", "models/ID/multipart_upload", start_model_upload),
    ("POST", "models/ID/multipart_upload", complete_model_upload),
    ("GET", "models/ID/download", download_model),
    ("POST", "datasets", create_dataset),
    ("GET", "datasets/ID", get_dataset),
    ("PATCH", "datasets/ID", complete_dataset_upload),
    ("GET", "datasets/ID/upload_url", start_dataset_upload),
    ("GET", "datasets/ID/download_data", download_dataset),
    ("POST", "jobs", create_job),
    ("GET", "jobs/ID", get_job),
    ("PATCH", "jobs/ID", rename_job),
    ("GET", "jobs/ID/result", get_job_result),
    ("GET", "(jobs|models|datasets)/ID/shared_access", get_sharing),
    ("PATCH", "(jobs|models|datasets)/ID/shared_access", change_sharing),
    ("DELETE", "(jobs|models|datasets)/ID/shared_access", stop_sharing),
]


# --- tensors ----------------------------------------------------------------------------------------------------------

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


# --- source models as ONNX --------------------------------------------------------------------------------------------


def load_as_onnx(model, specs):
    """Any source model as one onnx.ModelProto with its weights inside and the inputs of `specs` (list of Tensor).

    Without specs its own inputs count. Raises JobFailedError if model and specs contradict each other.
    """
    model_type = model.message.model_type
    if model_type == pb.MODEL_TYPE_ONNX:
        proto = load_onnx(model.path)
    elif model_type == pb.MODEL_TYPE_TORCHSCRIPT:
        proto = torchscript_to_onnx(model.path, specs)
    elif model_type == pb.MODEL_TYPE_TORCH_EXPORTED_PROGRAM:
        proto = exported_program_to_onnx(model.path, specs)
    else:
        raise JobFailedError(f"a {pb.ModelType.Name(model_type)} is no source model")
    fix_input_shapes(proto, specs)
    return proto


def load_onnx(path):
    """The onnx.ModelProto of an .onnx file, or of a zipped folder with one .onnx file and its external weights."""
    import onnx

    try:
        if not zipfile.is_zipfile(path):
            return onnx.load(path)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            zipfile.ZipFile(path).extractall(folder)
            (onnx_path,) = (found for found in Path(folder).rglob("*.onnx") if found.is_file())
            return onnx.load(onnx_path)
    except Exception as e:
        raise JobFailedError(f"the model is no readable ONNX model: {e}") from e


def torchscript_to_onnx(path, specs):
    import torch

    try:
        module = torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as e:
        raise JobFailedError(f"the model is no readable TorchScript: {e}") from e
    return torch_to_onnx(module, specs)


def exported_program_to_onnx(path, specs):
    import torch

    try:
        program = torch.export.load(path)
    except Exception as e:
        raise JobFailedError(f"the model is no readable torch.export program: {e}") from e
    own = [
        Tensor(node.name, tuple(node.meta["val"].shape), str(node.meta["val"].dtype).removeprefix("torch."))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if specs and [(t.shape, t.dtype) for t in specs] != [(t.shape, t.dtype) for t in own]:
        raise JobFailedError(f"input_specs {listed(specs)} contradict the exported program's {listed(own)}")
    return torch_to_onnx(program.module(), specs or own)


def torch_to_onnx(module, specs):
    """Trace a torch module on zeros; the input names are those of `specs`."""
    import onnx
    import torch

    inputs = tuple(torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in specs)
    buffer = io.BytesIO()
    try:
        with torch.no_grad():
            traced = torch.jit.trace(module, inputs, check_trace=False)
            names = [t.name for t in specs]
            torch.onnx.export(traced, inputs, buffer, input_names=names, opset_version=17, dynamo=False)
    except Exception as e:
        raise JobFailedError(f"the model does not run on inputs {listed(specs)}: {e}") from e
    return onnx.load_from_string(buffer.getvalue())


def graph_inputs(graph):
    """The inputs that are not weights (files of old exporters list those, too)."""
    weights = {weight.name for weight in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def dims_of(value):
    """A shape with None where a dimension is not fixed."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def fix_input_shapes(proto, specs):
    """Write the shapes of `specs` into open dimensions of the model. Raises JobFailedError if they do not fit."""
    from onnx import helper

    values = graph_inputs(proto.graph)
    own = [Tensor(v.name, dims_of(v), np_dtype(v.type.tensor_type.elem_type)) for v in values]
    if not specs and any(None in t.shape for t in own):
        raise JobFailedError(f"the model's inputs have open dimensions ({listed(own)}): input_specs must fix them")
    by_name = {t.name: t for t in specs or own}
    if set(by_name) != {t.name for t in own}:
        raise JobFailedError(f"input_specs {listed(specs)} name other inputs than the model's: {listed(own)}")
    for value, tensor in zip(values, own):
        wanted = by_name[tensor.name]
        fits = len(wanted.shape) == len(tensor.shape) and wanted.dtype == tensor.dtype
        if not fits or any(a not in (None, b) for a, b in zip(tensor.shape, wanted.shape)):
            raise JobFailedError(f"input_specs {wanted} contradict the model's input {tensor}")
        elem_type = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, elem_type, wanted.shape))


def np_dtype(elem_type):
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(elem_type).name


# --- changing the inputs and outputs of an ONNX graph -----------------------------------------------------------------


def rename_tensor(graph, old, new):
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def put_node_at_input(graph, value, op_type, elem_type, shape, **attributes):
    """Let `value` have another type or shape; a node turns it into what the graph expects."""
    from onnx import helper

    inner = f"{value.name}/{op_type}"
    rename_tensor(graph, value.name, inner)
    graph.node.insert(0, helper.make_node(op_type, [value.name], [inner], **attributes))
    value.CopyFrom(helper.make_tensor_value_info(value.name, elem_type, shape))


def put_node_at_output(graph, value, op_type, elem_type, shape, **attributes):
    from onnx import helper

    inner = f"{value.name}/{op_type}"
    rename_tensor(graph, value.name, inner)
    graph.node.append(helper.make_node(op_type, [inner], [value.name], **attributes))
    value.CopyFrom(helper.make_tensor_value_info(value.name, elem_type, shape))


def named_values(values, names, option):
    """Those of `values` that a comma-separated option names. Raises JobFailedError for a name that is not there."""
    by_name = {value.name: value for value in values}
    chosen = [name for name in (names or "").split(",") if name]
    for name in chosen:
        if name not in by_name:
            raise JobFailedError(f"--{option} names {name}, the model has {', '.join(by_name)}")
    return [by_name[name] for name in chosen]


def rename_outputs(graph, names):
    """Honour --output_names."""
    new_names = names.split(",") if names else [value.name for value in graph.output]
    if len(new_names) != len(graph.output):
        raise JobFailedError(f"--output_names has {len(new_names)} names, the model has {len(graph.output)} outputs")
    for value, name in zip(graph.output, new_names):
        rename_tensor(graph, value.name, name)
        value.name = name


def move_channels_last(graph, options):
    """Honour --force_channel_last_input and _output: (N, C, …) becomes (N, …, C) on the outside."""
    option = "force_channel_last_input"
    for value in named_values(graph_inputs(graph), options.get(option), option):
        n, c, *rest = dims_of(value)
        perm = [0, len(rest) + 1, *range(1, len(rest) + 1)]
        put_node_at_input(graph, value, "Transpose", value.type.tensor_type.elem_type, (n, *rest, c), perm=perm)
    option = "force_channel_last_output"
    for value in named_values(graph.output, options.get(option), option):
        n, c, *rest = dims_of(value)
        perm = [0, *range(2, len(rest) + 2), 1]
        put_node_at_output(graph, value, "Transpose", value.type.tensor_type.elem_type, (n, *rest, c), perm=perm)


def truncate_64bit(graph, runtime, options):
    """Honour --truncate_64bit_io: int64 outside becomes int32. Without it, only onnx takes 64 bits."""
    from onnx import TensorProto

    values = [(put_node_at_input, value, TensorProto.INT64) for value in graph_inputs(graph)]
    values += [(put_node_at_output, value, TensorProto.INT32) for value in graph.output]
    for put_node, value, inner_type in values:
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            if "truncate_64bit_io" in options:
                to = inner_type
                put_node(graph, value, "Cast", TensorProto.INT32, dims_of(value), to=to)
            elif runtime != "onnx":
                raise JobFailedError(f"{value.name} is int64, {runtime} needs --truncate_64bit_io")


def expose_quantized_io(graph):
    """Honour --quantize_io: take off the QuantizeLinear at each input and the DequantizeLinear at each output.

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


# --- what jobs make and run: tagged binaries and onnxruntime sessions -------------------------------------------------


def write_target(hub, job, runtime, content):
    """Store ONNX bytes as the job's target model in the form of `runtime`, and describe its inputs and outputs."""
    target = hub.models[job.target_id]
    message = target.message
    path = hub.folder / (job.target_id + EXTENSIONS[message.model_type])
    inputs, outputs = inputs_and_outputs(make_session(content))
    head = {"runtime": runtime, "inputs": [vars(t) for t in inputs], "outputs": [vars(t) for t in outputs]}
    binary = TAG + json.dumps(head).encode() + b"\n" + content
    if runtime == "onnx":
        write_zip(path, {"model.onnx": content})
    elif runtime == "precompiled_qnn_onnx":
        write_zip(path, {"model.onnx": onnx_around_binary(inputs, outputs, "model.bin"), "model.bin": binary})
    else:
        path.write_bytes(binary)
    message.input_spec.CopyFrom(tensors_to_message(inputs))
    message.output_spec.CopyFrom(tensors_to_message(outputs))
    if "qnn" in runtime:
        version = full_qairt_version(job.parsed_options.get("qairt_version", "default"))
        message.metadata.entries[pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION] = version
    message.file_upload_complete = True
    target.path = path
    job.details.target_model.CopyFrom(message)


def write_zip(path, files):
    """The form in which the service hands out ONNX models: a zip with one folder <model>.onnx."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"model.onnx/{name}", content)


def onnx_around_binary(inputs, outputs, binary_name):
    """An ONNX model of one node that refers to a context binary beside it, as onnxruntime's QNN provider wants it."""
    from onnx import helper

    values = [
        [helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype)), t.shape) for t in ts]
        for ts in (inputs, outputs)
    ]
    names = [[t.name for t in ts] for ts in (inputs, outputs)]
    node = helper.make_node("EPContext", *names, domain="com.microsoft", embed_mode=0, ep_cache_context=binary_name,
                            notes=EMULATED)
    graph = helper.make_graph([node], "emulated", *values)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()


def onnx_bytes_of(model):
    """The ONNX bytes inside a compiled model. Raises JobFailedError if it was not made here."""
    content = model.path.read_bytes()
    if model.message.model_type == pb.MODEL_TYPE_ONNX:
        if zipfile.is_zipfile(model.path):
            with zipfile.ZipFile(model.path) as archive:
                binaries = [name for name in archive.namelist() if name.endswith(".bin")]
                content = archive.read(binaries[0]) if binaries else load_onnx(model.path).SerializeToString()
        if not content.startswith(TAG):
            return content
    if not content.startswith(TAG):
        kind = pb.ModelType.Name(model.message.model_type).removeprefix("MODEL_TYPE_")
        raise JobFailedError(f"this {kind} was not made by the local hub: it runs on a Qualcomm device only")
    return content[content.index(b"\n", len(TAG)) + 1 :]


def make_session(content):
    """An onnxruntime session on the CPU. Raises JobFailedError if the bytes are no model that it can run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the CPU to the client meanwhile
    # CPUs without VNNI would cut sums of 8-bit products off at 16 bits: wrong logits, by a third of their range
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise JobFailedError(f"onnxruntime cannot run the model: {e}") from e


def session_of(hub, model_id):
    """The session of a compiled model, kept for the next job on it."""
    session = hub.sessions.pop(model_id, None) or make_session(onnx_bytes_of(hub.models[model_id]))
    hub.sessions[model_id] = session
    while len(hub.sessions) > CACHED_SESSIONS:
        del hub.sessions[next(iter(hub.sessions))]
    return session


def inputs_and_outputs(session):
    """The inputs and the outputs of a session as two lists of Tensor; scales as run_compile_job noted them."""
    dtypes = {"float": "float32", "double": "float64"}  # where onnxruntime's name is another than numpy's
    quantizers = json.loads(session.get_modelmeta().custom_metadata_map.get("quantizers", "{}"))
    lists = []
    for arguments in (session.get_inputs(), session.get_outputs()):
        lists.append([])
        for argument in arguments:
            dtype = argument.type.removeprefix("tensor(").removesuffix(")")
            quantizer = quantizers.get(argument.name, (None, None))
            lists[-1].append(Tensor(argument.name, tuple(argument.shape), dtypes.get(dtype, dtype), *quantizer))
    return lists


# --- compile, quantize and link jobs ----------------------------------------------------------------------------------


def run_compile_job(hub, job):
    """Source model -> ONNX with the inputs and outputs that the options ask for -> the target runtime's form."""
    options = job.parsed_options
    runtime = options.get("target_runtime", "tflite")
    specs = tensors_from_message(job.details.tensor_type_list)
    proto = load_as_onnx(hub.models[job.model_id], specs)
    if any(not dims_of(value) or None in dims_of(value) for value in proto.graph.output):
        import onnx

        proto = onnx.shape_inference.infer_shapes(proto)
    rename_outputs(proto.graph, options.get("output_names"))
    if "quantize_io" in options:
        quantizers = expose_quantized_io(proto.graph)
        proto.metadata_props.add(key="quantizers", value=json.dumps(quantizers))
    truncate_64bit(proto.graph, runtime, options)
    move_channels_last(proto.graph, options)
    write_target(hub, job, runtime, proto.SerializeToString())
    job.details.target_tensor_type_list.CopyFrom(hub.models[job.target_id].message.input_spec)
    job.result.compile_job_result.compile_job_id = job.id
    job.result.compile_job_result.compile_detail.tool_versions.extend(tool_versions(runtime))


def tool_versions(runtime, qairt_version="default"):
    import onnx
    import onnxruntime

    versions = {"ONNX": onnx.__version__, "ONNX Runtime": onnxruntime.__version__}
    if "qnn" in runtime:
        versions["QAIRT"] = full_qairt_version(qairt_version)
    if runtime == "tflite":
        versions["TensorFlow Lite"] = "emulated"
    return [pb.ToolVersion(name=name, version=version) for name, version in versions.items()]


def run_quantize_job(hub, job):
    """Static QDQ quantization by onnxruntime with the uploaded calibration samples."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    bits = {pb.QUANTIZE_DTYPE_INT8: QuantType.QUInt8, pb.QUANTIZE_DTYPE_INT16: QuantType.QUInt16}
    weight_bits = {pb.QUANTIZE_DTYPE_INT8: QuantType.QInt8, pb.QUANTIZE_DTYPE_INT16: QuantType.QInt16}
    details = job.details
    if details.activations_dtype not in bits or details.weights_dtype not in weight_bits:
        raise JobFailedError("the local hub quantizes weights and activations to int8 or int16")
    with tempfile.TemporaryDirectory(dir=hub.folder) as folder, open_dataset(hub, job) as samples:
        prepared, quantized = f"{folder}/prepared.onnx", f"{folder}/quantized.onnx"
        proto = load_onnx(hub.models[job.model_id].path)
        fix_input_shapes(proto, [])
        quant_pre_process(proto, prepared, skip_symbolic_shape=True)
        samples.check(inputs_and_outputs(make_session(Path(prepared).read_bytes()))[0])
        # Every operation is quantized, as the service does; so inputs and outputs are, too, and --quantize_io works.
        op_types = sorted({node.op_type for node in onnx.load(prepared).graph.node} - {"Constant", "Shape"})
        quantize_static(
            prepared, quantized, CalibrationReader(hub, job, samples), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=bits[details.activations_dtype], weight_type=weight_bits[details.weights_dtype],
            op_types_to_quantize=op_types,
        )
        write_target(hub, job, "onnx", Path(quantized).read_bytes())
    job.result.quantize_job_result.quantize_job_id = job.id


class CalibrationReader:
    """What onnxruntime's calibration reads samples from."""

    def __init__(self, hub, job, samples):
        self.hub, self.job, self.samples = hub, job, samples

    def get_next(self):
        check_not_stopping(self.hub)
        if self.job.num_samples == self.samples.num_samples:
            return None
        self.job.num_samples += 1
        return self.samples.read(self.job.num_samples - 1)


def run_link_job(hub, job):
    """DLC -> context binary: the same content under another head."""
    if len(job.model_ids) > 1:
        raise JobFailedError("the local hub links one model at a time")
    source = hub.models[job.model_id]
    if source.message.model_type != pb.MODEL_TYPE_QNN_DLC:
        raise JobFailedError("only a QNN DLC can be linked")
    write_target(hub, job, "qnn_context_binary", onnx_bytes_of(source))
    job.result.link_job_result.link_job_id = job.id


# --- inference and profile jobs ---------------------------------------------------------------------------------------


class Samples:
    """The samples of a dataset's HDF5 file, read one at a time: {input name: array}."""

    def __init__(self, path):
        self.file = h5py.File(path, "r")
        groups = sorted(self.file["data"].values(), key=lambda group: group.attrs.get("order", 0))
        self.groups = {group.attrs["name"]: group for group in groups}
        self.num_samples = int(groups[0].attrs["batch_count"]) if groups else 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def check(self, inputs):
        """Raise JobFailedError unless every sample has exactly these inputs, in this order."""
        names = [t.name for t in inputs]
        if list(self.groups) != names:
            raise JobFailedError(f"the dataset has the inputs {', '.join(self.groups)}, the model {', '.join(names)}")
        for tensor in inputs:
            group = self.groups[tensor.name]
            if group.attrs["batch_count"] != self.num_samples:
                raise JobFailedError("the dataset has not the same number of samples for every input")
            for i in range(self.num_samples):
                sample = group[f"batch_{i}"]
                if sample.shape != tensor.shape or sample.dtype.name not in tensor.accepted_dtypes:
                    given = Tensor(tensor.name, sample.shape, sample.dtype.name)
                    raise JobFailedError(f"sample {i} of the dataset is {given}, the model expects {tensor}")

    def read(self, i):
        return {name: group[f"batch_{i}"][()] for name, group in self.groups.items()}


def open_dataset(hub, job):
    try:
        return Samples(hub.datasets[job.dataset_id].path)
    except (OSError, KeyError) as e:
        raise JobFailedError(f"dataset {job.dataset_id} is not of AI Hub's layout: {e}") from e


def run_inference_job(hub, job):
    """Run the model on every sample, one at a time in memory, and write the outputs as a new dataset.

    A quantised input takes stored or real (float32) values; outputs are then real, too, if an input was.
    """
    session = session_of(hub, job.model_id)
    inputs, outputs = inputs_and_outputs(session)
    job.details.tensor_type_list.CopyFrom(tensors_to_message(inputs))
    result = job.result.inference_job_result
    result.inference_job_id = job.id
    dataset = add_dataset(hub, f"outputs of {job.id}", expired=job.fault.outputs == "expired")
    path = hub.folder / f"{dataset.dataset_id}.h5"
    microseconds = []
    with open_dataset(hub, job) as samples, h5py.File(path, "w") as file:
        samples.check(inputs)
        num_outputs = samples.num_samples - (job.fault.outputs == "short")
        groups = output_groups(file, outputs, num_outputs)
        for i in range(samples.num_samples):
            check_not_stopping(hub)
            sample = samples.read(i)
            feeds = {t.name: t.quantize(sample[t.name]) for t in inputs}
            start = time.perf_counter()
            arrays = session.run(None, feeds)
            microseconds.append(round((time.perf_counter() - start) * 1e6))
            if any(sample[name].dtype != feeds[name].dtype for name in feeds):
                arrays = [t.dequantize(array) for t, array in zip(outputs, arrays)]
            for group, array in zip(groups, arrays if i < num_outputs else []):
                array = array[..., :-1] if job.fault.outputs == "shape" else array
                group.create_dataset(f"batch_{i}", data=array, compression="gzip")
            job.num_samples += 1
    hub.datasets[dataset.dataset_id].path = path
    dataset.file_upload_complete = True
    if job.fault.outputs != "missing":
        job.output_dataset_id = result.output_dataset_id = dataset.dataset_id
    if job.profiling:
        fill_in_profile(hub, job, microseconds)


def output_groups(file, outputs, num_samples):
    """Create a group per output as the client's reader wants it: data/<k> with name, order and batch_count."""
    groups = []
    for k, tensor in enumerate(outputs):
        group = file.create_group(f"data/{k}")
        group.attrs.update(name=tensor.name, order=k, batch_count=num_samples)
        groups.append(group)
    return groups


def run_profile_job(hub, job):
    """Time the model on random inputs."""
    session = session_of(hub, job.model_id)
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


def fill_in_profile(hub, job, microseconds):
    """Latency and memory as measured here; every layer is on the CPU."""
    import onnx

    detail = job.result.inference_job_result.detail
    detail.major_version, detail.minor_version = 1, 2
    detail.execution_time = int(np.median(microseconds))
    detail.all_execution_times.extend(microseconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    detail.after_execution_peak_memory = peak
    detail.execution_memory.peak.lower = detail.execution_memory.peak.upper = peak
    detail.execution_memory.increase.lower = detail.execution_memory.increase.upper = 0
    model = hub.models[job.model_id]
    proto = onnx.load_from_string(onnx_bytes_of(model))
    for node in proto.graph.node:
        layer = detail.layer_details.add(name=node.name or node.output[0], layer_type_name=node.op_type)
        layer.compute_unit, layer.delegate_name = pb.COMPUTE_UNIT_CPU, f"onnxruntime, {EMULATED}"
    runtime = {pb.MODEL_TYPE_ONNX: "onnx", pb.MODEL_TYPE_TFLITE: "tflite"}.get(model.message.model_type, "qnn")
    if pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION in model.message.metadata.entries:
        runtime = "qnn"
    detail.tool_versions.extend(tool_versions(runtime, job.parsed_options.get("qairt_version", "default")))
    job.details.execution_time = detail.execution_time


RUNNERS = {
    "compile": (run_compile_job, pb.JOB_STATE_OPTIMIZING_MODEL),
    "quantize": (run_quantize_job, pb.JOB_STATE_QUANTIZING_MODEL),
    "link": (run_link_job, pb.JOB_STATE_LINKING_MODELS),
    "inference": (run_inference_job, pb.JOB_STATE_RUNNING_INFERENCE),
    "profile": (run_profile_job, pb.JOB_STATE_MEASURING_PERFORMANCE),
}


# --- the command line -------------------------------------------------------------------------------------------------


def run_command(command, client_ini):
    """Run a command with QAIHUB_CLIENT_INI set and this Python first on the PATH; returns its exit code."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"QAIHUB_CLIENT_INI": str(client_ini), "PATH": path}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as e:
        refuse(f"cannot run {command[0]}: {e.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the command, too: it decides
            code = process.wait()
            return code if code >= 0 else 128 - code


def main():
    command = sys.argv[1:]
    if command[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    logging.disable(logging.WARNING)  # onnxruntime's quantizer warns on the root logger
    with LocalHub() as hub:
        client_ini = hub.write_client_ini(hub.folder / "client.ini")
        print(f"local hub at {hub.url}: jobs are {EMULATED}; figures are not a device's", file=sys.stderr)
        if command:
            sys.exit(run_command(command, client_ini))
        print(f"in another terminal: export QAIHUB_CLIENT_INI={client_ini}\nCtrl-C stops the hub", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
