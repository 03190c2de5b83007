"""Meters, logging, checkpoints' files and processes: what train.py needs besides training."""

import datetime
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections import defaultdict, deque
from pathlib import Path

import common
from common import machine

import torch
import torch.distributed as dist

# how long processes wait for one another
JOINING = datetime.timedelta(minutes=5)  # until all of a run have started
INDEXING = datetime.timedelta(hours=3)  # until the first has read all videos' frame times: half an hour for QEVD
WORKING = datetime.timedelta(minutes=30)  # at any other meeting: one may have more to decode, or a checkpoint to write

STALLED = 600.0  # s without one batch, after which a run ends
BEAT = 5.0  # s between two signs of life of a process
LOST = 30.0  # s without one, after which the others end

store = None  # what processes tell one another by name, a torch.distributed.Store, where there are several
leaving = threading.Event()  # this process needs the others no longer


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
        if torch.cuda.is_available():
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
PEAKS |= {"RTX 4090": 165e12, "RTX 3090": 71e12, "A10": 125e12, "V100": 125e12, "T4": 65e12}


def peak_of_gpu():
    """Dense 16-bit FLOP/s of the current GPU by its name; None for an unknown one, or without a GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
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
            what = f"no batch for {STALLED:g} s" if "timed out" in str(e) else first_line(e)
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
    if not is_main_process():
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
                link_or_copy(path, temporary)
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


def check_space(model, epochs, args):
    """Say what the checkpoints of `epochs` more epochs take in --output-dir; exits with code 2 if that is not free."""
    if not is_main_process():
        return
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) * (2 if args.model_ema else 1)
    learning = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state = learning * (2 if args.opt == "adamw" else 1)  # SGD keeps one value a weight
    numbered = epochs // args.save_every if args.save_every else 0
    kept = 3 + numbered  # the last, the best, and the one that is being written
    common.check_space(args.output_dir, kept * (weights + state), "make room, or keep fewer with --save-every")


def link_or_copy(path, other):
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        Path(other).write_bytes(Path(path).read_bytes())


class MetricsFile:
    """metrics.jsonl, one JSON object an epoch, and curves.png drawn from it."""

    def __init__(self, output_dir, start_epoch, last=None):
        """Keep the lines of the epochs before `start_epoch`: what follows will be written again.

        last: the line of the checkpoint's epoch, which is saved before it is written here.
        """
        self.path = Path(output_dir) / "metrics.jsonl"
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
    args.rank, args.world_size, args.local_rank, _ = machine.launcher(array=False)
    args.distributed = args.world_size > 1
    if args.device.startswith("cuda"):
        if args.distributed:  # SLURM may show each process its own GPU only
            args.device = f"cuda:{args.local_rank % torch.cuda.device_count()}"
        if ":" in args.device:
            torch.cuda.set_device(args.device)
    if not args.distributed:
        return
    global store
    host, port = meeting_point(args.dist_url)
    hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(host, port, None, args.rank == 0 and not hosted_by_torchrun, JOINING)
        gpu = args.device.startswith("cuda") and torch.cuda.get_device_properties(args.device).uuid
        store.set(f"joined/{args.rank}", str(gpu or ""))
        wait_for_all(args.world_size)
        refuse_shared_gpu(args.world_size)
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, None, WORKING, args.world_size, args.rank, store)
        threading.Thread(target=watch, args=(store.clone(), args.rank, args.world_size), daemon=True).start()
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
    started = machine.launcher(environ, array=False)
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


def watch(store, rank, world_size):
    """Give signs of life, and end this process when another one gives none: in a thread, through the run's store.

    The first process holds the store, except under torchrun, and looks at all others; they look for its word. A process
    that ends by itself says so before: see `leave_distributed_mode`.
    """
    seen = {}
    for beat in itertools.count():
        try:
            if leaving.wait(BEAT):
                return
            store.set(f"alive/{rank}", str(beat))
            if store.check(["lost"]):
                end_with_others(store.get("lost").decode())
            for other in range(world_size) if rank == 0 else ():
                key = f"alive/{other}"
                now = store.get(key) if store.check([key]) else b""
                if now != seen.get(other, (None, 0))[0]:
                    seen[other] = now, time.monotonic()
                elif now != b"left" and time.monotonic() - seen[other][1] > LOST:
                    store.set("lost", str(other))
                    leaving.wait(2 * BEAT)  # the store goes with this process: let the others look first
                    end_with_others(other)
        except RuntimeError:  # of a connection that is no more
            if not leaving.is_set():
                end_with_others(0)


def end_with_others(lost):
    print(f"error: process {lost} of this run has ended or does not answer, so this one ends, too", file=sys.stderr)
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()  # they hold the port at which the next run meets
    os._exit(2)


def first_line(error):
    return str(error).splitlines()[0]


def refuse_shared_gpu(world_size):
    """Exit with code 2 if two processes of the run compute on one GPU: NCCL would fail without saying so."""
    first = {}
    for rank in range(world_size):
        gpu = store.get(f"joined/{rank}").decode()
        if gpu and first.setdefault(gpu, rank) != rank:
            common.refuse(
                f"processes {first[gpu]} and {rank} have the same GPU: start as many processes on a machine as it has "
                f"GPUs (torchrun: --nproc-per-node)"
            )


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
    of_others = dist.is_initialized() and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)", str(error))
    if isinstance(error, dist.DistError) or of_others:
        common.refuse(f"another process of this run has ended, so this one ends, too ({text})")


def refuse_small_shared_memory(args):
    """Exit with code 2 if the batches that workers send do not fit into /dev/shm, as with Docker's default of 64 MB."""
    folder = Path("/dev/shm")
    if not args.workers or not folder.is_dir():
        return
    of_train, of_val = (math.prod(getattr(args, f"{split}_crop_size")) for split in ("train", "val"))
    values = of_val * 4 + (0 if args.test_only else of_train)  # bytes of one colour of a frame: float32, uint8
    batch = args.batch_size * args.clip_len * 3 * values
    needed = batch * (2 * args.workers + 1) * machine.launcher(array=False).local_world_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        common.refuse(
            f"workers send batches through {folder}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are "
            f"free; give fewer --workers or a smaller --batch-size, or make it larger (Docker: --shm-size 4g)"
        )


def leave_distributed_mode():
    """When all processes have come here, leave the run."""
    if dist.is_initialized():
        dist.barrier()
        store.set(f"alive/{dist.get_rank()}", "left")
        leaving.set()
        dist.barrier()
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
