"""How fast train.py loads clips, from videos and from the frame cache, trains on them, and does both at once.

Makes VIDEOS videos of 320 x 240, 5 s at 30 fps, in a temporary folder; writes nothing else. Every figure is the median
of REPEATS runs of train.py's own loader and train_one_epoch, in clips of 16 frames at 4 fps. The last line is one JSON
object for each batch size. All of it takes 20 minutes on 2 cores. Of requirements.txt it needs torch, torchvision, av,
numpy, h5py, scipy, tqdm, pebble and filelock.

    $ python tests/benchmarks/bench_train.py                   # the GPU if there is one, else the CPU
    $ python tests/benchmarks/bench_train.py --videos 192 --batch-size 24 64   # for a GPU

Loading and step share the cores on a CPU, so there the two at once cannot reach the slower of the two: the bound is
1 / (1/loading + 1/step), and both ratios are shown. On a GPU the share of its time that it waits for clips is shown.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / folder) for folder in ("references/video_classification", "tools", "tests", ".")]

import common
from common import machine
from common.held_out import NOTHING

import torch

import datasets
import presets
import train
import utils
from make_videos import write_video

MODES = [  # name, --trainable-layers, and other flags
    ("layer4 + fc, float32", ["layer4", "fc"], []),
    ("layer4 + fc, --amp", ["layer4", "fc"], ["--amp"]),
    ("the same, --fold-frozen", ["layer4", "fc"], ["--amp", "--fold-frozen"]),
    ("all layers, float32", ["all"], []),
    ("all layers, --amp", ["all"], ["--amp"]),
]
PASSES = 32  # over the videos in one run that loads from the cache: it would be too short to time


def write_videos(root, count):
    (root / "train" / "squats").mkdir(parents=True)
    paths = [root / "train" / "squats" / f"{i:08d}.mp4" for i in range(count)]
    write = functools.partial(write_video, num_frames=150, height=240, width=320, options={"bf": "3", "g": "60"})
    with concurrent.futures.ProcessPoolExecutor(machine.num_workers()) as pool:
        list(pool.map(write_one, [write] * count, paths, range(count)))


def write_one(write, path, seed):
    write(path, seed=seed)


def parse_train_args(root, options, layers=("all",), more=(), cache=""):
    # many steps on the same few clips: at the default learning rate they might diverge
    flags = ["--data-path", str(root), "--lr", "1e-5", "--workers", str(options.workers), "--cache-frames", str(cache)]
    flags += ["--batch-size", str(options.batch_size)]
    args = train.get_args_parser().parse_args([*flags, "--trainable-layers", *layers, *more])
    args.print_freq = 10**6
    train.models.settle_device(args)
    train.processes.join(args)
    train.settings.complete(args, None, range(92))
    return args


def make_loader(args, passes=1, preset=presets.for_training):
    """train.py's loader over `passes` epochs at once."""
    class_map = common.load_class_map(args.class_map)
    dataset = datasets.load_dataset("train", class_map, preset(args), utils.BadVideos(0.0), args, NOTHING)
    clips = [clip for _ in range(passes) for clip in datasets.TrainSampler(dataset, 1, 0)]
    return datasets.make_loader(dataset, clips, args)


class Stepper:
    """train_one_epoch on any iterable of batches."""

    def __init__(self, args):
        self.args, self.bad_videos = args, utils.BadVideos(0.0)
        self.learner = train.Learner(args, None, 10**6, [f"class {i}" for i in range(92)])
        self.learner.scheduler = torch.optim.lr_scheduler.ConstantLR(self.learner.optimizer, 1.0)

    def run(self, loader):
        self.bad_videos.start(10**9)
        return train.train_one_epoch(self.learner, loader, self.bad_videos, 0, self.args)

    def validate(self, loader, exact):
        train.evaluate(self.learner.raw, loader, self.bad_videos, self.args, exact=exact)


def feed(args, passes):
    """What the host can feed, by CPU seconds a clip: a loop from the cache into a stub in place of network and device.

    Returns (clips/s of the whole loop here, clips/s that one core's worker loads, clips/s that the training process
    takes in). The stub computes on one thread, since those of an OpenMP team would spin while they wait.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loader, stepper = make_loader(args, passes), Stepper(args)
    learner = stepper.learner
    learner.model = torch.nn.Sequential(torch.nn.Linear(args.clip_len, args.num_classes)).to(args.device)
    learner.optimizer = train.models.make_optimizer(learner.model, args)
    learner.augment = lambda clips, labels, _: (clips[..., 0, 0, 0].float(), labels)
    start, own, others = time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with contextlib.redirect_stdout(io.StringIO()):
        stepper.run(loader)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    num_clips = len(loader.sampler)
    del loader  # its workers end, and are counted
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = ended.ru_utime + ended.ru_stime - others.ru_utime - others.ru_stime
    torch.set_num_threads(threads)
    return num_clips / seconds, num_clips / others, num_clips / own


def clips_per_second(run, num_clips, device, repeats):
    """The median of `repeats` timed calls of `run`, after one that is not timed."""
    rates = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(num_clips / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def drain(loader):
    for _ in loader:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", default=32, type=int)
    parser.add_argument("--batch-size", default=[8], nargs="+", type=int, dest="batch_sizes")
    parser.add_argument("--workers", default=10, type=int, help="decoding processes, at most one for each core")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--modes", default=[1, 2, 3, 4, 5], nargs="*", type=int, help="which ways to train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder), options.videos)
        for batch_size in options.batch_sizes:
            bench(Path(folder), argparse.Namespace(**vars(options), batch_size=batch_size))


def bench(root, options):
    args = parse_train_args(root, options)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    passes = PASSES if args.device == "cuda" else 1
    cached = parse_train_args(root, options, cache=root / "cache")
    few = max(1, passes // 8)
    loaders = {"videos": (make_loader(args, few), few * options.videos)}
    drain(make_loader(cached))
    loaders["cache"] = make_loader(cached, passes), passes * options.videos
    many = make_loader(cached, PASSES), PASSES * options.videos
    loading = {
        name: clips_per_second(lambda loader=loader: drain(loader), count, args.device, options.repeats)
        for name, (loader, count) in {**loaders, "cache": many}.items()
    }
    print(f"{where}; {args.workers} processes load batches of {args.batch_size}; loading alone, clips/s:")
    print(f"from videos {loading['videos']:.1f}, from the cache {loading['cache']:.0f}, ", end="")
    print(f"{loading['cache'] / loading['videos']:.1f} times as many")
    whole, of_core, taken = feed(parse_train_args(root, options, ["fc"], cache=root / "cache"), 8 * PASSES)
    print(f"a stub for a network, from the cache: {whole:.0f} clips/s here; by CPU time a worker's core loads "
          f"{of_core:.0f}, eight of them {8 * of_core:.0f}, and the training process takes in {taken:.0f}")  # fmt: skip
    loading |= {"stub": whole, "worker's core": of_core, "training process": taken}
    heads = f"{'both / slower':>16}{'both / bound':>15}{'waiting':>10}{'memory':>12}"
    print(f"{'':24}{'from':>8}{'step':>10}{'both':>10}{heads}")
    rows = {}
    for name, layers, more in (MODES[k - 1] for k in options.modes):
        # on the device already: what it takes to bring them there belongs to loading
        loader, count = loaders["cache"]
        batch = next(iter(loader))
        clips = batch.clips.to(args.device)
        batches = [batch._replace(clips=clips, labels=batch.labels.to(args.device))] * (count // len(clips))
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(io.StringIO()):
            run, seen = Stepper(parse_train_args(root, options, layers, more)).run, len(batches) * len(clips)
            step = clips_per_second(lambda: run(batches), seen, args.device, options.repeats)  # noqa: B023
        for source, (loader, count) in loaders.items():
            with contextlib.redirect_stdout(io.StringIO()):
                both = clips_per_second(lambda: run(loader), count, args.device, options.repeats)  # noqa: B023
            bound = 1 / (1 / loading[source] + 1 / step)
            row = dict(step=step, both=both, to_slower=both / min(loading[source], step), to_bound=both / bound)
            row["waiting"] = 1 - both / step  # the share of its time that a device of its own waits
            row["memory"] = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0  # GB, of the GPU
            rows[f"{name}, from {source}"] = {key: round(value, 3) for key, value in row.items()}
            shown = f"{row['to_slower']:>16.2f}{row['to_bound']:>15.2f}{100 * row['waiting']:>8.0f} %"
            shown += f"{row['memory']:>9.1f} GB" * (args.device == "cuda")
            print(f"{name:24}{source:>8}{step:>10.2f}{both:>10.2f}{shown}", flush=True)
    loader, count = make_loader(cached, few, presets.for_validation), few * options.videos
    stepper = Stepper(cached)
    for exact in True, False:
        cached.amp = not exact
        with contextlib.redirect_stdout(io.StringIO()):
            rate = clips_per_second(lambda: stepper.validate(loader, exact), count, args.device, options.repeats)  # noqa: B023
        name = "validation, float32" if exact else "validation, --amp, between epochs"
        rows[name] = {"both": round(rate, 3)}
        print(f"{name:42}{rate:>10.2f}", flush=True)
    rates = {name: round(rate, 1) for name, rate in loading.items()}
    print(json.dumps({"device": where, "batch_size": options.batch_size, "loading": rates, "modes": rows}))


if __name__ == "__main__":
    main()
