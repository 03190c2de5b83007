"""Small tensor transforms on batches of clips; they run on the training device.

A batch is float32 (N, 3, T, H, W), RGB, in [0, 1] before it is normalised.
"""

import re

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from torchvision_patches.spatial import PRESET


def names_a_side(class_name):
    """Whether a class stops being itself in a mirror: `left` or `right` is one of the words of its name."""
    return not {"left", "right"}.isdisjoint(re.split(r"[^a-z]+", class_name.lower()))


def as_float(clips):
    """uint8 (N, T, H, W, 3), as training clips come, as float32 (N, 3, T, H, W) in [0, 1]; others as they are."""
    return clips.permute(0, 4, 1, 2, 3).float().div(255) if clips.dtype == torch.uint8 else clips


class Normalize(torch.nn.Module):
    """[0, 1] -> the mean and standard deviation of Kinetics-400, per colour, that R(2+1)D-18 was trained with."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(PRESET.mean).view(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor(PRESET.std).view(3, 1, 1, 1))

    def forward(self, clips):
        return (clips - self.mean) / self.std


class RandomHorizontalFlip(torch.nn.Module):
    """Mirror each clip, all its frames alike, with probability `p`; never a clip whose class names a side."""

    def __init__(self, class_names, p):
        super().__init__()
        probability = [0.0 if names_a_side(name) else p for name in class_names]
        self.register_buffer("probability", torch.tensor(probability))

    def forward(self, clips, targets):
        flip = torch.rand(len(clips), device=clips.device) < self.probability[targets]
        return torch.where(flip.view(-1, 1, 1, 1, 1), clips.flip(-1), clips)


class ColorJitter(torch.nn.Module):
    """Change each clip's brightness, contrast and saturation, all its frames alike, by factors in 1 ± `change`.

    In this order. torchvision's ColorJitter draws one set of factors for all that it is given, here a whole batch.
    """

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, clips):
        factors = 1 + self.change * (2 * torch.rand(3, len(clips), 1, 1, 1, 1, device=clips.device) - 1)
        brightness, contrast, saturation = factors.clamp(min=0).unbind()
        clips = (clips * brightness).clamp(0, 1)
        average = grey(clips).mean((1, 3, 4), keepdim=True)  # of each frame
        clips = torch.lerp(average, clips, contrast).clamp(0, 1)
        return torch.lerp(grey(clips), clips, saturation).clamp(0, 1)


def grey(clips):
    """(N, 3, T, H, W) -> (N, 1, T, H, W)."""
    return v2.functional.rgb_to_grayscale(clips.transpose(1, 2)).transpose(1, 2)


class MixUp(v2.MixUp):
    """torchvision's MixUp on clips: it takes batches of videos only as tv_tensors.Video.

    clips (N, 3, T, H, W), targets int64 (N,) -> clips of that shape, targets float32 (N, num_classes).
    """

    def forward(self, clips, targets):
        clips, targets = super().forward(tv_tensors.Video(clips), targets)
        return clips.as_subclass(torch.Tensor), targets


def make_augment(class_names, args):
    """Function of (clips of a batch, class indices) on the device -> (normalised clips, targets for the loss)."""
    normalize = Normalize().to(args.device)
    flip = RandomHorizontalFlip(class_names, args.hflip_prob).to(args.device)
    jitter = ColorJitter(args.color_jitter) if args.color_jitter else None
    mixup = MixUp(alpha=args.mixup_alpha, num_classes=len(class_names)) if args.mixup_alpha else None

    def augment(clips, targets):
        clips = flip(as_float(clips), targets)
        clips = normalize(jitter(clips) if jitter else clips)
        if mixup:
            clips, targets = mixup(clips, targets)
        return clips.to(memory_format=torch.channels_last_3d), targets

    return augment
