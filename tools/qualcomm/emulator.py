"""Clips through Qualcomm's HTP emulator: what is done is kept, and how the logits agree with torch and onnxruntime.

Definitions only, no constant that a user edits. An emulated clip takes some 30 s of a core, so it is for a handful.
"""

import json
from pathlib import Path

import common
from common import machine

from aihub import logits_file, model_io, onnx_graphs

from . import compiler


class Journal:
    """OUTPUT_H5.state/<key>.jsonl: one line for each clip that was emulated, so that a kill loses none.

    It stays when all are done, for a later run of more clips. `graph`: where the deployed graph is kept meanwhile, so
    that a restart has nothing to calibrate.
    """

    def __init__(self, output_h5, key):
        folder = Path(f"{output_h5}.state")
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.graph = folder / f"{key[:16]}.jsonl", folder / f"{key[:16]}.onnx"

    def read(self):
        """{(tensor path, bytes, mtime): output as lists}; a line that a kill cut off does not count."""
        done = {}
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                done[tuple(row["clip"])] = row["output"]
            except (ValueError, KeyError, TypeError):
                continue
        return done

    def add(self, clip, output):
        """Note a clip; on a line of its own also after one that was cut off."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"clip": clip, "output": output.tolist()}) + "\n")


def identity_of(data_dir, row):
    """What tells a clip from another, also from its own later version: (tensor path, bytes, mtime in ns)."""
    path = Path(data_dir, row["tensor_path"])
    status = path.stat() if path.exists() else None
    return (row["tensor_path"], *((status.st_size, status.st_mtime_ns) if status else (0, 0)))


def emulate(binary, description, rows, read_clip, journal, data_dir, wheels, num_processes):
    """The emulator's outputs for the manifest's rows, an array (clips, classes) of the binary's output type.

    `read_clip(row)` gives float32 (1, 3, T, H, W). Clips that the journal has are not run again. Raises CompilerError.
    """
    import numpy as np
    from tqdm import tqdm

    clips = [identity_of(data_dir, row) for row in rows]
    done = journal.read()
    missing = [i for i, clip in enumerate(clips) if clip not in done]

    def load(i):
        return model_io.as_model_input(read_clip(rows[i]), description["input"])

    number = min(len(missing), machine.num_workers(num_processes))
    with tqdm(total=len(clips), initial=len(clips) - len(missing), unit="clip", desc="emulating") as bar:
        for i, output in compiler.emulate(binary, description, wheels, missing, load, number) if missing else ():
            journal.add(clips[i], output)
            done[clips[i]] = output.tolist()
            bar.update()
    return np.concatenate([np.array(done[clip], dtype=description["output"]["dtype"]) for clip in clips])


def compare(found, graph, description, rows, read_clip, outputs):
    """Print how the emulator's outputs agree with onnxruntime's on this CPU and with torch's, and return it."""
    import numpy as np

    session = onnx_graphs.cpu_session(graph.SerializeToString())
    taken, given = description["input"], description["output"]
    expected = {"onnxruntime": [], "torch": []}
    for row in rows:
        clip = read_clip(row)
        (output,) = session.run(None, {taken["name"]: model_io.as_model_input(clip, taken)})
        expected["onnxruntime"].append(model_io.as_logits(output, given))
        if found.torch_model is not None:
            import torch

            with torch.no_grad():
                expected["torch"].append(found.torch_model(torch.from_numpy(clip)).numpy())
    figures, logits = {}, model_io.as_logits(outputs, given)
    for what, arrays in expected.items():
        if not arrays:
            continue
        figures[f"against_{what}"] = found_out = logits_file.agreement(logits, np.concatenate(arrays))
        print(f"emulator against {what}: {logits_file.in_words(found_out, len(rows), given['scale'])}")
    return figures


def write_h5(path, rows, logits, description, model_name):
    """Write logits as run_inference.py does: data/0/batch_<i> float32 (1, classes), and `tensor_paths`."""
    import h5py

    with common.written_then_renamed(path) as temporary, h5py.File(temporary, "w") as file:
        logits_file.write_logits(file, logits, [row["tensor_path"] for row in rows], description["output"]["name"])
        device = f"Qualcomm's HTP emulator for {description['chip']}, QAIRT {description['qairt']}"
        file.attrs.update({"model": model_name, "device": device, "job_ids": "[]", "output_kind": "logits"})
        file.attrs["io"] = json.dumps({key: description[key] for key in ("input", "output")})
        if description["classes"]:
            file.attrs["classes"] = json.dumps(description["classes"])
