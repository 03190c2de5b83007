"""What a run is: its flags, completed by the checkpoint, the network and the machine before the first step."""

from pathlib import Path

import common
from common import machine
from common.weights import check_network, of_registry

import torch

import datasets
import models
import processes
import splits
import starting
import utils
from arguments import get_args_parser
from torchvision_patches import clip
from torchvision_patches.frame_rule import RULE_VERSION

# Settings that --resume must find as they were, to continue the run that was interrupted and no other.
RECIPE = """
    weights batch_size clips_per_video opt lr lr_head layer_decay drop_path betas no_decay_norm momentum
    weight_decay lr_scheduler lr_milestones
    lr_gamma lr_warmup_epochs lr_warmup_method lr_warmup_decay trainable_layers amp label_smoothing model_ema
    clip_grad_norm accumulate sync_bn class_balanced color_jitter hflip_prob mixup_alpha videomix_prob stackmix_prob
    rand_augment hold_out hold_out_seed train_splits teacher_logits distill_alpha distill_temperature
    bn_clips fold_frozen pad_channels train_resize_size train_crop_size cache_frames seed world_size
""".split()  # noqa: SIM905


def settle(args):
    """Complete the flags of a run whose processes have met.

    Returns (checkpoint of --resume or None, class map, HeldOut).
    Only here, in processes.join and in models.settle_device are flags written: resume, hold_out, hold_out_seed, what
    `complete` writes. Exits with code 2 where flags contradict one another or the checkpoint.
    """
    if args.resume_weights_only and not args.resume:
        common.refuse("--resume-weights-only starts from the weights of a checkpoint: name it with --resume")
    if args.resume == "auto":
        if args.resume_weights_only:
            common.refuse("--resume auto continues a run exactly: leave out --resume-weights-only, or name a file")
        last = Path(args.output_dir, "checkpoint.pth")
        args.resume = processes.from_main_process(lambda: str(last) if last.exists() else "")
    checkpoint = starting.starting_point(args)
    class_map = common.load_class_map(args.class_map)
    classes = sorted(class_map, key=class_map.get)
    complete(args, checkpoint, classes)
    if args.test_only and not checkpoint:
        common.refuse("--test-only needs a trained network: name its checkpoint with --resume")
    for flag in ("--save-logits", "--recompute-statistics"):
        if getattr(args, flag[2:].replace("-", "_")) and not args.test_only:
            common.refuse(f"{flag} is of a trained network: give --test-only and --resume CHECKPOINT, too")
    if checkpoint:
        checkpoint = starting.without_other_head(checkpoint, classes, args)
    elif args.weights:  # where they cannot be had, that is said before the videos are looked at
        processes.from_main_process(lambda: bool(of_registry(args.model, args.weights, lambda _: None)))
    datasets.refuse_small_shared_memory(args)
    held_out = processes.from_main_process(lambda: splits.settled_hold_out(args, checkpoint, class_map))
    args.hold_out, args.hold_out_seed = held_out.share, held_out.seed
    folders = {*args.train_splits, *(name.split("/")[0] for name in held_out.videos)}
    if args.cache_frames and (args.extra_data or folders != {"train"}):
        common.refuse("--cache-frames holds one folder a split: leave it out with --extra-data and --train-splits")
    if "val" in args.train_splits and not held_out.videos:
        utils.log("val is trained on, too: its accuracy says nothing about other videos")
    return checkpoint, class_map, held_out


def complete(args, checkpoint, classes):
    """Write amp, warmup_epochs, workers, num_classes, trainable_layers, training's sizes, what `clip_of_run` reads."""
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
    for field, flag in clip.FLAGS.items():
        setattr(args, flag, about[field])
    args.train_resize_size = args.train_resize_size or args.val_resize_size
    args.train_crop_size = args.train_crop_size or args.val_crop_size
    refuse_sizes(args)
    models.settle_layers(args)


def settled_clip(args, checkpoint):
    """The ClipDescription of a run: as its flags say, else the checkpoint, else the network's own weights.

    Exits with code 2 where a flag contradicts the checkpoint, unless that is --resume-weights-only.
    """
    given = {field: getattr(args, flag) for field, flag in clip.FLAGS.items() if getattr(args, flag) is not None}
    given = {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}
    saved = checkpoint or {"args": {}}
    if args.keep_aspect and args.val_resize_size:
        common.refuse("--keep-aspect resizes the shorter side to the network's own size: leave out --val-resize-size")
    check_network(args.model or clip.DEFAULT_MODEL)
    try:
        about, unsaid = clip.described(saved, {"model": args.model} | saved["args"])
    except ValueError as e:
        common.refuse(f"{args.resume or args.weights}: {e}")
    if args.keep_aspect:
        given["resize_size"] = (min(about.resize_size),)
    if args.resume and not args.resume_weights_only:
        for field in given:
            before = getattr(about, field)
            if given[field] != before and field not in unsaid:
                flag, ours, theirs = clip.FLAGS[field], *map(clip.field_in_words, (given[field], before))
                flag = "keep_aspect" if args.keep_aspect and field == "resize_size" else flag
                flag = flag.replace("_", "-")
                common.refuse(f"--{flag} {ours}, but {args.resume} has {theirs}; leave out the flag")
        if about.rule_version != RULE_VERSION:
            common.refuse(
                f"{args.resume} was trained on frames picked by version {about.rule_version} of the frame rule, this "
                f"is version {RULE_VERSION}: train anew, or from its weights alone (--resume-weights-only)"
            )
    assumed = about.says(field for field in unsaid if field not in given)
    if checkpoint and assumed:
        utils.log(f"{args.resume or args.weights} does not say its {assumed}: these are assumed")
    return about._replace(**given, rule_version=RULE_VERSION)


def clip_of_run(args):
    """The ClipDescription of a settled run."""
    return clip.described({"mean": args.mean, "std": args.std, "rule_version": RULE_VERSION}, vars(args))[0]


def refuse_sizes(args):
    """Exit with code 2 where a crop is larger than what it is cut from, or the frame cache has no size to keep."""
    for split in "train", "val":
        resized, cropped = getattr(args, f"{split}_resize_size"), getattr(args, f"{split}_crop_size")
        if any(crop > size for crop, size in zip(cropped, 2 * resized)):
            common.refuse(f"--{split}-crop-size {cropped} is larger than --{split}-resize-size {resized}")
        if args.cache_frames and len(resized) == 1:
            common.refuse(
                f"--cache-frames keeps frames of one size, and {args.model} resizes the shorter side to {resized[0]}: "
                f"leave out the cache, or give --train-resize-size and --val-resize-size as height and width"
            )


ADVICE = "or train on from its weights alone: --resume-weights-only and another --output-dir"


def refuse_other_recipe(args, checkpoint):
    """--resume continues exactly, or not at all."""
    if "train_set" not in checkpoint:
        common.refuse(f"{args.resume} was written by another script and cannot be continued exactly; {ADVICE}")
    changed, defaults = [], vars(get_args_parser().parse_args(["--data-path", ""]))
    for key in RECIPE if args.lr_scheduler == "multistep" else [*RECIPE, "epochs"]:
        before, now = checkpoint["args"].get(key, defaults.get(key)), getattr(args, key)
        if key == "cache_frames":  # wherever it lies
            before, now = bool(before), bool(now)
        if before != now:
            changed.append(f"{key} {before}, not {now}")
    if changed:
        common.refuse(f"{args.resume} has {'; '.join(changed)}; give the same flags, {ADVICE}")


def refuse_other_videos(args, checkpoint, train_set):
    """--resume continues on the videos that it has seen. train_set: their KineticsWithVideoId.summary()."""
    if checkpoint["train_set"] != train_set:
        common.refuse(f"{args.resume} was trained on {checkpoint['train_set']}, not on {train_set}; {ADVICE}")
