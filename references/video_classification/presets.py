"""What is done to one clip before it enters a batch: uint8 (T, H, W, 3) -> float32 (3, T, h, w) in [0, 1].

Normalisation and flips are done to whole batches on the device: see transforms.py.
"""

import torch
from torchvision.transforms import v2

from torchvision_patches.spatial import resize_and_crop


class VideoClassificationPresetTrain:
    """Resize to `resize_size`, crop `crop_size` at random, jitter the colours; every frame of a clip alike.

    Sizes are (height, width) in pixels. color_jitter: the largest relative change of brightness, contrast and
    saturation, 0 for none. Randomness is torch's global one.
    """

    def __init__(self, *, crop_size, resize_size, color_jitter=0.0):
        self.crop_size, self.resize_size = tuple(crop_size), tuple(resize_size)
        self.jitter = v2.ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None

    def __call__(self, clip):
        room = [resized - cropped for resized, cropped in zip(self.resize_size, self.crop_size)]
        top, left = (int(torch.randint(free + 1, ())) for free in room)
        clip = resize_and_crop(clip, self.resize_size, self.crop_size, top, left)
        return self.jitter(clip.transpose(0, 1)).transpose(0, 1) if self.jitter else clip


class VideoClassificationPresetEval:
    """Resize to `resize_size` and crop `crop_size`, (height, width) in pixels, from the centre."""

    def __init__(self, *, crop_size, resize_size):
        self.crop_size, self.resize_size = tuple(crop_size), tuple(resize_size)

    def __call__(self, clip):
        return resize_and_crop(clip, self.resize_size, self.crop_size)
