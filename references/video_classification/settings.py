"""What a run is: its flags, completed by the checkpoint, the network and the machine before the first step."""

import common
from common import machine

import torch

import models
import utils
from torchvision_patches import clip
from torchvision_patches.video_utils import RULE_VERSION

# Settings that --resume must find as they were, to continue the run that was interrupted and no other.
RECIPE = """
    weights batch_size clips_per_video opt lr lr_head no_decay_norm momentum weight_decay lr_scheduler lr_milestones
    lr_gamma lr_warmup_epochs lr_warmup_method lr_warmup_decay trainable_layers amp label_smoothing model_ema
    clip_grad_norm accumulate sync_bn class_balanced color_jitter hflip_prob mixup_alpha videomix_prob stackmix_prob
    rand_augment hold_out teacher_logits distill_alpha distill_temperature
    bn_clips fold_frozen train_resize_size train_crop_size cache_frames seed world_size
""".split()  # noqa: SIM905
# torchvision's names of the flags that say a field of the clip's description
FLAGS = {"model_name": "model", "resize_size": "val_resize_size", "crop_size": "val_crop_size"}
FLAGS |= {field: field for field in ("clip_len", "frame_rate", "rotate")}


def settle(args, checkpoint, classes):
    """Complete the flags, here and nowhere else; exits with code 2 where a flag and the checkpoint differ.

    Written are amp, warmup_epochs, workers, num_classes, trainable_layers; what `clip_of` reads; the sizes of training.
    """
    bf16_on_cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if args.amp and args.device == "cpu" and not bf16_on_cpu:
        utils.log("--amp is left out: this CPU cannot compute in bfloat16")
        args.amp = False
    if args.device.startswith("cuda") and not (args.amp or args.test_only):
        utils.log("--amp is left out: with it, a step on a GPU with bfloat16 takes 2/3 of the time and half the memory")
    args.warmup_epochs = min(args.lr_warmup_epochs, args.epochs // 2)
    if args.resume and not args.resume_weights_only:  # a run that is continued may have been given more epochs
        args.warmup_epochs = checkpoint["args"].get("warmup_epochs", args.lr_warmup_epochs)
    elif args.lr_scheduler != "onecycle" and args.warmup_epochs < args.lr_warmup_epochs and not args.test_only:
        utils.log(f"a warm-up of {args.lr_warmup_epochs} of {args.epochs} epochs is shortened to {args.warmup_epochs}")
    # more decoding processes than cores only get into each other's way
    args.workers = min(args.workers, machine.num_workers())
    about = settled_clip(args, checkpoint).as_dict()
    args.mean, args.std, args.num_classes = about["mean"], about["std"], len(classes)
    for field, flag in FLAGS.items():
        setattr(args, flag, about[field])
    args.train_resize_size = args.train_resize_size or args.val_resize_size
    args.train_crop_size = args.train_crop_size or args.val_crop_size
    refuse_sizes(args)
    models.settle_layers(args)


def settled_clip(args, checkpoint):
    """The ClipDescription of a run: as its flags say, else the checkpoint, else the network's own weights.

    Exits with code 2 where a flag contradicts the checkpoint, unless that is --resume-weights-only.
    """
    given = {field: getattr(args, flag) for field, flag in FLAGS.items() if getattr(args, flag) is not None}
    given = {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}
    saved = checkpoint or {"args": {}}
    models.refuse_unless_video_model(args.model or clip.DEFAULT_MODEL)
    try:
        about, unsaid = clip.described(saved, {"model": args.model} | saved["args"])
    except ValueError as e:
        common.refuse(f"{args.resume or args.weights}: {e}")
    if args.resume and not args.resume_weights_only:
        for field in given:
            before = getattr(about, field)
            if given[field] != before and field not in unsaid:
                flag, ours, theirs = FLAGS[field].replace("_", "-"), *map(clip.in_words, (given[field], before))
                common.refuse(f"--{flag} {ours}, but {args.resume} has {theirs}; leave the flag away")
        if about.rule_version != RULE_VERSION:
            common.refuse(
                f"{args.resume} was trained on frames picked by version {about.rule_version} of the frame rule, this "
                f"is version {RULE_VERSION}: train anew, or from its weights alone (--resume-weights-only)"
            )
    assumed = [f"{field} {clip.in_words(getattr(about, field))}" for field in unsaid if field not in given]
    if checkpoint and assumed:
        utils.log(f"{args.resume or args.weights} does not say its {', '.join(assumed)}: these are assumed")
    return about._replace(**given, rule_version=RULE_VERSION)


def clip_of(args):
    """The ClipDescription of a settled run."""
    fields = {field: getattr(args, flag) for field, flag in FLAGS.items()}
    fields |= {"mean": args.mean, "std": args.std, "rule_version": RULE_VERSION}
    return clip.ClipDescription(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def refuse_sizes(args):
    """Exit with code 2 where a crop is larger than what it is cut from, or the frame cache has no size to keep."""
    for split in "train", "val":
        resized, cropped = getattr(args, f"{split}_resize_size"), getattr(args, f"{split}_crop_size")
        if any(crop > size for crop, size in zip(cropped, 2 * resized)):
            common.refuse(f"--{split}-crop-size {cropped} is larger than --{split}-resize-size {resized}")
        if args.cache_frames and len(resized) == 1:
            common.refuse(
                f"--cache-frames keeps frames of one size, and {args.model} resizes the shorter side to {resized[0]}: "
                f"leave the cache away, or give --train-resize-size and --val-resize-size as height and width"
            )


def refuse_other_recipe(args, checkpoint, defaults, keys=RECIPE):
    """--resume continues exactly, or not at all. defaults: of the flags, {name: value}."""
    advice = "; give the same flags, or train on from its weights alone: --resume-weights-only and another --output-dir"
    if "classes" not in checkpoint:
        common.refuse(f"{args.resume} was written by another script and cannot be continued exactly{advice}")
    changed = []
    for key in keys if args.lr_scheduler == "multistep" else [*keys, "epochs"]:
        before, now = checkpoint["args"].get(key, defaults.get(key)), getattr(args, key)
        if key == "cache_frames":  # wherever it lies
            before, now = bool(before), bool(now)
        if before != now:
            changed.append(f"{key} {before}, not {now}")
    if changed:
        common.refuse(f"{args.resume} has {'; '.join(changed)}{advice}")
