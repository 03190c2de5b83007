"""A camera of this machine or of the network, or a file, read by PyAV in a thread and opened again when it is lost."""

import contextlib
import errno
import re
import sys
import threading
import time
from functools import partial

import av

from torchvision_patches.decoding import (
    RgbConverter,
    UnreadableVideo,
    moving_pictures,
    open_container,
    upright,
    watched,
)

LONGEST_WAIT = 10  # seconds for opening, and for the next packet, before a camera counts as lost
PAUSE = 2  # seconds before a lost camera is opened again
LONGEST_STEP = 2  # seconds from one frame to the next, in which the first stands; longer is a gap
SYSTEMS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}  # FFmpeg's names of the systems' cameras


def printable_address(address):
    """An address as it is printed and shown: its host alone, as all that is before or behind it may give access."""
    scheme, of_network, rest = address.partition("://")
    if not of_network:
        return address
    host = re.split("[/?#]", rest)[0]
    unclear = "@" in rest[len(host) :]  # of a password with a slash, "host" is its beginning
    return f"{scheme}://{'…' if unclear else host.rpartition('@')[2]}"


def open_camera(address):
    """Open a camera: (container of PyAV, whether it is a file). Raises OSError or PyAV's errors.

    address: the number of a camera of this machine, its device (/dev/video0; on Windows "video=NAME"), an address of
    rtsp, http or https, or the path of a file.
    """
    limits = dict(timeout=(LONGEST_WAIT, LONGEST_WAIT))
    scheme, of_network, rest = address.partition("://")
    if of_network:
        if (scheme := scheme.lower()) not in ("rtsp", "rtsps", "http", "https"):
            raise OSError(errno.EINVAL, "cameras of the network have an address of rtsp or http")
        options = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}
        return av.open(f"{scheme}://{rest}", options=options, **limits), False
    if address.isdecimal() or address.startswith(("/dev/", "video=")):
        device = f"/dev/video{address}" if address.isdecimal() and sys.platform == "linux" else address
        return av.open(device, format=SYSTEMS.get(sys.platform, "v4l2"), **limits), False
    return open_container(address), True


def frames_that_decode(container, stream):
    """Yield the frames of a video stream; packets that do not decode are left out, as the start of a stream may be."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


class CameraThread(threading.Thread):
    """Reads frames until `stop`; gives them to `put` at the rate of a ClipDescription, and says to `tell` how it is.

    put(seconds, pixels): uint8 (H, W, 3) RGB, at a time that only grows, of a clock that starts with the thread. Where
    a camera gives fewer frames, they are repeated, as by the frame rule.
    tell(trouble): a sentence when the camera is lost, "" when it is there.
    A file is played at its own pace, and again from its start after PAUSE.
    """

    def __init__(self, address, description, put, tell):
        super().__init__(daemon=True)  # a driver that hangs does not keep the program
        self.address, self.description, self.put, self.tell = address, description, put, tell
        self.name_shown, self.stopped, self.started = printable_address(address), threading.Event(), time.monotonic()
        self.num_frames = 0  # that have been decoded so far

    def run(self):
        while not self.stopped.is_set():
            left = threading.Event()  # set when that reading is over for us, though a driver may hold its thread
            try:
                limit = 2 * LONGEST_WAIT  # for what does not obey PyAV's limit, which drivers do not
                watched(self.name_shown, partial(self.read, left), limit, lambda: self.num_frames)
                trouble = "has ended"
            except (UnreadableVideo, av.error.ExitError):  # PyAV's limit is over
                trouble = "gives no picture"
            except Exception as e:  # PyAV's errors are of many kinds, and this thread goes on
                # not str(e), which repeats the address
                trouble = f"cannot be read ({getattr(e, 'strerror', None) or type(e).__name__})"
            left.set()
            if not self.stopped.is_set():
                self.tell(f"{self.name_shown} {trouble}; it is tried again every {PAUSE} s")
            self.stopped.wait(PAUSE)

    def read(self, left):
        """Open the camera and read until it ends, or `left` is set. Raises what PyAV raises where it cannot be read."""
        container, is_file = open_camera(self.address)
        with container:
            stream = next(iter(moving_pictures(container)), None)
            if not stream:
                raise UnreadableVideo(self.name_shown, "it has no video stream")
            with contextlib.closing(frames_that_decode(container, stream)) as frames:
                self.pass_on(at_own_pace(frames, stream, self.stopped.wait) if is_file else frames, left)

    def pass_on(self, frames, left):
        """Give the frames of one reading to `put`, as they come."""
        slot, pixels, rate, converter = None, None, self.description.frame_rate, RgbConverter()
        for frame in frames:
            if left.is_set() or self.stopped.is_set():
                return
            self.num_frames += 1
            if slot is None:
                self.tell("")
            now = int((time.monotonic() - self.started) * rate)  # not by its own time: a camera's frame is of now
            if now == slot:
                continue
            if slot is not None and now - slot <= LONGEST_STEP * rate:
                for missed in range(slot + 1, now):
                    self.put(missed / rate, pixels)
            slot, pixels = now, converter.rgb(frame)
            if self.description.rotate:
                pixels = upright(pixels, frame)
            self.put(slot / rate, pixels)

    def stop(self):
        """End the reading, and wait for it: FFmpeg crashes where Python ends around it. A hanging driver is left."""
        self.stopped.set()
        self.join(LONGEST_STEP)


def at_own_pace(frames, stream, wait):
    """Yield the frames of a file when they are due, by wait(seconds). A jump of its times is no more than a frame."""
    usual, due, before = 1 / float(stream.average_rate or stream.guessed_rate or 25), time.monotonic(), None
    for frame in frames:
        step = frame.time - before if None not in (frame.time, before) else 0
        due += step if 0 < step <= LONGEST_STEP else usual
        before = frame.time
        wait(max(0, due - time.monotonic()))
        yield frame
