"""Network cameras on loopback for tests: Motion JPEG over HTTP, H.264 over RTSP. They can be cut and come back."""

import asyncio
import base64
import contextlib
import io
import itertools
import re
import struct
import threading

import av
from PIL import Image

RATE = 20  # frames per second
LOGIN = "coach:s3cret%40%25"  # as it stands in an address, of the password s3cret@%
BASIC = "Basic " + base64.b64encode(b"coach:s3cret@%").decode()
HIDDEN = ("coach", "s3cret", "hidden")  # what may be seen nowhere of an address that ends in ?key=hidden
SDP = """v=0\r
o=- 0 0 IN IP4 127.0.0.1\r
s=camera\r
t=0 0\r
m=video 0 RTP/AVP 96\r
a=rtpmap:96 H264/90000\r
a=fmtp:96 packetization-mode=1\r
a=control:track1\r
"""


class NetworkCamera:
    """Shows frames, RGB uint8 (H, W, 3), again and again to whoever knows name and password.

    wait(i): seconds from frame i to the next one.
    """

    scheme, version = "http", "HTTP/1.1"

    def __init__(self, frames, host="127.0.0.1", wait=lambda i: 1 / RATE):
        self.frames, self.host, self.wait, self.port = self.encoded(frames), host, wait, 0

    def address(self, login=LOGIN):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{login}@{host}:{self.port}/stream?key=hidden"

    def start(self):
        """Listen on a port of its own, the same one again after `stop`."""
        ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.serve(ready),), daemon=True)
        self.thread.start()
        assert ready.wait(20)
        return self

    async def serve(self, ready):
        self.ended, talks = asyncio.Event(), set()

        async def connected(reader, writer):
            talks.add(asyncio.current_task())
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await self.talk(reader, writer)
            writer.transport.abort()

        server = await asyncio.start_server(connected, self.host, self.port)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self.ended.wait()
        server.close()
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks)

    def stop(self):
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join(20)
        assert not self.thread.is_alive()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.thread.is_alive():
            self.stop()

    async def request(self, reader, writer):
        """The next request that has the right name and password, as text; all others are refused."""
        while True:
            first = await reader.readexactly(1)
            if first == b"$":  # a report on the packets that it has had
                (length,) = struct.unpack(">xH", await reader.readexactly(3))
                await reader.readexactly(length)
                continue
            text = (first + await reader.readuntil(b"\r\n\r\n")).decode()
            if f"Authorization: {BASIC}\r\n" in text:
                return text
            self.answer(writer, text, "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n')

    def answer(self, writer, request, status="200 OK", header="", body=""):
        number = "".join(re.findall(r"CSeq: \d+\r\n", request))
        head = f"{self.version} {status}\r\n{number}{header}Content-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())

    async def each_frame(self):
        """Yield (i, what `encoded` made of a frame) at their times."""
        for i in itertools.count():
            yield i, self.frames[i % len(self.frames)]
            await asyncio.sleep(self.wait(i))


class HttpCamera(NetworkCamera):
    """Motion JPEG; frames may be of several sizes."""

    @staticmethod
    def encoded(frames):
        return [jpeg(frame) for frame in frames]

    async def talk(self, reader, writer):
        await self.request(reader, writer)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
        async for _, frame in self.each_frame():
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(frame)}\r\n\r\n"
            writer.write(head.encode() + frame + b"\r\n")
            await writer.drain()


class RtspCamera(NetworkCamera):
    """H.264 by RTSP (RFC 2326), interleaved into its TCP connection. clock(i): the time in s that frame i carries."""

    scheme, version = "rtsp", "RTSP/1.0"
    clock = staticmethod(lambda i: i / RATE)

    @staticmethod
    def encoded(frames):
        """Each frame as its NAL units, which fit into a packet."""
        options = {"tune": "zerolatency", "preset": "ultrafast"}
        with av.open(io.BytesIO(), "w", format="h264") as container:
            stream = container.add_stream("libx264", rate=RATE, options=options)
            stream.height, stream.width = frames[0].shape[:2]
            pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
            packets = [bytes(packet) for picture in [*pictures, None] for packet in stream.encode(picture)]
        return [re.split(rb"\x00+\x00\x01", packet)[1:] for packet in packets]

    async def talk(self, reader, writer):
        with contextlib.ExitStack() as stack:
            while True:
                request = await self.request(reader, writer)
                method, header, body = request.split()[0], "Session: 1\r\n", ""
                if method == "DESCRIBE":
                    header, body = "Content-Type: application/sdp\r\n", SDP
                elif method == "SETUP":
                    header += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
                self.answer(writer, request, "200 OK", header, body)
                if method == "PLAY":
                    stack.callback(asyncio.create_task(self.play(writer)).cancel)

    async def play(self, writer):
        numbers = itertools.count()
        async for i, units in self.each_frame():
            time = int(90000 * self.clock(i)) % 2**32
            for unit in units:
                last = 128 * (unit is units[-1])
                packet = struct.pack(">BBHII", 128, 96 + last, next(numbers) % 2**16, time, 1) + unit
                writer.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
            await writer.drain()


def jpeg(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=92)
    return content.getvalue()
