"""The index: frame times of all videos of a dataset, read once, in parallel, whatever a file does to its reader."""

import contextlib
import os
import secrets
import time
import zipfile
import zlib
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from torchvision_patches.decoding import UnreadableVideo, facts_of, stamp, watched
from torchvision_patches.pool import WorkerLost, outcomes_of

INDEX_VERSION = 3  # of the index file and of the rules by which frame times are read
SAVE_EVERY = 60  # seconds between two saves of an index that is being built
TIME_LIMIT = 300  # seconds that reading the times of one video may take
CHUNK_LIMIT = 60  # seconds after which those of a chunk are read one by one, to learn which one takes so long


class Record(NamedTuple):
    """What the index knows of one video; `reason` says why an unreadable one has no frames. See decoding.Facts."""

    size: int  # bytes
    mtime: int  # ns
    fps: float
    pts: np.ndarray  # int64 (num_frames,)
    reason: str


def index_videos(video_paths, num_workers=0, cache_file=None, root=None, progress=True):
    """Read the frame times of many videos, in parallel, and remember them.

    num_workers: processes; a video on which one crashes, is killed or hangs is named, and the others go on. 0 reads in
    this process, where only a video that hangs can be left. cache_file: where the index is kept, an .npz without
    pickles. A video is found in it by its path below `root`, its size and its mtime: the dataset may move, and only new
    and changed videos are read again. An index that is damaged or of another version is built anew. It is saved every
    60 s and renamed into place, so that building may be killed, and several processes may start at once.

    Returns a dict for `_precomputed_metadata`, with one entry a video in each list: "video_paths", "video_pts" (int64
    (num_frames,)), "video_fps" and "stamps" (size in bytes, mtime in ns); and "unreadable": {path: reason}. An
    unreadable video is named on stdout and has no frames.
    """
    names = [os.fsencode(os.path.relpath(path, root) if root else path) for path in video_paths]
    records = load_index(cache_file) if cache_file else {}
    tables = {record.pts.tobytes(): record.pts for record in records.values()}
    # what could not be read is tried again: the reason may have been the disk's
    known = {name: record[:2] for name, record in records.items() if not record.reason}
    todo = [i for i, path in enumerate(video_paths) if known.get(names[i]) != stamp(path)]
    saved = time.monotonic()
    read = read_records([video_paths[i] for i in todo], num_workers)
    for k, record in tqdm(read, "indexing", len(todo), unit="video", disable=not progress or not todo):
        # videos with equal frame times share one array: 200,000 videos have a few hundred different ones
        records[names[todo[k]]] = record._replace(pts=tables.setdefault(record.pts.tobytes(), record.pts))
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


def read_record(path):
    """The Record of one video, read from the file; any failure becomes its reason, so that one file stops nothing."""
    before = stamp(path)  # a file that is replaced while it is read is read again next time
    try:
        facts = facts_of(path)
        return Record(*before, facts.fps, facts.pts.astype(np.int64), "")
    except UnreadableVideo as e:
        return unreadable(path, e.reason)


def unreadable(path, reason):
    """The Record of a video that cannot be read."""
    return Record(*stamp(path), 0.0, np.empty(0, np.int64), reason)


def read_chunk(numbered):
    """[(k, Record)] of some videos, [(k, path)]; in a worker process."""
    return [(k, read_record(path)) for k, path in numbered]


def read_records(paths, num_workers):
    """Yield (k, Record of paths[k]) as they are read, in `num_workers` processes or, for 0, in this one.

    Videos are handed out in chunks; those of a chunk that is lost with its worker are read once more, one by one.
    """
    if not num_workers:
        for k, path in enumerate(paths):
            try:
                yield k, watched(path, lambda path=path: read_record(path), TIME_LIMIT)
            except UnreadableVideo as e:
                yield k, unreadable(path, e.reason)
        return
    size, numbered = max(1, min(32, len(paths) // (4 * num_workers))), list(enumerate(paths))
    chunks, again = deque(numbered[start : start + size] for start in range(0, len(numbered), size)), deque()
    for chunk, read, error in outcomes_of(read_chunk, chunks, num_workers, CHUNK_LIMIT):
        if isinstance(error, WorkerLost):
            again.extend([video] for video in chunk)
        elif error:
            raise error
        else:
            yield from read
    for [(k, path)], read, error in outcomes_of(read_chunk, again, num_workers, TIME_LIMIT):
        yield (k, unreadable(path, error.reason)) if error else read[0]


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
            return {name: Record(*s, fps, tables[table], reason) for name, s, fps, table, reason in rows}
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        print(f"the index {cache_file} cannot be used ({e}): it is built anew")
        return {}
