"""The video networks that there are: torchvision's registry, with ours in it, and how they lie in memory."""

import functools

import torch
from torchvision.models import get_model_weights, list_models
from torchvision.transforms._presets import VideoClassification

from torchvision_patches import videomae  # noqa: F401  (registers its networks)


@functools.cache
def video_networks():
    """Names of the networks in the registry whose weights take clips, sorted."""
    return [name for name in list_models() if takes_clips(name)]


def takes_clips(name):
    """Whether the preset of a network's newest weights is torchvision's for videos: it says sizes, mean and std."""
    return getattr(get_model_weights(name).DEFAULT.transforms, "func", None) is VideoClassification


def channels_last(network):
    """The network, its 3-D convolutions in torch.channels_last_3d; `.to(memory_format=…)` refuses to see 2-D ones."""
    for parameter in network.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network
