"""How far the page of live.py is from the file: the same videos as predict.py reads them, and as a camera sends them.

    $ python tests/benchmarks/bench_live.py --checkpoint checkpoint.pth --seeds 8

Drawn exercises of 4 s are classified (a) from their frames by the official rule, (b) from those frames through JPEG of
the page's quality, and (c) sampled as the page does from a camera of 24, 25, 29 or 30 fps whose clock starts anywhere,
through JPEG. Prints the largest and the mean change of a probability, and how often the label is the same.
"""

import argparse
import io
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tools"), str(REPO / "tests")]

from common.calibration import softmax

import numpy as np
import torch
from PIL import Image

from drawn.scene import frames_of
from see.classifier import load
from torchvision_patches.clip import resized_and_cropped
from torchvision_patches.video_utils import VideoClips

EXERCISES = ["jumping_jacks", "squats", "toe_touch", "standing_kicks", "pushups", "leg_lifts"]
QUALITY = float(re.search(r"const QUALITY = ([\d.]+)", (REPO / "tools/page/live.js").read_text())[1])


def through_jpeg(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=round(100 * QUALITY))
    return np.asarray(Image.open(content).convert("RGB"))


def as_the_page_samples(num_frames, fps, clock, clip_len):
    """Numbers of the first frame in each quarter of a second, the last `clip_len` of them."""
    slots = np.floor((np.arange(num_frames) / fps + clock) * 4 + 1e-6)
    return np.flatnonzero(np.diff(slots, prepend=-1) > 0)[-clip_len:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="sample/training/checkpoint.pth")
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    classifier, rng = load(args.checkpoint), np.random.default_rng(0)
    clip_len = classifier.description.clip_len
    changes = {"through JPEG": [], "a camera's frames, through JPEG": []}
    same = dict.fromkeys(changes, 0)

    def probabilities(frames):
        clip = resized_and_cropped(np.stack(frames), classifier.description)[None]
        return softmax(classifier.logits(clip))[0]

    for name in EXERCISES:
        for seed in range(args.seeds):
            fps = int(rng.choice([24, 25, 29, 30]))
            frames = list(frames_of(name, [4321, seed], 4 * fps + fps // 2, fps))[fps // 2 :]
            _, indices = VideoClips.compute_clips_for_video(torch.arange(len(frames)), clip_len, 1, fps, 4)
            official = [frames[i] for i in indices[0].tolist()]
            page = [frames[i] for i in as_the_page_samples(len(frames), fps, rng.random() / 4, clip_len)]
            expected = probabilities(official)
            for what, clip in zip(changes, (official, page)):
                got = probabilities([through_jpeg(frame) for frame in clip])
                changes[what].append(np.abs(got - expected).max())
                same[what] += int(got.argmax() == expected.argmax())
    for what, values in changes.items():
        print(f"{what}: the largest change of a probability is {np.mean(values):.4f} on average, "
              f"{max(values):.4f} at most; the label is the same for {same[what]} of {len(values)}")  # fmt: skip


if __name__ == "__main__":
    main()
