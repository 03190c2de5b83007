""".npy clips -> AI Hub inference jobs -> logits in one HDF5 file.

Reads the clips under `data_path` in the order of its manifest.jsonl, and a compiled model (DLC_PATH, with the
description that example_export.py writes beside it) or an ONNX file (ONNX_DIR) that is compiled first.
Writes OUTPUT_H5, complete or not at all, in AI Hub's own layout: data/0/batch_<i> float32 (1, num_classes) for clip i,
and beside it `tensor_paths`, whose row i names that clip.

Clips travel in chunks, several at a time. OUTPUT_H5.state/ remembers, for each model, set of clips and hub, what was
uploaded, submitted and received: after a crash the same command goes on where it stopped.

$ python tools/run_inference.py
$ python tools/local_hub.py python tools/run_inference.py       # without an account, emulated on this CPU
"""

import collections
import hashlib
import json
import shutil
import time
from pathlib import Path

import aihub
import common

# ----------------------------------------------------------------------------------------------------------------------
# --- Model source: choose one ---
DLC_PATH = "./export_assets/resnet_2plus1d.bin"  # A (recommended): compiled model of any runtime; "" for B
ONNX_DIR = ""                           # B: folder of an ONNX file that is compiled first; "" for A
VIDEO_ONNX_NAME = "model.onnx"          # its name in ONNX_DIR
DEVICE_NAME = "Dragonwing IQ-9075 EVK"  # name of a device of AI Hub (qai-hub list-devices)
# --- Data ---
data_path = "./preprocessed_tensors"    # OUT_ROOT of preprocess_and_save.py
OUTPUT_H5 = "dataset-export.h5"         # where the logits are written
# --- Input ---
BATCH, C, T, H, W = 1, 3, 16, 112, 112  # used only where the model does not say what it takes
IS_DLC_CHANNEL_LAST = False             # False = ask the model; True = insist on channel last, (1, T, 112, 112, 3)
# --- Quick debug mode ---
USE_SINGLE_TENSOR = False               # True to run only one clip
SINGLE_TENSOR_INDEX = 0                 # which one, counted in the manifest's order
# --- Transfer ---
MAX_CHUNK = 538                         # clips a dataset at most; fewer where they would not fit
MAX_CHUNK_BYTES = 2_000_000_000         # bytes a dataset at most, before compression; AI Hub's limit is 2 GiB
CHUNKS_IN_FLIGHT = 4                    # datasets that are uploaded or running at the same time
ATTEMPTS = 3                            # tries for a chunk whose job or transfer fails
RETRY_SECONDS = 10.0                    # s before the next try
# ----------------------------------------------------------------------------------------------------------------------


# --- what to run ------------------------------------------------------------------------------------------------------


def model_file():
    """The path of the model to run, by DLC_PATH or ONNX_DIR. Exits with code 2 unless just one is set and there."""
    if bool(DLC_PATH) == bool(ONNX_DIR):
        common.refuse('set one of DLC_PATH (a compiled model) and ONNX_DIR (a folder with model.onnx), the other to ""')
    path = Path(DLC_PATH) if DLC_PATH else Path(ONNX_DIR, VIDEO_ONNX_NAME)
    if not (path.is_file() or (DLC_PATH and path.is_dir() and path.suffix == ".onnx")):
        common.refuse(f"there is no model {path}; tools/example_export.py makes one")
    return path


def find_clips():
    """Paths of the clips relative to `data_path`: in the manifest's order or, without a manifest, sorted."""
    root = Path(data_path)
    if (root / "manifest.jsonl").is_file():
        clips = [row["tensor_path"] for row in common.read_manifest(root / "manifest.jsonl")]
    else:
        clips = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.npy"))
        print(f"no manifest.jsonl in {data_path}: its {len(clips):,} .npy files, sorted by path")
    if not clips:
        common.refuse(f"there are no clips in {data_path}; run tools/preprocess_and_save.py first")
    if USE_SINGLE_TENSOR:
        if not 0 <= SINGLE_TENSOR_INDEX < len(clips):
            common.refuse(f"SINGLE_TENSOR_INDEX is {SINGLE_TENSOR_INDEX}, but there are {len(clips):,} clips")
        clips = [clips[SINGLE_TENSOR_INDEX]]
        if clips_in_output() > 1:
            beside = Path(OUTPUT_H5).with_name(f"{Path(OUTPUT_H5).stem}-single.h5")
            common.refuse(f"{OUTPUT_H5} is a result of more clips than one; pass another, say --output-h5 {beside}")
    return clips


def clips_in_output():
    """How many clips OUTPUT_H5 holds predictions of, whoever wrote it; 0 if it is not there or damaged."""
    import h5py

    try:
        with h5py.File(OUTPUT_H5, "r") as file:
            return len(file["data/0"])
    except (OSError, KeyError):
        return 0


def key_of_run(content, described, device, clips):
    """A hash of all that decides the result, which chunk a readable clip is in, too; another key is another run.

    `content` is the hash of the model, with weights that lie in another file.
    """
    constants = (BATCH, C, T, H, W, IS_DLC_CHANNEL_LAST, MAX_CHUNK, MAX_CHUNK_BYTES)
    parts = [content, described, DEVICE_NAME, aihub.is_emulated(device), constants]
    for clip in clips:
        path = Path(data_path, clip)
        parts.append((clip, path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- what the model takes ---------------------------------------------------------------------------------------------


def read_description(path):
    """What is written beside a compiled model: resnet_2plus1d.json, or the bundle's metadata.json; {} without either.

    Returns "input" and "output" as aihub.io_of does, and `output_kind` and `classes`, as far as they are known.
    """
    own = path.with_suffix(".json")
    try:
        description = json.loads(own.read_text(encoding="utf-8"))
        sha256 = description["sha256"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{own} is not what example_export.py writes beside a model, it is ignored")
    else:
        if sha256 != common.sha256_of(path):
            common.refuse(f"{own} describes another file than {path}; export the model again")
        return description
    return aihub.io_of_bundle(path.parent, path.name) or {}


def float_io(name, shape):
    """The description of a model of which only the input is known: float32 `shape`."""
    floats = {"dtype": "float32", "scale": None, "zero_point": None}
    return {"input": {"name": name, "shape": shape, **floats}, "output": {"name": "", "shape": None, **floats}}


def from_constants():
    """What BATCH, C, T, H, W and IS_DLC_CHANNEL_LAST say, for a model that nothing describes."""
    shape = (BATCH, T, H, W, C) if IS_DLC_CHANNEL_LAST else (BATCH, C, T, H, W)
    print(f"nothing says what the model takes: float32 {shape}, as the constants have it")
    return float_io("video", shape)


def check_io(io):
    """Exit with code 2 where the model contradicts the constants or does not say how its integers are to be read."""
    if IS_DLC_CHANNEL_LAST and aihub.layout_of(io["input"]["shape"]) == "NCTHW":
        common.refuse(
            f"IS_DLC_CHANNEL_LAST is True, but the model takes channel first ({aihub.describe(io['input'])}); "
            f"False lets the model decide"
        )
    for tensor in (io["input"], io["output"]):
        aihub.check_scale(tensor)


def read_headers(clips):
    """The clips' files as far as they can be read: ({path: (shape, dtype)}, {path: why not}), in the clips' order."""
    import numpy as np

    headers, unreadable = {}, {}
    for clip in clips:
        try:
            header = np.load(Path(data_path, clip), mmap_mode="r")
            headers[clip] = (header.shape, header.dtype)
        except (OSError, ValueError, EOFError) as e:
            unreadable[clip] = str(e)
    if not headers:
        common.refuse(f"none of the {len(clips):,} clips in {data_path} can be read: {next(iter(unreadable.values()))}")
    return headers, unreadable


def check_fit(headers, tensor):
    """Exit with code 2 and one sentence if a clip has another shape than the model takes: it is not cut or padded."""
    shape = tuple(tensor["shape"])
    if aihub.layout_of(shape) == "NTHWC":
        shape = (shape[0], shape[4], *shape[1:4])
    others = [f"{clip} is {dtype} {own}" for clip, (own, dtype) in headers.items()
              if own != shape or dtype not in ("float32", "float16")]  # fmt: skip
    if others:
        common.refuse(
            f"{len(others):,} of {len(headers):,} clips do not fit the model, which takes float32 {shape}: "
            f"{'; '.join(others[:3])}{' …' if len(others) > 3 else ''}; preprocess with the model's CLIP_LEN"
        )


def size_of_chunk(tensor):
    """How many clips a dataset holds: at most MAX_CHUNK, and at most MAX_CHUNK_BYTES before compression."""
    import numpy as np

    clip_bytes = int(np.prod(tensor["shape"])) * np.dtype(tensor["dtype"]).itemsize
    return max(1, min(MAX_CHUNK, MAX_CHUNK_BYTES // clip_bytes))


# --- state: what survives a crash -------------------------------------------------------------------------------------


class State:
    """OUTPUT_H5.state/<key>/: state.json with the hub's ids, chunk_<i>.npy, float32 (clips, classes), once it arrived.

    A folder a key, so that a run leaves alone what another one has paid for.
    """

    def __init__(self, key):
        self.folder = Path(f"{OUTPUT_H5}.state", key[:16])
        self.folder.mkdir(parents=True, exist_ok=True)
        if others := len(list(self.folder.parent.iterdir())) - 1:
            print(f"{self.folder.parent} also keeps {others} unfinished for another model, other clips or another hub")
        try:
            self.content = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.content = {"model": "", "io": None, "chunks": {}}

    def remove(self):
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def save(self):
        with common.written_then_renamed(self.folder / "state.json") as temporary:
            temporary.write_text(json.dumps(self.content), encoding="utf-8")

    def chunk(self, i):
        """{"dataset": id or "", "job": id or ""} of a chunk, to be changed and saved."""
        return self.content["chunks"].setdefault(str(i), {"dataset": "", "job": ""})

    def part(self, i):
        return self.folder / f"chunk_{i:05d}.npy"


# --- running ----------------------------------------------------------------------------------------------------------


def still_there(get, identifier):
    """What `get` of the hub returns for an id of an earlier run, or None: no id, unknown to this hub, or expired."""
    from qai_hub.client import UserError

    if not identifier:
        return None
    try:
        found = get(identifier)
    except UserError:
        found = None
    if found is None or getattr(found, "is_expired", bool)():
        print(f"AI Hub no longer has {identifier} of an earlier run, bringing it there again")
        return None
    return found


def model_on_hub(hub, path, onnx_model, described, device, state):
    """The hub's model and what it takes: the one that an earlier run uploaded or compiled, or a new one."""
    if model := still_there(hub.get_model, state.content["model"]):
        return model, state.content["io"]
    if onnx_model:
        specs = {described["input"]["name"]: (described["input"]["shape"], "float32")}
        model, io = aihub.compile_onnx(hub, onnx_model, specs, device)
        io = io or described
    else:
        print(f"uploading {path}")
        model = hub.upload_model(str(path))
        io = described
        if "input" not in io:
            io = io | (aihub.io_of(hub.get_model(model.model_id)) or from_constants())
    state.content |= {"model": model.model_id, "io": io}
    state.save()
    return model, io


def write_chunk(path, clips, tensor):
    """Write clips to an HDF5 file as the client would, one in memory at a time, in the form that the model takes."""
    import h5py
    import numpy as np

    with h5py.File(path, "w") as file:
        for i, clip in enumerate(clips):
            values = np.load(Path(data_path, clip)).astype(np.float32)
            if not (values.min() >= -0.01 and values.max() <= 1.01):
                common.refuse(
                    f"the clip {clip} has values from {values.min():.3g} to {values.max():.3g} instead of [0, 1]: "
                    f"normalisation is inside the model; run tools/preprocess_and_save.py again"
                )
            array = aihub.as_model_input(values, tensor)
            file.create_dataset(f"data/0/batch_{i}", data=array, compression="gzip", compression_opts=1)
        file["data/0"].attrs.update({"name": tensor["name"], "order": 0, "batch_count": len(clips)})


def dataset_of_chunk(hub, i, clips, tensor, state):
    """The hub's dataset of a chunk: uploaded by an earlier run and still there, or uploaded now."""
    if dataset := still_there(hub.get_dataset, state.chunk(i)["dataset"]):
        return dataset
    path = state.folder / "upload.h5"
    try:
        write_chunk(path, clips, tensor)
        dataset = hub.upload_dataset(str(path), name=f"chunk {i}")
    finally:
        path.unlink(missing_ok=True)
    state.chunk(i)["dataset"] = dataset.dataset_id
    state.save()
    return dataset


def job_of_chunk(hub, model, device, i, clips, tensor, state):
    """The inference job of a chunk: submitted by an earlier run and known to the hub, or submitted now."""
    if job := still_there(hub.get_job, state.chunk(i)["job"]):
        return job
    dataset = dataset_of_chunk(hub, i, clips, tensor, state)
    job = hub.submit_inference_job(model, device, dataset, profile=False, name=f"{Path(OUTPUT_H5).stem} chunk {i}")
    state.chunk(i)["job"] = job.job_id
    state.save()
    print(f"chunk {i}: {len(clips):,} clips, {job.url}", flush=True)
    return job


def logits_of(job, num_clips, tensor):
    """What a finished job brought, float32 (num_clips, num_classes). Raises JobFailedError unless that is all."""
    import numpy as np
    from qai_hub.client import UserError

    status = job.get_status()
    if not status.success:
        raise aihub.JobFailedError(f"the inference job failed: {status.message or 'no reason given'}; see {job.url}")
    try:
        outputs = job.download_output_data()
    except UserError as e:  # they expire, too
        raise aihub.JobFailedError(f"the inference job's outputs cannot be had: {e}; see {job.url}") from None
    if not outputs:
        raise aihub.JobFailedError(f"the inference job succeeded but brought no outputs; see {job.url}")
    arrays = outputs.get(tensor["name"]) or next(iter(outputs.values()))
    shapes = {array.shape for array in arrays}
    wanted = {tuple(tensor["shape"])} if tensor["shape"] else shapes
    if len(arrays) != num_clips or shapes != wanted or len(shapes) != 1:
        raise aihub.JobFailedError(
            f"the inference job brought {len(arrays)} outputs of shape {sorted(shapes)} for {num_clips} clips, "
            f"{num_clips} of {sorted(wanted)} were expected; see {job.url}"
        )
    try:
        return np.concatenate([aihub.as_logits(array, tensor).reshape(1, -1) for array in arrays])
    except ValueError as e:
        raise aihub.JobFailedError(f"{e}; see {job.url}") from None


def run_chunks(hub, model, device, io, chunks, state):
    """Bring every chunk's logits to state.part(i), several in flight; returns {chunk: why it could not be had}.

    A chunk whose job fails is tried ATTEMPTS times and then left out. When the service itself keeps failing, the run
    stops: raises aihub.JobFailedError.
    """
    import numpy as np
    from tqdm import tqdm

    errors = aihub.hub_errors()
    waiting = collections.deque(i for i in range(len(chunks)) if not state.part(i).exists())
    running, attempts, failed, seconds = {}, collections.Counter(), {}, 0.2

    def failure(i, error, url=""):
        attempts[i] += 1
        reason = aihub.sentence_of(error)
        if attempts[i] < ATTEMPTS:
            bar.write(f"chunk {i}: {reason}; try {attempts[i] + 1} of {ATTEMPTS} in {RETRY_SECONDS:g} s")
            waiting.append(i)
            time.sleep(RETRY_SECONDS)
        elif isinstance(error, aihub.JobFailedError):
            failed[i] = reason
        else:
            what = f"chunk {i}: AI Hub: {reason.rstrip('.')}" + (f"; see {url}" if url else "")
            kept = f"what has arrived is kept in {state.folder}, run the same command again"
            raise aihub.JobFailedError(f"{what}; {kept}")

    num_clips = sum(map(len, chunks))
    arrived = num_clips - sum(len(chunks[i]) for i in waiting)
    with tqdm(total=num_clips, initial=arrived, unit="clip", desc="inference") as bar:
        while waiting or running:
            while waiting and len(running) < CHUNKS_IN_FLIGHT:
                i = waiting.popleft()
                try:
                    running[i] = job_of_chunk(hub, model, device, i, chunks[i], io["input"], state)
                    seconds = 0.2
                except errors as e:
                    failure(i, e)
            for i, job in list(running.items()):
                try:
                    if not job.get_status().finished:
                        continue
                    logits = logits_of(job, len(chunks[i]), io["output"])
                    with common.written_then_renamed(state.part(i)) as temporary, open(temporary, "wb") as file:
                        np.save(file, logits)
                    bar.update(len(chunks[i]))
                except aihub.JobFailedError as e:
                    state.chunk(i)["job"] = ""
                    state.save()
                    failure(i, e)
                except errors as e:
                    failure(i, e, job.url)
                del running[i]
            if running:
                time.sleep(seconds)
                seconds = min(10, 1.5 * seconds)
    return failed


def write_h5(clips, logits, io, attributes):
    """Write OUTPUT_H5: AI Hub's data/0/batch_<i>, `tensor_paths`, and attributes that say where they come from."""
    import h5py

    with common.written_then_renamed(OUTPUT_H5) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("data/0")
        for i, row in enumerate(logits):
            group.create_dataset(f"batch_{i}", data=row[None])  # 368 bytes: gzip would make it 2.5 KB
        group.attrs.update({"name": io["output"]["name"] or "output_0", "order": 0, "batch_count": len(logits)})
        file.create_dataset("tensor_paths", data=clips, dtype=h5py.string_dtype())
        file.attrs.update(attributes)


def is_complete(key, num_clips):
    """Whether OUTPUT_H5 is there already, with each of `num_clips` clips, and comes from this run."""
    import h5py

    try:
        with h5py.File(OUTPUT_H5, "r") as file:
            return file.attrs.get("run") == key and len(file["tensor_paths"]) == num_clips
    except (OSError, KeyError):
        return False


def main():
    common.set_constants_from_flags(globals())
    import numpy as np

    model_path, clips = model_file(), find_clips()
    headers, unreadable = read_headers(clips)
    if DLC_PATH:
        onnx_model, content, described = None, common.sha256_of(model_path), read_description(model_path)
    else:
        onnx_model, specs = aihub.load_onnx(model_path, (BATCH, C, T, H, W))
        content = hashlib.sha256(onnx_model.SerializeToString()).hexdigest()
        described = next(float_io(name, shape) for name, (shape, _) in specs.items())
    if "input" in described:  # refuse what does not fit before anything is uploaded
        check_io(described)
        check_fit(headers, described["input"])
    hub = aihub.connect_to_hub()
    with aihub.hub_errors_in_one_sentence():
        device = aihub.find_device(hub, DEVICE_NAME)
        device_name = DEVICE_NAME + (" (emulated on a CPU)" if aihub.is_emulated(device) else "")
        key = key_of_run(content, described, device, headers)
        if is_complete(key, len(clips)):
            print(f"{OUTPUT_H5} is complete for this model and these clips; delete it to run them again")
            return
        state = State(key)
        model, io = model_on_hub(hub, model_path, onnx_model, described, device, state)
        check_io(io)
        check_fit(headers, io["input"])
        good, size = list(headers), size_of_chunk(io["input"])
        chunks = [good[i : i + size] for i in range(0, len(good), size)]
        print(f"model     {model_path} on {device_name}")
        print(f"input     {aihub.describe(io['input'])}")
        print(f"clips     {len(good):,} in {len(chunks):,} chunks of at most {size}")
        failed = run_chunks(hub, model, device, io, chunks, state)
    for clip, reason in unreadable.items():
        print(f"left out {clip}: {reason}")
    if failed:
        for i, reason in sorted(failed.items()):
            print(f"chunk {i} failed {ATTEMPTS} times ({len(chunks[i]):,} clips from {chunks[i][0]}): {reason}")
        print(f"{OUTPUT_H5} is not written: {len(failed)} of {len(chunks)} chunks are missing. The others are kept, "
              f"run the same command again")  # fmt: skip
        raise SystemExit(1)
    logits = np.concatenate([np.load(state.part(i)) for i in range(len(chunks))])
    attributes = {
        "model": model_path.name,
        "model_path": str(model_path.resolve()),
        "model_sha256": common.sha256_of(model_path),
        "device": device_name,
        "job_ids": json.dumps([state.chunk(i)["job"] for i in range(len(chunks))]),
        "run": key,
    }
    if "output_kind" in io:
        attributes["output_kind"] = io["output_kind"]
    if io.get("classes"):
        attributes["classes"] = json.dumps(io["classes"])
    write_h5(good, logits, io, attributes)
    state.remove()
    print(f"wrote {OUTPUT_H5}: {len(good):,} clips, {logits.shape[1]} {io.get('output_kind', 'scores')} each"
          + (f"; {len(unreadable):,} clips left out" if unreadable else ""))  # fmt: skip
    known = common.load_class_map(common.REPO / "class_map.json")
    class_map = "class_map.json" if io.get("classes", []) in ([], sorted(known, key=known.get)) else "YOUR_CLASS_MAP"
    print(f"next: python tools/evaluate.py --h5 {OUTPUT_H5} --manifest {Path(data_path, 'manifest.jsonl')} "
          f"--class_map {class_map}")  # fmt: skip
    if unreadable:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
