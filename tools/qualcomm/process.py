"""What runs inside the compiler's own process: Qualcomm's provider for onnxruntime compiles a graph or runs a binary.

compiler.py starts it with the folder of its wheels on PYTHONPATH (the project's onnxruntime is another one), and
watcher.py ends it.

    process.py compile FOLDER SOC       FOLDER/graph.onnx -> FOLDER/context.bin; answers with one line of JSON
    process.py run FOLDER SOC           FOLDER/context.onnx, which names its binary; for each line of stdin, an .npy
                                        file with one input, it answers with one line of JSON
"""

import csv
import json
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_qnn

ESTIMATE = "Simulated (Accelerator exec time us"  # an event of the compiler's profile, in us


def make_session(path, soc, entries=(), options=()):
    """An onnxruntime session on Qualcomm's HTP backend, for the chip with this SoC number, without fallback to the CPU.

    Raises onnxruntime's exception if the graph is not wholly taken. Only once a process: the provider is registered.
    """
    onnxruntime.register_execution_provider_library(onnxruntime_qnn.EP_NAME, onnxruntime_qnn.get_library_path())
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4  # it reports errors on success, too
    for key, value in {"session.disable_cpu_ep_fallback": "1", **dict(entries)}.items():
        session_options.add_session_config_entry(key, value)
    device = next(d for d in onnxruntime.get_ep_devices() if d.ep_name == onnxruntime_qnn.EP_NAME)
    target = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": soc, "enable_htp_fp16_precision": "1"}
    session_options.add_provider_for_devices([device], target | dict(options))
    return onnxruntime.InferenceSession(str(path), session_options, enable_fallback=0)


def compile_graph(folder, soc):
    """Compile FOLDER/graph.onnx to FOLDER/context.bin; returns its figures, or {"error", "unsupported": [[op, name]]}.

    estimated_ms: [low, estimate, high], None for a chip for which the compiler has no model of time.
    """
    context, profile = folder / "made.onnx", folder / "profile.csv"
    entries = {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    options = {"profiling_level": "basic", "profiling_file_path": str(profile)}
    try:
        make_session(folder / "graph.onnx", soc, entries, options)
        error = ""
    except Exception as e:  # onnxruntime has a class of its own for every status
        error = str(e)
    nodes = onnx.load(context, load_external_data=False).graph.node if context.exists() else []
    left = [[node.op_type, node.name] for node in nodes if node.op_type != "EPContext"]
    if error or len(nodes) != 1 or left:
        return {"error": error or f"the graph was cut into {len(nodes)} parts", "unsupported": left}
    os.replace(folder / "made_qnn.bin", folder / "context.bin")
    attributes = {attribute.name: attribute.s.decode() for attribute in nodes[0].attribute}
    target = chip_of(folder / "context.bin") | {"qairt": attributes["ep_sdk_version"].removeprefix("v")}
    return figures_of(profile) | target | {"graph": attributes["partition_name"]}


def figures_of(profile):
    """What the compiler's profile, a CSV file of events, says of latency and of traffic with the main memory."""
    with open(profile, newline="") as file:
        events = {row["Event Identifier"]: int(row["Time"]) for row in csv.DictReader(file) if row["Time"].isdigit()}
    times = [events.get(f"{ESTIMATE}{bound})") for bound in (" (lower estimate)", "", " (upper estimate)")]
    return {
        "estimated_ms": None if None in times else [time / 1000 for time in times],
        "ops_without_cost": events.get("Missing Ops (Number of Ops with no Costs associated)"),
        "spill_bytes": events.get("Intermediate Spill"),
        "fill_bytes": events.get("Intermediate Fill"),
        "weights_and_input_bytes": events.get("Input Fill"),
    }


def chip_of(binary):
    """The chip that a context binary was made for, as its own record of the compiler's options has it."""
    with open(binary, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"soc_type=(\w+);arch=(\d+)", content)
        chip, arch = (part.decode() for part in found.groups()) if found else ("unknown", "unknown")
    return {"chip": chip, "hexagon": f"v{arch}"}


def answer(message):
    print(json.dumps(message), flush=True)


def main():
    command, folder, soc = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if command == "compile":
        answer(compile_graph(folder, soc))
        return
    session = make_session(folder / "context.onnx", soc)
    (name,) = (tensor.name for tensor in session.get_inputs())
    for line in sys.stdin:
        answer({"output": session.run(None, {name: np.load(line.rstrip("\n"))})[0].tolist()})


if __name__ == "__main__":
    main()
