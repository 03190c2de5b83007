"""A copy of a recording with the label of each moment in a strip below the picture; sound is kept.

Decodes, draws and encodes frame by frame: memory does not grow with the length. No ffmpeg program is needed.
"""

import errno

import common

import av
import numpy as np
from tqdm import tqdm

from see import drawing
from torchvision_patches.decoding import RgbConverter, UnreadableVideo, opened, upright

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def annotate(path, target, segments):
    """Write the copy of a recording, upright as players show it, as an mp4 file.

    segments: drawing.Segments, from the first frame to the last. What does not decode is left out. Sound is copied;
    where an mp4 file cannot hold it as it is, encoded anew; where that fails too, left out. Returns what is said of
    that, or "". Raises UnreadableVideo if there is no copy, OSError if the disk is full.
    """
    for sound in (CopiedSound, EncodedSound, NoSound):
        try:
            write_copy(path, target, segments, sound)
            return "its sound is left out of the annotated copy: no AAC can be made of it" if sound is NoSound else ""
        except UnreadableVideo as e:
            if isinstance(e.__cause__, OSError) and e.__cause__.errno in DISK_IS_FULL:
                raise e.__cause__ from None  # `opened` takes whatever happens meanwhile for the recording's fault
            failure = e
    raise failure


def write_copy(path, target, segments, sound_class):
    """Write the copy once, with the sound that a class below gives it. Raises UnreadableVideo."""
    with opened(path) as (container, stream):
        first = next(container.decode(stream))
    with (
        opened(path) as (container, stream),
        common.written_then_renamed(target) as temporary,
        av.open(str(temporary), "w", format="mp4") as copy,
        tqdm(desc="annotating", unit="frame", total=stream.frames or None, leave=False, disable=None) as bar,
    ):
        picture, sound = LabelledPicture(copy, stream, first, segments), sound_class(copy, container)
        for packet in container.demux([stream, *sound.streams]):
            if packet.stream is not stream:
                sound.put(packet)
                continue
            for frame in frames_of_packet(packet):
                picture.put(frame)
                bar.update()
        copy.mux(picture.stream.encode())


def frames_of_packet(packet):
    """The frames of a packet; none if it is damaged."""
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


class NoSound:
    """A copy without sound; `streams` are the recording's streams of sound that are read."""

    streams = ()

    def __init__(self, copy, container):
        pass


class CopiedSound:
    """The sound of the copy: the packets of the recording where an mp4 file holds them, else as EncodedSound."""

    kept = ("aac", "mp3", "ac3", "eac3", "opus", "alac")  # what mp4 holds and players know; others become AAC

    def __init__(self, copy, container):
        self.copy = copy
        self.streams = [stream for stream in container.streams.audio if stream.codec_context][:1]
        for stream in self.streams:
            self.is_copied = stream.codec_context.name in self.kept
            self.stream = copy.add_stream_from_template(stream) if self.is_copied else self.encoder(stream)

    def encoder(self, stream):
        """A stream of AAC, at the rate that it knows next to the recording's, in at most two channels."""
        wanted = stream.codec_context.sample_rate
        rate = min(av.Codec("aac", "w").audio_rates, key=lambda known: abs(known - wanted))
        new = self.copy.add_stream("aac", rate=rate)
        new.codec_context.layout = "stereo" if stream.codec_context.channels > 1 else "mono"
        return new

    def put(self, packet):
        if not self.is_copied:
            for frame in frames_of_packet(packet) if packet.size else [None]:  # None: the end
                self.copy.mux(self.stream.encode(frame))
        elif packet.dts is not None:
            packet.stream = self.stream
            self.copy.mux(packet)


class EncodedSound(CopiedSound):
    """The sound of the copy, always encoded anew."""

    kept = ()


class LabelledPicture:
    """The pictures of the copy: `put` frames in their order."""

    def __init__(self, copy, stream, first, segments):
        self.copy, self.segments, self.time_base = copy, segments, stream.time_base
        self.rate = stream.average_rate or stream.guessed_rate
        self.colours, self.converter = drawing.colours_of(segments), RgbConverter()
        self.first = self.last = self.number = None  # times in ticks; segment of the strip
        self.size = self.upright(first).shape[:2]
        height, width = self.size
        self.strip_height = max(28, height // 12 // 4 * 4)
        self.stream = copy.add_stream("libx264", rate=self.rate, options={"crf": "20", "preset": "veryfast"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height + self.strip_height, "yuv420p"
        self.stream.codec_context.time_base = self.time_base

    def upright(self, frame):
        """A frame as players show it, uint8 (H, W, 3), both even, as 4:2:0 needs it: the last row is there twice."""
        pixels = upright(self.converter.rgb(frame), frame)
        return np.pad(pixels, [(0, len(pixels) % 2), (0, pixels.shape[1] % 2), (0, 0)], "edge")

    def put(self, frame):
        pts = frame.pts
        if pts is None or (self.last is not None and pts <= self.last):  # AVI has no times
            pts = 0 if self.last is None else self.last + max(1, round(1 / (self.rate * self.time_base)))
        self.first = pts if self.first is None else self.first
        pixels = self.upright(frame)
        if self.size != pixels.shape[:2]:
            return  # it changes in the middle of the recording; one stream has one size
        joined = np.concatenate([pixels, self.strip(float((pts - self.first) * self.time_base))])
        new = av.VideoFrame.from_ndarray(joined, format="rgb24")
        new.pts, new.time_base, self.last = pts, self.time_base, pts
        self.copy.mux(self.stream.encode(new))

    def strip(self, seconds):
        """The strip at a time, uint8 (strip height, W, 3); drawn when the segment changes."""
        number = self.number or 0
        while number + 1 < len(self.segments) and seconds >= self.segments[number].end:
            number += 1
        if number != self.number:
            width = self.size[1]
            image = drawing.draw_strip(self.segments[number], self.colours, width, self.strip_height)
            self.number, self.drawn = number, np.asarray(image)
        return self.drawn
