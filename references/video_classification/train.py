"""Train R(2+1)D-18 to tell exercises apart, and validate it: torchvision's reference style and flags.

Reads   DATA_PATH/{train,val}/<class>/<video>.mp4 and class_map.json
Writes  OUTPUT_DIR/checkpoint.pth, model_<epoch>.pth, model_best.pth, metrics.jsonl, curves.png

    $ python references/video_classification/train.py --data-path QEVD_organized --weights KINETICS400_V1 \\
          --cache-dataset --epochs 15 --batch-size 24 --lr 0.01
    $ python references/video_classification/train.py --data-path QEVD_organized --resume checkpoint.pth --test-only
    $ torchrun --nproc-per-node 8 -- references/video_classification/train.py …   # --batch-size is that of one process
"""

import argparse
import contextlib
import json
import math
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

# `python references/video_classification/train.py` puts only its own folder on the path; appended, so that nothing in
# tools/ can shadow a package or a file here. `import common` then does the same for torchvision_patches.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import common
from common import flags

import torch
from torch import nn
from torch.optim import swa_utils

import datasets
import models
import presets
import settings
import starting
import teachers
import transforms
import utils


def train_one_epoch(
    model, criterion, optimizer, scheduler, loader, augment, bad_videos, epoch, args, model_ema=None, scaler=None,
    time_left=None,
):  # fmt: skip
    """One pass over the training clips. Returns {"train_loss", "train_acc1" in percent, "clips_per_s", …}.

    time_left: what a log line says of the rest of the run, a function of the share of this epoch that is done.
    Exits with code 2 as soon as a log line shows a loss that is not finite.
    """
    models.set_train_mode(model, args)
    network = args.model, args.num_classes, args.clip_len, *args.train_crop_size, *args.trainable_layers
    metric_logger = utils.MetricLogger(models.flops_of_step(*network))
    meters = metric_logger.meters
    parameters = [p for p in model.parameters() if p.requires_grad]
    device_type = torch.device(args.device).type
    steps = len(loader)
    start, num_clips = time.perf_counter(), 0
    for i, (clips, targets, _, failures) in enumerate(
        metric_logger.log_every(loader, args.print_freq, f"Epoch: [{epoch}]", time_left)
    ):
        bad_videos.report(failures)
        if not len(clips):
            common.refuse("not one clip of a batch decodes; tools/check_videos.py finds such videos")
        targets, logits = targets if isinstance(targets, list) else (targets, None)
        clips, targets = clips.to(args.device, non_blocking=True), targets.to(args.device, non_blocking=True)
        if logits is not None:
            logits = teachers.probabilities(logits.to(args.device, non_blocking=True), args.distill_temperature)
        clips, soft_targets = augment(clips, targets, logits)
        group_start = i - i % args.accumulate
        group = min(args.accumulate, steps - group_start)
        last_of_group = i == group_start + group - 1
        wait = model.no_sync() if args.distributed and not last_of_group else contextlib.nullcontext()
        with wait:
            with torch.autocast(device_type, models.amp_dtype(args), enabled=args.amp):
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
        "waited_s": metric_logger.waited,
    }


def refuse_if_not_finite(loss, epoch, step, args):
    if not loss.isfinite():
        common.refuse(
            f"the loss is not finite at epoch {epoch}, step {step}, or since less than {args.print_freq} steps; most "
            f"often the learning rate is too high: try a tenth of --lr, or --clip-grad-norm 1. Nothing of this epoch "
            f"was saved"
        )


@torch.inference_mode()
def evaluate(model, loader, bad_videos, args, header="Test:", exact=True):
    """Accuracy on the validation clips; the same at any world size.

    exact: in float32, as the exported model computes it; else in the precision of training.
    A video's prediction is the mean of the softmax of its clips. Returns accuracies in percent (clip_acc1, clip_acc5,
    video_acc1, video_acc5, mean_class_acc: the mean over the classes of the videos' Acc@1), val_loss, and num_clips,
    num_videos: what could be decoded.
    """
    model = models.unwrapped(model).eval()
    metric_logger = utils.MetricLogger()
    dataset, normalize = loader.dataset, transforms.Normalize(args.mean, args.std).to(args.device)
    labels = dataset.labels.to(args.device)
    k, device_type = min(5, args.num_classes), torch.device(args.device).type
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
        with (
            models.float32_on_gpu() if exact else torch.autocast(device_type, models.amp_dtype(args), enabled=args.amp)
        ):
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


def main(args):
    models.settle_device(args)
    utils.init_distributed_mode(args)
    if args.resume == "auto":
        if args.resume_weights_only:
            common.refuse("--resume auto continues a run exactly: leave --resume-weights-only away, or name a file")
        last = Path(args.output_dir, "checkpoint.pth")
        args.resume = utils.from_main_process(lambda: str(last) if last.exists() else "")
    checkpoint = starting.starting_point(args)
    class_map = common.load_class_map(args.class_map)
    classes = sorted(class_map, key=class_map.get)
    settings.settle(args, checkpoint, classes)
    if checkpoint:
        checkpoint = starting.without_other_head(checkpoint, classes, args)
    utils.log(f"{args.model} on {args.world_size} x {args.device}, {args.workers} decoding processes each")
    utils.refuse_small_shared_memory(args)
    if args.cache_frames and (args.extra_data or args.train_splits != ["train"]):
        common.refuse("--cache-frames holds one folder a split: leave it away with --extra-data and --train-splits")
    if "val" in args.train_splits and not args.hold_out:
        utils.log("val is trained on, too: its accuracy says nothing about other videos")
    if utils.is_main_process() and not args.test_only:
        utils.make_output_dir(args)

    bad_videos = utils.BadVideos(args.max_bad_share)
    sizes = dict(crop_size=args.val_crop_size, resize_size=args.val_resize_size)
    preset = presets.VideoClassificationPresetEval
    dataset_test = datasets.load_dataset("val", class_map, preset, sizes, bad_videos, args)
    test_sampler = datasets.val_clips(dataset_test, args.clips_per_video, args.rank, args.world_size)
    loader_test = datasets.make_loader(dataset_test, test_sampler, args)

    torch.manual_seed(args.seed)
    if args.test_only:
        if not checkpoint:
            common.refuse("--test-only needs a trained network: name its checkpoint with --resume")
        model = models.make_model(args, {"model": checkpoint["model"]})
        if args.recompute_statistics:
            recompute_statistics(model, checkpoint, class_map, classes, bad_videos, args)
        if args.save_logits:
            return teachers.save_logits(model, class_map, classes, bad_videos, args)
        metrics = evaluate(model, loader_test, bad_videos, args)
        utils.log(json.dumps(metrics))
        return
    train(args, checkpoint, class_map, classes, loader_test, bad_videos)


def recompute_statistics(model, checkpoint, class_map, classes, bad_videos, args):
    """BatchNorm's statistics over --bn-clips training clips; the checkpoint with them into --recompute-statistics."""
    sizes = dict(crop_size=args.train_crop_size, resize_size=args.train_resize_size)
    dataset = datasets.load_dataset("train", class_map, presets.VideoClassificationPresetTrain, sizes, bad_videos, args)
    sampler = datasets.TrainSampler(dataset, args.clips_per_video, args.seed, args.rank, args.world_size)
    loader = datasets.make_loader(dataset, sampler, args)
    batches = islice(loader, math.ceil(args.bn_clips / (args.batch_size * args.world_size)))
    models.recompute_statistics(model, batches, transforms.make_augment(classes, args), args)
    state = checkpoint | {"model": model.state_dict(), "epoch": checkpoint.get("epoch", 0)}
    utils.save_on_master(state, args.recompute_statistics)


def train(args, checkpoint, class_map, classes, loader_test, bad_videos):
    """Train from --start-epoch, or after the checkpoint's epoch, to --epochs; validate, log and save on the way."""
    exact = starting.continues(args)
    defaults = vars(get_args_parser().parse_args(["--data-path", ""]))
    if exact:
        settings.refuse_other_recipe(args, checkpoint, defaults)
    sizes = dict(crop_size=args.train_crop_size, resize_size=args.train_resize_size)
    preset, promised = presets.VideoClassificationPresetTrain, getattr(loader_test.dataset.video_clips, "missing", 0)
    dataset = datasets.load_dataset("train", class_map, preset, sizes, bad_videos, args, promised)
    datasets.name_untrained_classes(dataset, loader_test.dataset, classes)
    args.train_set = dataset.summary()
    if exact:
        settings.refuse_other_recipe(args, checkpoint, defaults, ["train_set"])
    sampler = datasets.TrainSampler(
        dataset, args.clips_per_video, args.seed, args.rank, args.world_size, args.class_balanced
    )
    loader = datasets.make_loader(dataset, sampler, args)
    steps = math.ceil(len(loader) / args.accumulate)
    bn_batches = models.batches_for_statistics(steps, args)

    model = models.make_model(args, checkpoint if exact or not checkpoint else {"model": checkpoint["model"]})
    averaging = swa_utils.get_ema_multi_avg_fn(args.model_ema)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=averaging, use_buffers=True) if args.model_ema else None
    optimizer = models.make_optimizer(model, args)
    scheduler = models.make_scheduler(optimizer, steps, args)
    device_type = torch.device(args.device).type
    scaler = torch.amp.GradScaler(device_type, enabled=args.amp and models.amp_dtype(args) == torch.float16)
    start_epoch, best = args.start_epoch, -1.0
    if exact:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["lr_scheduler"])
        if scaler.is_enabled():
            scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            starting.load_all(ema.module, checkpoint["model"], args.resume)
            ema.n_averaged.fill_(checkpoint["ema_steps"])
        start_epoch, best = checkpoint["epoch"] + 1, checkpoint["best_acc1"]
        utils.log(f"{args.resume} has {start_epoch} epochs behind it; {max(0, args.epochs - start_epoch)} to go")
    utils.check_space(model, args.epochs - start_epoch, args)
    raw_model = model
    if args.distributed:
        model = models.distributed(model, args)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    if args.teacher_logits:
        split_folder = Path(args.data_path, "train")
        dataset.teachers = teachers.Teachers(args.teacher_logits, dataset, split_folder, classes, args)
        criterion = teachers.Distillation(args.distill_alpha, args.distill_temperature, args.label_smoothing)
    augment = transforms.make_augment(classes, args)
    last_metrics = checkpoint.get("metrics") if exact else None
    metrics_file = utils.MetricsFile(args.output_dir, start_epoch, last_metrics) if utils.is_main_process() else None
    writer = tensorboard_writer(args) if args.tensorboard and utils.is_main_process() else None

    begin = time.perf_counter()
    for epoch in range(start_epoch, args.epochs):
        torch.manual_seed(args.seed + 1000 * epoch + args.rank)  # flips, MixUp and dropout
        sampler.set_epoch(epoch)
        bad_videos.start(args.world_size * len(sampler))
        metrics = {"epoch": epoch}
        metrics |= train_one_epoch(
            model, criterion, optimizer, scheduler, loader, augment, bad_videos, epoch, args, ema, scaler,
            partial(utils.time_left, begin, args.epochs - start_epoch, epoch - start_epoch),
        )  # fmt: skip
        learning = [raw_model, ema.module] if ema else [raw_model]
        for network in learning if bn_batches else ():
            models.recompute_statistics(network, islice(loader, bn_batches), augment, args)
        utils.same_buffers(*learning)
        last = epoch == args.epochs - 1
        if (epoch + 1) % args.eval_every == 0 or last:
            metrics |= evaluate(ema or model, loader_test, bad_videos, args, exact=last)
        metrics["seconds"] = time.perf_counter() - begin
        is_best = metrics.get("video_acc1", -1.0) > best
        best = max(best, metrics.get("video_acc1", -1.0))
        state = {
            "model": learning[-1].state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "epoch": epoch,
            "args": vars(args),
            "scaler": scaler.state_dict(),
            "classes": classes,
            "best_acc1": best,
            "metrics": metrics,
        } | settings.clip_of(args).as_dict()
        if ema:
            state |= {"raw_model": raw_model.state_dict(), "ema_steps": int(ema.n_averaged)}
        save(state, is_best, args)
        if metrics_file:
            metrics_file.append(metrics)
        if writer:
            for key, value in metrics.items():
                writer.add_scalar(key, value, epoch)
            writer.flush()
    utils.log(f"Training time {(time.perf_counter() - begin) / 60:.1f} min; best Video Acc@1 {best:.3f}")
    last = Path(args.output_dir, "checkpoint.pth")
    tensors = dict(CHECKPOINT=last, DATA_ROOT=Path(args.data_path, "val"))
    commands = (
        flags.next_command("preprocess_and_save.py", last, **tensors),
        flags.next_command("example_export.py", last, checkpoint=last),
    )
    utils.log(f"{last} is the last epoch's; next: {', then '.join(commands)}")


def save(state, is_best, args):
    """checkpoint.pth, and as --save-every and the best validation say, the same file under other names."""
    output_dir, epoch = Path(args.output_dir), state["epoch"]
    numbered = args.save_every and (epoch + 1) % args.save_every == 0
    others = [output_dir / f"model_{epoch}.pth"] * bool(numbered) + [output_dir / "model_best.pth"] * is_best
    utils.save_on_master(state, output_dir / "checkpoint.pth", *others)


def tensorboard_writer(args):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        common.refuse("--tensorboard needs the package: pip install tensorboard")
    return SummaryWriter(args.output_dir)


DEFAULT_MAP = Path(__file__).resolve().parents[2] / "class_map.json"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands, and each flag's default."""


def positive(text):
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text}")
    return int(text)


def get_args_parser(add_help=True):
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data-path DIR [flags]",
        description=__doc__,
        add_help=add_help,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("what one needs first")
    add, out = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--data-path", required=True, help="folder that holds train/<class>/<video> and val/<class>/<video>")
    add("--class-map", default=str(DEFAULT_MAP), help="JSON object {class folder name: index}")
    add("--weights", help="start from torchvision's (say KINETICS400_V1), a file or a name on Hugging Face's Hub")
    add("--trainable-layers", nargs="+", help="modules that learn, or: all; None: layer4 and the head")
    add("--epochs", default=15, type=positive, help="passes over the training videos")
    add("-b", "--batch-size", default=24, type=positive, help="clips a step, in each process")
    add("--lr", default=0.01, type=float, help="initial (onecycle: highest); multiplied by the number of processes")
    add("--amp", action="store_true", help="bfloat16, or float16 on a GPU without; on a CPU in frozen layers only")
    out("--output-dir", default=".", help="for checkpoints, metrics.jsonl and curves.png")
    run = dict(dest="output_dir", default=argparse.SUPPRESS, metavar="NAME", type=flags.run_folder)
    out("--run", **run, help="--output-dir runs/NAME, where later steps with the same --run look")
    add("--resume", default="", help="checkpoint to continue exactly; auto: OUTPUT_DIR/checkpoint.pth, if it is there")

    group = parser.add_argument_group("data, model and machine")
    add = group.add_argument
    add("--model", help="a video model of torchvision; None: the checkpoint's, else r2plus1d_18")
    add("--train-splits", default=["train"], nargs="+", choices=["train", "val"], help="folders that are trained on")
    add("--extra-data", default=[], nargs="+", metavar="DIR", help="more roots with train/<class>/<video> to train on")
    add("--hold-out", default=0.0, type=float, metavar="SHARE", help="validate on this part of train, instead of val/")
    add("--groups", default="", metavar="CSV", help="video,group (a person, say): --hold-out never divides a group")
    add("--cache-dataset", action="store_true", help="keep the index of the videos in DATA_PATH/<split>.index.npz")
    add("--cache-frames", default="", metavar="DIR", help="decode each video once: keep resized frames, 66 kB each")
    add("--device", help="cuda, cuda:1, … or cpu; None: cuda where there is one")
    add("-j", "--workers", default=10, type=int, help="decoding processes, at most one for each core; 0: none")
    add("--print-freq", default=10, type=positive, help="batches between two log lines")
    add("--seed", default=0, type=int, help="all randomness follows from it")
    add("--use-deterministic-algorithms", action="store_true", help="bit for bit on GPUs too; slower")

    group = parser.add_argument_group("clips")
    add = group.add_argument
    add("--clip-len", type=int, help="frames; None: the checkpoint's, else 16, as export expects (the original: 8)")
    add("--frame-rate", type=float, help="fps at which frames are picked; None: the checkpoint's, else 4")
    add("--clips-per-video", default=1, type=positive, help="an epoch, random ones; in validation evenly spread")
    sizes, crop = (dict(nargs=n, type=int, metavar="PIXELS") for n in ("+", 2))
    add("--val-resize-size", **sizes, help="height and width, or the shorter side; None: the checkpoint's or network's")
    add("--val-crop-size", **crop, help="height and width; None: the checkpoint's or the network's own")
    add("--train-resize-size", **sizes, help="None: as in validation")
    add("--train-crop-size", **crop, help="None: as in validation")
    upright = dict(action=argparse.BooleanOptionalAction, default=None)
    add("--rotate", **upright, help="turn frames upright as players do; None: the checkpoint's, else as they lie")
    add("--max-bad-share", default=0.1, type=float, help="share of clips that may fail to decode before the run stops")

    group = parser.add_argument_group("recipe")
    add = group.add_argument
    add("--opt", default="sgd", choices=["sgd", "adamw"])
    add("--lr-head", type=float, help="that of the last layer; None: as --lr")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    add("--no-decay-norm", action="store_true", help="no weight decay on norms and biases")
    add("--lr-scheduler", default="multistep", choices=["multistep", "cosine", "onecycle"])
    add("--lr-milestones", default=[20, 30, 40], nargs="+", type=int, help="epochs (multistep)")
    add("--lr-gamma", default=0.1, type=float, help="factor at a milestone (multistep)")
    add("--lr-warmup-epochs", default=10, type=int, help="(multistep and cosine; onecycle has its own warm-up)")
    add("--lr-warmup-method", default="linear", choices=["linear", "constant"])
    add("--lr-warmup-decay", default=0.001, type=float, help="factor at the start of warm-up")
    add("--fold-frozen", action="store_true", help="compute frozen BatchNorm (on a GPU all) within convolutions")
    add("--label-smoothing", default=0.0, type=float)
    add("--clip-grad-norm", default=0.0, type=float, help="largest norm of the gradient; 0: any")
    add("--accumulate", default=1, type=positive, help="batches whose gradients make one step")
    add("--model-ema", default=0.0, type=float, help="decay, say 0.999: validate and save averaged weights; 0: do not")
    add("--class-balanced", action="store_true", help="draw clips so that all classes come equally often")
    add("--hflip-prob", default=0.5, type=float, help="of a mirrored clip; classes that name a side never are")
    add("--rand-augment", action="store_true", help="torchvision's RandAugment, one draw for all frames of a clip")
    add("--color-jitter", default=0.0, type=float, help="largest relative change of brightness, contrast, saturation")
    add("--mixup-alpha", default=0.0, type=float, help="0: no MixUp")
    add("--videomix-prob", default=0.0, type=float, help="of a clip with a box of another one, the same in all frames")
    add("--stackmix-prob", default=0.0, type=float, help="of a clip that ends with the frames of another one")
    add("--bn-clips", default=512, type=int, help="BatchNorm's statistics anew from these after short epochs; 0: never")
    add("--teacher-logits", nargs="+", default=[], metavar="FILE", help="learn from these, too; several are averaged")
    add("--distill-alpha", default=0.5, type=float, help="weight of the teachers' part of the loss")
    add("--distill-temperature", default=2.0, type=float)
    add("--sync-bn", action="store_true", help="BatchNorm over all processes (GPUs only)")

    group = parser.add_argument_group("validation, saving and resuming")
    add = group.add_argument
    add("--test-only", action="store_true", help="validate the checkpoint of --resume")
    add("--eval-every", default=1, type=positive, help="epochs between two validations; the last is always validated")
    add("--save-every", default=1, type=int, help="epochs between two model_<epoch>.pth; 0: only the last and the best")
    add("--overwrite", action="store_true", help="start a new run in an OUTPUT_DIR that holds another one's checkpoint")
    add("--save-logits", default="", metavar="FILE", help="with --test-only: what it says of all clips of --split")
    add("--recompute-statistics", default="", metavar="FILE", help="with --test-only: BatchNorm's; saved here")
    add("--split", default="train", choices=["train", "val"], help="of --save-logits")
    add("--views", default=1, type=positive, help="of --save-logits; beyond the centre: random crops, flips, averaged")
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
    args = get_args_parser().parse_args()
    try:
        main(args)
        utils.leave_distributed_mode()
    except KeyboardInterrupt:
        common.interrupted("--resume auto goes on from the last checkpoint")
    except RuntimeError as e:
        utils.explain(e, args)
        raise
