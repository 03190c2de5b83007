"""run_inference.py at QEVD's 11,452 validation clips in chunks of 538: memory, temporary space, requests, seconds.

Neither memory nor temporary space may grow with the number of clips. A clip is 24,576 bytes as it is sent, before
compression. What comes on top at the end of a run is HDF5's own cache while OUTPUT_H5 is written, some 20 MB.
Reads nothing; makes random clips of 8 frames of 16 x 16 and a small model, and runs them on a local hub, all in a
temporary folder. Prints a table and, as its last line, one JSON object.

$ python tests/benchmarks/bench_inference_memory.py
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO / "tools"), str(REPO / "tests")]

from faulty_hub import FaultyHub
from small_models import compile_binary, read_h5, write_clips

NUM_CLIPS, CHUNK = (538, 11_452), 538
# runs the script and prints the most memory it held, in MB (ru_maxrss counts KB on Linux)
RUN_AND_MEASURE = """
import resource, subprocess, sys
rc = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(rc, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


class LargestUpload(threading.Thread):
    """Looks every 5 ms how many bytes lie in the .h5 files under some folders; `bytes` is the most it saw."""

    def __init__(self, *folders):
        super().__init__(daemon=True)
        self.folders, self.bytes, self.running = folders, 0, True

    def run(self):
        while self.running:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                paths = [path for folder in self.folders for path in folder.rglob("*")]
                sizes = [path.stat().st_size for path in paths if path.suffix in (".h5", ".part")]
                self.bytes = max(self.bytes, sum(sizes))
            time.sleep(0.005)


def measure(folder, number, hub):
    """(most memory in MB, most KB of uploads on disk here and at the hub, requests, seconds) of one run."""
    clips, output = folder / f"clips_{number}", folder / f"{number}.h5"
    paths = write_clips(clips, number)
    script = [sys.executable, str(REPO / "tools/run_inference.py"), "--dlc-path", str(folder / "model.bin")]
    script += ["--data-path", str(clips), "--output-h5", str(output), "--max-chunk", str(CHUNK)]
    temporary = folder / f"tmp_{number}"
    temporary.mkdir()
    environment = os.environ | {"QAIHUB_CLIENT_INI": str(folder / "client.ini"), "TMPDIR": str(temporary)}
    uploads = LargestUpload(temporary, Path(f"{output}.state"), hub.folder)
    hub.requests.clear()
    uploads.start()
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN_AND_MEASURE, *script]
    measured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    uploads.running, seconds = False, time.perf_counter() - start
    rc, memory = map(float, measured.stdout.split())
    assert rc == 0, f"run_inference.py ended with exit code {rc:.0f}:\n{measured.stderr}"
    assert len(set(paths)) == number and read_h5(output)[1] == paths
    return memory, uploads.bytes / 1024, len(hub.requests), seconds


def main():
    with tempfile.TemporaryDirectory() as folder, FaultyHub(keep_data=False) as hub:
        folder = Path(folder)
        hub.write_client_ini(folder / "client.ini")
        compile_binary(hub, folder / "model.bin", channel_last=True)
        runs = {number: measure(folder, number, hub) for number in NUM_CLIPS}
    for number, (memory, kilobytes, requests, seconds) in runs.items():
        print(f"{number:>6,} clips  {memory:6.0f} MB of memory  {kilobytes:8,.0f} KB of datasets on disk  "
              f"{requests:5,} requests  {seconds:6.1f} s")  # fmt: skip
    names = ("mb", "kb", "requests", "seconds")
    print(json.dumps({str(number): dict(zip(names, map(round, figures))) for number, figures in runs.items()}))


if __name__ == "__main__":
    main()
