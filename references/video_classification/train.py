"""Train R(2+1)D-18 to tell exercises apart, and validate it: torchvision's reference style and flags.

Reads   DATA_PATH/{train,val}/<class>/<video>.mp4 and class_map.json
Writes  OUTPUT_DIR/checkpoint.pth, model_<epoch>.pth, model_best.pth, metrics.jsonl, curves.png

    $ python references/video_classification/train.py --data-path QEVD_organized --weights KINETICS400_V1 \\
          --cache-dataset --epochs 15 --batch-size 24 --lr 0.01
    $ python references/video_classification/train.py --data-path QEVD_organized --resume checkpoint.pth --test-only
    $ torchrun --nproc-per-node 8 references/video_classification/train.py …      # --batch-size is that of one process
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader

# `python references/video_classification/train.py` puts only its own folder on the path; appended, so that nothing in
# tools/ can shadow a package or a file here. `import common` then does the same for torchvision_patches.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import common
import datasets
import models
import presets
import transforms
import utils

# Settings that --resume must find as they were, to continue the run that was interrupted and no other.
RECIPE = """
    weights batch_size clips_per_video opt lr momentum weight_decay lr_scheduler lr_milestones lr_gamma lr_warmup_epochs
    lr_warmup_method lr_warmup_decay trainable_layers amp label_smoothing model_ema clip_grad_norm accumulate sync_bn
    class_balanced color_jitter hflip_prob mixup_alpha train_resize_size train_crop_size cache_frames seed world_size
""".split()  # noqa: SIM905


def train_one_epoch(
    model, criterion, optimizer, scheduler, loader, augment, bad_videos, epoch, args, model_ema=None, scaler=None
):
    """One pass over the training clips. Returns {"train_loss", "train_acc1" in percent, "clips_per_s", …}.

    Exits with code 2 as soon as a log line shows a loss that is not finite.
    """
    models.set_train_mode(model, args)
    metric_logger = utils.MetricLogger()
    meters = metric_logger.meters
    parameters = [p for p in model.parameters() if p.requires_grad]
    device_type = torch.device(args.device).type
    steps = len(loader)
    start, num_clips = time.perf_counter(), 0
    for i, (clips, targets, _, failures) in enumerate(
        metric_logger.log_every(loader, args.print_freq, f"Epoch: [{epoch}]")
    ):
        bad_videos.report(failures)
        if not len(clips):
            common.refuse("not one clip of a batch decodes; tools/check_videos.py finds such videos")
        clips, targets = clips.to(args.device, non_blocking=True), targets.to(args.device, non_blocking=True)
        clips, soft_targets = augment(clips, targets)
        group_start = i - i % args.accumulate
        group = min(args.accumulate, steps - group_start)
        last_of_group = i == group_start + group - 1
        wait = model.no_sync() if args.distributed and not last_of_group else contextlib.nullcontext()
        with wait:
            with torch.autocast(device_type, amp_dtype(args), enabled=args.amp):
                output = model(clips)
            loss = criterion(output.float(), soft_targets)
            scaler.scale(loss / group).backward()
        if last_of_group:
            if args.clip_grad_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            if model_ema:
                model_ema.update_parameters(models.unwrapped(model))
        if i % args.print_freq == 0 or i == steps - 1:  # only here, so that no other step waits for the device
            refuse_if_not_finite(loss, epoch, i, args)
        num_clips += len(clips)
        meters["loss"].update(loss, len(clips))
        meters["acc1"].update(100 * (output.detach().argmax(1) == targets).float().mean(), len(clips))
        meters["lr"].update(optimizer.param_groups[0]["lr"])
    seconds = time.perf_counter() - start
    totals = torch.tensor(
        [meters["loss"].global_avg * num_clips, meters["acc1"].global_avg * num_clips, num_clips, bad_videos.count],
        dtype=torch.float64,
        device=args.device,
    )
    utils.reduce_across_processes(totals)
    loss, acc1, clips, bad = totals.tolist()
    bad_videos.check(int(bad), bad_videos.num_clips, "clips")
    utils.log(f"Epoch: [{epoch}]  {int(clips):,} clips in {seconds:.1f} s, {int(bad)} that did not decode replaced")
    return {
        "lr": optimizer.param_groups[0]["lr"],
        "train_loss": loss / clips,
        "train_acc1": acc1 / clips,
        "bad_clips": int(bad),
        "clips_per_s": clips / seconds,
    }


def refuse_if_not_finite(loss, epoch, step, args):
    if not loss.isfinite():
        common.refuse(
            f"the loss is not finite at epoch {epoch}, step {step}, or since less than {args.print_freq} steps; most "
            f"often the learning rate is too high: try a tenth of --lr, or --clip-grad-norm 1. Nothing of this epoch "
            f"was saved"
        )


@torch.inference_mode()
def evaluate(model, loader, bad_videos, args, header="Test:"):
    """Accuracy on the validation clips, in float32, as the exported model computes it; exact at any world size.

    A video's prediction is the mean of the softmax of its clips. Returns accuracies in percent (clip_acc1, clip_acc5,
    video_acc1, video_acc5, mean_class_acc: the mean over the classes of the videos' Acc@1), val_loss, and num_clips,
    num_videos: what could be decoded.
    """
    model = models.unwrapped(model).eval()
    metric_logger = utils.MetricLogger()
    dataset, normalize = loader.dataset, transforms.Normalize().to(args.device)
    labels = torch.tensor([label for _, label in dataset.samples], device=args.device)
    k = min(5, args.num_classes)
    video_scores = torch.zeros(len(labels), args.num_classes, dtype=torch.float64, device=args.device)
    totals = torch.zeros(5, dtype=torch.float64, device=args.device)  # loss, Acc@1, Acc@5, clips, failures
    num_clips = torch.tensor(len(loader.sampler), device=args.device)
    utils.reduce_across_processes(num_clips)
    bad_videos.start(num_clips.item())
    for clips, targets, video_idx, failures in metric_logger.log_every(loader, args.print_freq, header):
        bad_videos.report(failures)
        if not len(clips):
            continue
        clips = normalize(transforms.as_float(clips.to(args.device, non_blocking=True)))
        clips = clips.to(memory_format=torch.channels_last_3d)
        targets, video_idx = targets.to(args.device), video_idx.to(args.device)
        # TF32, which cuDNN would use, keeps 10 bits of the mantissa
        cudnn = torch.backends.cudnn
        with cudnn.flags(True, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            output = model(clips).double()
        right = output.topk(k).indices == targets[:, None]
        loss = nn.functional.cross_entropy(output, targets, reduction="sum")
        totals[:4] += torch.stack([loss, right[:, 0].sum(), right.sum(), loss.new_tensor(len(clips))])
        video_scores.index_add_(0, video_idx, output.softmax(1))
        metric_logger.meters["acc1"].update(100 * right[:, 0].float().mean(), len(clips))
    totals[4] = bad_videos.count
    utils.reduce_across_processes(totals, video_scores)
    bad_videos.check(int(totals[4]), bad_videos.num_clips, "clips")
    return report(totals.tolist(), video_scores, labels, k)


def report(totals, video_scores, labels, k):
    """Print the reference's result lines from what `evaluate` has added up, and return the figures."""
    loss, clip_right1, clip_right5, num_clips, failures = totals
    seen = video_scores.sum(1) > 0
    if not seen.any():
        common.refuse(
            "not one validation clip can be decoded; tools/check_videos.py says what is wrong with each video"
        )
    right = video_scores[seen].topk(k).indices == labels[seen, None]
    per_class = [right[labels[seen] == label, 0].double().mean() for label in labels[seen].unique()]
    metrics = {
        "val_loss": loss / num_clips,
        "clip_acc1": 100 * clip_right1 / num_clips,
        "clip_acc5": 100 * clip_right5 / num_clips,
        "video_acc1": 100 * right[:, 0].double().mean().item(),
        "video_acc5": 100 * right.sum(1).double().mean().item(),
        "mean_class_acc": 100 * torch.stack(per_class).mean().item(),
        "num_clips": int(num_clips),
        "num_videos": int(seen.sum()),
    }
    utils.log(f" * Clip Acc@1 {metrics['clip_acc1']:.3f} Clip Acc@5 {metrics['clip_acc5']:.3f}")
    utils.log(f" * Video Acc@1 {metrics['video_acc1']:.3f} Video Acc@5 {metrics['video_acc5']:.3f}")
    utils.log(f" * Mean per-class Acc@1 {metrics['mean_class_acc']:.3f} ({len(per_class)} classes)")
    left_out = len(seen) - metrics["num_videos"]
    utils.log(f" * {metrics['num_videos']:,} videos, {int(num_clips):,} clips; {left_out} unreadable videos left out")
    return metrics


def amp_dtype(args):
    """bfloat16 where the hardware has it, float16 on other GPUs."""
    on_gpu = args.device.startswith("cuda")
    return torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16


def make_optimizer(model, args):
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = args.lr * args.world_size
    if args.opt == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(parameters, lr, momentum=args.momentum, weight_decay=args.weight_decay)


def make_scheduler(optimizer, steps_per_epoch, args):
    """Warm-up, then the schedule of --lr-scheduler, one step for each step of the optimizer."""
    total, warmup = args.epochs * steps_per_epoch, args.lr_warmup_epochs * steps_per_epoch
    if args.lr_scheduler == "onecycle":  # has its own warm-up
        peak = args.lr * args.world_size
        return lr_scheduler.OneCycleLR(optimizer, peak, total_steps=max(1, total), cycle_momentum=False)
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


def make_loader(dataset, sampler, args):
    # a generator of its own: starting workers draws a number, and an interrupted run starts them more often
    return DataLoader(
        dataset,
        args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        collate_fn=datasets.collate_fn,
        pin_memory="cuda" in args.device,
        persistent_workers=args.workers > 0,
        generator=torch.Generator(),
    )


def settle_args(args, checkpoint):
    """Fill in what is left to the checkpoint, else to defaults; exits with code 2 where flag and checkpoint differ."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        common.refuse("--device cuda: torch finds no CUDA device here; leave the flag away to use the CPU")
    bf16_on_cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if args.amp and args.device == "cpu" and not bf16_on_cpu:
        print("--amp is left out: this CPU cannot compute in bfloat16")
        args.amp = False
    # more decoding processes than cores only get into each other's way
    args.workers = min(args.workers, common.num_workers())
    saved = {**checkpoint["args"], **checkpoint} if checkpoint else {}
    saved["model"] = saved.get("model_name", saved.get("args", {}).get("model"))
    saved["val_resize_size"] = saved.get("resize_size", saved.get("val_resize_size"))
    saved["val_crop_size"] = saved.get("crop_size", saved.get("val_crop_size"))
    for name, default in CLIP_DEFAULTS.items():
        flag, stored = getattr(args, name), saved.get(name)
        stored = list(stored) if isinstance(stored, (list, tuple)) else stored
        if stored is not None and flag not in (None, stored) and not args.resume_weights_only:
            common.refuse(f"--{name.replace('_', '-')} {flag}, but {args.resume} has {stored}; leave the flag away")
        setattr(args, name, next(v for v in (flag, stored, default) if v is not None))
    for split in "train", "val":
        resized, cropped = getattr(args, f"{split}_resize_size"), getattr(args, f"{split}_crop_size")
        if any(crop > size for crop, size in zip(cropped, resized)):
            common.refuse(f"--{split}-crop-size {cropped} is larger than --{split}-resize-size {resized}")


def refuse_other_recipe(args, checkpoint, keys=RECIPE):
    """--resume continues exactly, or not at all."""
    advice = "; give the same flags, or start anew from its weights with --resume-weights-only"
    if "classes" not in checkpoint:
        common.refuse(f"{args.resume} was written by another script and cannot be continued exactly{advice}")
    changed = []
    for key in keys if args.lr_scheduler == "multistep" else [*keys, "epochs"]:
        before, now = checkpoint["args"].get(key), getattr(args, key)
        if key == "cache_frames":  # wherever it lies
            before, now = bool(before), bool(now)
        if before != now:
            changed.append(f"{key} {before}, not {now}")
    if changed:
        common.refuse(f"{args.resume} has {'; '.join(changed)}{advice}")


def main(args):
    if (args.device or "").startswith("cuda") or (args.device is None and torch.cuda.is_available()):
        torch.backends.cudnn.benchmark = not args.use_deterministic_algorithms
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
    checkpoint = utils.load_checkpoint(args.resume) if args.resume else None
    settle_args(args, checkpoint)
    utils.init_distributed_mode(args)
    class_map = common.load_class_map(args.class_map)
    classes = sorted(class_map, key=class_map.get)
    args.num_classes = len(classes)
    if checkpoint and checkpoint.get("classes", classes) != classes:
        common.refuse(
            f"{args.resume} was trained with other classes, or another order, than {args.class_map} has; --class-map "
            f"names the map that it was trained with"
        )
    utils.log(f"{args.model} on {args.world_size} x {args.device}, {args.workers} decoding processes each")

    bad_videos = utils.BadVideos(args.max_bad_share)
    sizes = dict(crop_size=args.val_crop_size, resize_size=args.val_resize_size)
    preset = presets.VideoClassificationPresetEval
    dataset_test = datasets.load_dataset("val", class_map, preset, sizes, bad_videos, args)
    test_sampler = datasets.val_clips(dataset_test, args.clips_per_video, args.rank, args.world_size)
    loader_test = make_loader(dataset_test, test_sampler, args)

    torch.manual_seed(args.seed)
    if args.test_only:
        if not checkpoint:
            common.refuse("--test-only needs a trained network: name its checkpoint with --resume")
        model = models.make_model(args, {"model": checkpoint["model"]})
        metrics = evaluate(model, loader_test, bad_videos, args)
        utils.log(json.dumps(metrics))
        return
    train(args, checkpoint, class_map, classes, loader_test, bad_videos)


def train(args, checkpoint, class_map, classes, loader_test, bad_videos):
    """Train from --start-epoch, or after the checkpoint's epoch, to --epochs; validate, log and save on the way."""
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    exact = checkpoint is not None and not args.resume_weights_only
    if exact:
        refuse_other_recipe(args, checkpoint)
    sizes = dict(crop_size=args.train_crop_size, resize_size=args.train_resize_size)
    preset, promised = presets.VideoClassificationPresetTrain, getattr(loader_test.dataset.video_clips, "missing", 0)
    dataset = datasets.load_dataset("train", class_map, preset, sizes, bad_videos, args, promised)
    args.train_set = dataset.summary()
    if exact:
        refuse_other_recipe(args, checkpoint, ["train_set"])
    sampler = datasets.TrainSampler(
        dataset, args.clips_per_video, args.seed, args.rank, args.world_size, args.class_balanced
    )
    loader = make_loader(dataset, sampler, args)

    model = models.make_model(args, checkpoint if exact or not checkpoint else {"model": checkpoint["model"]})
    averaging = swa_utils.get_ema_multi_avg_fn(args.model_ema)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=averaging, use_buffers=True) if args.model_ema else None
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, math.ceil(len(loader) / args.accumulate), args)
    device_type = torch.device(args.device).type
    scaler = torch.amp.GradScaler(device_type, enabled=args.amp and amp_dtype(args) == torch.float16)
    start_epoch, best = args.start_epoch, -1.0
    if exact:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["lr_scheduler"])
        if scaler.is_enabled():
            scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            models.load_weights(ema.module, checkpoint["model"], args.resume)
            ema.n_averaged.fill_(checkpoint["ema_steps"])
        start_epoch, best = checkpoint["epoch"] + 1, checkpoint["best_acc1"]
        utils.log(f"{args.resume} has {start_epoch} epochs behind it; {max(0, args.epochs - start_epoch)} to go")
    raw_model = model
    if args.distributed:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[args.device] if "cuda" in args.device else None)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    augment = transforms.make_augment(classes, args)
    metrics_file = utils.MetricsFile(args.output_dir, start_epoch) if utils.is_main_process() else None
    writer = tensorboard_writer(args) if args.tensorboard and utils.is_main_process() else None

    begin = time.perf_counter()
    for epoch in range(start_epoch, args.epochs):
        torch.manual_seed(args.seed + 1000 * epoch + args.rank)  # flips, MixUp and dropout
        sampler.set_epoch(epoch)
        bad_videos.start(args.world_size * len(sampler))
        metrics = {"epoch": epoch}
        metrics |= train_one_epoch(
            model, criterion, optimizer, scheduler, loader, augment, bad_videos, epoch, args, ema, scaler
        )
        utils.same_buffers(raw_model, *([ema] if ema else []))
        if (epoch + 1) % args.eval_every == 0 or epoch == args.epochs - 1:
            metrics |= evaluate(ema or model, loader_test, bad_videos, args)
        metrics["seconds"] = time.perf_counter() - begin

        output_dir = Path(args.output_dir)
        is_best = metrics.get("video_acc1", -1.0) > best
        best = max(best, metrics.get("video_acc1", -1.0))
        state = {
            "model": (ema.module if ema else raw_model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "epoch": epoch,
            "args": vars(args),
            "scaler": scaler.state_dict(),
            "classes": classes,
            "clip_len": args.clip_len,
            "frame_rate": args.frame_rate,
            "resize_size": list(args.val_resize_size),
            "crop_size": list(args.val_crop_size),
            "model_name": args.model,
            "best_acc1": best,
        }
        if ema:
            state |= {"raw_model": raw_model.state_dict(), "ema_steps": int(ema.n_averaged)}
        numbered = args.save_every and (epoch + 1) % args.save_every == 0
        others = [output_dir / f"model_{epoch}.pth"] * bool(numbered) + [output_dir / "model_best.pth"] * is_best
        if metrics_file:
            metrics_file.append(metrics)
        utils.save_on_master(state, output_dir / "checkpoint.pth", *others)
        if writer:
            for key, value in metrics.items():
                writer.add_scalar(key, value, epoch)
            writer.flush()
    utils.log(f"Training time {(time.perf_counter() - begin) / 60:.1f} min; best Video Acc@1 {best:.3f}")


def tensorboard_writer(args):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        common.refuse("--tensorboard needs the package: pip install tensorboard")
    return SummaryWriter(args.output_dir)


# what --resume takes over from the checkpoint, and what they are without one
CLIP_DEFAULTS = {
    "model": "r2plus1d_18",
    "clip_len": 16,  # frames
    "frame_rate": 4,  # fps
    "val_resize_size": list(transforms.PRESET.resize_size),  # (height, width) in pixels
    "val_crop_size": list(transforms.PRESET.crop_size),  # (height, width) in pixels
}
DEFAULT_MAP = Path(__file__).resolve().parents[2] / "class_map.json"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands, and each flag's default."""


def get_args_parser(add_help=True):
    parser = argparse.ArgumentParser(
        description=__doc__,
        add_help=add_help,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--data-path", required=True, help="folder that holds train/<class>/<video> and val/<class>/<video>")
    add("--class-map", default=str(DEFAULT_MAP), help="JSON object {class folder name: index}")
    add("--model", help="a video model of torchvision; None: the checkpoint's, else r2plus1d_18")
    add("--weights", help="pre-trained weights of torchvision to start from, say KINETICS400_V1")
    add("--device", help="cuda or cpu; None: cuda where there is one")
    add("-b", "--batch-size", default=24, type=int, help="clips a step, in each process")
    add("--epochs", default=15, type=int)
    add("-j", "--workers", default=10, type=int, help="decoding processes, at most one for each core; 0: none")
    add("--output-dir", default=".", help="for checkpoints, metrics.jsonl and curves.png")
    add("--print-freq", default=10, type=int, help="batches between two log lines")
    add("--cache-dataset", action="store_true", help="keep the index of the videos in DATA_PATH/<split>.index.npz")
    add(
        "--cache-frames",
        default="",
        metavar="DIR",
        help="decode each video once: keep its resized frames here, 66 kB each, and train from them",
    )
    add("--seed", default=0, type=int, help="all randomness follows from it")
    add("--use-deterministic-algorithms", action="store_true", help="bit for bit on GPUs too; slower")

    group = parser.add_argument_group("clips")
    add = group.add_argument
    add(
        "--clip-len",
        type=int,
        help="frames of a clip; None: the checkpoint's, else 16, what preprocessing and export expect (the original "
        "trains on 8 and exports 16)",
    )
    add("--frame-rate", type=float, help="fps at which frames are picked; None: the checkpoint's, else 4")
    add("--clips-per-video", default=1, type=int, help="random clips an epoch, and evenly spread ones in validation")
    add("--train-resize-size", default=[128, 171], nargs=2, type=int, metavar=("H", "W"), help="pixels")
    add("--train-crop-size", default=[112, 112], nargs=2, type=int, metavar=("H", "W"), help="pixels")
    add("--val-resize-size", nargs=2, type=int, metavar=("H", "W"), help="pixels; None: the checkpoint's, else 128 171")
    add("--val-crop-size", nargs=2, type=int, metavar=("H", "W"), help="pixels; None: the checkpoint's, else 112 112")
    add("--max-bad-share", default=0.1, type=float, help="share of clips that may fail to decode before the run stops")

    group = parser.add_argument_group("recipe")
    add = group.add_argument
    add("--trainable-layers", default=["layer4", "fc"], nargs="+", help="modules that learn, or: all")
    add("--opt", default="sgd", choices=["sgd", "adamw"])
    add("--lr", default=0.01, type=float, help="initial (onecycle: highest); multiplied by the number of processes")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    add("--lr-scheduler", default="multistep", choices=["multistep", "cosine", "onecycle"])
    add("--lr-milestones", default=[20, 30, 40], nargs="+", type=int, help="epochs (multistep)")
    add("--lr-gamma", default=0.1, type=float, help="factor at a milestone (multistep)")
    add("--lr-warmup-epochs", default=10, type=int, help="(multistep and cosine; onecycle has its own warm-up)")
    add("--lr-warmup-method", default="linear", choices=["linear", "constant"])
    add("--lr-warmup-decay", default=0.001, type=float, help="factor at the start of warm-up")
    add(
        "--amp",
        action="store_true",
        help="train in bfloat16, or float16 on a GPU that has no bfloat16",
    )
    add("--label-smoothing", default=0.0, type=float)
    add("--clip-grad-norm", default=0.0, type=float, help="largest norm of the gradient; 0: any")
    add("--accumulate", default=1, type=int, help="batches whose gradients make one step")
    add(
        "--model-ema",
        default=0.0,
        type=float,
        metavar="DECAY",
        help="validate and save the moving average of the weights, say 0.999; 0: the weights themselves",
    )
    add("--class-balanced", action="store_true", help="draw clips so that all classes come equally often")
    add("--hflip-prob", default=0.5, type=float, help="of a mirrored clip; classes that name a side never are")
    add("--color-jitter", default=0.0, type=float, help="largest relative change of brightness, contrast, saturation")
    add("--mixup-alpha", default=0.0, type=float, help="0: no MixUp")
    add("--sync-bn", action="store_true", help="BatchNorm over all processes (GPUs only)")

    group = parser.add_argument_group("validation, saving and resuming")
    add = group.add_argument
    add("--test-only", action="store_true", help="validate the checkpoint of --resume")
    add("--eval-every", default=1, type=int, help="epochs between two validations; the last epoch is always validated")
    add("--save-every", default=1, type=int, help="epochs between two model_<epoch>.pth; 0: only the last and the best")
    add("--resume", default="", help="checkpoint to continue exactly, with the same flags")
    add("--resume-weights-only", action="store_true", help="take only the weights of --resume, and start a new run")
    add("--start-epoch", default=0, type=int, help="first epoch of a new run; --resume goes on after its own")
    add("--tensorboard", action="store_true", help="also write for TensorBoard, into OUTPUT_DIR")

    group = parser.add_argument_group("taken for the sake of the original's command lines")
    add = group.add_argument
    add("--dist-url", default="env://", help="where processes meet")
    add("--world-size", default=1, type=int, help="torchrun decides")
    add("--kinetics-version", default="400", help="the class map decides")
    return parser


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
        utils.leave_distributed_mode()
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
