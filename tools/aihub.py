"""What the AI Hub scripts share: connecting, waiting for jobs, layouts and quantised tensors, ONNX files.

Definitions only, no constant that a user edits. numpy, onnx and qai_hub are imported inside the functions that need
them, so that `--help` stays fast.
"""

import collections
import configparser
import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import common

# First line of every binary that the local hub makes: no program can take it for one of Qualcomm's.
HUB_TAG = b"LOCAL HUB: EMULATED ON THE CPU, NOT A QUALCOMM BINARY\n"
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


def is_passing(error):
    """Whether one of `hub_errors` comes of a service that is away or asks to slow down; False for what it refuses."""
    from qai_hub.client import APIException, UserError

    if isinstance(error, APIException):
        return error.status_code == 429 or (error.status_code or 0) >= 500
    return not isinstance(error, UserError)


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
                common.refuse(
                    f"no AI Hub token is configured in {client_ini}: get one at https://workbench.aihub.qualcomm.com "
                    f"(Account), then `qai-hub configure --api_token TOKEN` writes that file; or run without an "
                    f"account on this machine: python tools/local_hub.py python tools/{script}"
                )
            if "Failed to authenticate" in str(e):
                common.refuse(
                    f"AI Hub does not accept the token in {client_ini}: copy the current one from "
                    f"https://workbench.aihub.qualcomm.com (Account) and run `qai-hub configure --api_token TOKEN`"
                )
            raise
        except (configparser.Error, ValueError):  # its text quotes the file, and with it the token
            common.refuse(
                f"{client_ini} cannot be read as the client's configuration: delete it and run `qai-hub configure "
                f"--api_token TOKEN`, which writes it anew"
            )
    hub.set_verbose(False)
    return hub


def find_device(hub, name, chipset=""):
    """The hub's newest device of this name or with this chipset, with its attributes. Exits with code 2 without one."""
    devices = hub.get_devices(attributes=f"chipset:{chipset}") if chipset else hub.get_devices(name=name)
    if not devices:
        what = f"with the chipset {chipset!r}" if chipset else repr(name)
        common.refuse(f"AI Hub has no device {what}; `qai-hub list-devices` shows names and chipsets")
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
        common.refuse(f"the model {model.name} has {len(inputs)} inputs and {len(outputs)} outputs, not one of each")
    if not layout_of(inputs[0]["shape"]):
        common.refuse(f"the model's input {inputs[0]['name']} has shape {inputs[0]['shape']}, which is no RGB clip")
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


def qairt_version_of(model):
    """The version of QAIRT that a hub model was compiled with, say "2.50"; "" where the hub does not say it."""
    from qai_hub import ModelMetadataKey

    version = re.match(r"\d+\.\d+", model.metadata.get(ModelMetadataKey.QAIRT_SDK_VERSION, ""))
    return version[0] if version else ""


def job_options(qairt_version, options=""):
    """Options of a job on a model that was compiled with this version of QAIRT; the user's own ones win."""
    if not qairt_version or "--qairt_version" in options:
        return options
    return f"--qairt_version {qairt_version} {options}".strip()


def target_model_of(hub, described):
    """The hub's own model that the jobs named in a description made, or None: no job, unknown here, or failed."""
    from qai_hub.client import UserError

    try:
        job_id = described.get("link_job") or described.get("compile_job")
        return hub.get_job(job_id).get_target_model() if job_id else None
    except UserError:
        return None


def describe(tensor):
    """A tensor of `io_of` in words: name, type, shape, layout, quantisation."""
    words = [f"{tensor['name']}: {tensor['dtype']} {tuple(tensor['shape'] or ())}", layout_of(tensor["shape"])]
    if tensor["scale"] is not None:
        words.append(f"scale {tensor['scale']:.6g}, zero point {tensor['zero_point']:.0f}")
    return ", ".join(filter(None, words))


def check_scale(tensor):
    """Exit with code 2 and one sentence if an output of `io_of` holds integers without a scale: no logits are in it."""
    if not tensor["dtype"].startswith("float") and tensor["scale"] is None:
        common.refuse(
            f"the model gives {describe(tensor)} and does not say its scale, so its logits cannot be read; export it "
            f"for another runtime, or with --precision float"
        )


def sent_dtype(tensor):
    """The type in which clips are sent to an input of `io_of`: float32 for an integer without a scale.

    So does qai_hub_models; the service quantises what it is sent.
    """
    return "float32" if tensor["scale"] is None and not tensor["dtype"].startswith("float") else tensor["dtype"]


def as_model_input(clip, tensor):
    """Float32 (1, 3, T, H, W) in [0, 1] as the layout and type of a model's input (`io_of(model)["input"]`).

    An integer input is quantised: round(value / scale) + zero point, clipped to the type's range.
    """
    import numpy as np

    if layout_of(tensor["shape"]) == "NTHWC":
        clip = clip.transpose(0, 2, 3, 4, 1)
    if tensor["scale"] is not None:
        limits = np.iinfo(tensor["dtype"])
        clip = (np.rint(clip / tensor["scale"]) + tensor["zero_point"]).clip(limits.min, limits.max)
    return np.ascontiguousarray(clip, dtype=sent_dtype(tensor))


def clip_digest(clip):
    """A hash of a clip's values, as float32 in C order; 32 hex digits."""
    import numpy as np

    return hashlib.blake2b(np.ascontiguousarray(clip, dtype=np.float32), digest_size=16).hexdigest()


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


def agreement(logits, expected):
    """How two arrays (clips, classes) agree: PSNR in dB over the peak of `expected` (None: equal), and by Top-1."""
    import numpy as np

    error = float(np.mean((logits - expected) ** 2))
    return {
        "psnr_db": round(float(10 * np.log10(float(np.abs(expected).max()) ** 2 / error)), 1) if error else None,
        "largest_difference": float(np.abs(logits - expected).max()),
        "same_top1": int((logits.argmax(1) == expected.argmax(1)).sum()),
    }


def in_words(agreed, num_clips, scale=None):
    """What `agreement` found, for people; scale: a quantisation step of the output, where it has one."""
    psnr = "the same values" if agreed["psnr_db"] is None else f"PSNR {agreed['psnr_db']} dB"
    steps = f" ({agreed['largest_difference'] / scale:.0f} steps)" if scale else ""
    return (
        f"{psnr}, largest difference {agreed['largest_difference']:.2g}{steps}, "
        f"the same Top-1 for {agreed['same_top1']} of {num_clips} clips"
    )


def evaluate_command(h5, manifest, classes, **constants):
    """The command that evaluates logits of these classes, with the class map if it is not the project's."""
    constants |= {"h5": h5, "manifest": manifest}
    class_map = common.class_map_with(classes or [], only_these=True)
    if classes and class_map != common.REPO / "class_map.json":
        constants["class_map"] = class_map or "YOUR_CLASS_MAP"
    return common.next_command("evaluate.py", h5, **constants)


def write_logits(file, rows, tensor_paths, output_name):
    """Write logits into an open HDF5 file as AI Hub does, data/0/batch_<i> float32 (1, classes), and `tensor_paths`."""
    import h5py

    group = file.create_group("data/0")
    for i, row in enumerate(rows):
        group.create_dataset(f"batch_{i}", data=row[None])  # 368 bytes: gzip would make it 3 KB
    group.attrs.update({"name": output_name, "order": 0, "batch_count": len(tensor_paths)})
    file.create_dataset("tensor_paths", data=tensor_paths, dtype=h5py.string_dtype())


def load_onnx(path, shape):
    """Read an ONNX file (weights beside it included) and check that it takes one float32 clip and gives one tensor.

    `shape` is (BATCH, C, T, H, W) of the user's constants; the file may have it as NCTHW, as NTHWC, or leave dimensions
    open. Returns (onnx model, {input name: (shape as the file has it, "float32")}). Exits with code 2 and one sentence
    for a file that does not fit.
    """
    import onnx

    if not Path(path).is_file():
        common.refuse(
            f"there is no ONNX file {path} (looked in {Path(path).absolute()}); set ONNX_DIR to its folder and "
            f"VIDEO_ONNX_NAME to its name"
        )
    try:
        onnx.checker.check_model(str(path))  # by path, so that weights in a second file are checked, too
        model = onnx.load(path)
    except Exception as e:  # protobuf's DecodeError, onnx's ValidationError, a missing weights file
        common.refuse(f"{path} is not a valid ONNX model: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 11:
        common.refuse(f"{path} has opset {opset}; export it with 11 or newer, say torch.onnx.export(opset_version=17)")
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        names = [value.name for value in (*inputs, *model.graph.output)]
        common.refuse(f"{path} has the inputs and outputs {', '.join(names)}; one clip in and one tensor out is needed")
    (value,) = inputs
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        common.refuse(
            f"the input {value.name} of {path} is not float32; a quantised model is compiled by "
            f"tools/example_export.py --precision w8a8, from the checkpoint"
        )
    own = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]  # None: open
    batch, c, t, h, w = shape
    for wanted in ((batch, c, t, h, w), (batch, t, h, w, c)):
        if len(own) == 5 and all(a in (None, b) for a, b in zip(own, wanted)):
            return model, {value.name: (wanted, "float32")}
    common.refuse(
        f"the input {value.name} of {path} has shape {tuple(own)}, but BATCH, C, T, H, W are {tuple(shape)}; set them "
        f"to what the model takes"
    )


def read_hub_binary(path):
    """(head, ONNX model as bytes) of a binary that the local hub made; None if `path` is any other file.

    `path` is what example_export.py saves: a .bin, .dlc or .tflite file, or a folder <name>.onnx with a binary in it.
    head: {"runtime", "qairt_version", "inputs", "outputs"}.
    """
    path = Path(path)
    if path.is_dir():
        path = next(path.glob("*.bin"), None)
    if path is None:
        return None
    with open(path, "rb") as file:
        if file.read(len(HUB_TAG)) != HUB_TAG:
            return None
        return json.loads(file.readline()), file.read()


def check_hub_binary(path, device):
    """Exit with code 2 and one sentence where a binary that the local hub made would be sent to a real device."""
    if read_hub_binary(path) and not is_emulated(device):
        common.refuse(
            f"{path} was made by the local hub and runs there alone: export it again with AI Hub, or make a binary for "
            f"the chip of it with tools/compile_offline.py --source {path}"
        )


def quantize_onnx(model, path, samples, weight_bits=8, activation_bits=8):
    """Quantise a float ONNX model (onnx.ModelProto) statically and write it to `path`, with QDQ nodes.

    `samples` yields calibration samples {input name: float32 array}; ranges are the smallest and largest values seen.
    Weights become signed integers of `weight_bits`, a scale a channel; activations unsigned ones of `activation_bits`.
    Both are 8 or 16. Every operation is quantised, as by AI Hub, so that inputs and outputs are, too.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = iter(samples)
    with tempfile.TemporaryDirectory() as folder:
        prepared = f"{folder}/prepared.onnx"
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        operations = {node.op_type for node in onnx.load(prepared).graph.node} - {"Constant", "Shape"}
        quantize_static(
            prepared, str(path), SimpleNamespace(get_next=lambda: next(samples, None)), quant_format=QuantFormat.QDQ,
            per_channel=True, op_types_to_quantize=sorted(operations),
            activation_type=QuantType[f"QUInt{activation_bits}"], weight_type=QuantType[f"QInt{weight_bits}"],
        )


def compile_onnx(hub, model, input_specs, device, compile_options="", link_options=""):
    """Compile an ONNX model to a QNN context binary: directly or, where that is refused, to a DLC that is then linked.

    Returns (hub model, its description as `io_of` gives it). Raises JobFailedError.
    """
    from qai_hub.client import UserError

    source = hub.upload_model(model, name="model.onnx")
    direct, dlc = (f"--target_runtime {runtime} {compile_options}".strip() for runtime in
                   ("qnn_context_binary", "qnn_dlc"))  # fmt: skip
    try:
        job = hub.submit_compile_job(source, device, input_specs=input_specs, options=direct)
        wait_for(job)
        return job.get_target_model(), io_of(job.get_target_model())
    except (UserError, JobFailedError) as e:
        print(f"not compiled directly ({sentence_of(e)}); compiling to a DLC and linking it instead")
    job = hub.submit_compile_job(source, device, input_specs=input_specs, options=dlc)
    wait_for(job)
    link = hub.submit_link_job([job.get_target_model()], device, options=link_options)
    wait_for(link)
    # the hub does not describe every linked binary; the DLC that it was made of takes and gives the same
    return link.get_target_model(), io_of(link.get_target_model()) or io_of(job.get_target_model())


def print_profile(job, device):
    """Print what a profile job measured: latency against the gate, memory, and where the layers ran."""
    profile = job.download_profile()
    if not profile:
        raise JobFailedError(f"the {job.job_type} job brought no profile; see {job.url}")
    summary, layers = profile["execution_summary"], profile["execution_detail"]
    units = collections.Counter(layer["compute_unit"] for layer in layers)
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
    elsewhere = [f"{layer['name']} ({layer['compute_unit']})" for layer in layers if layer["compute_unit"] != "NPU"]
    if elsewhere and not is_emulated(device):
        print(f"NOT ON THE NPU, which costs time: {len(elsewhere)} of {len(layers)} layers: {', '.join(elsewhere[:20])}"
              + (" …" if len(elsewhere) > 20 else ""))  # fmt: skip
