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

from common.calibration import softmax

import aiohttp
import av
import numpy as np
import pytest
from PIL import Image

import browser
import live
from conftest import REPO
from drawn.scene import frames_of
from drawn_exercises import CLASSES, draw, write_exercises, write_onnx
from see import classifier
from torchvision_patches.clip import first_clip, resized_and_cropped

pytestmark = pytest.mark.slow

SCRIPT = REPO / "tools/live.py"
SAMPLE = ["jumping_jacks", "squats", "toe_touch", "standing_kicks", "pushups", "leg_lifts"]
CHECKPOINT = Path(os.environ.get("SAMPLE_CHECKPOINT", REPO / "sample/training/checkpoint.pth"))
needs_chromium = pytest.mark.skipif(not browser.find_chromium(), reason="no Chromium here: apt install chromium")
GREY = "rgb(85, 96, 110)"  # of what is not sure
FAKE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


def start(folder, *arguments, **environment):
    """Start live.py in `folder`; returns (process, the address that it prints)."""
    command = [sys.executable, SCRIPT, "--port", "0", "--open-browser", "false", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)
    printed = ""
    for line in process.stdout:
        printed += line
        if found := re.search(r"open (http://\S+:\d+/\S+/) ", line):
            return process, found[1]
    raise AssertionError(f"live.py ended with code {process.wait()}:\n{printed}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder that it runs in) of a live.py with the tiny network."""
    folder = tmp_path_factory.mktemp("live")
    process, address = start(folder, "--checkpoint", write_onnx(folder / "tiny.onnx"))
    yield address, folder
    process.send_signal(2)
    assert process.wait(20) == 130, "Ctrl-C does not end it well"


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
    network = classifier.load(folder / "tiny.onnx")
    expected = network.logits(resized_and_cropped(clip, network.description)[None])
    np.testing.assert_allclose(answer["logits"], expected[0], atol=1e-4)
    assert answer["five"][0][0] == "squats" and answer["strip"].startswith("data:image/jpeg;base64,")


def test_below_the_threshold_the_label_is_not_sure(tmp_path):
    """After the temperature, of the steadied probabilities; the bars keep their classes."""
    write_onnx(tmp_path / "plain.onnx")
    network = classifier.load(tmp_path / "plain.onnx")
    clip = np.stack([live.model_view(frame, network.description) for frame in draw("squats", [7, 80], 16, 4)], axis=1)
    plain = live.answer_to(network, clip[None])
    assert plain["label"] == plain["five"][0][0] == "squats", "without a threshold each clip has a label"
    top = softmax(np.array(plain["logits"]) / 3).max()
    for threshold, label in ((top - 0.01, "squats"), (top + 0.01, "not sure")):
        write_onnx(tmp_path / "tiny.onnx", temperature=3.0, threshold=float(threshold))
        network = classifier.load(tmp_path / "tiny.onnx")
        ring = live.Ring(network.description)
        answer = live.answer_to(network, clip[None], ring, seconds=1.0)
        assert answer["label"] == label
        assert answer["five"][0] == ("squats", pytest.approx(top, abs=1e-5)), "not after the temperature"


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
    network = classifier.load(folder / "tiny.onnx")
    clip = first_clip(str(path), network.description)
    assert clip.num_frames == 20 and clip.fps == 4 and clip.frame_indices == list(range(16))
    recorded = network.logits(clip.pixels[None])[0]
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
        assert process.wait(20) == 130
    finally:
        process.kill()
    (path,) = (tmp_path / "recordings").glob("*.mp4")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 1


# on PYTHONPATH: presses Ctrl-C when the thread of the page has begun and its start is not over
PRESSES = """
import signal, threading

start = threading.Thread.start

def pressed(thread):
    start(thread)
    if getattr(thread, "_target", None) and thread._target.__qualname__ == "main.<locals>.run":
        signal.raise_signal(signal.SIGINT)

threading.Thread.start = pressed
"""


def test_ctrl_c_while_the_page_is_opened_ends_it(run_script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PRESSES)
    arguments = ("--checkpoint", write_onnx(tmp_path / "tiny.onnx"), "--port", 0, "--open-browser", "false")
    error = run_script(SCRIPT, *arguments, code=130, timeout=60, PYTHONPATH=tmp_path).stderr
    assert error.endswith("interrupted; start it again for a new address\n") and "Traceback" not in error, error


def test_wrong_usage(server, run_script, tmp_path):
    address, folder = server
    port = re.search(r":(\d+)/", address)[1]
    arguments = ("--checkpoint", folder / "tiny.onnx", "--open-browser", "false")
    for flags, words in (
        (("--port", port), f"port {port} of 127.0.0.1 cannot be had (Address already in use); --port 0"),
        (("--port", 0, "--host", "203.0.113.9"), "(Cannot assign requested address); --host takes an address of this"),
        (("--port", 0, "--host", "name.invalid"), "port 0 of name.invalid cannot be had"),
        (("--port", 65536), "--port 0 to 65535"),
        (("--host", ""), "--host takes an address of this machine"),
    ):
        said = run_script(SCRIPT, *arguments, *flags, code=2).stderr
        assert words in said and "Traceback" not in said, said
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


def wait_for(page, name, words):
    """Wait until the element of this id has these words in its text."""
    try:
        page.locator(f"#{name}", has_text=words).wait_for(state="attached")
    except Exception as e:
        raise AssertionError(f"{words!r} does not come; the page says:\n{page.inner_text('body')}") from e


def wait_until(page, expression, seconds=60):
    """Wait until an expression of JavaScript is true; Playwright's own way is what the page's policy forbids."""
    for _ in range(10 * seconds):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not true after {seconds} s: {expression}")


@needs_chromium
def test_from_the_camera_to_the_label(server, tmp_path):
    """The label is the drawn one, and the frames that Record keeps give predict.py the same label and logits."""
    address, folder = server
    camera = write_camera(tmp_path / "camera.y4m", draw("squats", [7, 82], 200, 20), 20)
    with browser.open_page(address, *FAKE, camera) as page:
        page.evaluate("""(() => {  // keeps the answers, which the page shows in part only
            const show = showLabel;
            window.answers = [];
            showLabel = (answer) => { window.answers.push(answer); show(answer); };
        })()""")
        page.click("#camera")
        wait_for(page, "state", "Collecting frames")
        assert page.is_disabled("#camera"), "it could be started twice"
        page.click("#record")
        wait_for(page, "label", "squats")
        wait_until(page, "window.answers.length >= 3")
        page.click("#record")
        wait_for(page, "message", "Recorded")
        path = folder / page.text_content("#message").removeprefix("Recorded ")
        shown = page.inner_text("body")
        assert re.search(r"\d\.\d s behind the picture; the network takes \d\.\d\d s\.", shown), shown
        assert re.search(r"squats\s+\d+\.\d %", shown) and re.search(r"squats \d+ s", shown), shown
        assert page.evaluate("document.getElementById('strip').naturalWidth") == 8 * 112
        check_layout(page)
        assert not page.problems
        page.click("#stop")
        assert page.is_enabled("#camera")
        answers = page.evaluate("window.answers.map((answer) => answer.logits)")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) >= 20
    network = classifier.load(folder / "tiny.onnx")
    views = [live.model_view(frame, network.description) for frame in frames]
    clips = [np.stack(views[i : i + 16], axis=1) for i in range(len(frames) - 15)]
    logits = [network.logits(clip[None])[0] for clip in clips]
    nearest = [min(np.abs(np.subtract(answer, row)).max() for row in logits) for answer in answers[1:3]]
    assert max(nearest) < 0.5, f"logits of the page are {nearest} from those of the recorded frames (H.264)"


def check_layout(page):
    """Nothing is wider than the page, at any width and in both colour schemes; text stands out from what is behind."""
    for width, scheme in ((1100, "light"), (1100, "dark"), (375, "light"), (320, "dark")):
        folder = os.environ.get("SCREENSHOTS")
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        if folder:
            page.screenshot(path=Path(folder, f"{width}-{scheme}.png"), full_page=True)
        wide = page.evaluate("""[...document.querySelectorAll('body *')].filter((element) =>
            element.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map((element) => element.outerHTML)""")
        assert not wide, f"wider than {width} px: {wide[:3]}"
        low = page.evaluate("""(() => {
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
    address, folder = server
    video = write_exercises(tmp_path / "pushups.webm", ["pushups"], seconds=8, seed=50, codec="libvpx")
    short = write_exercises(tmp_path / "short.webm", ["squats"], seconds=2, seed=51, codec="libvpx")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with browser.open_page(address) as page:  # no camera at all
        page.click("#camera")
        wait_for(page, "message", "No camera was found")
        for error, words in (("NotAllowedError", "was refused"), ("NotReadableError", "in use by another program"),
                             ("OddError", "cannot be used: why")):  # fmt: skip
            page.evaluate(f"""(() => {{ navigator.mediaDevices.getUserMedia =
                () => Promise.reject(new DOMException('why', '{error}')); }})()""")
            page.click("#camera")
            wait_for(page, "message", words)
        page.set_input_files("#file", tmp_path / "broken.mp4")
        wait_for(page, "message", "cannot play broken.mp4")
        page.set_input_files("#file", video)
        wait_for(page, "label", "pushups")
        assert page.is_hidden("#message")
        page.evaluate("(() => { const show = showLabel; showLabel = (a) => { window.answer = a; show(a); }; })()")
        page.set_input_files("#file", short)  # shorter than a clip: as predict.py samples it
        wait_for(page, "state", "Of the whole file")
        logits = page.evaluate("window.answer.logits")
        page.evaluate("showLabel({ ...window.answer, label: 'not sure' })")
        assert page.text_content("#label") == "not sure"
        wait_for(page, "legend", "not sure 1 s")
        assert page.evaluate("getComputedStyle(document.querySelector('#legend .unsure')).backgroundColor") == GREY
    network = classifier.load(folder / "tiny.onnx")
    expected = network.logits(first_clip(str(short), network.description).pixels[None])[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@needs_chromium
def test_keyboard_and_the_end_of_the_program(tmp_path):
    process, address = start(tmp_path, "--checkpoint", write_onnx(tmp_path / "tiny.onnx"))
    camera = write_camera(tmp_path / "camera.y4m", draw("squats", [7, 82], 40, 20), 20)
    try:
        with browser.open_page(address, *FAKE, camera) as page:
            wait_for(page, "model", "3 classes, 16 frames at 4 fps")
            order = []
            for _ in range(2):
                page.keyboard.press("Tab")
                order.append(page.evaluate("document.activeElement.id"))
            assert order == ["camera", "choose"], "Stop and Record wait for a picture"
            assert page.evaluate("document.activeElement.matches(':focus-visible')")
            page.focus("#camera")
            page.keyboard.press("Enter")
            wait_for(page, "state", "Collecting frames")
            assert page.is_enabled("#stop")
            process.send_signal(2)
            wait_for(page, "message", "live.py has ended")
        assert process.wait(20) == 130
    finally:
        process.kill()


@needs_chromium
@pytest.mark.skipif(not CHECKPOINT.exists(), reason="no checkpoint of the sample: python3 tools/quickstart.py")
def test_the_sample_model_names_what_the_camera_shows(tmp_path):
    """At least 5 of the sample's 6 exercises, drawn with people and rooms that training has not seen."""
    process, address = start(tmp_path, "--checkpoint", CHECKPOINT)
    seen = {}
    try:
        for name in SAMPLE:
            frames = list(frames_of(name, [1234, SAMPLE.index(name)], 120, 20))
            camera = write_camera(tmp_path / "camera.y4m", frames, 20)
            with browser.open_page(address, *FAKE, camera) as page:
                page.click("#camera")
                wait_until(page, "document.getElementById('label').textContent.length > 1", 120)
                seen[name] = page.text_content("#label")
                check_layout(page)
    finally:
        process.kill()
    assert sum(name == label for name, label in seen.items()) >= 5, f"drawn and shown: {seen}"


# --- another address --------------------------------------------------------------------------------------------------


def test_a_host_of_the_network_says_what_it_opens(tmp_path):
    process, address = start(tmp_path, "--checkpoint", write_onnx(tmp_path / "tiny.onnx"), "--host", "0.0.0.0")
    port, token = re.search(r":(\d+)/(\S+)/", address).groups()

    async def run():
        async with aiohttp.ClientSession() as session:
            for host, status in ("192.168.1.9", 200), (socket.gethostname(), 200), ("evil.example", 403):
                async with session.get(f"{address}info", headers={"Host": f"{host}:{port}"}) as answer:
                    assert answer.status == status, host
            async with session.get(f"http://127.0.0.1:{port}/wrong/info") as answer:
                assert answer.status == 403, "the token is not needed"

    try:
        asyncio.run(run())
    finally:
        process.send_signal(2)
    rest = process.stdout.read()  # not communicate: what was read ahead of the address is in the file object
    assert process.wait(20) == 130
    assert f"http://{socket.gethostname()}:{port}/{token}/" in rest and "gives such a page no camera" in rest, rest


@needs_chromium
@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 in this Python: use another one")
def test_an_ipv6_address_and_a_camera_of_the_machine_on_the_page(tmp_path):
    """The page's policy lets it reach its own address, whatever that is written like."""
    network = write_onnx(tmp_path / "tiny.onnx")
    video = write_exercises(tmp_path / "a:b.mp4", ["pushups"], seconds=8, seed=50)
    process, address = start(tmp_path, "--checkpoint", network, "--host", "::1", "--camera", video)
    assert address.startswith("http://[::1]:")
    try:
        with browser.open_page(address) as page:
            wait_for(page, "label", "pushups")
            assert page.evaluate("document.getElementById('picture').naturalWidth") == 340
            assert not page.problems
            wait_for(page, "message", "a:b.mp4 has ended; it is tried again")
    finally:
        process.kill()
