"""LocalHub: HTTP on 127.0.0.1 with aiohttp. API calls go to the functions of routes.ROUTES; files come and go as behind
the pre-signed addresses of a storage service."""

import asyncio
import hashlib
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

from aiohttp import web

from . import job_life
from .records import DatasetRecord, RefusedError, new_id, pb, timestamp
from .routes import ROUTES

MAX_BODY_BYTES = 16 << 20  # of an API call; files travel on their own
QAIRT_VERSIONS = ("2.50", "2.48")  # qai_hub_models 0.65 asks for 2.50
DATASET_SECONDS = 30 * 24 * 3600  # after which a dataset expires, as the service's do


class LocalHub:
    """The server, started and stopped by `with LocalHub() as hub:`.

    qairt_versions: those that it offers; the first is the default and the latest. max_part_bytes: a model is uploaded
    in parts of at most so many. max_dataset_bytes: a larger dataset is refused with status 413.

    `url`, `token`: what a client.ini needs (`write_client_ini` writes one). `requests`: (method, path) as received.
    `models`, `datasets`, `jobs`: records by id, in the order of creation.
    """

    def __init__(self, qairt_versions=QAIRT_VERSIONS, max_part_bytes=64 << 20, max_dataset_bytes=2 << 30):
        self.token = secrets.token_hex(20)  # of this run: on a shared machine others find the port, too
        self.qairt_versions = list(qairt_versions)
        self.max_part_bytes, self.max_dataset_bytes = max_part_bytes, max_dataset_bytes
        self.requests = []
        self.models, self.datasets, self.jobs = {}, {}, {}
        self.upload_keys, self.sessions = {}, {}
        self.stopping = False
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="local-hub-"))
        self.workers = ThreadPoolExecutor(32)  # of API calls, some of which wait for a short job
        started = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self.serve(started),), daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self.stopping = True
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.workers.shutdown(wait=False)
        job_life.COMPUTER.submit(shutil.rmtree, self.folder).result()  # after the job that computes, which ends soon

    async def serve(self, started):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, self.socket).start()
        started.set()
        await self.stop.wait()
        await runner.cleanup()

    def write_client_ini(self, path, token=None):
        """Write a client.ini for QAIHUB_CLIENT_INI that points here; returns `path`."""
        lines = ["[api]", f"api_url = {self.url}", f"web_url = {self.url}", f"api_token = {token or self.token}"]
        Path(path).write_text("\n".join([*lines, "verbose = False", ""]), encoding="utf-8")
        return path

    def find(self, table, key):
        """`self.<table>[key]`, or RefusedError 404."""
        if key not in getattr(self, table):
            raise RefusedError(404, f"there is no {table[:-1]} {key}")
        return getattr(self, table)[key]

    def add_dataset(self, name):
        """Remember a new dataset without data; returns its message."""
        dataset = pb.Dataset(dataset_id=new_id("d"), name=name, creation_time=timestamp())
        dataset.expiration_time.CopyFrom(timestamp(DATASET_SECONDS))
        self.datasets[dataset.dataset_id] = DatasetRecord(dataset)
        return dataset

    def delete_used_data(self):
        """Delete the inputs of jobs that are done, so that only those of jobs in flight take space."""
        for job in list(self.jobs.values()):
            dataset = self.datasets.get(job.dataset_id)
            if job.state == "done" and dataset and dataset.path:
                dataset.path.unlink(missing_ok=True)
                dataset.path = None
                dataset.message.expiration_time.CopyFrom(timestamp(-1))

    def submit(self, job, inline_seconds=job_life.INLINE_SECONDS):
        """Start a job that was checked; waits up to `inline_seconds` for its end."""
        job_life.start(self, job, inline_seconds)

    def run(self, job):
        """Do what a job asks for. Raises EmulatedJobError."""
        job_life.run_in_turn(self, job)

    @staticmethod
    def report(what, error):
        """One line to stderr about an error of the hub itself."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"local hub: {what}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        print(" ".join(text.split()), file=sys.stderr)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def handle(self, request):
        """Answer one request, with a sentence where it is refused and status 500 where the hub itself errs."""
        self.requests.append((request.method, request.path))
        try:
            return await self.answer(request)
        except RefusedError as e:
            return web.json_response({"detail": str(e)}, status=e.status)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as e:
            self.report(f"{request.method} {request.path}", e)
            return web.Response(status=500, text=f"{type(e).__name__}: {e}")

    async def answer(self, request):
        """The response to a blob transfer or an API call. Raises RefusedError."""
        if request.host not in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):  # a web page of a browser
            raise RefusedError(403, f"the local hub answers on {self.url} only")
        if request.path.startswith("/blob/"):
            return await self.transfer_blob(request, request.path.removeprefix("/blob/"))
        if not secrets.compare_digest(request.headers.get("Authorization", ""), f"token {self.token}"):
            raise RefusedError(401, "Invalid token.")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(f"/api/v1/{pattern}/".replace("ID", "([a-z0-9]+)"), request.path)
            if method == request.method and match:
                body = await request.read()
                message = await self.loop.run_in_executor(
                    self.workers, function, self, request.query, body, *match.groups()
                )
                return web.Response(body=message.SerializeToString(), content_type="application/x-protobuf")
        raise RefusedError(404, f"the local hub does not know {request.method} {request.path}")

    async def transfer_blob(self, request, key):
        """Take in an upload or give out a file."""
        if not re.fullmatch(r"[mdu][0-9a-f]{8}[-.\w]*", key):  # the name of a model, dataset or part, no path
            raise RefusedError(404, f"there is no file {key}")
        path = self.folder / key
        if request.method == "GET":
            if not path.is_file():
                raise RefusedError(404, f"there is no file {key}")
            return web.FileResponse(path)
        if key not in self.upload_keys:
            raise RefusedError(403, "this upload address is not valid")
        source = request.content
        if request.method == "POST":  # a form whose last part is the file
            form = await request.multipart()
            while (source := await form.next()) is not None and not source.filename:
                await source.release()
            if source is None:
                raise RefusedError(400, "the form holds no file")
        md5 = await self.write_blob(path, source)
        self.upload_keys[key] = md5
        return web.Response(status=200 if request.method == "PUT" else 204, headers={"ETag": md5})

    async def write_blob(self, path, source):
        """Write a body, or a part of one, to `path`: complete or not at all. Returns its MD5."""
        read, md5 = getattr(source, "read_chunk", None) or source.read, hashlib.md5()
        with common.written_then_renamed(path) as temporary, open(temporary, "wb") as file:
            while piece := await read(1 << 20):
                md5.update(piece)
                file.write(piece)
        return md5.hexdigest()
