"""Video files through PyAV: opening them, the times of their frames, and decoding the frames that a clip needs."""

import contextlib
import errno
import os
import queue
import stat
import threading
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

NOT_VIDEOS = {"image2", "tty", "hls", "concat", "dash", "sdp", "rtsp"}  # FFmpeg's names of pictures, texts, playlists
NO_TIMES = -(2**62)  # from here on, a frame "time" is the frame's number: the file has no times. No file counts so low
SKIP_BY_PACKET = {"h264", "hevc"}  # decoders that look at skip_frame at each packet; dav1d does once, at the first
NO_CHROMA_POSITION = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p"}  # of even height; libswscale converts them directly
UNSPECIFIED = 2  # transfer characteristics and primaries, in FFmpeg's pixfmt.h
STALLED = 60  # seconds after which a read of which nothing comes is given up: a network drive that does not answer


class UnreadableVideo(RuntimeError):
    """A video, or the part of it that a clip needs, cannot be read. `str()` names the file and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)  # both in args, so that it crosses process borders
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


class NotAsIndexed(Exception):
    """The packets of a file do not lie where its header says they do."""


def stamp(path):
    """(size in bytes, mtime in ns) of a file; (-1, -1) if it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def open_container(path, **options):
    """Open a file with PyAV: always a regular file on this machine, whatever its name or its content says.

    "file:" keeps FFmpeg from taking `my:set/a.mp4` for a protocol; the whitelist keeps a playlist under a video's name
    from reaching the network. A FIFO, on which opening would wait for ever, a socket, a device or a folder is refused.
    `options` are those of FFmpeg's reader.
    Raises OSError, of which PyAV's errors are a kind.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise OSError(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")
    options = {"protocol_whitelist": "file"} | options
    return av.open(f"file:{os.fspath(path)}", metadata_errors="ignore", options=options)


def moving_pictures(container):
    """The video streams of a container that are not a cover picture."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


@contextlib.contextmanager
def opened(path):
    """Open a video with PyAV; yields (container, its first video stream that is not a cover picture).

    Whatever goes wrong inside the block is raised as UnreadableVideo: on damaged files PyAV raises built-in errors too.
    """
    try:
        with open_container(path) as container:
            kind, streams = container.format.name, moving_pictures(container)
            if kind.endswith("_pipe") or kind in NOT_VIDEOS:
                raise UnreadableVideo(path, f"it is a picture, a text or a playlist ({kind}), not a video")
            if not streams:
                raise UnreadableVideo(path, "it has no video stream")
            if streams[0].codec_context is None:
                raise UnreadableVideo(path, "FFmpeg has no decoder for its codec")
            streams[0].codec_context.thread_count = 1  # worker processes share the cores between them
            yield container, streams[0]
    except (UnreadableVideo, NotAsIndexed):
        raise
    except Exception as e:
        if os.path.isfile(path) and not os.path.getsize(path):
            raise UnreadableVideo(path, "it is empty") from e
        raise UnreadableVideo(path, getattr(e, "strerror", None) or f"{type(e).__name__}: {e}") from e


def watched(path, read, seconds, progress=lambda: 0):
    """Run `read()` in a thread, and leave it behind if for some seconds nothing comes of it; returns its result.

    A thread that waits for a disk cannot be ended, but the rest of the process goes on. progress: what changes as the
    reading goes on; a read that is only long is waited for. Raises what `read` raises, UnreadableVideo if it stalls.
    """
    results = queue.SimpleQueue()

    def work():
        try:
            results.put((read(), None))
        except BaseException as e:
            results.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    waits = 0
    while waits < 2:  # twice half the time: after a Ctrl-Z, the first wait is over before the thread has gone on
        before = progress()
        try:
            result, error = results.get(timeout=seconds / 2)
        except queue.Empty:
            waits = waits + 1 if progress() == before else 0
            continue
        if error is not None:
            raise error
        return result
    raise UnreadableVideo(path, f"for {seconds} s nothing came of reading it: does its disk answer?")


# --- which frames a file has, without decoding them -----------------------------------------------------------------


class Facts(NamedTuple):
    """What is known of a video without decoding it."""

    pts: np.ndarray  # int64 (num_frames,), the times of its frames in ticks, or numbers from NO_TIMES
    fps: float  # by its header; what the frame rule takes
    tick: float  # s, the unit of `pts`; where those are numbers, of a frame


def facts_of(path, header=True):
    """The Facts of a video. `header=False` always reads the packets.

    Raises UnreadableVideo if the file cannot be opened, or has no video stream, frame rate or frame.
    """
    with opened(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        pts = times_from_header(container, stream) if header else None
        if pts is None:
            pts = times_from_packets(path, container, stream)
        time_base = stream.time_base
    if not len(pts):
        raise UnreadableVideo(path, "it has no frames")
    if not fps > 0:
        raise UnreadableVideo(path, "it has no frame rate")
    return Facts(pts, fps, float(time_base) if has_times(pts) else 1 / fps)


def frame_times(path, header=True):
    """The times of a video's frames in presentation order, and its average frame rate: (pts, fps) of its Facts."""
    return facts_of(path, header)[:2]


def has_times(pts):
    """Whether the "times" of a video's frames are times, not numbers."""
    return pts[0] != NO_TIMES


def times_from_header(container, stream):
    """Frame times out of an mp4 header, with no packet read; None where only the packets can tell them.

    The header's index knows decoding times. They are the presentation times where no frame is reordered, and
    spaced like them where they are evenly spaced; `read_frames` checks the latter on the packets it meets.
    """
    entries = list(stream.index_entries) if "mp4" in container.format.name else []
    if not entries or len(entries) != stream.frames or any(e.is_discard for e in entries):
        return None
    if max(entry.pos + entry.size for entry in entries) > container.size:  # the end of the file is missing
        return None
    dts = np.array([entry.timestamp for entry in entries])
    evenly_spaced = len(set(np.diff(dts))) <= 1
    if stream.start_time is None or not (evenly_spaced or stream.codec_context.has_b_frames == 0):
        return None
    return dts - dts[0] + stream.start_time if entries[0].is_keyframe else None


def times_from_packets(path, container, stream):
    """Frame times from all packets of a file; NO_TIMES + 0, 1, 2, … where packets carry no usable times.

    AVI stores no presentation times, and what FFmpeg derives for it is out of order with B-frames. A file cut out of a
    longer one may start without a keyframe, or with frames that are shown before it and refer to what is gone: its
    frames are those that decode, as the original counts them, and are numbered.
    """
    packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
    pts = [time for time, _, is_discard in packets if not is_discard]
    numbered = container.format.name == "avi" or None in pts or len(set(pts)) < len(pts)
    start = next((i for i, (_, is_keyframe, _) in enumerate(packets) if is_keyframe), 0)
    if start > 0 or (pts and not numbered and min(pts) < packets[0][0]):
        before, first = start_of(path, None if numbered else packets[start][0])
        later = [time for time, _, is_discard in packets[start:] if not is_discard]
        return NO_TIMES + np.arange(before + sum(numbered or time >= first for time in later))
    return NO_TIMES + np.arange(len(pts)) if numbered else np.sort(np.array(pts, dtype=np.int64))


def start_of(path, time):
    """(number of frames before the one at `time`, time of the first frame from there on) of what a file decodes to.

    time: of the first keyframe, in ticks; None for a file without times, where the first keyframe is meant. Returns
    (0, inf) if no such frame comes.
    """
    with opened(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if frame.key_frame if time is None else frame.pts >= time:
                return number, frame.pts
    return 0, np.inf


# --- decoding -------------------------------------------------------------------------------------------------------


def read_frames(path, pts, frame_indices, convert=None, rotate=False):
    """Decode some frames of a video, and as few others as the codec allows.

    pts, frame_indices: (T,) ascending, repeats allowed: the times and numbers of the frames, as `frame_times` counts
    them; in a file without times, frames are found by counting. convert: what is kept of each frame, a function of
    uint8 (H, W, 3), RGB; it is called before the next frame is decoded, so that long clips need not be held in full.
    rotate: turn the frames as the file asks players to; the official preprocessing does not.
    Returns uint8 (T, H, W, 3), RGB, or what `convert` made of it.
    Raises UnreadableVideo if the file, or a frame that has to be decoded, is damaged or missing, if the frame size
    changes between the frames, or if reading stalls.
    """
    return frames_and_rotation(path, pts, frame_indices, convert, rotate)[0]


def frames_and_rotation(path, pts, frame_indices, convert=None, rotate=False):
    """(what `read_frames` returns, degrees clockwise by which players turn these frames: 0, 90, 180 or 270)."""
    pts, frame_indices = np.asarray(pts), np.asarray(frame_indices)
    clip = DecodedFrames(path, len(pts), convert, rotate)
    watched(path, lambda: decode_all(clip, pts, frame_indices), STALLED, lambda: clip.num_packets)
    return clip.frames, clip.rotation


def decode_all(clip, pts, frame_indices):
    """Decode frames into DecodedFrames, with no regard to time. A header that misleads is not asked again."""
    try:
        return decode_clip(clip, pts, frame_indices, seek=frame_indices[0] > 0)
    except NotAsIndexed:
        pts, _ = frame_times(clip.path, header=False)
    if frame_indices[-1] >= len(pts):
        raise UnreadableVideo(clip.path, f"it has {len(pts)} frames, and frame {frame_indices[-1]} is needed")
    try:
        decode_clip(clip, pts[frame_indices], frame_indices, seek=False)
    except NotAsIndexed:
        raise UnreadableVideo(clip.path, f"one of its frames {frame_indices.tolist()} does not decode") from None


def decode_clip(clip, pts, frame_indices, seek):
    """Open the file and decode its frames, by their times if it has any, else by counting."""
    with opened(clip.path) as (container, stream):
        if pts[0] - frame_indices[0] == NO_TIMES:
            return frames_by_number(clip, container, stream, frame_indices)
        return frames_by_time(clip, container, stream, pts, frame_indices, seek)


def frames_by_time(clip, container, stream, pts, frame_indices, seek):
    """Decode the frames at `pts` into `clip`, from the keyframe before the first of them if `seek`.

    Raises NotAsIndexed if a frame does not come out, or is not the `frame_indices`-th of the file.
    """
    if seek:
        with contextlib.suppress(av.error.FFmpegError):  # no frame is marked as a keyframe: read from the start
            container.seek(int(pts[0]), stream=stream)
    can_skip = stream.codec_context.name in SKIP_BY_PACKET
    wanted, met, skipped = set(pts.tolist()), [], 0
    for packet in container.demux(stream):
        clip.num_packets += 1
        if packet.pts is not None and not packet.is_discard:
            if seek and not met:
                if packet.pts > pts[0] or not packet.is_keyframe:
                    raise NotAsIndexed
                skipped = frames_before(stream, packet)
            met.append(packet.pts)
        if can_skip and packet.pts is not None:
            # a frame that no one wants and no other frame refers to need not be decoded
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in packet.decode():
            # before the first packet's frame there may be some that refer to what a seek has jumped over
            if frame.is_corrupt and frame.pts >= met[0]:
                seconds = float(frame.pts * stream.time_base)
                raise UnreadableVideo(clip.path, f"the frame at {seconds:.2f} s is damaged")
            if frame.pts in wanted:
                clip.put(pts == frame.pts, frame)
                wanted.discard(frame.pts)
        if not wanted:
            break
    if wanted:
        raise NotAsIndexed
    met = np.sort(met)
    if skipped is None:
        skipped = frame_indices[0] - np.searchsorted(met, pts[0])
    if not np.array_equal(met.take(frame_indices - skipped, mode="clip"), pts):
        raise NotAsIndexed


def frames_before(stream, packet):
    """How many frames lie before `packet`, a keyframe, in decoding order, and so in presentation order too.

    None if the container has no complete index to tell; its frame times are then from the packets, and need no check.
    """
    entries = stream.index_entries
    return entries.search_timestamp(packet.dts) if len(entries) == stream.frames and packet.dts is not None else None


def frames_by_number(clip, container, stream, frame_indices):
    """Decode from the start and count, into `clip`.

    Codecs leave packets in AVI that hold no picture of their own (or stand for a repeated one), so a file may give
    fewer frames than it has packets: the last frame then stands for those that do not come.
    """
    number = -1
    for number, frame in enumerate(container.decode(stream)):
        clip.num_packets += 1
        if frame.is_corrupt:
            raise UnreadableVideo(clip.path, f"frame {number} is damaged")
        if number in frame_indices:
            clip.put(frame_indices == number, frame)
        if number >= frame_indices[-1]:
            return
    if number < 0:
        raise UnreadableVideo(clip.path, "none of its frames decodes")
    clip.put(frame_indices > number, frame)


def upright(pixels, frame):
    """The pixels (H, W, 3) of a decoded frame, turned as its file asks players to turn it."""
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


class RgbConverter:
    """Decoded frames as RGB, by the organisers' rule whatever their tags say.

    One reformatter of one thread: PyAV would set up another with several threads for each frame, at 4 ms each.
    """

    def __init__(self):
        self.untagged = None  # the VideoFrame that is converted in place of a decoded one
        self.reformatter = VideoReformatter()

    def rgb(self, frame):
        """A decoded frame as uint8 (H, W, 3), not turned."""
        return self.reformatter.reformat(self.without_tags(frame), format="rgb24", threads=1).to_ndarray()

    def without_tags(self, frame):
        """A frame with the planes of `frame` and no tags: `frame` itself, or one that the next call overwrites.

        The organisers' PyAV 16.0.1 converts the planes as they are: by the BT.601 matrix, in full range if the pixel
        format says so (yuvj420p). From 17.0 on a frame's tags are obeyed or refused. Matrix, range and transfer can be
        set, but not the field order and the position of chroma, which most frames' conversion does not look at.
        """
        width, height, kind = frame.width, frame.height, frame.format.name
        if kind in NO_CHROMA_POSITION and height % 2 == 0 and not frame.interlaced_frame:
            frame.colorspace, frame.color_range = Colorspace.ITU601, ColorRange.MPEG
            frame.color_trc = frame.color_primaries = UNSPECIFIED
            return frame
        if any(plane.line_size < 0 for plane in frame.planes):  # bottom-up RGB: no tag matters, PyAV 17.0 misplaces it
            return frame
        other = self.untagged
        if not other or (width, height, kind) != (other.width, other.height, other.format.name):
            other = self.untagged = av.VideoFrame(width, height, kind)
        for planes in zip(frame.planes, other.planes):
            source, target = (np.frombuffer(plane, np.uint8).reshape(plane.height, -1) for plane in planes)
            count = min(source.shape[1], target.shape[1])  # lines are padded, decoders pad them more
            target[:, :count] = source[:, :count]
        return other


class DecodedFrames(RgbConverter):
    """Frames of a file, as they are decoded."""

    def __init__(self, path, num_frames, convert=None, rotate=False):
        super().__init__()
        self.path, self.num_frames, self.convert, self.rotate = path, num_frames, convert, rotate
        self.num_packets = 0  # that have been read so far
        self.size = self.frames = None  # (height, width) in the file; uint8 (num_frames, …)
        self.rotation = None  # degrees clockwise by which players turn them

    def put(self, positions, frame):
        """Write a decoded frame as RGB, converted, to `positions`, bool (num_frames,)."""
        pixels = self.rgb(frame)
        self.size = self.size or pixels.shape[:2]
        if self.size != pixels.shape[:2]:
            sizes = [f"{width} x {height}" for height, width in (self.size, pixels.shape[:2])]
            raise UnreadableVideo(self.path, f"its frame size changes from {sizes[0]} to {sizes[1]}")
        turned = -round(frame.rotation / 90) % 4 * 90  # counter-clockwise there
        self.rotation = turned if self.rotation is None else self.rotation
        if self.rotate and turned:
            pixels = upright(pixels, frame)
        pixels = self.convert(pixels) if self.convert else pixels
        if self.frames is None:
            self.frames = np.empty((self.num_frames, *pixels.shape), np.uint8)
        self.frames[positions] = pixels
