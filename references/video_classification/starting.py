"""The weights that training starts from, and which of a checkpoint's a run may take."""

import common
from common.checkpoints import HEADS, load_checkpoint, num_outputs
from common.weights import path_of

import processes
import utils


def starting_point(args):
    """The checkpoint that --resume names, or the file or network of the Hub that --weights names; else None.

    Exits with code 2 and one sentence where it cannot be had, or both are named and only one can be taken.
    """
    if args.resume and args.resume_weights_only and args.weights:
        common.refuse(f"a run starts from --resume {args.resume} or from --weights {args.weights}: name one of them")
    if args.resume:
        return load_checkpoint(args.resume, say=utils.log)
    path = path_of(args.weights, processes.from_main_process) if args.weights else None
    return load_checkpoint(path, "--weights names a file, or weights of torchvision", utils.log) if path else None


def continues(args):
    """Whether the run goes on with the network of --resume as it is, its head included, instead of starting from it."""
    return bool(args.resume) and (args.test_only or not args.resume_weights_only)


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
