"""Clips of a manifest through a QNN context binary: which are done already, and how the logits agree with torch's.

Where the emulator runs it, a clip takes 10 to 30 s of a core, so it is for a handful.
"""

import functools
import json
from pathlib import Path

import common
from common import json_lines, machine

from aihub import logits_file, model_io, onnx_graphs, tensors

from . import binary_runs, latency


def identity_of(data_dir, row):
    """What tells a clip from another, also from its own later version: [tensor path, bytes, mtime in ns]."""
    from torchvision_patches.decoding import stamp

    return [row["tensor_path"], *stamp(Path(data_dir, row["tensor_path"]))]


def outputs_of(binary, data_dir, rows, output_h5, wheels, num_processes=0):
    """A binary's outputs of clips, an array (clips, classes) of its output type; prints what they took.

    rows: of the manifest in `data_dir`, or {"tensor_path"} alone. Each clip is noted in `output_h5`.state when
    it is done and is not run again; the notes stay for a later run of more clips. Raises CompilerError.
    """
    import numpy as np
    from tqdm import tqdm

    notes = Path(f"{output_h5}.state", f"{binary.description['sha256'][:16]}.jsonl")
    done = {json.dumps(row.get("clip")): row.get("output") for row in json_lines.read_rows(notes)}
    identities = [identity_of(data_dir, row) for row in rows]
    names, load = [json.dumps(identity) for identity in identities], loader(binary, data_dir)
    missing = {i: functools.partial(load, rows[i]) for i, name in enumerate(names) if name not in done}
    number, times = min(len(missing), machine.num_workers(num_processes)), []
    if binary_runs.is_native():
        number = min(number, 1)  # there is one NPU
    print(f"running   {binary.path} on {binary_runs.where_it_runs(binary)}", flush=True)
    with tqdm(total=len(rows), initial=len(rows) - len(missing), unit="clip", desc="running") as bar:
        for i, output, seconds in binary_runs.run_each(binary, missing, wheels, number):
            times.append(seconds)
            done[names[i]] = output.tolist()
            json_lines.append_row(notes, {"clip": identities[i], "output": done[names[i]]})
            bar.update()
    if said := latency.measured(times, binary.description, binary_runs.is_native()):
        print(said)
    return np.concatenate([np.array(done[name], dtype=binary.description["output"]["dtype"]) for name in names])


def loader(binary, data_dir):
    """A function from a manifest's row to its clip, float32 (1, 3, T, H, W) as the binary takes it."""
    return functools.partial(tensors.read_clip, data_dir, shape=model_io.ncthw(binary.description["input"]["shape"]))


def compare(uncompiled, graph, binary, clips, outputs):
    """Print how a binary's outputs agree with onnxruntime's on this CPU and with torch's, and return it.

    clips: that gave the outputs, each float32 (1, 3, T, H, W).
    """
    import numpy as np
    import torch

    session = onnx_graphs.cpu_session(graph.SerializeToString())
    taken, given = binary.description["input"], binary.description["output"]
    expected, num_clips = {"onnxruntime": [], "torch": []}, len(outputs)
    for clip in clips:
        (output,) = session.run(None, {taken["name"]: model_io.as_model_input(clip, taken)})
        expected["onnxruntime"].append(model_io.as_logits(output, given))
        if uncompiled.torch_model is not None:
            with torch.no_grad():
                expected["torch"].append(uncompiled.torch_model(torch.from_numpy(clip)).numpy())
    figures, logits = {}, model_io.as_logits(outputs, given)
    for what, arrays in expected.items():
        if arrays:
            figures[f"against_{what}"] = agreed = logits_file.agreement(logits, np.concatenate(arrays))
            print(f"binary against {what}: {logits_file.agreement_in_words(agreed, num_clips, given['scale'])}")
    return figures


def write_h5(path, rows, outputs, binary):
    """Write the logits in a binary's outputs of these rows as run_inference.py does; returns what write_logits does."""
    description = binary.description
    with common.written_then_renamed(path) as temporary, common.new_hdf5(temporary) as file:
        logits, paths = model_io.as_logits(outputs, description["output"]), [row["tensor_path"] for row in rows]
        broken = logits_file.write_logits(file, logits, paths, description["output"]["name"])
        io = {key: description[key] for key in ("input", "output")}
        attributes = {"model": binary.path.name, "device": binary_runs.where_it_runs(binary), "job_ids": "[]"}
        attributes |= {"output_kind": "logits", "io": json.dumps(io)}
        if description.get("classes"):
            attributes["classes"] = json.dumps(description["classes"])
        file.attrs.update(attributes)
    return broken
