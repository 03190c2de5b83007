"""What three or more tools share: definitions only, no constant that a user edits.

Every tool starts with `import common`, which also makes `torchvision_patches` importable. It imports the standard
library; numpy, onnx and qai_hub only inside the functions for AI Hub, which need them.
"""

import argparse
import ast
import configparser
import contextlib
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# `python tools/<script>.py` puts only tools/ on the path; appended, so that nothing here can shadow a package.
sys.path.append(str(REPO))


def refuse(message):
    """Print one sentence that says what is wrong, where and what to do; exit with code 2 (usage or configuration)."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- constants and flags -----------------------------------------------------------------------------------------


def constants_of(source):
    """The constants of a script: the assignments between its first two ruled lines (`# ----…`).

    Returns {name: comment on its line}. Constants of several lines carry their comment on the first.
    """
    lines = source.splitlines()
    rules = [i for i, line in enumerate(lines, 1) if line.startswith("# -----")]
    comments = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and rules[0] < node.lineno < rules[1]:
            # `T, H, W = …` is one assignment of several names
            names = [part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)]
            comments |= dict.fromkeys(names, lines[node.lineno - 1].rpartition("  # ")[2].strip())
    return comments


def boolean(text):
    """`true` or `false`, in any case, as a bool. Raises ValueError for anything else."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def set_constants_from_flags(script, argv=None):
    """Let flags replace the constants of a script for one run.

    `script` is the script's `globals()`. The constant `CLIP_LEN` becomes the flag `--clip-len` (`--clip_len` works
    too); a list takes several values; a boolean takes `true` or `false`, and the bare flag means true; `skip_x` can
    also be turned off with `--do-x`. `--help` shows each constant's value and the comment on its line. An unknown flag
    or a bad value exits with code 2.
    """
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    summary = script["__doc__"].strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in constants_of(source).items():
        value = script[name]
        options = dict(dest=name, default=value, metavar=name.upper())
        options["help"] = f"{comment} (now: {value!r})".replace("%", "%%")
        if isinstance(value, bool):
            options.update(type=boolean, nargs="?", const=True, metavar="true|false")
        elif isinstance(value, (list, tuple)):
            options.update(nargs="*", type=type(value[0]) if value else str)
        else:
            options["type"] = type(value)
        flag = "--" + name.lower()
        parser.add_argument(*dict.fromkeys([flag.replace("_", "-"), flag]), **options)
        if flag.startswith("--skip_"):
            parser.add_argument(flag.replace("--skip_", "--do-"), dest=name, action="store_false", default=value)
    script.update(vars(parser.parse_args(argv)))


# --- files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_then_renamed(path):
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends well, delete it otherwise.

    So `path` is complete or absent at every moment, whatever kills the process.
    """
    path = Path(path)
    # not the process's number: on two machines, or in two containers, it may be the same
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**9)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path):
    """The SHA-256 of a file's content, or of the files of a folder in the order of their names, as 64 hex digits."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def load_class_map(path):
    """Read {class folder name: index} and check that the indices are 0 … n-1, each once.

    Exits with code 2 and one sentence if the file is missing, is not such a map, or skips an index.
    """
    try:
        class_map = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(f"there is no class map {path}; it is a JSON object {{class folder name: index}}, as class_map.json")
    except OSError as e:
        refuse(f"cannot read the class map {path}: {e.strerror}")
    except ValueError as e:
        refuse(f"{path} is not JSON ({e}); it must be an object {{class folder name: index}}")
    indices = list(class_map.values()) if isinstance(class_map, dict) else []
    if not indices or any(type(i) is not int for i in indices) or sorted(indices) != list(range(len(indices))):
        refuse(f"{path} must map class folder names to the indices 0 … n-1, each index once")
    return class_map


def read_manifest(path):
    """Read the rows of a manifest.jsonl, as preprocess_and_save.py writes it: one JSON object a line.

    Returns a list of dicts with at least `video_path`, `label` and `tensor_path` (relative to the manifest's folder).
    Exits with code 2 and one sentence if the file is missing, empty or damaged.
    """
    path, rows = Path(path), []
    if not path.is_file():
        refuse(f"there is no manifest {path}; run tools/preprocess_and_save.py first, it writes one into OUT_ROOT")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)  # of bytes: text that is not UTF-8 is a ValueError, too
                rows.append(row | {key: row[key] for key in ("video_path", "label", "tensor_path")})
            except (ValueError, KeyError, TypeError) as e:
                refuse(f"{path}, line {number}, is no manifest row ({e!r}); run tools/preprocess_and_save.py again")
    if not rows:
        refuse(f"the manifest {path} is empty; run tools/preprocess_and_save.py first")
    return rows


# --- several processes -------------------------------------------------------------------------------------------


def rank_and_world_size(environ=os.environ):
    """This process's share of the work, as its launcher says: (rank, world size); (0, 1) without a launcher.

    `torchrun` sets RANK and WORLD_SIZE; a SLURM array sets SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT. Items
    `sorted_items[rank::world_size]` are this process's. Exits with code 2 in the last task of an array with gaps.
    """
    if "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_COUNT" in environ:
        task, count = int(environ["SLURM_ARRAY_TASK_ID"]), int(environ["SLURM_ARRAY_TASK_COUNT"])
        first, step = int(environ.get("SLURM_ARRAY_TASK_MIN", 0)), int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
        rank = (task - first) // step
        if rank >= count:
            refuse(f"task {task} of the SLURM array has no share among {count}; use a range, as --array 0-{count - 1}")
        return rank, count
    return 0, 1


# --- AI Hub: what example_export, compile_and_profile and run_inference share -----------------------------------------

LATENCY_GATE_MS = 34  # LPCVC 2026, track 2: a valid entry is faster than this on the Dragonwing IQ-9075 EVK


class JobFailedError(Exception):
    """A job of AI Hub ended without success; the message is one sentence with its reason and its URL."""


def sentence_of(error):
    """What an error of the qai_hub client says, on one line and without the box that it draws."""
    return " ".join(re.sub(r"[┌─┐└┘|]", " ", str(error)).split())


def hub_errors():
    """What the qai_hub client raises when AI Hub refuses a request or does not answer it.

    With what botocore raises: the service may let the client up- and download from its storage without going between.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from qai_hub.client import APIException, Error
    from s3transfer.exceptions import RetriesExceededError

    return (Error, APIException, BotoCoreError, ClientError, RetriesExceededError)


@contextlib.contextmanager
def hub_errors_in_one_sentence():
    """Turn a failed job or an error of the qai_hub client into one sentence on stderr and exit code 1; Ctrl-C, 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; jobs that were submitted go on at AI Hub", file=sys.stderr)
        raise SystemExit(130) from None
    except JobFailedError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    except hub_errors() as e:
        print(f"error: AI Hub: {sentence_of(e)}", file=sys.stderr)
        raise SystemExit(1) from None


def connect_to_hub():
    """Import the qai_hub client and ask AI Hub for something, so that a bad configuration shows at once.

    Returns the module. Exits with one sentence: code 2 if no token is configured, the file with it is damaged or the
    token is not accepted, code 1 if the service does not answer (the client tries for 46 s).
    """
    import qai_hub as hub
    from qai_hub.client import UserError

    client_ini = os.environ.get("QAIHUB_CLIENT_INI", "~/.qai_hub/client.ini")
    script = Path(sys.argv[0]).name
    with hub_errors_in_one_sentence():
        try:
            hub.get_frameworks()
        except UserError as e:
            if "Failed to load" in str(e):
                refuse(
                    f"no AI Hub token is configured in {client_ini}: get one at https://workbench.aihub.qualcomm.com "
                    f"(Account), then `qai-hub configure --api_token TOKEN` writes that file; or run without an "
                    f"account on this machine: python tools/local_hub.py python tools/{script}"
                )
            if "Failed to authenticate" in str(e):
                refuse(
                    f"AI Hub does not accept the token in {client_ini}: copy the current one from "
                    f"https://workbench.aihub.qualcomm.com (Account) and run `qai-hub configure --api_token TOKEN`"
                )
            raise
        except (configparser.Error, ValueError):  # its text quotes the file, and with it the token
            refuse(
                f"{client_ini} cannot be read as the client's configuration: delete it and run `qai-hub configure "
                f"--api_token TOKEN`, which writes it anew"
            )
    hub.set_verbose(False)
    return hub


def find_device(hub, name):
    """The hub's newest device of this name, with its attributes. Exits with code 2 if there is none."""
    devices = hub.get_devices(name=name)
    if not devices:
        refuse(f"AI Hub has no device {name!r}; `qai-hub list-devices` shows their names")
    return devices[-1]


def is_emulated(device):
    """Whether a device of the hub says that it is emulated, as those of local_hub.py do."""
    return any(attribute.startswith("emulated") for attribute in device.attributes)


def wait_for(job):
    """Wait until a job has ended; the URL of a job is printed first. Raises JobFailedError if it did not succeed.

    If AI Hub stops answering, the client's InternalError says so, and where the job can be seen that goes on there.
    """
    from qai_hub.client import InternalError

    print(f"{job.job_type} job {job.url}", flush=True)
    seconds = 0.5
    try:
        while not (status := job.get_status()).finished:
            time.sleep(seconds)
            seconds = min(10, 1.5 * seconds)
    except hub_errors() as e:
        raise InternalError(f"{sentence_of(e)} The {job.job_type} job goes on there: {job.url}") from e
    if not status.success:
        raise JobFailedError(f"the {job.job_type} job failed: {status.message or 'no reason given'}; see {job.url}")


def layout_of(shape):
    """"NCTHW" or "NTHWC", the layout of an RGB clip's five dimensions; None for any other shape."""
    if shape is None or len(shape) != 5:
        return None
    return "NTHWC" if shape[4] == 3 else "NCTHW" if shape[1] == 3 else None


def io_of(model):
    """What a hub model takes and gives: {"input": {name, dtype, shape, scale, zero_point}, "output": the same}.

    None where the hub does not say, as for uploaded binaries. Exits with code 2 and one sentence if the model has not
    exactly one input and one output, or its input is no RGB clip.
    """
    inputs, outputs = ([t._asdict() for tensors in spec.values() for t in tensors]
                       for spec in (model.input_spec, model.output_spec))  # fmt: skip
    if not inputs or not outputs or not inputs[0]["shape"]:
        return None
    if len(inputs) != 1 or len(outputs) != 1:
        refuse(f"the model {model.name} has {len(inputs)} inputs and {len(outputs)} outputs, one of each is needed")
    if not layout_of(inputs[0]["shape"]):
        refuse(f"the model's input {inputs[0]['name']} has shape {inputs[0]['shape']}, which is no RGB clip of 5 axes")
    return {"input": inputs[0], "output": outputs[0]}


def io_of_bundle(bundle, name):
    """What metadata.json in a bundle folder of qai_hub_models says of its model `name`, as `io_of` has it, or None."""
    try:
        metadata = json.loads(Path(bundle, "metadata.json").read_text(encoding="utf-8"))
        entry, io = metadata["model_files"][str(name)], {}
        for key in ("input", "output"):
            ((name, tensor),) = entry[f"{key}s"].items()
            unscaled = {"scale": None, "zero_point": None}
            io[key] = {"name": name, "dtype": tensor["dtype"], "shape": tensor["shape"], **unscaled}
            io[key] |= tensor.get("quantization_parameters") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or of another model or program
        return None
    return io if layout_of(io["input"]["shape"]) else None


def describe(tensor):
    """A tensor of `io_of` in words: name, type, shape, layout, quantisation."""
    words = [f"{tensor['name']}: {tensor['dtype']} {tuple(tensor['shape'] or ())}", layout_of(tensor["shape"])]
    if tensor["scale"] is not None:
        words.append(f"scale {tensor['scale']:.6g}, zero point {tensor['zero_point']:.0f}")
    return ", ".join(filter(None, words))


def check_scale(tensor):
    """Exit with code 2 and one sentence if a tensor of `io_of` holds integers without a scale: [0, 1] would be lost."""
    if not tensor["dtype"].startswith("float") and tensor["scale"] is None:
        refuse(
            f"the model has {describe(tensor)} and does not say its scale; export it again with "
            f"tools/example_export.py, which writes it beside the model"
        )


def as_model_input(clip, tensor):
    """Float32 (1, 3, T, H, W) in [0, 1] as the layout and type of a model's input (`io_of(model)["input"]`).

    An integer input is quantised: round(value / scale) + zero point, clipped to the type's range. Exits with code 2 and
    one sentence for an integer input without a scale.
    """
    import numpy as np

    check_scale(tensor)
    if layout_of(tensor["shape"]) == "NTHWC":
        clip = clip.transpose(0, 2, 3, 4, 1)
    if tensor["scale"] is not None:
        limits = np.iinfo(tensor["dtype"])
        clip = (np.rint(clip / tensor["scale"]) + tensor["zero_point"]).clip(limits.min, limits.max)
    return np.ascontiguousarray(clip, dtype=tensor["dtype"])


def as_logits(output, tensor):
    """A model's output as float32; integers are (value - zero point) * scale of `io_of(model)["output"]`.

    Raises ValueError for integers without a scale.
    """
    import numpy as np

    if output.dtype.kind == "f":
        return output.astype(np.float32)
    if tensor["scale"] is None:
        raise ValueError(f"the outputs are {output.dtype} and the model does not say their scale")
    return ((output.astype(np.float32) - tensor["zero_point"]) * tensor["scale"]).astype(np.float32)


def load_onnx(path, shape):
    """Read an ONNX file (weights beside it included) and check that it takes one float32 clip and gives one tensor.

    `shape` is (BATCH, C, T, H, W) of the user's constants; the file may have it as NCTHW, as NTHWC, or leave dimensions
    open. Returns (onnx model, {input name: (shape as the file has it, "float32")}). Exits with code 2 and one sentence
    for a file that does not fit.
    """
    import onnx

    if not Path(path).is_file():
        refuse(f"there is no ONNX file {path}; set ONNX_DIR to its folder and VIDEO_ONNX_NAME to its name")
    try:
        onnx.checker.check_model(str(path))  # by path, so that weights in a second file are checked, too
        model = onnx.load(path)
    except Exception as e:  # protobuf's DecodeError, onnx's ValidationError, a missing weights file
        refuse(f"{path} is not a valid ONNX model: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 11:
        refuse(f"{path} has opset {opset}; export it again with 11 or newer, say torch.onnx.export(opset_version=17)")
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        names = [value.name for value in (*inputs, *model.graph.output)]
        refuse(f"{path} has the inputs and outputs {', '.join(names)}; one clip in and one tensor out is needed")
    (value,) = inputs
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        refuse(f"the input {value.name} of {path} is not float32")
    own = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]  # None: open
    batch, c, t, h, w = shape
    for wanted in ((batch, c, t, h, w), (batch, t, h, w, c)):
        if len(own) == 5 and all(a in (None, b) for a, b in zip(own, wanted)):
            return model, {value.name: (wanted, "float32")}
    refuse(
        f"the input {value.name} of {path} has shape {tuple(own)}, but BATCH, C, T, H, W are {tuple(shape)}; set them "
        f"to what the model takes"
    )


def compile_onnx(hub, model, input_specs, device):
    """Compile an ONNX model to a QNN context binary: directly or, where that is refused, to a DLC that is then linked.

    Returns (hub model, its description as `io_of` gives it). Raises JobFailedError.
    """
    from qai_hub.client import UserError

    source = hub.upload_model(model, name="model.onnx")
    direct = "--target_runtime qnn_context_binary"
    try:
        job = hub.submit_compile_job(source, device, input_specs=input_specs, options=direct)
        wait_for(job)
        return job.get_target_model(), io_of(job.get_target_model())
    except (UserError, JobFailedError) as e:
        print(f"not compiled directly ({sentence_of(e)}); compiling to a DLC and linking it instead")
    job = hub.submit_compile_job(source, device, input_specs=input_specs, options="--target_runtime qnn_dlc")
    wait_for(job)
    link = hub.submit_link_job([job.get_target_model()], device)
    wait_for(link)
    # the hub does not describe every linked binary; the DLC that it was made of takes and gives the same
    return link.get_target_model(), io_of(link.get_target_model()) or io_of(job.get_target_model())


def print_profile(job, device):
    """Print what a profile job measured: latency against the gate, memory, and where the layers ran."""
    profile = job.download_profile()
    if not profile:
        raise JobFailedError(f"the {job.job_type} job brought no profile; see {job.url}")
    summary, units = profile["execution_summary"], {}
    for layer in profile["execution_detail"]:
        units[layer["compute_unit"]] = units.get(layer["compute_unit"], 0) + 1
    milliseconds = summary["estimated_inference_time"] / 1000
    if is_emulated(device):
        print(f"latency   {milliseconds:.2f} ms on this CPU, which says nothing about the {LATENCY_GATE_MS} ms gate")
    else:
        verdict = "meets" if milliseconds < LATENCY_GATE_MS else "MISSES"
        print(f"latency   {milliseconds:.2f} ms on {device.name}: {verdict} the {LATENCY_GATE_MS} ms gate")
    peak = summary.get("inference_memory_peak_range")
    if isinstance(peak, tuple):
        print(f"memory    {peak[0] / 2**20:.0f} to {peak[1] / 2**20:.0f} MiB at the peak of inference")
    print(f"layers    {', '.join(f'{unit} {count}' for unit, count in sorted(units.items())) or 'not reported'}")


# --- the environment of quickstart.py and tests/run.py --------------------------------------------------------------


def make_environment(*requirement_files):
    """Create `.venv` beside the README with what the requirement files name; returns the path of its Python.

    Runs on any Python 3.10 to 3.13 with nothing installed. Done once: a stamp remembers the files' content. Exits
    with code 2 and one sentence if this Python is too old or new, has no venv module, or pip cannot install.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        refuse(f"Python 3.10 to 3.13 is needed (qai_hub_models 0.65), this is {sys.version.split()[0]}")
    home = REPO / ".venv"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(b"".join(Path(f).read_bytes() for f in requirement_files)).hexdigest()
    stamp = home / f"installed-{wanted[:16]}"
    if stamp.exists():
        return python
    # pip comes last: without it, making the environment was interrupted
    if not python.exists() or subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode:
        print(f"creating {home.relative_to(REPO)} …", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)]).returncode:
            refuse("this Python cannot create environments; on Debian or Ubuntu: apt install python3-venv")
    print("installing packages (some 6 GB with the CUDA build of torch; 2 to 10 minutes) …", flush=True)
    requirements = [part for file in requirement_files for part in ("-r", str(file))]
    if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements]).returncode:
        refuse("pip could not install requirements.txt; its message stands above")
    stamp.touch()
    return python
