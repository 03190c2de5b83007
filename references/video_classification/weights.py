"""The weights that training starts from: a checkpoint, torchvision's, a file of others, Hugging Face's Hub."""

import shutil
import urllib.request
from pathlib import Path

import common
from common.checkpoints import HEADS, listed, load_checkpoint, num_outputs

import torch
import torchvision
from tqdm import tqdm

import utils
from torchvision_patches.videomae import HUB

ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")  # of files, where --weights names one
FILES_OF_A_FOLDER = ("model.safetensors", "pytorch_model.bin")  # as transformers saves a network
WAIT = 20  # s for a server's next word


def starting_point(args):
    """The checkpoint that --resume names, or the file or network of the Hub that --weights names; else None.

    Exits with code 2 and one sentence where it cannot be had, or both are named and only one can be taken.
    """
    if args.resume and args.resume_weights_only and args.weights:
        common.refuse(f"a run starts from --resume {args.resume} or from --weights {args.weights}: name one of them")
    if args.resume:
        return load_checkpoint(args.resume, say=utils.log)
    path = path_of(args.weights) if args.weights else None
    return load_checkpoint(path, "--weights names a file, or weights of torchvision", utils.log) if path else None


def continues(args):
    """Whether the run goes on with the network of --resume as it is, its head included, instead of starting from it."""
    return bool(args.resume) and (args.test_only or not args.resume_weights_only)


def path_of(name):
    """The file that --weights names: itself, a folder of transformers, a name on the Hub; None for torchvision's.

    Each process looks for itself, the first alone asks the Hub.
    """
    if Path(name).is_dir():
        found = next((path for path in (Path(name, file) for file in FILES_OF_A_FOLDER) if path.is_file()), None)
        return found or common.refuse(f"the folder {name} of --weights holds no {' or '.join(FILES_OF_A_FOLDER)}")
    if Path(name).exists() or name.endswith(ENDINGS):
        return Path(name)
    return utils.from_main_process(lambda: from_hub(name)) if name.count("/") == 1 else None


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
            reason = utils.first_line(e)
            break
    common.refuse(
        f"--weights {name} is no file here and could not be had from {huggingface_hub.constants.ENDPOINT} ({reason}): "
        f"download its {FILES_OF_A_FOLDER[0]} where there is a network and put it at {Path(name, FILES_OF_A_FOLDER[0])}"
    )


def of_torchvision(model_name, weights_name):
    """The state_dict of weights in the registry, by their name; exits with code 2 where there are none.

    They come from torch hub's cache, or from the network into it.
    """
    known = torchvision.models.get_model_weights(model_name)
    name = weights_name.rpartition(".")[2]
    if name not in known.__members__:
        common.refuse(
            f"{model_name} has no weights {weights_name}; there are {', '.join(known.__members__)}, and a file or a "
            f"name on the Hub will do"
        )
    url = known[name].url
    if url.startswith(HUB):
        return load_checkpoint(from_hub(url.removeprefix(HUB)), say=utils.log)["model"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not cached.exists():
        try:
            download(url, cached)
        except OSError as e:
            common.refuse(
                f"{weights_name} could not be had from {url} ({e}); download it where there is a network and put it at "
                f"{cached}, or train from scratch: leave --weights away and give --trainable-layers all, or, in half "
                f"the time, layer3 layer4 fc"
            )
    return load_checkpoint(cached, say=utils.log)["model"]


def download(url, path):
    """Fetch a file whose name ends in the first digits of its SHA-256, as torchvision's do. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with common.written_then_renamed(path) as temporary:
        with urllib.request.urlopen(url, timeout=WAIT) as answer, open(temporary, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(answer, "read", total=size, unit="B", unit_scale=True, desc=path.name) as counted:
                shutil.copyfileobj(counted, file)
        digits = path.stem.rpartition("-")[2]
        if not common.sha256_of(temporary).startswith(digits):
            raise OSError(f"what came is another file, its SHA-256 does not start with {digits}")


def without_other_head(checkpoint, classes, args):
    """The checkpoint as training may take it for these classes: without a head that was trained for others.

    Exits with code 2 where the head is needed: --resume, --test-only.
    """
    before, source = checkpoint.get("classes"), args.resume or args.weights
    if before in (None, classes):
        return checkpoint
    if continues(args):
        common.refuse(
            f"{source} was trained with other classes ({len(before)}), or another order, than the {len(classes)} of "
            f"{args.class_map}; --class-map names the map that it was trained with, and --resume-weights-only starts a "
            f"new run from all of it but its head"
        )
    utils.log(f"{source} knows other classes, or another order: all but its head is taken")
    kept = {name: value for name, value in checkpoint["model"].items() if name.split(".")[0] not in HEADS}
    return checkpoint | {"model": kept}


def load_all(model, state, path):
    """Give a network exactly its weights; exits with code 2, and both numbers of classes, where they do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        ours, theirs = num_outputs(model.state_dict()), num_outputs(state)
        if None not in (ours, theirs) and ours != theirs:
            common.refuse(
                f"the head of {path} has {theirs} classes, the class map {ours}: name the map that it was trained with "
                f"(--class-map), or start from all but the head with --resume-weights-only"
            )
        common.refuse(f"the weights of {path} do not fit --model and the class map: {str(e)[:400]}")


def start_from(model, state, source):
    """Give a network what fits of some weights: all, but for a head of another size, or parts that they lack.

    Says what stays random and what was not used. Exits with code 2 where a layer has another shape or most are missing.
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
        common.refuse(f"{source} has the weights of another network ({reason}): --model names the network")
    model.load_state_dict(fits, strict=False)
    text = f"{source} loaded; from scratch: {', '.join(name for name in own if name not in fits) or 'nothing'}"
    if (before := num_outputs(state)) and before != num_outputs(own):
        text += f" (its head has {before} classes, the class map {num_outputs(own)})"
    if unused := [name for name in state if name not in own]:
        text += f"; not used: {listed(unused)}"
    utils.log(text)
