"""Which network is trained, the weights it starts from, and what of it learns."""

import socket
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.optim import swa_utils

import common
import utils


def make_model(args, checkpoint):
    """The network with `--num-classes` of the class map, frozen but for --trainable-layers, on the device."""
    try:
        model = torchvision.models.get_model(args.model, num_classes=args.num_classes)
    except ValueError:
        known = ", ".join(torchvision.models.list_models(torchvision.models.video))
        common.refuse(f"torchvision has no model {args.model}; its video models are {known}")
    if checkpoint:
        load_weights(model, checkpoint["raw_model" if "raw_model" in checkpoint else "model"], args.resume)
    elif args.weights:
        state = utils.from_main_process(lambda: pretrained_weights(args.model, args.weights))
        own = model.state_dict()
        # all but the head, whose shape depends on the number of classes
        missing = model.load_state_dict({k: v for k, v in state.items() if v.shape == own[k].shape}, strict=False)
        utils.log(f"{args.weights} loaded; from scratch: {', '.join(missing.missing_keys) or 'nothing'}")
    freeze(model, args)
    if not (checkpoint or args.weights or args.trainable_layers == ["all"]):
        utils.log(f"training from scratch: all layers but {' '.join(args.trainable_layers)} are random and stay so")
    if args.sync_bn and args.distributed:
        if "cpu" in args.device:
            common.refuse("--sync-bn needs GPUs: torch has no synchronised BatchNorm for the CPU")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(args.device, memory_format=torch.channels_last_3d)


def load_weights(model, state, path):
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        common.refuse(f"the weights of {path} do not fit --model and the class map: {str(e)[:400]}")


def pretrained_weights(model_name, weights_name):
    """torchvision's weights of that name, from torch hub's cache or the network; exits with code 2 without either."""
    known = torchvision.models.get_model_weights(model_name)
    name = weights_name.rpartition(".")[2]
    if name not in known.__members__:
        common.refuse(f"{model_name} has no weights {weights_name}; there are {', '.join(known.__members__)}")
    weights = known[name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    socket.setdefaulttimeout(20)
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as e:
        common.refuse(
            f"{weights_name} could not be had from {weights.url} ({e}); download it where there is a network and put "
            f"it at {cached}, or train from scratch: leave --weights away and give --trainable-layers all"
        )
    finally:
        socket.setdefaulttimeout(None)


def learns(name, args):
    """Whether the child `name` of the network is one of --trainable-layers."""
    return args.trainable_layers == ["all"] or name in args.trainable_layers


def freeze(model, args):
    """Let only the modules named by --trainable-layers learn; the others run without autograd."""
    children = dict(model.named_children())
    for unknown in [name for name in args.trainable_layers if name not in children and name != "all"]:
        known = " ".join(children)
        common.refuse(f"{args.model} has no layer {unknown}: --trainable-layers takes all or some of {known}")
    for name, child in children.items():
        child.requires_grad_(learns(name, args))
    if args.device == "cpu":
        first = next(child for name, child in children.items() if learns(name, args))
        first.register_forward_pre_hook(leave_bfloat16)


def leave_bfloat16(module, inputs):
    """On CPUs, what learns computes in float32: torch 2.11's bfloat16 weight gradients are wrong there for some Conv3d.

    The forward pass is right, so the frozen layers before may use it. Until the end of train.py's `autocast` block.
    """
    torch.set_autocast_enabled("cpu", False)
    return tuple(x.float() for x in inputs)


def set_train_mode(model, args):
    """Training mode, but for frozen modules: the statistics of their BatchNorm layers must not move."""
    model.train()
    for name, child in unwrapped(model).named_children():
        child.train(learns(name, args))


def unwrapped(model):
    wrappers = nn.parallel.DistributedDataParallel, swa_utils.AveragedModel
    return model.module if isinstance(model, wrappers) else model
