"""Decode every frame of every video, report what is wrong, repair what can be repaired and quarantine the rest.

Reads   ROOT/{train,val}/<class>/<video>.mp4
Writes  REPORT, a CSV with one row a video, as it goes; moves damaged videos to QUARANTINE/{train,val}/<class>/

    $ python tools/check_videos.py --root ./full_dataset --quarantine ./bad_videos --remux --replace --ext mp4 \
          --jobs 8 --report bad_videos.csv

After a run every video under ROOT decodes completely, and every damaged original lies in QUARANTINE, where nothing is
ever overwritten. What happens to a damaged video:

    (no flag)           it moves to QUARANTINE
    --remux             it moves to QUARANTINE; a repair that works goes beside it as <name>.repaired.mp4
    --remux --replace   if it can be repaired, the repaired file takes its place and the original goes to QUARANTINE
    --reencode          (with --remux) what remuxing cannot repair is encoded anew, lost picture parts concealed
    --dry-run           the same is tried and reported, but nothing under ROOT or QUARANTINE is touched

A repair counts only if the repaired file then decodes completely. A file that cannot be read (no permission, a broken
link, a failing disk, no memory) is reported and left where it is. A changed bit that still decodes to legal pictures
cannot be seen by any decoder.

Stopped or killed at any moment, run the same command again: healthy videos whose size and mtime are unchanged are
skipped, and rows of other datasets in REPORT stay. `torchrun` and SLURM arrays share the videos between processes, by
a hash of the path; whichever process finishes last merges the reports.

Exit codes: 0 all healthy, 1 faults found (listed), 2 wrong usage or a broken package, 130 stopped.
"""

import concurrent.futures.process
import contextlib
import csv
import filecmp
import functools
import glob
import importlib
import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import zlib
from collections import Counter
from pathlib import Path

import common

# ----------------------------------------------------------------------------------------------------------------------
ROOT = "./QEVD_organized"  # dataset: ROOT/{train,val}/<class>/<video>
QUARANTINE = "./bad_videos"  # where damaged videos go; not inside ROOT/train or ROOT/val
REPORT = "bad_videos.csv"  # CSV, one row a video
EXT = ["mp4"]  # endings of video files, in any case
REMUX = False  # try to repair: copy the streams into a new file, then the same without corrupt packets
REPLACE = False  # put a repaired file in the place of the original
REENCODE = False  # with REMUX: encode anew what remuxing cannot repair
DRY_RUN = False  # report only
TIMEOUT = 300.0  # seconds a video may take to decode, and again to repair
JOBS = os.cpu_count()  # processes
# ----------------------------------------------------------------------------------------------------------------------

REASONS = {
    "healthy": "every frame decodes",
    "empty": "the file has no bytes",
    "unreadable": "the disk will not read it, or memory is short",
    "not_a_video": "the content is no video (a web page, a text or a picture under a video's name)",
    "no_moov": "cut off before it was complete: its index, the moov box, is missing or cut",
    "bad_header": "the container's header is damaged or names no stream",
    "no_video_stream": "no video in it, sound at most",
    "cover_picture_only": "sound with a cover picture, no moving picture",
    "no_decoder": "no decoder for its codec here, or the codec's name is damaged",
    "no_frames": "there is a video stream, but not one frame decodes",
    "truncated": "the end is missing",
    "corrupt_frames": "damaged data in the middle",
    "timeout": "decoding did not end within the time limit, twice",
    "decoder_crash": "the decoder crashed or failed in an unknown way, twice",
}
REPAIRABLE = "no_frames", "truncated", "corrupt_frames"  # what opens and does not take the decoder down
COLUMNS = ["video", "reason", "action", "detail", "quarantined_to", "repaired_by", "frames", "corrupt_frames"]
COLUMNS += ["fps", "variable_frame_rate", "duration_s", "shorter_than_4_s", "width", "height", "codec", "rotation"]
COLUMNS += ["size_bytes", "mtime_ns"]
FORMATS = {"m4v": "mp4", "mkv": "matroska"}  # muxers whose name is not the file's ending


# --- one video: is it healthy? (runs in a child process) -------------------------------------------------------------


def open_video(path, **options):
    """Open for reading, tolerant of odd metadata; a playlist under a video's name must not reach the network."""
    import av

    return av.open(str(path), metadata_errors="ignore", options={"protocol_whitelist": "file"} | options)


def outermost_boxes(path):
    """Where the container's outermost boxes end: {kind: byte offset}; {} for a container that is not known here.

    MP4/MOV boxes are 4 bytes size, 4 bytes kind (ISO/IEC 14496-12, 4.2); AVI is RIFF chunks, 4 bytes kind, 4 bytes
    size; Matroska is an EBML header and one Segment (RFC 8794). Sizes that say "unknown" are left out.
    """
    ends, size = {}, os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            length = int.from_bytes(head[4:8], "little")
            return {} if length in (0, 0xFFFFFFFF) else {"RIFF": 8 + length}
        if head[:4] == b"\x1aE\xdf\xa3":
            file.seek(4)
            for kind in "EBML", "Segment":
                first = file.read(1) or b"\0"
                width = 9 - first[0].bit_length()  # the leading zero bits of the first byte give the number of bytes
                length = int.from_bytes(bytes([first[0] & (0xFF >> width)]) + file.read(width - 1), "big")
                if length < (1 << 7 * width) - 1:
                    ends[kind] = file.tell() + length
                if length > size:
                    break
                file.seek(length + 4, os.SEEK_CUR)  # to the size of the Segment, behind its 4-byte name
            return ends
        position = 0
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8].decode("latin-1")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            elif length == 0:
                length = size - position
            if length < 8 or not kind.isprintable():
                break
            position += length
            ends[kind] = position
    return ends if ends.keys() & {"ftyp", "moov", "mdat", "moof"} else {}


def read_through(path):
    """Raise the OSError with which the disk fails, if it was not the file's content that a decoder failed on."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def why_not_openable(path, boxes):
    """Reason code for a file in which no decodable stream can be found."""
    if boxes.keys() & {"EBML", "Segment", "RIFF"}:
        return "bad_header"
    if not boxes:
        return "not_a_video"
    return "bad_header" if boxes.get("moov", sys.maxsize) <= os.path.getsize(path) else "no_moov"


def decode(container, stream):
    """Decode the whole stream on one thread, going on after errors.

    Returns a namespace: packets and frames (counts), corrupt (frames that the decoder marked so), errors, first_error,
    packet_pts, frame_pts, interlaced, rotation (degrees). Raises OSError if the disk fails.
    """
    import av

    seen = types.SimpleNamespace(packets=0, frames=0, corrupt=0, errors=0, first_error="", interlaced=False, rotation=0)
    seen.packet_pts, seen.frame_pts = [], []
    stream.codec_context.thread_count = 1  # JOBS processes share the cores already
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            if packet.size:
                seen.packets += 1
                if not packet.is_discard:  # an edit list hides it
                    seen.packet_pts.append(packet.pts)
            for frame in packet.decode():
                if not seen.frames:
                    seen.rotation = frame.rotation
                seen.frames += 1
                seen.corrupt += frame.is_corrupt
                seen.interlaced |= frame.interlaced_frame
                seen.frame_pts.append(frame.pts)
        except StopIteration:
            return seen
        except av.error.FFmpegError as e:
            read_through(container.name)
            seen.errors += 1
            seen.first_error = seen.first_error or e.strerror


def lost_frames(codec, seen):
    """Number of packets that silently gave no frame, for codecs where each gives one.

    Packets shown before the first decoded frame do not count: a video cut out of a longer one may start with frames
    whose references are gone. Nor do interlaced ones, where two packets may make a frame.
    """
    if codec not in ("h264", "hevc") or seen.interlaced or not seen.frames or None in seen.frame_pts:
        return 0
    first, shown = min(seen.frame_pts), set(seen.frame_pts)
    return sum(pts is not None and pts > first and pts not in shown for pts in seen.packet_pts)


def properties(stream, seen):
    """What later steps may want to know of a video, as columns of the report. fps is frames per second of the whole."""
    pts = sorted(p for p in seen.frame_pts if p is not None)
    gaps = [after - before for before, after in itertools.pairwise(pts)]
    rate = stream.average_rate or stream.guessed_rate
    variable = False
    if gaps and pts[-1] > pts[0] and len(pts) == seen.frames:
        mean = (pts[-1] - pts[0]) / len(gaps)
        rate = 1 / (mean * stream.time_base)
        variable = max(gaps) - min(gaps) > 0.1 * mean + 2  # coarse clocks round each time by up to one tick
    duration = seen.frames / rate if rate else 0
    return {
        "frames": seen.frames,
        "corrupt_frames": seen.corrupt,
        "fps": f"{float(rate or 0):.3f}",
        "variable_frame_rate": "yes" if variable else "no",
        "duration_s": f"{float(duration):.3f}",
        "shorter_than_4_s": "yes" if duration < 4 else "no",
        "width": stream.codec_context.width,
        "height": stream.codec_context.height,
        "codec": stream.codec_context.codec.canonical_name,
        "rotation": seen.rotation,
    }


def fault_of(path, boxes, stream, seen):
    """(reason code, figures) of a stream that has been decoded as far as it goes."""
    size = os.path.getsize(path)
    index = [entry for entry in stream.index_entries if entry.size]
    beyond = sum(entry.pos + entry.size > size for entry in index)
    # Headers lie about frame counts and durations; what counts is data that the file itself points to but has not.
    if "moof" in boxes:
        cut = max(boxes["moof"], boxes.get("mdat", 0)) > size
    elif "RIFF" in boxes or "Segment" in boxes:
        cut = max(boxes.values()) > size and not 0 < stream.frames <= seen.packets
    else:
        cut = False
    if beyond or cut:
        of_index = f", {beyond} of {len(index)} lie beyond the end" if beyond else ""
        return "truncated", f"{seen.frames} frames decode{of_index}"
    if not seen.frames:
        return "no_frames", seen.first_error
    unread, lost = max(0, len(index) - seen.packets), lost_frames(stream.codec_context.name, seen)
    if seen.errors or seen.corrupt or unread or lost:
        counts = f"{seen.errors} errors, {seen.corrupt} marked corrupt, {max(unread, lost)} missing"
        return "corrupt_frames", f"{seen.frames} frames decode, {counts}"
    return "healthy", ""


def verdict(reason, figures="", **columns):
    """A row of the report so far: the reason, its sentence with figures, and columns such as frames and codec."""
    return columns | {"reason": reason, "detail": REASONS[reason] + f" ({figures})" * bool(figures)}


def examine(path):
    """Decode the first moving picture of a file completely. Returns a row: reason, detail, properties if it opens."""
    import av

    try:
        if os.path.getsize(path) == 0:
            return verdict("empty")
        boxes = outermost_boxes(path)
        try:
            container = open_video(path)
        except av.error.FFmpegError as e:
            read_through(path)
            return verdict(why_not_openable(path, boxes), e.strerror)
        with container:
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty", "hls", "concat"):
                return verdict("not_a_video", f"it is read as {container.format.name}")
            moving = moving_pictures(container)
            index_cut = why_not_openable(path, boxes) == "no_moov"
            if not moving:
                if container.streams.video:
                    return verdict("cover_picture_only")
                return verdict("no_moov" if index_cut else "no_video_stream" if container.streams else "bad_header")
            if moving[0].codec_context is None or not has_decoder(moving[0]):
                return verdict("no_moov" if index_cut else "no_decoder")
            seen = decode(container, moving[0])
            reason, figures = fault_of(path, boxes, moving[0], seen)
            return verdict(reason, figures, **properties(moving[0], seen))
    except OSError as e:
        return verdict("unreadable", os.strerror(e.errno) if e.errno else str(e))


def moving_pictures(container):
    """The video streams that are not a cover picture."""
    import av

    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def has_decoder(stream):
    """Whether this FFmpeg can decode the stream's codec."""
    import av

    try:
        av.Codec(stream.codec_context.name, "r")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


# --- one video: the repair ladder (runs in a child process) ----------------------------------------------------------


def wanted_streams(container):
    """What a repaired file keeps: moving pictures, sound and subtitles."""
    return [*moving_pictures(container), *container.streams.audio, *container.streams.subtitles]


def create_video(path, original):
    """Open `path` for writing in the container format that the ending of `original` names, with its metadata."""
    import av

    ending = Path(original).suffix[1:].lower()
    return av.open(str(path), "w", format=FORMATS.get(ending, ending))


def copy_packet(packet, stream, last_dts, target):
    """Mux a packet into `stream` of `target`; `last_dts` holds the decoding time of each stream's packet before.

    Matroska gives the first packets of a stream with B-frames no decoding time: they get times before the first pts,
    one tick apart (H.264 and HEVC reorder over at most 16 frames).
    """
    if not packet.size:  # the end
        return
    if packet.dts is None:
        packet.dts = last_dts[stream.index] + 1 if stream.index in last_dts else (packet.pts or 0) - 17
    last_dts[stream.index] = packet.dts
    packet.stream = stream
    target.mux(packet)


def remux(original, repaired, **options):
    """Copy all wanted streams packet by packet into a new file; `options` are the reader's."""
    with open_video(original, **options) as source, create_video(repaired, original) as target:
        target.metadata.update(source.metadata)
        streams = {stream.index: target.add_stream_from_template(stream) for stream in wanted_streams(source)}
        last_dts = {}
        for packet in source.demux(wanted_streams(source)):
            copy_packet(packet, streams[packet.stream.index], last_dts, target)


def remux_without_corrupt_packets(original, repaired):
    """The same without the packets that the reader knows to be incomplete, say the last one of a cut file."""
    remux(original, repaired, fflags="+discardcorrupt")


def reencode(original, repaired, rotation):
    """Encode what can be decoded as H.264 (crf 18), each frame at its own time; copy sound and subtitles.

    `rotation` in degrees goes into the new header (PyAV before 18 cannot write one: then this raises).
    """
    import av

    with open_video(original) as source, create_video(repaired, original) as target:
        target.metadata.update(source.metadata)
        picture, *others = wanted_streams(source)
        width, height = picture.codec_context.width, picture.codec_context.height
        encoder = target.add_stream("libx264", rate=picture.average_rate or 30, options={"crf": "18"})
        encoder.width, encoder.height = width, height
        encoder.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # 4:2:0 needs even sides
        encoder.codec_context.time_base = encoder.time_base = picture.time_base
        encoder.codec_context.thread_count = 1
        if rotation:
            encoder.set_display_rotation(rotation)
        streams = {stream.index: target.add_stream_from_template(stream) for stream in others}
        last_pts, last_dts = None, {}
        for packet in source.demux([picture, *others]):
            if packet.stream.index in streams:
                copy_packet(packet, streams[packet.stream.index], last_dts, target)
                continue
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue  # what cannot be decoded is what this repair leaves out
            for frame in frames:
                frame = frame.reformat(width, height, encoder.pix_fmt)
                if last_pts is not None and (frame.pts is None or frame.pts <= last_pts):  # AVI stores no pts
                    frame.pts = last_pts + 1
                last_pts = frame.pts or 0
                frame.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses
                target.mux(encoder.encode(frame))
        target.mux(encoder.encode())


def repair(original, repaired, original_row, with_reencode):
    """Climb the ladder until a step gives a file that decodes completely; it then lies, synced, in `repaired`.

    It must have at least as many frames as are intact in the original, and one: a repair may not lose any.
    Returns the row of the repaired file with `repaired_by`, or {"tried": why each step failed}.
    """
    steps = [("copy remux", remux), ("remux without corrupt packets", remux_without_corrupt_packets)]
    least_frames = max(1, original_row["frames"] - original_row["corrupt_frames"])
    tried = []
    if with_reencode:
        steps.append(("re-encoding", functools.partial(reencode, rotation=original_row["rotation"])))
    for name, step in steps:
        try:
            step(original, repaired)
            row = examine(repaired)
        except (ImportError, MemoryError):
            raise
        except Exception as e:  # a muxer may refuse a damaged file with any error; the next step may still do
            tried.append(f"{name}: {getattr(e, 'strerror', None) or e!r}")
            continue
        if row["reason"] == "healthy" and row["frames"] >= least_frames:
            shutil.copymode(original, repaired)
            sync(repaired)
            return row | {"repaired_by": name}
        found = f"only {row['frames']} frames" if row["reason"] == "healthy" else f"still {row['reason']}"
        tried.append(f"{name}: {found}")
    return {"tried": "; ".join(tried)}


def sync(path):
    """Have a file on the disk before anything is renamed or deleted because of it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# --- child processes -------------------------------------------------------------------------------------------------


def end_with_parent(parent):
    """In a child: end once the parent (its process id) was killed, for then nobody ends a video that hangs."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def result_of(future):
    """(what the child returned, None), or (None, (reason code, figures)) if it hung, crashed or got no memory.

    Exits with code 2 if the child could not import a package: no video is to blame for that.
    """
    import pebble

    try:
        return future.result(), None
    except concurrent.futures.TimeoutError:
        return None, ("timeout", f"{TIMEOUT:g} s")
    except concurrent.futures.process.BrokenProcessPool:
        raise
    except ImportError as e:
        common.refuse(f"a child process cannot import what it needs ({e}); install the packages of requirements.txt")
    except MemoryError:
        return None, ("unreadable", "not enough memory")
    except pebble.ProcessExpired as e:
        return None, ("decoder_crash", f"exit code {e.exitcode}")
    except Exception as e:  # whatever a mangled file made the bindings raise
        return None, ("decoder_crash", repr(e))


def examined_and_repaired(videos, temporary_of):
    """Yield (video, row, temporary path of the repaired file or None) for each video, in the order in which they end.

    Every check and every repair runs in a child process with a limit of TIMEOUT seconds; a decoder that hangs or
    crashes ends its child only. Either is tried once more: the system may have ended the child for lack of memory, a
    file server may have stalled.
    """
    import pebble

    children = multiprocessing.get_context("spawn")  # a forked child would outlive a killed parent
    waiting, running = iter(videos), {}
    setting = {"context": children, "initializer": end_with_parent, "initargs": [os.getpid()]}
    with pebble.ProcessPool(min(JOBS, len(videos)), **setting) as pool:

        def start(video, row=None, again=False):
            temporary = temporary_of(video) if row else None
            if row:
                future = pool.schedule(repair, args=(str(video), temporary, row, REENCODE), timeout=TIMEOUT)
            else:
                future = pool.schedule(examine, args=(str(video),), timeout=TIMEOUT)
            running[future] = video, row, temporary, again

        try:
            for video in itertools.islice(waiting, 4 * JOBS):  # a few ahead, so that no child waits for work
                start(video)
            while running:
                ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    video, row, temporary, again = running.pop(future)
                    result, failure = result_of(future)
                    if failure and not again:
                        start(video, row, again=True)
                        continue
                    if failure:
                        result = {"tried": ", ".join(failure)} if row else verdict(*failure)
                    if row is None and REMUX and result["reason"] in REPAIRABLE:
                        start(video, result)
                        continue
                    for upcoming in itertools.islice(waiting, 1):
                        start(upcoming)
                    if row is None:
                        yield video, result, None
                    elif "tried" in result:
                        temporary.unlink(missing_ok=True)
                        yield video, row | {"detail": f"{row['detail']}; not repaired ({result['tried']})"}, None
                    else:
                        faults = {key: row[key] for key in ("reason", "detail")}
                        yield video, result | faults, temporary
        except BaseException:
            pool.stop()  # leaving the block would wait for the children
            raise


# --- files: nothing is lost ------------------------------------------------------------------------------------------


def is_ours(video):
    """Whether a video is this process's share of the work.

    Told by a hash of its path, not by its place in a sorted list: other processes move files away meanwhile.
    """
    rank, world_size, *_ = common.launcher()
    return zlib.crc32(os.fsencode(Path(video).relative_to(ROOT))) % world_size == rank


def list_videos():
    """This process's share of the videos under ROOT/train and ROOT/val, sorted.

    Deletes the half-written repairs that a killed run left beside them, except in a dry run.
    """
    endings = ["." + ending.lower().lstrip(".") for ending in EXT]
    files = []
    for split in "train", "val":
        for folder, _, names in os.walk(Path(ROOT, split), followlinks=True):
            files += [Path(folder, name) for name in names]
    videos = [file for file in files if file.suffix.lower() in endings]
    others = Counter(file.suffix.lower() for file in files if not file.name.startswith("."))
    for ending in endings:
        del others[ending]
    if others:
        named = ", ".join(f"{ending or 'none'} {count:,}" for ending, count in others.most_common())
        print(f"files with other endings are not checked ({named}); --ext names the endings of videos")
    if not videos:
        common.refuse(f"no {' or '.join(endings)} file in {ROOT}/train or {ROOT}/val; --ext names other endings")
    for file in files:
        leftover = re.fullmatch(r"\.(.+)\.\d+\.repairing", file.name, re.DOTALL)  # as temporary_path() names them
        if leftover and not DRY_RUN and is_ours(file.with_name(leftover[1])):
            file.unlink()
    return sorted(filter(is_ours, videos))


def temporary_path(video, scratch):
    """Where a repair of `video` is written: beside it, so that a rename puts it in place; in a dry run in `scratch`."""
    folder = Path(scratch, str(zlib.crc32(os.fsencode(video)))) if DRY_RUN else video.parent
    folder.mkdir(exist_ok=True)
    return folder / f".{video.name}.{os.getpid()}.repairing"


def same_content(a, b):
    """Whether `b` is a link to where the link `a` leads, or both are files with the same bytes."""
    if os.path.islink(a) or os.path.islink(b):
        return os.path.islink(a) and os.path.islink(b) and os.readlink(b) == os.path.realpath(a)
    return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)


def preserve(file, wanted):
    """Have the content of `file` at `wanted`, too, or at <name>.1.mp4, .2, …: the first that is free or holds it.

    Returns that path. Overwrites nothing, even if other processes fill the same folder.
    """
    if file.parent.resolve() == wanted.parent.resolve():  # links inside QUARANTINE may lead back into the dataset
        raise OSError(f"the quarantine folder {wanted.parent} is the video's own folder")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    place = wanted
    for number in itertools.count(1):
        if not os.path.lexists(place):
            with contextlib.suppress(FileExistsError):  # another process was faster
                duplicate(file, place)
                return place
        if same_content(file, place):
            return place
        place = wanted.with_name(f"{wanted.stem}.{number}{wanted.suffix}")


def duplicate(file, place):
    """A hard link, across file systems a copy, of a link a link. Raises FileExistsError if `place` is taken."""
    if file.is_symlink():
        os.symlink(os.path.realpath(file), place)
        return
    try:
        os.link(file, place)
    except FileExistsError:
        raise
    except OSError:  # another file system, or one without hard links
        with common.written_then_renamed(place) as temporary:
            shutil.copy2(file, temporary)
            sync(temporary)
            os.close(os.open(place, os.O_CREAT | os.O_EXCL))  # the name is ours, or this raises


def plan(video, row, temporary):
    """Complete a row: what to do with the video, size and mtime of what then stands in its place."""
    row = {"video": str(video), "action": "kept"} | row
    stands = temporary if temporary and REPLACE else video
    with contextlib.suppress(OSError):  # a broken link has no size
        stat = os.stat(stands)
        row |= {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if row["reason"] not in ("healthy", "unreadable"):
        action = "replaced" if temporary and REPLACE else "quarantined"
        row["action"] = f"would be {action}" if DRY_RUN else action
    return row


def copy_to_quarantine(video, row, temporary):
    """Bring what the row says into quarantine and note where the original came to lie; the dataset stays as it is."""
    if row["action"] in ("quarantined", "replaced"):
        place = preserve(video, Path(QUARANTINE) / video.relative_to(ROOT))
        row["quarantined_to"] = str(place)
        if temporary and row["action"] == "quarantined":
            preserve(temporary, place.with_name(f"{place.stem}.repaired{place.suffix}"))


def change_dataset(video, row, temporary):
    """Do what the row says under ROOT; the original lies in quarantine, too, by now."""
    if row["action"] == "replaced":
        os.replace(temporary, video)
    elif row["action"] == "quarantined":
        video.unlink()


# --- the report ------------------------------------------------------------------------------------------------------


def share_path(state, rank, world_size):
    """The file for one process's rows: REPORT itself, or under a launcher <report>.<rank>of<n>[.<id>].<state>.csv.

    `state` is part or done; the id is the launch's where the launcher gives one, so that no process takes what an
    earlier launch left for the share of one that has not started yet.
    """
    report = Path(REPORT)
    if world_size == 1:
        return report
    launch = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_ARRAY_JOB_ID") or ""
    name = ".".join(filter(None, [report.stem, f"{rank}of{world_size}", re.sub(r"\W", "-", launch), state]))
    return report.with_name(name + report.suffix)


def all_shares():
    """The share files that lie beside REPORT, from this launch or an earlier one."""
    report = Path(REPORT)
    pattern = f"{glob.escape(report.stem)}.[0-9]*of[0-9]*.[pd][ao][rn][te]{glob.escape(report.suffix)}"
    return sorted(report.parent.glob(pattern))


def read_rows(path):
    """Rows of a report by video; the last row of a video counts. Leaves out a row that a kill cut off.

    Raises FileNotFoundError. Exits with code 2 if the file is no report of this script, so that nothing else is
    overwritten.
    """
    text = path.read_bytes().decode("utf-8", errors="surrogateescape").replace("\0", "")
    lines = csv.reader(io.StringIO(text, newline=""))
    if text and next(lines, None) != COLUMNS:
        common.refuse(f"{path} is no report of check_videos.py; move it away or name another file with --report")
    rows = [dict(zip(COLUMNS, line)) for line in lines if len(line) == len(COLUMNS)]
    if not text.endswith("\n"):
        rows = rows[:-1]
    return {row["video"]: row for row in rows}


def write_rows(path, rows):
    """Write a report as a whole, sorted by video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.written_then_renamed(path) as temporary, open_report(temporary, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[video] for video in sorted(rows))


def open_report(path, mode):
    """Open a report for writing; names that are not UTF-8 come back as they are."""
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")


def earlier_rows():
    """Rows of earlier runs, finished or not, with any number of processes: (those of this ROOT, those of others)."""
    found, rows, others = [], {}, {}
    for path in [Path(REPORT), *all_shares()]:
        with contextlib.suppress(FileNotFoundError):  # the first run; another process has just merged the shares
            found.append((path.stat().st_mtime_ns, read_rows(path)))
    for _, part in sorted(found, key=lambda pair: pair[0]):  # of a video that is in several the newest counts
        for video, row in part.items():
            if ours := spelled_from_root(video):
                rows[ours] = row | {"video": ours}
            else:
                others[video] = row
    return rows, others


def spelled_from_root(video):
    """The path as this run writes it, if it lies under ROOT, in whatever spelling of ROOT; None for another's."""
    with contextlib.suppress(ValueError):
        return str(Path(ROOT) / Path(os.path.abspath(video)).relative_to(os.path.abspath(ROOT)))
    return None


def row_to_keep(row):
    """What an earlier row says for this run: the row of a video that need not be looked at again, or None.

    That is a video found or made healthy whose size and mtime are unchanged, or one that has moved to quarantine.
    """
    video = Path(row["video"])
    if not os.path.lexists(video):
        return row | {"action": "quarantined earlier"} if row["action"].startswith("quarantined") else None
    if row["action"] not in ("kept", "replaced") or row["reason"] == "unreadable":
        return None
    stat = os.stat(video)
    if (str(stat.st_size), str(stat.st_mtime_ns)) != (row["size_bytes"], row["mtime_ns"]):
        return None
    if row["action"] == "replaced":
        return row | {"reason": "healthy", "action": "kept", "detail": f"repaired in an earlier run: {row['detail']}"}
    return row


def merge(rank, world_size):
    """Sort the report. Under a launcher the process that finishes last joins all shares; the others return None.

    Returns the rows of the whole report by video.
    """
    if world_size > 1:
        os.replace(share_path("part", rank, world_size), share_path("done", rank, world_size))
    rows = {}
    for other in range(world_size):
        try:
            rows |= read_rows(share_path("done", other, world_size))
        except FileNotFoundError:  # still at work, or merged by another process that finished at the same moment
            return None
    write_rows(Path(REPORT), rows)
    for share in all_shares():
        share.unlink(missing_ok=True)
    return rows


def print_summary(rows):
    """A table of reasons and what was done, whose counts add up to the number of videos; and where things lie."""
    earlier = [row for row in rows.values() if row["action"] == "quarantined earlier"]
    now = [row for row in rows.values() if row["action"] != "quarantined earlier"]
    print()
    for reason in REASONS:
        actions = [row["action"] for row in now if row["reason"] == reason]
        if actions:
            done = ", ".join(f"{actions.count(action):,} {action}" for action in sorted(set(actions)))
            print(f"  {reason:20}{len(actions):9,}   {done}")
    print(f"  {'sum':20}{len(now):9,}")
    stay = [row for row in now if row["action"] in ("kept", "replaced")]
    short = sum(row["shorter_than_4_s"] == "yes" for row in stay)
    variable = sum(row["variable_frame_rate"] == "yes" for row in stay)
    print(f"of the {len(stay):,} that stay, {short:,} are shorter than 4 s and {variable:,} have a variable frame rate")
    print(f"{len(earlier):,} were quarantined in earlier runs" if earlier else "none was quarantined in an earlier run")
    print(f"report: {REPORT}; quarantine: {QUARANTINE}")


# --- the run ---------------------------------------------------------------------------------------------------------


def check_packages():
    """Exit with code 2 if a package is missing or broken, before a child process fails on every video for it."""
    try:
        for package in "av", "pebble", "tqdm":
            importlib.import_module(package)
    except ImportError as e:
        common.refuse(f"cannot import a package ({e}); install those of requirements.txt")


def check_usage():
    """Exit with code 2 and one sentence if the constants contradict one another or there is no dataset."""
    folders = [Path(ROOT, split) for split in ("train", "val")]
    if not any(folder.is_dir() for folder in folders):
        common.refuse(f"{ROOT} has neither train/ nor val/; --root names the folder of {{train,val}}/<class>/<video>")
    places = [Path(QUARANTINE), *(Path(QUARANTINE, folder.name) for folder in folders)]
    if any(place.resolve().is_relative_to(folder.resolve()) for place in places for folder in folders):
        common.refuse(f"the quarantine {QUARANTINE} lies in the dataset; name a folder outside of train/ and val/")
    if (REPLACE or REENCODE) and not REMUX:
        common.refuse("--replace and --reencode say what to do with a repair; give --remux with them")
    if JOBS < 1 or TIMEOUT <= 0 or not EXT:
        common.refuse("--jobs must be at least 1, --timeout more than 0 s, and --ext name at least one ending")


def check_and_record(videos, report, scratch):
    """Check, repair and move the videos, writing each row between the copy to quarantine and the change of the dataset:
    a row whose change a kill prevented is seen as out of date by the next run, and a change can never lack its row."""
    from tqdm import tqdm

    writer = csv.DictWriter(report, COLUMNS, lineterminator="\n")

    def record(row):
        writer.writerow(row)
        report.flush()

    results = examined_and_repaired(videos, lambda video: temporary_path(video, scratch))
    for video, row, temporary in tqdm(results, total=len(videos), unit="video", smoothing=0):
        row["video"] = str(video)
        try:
            row = plan(video, row, temporary)
            copy_to_quarantine(video, row, temporary)
            record(row)
            change_dataset(video, row, temporary)
        except OSError as e:
            row |= {"action": "failed", "detail": f"{row['detail']}; could not be moved or replaced: {e}"}
            record(row)
        if temporary:
            temporary.unlink(missing_ok=True)
        if row["reason"] != "healthy":
            tqdm.write(f"{row['reason']}: {video}: {row['detail']} -> {row['action']}")


def main():
    common.set_constants_from_flags(globals())
    check_usage()
    check_packages()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is clean, too
    rank, world_size, *_ = common.launcher()
    videos = list_videos()
    earlier, of_other_roots = earlier_rows()
    kept = {video: row_to_keep(row) for video, row in earlier.items() if is_ours(video)}
    kept = {video: row for video, row in kept.items() if row}
    todo = [video for video in videos if str(video) not in kept]
    share = f" in share {rank} of {world_size}" if world_size > 1 else ""
    unchanged = len(videos) - len(todo)
    print(f"{len(videos):,} videos under {ROOT}{share}, {unchanged:,} unchanged since an earlier run and skipped")

    part = share_path("part", rank, world_size)
    write_rows(part, of_other_roots | kept)
    if world_size > 1:
        share_path("done", rank, world_size).unlink(missing_ok=True)
    try:
        with open_report(part, "a") as report, tempfile.TemporaryDirectory() as scratch:
            if todo:
                check_and_record(todo, report, scratch)
    except KeyboardInterrupt:
        print(f"\nstopped; {part} is kept, run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    rows = merge(rank, world_size)
    if rows is None:
        print(f"share {rank} of {world_size} is done; the process that finishes last merges the reports into {REPORT}")
        return
    rows = {video: row for video, row in rows.items() if video not in of_other_roots}
    print_summary(rows)
    if any(row["reason"] != "healthy" and row["action"] != "quarantined earlier" for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
