"""What stands beside a compiled model: its tensors, its classes, how its clips are made, what it was made of.

example_export.py and compile_offline.py write it as <name>.json, a bundle of qai_hub_models holds it in three files.
This is the one reader.
"""

import contextlib
import json
from itertools import chain, repeat
from pathlib import Path

import common

from aihub import model_io


def read_description(path, sha256=""):
    """What is known of a model file or folder without AI Hub, a dict; {} where nothing stands beside it.

    "input" and "output" as model_io.io_of has them, "classes", "clip" (clip.ClipDescription.as_dict), "checkpoint",
    "temperature" and "threshold" (calibration.Calibration) and more, as far as they are there. sha256: of the model,
    where it is known already. A file that is no description is named and ignored; exits with code 2 and one sentence
    for that of another model.
    """
    path = Path(path)
    own = path.with_suffix(".json")
    try:
        described = json.loads(own.read_text(encoding="utf-8"))
        made_of = described["sha256"]
    except FileNotFoundError:
        return of_bundle(path)
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{own} is not what example_export.py writes beside a model, it is ignored")
        return of_bundle(path)
    if made_of != (sha256 or common.sha256_of(path)):
        common.refuse(f"{own} describes another file than {path}; export the model again")
    return described


def of_bundle(path):
    """What metadata.json, labels.txt and clip.json beside a model say, the files of a bundle of qai_hub_models."""
    described = model_io.io_of_bundle(path.parent, path.name) or {}
    with contextlib.suppress(OSError, ValueError):
        described["classes"] = Path(path.parent, "labels.txt").read_text(encoding="utf-8").splitlines()
    return described | common.read_json(Path(path.parent, "clip.json"))


def checkpoints_of(described):
    """[(path, its SHA-256 or None)] of the checkpoints that a model was made of: text, or lists where several vote."""
    told = (described.get(key) or [] for key in ("checkpoint", "checkpoint_sha256"))
    paths, hashes = ([of] if isinstance(of, str) else of for of in told)
    return list(zip(paths, chain(hashes, repeat(None))))


def check_age(described, path):
    """Say it where a checkpoint has changed since a model was made of it: its logits are those of the old weights."""
    for checkpoint, sha256 in checkpoints_of(described):
        if sha256 and Path(checkpoint).is_file() and common.sha256_of(checkpoint) != sha256:
            print(
                f"the checkpoint {checkpoint} is not the one that the export {path} was made of: what follows is of "
                f"the weights that it had then; export it again for its own"
            )


def clip_of_model(described, path, shape):
    """The ClipDescription of a model that takes `shape` = (N, C, T, H, W), by what `read_description` found.

    What is not said is assumed, and printed. Exits with code 2 and one sentence if the model takes other clips.
    """
    from torchvision_patches import clip

    told = described.get("clip") or {}
    own = {"clip_len": int(shape[2]), "crop_size": tuple(int(side) for side in shape[3:])}
    try:
        description, _ = clip.described(told)
    except (ValueError, TypeError, AttributeError) as e:
        common.refuse(f"what stands beside {path} is no description of a clip ({e}); export the model again")
    taken = description._replace(**own)
    if told and (differences := description.differences(taken, ("clip_len", "crop_size"))):
        common.refuse(f"what stands beside {path} says {', '.join(differences)}, as the model takes; export it again")
    if told:
        return description
    scale = [side / official for side, official in zip(own["crop_size"], description.crop_size)]
    resized = tuple(round(side * by) for side, by in zip(description.resize_size, scale))  # as much is cut off
    taken = taken._replace(resize_size=resized)
    assumed = taken.says(("frame_rate", "resize_size", "rotate"))
    print(f"nothing beside {path} says how its clips are made; assumed: {assumed}")
    return taken
