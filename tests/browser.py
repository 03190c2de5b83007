"""A real headless Chromium for the tests of the page, driven by the DevTools protocol (no driver program)."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# as root, in a container and without a network
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--window-size=1100,1000", "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip


def find_chromium():
    """The path of a Chromium: the environment variable CHROMIUM, or one on the path; None without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One open page: `evaluate` JavaScript in it, `wait` until an expression is true, take a `screenshot`."""

    def __init__(self, socket):
        self.socket, self.number, self.events = socket, 0, []

    async def call(self, method, **parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self.socket.receive(timeout=60)).data)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    async def evaluate(self, expression):
        """The value of a JavaScript expression, as JSON has it; promises are awaited."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    async def wait(self, expression, seconds=60):
        """Wait until an expression is true; returns its value. Fails with the page's text after `seconds`."""
        for _ in range(int(seconds / 0.1)):
            if value := await self.evaluate(expression):
                return value
            await asyncio.sleep(0.1)
        text = await self.evaluate("document.body.innerText")
        raise AssertionError(f"not true after {seconds} s: {expression}\nthe page says:\n{text}")

    async def screenshot(self, path, width=1100, scheme="light"):
        """Write a picture of the whole page at a width in pixels, in a colour scheme."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        await asyncio.sleep(0.3)
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    async def problems(self):
        """What the page has written to its console as errors, and exceptions nobody caught."""
        await self.evaluate("1")  # collects what has come
        return [event for event in self.events if event.get("method") == "Runtime.exceptionThrown"
                or event.get("params", {}).get("entry", {}).get("level") == "error"]  # fmt: skip


@contextlib.asynccontextmanager
async def open_page(address, *flags):
    """Start Chromium with `flags`, open a page in it; yields the Tab, and ends the browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find_chromium(), *FLAGS, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        with open(Path(profile, "log"), "wb") as log:
            process = subprocess.Popen([*command, "about:blank"], stdout=log, stderr=log)
        try:
            port = await devtools_port(Path(profile), process)
            # not by proxy: the browser is on this machine
            async with aiohttp.ClientSession(trust_env=False) as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    target = next(tab for tab in await answer.json() if tab["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.call(f"{domain}.enable")
                    await tab.call("Page.navigate", url=address)
                    await tab.wait("document.readyState === 'complete'")
                    yield tab
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


async def devtools_port(profile, process):
    """The port that the browser writes into its profile once it listens."""
    for _ in range(600):
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((profile / "DevToolsActivePort").read_text().splitlines()[0])
        assert process.poll() is None, (profile / "log").read_text(errors="replace")
        await asyncio.sleep(0.1)
    raise AssertionError("Chromium did not start within 60 s:\n" + (profile / "log").read_text(errors="replace"))
