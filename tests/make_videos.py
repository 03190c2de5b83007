"""Videos for tests and benchmarks, made on the spot: textured backgrounds, moving shapes, camera shake and noise."""

import os

import av
import numpy as np


def draw_frames(num_frames, height, width, seed=0):
    """Yield `num_frames` uint8 (height, width, 3) RGB frames that cost a codec about what filmed ones do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 200, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float32)
    texture = coarse.repeat(16, 0).repeat(16, 1)
    texture += rng.normal(0, 8, (*texture.shape[:2], 1))
    noise = rng.normal(0, 2.5, (height + 8, width + 8, 1))
    y, x = np.mgrid[:height, :width]
    for t in range(num_frames):
        top, left = rng.integers(0, 3, 2)  # camera shake
        frame = texture[top : top + height, left : left + width]
        frame = frame + noise[rng.integers(8) :, rng.integers(8) :][:height, :width]
        for k, radius in enumerate((0.1, 0.15, 0.2)):
            cy = height * (0.5 + 0.3 * np.sin(t / 7 + k + seed))
            cx = width * (0.5 + 0.35 * np.cos(t / 9 + 2 * k))
            frame[(y - cy) ** 2 + (x - cx) ** 2 < (radius * height) ** 2] = (250 - 60 * k, 40 + 80 * k, 90 * k)
        yield frame.clip(0, 255).astype(np.uint8)


def write_video(path, num_frames=60, fps=30, height=96, width=128, seed=0, codec="libx264", pix_fmt="yuv420p",
                options=None, pts=None, container_options=None, rotation=0):
    """Write `num_frames` drawn frames to `path` and return `path`.

    `pts` gives the presentation time of each frame in units of 1/fps s (default 0, 1, 2, …; skip some for a variable
    frame rate). `options` are the encoder's, say {"bf": "3", "g": "30"}; `container_options` the muxer's, say
    {"movflags": "faststart"}. `rotation`, degrees counter-clockwise, asks players to turn it (PyAV 18 and later).
    """
    linux = hasattr(os, "sched_getscheduler")
    policy = linux and (os.sched_getscheduler(0), os.sched_getparam(0))
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for i, array in enumerate(draw_frames(num_frames, height, width, seed)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = i if pts is None else pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # run by root, the AV1 encoder gives its caller real-time priority, and all that this starts would inherit it
    if linux:
        os.sched_setscheduler(0, *policy)
    return path


def write_still(path, num_frames=300, height=480, width=640):
    """A video of one still at 30 fps that takes long to decode and is soon written: the same packet over and over."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(next(draw_frames(1, height, width)), format="rgb24")
        frame = frame.reformat(format="yuv420p")
        frame.pts = 0
        (packet, *_) = stream.encode(frame) + stream.encode()
        for i in range(num_frames):
            again = av.Packet(bytes(packet))
            again.stream, again.time_base, again.pts, again.dts = stream, packet.time_base, i, i
            again.is_keyframe = True
            container.mux(again)
    return path
