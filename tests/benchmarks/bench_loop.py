"""What train.py's own bookkeeping costs, from metadata of 1,000, 190,254 (QEVD) and 1,000,000 videos; decodes nothing.

For each number of videos: making the clips (seconds, MiB), starting an epoch, a step without the network's share, what
a forked worker takes for itself after the epoch, and what a spawned one takes to start, beyond its imports. Seconds are
those of one core. Writes nothing; the last line is one JSON object. Takes a minute.

    $ python tests/benchmarks/bench_loop.py
"""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "references/video_classification"), str(REPO / "tools"), str(REPO)]

import torch

import datasets
import train
import utils
from torchvision_patches.video_utils import VideoClips

# ----------------------------------------------------------------------------------------------------------------------
SIZES = (1_000, 190_254, 1_000_000)  # videos
TABLES = 300  # different frame tables, as the videos of a dataset have them
STEPS = 300  # steps that are timed
WORKERS = 10  # of which one is looked at: it reads a tenth of an epoch
# ----------------------------------------------------------------------------------------------------------------------


def metadata_of(count):
    tables = [torch.arange(60 + i) * 512 for i in range(TABLES)]
    paths = [f"/data/QEVD_organized/train/an_exercise_{i % 92}/{i:08d}.mp4" for i in range(count)]
    numbers = torch.randint(TABLES, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    pts, fps = [tables[number] for number in numbers], [30.0] * count
    return [(path, i % 92) for i, path in enumerate(paths)], {"video_paths": paths, "video_pts": pts, "video_fps": fps}


def memory(kind):
    """MiB of this process: "Rss" or "Private_Dirty" (Linux)."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(kind + ":"))


def no_clip(idx):
    """In place of `VideoClips.get_clip`: finds the video, and gives one grey frame."""
    video_idx, _ = no_clip.clips.get_clip_location(idx)
    return torch.zeros(1, 1, 1, 3, dtype=torch.uint8), None, None, video_idx


def keep(clip):
    return clip


def private_memory_of_a_fork(dataset):
    """MiB that a forked worker has for itself after its part of an epoch."""

    def work(pipe):
        start = memory("Private_Dirty")
        sampler = datasets.TrainSampler(dataset, 1, 0, rank=0, world_size=WORKERS)
        for item in list(sampler):
            dataset[item]
        pipe.send(memory("Private_Dirty") - start)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    process.start()
    result = here.recv()
    process.join()
    return result


def receive(pipe):
    sent = pipe.recv_bytes()
    before, start = memory("Rss"), time.process_time()
    dataset = pickle.loads(sent)
    assert len(dataset)
    pipe.send((time.process_time() - start, memory("Rss") - before, len(sent) / 2**20))


def spawned(dataset):
    """(s, MiB, MiB sent) that a spawned worker takes to have the dataset, after its imports."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(there,))
    process.start()
    dataset.video_clips.__dict__.pop("get_clip", None)
    dataset.current = None  # shared memory has a way of its own
    here.send_bytes(pickle.dumps(dataset))
    result = here.recv()
    process.join()
    return result


class Stub(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(1, 92)

    def forward(self, clips):
        return self.fc(clips[:, 0, 0, 0, :1])


def bare_steps(model, optimizer, batch, criterion):
    """Seconds of a step of the network alone."""
    start = time.process_time()
    for _ in range(STEPS):
        criterion(model(batch[0].permute(0, 4, 1, 2, 3).float().div(255)), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.process_time() - start) / STEPS


class Batches:
    """A loader that takes its lengths and numbers from the real sampler, and whose batches are there at once."""

    def __init__(self, sampler, batch):
        self.sampler, self.batch = sampler, batch

    def __len__(self):
        return min(STEPS, len(self.sampler))

    def __iter__(self):
        items = iter(self.sampler)
        for _ in range(len(self)):
            for _ in range(len(self.batch[0])):
                next(items, None)
            yield self.batch


def step_overhead(sampler):
    """Seconds of a step of train_one_epoch beyond the network's own: the median of 5 runs."""
    args = train.get_args_parser().parse_args(["--data-path", ".", "--device", "cpu", "--trainable-layers", "all"])
    args.distributed = False
    train.settings.complete(args, None, range(92))
    model, criterion = Stub(), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    clips, numbers = torch.zeros(24, 1, 1, 1, 3, dtype=torch.uint8), torch.zeros(3, 24, dtype=torch.int64)
    batch = datasets.Batch(clips, *numbers, None, [])
    bad_videos = utils.BadVideos(0.1)
    bad_videos.start(10**9)
    learner = train.Learner(args, None, 10**6, [f"class {i}" for i in range(92)])
    learner.raw = learner.model = model
    learner.optimizer, learner.augment = optimizer, augment
    learner.scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    differences = []
    for _ in range(5):
        loader = Batches(sampler, batch)
        next(iter(sampler))  # the start of an epoch is timed by itself
        start = time.process_time()
        list(zip(range(1), sampler))
        epoch_start = time.process_time() - start
        with contextlib.redirect_stdout(io.StringIO()):
            begin = time.process_time()
            train.train_one_epoch(learner, loader, bad_videos, 0, args)
            seconds = time.process_time() - begin - epoch_start
        differences.append(seconds / len(loader) - bare_steps(model, optimizer, batch, criterion))
    return statistics.median(differences)


def augment(clips, labels, _):
    return clips.permute(0, 4, 1, 2, 3).float().div(255), labels


def bench(count):
    samples, metadata = metadata_of(count)
    before, start = memory("Rss"), time.process_time()
    clips = VideoClips(metadata["video_paths"], 16, 1, 4, metadata)
    row = {"videos": count, "clips_s": time.process_time() - start, "clips_mib": memory("Rss") - before}
    row["clips"] = clips.num_clips()
    dataset = datasets.KineticsWithVideoId("/data/QEVD_organized", samples, clips, keep)
    sampler = datasets.TrainSampler(dataset, 1, 0)
    start = time.process_time()
    next(iter(sampler))
    row["epoch_start_s"] = time.process_time() - start
    row["step_ms"] = 1000 * step_overhead(sampler)
    clips.get_clip, no_clip.clips = no_clip, clips
    row["fork_mib"] = private_memory_of_a_fork(dataset)
    row["spawn_s"], row["spawn_mib"], row["sent_mib"] = spawned(dataset)
    return row


def main():
    torch.set_num_threads(1)
    rows = []
    for count in SIZES:
        rows.append({key: round(value, 3) for key, value in bench(count).items()})
        print("  ".join(f"{key} {value:,}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps({"cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
