"""Weights that others trained, by a file, a name on Hugging Face's Hub or a name in torchvision's registry."""

import shutil
import urllib.request
from pathlib import Path

from common import checkpoints, refuse, sha256_of, written_then_renamed
from common.checkpoints import load_checkpoint, num_outputs
from common.names import shortened

FILES_OF_A_FOLDER = ("model.safetensors", "pytorch_model.bin")  # as transformers saves a network
WAIT = 20  # s for a server's next word


def check_network(name):
    """Exit with code 2, and the names that there are, for a network that is no video network of the registry."""
    from torchvision_patches import networks

    known = networks.video_networks()
    if name not in known:
        refuse(f"there is no video model {name}; there are {', '.join(known)}")


def path_of(name, once=lambda ask: ask()):
    """The path of the weights that a user names: a file, a folder of transformers or the Hub's; None for torchvision's.

    once: lets the first of several processes ask the Hub, and tells the others what it got.
    """
    if Path(name).is_dir():
        found = next((path for path in (Path(name, file) for file in FILES_OF_A_FOLDER) if path.is_file()), None)
        return found or refuse(f"the folder {name} of --weights holds no {' or '.join(FILES_OF_A_FOLDER)}")
    if Path(name).exists() or name.endswith((*checkpoints.ENDINGS, ".bin")):
        return Path(name)
    return once(lambda: from_hub(name)) if name.count("/") == 1 else None


def from_hub(name):
    """The path of a network's weights in the Hub's cache, fetched if they are not there; exits with code 2 without."""
    import huggingface_hub
    from huggingface_hub import errors

    reason = ""
    for file in FILES_OF_A_FOLDER:
        try:
            return huggingface_hub.hf_hub_download(name, file)
        except errors.RemoteEntryNotFoundError:
            reason = f"it has no {' or '.join(FILES_OF_A_FOLDER)}"
        except (OSError, ValueError, errors.EntryNotFoundError) as e:
            reason = str(e).splitlines()[0]
            break
    refuse(
        f"--weights {name} is no file here and could not be had from {huggingface_hub.constants.ENDPOINT} ({reason}): "
        f"download its {FILES_OF_A_FOLDER[0]} where there is a network and put it at {Path(name, FILES_OF_A_FOLDER[0])}"
    )


def of_registry(model_name, weights_name, say=print):
    """The state_dict of weights in the registry, by their name; exits with code 2 where there are none.

    They come from torch hub's cache, or from the network into it.
    """
    import torch
    import torchvision

    from torchvision_patches.videomae import HUB

    known = torchvision.models.get_model_weights(model_name)
    name = weights_name.rpartition(".")[2]
    if name not in known.__members__:
        refuse(
            f"{model_name} has no weights {weights_name}; there are {', '.join(known.__members__)}, and a file or a "
            f"name on the Hub will do"
        )
    url = known[name].url
    if url.startswith(HUB):
        return load_checkpoint(from_hub(url.removeprefix(HUB)), say=say)["model"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not cached.exists():
        try:
            download(url, cached)
        except OSError as e:
            refuse(
                f"{weights_name} could not be had from {url} ({e}); download it where there is a network and put it at "
                f"{cached}, or train from scratch: leave out --weights and give --trainable-layers all, or, in half "
                f"the time, layer3 layer4 fc"
            )
    return load_checkpoint(cached, say=say)["model"]


def download(url, path):
    """Fetch a file whose name ends in the first digits of its SHA-256, as torchvision's do. Raises OSError."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    with written_then_renamed(path) as temporary:
        with urllib.request.urlopen(url, timeout=WAIT) as answer, open(temporary, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(answer, "read", total=size, unit="B", unit_scale=True, desc=path.name) as counted:
                shutil.copyfileobj(counted, file)
        digits = path.stem.rpartition("-")[2]
        if not sha256_of(temporary).startswith(digits):
            raise OSError(f"what came is another file, its SHA-256 does not start with {digits}")


def start_from(model, state, source, say=print):
    """Load into a network the weights that fit it; a head of another size, and what they lack, stay random.

    Says what is random and what was not used. Exits with code 2 where a layer has another shape or most are missing.
    """
    own = model.state_dict()
    head = list(dict(model.named_children()))[-1]
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    others = [name for name in state.keys() & own.keys() - fits.keys() if name.split(".")[0] != head]
    if others or 2 * len(fits) < len(own):
        reason = f"only {len(fits)} of the {len(own)} parts of this one are in it"
        if others:
            name = min(others)
            reason = f"its {name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        refuse(f"{source} has the weights of another network ({reason}): --model names the network")
    model.load_state_dict(fits, strict=False)
    text = f"{source} loaded; new: {', '.join(name for name in own if name not in fits) or 'nothing'}"
    if (before := num_outputs(state)) and before != num_outputs(own):
        text += f" (its head has {before} classes, the class map {num_outputs(own)})"
    if unused := [name for name in state if name not in own]:
        text += f"; not used: {shortened(unused, 3)}"
    say(text)
