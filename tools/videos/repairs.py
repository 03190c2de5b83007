"""Repairs of damaged videos, and the moving of files, by which nothing is lost: a room of check_videos.py.

Nothing in here overwrites what it has not written itself; `repair` writes to a temporary path that its caller renames.
"""

import contextlib
import filecmp
import functools
import itertools
import os
import shutil
from pathlib import Path

import common

from videos.judging import examine

# reasons of what opens and does not take the decoder down
REPAIRABLE = "no_frames", "truncated", "corrupt_frames", "size_change", "no_frame_times"
FORMATS = {"m4v": "mp4", "mkv": "matroska", "ts": "mpegts", "mts": "mpegts"}  # muxers not named as the file's ending
H264 = "libx264", {"crf": "18"}
ENCODERS = {"webm": ("libvpx-vp9", {"crf": "20", "b": "0", "cpu-used": "4"})}  # of endings that H.264 may not stand in


# --- one video: the repair ladder (runs in a child process) ----------------------------------------------------------


def wanted_streams(container):
    """What a repaired file keeps: moving pictures, sound and subtitles."""
    from torchvision_patches.decoding import moving_pictures

    return [*moving_pictures(container), *container.streams.audio, *container.streams.subtitles]


def create_video(path, original):
    """Open `path` for writing in the container format that the ending of `original` names, with its metadata."""
    import av

    ending = Path(original).suffix[1:].lower()
    return av.open(f"file:{path}", "w", format=FORMATS.get(ending, ending))


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
    from torchvision_patches.decoding import open_container

    with open_container(original, **options) as source, create_video(repaired, original) as target:
        target.metadata.update(source.metadata)
        streams = {stream.index: target.add_stream_from_template(stream) for stream in wanted_streams(source)}
        last_dts = {}
        for packet in source.demux(wanted_streams(source)):
            copy_packet(packet, streams[packet.stream.index], last_dts, target)


def reencode(original, repaired, rotation):
    """Encode what can be decoded as H.264 (WebM: VP9), each frame at its own time; copy sound and subtitles.

    Pictures of other sizes than the first are scaled to its. `rotation`, degrees clockwise, goes into the new header
    (PyAV before 18 cannot write one: then this raises).
    """
    import av

    from torchvision_patches.decoding import open_container

    with open_container(original) as source, create_video(repaired, original) as target:
        target.metadata.update(source.metadata)
        picture, *others = wanted_streams(source)
        width, height = picture.codec_context.width, picture.codec_context.height
        codec, options = ENCODERS.get(Path(original).suffix[1:].lower(), H264)
        encoder = target.add_stream(codec, rate=picture.average_rate or 30, options=options)
        encoder.width, encoder.height = width, height
        encoder.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # 4:2:0 needs even sides
        encoder.codec_context.time_base = encoder.time_base = picture.time_base
        encoder.codec_context.thread_count = 1
        if rotation:
            encoder.set_display_rotation(-rotation % 360)
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
    whole = functools.partial(remux, fflags="+discardcorrupt")  # without the last packet of a cut file, say
    steps = [("copy remux", remux), ("remux without corrupt packets", whole)]
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


# --- files: nothing is lost ------------------------------------------------------------------------------------------


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
    """Make `place` a hard link to a file, or a copy where that cannot be; of a symbolic link, another one.

    Raises FileExistsError if `place` is taken.
    """
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
