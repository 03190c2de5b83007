"""Memory and temporary files of run_inference.py: neither may grow with the number of clips, one chunk of 20 or 100.

A clip is 24,576 bytes as it is sent, before compression. What comes on top at the end of a run is HDF5's own cache
while OUTPUT_H5 is written, some 20 MB for any number of clips.
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

NUM_CLIPS, CHUNK = (20, 2000), 20
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
                paths = [path for folder in self.folders for path in folder.rglob("*.h5")]
                self.bytes = max(self.bytes, sum(path.stat().st_size for path in paths))
            time.sleep(0.005)


def measure(folder, number):
    """(most memory in MB, most KB of uploads on disk, seconds) of one run over `number` clips."""
    clips, output = folder / f"clips_{number}", folder / f"{number}.h5"
    paths = write_clips(clips, number)
    script = [sys.executable, str(REPO / "tools/run_inference.py"), "--dlc-path", str(folder / "model.bin")]
    script += ["--data-path", str(clips), "--output-h5", str(output), "--max-chunk", str(CHUNK)]
    temporary = folder / f"tmp_{number}"
    temporary.mkdir()
    environment = os.environ | {"QAIHUB_CLIENT_INI": str(folder / "client.ini"), "TMPDIR": str(temporary)}
    uploads = LargestUpload(temporary, Path(f"{output}.state"))
    uploads.start()
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN_AND_MEASURE, *script]
    measured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    uploads.running = False
    rc, memory = map(float, measured.stdout.split())
    assert rc == 0, f"run_inference.py ended with exit code {rc:.0f}:\n{measured.stderr}"
    assert len(set(paths)) == number and read_h5(output)[1] == paths
    return memory, uploads.bytes / 1024, time.perf_counter() - start


def main():
    with tempfile.TemporaryDirectory() as folder, FaultyHub(keep_data=False) as hub:
        folder = Path(folder)
        hub.write_client_ini(folder / "client.ini")
        compile_binary(hub, folder / "model.bin", channel_last=True)
        runs = {number: measure(folder, number) for number in NUM_CLIPS}
    for number, (memory, kilobytes, seconds) in runs.items():
        print(f"{number:>6,} clips  {memory:6.0f} MB of memory  {kilobytes:6.0f} KB of uploads  {seconds:6.1f} s")
    (few, few_kb, _), (many, many_kb, _) = runs.values()
    figures = {"mb_few": few, "mb_many": many, "kb_few": few_kb, "kb_many": many_kb}
    print(json.dumps({name: round(value) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
