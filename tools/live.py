"""A page on this machine that says what the webcam shows: a label a second, with the frames that the model saw.

Reads   CHECKPOINT, and frames that the page sends: of a webcam, or of a video file that is dropped on it
Writes  nothing, unless the page's Record is pressed: then RECORDINGS/<time>.mp4, the frames that were classified, and
        .csv, their labels. As its rate is that of the model, predict.py sees the same frames in it.

    $ python tools/live.py --checkpoint checkpoint.pth     # opens the browser; Ctrl-C ends it

A clip is what the official frame rule would take of a video that ends now: the last frames at FRAME_RATE, resized and
cropped by the code of training. It listens on 127.0.0.1, to who knows the token in the address. The page needs no
internet. From another machine: ssh -L 8765:127.0.0.1:8765, then the printed address in the browser there.

Exit codes: 0 ended by Ctrl-C, 2 wrong usage, unusable model, port in use.
"""

import asyncio
import base64
import contextlib
import csv
import io
import json
import secrets
import struct
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
CHECKPOINT = "./checkpoint.pth"  # of train.py; or an ONNX file or folder, or a binary made by the local hub
PORT = 8765  # of 127.0.0.1; 0: any free one
OPEN_BROWSER = True  # false: only print the address
RECORDINGS = "./recordings"  # folder for what the page's Record button keeps
FRAME_RATE = 4  # frames per second that are sampled; what the model was trained on
EVERY = 1.0  # seconds between two labels
# ----------------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent / "page"
FILES = {"": "index.html", "live.js": "live.js", "style.css": "style.css"}
MAX_FRAME_BYTES = 8 << 20
MAX_SIDE = 4096  # pixels
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self' ws://127.0.0.1:* ws://localhost:*; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


# --- frames -----------------------------------------------------------------------------------------------------------


def read_frame(message):
    """A message of the page as (its time in s, RGB uint8 (H, W, 3), the model's view of it float32 (3, 112, 112)).

    The message is the time as a big-endian float64, then a JPEG. Raises ValueError if it is anything else.
    """
    import torch
    from PIL import Image

    from torchvision_patches.spatial import resize_and_crop

    try:
        (seconds,) = struct.unpack_from(">d", message)
        image = Image.open(io.BytesIO(message[8:]), formats=["JPEG"])
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"a frame has {image.width} x {image.height} pixels, at most {MAX_SIDE} are taken")
        pixels = np.asarray(image.convert("RGB"))
    except (struct.error, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"a frame cannot be read: {e}") from None
    return seconds, pixels, resize_and_crop(torch.from_numpy(pixels.copy())[None])[:, 0].numpy()


class Ring:
    """The last frames of one page, evenly spaced; after a gap, or a jump in a file, it begins anew."""

    def __init__(self, clip_len):
        self.frames = deque(maxlen=clip_len)  # (time in s, float32 (3, 112, 112))

    def append(self, seconds, frame):
        if self.frames and not 0 < seconds - self.frames[-1][0] < 1.75 / FRAME_RATE:
            self.frames.clear()
        self.frames.append((seconds, frame))

    @property
    def is_full(self):
        return len(self.frames) == self.frames.maxlen

    def clip(self):
        """float32 (1, 3, T, 112, 112)."""
        return np.stack([frame for _, frame in self.frames], axis=1)[None]


def filmstrip(clip):
    """The frames of a clip, float32 (1, 3, T, H, W), in two rows as a JPEG for an `src` attribute."""
    from PIL import Image

    frames = (clip[0].transpose(1, 2, 3, 0) * 255).round().astype(np.uint8)  # (T, H, W, 3)
    if len(frames) % 2:
        frames = np.concatenate([frames, np.zeros_like(frames[:1])])
    rows = [np.concatenate(list(row), axis=1) for row in np.split(frames, 2)]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


class Recording:
    """RECORDINGS/<time>.mp4 with the frames, at FRAME_RATE, and .csv with the labels; both are there after `close`."""

    def __init__(self):
        self.path = Path(RECORDINGS, time.strftime("%Y-%m-%d_%H-%M-%S") + f"-{secrets.token_hex(2)}.mp4")
        self.files = contextlib.ExitStack()
        self.container = self.stream = None
        self.count = 0  # frames

    def open(self, height, width):
        import av

        self.path.parent.mkdir(parents=True, exist_ok=True)
        table = self.files.enter_context(common.written_then_renamed(self.path.with_suffix(".csv")))
        self.table = csv.writer(self.files.enter_context(table.open("w", newline="", encoding="utf-8")))
        self.table.writerow(["seconds", "label", "probability"])
        video = self.files.enter_context(common.written_then_renamed(self.path))
        self.container = self.files.enter_context(av.open(str(video), "w", format="mp4"))
        self.stream = self.container.add_stream("libx264", rate=FRAME_RATE, options={"crf": "18"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"

    def put(self, pixels):
        """Add a frame, uint8 (H, W, 3). Raises OSError if it cannot be written, ValueError if the size has changed."""
        import av

        height, width = (side // 2 * 2 for side in pixels.shape[:2])  # the encoder takes even sizes only
        if not self.stream:
            self.open(height, width)
        if (height, width) != (self.stream.height, self.stream.width):
            raise ValueError("the size of the picture has changed")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        self.container.mux(self.stream.encode(frame))
        self.count += 1

    def label(self, label, probability):
        if self.count:
            self.table.writerow([f"{self.count / FRAME_RATE:.2f}", label, f"{probability:.4f}"])

    def close(self):
        """Finish the files. Returns the path of the video, None if nothing was recorded."""
        with self.files:
            if self.count:
                self.container.mux(self.stream.encode())
        return self.path if self.count else None


# --- one page ---------------------------------------------------------------------------------------------------------


class Session:
    """One open page: its ring, its recording, and its two loops, which `run` runs until it is closed."""

    def __init__(self, socket, classifier, network):
        self.socket, self.classifier, self.network = socket, classifier, network
        self.ring, self.recording, self.has_come = Ring(classifier.description.clip_len), None, asyncio.Event()

    async def run(self):
        labels = asyncio.create_task(self.label())
        try:
            async for message in self.socket:
                if message.type == WSMsgType.BINARY:
                    await self.take(message.data)
                elif message.type == WSMsgType.TEXT:
                    await self.record(json.loads(message.data).get("record"))
        finally:
            labels.cancel()
            await self.stop_recording()

    async def take(self, message):
        """Put a frame into the ring and the recording."""
        try:
            seconds, pixels, frame = await asyncio.to_thread(read_frame, message)
            self.ring.append(seconds, frame)
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
        from common.calibration import best, softmax

        loop = asyncio.get_running_loop()
        while True:
            self.has_come.clear()
            await self.has_come.wait()
            if not self.ring.is_full:
                continue
            started, clip, newest = loop.time(), self.ring.clip(), self.ring.frames[-1][0]
            logits = (await loop.run_in_executor(self.network, self.classifier.logits, clip))[0]
            milliseconds = 1000 * (loop.time() - started)
            five = best(softmax(logits), self.classifier.classes)
            if self.recording:
                self.recording.label(*five[0])
            strip = await asyncio.to_thread(filmstrip, clip)
            await self.send(time=newest, five=five, logits=logits.tolist(), network_ms=milliseconds, strip=strip)
            await asyncio.sleep(EVERY - 0.1 - (loop.time() - started))  # the next frame comes a little later

    async def record(self, wanted):
        if wanted and not self.recording:
            self.recording = Recording()
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
            await self.socket.send_json(message)


# --- the server -------------------------------------------------------------------------------------------------------


def make_app(classifier, token):
    """The aiohttp application: the page and its connection under /<token>/, nothing for anyone else."""
    network = ThreadPoolExecutor(1)  # all pages take turns
    pages = weakref.WeakSet()

    @web.middleware
    async def guard(request, handler):
        # a name that someone else resolves to 127.0.0.1 must not get in, nor another site's script
        host = request.host.rsplit(":", 1)[0]
        origin = request.headers.get("Origin")
        allowed = host in ("127.0.0.1", "localhost") and origin in (None, f"http://{request.host}")
        if not allowed or not secrets.compare_digest(request.match_info.get("token", ""), token):
            raise web.HTTPForbidden(text="Open the address that live.py printed.\n")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def file(request):
        name = FILES.get(request.match_info.get("name"))
        return web.FileResponse(PAGE / name) if name else web.Response(status=404, text="There is no such page.\n")

    async def info(request):
        what = {"model": classifier.about, "classes": len(classifier.classes), "frame_rate": FRAME_RATE}
        return web.json_response(what | {"clip_len": classifier.description.clip_len})

    async def frames(request):
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES, heartbeat=20)
        await socket.prepare(request)
        pages.add(socket)
        await Session(socket, classifier, network).run()
        return socket

    async def close_pages(app):
        for socket in set(pages):
            await socket.close(code=WSCloseCode.GOING_AWAY)

    app = web.Application(middlewares=[guard])
    app.add_routes([web.get("/{token}/info", info), web.get("/{token}/frames", frames)])
    app.on_shutdown.append(close_pages)  # the end would wait for them, half a minute
    app.add_routes([web.get("/{token}/{name:[^/]*}", file), web.get("/{anything:.*}", file)])
    return app


async def serve(classifier):
    """Serve the page until the process is stopped. Exits with code 2 and one sentence if the port is in use."""
    token = secrets.token_urlsafe(16)
    runner = web.AppRunner(make_app(classifier, token), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", PORT)
    try:
        await site.start()
    except OSError as e:
        common.refuse(f"port {PORT} of 127.0.0.1 cannot be had ({e.strerror}); --port 0 takes any that is free")
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/{token}/"
    print(f"open {address}  (Ctrl-C ends it)", flush=True)
    if OPEN_BROWSER:
        await asyncio.to_thread(webbrowser.open, address)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def warm_up(classifier):
    """Do everything once: first calls import and are slow."""
    from PIL import Image

    black = io.BytesIO()
    Image.new("RGB", (640, 480)).save(black, "JPEG")
    _, _, frame = read_frame(struct.pack(">d", 0) + black.getvalue())
    clip = np.stack([frame] * classifier.description.clip_len, axis=1)[None]
    filmstrip(clip)
    classifier.logits(clip)


def main():
    flags.set_constants_from_flags(globals())
    from see.classifier import load

    classifier = load(CHECKPOINT)
    frames = classifier.description.clip_len
    print(f"{classifier.about}: {len(classifier.classes)} classes, {frames} frames at {FRAME_RATE} fps")
    warm_up(classifier)
    try:
        asyncio.run(serve(classifier))
    except KeyboardInterrupt:
        print("\nended")
    if classifier.latency:
        print(classifier.latency())


if __name__ == "__main__":
    main()
