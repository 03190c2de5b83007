"""What the page's Record keeps: the frames that were classified, as a video, and their labels, as a table."""

import contextlib
import csv
import secrets
import time
from fractions import Fraction
from pathlib import Path

import common

import av
import numpy as np


class Recording:
    """<folder>/<time>.mp4 with the frames, at frame_rate, and .csv with the labels; both are there after `close`."""

    def __init__(self, folder, frame_rate):
        self.path = Path(folder, time.strftime("%Y-%m-%d_%H-%M-%S") + f"-{secrets.token_hex(2)}.mp4")
        self.frame_rate = Fraction(frame_rate).limit_denominator(1000)
        self.files = contextlib.ExitStack()
        self.container = self.stream = None
        self.count = 0  # frames

    def open(self, height, width):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table = self.files.enter_context(common.written_then_renamed(self.path.with_suffix(".csv")))
        self.table = csv.writer(self.files.enter_context(table.open("w", newline="", encoding="utf-8")))
        self.table.writerow(["seconds", "label", "probability"])
        video = self.files.enter_context(common.written_then_renamed(self.path))
        self.container = self.files.enter_context(av.open(str(video), "w", format="mp4"))
        self.stream = self.container.add_stream("libx264", rate=self.frame_rate, options={"crf": "18"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"

    def put(self, pixels):
        """Add a frame, uint8 (H, W, 3). Raises OSError if it cannot be written, ValueError if the size has changed."""
        height, width = (side // 2 * 2 for side in pixels.shape[:2])  # the encoder takes even sizes only
        if not self.stream:
            self.open(height, width)
        if (height, width) != (self.stream.height, self.stream.width):
            raise ValueError("the size of the picture has changed")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        self.container.mux(self.stream.encode(frame))
        self.count += 1

    def label(self, label, probability):
        """Note the label of the clip that ends with the newest frame, and the probability of its best class."""
        if self.count:
            self.table.writerow([f"{float(self.count / self.frame_rate):.2f}", label, f"{probability:.4f}"])

    def close(self):
        """Finish the files. Returns the path of the video, None if nothing was recorded."""
        with self.files:
            if self.count:
                self.container.mux(self.stream.encode())
        return self.path if self.count else None
