"""How fast are frame times read, against opening the file and against listing all its packets?

Writes NUM_VIDEOS H.264 videos (B-frames, 640x360, 5 s) and one of 60 s to a temporary folder. Rounds in turn, one
process, medians; then index_videos in one and in two processes; then the memory of an index of 200,000 videos.
Prints a table, and as its last line one JSON object.

    $ python tests/benchmarks/bench_index.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

import av
import numpy as np
import torch

from make_videos import write_video
from torchvision_patches.decoding import frame_times, times_from_header
from torchvision_patches.video_index import Record, index_videos, load_index, save_index, stamp
from torchvision_patches.video_utils import VideoClips

# ----------------------------------------------------------------------------------------------------------------------
NUM_VIDEOS = 40  # different files; the parallel part links each COPIES times
COPIES = 25
ROUNDS = 9
DATASET = 200_000  # videos of the index whose memory is measured
# ----------------------------------------------------------------------------------------------------------------------


def open_only(path):
    with av.open(path) as container:
        return container.streams.video[0].average_rate


def list_packets(path):
    with av.open(path) as container:
        stream = container.streams.video[0]
        return sorted(p.pts for p in container.demux(stream) if p.size), float(stream.average_rate)


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


class CountedFile:
    """A file that counts the bytes read from it, as av.open takes one."""

    def __init__(self, path):
        self.file, self.bytes = open(path, "rb"), 0  # noqa: SIM115 (lives as long as the container)

    def read(self, size):
        data = self.file.read(size)
        self.bytes += len(data)
        return data

    def seek(self, *where):
        return self.file.seek(*where)

    def tell(self):
        return self.file.tell()


def share_of_bytes_read(path):
    """The share of a file that is read to learn its frame times from its header."""
    file = CountedFile(path)
    with av.open(file) as container:
        assert times_from_header(container, container.streams.video[0]) is not None
    return file.bytes / os.path.getsize(path)


def memory_of_dataset(folder, path):
    """Load an index of DATASET videos of 2 to 13 s and make VideoClips of it: (MiB at the peak, seconds, clips)."""
    rng = np.random.default_rng(0)
    tables = [np.arange(n, dtype=np.int64) * 512 for n in range(400)]
    lengths = rng.integers(60, 400, DATASET)
    records = {b"train/class/%08d.mp4" % i: Record(*stamp(path), 30.0, tables[n], "") for i, n in enumerate(lengths)}
    save_index(Path(folder, "large.npz"), records)
    code = f"import bench_index; bench_index.load_and_measure({str(Path(folder, 'large.npz'))!r})"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent))


def load_and_measure(cache_file):
    before = peak_memory()
    start = time.perf_counter()
    records = load_index(cache_file)
    tensors = {id(record.pts): torch.from_numpy(record.pts) for record in records.values()}
    metadata = {"video_paths": [os.fsdecode(name) for name in records]}
    metadata["video_pts"] = [tensors[id(record.pts)] for record in records.values()]
    metadata["video_fps"] = [record.fps for record in records.values()]
    clips = VideoClips(metadata["video_paths"], 16, 1, 4, _precomputed_metadata=metadata)
    print(json.dumps([peak_memory() - before, time.perf_counter() - start, len(clips)]))


def peak_memory():
    """The largest resident size this process has had, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main():
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{k}.mp4")) for k in range(NUM_VIDEOS)]
        for seed, path in enumerate(paths):
            write_video(path, 150, 30, 360, 640, seed, options={"bf": "3"})
        ways = {"open with PyAV": open_only, "list all packets": list_packets, "ours": frame_times}
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for path in paths:
                for name, way in ways.items():
                    times[name].append(timed(way, path))
        for path in paths:
            assert np.array_equal(frame_times(path)[0], list_packets(path)[0]), path
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        for name, ms in medians.items():
            print(f"{name:18s} {ms:6.2f} ms a file   {ms / medians['open with PyAV']:.2f} times opening")

        links = [f"{path[:-4]}-{copy}.mp4" for path in paths for copy in range(COPIES)]
        for link in links:
            os.link(link.rpartition("-")[0] + ".mp4", link)
        rates = {0: [], 2: []}
        for _ in range(5):
            for workers in rates:
                rates[workers].append(len(links) / timed(lambda w=workers: index_videos(links, w, progress=False)))
        one, two = (statistics.median(rate) for rate in rates.values())
        print(f"index_videos       {one:6.0f} files/s in one process, {two:.0f} in two: {two / one:.2f} times")

        large = Path(folder, "large.mp4")
        write_video(large, 1800, 30, 360, 640, options={"bf": "3"}, container_options={"movflags": "faststart"})
        share = share_of_bytes_read(large)
        print(f"bytes read         {share:.1%} of a file of {os.path.getsize(large) / 1e6:.1f} MB")
        memory, seconds, num_clips = memory_of_dataset(folder, paths[0])
        print(f"{DATASET:,} videos     {memory:.0f} MiB for index and clips ({num_clips:,} clips, {seconds:.0f} s)")
    figures = {"of_opening": round(medians["ours"] / medians["open with PyAV"], 2)}
    figures |= {"of_listing_packets": round(medians["ours"] / medians["list all packets"], 2)}
    figures |= {"two_processes": round(two / one, 2), "share_of_bytes": round(share, 3), "mib_200k": round(memory)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
