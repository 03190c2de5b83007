"""What is done to one clip before it enters a batch: resize and crop.

Colours, flips and normalisation are done to whole batches on the device: see transforms.py.
"""

from functools import partial

import torch

from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.spatial_numpy import centre_of, resized_size


class VideoClassificationPresetTrain:
    """Resize to `resize_size` and crop `crop_size` at random, every frame of a clip alike.

    Sizes are (height, width) in pixels; a resize_size of one number is the shorter side's. Randomness is torch's global
    one. `resized`: the clips are resized already, as the frame cache has them.
    """

    def __init__(self, *, crop_size, resize_size, resized=False):
        self.crop_size, self.resize_size, self.resized = tuple(crop_size), tuple(resize_size), resized

    def __call__(self, clip):
        """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3): rounded to grey levels, a quarter of the memory of float32."""
        cropped = self.crop(clip)
        if cropped.dtype == torch.uint8:
            return cropped
        return cropped.permute(1, 2, 3, 0).mul(255).round().byte().contiguous()

    def corner(self, resize_size):
        """Where the crop starts, (row, column) of the resized frame."""
        room = [resized - cropped for resized, cropped in zip(resize_size, self.crop_size)]
        return [int(torch.randint(free + 1, ())) for free in room]

    def crop(self, clip):
        """uint8 (T, h, w, 3) if the clip is resized already, else float32 (3, T, h, w) in [0, 1]."""
        resize_size = clip.shape[1:3] if self.resized else resized_size(self.resize_size, *clip.shape[1:3])
        top, left = self.corner(resize_size)
        if self.resized:
            return clip[:, top : top + self.crop_size[0], left : left + self.crop_size[1]]
        return resize_and_crop(clip, resize_size, self.crop_size, top, left)


class VideoClassificationPresetEval(VideoClassificationPresetTrain):
    """Resize to `resize_size` and crop `crop_size` from the centre, not rounded: float32 (3, T, h, w) in [0, 1]."""

    def __call__(self, clip):
        return self.crop(clip)

    def corner(self, resize_size):
        return centre_of(resize_size, self.crop_size)


def for_training(args):
    """The preset of training clips, with its sizes; `resized` is still to be given."""
    return partial(VideoClassificationPresetTrain, crop_size=args.train_crop_size, resize_size=args.train_resize_size)


def for_validation(args, at_random=False):
    """The preset of validation clips, with its sizes; at_random: cropped as training clips are."""
    preset = VideoClassificationPresetTrain if at_random else VideoClassificationPresetEval
    return partial(preset, crop_size=args.val_crop_size, resize_size=args.val_resize_size)
