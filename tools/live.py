"""A page that says what a camera shows: a label a second, with the frames that the model saw.

Reads   CHECKPOINT, and frames: that the page sends, of a webcam or of a video file that is dropped on it; or, with
        --camera, of a camera of the machine that this runs on, or of the network
Writes  nothing, unless the page's Record is pressed: then RECORDINGS/<time>.mp4, the frames that were classified, and
        .csv, their labels. As its rate is that of the model, predict.py sees the same frames in it.

    $ python tools/live.py --checkpoint checkpoint.pth     # opens the browser; Ctrl-C ends it
    $ python tools/live.py --camera 0                      # the first camera of this machine, on a board as well
    $ python tools/live.py --camera rtsp://NAME:PASSWORD@192.168.1.20/stream --host 0.0.0.0

A clip is what the official frame rule would take of a video that ends now: the last frames at the model's rate, resized
and cropped by the code of training; a file that is shorter than a clip is sampled faster, as predict.py does it. The
program listens on 127.0.0.1, to who knows the token in the address. The page needs no internet. From another machine:
ssh -L 8765:127.0.0.1:8765, then the printed address in the browser there; or HOST.

Exit codes: 130 ended by Ctrl-C, 2 wrong usage, unusable model, port in use.
"""

import asyncio
import base64
import contextlib
import errno
import io
import ipaddress
import json
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
import weakref
import webbrowser
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
from common import flags

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

# ----------------------------------------------------------------------------------------------------------------------
CHECKPOINT = ["./checkpoint.pth"]  # of train.py, several vote; or an ONNX file or folder, or a binary of the local hub
CHECKPOINT_WEIGHTS = []  # how much each checkpoint's vote counts, say 2 1 1; []: all alike
MIRROR = False  # true: the mirror image of a clip votes, too
CAMERA = ""  # of this machine: 0, /dev/video0; of the network: rtsp://…, http://…; a file; "": the browser's
HOST = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine, for a container or a board on the desk
PORT = 8765  # of HOST; 0: any free one
OPEN_BROWSER = True  # false: only print the address
RECORDINGS = "./recordings"  # folder for what the page's Record button keeps
EVERY = 1.0  # seconds between two labels
STEADY = 3.0  # seconds over which the shown label is averaged; 0: each clip by itself
# ----------------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent / "page"
FILES = {"": "index.html", "live.js": "live.js", "style.css": "style.css"}
MAX_FRAME_BYTES = 8 << 20
MAX_SIDE = 4096  # pixels
MAX_FILE_BYTES = 256 << 20  # of a file that is shorter than a clip
SHOWN_WIDTH = 640  # pixels of this machine's camera on the page
HOSTS = "--host takes an address of this machine, or 0.0.0.0 for all of them"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' {socket}; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


# --- frames -----------------------------------------------------------------------------------------------------------


def read_frame(message):
    """A message of the page as (its time in s, RGB uint8 (H, W, 3)).

    The message is the time as a big-endian float64, then a JPEG. Raises ValueError if it is anything else.
    """
    from PIL import Image

    try:
        (seconds,) = struct.unpack_from(">d", message)
        image = Image.open(io.BytesIO(message[8:]), formats=["JPEG"])
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"a frame has {image.width} x {image.height} pixels, at most {MAX_SIDE} are taken")
        return seconds, np.array(image.convert("RGB"))
    except (struct.error, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"a frame cannot be read: {e}") from None


def model_view(pixels, description):
    """What a network of this ClipDescription takes of a frame uint8 (H, W, 3): float32 (3, crop height, width)."""
    from torchvision_patches.clip import resized_and_cropped

    return resized_and_cropped(pixels[None], description)[:, 0]


class Ring:
    """The last frames of one page, evenly spaced; after a gap, or a jump in a file, it begins anew."""

    def __init__(self, description):
        self.frames = deque(maxlen=description.clip_len)  # (time in s, float32 (3, H, W))
        self.longest_gap = 1.75 / description.frame_rate  # s
        self.rows = deque()  # (time in s, probabilities) of the labels since it began

    def append(self, seconds, frame):
        if self.frames and not 0 < seconds - self.frames[-1][0] < self.longest_gap:
            self.frames.clear()
            self.rows.clear()
        self.frames.append((seconds, frame))

    @property
    def is_full(self):
        return len(self.frames) == self.frames.maxlen

    def clip(self):
        """float32 (1, 3, T, H, W)."""
        return np.stack([frame for _, frame in self.frames], axis=1)[None]

    def steadied(self, seconds, probabilities):
        """The mean of the probabilities of the last STEADY seconds, these included: (num_classes,)."""
        self.rows.append((seconds, probabilities))
        while seconds - self.rows[0][0] > STEADY:
            self.rows.popleft()
        return np.mean([row for _, row in self.rows], axis=0)


def as_jpeg(pixels, width):
    """A frame uint8 (H, W, 3) as the bytes of a JPEG of at most that width in pixels."""
    from PIL import Image

    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((width, width))
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def filmstrip(clip):
    """The frames of a clip, float32 (1, 3, T, H, W), in two rows as a JPEG for an `src` attribute."""
    frames = (clip[0].transpose(1, 2, 3, 0) * 255).round().astype(np.uint8)  # (T, H, W, 3)
    if len(frames) % 2:
        frames = np.concatenate([frames, np.zeros_like(frames[:1])])
    rows = [np.concatenate(list(row), axis=1) for row in np.split(frames, 2)]
    strip = np.concatenate(rows)
    return "data:image/jpeg;base64," + base64.b64encode(as_jpeg(strip, max(strip.shape))).decode()


# --- one page ---------------------------------------------------------------------------------------------------------


class Session:
    """One open page: its ring, its recording, and its two loops, which `run` runs until it is closed."""

    def __init__(self, page, classifier, network):
        self.page, self.classifier, self.network = page, classifier, network
        self.ring, self.recording, self.has_come = Ring(classifier.description), None, asyncio.Event()

    async def run(self):
        labels = asyncio.create_task(self.label())
        try:
            async for message in self.page:
                if message.type == WSMsgType.BINARY:
                    await self.take(read_frame, message.data)
                elif message.type == WSMsgType.TEXT:
                    await self.record(json.loads(message.data).get("record"))
        finally:
            labels.cancel()
            await self.stop_recording()

    async def take(self, read, *arguments):
        """Put the frame that read(*arguments) gives, as `read_frame` does, into the ring and the recording."""
        try:
            seconds, pixels = await asyncio.to_thread(read, *arguments)
            self.ring.append(seconds, await asyncio.to_thread(model_view, pixels, self.classifier.description))
            self.has_come.set()
            if self.recording:
                await asyncio.to_thread(self.recording.put, pixels)
        except (OSError, ValueError) as e:
            await self.send(error=f"{e}; recording has ended" if self.recording else str(e))
            await self.stop_recording()
            return
        if not self.ring.is_full:
            await self.send(filled=len(self.ring.frames))

    async def label(self):
        """Classify the ring every EVERY seconds, as soon as a frame has come."""
        loop = asyncio.get_running_loop()
        while True:
            self.has_come.clear()
            await self.has_come.wait()
            if not self.ring.is_full:
                continue
            started, clip, newest = loop.time(), self.ring.clip(), self.ring.frames[-1][0]
            answer = await loop.run_in_executor(self.network, answer_to, self.classifier, clip, self.ring, newest)
            if self.recording and "label" in answer:
                self.recording.label(answer["label"], answer["five"][0][1])
            await self.send(time=newest, **answer)
            await asyncio.sleep(EVERY - 0.1 - (loop.time() - started))  # the next frame comes a little later

    async def record(self, wanted):
        from page.recording import Recording

        if wanted and not self.recording:
            self.recording = Recording(RECORDINGS, self.classifier.description.frame_rate)
            await self.send(recording=str(self.recording.path))
        elif not wanted:
            await self.stop_recording()

    async def stop_recording(self):
        recording, self.recording = self.recording, None
        if recording:
            try:
                path = await asyncio.to_thread(recording.close)
                await self.send(recorded=str(path or ""))
            except OSError as e:
                await self.send(error=f"{recording.path} could not be written: {e.strerror}", recorded="")

    async def send(self, **message):
        with contextlib.suppress(ConnectionError):  # the page is gone
            await self.page.send_json(message)


def answer_to(classifier, clip, ring=None, seconds=0):
    """What the page shows of a clip float32 (1, 3, T, H, W), as JSON, or why none; its label steadied by a Ring."""
    from common.calibration import NO_NUMBERS, best, label_of

    started = time.monotonic()
    (probabilities,), (logits,) = classifier.probabilities(clip)
    milliseconds = 1000 * (time.monotonic() - started)
    if np.isnan(probabilities).any():
        return {"error": NO_NUMBERS}
    five = best(ring.steadied(seconds, probabilities) if ring else probabilities, classifier.classes)
    answer = {"label": label_of(five[0], classifier.threshold), "five": five, "logits": logits.tolist()}
    return answer | {"network_ms": milliseconds, "strip": filmstrip(clip)}


def answer_to_file(classifier, content):
    """What the page shows of a whole video file that is shorter than a clip. Raises ValueError if it is no video."""
    from torchvision_patches.clip import first_clip
    from torchvision_patches.video_utils import UnreadableVideo

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video")
        path.write_bytes(content)
        try:
            return answer_to(classifier, first_clip(str(path), classifier.description).pixels[None])
        except UnreadableVideo as e:
            raise ValueError(e.reason) from None


# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """The pages that are open, and what they share: the network, the token and, with CAMERA, the camera."""

    def __init__(self, classifier, token):
        self.classifier, self.token = classifier, token
        self.network = ThreadPoolExecutor(1)  # all pages take turns
        self.pages = weakref.WeakKeyDictionary()  # {connection: Session}
        self.camera, self.trouble = None, ""

    def app(self):
        """The aiohttp application: the page and its connection under /<token>/, nothing for anyone else."""
        app = web.Application(middlewares=[self.guard], client_max_size=MAX_FILE_BYTES)
        app.add_routes([web.get("/{token}/info", self.info), web.get("/{token}/frames", self.frames)])
        app.add_routes([web.post("/{token}/file", self.file)])
        app.add_routes([web.get("/{token}/{name:[^/]*}", self.asset), web.get("/{anything:.*}", self.asset)])
        app.on_shutdown.append(self.close)
        return app

    @web.middleware
    async def guard(self, request, handler):
        # a name that someone else resolves to this address must not get in, nor another site's script
        origin = request.headers.get("Origin")
        allowed = is_ours(request.host) and origin in (None, f"http://{request.host}")
        if not allowed or not secrets.compare_digest(request.match_info.get("token", ""), self.token):
            raise web.HTTPForbidden(text="Open the address that live.py printed.\n")
        response = await handler(request)
        if not response.prepared:
            # a policy cannot name an IPv6 address; today's browsers take 'self' for the connection as well
            own = "" if request.host.startswith("[") else f"ws://{request.host}"
            response.headers.update({key: text.replace("{socket}", own) for key, text in HEADERS.items()})
        return response

    async def asset(self, request):
        name = FILES.get(request.match_info.get("name"))
        return web.FileResponse(PAGE / name) if name else web.Response(status=404, text="There is no such page.\n")

    async def info(self, request):
        clip = self.classifier.description
        what = {"model": self.classifier.about, "classes": len(self.classifier.classes), "clip_len": clip.clip_len}
        return web.json_response(what | {"frame_rate": clip.frame_rate, "camera": self.camera_name()})

    async def file(self, request):
        loop, content = asyncio.get_running_loop(), await request.read()
        try:
            answer = await loop.run_in_executor(self.network, answer_to_file, self.classifier, content)
        except ValueError as e:
            answer = {"error": f"This file cannot be read: {e}."}
        return web.json_response(answer)

    async def frames(self, request):
        page = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES, heartbeat=20)
        await page.prepare(request)
        self.pages[page] = session = Session(page, self.classifier, self.network)
        if self.camera:
            await session.send(camera_trouble=self.trouble)
        await session.run()
        return page

    def camera_name(self):
        return self.camera.name_shown if self.camera else ""

    def start_camera(self):
        from page.camera import CameraThread

        loop = asyncio.get_running_loop()

        def in_loop(function, *arguments):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                asyncio.run_coroutine_threadsafe(function(*arguments), loop).result()

        if CAMERA:
            put, tell = (lambda *given, to=to: in_loop(to, *given) for to in (self.put, self.tell))
            self.camera = CameraThread(CAMERA, self.classifier.description, put, tell)
            self.camera.start()

    async def put(self, seconds, pixels):
        """Show all pages a frame of this machine's camera, and label it."""
        jpeg = struct.pack(">d", seconds) + await asyncio.to_thread(as_jpeg, pixels, SHOWN_WIDTH)
        for page, session in list(self.pages.items()):
            with contextlib.suppress(ConnectionError):
                await page.send_bytes(jpeg)
            await session.take(lambda: (seconds, pixels))

    async def tell(self, trouble):
        """Say to all pages, and here, how the camera is: a sentence, or "" where it is there."""
        if trouble != self.trouble:
            print(trouble or f"{self.camera_name()} is there again", flush=True)
        self.trouble = trouble
        for session in list(self.pages.values()):
            await session.send(camera_trouble=trouble)

    async def close(self, app):
        if self.camera:
            await asyncio.to_thread(self.camera.stop)  # its thread may be waiting for this loop
        for page in list(self.pages):  # the end would wait for them, half a minute
            await page.close(code=WSCloseCode.GOING_AWAY)


def is_ours(host):
    """Whether a request's Host header names this machine as HOST lets it be named: no name of someone else's."""
    name = host.rsplit(":", 1)[0].strip("[]").lower()
    if name in ("127.0.0.1", "localhost", HOST.lower()):
        return True
    if HOST not in ("0.0.0.0", "::"):
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name.removesuffix(".local") == socket.gethostname().lower()


async def serve(server, started):
    """Serve the page until this task is cancelled. Raises OSError if the port or the address cannot be had."""
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, PORT).start()
        started(runner.addresses[0][1])
        server.start_camera()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def say_address(token, port):
    """Print, and open, the address; say what an address other than loopback opens."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(HOST, f"[{HOST}]" if ":" in HOST else HOST)
    address = f"http://{name}:{port}/{token}/"
    print(f"open {address}  (Ctrl-C ends it)", flush=True)
    if HOST not in ("127.0.0.1", "::1", "localhost"):
        if name != HOST:
            print(f"on other machines: http://{socket.gethostname()}:{port}/{token}/", flush=True)
        print("whoever knows this address and reaches this machine sees the page, unencrypted; a browser on another "
              "machine gives such a page no camera: use --camera, or ssh -L", flush=True)  # fmt: skip
    if OPEN_BROWSER:
        webbrowser.open(address)


def warm_up(classifier):
    """Do everything once: first calls import and are slow."""
    description = classifier.description
    _, pixels = read_frame(struct.pack(">d", 0) + as_jpeg(np.zeros((480, 640, 3), np.uint8), 640))
    clip = np.stack([model_view(pixels, description)] * description.clip_len, axis=1)[None]
    if why := answer_to(classifier, clip).get("error"):
        common.refuse(f"{classifier.about} cannot be used, as a black clip shows: {why}")


def main():
    flags.set_constants_from_flags(globals())
    if not HOST or not 0 <= PORT < 2**16:
        common.refuse(f"port {PORT} of {HOST or 'no address'} cannot be had: {HOSTS}, --port 0 to {2**16 - 1}")
    from see.classifier import load

    classifier, token = load(CHECKPOINT, CHECKPOINT_WEIGHTS, MIRROR), secrets.token_urlsafe(16)
    print(classifier.in_words())
    warm_up(classifier)
    # in a thread of its own: a kernel (Jupyter, Spyder) runs a loop in this one
    ended, is_over, loop = [], threading.Event(), asyncio.new_event_loop()
    task = loop.create_task(serve(Server(classifier, token), lambda port: say_address(token, port)))

    def run():
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except OSError as e:
            ended.append(e)
        finally:
            is_over.set()

    try:
        threading.Thread(target=run).start()
        # not the thread's join, which an interrupt makes believe that it has ended (Python up to 3.12)
        while not is_over.wait(1):
            pass
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(task.cancel)
        is_over.wait()
        print("\n" + classifier.latency() if classifier.latency else "", end="")
        common.interrupted("start it again for a new address")
    for e in ended:
        # not its strerror, into which asyncio writes the address again
        number = e.errno or errno.EADDRNOTAVAIL  # Python 3.13 tells no number where it tried each address in vain
        why = e.strerror if isinstance(e, socket.gaierror) else os.strerror(number)
        cure = "--port 0 takes any that is free" if number in (errno.EADDRINUSE, errno.EACCES) else HOSTS
        common.refuse(f"port {PORT} of {HOST} cannot be had ({why}); {cure}")


if __name__ == "__main__":
    main()
