"""What runs inside the compiler's own process: Qualcomm's provider for onnxruntime compiles a graph or runs a binary.

compiler.py starts it with the folder of its wheels (the project's onnxruntime is another one), watcher.py ends it.
It answers with lines of JSON.

    provider.py WHEELS compile FOLDER SOC    FOLDER/graph.onnx -> FOLDER/context.bin; one answer
    provider.py WHEELS run FOLDER SOC        loads FOLDER/context.onnx, which names its binary: one answer; then one for
                                             each line of stdin, an .npy file with one input

SOC is Qualcomm's number of the chip that a binary was made for, or "native" for the chip of this machine.
"""

import csv
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import numpy as np
import onnx
import onnxruntime
import onnxruntime_qnn

ESTIMATE = "Simulated (Accelerator exec time us"  # an event of the compiler's profile, in us


def htp_session(path, soc, entries=(), options=()):
    """An onnxruntime session on Qualcomm's HTP backend, for the chip with this SoC number, without fallback to the CPU.

    Raises onnxruntime's exception if the graph is not wholly taken. Only once a process: the provider is registered.
    """
    onnxruntime.register_execution_provider_library(onnxruntime_qnn.EP_NAME, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == onnxruntime_qnn.EP_NAME]
    if not devices:
        raise RuntimeError("onnxruntime finds no NPU of Qualcomm here: is its driver installed?")
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4  # it reports errors on success, too
    for key, value in {"session.disable_cpu_ep_fallback": "1", **dict(entries)}.items():
        session_options.add_session_config_entry(key, value)
    target = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "enable_htp_fp16_precision": "1"}
    target |= {"htp_performance_mode": "burst"} if soc == "native" else {"soc_model": soc}
    session_options.add_provider_for_devices(devices[:1], target | dict(options))
    return onnxruntime.InferenceSession(str(path), session_options, enable_fallback=0)


def compile_graph(folder, soc):
    """Compile FOLDER/graph.onnx to FOLDER/context.bin; returns its figures, or {"error", "unsupported": [[op, name]]}.

    estimated_ms: [low, estimate, high], None for a chip for which the compiler has no model of time.
    """
    context, profile = folder / "made.onnx", folder / "profile.csv"
    entries = {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    options = {"profiling_level": "basic", "profiling_file_path": str(profile)}
    try:
        htp_session(folder / "graph.onnx", soc, entries, options)
        error = ""
    except Exception as e:  # onnxruntime has a class of its own for every status
        error = str(e)
    nodes = onnx.load(context, load_external_data=False).graph.node if context.exists() else []
    left = [[node.op_type, node.name] for node in nodes if node.op_type != "EPContext"]
    if error or len(nodes) != 1 or left:
        return {"error": error or f"the graph was cut into {len(nodes)} parts", "unsupported": left}
    os.replace(folder / "made_qnn.bin", folder / "context.bin")
    attributes = {attribute.name: attribute.s.decode() for attribute in nodes[0].attribute}
    made_by = {"qairt": attributes["ep_sdk_version"].removeprefix("v"), "graph": attributes["partition_name"]}
    return figures_of(profile) | made_by


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


def answer(message):
    print(json.dumps(message), flush=True)


def run_inputs(folder, soc):
    """Load FOLDER/context.onnx and answer {"output", "seconds"} for each input that stdin names."""
    try:
        session = htp_session(folder / "context.onnx", soc)
    except Exception as e:  # onnxruntime has a class of its own for every status
        answer({"error": str(e)})
        return
    answer({})
    (name,) = (tensor.name for tensor in session.get_inputs())
    for line in sys.stdin:
        values = np.load(line.rstrip("\n"))
        start = time.perf_counter()
        (output,) = session.run(None, {name: values})
        answer({"output": output.tolist(), "seconds": time.perf_counter() - start})


def main():
    command, folder, soc = sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    if command == "compile":
        answer(compile_graph(folder, soc))
    else:
        run_inputs(folder, soc)


if __name__ == "__main__":
    main()
