"""live.py's own cameras: of the machine, of the network, files; what is odd about them, lost ones, who sees what."""

import asyncio
import contextlib
import errno
import itertools
import json
import os
import queue
import socket
import threading
import types

import aiohttp
import av
import numpy as np
import pytest

from drawn_exercises import draw, without_torch, write_exercises, write_onnx, write_tone
from network_cameras import HIDDEN, RATE, HttpCamera, RtspCamera
from page import camera as camera_room
from page.camera import CameraThread, printable_address
from test_live import start, with_client
from torchvision_patches.clip import first_clip, of_network, resized_and_cropped

FRAMES = draw("squats", [7, 80], 40, RATE)
DESCRIPTION = of_network()  # 4 frames per second


@contextlib.contextmanager
def read(address, description=DESCRIPTION):
    """Read a camera; yields a function that gives the next ("put", seconds, pixels) or ("tell", trouble)."""
    came = queue.Queue()
    put, tell = (lambda *given, what=what: came.put((what, *given)) for what in ("put", "tell"))
    thread = CameraThread(address, description, put, tell)
    thread.start()
    try:
        yield lambda: came.get(timeout=60)
    finally:
        thread.stop()


def next_of(come, what):
    """What is next said, or put, whatever comes in between."""
    while (given := come())[0] != what:
        pass
    return given[1:]


def start_without_torch(folder, camera):
    """Start live.py as on a board; returns what `start` does."""
    network = write_onnx(folder / "tiny.onnx", clip=DESCRIPTION.as_dict())
    return start(folder, "--checkpoint", network, "--camera", camera, **without_torch(folder))


@pytest.fixture
def patient(monkeypatch):
    """The limits of camera.py, short enough for a test."""
    monkeypatch.setattr(camera_room, "LONGEST_WAIT", 1)
    monkeypatch.setattr(camera_room, "PAUSE", 0.1)


@pytest.mark.parametrize("kind", [HttpCamera, RtspCamera])
def test_a_network_camera_that_goes_and_comes_back(tmp_path, kind):
    """Its frames become labels, without torch; cut, it is said and tried again; name and password are nowhere."""
    said = []
    with kind(FRAMES) as camera:
        process, address = start_without_torch(tmp_path, camera.address())

        async def use(client):
            async def until(key, wanted):
                while True:
                    message = await client.socket.receive(timeout=60)
                    assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
                    said.append("a picture" if message.type == aiohttp.WSMsgType.BINARY else message.data[:2000])
                    if message.type == aiohttp.WSMsgType.TEXT and wanted(json.loads(message.data).get(key)):
                        return json.loads(message.data)[key]

            assert (await until("five", bool))[0][0] == "squats"
            assert "a picture" in said
            await asyncio.to_thread(camera.stop)
            assert f"{kind.scheme}://127.0.0.1:{camera.port} " in await until("camera_trouble", bool)
            await asyncio.to_thread(camera.start)
            await until("camera_trouble", lambda trouble: trouble == "")
            assert (await until("five", bool))[0][0] == "squats"
            async with aiohttp.ClientSession() as session, session.get(f"{address}info") as answer:
                said.append(await answer.text())

        try:
            with_client(address, use)
            process.send_signal(2)
            printed = process.stdout.read()
            assert process.wait(20) == 130
        finally:
            process.kill()
    assert "is tried again" in printed and "is there again" in printed, printed
    assert not [word for word in HIDDEN if word in printed + "".join(said)]


@pytest.mark.parametrize("kind", [HttpCamera, RtspCamera])
def test_a_wrong_password_is_said_and_not_shown(tmp_path, kind):
    """Also not by FFmpeg itself, nor in a traceback: PyAV's errors repeat the address and have no common base."""
    with kind(FRAMES) as camera:
        url = camera.address("coach:s3cret")
        process, _ = start_without_torch(tmp_path, url)
        said = process.stdout.readline()
        process.send_signal(2)
        said += process.stdout.read()
        assert process.wait(20) == 130
    assert "401 Unauthorized" in said and "is tried again" in said and "Traceback" not in said, said
    assert not [word for word in HIDDEN if word in said]


@pytest.mark.parametrize("kind", [HttpCamera, RtspCamera])
def test_a_camera_that_stalls_is_left_and_comes_back(patient, kind):
    """One frame and then nothing, on a connection that stays open: the limit ends it, and the next one is taken."""
    silent = [1e6]
    camera = kind(FRAMES, wait=lambda i: silent.pop() if silent and i > 30 else 1 / RATE)
    with camera, read(camera.address()) as come:
        assert come() == ("tell", "")
        assert "gives no picture; it is tried again" in next_of(come, "tell")[0]
        assert next_of(come, "tell") == ("",)


class Driver:
    """A driver that hangs at its first picture until it is woken, and lets nobody else in meanwhile."""

    def __init__(self):
        self.in_use, self.woken, self.number = False, threading.Event(), itertools.count()

    def open(self, address):
        if self.in_use:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self.in_use = True
        return self, False

    def decoded(self, container, stream):
        if next(self.number) == 0:
            self.woken.wait(60)
        while True:
            yield av.VideoFrame(32, 32, "rgb24")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.in_use = False


def test_a_driver_that_hangs_is_left_and_closed_when_it_wakes(patient, monkeypatch):
    """PyAV's limit does not reach into a driver."""
    driver = Driver()
    monkeypatch.setattr(camera_room, "open_camera", driver.open)
    monkeypatch.setattr(camera_room, "moving_pictures", lambda container: ["stream"])
    monkeypatch.setattr(camera_room, "frames_that_decode", driver.decoded)
    with read("0") as come:
        assert come() == ("tell", "0 gives no picture; it is tried again every 0.1 s")
        assert come() == ("tell", "0 cannot be read (Device or resource busy); it is tried again every 0.1 s")
        driver.woken.set()
        assert next_of(come, "put")


# --- when a frame is of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "slots"), [
    ([0, 0.01, 0.24, 0.26, 0.5, 0.51], [0, 1, 2]),  # the first frame of each
    ([i / 120 for i in range(121)], [0, 1, 2, 3, 4]),
    ([0, 1, 2], [0, 0, 0, 0, 4, 4, 4, 4, 8]),  # 1 frame a second, repeated as by the frame rule
    ([0, 0.4, 0.8, 1.2], [0, 1, 1, 3, 4]),  # 2.5
    ([0, 0.49, 0.5, 0.99], [0, 1, 2, 3]),  # they may come late
    ([0, 2, 4.5, 4.75], [0] * 8 + [8, 18, 19]),  # a gap of more than two seconds stays one
])  # fmt: skip
def test_each_slot_of_the_model_has_the_frame_that_was_there(monkeypatch, times, slots):
    """Whatever times the camera itself gives: they may jump, stand still or be missing."""
    rows, clock = [], types.SimpleNamespace(now=0)
    first_in = {int(4 * seconds): i for i, seconds in reversed([*enumerate(times)])}
    monkeypatch.setattr(camera_room, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    thread = CameraThread("0", DESCRIPTION, lambda at, pixels: rows.append((4 * at, pixels[0, 0, 0])), print)

    def frames():
        for i, seconds in enumerate(times):
            clock.now = seconds
            frame = av.VideoFrame.from_ndarray(np.full((8, 8, 3), i, np.uint8), format="rgb24")
            frame.pts = [None, 10**9, 3][i % 3]
            yield frame

    thread.pass_on(frames(), threading.Event())
    assert [shade for _, shade in rows] == [first_in[slot] for slot in slots]
    put_at = [at for at, _ in rows]
    assert put_at == sorted(set(put_at)) and put_at[-1] == int(4 * times[-1]), "slots are whole and only grow"


@pytest.mark.parametrize(("times", "pauses"), [
    ([0, 0.1, 0.2], [0.1, 0.1]),
    ([36000, 36000.1, 36000.2], [0.1, 0.1]),  # of a clock
    ([5, 5.1, 0, 0.1, 500, 500.1], [0.1] * 5),  # jumps
    ([None, None, None], [0.1, 0.1]),
    ([0, 1, 2], [1, 1]),
])  # fmt: skip
def test_a_file_is_played_at_its_own_pace(monkeypatch, times, pauses):
    waited, clock = [], types.SimpleNamespace(now=0)
    monkeypatch.setattr(camera_room, "time", types.SimpleNamespace(monotonic=lambda: clock.now))

    def wait(seconds):
        waited.append(seconds)
        clock.now += seconds

    frames = [types.SimpleNamespace(time=seconds) for seconds in times]
    stream = types.SimpleNamespace(average_rate=10, guessed_rate=None)
    assert list(camera_room.at_own_pace(iter(frames), stream, wait)) == frames
    np.testing.assert_allclose(waited[1:], pauses)


# --- what is given as a camera ----------------------------------------------------------------------------------------


def test_odd_cameras_are_said_in_one_sentence(patient, tmp_path):
    """And tried again: what is missing may be plugged in."""
    (tmp_path / "text").write_text("no video")
    (tmp_path / "folder").mkdir()
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        write_tone(container, container.add_stream("pcm_s16le", rate=8000, layout="mono"), 1)
    odd = {
        "/dev/video9": "No such file or directory",
        "/dev/null": "Inappropriate ioctl for device",
        str(tmp_path / "none.mp4"): "No such file or directory",
        str(tmp_path / "folder"): "it is a folder, not a file",
        str(tmp_path / "text"): "Invalid data found when processing input",
        str(sound): "gives no picture",
        "udp://10.0.0.9:1234": "rtsp or http",
        "http://127.0.0.1:9/": "Connection refused",
        "rtsp://[::1": "rtsp://[::1 cannot be read",
    }
    for address, words in odd.items():
        with read(address) as come:
            what, trouble = come()
            assert what == "tell" and words in trouble and trouble.endswith("; it is tried again every 0.1 s"), trouble
            assert come() == (what, trouble), "once is not again"


def test_a_camera_that_may_not_be_opened(patient, monkeypatch):
    """As root, which runs these tests in a container, everything may be opened."""

    def refuse(*_, **__):
        raise av.error.PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/dev/video0")

    monkeypatch.setattr(camera_room.av, "open", refuse)
    with read("0") as come:
        assert "0 cannot be read (Permission denied)" in come()[1]


def test_a_page_in_place_of_a_stream_and_pictures_of_other_sizes(patient):
    class Page(HttpCamera):
        async def talk(self, reader, writer):
            self.answer(writer, await self.request(reader, writer), body="<html><title>Camera</title></html>")
            await writer.drain()

    with Page(FRAMES) as camera, read(camera.address()) as come:
        assert "Invalid data found" in come()[1]
    with HttpCamera([FRAMES[0], FRAMES[0][:64, :48]]) as camera, read(camera.address()) as come:
        sizes = {next_of(come, "put")[1].shape for _ in range(12)}
    assert sizes == {FRAMES[0].shape, (64, 48, 3)}


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 in this Python: use another one")
def test_a_camera_with_an_ipv6_address(patient):
    for kind in (HttpCamera, RtspCamera):
        with kind(FRAMES, host="::1") as camera, read(camera.address()) as come:
            assert next_of(come, "put")[1].shape == FRAMES[0].shape
            camera.stop()
            assert next_of(come, "tell")[0].startswith(f"{kind.scheme}://[::1]:{camera.port} ")


def test_a_file_is_turned_as_the_model_was_trained(patient, tmp_path):
    video = write_exercises(tmp_path / "a:b.mp4", ["pushups"], seconds=2, rotation=90)
    for rotate in (False, True):
        with read(str(video), DESCRIPTION._replace(rotate=rotate)) as come:
            seen = next_of(come, "put")[1]
        expected = first_clip(str(video), DESCRIPTION._replace(rotate=rotate, clip_len=1)).pixels
        assert seen.shape[0] > seen.shape[1] if rotate else seen.shape[0] < seen.shape[1]
        np.testing.assert_allclose(resized_and_cropped(seen[None], DESCRIPTION), expected, atol=0.02)


@pytest.mark.parametrize(("address", "shown"), [
    ("rtsp://me:pa@ss@cam.local:554/live?user=me&password=x", "rtsp://cam.local:554"),
    ("rtsp://10.0.0.2:554/user=me&password=x&channel=1", "rtsp://10.0.0.2:554"),  # as some cameras want it
    ("rtsp://me:p/a?s#s@cam.local/live", "rtsp://…"),  # "me:p" would be the host
    ("rtsp://me:p@a/s@cam.local/live", "rtsp://…"),
    ("RTSP://me:x@[fd00::2]:554/live", "RTSP://[fd00::2]:554"),
    ("rtsp://[me:x@", "rtsp://"),
    ("http://10.0.0.2/video", "http://10.0.0.2"),
    ("0", "0"),
    ("/dev/video0", "/dev/video0"),
])  # fmt: skip
def test_addresses_are_shown_without_what_gives_access(address, shown):
    assert printable_address(address) == shown
