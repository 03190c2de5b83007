"""Run the whole pipeline on this machine, from drawn videos to the accuracy of the deployed model; nothing else needed.

Makes `.venv` beside the README, installs requirements.txt, then runs the commands of the README one after another,
with AI Hub replaced by one on this machine (tools/local_hub.py). All it makes lies in FOLDER. What is done is not
done again: it can be interrupted and restarted. The last line is one JSON object with the figures.

    $ python3 tools/quickstart.py     # on Python 3.10 to 3.13
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import common
from common import environment, flags

from qualcomm import compiler

# ----------------------------------------------------------------------------------------------------------------------
FOLDER = "sample"  # everything is written here, relative to the repository; git ignores it
TRAIN_VIDEOS_PER_CLASS = 16  # drawn videos to train on
VAL_VIDEOS_PER_CLASS = 12  # drawn videos to validate on
EPOCHS = 6  # passes over the training videos
# ----------------------------------------------------------------------------------------------------------------------

FEW = 5  # videos of a class, over all epochs, of which a network learns nothing
EXERCISE = "squats"  # one of the drawn exercises
TRAINING = "train R(2+1)D-18"  # the step that goes on from its checkpoint when it was interrupted


def pretrained_weights():
    """Where torchvision looks for the Kinetics-400 weights of R(2+1)D-18 before it would download them."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME", Path(cache, "torch")), "hub", "checkpoints", "r2plus1d_18-91a641e6.pth")


def steps():
    """The pipeline as (what the step does, its command), in the README's order and words.

    Clips have 8 frames, 2 s, instead of QEVD's 16: half the work, and a whole repetition of each drawn exercise.
    """
    folder = shlex.quote(FOLDER)
    organized, training = f"{folder}/QEVD_organized", f"{folder}/training"
    return steps_of_training(organized, training) + steps_of_deployment(organized, training)


def steps_of_training(organized, training):
    """From nothing to a validated checkpoint in the folder `training`, of videos in `organized`."""
    folder = shlex.quote(FOLDER)
    dataset = f"{folder}/dataset"
    train = "python references/video_classification/train.py"
    parts = " ".join(f"{dataset}/QEVD-FIT-300k-Part-{k}" for k in (1, 2, 3, 4))
    weights = " --weights KINETICS400_V1" if pretrained_weights().exists() else ""
    return [
        (
            "draw the sample dataset",
            f"python tools/make_sample_dataset.py --out {dataset}"
            f" --train-videos-per-class {TRAIN_VIDEOS_PER_CLASS} --val-videos-per-class {VAL_VIDEOS_PER_CLASS}",
        ),
        (
            "organize it by split and class",
            f"python tools/refactor_dataset.py --srcs {parts} --dest {organized}"
            f" --labels-json {dataset}/fine_grained_labels_release.json --missing-csv {folder}/missing.csv",
        ),
        (
            "check every frame of every video",
            f"python tools/check_videos.py --root {organized} --quarantine {folder}/bad_videos --remux --replace"
            f" --ext mp4 --jobs 2 --report {folder}/bad_videos.csv",
        ),
        (
            TRAINING,
            f"{train} --data-path {organized} --output-dir {training}{weights} --device cpu --amp --cache-dataset"
            f" --clip-len 8 --trainable-layers layer3 layer4 fc --epochs {EPOCHS} --batch-size 4 --opt adamw"
            f" --lr 0.0005 --lr-head 0.005 --lr-scheduler onecycle --bn-clips 0 --workers 1 --eval-every {EPOCHS}"
            f" --save-every 0",
        ),
        (
            "validate it",
            f"{train} --data-path {organized} --resume {training}/checkpoint.pth --test-only --device cpu",
        ),
    ]


def steps_of_deployment(organized, training):
    """From the checkpoint to figures and pictures of the deployed model."""
    folder = shlex.quote(FOLDER)
    tensors = f"{folder}/preprocessed_tensors"
    return [
        (
            "turn the validation videos into tensors",
            f"python tools/preprocess_and_save.py --data-root {organized}/val --out-root {tensors} --clip-len 8",
        ),
        (
            "export and compile the model",
            f"python tools/local_hub.py python tools/example_export.py --checkpoint {training}/checkpoint.pth"
            f" --data-dir {tensors} --output-dir {folder}/export_assets",
        ),
        (
            "run it on every tensor",
            "python tools/local_hub.py python tools/run_inference.py"
            f" --dlc-path {folder}/export_assets/resnet_2plus1d.bin --data-path {tensors}"
            f" --output-h5 {folder}/dataset-export.h5",
        ),
        (
            "evaluate what came back",
            f"python tools/evaluate.py --h5 {folder}/dataset-export.h5 --manifest {tensors}/manifest.jsonl"
            f" --class_map class_map.json --report-dir {folder}/report",
        ),
        (
            "classify videos as if no one had labelled them",
            f"python tools/predict.py {organized}/val/{EXERCISE} --checkpoint {training}/checkpoint.pth"
            f" --out {folder}/predictions",
        ),
    ]


def offline_step():
    """What else is run where Qualcomm's compiler is installed already; it is never installed unasked."""
    folder = shlex.quote(FOLDER)
    return (
        "estimate the latency on the Dragonwing IQ-9075",
        f"python tools/compile_offline.py --source {folder}/export_assets/resnet_2plus1d.bin"
        f" --output-dir {folder}/export_assets",
    )


def write_state(path, state):
    common.write_text(path, json.dumps(state, indent=2) + "\n")


def run(command, python):
    """Run one command with the environment's Python, showing its output; returns the last line it printed.

    Exits with the command's exit code if that is not 0.
    """
    print(f"\n$ {command}", flush=True)
    arguments = [str(python) if word == "python" else word for word in shlex.split(command)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    last = ""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        print(f"this command failed; what was done before it is kept: mend what it says and start again: {command}")
        sys.exit(process.returncode)
    return last


def main():
    flags.set_constants_from_flags(globals())
    start = time.monotonic()
    os.chdir(common.REPO)
    python = environment.make_environment(common.REPO / "requirements.txt")
    if not pretrained_weights().exists():
        print(f"no pre-trained weights at {pretrained_weights()}: training starts from scratch")

    Path(FOLDER).mkdir(exist_ok=True)
    state_file = Path(FOLDER, "quickstart.json")
    drawn = {"train": TRAIN_VIDEOS_PER_CLASS, "val": VAL_VIDEOS_PER_CLASS}
    state = json.loads(state_file.read_text()) if state_file.exists() else {"done": {}, "started": "", "drawn": drawn}
    if state.get("drawn", drawn) != drawn:
        common.refuse(f"{FOLDER}/ holds another number of videos: delete it, or keep it and pass --folder OTHER")
    results, todo = {}, steps()
    wheels = common.REPO / ".qnn"
    has_compiler = wheels.is_dir()
    if has_compiler and (reason := compiler.why_not_loaded(wheels)):
        print(f"without an estimate of the latency: {reason}")
        has_compiler = False
    todo += [offline_step()] * has_compiler
    for number, (what, command) in enumerate(todo, 1):
        if command in state["done"]:
            results[command] = state["done"][command]
            print(f"{number}. {what}: done before, {results[command]['seconds']} s")
            continue
        print(f"\n{number}. {what}", end="")
        checkpoint = Path(FOLDER, "training", "checkpoint.pth")
        interrupted = what == TRAINING and state["started"] == command and checkpoint.exists()
        if what == TRAINING and not interrupted:
            checkpoint.unlink(missing_ok=True)  # another command's
        # what was done after this step stood on something older: it is forgotten, and done again
        state = {"done": {}, "started": command, "drawn": drawn}
        write_state(state_file, state | {"done": results})
        begin = time.monotonic()
        last_line = run(command + (f" --resume {shlex.quote(str(checkpoint))}" if interrupted else ""), python)
        results[command] = {"seconds": round(time.monotonic() - begin), "last_line": last_line}
        write_state(state_file, state | {"done": results})

    last_lines = [results[command]["last_line"] for _, command in todo]
    trained, deployed = json.loads(last_lines[4]), json.loads(last_lines[8])
    report_figures(trained, deployed, json.loads(last_lines[10]) if has_compiler else None, time.monotonic() - start)


def about_so_few():
    """What to expect of a network that has seen hardly a video of each class, as a line; "" for others."""
    if TRAIN_VIDEOS_PER_CLASS * EPOCHS > FEW:
        return ""
    chance = 100 / sum(path.is_dir() for path in Path(FOLDER, "QEVD_organized", "val").iterdir())
    seen = f"{TRAIN_VIDEOS_PER_CLASS} a class, {EPOCHS} epoch{'s' * (EPOCHS > 1)}"
    return f"Of so few videos ({seen}) about {chance:.1f} % Top-1, chance, is expected: every step runs, that is all.\n"


def report_figures(trained, deployed, compiled, seconds):
    """Print where everything lies, the two accuracies and the next step; exit with code 1 if they do not agree.

    compiled: what compile_offline.py found, None where Qualcomm's compiler is not installed.
    """
    val_acc1, val_acc5 = trained["video_acc1"], trained["video_acc5"]
    print(f"""
{FOLDER}/dataset/contact_sheet.png     what the drawn exercises look like
{FOLDER}/training/                     checkpoint.pth, metrics.jsonl, curves.png
{FOLDER}/preprocessed_tensors/         the validation clips as the device takes them, manifest.jsonl
{FOLDER}/export_assets/                the compiled model (emulated: it runs on tools/local_hub.py only)
{FOLDER}/dataset-export.h5             its logits
{FOLDER}/report/report.html            where it is right and wrong
{FOLDER}/predictions/                  pictures of what the model saw in videos of {EXERCISE}, and said of them

                            Top-1      Top-5
training's own validation   {val_acc1:7.3f} %  {val_acc5:7.3f} %  {trained["num_videos"]} videos
deployed model              {deployed["top1"]:7.3f} %  {deployed["top5"]:7.3f} %  {deployed["n"]} videos
{about_so_few()}
Next: your own videos (README, "Use your own videos"), or QEVD and an AI Hub account (README, from section 2).
Your own webcam: .venv/bin/python tools/live.py --checkpoint {shlex.quote(FOLDER)}/training/checkpoint.pth
""")
    if not compiled:
        print(f"Is it under 34 ms? (installs Qualcomm's compiler)\n$ {offline_step()[1]}\n")
    agree = abs(val_acc1 - deployed["top1"]) < 0.001 and trained["num_videos"] == deployed["n"]
    if not agree:
        print("error: the two must agree on the same videos; compare the clip settings and the outputs of steps 5 to 9")
    figures = {"val_acc1": val_acc1, "deployed_acc1": deployed["top1"], "deployed_acc5": deployed["top5"]}
    if compiled:
        figures["estimated_ms"] = compiled["estimated_ms"]
    print(json.dumps(figures | {"num_val_videos": deployed["n"], "seconds": round(seconds)}))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
