"""What a clip of a model is: the one description that training writes and every later step takes from there.

A checkpoint holds its fields as keys of its own, files of JSON hold `as_dict()`: settings.json beside tensors, the
description beside a compiled model (under "clip"). Which class is which logit stands beside it, under `classes`.
"""

from typing import NamedTuple

from torchvision_patches.frame_rule import RULE_VERSION

DEFAULT_MODEL = "r2plus1d_18"  # the contest's
OFFICIAL_CLIP_LEN, OFFICIAL_FRAME_RATE = 16, 4.0  # frames; fps: LPCVC 2026 Track 2, what the organisers feed
OF_PIXELS = ("clip_len", "frame_rate", "rotate", "resize_size", "crop_size", "rule_version")  # what makes a tensor


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

    def differences(self, other, fields=OF_PIXELS):
        """How another description differs, as text: ["frame_rate 8, not 4", …], this one's value first."""
        return [
            f"{field} {in_words(mine)}, not {in_words(theirs)}"
            for field in fields
            if (mine := getattr(self, field)) != (theirs := getattr(other, field))
        ]


def in_words(value):
    """A field's value for people: 4 for 4.0, 128 x 171 for (128, 171), 0.5, 0.4 for (0.5, 0.4)."""
    if isinstance(value, (tuple, list)):
        return (", " if isinstance(value[0], float) else " x ").join(in_words(part) for part in value)
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
    others that have no more; torchvision's names. Returns (description, [names]). Raises ValueError as `of_network`.
    """
    args = args or {}
    told = {"model_name": args.get("model"), "clip_len": args.get("clip_len"), "frame_rate": args.get("frame_rate")}
    told |= {"resize_size": args.get("val_resize_size"), "crop_size": args.get("val_crop_size")}
    told |= {"rotate": args.get("rotate")}
    told |= {key: saved[key] for key in ClipDescription._fields if saved.get(key) is not None}
    told = {key: value for key, value in told.items() if value is not None}
    untold = [key for key in ClipDescription._fields if key not in told]
    default = of_network(told.get("model_name", DEFAULT_MODEL))._asdict() if untold else {}
    values = {key: of_type(told[key]) for key, of_type in ClipDescription.__annotations__.items() if key in told}
    return ClipDescription(**{key: default[key] for key in untold}, **values), untold
