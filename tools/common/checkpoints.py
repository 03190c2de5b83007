"""Weights and checkpoints, whoever wrote them: what lies in a file, under plain names, with nothing in it executed."""

import argparse
import pickle
import re
from pathlib import Path

from common import refuse
from common.names import shortened

# where the weights lie in a file, the first that is there; none of them: the file is the weights. train.py, torchvision
# and DeiT write model, Lightning and timm state_dict, DeepSpeed module; averaged weights come last
PLACES = ("model", "state_dict", "model_state_dict", "module", "ema", "model_ema", "ema_state_dict")
# what a wrapper puts before each name: DataParallel and AveragedModel, Lightning, classifiers on a backbone
PREFIXES = ("module.", "model.", "backbone.", "network.", "net.")
WITHIN_NAMES = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch's own wrappers
ENDINGS = (".pth", ".pt", ".ckpt", ".tar", ".safetensors")  # of files of weights
HEADS = ("fc", "head", "classifier")  # what networks call their last layer


def load_checkpoint(path, where_else="name one that train.py wrote", say=print):
    """Read a checkpoint of train.py, of the original sample solution or of others' training, or bare weights.

    Returns what it holds, on the CPU, with the weights under `model` (float32, without a wrapper's prefixes) and `args`
    as a dict. say: gets one sentence where the weights are not what lies in the file as it is. Exits with code 2 and
    one sentence if the file is missing (`where_else` says what to do then), is damaged, has no weights, or holds more
    than weights, plain values and the original's argparse.Namespace.
    """
    content = read_weights(path, where_else)
    found = weights_in(content) if isinstance(content, dict) else None
    if not found:
        refuse(f"{path} has no weights: neither by themselves nor under {', '.join(PLACES[:-1])} or {PLACES[-1]}")
    place, weights = found
    weights, changes = with_plain_names(weights)
    if any(value.is_floating_point() and value.dtype.itemsize < 4 for value in weights.values()):
        changes.append("half precision as float32")
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    if broken := [name for name, value in weights.items() if value.isnan().any()]:
        refuse(f"{path} has weights that are no numbers ({shortened(broken, 3)}): take one from before, or train anew")
    args = content.get("args") if place else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    is_told = place and (content.get("model_name") or args.get("model"))
    weights, names_network = in_our_form(weights, changes, is_told)
    if place not in ((), ("model",)):
        changes.insert(0, f"the weights are those under {' in '.join(reversed(place))}")
    if changes:
        say(f"{path}: {'; '.join(changes)}")
    others = {key: value for key, value in content.items() if key != place[0]} if place else {}
    return others | names_network | {"model": weights, "args": args}


def best_beside(path):
    """The path of train.py's model_best.pth beside its checkpoint; exits with code 2 and one sentence without one."""
    best = Path(path).with_name("model_best.pth")
    if not best.is_file():
        refuse(
            f"there is no {best} (looked in {best.absolute().parent}); train.py writes it with the best validation so "
            f"far, and without --best {path} is taken"
        )
    return str(best)


def read_weights(path, where_else):
    """What torch or safetensors reads from a file; exits with code 2 and one sentence where there is nothing to read.

    Which of the two is told by the content: names are given freely.
    """
    import safetensors.torch
    import torch

    try:
        if is_safetensors(path):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        refuse(f"there is no checkpoint {path} (looked in {Path(path).absolute()}); {where_else}")
    except OSError as e:
        refuse(f"the checkpoint {path} cannot be read ({e.strerror or e})")
    except pickle.UnpicklingError as e:
        if foreign := re.search(r"GLOBAL ([\w.]*\w)(?!\S)", str(e)):
            refuse_code(path, foreign[1])
        refuse_damaged(path, str(e))
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as e:
        refuse_damaged(path, str(e))


def is_safetensors(path):
    """Whether a file starts as one of safetensors: the length of its head in 8 bytes, and an object of JSON."""
    with open(path, "rb") as file:
        start, size = file.read(9), file.seek(0, 2)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


def refuse_code(path, kind):
    weights = "c.state_dict() if hasattr(c, 'state_dict') else c.get('model', c.get('state_dict'))"
    clean = f"c = torch.load({str(path)!r}, weights_only=False); torch.save({{'model': {weights}}}, 'clean.pth')"
    refuse(
        f"{path} holds a {kind} beside weights and plain values and is not loaded, because such a file could run code; "
        f'if you made it, save plain values (float(x), str(path)), or: python -c "import torch; {clean}"'
    )


def refuse_damaged(path, error):
    """Exit with code 2: what the file is instead of weights, as far as its first bytes or the `error` tell it."""
    if "TorchScript" in error:
        refuse(f"{path} is TorchScript, which holds code and is not loaded: save the state_dict() of its network")
    with open(path, "rb") as file:
        start = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kinds = {b"<": "it is a web page", b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself"}
    what = next((kind for first, kind in kinds.items() if start.startswith(first)), "" if start else "it is empty")
    what = what or ("it is cut off" if start.startswith(b"pk\x03\x04") and "central directory" in error else "")
    refuse(f"{path} is damaged, or no weights of torch{f' ({what})' if what else ''}: delete it and get it again")


def weights_in(content, place=()):
    """(place, {name: tensor}): the weights in what was read, and the keys under which they lie; None without any."""
    import torch

    for key in PLACES:
        if isinstance(content.get(key), dict) and (found := weights_in(content[key], (*place, key))):
            return found
    weights = {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    return (place, weights) if 2 * len(weights) > len(content) else None


def with_plain_names(weights):
    """The weights without what wrappers put before or into their names, and what was changed, as texts."""
    changes, before = [], weights
    weights = {WITHIN_NAMES.sub("", name): value for name, value in weights.items()}
    if weights.keys() != before.keys():
        changes.append(f'"{WITHIN_NAMES.search(next(name for name in before if name not in weights))[0]}" is taken out')
    while prefix := next((p for p in PREFIXES if 2 * sum(name.startswith(p) for name in weights) > len(weights)), None):
        # what such a module holds beside the network, say its loss, is not the network's; a head may be
        kept = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        others = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        kept = {name: value for name, value in others.items() if name.split(".")[0] in HEADS} | kept
        changes.append(f'"{prefix}" before each name is taken off')
        if left_out := [name for name in others if name not in kept]:
            changes.append(f"{shortened(left_out, 3)} left out")
        weights = kept
    return weights, changes


def in_our_form(weights, changes, is_told=False):
    """Weights of a form that torchvision_patches knows in its own, and {"model_name": network} where they tell it.

    changes: gets what was done, as a text. is_told: whether the file itself says which network it is.
    """
    from torchvision_patches import networks, videomae

    if not videomae.is_hugging_face(weights):
        name = None if is_told else networks.network_with(weights)
        if name:
            changes.append(f"the network is {name} by its weights")
        return weights, {"model_name": name} if name else {}
    weights, unused = videomae.from_hugging_face(weights)
    changes.append("a VideoMAE of Hugging Face's form" + (f", {shortened(unused, 3)} not used" if unused else ""))
    name = videomae.name_by_width(weights)
    return weights, {"model_name": name} if name else {}


def num_outputs(weights):
    """The number of classes of the last layer that weights hold, by its usual names; None where there is none."""
    heads = [value for name, value in weights.items() if name.split(".")[0] in HEADS and value.ndim > 1]
    return len(heads[-1]) if heads else None
