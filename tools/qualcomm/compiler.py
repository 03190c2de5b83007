"""Qualcomm's compiler and HTP emulator as this machine has them: their wheels in a folder of their own, their process.

Definitions only, no constant that a user edits. The wheels cannot be imported beside the project's onnxruntime, so
process.py works with them in a process of its own. Nothing of them is copied or committed: Qualcomm's licence
lets everybody use them, and nobody pass them on.
"""

import collections
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common

# onnxruntime-qnn 2.6.0 carries QAIRT 2.50, as AI Hub does; 2.7.0 carries 2.51, whose binaries 2.50 refuses
WHEELS = {"onnxruntime-qnn": "2.6.0", "onnxruntime": "1.24.4", "flatbuffers": "25.12.19"}
QAIRT = "2.50"
# {SoC number: chip}: what these wheels compile a float network for, each of 0 to 150 tried once; names are theirs
SOCS = {
    36: "SM8450", 39: "SA8295", 41: "SM7450", 42: "SM8475", 43: "SM8550", 52: "SA8255", 53: "SXR2230P", 57: "SM8650",
    60: "SC8380XP", 62: "SA8540", 63: "AIC100", 66: "QCS8550", 67: "SA8620P", 69: "SM8750", 72: "SA8797",
    75: "SXR2330P", 77: "QCS9100", 82: "QCS8300", 87: "SM8850", 88: "SC8480XP", 89: "QCM8538", 90: "QCS8625",
    92: "SM8850L", 94: "SC8440XP", 97: "SM8845", 99: "QCM8838", 103: "SM8975", 104: "CQ8725S", 105: "CQ8750S",
    109: "QCS8845", 112: "SM8975L", 113: "SM8950", 114: "SA8787", 115: "QMX115", 117: "IPQ9650", 119: "IQX5121",
    120: "SC8340XP",
}  # fmt: skip
SOCS_WITH_ESTIMATE = (52, 62, 63, 72, 77, 114)  # of those, the chips for which the compiler has a model of time
WATCHER, PROCESS = (str(Path(__file__).with_name(name)) for name in ("watcher.py", "process.py"))
HOW_ELSE = (
    "run it on Linux x86-64, say in the Docker image python:3.12-bookworm, or compile on AI Hub with "
    "tools/example_export.py"
)


class CompilerError(Exception):
    """The compiler refused a graph or its process ended; the message is one sentence.

    `unsupported`: [[operation, name of the graph's node]] that it does not take.
    """

    def __init__(self, message, unsupported=()):
        super().__init__(message)
        self.unsupported = [tuple(pair) for pair in unsupported]


# --- the wheels -------------------------------------------------------------------------------------------------------


def missing_wheel():
    """Why Qualcomm has no wheel for this machine, "" where it has one."""
    system, machine = platform.system(), platform.machine().lower()
    python = sys.version_info[:2]
    if (system, machine) not in (("Linux", "x86_64"), ("Linux", "aarch64"), ("Windows", "amd64"), ("Windows", "arm64")):
        return f"{system} on {machine}"
    oldest = (3, 11) if (system, machine) == ("Linux", "x86_64") else (3, 12)
    if not oldest <= python <= (3, 14):
        return f"Python {python[0]}.{python[1]} on {system} {machine} ({oldest[0]}.{oldest[1]} to 3.14 are served)"
    name, version = platform.libc_ver()
    if system == "Linux" and (name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35)):
        return f"{name or 'a C library other than glibc'} {version} (glibc 2.35 or newer is needed)"
    return ""


def is_installed(folder):
    """Whether the folder holds all wheels in the pinned versions; it appears at once, by renaming."""
    names = [f"{name.replace('-', '_')}-{version}.dist-info" for name, version in WHEELS.items()]
    return all(Path(folder, name).is_dir() for name in names)


def install(folder):
    """Install the pinned wheels into `folder` unless they are there, saying what, from whom and under which licence.

    Exits with code 2 and one sentence where there is no wheel or pip cannot get it. Of two at a time one wins.
    """
    folder = Path(folder).absolute()
    if is_installed(folder):
        return
    if reason := missing_wheel():
        common.refuse(f"Qualcomm's compiler is not made for {reason}: {HOW_ELSE}")
    wheels = [f"{name}=={version}" for name, version in WHEELS.items()]
    print(
        f"installing {', '.join(wheels)} into {folder} (287 MB, once):\n"
        f"  onnxruntime-qnn is by Qualcomm Technologies, Inc.: the provider under the MIT licence, its QAIRT libraries "
        f"under\n  the terms in {folder}/onnxruntime_qnn/Qualcomm_LICENSE.pdf (for use with your own application, not "
        f"to be passed on);\n  onnxruntime is by Microsoft (MIT), flatbuffers by Google (Apache 2.0)",
        flush=True,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    except OSError as e:
        common.refuse(f"{folder.parent} cannot be written ({e.strerror}); name another folder with --qnn-dir")
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*command, "--target", str(fresh), *wheels]).returncode:
            common.refuse(f"pip could not install {wheels[0]}, its message stands above; or {HOW_ELSE}")
        if not is_installed(folder):
            shutil.rmtree(folder, ignore_errors=True)  # other versions
            with contextlib.suppress(OSError):  # another process was faster
                fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if not is_installed(folder):
        common.refuse(f"{folder} cannot be replaced; delete it, or name another folder with --qnn-dir")


# --- its process ------------------------------------------------------------------------------------------------------


class Process:
    """process.py at work on a folder, as a context: `ask` sends it a line, `answer` waits for its next one.

    When the context ends, or this program is killed, the process ends and the folder goes.
    """

    def __init__(self, command, folder, soc, wheels):
        path = os.pathsep.join(filter(None, [str(Path(wheels).absolute()), os.environ.get("PYTHONPATH")]))
        work = [sys.executable, "-P", PROCESS, command, str(folder), str(soc)]
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-P", WATCHER, str(folder), *work], text=True, encoding="utf-8", cwd=folder,
            env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def ask(self, line):
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def answer(self):
        """Its next answer, a dict. Raises CompilerError if it ended instead."""
        for line in self.process.stdout:  # Qualcomm's libraries print there, too
            if line.startswith("{"):
                return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        memory = " (for want of memory?)" if code == 137 else ""
        raise CompilerError(f"Qualcomm's compiler ended with exit code {code}{memory}: {last}")


@contextlib.contextmanager
def compiling(graph, soc, wheels):
    """Start to compile an onnx.ModelProto for the chip of a SoC number; yields a function that waits for the end.

    It returns (path of the binary, figures) and raises CompilerError, with the operations that the compiler does not
    take. The binary lies in a temporary folder, which goes with the context. Figures: estimated_ms [low, estimate,
    high] or None, ops_without_cost, spill_bytes, fill_bytes, weights_and_input_bytes, bytes, chip, hexagon, qairt,
    graph (its name in the binary).
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="qnn-", ignore_cleanup_errors=True) as folder:
        onnx.save(graph, f"{folder}/graph.onnx")
        with Process("compile", folder, soc, wheels) as process:

            def finish():
                figures = process.answer()
                if "error" in figures:
                    names = sorted({operation for operation, _ in figures["unsupported"]})
                    reason = f"it does not take {', '.join(names)}" if names else sentence_of(figures["error"])
                    raise CompilerError(reason, figures["unsupported"])
                binary = Path(folder, "context.bin")
                return binary, figures | {"bytes": binary.stat().st_size}

            yield finish


def compile_each(graphs, soc, wheels, num_processes):
    """Compile the onnx.ModelProto of each (what, graph); yields (what, figures, or "error" and "unsupported").

    The next graph is made while up to num_processes are compiled. No binary is kept.
    """
    with contextlib.ExitStack() as all_running:
        running = collections.deque()

        def oldest():
            what, job, finish = running.popleft()
            try:
                figures = finish()[1]
            except CompilerError as e:
                figures = {"error": str(e), "unsupported": e.unsupported}
            job.close()
            return what, figures

        for what, graph in graphs:
            if len(running) == num_processes:
                yield oldest()
            job = all_running.enter_context(contextlib.ExitStack())
            running.append((what, job, job.enter_context(compiling(graph, soc, wheels))))
        while running:
            yield oldest()


def sentence_of(error):
    """The part of onnxruntime's message that says something, on one line."""
    return " ".join(error.rpartition(" : ")[2].split())[:300]


# --- the emulator -----------------------------------------------------------------------------------------------------


def write_context(binary, description, folder):
    """Write FOLDER/context.onnx, by which onnxruntime's provider runs a context binary, and the binary beside it."""
    import numpy as np
    import onnx
    from onnx import helper

    tensors, graph_name = (description["input"], description["output"]), description["graph"]
    elem_types = [helper.np_dtype_to_tensor_dtype(np.dtype(tensor["dtype"])) for tensor in tensors]
    values = [helper.make_tensor_value_info(t["name"], kind, t["shape"]) for t, kind in zip(tensors, elem_types)]
    node = helper.make_node(
        "EPContext", [values[0].name], [values[1].name], domain="com.microsoft", name=graph_name, main_context=1,
        embed_mode=0, ep_cache_context="context.bin", source="QNNExecutionProvider", partition_name=graph_name,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], graph_name, values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets), f"{folder}/context.onnx")
    shutil.copyfile(binary, f"{folder}/context.bin")


def emulate(binary, description, wheels, numbers, load, num_processes=1):
    """Run the inputs load(i), arrays as the binary takes them, in Qualcomm's HTP emulator; yields (i, output) each.

    `description`: what stands beside the binary: its input and output as model_io.io_of has them, `graph`, `soc`.
    Raises CompilerError.
    """
    import concurrent.futures
    import queue

    import numpy as np

    idle = queue.SimpleQueue()

    def run(i):
        process = idle.get()
        path = Path(folder, f"{i}.npy")
        np.save(path, load(i))
        process.ask(path)
        output = process.answer()["output"]
        path.unlink()
        idle.put(process)
        return i, np.array(output, dtype=description["output"]["dtype"])

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qnn-", ignore_cleanup_errors=True))
        write_context(binary, description, folder)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(num_processes))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for _ in range(num_processes):  # when this ends they are killed first, so no thread waits for them
            idle.put(stack.enter_context(Process("run", folder, description["soc"], wheels)))
        futures = [pool.submit(run, i) for i in numbers]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
