"""What a clip of a model is, the one description that training writes and every later step takes, and reading one.

A checkpoint holds its fields as keys of its own, files of JSON hold `as_dict()`: settings.json beside tensors, the
description beside a compiled model (under "clip"). Which class is which logit stands beside it, under `classes`.
"""

import math
from typing import NamedTuple

import numpy as np

from torchvision_patches.decoding import facts_of, frames_and_rotation
from torchvision_patches.frame_rule import RULE_VERSION, sampled_frames, spread
from torchvision_patches.spatial_numpy import resize_and_crop_array, resized_size

DEFAULT_MODEL = "r2plus1d_18"  # the contest's
OFFICIAL_CLIP_LEN, OFFICIAL_FRAME_RATE = 16, 4.0  # frames; fps: LPCVC 2026 Track 2, what the organisers feed
OF_PIXELS = ("clip_len", "frame_rate", "rotate", "resize_size", "crop_size", "rule_version")  # what makes a tensor
# the flags of training that say a field, under torchvision's names
FLAGS = {"model_name": "model", "resize_size": "val_resize_size", "crop_size": "val_crop_size"}
FLAGS |= {field: field for field in ("clip_len", "frame_rate", "rotate")}


class ClipDescription(NamedTuple):
    """How the clip is made that a network takes, and which network that is."""

    model_name: str  # in torchvision's registry
    clip_len: int  # frames
    frame_rate: float  # frames per second at which a video is sampled
    rotate: bool  # whether frames are turned upright as their file asks players to
    resize_size: tuple  # (height, width), or (side,) for the shorter side; pixels
    crop_size: tuple  # (height, width) of the crop from the centre; pixels
    mean: tuple  # of each colour of values in [0, 1]
    std: tuple
    rule_version: int  # of the rule that picks frames

    def as_dict(self):
        """Plain values, for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()}

    def says(self, fields):
        """Some of its fields for people: "frame_rate 8, rotate False"."""
        return ", ".join(f"{field} {field_in_words(getattr(self, field))}" for field in fields)

    def differences(self, other, fields=OF_PIXELS):
        """How another description differs, as text: ["frame_rate 8, not 4", …], this one's value first."""
        return [
            f"{field} {field_in_words(mine)}, not {field_in_words(theirs)}"
            for field in fields
            if (mine := getattr(self, field)) != (theirs := getattr(other, field))
        ]


def field_in_words(value):
    """A field's value for people: 4 for 4.0, 128 x 171 for (128, 171), 0.5, 0.4 for (0.5, 0.4)."""
    if isinstance(value, (tuple, list)):
        return (", " if isinstance(value[0], float) else " x ").join(field_in_words(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def of_network(model_name=DEFAULT_MODEL, clip_len=OFFICIAL_CLIP_LEN, frame_rate=OFFICIAL_FRAME_RATE):
    """The ClipDescription of a network before training: sizes, mean and std of its newest weights in the registry.

    Raises ValueError for a name that the registry does not have.
    """
    from torchvision_patches import networks  # a board that runs a compiled network has no torchvision

    preset = networks.get_model_weights(model_name).DEFAULT.transforms()
    sizes = (tuple(getattr(preset, key)) for key in ("resize_size", "crop_size", "mean", "std"))
    return ClipDescription(model_name, clip_len, float(frame_rate), False, *sizes, RULE_VERSION)


def described(saved, args=None):
    """The ClipDescription that a file holds, and the names of the fields it does not say, which are `of_network`'s.

    saved: the keys of a checkpoint, or what `as_dict` gave. args: the flags of the training, a dict, for checkpoints of
    others that have no more; torchvision's names. Returns (description, [names]). Raises ValueError as `of_network`,
    and for values that no clip has.
    """
    args = args or {}
    told = {field: args.get(flag) for field, flag in FLAGS.items()}
    told |= {key: saved[key] for key in ClipDescription._fields if saved.get(key) is not None}
    told = {key: value for key, value in told.items() if value is not None}
    untold = [key for key in ClipDescription._fields if key not in told]
    default = of_network(told.get("model_name", DEFAULT_MODEL))._asdict() if untold else {}
    try:
        values = {key: of_type(told[key]) for key, of_type in ClipDescription.__annotations__.items() if key in told}
        description = ClipDescription(**{key: default[key] for key in untold}, **values)
        impossible = [field for field in LENGTHS if not is_possible(field, getattr(description, field))]
        if not impossible and any(a > b for a, b in zip(description.crop_size, 2 * description.resize_size)):
            impossible = ["resize_size", "crop_size"]
    except TypeError as e:
        raise ValueError(f"it says of its clips what has another type ({e})") from None
    if impossible:
        raise ValueError(f"no clip has {description.says(impossible)}")
    return description, untold


# how many numbers each field may be made of
LENGTHS = {"clip_len": [1], "frame_rate": [1], "resize_size": [1, 2], "crop_size": [2], "mean": [3], "std": [3]}


def is_possible(field, value):
    """Whether a field of LENGTHS has so many finite numbers, above 0 but for the mean, and whole ones of pixels."""
    numbers = value if isinstance(value, tuple) else (value,)
    least = -math.inf if field == "mean" else 0
    whole = not field.endswith("_size") or all(isinstance(number, int) for number in numbers)
    return len(numbers) in LENGTHS[field] and whole and all(least < number < math.inf for number in numbers)


def agreed(description, untold, wanted, source):
    """A ClipDescription with what a user asks for where its file says nothing.

    untold: the names of fields that the file does not say, as `described` gives them. wanted: {field: value}. source:
    the file's name. Raises ValueError, one sentence, for a value that contradicts the file.
    """
    for field, value in wanted.items():
        if field not in untold and value != getattr(description, field):
            of_file, asked = field_in_words(getattr(description, field)), field_in_words(value)
            raise ValueError(
                f"{source} was trained on clips of {field} {of_file}, and {field} {asked} is asked for: leave it out"
            )
    return description._replace(**wanted)


class FirstClip(NamedTuple):
    """The first clip of a video as a network takes it."""

    pixels: np.ndarray  # float32 (3, T, H, W), RGB in [0, 1], not normalised
    frame_indices: list  # T numbers of frames
    times: list  # T times in s, from the first frame of the video
    num_frames: int  # of the video
    fps: float  # by its header
    rotation: int  # degrees clockwise by which players turn it; done if the description says `rotate`


def frames_to_read(facts, description):
    """(pts, frame indices) of the frames that the clips of a video with these Facts are made of: int64 (n,) each.

    Clips are all windows of `clip_len` of them; there is at least one.
    """
    numbers = sampled_frames(len(facts.pts), description.clip_len, facts.fps, description.frame_rate)
    return facts.pts[numbers], numbers


def resize_function():
    """The function that resizes and crops frames uint8 (T, H, W, 3): in torch or, where there is none, in numpy.

    Called before processes are forked, it spares each of them to load torch.
    """
    try:
        import torch

        from torchvision_patches.spatial import resize_and_crop
    except ImportError:
        return resize_and_crop_array
    return lambda frames, *sizes: resize_and_crop(torch.from_numpy(frames), *sizes).numpy()


def resized_and_cropped(frames, description):
    """Frames uint8 (T, H, W, 3) as a network takes them: float32 (3, T, crop height, crop width) in [0, 1]."""
    size = resized_size(description.resize_size, *frames.shape[1:3])
    return resize_function()(frames, size, description.crop_size)


def first_clip(path, description):
    """Read the FirstClip of a video, by the frame rule and the sizes of a ClipDescription.

    Raises UnreadableVideo if the file, or one of the clip's frames, cannot be read.
    """
    facts = facts_of(path)
    pts, indices = frames_to_read(facts, description)
    start = int(spread(len(pts) - description.clip_len + 1, 1)[0])
    pts, indices = (column[start : start + description.clip_len] for column in (pts, indices))
    frames, rotation = frames_and_rotation(path, pts, indices, rotate=description.rotate)
    times = ((pts - facts.pts[0]) * facts.tick).round(6).tolist()
    pixels = resized_and_cropped(frames, description)
    return FirstClip(pixels, indices.tolist(), times, len(facts.pts), facts.fps, rotation)
