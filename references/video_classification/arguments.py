"""The flags of train.py: torchvision's wherever it has one."""

import argparse
from pathlib import Path

from common import flags

DEFAULT_MAP = Path(__file__).resolve().parents[2] / "class_map.json"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands, and each flag's default."""


def positive(text):
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text}")
    return int(text)


def share(text):
    """A part of a whole, 0 or more and less than 1, for argparse."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"a share from 0 to less than 1 is needed, not {text}")
    return float(text)


def portion(text):
    """A number from 0 to 1, for argparse."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is needed, not {text}")
    return float(text)


def get_args_parser(description=None):
    """The parser of train.py. description: the text that --help starts with."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data-path DIR [flags]",
        description=description,
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
    add("--model", help="torchvision's for videos, videomae_base or _small; None: the checkpoint's, else r2plus1d_18")
    add("--train-splits", default=["train"], nargs="+", choices=["train", "val"], help="folders that are trained on")
    add("--extra-data", default=[], nargs="+", metavar="DIR", help="more roots with train/<class>/<video> to train on")
    add("--hold-out", type=share, help="validate on this part of train; None: the checkpoint's; 0: validate on val/")
    add("--hold-out-seed", default=0, type=int, help="which part; the same one for all that are averaged or ensembled")
    add("--groups", default="", metavar="FILE", help="who is in which video: --hold-out never divides a group")
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
    add("--keep-aspect", action="store_true", help="resize the shorter side only: a portrait video is not squashed")
    add("--max-bad-share", default=0.1, type=portion, help="share of clips that may fail to decode, or it stops")

    group = parser.add_argument_group("recipe")
    add = group.add_argument
    add("--opt", default="sgd", choices=["sgd", "adamw"], help="optimizer")
    add("--lr-head", type=float, help="that of the last layer; None: as --lr")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay", help="of --opt")
    add("--layer-decay", default=1.0, type=float, help="factor of the rate for each layer further from the head")
    add("--drop-path", type=share, help="largest probability of dropping a residual path; None: the network's own")
    add("--betas", default=[0.9, 0.999], nargs=2, type=float, help="of AdamW")
    add("--no-decay-norm", action="store_true", help="no weight decay on norms and biases")
    add("--lr-scheduler", default="multistep", choices=["multistep", "cosine", "onecycle"], help="how it falls")
    add("--lr-milestones", default=[20, 30, 40], nargs="+", type=int, help="epochs (multistep)")
    add("--lr-gamma", default=0.1, type=float, help="factor at a milestone (multistep)")
    add("--lr-warmup-epochs", default=10, type=int, help="(multistep and cosine; onecycle has its own warm-up)")
    add("--lr-warmup-method", default="linear", choices=["linear", "constant"], help="how it rises")
    add("--lr-warmup-decay", default=0.001, type=float, help="factor at the start of warm-up")
    add("--fold-frozen", action="store_true", help="compute frozen BatchNorm (on a GPU all) within convolutions")
    add("--pad-channels", default=1, type=positive, help="compute with multiples of it, say 8 on a GPU; same results")
    add("--label-smoothing", default=0.0, type=share, help="part of each label that all classes share")
    add("--clip-grad-norm", default=0.0, type=float, help="largest norm of the gradient; 0: any")
    add("--accumulate", default=1, type=positive, help="batches whose gradients make one step")
    add("--model-ema", default=0.0, type=float, help="decay, say 0.999: validate and save averaged weights; 0: do not")
    add("--class-balanced", action="store_true", help="draw clips so that all classes come equally often")
    add("--hflip-prob", default=0.5, type=portion, help="of a mirrored clip; classes that name a side never are")
    add("--rand-augment", action="store_true", help="torchvision's RandAugment, one draw for all frames of a clip")
    add("--color-jitter", default=0.0, type=portion, help="largest relative change of brightness, contrast, saturation")
    add("--mixup-alpha", default=0.0, type=float, help="0: no MixUp")
    add("--videomix-prob", default=0.0, type=portion, help="of a clip with a box of another one, in all frames: CutMix")
    add("--stackmix-prob", default=0.0, type=portion, help="of a clip that ends with the frames of another one")
    add("--bn-clips", default=512, type=int, help="BatchNorm's statistics anew from these after short epochs; 0: never")
    add("--teacher-logits", nargs="+", default=[], metavar="FILE", help="learn from these, too; several are averaged")
    add("--distill-alpha", default=0.5, type=portion, help="weight of the teachers' part of the loss")
    add("--distill-temperature", default=2.0, type=float, help="both sides' logits are divided by it")
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
