"""Which network is trained, the weights it starts from, what of it learns, and how it computes."""

import contextlib
import functools
import math
import os
import re
import warnings

import common
from common.checkpoints import HEADS
from common.weights import of_registry, start_from

import torch
import torchvision
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

import layers
import processes
import starting
import utils
from torchvision_patches import networks

FEW_STEPS = 50  # of an epoch, below which BatchNorm's statistics are recomputed after it


def settle_layers(args):
    """Give --trainable-layers the network's own names; without the flag: layer4 and the head, or all if it has none.

    Exits with code 2 if the network does not have such a layer, or cannot take clips of that size.
    """
    with torch.device("meta"):
        model = torchvision.models.get_model(args.model, num_classes=args.num_classes)
    children = [name for name, _ in model.named_children()]
    if args.drop_path is not None:
        set_drop_path(model, args)
    layers = args.trainable_layers or (["layer4", "head"] if "layer4" in children else ["all"])
    args.trainable_layers = [children[-1] if name in HEADS else name for name in layers]
    for unknown in [name for name in args.trainable_layers if name not in children and name != "all"]:
        known = " ".join(children)
        common.refuse(f"{args.model} has no layer {unknown}: --trainable-layers takes all or some of {known}")
    try:
        with torch.device("meta"):  # nothing is computed, but every shape is checked
            model(torch.empty(1, 3, args.clip_len, *args.train_crop_size))
    except (RuntimeError, ValueError) as e:
        size = f"{args.clip_len} frames of {args.train_crop_size[0]} x {args.train_crop_size[1]}"
        common.refuse(f"{args.model} does not take clips of {size} ({utils.first_line(e)}); leave the sizes to it")


def make_model(args, checkpoint):
    """The network with `--num-classes` of the class map, frozen but for --trainable-layers, on the device."""
    model = torchvision.models.get_model(args.model, num_classes=args.num_classes)
    if checkpoint and starting.continues(args):
        starting.load_all(model, checkpoint["raw_model" if "raw_model" in checkpoint else "model"], args.resume)
    elif checkpoint:
        start_from(model, checkpoint["model"], args.resume or args.weights, utils.log)
    elif args.weights:
        state = processes.from_main_process(lambda: of_registry(args.model, args.weights, utils.log))
        start_from(model, state, args.weights, utils.log)
    if args.drop_path is not None:
        set_drop_path(model, args)
    freeze(model, args)
    if not (checkpoint or args.weights or args.trainable_layers == ["all"]):
        utils.log(f"training from scratch: all layers but {' '.join(args.trainable_layers)} are random and stay so")
    if args.sync_bn and args.distributed:
        if "cpu" in args.device:
            common.refuse("--sync-bn needs GPUs: torch has no synchronised BatchNorm for the CPU")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = networks.channels_last(model.to(args.device))
    if args.fold_frozen and not args.test_only:
        frozen = [name for name, _ in model.named_children() if not learns(name, args)]
        layers.fold(model, frozen, "cuda" in args.device, args.pad_channels)
    if args.pad_channels > 1 and not layers.pad_channels(model, args.pad_channels) and not args.fold_frozen:
        common.refuse(f"--pad-channels finds nothing to pad in {args.model}: it is for R(2+1)D, without --sync-bn")
    return model


def learns(name, args):
    """Whether the child `name` of the network is one of --trainable-layers."""
    return args.trainable_layers == ["all"] or name in args.trainable_layers


def freeze(model, args):
    """Let only the modules named by --trainable-layers learn; the others run without autograd."""
    children = dict(model.named_children())
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


def distributed(model, args):
    """The model for several processes. Its buffers are not sent at each step: they are made the same after an epoch."""
    # 1 x 1 x 1 weights have the same values in one order by several strides; nothing is wrong with them
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[args.device] if "cuda" in args.device else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=args.accumulate == 1,
    )


def norms_that_learn(model, args):
    """The BatchNorm layers of --trainable-layers; transformers have none."""
    children = [child for name, child in unwrapped(model).named_children() if learns(name, args)]
    return [m for child in children for m in child.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def batches_for_statistics(model, steps, args):
    """Over how many batches BatchNorm's statistics are recomputed after each epoch; 0 where training's own will do.

    Those are averages over some 20 steps with weights that have moved on since, and in a run of a few steps still hold
    what they started from.
    """
    if steps >= FEW_STEPS or not args.bn_clips or not norms_that_learn(model, args):
        return 0
    batches = math.ceil(args.bn_clips / (args.batch_size * args.world_size))
    batches = min(batches, steps * args.accumulate)
    utils.log(
        f"an epoch has {steps} steps, few for BatchNorm: its statistics are recomputed after each, over "
        f"{batches * args.batch_size * args.world_size:,} clips at most (--bn-clips); a smaller --batch-size gives more"
    )
    return batches


@torch.no_grad()
def recompute_statistics(model, batches, augment, args):
    """Set BatchNorm's statistics of what learns to their means over batches, with the weights as they are now.

    batches: of the training loader; augment: what training does to them. Frozen layers are untouched.
    """
    set_train_mode(model, args)
    norms = norms_that_learn(model, args)
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all
    for clips, labels, *_ in batches if norms else ():
        if len(clips):
            model(augment(clips.to(args.device), labels.to(args.device))[0])
    for norm, (momentum, steps) in zip(norms, before):
        processes.reduce_across_processes(norm.running_mean, norm.running_var)
        norm.running_mean /= args.world_size
        norm.running_var /= args.world_size
        norm.momentum, norm.num_batches_tracked = momentum, steps


@functools.cache
def flops_of_step(name, num_classes, clip_len, height, width, *trainable_layers):
    """Floating point operations of training on one clip: forward, and backward through what learns."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=num_classes)
        clip = torch.empty(1, 3, clip_len, height, width)
    for child, module in model.named_children():
        module.requires_grad_(trainable_layers == ("all",) or child in trainable_layers)
    with FlopCounterMode(display=False) as counter:
        model.train()(clip).sum().backward()
    return counter.get_total_flops()


def unwrapped(model):
    wrappers = nn.parallel.DistributedDataParallel, swa_utils.AveragedModel
    return model.module if isinstance(model, wrappers) else model


def settle_device(args):
    """Choose the device and how it computes; exits with code 2 if it is not there."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        common.refuse(f"--device {args.device}: it is cuda, cuda:1, … or cpu")
    number = int(args.device.partition(":")[2] or 0)
    if args.device != "cpu" and number >= torch.cuda.device_count():
        common.refuse(
            f"--device {args.device}: torch finds {torch.cuda.device_count()} CUDA devices here, counted from 0; leave "
            f"out the flag to use the first, or the CPU"
        )
    if args.device != "cpu" and (reason := networks.lacking_for(number)):
        common.refuse(f"--device {args.device}: {reason}; take another GPU, or --device cpu")
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
    torch.backends.cudnn.benchmark = args.device.startswith("cuda") and not args.use_deterministic_algorithms
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions do by default


def amp_dtype(args):
    """bfloat16 where the hardware has it, float16 on other GPUs."""
    on_gpu = args.device.startswith("cuda")
    return torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16


@contextlib.contextmanager
def float32_on_gpu():
    """No TF32, which keeps 10 bits of the mantissa."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with cudnn.flags(True, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def make_optimizer(model, args):
    """SGD or AdamW, with a group of parameters for each rate and weight decay that the flags give some of them.

    --lr-head is the head's own rate, --layer-decay lowers those of the layers below, --no-decay-norm spares norms.
    """
    groups, head, depths = {}, list(dict(model.named_children()))[-1], depths_of(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            below = max(depths.values()) - depths.get(layer_of(name, depths), 0)
            rate = args.lr * args.layer_decay**below
            if args.lr_head is not None and name.split(".")[0] == head:
                rate = args.lr_head
            decays = not (args.no_decay_norm and parameter.ndim == 1)  # norms and biases have one dimension
            groups.setdefault((rate, args.weight_decay if decays else 0.0), []).append(parameter)
    groups = [
        dict(params=parameters, lr=rate * args.world_size, weight_decay=decay)
        for (rate, decay), parameters in groups.items()
    ]
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(args.betas))
    return torch.optim.SGD(groups, momentum=args.momentum)


def depths_of(model):
    """{name of a layer: its depth} for --layer-decay: blocks count one by one, what precedes them is 0 together.

    What follows the last block has one depth together, the head's, as in BEiT and VideoMAE. A block is an item of a
    sequence that has parts of its own.
    """
    layers = []
    for name, child in model.named_children():
        parts = [part for part, block in child.named_children() if part.isdecimal() and any(block.children())]
        layers += [f"{name}.{part}" for part in parts] or [name]
    blocks = [i for i, name in enumerate(layers) if "." in name] or [0]
    first, last = blocks[0], blocks[-1]
    return {name: min(max(i - first + 1, 0), last - first + 2) for i, name in enumerate(layers)}


def layer_of(parameter, depths):
    """The layer of `depths_of` that holds a parameter: the first part of its name, or the first two."""
    parts = parameter.split(".")
    return parts[0] if parts[0] in depths else ".".join(parts[:2])


def set_drop_path(model, args):
    """Let --drop-path be the largest probability of dropping a residual path; it rises linearly from 0 at the first.

    Exits with code 2 for a network that drops none.
    """
    droppers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if not droppers:
        common.refuse(f"--drop-path: {args.model} has no paths that can be dropped, leave out the flag")
    for i, dropper in enumerate(droppers):
        dropper.p = args.drop_path * i / max(1, len(droppers) - 1)


def make_scheduler(optimizer, steps_per_epoch, args):
    """Warm-up, then the schedule of --lr-scheduler, one step for each step of the optimizer."""
    total, warmup = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    if args.lr_scheduler == "onecycle":  # has its own warm-up
        peaks = [group["lr"] for group in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=max(1, total), cycle_momentum=False)
    if args.lr_scheduler == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total - warmup))
    else:
        milestones = [epoch * steps_per_epoch - warmup for epoch in args.lr_milestones]
        main = lr_scheduler.MultiStepLR(optimizer, milestones, args.lr_gamma)
    if not warmup:
        return main
    if args.lr_warmup_method == "linear":
        first = lr_scheduler.LinearLR(optimizer, start_factor=args.lr_warmup_decay, total_iters=warmup)
    else:
        first = lr_scheduler.ConstantLR(optimizer, factor=args.lr_warmup_decay, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [first, main], milestones=[warmup])
