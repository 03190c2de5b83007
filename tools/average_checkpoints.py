"""Average the weights of several checkpoints of one network: a soup (Wortsman et al., 2022), which costs nothing later.

Reads:  CHECKPOINTS, of the same network, classes and hold-out, fine-tuned from the same weights; data_path, if named
Writes: OUTPUT, a checkpoint that every later step takes

    $ python tools/average_checkpoints.py --checkpoints a/checkpoint.pth b/checkpoint.pth --data-path QEVD_organized

With data_path, BatchNorm's statistics are recomputed over training clips (averaged ones fit no network), and it is
validated. GREEDY takes the checkpoints from the best on and keeps each that does not lower Video Acc@1 on val; its
result is never below the best single one there, which flatters it: report a soup's accuracy on other videos.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from common import flags
from common.checkpoints import load_checkpoint
from common.held_out import read_held_out
from common.names import digits, shortened

# ----------------------------------------------------------------------------------------------------------------------
CHECKPOINTS = ["./checkpoint.pth"]  # two or more
OUTPUT = "./soup.pth"  # checkpoint to write
GREEDY = False  # keep only what helps on val; needs data_path
data_path = ""  # dataset root with train/ and val/; "": statistics are averaged, and nothing is validated
CLASS_MAP = "./class_map.json"  # the map that the checkpoints were trained with
BN_CLIPS = 512  # training clips over which BatchNorm's statistics are recomputed
DEVICE = ""  # of train.py; "": cuda where there is one
# ----------------------------------------------------------------------------------------------------------------------

KEPT = ("classes", "args", "epoch", "held_out")  # of the first checkpoint, beside its ClipDescription
OTHER_HOLD_OUT = "the videos that were held out (train with the same --hold-out, --hold-out-seed and --groups)"
TRAIN = common.REPO / "references/video_classification/train.py"


def load_alike(paths):
    """The checkpoints, in order. Exits with code 2 unless they hold one network, for the same classes and clips."""
    from torchvision_patches import clip

    checkpoints = [load_checkpoint(path) for path in paths]
    try:
        abouts = [clip.described(checkpoint, checkpoint["args"])[0] for checkpoint in checkpoints]
    except ValueError as e:
        common.refuse(f"one of {shortened(paths)} holds no network that can be used here ({e})")
    first = checkpoints[0]
    for path, other, about in zip(paths[1:], checkpoints[1:], abouts[1:]):
        different = about.differences(abouts[0], about._fields)
        different += [] if other.get("held_out") == first.get("held_out") else [OTHER_HOLD_OUT]
        different += ["their classes"] if other.get("classes") != first.get("classes") else []
        shapes = [{key: value.shape for key, value in c["model"].items()} for c in (first, other)]
        different += ["their layers"] if shapes[0] != shapes[1] else []
        if different:
            common.refuse(f"{path} and {paths[0]} differ: {', '.join(different)}; there is no average of them")
    return checkpoints


def average(checkpoints):
    """The first checkpoint with the mean of all weights; counters are the first one's. No optimizer comes along."""
    from torchvision_patches import clip

    first = checkpoints[0]
    weights = {
        key: sum(c["model"][key].double() for c in checkpoints).div(len(checkpoints)).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in first["model"].items()
    }
    seen = sorted({split for checkpoint in checkpoints for split in checkpoint.get("train_splits", [])})
    kept = {key: first[key] for key in (*KEPT, *clip.ClipDescription._fields) if key in first}
    return kept | {"model": weights, "train_splits": seen}


def save_soup(checkpoint, path):
    """Write a checkpoint, and beside it the list of the videos that were held out, which is that of all CHECKPOINTS."""
    import torch

    try:
        read_held_out(checkpoint, CHECKPOINTS[0]).write(Path(path).parent)
        with common.written_then_renamed(path) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError where the disk is full
        common.refuse(f"{path} cannot be written ({str(e).splitlines()[0]})")


def validate(path, layers, recompute=True):
    """Let train.py recompute the statistics of a checkpoint, in place, and validate it. Returns its figures.

    Exits with train.py's exit code if it fails.
    """
    command = [sys.executable, str(TRAIN), "--data-path", data_path, "--class-map", CLASS_MAP, "--resume", str(path)]
    command += ["--test-only", "--trainable-layers", *layers] + (["--device", DEVICE] if DEVICE else [])
    command += ["--recompute-statistics", str(path), "--bn-clips", str(BN_CLIPS)] if recompute else []
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if result.returncode:
        print(result.stdout, end="")
        sys.exit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def greedy(paths, checkpoints, layers, folder):
    """The paths and checkpoints of a greedy soup, the best first."""
    figures = [validate(path, layers, recompute=False) for path in paths]
    accuracies, d = [figure["video_acc1"] for figure in figures], digits(figures[0]["num_videos"])
    for path, accuracy in zip(paths, accuracies):
        print(f"{path}: Video Acc@1 {accuracy:.{d}f}", flush=True)
    best_first = sorted(range(len(paths)), key=lambda i: -accuracies[i])
    kept, best = best_first[:1], accuracies[best_first[0]]
    for i in best_first[1:]:
        tried = Path(folder, "tried.pth")
        save_soup(average([checkpoints[k] for k in (*kept, i)]), tried)
        accuracy = validate(tried, layers)["video_acc1"]
        what = "kept" if accuracy >= best else "left out"
        print(f"with {paths[i]}: Video Acc@1 {accuracy:.{d}f}, {what}", flush=True)
        if accuracy >= best:
            kept, best = [*kept, i], accuracy
    return [paths[i] for i in kept], [checkpoints[i] for i in kept]


def main():
    flags.set_constants_from_flags(globals())
    if len(CHECKPOINTS) < 2:
        common.refuse(
            f"an average needs two checkpoints or more: name them with --checkpoints, not {CHECKPOINTS} alone"
        )
    if GREEDY and not data_path:
        common.refuse("a greedy soup is chosen on val: name the dataset's root with --data-path")
    paths, checkpoints = CHECKPOINTS, load_alike(CHECKPOINTS)
    Path(OUTPUT).absolute().parent.mkdir(parents=True, exist_ok=True)
    layers = checkpoints[0]["args"].get("trainable_layers") or ["all"]
    if GREEDY:
        with tempfile.TemporaryDirectory(dir=Path(OUTPUT).resolve().parent) as folder:
            paths, checkpoints = greedy(paths, checkpoints, layers, folder)
    save_soup(average(checkpoints), OUTPUT)
    print(f"{OUTPUT}: the average of {', '.join(paths)}")
    commands = [flags.next_command("example_export.py", OUTPUT, checkpoint=OUTPUT)]
    if data_path and (held_out := read_held_out(checkpoints[0], paths[0]).videos):
        root = Path(data_path, held_out[0].split("/")[0])
        of_held_out = {"CHECKPOINT": OUTPUT, "DATA_ROOT": root, "HELD_OUT": "true"}
        commands.insert(0, flags.next_command("preprocess_and_save.py", OUTPUT, **of_held_out))
    print(f"next: {', then '.join(commands)}")
    if data_path:
        # one checkpoint alone has statistics that fit it
        print(json.dumps(validate(OUTPUT, layers, recompute=len(checkpoints) > 1)))


if __name__ == "__main__":
    main()
