"""A camera of this machine or of the network, or a file, read by PyAV in a thread and opened again when it is lost."""

import contextlib
import re
import sys
import threading
import time
from urllib.parse import urlsplit

import av

from torchvision_patches.decoding import DecodedFrames, moving_pictures, open_container

LONGEST_WAIT = 10  # seconds for opening, and for the next frame, before a camera counts as lost
PAUSE = 2  # seconds before a lost camera is opened again
SYSTEMS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}  # FFmpeg's names of the systems' cameras


def printable_address(address):
    """An address as it is printed and shown: without the name, password and query that may give access."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_camera(address):
    """Open a camera: (container of PyAV, whether it is a file). Raises OSError, of which PyAV's errors are a kind.

    address: the number of a camera of this machine, its device (/dev/video0; on Windows "video=NAME"), an address of
    rtsp, http or https, or the path of a file.
    """
    limits = dict(timeout=(LONGEST_WAIT, LONGEST_WAIT))
    if re.match(r"(rtsps?|https?)://", address):
        options = {"rtsp_transport": "tcp"} if address.startswith("rtsp") else {}
        return av.open(address, options=options | {"fflags": "nobuffer"}, **limits), False
    if address.isdecimal() or address.startswith(("/dev/", "video=")):
        device = f"/dev/video{address}" if address.isdecimal() and sys.platform == "linux" else address
        return av.open(device, format=SYSTEMS.get(sys.platform, "v4l2"), **limits), False
    return open_container(address), True


class CameraThread(threading.Thread):
    """Reads frames until `stop`; gives the first of each 1 / frame_rate s to `put`, and says to `tell` how it is.

    put(seconds, pixels): uint8 (H, W, 3) RGB, at a time that only grows, of a clock that starts with the thread.
    tell(trouble): a sentence when the camera is lost, "" when it is there. Both are called in this thread.
    A file is played at its own pace, and again from its start after PAUSE.
    """

    def __init__(self, address, frame_rate, put, tell):
        super().__init__(daemon=True)  # a driver that hangs does not keep the program
        self.address, self.frame_rate, self.put, self.tell = address, frame_rate, put, tell
        self.name_shown, self.stopped, self.started = printable_address(address), threading.Event(), time.monotonic()

    def run(self):
        while not self.stopped.is_set():
            try:
                self.read()
                trouble = "has ended"
            except (OSError, ValueError, IndexError) as e:
                # not str(e), which repeats the address
                trouble = f"cannot be read ({getattr(e, 'strerror', None) or type(e).__name__})"
            if not self.stopped.is_set():
                self.tell(f"{self.name_shown} {trouble}; it is tried again every {PAUSE} s")
            self.stopped.wait(PAUSE)

    def read(self):
        """Open the camera and read until it ends. Raises OSError where it cannot be read."""
        opened, is_file = open_camera(self.address)
        with opened as container, contextlib.closing(container.decode(moving_pictures(container)[0])) as frames:
            slot, decoded, first = None, DecodedFrames(self.name_shown, 1), time.monotonic()
            for frame in frames:
                if self.stopped.is_set():
                    return
                if is_file:  # at its own pace; a camera's frame is of now
                    self.stopped.wait(max(0, first + (frame.time or 0) - time.monotonic()))
                if slot is None:
                    self.tell("")
                seconds = time.monotonic() - self.started
                if (now := int(seconds * self.frame_rate)) != slot:
                    slot = now
                    self.put(seconds, decoded.rgb(frame))

    def stop(self):
        self.stopped.set()
