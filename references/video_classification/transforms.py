"""Small tensor transforms on batches of clips; they run on the training device.

A batch is float32 (N, 3, T, H, W), RGB, in [0, 1] before it is normalised.
"""

import torch
from torchvision.transforms import v2

from torchvision_patches.mirror import names_a_side


def as_float(clips):
    """uint8 (N, T, H, W, 3), as training clips come, as float32 (N, 3, T, H, W) in [0, 1]; others as they are."""
    return clips.permute(0, 4, 1, 2, 3).float().div(255) if clips.dtype == torch.uint8 else clips


class Normalize(torch.nn.Module):
    """[0, 1] -> by the mean and standard deviation of each colour that the network was trained with."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1, 1))

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


class RandAugment(torch.nn.Module):
    """torchvision's RandAugment (Cubuk et al., 2020), drawn anew for each clip and the same for all its frames.

    None of its operations mirrors, so a class that names a side stays what it is.
    """

    def __init__(self):
        super().__init__()
        self.change = v2.RandAugment()

    def forward(self, clips):
        return torch.stack([self.change(clip.transpose(0, 1)).transpose(0, 1) for clip in clips])


def grey(clips):
    """(N, 3, T, H, W) -> (N, 1, T, H, W)."""
    return v2.functional.rgb_to_grayscale(clips.transpose(1, 2)).transpose(1, 2)


class MixUp(torch.nn.Module):
    """Lay each clip over the next one of the batch, weighted by one draw of Beta(alpha, alpha) (Zhang et al., 2018).

    clips (N, 3, T, H, W), targets, each float (N, classes): mixed alike.
    """

    def __init__(self, alpha):
        super().__init__()
        self.weight = torch.distributions.Beta(alpha, alpha)

    def forward(self, clips, *targets):
        other = 1 - float(self.weight.sample())
        return tuple(torch.lerp(part, part.roll(-1, 0), other) for part in (clips, *targets))


class VideoMix(torch.nn.Module):
    """Put a box of another clip of the batch into a clip, the same in all frames, with probability `p` for each.

    The box's share of the picture is uniform in [0, 1] before it is cut at the border, as in VideoMix (Yun et al.,
    2020); targets float (N, classes) are mixed by the area that it takes in the end.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, clips, *targets):
        number, height, width = len(clips), *clips.shape[-2:]
        chosen, share, y, x = torch.rand(4, number, device=clips.device)
        side = share.sqrt() * (chosen < self.p) / 2
        rows, columns = (torch.arange(size, device=clips.device) + 0.5 for size in (height, width))
        inside_rows = (rows - y[:, None] * height).abs() < side[:, None] * height
        inside_columns = (columns - x[:, None] * width).abs() < side[:, None] * width
        box = (inside_rows[:, :, None] & inside_columns[:, None])[:, None, None]
        return mixed(clips, targets, box, box.flatten(1).float().mean(1))


class StackMix(torch.nn.Module):
    """Let a clip end with the frames of another one of the batch, with probability `p` for each.

    At least one frame of each; targets float (N, classes) are mixed by the number of frames.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, clips, *targets):
        number, frames = len(clips), clips.shape[2]
        chosen, cut = torch.rand(2, number, device=clips.device)
        kept = torch.where(chosen < self.p, 1 + (cut * (frames - 1)).floor(), frames)
        end = (torch.arange(frames, device=clips.device) >= kept[:, None])[:, None, :, None, None]
        return mixed(clips, targets, end, 1 - kept / frames)


def mixed(clips, targets, where, share):
    """Clips that are the next one of the batch `where` (bool, broadcasts), and targets by its `share` (N,)."""
    targets = (torch.lerp(part, part.roll(-1, 0), share[:, None]) for part in targets)
    return torch.where(where, clips.roll(-1, 0), clips), *targets


def make_augment(class_names, args):
    """What training does to a batch on the device: a function (clips, class indices (N,), teacher=None).

    teacher: its probabilities, float (N, classes). The function returns normalised clips, labels float (N, classes) and
    the teacher's probabilities, if there are any; labels and teacher are mixed as the clips are.
    """
    normalize = Normalize(args.mean, args.std).to(args.device)
    flip = RandomHorizontalFlip(class_names, args.hflip_prob).to(args.device)
    changes = [RandAugment()] if args.rand_augment else []
    changes += [ColorJitter(args.color_jitter)] if args.color_jitter else []
    mixes = [MixUp(args.mixup_alpha)] if args.mixup_alpha else []
    mixes += [VideoMix(args.videomix_prob)] if args.videomix_prob else []
    mixes += [StackMix(args.stackmix_prob)] if args.stackmix_prob else []

    def augment(clips, labels, teacher=None):
        clips = flip(as_float(clips), labels)
        for change in changes:
            clips = change(clips)
        clips = normalize(clips)
        targets = [torch.nn.functional.one_hot(labels, len(class_names)).float()]
        targets += [] if teacher is None else [teacher]
        for mix in mixes:
            clips, *targets = mix(clips, *targets)
        return clips.to(memory_format=torch.channels_last_3d), *targets

    return augment
