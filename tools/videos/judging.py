"""The verdict on one file: is it a video of which every frame decodes, and if not, what is wrong with it?

`examine` decodes a file completely; check_videos.py runs it in child processes, on what it finds and on its repairs.
What a file is taken for, which stream of it, and which frames it has, is the index's own rule (torchvision_patches/
decoding.py, `facts_of`): a file is healthy only if each of those frames was met while everything was decoded. So what
is healthy here, the index takes, and training and preprocessing decode.
"""

import itertools
import os
import sys
import types

REASONS = {
    "healthy": "every frame decodes",
    "empty": "the file has no bytes",
    "unreadable": "it is no file, the disk will not read it, or memory is short",
    "not_a_video": "the content is no video (a web page, a text or a picture under a video's name)",
    "no_moov": "cut off before it was complete: its index, the moov box, is missing or cut",
    "bad_header": "the container's header is damaged or names no stream",
    "no_video_stream": "no video in it, sound at most",
    "cover_picture_only": "sound with a cover picture, no moving picture",
    "no_decoder": "no decoder for its codec here, or the codec's name is damaged",
    "no_frames": "there is a video stream, but not one frame decodes",
    "truncated": "the end is missing",
    "corrupt_frames": "damaged data in the middle",
    "size_change": "its pictures change their size in mid-stream",
    "no_frame_times": "it decodes, but nothing tells its frame rate",
    "timeout": "decoding did not end within the time limit, twice",
    "decoder_crash": "the decoder crashed or failed in an unknown way, twice",
}


def outermost_boxes(path):
    """Where the container's outermost boxes end: {kind: byte offset}; {} for a container that is not known here.

    MP4/MOV boxes are 4 bytes size, 4 bytes kind (ISO/IEC 14496-12, 4.2); AVI is RIFF chunks, 4 bytes kind, 4 bytes
    size; Matroska is an EBML header and one Segment (RFC 8794). Sizes that say "unknown" are left out.
    FFmpeg's own log does not tell as much: "moov atom not found" is all it says of a web page and of a cut video alike,
    and nothing of an AVI that ends between two packets or of fragments that are missing.
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
    pts (of frames), sizes ({(width, height)}), rotation (degrees clockwise).
    Raises OSError if the disk fails.
    """
    import av

    seen = types.SimpleNamespace(packets=0, frames=0, corrupt=0, errors=0, first_error="", rotation=0)
    seen.pts, seen.sizes = [], set()
    stream.codec_context.thread_count = 1  # JOBS processes share the cores already
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            seen.packets += packet.size > 0
            for frame in packet.decode():
                if not seen.frames:
                    seen.rotation = -frame.rotation % 360
                seen.frames += 1
                seen.corrupt += frame.is_corrupt
                seen.pts.append(frame.pts)
                seen.sizes.add((frame.width, frame.height))
        except StopIteration:
            return seen
        except av.error.FFmpegError as e:
            read_through(container.name.removeprefix("file:"))
            seen.first_error = seen.first_error or e.strerror
            seen.errors += 1


def all_are_read(path):
    """Whether `read_frames` gives every frame that the index takes of a file."""
    from torchvision_patches.decoding import UnreadableVideo, frame_times, read_frames

    try:
        pts, _ = frame_times(path)
        read_frames(path, pts, range(len(pts)), convert=lambda pixels: pixels[:1, :1])
    except UnreadableVideo:
        return False
    return True


def facts_and_missing(path, seen):
    """What the index says of a file, against what was decoded of it.

    Times that a header gives are taken only if the decoded frames have them, as `read_frames` does it. Returns (the
    index's Facts, the number of frames in them that were not decoded). Raises UnreadableVideo.
    """
    from torchvision_patches.decoding import facts_of, has_times

    for header in True, False:
        facts = facts_of(path, header)
        missing = len(set(facts.pts.tolist()).difference(seen.pts)) if has_times(facts.pts) else 0
        if not missing:
            break
    return facts, missing


def properties(stream, seen, facts):
    """What later steps may want to know of a video, as columns of the report. fps is frames per second of the whole.

    header_fps is what the frame rule takes; `facts` is None where the index takes nothing.
    """
    from torchvision_patches.decoding import moving_pictures

    pts = sorted(p for p in seen.pts if p is not None)
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
        "header_fps": f"{facts.fps:.3f}" if facts else "",
        "variable_frame_rate": "yes" if variable else "no",
        "longest_gap_s": f"{float(max(gaps, default=0) * stream.time_base):.3f}",
        "duration_s": f"{float(duration):.3f}",
        "shorter_than_4_s": "yes" if duration < 4 else "no",
        "width": stream.codec_context.width,
        "height": stream.codec_context.height,
        "codec": stream.codec_context.codec.canonical_name,
        "rotation": seen.rotation,
        "video_streams": len(moving_pictures(stream.container)),
    }


def missing_end(path, boxes, stream, seen):
    """A clause about the data that a file points to but has not, "" if it has all of it.

    Headers lie about frame counts and durations; what counts is where they say that data lies.
    """
    size = os.path.getsize(path)
    entries = [entry for entry in stream.index_entries if entry.size]
    beyond = sum(entry.pos + entry.size > size for entry in entries)
    if beyond:
        return f"{beyond} of {len(entries)} frames lie beyond the end"
    if "moof" in boxes:
        cut = max(boxes["moof"], boxes.get("mdat", 0)) > size
    else:
        known = "RIFF" in boxes or "Segment" in boxes
        cut = known and max(boxes.values()) > size and not 0 < stream.frames <= seen.packets
    return "its outermost box ends beyond the end" if cut else ""


def fault_of(path, boxes, stream, seen):
    """(reason code, figures, Facts or None, whether all that the index takes decodes) of a stream that was decoded."""
    from torchvision_patches.decoding import UnreadableVideo

    facts, missing, refused = None, 0, ""
    try:
        facts, missing = facts_and_missing(path, seen)
    except UnreadableVideo as e:
        refused = e.reason
    end = missing_end(path, boxes, stream, seen)
    unread = max(0, sum(entry.size > 0 for entry in stream.index_entries) - seen.packets) if not end else 0
    # damage may lie where nobody reads: a header may name fewer frames than there are packets
    damaged = seen.errors or seen.corrupt
    broken = not seen.frames or missing or (damaged and not all_are_read(path))
    decodes = not (broken or refused or len(seen.sizes) > 1)
    if not seen.frames:
        reason, figures = "no_frames", seen.first_error
    elif broken or unread or damaged:
        reason = "corrupt_frames"
        figures = f"{seen.frames} frames decode, {seen.errors} errors, {seen.corrupt} marked corrupt"
        figures += f", {max(missing, unread)} missing"
    elif len(seen.sizes) > 1:
        reason, figures = "size_change", ", ".join(f"{w} x {h}" for w, h in sorted(seen.sizes))
    elif refused:
        reason, figures = "no_frame_times", refused
    else:
        reason, figures = "healthy", ""
    if end:
        reason, figures = "truncated", f"{seen.frames} frames decode, {end}"
    return reason, figures, facts, decodes


def report_row(reason, figures="", **columns):
    """A row of the report so far: the reason, its sentence with figures, and columns such as frames and codec."""
    return columns | {"reason": reason, "detail": REASONS[reason] + f" ({figures})" * bool(figures)}


def examine(path):
    """Decode the first moving picture of a file completely. Returns a row: reason, detail, properties if it opens.

    Its column `decodes` is "yes" if every frame that the index takes decodes: of a healthy video, and of one that has
    lost its end, or packets that only a header tells of, but whose other frames are whole.
    """
    import av

    from torchvision_patches.decoding import open_container

    try:
        boxes = outermost_boxes(path) if os.path.isfile(path) else {}
        try:
            container = open_container(path)  # refuses what is no file
        except av.error.FFmpegError as e:
            read_through(path)
            reason = why_not_openable(path, boxes) if os.path.getsize(path) else "empty"
            return report_row(reason, e.strerror if boxes else "")
        with container:
            return examine_container(path, boxes, container)
    except OSError as e:
        return report_row("unreadable", e.strerror or str(e))


def examine_container(path, boxes, container):
    """The row of `examine` for a file that opens."""
    from torchvision_patches.decoding import NOT_VIDEOS, moving_pictures

    kind, moving = container.format.name, moving_pictures(container)
    if kind.endswith("_pipe") or kind in NOT_VIDEOS:
        return report_row("not_a_video", f"it is read as {kind}")
    index_cut = why_not_openable(path, boxes) == "no_moov"
    if not moving:
        if container.streams.video:
            return report_row("cover_picture_only")
        return report_row("no_moov" if index_cut else "no_video_stream" if container.streams else "bad_header")
    if moving[0].codec_context is None or not has_decoder(moving[0]):
        return report_row("no_moov" if index_cut else "no_decoder")
    seen = decode(container, moving[0])
    reason, figures, facts, decodes = fault_of(path, boxes, moving[0], seen)
    columns = properties(moving[0], seen, facts)
    return report_row(reason, figures, decodes="yes" if decodes else "no", **columns)


def has_decoder(stream):
    """Whether this FFmpeg can decode the stream's codec."""
    import av

    try:
        av.Codec(stream.codec_context.name, "r")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
