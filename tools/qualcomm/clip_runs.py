"""Clips of a manifest through a QNN context binary: which are done already, and how the logits agree with torch's.

Definitions only, no constant that a user edits. Where the emulator runs it, a clip takes 10 to 30 s of a core, so it is
for a handful.
"""

import json
from pathlib import Path

import common
from common import json_lines, machine

from aihub import logits_file, model_io, onnx_graphs

from . import binary_runs, latency


def identity_of(data_dir, row):
    """What tells a clip from another, also from its own later version: [tensor path, bytes, mtime in ns]."""
    path = Path(data_dir, row["tensor_path"])
    status = path.stat() if path.exists() else None
    return [row["tensor_path"], *((status.st_size, status.st_mtime_ns) if status else (0, 0))]


def outputs_of(binary, clips, output_h5, wheels, num_processes):
    """A binary's outputs of clips, an array (clips, classes) of its output type; prints what they took.

    `clips`: [(identity, function that returns float32 (1, 3, T, H, W))]. Each clip is noted in `output_h5`.state when
    it is done and is not run again; the notes stay for a later run of more clips. Raises CompilerError.
    """
    import numpy as np
    from tqdm import tqdm

    notes = Path(f"{output_h5}.state", f"{binary.description['sha256'][:16]}.jsonl")
    done = {json.dumps(row.get("clip")): row.get("output") for row in json_lines.read_rows(notes)}
    names = [json.dumps(identity) for identity, _ in clips]
    missing = {i: clips[i][1] for i, name in enumerate(names) if name not in done}
    number, times = min(len(missing), machine.num_workers(num_processes)), []
    if binary_runs.is_native():
        number = min(number, 1)  # there is one NPU
    print(f"running   {binary.path} on {binary_runs.where_it_runs(binary)}", flush=True)
    with tqdm(total=len(clips), initial=len(clips) - len(missing), unit="clip", desc="running") as bar:
        for i, output, seconds in binary_runs.run_each(binary, missing, wheels, number):
            times.append(seconds)
            done[names[i]] = output.tolist()
            json_lines.append_row(notes, {"clip": clips[i][0], "output": done[names[i]]})
            bar.update()
    if said := latency.measured(times, binary.description, binary_runs.is_native()):
        print(said)
    return np.concatenate([np.array(done[name], dtype=binary.description["output"]["dtype"]) for name in names])


def compare(uncompiled, graph, binary, clips, outputs):
    """Print how a binary's outputs agree with onnxruntime's on this CPU and with torch's, and return it."""
    import numpy as np
    import torch

    session = onnx_graphs.cpu_session(graph.SerializeToString())
    taken, given = binary.description["input"], binary.description["output"]
    expected = {"onnxruntime": [], "torch": []}
    for _, load in clips:
        clip = load()
        (output,) = session.run(None, {taken["name"]: model_io.as_model_input(clip, taken)})
        expected["onnxruntime"].append(model_io.as_logits(output, given))
        if uncompiled.torch_model is not None:
            with torch.no_grad():
                expected["torch"].append(uncompiled.torch_model(torch.from_numpy(clip)).numpy())
    figures, logits = {}, model_io.as_logits(outputs, given)
    for what, arrays in expected.items():
        if arrays:
            figures[f"against_{what}"] = agreed = logits_file.agreement(logits, np.concatenate(arrays))
            print(f"binary against {what}: {logits_file.in_words(agreed, len(clips), given['scale'])}")
    return figures


def write_h5(path, tensor_paths, logits, binary):
    """Write logits as run_inference.py does."""
    import h5py

    description = binary.description
    with common.written_then_renamed(path) as temporary, h5py.File(temporary, "w") as file:
        logits_file.write_logits(file, logits, tensor_paths, description["output"]["name"])
        io = {key: description[key] for key in ("input", "output")}
        attributes = {"model": binary.path.name, "device": binary_runs.where_it_runs(binary), "job_ids": "[]"}
        attributes |= {"output_kind": "logits", "io": json.dumps(io)}
        if description.get("classes"):
            attributes["classes"] = json.dumps(description["classes"])
        file.attrs.update(attributes)
