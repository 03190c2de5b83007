"""QNN context binaries at work: on Qualcomm's NPU where this machine has one, in Qualcomm's HTP emulator elsewhere.

The code is the same for both: onnxruntime's provider, in provider.py's process. The wheels for x86-64 carry the
emulator, those for ARM the libraries that speak to the chip.
"""

import atexit
import concurrent.futures
import contextlib
import platform
import queue
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import common

import numpy as np

from aihub import description, model_io, onnx_graphs

from . import compiler, latency

WARM_UP = 3  # runs before a chip's latency counts: the first ones wake it up


class CompiledBinary(NamedTuple):
    """A file made for a chip and what is known of it.

    `path`: a context binary (.bin), or an ONNX file whose one node names such a binary beside it.
    `description`: {"input", "output": as model_io.io_of has them, "graph": its name in the binary, "soc": number of the
    chip, …}, as compile_offline.py writes it beside a binary.
    """

    path: Path
    description: dict


def is_native():
    """Whether binaries run on this machine's own chip: the provider's wheels for ARM have no emulator."""
    return platform.machine().lower() in ("aarch64", "arm64")


def where_it_runs(binary):
    """In words, what computes the logits of a binary on this machine."""
    if is_native():
        return "the NPU of this machine"
    return f"Qualcomm's HTP emulator for {binary.description['chip']}, QAIRT {binary.description['qairt']}"


def write_context(binary, folder):
    """Put FOLDER/context.onnx, by which the provider runs a binary, and the binary itself into a folder."""
    import onnx

    if binary.path.suffix == ".onnx":
        for file in binary.path.parent.iterdir():
            symlink_or_copy(file, Path(folder, "context.onnx" if file == binary.path else file.name))
        return
    graph_name = binary.description["graph"]
    tensors = [[(t["name"], t["dtype"], t["shape"])] for t in (binary.description[key] for key in ("input", "output"))]
    more = {"name": graph_name, "main_context": 1, "source": "QNNExecutionProvider", "partition_name": graph_name}
    onnx.save(onnx_graphs.around_binary(tensors, "context.bin", graph_name, **more), f"{folder}/context.onnx")
    symlink_or_copy(binary.path, Path(folder, "context.bin"))


def symlink_or_copy(file, target):
    """Let `target` be a file of 30 to 200 MB without writing it anew, where the file system has links."""
    try:
        target.symlink_to(file.absolute())
    except OSError:
        shutil.copyfile(file, target)


def binary_at(path):
    """The CompiledBinary in a .bin of compile_offline.py, or in an ONNX file or folder that names a context binary.

    None for any other file. Exits with code 2 and one sentence for a binary that cannot be run here.
    """
    path = Path(path)
    if onnx_graphs.read_hub_binary(path):
        return None
    if path.suffix == ".bin":
        described = description.read_description(path)
        if "graph" not in described or "soc" not in described:
            common.refuse(
                f"nothing beside {path} says what its graph is called, so it cannot be run here: make one with "
                f"tools/compile_offline.py, or export with --target-runtime precompiled_qnn_onnx, which names it"
            )
        return CompiledBinary(path, described)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".onnx":
        return None
    return binary_of_onnx(files[0], description.read_description(path))


def binary_of_onnx(path, described):
    """The CompiledBinary of an ONNX file whose one node is a context, as AI Hub makes it; None for other ONNX files.

    described: what stands beside it. The tensors are the file's own, with the scales that are known.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        name = onnx_graphs.binary_named_in(graph)
    except Exception:  # no ONNX model: whoever reads it as one says so
        return None
    if name is None:
        return None
    binary = path.parent / name
    if not binary.is_file():
        common.refuse(f"{path} names the context binary {name[:60]!r}, which is not beside it")
    io = onnx_graphs.io_of_graph(graph, {})
    io = {key: tensor | {scale: described.get(key, {}).get(scale) for scale in ("scale", "zero_point")}
          for key, tensor in io.items()}  # fmt: skip
    made_for = compiler.chip_of(binary)
    numbers = [number for number, chip in compiler.SOCS.items() if chip == made_for["chip"]]
    if not numbers and not is_native():
        common.refuse(f"{binary} does not say which of Qualcomm's chips it is for, so no emulator can run it")
    qairt = described.get("qairt_version") or "unknown"
    return CompiledBinary(path, described | io | made_for | {"soc": (numbers or [0])[0], "qairt": qairt})


@contextlib.contextmanager
def running(binary, wheels):
    """Load a binary; yields a function from an input, an array as the binary takes it, to (output, seconds).

    The seconds are those of the provider's call alone, as AI Hub times an inference. Raises CompilerError, also where
    the binary cannot be loaded: there is no fallback to the CPU.
    """
    with tempfile.TemporaryDirectory(prefix="qnn-", ignore_cleanup_errors=True) as folder:
        write_context(binary, folder)
        soc = "native" if is_native() else binary.description["soc"]
        with compiler.Process("run", folder, soc, wheels) as process:

            def run(array):
                np.save(f"{folder}/input.npy", array)
                process.ask(f"{folder}/input.npy")
                answer = process.answer()
                return np.array(answer["output"], dtype=binary.description["output"]["dtype"]), answer["seconds"]

            if error := process.answer().get("error"):
                raise compiler.CompilerError(compiler.reason_of(error))
            tensor = binary.description["input"]
            for _ in range(WARM_UP if is_native() else 0):
                run(np.zeros(tensor["shape"], tensor["dtype"]))
            yield run


class BinarySession:
    """A binary that stays loaded until this program ends: clips in, logits out, and how long each took."""

    def __init__(self, binary, wheels):
        """Load a binary. Exits with code 2 and one sentence where it cannot be run: nothing falls back to the CPU."""
        self.binary, self.seconds = binary, []
        compiler.install(wheels)
        stack = contextlib.ExitStack()
        atexit.register(stack.close)
        try:
            self.run = stack.enter_context(running(binary, wheels))
        except compiler.CompilerError as e:
            where = "the NPU of this machine" if is_native() else "Qualcomm's emulator"
            common.refuse(f"{binary.path} cannot be run on {where}: {e}")

    @property
    def clip_shape(self):
        """(1, 3, T, H, W)."""
        return model_io.ncthw(self.binary.description["input"]["shape"])

    @property
    def about(self):
        slow = "" if is_native() else ", 10 to 30 s a clip"
        return f"{self.binary.path} on {where_it_runs(self.binary)}{slow}"

    def logits(self, clips):
        """float32 (B, 3, T, H, W), RGB in [0, 1] -> float32 (B, num_classes)."""
        rows = []
        for clip in clips:
            output, seconds = self.run(model_io.as_model_input(clip[None], self.binary.description["input"]))
            self.seconds.append(seconds)
            rows.append(model_io.as_logits(output.reshape(1, -1), self.binary.description["output"]))
        return np.concatenate(rows)

    def latency(self):
        """What the clips took, in words, beside the gate and the compiler's estimate; "" before the first clip."""
        return latency.measured(self.seconds, self.binary.description, is_native())


def run_each(binary, inputs, wheels, num_processes):
    """Run clips in so many processes at a time; yields (i, output, seconds) of each as it is done.

    `inputs`: {i: function that returns float32 (1, 3, T, H, W)}. Raises CompilerError.
    """
    idle = queue.SimpleQueue()

    def run(i):
        run_one = idle.get()
        output, seconds = run_one(model_io.as_model_input(inputs[i](), binary.description["input"]))
        idle.put(run_one)
        return i, output, seconds

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(max(num_processes, 1)))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for _ in range(num_processes):  # when this ends they are killed first, so no thread waits for them
            idle.put(stack.enter_context(running(binary, wheels)))
        for future in concurrent.futures.as_completed([pool.submit(run, i) for i in inputs]):
            yield future.result()
