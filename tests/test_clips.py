"""torchvision_patches: which frames make a clip, how they are decoded, resized and indexed."""

import contextlib
import faulthandler
import hashlib
import inspect
import os
import pickle
import shutil
import signal
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.datasets import video_utils as upstream
from torchvision.datasets.samplers import RandomClipSampler, UniformClipSampler
from torchvision.transforms import functional as F

from make_videos import write_video
from torchvision_patches import decoding, video_index, video_utils
from torchvision_patches.clip import of_network
from torchvision_patches.frame_rule import sampled_frames
from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.spatial_numpy import resize_and_crop_array
from torchvision_patches.video_utils import UnreadableVideo, VideoClips, frame_times, index_videos, read_frames

pytestmark = pytest.mark.quick

# --- which frames ---------------------------------------------------------------------------------------------------


def literal_clips(n, fps, num_frames, rate, step=1):
    """The official rule of the challenge, word by word; indices as the original computes them, in float32."""
    if n == 0:
        return []
    total = n * rate / fps
    if total < num_frames:
        duration = n / fps
        total = num_frames
        rate = int(np.ceil(num_frames / duration))
    between = fps / rate
    if between == int(between):
        sampled = [i for i in range(n) if i % int(between) == 0]
    else:
        sampled = [int(np.float32(i) * np.float32(between)) for i in range(int(total))]
    return [sampled[start : start + num_frames] for start in range(0, len(sampled) - num_frames + 1, step)]


NAMED_CASES = [
    (0, 30, 16, 4), (1, 30, 16, 4), (3, 30, 16, 4), (15, 30, 16, 4), (16, 30, 16, 4), (17, 30, 16, 4),
    (120, 30, 16, 4), (119, 30, 16, 4), (96, 24, 16, 4), (100, 25, 16, 4), (60, 15, 16, 4), (240, 60, 16, 4),
    (120, 30000 / 1001, 16, 4), (50, 30, 16, 4), (103, 30, 16, 4), (150, 30, 8, 4), (64, 4, 16, 4), (40, 2, 16, 4),
]  # fmt: skip
rng = np.random.default_rng(0)
RANDOM_CASES = [
    (
        int(rng.integers(0, 400)),
        float(rng.choice([12, 15, 23.976, 24, 25, 29.97, 30000 / 1001, 30, 50, 60, rng.uniform(5, 120)])),
        int(rng.choice([1, 4, 8, 16, 32])),
        int(rng.choice([1, 2, 4, 5, 8, 15, 30])),
    )
    for _ in range(600)
]


@pytest.mark.parametrize("step", [1, 5])
def test_frame_indices_equal_the_literal_rule(step):
    for n, fps, num_frames, rate in NAMED_CASES + RANDOM_CASES:
        pts = torch.arange(n) * 512 + 77
        clips, indices = VideoClips.compute_clips_for_video(pts, num_frames, step, fps, rate)
        expected = literal_clips(n, fps, num_frames, rate, step)
        assert indices.tolist() == expected, f"n={n} fps={fps} T={num_frames} rate={rate} step={step}"
        assert torch.equal(clips, pts[indices]), f"n={n} fps={fps}: times do not belong to the indices"
        assert n == 0 or len(expected) >= 1, f"n={n} fps={fps} T={num_frames}: a video with frames gives no clip"


def test_the_examples_of_the_docstring_and_the_readme():
    indices = VideoClips.compute_clips_for_video(torch.arange(150), 16, 1, 30.0, 4)[1]
    assert len(indices) == 5 and indices[0, :4].tolist() == [0, 7, 15, 22] and indices[-1, -1] == 142
    indices = VideoClips.compute_clips_for_video(torch.arange(75), 16, 1, 30.0, 4)[1]
    assert indices.tolist() == [[0, 4, 8, 12, 17, 21, 25, 30, 34, 38, 42, 47, 51, 55, 60, 64]]


def test_without_a_frame_rate_frames_are_taken_as_they_come():
    indices = VideoClips.compute_clips_for_video(torch.arange(20), 16, 2, 30.0, None)[1]
    assert indices.tolist() == [list(range(0, 16)), list(range(2, 18)), list(range(4, 20))]


# --- decoding: every odd file, frame by frame against a full decode ---------------------------------------------------


def write_h264(path, **kwargs):
    return write_video(path, 75, options={"bf": "3", "g": "25"} | kwargs.pop("options", {}), **kwargs)


def write_gap_under_even_decoding_times(path):
    """B-frames, decoding times evenly spaced, but one presentation time is left out: the header's index misleads."""
    plain = write_h264(path.with_suffix(".plain.mp4"))
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        frame = None
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                frame = frame or packet.duration
                packet.pts += frame * 2 if packet.pts >= 20 * frame else 0
                packet.stream = stream
                target.mux(packet)
    plain.unlink()
    return path


def write_cut(path):
    """Cut off the first 1.2 s without re-encoding: an edit list hides the frames between the keyframe and the cut."""
    plain = write_h264(path.with_suffix(".plain.mp4"), options={"g": "15", "bf": "2"})
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        cut = round(1.2 / source.streams.video[0].time_base)
        source.seek(cut, stream=source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.pts, packet.dts = packet.pts - cut, packet.dts - cut
                packet.stream = stream
                target.mux(packet)
    plain.unlink()
    return path


def write_without_start(path, dropped=5, **how):
    """A file cut out of a longer one: its first packets are missing, down to the `dropped`-th or to a keyframe."""
    plain = write_video(path.with_suffix(".plain.mkv"), 60, **how)
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        if dropped == "to a keyframe":
            dropped = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[dropped:]:
            packet.stream = stream
            target.mux(packet)
    plain.unlink()
    return path


def write_bad_comment(path):
    """A metadata comment that is no UTF-8."""
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = "COMMENT"
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"COMMENT", b"\xff\xfe\xe9OMM\xff"))
    return path


OPEN_GOP = {"x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0:bframes=3"}
RADL = {"x265-params": "log-level=none:open-gop=0:keyint=20:min-keyint=20:scenecut=0:bframes=3:radl=2"}
ODD_FILES = {
    "b_frames.mp4": write_h264,
    "faststart.mp4": lambda p: write_h264(p, container_options={"movflags": "faststart"}),
    "fragmented.mp4": lambda p: write_h264(p, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "open_gop.mp4": lambda p: write_h264(p, options={"x264-params": "open-gop=1:keyint=20:bframes=3"}),
    "intra_refresh.mp4": lambda p: write_h264(p, options={"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "no_b_frames.mp4": lambda p: write_h264(p, options={"bf": "0"}),
    "all_keyframes.mp4": lambda p: write_h264(p, options={"g": "1"}),
    "variable_frame_rate.mp4": lambda p: write_h264(p, pts=[i + i // 7 * 3 for i in range(75)]),
    "variable_no_b_frames.mp4": lambda p: write_h264(p, pts=[i + i // 7 * 3 for i in range(75)], options={"bf": "0"}),
    "first_pts_not_0.mp4": lambda p: write_h264(p, pts=range(50, 125)),
    "29.97.mp4": lambda p: write_h264(p, fps=Fraction(30000, 1001)),
    "3_frames.mp4": lambda p: write_video(p, 3),
    "1_frame.mp4": lambda p: write_video(p, 1),
    "gap.mp4": write_gap_under_even_decoding_times,
    "cut.mp4": write_cut,
    "bad_comment.mp4": write_bad_comment,
    "odd_size.mp4": lambda p: write_video(p, 40, height=51, width=33, pix_fmt="yuv444p"),
    "b_frames.mov": write_h264,
    "b_frames.mkv": write_h264,
    "b_frames.ts": write_h264,
    "h264_b_frames.avi": write_h264,
    "mpeg4.avi": lambda p: write_video(p, 75, codec="mpeg4"),
    "mpeg4_b_frames.avi": lambda p: write_video(p, 75, codec="mpeg4", options={"bf": "2"}),
    "mjpeg.avi": lambda p: write_video(p, 40, codec="mjpeg", pix_fmt="yuvj420p"),
    "hevc_10_bit.mp4": lambda p: write_video(
        p, 75, codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=none:bframes=3:keyint=25"}
    ),
    "av1.mp4": lambda p: write_video(p, 40, codec="libsvtav1", options={"preset": "12"}),
    "vp9.webm": lambda p: write_video(p, 40, codec="libvpx-vp9", options={"cpu-used": "8"}),
    "h264_raw.h264": write_h264,
    "starts_mid_gop.mp4": lambda p: write_without_start(p, options={"bf": "3", "g": "30"}),
    "starts_mid_gop.mkv": lambda p: write_without_start(p, options={"bf": "3", "g": "30"}),
    "starts_mid_gop.avi": lambda p: write_without_start(p, codec="mpeg4", options={"g": "30"}),
    "starts_mid_open_gop.mkv": lambda p: write_without_start(p, "to a keyframe", options=OPEN_GOP),
    "hevc_leading_frames_decode.mkv": lambda p: write_without_start(p, "to a keyframe", codec="libx265", options=RADL),
    "time_base_of_1_frame.mp4": lambda p: write_h264(p, container_options={"video_track_timescale": "30"}),
}


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    os.environ["SVT_LOG"] = "0"
    folder = tmp_path_factory.mktemp("odd")
    return {name: write(folder / name) for name, write in ODD_FILES.items()}


def decode_all(path):
    """Every frame of a video, in order: uint8 (n, H, W, 3), converted by PyAV from planes that carry no tags."""
    pictures = []
    with av.open(str(path), metadata_errors="ignore") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            bare = av.VideoFrame(frame.width, frame.height, frame.format.name)
            for plane, content in zip(bare.planes, frame.planes):
                rows = np.frombuffer(content, np.uint8).reshape(plane.height, -1)[:, : plane.line_size]
                np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : rows.shape[1]] = rows
            pictures.append(bare.to_ndarray(format="rgb24"))
    return np.stack(pictures)


@pytest.mark.parametrize("name", ODD_FILES)
def test_clips_equal_a_full_decode_bit_for_bit(odd_files, name):
    frames = decode_all(odd_files[name])
    times, fps = frame_times(odd_files[name])
    assert len(times) == len(frames), f"{name}: indexed {len(times)} frames, {len(frames)} decode"
    for num_frames, rate in ((16, 4), (8, 10), (4, 30)):
        clips = VideoClips([str(odd_files[name])], num_frames, 1, rate)
        assert len(clips) == len(literal_clips(len(frames), fps, num_frames, rate)) >= 1
        for i in {0, len(clips) // 3, len(clips) - 1}:
            video, audio, _, video_idx = clips.get_clip(i)
            expected = frames[clips.resampling_idxs[0][i]]
            wrong = [k for k in range(num_frames) if not np.array_equal(video[k].numpy(), expected[k])]
            assert not wrong, f"{name}: clip {i} of {num_frames} frames at {rate} fps differs at positions {wrong}"
            assert video.dtype == torch.uint8 and audio.numel() == 0 and video_idx == 0


@pytest.mark.parametrize("name", [name for name in ODD_FILES if name != "gap.mp4"])
def test_times_from_the_header_equal_those_of_the_packets(odd_files, name):
    from_header, from_packets = (frame_times(odd_files[name], header=header) for header in (True, False))
    assert np.array_equal(from_header[0], from_packets[0]) and from_header[1] == from_packets[1], name


def test_the_header_alone_is_read_where_it_suffices(odd_files, monkeypatch):
    def no_packets(*_):
        raise AssertionError("packets were read")

    monkeypatch.setattr(decoding, "times_from_packets", no_packets)
    for name in ("b_frames.mp4", "faststart.mp4", "first_pts_not_0.mp4", "29.97.mp4", "variable_no_b_frames.mp4"):
        frame_times(odd_files[name])
    for name in ("variable_frame_rate.mp4", "fragmented.mp4", "cut.mp4", "b_frames.mkv"):
        with pytest.raises(UnreadableVideo, match="packets were read"):
            frame_times(odd_files[name])


@pytest.mark.parametrize("name", ["size_change.mkv", "size_change.mp4"])
def test_a_frame_size_that_changes_is_refused_where_it_changes(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as target:  # the packets of two files in one track
        stream = None
        for k, size in enumerate((48, 96)):
            part = write_video(tmp_path / f"{size}.h264", 30, height=size, width=size, options={"bf": "0"})
            with av.open(str(part)) as source:
                stream = stream or target.add_stream_from_template(source.streams.video[0])
                for i, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
                    packet.stream, packet.time_base = stream, Fraction(1, 30)
                    packet.pts = packet.dts = 30 * k + i
                    packet.duration = 1
                    target.mux(packet)
    pts, _ = frame_times(path)
    assert len(pts) == 60
    assert read_frames(path, pts[:30:2], range(0, 30, 2)).shape == (15, 48, 48, 3)
    with pytest.raises(UnreadableVideo, match=f"{name}: its frame size changes from 48 x 48 to 96 x 96"):
        read_frames(path, pts[::4], range(0, 60, 4))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_told_and_applied_only_on_demand(tmp_path, degrees):
    path = write_video(tmp_path / "phone.mp4", 40, height=48, width=64)
    plain = VideoClips([str(path)], 16, 1, 4).get_clip(0)[0].numpy()
    # the track's matrix: 16.16 fixed point, the third of each row 2.30 (ISO/IEC 14496-12, 8.3.2)
    turned = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrices = [
        b"".join((n << 16).to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0)) + b"\x40\0\0\0"
        for a, b, c, d in ((1, 0, 0, 1), turned)
    ]
    header = path.read_bytes().partition(b"tkhd")
    path.write_bytes(header[0] + header[1] + header[2].replace(*matrices, 1))

    clips = VideoClips([str(path)], 16, 1, 4)
    pts, _ = frame_times(path)
    assert decoding.frames_and_rotation(path, pts[8:9], [8])[1] == degrees
    assert np.array_equal(clips.get_clip(0)[0].numpy(), plain), "the official preprocessing does not turn frames"
    clips.rotate = True
    upright = clips.subset([0]).get_clip(0)[0].numpy()
    assert np.array_equal(upright, np.rot90(plain, -degrees // 90, axes=(1, 2))), "not turned clockwise"


def test_a_read_that_stalls_is_given_up_and_named(tmp_path, monkeypatch):
    """As from a network drive that does not answer; a read that takes long, but goes on, is waited for."""
    path = write_video(tmp_path / "x.mp4", 60)
    pts, _ = frame_times(path)
    monkeypatch.setattr(decoding, "STALLED", 0.4)
    seconds = 0.1

    def slowly(pixels):
        time.sleep(seconds)
        return pixels

    assert len(read_frames(path, pts[:16], range(16), slowly)) == 16
    seconds = 60
    with pytest.raises(UnreadableVideo, match="x.mp4: for 0.4 s nothing came of reading it"):
        read_frames(path, pts[:16], range(16), slowly)


def test_a_late_clip_starts_at_its_keyframe(tmp_path):
    """The first half of the file is destroyed, and clips of the second half still decode."""
    path = write_video(tmp_path / "long.mp4", 240, options={"g": "30", "bf": "2"})
    frames, clips = decode_all(path), VideoClips([str(path)], 8, 1, 8)
    data = bytearray(path.read_bytes())
    data[300 : len(data) // 3] = bytes(len(data) // 3 - 300)
    path.write_bytes(data)
    assert np.array_equal(clips.get_clip(len(clips) - 1)[0].numpy(), frames[clips.resampling_idxs[0][-1]])
    with pytest.raises(UnreadableVideo):
        clips.get_clip(0)


def test_a_file_whose_keyframes_are_not_marked_is_read_from_its_start(tmp_path):
    """As one changed bit in its header's list of them does it: FFmpeg cannot seek, though every frame decodes."""
    path = write_video(tmp_path / "x.mp4", 30)
    data = bytearray(path.read_bytes())
    listed = data.index(b"stss") + 12  # behind the version and the number of keyframes
    assert data[listed : listed + 4] == (1).to_bytes(4, "big")
    data[listed] = 1
    path.write_bytes(data)
    pts, _ = frame_times(path)
    every = read_frames(path, pts, range(30))
    for number in 0, 7, 29:
        assert np.array_equal(read_frames(path, pts[number : number + 1], [number])[0], every[number]), number


@pytest.mark.parametrize("damage", ["zeros", "noise", "cut", "gone", "not a video"])
def test_damage_inside_a_clip_names_the_file(tmp_path, damage):
    path = write_video(tmp_path / "x.mp4", 120, container_options={"movflags": "faststart"})
    clips = VideoClips([str(path)], 16, 1, 4)
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, len(data) // 10
    if damage == "zeros":
        data[middle : middle + length] = bytes(length)
    elif damage == "noise":
        data[middle : middle + length] = np.random.default_rng(0).bytes(length)
    elif damage == "cut":
        del data[middle:]
    elif damage == "not a video":
        data = b"<html>404</html>"
    path.unlink() if damage == "gone" else path.write_bytes(data)
    with pytest.raises(UnreadableVideo, match="x.mp4"):
        clips.get_clip(0)


def test_tchw_and_bounds(odd_files):
    clips = VideoClips([str(odd_files["b_frames.mp4"])], 16, 1, 4, output_format="TCHW")
    assert clips.get_clip(0)[0].shape == (16, 3, 96, 128)
    with pytest.raises(IndexError):
        clips.get_clip(len(clips))


# --- colours ---------------------------------------------------------------------------------------------------------


def patches(size=64, seed=0):
    """Y, Cb and Cr of 16 patches of 16 x 16 equal pixels, so that no interpolation shows; the upper four are gray."""
    levels = np.random.default_rng(seed).integers((40, 90, 90), (210, 166, 166), (4, 4, 3), dtype=np.uint8)
    levels[0, :, 1:] = 128
    return levels.repeat(size // 4, 0).repeat(size // 4, 1).transpose(2, 0, 1)


def by_bt601(yuv, full_range=False):
    """uint8 (3, H, W) -> RGB as float (H, W, 3), by the formula of ITU-R BT.601."""
    y, cb, cr = yuv.astype(float)
    y, scale = (y, 1) if full_range else ((y - 16) * 255 / 219, 255 / 224)
    cb, cr = (cb - 128) * scale, (cr - 128) * scale
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)


def write_planes(path, yuv, codec="libx264", pix_fmt="yuv420p", options=None, **tags):
    """Eight frames whose planes are exactly `yuv`, uint8 (3, H, W); tags are numbered as in FFmpeg's pixfmt.h."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"qp": "0"} | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *yuv.shape[1:], pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        across, down = "444" not in pix_fmt, "420" in pix_fmt
        planes = [yuv[0], *(chroma[:: 1 + down, :: 1 + across] for chroma in yuv[1:])]
        for number in range(8):
            frame = av.VideoFrame(yuv.shape[2], yuv.shape[1], pix_fmt)
            for plane, content in zip(frame.planes, planes):
                content = content.astype(np.uint16) * 4 if "10" in pix_fmt else content
                np.frombuffer(plane, content.dtype).reshape(plane.height, -1)[:, : content.shape[1]] = content
            frame.pts = number
            for name in tags.keys() & {"colorspace", "color_range"}:
                setattr(frame, name, tags[name])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


INTERLACED = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
TAGS = {
    "BT.709": dict(colorspace=1, color_trc=1, color_primaries=1, color_range=1),
    "BT.601": dict(colorspace=6, color_trc=6, color_primaries=6),
    "FCC": dict(colorspace=4),
    "SMPTE 240M": dict(colorspace=7),
    "BT.2020 HLG": dict(colorspace=9, color_trc=18, color_primaries=9),
    "a matrix without a converter": dict(colorspace=10),
    "logarithmic": dict(colorspace=1, color_trc=9, color_primaries=1),
    "linear, other primaries": dict(color_trc=8, color_primaries=10),
    "interlaced": dict(options=INTERLACED),
    "interlaced BT.709": dict(options=INTERLACED, colorspace=1),
}


def rgb_of(path):
    """Frame 5 of a video, int64 (H, W, 3)."""
    pts, _ = frame_times(path)
    return read_frames(path, pts[5:6], [5])[0].astype(int)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_colours_are_those_of_the_planes_whatever_the_tags(tmp_path, pix_fmt):
    """By the BT.601 matrix, as the organisers' PyAV 16 converts; a full range is honoured."""
    yuv = patches()
    plain = rgb_of(write_planes(tmp_path / "plain.mp4", yuv, pix_fmt=pix_fmt))
    expected = by_bt601(yuv, full_range="j" in pix_fmt)
    off = (plain - expected)[8::16, 8::16]  # in the middle of each patch
    # where chroma is subsampled, libswscale rounds down three products: up to 3 too dark, without colour up to 1
    assert off.max() <= 1 and off.min() > (-1 if pix_fmt == "yuv444p" else -3), f"{pix_fmt}: not as BT.601 says: {off}"
    assert off[0].min() > (-2 if "10" in pix_fmt else -1), f"{pix_fmt}: gray is not as BT.601 says: {off[0]}"
    others = dict(TAGS, YCgCo=dict(colorspace=8)) if pix_fmt == "yuv444p" else TAGS
    for name, tags in others.items():
        tagged = rgb_of(write_planes(tmp_path / f"{name}.mp4", yuv, pix_fmt=pix_fmt, **tags))
        assert np.array_equal(tagged, plain), f"{pix_fmt} tagged {name}: up to {np.abs(tagged - plain).max()} away"


# --- spatial ----------------------------------------------------------------------------------------------------------


def test_spatial_values_equal_torchvisions_float_pipeline():
    generator = torch.Generator().manual_seed(0)
    sizes = (128, 171), (112, 112)
    assert (of_network().resize_size, of_network().crop_size) == sizes
    for height, width in ((720, 1280), (256, 340), (128, 171), (127, 171), (64, 48), (3, 1), (1, 1), (1280, 720)):
        clip = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
        resized = F.resize(F.convert_image_dtype(clip.permute(0, 3, 1, 2), torch.float32), [128, 171], antialias=False)
        expected = F.center_crop(resized, [112, 112]).permute(1, 0, 2, 3)
        assert torch.allclose(resize_and_crop(clip, *sizes), expected, atol=1e-5), f"{height} x {width}, centre"
        for top, left in ((0, 0), (16, 59), (5, 31)):
            cropped = resized[:, :, top : top + 112, left : left + 112].permute(1, 0, 2, 3)
            result = resize_and_crop(clip, *sizes, top, left)
            assert torch.allclose(result, cropped, atol=1e-5), f"{height} x {width} at {top}, {left}"
            assert result.is_contiguous()
    with pytest.raises(ValueError, match="does not lie inside"):
        resize_and_crop(clip, *sizes, 17, 0)


# --- the patch --------------------------------------------------------------------------------------------------------

# sha256[:16] of the source of each function that is replaced, in torchvision 0.26.0
REPLACED = {
    "_compute_frame_pts": "d53ea289ece56806",
    "compute_clips": "7b4c64022e4a95ea",
    "compute_clips_for_video": "c6b7a8e260d2d4d8",
    "__getstate__": "dc26bc919cd0d3b8",
    "__setstate__": "d88bb6c8392feceb",
    "get_clip": "c47784feab61bed4",
}


@pytest.mark.parametrize("name", REPLACED)
def test_the_functions_that_the_patch_replaces_are_those_it_was_written_for(name):
    source = inspect.getsource(getattr(upstream.VideoClips, name))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == REPLACED[name], (
        f"torchvision's VideoClips.{name} has changed since 0.26.0. Nothing is broken yet: look at what "
        f"`python torchvision_patches/video_utils.py` prints, mend the override if need be, put the new hash here."
    )


def test_the_patch_prints_itself_as_diffs(run_script):
    printed = run_script("torchvision_patches/video_utils.py").stdout
    for name in video_utils.OVERRIDES:
        assert f"+++ ours: VideoClips.{name}" in printed
    assert "-        torchcodec = _get_torchcodec()" in printed


def test_subset_pickle_samplers_and_worker_processes(odd_files):
    paths = [str(odd_files[name]) for name in ("b_frames.mp4", "3_frames.mp4", "29.97.mp4")]
    clips = VideoClips(paths, 8, 1, 8, num_workers=2)
    assert isinstance(clips.subset([2, 0]), VideoClips) and clips.subset([2, 0]).video_paths == [paths[2], paths[0]]
    copy = pickle.loads(pickle.dumps(clips))
    assert len(copy) == len(clips) and torch.equal(copy.get_clip(1)[0], clips.get_clip(1)[0])
    assert len(RandomClipSampler(clips, 1)) == 3
    order = list(UniformClipSampler(clips, 2))
    loader = torch.utils.data.DataLoader(ClipDataset(clips), sampler=order, num_workers=2, batch_size=None)
    for i, video in zip(order, loader, strict=True):
        assert torch.equal(video, clips.get_clip(i)[0]), f"clip {i} from a worker process differs"


class ClipDataset(torch.utils.data.Dataset):
    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, i):
        return self.clips.get_clip(i)[0]


# --- the index --------------------------------------------------------------------------------------------------------


def write_broken_files(folder):
    """One file of each kind that is no readable video: {name: file}, and one healthy video, `good.mp4`."""
    good = write_video(folder / "good.mp4", 60, container_options={"movflags": "faststart"}).read_bytes()
    moov_last = write_video(folder / "moov_last.tmp.mp4", 60).read_bytes()
    (folder / "moov_last.tmp.mp4").unlink()
    contents = {
        "empty.mp4": b"",
        "html.mp4": b"<!DOCTYPE html><html>not found</html>" * 20,
        "text.mp4": b"nothing to see here\n",
        "no_moov.mp4": moov_last[: len(moov_last) // 2],
        "header_only.mp4": good[:24],
        "cut_in_moov.mp4": good[:200],
        "zeros.mp4": bytes(5000),
        "random.mp4": np.random.default_rng(0).bytes(5000),
        "jpeg.mp4": b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(500),
        "zip.mp4": b"PK\x03\x04" + bytes(100),
        "broken_moov.mp4": good[:60] + bytes(500) + good[560:],
        "no_codec.mp4": good.replace(b"avc1", b"zzzz"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with av.open(str(folder / "audio_only.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    return {path.name: path for path in sorted(folder.glob("*.mp4"))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_each_named_once_and_stop_nothing(tmp_path, capsys, num_workers):
    files = write_broken_files(tmp_path)
    assert len(files) == 16
    index = index_videos([str(path) for path in files.values()], num_workers, progress=False)
    printed = capsys.readouterr().out
    for name, path in files.items():
        assert printed.count(f"no clip from {path}: ") == (name != "good.mp4"), f"{name}: {printed}"
    assert all(index["unreadable"][str(path)] for name, path in files.items() if name != "good.mp4")
    clips = VideoClips(index["video_paths"], 16, 1, 4, _precomputed_metadata=index)
    assert len(clips) == 1 and clips.get_clip(0)[0].shape == (16, 96, 128, 3)
    assert len(clips.unreadable) == 15 and len(pickle.loads(pickle.dumps(clips))) == 1


def test_a_path_with_a_colon_is_a_file(tmp_path, monkeypatch):
    """FFmpeg would take the part before the colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my:set", "http:", "concat:x", "file:y"):
        os.mkdir(folder)
        video = f"{folder}/a:1.mp4"
        write_video(tmp_path / video, 20, height=32, width=32)
        clips = VideoClips([video], 16, 1, 4)
        assert len(clips) == 1 and not clips.unreadable and clips.get_clip(0)[0].shape == (16, 32, 32, 3), folder


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_only_regular_files_are_videos(tmp_path, kind):
    """None of them is opened: reading a FIFO would wait for ever, /dev/zero never ends."""
    path = tmp_path / "x.mp4"
    with contextlib.ExitStack() as stack:
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        else:
            path.symlink_to("/dev/zero" if kind == "device" else tmp_path)
        with pytest.raises(UnreadableVideo, match=f"x.mp4: it is a {kind}, not a file"):
            frame_times(path)


def test_a_playlist_reaches_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        playlists = {"hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n"}
        playlists["concat"] = f"ffconcat version 1.0\nfile {url}\n"
        for name, text in playlists.items():
            path = tmp_path / f"{name}.mp4"
            path.write_text(text)
            with pytest.raises(UnreadableVideo, match=f"{name}.mp4: "):
                frame_times(path)
        with pytest.raises(TimeoutError):
            server.accept()


def facts_or_trouble(path):
    """`facts_of` where some videos are the end of their reader."""
    name = Path(path).stem
    if name == "hangs":
        time.sleep(600)
    if name in ("crashes", "out_of_memory"):
        faulthandler.disable()  # pytest's, which would print where all threads are
        os.kill(os.getpid(), signal.SIGSEGV if name == "crashes" else signal.SIGKILL)
    return decoding.facts_of(path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_the_end_of_a_reader_is_named_and_left_out(tmp_path, monkeypatch, capsys, num_workers):
    monkeypatch.setattr(video_index, "facts_of", facts_or_trouble)
    monkeypatch.setattr(video_index, "TIME_LIMIT", 1)
    monkeypatch.setattr(video_index, "CHUNK_LIMIT", 1)
    names = ["hangs", "crashes", "out_of_memory"] if num_workers else ["hangs"]
    good = write_video(tmp_path / "good.mp4", 20, height=32, width=32)
    for name in names + [f"good{i}" for i in range(40)]:
        os.link(good, tmp_path / f"{name}.mp4")
    paths = sorted(str(path) for path in tmp_path.glob("*.mp4"))
    index = index_videos(paths, num_workers, progress=False)
    reasons = {Path(path).stem: reason for path, reason in index["unreadable"].items()}
    assert "1 s" in reasons.pop("hangs")
    if num_workers:
        assert reasons.pop("crashes") == "its decoder crashed (exit code -11)"
        assert "(exit code -9: killed, as the system does" in reasons.pop("out_of_memory")
    assert not reasons and [len(pts) for pts in index["video_pts"]].count(20) == 41
    assert capsys.readouterr().out.count("no clip from") == len(names)


@pytest.fixture
def dataset(tmp_path):
    for k, name in enumerate(("train/a/1.mp4", "train/a/2.mp4", "val/a/1.mp4")):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, 20 + 5 * k, seed=k, height=32, width=32)
    return tmp_path / "root"


def index_of(root, cache_file, split="train"):
    paths = sorted(str(path) for path in (root / split).rglob("*.mp4"))
    index = index_videos(paths, cache_file=cache_file, root=root, progress=False)
    return [len(pts) for pts in index["video_pts"]]


@pytest.fixture
def reads(monkeypatch):
    """The names of the files whose times are read, in order."""
    names = []
    read = video_index.facts_of

    def counted(path):
        names.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(video_index, "facts_of", counted)
    return names


def test_the_index_is_read_again_only_for_what_changed(dataset, tmp_path, reads):
    cache = tmp_path / "index.npz"
    assert index_of(dataset, cache) == [20, 25] and reads == ["1.mp4", "2.mp4"]
    assert index_of(dataset, cache) == [20, 25] and len(reads) == 2, "an unchanged dataset was read again"

    write_video(dataset / "train/a/2.mp4", 33, height=32, width=32)
    assert index_of(dataset, cache) == [20, 33] and reads[2:] == ["2.mp4"], "only the changed file"
    os.utime(dataset / "train/a/1.mp4", ns=(0, 5))
    index_of(dataset, cache)
    assert reads[3:] == ["1.mp4"], "only the file with another mtime"
    write_video(dataset / "train/a/3.mp4", 12, height=32, width=32)
    assert index_of(dataset, cache) == [20, 33, 12] and reads[4:] == ["3.mp4"], "only the new file"
    (dataset / "train/a/1.mp4").unlink()
    assert index_of(dataset, cache) == [33, 12] and len(reads) == 5

    moved = dataset.rename(tmp_path / "moved")
    assert index_of(moved, cache) == [33, 12] and len(reads) == 5, "moving the dataset read it again"


def test_one_split_never_serves_another(dataset, tmp_path, reads):
    """Same class, same name, same size and mtime: still the other split's file is read."""
    twin = dataset / "val/a/2.mp4"
    shutil.copy2(dataset / "train/a/2.mp4", twin)
    cache = tmp_path / "index.npz"
    index_of(dataset, cache)
    before = len(reads)
    assert index_of(dataset, cache, "val") == [30, 25] and reads[before:] == ["1.mp4", "2.mp4"]


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other version", "pickle"])
def test_a_damaged_index_is_built_anew(dataset, tmp_path, capsys, damage, monkeypatch):
    cache = tmp_path / "index.npz"
    if damage == "other version":
        monkeypatch.setattr(video_index, "INDEX_VERSION", 1)
    index_of(dataset, cache)
    monkeypatch.setattr(video_index, "INDEX_VERSION", 2)
    content = cache.read_bytes()
    if damage == "pickle":
        np.savez(cache, version=2, names=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage != "other version":
        cache.write_bytes({"empty": b"", "cut": content[:-90], "noise": b"x" * 500}[damage])
    assert index_of(dataset, cache) == [20, 25]
    assert "is built anew" in capsys.readouterr().out
    assert index_of(dataset, cache) == [20, 25] and "anew" not in capsys.readouterr().out


def test_several_processes_build_one_index(dataset, tmp_path):
    # not multiprocessing.Pool: it ends its processes by a signal, and once waited for one for ever
    with ProcessPoolExecutor(4) as pool:
        results = list(pool.map(index_of, [dataset] * 8, [tmp_path / "index.npz"] * 8))
    assert results == [[20, 25]] * 8
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["index.npz"], "a temporary file is left"


def io_error(path):
    raise UnreadableVideo(path, "Input/output error")


def test_unreadable_videos_are_tried_again(dataset, tmp_path, capsys, reads, monkeypatch):
    """What failed may have been the disk: the file's size and mtime would not tell that it is back."""
    cache = tmp_path / "index.npz"
    with monkeypatch.context() as disk:
        disk.setattr(video_index, "facts_of", io_error)
        assert index_of(dataset, cache) == [0, 0] and "1.mp4: " in capsys.readouterr().out
    assert index_of(dataset, cache) == [20, 25] and reads == ["1.mp4", "2.mp4"]
    assert "no clip from" not in capsys.readouterr().out


def test_a_truncated_file_has_the_frames_of_its_packets(tmp_path):
    """The header of a faststart file promises all frames, wherever the file ends."""
    path = write_video(tmp_path / "x.mp4", 150, options={"bf": "3"}, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    times, _ = frame_times(path)
    assert np.array_equal(times, frame_times(path, header=False)[0]) and 60 < len(times) < 150


def test_read_frames_refuses_what_an_old_index_promises(tmp_path):
    path = write_video(tmp_path / "x.mp4", 10)
    with pytest.raises(UnreadableVideo, match="x.mp4: it has 10 frames, and frame 40 is needed"):
        read_frames(path, [0, 512 * 40], [0, 40])


def test_a_board_without_torch_makes_the_same_clips():
    """Frame numbers equal, pixels equal bit for bit, for odd sizes, rates and lengths."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = tuple(int(size) for size in rng.integers(20, 200, 2))
        crop = tuple(int(rng.integers(4, size + 1)) for size in sizes)
        clip = rng.integers(0, 256, (2, *rng.integers(8, 300, 2), 3), dtype=np.uint8)
        expected = resize_and_crop(torch.from_numpy(clip), sizes, crop).numpy()
        np.testing.assert_array_equal(resize_and_crop_array(clip, sizes, crop), expected)
        length, frames, fps = int(rng.integers(1, 500)), 8, float(rng.uniform(5, 60))
        rate = float(rng.choice([2.5, 4, 8]))
        _, numbers = VideoClips.compute_clips_for_video(torch.arange(length), frames, 1, fps, rate)
        sampled = sampled_frames(length, frames, fps, rate)
        every = np.lib.stride_tricks.sliding_window_view(sampled, frames)
        np.testing.assert_array_equal(every, numbers.numpy())
