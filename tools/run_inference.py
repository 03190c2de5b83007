""".npy clips -> AI Hub inference jobs -> logits in one HDF5 file.

Reads the clips under `data_path` in the order of its manifest.jsonl, and a compiled model (DLC_PATH, with the
description that example_export.py writes beside it) or an ONNX file (ONNX_DIR) that is compiled first. Tensors that
were made otherwise than the model's clips are refused.
Writes OUTPUT_H5, complete or not at all, in AI Hub's own layout: data/0/batch_<i> float32 (1, num_classes) for clip i,
and beside it `tensor_paths`, whose row i names that clip.

First one clip goes through the model, then chunks of clips, several at a time. OUTPUT_H5.state/ remembers, chunk by
chunk, what was uploaded, submitted and received: the same command goes on where it stopped, and runs again only chunks
whose clips or model have changed.

$ python tools/run_inference.py
$ python tools/local_hub.py python tools/run_inference.py       # without an account, emulated on this CPU
"""

import contextlib
import errno
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import flags

from aihub import description, logits_file, model_io, onnx_graphs, own_onnx, service, tensors
from aihub.jobs import Clips, Inference, Patience, Target, still_there
from aihub.state import State, chunks_of, keep_aside, key_of, logits_of_row, read_result, take_over, write_result

# ----------------------------------------------------------------------------------------------------------------------
# --- Model source: choose one ---
DLC_PATH = "./export_assets/resnet_2plus1d.bin"  # A (recommended): compiled model of any runtime; "" for B
ONNX_DIR = ""                           # B: folder of an ONNX file that is compiled first; "" for A
VIDEO_ONNX_NAME = "model.onnx"          # its name in ONNX_DIR
LOCAL = False                           # True = run A on this machine's Qualcomm NPU or, without one, in its emulator
PRECISION = "float"                     # of B: float, w8a8 or w8a16
CALIBRATION_DIR = "./calibration_tensors"  # of B: clips of training videos, which w8a8 and w8a16 are calibrated with
NUM_CALIBRATION_CLIPS = 100             # how many of them, as many of each class
SHARE = []                              # of B: e-mail addresses that shall see the jobs that compile it
DEVICE_NAME = "Dragonwing IQ-9075 EVK"  # name of a device of AI Hub (qai-hub list-devices)
# --- Data ---
data_path = "./preprocessed_tensors"    # OUT_ROOT of preprocess_and_save.py
OUTPUT_H5 = "dataset-export.h5"         # where the logits are written
# --- Input ---
BATCH, C, T, H, W = 1, 3, 16, 112, 112  # used only where the model does not say what it takes
IS_DLC_CHANNEL_LAST = False             # False = ask the model; True = insist on channel last, (1, T, 112, 112, 3)
LAYOUT = ""                             # NCTHW or NTHWC, for a compiled model of which nothing says what it takes
# --- Quick debug mode ---
USE_SINGLE_TENSOR = False               # True to run only one clip
SINGLE_TENSOR_INDEX = 0                 # which one, counted in the manifest's order
# --- Transfer ---
MAX_CHUNK = 538                         # clips a dataset at most; fewer where they would not fit
MAX_CHUNK_BYTES = 2_000_000_000         # bytes a dataset at most, before compression; AI Hub's limit is 2 GiB
CHUNKS_IN_FLIGHT = 4                    # datasets that are uploaded or running at the same time
ATTEMPTS = 3                            # tries for a chunk whose job fails
RETRY_SECONDS = 10.0                    # s before the next try; doubled each time that AI Hub does not answer
PATIENCE_SECONDS = 3600.0               # s that AI Hub may stay away before the run ends; what has arrived is kept
ALLOW_PARTIAL = False                   # True = write OUTPUT_H5 also where chunks are missing, and list them
INFERENCE_OPTIONS = ""                  # more options of AI Hub's inference jobs, say "--qairt_version 2.50"
# ----------------------------------------------------------------------------------------------------------------------


# --- what to run ------------------------------------------------------------------------------------------------------


def model_file():
    """The path of the model to run, by DLC_PATH or ONNX_DIR. Exits with code 2 unless just one is set and there."""
    if bool(DLC_PATH) == bool(ONNX_DIR):
        common.refuse('set one of DLC_PATH (a compiled model) and ONNX_DIR (a folder with model.onnx), the other to ""')
    path = Path(DLC_PATH) if DLC_PATH else Path(ONNX_DIR, VIDEO_ONNX_NAME)
    if not (path.is_file() or (DLC_PATH and path.is_dir() and path.suffix == ".onnx")):
        common.refuse(f"there is no model {path} (looked in {path.absolute()}); tools/example_export.py makes one")
    return path


def wanted_of_onnx():
    """What is made of the ONNX file of ONNX_DIR. Exits with code 2 where that is asked of a compiled model."""
    if DLC_PATH and (PRECISION != "float" or SHARE):
        common.refuse(
            f"{DLC_PATH} is compiled already: its precision and who sees its jobs are tools/example_export.py's "
            f"--precision and --share"
        )
    return own_onnx.Wanted(PRECISION, CALIBRATION_DIR, NUM_CALIBRATION_CLIPS, tuple(SHARE))


def find_clips():
    """Paths of the clips relative to `data_path`: in the manifest's order or, without a manifest, sorted."""
    root = Path(data_path)
    if (root / "manifest.jsonl").is_file():
        clips = [row["tensor_path"] for row in common.read_manifest(root / "manifest.jsonl")]
    else:
        clips = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.npy"))
        print(f"no manifest.jsonl in {data_path}: its {len(clips):,} .npy files, sorted by path")
    if not clips:
        common.refuse(
            f"there are no clips in {data_path} (looked in {root.absolute()}); run tools/preprocess_and_save.py first"
        )
    for clip in clips:
        try:
            clip.encode()
        except UnicodeEncodeError:
            common.refuse(f"the file name {clip!r} in {data_path} is not UTF-8, which OUTPUT_H5 needs; rename it")
    if USE_SINGLE_TENSOR:
        if not 0 <= SINGLE_TENSOR_INDEX < len(clips):
            common.refuse(f"SINGLE_TENSOR_INDEX is {SINGLE_TENSOR_INDEX}, but there are {len(clips):,} clips")
        clips = [clips[SINGLE_TENSOR_INDEX]]
        if read_result(OUTPUT_H5).get("number", 0) > 1:
            beside = Path(OUTPUT_H5).with_name(f"{Path(OUTPUT_H5).stem}-single.h5")
            common.refuse(f"{OUTPUT_H5} is a result of more clips than one; pass another, say --output-h5 {beside}")
    return clips


@contextlib.contextmanager
def only_run():
    """Hold the lock on OUTPUT_H5. Exits with code 2 if another run holds it, or if it cannot be written."""
    try:
        with common.only_writer(OUTPUT_H5, "--output-h5"):
            yield
    except OSError as e:
        if e.errno == errno.ENOSPC or "No space left" in str(e):
            common.refuse(f"no space is left for {Path(OUTPUT_H5).absolute()} and its .state; what arrived is kept")
        raise


# --- without AI Hub ---------------------------------------------------------------------------------------------------


def run_here(path, clips):
    """Run a binary that is made for a Qualcomm chip on this machine: never on its CPU. Exit code 1 if clips fail."""
    from qualcomm import binary_runs, clip_runs, compiler

    if (binary := binary_runs.binary_at(path)) is None:
        common.refuse(
            f"{path} is not made for a Qualcomm chip: --local runs a binary of tools/compile_offline.py, or an ONNX "
            f"file that names one; for others: python tools/local_hub.py python tools/run_inference.py"
        )
    check_clips_of_model(Source(path, None, "", binary.description))
    compiler.install(common.REPO / ".qnn")
    good, bad = State(OUTPUT_H5).examine(data_path, clips)
    tensors.check_fit(good, binary.description["input"])
    rows = [{"tensor_path": clip} for clip in good]
    try:
        outputs = clip_runs.outputs_of(binary, data_path, rows, OUTPUT_H5, common.REPO / ".qnn")
    except compiler.CompilerError as e:
        common.refuse(f"{path} cannot be run here: {e}")
    broken = clip_runs.write_h5(OUTPUT_H5, rows, outputs, binary)
    for clip, reason in bad.items():
        print(f"left out {clip}: {reason}")
    lacking = {"left out": len(bad), "of them without numbers": broken}
    end(f"{len(good):,} clips", lacking, binary.description.get("classes"))


# --- what the model takes ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """The model to run, as it lies on disk."""

    path: Path
    onnx_model: Any  # an onnx.ModelProto that is compiled first, or None
    sha256: str  # of the content, weights in another file included
    described: dict  # "input" and "output" as model_io.io_of has them, and more that example_export.py writes beside it


def read_source(path):
    """The Source in a file, of DLC_PATH or ONNX_DIR."""
    if DLC_PATH:
        sha256 = common.sha256_of(path)
        return Source(path, None, sha256, description.read_description(path, sha256))
    onnx_model, specs = onnx_graphs.load_onnx(path, (BATCH, C, T, H, W))
    ((name, (shape, _)),) = specs.items()
    sha256 = hashlib.sha256(onnx_model.SerializeToString()).hexdigest()
    kind = {"output_kind": onnx_graphs.output_kind(onnx_model.graph)}
    return Source(path, onnx_model, sha256, float_io(name, shape) | kind)


def float_io(name, shape):
    """The description of a model of which only the input is known: float32 `shape`."""
    floats = {"dtype": "float32", "scale": None, "zero_point": None}
    return {"input": {"name": name, "shape": shape, **floats}, "output": {"name": "", "shape": None, **floats}}


def wanted_layout():
    """The layout that the constants insist on, or "" to let the model decide."""
    return "NTHWC" if IS_DLC_CHANNEL_LAST else LAYOUT


def check_io(io):
    """Exit with code 2 where the model contradicts the constants or does not say how its outputs are to be read."""
    if wanted_layout() not in ("", model_io.layout_of(io["input"]["shape"])):
        common.refuse(
            f"IS_DLC_CHANNEL_LAST is {IS_DLC_CHANNEL_LAST} and LAYOUT {LAYOUT!r}, but the model takes "
            f"{model_io.describe(io['input'])}; False and '' let the model decide"
        )
    own = dict(zip(("BATCH", "C", "T", "H", "W"), model_io.ncthw(io["input"]["shape"])))
    for name in asked & own.keys():
        if globals()[name] != own[name]:
            common.refuse(f"{name} is {globals()[name]}, but the model takes {model_io.describe(io['input'])}")
    model_io.check_scale(io["output"])


# --- AI Hub -----------------------------------------------------------------------------------------------------------


def known_io(source, record, result):
    """What the model takes and gives as far as it is known without AI Hub, or None."""
    if "input" in source.described and not source.onnx_model:
        return {key: source.described[key] for key in ("input", "output")}
    if record.get("io"):
        return record["io"]
    earlier = result["attributes"] if result else {}
    io = json.loads(earlier["io"]) if "io" in earlier and earlier["model_sha256"] == source.sha256 else None
    return io if io and wanted_layout() in ("", model_io.layout_of(io["input"]["shape"])) else None


def model_on_hub(hub, source, device, record, patiently):
    """(hub's model, what the hub says that it takes and gives or None).

    The model is that of an earlier run, that of the jobs which made the binary, or compiled or uploaded now.
    """
    if model := still_there(hub.get_model, record.get("model"), patiently):
        return model, model_io.io_of(model)
    if source.onnx_model:
        tensor = source.described["input"]
        specs = {tensor["name"]: (tensor["shape"], "float32")}
        return own_onnx.compile_onnx(hub, source.onnx_model, specs, device, wanted_of_onnx())
    if model := service.target_model_of(hub, source.described):
        job = source.described.get("link_job") or source.described["compile_job"]
        print(f"{source.path} was made by {job}: it is not uploaded again")
    else:
        print(f"uploading {source.path}")
        model = patiently(str(source.path), hub.upload_model, str(source.path))
    return model, model_io.io_of(hub.get_model(model.model_id))


def expected_logits(source, good, result):
    """(clip, its logits) to compare one clip's with: torch's, of the export, or an earlier run's; (None, None) without.

    The logits of an earlier run count only if the same model gave them.
    """
    import numpy as np

    exported = source.described.get("probe") or {}
    for clip, examined in good.items():
        if examined.digest == exported.get("digest"):
            return clip, np.float32(exported["logits"])
    if result and result["attributes"].get("model_sha256") == source.sha256:
        for row, clip in enumerate(result["clips"]):
            if clip in good:
                return clip, logits_of_row(OUTPUT_H5, row)
    return None, None


asked = set()  # names of the constants that flags set


def main():
    asked.update(flags.set_constants_from_flags(globals()))
    if LAYOUT not in ("", *model_io.LAYOUTS):
        possible = ", ".join(model_io.LAYOUTS)
        common.refuse(f"LAYOUT is {LAYOUT!r}, possible are {possible} and, for what the model says, nothing")
    path = model_file()
    own_onnx.check_wanted(wanted_of_onnx())
    clips = find_clips()
    if LOCAL:
        with only_run():
            run_here(path, clips)
        return
    with only_run(), service.hub_errors_in_one_sentence():
        bring_logits(read_source(path), clips)


@dataclass
class Run:
    """What is known while the lock on OUTPUT_H5 is held."""

    source: Source
    device: Any  # qai_hub.Device
    good: dict  # {clip: tensors.Examined}
    bad: dict  # {clip: why it is left out}
    result: dict  # of an earlier run, as read_result has it
    state: State
    attributes: dict  # of OUTPUT_H5: what the logits are of

    @property
    def model_key(self):
        """What the state calls the model by."""
        return key_of(self.source.sha256, self.attributes["device"], wanted_layout(), PRECISION)


def make_chunks(clips, run, io):
    """The chunks of the clips, as large as the constants allow for a model that takes and gives `io`."""
    size = max(1, min(MAX_CHUNK, MAX_CHUNK_BYTES // model_io.bytes_of_clip(io["input"])))
    model = [run.attributes["model_sha256"], run.attributes["device"], io["input"], io["output"]]
    return chunks_of(clips, run.good, size, model)


def attributes_of(source, device):
    """What OUTPUT_H5 says of its logits, as far as it decides about them."""
    described = source.described
    attributes = {"model": source.path.name, "model_sha256": source.sha256}
    attributes["device"] = DEVICE_NAME + (" (emulated on a CPU)" if service.is_emulated(device) else "")
    if "output_kind" in described:
        attributes["output_kind"] = described["output_kind"]
    if source.onnx_model and PRECISION != "float":
        attributes["precision"] = PRECISION
    return attributes | {key: json.dumps(described[key]) for key in ("classes", "clip") if described.get(key)}


def check_clips_of_model(source):
    """Exit with code 2 and one sentence if the clips in data_path were made otherwise than those of the model.

    By its description; says it where the model is older than its checkpoint.
    """
    described = source.described
    if "input" in described:
        check_io(described)
    description.check_age(described, source.path)
    if described.get("clip"):
        shape = model_io.ncthw(described["input"]["shape"]) if "input" in described else (BATCH, C, T, H, W)
        tensors.check_tensors(data_path, source.path, description.clip_of_model(described, source.path, shape))


def bring_logits(source, clips):
    """All that is done while the lock on OUTPUT_H5 is held."""
    described = source.described
    check_clips_of_model(source)
    hub = service.connect_to_hub()
    device = service.find_device(hub, DEVICE_NAME)
    onnx_graphs.check_hub_binary(source.path, device)
    state, result = State(OUTPUT_H5), read_result(OUTPUT_H5)
    good, bad = state.examine(data_path, clips, result.get("examined", {}))
    if "input" in described:
        tensors.check_fit(good, described["input"])
    run = Run(source, device, good, bad, result, state, attributes_of(source, device))
    io = known_io(source, state.read(run.model_key), result)
    chunks, failed = [], {}
    if io:
        chunks = make_chunks(clips, run, io)
        if not bad and is_complete(result, chunks, run.attributes):
            state.remove([])
            print(f"{OUTPUT_H5} is complete for this model and these clips; delete it to run them again")
            return
        take_over(OUTPUT_H5, result, chunks, state)
    if not chunks or not all(state.has_logits(chunk.key) for chunk in chunks):
        inference = prepare_inference(hub, run, io)
        io, chunks = inference.target.io, make_chunks(clips, run, inference.target.io)
        failed = infer(inference, chunks, state)
    finish(run, chunks, failed, io)


def prepare_inference(hub, run, io):
    """Bring the model to AI Hub and one clip through it, unless an earlier run has; returns its Inference."""
    source, state = run.source, run.state
    patiently, record = Patience(RETRY_SECONDS, PATIENCE_SECONDS), state.read(run.model_key)
    model, hub_io = model_on_hub(hub, source, run.device, record, patiently)
    state.update(run.model_key, model=model.model_id)
    io = io or hub_io or (source.described if source.onnx_model and PRECISION == "float" else None)
    layout_known = bool(io or wanted_layout())
    io = io or float_io("video", model_io.shape_in(wanted_layout() or model_io.OURS, (BATCH, C, T, H, W)))
    check_io(io)
    tensors.check_fit(run.good, io["input"])
    print(f"model     {source.path} on {run.attributes['device']}")
    print(f"input     {model_io.describe(io['input'])}{'' if layout_known else ', a guess'}")
    options = service.job_options(
        source.described.get("qairt_version") or service.qairt_version_of(model), INFERENCE_OPTIONS
    )
    target = Target(hub, model, run.device, io, options, Path(OUTPUT_H5).stem)
    clips = Clips(data_path, {clip: examined.digest for clip, examined in run.good.items()})
    inference = Inference(target, clips, state, patiently)
    if not record.get("io") and len(run.good) > 1:
        clip, expected = expected_logits(source, run.good, run.result)
        inference.probe(clip or next(iter(run.good)), expected, layout_known)
        state.update(run.model_key, io=io)
    return inference


def infer(inference, chunks, state):
    """Bring the chunks' logits into the state; returns {chunk number: why not}."""
    largest = max(len(chunk.clips) for chunk in chunks)
    # two datasets lie there, before they are compressed
    needed = 2 * largest * model_io.bytes_of_clip(inference.target.io["input"])
    common.check_space(state.folder, needed, f"make room or lower --max-chunk-bytes (now {MAX_CHUNK_BYTES:,})")
    print(f"clips     {sum(len(chunk.clips) for chunk in chunks):,} in {len(chunks):,} chunks of at most {largest}")
    try:
        return inference.run(chunks, CHUNKS_IN_FLIGHT, ATTEMPTS, RETRY_SECONDS)
    except (service.JobFailedError, *service.hub_errors()) as e:
        reason = service.sentence_of(e).rstrip(".")
        raise service.JobFailedError(
            f"{reason}; what has arrived is kept in {state.folder}, run the same command again"
        ) from e


def is_complete(result, chunks, attributes):
    """Whether OUTPUT_H5 is there already, with each of the chunks, and says the same of them."""
    if not result or result["chunks"] != [(chunk.key, len(chunk.clips)) for chunk in chunks]:
        return False
    return attributes.items() <= result["attributes"].items()


def finish(run, chunks, failed, io):
    """Write OUTPUT_H5 and say what is not in it; exit code 1 if something is not."""
    for clip, reason in run.bad.items():
        print(f"left out {clip}: {reason}")
    by_number = {chunk.number: chunk for chunk in chunks}
    for number, reason in sorted(failed.items()):
        clips = by_number[number].clips
        print(f"chunk {number} failed {ATTEMPTS} times ({len(clips):,} clips from {clips[0]}): {reason}")
    if failed and not ALLOW_PARTIAL:
        print(f"{OUTPUT_H5} is not written: {len(failed)} of {len(chunks)} chunks are missing. The others are kept, "
              f"run the same command again; --allow-partial writes what there is")  # fmt: skip
        raise SystemExit(1)
    there = [chunk for chunk in chunks if chunk.number not in failed]
    if run.result:
        keep_aside(Path(OUTPUT_H5), run.result, there, run.source.sha256)
    jobs = [run.state.read(chunk.key).get("job", "") for chunk in there]
    # evaluate.py looks whether model_path still holds this model
    source, state = run.source, run.state
    attributes = run.attributes | {"model_path": str(source.path.resolve())}
    attributes |= {"job_ids": json.dumps(jobs), "io": json.dumps(io)}
    name = io["output"]["name"] or "output_0"
    num_clips, num_classes = sum(len(chunk.clips) for chunk in there), state.logits(there[0].key).shape[1]
    broken = write_result(OUTPUT_H5, there, state, name, attributes)
    state.remove([run.model_key, *(chunk.key for chunk in there)])
    missing = sum(len(by_number[number].clips) for number in failed)
    written = f"{num_clips:,} clips, {num_classes} {attributes.get('output_kind', 'scores')} each"
    lacking = {"left out": len(run.bad), "of failed chunks missing": missing, "of them without numbers": broken}
    end(written, lacking, source.described.get("classes"))


def end(written, lacking, classes):
    """Say what OUTPUT_H5 holds, {why: number of clips} that it lacks, the next step; exit code 1 if it lacks any."""
    lacking = "".join(f"; {number:,} clips {why}" for why, number in lacking.items() if number)
    print(f"wrote {OUTPUT_H5}: {written}{lacking}")
    apart = {"report_dir": "./report_one"} if USE_SINGLE_TENSOR else {}  # the report of all clips stays
    print(f"next: {logits_file.evaluate_command(OUTPUT_H5, Path(data_path, 'manifest.jsonl'), classes, **apart)}")
    if lacking:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
