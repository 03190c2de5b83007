"""The verdict on one file: is it a video of which every frame decodes, and if not, what is wrong with it?

`examine` decodes a file completely; check_videos.py runs it in child processes, on what it finds and on its repairs.
"""

import itertools
import os
import sys
import types

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
