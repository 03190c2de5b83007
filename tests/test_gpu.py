"""What only a GPU can show of train.py; all of it is skipped without one."""

import pytest
import torch

from test_train import FAST, before, load, metrics_of, train, videos  # noqa: F401
from test_training_run import reference  # noqa: F401
from test_training_run import test_padded_channels_change_rounding_only as padded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ON_GPU = [*FAST, "--device", "cuda", "--batch-size", 4, "--epochs", 2, "--lr-warmup-epochs", 0]


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):  # noqa: F811
    output_dir = tmp_path_factory.mktemp("trained")
    recipe = ["--mixup-alpha", 0.4, "--color-jitter", 0.2, "--rand-augment", "--model-ema", 0.9, "--clip-grad-norm", 5]
    flags = ["--data-path", videos, *ON_GPU, "--amp", "--fold-frozen", *recipe, "--use-deterministic-algorithms"]
    out, err = train(*flags, "--output-dir", output_dir)
    assert "Warning" not in err, err
    return flags, output_dir, out


def test_a_run_and_its_continuation_are_bit_for_bit_the_same(trained, tmp_path):
    flags, output_dir, out = trained
    assert "r2plus1d_18" not in out and "on 1 x cuda, " in out and "max mem: " in out and "clips/s  waited: " in out
    train(*flags, "--output-dir", tmp_path, "--epochs", 1)
    train(*flags, "--output-dir", tmp_path, "--resume", "auto")
    whole, parts = (load(folder / "checkpoint.pth") for folder in (output_dir, tmp_path))
    for name, weights in whole["raw_model"].items():
        assert torch.equal(weights, parts["raw_model"][name]), name


def test_validation_is_that_of_the_cpu(videos, trained, tmp_path):  # noqa: F811
    """The last validation of a run is in float32, without TF32."""
    flags = ["--data-path", videos, *FAST, "--resume", trained[1] / "checkpoint.pth", "--test-only"]
    out, _ = train(*flags)
    on_cpu = out.splitlines()[-1]
    loss = float(on_cpu.split('"val_loss": ')[1].split(",")[0])
    assert metrics_of(trained[1])[-1]["val_loss"] == pytest.approx(loss, rel=1e-4), on_cpu
    assert metrics_of(trained[1])[-1]["num_videos"] == 13


@pytest.mark.parametrize(("name", "multiple"), [("r2plus1d_18", 1), ("mc3_18", 1), ("r2plus1d_18", 8)])
def test_folding_changes_rounding_only(reference, name, multiple):  # noqa: F811
    """In float32, and not by more than bfloat16 itself in bfloat16; with padded channels, too."""
    args = reference.train.get_args_parser().parse_args(["--data-path", ".", "--model", name, "--device", "cuda"])
    args.distributed = False
    reference.settings.complete(args, None, range(92))
    networks = {}
    for args.fold_frozen, args.pad_channels in (False, 1), (True, multiple):
        torch.manual_seed(0)
        networks[args.fold_frozen] = reference.models.make_model(args, None)
        reference.models.set_train_mode(networks[args.fold_frozen], args)
    clips = torch.randn(4, 3, 16, 112, 112, device="cuda").to(memory_format=torch.channels_last_3d)
    parts = "stem", "layer1", "layer2", "layer3"
    outputs = {}
    for dtype in torch.float32, torch.bfloat16:
        for fold, model in networks.items():
            x, autocast = clips, torch.autocast("cuda", torch.bfloat16, dtype == torch.bfloat16)
            with torch.no_grad(), reference.models.float32_on_gpu(), autocast:
                for part in parts:
                    x = getattr(model, part)(x)
            outputs[dtype, fold] = x.float()
    exact = outputs[torch.float32, False]
    torch.testing.assert_close(outputs[torch.float32, True], exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    errors = [(outputs[torch.bfloat16, fold] - exact).norm() / exact.norm() for fold in (False, True)]
    assert errors[1] < 1.5 * errors[0] < 0.03, errors


@pytest.mark.parametrize(("multiple", "flat"), [(8, False), (8, True), (32, False)])
def test_padded_channels_change_rounding_only_here_too(reference, multiple, flat):  # noqa: F811
    with torch.device("cuda"):
        padded(reference, multiple, flat, None)


def test_float16_is_scaled_and_resumes(videos, tmp_path):  # noqa: F811
    """As on a GPU without bfloat16."""
    flags = ["--data-path", videos, *ON_GPU, "--amp", "--fold-frozen", "--output-dir", tmp_path]
    in_float16 = before("import models, torch; models.amp_dtype = lambda args: torch.float16")
    train(*flags, "--epochs", 1, first=in_float16)
    assert load(tmp_path / "checkpoint.pth")["scaler"]["scale"] > 1
    out, err = train(*flags, "--resume", "auto", "--epochs", 2, first=in_float16)
    assert "1 epochs behind it; 1 to go" in out and "Warning" not in err, err


def test_all_layers_from_workers_and_the_cache(videos, tmp_path):  # noqa: F811
    flags = ["--data-path", videos, *ON_GPU, "--workers", 2, "--trainable-layers", "all"]
    flags += ["--cache-frames", tmp_path / "cache"]
    out, err = train(*flags, "--output-dir", tmp_path)
    assert "--amp is left out: with it, a step on a GPU" in out and "Warning" not in err


def test_what_a_user_can_mend_is_one_sentence(videos, tmp_path):  # noqa: F811
    flags = ["--data-path", videos, *ON_GPU, "--output-dir", tmp_path]
    _, err = train(*flags, first=before("import torch; torch.cuda.set_per_process_memory_fraction(1e-3)"), code=2)
    assert "4 clips at once do not fit into the memory of cuda (" in err and "Traceback" not in err
    _, err = train(*flags, "--device", "cuda:99", code=2)
    assert f"torch finds {torch.cuda.device_count()} CUDA devices here" in err
    names = "--train-crop-size", "--val-crop-size", "--train-resize-size", "--val-resize-size"
    sizes = [value for name in names for value in (name, 224, 224)]
    undetermined = ["--model", "s3d", "--clip-len", 16, "--trainable-layers", "all", "--use-deterministic-algorithms"]
    _, err = train(*flags, *sizes, *undetermined, code=2)
    assert "which has no deterministic form" in err and "Traceback" not in err


def test_more_processes_than_gpus(videos, tmp_path):  # noqa: F811
    count = torch.cuda.device_count() + 1
    _, err = train("--data-path", videos, *ON_GPU, "--output-dir", tmp_path, processes=count, torchrun=True, code=1)
    assert "two processes of this run have the same GPU" in err and "Traceback" not in err.split("torch/dist")[0]
