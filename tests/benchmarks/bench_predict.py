"""Clips a second of predict.py, against reading the clips alone and the network alone, in the same run.

    $ python tests/benchmarks/bench_predict.py --videos 48 --rounds 3

Draws videos of 5 s (340 x 256, 30 fps, H.264) and takes an untrained R(2+1)D-18 from a checkpoint. Prints medians and
the ratio to the slower of the two, with and without the pictures.
"""

import argparse
import contextlib
import functools
import io
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tools"), str(REPO / "tests")]

from common import machine

import torch
import torchvision

import predict
from make_videos import write_video
from see.classifier import load
from torchvision_patches.clip import first_clip
from torchvision_patches.pool import outcomes_of


def clips_per_second(number, work):
    start = time.perf_counter()
    work()
    return number / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos = [str(write_video(Path(folder, f"{k}.mp4"), 150, height=256, width=340, seed=k)) for k in range(4)]
        videos = [videos[k % 4] for k in range(args.videos)]
        network = torchvision.models.get_model("r2plus1d_18", num_classes=92)
        torch.save({"model": network.state_dict(), "model_name": "r2plus1d_18"}, Path(folder, "checkpoint.pth"))
        classifier = load(Path(folder, "checkpoint.pth"))
        predict.OUT = folder
        clip = first_clip(videos[0], classifier.description).pixels[None].repeat(classifier.batch_size, 0)
        names = {video: Path(video).stem for video in videos}

        def read():
            read = functools.partial(first_clip, description=classifier.description)
            list(outcomes_of(read, deque(videos), machine.num_workers(), 60, in_order=True))

        def run_network():
            for _ in range(-(-args.videos // classifier.batch_size)):
                classifier.logits(clip)

        def classify(pictures):
            predict.PICTURES = pictures
            with contextlib.redirect_stdout(io.StringIO()):
                predict.predict_all(videos, {}, names, classifier)

        works = {"reading alone": read, "network alone": run_network, "predict.py": lambda: classify(True),
                 "without pictures": lambda: classify(False)}  # fmt: skip
        rates = {name: [] for name in works}
        classifier.logits(clip)
        for _ in range(args.rounds):
            for name, work in works.items():
                rates[name].append(clips_per_second(args.videos, work))
        medians = {name: statistics.median(values) for name, values in rates.items()}
    slower = min(medians["reading alone"], medians["network alone"])
    print(f"{classifier.about}, {machine.num_cores()} cores, {args.videos} videos, medians of {args.rounds}")
    for name, rate in medians.items():
        print(f"{name:18} {rate:8.2f} clips/s  {rate / slower:5.2f} of the slower")


if __name__ == "__main__":
    main()
