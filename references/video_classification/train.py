"""Train R(2+1)D-18 to tell exercises apart, and validate it: torchvision's reference style and flags.

Reads   DATA_PATH/{train,val}/<class>/<video>.mp4 and class_map.json
Writes  OUTPUT_DIR/checkpoint.pth, model_<epoch>.pth, model_best.pth, metrics.jsonl, curves.png

    $ python references/video_classification/train.py --data-path QEVD_organized --weights KINETICS400_V1 \\
          --cache-dataset --epochs 15 --batch-size 24 --lr 0.01
    $ python references/video_classification/train.py --data-path QEVD_organized --resume checkpoint.pth --test-only
    $ torchrun --nproc-per-node 8 -- references/video_classification/train.py …   # --batch-size is that of one process
"""

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
from common import calibration, flags, provenance
from common.names import digits

import torch
from torch import nn

import datasets
import models
import presets
import processes
import settings
import starting
import teachers
import transforms
import utils
from arguments import get_args_parser
from learner import Learner


def train_one_epoch(learner, loader, bad_videos, epoch, args, time_left=None):
    """One pass over the training clips. Returns {"train_loss", "train_acc1" in percent, "clips_per_s", …}.

    time_left: what a log line says of the rest of the run, a function of the share of this epoch that is done.
    Exits with code 2 as soon as a log line shows a loss that is not finite.
    """
    models.set_train_mode(learner.model, args)
    network = args.model, args.num_classes, args.clip_len, *args.train_crop_size, *args.trainable_layers
    metric_logger = utils.MetricLogger(models.flops_of_step(*network))
    meters, steps = metric_logger.meters, len(loader)
    start, num_clips = time.perf_counter(), 0
    batches = metric_logger.log_every(loader, args.print_freq, f"Epoch: [{epoch}]", time_left)
    for i, batch in enumerate(batches):
        bad_videos.report(batch.failures)
        if not len(batch.clips):
            common.refuse("not one clip of a batch decodes; tools/check_videos.py finds such videos")
        group_start = i - i % args.accumulate
        group = min(args.accumulate, steps - group_start)
        loss, right = learner.learn(batch, group, ends_group=i == group_start + group - 1)
        if i % args.print_freq == 0 or i == steps - 1:  # only here, so that no other step waits for the device
            refuse_if_not_finite(loss, epoch, i, args)
        num_clips += len(batch.clips)
        meters["loss"].update(loss, len(batch.clips))
        meters["acc1"].update(100 * right, len(batch.clips))
        meters["lr"].update(max(group["lr"] for group in learner.optimizer.param_groups))
    seconds = time.perf_counter() - start
    totals = torch.tensor(
        [meters["loss"].global_avg * num_clips, meters["acc1"].global_avg * num_clips, num_clips, bad_videos.count],
        dtype=torch.float64,
        device=args.device,
    )
    processes.reduce_across_processes(totals)
    loss, acc1, clips, bad = totals.tolist()
    bad_videos.check(int(bad), bad_videos.num_clips, "clips")
    utils.log(f"Epoch: [{epoch}]  {int(clips):,} clips in {seconds:.1f} s, {int(bad)} that did not decode replaced")
    return {
        "lr": max(group["lr"] for group in learner.optimizer.param_groups),
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
def evaluate(model, loader, bad_videos, args, exact=True):
    """Accuracy on the validation clips; the same at any world size.

    exact: in float32, as the exported model computes it; else in the precision of training.
    A video's prediction is the mean of the softmax of its clips. Returns accuracies in percent (clip_acc1, clip_acc5,
    video_acc1, video_acc5, mean_class_acc: the mean over the classes of the videos' Acc@1; with --clips-per-video also
    first_clip_acc1, of the first clips alone, as the contest scores them), val_loss, and num_clips, num_videos: what
    could be decoded; and the logits of each video's first clip, float64 (videos, classes), NaN where it is not known.
    """
    model = models.unwrapped(model).eval()
    metric_logger = utils.MetricLogger()
    dataset, normalize = loader.dataset, transforms.Normalize(args.mean, args.std).to(args.device)
    labels = dataset.labels.to(args.device)
    k, device_type = min(5, args.num_classes), torch.device(args.device).type
    video_scores = torch.zeros(len(labels), args.num_classes, dtype=torch.float64, device=args.device)
    first_logits, first_seen = torch.zeros_like(video_scores), torch.zeros_like(video_scores[:, :1])
    totals = torch.zeros(5, dtype=torch.float64, device=args.device)  # loss, Acc@1, Acc@5, clips, failures
    num_clips = torch.tensor(len(loader.sampler), device=args.device)
    processes.reduce_across_processes(num_clips)
    bad_videos.start(num_clips.item())
    for batch in metric_logger.log_every(loader, args.print_freq, "Test:"):
        bad_videos.report(batch.failures)
        if not len(batch.clips):
            continue
        clips = normalize(transforms.as_float(batch.clips.to(args.device, non_blocking=True)))
        clips = clips.to(memory_format=torch.channels_last_3d)
        targets, video_idx = batch.labels.to(args.device), batch.video_idx.to(args.device)
        with (
            models.float32_on_gpu() if exact else torch.autocast(device_type, models.amp_dtype(args), enabled=args.amp)
        ):
            output = model(clips).double()
        right = output.topk(k).indices == targets[:, None]
        loss = nn.functional.cross_entropy(output, targets, reduction="sum")
        totals[:4] += torch.stack([loss, right[:, 0].sum(), right.sum(), loss.new_tensor(len(clips))])
        video_scores.index_add_(0, video_idx, output.softmax(1))
        is_first = (batch.clip_idx == dataset.scored[batch.video_idx]).to(args.device)[:, None]
        first_logits.index_add_(0, video_idx, output * is_first)
        first_seen.index_add_(0, video_idx, is_first.double())
        metric_logger.meters["acc1"].update(100 * right[:, 0].float().mean(), len(clips))
    totals[4] = bad_videos.count
    processes.reduce_across_processes(totals, video_scores, first_logits, first_seen)
    bad_videos.check(int(totals[4]), bad_videos.num_clips, "clips")
    metrics = report(totals.tolist(), video_scores, labels, k)
    first_logits = first_logits / first_seen  # a video of one clip has it several times
    seen = first_seen[:, 0] > 0
    if args.clips_per_video > 1 and seen.any():
        right = first_logits[seen].argmax(1) == labels[seen]
        first = metrics["first_clip_acc1"] = 100 * right.double().mean().item()
        more, d = metrics["video_acc1"] - first, digits(len(right))
        utils.log(f" * First clip, which the contest scores, Acc@1 {first:.{d}f}; several clips: {more:+.{d}f} points")
    return metrics, first_logits.cpu()


def calibrated(logits, labels):
    """The temperature and threshold of common/calibration.py for a checkpoint, {} where these clips do not tell them.

    logits: float64 (videos, classes), of videos that were not trained on; rows of NaN are left out.
    """
    known = logits.isfinite().all(1)
    found = calibration.fit_if_told(logits[known].numpy(), labels[known].numpy())
    if not found:
        return {}
    promise = f"{100 * calibration.WANTED:g} % of the answers"
    text = f'"not sure" below {100 * found.threshold:.0f} %, so that {promise} are right' if found.threshold else ""
    utils.log(f" * Temperature {found.temperature:.2f}; {text or f'no threshold makes {promise} right'}")
    return found._asdict()


def report(totals, video_scores, labels, k):
    """Print the reference's result lines from what `evaluate` has added up, and return the figures."""
    loss, clip_right1, clip_right5, num_clips, _ = totals
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
    d = digits(metrics["num_videos"])
    utils.log(f" * Clip Acc@1 {metrics['clip_acc1']:.{d}f} Clip Acc@5 {metrics['clip_acc5']:.{d}f}")
    utils.log(f" * Video Acc@1 {metrics['video_acc1']:.{d}f} Video Acc@5 {metrics['video_acc5']:.{d}f}")
    utils.log(f" * Mean per-class Acc@1 {metrics['mean_class_acc']:.{d}f} ({len(per_class)} classes)")
    left_out = len(seen) - metrics["num_videos"]
    utils.log(f" * {metrics['num_videos']:,} videos, {int(num_clips):,} clips; {left_out} unreadable videos left out")
    return metrics


def main(args):
    models.settle_device(args)
    processes.join(args)
    checkpoint, class_map, held_out = settings.settle(args)
    utils.log(f"{args.model} on {args.world_size} x {args.device}, {args.workers} decoding processes each")
    if processes.is_main_process() and not args.test_only:
        utils.make_output_dir(args)

    bad_videos = utils.BadVideos(args.max_bad_share)
    torch.manual_seed(args.seed)
    if not args.test_only:
        for path in args.teacher_logits:  # refused before the videos are looked at
            teachers.read_about(path, sorted(class_map, key=class_map.get), args)
        return train(args, checkpoint, class_map, held_out, bad_videos)
    model = models.make_model(args, {"model": checkpoint["model"]})
    if args.recompute_statistics:
        save_recomputed(model, checkpoint, class_map, held_out, bad_videos, args)
    if args.save_logits:
        return teachers.save_logits(model, class_map, held_out, bad_videos, args)
    metrics, _ = evaluate(model, validation_loader(class_map, held_out, bad_videos, args), bad_videos, args)
    if "val" in checkpoint.get("train_splits", []) and not held_out.videos:
        metrics["saw_val"] = True
        utils.log(" * This network was trained on val, too: these figures say nothing about other videos")
    utils.log(json.dumps(metrics))


def save_recomputed(model, checkpoint, class_map, held_out, bad_videos, args):
    """BatchNorm's statistics over --bn-clips training clips; the checkpoint with them into --recompute-statistics."""
    loader = training_loader(class_map, held_out, bad_videos, args)
    batches = islice(loader, math.ceil(args.bn_clips / (args.batch_size * args.world_size)))
    augment = transforms.make_augment(sorted(class_map, key=class_map.get), args)
    models.recompute_statistics(model, batches, augment, args)
    state = checkpoint | {"model": model.state_dict(), "epoch": checkpoint.get("epoch", 0)}
    utils.save_on_master(state, args.recompute_statistics)


def validation_loader(class_map, held_out, bad_videos, args):
    dataset = datasets.load_dataset("val", class_map, presets.for_validation(args), bad_videos, args, held_out)
    clips = datasets.val_clips(dataset, args.clips_per_video, args.rank, args.world_size)
    return datasets.make_loader(dataset, clips, args)


def training_loader(class_map, held_out, bad_videos, args, validated=None):
    """The loader of training clips. validated: the videos of validation, whose frames --cache-frames will keep, too."""
    promised = getattr(validated, "missing", 0)
    preset = presets.for_training(args)
    dataset = datasets.load_dataset("train", class_map, preset, bad_videos, args, held_out, promised)
    share = args.rank, args.world_size, args.class_balanced
    sampler = datasets.TrainSampler(dataset, args.clips_per_video, args.seed, *share)
    return datasets.make_loader(dataset, sampler, args)


def train(args, checkpoint, class_map, held_out, bad_videos):
    """Train from --start-epoch, or after the checkpoint's epoch, to --epochs; validate, log and save on the way."""
    classes = sorted(class_map, key=class_map.get)
    continued = checkpoint if starting.continues(args) else None
    if continued:
        settings.refuse_other_recipe(args, continued)
    loader_test = validation_loader(class_map, held_out, bad_videos, args)
    loader = training_loader(class_map, held_out, bad_videos, args, loader_test.dataset.video_clips)
    datasets.name_untrained_classes(loader.dataset, loader_test.dataset, classes)
    if continued:
        settings.refuse_other_videos(args, continued, loader.dataset.summary())
    if args.teacher_logits:
        folder = Path(args.data_path, "train")
        loader.dataset.teachers = teachers.Teachers(args.teacher_logits, loader.dataset, folder, classes, args)
    steps = math.ceil(len(loader) / args.accumulate)
    learner = Learner(args, checkpoint, steps, classes)
    bn_batches = models.batches_for_statistics(learner.raw, steps, args)
    start_epoch, best, last_metrics = args.start_epoch, -1.0, None
    if continued:
        start_epoch, best, last_metrics = checkpoint["epoch"] + 1, checkpoint["best_acc1"], checkpoint["metrics"]
        utils.log(f"{args.resume} has {start_epoch} epochs behind it; {max(0, args.epochs - start_epoch)} to go")
    utils.check_space_for_checkpoints(learner.raw, args.epochs - start_epoch, args)
    history = utils.TrainingHistory(args, start_epoch, last_metrics) if processes.is_main_process() else None
    known = facts(args, checkpoint, loader.dataset, class_map, held_out)
    if history:
        known["git"] = provenance.git_state()
        held_out.write(args.output_dir)

    begin = time.perf_counter()
    for epoch in range(start_epoch, args.epochs):
        torch.manual_seed(args.seed + 1000 * epoch + args.rank)  # flips, MixUp and dropout
        loader.sampler.set_epoch(epoch)
        bad_videos.start(args.world_size * len(loader.sampler))
        time_left = partial(utils.time_left, begin, args.epochs - start_epoch, epoch - start_epoch)
        sureness, metrics = {}, {"epoch": epoch}
        metrics |= train_one_epoch(learner, loader, bad_videos, epoch, args, time_left)
        if bn_batches:
            utils.log(f"BatchNorm: [{epoch}]  its statistics anew, over {bn_batches} batches (--bn-clips)")
        for network in learner.networks() if bn_batches else ():
            models.recompute_statistics(network, islice(loader, bn_batches), learner.augment, args)
        processes.same_buffers(*learner.networks())
        is_last = epoch == args.epochs - 1
        if (epoch + 1) % args.eval_every == 0 or is_last:
            figures, logits = evaluate(learner.networks()[-1], loader_test, bad_videos, args, exact=is_last)
            metrics |= figures
            if held_out.videos or "val" not in known["train_splits"]:
                sureness = calibrated(logits, loader_test.dataset.labels)
        metrics["seconds"] = time.perf_counter() - begin
        is_best = metrics.get("video_acc1", -1.0) > best
        best = max(best, metrics.get("video_acc1", -1.0))
        if epoch == start_epoch and args.overwrite and not continued:
            utils.remove_earlier_run(args.output_dir)
        now = {"epoch": epoch, "args": vars(args), "best_acc1": best, "metrics": metrics} | sureness
        save(learner.state() | known | now, is_best, args)
        if history:
            history.append(metrics)
    d = digits(len(loader_test.dataset.samples))
    utils.log(f"Training time {(time.perf_counter() - begin) / 60:.1f} min; best Video Acc@1 {best:.{d}f}")
    print_next_steps(args, held_out)


def facts(args, checkpoint, dataset, class_map, held_out):
    """What every checkpoint of a run says beside weights, for the steps that follow."""
    about = {"classes": sorted(class_map, key=class_map.get), "train_set": dataset.summary()}
    about |= settings.clip_of_run(args).as_dict() | {"held_out": held_out.key() if held_out.videos else None}
    # what the weights that it starts from have seen, this network has seen
    return about | {"train_splits": sorted({*args.train_splits, *(checkpoint or {}).get("train_splits", [])})}


def print_next_steps(args, held_out):
    last, tensors = Path(args.output_dir, "checkpoint.pth"), {"DATA_ROOT": Path(args.data_path, "val")}
    if held_out.videos:
        tensors = {"DATA_ROOT": Path(args.data_path, held_out.videos[0].split("/")[0]), "HELD_OUT": "true"}
    commands = (
        flags.next_command("preprocess_and_save.py", last, CHECKPOINT=last, **tensors),
        flags.next_command("example_export.py", last, checkpoint=last),
    )
    best = last.with_name("model_best.pth")
    which = f", {best} the epoch's that is best on validation, which --best takes" if best.exists() else ""
    utils.log(f"{last} is the last epoch's{which}; next: {', then '.join(commands)}")


def save(state, is_best, args):
    """checkpoint.pth, and as --save-every and the best validation say, the same file under other names."""
    output_dir, epoch = Path(args.output_dir), state["epoch"]
    numbered = args.save_every and (epoch + 1) % args.save_every == 0
    others = [output_dir / f"model_{epoch}.pth"] * bool(numbered) + [output_dir / "model_best.pth"] * is_best
    utils.save_on_master(state, output_dir / "checkpoint.pth", *others)


if __name__ == "__main__":
    args = get_args_parser(__doc__).parse_args()
    try:
        main(args)
        processes.leave()
    except KeyboardInterrupt:
        common.interrupted("--resume auto goes on from the last checkpoint")
    except RuntimeError as e:
        utils.explain(e, args)
        raise
