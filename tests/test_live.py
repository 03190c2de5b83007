"""live.py: what comes over the connection, who gets in, and the page itself in a real headless Chromium."""

import asyncio
import csv
import io
import itertools
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import aiohttp
import av
import numpy as np
import pytest
from PIL import Image

import browser
import predict
from conftest import REPO
from drawn.scene import frames_of
from drawn_exercises import CLASSES, draw, write_exercises, write_onnx
from see import classifier

pytestmark = pytest.mark.slow

SCRIPT = REPO / "tools/live.py"
SAMPLE = ["jumping_jacks", "squats", "toe_touch", "standing_kicks", "pushups", "leg_lifts"]
CHECKPOINT = Path(os.environ.get("SAMPLE_CHECKPOINT", REPO / "sample/training/checkpoint.pth"))
needs_chromium = pytest.mark.skipif(not browser.find_chromium(), reason="no Chromium here: apt install chromium")
FAKE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


def start(folder, *arguments):
    """Start live.py in `folder`; returns (process, the address that it prints)."""
    command = [sys.executable, SCRIPT, "--port", "0", "--open-browser", "false", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = ""
    for line in process.stdout:
        printed += line
        if found := re.search(r"open (http://127.0.0.1:\d+/\S+/) ", line):
            return process, found[1]
    raise AssertionError(f"live.py ended with code {process.wait()}:\n{printed}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder that it runs in) of a live.py with the tiny network."""
    folder = tmp_path_factory.mktemp("live")
    process, address = start(folder, "--checkpoint", write_onnx(folder / "tiny.onnx"))
    yield address, folder
    process.send_signal(2)
    assert process.wait(20) == 0, "Ctrl-C does not end it well"


def jpeg(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=92)
    return content.getvalue()


class Client:
    """What the page does, without a browser."""

    def __init__(self, socket):
        self.socket = socket

    async def put(self, seconds, content):
        await self.socket.send_bytes(struct.pack(">d", seconds) + content)

    async def play(self, frames):
        """Send frames again and again, at the model's rate by their times but faster, until this is cancelled."""
        for i in itertools.count():
            await self.put(i / 4, frames[i % len(frames)])
            await asyncio.sleep(0.05)

    async def get(self, key):
        """The next message that has this key."""
        while True:
            message = await self.socket.receive_json(timeout=30)
            if key in message:
                return message


def with_client(address, use):
    """Run `await use(client)` with a Client that is connected to live.py."""

    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}frames", max_msg_size=0) as socket:
            return await use(Client(socket))

    return asyncio.run(run())


# --- the connection ---------------------------------------------------------------------------------------------------


def test_frames_become_the_label_of_a_clip_that_ends_now(server):
    """The newest 16 frames, decoded and cropped as training does, through the network."""
    import torch

    from torchvision_patches.spatial import resize_and_crop

    address, folder = server
    frames = [jpeg(frame) for frame in draw("squats", [7, 80], 24, 4)]

    async def use(client):
        playing = asyncio.create_task(client.play(frames))
        answers = [await client.get("five") for _ in range(2)]
        playing.cancel()
        return answers[-1]

    answer = with_client(address, use)
    last = round(answer["time"] * 4)
    newest = [frames[i % len(frames)] for i in range(last - 15, last + 1)]
    clip = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in newest])
    expected = classifier.load(folder / "tiny.onnx").logits(resize_and_crop(torch.from_numpy(clip))[None].numpy())
    np.testing.assert_allclose(answer["logits"], expected[0], atol=1e-4)
    assert answer["five"][0][0] == "squats" and answer["strip"].startswith("data:image/jpeg;base64,")


def test_gaps_begin_a_new_clip_and_what_is_no_frame_is_said(server):
    address, _ = server
    frame = jpeg(draw("squats", [7, 80], 1, 4)[0])

    async def use(client):
        filled = []
        for seconds in (0, 0.25, 0.5, 0.6, 3, 3.25, 1, 1.25):  # after 0.6 a gap, after 3.25 a jump back
            await client.put(seconds, frame)
            filled.append((await client.get("filled"))["filled"])
        assert filled == [1, 2, 3, 4, 1, 2, 1, 2]
        for content in (b"", b"no jpeg", frame[:300], jpeg(np.zeros((8, 5000, 3), np.uint8))):
            await client.put(2, content)
            assert "frame" in (await client.get("error"))["error"]
        await client.socket.send_bytes(b"123")
        assert "cannot be read" in (await client.get("error"))["error"]
        await client.put(1.5, frame)
        assert (await client.get("filled"))["filled"] == 3, "a bad frame is not the end"

    with_client(address, use)


def test_only_who_knows_the_token_gets_in_and_only_from_this_machine(server):
    address, _ = server
    port, token = re.search(r":(\d+)/(\S+)/", address).groups()
    base = f"http://127.0.0.1:{port}"

    async def run():
        async with aiohttp.ClientSession() as session:
            for path in ("", "x", "wrong/", "wrong/frames", f"{token}x/", f"wrong/{token}/"):
                async with session.get(f"{base}/{path}") as answer:
                    assert answer.status == 403 and "live.py printed" in await answer.text(), path
            for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"},
                            {"Origin": "null"}):  # fmt: skip
                for name in ("", "info", "frames"):
                    async with session.get(address + name, headers=headers) as answer:
                        assert answer.status == 403, (headers, name)
            for name in ("", "live.js", "style.css", "info"):
                async with session.get(address + name, headers={"Host": f"localhost:{port}"}) as answer:
                    assert answer.status == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
            for name in ("../live.py", "page", "..%2flive.py"):
                async with session.get(address + name) as answer:
                    assert answer.status in (403, 404), name

    asyncio.run(run())
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(OSError), socket.create_connection((own, int(port)), timeout=5):
            pass


def test_nothing_is_stored_before_record_and_then_what_was_classified(server):
    address, folder = server
    frames = [jpeg(frame) for frame in draw("pushups", [7, 81], 24, 4)]

    async def use(client):
        for i in range(4):
            await client.put(i / 4, frames[i])
            await client.get("filled")
        assert not (folder / "recordings").exists()
        await client.socket.send_json({"record": True})
        path = (await client.get("recording"))["recording"]
        for i in range(4, 24):
            await client.put(i / 4, frames[i])
            await asyncio.sleep(0.06)
        await client.socket.send_json({"record": False})
        assert (await client.get("recorded"))["recorded"] == path
        return folder / path

    path = with_client(address, use)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.with_suffix(".csv").name, path.name]
    clip = predict.read_clip(str(path), 16, 4)
    assert clip.num_frames == 20 and clip.fps == 4 and clip.frame_indices == list(range(16))
    recorded = classifier.load(folder / "tiny.onnx").logits(clip.pixels[None])[0]
    assert CLASSES[recorded.argmax()] == "pushups"
    with open(path.with_suffix(".csv"), newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"pushups"}


def test_a_recording_that_cannot_be_written_or_is_cut_off(server):
    address, folder = server
    frame, other = jpeg(draw("squats", [7, 80], 1, 4)[0]), jpeg(np.zeros((64, 48, 3), np.uint8))
    before = set(folder.rglob("*.mp4"))

    async def changes(client):
        await client.socket.send_json({"record": True})
        await client.put(0, frame)
        await client.put(0.25, other)
        assert "the size of the picture has changed" in (await client.get("error"))["error"]
        assert (await client.get("recorded"))["recorded"]

    async def leaves(client):
        await client.socket.send_json({"record": True})
        await client.put(0, frame)
        await client.get("filled")

    with_client(address, changes)
    with_client(address, leaves)  # the page is closed in the middle
    for _ in range(100):
        new = set(folder.rglob("*.mp4")) - before
        if len(new) == 2 and not any(path.name.startswith(".") for path in new):
            break
        asyncio.run(asyncio.sleep(0.1))
    assert len(new) == 2
    for path in new:
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 1


def test_the_end_of_the_program_closes_its_pages_and_finishes_their_recordings(tmp_path):
    process, address = start(tmp_path, "--checkpoint", write_onnx(tmp_path / "tiny.onnx"))

    async def use(client):
        await client.socket.send_json({"record": True})
        await client.put(0, jpeg(draw("squats", [7, 80], 1, 4)[0]))
        await client.get("filled")
        process.send_signal(2)
        while not client.socket.closed:
            await client.socket.receive(timeout=10)  # by itself it would wait for half a minute

    try:
        with_client(address, use)
        assert process.wait(20) == 0
    finally:
        process.kill()
    (path,) = (tmp_path / "recordings").glob("*.mp4")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 1


def test_wrong_usage(server, run_script, tmp_path):
    address, folder = server
    port = re.search(r":(\d+)/", address)[1]
    arguments = ("--checkpoint", folder / "tiny.onnx", "--open-browser", "false")
    assert f"port {port} of 127.0.0.1 cannot be had" in run_script(SCRIPT, *arguments, "--port", port, code=2).stderr
    assert "there is no absent.pth" in run_script(SCRIPT, "--checkpoint", "absent.pth", code=2).stderr


# --- the page, in a browser -------------------------------------------------------------------------------------------


def write_camera(path, frames, fps):
    """A file for Chromium's fake camera: YUV4MPEG2, played again and again."""
    height, width = frames[0].shape[:2]
    with open(path, "wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C420jpeg\n".encode())
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            file.write(b"FRAME\n" + frame.to_ndarray().tobytes())
    return f"--use-file-for-fake-video-capture={path}"


def click(name):
    return f"document.getElementById('{name}').click()"


def text(name):
    return f"document.getElementById('{name}').textContent"


@needs_chromium
def test_from_the_camera_to_the_label(server, tmp_path):
    """The label is the drawn one, and the frames that Record keeps give predict.py the same label and logits."""
    address, folder = server
    camera = write_camera(tmp_path / "camera.y4m", draw("squats", [7, 82], 200, 20), 20)

    async def run():
        async with browser.open_page(address, *FAKE, camera) as tab:
            await tab.evaluate("""(() => {  // keeps the answers, which the page shows in part only
                const show = showLabel;
                window.answers = [];
                showLabel = (answer) => { window.answers.push(answer); show(answer); };
            })()""")
            await tab.evaluate(click("camera"))
            await tab.wait(f"{text('state')}.includes('Collecting frames')")
            await tab.evaluate(click("record"))
            await tab.wait(f"{text('label')} === 'squats'")
            await tab.wait("window.answers.length >= 3")
            await tab.evaluate(click("record"))
            await tab.wait(f"{text('message')}.startsWith('Recorded')")
            path = folder / (await tab.evaluate(text("message"))).removeprefix("Recorded ")
            shown = await tab.evaluate("document.body.innerText")
            assert re.search(r"\d+ ms after its last frame, \d+ ms of them in the network", shown), shown
            assert re.search(r"squats\s+\d+\.\d %", shown) and re.search(r"squats \d+ s", shown), shown
            assert await tab.evaluate("document.getElementById('strip').naturalWidth") == 8 * 112
            await check_layout(tab)
            assert not await tab.problems()
            await tab.evaluate(click("stop"))
            return path, await tab.evaluate("window.answers.map((answer) => answer.logits)")

    path, answers = asyncio.run(run())
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) >= 20
    import torch

    from torchvision_patches.spatial import resize_and_crop

    network = classifier.load(folder / "tiny.onnx")
    clips = [np.stack(frames[i : i + 16]) for i in range(len(frames) - 15)]
    logits = [network.logits(resize_and_crop(torch.from_numpy(clip))[None].numpy())[0] for clip in clips]
    nearest = [min(np.abs(np.subtract(answer, row)).max() for row in logits) for answer in answers[1:3]]
    assert max(nearest) < 0.5, f"logits of the page are {nearest} from those of the recorded frames (H.264)"


async def check_layout(tab):
    """Nothing is wider than the page, at any width and in both colour schemes; text stands out from what is behind."""
    for width, scheme in ((1100, "light"), (1100, "dark"), (375, "light"), (320, "dark")):
        folder = os.environ.get("SCREENSHOTS")
        await tab.screenshot(Path(folder, f"{width}-{scheme}.png") if folder else os.devnull, width, scheme)
        wide = await tab.evaluate("""[...document.querySelectorAll('body *')].filter((element) =>
            element.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map((element) => element.outerHTML)""")
        assert not wide, f"wider than {width} px: {wide[:3]}"
        low = await tab.evaluate("""(() => {
            const light = (colour) => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
                    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const behind = (element) => {
                const colour = getComputedStyle(element).backgroundColor;
                return /, 0\\)$/.test(colour) && element.parentElement ? behind(element.parentElement) : colour;
            };
            return [...document.querySelectorAll('h1, h2, p, li, span.name, span.percent, button:enabled')]
                .filter((element) => element.innerText && element.offsetParent)
                .map((element) => {
                    const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
                    return [element.innerText, (pair[0] + 0.05) / (pair[1] + 0.05)];
                }).filter(([, contrast]) => contrast < 4.5);
        })()""")
        assert not low, f"contrast below 4.5 at {width} px, {scheme}: {low}"


@needs_chromium
def test_cameras_that_are_refused_missing_or_busy_and_files(server, tmp_path):
    address, _ = server
    video = write_exercises(tmp_path / "pushups.webm", ["pushups"], seconds=8, seed=50, codec="libvpx")
    (tmp_path / "broken.mp4").write_bytes(b"no video")

    async def run():
        async with browser.open_page(address) as tab:  # no camera at all
            await tab.evaluate(click("camera"))
            await tab.wait(f"{text('message')}.includes('No camera was found')")
            for error, words in (("NotAllowedError", "was refused"), ("NotReadableError", "in use by another program"),
                                 ("OddError", "cannot be used: why")):  # fmt: skip
                await tab.evaluate(f"""navigator.mediaDevices.getUserMedia =
                    () => Promise.reject(new DOMException('why', '{error}'))""")
                await tab.evaluate(click("camera"))
                await tab.wait(f"{text('message')}.includes('{words}')")
            for path in (tmp_path / "broken.mp4", video):
                root = (await tab.call("DOM.getDocument"))["root"]["nodeId"]
                node = (await tab.call("DOM.querySelector", nodeId=root, selector="#file"))["nodeId"]
                await tab.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)
                if path is not video:
                    await tab.wait(f"{text('message')}.includes('cannot play broken.mp4')")
            await tab.wait(f"{text('label')} === 'pushups'")
            assert await tab.evaluate("document.getElementById('message').hidden")

    asyncio.run(run())


@needs_chromium
def test_keyboard_and_the_end_of_the_program(tmp_path):
    process, address = start(tmp_path, "--checkpoint", write_onnx(tmp_path / "tiny.onnx"))

    async def press(tab, key, code):
        for kind in ("keyDown", "keyUp"):
            enter = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **enter)

    async def run():
        camera = write_camera(tmp_path / "camera.y4m", draw("squats", [7, 82], 40, 20), 20)
        async with browser.open_page(address, *FAKE, camera) as tab:
            await tab.wait(f"{text('model')}.includes('3 classes, 16 frames at 4 fps')")
            order = []
            for _ in range(2):
                await press(tab, "Tab", 9)
                order.append(await tab.evaluate("document.activeElement.id"))
            assert order == ["camera", "choose"], "Stop and Record wait for a picture"
            assert await tab.evaluate("document.activeElement.matches(':focus-visible')")
            await tab.evaluate("document.getElementById('camera').focus()")
            await press(tab, "Enter", 13)
            await tab.wait(f"{text('state')}.includes('Collecting frames')")
            assert not await tab.evaluate("document.getElementById('stop').disabled")
            process.send_signal(2)
            await tab.wait(f"{text('message')}.includes('live.py has ended')")

    try:
        asyncio.run(run())
        assert process.wait(20) == 0
    finally:
        process.kill()


@needs_chromium
@pytest.mark.skipif(not CHECKPOINT.exists(), reason="no checkpoint: run quickstart.py, or set SAMPLE_CHECKPOINT")
def test_the_sample_model_names_what_the_camera_shows(tmp_path):
    """At least 5 of the sample's 6 exercises, drawn with people and rooms that training has not seen."""
    process, address = start(tmp_path, "--checkpoint", CHECKPOINT)
    seen = {}

    async def run(name):
        frames = list(frames_of(name, [1234, SAMPLE.index(name)], 120, 20))
        camera = write_camera(tmp_path / "camera.y4m", frames, 20)
        async with browser.open_page(address, *FAKE, camera) as tab:
            await tab.evaluate(click("camera"))
            await tab.wait(f"{text('label')}.length > 1", 120)
            seen[name] = await tab.evaluate(text("label"))
            await check_layout(tab)

    try:
        for name in SAMPLE:
            asyncio.run(run(name))
    finally:
        process.kill()
    assert sum(name == label for name, label in seen.items()) >= 5, f"drawn and shown: {seen}"
