"""Clips through a model at AI Hub, for run_inference.py: datasets written and uploaded, one clip first, then chunks."""

import collections
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import machine

from aihub import logits_file, model_io, service


class Patience:
    """`patiently(what, call, …)` is `call(…)`, tried again while AI Hub does not answer or asks to slow down.

    Waits `retry_seconds`, doubled each time up to five minutes; all is forgotten at the next answer. Raises
    service.JobFailedError after `patience_seconds` of it. What AI Hub refuses is raised at once.
    """

    def __init__(self, retry_seconds, patience_seconds):
        self.retry_seconds, self.patience_seconds = retry_seconds, patience_seconds

    def __call__(self, what, call, *arguments, **keywords):
        from tqdm import tqdm

        since, seconds = time.monotonic(), self.retry_seconds
        while True:
            try:
                return call(*arguments, **keywords)
            except service.hub_errors() as e:
                if not service.is_passing(e):
                    raise
                reason = f"{what}: AI Hub: {service.sentence_of(e)}"
            left = since + self.patience_seconds - time.monotonic()
            if left <= 0:
                raise service.JobFailedError(f"{reason} It was tried again for {self.patience_seconds / 3600:.2g} h")
            tqdm.write(f"{reason} Next try in {min(seconds, left):.0f} s")
            time.sleep(min(seconds, left))
            seconds = min(2 * seconds, 300)


def write_dataset(path, data_path, clips, digests, tensor):
    """Write clips to an HDF5 file as the client would, in the form that the model takes; returns `path`.

    A few clips are in memory at a time, compressed in several threads. Exits with code 2 if one has changed meanwhile.
    """
    import numpy as np

    def compressed(clip):
        values = np.load(Path(data_path, clip))
        if model_io.clip_digest(values) != digests[clip]:
            common.refuse(f"the clip {clip} has changed since this run began; run the same command again")
        array = model_io.as_model_input(values.astype(np.float32), tensor)
        return array.shape, array.dtype, zlib.compress(array.tobytes(), 1)

    at_once = 2 * machine.num_workers()
    with ThreadPool(machine.num_workers()) as pool, common.new_hdf5(path) as file:
        group = logits_file.begin_samples(file, tensor["name"], len(clips))
        for start in range(0, len(clips), at_once):
            some = pool.map(compressed, clips[start : start + at_once], chunksize=1)
            for i, (shape, dtype, content) in enumerate(some, start):
                batch = group.create_dataset(logits_file.batch_name(i), shape, dtype, chunks=shape, compression="gzip")
                batch.id.write_direct_chunk((0,) * len(shape), content)  # h5py would compress in one thread
    return path


def logits_of(job, status, num_clips, tensor, patiently):
    """What a finished job brought, float32 (num_clips, num_classes).

    Raises service.JobFailedError unless that is all.
    """
    import numpy as np
    from qai_hub.client import UserError

    page = service.page_of(job)
    if not status.success:
        raise service.JobFailedError(f"the inference job failed: {status.message or 'no reason given'}; see {page}")
    try:
        outputs = patiently(page, job.download_output_data)
    except UserError as e:  # they expire, too
        raise service.JobFailedError(f"the inference job's outputs cannot be had: {e}; see {page}") from None
    if not outputs:
        raise service.JobFailedError(f"the inference job succeeded but brought no outputs; see {page}")
    arrays = outputs.get(tensor["name"]) or next(iter(outputs.values()))
    sizes = {array.size for array in arrays}
    wanted = {int(np.prod(tensor["shape"]))} if tensor["shape"] else sizes
    if len(arrays) != num_clips or sizes != wanted or len(sizes) != 1:
        raise service.JobFailedError(
            f"the inference job brought {len(arrays)} outputs of {sorted(sizes)} values for {num_clips} clips, "
            f"{num_clips} of {sorted(wanted)} were expected; see {page}"
        )
    try:
        return np.concatenate([model_io.as_logits(array, tensor).reshape(1, -1) for array in arrays])
    except ValueError as e:
        raise service.JobFailedError(f"{e}; see {page}") from None


def still_there(get, identifier, patiently):
    """What `get` of the hub returns for an id of an earlier run, or None: no id, unknown to this hub, or expired."""
    from qai_hub.client import UserError

    if not identifier:
        return None
    try:
        found = patiently(identifier, get, identifier)
    except UserError:
        found = None
    if found is None or getattr(found, "is_expired", bool)():
        print(f"AI Hub no longer has {identifier} of an earlier run, bringing it there again")
        return None
    return found


class Target(NamedTuple):
    """One model at AI Hub on one device, and the form of its jobs."""

    hub: Any  # the client's module
    model: Any  # qai_hub.Model
    device: Any  # qai_hub.Device
    io: dict  # what the model takes and gives, as model_io.io_of has it; a guess is corrected by the probe
    options: str  # of every inference job
    name: str  # of its jobs at AI Hub


class Clips(NamedTuple):
    """The clips that go through a model."""

    folder: str  # they lie in
    digests: dict  # {path of a clip in the folder: model_io.clip_digest of it}


class Inference:
    """Clips on their way through a Target. state: what survives a crash."""

    def __init__(self, target, clips, state, patiently):
        self.target, self.clips, self.state, self.patiently = target, clips, state, patiently

    def write(self, path, clips):
        return write_dataset(path, self.clips.folder, clips, self.clips.digests, self.target.io["input"])

    def upload(self, path, what):
        return self.patiently(what, self.target.hub.upload_dataset, str(path), name=what)

    def submit(self, dataset, what):
        # the client's own wait for a service that asks to slow down, of 10 minutes, is left to `patiently`
        hub, model, device, _, options, name = self.target
        return self.patiently(what, hub.submit_inference_job, model, device, dataset, profile=False, options=options,
                              name=f"{name} {what}", retry=False)  # fmt: skip

    # --- one clip -----------------------------------------------------------------------------------------------------

    def probe(self, clip, expected=None, layout_known=True):
        """Send one clip and check what comes back: what is wrong ends here, after one small job.

        expected: its logits, float32 (num_classes,), or None. layout_known: False if the target's io is but a guess; it
        is corrected by what the job tells, and the clip sent again. Raises service.JobFailedError; exits with code 2 if
        nothing tells the layout.
        """
        tensor = self.target.io["input"]
        job, status, told = self.send_one(clip)
        if told and self.contradicted(told):
            if layout_known:
                raise service.JobFailedError(
                    f"the device says that the model takes {told}, its description {model_io.describe(tensor)}; export "
                    f"the model again; see {service.page_of(job)}"
                )
            ((name, (shape, dtype)),) = told.items()
            tensor |= {"name": name, "shape": tuple(shape), "dtype": dtype}
            print(f"the probe says that the model takes {model_io.describe(tensor)}; it is sent so")
            job, status, _ = self.send_one(clip)
        elif not told and not layout_known:
            common.refuse(
                "nothing says in which layout the model takes its clips, and AI Hub does not tell either; set LAYOUT "
                "to NCTHW or NTHWC, or keep the .json that example_export.py writes beside a model"
            )
        logits = logits_of(job, status, 1, self.target.io["output"], self.patiently)[0]
        self.check_logits(clip, logits, expected, service.page_of(job))

    def send_one(self, clip):
        """(job, its status, what it says of the model's inputs {name: (shape, type)}) of a finished job on one clip."""
        with tempfile.TemporaryDirectory(prefix="upload-", dir=self.state.folder) as folder:
            dataset = self.upload(self.write(Path(folder, "probe.h5"), [clip]), "probe")
        job = self.submit(dataset, "probe")
        print(f"probe     1 clip, {service.page_of(job)}", flush=True)
        seconds = 0.2
        while not (status := self.patiently(service.page_of(job), job.get_status)).finished:
            time.sleep(seconds)
            seconds = min(10, 1.5 * seconds)
        # of some models known only now
        return job, status, self.patiently(service.page_of(job), self.target.hub.get_job, job.job_id).shapes

    def contradicted(self, told):
        """Whether a job's {name: (shape, dtype)} differ from what is known of the model's input; sizes and order."""
        tensor = self.target.io["input"]
        return {name: tuple(shape) for name, (shape, _) in told.items()} != {tensor["name"]: tuple(tensor["shape"])}

    @staticmethod
    def check_logits(clip, logits, expected, url):
        import numpy as np

        if not np.isfinite(logits).all():
            raise service.JobFailedError(f"the model gives logits that are no numbers for {clip}; see {url}")
        if expected is None:
            return
        if len(logits) != len(expected):
            raise service.JobFailedError(f"the model gives {len(logits)} logits instead of {len(expected)}; see {url}")
        largest = float(np.abs(expected).max())
        difference = float(np.abs(logits - expected).max())
        print(f"probe     its logits, at most {largest:.3g}, differ by {difference:.2g} from what they should be")
        if difference > 0.5 * largest:
            raise service.JobFailedError(
                f"the logits of {clip} are not those of the model that was exported (they differ by {difference:.2g}, "
                f"the largest is {largest:.3g}); export it again; see {url}"
            )

    # --- chunks -------------------------------------------------------------------------------------------------------

    def run(self, chunks, in_flight, attempts, retry_seconds):
        """Bring every chunk's logits into the state, `in_flight` at a time; returns {chunk number: why not}.

        A chunk whose job fails is tried `attempts` times, then left out; if none has succeeded by then, the run ends:
        raises service.JobFailedError, as for a service that stays away. A dataset is written while another is uploaded.
        """
        from tqdm import tqdm

        waiting = collections.deque(chunk for chunk in chunks if not self.state.has_logits(chunk.key))
        running, tries, failed, seconds = {}, collections.Counter(), {}, 0.2
        num_clips = sum(len(chunk.clips) for chunk in chunks)
        arrived = num_clips - sum(len(chunk.clips) for chunk in waiting)
        with (
            tempfile.TemporaryDirectory(prefix="upload-", dir=self.state.folder) as folder,
            ThreadPoolExecutor(1) as writer,
            tqdm(total=num_clips, initial=arrived, unit="clip", desc="inference") as bar,
        ):
            written = Written(self, folder, writer)
            while waiting or running:
                while waiting and len(running) < in_flight:
                    chunk = waiting.popleft()
                    running[chunk.number] = chunk, self.start(chunk, waiting, written)
                    seconds = 0.2
                for chunk, job in list(running.values()):
                    status = self.patiently(f"chunk {chunk.number}, {service.page_of(job)}", job.get_status)
                    if not status.finished:
                        continue
                    del running[chunk.number]
                    try:
                        logits = logits_of(job, status, len(chunk.clips), self.target.io["output"], self.patiently)
                        self.state.save_logits(chunk.key, logits)
                        bar.update(len(chunk.clips))
                        continue
                    except service.JobFailedError as e:
                        reason = str(e)
                    self.state.update(chunk.key, job="")
                    tries[chunk.key] += 1
                    if tries[chunk.key] < attempts:
                        bar.write(f"chunk {chunk.number}: {reason}; try {tries[chunk.key] + 1} of {attempts}")
                        waiting.appendleft(chunk)  # before others are uploaded to fail alike
                        time.sleep(retry_seconds)
                    elif bar.n == 0:
                        raise service.JobFailedError(
                            f"chunk {chunk.number} failed {attempts} times, none has succeeded: {reason}"
                        )
                    else:
                        failed[chunk.number] = reason
                if running:
                    time.sleep(seconds)
                    seconds = min(10, 1.5 * seconds)
        return failed

    def start(self, chunk, waiting, written):
        """The inference job of a chunk: submitted by an earlier run and known to the hub, or submitted now."""
        from tqdm import tqdm

        known = self.state.read(chunk.key)
        if job := still_there(self.target.hub.get_job, known.get("job"), self.patiently):
            return job
        what = f"chunk {chunk.number}"
        dataset = still_there(self.target.hub.get_dataset, known.get("dataset"), self.patiently)
        if not dataset:
            path = written.take(chunk)
            if waiting and not self.state.read(waiting[0].key).get("dataset"):
                written.begin(waiting[0])
            dataset = self.upload(path, what)
            path.unlink()
            self.state.update(chunk.key, dataset=dataset.dataset_id)
        job = self.submit(dataset, what)
        self.state.update(chunk.key, job=job.job_id)
        tqdm.write(f"{what}: {len(chunk.clips):,} clips, {service.page_of(job)}")
        return job


class Written:
    """Datasets written in a thread ahead of their upload: at most one, beside the one that is uploaded."""

    def __init__(self, inference, folder, writer):
        self.inference, self.folder, self.writer, self.futures = inference, folder, writer, {}

    def begin(self, chunk):
        if chunk.key not in self.futures:
            path = Path(self.folder, f"{chunk.number}.h5")
            self.futures[chunk.key] = self.writer.submit(self.inference.write, path, chunk.clips)

    def take(self, chunk):
        """The path of a chunk's dataset, written by now."""
        self.begin(chunk)
        return self.futures.pop(chunk.key).result()
