"""torchvision's VideoClips with the official frame rule of LPCVC 2026 Track 2, decoding by PyAV and a robust index.

What is overridden, and why; all else is torchvision 0.26's:

    _compute_frame_pts       reads frame times through PyAV: upstream needs TorchCodec, and one bad file stops it
    _init_from_metadata      also takes over which files could not be indexed, and why
    compute_clips            videos with equal frame times share their clips: 0.3 s instead of 15 s for QEVD
    compute_clips_for_video  a video too short for one clip is sampled faster, where upstream drops it
    get_clip                 decodes the frames of the clip only, where upstream decodes the whole span, and audio
    __getstate__             keeps them shared in a spawned process, where upstream sends each video's own
    __setstate__

    $ python torchvision_patches/video_utils.py     # prints each override as a diff against the installed torchvision
"""

import contextlib
import difflib
import inspect
import math
import os
import secrets
import time
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import av
import numpy as np
import torch
import torchvision
from torchvision.datasets import video_utils as upstream
from tqdm import tqdm

WRITTEN_FOR = "0.26.0"
if torchvision.__version__.split("+")[0] != WRITTEN_FOR:
    raise ImportError(
        f"torchvision_patches is written for torchvision {WRITTEN_FOR}, and {torchvision.__version__} is installed: "
        f"run `pip install -r requirements.txt`, or compare the overrides with the new version and change WRITTEN_FOR"
    )

VIDEO_EXTENSIONS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}  # what training and preprocessing take for videos
INDEX_VERSION = 1  # of the index file and of the rules by which frame times are read
SAVE_EVERY = 60  # seconds between two saves of an index that is being built
NO_TIMES = -(2**62)  # from here on, a frame "time" is the frame's number: the file has no times. No file counts so low
SKIP_BY_PACKET = {"h264", "hevc"}  # decoders that look at skip_frame at each packet; dav1d does once, at the first


class UnreadableVideo(RuntimeError):
    """A video, or the part of it that a clip needs, cannot be read. `str()` names the file and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)  # both in args, so that it crosses process borders
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


class NotAsIndexed(Exception):
    """The packets of a file do not lie where its header says they do."""


@contextlib.contextmanager
def opened(path):
    """Open a video with PyAV; yields (container, its first video stream that is not a cover picture).

    Whatever goes wrong inside the block is raised as UnreadableVideo: on damaged files PyAV raises built-in errors too.
    """
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise UnreadableVideo(path, "it has no video stream")
            if streams[0].codec_context is None:
                raise UnreadableVideo(path, "FFmpeg has no decoder for its codec")
            yield container, streams[0]
    except (UnreadableVideo, NotAsIndexed):
        raise
    except Exception as e:
        raise UnreadableVideo(path, getattr(e, "strerror", None) or f"{type(e).__name__}: {e}") from e


# --- frame times: which frames a file has, without decoding one -----------------------------------------------------


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
    return dts - dts[0] + stream.start_time


def times_from_packets(container, stream):
    """Frame times from all packets of a file; NO_TIMES + 0, 1, 2, … where packets carry no usable times.

    AVI stores no presentation times, and what FFmpeg derives for it is out of order with B-frames.
    """
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    pts = [packet.pts for packet in packets]
    if container.format.name == "avi" or None in pts or len(set(pts)) < len(pts):
        return NO_TIMES + np.arange(len(pts))
    return np.sort(np.array(pts, dtype=np.int64))


def frame_times(path, header=True):
    """The presentation time of each frame of a video, in presentation order, and its average frame rate.

    Returns (pts, fps): int64 (num_frames,) in the stream's time base, or numbers (see `times_from_packets`); frames per
    second as a float. `header=False` always reads the packets.
    Raises UnreadableVideo if the file cannot be opened, or has no video stream, frame rate or frame.
    """
    with opened(path) as (container, stream):
        if container.format.name.endswith("_pipe"):
            raise UnreadableVideo(path, "it is a picture, not a video")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        pts = times_from_header(container, stream) if header else None
        if pts is None:
            pts = times_from_packets(container, stream)
    if not len(pts):
        raise UnreadableVideo(path, "it has no frames")
    if not fps > 0:
        raise UnreadableVideo(path, "it has no frame rate")
    return pts, fps


# --- decoding -------------------------------------------------------------------------------------------------------


def read_frames(path, pts, frame_indices, convert=None):
    """Decode some frames of a video, and as few others as the codec allows.

    pts, frame_indices: (T,) ascending, repeats allowed: the times and numbers of the frames, as `frame_times` counts
    them; in a file without times, frames are found by counting. convert: what is kept of each frame, a function of
    uint8 (H, W, 3), RGB; it is called before the next frame is decoded, so that long clips need not be held in full.
    Returns uint8 (T, H, W, 3), RGB, or what `convert` made of it. Rotation metadata is not applied: the official
    preprocessing does not apply it either.
    Raises UnreadableVideo if the file, or a frame that has to be decoded, is damaged or missing.
    """
    pts, frame_indices = np.asarray(pts), np.asarray(frame_indices)
    clip = Clip(path, len(pts), convert)
    try:
        with opened(path) as (container, stream):
            # one thread: worker processes share the cores between them
            stream.codec_context.thread_count = 1
            if pts[0] - frame_indices[0] == NO_TIMES:
                return frames_by_number(clip, container, stream, frame_indices)
            return frames_by_time(clip, container, stream, pts, frame_indices, seek=frame_indices[0] > 0)
    except NotAsIndexed:
        return read_frames_without_header(clip, frame_indices)


def read_frames_without_header(clip, frame_indices):
    """`read_frames` for a file whose header misleads: trust its packets only, and decode from the start."""
    pts, _ = frame_times(clip.path, header=False)
    if frame_indices[-1] >= len(pts):
        raise UnreadableVideo(clip.path, f"it has {len(pts)} frames, and frame {frame_indices[-1]} is needed")
    with opened(clip.path) as (container, stream):
        stream.codec_context.thread_count = 1
        try:
            return frames_by_time(clip, container, stream, pts[frame_indices], frame_indices, seek=False)
        except NotAsIndexed:
            raise UnreadableVideo(clip.path, f"one of its frames {frame_indices.tolist()} does not decode") from None


def frames_by_time(clip, container, stream, pts, frame_indices, seek):
    """Decode the frames at `pts` into `clip`, from the keyframe before the first of them if `seek`; its `frames`.

    Raises NotAsIndexed if a frame does not come out, or is not the `frame_indices`-th of the file.
    """
    if seek:
        container.seek(int(pts[0]), stream=stream)
    can_skip = stream.codec_context.name in SKIP_BY_PACKET
    wanted, met, skipped = set(pts.tolist()), [], 0
    for packet in container.demux(stream):
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
    return clip.frames


def frames_before(stream, packet):
    """How many frames lie before `packet`, a keyframe, in decoding order, and so in presentation order too.

    None if the container has no complete index to tell; its frame times are then from the packets, and need no check.
    """
    entries = stream.index_entries
    return entries.search_timestamp(packet.dts) if len(entries) == stream.frames and packet.dts is not None else None


def frames_by_number(clip, container, stream, frame_indices):
    """Decode from the start and count, into `clip`; its `frames`.

    Codecs leave packets in AVI that hold no picture of their own (or stand for a repeated one), so a file may give
    fewer frames than it has packets: the last frame then stands for those that do not come.
    """
    number = -1
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise UnreadableVideo(clip.path, f"frame {number} is damaged")
        if number in frame_indices:
            clip.put(frame_indices == number, frame)
        if number >= frame_indices[-1]:
            return clip.frames
    if number < 0:
        raise UnreadableVideo(clip.path, "none of its frames decodes")
    clip.put(frame_indices > number, frame)
    return clip.frames


class Clip:
    """The frames of a clip, as they are decoded.

    One reformatter a clip, of one thread: PyAV would set up another with several threads for each frame, at 4 ms each.
    """

    def __init__(self, path, num_frames, convert=None):
        self.path, self.num_frames, self.convert = path, num_frames, convert
        self.size = self.frames = None  # (height, width) in the file; uint8 (num_frames, …)
        self.reformatter = av.video.reformatter.VideoReformatter()

    def put(self, positions, frame):
        """Write a decoded frame as RGB, converted, to `positions`, bool (num_frames,)."""
        pixels = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        self.size = self.size or pixels.shape[:2]
        if self.size != pixels.shape[:2]:
            raise UnreadableVideo(self.path, f"its frame size changes from {self.size} to {pixels.shape[:2]}")
        pixels = self.convert(pixels) if self.convert else pixels
        if self.frames is None:
            self.frames = np.empty((self.num_frames, *pixels.shape), np.uint8)
        self.frames[positions] = pixels


# --- the index: frame times of a whole dataset ----------------------------------------------------------------------


class Record(NamedTuple):
    """What the index knows of one video; `reason` says why an unreadable one has no frames."""

    size: int  # bytes
    mtime: int  # ns
    fps: float
    pts: np.ndarray  # int64 (num_frames,)
    reason: str


def index_videos(video_paths, num_workers=0, cache_file=None, root=None, progress=True):
    """Read the frame times of many videos, in parallel, and remember them.

    num_workers: processes; 0 reads in this one. cache_file: where the index is kept, an .npz without pickles. A video
    is found in it by its path below `root`, its size and its mtime: the dataset may move, and only new and changed
    videos are read again. An index that is damaged or of another version is built anew. It is saved every 60 s and
    renamed into place, so that building may be killed, and several processes may start at once.

    Returns {"video_paths": list, "video_pts": list of int64 (num_frames,), "video_fps": list of float, "stamps": list
    of (size in bytes, mtime in ns), "unreadable": {path: reason}}, for `_precomputed_metadata`. An unreadable video is
    named on stdout and has no frames.
    """
    names = [os.fsencode(os.path.relpath(path, root) if root else path) for path in video_paths]
    records = load_index(cache_file) if cache_file else {}
    tables = {record.pts.tobytes(): record.pts for record in records.values()}
    # what could not be read is tried again: the reason may have been the disk's
    known = {name: record[:2] for name, record in records.items() if not record.reason}
    todo = [i for i, path in enumerate(video_paths) if known.get(names[i]) != stamp(path)]
    parallel = num_workers > 0 and len(todo) > 1
    saved = time.monotonic()
    with ProcessPoolExecutor(num_workers) if parallel else contextlib.nullcontext() as pool:
        paths = [video_paths[i] for i in todo]
        chunk = max(1, min(32, len(todo) // (4 * num_workers or 1)))
        read = pool.map(read_record, paths, chunksize=chunk) if parallel else map(read_record, paths)
        for i, record in zip(todo, tqdm(read, "indexing", len(todo), unit="video", disable=not progress or not todo)):
            # videos with equal frame times share one array: 200,000 videos have a few hundred different ones
            records[names[i]] = record._replace(pts=tables.setdefault(record.pts.tobytes(), record.pts))
            if cache_file and time.monotonic() - saved > SAVE_EVERY:
                save_index(cache_file, records)
                saved = time.monotonic()
    records = {name: records[name] for name in names}
    if cache_file and todo:
        save_index(cache_file, records)
    unreadable = {path: records[name].reason for path, name in zip(video_paths, names) if records[name].reason}
    for path, reason in unreadable.items():
        print(f"no clip from {path}: {reason}")
    tensors = {id(pts): torch.from_numpy(pts) for pts in tables.values()}
    return {
        "video_paths": list(video_paths),
        "video_pts": [tensors[id(records[name].pts)] for name in names],
        "video_fps": [records[name].fps for name in names],
        "stamps": [records[name][:2] for name in names],
        "unreadable": unreadable,
    }


def stamp(path):
    """(size in bytes, mtime in ns) of a file; (-1, -1) if it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_record(path):
    """The Record of one video, read from the file; any failure becomes its reason, so that one file stops nothing."""
    before = stamp(path)  # a file that is replaced while it is read is read again next time
    try:
        pts, fps = frame_times(path)
        return Record(*before, fps, pts.astype(np.int64), "")
    except UnreadableVideo as e:
        return Record(*before, 0.0, np.empty(0, np.int64), e.reason)


def save_index(cache_file, records):
    """Write {name: Record} to `cache_file` under a temporary name, then rename it; a printed sentence if that fails."""
    tables = list({id(record.pts): record.pts for record in records.values()}.values())
    number = {id(pts): k for k, pts in enumerate(tables)}
    temporary = f"{cache_file}.{secrets.randbelow(10**9)}.tmp.npz"
    try:
        np.savez(
            temporary,
            version=INDEX_VERSION,
            names=np.frombuffer(b"\0".join(records), np.uint8),
            reasons=np.frombuffer("\0".join(record.reason for record in records.values()).encode(), np.uint8),
            stamps=np.array([record[:2] for record in records.values()], np.int64).reshape(-1, 2),
            fps=np.array([record.fps for record in records.values()]),
            table=np.array([number[id(record.pts)] for record in records.values()], np.int64),
            lengths=np.array([len(pts) for pts in tables], np.int64),
            pts=np.concatenate([np.empty(0, np.int64), *tables]),
        )
        os.replace(temporary, cache_file)
    except OSError as e:
        print(f"the index {cache_file} cannot be saved ({e.strerror}): the next run reads the same videos again")
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def load_index(cache_file):
    """Read {name: Record} from `cache_file`; {} and a printed sentence if it is damaged or of another version."""
    if not os.path.exists(cache_file):
        return {}
    try:
        with np.load(cache_file, allow_pickle=False) as file:
            if file["version"] != INDEX_VERSION:
                raise ValueError(f"it has version {file['version']}, this is version {INDEX_VERSION}")
            names = file["names"].tobytes().split(b"\0")
            reasons = file["reasons"].tobytes().decode().split("\0")
            tables = np.split(file["pts"], file["lengths"].cumsum()[:-1])
            columns = (file["stamps"].tolist(), file["fps"].tolist(), file["table"].tolist(), reasons)
            rows = zip(names, *columns, strict=True)
            return {name: Record(*stamp, fps, tables[table], reason) for name, stamp, fps, table, reason in rows}
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        print(f"the index {cache_file} cannot be used ({e}): it is built anew")
        return {}


# --- the patch ------------------------------------------------------------------------------------------------------


class VideoClips(upstream.VideoClips):
    """torchvision's VideoClips, with its name so that its clip samplers take it; see the head of this file.

    `unreadable` is {path: reason} of the videos that could not be indexed; they give no clip.
    """

    def _compute_frame_pts(self):
        self._init_from_metadata(index_videos(self.video_paths, self.num_workers))

    def _init_from_metadata(self, metadata):
        super()._init_from_metadata(metadata)
        self.unreadable = metadata.get("unreadable", {})

    def compute_clips(self, num_frames, step, frame_rate=None):
        """All clips of all videos, as upstream; `clips` and `resampling_idxs` of equal videos are the same tensors."""
        self.num_frames, self.step, self.frame_rate = num_frames, step, frame_rate
        found, of_video = {}, []
        for pts, fps in zip(self.video_pts, self.video_fps):
            if (id(pts), fps) not in found:
                found[id(pts), fps] = self.compute_clips_for_video(pts, num_frames, step, fps, frame_rate)
            of_video.append(found[id(pts), fps])
        self.clips, self.resampling_idxs = map(list, zip(*of_video)) if of_video else ([], [])
        self.cumulative_sizes = np.cumsum([len(clips) for clips in self.clips], dtype=np.int64).tolist()

    def __getstate__(self):
        """For another process: each different frame table once, as an array, and which video has which."""
        tables = {id(pts): pts for pts in self.video_pts}
        number = {key: i for i, key in enumerate(tables)}
        state = self.__dict__ | {"video_pts": np.array([number[id(pts)] for pts in self.video_pts], np.int64)}
        state["tables"] = [pts.numpy() for pts in tables.values()]
        for derived in ("clips", "resampling_idxs", "cumulative_sizes"):
            del state[derived]
        return state

    def __setstate__(self, state):
        tables = [torch.from_numpy(pts) for pts in state.pop("tables")]
        self.__dict__ = state | {"video_pts": [tables[number] for number in state["video_pts"].tolist()]}
        self.compute_clips(self.num_frames, self.step, self.frame_rate)

    @staticmethod
    def compute_clips_for_video(video_pts, num_frames, step, fps, frame_rate=None):
        """All clips of one video by the official rule: `num_frames` frames at `frame_rate`, `step` apart.

        A video that is too short for one clip is sampled faster: at the least whole rate that gives `num_frames`
        frames. A video without frames has no clip.

        150 frames at 30 fps, 16 at 4 fps wanted: there are 150 * 4 / 30 = 20 frames, 30 / 4 = 7.5 apart: 0, 7, 15, 22,
        …, 142; five windows of 16. 75 frames at 30 fps would give 10: the rate becomes ceil(16 / 2.5 s) = 7, frames
        30 / 7 apart: 0, 4, 8, 12, …, 64; one window.

        Returns (pts, frame indices), both int64 (num_clips, num_frames).
        """
        n = len(video_pts)
        if n == 0:
            return torch.empty(0, num_frames, dtype=torch.int64), torch.empty(0, num_frames, dtype=torch.int64)
        frame_rate = frame_rate or fps
        total = n * frame_rate / fps
        if total < num_frames:
            frame_rate, total = math.ceil(num_frames / (n / fps)), num_frames
        sampled = torch.arange(n)[upstream.VideoClips._resample_video_idx(math.floor(total), fps, frame_rate)]
        return upstream.unfold(video_pts[sampled], num_frames, step), upstream.unfold(sampled, num_frames, step)

    def get_clip(self, idx):
        """Decode clip `idx`. Returns (video, audio, info, video index), as upstream.

        video: uint8 (T, H, W, 3), or (T, 3, H, W) for output_format "TCHW"; RGB, not rotated. audio: float32 (1, 0),
        never read. info: {"video_fps": the rate asked for, or the file's if none was}.
        Raises IndexError past the last clip, UnreadableVideo if the clip cannot be decoded.
        """
        if idx >= self.num_clips():
            raise IndexError(f"clip {idx} is asked for, there are {self.num_clips()}")
        video_idx, clip_idx = self.get_clip_location(idx)
        pts, frame_indices = self.clips[video_idx][clip_idx], self.resampling_idxs[video_idx][clip_idx]
        video = torch.from_numpy(read_frames(self.video_paths[video_idx], pts.numpy(), frame_indices.numpy()))
        if self.output_format == "TCHW":
            video = video.permute(0, 3, 1, 2)
        info = {"video_fps": self.frame_rate or self.video_fps[video_idx]}
        return video, torch.empty(1, 0), info, video_idx


OVERRIDES = ("_compute_frame_pts", "_init_from_metadata", "compute_clips", "compute_clips_for_video", "get_clip")
OVERRIDES += ("__getstate__", "__setstate__")


def print_patch():
    """Print each override as a unified diff against the function of the installed torchvision that it replaces."""
    for name in OVERRIDES:
        before, after = (
            inspect.getsource(getattr(cls, name)).splitlines() for cls in (upstream.VideoClips, VideoClips)
        )
        titles = f"torchvision {torchvision.__version__}: VideoClips.{name}", f"ours: VideoClips.{name}"
        print("\n".join(difflib.unified_diff(before, after, *titles, lineterm="")), end="\n\n")


if __name__ == "__main__":
    print_patch()
