"""The video networks that there are, torchvision's registry with ours in it; how they lie in memory, and where."""

import functools
import re

import torch
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms._presets import VideoClassification

from torchvision_patches import videomae  # noqa: F401  (registers its networks)


@functools.cache
def video_networks():
    """Names of the networks in the registry whose weights take clips, sorted."""
    return [name for name in list_models() if takes_clips(name)]


def takes_clips(name):
    """Whether the preset of a network's newest weights is torchvision's for videos: it says sizes, mean and std."""
    return getattr(get_model_weights(name).DEFAULT.transforms, "func", None) is VideoClassification


def lacking_for(number=0):
    """What torch lacks to compute on a GPU, "" where it can: a build has code for some compute capabilities only."""
    if not torch.version.cuda:  # AMD's have other names
        return ""
    own, built = torch.cuda.get_device_capability(number), torch.cuda.get_arch_list()
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(built)):
        made_for = divmod(int(digits), 10)
        # code runs on later ones of the same major number, its intermediate form on all later ones
        if made_for <= own and (kind == "compute" or made_for[0] == own[0]):
            return ""
    name = f"{torch.cuda.get_device_name(number)}, compute capability {own[0]}.{own[1]}"
    return f"this torch is not built for {name}, but for {' '.join(built)}"


def device():
    """"cuda" where torch can compute on the first GPU, else "cpu"; a GPU that it cannot use is named."""
    if not torch.cuda.is_available():
        return "cpu"
    if reason := lacking_for():
        print(f"{reason}: the CPU computes", flush=True)
    return "cpu" if reason else "cuda"


@functools.cache
def shapes_of(name):
    """{name of a weight: its shape} of a network of the registry, and what those of its last layer begin with."""
    with torch.device("meta"):
        network = get_model(name)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    return shapes, f"{list(dict(network.named_children()))[-1]}."


def network_with(weights):
    """The name of the video network that has exactly these weights but for its last layer, or None."""
    for name in video_networks():
        shapes, head = shapes_of(name)
        same = shapes.keys() == weights.keys()
        if same and all(shapes[key] == weights[key].shape for key in shapes if not key.startswith(head)):
            return name
    return None


def channels_last(network):
    """The network, its 3-D convolutions in torch.channels_last_3d; `.to(memory_format=…)` refuses to see 2-D ones."""
    for parameter in network.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network
