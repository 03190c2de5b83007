"""Log lines, videos that do not decode, files of a run: what train.py needs besides training."""

import datetime
import json
import math
import multiprocessing
import os
import re
import time
from collections import defaultdict, deque
from pathlib import Path

import common

import torch
import torch.distributed as dist

import processes

# --- log lines ------------------------------------------------------------------------------------------------------


def log(*words):
    """Print in the first process only."""
    if processes.is_main_process():
        print(*words, flush=True)


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
    """Named SmoothedValues, and a loop over a loader that prints them every `print_freq` batches with the eta.

    After the loop `waited` is how many seconds it waited for batches. flops: floating point operations of a clip.
    """

    def __init__(self, flops=0):
        self.meters, self.waited, self.flops = defaultdict(SmoothedValue), 0.0, flops

    def log_every(self, loader, print_freq, header, time_left=None):
        """Yield the batches of `loader`, whose first element is the clips.

        time_left: a function from the share that is done to a text, where the loop is a part of something longer.
        """
        start, steps, num_clips = time.perf_counter(), len(loader), 0
        batches = patiently(loader)
        for i in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch
            num_clips += len(batch[0])
            if i % print_freq == 0 or i == steps - 1:
                seconds = time.perf_counter() - start
                eta = datetime.timedelta(seconds=int(seconds / (i + 1) * (steps - 1 - i)))
                left = f"  left: {time_left((i + 1) / steps)} of the run" if time_left else ""
                meters = "".join(f"  {name}: {meter}" for name, meter in self.meters.items())
                log(f"{header}  [{i + 1}/{steps}]  eta: {eta}{left}{meters}{self.pace(num_clips, seconds)}")

    def pace(self, num_clips, seconds):
        """How fast this process is, what it waits for, and which share of its GPU's peak that is, where it is known."""
        text = f"  {num_clips / seconds:.4g} clips/s  waited: {self.waited:.1f} s of {seconds:.1f}"
        if self.flops:
            achieved = self.flops * num_clips / seconds
            text += f"  {achieved / 1e9:,.0f} GFLOP/s"
            if peak := peak_of_gpu():
                text += f" (MFU {100 * achieved / peak:.1f} %)"
        if torch.cuda.is_initialized():
            text += f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        return text


def time_left(begin, epochs, epochs_done, share):
    """What is left of `epochs` epochs that began at `begin`, `share` of one more than `epochs_done` being done.

    By the pace so far, which holds validation and saving of the epochs before.
    """
    done = epochs_done + share
    seconds = (time.perf_counter() - begin) * (epochs - done) / done
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# dense FLOP/s with 16-bit factors and 32-bit sums, by their makers' data sheets
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PEAKS |= {"RTX 4090": 165e12, "RTX 3090": 71e12, "A10": 125e12, "T4": 65e12}


def peak_of_gpu():
    """Dense 16-bit FLOP/s of the current GPU by its name; None for an unknown one, or where the CPU computes."""
    name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    return next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def patiently(loader):
    """The batches of a loader; exits with code 2 where its workers send none for STALLED s, or one of them ends."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as e:
            if "DataLoader" not in str(e):
                raise
            reading = getattr(getattr(loader, "dataset", None), "being_read", list)()
            what = f"no batch for {processes.STALLED:g} s" if "timed out" in str(e) else first_line(e)
            for worker in multiprocessing.active_children():
                worker.kill()  # or this process would wait for a stopped one when it ends
            common.refuse(
                f"{what}; its workers were reading {', '.join(reading) or 'nothing'}: move such a video away, look at "
                f"the disk it lies on, or give the run fewer --workers if memory is short"
            )
        yield batch


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
    if not processes.is_main_process():
        return
    bad = [k for k, v in checkpoint["model"].items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        common.refuse(
            f"{bad[0]} is not finite after epoch {checkpoint['epoch']}: nothing was saved, earlier files stand"
        )
    try:
        with common.written_then_renamed(path) as temporary:
            torch.save(checkpoint, temporary)
        for other in others:
            with common.written_then_renamed(other) as temporary:
                temporary.unlink(missing_ok=True)
                hard_link_or_copy(path, temporary)
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError where the disk is full
        cannot_write(path, e)


def cannot_write(path, error):
    reason = getattr(error, "strerror", None) or first_line(error)
    common.refuse(
        f"{path} cannot be written ({reason}): make room or name another --output-dir, and continue with --resume; "
        f"what was saved before is whole"
    )


def make_output_dir(args):
    """Create --output-dir; exits with code 2 if it cannot be, or if it holds another run's checkpoint."""
    output_dir = Path(args.output_dir)
    mine = args.resume and not args.resume_weights_only and Path(args.resume).resolve().parent == output_dir.resolve()
    if (output_dir / "checkpoint.pth").exists() and not (mine or args.overwrite):
        common.refuse(
            f"{output_dir} holds the checkpoint of another run: continue it with --resume auto, name another "
            f"--output-dir, or let this run replace it with --overwrite"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        cannot_write(output_dir, e)


def remove_earlier_run(output_dir):
    """Remove the numbered and best checkpoints that --overwrite replaces; first process only.

    An interruption later would leave them beside a checkpoint.pth of another run, maybe of other classes.
    """
    for path in Path(output_dir).glob("model_*.pth") if processes.is_main_process() else ():
        if re.fullmatch(r"model_(best|\d+)\.pth", path.name):
            path.unlink()


def check_space_for_checkpoints(model, epochs, args):
    """Say what the checkpoints of `epochs` more epochs take in --output-dir; exits with code 2 if that is not free."""
    if not processes.is_main_process():
        return
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) * (2 if args.model_ema else 1)
    learning = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state = learning * (2 if args.opt == "adamw" else 1)  # SGD keeps one value a weight
    numbered = epochs // args.save_every if args.save_every else 0
    kept = 3 + numbered  # the last, the best, and the one that is being written
    common.check_space(args.output_dir, kept * (weights + state), "make room, or keep fewer with --save-every")


def hard_link_or_copy(path, other):
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        Path(other).write_bytes(Path(path).read_bytes())


class TrainingHistory:
    """metrics.jsonl, one JSON object an epoch, curves.png drawn from it and, with --tensorboard, its files."""

    def __init__(self, args, start_epoch, last=None):
        """Keep the lines of the epochs before `start_epoch`: what follows will be written again.

        last: the line of the checkpoint's epoch, which is saved before it is written here.
        """
        self.tensorboard = tensorboard_writer(args) if args.tensorboard else None
        self.path = Path(args.output_dir) / "metrics.jsonl"
        text = self.path.read_text() if start_epoch and self.path.exists() else ""
        rows = {row["epoch"]: row for row in map(json.loads, text.splitlines()) if row["epoch"] < start_epoch}
        rows |= {last["epoch"]: last} if last else {}
        self.rows = [rows[epoch] for epoch in sorted(rows)]

    def append(self, row):
        self.rows.append(row)
        try:
            common.write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self.draw()
        except OSError as e:
            cannot_write(self.path, e)
        if self.tensorboard:
            for key, value in row.items():
                self.tensorboard.add_scalar(key, value, row["epoch"])
            self.tensorboard.flush()

    def draw(self):
        from matplotlib.figure import Figure  # without pyplot no display is ever looked for

        figure = Figure(figsize=(10, 4))
        left, right = figure.subplots(1, 2)
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


def tensorboard_writer(args):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        common.refuse("--tensorboard needs the package: pip install tensorboard")
    return SummaryWriter(args.output_dir)


# --- errors ---------------------------------------------------------------------------------------------------------


def first_line(error):
    return str(error).splitlines()[0]


def explain(error, args):
    """Exit with code 2 and one sentence for those of torch's errors that a user can mend; return for all others."""
    text = first_line(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        common.refuse(
            f"{args.batch_size} clips at once do not fit into the memory of {args.device} ({text[:150]}): give a "
            f"smaller --batch-size, or --amp; --accumulate makes a step of several batches"
        )
    if "deterministic implementation" in text:
        what = text.partition(" does not")[0]
        common.refuse(f"{args.model} needs {what}, which has no deterministic form: leave the flag away")
    if "Duplicate GPU" in str(error):
        common.refuse(
            "two processes of this run have the same GPU: start as many processes on a machine as it has GPUs "
            "(torchrun: --nproc-per-node)"
        )
    of_others = dist.is_initialized() and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)", str(error))
    if isinstance(error, dist.DistError) or of_others:
        common.refuse(f"another process of this run has ended or does not answer, so this one ends, too ({text})")
