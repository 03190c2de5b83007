"""A copy of a recording with the label of each moment in a strip below the picture; sound is kept.

Pictures stay in the planes of the file, 4:2:0 and 8 bit, so that no colour is converted. Memory does not grow with the
length. No ffmpeg program is needed.
"""

import errno

import common

import av
import numpy as np
from tqdm import tqdm

from see import drawing
from torchvision_patches.decoding import UnreadableVideo, opened

COPIED_SOUND = ("aac", "mp3", "ac3", "eac3", "opus", "alac")  # what mp4 holds and players know; others become AAC


def annotate(path, target, segments):
    """Write the copy of a recording, upright as players show it, as an mp4 file.

    segments: timeline.Segments, from the first frame to the last. What does not decode is left out. Returns [], or [why
    there is no copy].
    """
    try:
        with (
            opened(path) as (container, stream),
            common.written_then_renamed(target) as temporary,
            av.open(str(temporary), "w", format="mp4") as copy,
            tqdm(desc="annotating", unit="frame", total=stream.frames or None, leave=False, disable=None) as bar,
        ):
            picture, sound, early = Picture(copy, stream, segments), Sound(copy, container), []
            for packet in container.demux([stream, *sound.streams]):
                if packet.stream is stream:
                    for frame in decoded(packet):
                        picture.put(frame)
                        bar.update()
                else:
                    early.append(packet)
                if picture.stream:  # both streams are known: from here on the file can be written
                    for waiting in early:
                        sound.put(waiting)
                    early = []
            picture.flush()
    except UnreadableVideo as e:
        if isinstance(e.__cause__, OSError) and e.__cause__.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise e.__cause__ from None  # `opened` takes whatever happens meanwhile for the recording's fault
        return [f"no annotated copy: {e.reason}"]
    return []


def decoded(packet):
    """The frames of a packet; none if it is damaged."""
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


class Sound:
    """The sound of the copy: the packets of the recording, or what they hold encoded anew."""

    def __init__(self, copy, container):
        self.copy = copy
        self.streams = [stream for stream in container.streams.audio if stream.codec_context][:1]
        for stream in self.streams:
            self.is_copied = stream.codec_context.name in COPIED_SOUND
            self.stream = copy.add_stream_from_template(stream) if self.is_copied else self.encoder(stream)

    def encoder(self, stream):
        new = self.copy.add_stream("aac", rate=stream.codec_context.sample_rate)
        new.codec_context.layout = "stereo" if stream.codec_context.channels > 1 else "mono"
        return new

    def put(self, packet):
        if not self.is_copied:
            for frame in decoded(packet) if packet.size else [None]:  # None: the end
                self.copy.mux(self.stream.encode(frame))
        elif packet.dts is not None:
            packet.stream = self.stream
            self.copy.mux(packet)


class Picture:
    """The pictures of the copy: `put` frames in their order, then `flush`."""

    def __init__(self, copy, stream, segments):
        self.copy, self.segments, self.time_base = copy, segments, stream.time_base
        self.rate = stream.average_rate or stream.guessed_rate
        self.colours = drawing.colours_of(segments)
        self.stream = self.first = self.last = self.number = None  # encoder; times in ticks; segment of the strip

    def put(self, frame):
        pts = frame.pts
        if pts is None or (self.last is not None and pts <= self.last):  # AVI has no times
            pts = 0 if self.last is None else self.last + max(1, round(1 / (self.rate * self.time_base)))
        self.first = pts if self.first is None else self.first
        even = frame.reformat(frame.width // 2 * 2, frame.height // 2 * 2, "yuv420p")
        planes = [np.rot90(plane, round(frame.rotation / 90)) for plane in planes_of(even)]  # counter-clockwise
        height, width = planes[0].shape
        if not self.stream:
            self.open(width, height, frame)
        if self.size != (width, height):
            return  # it changes in the middle of the recording; one stream has one size
        strip = self.strip(float((pts - self.first) * self.time_base))
        joined = np.concatenate([plane.ravel() for pair in zip(planes, strip) for plane in pair])
        new = av.VideoFrame.from_ndarray(joined.reshape(-1, width), format="yuv420p")
        new.pts, new.time_base, self.last = pts, self.time_base, pts
        self.copy.mux(self.stream.encode(new))

    def open(self, width, height, frame):
        """Begin the stream, for pictures of width x height with a strip below."""
        self.size = width, height
        self.strip_height = max(28, height // 12 // 4 * 4)
        self.stream = self.copy.add_stream("libx264", rate=self.rate, options={"crf": "20", "preset": "veryfast"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height + self.strip_height, "yuv420p"
        context = self.stream.codec_context
        context.time_base = self.time_base
        self.is_full_range = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        context.color_range, context.colorspace = 2 if self.is_full_range else frame.color_range, frame.colorspace
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc

    def strip(self, seconds):
        """The planes of the strip at a time; drawn when the segment changes."""
        number = self.number or 0
        while number + 1 < len(self.segments) and seconds >= self.segments[number].end:
            number += 1
        if number != self.number:
            image = drawing.draw_strip(self.segments[number], self.colours, self.size[0], self.strip_height)
            y, cb, cr = (np.asarray(band) for band in image.convert("YCbCr").split())
            y, cb, cr = y, *(band.reshape(len(y) // 2, 2, -1, 2).mean((1, 3)) for band in (cb, cr))
            if not self.is_full_range:
                y, cb, cr = 16 + y * (219 / 255), *(128 + (band - 128) * (224 / 255) for band in (cb, cr))
            self.number, self.planes = number, [band.round().astype(np.uint8) for band in (y, cb, cr)]
        return self.planes

    def flush(self):
        if self.stream:
            self.copy.mux(self.stream.encode())


def planes_of(frame):
    """The planes of a yuv420p frame: uint8 (H, W) and twice (H / 2, W / 2)."""
    return [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
            for plane in frame.planes]  # fmt: skip
