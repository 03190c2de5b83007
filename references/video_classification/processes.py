"""The processes of one run: who started them, where they meet, how long one waits for another.

torchrun and torch.distributed watch them: a process that fails ends the others, at the latest when they have waited
for it as long as the limits here say.
"""

import datetime
import os

import common
from common import machine

import torch
import torch.distributed as dist

# All time limits of a training, the inner ones first. Each leaves the ones before it time to end with their own
# sentence, which names the cause: reading one video's frame times (torchvision_patches/video_index.py: 5 minutes),
JOINING = datetime.timedelta(minutes=5)  # until all processes of a run have started
STALLED = 600.0  # s without one batch of this process's workers: the frames of a whole batch on a busy disk
WORKING = datetime.timedelta(minutes=30)  # at any meeting: another one may wait STALLED, or write a checkpoint
INDEXING = datetime.timedelta(hours=3)  # until the first has read all videos' frame times: half an hour for QEVD


def join(args):
    """Join the other processes of the run, if `torchrun` or `srun` started any; each must call this.

    Sets args.distributed, rank, local_rank and world_size, and args.device to this process's GPU. Exits with code 2
    and one sentence if nothing says where they meet, or not all have come after JOINING.
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
    if args.dist_url == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        common.refuse(
            f"this is process {args.rank} of {args.world_size}, and nothing says where they meet: in a SLURM script "
            f"put `export MASTER_ADDR=$(hostname) MASTER_PORT=29500` before srun, or ask for one task (torchrun sets "
            f"both by itself)"
        )
    try:
        store, *_ = next(dist.rendezvous(args.dist_url, args.rank, args.world_size, timeout=JOINING))
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, None, WORKING, args.world_size, args.rank, store)
    except (dist.DistError, ValueError) as e:  # ValueError: of a --dist-url that is none
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        common.refuse(
            f"process {args.rank} of {args.world_size} has not met the others within {JOINING.seconds:,} s at "
            f"{place if args.dist_url == 'env://' else args.dist_url} ({str(e).splitlines()[0]}): in a SLURM script "
            f"start training with srun; MASTER_ADDR and MASTER_PORT name the first one's machine and a free port of it"
        )


def leave():
    """When all processes have come here, leave the run."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def from_main_process(make):
    """Call `make` in the first process only and give its result to all, which wait for it up to INDEXING."""
    result = [make() if is_main_process() else None]
    if dist.is_initialized():
        patient = dist.new_group(backend="gloo", timeout=INDEXING)
        dist.broadcast_object_list(result, src=0, group=patient)
        dist.destroy_process_group(patient)
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
