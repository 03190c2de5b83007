"""Memory of run_inference.py: it must not grow with the number of clips, 2,000 against 50 in datasets of 20.

What comes on top at the end is HDF5's own cache while OUTPUT_H5 is written, some 20 MB for any number of clips.
Reads nothing; makes random clips of 8 frames of 16 x 16 and a small model, and runs them on a local hub, all in a
temporary folder. Prints a table and, as its last line, one JSON object.

$ python tests/benchmarks/bench_inference_memory.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO / "tools"), str(REPO / "tests")]

from small_models import compile_binary, read_h5, write_clips

from local_hub import LocalHub

NUM_CLIPS = (50, 2000)
# runs the script and prints the most memory it held, in MB (ru_maxrss counts KB on Linux)
RUN_AND_MEASURE = """
import resource, subprocess, sys
rc = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(rc, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def measure(folder, number):
    """(most memory in MB, seconds) of one run over `number` clips."""
    clips, output = folder / f"clips_{number}", folder / f"{number}.h5"
    paths = write_clips(clips, number)
    script = [sys.executable, str(REPO / "tools/run_inference.py"), "--dlc-path", str(folder / "model.bin")]
    script += ["--data-path", str(clips), "--output-h5", str(output), "--max-chunk", "20"]
    environment = os.environ | {"QAIHUB_CLIENT_INI": str(folder / "client.ini")}
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN_AND_MEASURE, *script]
    measured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rc, memory = map(float, measured.stdout.split())
    assert rc == 0, f"run_inference.py ended with exit code {rc:.0f}:\n{measured.stderr}"
    assert len(set(paths)) == number and read_h5(output)[1] == paths
    return memory, time.perf_counter() - start


def main():
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        folder = Path(folder)
        hub.write_client_ini(folder / "client.ini")
        compile_binary(hub, folder / "model.bin", channel_last=True)
        runs = {number: measure(folder, number) for number in NUM_CLIPS}
    for number, (memory, seconds) in runs.items():
        print(f"{number:>6,} clips  {memory:6.0f} MB at the peak  {seconds:6.1f} s")
    (few, _), (many, _) = runs.values()
    print(json.dumps({"mb_few": round(few), "mb_many": round(many), "ratio": round(many / few, 3)}))


if __name__ == "__main__":
    main()
