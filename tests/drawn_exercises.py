"""Drawn exercises and a network that tells them apart: a linear model of where the picture is bright and moves.

It is fitted in a second and takes clips of the real size, so that tests can ask for right labels.
"""

import functools
import json
import warnings
from pathlib import Path
from unittest import mock

import common

import av
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from drawn import scene
from drawn.scene import HEIGHT, WIDTH
from torchvision_patches.clip import of_network, resized_and_cropped

CLASSES = ["jumping_jacks", "pushups", "squats"]


class TinyNetwork(nn.Module):
    """(1, 3, 16, 112, 112) in [0, 1] -> 3 logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2 * 14 * 14, len(CLASSES))

    def features(self, clip):
        grey = F.avg_pool3d(clip.mean(1, keepdim=True), (1, 8, 8))  # (1, 1, 16, 14, 14)
        moving = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean(2)
        return torch.cat([grey.mean(2).flatten(1), 10 * moving.flatten(1)], 1)

    def forward(self, clip):
        return self.fc(self.features(clip))


def draw(name, seeds, num_frames, fps):
    """Frames of a drawn exercise, uint8 (T, H, W, 3); rougher than those of the sample, in a third of the time."""
    with mock.patch.multiple(scene, SCALE=1, MARGIN=8):
        return np.stack(list(scene.frames_of(name, seeds, num_frames, fps)))


@functools.cache
def trained_network():
    """A TinyNetwork that knows the drawn CLASSES."""
    network, features, targets = TinyNetwork(), [], []
    with torch.no_grad():
        for index in range(len(CLASSES)):
            for seed in range(8):
                clip = resized_and_cropped(draw(CLASSES[index], [99, seed], 16, 4), of_network())[None]
                features.append(network.features(torch.from_numpy(clip))[0])
                targets.append(8 * F.one_hot(torch.tensor(index), len(CLASSES)) - 4.0)
        x, y = torch.stack(features), torch.stack(targets)
        mean = x.mean(0)
        x = x - mean
        weight = torch.linalg.solve(x @ x.T + 3 * torch.eye(len(x)), y).T @ x  # ridge regression
        network.fc.weight.copy_(weight)
        network.fc.bias.copy_(y.mean(0) - weight @ mean)
    return network.eval()


def write_onnx(path, **beside):
    """The trained network as an ONNX file, with its classes and `beside` beside it as example_export.py writes them."""
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(trained_network(), (torch.zeros(1, 3, 16, 112, 112),), str(path), dynamo=False,
                          opset_version=17, input_names=["video"], output_names=["class_probs"])  # fmt: skip
    described = {"sha256": common.sha256_of(path), "classes": CLASSES, **beside}
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find, absent = PathFinder.find_spec, ("torch", "torchvision", "qai_hub_models")
PathFinder.find_spec = lambda name, *more: None if name in absent else find(name, *more)
"""


def without_torch(folder):
    """The environment of a process that finds no torch, as on a board, by a file in `folder`."""
    Path(folder, "sitecustomize.py").write_text(WITHOUT_TORCH)
    return {"PYTHONPATH": str(folder)}


def write_exercises(path, names, seconds=5, fps=10, seed=0, rotation=0, sound=None, codec="libx264"):
    """A video of drawn exercises one after another, `seconds` each. sound: a codec name, for a tone beside it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if rotation:
            stream.set_display_rotation(-rotation)  # counter-clockwise there
        tone = container.add_stream(sound, rate=8000, layout="mono") if sound else None
        for number, name in enumerate(names):
            for i, picture in enumerate(draw(name, [7, seed + number], seconds * fps, fps)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number * seconds * fps + i
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            write_tone(container, tone, seconds * len(names))
    return path


def write_tone(container, stream, seconds):
    for k in range(seconds * 8):
        wave = np.sin(2 * np.pi * 440 * (np.arange(1000) + 1000 * k) / 8000)
        frame = av.AudioFrame.from_ndarray((9000 * wave).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 1000 * k
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
