"""What this process may use: its cores, and its share of the work of one launcher."""

import contextlib
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from common import refuse


class Launcher(NamedTuple):
    """This process among those that one launcher started; items `sorted_items[rank::world_size]` are its share."""

    rank: int  # 0 … world_size - 1
    world_size: int
    local_rank: int  # among the processes of this machine
    local_world_size: int  # processes on this machine


OF_MPI = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"  # Open MPI; MPICH and Intel's; MVAPICH


def launcher(environ=os.environ, array=True):
    """Read from the environment who started this process: Launcher(0, 1, 0, 1) where it stands alone.

    `torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; `srun` sets SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID and SLURM_TASKS_PER_NODE; a SLURM array sets SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT, and each of
    its tasks may hold an `srun` of its own. `array=False` takes each task of an array for a run by itself, as training
    does. Exits with code 2 and one sentence where the variables contradict one another, in the script of a SLURM job of
    several tasks, where one process runs and only `srun` would start the others, and under `mpirun`, whose processes
    would each do all.
    """

    def number(name, default=None, least=0):
        value = environ.get(name, default)
        with contextlib.suppress(TypeError, ValueError):
            if int(value) >= least:
                return int(value)
        needed = f"a number from {least} on" if least else "a number"
        refuse(f"{name} is {value!r} in the environment, {needed} is needed; torchrun and srun set it")

    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank, world_size = number("RANK"), number("WORLD_SIZE", least=1)
        local_world_size = number("LOCAL_WORLD_SIZE", world_size, 1)
        local_rank = number("LOCAL_RANK", rank % local_world_size)
    else:
        rank, world_size = number("SLURM_PROCID", 0), 1
        if "SLURM_PROCID" in environ:
            world_size = number("SLURM_NTASKS", 1, 1)
        elif others := next((size for size in map(environ.get, OF_MPI) if size not in (None, "1")), None):
            refuse(f"mpirun started {others} processes, each of which would do all: start them by torchrun or srun")
        if in_batch_script(environ):
            refuse(f"this SLURM job has {world_size} tasks, but one process was started: put srun before python, or "
                   f"ask for one task (--ntasks 1)")  # fmt: skip
        # "8(x2),4" says: 8 processes on each of two machines, 4 on the third; machines are mostly filled alike
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
        most = max(map(int, re.findall(r"(?:^|,)(\d+)", per_node)), default=1)
        local_rank, local_world_size = number("SLURM_LOCALID", rank), min(world_size, most)
        if array and "SLURM_ARRAY_TASK_COUNT" in environ:
            count = number("SLURM_ARRAY_TASK_COUNT", least=1)
            step = number("SLURM_ARRAY_TASK_STEP", 1, 1)
            task = (number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN", 0)) // step
            if task >= count:
                refuse(f"task {task} of the SLURM array has no share: use a range, as --array 0-{count - 1}")
            rank, world_size = task * world_size + rank, count * world_size
    if not 0 <= rank < world_size:
        refuse(f"the launcher says that this is process {rank} of {world_size}; numbers go from 0 to {world_size - 1}")
    return Launcher(rank, world_size, local_rank, local_world_size)


def in_batch_script(environ=os.environ):
    """Whether this is the script, or the shell, of a SLURM job of several tasks itself, and no process of `srun`.

    What `srun` starts has the number of a step; so may a shell of salloc, in a step of one task.
    """
    alone = "SLURM_STEP_ID" not in environ or environ.get("SLURM_STEP_NUM_TASKS") == "1"
    return environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environ and alone


def num_cores():
    """CPU cores that this process may use: by its affinity and by the quota of its cgroup (containers, SLURM)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_quota())))


def cgroup_quota(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """CPU cores by the quotas of this process's cgroup and those above it, version 2 or 1; infinite without one."""
    quota = math.inf
    with contextlib.suppress(OSError, ValueError):  # no Linux, or no cgroups
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base, files = ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")) if controllers else ("", ("cpu.max",))
            for folder in (Path(path), *Path(path).parents) if {"", "cpu"} & {*controllers.split(",")} else ():
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    texts = [(root / base / str(folder).lstrip("/") / file).read_text() for file in files]
                    most, period = map(float, " ".join(texts).split())
                    quota = min(quota, most / period if most > 0 else math.inf)  # version 1 says -1
    return quota


def num_workers(wanted=0):
    """How many worker processes to start: `wanted`, or for 0 this process's part of the cores of its machine."""
    return wanted or max(1, num_cores() // (1 if in_batch_script() else launcher().local_world_size))
