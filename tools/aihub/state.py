"""What run_inference.py keeps on disk: the state of a run, by chunk, and the logits that it writes.

OUTPUT_H5.state/examined.json       {clip: tensors.Examined} of clips that were found good
OUTPUT_H5.state/<model>.json        the model at AI Hub, what it takes and gives, whether one clip went through it
OUTPUT_H5.state/<chunk>.json        AI Hub's ids of a chunk's dataset and job
OUTPUT_H5.state/<chunk>.npy         a chunk's logits, float32 (clips, classes), once they arrived

Files are named by a hash of what they depend on, so runs of several models and sets of clips share the folder.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import common

from aihub import logits_file, tensors


class Chunk(NamedTuple):
    """Clips that travel as one dataset."""

    number: int  # counted in the manifest's order
    key: str  # of all that decides its logits
    clips: list  # paths relative to data_path


def chunks_of(clips, good, size, model):
    """Cut clips by their place in the manifest, so that one that is left out or comes back changes one chunk.

    good: {clip: tensors.Examined} of those that are not left out; model: what else their logits depend on.
    """
    parts = [[clip for clip in clips[start : start + size] if clip in good] for start in range(0, len(clips), size)]
    keys = [key_of(model, [(clip, good[clip].digest) for clip in part]) for part in parts]
    return [Chunk(number, key, part) for number, (key, part) in enumerate(zip(keys, parts)) if part]


def key_of(*parts):
    """A hash of values that JSON can hold, 32 hex digits."""
    return common.json_hash(parts)[:32]


class State:
    """The folder OUTPUT_H5.state."""

    def __init__(self, output_h5):
        self.folder = Path(f"{output_h5}.state")
        self.folder.mkdir(parents=True, exist_ok=True)
        for upload in self.folder.glob("upload-*"):  # of a run that was killed; there is no other, see only_run
            shutil.rmtree(upload)
        for leftover in self.folder.parent.glob(f".{Path(output_h5).name}.*.tmp"):
            leftover.unlink()

    def read(self, name):
        """The content of <name>.json, or {} if it is not there or damaged."""
        return common.read_json(self.folder / f"{name}.json")

    def update(self, name, **values):
        """Write <name>.json with these values changed."""
        common.write_text(self.folder / f"{name}.json", json.dumps(self.read(name) | values))

    def examine(self, folder, clips, known=()):
        """tensors.examine_all, for which the state remembers, and `known` of an earlier result, what was seen."""
        good, bad = tensors.examine_all(folder, clips, dict(known) | self.read("examined"))
        self.update("examined", **good)
        return good, bad

    def has_logits(self, key):
        return (self.folder / f"{key}.npy").exists()

    def logits(self, key):
        """Float32 (clips, classes) of a chunk that has arrived."""
        import numpy as np

        return np.load(self.folder / f"{key}.npy")

    def save_logits(self, key, logits):
        import numpy as np

        with common.written_then_renamed(self.folder / f"{key}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, logits)

    def remove(self, names):
        """Delete what was kept under these names, and the folder unless it keeps something of other runs."""
        for name in names:
            for suffix in (".json", ".npy"):
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
        others = [path for path in self.folder.iterdir() if path.name != "examined.json"]
        if others:
            print(f"{self.folder} still keeps {len(others)} files for another model, other clips or another hub")
        else:
            shutil.rmtree(self.folder)


def read_result(path):
    """What an earlier run wrote to `path`, a dict; {} if there is nothing that can be used.

    number: of clips. clips: their paths. chunks: [(key, number of clips)], [] where another program wrote the file.
    attributes: of the file. examined: {clip: values of a tensors.Examined}.
    """
    try:
        with common.open_hdf5(path)[0] as file:
            chunks = [line.decode().split() for line in file["chunks"]] if "chunks" in file else []
            clips = [clip.decode() for clip in file["tensor_paths"]] if "tensor_paths" in file else []
            return {
                "number": logits_file.count_samples(file),
                "clips": clips,
                "chunks": [(key, int(number)) for key, number in chunks],
                "attributes": dict(file.attrs),
                "examined": json.loads(file["examined"][()].tobytes()) if "examined" in file else {},
            }
    except (OSError, KeyError, ValueError):
        return {}


def logits_of_row(path, row):
    """Float32 (classes,) of the clip that `tensor_paths[row]` names."""
    with common.open_hdf5(path)[0] as file:
        return logits_file.logits_of_clips(file, [row])[0]


def take_over(path, result, chunks, state):
    """Copy what an earlier result has of these chunks into the state, so that it is not run again."""
    keys, row = {chunk.key for chunk in chunks}, 0
    if keys.isdisjoint(key for key, _ in result.get("chunks", [])):
        return
    jobs = json.loads(result["attributes"]["job_ids"])
    with common.open_hdf5(path)[0] as file:
        for (key, number), job in zip(result["chunks"], jobs):
            if key in keys:
                state.save_logits(key, logits_file.logits_of_clips(file, range(row, row + number)))
                state.update(key, job=job)
            row += number


def write_result(path, chunks, state, output_name, attributes):
    """Write OUTPUT_H5: the logits as logits_file has them, and for the next run `chunks` and `examined`.

    Returns how many clips have logits that are no numbers.
    """
    import h5py
    import numpy as np

    clips = [clip for chunk in chunks for clip in chunk.clips]
    with common.written_then_renamed(path) as temporary, common.new_hdf5(temporary) as file:
        rows = (row for chunk in chunks for row in state.logits(chunk.key))
        broken = logits_file.write_logits(file, rows, clips, output_name)
        sizes = [f"{chunk.key} {len(chunk.clips)}" for chunk in chunks]
        file.create_dataset("chunks", data=sizes, dtype=h5py.string_dtype())
        examined = np.frombuffer(json.dumps(state.read("examined")).encode(), np.uint8)
        file.create_dataset("examined", data=examined, compression="gzip")
        file.attrs.update(attributes)
    return broken


def keep_aside(path, result, chunks, model_sha256):
    """Rename an earlier result that this run's would lose: of another model, or with clips that this run has not."""
    clips = {clip for chunk in chunks for clip in chunk.clips}
    same_model = result["attributes"].get("model_sha256") == model_sha256
    if same_model and clips.issuperset(result["clips"]):
        return
    what = "more clips" if same_model else "another model"
    number = 1
    while (aside := path.with_name(f"{path.stem}-before-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} held a result of {what}; it is now {aside}")
