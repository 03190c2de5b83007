"""VideoMAE is Hugging Face's, takes their files, and is what torchvision's registry and tracing expect.

$ python -m pytest tests/test_videomae.py
"""

import math

import numpy as np
import pytest
import torch
import torchvision

from aihub import onnx_graphs
from test_train import load, metrics_of, train
from test_training_run import videos  # noqa: F401
from torchvision_patches import clip, networks, videomae

WIDTH, LAYERS, HEADS, CLASSES = 32, 2, 4, 5


def wave(name, shape):
    """Weights that follow from a name and a shape, on any machine: float32."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    values = (numbers * 0.7 + sum(map(ord, name))).sin() * 0.2
    return values.reshape(shape).float() + ("norm" in name and "weight" in name)


def hugging_face_state(pretraining=False):
    """A small VideoMAE as transformers 4.57 names its weights, fine-tuned or self-supervised with a decoder."""
    first = "videomae.embeddings.patch_embeddings.projection"
    shapes = {f"{first}.weight": (WIDTH, 3, 2, 16, 16), f"{first}.bias": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"videomae.encoder.layer.{i}"
        inner = f"{layer}.attention.attention"
        shapes |= {f"{inner}.{name}.weight": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        shapes |= {f"{inner}.{name}_bias": (WIDTH,) for name in "qv"}
        for name, rows, columns in (
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", 4 * WIDTH, WIDTH),
            ("output.dense", WIDTH, 4 * WIDTH),
        ):
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        for name in "layernorm_before", "layernorm_after":
            shapes |= {f"{layer}.{name}.weight": (WIDTH,), f"{layer}.{name}.bias": (WIDTH,)}
    if pretraining:
        shapes |= {"videomae.layernorm.weight": (WIDTH,), "mask_token": (1, 1, 16), "decoder.head.bias": (6,)}
    else:
        shapes |= {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,)}
        shapes |= {"classifier.weight": (CLASSES, WIDTH), "classifier.bias": (CLASSES,)}
    return {name: wave(name, shape) for name, shape in shapes.items()}


def small():
    model = videomae.VideoMAE(WIDTH, LAYERS, HEADS, CLASSES).eval()
    model.load_state_dict(videomae.from_hugging_face(hugging_face_state())[0])
    return model


def clips_of(side, frames=4):
    return wave("clip", (2, 3, frames, side, side)) * 5


# logits of transformers 4.57.6's VideoMAEForVideoClassification with these weights for `clips_of`, by the side
THEIRS = {
    32: [[0.48198, 0.33289, -0.53684, 0.83338, -1.27159], [0.52465, 0.30675, -0.53154, 0.84979, -1.307]],
    48: [[0.86853, -0.16606, -0.00773, 0.36133, -0.93442], [0.83555, -0.13383, -0.03391, 0.37713, -0.93724]],
}


@pytest.mark.parametrize("side", THEIRS)
@torch.no_grad()
def test_its_logits_are_hugging_faces(side):
    torch.testing.assert_close(small()(clips_of(side)), torch.tensor(THEIRS[side]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", THEIRS)
@torch.no_grad()
def test_its_logits_are_those_of_the_transformers_that_is_installed(side):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    config = transformers.VideoMAEConfig(
        image_size=side, num_frames=4, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, num_labels=CLASSES,
    )  # fmt: skip
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    theirs.load_state_dict(hugging_face_state())
    expected = theirs(clips_of(side).transpose(1, 2)).logits
    torch.testing.assert_close(small()(clips_of(side)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(THEIRS[side]), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_patches_that_normalise_change_rounding_only():
    model, other, clips = small(), small(), (clips_of(32) + 1) / 2
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    other.take_unnormalised(mean, std)
    expected = model((clips - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1))
    torch.testing.assert_close(other(clips), expected, atol=1e-4, rtol=1e-4)


def test_every_weight_of_theirs_has_its_place_or_is_named():
    ours, unused = videomae.from_hugging_face(hugging_face_state())
    assert not unused and ours.keys() == small().state_dict().keys()
    ours, unused = videomae.from_hugging_face(hugging_face_state(pretraining=True))
    assert unused == ["videomae.layernorm.weight", "mask_token", "decoder.head.bias"]
    assert small().state_dict().keys() - ours.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    bare = {name.removeprefix("videomae."): value for name, value in hugging_face_state().items()}
    assert videomae.is_hugging_face(bare) and not videomae.from_hugging_face(bare)[1]
    assert not videomae.is_hugging_face(ours)


def test_the_registry_has_two_of_them():
    assert {"videomae_base", "videomae_small", "r2plus1d_18", "mvit_v2_s"} <= set(networks.video_networks())
    assert not {"resnet18", "raft_large"} & set(networks.video_networks())
    about = clip.of_network("videomae_base")
    assert (about.crop_size, about.resize_size, about.mean) == ((224, 224), (224,), (0.485, 0.456, 0.406))
    with torch.device("meta"):
        model = torchvision.models.get_model("videomae_small", num_classes=92)
    assert sum(p.numel() for p in model.parameters()) == 21_915_356


@torch.no_grad()
def test_traced_it_has_plain_operations_and_the_same_logits():
    import onnxruntime

    model = onnx_graphs.torch_to_onnx(small(), (1, 3, 4, 32, 32))
    kinds = {node.op_type for node in model.graph.node}
    assert "Conv" in kinds and not kinds & {"Sin", "Cos", "Range", "If", "Loop", "Einsum"}, kinds
    (patches,) = [node for node in model.graph.node if node.op_type == "Conv"]
    weights = {w.name: tuple(w.dims) for w in model.graph.initializer}
    assert weights[patches.input[1]] == (WIDTH, 6, 16, 16), "patches are no 2-D convolution"
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    clips = clips_of(32)[:1]
    (logits,) = session.run(None, {"video": clips.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), small()(clips), atol=1e-4, rtol=1e-4)
    program = torch.export.export(small(), (clips,)).module()
    torch.testing.assert_close(program(clips), small()(clips), atol=1e-4, rtol=1e-4)


def test_dropped_paths_grow_with_depth_and_end_with_training():
    model = videomae.VideoMAE(WIDTH, 4, HEADS, CLASSES, stochastic_depth_prob=0.3)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    clips = clips_of(32)
    torch.manual_seed(0)
    assert not torch.equal(model(clips), model(clips)) and torch.equal(model.eval()(clips), model(clips))


@pytest.mark.parametrize("shape", [(3, 32, 32), (4, 40, 32), (64, 224, 224)])
def test_clips_that_it_does_not_take(shape):
    with torch.device("meta"):
        model = videomae.VideoMAE(WIDTH, LAYERS, HEADS)
    with pytest.raises(ValueError, match="frames must be even, sides multiples of 16"):
        model(torch.empty(1, 3, *shape, device="meta"))


def test_the_recipe_in_miniature(videos, tmp_path):  # noqa: F811
    """A self-supervised start, a teacher at 48 pixels, its logits, a student at 32 that starts from it."""
    torch.manual_seed(0)
    start = torchvision.models.get_model("videomae_small").state_dict()
    torch.save({k: v for k, v in start.items() if not k.startswith(("norm", "head"))}, tmp_path / "start.pth")
    run = ["--data-path", videos, "--device", "cpu", "--workers", 0, "--model", "videomae_small", "--clip-len", 4]
    run += ["--epochs", 1, "--batch-size", 4, "--lr-warmup-epochs", 0, "--save-every", 0, "--opt", "adamw"]
    run += ["--lr", 1e-3]
    recipe = ["--betas", 0.9, 0.999, "--wd", 0.05, "--no-decay-norm", "--layer-decay", 0.75, "--drop-path", 0.1]
    recipe += ["--lr-scheduler", "cosine", "--label-smoothing", 0.1, "--mixup-alpha", 0.8, "--videomix-prob", 0.5]
    recipe += ["--rand-augment"]

    def sizes(side):
        each = ("--train-resize-size", "--val-resize-size", "--train-crop-size", "--val-crop-size")
        return [value for flag in each for value in (flag, *((side + 8,) * 2 if "resize" in flag else (side, side)))]

    out, _ = train(*run, *recipe, *sizes(48), "--weights", tmp_path / "start.pth", "--output-dir", tmp_path / "teacher")
    assert "start.pth loaded; new: norm.weight, norm.bias, head.weight, head.bias" in out
    teacher = tmp_path / "teacher/checkpoint.pth"
    checkpoint = load(teacher)
    assert checkpoint["crop_size"] == [48, 48] and checkpoint["model_name"] == "videomae_small"
    assert not torch.equal(checkpoint["model"]["patches.weight"], start["patches.weight"]), "all layers learn"
    ask = ["--data-path", videos, "--device", "cpu", "--workers", 0, "--resume", teacher, "--test-only"]
    train(*ask, "--save-logits", tmp_path / "teacher.npy")
    assert np.isfinite(np.load(tmp_path / "teacher.npy")).all()
    student = ["--weights", teacher, "--trainable-layers", "head", "--teacher-logits", tmp_path / "teacher.npy"]
    out, _ = train(*run, *student, *sizes(32), "--output-dir", tmp_path / "student")
    assert "checkpoint.pth loaded; new: nothing" in out and "logits for 4 of 4 videos" in out
    student = load(tmp_path / "student/checkpoint.pth")
    assert student["crop_size"] == [32, 32] and np.isfinite(metrics_of(tmp_path / "student")[-1]["train_loss"])
    assert torch.equal(student["model"]["patches.weight"], checkpoint["model"]["patches.weight"])
