"""Worker processes with a time limit: a call that hangs or crashes its process costs itself only.

Every worker computes with one thread of torch. The cores are shared by the workers already; and in a forked process
torch's other threads do not exist, so that an operation which is large enough to be shared between them waits for ever
(OpenMP's pool of threads does not survive a fork that comes after its first use).

Python from 3.12 on tells developers of a fork in a process with threads (a DeprecationWarning, which users do not see),
because a thread may hold a lock at that moment. pebble has threads, torch and onnxruntime may have. The workers take
none of their locks: they decode, convert with one thread, and answer through a pipe of their own.
"""

import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, TimeoutError, wait
from typing import NamedTuple

from pebble import ProcessExpired, ProcessPool

from torchvision_patches.decoding import UnreadableVideo

AHEAD = 4  # calls a worker that are handed out before their time, so that no worker waits for work


class WorkerLost(Exception):
    """A call without an answer. `exit_code` is its process's, None if it exceeded the time limit."""

    def __init__(self, reason, exit_code=None):
        super().__init__(reason)
        self.reason, self.exit_code = reason, exit_code


class Outcome(NamedTuple):
    """How one call ended."""

    item: object  # the argument of the call
    value: object  # what the function returned; None if it did not
    error: Exception  # what it raised, or a WorkerLost; None if it returned

    def why_not(self):
        """Why the video of this call gave nothing, "" if it did. An error that is no video's fault is raised."""
        if isinstance(self.error, MemoryError):
            return "it does not fit into memory"
        if self.error and not isinstance(self.error, (UnreadableVideo, WorkerLost)):
            raise self.error
        return self.error.reason if self.error else ""


def outcomes_of(function, items, num_workers, time_limit, in_order=False):
    """Call `function(item)` in worker processes for each item, and yield an Outcome of each.

    function: importable by name, or a functools.partial of such a one. items: a deque, emptied from the left; whoever
    reads the outcomes may add to it meanwhile. time_limit: s a call. in_order: outcomes come in the order of the items,
    otherwise as the calls end. At most AHEAD calls a worker wait at any time.
    """
    running = {}
    with ProcessPool(num_workers, initializer=begin_worker, initargs=[os.getpid()]) as pool:
        try:
            while items or running:
                while items and len(running) < AHEAD * num_workers:
                    item = items.popleft()
                    running[pool.schedule(function, [item], timeout=time_limit)] = item
                ended = [next(iter(running))] if in_order else wait(running, return_when=FIRST_COMPLETED).done
                for future in ended:
                    yield outcome_of(future, running.pop(future), time_limit)
        finally:
            pool.stop()  # leaving the block would wait for the workers


def outcome_of(future, item, time_limit):
    """The Outcome of a future, which is waited for. Raises BrokenExecutor where no worker can be started."""
    error = future.exception()
    if isinstance(error, BrokenExecutor):
        raise error
    if isinstance(error, TimeoutError):
        error = WorkerLost(f"it did not finish within {time_limit:g} s (does its disk answer?)")
    elif isinstance(error, ProcessExpired):
        killed = ": killed, as the system does when memory is short" if error.exitcode == -9 else ""
        error = WorkerLost(f"its decoder crashed (exit code {error.exitcode}{killed})", error.exitcode)
    return Outcome(item, None if error else future.result(), error)


def begin_worker(parent):
    """In a worker: one thread of torch, and an end once the parent (its process id) is gone, which may be killed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
