"""What a frozen network makes of clips before its last layer: computed once a video, kept on disk by its content."""

import functools
import hashlib
from collections import deque
from pathlib import Path
from typing import NamedTuple

import common
from common import checkpoints, weights

import numpy as np
import torch
from torchvision.models import get_model
from tqdm import tqdm

from torchvision_patches import clip, networks
from torchvision_patches.clip import ClipDescription, frames_to_read, resized_and_cropped
from torchvision_patches.decoding import facts_of, read_frames
from torchvision_patches.pool import outcomes_of
from torchvision_patches.spatial_numpy import centre_of, resized_size

TIME_LIMIT = 120  # s for the clips of one video, as in preprocess_and_save.py


class Backbone(NamedTuple):
    """A trained network whose last layer is fitted anew."""

    network: torch.nn.Module  # in evaluation mode
    last: torch.nn.Module  # its last layer with weights: nn.Linear, or nn.Conv3d of 1 x 1 x 1 before a mean
    description: ClipDescription
    digest: str  # of its weights but the last layer's, 16 hex digits


def load_backbone(source, model_name, num_classes, rotate, keep_aspect):
    """The Backbone in the weights `source`, with a random last layer for `num_classes`.

    source: a checkpoint of any classes, a file, or the name of weights that the registry has for `model_name`, which
    names the network where the file does not ("": the default). rotate, keep_aspect: how clips of the new classes are
    made; the checkpoint that is written says so. Exits with code 2 and one sentence if there are no such weights, or
    they are those of another network.
    """
    path, default = weights.path_of(source), model_name or clip.DEFAULT_MODEL
    saved = checkpoints.load_checkpoint(path) if path else dict(model=weights.of_registry(default, source), args={})
    try:
        description, assumed = clip.described(saved, {"model": default} | saved["args"])
        if model_name not in ("", description.model_name):
            common.refuse(f"MODEL is {model_name}, but {source} holds a network {description.model_name}: leave it out")
        network = get_model(description.model_name, num_classes=num_classes)
    except ValueError as e:
        common.refuse(f"{source} holds no network that can be used here ({e})")
    weights.start_from(network, without_head(saved["model"], network), source)
    shorter = (min(description.resize_size),) if keep_aspect else description.resize_size
    description = description._replace(rotate=rotate, resize_size=shorter)
    unsaid = f"; {source} does not say {', '.join(assumed)}" if assumed else ""
    print(f"clips: {description.says(clip.OF_PIXELS[:-1])}{unsaid}")
    name, last = last_layer(network)
    device = networks.device()
    torch.backends.cudnn.allow_tf32 = False  # features would differ from the CPU's by a thousandth
    network = networks.channels_last(network.eval().to(device))
    return Backbone(network, last, description, digest_of(network, name))


def without_head(state, network):
    """Weights without those of the last layer of a network."""
    name, _ = last_layer(network)
    return {key: value for key, value in state.items() if not key.startswith(f"{name}.")}


def last_layer(network):
    """(name, module) of the last layer that has weights. Exits with code 2 if it is none that can be fitted alone."""
    layers = [(name, module) for name, module in network.named_modules() if list(module.parameters(recurse=False))]
    name, last = layers[-1]
    pointwise = isinstance(last, torch.nn.Conv3d) and last.kernel_size == (1, 1, 1)
    if not (isinstance(last, torch.nn.Linear) or pointwise):
        common.refuse(f"the last layer of this network is {name}, a {type(last).__name__}: teach.py fits linear ones")
    return name, last


def digest_of(network, last_name):
    """A hash of all weights and statistics but those of the last layer; 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not name.startswith(f"{last_name}."):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def features_of(backbone, clips):
    """What enters the last layer: float32 (n, features) of clips float32 (n, 3, T, H, W) in [0, 1]."""
    device = next(backbone.network.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1, 1) for values in
                 (backbone.description.mean, backbone.description.std))  # fmt: skip
    seen = []
    hook = backbone.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for clip in clips:  # one at a time: memory, and on a CPU a batch is no faster
            backbone.network(((torch.from_numpy(clip).to(device) - mean) / std)[None])
    finally:
        hook.remove()
    return torch.cat([x.mean((2, 3, 4)) if x.ndim == 5 else x for x in seen]).float().cpu().numpy()


# --- of many videos, kept on disk -------------------------------------------------------------------------------------


def crops_of(frames, description, shifted):
    """Crops of a clip uint8 (T, H, W, 3), the centre first: a list of float32 (3, T, h, w) in [0, 1].

    shifted: whether the crops that touch the middle of each edge follow, where the resized frame leaves room for them.
    """
    size, (height, width) = resized_size(description.resize_size, *frames.shape[1:3]), description.crop_size
    resized = resized_and_cropped(frames, description._replace(crop_size=size))
    top, left = centre_of(size, description.crop_size)
    edges = [(0, left), (size[0] - height, left), (top, 0), (top, size[1] - width)] if shifted else []
    starts = dict.fromkeys([(top, left), *edges])
    return [resized[:, :, row : row + height, column : column + width] for row, column in starts]


def clips_of(video_and_views, description):
    """What is seen of a video's clips, evenly spread from the first on: float32 (n, 3, T, H, W) in [0, 1].

    video_and_views: its path, how many clips at most, and whether the first one is seen in shifted crops, too. Raises
    UnreadableVideo if the file, or a frame of a clip, cannot be read.
    """
    video, num_clips, shifted = video_and_views
    pts, indices = frames_to_read(facts_of(video), description)
    length = description.clip_len
    starts = np.unique(np.linspace(0, len(pts) - length, num_clips).round().astype(int))
    spans = [slice(start, start + length) for start in starts]
    clips = [read_frames(video, pts[span], indices[span], rotate=description.rotate) for span in spans]
    first, *others = (crops_of(frames, description, shifted and not k) for k, frames in enumerate(clips))
    return np.stack(sum(others, first))


def kept_at(folder, backbone, content, num_clips, shifted, mirrored):
    """The file of a video's features: named by all that they depend on."""
    about = content, num_clips, shifted, mirrored, backbone.digest, backbone.description.as_dict()
    return Path(folder, f"{common.json_hash(about)[:32]}.npy")


def compute_features(views, backbone, folder, num_workers):
    """Yield (video, features or None, why not) of each video, as they are finished; what is kept is not computed again.

    views: {path of a video: (a hash of its content, number of its clips, whether the first one's shifted crops are
    looked at, too, and whether the mirror images of all)}. folder: where features are kept, float32 (views, features);
    row 0 is of the centre of the video's first clip, which later steps score.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    places = {video: kept_at(folder, backbone, *of_video) for video, of_video in views.items()}
    todo = deque((video, *views[video][1:3]) for video in views if not places[video].exists())
    read = functools.partial(clips_of, description=backbone.description)
    with tqdm(total=len(views), initial=len(views) - len(todo), unit="video", desc="looking") as bar:
        for video in views:
            if places[video].exists():
                yield video, np.load(places[video]), ""
        for outcome in outcomes_of(read, todo, num_workers, TIME_LIMIT):
            bar.update()
            video, *_ = outcome.item
            if outcome.error:
                yield video, None, outcome.why_not()
                continue
            clips = outcome.value
            if views[video][3]:
                clips = np.concatenate([clips, clips[..., ::-1]])
            rows = features_of(backbone, np.ascontiguousarray(clips))
            with common.written_then_renamed(places[video]) as temporary, open(temporary, "wb") as file:
                np.save(file, rows)
            yield video, rows, ""
