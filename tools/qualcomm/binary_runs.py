"""QNN context binaries at work: on Qualcomm's NPU where this machine has one, in Qualcomm's HTP emulator elsewhere.

Definitions only, no constant that a user edits. The code is the same for both: onnxruntime's provider, in provider.py's
process. The wheels for x86-64 carry the emulator, those for ARM the libraries that speak to the chip.
"""

import concurrent.futures
import contextlib
import platform
import queue
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import compiler


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


def where_it_runs(description):
    """In words, what computes the logits of a binary on this machine."""
    if is_native():
        return "the NPU of this machine"
    return f"Qualcomm's HTP emulator for {description['chip']}, QAIRT {description['qairt']}"


def write_context(binary, folder):
    """Put FOLDER/context.onnx, by which the provider runs a binary, and the binary itself into a folder."""
    import numpy as np
    import onnx
    from onnx import helper

    if binary.path.suffix == ".onnx":
        for file in binary.path.parent.iterdir():
            link_or_copy(file, Path(folder, "context.onnx" if file == binary.path else file.name))
        return
    tensors, graph_name = [binary.description[key] for key in ("input", "output")], binary.description["graph"]
    elem_types = [helper.np_dtype_to_tensor_dtype(np.dtype(tensor["dtype"])) for tensor in tensors]
    values = [helper.make_tensor_value_info(t["name"], kind, t["shape"]) for t, kind in zip(tensors, elem_types)]
    node = helper.make_node(
        "EPContext", [values[0].name], [values[1].name], domain="com.microsoft", name=graph_name, main_context=1,
        embed_mode=0, ep_cache_context="context.bin", source="QNNExecutionProvider", partition_name=graph_name,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], graph_name, values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets), f"{folder}/context.onnx")
    link_or_copy(binary.path, Path(folder, "context.bin"))


def link_or_copy(file, target):
    """Let `target` be a file of 30 to 200 MB without writing it anew, where the file system has links."""
    try:
        target.symlink_to(file.absolute())
    except OSError:
        shutil.copyfile(file, target)


@contextlib.contextmanager
def running(binary, wheels):
    """Load a binary; yields a function from an input, an array as the binary takes it, to (output, seconds).

    The seconds are those of the provider's call alone, as AI Hub times an inference. Raises CompilerError, also where
    the binary cannot be loaded: there is no fallback to the CPU.
    """
    import numpy as np

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
                raise compiler.CompilerError(compiler.sentence_of(error))
            yield run


def run_each(binary, inputs, wheels, num_processes):
    """Run clips in so many processes at a time; yields (i, output) of each as it is done.

    `inputs`: {i: function that returns float32 (1, 3, T, H, W)}. Raises CompilerError.
    """
    from aihub import model_io

    idle = queue.SimpleQueue()

    def run(i):
        run_one = idle.get()
        output, _ = run_one(model_io.as_model_input(inputs[i](), binary.description["input"]))
        idle.put(run_one)
        return i, output

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(max(num_processes, 1)))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for _ in range(num_processes):  # when this ends they are killed first, so no thread waits for them
            idle.put(stack.enter_context(running(binary, wheels)))
        for future in concurrent.futures.as_completed([pool.submit(run, i) for i in inputs]):
            yield future.result()
