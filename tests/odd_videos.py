"""Videos damaged and odd in every way we know, for the tests of all steps that read videos."""

import io
import os
import random
from fractions import Fraction

import av
import numpy as np
import pytest

from make_videos import draw_frames, write_video

ROTATION = 90 if hasattr(av.video.stream.VideoStream, "set_display_rotation") else 0  # PyAV 17 cannot write one
FASTSTART = {"movflags": "faststart"}
HEVC = dict(codec="libx265", options={"x265-params": "log-level=error"})


def write_with_sound(path, num_frames=40, video=True, cover=False, reading=None, rotation=0):
    """A file with a sine tone and, as asked for, a moving picture and a cover picture."""
    with av.open(str(path), "w", options=FASTSTART) as container:
        sound = container.add_stream("aac", rate=8000)
        picture = container.add_stream("libx264", rate=30) if video else None
        if video:
            picture.width, picture.height, picture.pix_fmt = 128, 96, "yuv420p"
        if video and rotation:
            picture.set_display_rotation(rotation)
        if cover:
            image = container.add_stream("mjpeg")
            image.width, image.height, image.pix_fmt = 64, 48, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic.value
        if cover:
            frame = av.VideoFrame.from_ndarray(next(draw_frames(1, 48, 64)), format="rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 30)
            container.mux(image.encode(frame) + image.encode())
        if video:
            for array in draw_frames(num_frames, 96, 128):
                container.mux(picture.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(picture.encode())
        tone = (8000 * np.sin(np.arange(8000 * num_frames // 30) / 5)).astype(np.int16)[None]
        chunk = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        chunk.rate = 8000
        container.mux(sound.encode(chunk))
        container.mux(sound.encode())
    return path


def overwrite(data, start, patch):
    return data[:start] + patch + data[start + len(patch) :]


def middle(data, num_bytes, fill):
    """Replace `num_bytes` in the middle of the media data."""
    at = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2 - num_bytes // 2
    return overwrite(data, at, fill(num_bytes))


def lying_duration(data):
    """Set the durations of mvhd, tkhd and mdhd (version 0) to ten minutes and more."""
    for kind, offset in (b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20):
        data = overwrite(data, data.index(kind) + offset, (10_000_000).to_bytes(4, "big"))
    return data


def lying_avi_header(data):
    """Let both frame counts of an AVI's header (avih dwTotalFrames, strh dwLength) claim more than there are."""
    data = overwrite(data, data.index(b"avih") + 8 + 16, (999).to_bytes(4, "little"))
    return overwrite(data, data.index(b"strh") + 8 + 32, (999).to_bytes(4, "little"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Bytes of healthy videos, by name."""
    folder = tmp_path_factory.mktemp("sources")
    write_video(folder / "h264.mp4", 60)
    write_video(folder / "fast.mp4", 60, options={"bf": "3", "g": "20"}, container_options=FASTSTART)
    write_video(folder / "hevc.mp4", 40, **HEVC, container_options=FASTSTART)
    write_video(folder / "mpeg4.mp4", 60, codec="mpeg4", container_options=FASTSTART)
    write_video(
        folder / "fragments.mp4", 60, options={"g": "15"}, container_options={"movflags": "frag_keyframe+empty_moov"}
    )
    write_video(folder / "h264.avi", 60)
    write_video(folder / "mpeg4.avi", 60, codec="mpeg4", options={"bf": "2"})
    write_video(folder / "h264.mkv", 60)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


REMUXED, ENCODED, NEVER = "remux", "re-encoding", "never"  # the step of the ladder that repairs a file
SHORTER = "shorter"  # it ends early, but all that is there decodes: it stays, unless a remux may replace it


def damaged_files(sources, folder):
    """Write every damaged file; returns {name: (reason code, what repairs it)}."""
    noise, media = random.Random(0).randbytes, sources["fast.mp4"].index(b"mdat")
    made = {
        "empty.mp4": (b"", "empty", NEVER),
        "html.mp4": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 50, "not_a_video", NEVER),
        "no_moov_half.mp4": (sources["h264.mp4"][: len(sources["h264.mp4"]) // 2], "no_moov", NEVER),
        "no_moov_98.mp4": (sources["h264.mp4"][: -len(sources["h264.mp4"]) // 50], "no_moov", NEVER),
        "moov_only_begun.mp4": (sources["fast.mp4"][:500], "no_moov", NEVER),
        "moov_zeroed.mp4": (
            overwrite(sources["fast.mp4"], sources["fast.mp4"].index(b"moov") + 4, bytes(600)),
            "bad_header",
            NEVER,
        ),
        "playlist.mp4": (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n",
            "not_a_video",
            NEVER,
        ),
        "all_zeros.mp4": (
            sources["fast.mp4"][: media + 4] + bytes(len(sources["fast.mp4"]) - media - 4),
            "no_frames",
            NEVER,
        ),
        "flipped.mp4": (middle(sources["mpeg4.mp4"], 1, lambda n: b"\xff"), "corrupt_frames", ENCODED),
        "mpeg4_cut.avi": (sources["mpeg4.avi"][: len(sources["mpeg4.avi"]) // 2], "truncated", REMUXED),
        "absurd_size.mkv": (overwrite(sources["h264.mkv"], 4, b"\x01\x7f" + b"\xff" * 6), "bad_header", NEVER),
        "h264_cut.mkv": (sources["h264.mkv"][: len(sources["h264.mkv"]) // 2], "truncated", SHORTER),
        "fragments_cut.mp4": (sources["fragments.mp4"][: len(sources["fragments.mp4"]) // 2], "truncated", REMUXED),
    }
    for name in "fast", "hevc", "mpeg4":
        data = sources[f"{name}.mp4"]
        for percent in 50, 98:
            made[f"{name}_cut_{percent}.mp4"] = data[: len(data) * percent // 100], "truncated", REMUXED
        made[f"{name}_noise.mp4"] = middle(data, 2000, noise), "corrupt_frames", ENCODED
        made[f"{name}_zeros.mp4"] = middle(data, 3000, bytes), "corrupt_frames", ENCODED
    for name, (data, _, _) in made.items():
        (folder / name).write_bytes(data)
    write_with_sound(folder / "sound_only.mp4", video=False)
    write_with_sound(folder / "sound_and_cover.mp4", video=False, cover=True)
    av.VideoFrame.from_ndarray(next(draw_frames(1, 96, 128)), format="rgb24").save(str(folder / "picture.png"))
    os.rename(folder / "picture.png", folder / "picture.mp4")
    others = {
        "sound_only.mp4": ("no_video_stream", NEVER),
        "sound_and_cover.mp4": ("cover_picture_only", NEVER),
        "picture.mp4": ("not_a_video", NEVER),
    }
    return {name: (reason, step) for name, (_, reason, step) in made.items()} | others


def odd_files(sources, folder):
    """Write every healthy but odd file; returns their names."""
    write_video(folder / "variable_rate.mp4", 30, pts=[3 * i + i % 3 for i in range(30)])
    write_video(folder / "three_frames.mp4", 3)
    write_video(folder / "one_frame.mp4", 1)
    write_video(folder / "av1.mp4", 10, codec="libsvtav1")
    write_video(folder / "hevc_10_bit.mp4", 20, pix_fmt="yuv420p10le", **HEVC)
    write_video(folder / "late_start.mp4", 30, pts=range(50, 80))
    write_video(folder / "B_FRAMES.MP4", 60, options={"bf": "5", "b_strategy": "0"})
    write_video(folder / "vp9.mp4", 10, codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"})
    write_video(folder / "interlaced.mp4", 30, options={"x264-params": "interlaced=1"})
    write_with_sound(folder / "sound_cover_and_rotation.mp4", cover=True, rotation=ROTATION)
    with_comment = write_video(folder / "metadata.mp4", 10).read_bytes()
    made = {
        "metadata.mp4": with_comment.replace(b"Lavf", b"\xff\xfe\xfa\xfb"),
        "h264_no_pts.avi": sources["h264.avi"],
        "mpeg4_b_frames.avi": sources["mpeg4.avi"],
        "lying_header.avi": lying_avi_header(sources["mpeg4.avi"]),
        "lying_duration.mp4": lying_duration(sources["fast.mp4"]),
        "fragments.mp4": sources["fragments.mp4"],
        "matroska.mkv": sources["h264.mkv"],
        "bytes_behind_the_end.mp4": sources["fast.mp4"] + random.Random(1).randbytes(999),
        os.fsdecode('caf\xe9 \u2019,\n"x"'.encode("utf-8")[:3] + b'\xe9, "x".mp4'): sources["mpeg4.mp4"],
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def zoo(tmp_path_factory, sources):
    """A dataset of damaged (train/damaged) and odd but healthy (val/odd) files: (root, expectations, odd names)."""
    root = tmp_path_factory.mktemp("zoo") / "full_dataset"
    for folder in "train/damaged", "val/odd":
        (root / folder).mkdir(parents=True)
    return root, damaged_files(sources, root / "train/damaged"), odd_files(sources, root / "val/odd")


# --- more, for the table of verdicts ---------------------------------------------------------------------------------


def without_its_first_packets(path, source, count):
    """What is left of `source`, a file, behind its first packets: it starts within a group of pictures."""
    with av.open(str(source)) as original, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        for packet in [packet for packet in original.demux(video=0) if packet.size][count:]:
            packet.stream = stream
            container.mux(packet)
    return path


def with_a_size_change(path, codec="libx264", frames=20):
    """30 pictures of 96 x 64, then as many of 192 x 128, in one track."""
    kind = {"libx264": "h264", "libvpx": "ivf"}[codec]
    options = {"libx264": {"bf": "0"}, "libvpx": {"cpu-used": "8", "deadline": "realtime"}}[codec]
    with av.open(str(path), "w") as container:
        stream, number = None, 0
        for height, width in (64, 96), (128, 192):
            part = io.BytesIO()
            with av.open(part, "w", format=kind) as target:
                encoder = target.add_stream(codec, rate=30, options=options)
                encoder.height, encoder.width, encoder.pix_fmt = height, width, "yuv420p"
                for array in draw_frames(frames, height, width):
                    target.mux(encoder.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
                target.mux(encoder.encode())
            part.seek(0)
            with av.open(part, format=kind) as source:
                stream = stream or container.add_stream_from_template(source.streams.video[0])
                for packet in (packet for packet in source.demux(video=0) if packet.size):
                    packet.stream, packet.time_base = stream, Fraction(1, 90000)
                    packet.pts = packet.dts = number * 3000
                    number += 1
                    container.mux(packet)
    return path


def with_two_streams(path):
    """Two moving pictures, the first of them tiny."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=30) for _ in range(2)]
        for stream, (height, width) in zip(streams, ((32, 48), (96, 128))):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for array in draw_frames(30, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return path


def with_times(path, milliseconds, codec="libx264", options=None, rate=30):
    """Frames at these times, in a clock of milliseconds, as browsers and screen recorders write them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time, array in zip(milliseconds, draw_frames(len(milliseconds), 64, 96)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def with_tags(path, pix_fmt="yuv420p", codec="libx264", **tags):
    """Pictures tagged as FFmpeg's pixfmt.h numbers it: colorspace, color_range, color_trc, color_primaries."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 96, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for array in draw_frames(20, 64, 96):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pix_fmt)
            for name in tags.keys() & {"colorspace", "color_range"}:
                setattr(frame, name, tags[name])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


VP8 = dict(codec="libvpx", options={"cpu-used": "8", "deadline": "realtime"})


def write_healthy(folder, sources):
    """Files that every step takes; returns their names."""
    odd_files(sources, folder)
    small = dict(num_frames=20, height=64, width=96)
    (folder / "gop.tmp.mp4").write_bytes(sources["fast.mp4"])
    without_its_first_packets(folder / "starts_in_a_group.mp4", folder / "gop.tmp.mp4", 5)
    without_its_first_packets(folder / "starts_in_a_group_too.mkv", folder / "gop.tmp.mp4", 5)
    (folder / "gop.tmp.mp4").unlink()
    with_two_streams(folder / "tiny_first_stream.mp4")
    with_times(folder / "clock_jumps.mp4", [33 * i + 3_600_000 * (i >= 15) for i in range(30)], options={"bf": "0"})
    uneven = np.cumsum([30, 33, 36, 33, 70] * 10).tolist()
    with_times(folder / "browser.webm", uneven, **VP8, rate=1000)
    bt709 = dict(colorspace=1, color_trc=1, color_primaries=1)
    with_tags(folder / "bt709.mp4", color_range=1, **bt709)
    with_tags(folder / "bt709_full_range.mp4", color_range=2, **bt709)
    with_tags(folder / "logarithmic.mp4", color_range=1, **(bt709 | {"color_trc": 9}))
    with_tags(folder / "ycgco.mp4", "yuv444p", colorspace=8)
    with_tags(folder / "gray.mkv", "gray", "ffv1")
    with_tags(folder / "rgb.mkv", "bgr0", "ffv1")
    with_tags(folder / "run_lengths.mov", "rgb24", "qtrle")
    with_tags(folder / "444.m4v", "yuv444p")
    write_video(folder / "motion_jpeg.avi", codec="mjpeg", pix_fmt="yuvj420p", **small)
    write_video(folder / "motion_jpeg_too.mov", codec="mjpeg", pix_fmt="yuvj420p", **small)
    write_video(folder / "raw.avi", codec="rawvideo", **small)
    write_video(folder / "vp8.webm", **VP8, **small)
    write_video(folder / "hevc.mkv", **HEVC, **small)
    write_video(folder / "prores.mov", codec="prores_ks", **small | {"pix_fmt": "yuv422p10le"})
    write_video(folder / "mpeg4.mov", codec="mpeg4", options={"bf": "2"}, **small)
    write_video(folder / "intra_refresh.mp4", options={"x264-params": "intra-refresh=1:keyint=10:bframes=0"}, **small)
    write_video(folder / "open_groups.mp4", options={"x264-params": "open-gop=1:keyint=8:bframes=3"}, **small)
    write_video(folder / "ntsc.mp4", fps=Fraction(30000, 1001), **small)
    write_video(folder / "one_by_three.mp4", pix_fmt="yuv444p", **small | {"height": 4, "width": 2})
    (folder / "linked.mp4").symlink_to(folder / "late_start.mp4")
    (folder / "ends_early.mkv").write_bytes(sources["h264.mkv"][: len(sources["h264.mkv"]) // 2])
    return sorted(path.name for path in folder.iterdir())


def write_bad(folder, sources):
    """Files that no step takes, or that each leaves out; returns their names below `folder`."""
    for name, (_, step) in damaged_files(sources, folder).items():
        if step == SHORTER or name == "mpeg4_cut_98.mp4":  # only its last frame is damaged, which clips may leave out
            (folder / name).unlink()
    for name in "mp4_cut_in_its_header.mp4", "text.mp4", "random.mp4", "zeros.mp4":
        data = {"mp4_c": sources["fast.mp4"][:200], "text.": b"nothing\n", "rando": random.Random(2).randbytes(5000)}
        (folder / name).write_bytes(data.get(name[:5], bytes(5000)))
    (folder / "codec_unknown.mp4").write_bytes(sources["fast.mp4"].replace(b"avc1", b"zzzz"))
    (folder / "codec_unknown.mkv").write_bytes(sources["h264.mkv"].replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XXX"))
    (folder / "half_zeros.mp4").write_bytes(middle(sources["fast.mp4"], len(sources["fast.mp4"]) // 2, bytes))
    for ending in "mp4", "mkv":
        with_a_size_change(folder / f"size_change_{ending}.{ending}")
    with_a_size_change(folder / "size_change_webm.webm", "libvpx")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / ".hidden.mp4").write_bytes(sources["mpeg4.mp4"])
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/junk.mp4").write_bytes(sources["mpeg4.mp4"])
    (folder / "._appledouble.mp4").write_bytes(b"\0\5\x16\7" + bytes(100))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != "__MACOSX")
