"""What live.py --camera holds over a long time: an RTSP camera on loopback that is cut for 3 s once a minute.

    $ python tests/benchmarks/bench_camera.py --minutes 10

Each minute prints the resident memory, open files and threads of live.py, which runs without torch, and the labels that
an open page has had.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tools"), str(REPO / "tests")]

import aiohttp

from drawn_exercises import draw, without_torch, write_onnx
from network_cameras import RATE, RtspCamera
from test_live import start
from torchvision_patches.clip import of_network


async def count_labels(address, labels):
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}frames", max_msg_size=0) as page:
        async for message in page:
            if message.type == aiohttp.WSMsgType.TEXT and "five" in json.loads(message.data):
                labels.append(message)


def held_by(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "Threads"))
    return f"{memory / 1024:.0f} MiB, {len(os.listdir(f'/proc/{pid}/fd'))} files, {threads} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=10)
    minutes, labels = parser.parse_args().minutes, []
    with RtspCamera(draw("squats", [7, 80], 120, RATE)) as camera, tempfile.TemporaryDirectory() as folder:
        network = write_onnx(Path(folder, "tiny.onnx"), clip=of_network().as_dict())
        flags = ("--checkpoint", network, "--camera", camera.address())
        process, address = start(folder, *flags, **without_torch(folder))
        threading.Thread(target=lambda: asyncio.run(count_labels(address, labels)), daemon=True).start()
        try:
            for minute in range(minutes):
                time.sleep(57)
                print(f"minute {minute + 1}: {held_by(process.pid)}, {len(labels)} labels", flush=True)
                camera.stop()
                time.sleep(3)
                camera.start()
        finally:
            process.kill()


if __name__ == "__main__":
    main()
