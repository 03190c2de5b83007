"""Qualcomm's compiler as this machine has it: its wheels in a folder of their own, its process.

The wheels cannot be imported beside the project's onnxruntime, so provider.py works with them in a process of its own.
Nothing of them is copied or committed: Qualcomm's licence lets everybody use them, and nobody pass them on.
"""

import collections
import contextlib
import json
import mmap
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common

# onnxruntime-qnn 2.6.0 carries QAIRT 2.50, as AI Hub does; 2.7.0 carries 2.51, whose binaries 2.50 refuses
WHEELS = {"onnxruntime-qnn": "2.6.0", "onnxruntime": "1.24.4", "flatbuffers": "25.12.19"}
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
WATCHER, PROVIDER = (str(Path(__file__).with_name(name)) for name in ("watcher.py", "provider.py"))
LIBRARIES = ("libonnxruntime_providers_qnn.so", "libQnnSystem.so", "libQnnHtp.so")  # what a compile loads
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
    if not (3, 11) <= python <= (3, 14):
        return f"Python {python[0]}.{python[1]} (3.11 to 3.14 are served)"
    name, version = platform.libc_ver()
    if system == "Linux" and (name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35)):
        return f"{name or 'a C library other than glibc'} {version} (glibc 2.35 or newer is needed)"
    return ""


def is_installed(folder):
    """Whether the folder holds all wheels in the pinned versions; it appears at once, by renaming."""
    names = [f"{name.replace('-', '_')}-{version}.dist-info" for name, version in WHEELS.items()]
    return all(Path(folder, name).is_dir() for name in names)


def install(folder):
    """Install the pinned wheels into `folder` unless they are there, and see that their libraries can be loaded.

    Exits with code 2 and one sentence where there is no wheel, pip cannot get it, or the system lacks a library.
    """
    folder = Path(folder).absolute()
    if not is_installed(folder):
        if reason := missing_wheel():
            common.refuse(f"Qualcomm's compiler is not made for {reason}: {HOW_ELSE}")
        fetch_wheels(folder)
    if reason := why_not_loaded(folder):
        common.refuse(reason)


def fetch_wheels(folder):
    """Let pip put the wheels into a folder that appears at once."""
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
        fresh.chmod(0o755)  # mkdtemp's 0700 would shut out the other users of a project's folder
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


def why_not_loaded(folder):
    """A sentence that says why the provider's libraries in `folder` cannot be loaded here; "" where they can.

    The system's loader is asked, in a process of its own. A missing library is named with its Debian package, whose
    name follows from it by Debian's policy: libatomic.so.1 is in libatomic1, libgcc_s.so.1 in libgcc-s1.
    """
    files = [str(path) for name in LIBRARIES if (path := Path(folder, "onnxruntime_qnn", name)).exists()]
    load = "import ctypes, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path)"
    process = subprocess.run([sys.executable, "-I", "-S", "-c", load, *files], capture_output=True, text=True)
    if process.returncode == 0:
        return ""
    error = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1].removeprefix("OSError: ")
    missing = re.match(r"(lib[\w+.-]+?)\.so\.([\d.]+): cannot open shared object file", error)
    if missing:
        name, version = missing[1].replace("_", "-"), missing[2]
        package = f"{name}{'-' if name[-1].isdigit() else ''}{version}"
        return (
            f"Qualcomm's compiler needs {error.partition(':')[0]}, which this machine does not have; on Debian and "
            f"Ubuntu: apt install {package}"
        )
    return f"the libraries of Qualcomm's compiler cannot be loaded ({error}); delete {folder} to install them anew"


# --- its process ------------------------------------------------------------------------------------------------------


class Process:
    """provider.py at work on a folder, as a context: `ask` sends it a line, `answer` waits for its next one.

    When the context ends, or this program is killed, the process ends and the folder goes.
    """

    def __init__(self, command, folder, soc, wheels):
        # not by PYTHONPATH, which cannot name a folder with a colon
        work = [sys.executable, "-P", PROVIDER, str(Path(wheels).absolute()), command, str(folder), str(soc)]
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-P", WATCHER, str(folder), *work], text=True, encoding="utf-8", cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
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
                    reason = f"it does not take {', '.join(names)}" if names else reason_of(figures["error"])
                    raise CompilerError(reason, figures["unsupported"])
                binary = Path(folder, "context.bin")
                return binary, figures | chip_of(binary) | {"bytes": binary.stat().st_size}

            yield finish


def chip_of(path):
    """{"chip", "hexagon"} that a context binary was made for, as its own record of the compiler's options has it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        options = re.search(rb"soc_type=(\w+);arch=(\d+)", content)
        chip, arch = (part.decode() for part in options.groups()) if options else ("unknown", "unknown")
    return {"chip": chip, "hexagon": f"v{arch}"}


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


def reason_of(error):
    """The part of onnxruntime's message that says something, on one line."""
    return " ".join(error.rpartition(" : ")[2].split())[:300]
