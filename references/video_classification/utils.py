"""Meters, logging, checkpoints' files and processes: what train.py needs besides training."""

import argparse
import datetime
import json
import os
import pickle
import re
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
import torch.distributed as dist

import common

# how long processes wait for one another
JOINING = datetime.timedelta(minutes=5)  # until all of a run have started
INDEXING = datetime.timedelta(hours=3)  # until the first has read all videos' frame times: half an hour for QEVD
WORKING = datetime.timedelta(minutes=30)  # at any other meeting: one may have more to decode, or a checkpoint to write

store = None  # what processes tell one another by name, a torch.distributed.Store, where there are several


# --- log lines ------------------------------------------------------------------------------------------------------


class SmoothedValue:
    """The median of the last 20 values and the average of all. Values on a GPU are fetched only when asked for."""

    def __init__(self):
        self.pending, self.recent, self.total, self.count = [], deque(maxlen=20), 0.0, 0

    def update(self, value, n=1):
        """Add a number or 0-dimensional tensor that stands for `n` clips."""
        self.pending.append((torch.as_tensor(value, dtype=torch.float32).detach(), n))

    def fetch(self):
        if self.pending:
            values, counts = zip(*self.pending)
            for value, n in zip(torch.stack(values).tolist(), counts):
                self.recent.append(value)
                self.total, self.count = self.total + value * n, self.count + n
            self.pending = []

    @property
    def global_avg(self):
        self.fetch()
        return self.total / max(1, self.count)

    def __str__(self):
        average = self.global_avg
        return f"{torch.tensor(list(self.recent) or [0.0]).median():.4g} ({average:.4g})"


class MetricLogger:
    """Named SmoothedValues, and a loop over a loader that prints them every `print_freq` batches with the eta."""

    def __init__(self):
        self.meters = defaultdict(SmoothedValue)

    def log_every(self, loader, print_freq, header):
        start = end = time.perf_counter()
        waited = 0.0
        for i, batch in enumerate(loader):
            waited += time.perf_counter() - end
            yield batch
            if i % print_freq == 0 or i == len(loader) - 1:
                seconds = time.perf_counter() - start
                eta = datetime.timedelta(seconds=int(seconds / (i + 1) * (len(loader) - 1 - i)))
                meters = "".join(f"  {name}: {meter}" for name, meter in self.meters.items())
                line = f"{header}  [{i + 1}/{len(loader)}]  eta: {eta}{meters}"
                line += f"  time: {seconds / (i + 1):.3f} s  data: {waited / (i + 1):.3f} s"
                if torch.cuda.is_available():
                    line += f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
                log(line)
            end = time.perf_counter()


class BadVideos:
    """Names each video that does not decode once, counts failures, and stops the run when there are too many.

    `count` is this process's; when the epoch ends, `check` takes the sum over all processes.
    """

    def __init__(self, max_share):
        self.max_share, self.named, self.count = max_share, set(), 0

    def start(self, num_clips):
        """A new epoch, in which all processes together ask for `num_clips` clips."""
        self.num_clips, self.count = num_clips, 0

    def report(self, failures):
        """Take note of some UnreadableVideo; exits with code 2 at more than `max_share` of the epoch's clips."""
        for failure in failures:
            if failure.path not in self.named:
                print(f"no clip from {failure}", flush=True)
            self.named.add(failure.path)
        self.count += len(failures)
        self.check(self.count, self.num_clips, "clips")

    def check(self, bad, total, what):
        if bad > self.max_share * total:
            common.refuse(
                f"{bad} of {total} {what} cannot be decoded, more than the {100 * self.max_share:g} % that "
                f"--max-bad-share allows; tools/check_videos.py finds such videos, repairs them or moves them away"
            )


# --- files ----------------------------------------------------------------------------------------------------------


def save_on_master(checkpoint, path, *others):
    """Save a checkpoint under `path` and, without a second copy on disk, under the `others`; first process only.

    Exits with code 2 instead of saving weights that are not finite.
    """
    if not is_main_process():
        return
    bad = [k for k, v in checkpoint["model"].items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        common.refuse(
            f"{bad[0]} is not finite after epoch {checkpoint['epoch']}: nothing was saved, earlier files stand"
        )
    with common.written_then_renamed(path) as temporary:
        torch.save(checkpoint, temporary)
    for other in others:
        with common.written_then_renamed(other) as temporary:
            temporary.unlink(missing_ok=True)
            link_or_copy(path, temporary)


def link_or_copy(path, other):
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        Path(other).write_bytes(Path(path).read_bytes())


def load_checkpoint(path):
    """Read a checkpoint as tensors and plain values only; its `args` come as a dict.

    The original's checkpoints hold an argparse.Namespace, which is let in. Exits with code 2 for anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        common.refuse(f"there is no checkpoint {path}")
    except pickle.UnpicklingError as e:
        common.refuse(
            f"{path} is damaged, or holds more than weights and plain values and could run code: {str(e)[:300]}"
        )
    except (RuntimeError, EOFError, OSError) as e:
        common.refuse(f"the checkpoint {path} cannot be read: {e}")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        common.refuse(f'{path} is no checkpoint of train.py: it has no weights under "model"')
    saved_args = checkpoint.get("args", {})
    checkpoint["args"] = saved_args if isinstance(saved_args, dict) else vars(saved_args)
    return checkpoint


class MetricsFile:
    """metrics.jsonl, one JSON object an epoch, and curves.png drawn from it."""

    def __init__(self, output_dir, start_epoch):
        """Keep the lines of the epochs before `start_epoch`: what follows will be written again."""
        self.path = Path(output_dir) / "metrics.jsonl"
        text = self.path.read_text() if start_epoch and self.path.exists() else ""
        self.rows = [row for row in map(json.loads, text.splitlines()) if row["epoch"] < start_epoch]

    def append(self, row):
        self.rows.append(row)
        with common.written_then_renamed(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.draw()

    def draw(self):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
        for axes, keys in (left, ("train_loss", "val_loss")), (right, ("train_acc1", "clip_acc1", "video_acc1")):
            for key in keys:
                points = [(row["epoch"], row[key]) for row in self.rows if key in row]
                axes.plot(*zip(*points), marker=".", label=key) if points else None
            axes.set_xlabel("epoch")
            axes.legend()
            axes.grid(alpha=0.3)
        left.set_ylabel("cross-entropy")
        right.set_ylabel("accuracy, %")
        figure.tight_layout()
        with common.written_then_renamed(self.path.with_name("curves.png")) as temporary:
            figure.savefig(temporary, dpi=100, format="png")
        plt.close(figure)


# --- processes ------------------------------------------------------------------------------------------------------


def init_distributed_mode(args):
    """Join the other processes of the run, if `torchrun` or `srun` started any; each must call this.

    Sets args.distributed, rank, local_rank and world_size, and args.device to this process's GPU. Exits with code 2
    and one sentence if not all have come after JOINING.
    """
    args.rank, args.world_size, args.local_rank, _ = common.launcher(array=False)
    args.distributed = args.world_size > 1
    if args.device.startswith("cuda"):
        if args.distributed:  # SLURM may show each process its own GPU only
            args.device = f"cuda:{args.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(args.device)
    if not args.distributed:
        return
    global store
    host, port = meeting_point(args.dist_url)
    hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(host, port, None, args.rank == 0 and not hosted_by_torchrun, JOINING)
        store.set(f"joined/{args.rank}", "")
        wait_for_all(args.world_size)
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, None, WORKING, args.world_size, args.rank, store)
    except (dist.DistNetworkError, dist.DistStoreError) as e:
        common.refuse(
            f"process {args.rank} of {args.world_size} cannot reach the first one at {host}:{port} ({first_line(e)}): "
            f"in a SLURM script start training with srun; MASTER_ADDR and MASTER_PORT name another place to meet"
        )


def meeting_point(url="env://", environ=os.environ):
    """(host, port) where the processes of a run meet: as `url` or MASTER_ADDR and MASTER_PORT say, else by SLURM's job.

    torchrun sets the two; srun does not, and then it is the first machine of the job step, at a port of the job's own.
    """
    if url.startswith("tcp://"):
        host, _, port = url[len("tcp://") :].rpartition(":")
        return host, int(port)
    started = common.launcher(environ, array=False)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or ""
    if started.local_world_size == started.world_size or not nodes:
        host = "127.0.0.1"
    else:  # of "node[03-05,09],other" the first is node03
        host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
    job, step = (environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    own_port = 15000 + (16 * int(job) + int(step or 0)) % 15000 if job.isdigit() else 29500
    return environ.get("MASTER_ADDR") or host, int(environ.get("MASTER_PORT") or own_port)


def wait_for_all(world_size):
    """Wait until every process of the run has joined; exits with code 2 after JOINING, naming one that has not."""
    keys = [f"joined/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, JOINING)
    except dist.DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        common.refuse(
            f"{len(missing)} of {world_size} processes did not start within {JOINING.seconds:,} s, the first is "
            f"process {missing[0]}: in a SLURM script start training with srun, or ask for one task"
        )


def first_line(error):
    return str(error).splitlines()[0]


def leave_distributed_mode():
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def log(*words):
    """Print in the first process only."""
    if is_main_process():
        print(*words, flush=True)


def from_main_process(make):
    """Call `make` in the first process only and give its result to all, which wait for it up to INDEXING."""
    result = [make() if is_main_process() else None]
    if dist.is_initialized():
        made = f"made/{store.add(f'asked/{dist.get_rank()}', 1)}"  # the same number in all
        store.set(made, "") if is_main_process() else store.wait([made], INDEXING)
        dist.broadcast_object_list(result, src=0)
    return result[0]


def reduce_across_processes(*tensors):
    """Sum each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def same_buffers(*modules):
    """Give every process the first one's buffers: each has moved its own BatchNorm statistics."""
    if dist.is_initialized():
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)
