"""A training that cannot be lost, at the size of QEVD: what ends, what continues, what is refused, what a step costs.

$ python -m pytest tests/test_training_run.py
"""

import copy
import json
import math
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as F

import warm_python
from conftest import REPO
from make_videos import write_video
from test_train import CLASSES, FAST, TRAIN, before, command, environment, load, metrics_of, slurm, train
from torchvision_patches import networks
from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.video_utils import VideoClips

pytestmark = pytest.mark.slow

FLAGS = [*FAST, "--batch-size", 2, "--epochs", 1, "--save-every", 0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """4 training and 2 validation videos of 2 classes, 1 s long."""
    root = tmp_path_factory.mktemp("videos")
    for split, count in ("train", 4), ("val", 2):
        for i in range(count):
            folder = root / split / CLASSES[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{i:08d}.mp4", num_frames=30, height=48, width=64, seed=i)
    return root


@pytest.fixture(scope="module")
def reference():
    """The modules of references/video_classification, which find their siblings by bare name."""
    folder = str(REPO / "references/video_classification")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    import train

    found = [getattr(train, name) for name in ("datasets", "models", "settings", "teachers", "transforms", "utils")]
    found += [train, train.datasets.splits, train.models.layers]
    yield types.SimpleNamespace(**{module.__name__: module for module in found})
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and sys.modules[name].__file__.startswith(folder):
            del sys.modules[name]


# --- continuing, and not destroying -----------------------------------------------------------------------------------


def test_resume_auto_starts_continues_and_nothing_is_overwritten(videos, tmp_path):
    flags = ["--data-path", videos, *FLAGS, "--output-dir", tmp_path]
    out, _ = train(*flags, "--resume", "auto")
    assert "clips/s  waited: " in out and "GFLOP/s" in out, "a log line does not say what limits"
    first = load(tmp_path / "checkpoint.pth")
    assert "1 epochs behind it; 0 to go" in train(*flags, "--resume", "auto")[0]
    _, err = train(*flags, code=2)
    assert "holds the checkpoint of another run" in err and "--overwrite" in err
    assert load(tmp_path / "checkpoint.pth")["model"].keys() == first["model"].keys()
    # killed between the checkpoint and its line of metrics.jsonl, a run has the line all the same
    (tmp_path / "metrics.jsonl").unlink()
    out, _ = train(*flags, "--resume", "auto", "--epochs", 2)
    assert "1 epochs behind it; 1 to go" in out
    assert [row["epoch"] for row in metrics_of(tmp_path)] == [0, 1]
    train(*flags, "--overwrite", "--lr", 0.5)
    assert load(tmp_path / "checkpoint.pth")["args"]["lr"] == 0.5


def test_too_little_space_is_told_before_the_first_step(videos, tmp_path):
    """A checkpoint of mc3_18 holds 46 MB of weights and 34 of momentum: no disk takes those of a million epochs."""
    flags = [*FAST, "--data-path", videos, "--output-dir", tmp_path / "out", "--epochs", 10**6, "--lr-warmup-epochs", 0]
    out, err = train(*flags, code=2)
    needed = float(err.split("at most ")[1].split(" GB are needed")[0].replace(",", ""))
    assert needed == pytest.approx(80_000, rel=0.02), err
    assert "keep fewer with --save-every" in err and "Epoch" not in out + err
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_costs_one_epoch(videos, tmp_path):
    """As files may not grow beyond 1 MB, saving ends as on a full disk; what was there stays."""
    flags = ["--data-path", videos, *FLAGS, "--output-dir", tmp_path, "--resume", "auto"]
    train(*flags)
    whole, rows = (tmp_path / "checkpoint.pth").read_bytes(), metrics_of(tmp_path)
    full = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    _, err = train(*flags, "--epochs", 2, first=full, code=2)
    assert f"{tmp_path / 'checkpoint.pth'} cannot be written" in err and "Traceback" not in err, err
    assert (tmp_path / "checkpoint.pth").read_bytes() == whole and metrics_of(tmp_path) == rows
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pth", "model_best.pth", "metrics.jsonl", "curves.png"
    }  # fmt: skip
    (tmp_path / "file").touch()
    _, err = train("--data-path", videos, *FLAGS, "--output-dir", tmp_path / "file", code=2)
    assert "file cannot be written (" in err and "Traceback" not in err


def test_zeros_are_refused_at_the_start(reference, capsys):
    for flag in ("--eval-every", "--print-freq", "--accumulate", "--batch-size", "--epochs", "--clips-per-video"):
        with pytest.raises(SystemExit) as stop:
            reference.train.get_args_parser().parse_args(["--data-path", ".", flag, "0"])
        assert stop.value.code == 2 and f"{flag}: a whole number from 1 on is needed" in capsys.readouterr().err


def test_what_a_user_can_mend_is_one_sentence(reference, capsys):
    """What torch says of a GPU, and where two processes would compute on one; test_gpu.py lets it happen."""
    args, utils = small_args(reference), reference.utils
    for error, said in {
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"): "12 clips at once do not fit into",
        torch.distributed.DistBackendError("NCCL error\nDuplicate GPU detected"): "have the same GPU: start as",
        RuntimeError("pool_backward does not have a deterministic implementation, but"): "needs pool_backward, which",
    }.items():
        args.batch_size = 12
        with pytest.raises(SystemExit) as stop:
            utils.explain(error, args)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert utils.explain(RuntimeError("a fault of ours"), args) is None
    for device in "gpu", "cpu:1", "cuda:99":
        args.device = device
        with pytest.raises(SystemExit):
            reference.models.settle_device(args)
        assert f"--device {device}: " in capsys.readouterr().err


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_process_that_goes_ends_the_others(videos, tmp_path, how):
    """The last of three is killed, or of two stopped, while it trains; no launcher looks after them, as with srun."""
    flags = ["--data-path", videos, *FLAGS, "--epochs", 10**6, "--output-dir", tmp_path, "--eval-every", 10**6]
    quick = before("processes.WORKING = datetime.timedelta(seconds=8)")
    code = f"{quick}\nimport runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    count = 3 if how == "killed" else 2
    processes, logs = [], [tmp_path / f"log{rank}" for rank in range(count)]
    try:
        for log, of_rank in zip(logs, slurm(count)):
            with open(log, "w") as output:
                options = dict(env=environment(**of_rank), stdout=output, stderr=subprocess.STDOUT)
                processes.append(subprocess.Popen([sys.executable, "-c", code, *command(*flags)[1:]], **options))
        deadline = time.monotonic() + 300
        while "Epoch: [1]" not in logs[0].read_text():
            assert time.monotonic() < deadline and processes[0].poll() is None, logs[0].read_text()
            time.sleep(0.1)
        processes[-1].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        codes = [process.wait(60) for process in processes[:-1]]
    finally:
        for process in processes:
            process.kill()
    texts = [log.read_text() for log in logs[:-1]]
    assert set(codes) == {2} and all("of this run has ended" in text for text in texts), texts
    assert not any("Traceback" in text for text in texts), texts


def test_two_machines_whose_folders_differ(videos, tmp_path):
    """The second one has a video under another class: it must not be trained with the first one's label."""
    for name in "one", "two":
        (tmp_path / name).mkdir()
        for video in sorted(videos.rglob("*.mp4")):
            link = tmp_path / name / video.relative_to(videos)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(video)
    flags = ["--data-path", "data", *FLAGS, "--output-dir", tmp_path / "out"]
    (moved,) = tmp_path.glob("two/train/jumping_jacks/00000001.mp4")
    moved.rename(tmp_path / "two/train/hook_left" / moved.name)
    environments = [environment(**of_rank) for of_rank in slurm(2, machines=2)]
    for rank, name in enumerate(("one", "two")):
        (tmp_path / f"machine{rank}").mkdir()
        (tmp_path / f"machine{rank}/data").symlink_to(tmp_path / name)
    places = f"import os; os.chdir({str(tmp_path)!r} + '/machine' + os.environ['SLURM_PROCID'])"
    results = warm_python.run(REPO / TRAIN, flags, environments, first=places)
    assert [result.returncode for result in results] == [2, 2], results
    assert "train is not the same on all machines" in results[1].stderr
    assert "00000001.mp4 (class 29) where" not in results[1].stderr and "hook_left/00000001.mp4" in results[1].stderr
    assert "another process of this run has ended" in results[0].stderr and "Traceback" not in results[0].stderr


# --- what would wait for ever -----------------------------------------------------------------------------------------


def test_workers_that_send_nothing_are_named(videos, tmp_path):
    flags = ["--data-path", videos, *FLAGS, "--workers", 1, "--output-dir", tmp_path]
    preset = "presets.VideoClassificationPresetTrain.__call__"
    _, err = train(*flags, first=before(f"processes.STALLED = 2; {preset} = lambda self, clip: time.sleep(99)"), code=2)
    assert "no batch for 2 s; its workers were reading" in err and f"{videos}/train/" in err
    _, err = train(*flags, first=before(f"import os; {preset} = lambda self, clip: os.kill(os.getpid(), 9)"), code=2)
    assert "DataLoader worker (pid" in err and f"{videos}/train/" in err and "Traceback" not in err


def test_little_shared_memory_is_said_before_the_first_step(videos, tmp_path):
    flags = ["--data-path", videos, *FLAGS, "--output-dir", tmp_path, "--workers", 1]
    flags += ["--batch-size", 24, "--clip-len", 1600]
    small = before("datasets.shutil.disk_usage = lambda folder: types.SimpleNamespace(free=64 * 2**20)")
    _, err = train(*flags, first=small, code=2)
    assert "workers send batches through /dev/shm: 1,3" in err and "67 MB are free" in err and "--shm-size" in err


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def small_args(reference, *flags):
    """Flags of a run on a CPU, completed for five classes."""
    args = reference.train.get_args_parser().parse_args(["--data-path", ".", *map(str, [*FAST, *flags])])
    args.distributed, args.world_size, args.rank = False, 1, 0
    reference.settings.complete(args, None, range(5))
    return args


def test_statistics_are_the_means_over_the_batches(reference):
    args = small_args(reference, "--trainable-layers", "layer4", "fc")
    model = reference.models.make_model(args, None)
    norm, frozen = model.layer4[0].conv1[1], model.layer3[0].conv1[1]
    inputs, batches = [], [(torch.rand(4, 3, 4, 28, 28), torch.zeros(4)) for _ in range(3)]
    norm.register_forward_pre_hook(lambda module, values: inputs.append(values[0].transpose(0, 1).flatten(1)))
    reference.models.recompute_statistics(model, batches, lambda clips, targets: (clips, targets), args)
    assert len(inputs) == 3 and not frozen.running_mean.any()
    mean, variance = (torch.stack([f(x) for x in inputs]).mean(0) for f in (lambda x: x.mean(1), lambda x: x.var(1)))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 0


def test_short_epochs_recompute_them_and_long_ones_do_not(reference, capsys):
    args = small_args(reference, "--batch-size", 24, "--bn-clips", 100)
    model = reference.models.make_model(args, None)
    assert reference.models.batches_for_statistics(model, 3, args) == 3
    assert "an epoch has 3 steps" in capsys.readouterr().out
    assert reference.models.batches_for_statistics(model, 20, args) == 5
    assert reference.models.batches_for_statistics(model, 50, args) == 0
    args.trainable_layers = ["fc"]
    assert reference.models.batches_for_statistics(model, 3, args) == 0, "no BatchNorm learns"
    args.bn_clips, args.trainable_layers = 0, ["all"]
    assert reference.models.batches_for_statistics(model, 3, args) == 0


def test_folding_frozen_batchnorm_changes_rounding_only(reference):
    args = small_args(reference, "--model", "r2plus1d_18", "--fold-frozen")
    torch.manual_seed(0)
    folded = reference.models.make_model(args, None)
    args.fold_frozen = False
    torch.manual_seed(0)
    plain = reference.models.make_model(args, None)
    for model in folded, plain:
        assert model.state_dict().keys() == plain.state_dict().keys()
        reference.models.set_train_mode(model, args)
    clips = torch.rand(2, 3, 4, 28, 28)
    ours, theirs = folded.layer1(folded.stem(clips)), plain.layer1(plain.stem(clips))
    assert not torch.equal(ours, theirs), "nothing was folded"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded(clips), plain(clips), atol=1e-3, rtol=1e-3)
    assert torch.equal(copy.deepcopy(folded)(clips), folded(clips))


def test_statistics_of_padded_channels_are_recomputed_alike(reference, capsys):
    flags = ["--model", "r2plus1d_18", "--trainable-layers", "all", "--pad-channels"]
    batches, found = [(torch.rand(2, 3, 4, 28, 28), torch.zeros(2)) for _ in range(2)], []
    for multiple in 1, 8:
        args = small_args(reference, *flags, multiple)
        torch.manual_seed(0)
        model = reference.models.make_model(args, None)
        reference.models.recompute_statistics(model, batches, lambda clips, targets: (clips, targets), args)
        found.append(dict(model.named_buffers()))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)
    with pytest.raises(SystemExit):
        reference.models.make_model(small_args(reference, "--model", "r3d_18", "--pad-channels", 8), None)
    assert "finds nothing to pad in r3d_18" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("multiple", "flat", "learning"),
    [(8, False, None), (16, False, ("layer4", "fc")), (32, False, None), (8, True, None)],
)
def test_padded_channels_change_rounding_only(reference, multiple, flat, learning):
    """Outputs, gradients, statistics, a step of the optimizer and its state, in training and validation.

    Names, values and number of weights stay. learning: children, None for all.
    """
    torch.manual_seed(0)
    plain = torchvision.models.get_model("r2plus1d_18", num_classes=5)
    fast = copy.deepcopy(plain)
    reference.layers.pad_channels(fast, multiple, flat)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert [p.shape for p in fast.parameters()] == [p.shape for p in plain.parameters()]
    seen = set()
    for module in fast.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.register_forward_hook(lambda _, inputs, output: seen.add(output.shape[1]))
    clips = torch.randn(2, 3, 4, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    outputs, optimizers = [], []
    for model in plain, fast:
        model.double()  # float32 rounds by 1e-5 itself, and differently in each form
        for name, child in model.named_children():
            child.requires_grad_(not learning or name in learning).train(not learning or name in learning)
        optimizers.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9))
        outputs.append(model(clips.double()))
        outputs[-1].square().sum().backward()
    middle = {reference.layers.up_to(channels, multiple) for channels in (45, 144, 230, 288, 460, 576, 921, 1152)}
    assert seen == middle | {64, 128, 256, 512}
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-9, rtol=1e-9)
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7, msg=name)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(optimizers[1].state_dict(), optimizers[0].state_dict(), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), atol=1e-9, rtol=1e-7)
    plain.load_state_dict(fast.state_dict())
    for model in plain, fast:
        model.eval().float()
    with torch.no_grad():
        torch.testing.assert_close(fast(clips), plain(clips), atol=1e-5, rtol=1e-5)
    assert torch.equal(copy.deepcopy(fast)(clips), fast(clips))


@pytest.mark.parametrize("name", ["r2plus1d_18", "mc3_18"])
def test_every_batchnorm_is_folded_and_its_relu_on_gpus(reference, monkeypatch, name):
    """cuDNN's two kernels stand here as what they compute; test_gpu.py has the real ones."""
    conv = torch.nn.functional.conv3d
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda x, *more: conv(x, *more).relu(), raising=False)
    with_sum = lambda x, w, z, alpha, *more: (conv(x, w, *more) + alpha * z).relu()  # noqa: E731
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", with_sum, raising=False)
    model = torchvision.models.get_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for values in module.running_mean, module.bias.data:
                values.normal_()
            for values in module.running_var, module.weight.data:
                values.uniform_(0.5, 2.0)
    clips = torch.rand(1, 3, 4, 28, 28).double()
    model.double()
    for on_gpu, multiple in (False, 1), (True, 1), (False, 8), (True, 16), (True, 32):
        folded = reference.layers.folded(copy.deepcopy(model), on_gpu, multiple)
        kinds = {type(module) for module in folded.modules()}
        assert torch.nn.BatchNorm3d not in kinds and (torch.nn.ReLU in kinds) != on_gpu
        with torch.no_grad():
            torch.testing.assert_close(folded(clips), model(clips), atol=1e-9, rtol=1e-9)


# --- a GPU, stubbed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "usable"),
    [((6, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((11, 0), False), ((13, 0), True)],
)
def test_a_gpu_that_torch_is_not_built_for_is_named(reference, monkeypatch, capsys, capability, usable):
    """Otherwise a run ends in "no kernel image is available" after it has indexed all videos."""
    built = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]
    answers = {"is_available": True, "device_count": 1, "get_device_capability": capability, "get_arch_list": built}
    for name, answer in (answers | {"get_device_name": "Tesla P100"}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    args = reference.train.get_args_parser().parse_args(["--data-path", "."])
    assert networks.device() == ("cuda" if usable else "cpu")
    if usable:
        assert reference.models.settle_device(args) is None and not capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as e:
        reference.models.settle_device(args)
    said = capsys.readouterr()
    about = f"this torch is not built for Tesla P100, compute capability {capability[0]}.{capability[1]}, but for sm_75"
    assert e.value.code == 2 and f"error: --device cuda: {about}" in said.err
    assert said.out.startswith(about) and said.out.endswith(": the CPU computes\n")


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_head_and_norms_have_rates_of_their_own(reference):
    flags = ["--lr", 0.01, "--lr-head", 0.1, "--no-decay-norm", "--wd", 0.001, "--lr-scheduler", "onecycle"]
    args = small_args(reference, *flags, "--trainable-layers", "layer4", "head")
    model = reference.models.make_model(args, None)
    optimizer = reference.models.make_optimizer(model, args)
    found = {(g["lr"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups}
    assert found.keys() == {(0.01, 0.001), (0.01, 0.0), (0.1, 0.001), (0.1, 0.0)}
    assert found[0.1, 0.001] == [(5, 512)] and found[0.1, 0.0] == [(5,)]
    assert all(len(shape) == 1 for shape in found[0.01, 0.0])
    scheduler = reference.models.make_scheduler(optimizer, 10, args)
    peaks = [0.0] * 4
    for _ in range(150):
        peaks = [max(peak, group["lr"]) for peak, group in zip(peaks, optimizer.param_groups)]
        optimizer.step()
        scheduler.step()
    assert sorted(peaks) == pytest.approx([0.01, 0.01, 0.1, 0.1], rel=0.01)
    plain = reference.models.make_optimizer(model, small_args(reference))
    assert len(plain.param_groups) == 1, "without the flags it is torchvision's one group"


def test_rates_fall_with_the_distance_from_the_head(reference):
    """As in BEiT and VideoMAE: what precedes the blocks is one layer, what follows the last has the full rate."""
    depths = {}
    for name in "videomae_small", "r2plus1d_18", "mvit_v2_s":
        with torch.device("meta"):
            depths[name] = reference.models.depths_of(torchvision.models.get_model(name))
    blocks = {f"blocks.{i}": i + 1 for i in range(12)}
    assert depths["videomae_small"] == {"patches": 0} | blocks | {"norm": 13, "head": 13}
    assert [depths["r2plus1d_18"][name] for name in ("stem", "layer1.0", "layer4.1", "fc")] == [0, 1, 8, 9]
    assert [depths["mvit_v2_s"][name] for name in ("pos_encoding", "blocks.0", "blocks.15", "head")] == [0, 1, 16, 17]
    flags = ["--opt", "adamw", "--lr", 0.1, "--layer-decay", 0.5, "--betas", 0.9, 0.95, "--no-decay-norm", "--wd", 0.05]
    args = small_args(reference, *flags, "--trainable-layers", "all")
    model = reference.models.make_model(args, None)
    optimizer = reference.models.make_optimizer(model, args)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters())) and optimizer.defaults["betas"] == (0.9, 0.95)
    found = [rates[id(p)] for p in (model.fc.weight, model.layer4[1].conv2[0].weight, model.stem[0].weight)]
    assert found == pytest.approx([0.1, 0.05, 0.1 * 0.5**9])


def test_dropped_paths_are_the_flags(reference, capsys):
    args = small_args(reference, "--model", "swin3d_t", "--drop-path", 0.3)
    rates = [m.p for m in reference.models.make_model(args, None).modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    with pytest.raises(SystemExit):
        small_args(reference, "--drop-path", 0.3)
    assert "mc3_18 has no paths that can be dropped" in capsys.readouterr().err


def test_temperature_and_threshold_are_those_of_the_first_clips(reference, capsys):
    """Of 400 videos the network is as sure of every answer as if its logits were twice what they should be."""
    torch.manual_seed(0)
    honest = torch.randn(400, 5, dtype=torch.float64) * 3
    labels = torch.distributions.Categorical(logits=honest).sample()
    logits = torch.cat([2 * honest, torch.full((1, 5), math.nan, dtype=torch.float64)])
    found = reference.train.calibrated(logits, torch.cat([labels, labels[:1]]))
    assert found["temperature"] == pytest.approx(2, rel=0.15) and 0 < found["threshold"] < 1
    assert 'Temperature' in capsys.readouterr().out
    sure = 100 * torch.nn.functional.one_hot(labels, 5).double()
    assert reference.train.calibrated(sure / 100, labels) == {}, "none is wrong: the temperature has no end"
    assert reference.train.calibrated(honest[:9], labels[:9]) == {}, "nine clips tell nothing"


# --- which videos -----------------------------------------------------------------------------------------------------


def test_no_group_is_on_both_sides(reference, tmp_path):
    """300 videos of 4 classes by 30 persons, two of which have no table entry."""
    hold_out = reference.splits.hold_out
    samples = [(f"/d/train/c{i % 4}/{i:08d}.mp4", i % 4) for i in range(300)]
    groups = {f"c{i % 4}/{i:08d}.mp4": f"person {i // 10}" for i in range(298)}
    held, of_groups = hold_out(samples, 0.2, groups, seed=0)
    sides = [{groups.get(path[9:], path[3:]) for path, _ in part} for part in (held, set(samples) - set(held))]
    assert not sides[0] & sides[1], "a person is on both sides"
    assert sides[0] == of_groups
    for label in range(4):
        assert 15 <= sum(own == label for _, own in held) <= 30
    assert sorted(hold_out(samples[::-1], 0.2, groups, 0)[0]) == sorted(held)
    assert sorted(hold_out(samples, 0.2, groups, 1)[0]) != sorted(held)
    alone, _ = hold_out(samples, 0.1, {}, 0)
    assert [sum(own == label for _, own in alone) for label in range(4)] == [8] * 4
    assert not hold_out(samples[:1], 0.5, {}, 0)[0], "the last video of a class is held out"


@pytest.fixture(scope="module")
def held_out(videos, tmp_path_factory):
    """A run that holds out one of two persons, by QEVD's file of worker ids: (flags of a run, folder, stdout)."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = [{"video_path": f"./{i:08d}.mp4", "worker_id": 70 + i // 2} for i in range(4)]
    (folder / "workers.json").write_text(json.dumps(rows))
    flags = ["--data-path", videos, *FLAGS, "--hold-out", 0.4, "--groups", folder / "workers.json"]
    out, _ = train(*flags, "--seed", 5, "--output-dir", folder)
    return flags, folder, out


def test_who_is_held_out_is_in_a_list_that_later_steps_follow(videos, held_out, run_script, tmp_path):
    flags, folder, out = held_out
    assert "4 of 4 videos have a group; 2 videos of 1 groups held out" in out
    assert "val: 2 videos" in out and "train: 2 videos" in out
    checkpoint, (file,) = load(folder / "checkpoint.pth"), folder.glob("held_out-*.json")
    about, listed = checkpoint["held_out"], json.loads(file.read_text())
    assert about == {"file": file.name, "share": 0.4, "seed": 0, "num_videos": 2}
    numbers = {int(Path(name).stem) for name in listed["videos"]}
    assert numbers in ({0, 1}, {2, 3}), "a person is on both sides"
    assert listed["groups"] == [str(70 + min(numbers) // 2)]
    tensors = f"--checkpoint {folder}/checkpoint.pth --data-root {videos}/train --held-out true"
    assert tensors in out.splitlines()[-1], "the next step would take other videos"

    test = ["--data-path", videos, "--resume", folder / "checkpoint.pth", "--test-only", "--device", "cpu"]
    result = json.loads(train(*test)[0].splitlines()[-1])
    assert result["num_videos"] == 2 and result["video_acc1"] == checkpoint["metrics"]["video_acc1"]
    assert "val: 2 videos" in train(*test, "--hold-out", 0)[0]
    assert "--hold-out 0.3 --hold-out-seed 0, but" in train(*test, "--hold-out", 0.3, code=2)[1]
    start = ["--data-path", videos, *FLAGS, "--resume", folder / "checkpoint.pth", "--resume-weights-only"]
    train(*start, "--output-dir", tmp_path / "started")
    assert load(tmp_path / "started/checkpoint.pth")["held_out"] == about, "a start from its weights forgets them"

    soup = tmp_path / "soup.pth"
    two = ["--checkpoints", folder / "checkpoint.pth", tmp_path / "started/checkpoint.pth", "--output", soup]
    data = ["--data-path", videos, "--class-map", REPO / "class_map.json", "--device", "cpu"]
    assert "--held-out true" in run_script("tools/average_checkpoints.py", *two, *data).stdout
    assert load(soup)["held_out"] == about and (tmp_path / file.name).read_text() == file.read_text()
    other = load(folder / "checkpoint.pth")
    torch.save(other | {"held_out": about | {"seed": 1}}, tmp_path / "other.pth")
    two[2] = tmp_path / "other.pth"
    assert "the videos that were held out (train with the same" in run_script(
        "tools/average_checkpoints.py", *two, code=2
    ).stderr
    test[3] = tmp_path / "other.pth"
    assert "is not the list that" in train(*test, code=2)[1]
    (tmp_path / file.name).unlink()
    assert f"{tmp_path / file.name} cannot be read" in train(*test, code=2)[1]


def test_the_hold_out_is_the_same_for_every_seed_of_training(reference, videos):
    class_map = {name: i for i, name in enumerate(sorted(CLASSES))}
    drawn = []
    for seed in 0, 1, 2:
        args = small_args(reference, "--data-path", videos, "--hold-out", 0.5, "--seed", seed)
        drawn.append(reference.splits.settled_hold_out(args, None, class_map))
    assert drawn[0].videos and drawn[0] == drawn[1] == drawn[2]


def test_what_cannot_be_held_out_is_refused(reference, held_out, videos, tmp_path, capsys):
    class_map = {name: i for i, name in enumerate(sorted(CLASSES))}

    def refusal(*flags):
        args = small_args(reference, "--data-path", videos, *flags)
        with pytest.raises(SystemExit):
            reference.splits.settled_hold_out(args, None, class_map)
        return capsys.readouterr().err

    workers = held_out[1] / "workers.json"
    assert "--hold-out SHARE to keep together: give both" in refusal("--groups", workers)
    one = tmp_path / "one.csv"
    one.write_text("video,group\n" + "".join(f"{i:08d},me\n" for i in range(4)))
    said = refusal("--groups", one, "--hold-out", 0.2)
    assert "nothing can be held out of 4 videos" in said and "puts 4 of them into 1 groups" in said
    args = small_args(reference, "--groups", workers)
    samples = [(f"/more/train/{CLASSES[i % 2]}/{i:08d}.mp4", i % 2) for i in range(4)]
    held = types.SimpleNamespace(videos=("train/a/1.mp4",), groups=("71",))
    assert reference.splits.of_other_groups(samples, "/more", held, args) == samples[:2]


def test_extra_videos_and_splits(videos, tmp_path):
    extra = tmp_path / "extra/train" / CLASSES[0]
    extra.mkdir(parents=True)
    write_video(extra / "new.mp4", num_frames=30, height=48, width=64, seed=77)
    (extra / "again.mp4").write_bytes((videos / "train" / CLASSES[0] / "00000002.mp4").read_bytes())
    flags = ["--data-path", videos, *FLAGS, "--extra-data", tmp_path / "extra"]
    out, _ = train(*flags, "--output-dir", tmp_path / "a")
    assert f"1 videos of {tmp_path}/extra are in train already and left out, the first is {extra}/again.mp4" in out
    assert "train: 5 videos" in out
    last = ["--data-path", videos, *FLAGS, "--output-dir", tmp_path / "b", "--train-splits", "train", "val"]
    out, _ = train(*last, "--hold-out", 0.3)
    assert "val: 2 videos" in out and "train: 4 videos" in out
    (tmp_path / "b/model_7.pth").touch()
    assert "val is trained on, too" in train(*last, "--overwrite", "--eval-every", 5)[0]
    assert not (tmp_path / "b/model_7.pth").exists(), "a checkpoint of the run that was replaced is still there"
    test = ["--data-path", videos, "--resume", tmp_path / "b/checkpoint.pth", "--test-only", "--device", "cpu"]
    out, _ = train(*test)
    assert "This network was trained on val, too" in out and json.loads(out.splitlines()[-1])["saw_val"]
    (extra / "copied.mp4").write_bytes((videos / "val" / CLASSES[0] / "00000000.mp4").read_bytes())
    _, err = train(*flags, "--output-dir", tmp_path / "c", code=2)
    assert "copied.mp4 is " in err and "a video to validate on" in err


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_the_distillation_loss_by_hand(reference):
    """Two clips of three classes; the second has no teacher, so that only its label counts."""
    criterion = reference.teachers.Distillation(alpha=0.3, temperature=2.0)
    output = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 1.0]], requires_grad=True)
    logits = torch.tensor([[[1.0, 1.0, 0.0], [3.0, -1.0, 0.0]], [[math.nan] * 3] * 2]).half()
    teacher = reference.teachers.probabilities(logits, 2.0)
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.4, 0.6]])

    def softmax(values):
        powers = [math.exp(value) for value in values]
        return [power / sum(powers) for power in powers]

    hard = -math.log(softmax([2, 0, -1])[0]), -0.4 * math.log(softmax([0.5, 0.5, 1])[1])
    hard = hard[0], hard[1] - 0.6 * math.log(softmax([0.5, 0.5, 1])[2])
    said = [sum(pair) / 2 for pair in zip(softmax([0.5, 0.5, 0]), softmax([1.5, -0.5, 0]))]
    student = softmax([1, 0, -0.5])
    kl = sum(q * math.log(q / p) for q, p in zip(said, student))
    assert teacher[0].tolist() == pytest.approx(said, abs=1e-3) and not teacher[1].any()
    loss = criterion(output, labels, teacher)
    assert loss.item() == pytest.approx((0.7 * hard[0] + hard[1] + 0.3 * 4 * kl) / 2, abs=1e-3)
    loss.backward()
    by_hand = 0.7 * (torch.tensor(softmax([2, 0, -1])) - labels[0]) / 2  # of the cross-entropy, then of the KL
    by_hand += 0.3 * 4 * (torch.tensor(student) - torch.tensor(said)) / 2 / 2
    torch.testing.assert_close(output.grad[0], by_hand, atol=1e-3, rtol=0)
    alone = criterion(output[1:], labels[1:], teacher[1:])
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(output[1:], labels[1:]))
    alone = reference.teachers.Distillation(1.0, 2.0)(output, labels, (output / 2).softmax(1))
    assert alone.item() == pytest.approx(0, abs=1e-6), "a teacher that is the student changes something"


def test_a_teacher_is_asked_once_and_listened_to(videos, reference, tmp_path):
    run = ["--data-path", videos, *FLAGS, "--output-dir", tmp_path, "--clips-per-video", 2]
    train(*run)
    logits = tmp_path / "teacher.npy"
    ask = ["--data-path", videos, "--device", "cpu", "--workers", 0, "--resume", tmp_path / "checkpoint.pth"]
    ask += ["--test-only", "--save-logits", logits, "--batch-size", 5]
    out, _ = train(*ask)
    assert "val: " not in out, "a split is read that is not needed"
    table, about = np.load(logits), json.loads((tmp_path / "teacher.npy.json").read_text())
    assert "10 of 10 windows; 0 did not decode" in out.replace(f"{len(table)} of {len(table)}", "10 of 10")
    assert table.dtype == np.float16 and table.shape == (sum(n for _, n in about["videos"].values()), 92)
    # one clip, by plain torchvision
    checkpoint = load(tmp_path / "checkpoint.pth")
    model = torchvision.models.get_model("mc3_18", num_classes=92).eval()
    model.load_state_dict(checkpoint["model"])
    name = f"{CLASSES[1]}/00000003.mp4"
    clips = VideoClips([str(videos / "train" / name)], 4, 1, 4)
    clip = resize_and_crop(clips.get_clip(clips.num_clips() - 1)[0], (32, 43), (28, 28))
    expected = model(reference.transforms.Normalize(checkpoint["mean"], checkpoint["std"])(clip[None]))[0].detach()
    first, count = about["videos"][name]
    assert count == clips.num_clips()
    torch.testing.assert_close(torch.from_numpy(table[first + count - 1]).float(), expected, atol=0.01, rtol=0.01)
    # killed half-way, two processes fill what is missing, and nothing else
    half = np.load(logits, mmap_mode="r+")
    half[1::2] = np.nan
    half[0] = 7
    half.flush()
    train(*ask, processes=2)
    again = np.load(logits)
    assert (again[0] == 7).all()
    assert np.abs(again[1:].astype(float) - table[1:]).max() < 0.01
    _, err = train(*ask, "--views", 3, code=2)
    assert "holds logits of another views" in err

    learn = [*run, "--overwrite", "--mixup-alpha", 0.3, "--teacher-logits", logits]
    out, _ = train(*learn, logits)
    assert out.count("logits for 4 of 4 videos") == 2
    del about["videos"][name]
    about["videos"]["squats/other.mp4"] = [0, 1]
    logits.with_name("teacher.npy.json").write_text(json.dumps(about))
    out, _ = train(*learn)
    assert "1 videos have none and learn from their label alone, first jumping_jacks/00000003.mp4" in out
    assert "1 of its videos are not here, first squats/other.mp4" in out
    logits.with_name("teacher.npy.json").write_text(json.dumps(about | {"classes": about["classes"][::-1]}))
    assert "has logits for another classes than this run" in train(*learn, code=2)[1]


# --- samples and clips at the size of QEVD ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(reference):
    """900 videos of three lengths and classes, of 1 to 5 clips, and 100 without any; metadata only."""
    return dataset_of(reference, 1000)


def dataset_of(reference, count):
    tables = [torch.arange(frames) * 512 for frames in (0, 90, 135, 150)]
    kinds = [0 if i % 10 == 0 else 1 + i % 3 for i in range(count)]
    paths = [f"/videos/train/{CLASSES[kind % 3]}/{i:08d}.mp4" for i, kind in enumerate(kinds)]
    metadata = {"video_paths": paths, "video_pts": [tables[k] for k in kinds], "video_fps": [30.0] * count}
    clips = VideoClips(paths, 16, 1, 4, metadata)
    samples = [(path, kind % 3) for path, kind in zip(paths, kinds)]
    return reference.datasets.KineticsWithVideoId("/videos", samples, clips, None)


def test_equal_frame_tables_share_their_clips(dataset):
    clips = dataset.video_clips
    assert len({id(table) for table in clips.clips}) == 4, "clips of equal videos are made anew"
    sent = pickle.dumps(clips)
    assert len(sent) < 150 * len(dataset.samples), "a spawned worker gets the frame times of each video"
    received = pickle.loads(sent)
    assert len({id(table) for table in received.clips}) == 4
    assert received.cumulative_sizes == clips.cumulative_sizes
    assert all(map(torch.equal, received.clips, clips.clips))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what is a process's own")
def test_a_forked_worker_keeps_little_for_itself(reference):
    """After it has read clips of 20,000 videos: not a copy of each page that a list's reference counts lie on."""
    dataset = dataset_of(reference, 20_000)
    clips = dataset.video_clips
    clips.get_clip = lambda idx: (torch.zeros(1), None, None, clips.get_clip_location(idx)[0])
    dataset.transform, items = torch.Tensor.byte, list(reference.datasets.TrainSampler(dataset, 1, 0))

    def own_memory():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Private_Dirty"))

    def work(pipe):
        before = own_memory()
        for item in items:
            dataset[item]
        pipe.send(own_memory() - before)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    process.start()
    assert here.poll(120) and here.recv() < 15, "MiB; with two tensors a video they are 60"
    process.join()


def test_an_epoch_has_clips_of_every_video_once(reference, dataset):
    for wanted in 1, 3:
        sampler = reference.datasets.TrainSampler(dataset, wanted, seed=3)
        clips = [clip for clip, _ in sampler]
        videos = [dataset.video_clips.get_clip_location(clip)[0] for clip in clips]
        expected = dataset.counts.clamp(max=wanted)
        assert len(set(clips)) == len(clips) == len(sampler) == expected.sum()
        assert torch.equal(torch.tensor(videos).bincount(minlength=1000), expected)
        shares = [list(reference.datasets.TrainSampler(dataset, wanted, 3, rank, 2)) for rank in (0, 1)]
        assert [pair for both in zip(*shares) for pair in both][: len(clips)] == list(sampler)
        sampler.set_epoch(1)
        assert [clip for clip, _ in sampler] != clips


def test_each_clip_of_a_video_is_as_likely(reference, dataset):
    drawn = torch.cat([reference.datasets.TrainSampler(dataset, 2, 0).draw(torch.Generator().manual_seed(i))[0]
                       for i in range(30)])  # fmt: skip
    five = (dataset.counts == 5).nonzero()[:, 0]
    places = torch.cat([drawn[(drawn >= start) & (drawn < start + 5)] - start for start in dataset.starts[five]])
    share = places.bincount(minlength=5) / len(places)
    assert len(five) > 200 and (share - 0.2).abs().max() < 0.02, share  # 6 standard deviations


def test_validation_takes_the_clips_of_torchvisions_sampler(reference, dataset):
    from torchvision.datasets.samplers import UniformClipSampler

    for wanted in 1, 2, 3, 5:
        expected = list(UniformClipSampler(dataset.video_clips, wanted))
        shares = [reference.datasets.val_clips(dataset, wanted, rank, 3) for rank in range(3)]
        assert sorted(clip for share in shares for clip, _ in share) == expected


def test_balanced_epochs_draw_all_classes_alike(reference, dataset):
    labels, dataset = dataset.labels.clone(), copy.copy(dataset)
    dataset.labels = torch.where(torch.arange(len(labels)) < 40, 0, 1)
    clips = [clip for clip, _ in reference.datasets.TrainSampler(dataset, 1, 0, balanced=True)]
    share = sum(dataset.video_clips.get_clip_location(clip)[0] < 40 for clip in clips) / len(clips)
    assert 0.4 < share < 0.6, share


def test_a_step_costs_no_more_with_more_videos(reference):
    """Calls, not seconds: in a step's bookkeeping nothing may walk over the videos."""
    counted = []
    for count in 1000, 8000:
        sampler = reference.datasets.TrainSampler(dataset_of(reference, count), 1, 0)
        loader = [(torch.zeros(2),)] * 20
        calls = 0

        def count_calls(frame, event, argument):
            nonlocal calls
            calls += 1

        sys.setprofile(count_calls)
        for _ in reference.utils.MetricLogger().log_every(loader, 1000, ""):
            len(sampler)
        sys.setprofile(None)
        counted.append(calls)
    assert counted[0] == counted[1] < 20 * 100


# --- networks as they are ---------------------------------------------------------------------------------------------

NETWORKS = ["r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_b"]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_enters_a_network_is_its_own_preset(reference, name):
    """Sizes, mean and std of torchvision's weights, in float; wide and tall videos."""
    import presets

    own = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    flags = ["--data-path", ".", "--device", "cpu", "--model", name]
    args = reference.train.get_args_parser().parse_args(flags)
    reference.settings.complete(args, None, range(92))
    preset = presets.VideoClassificationPresetEval(crop_size=args.val_crop_size, resize_size=args.val_resize_size)
    normalize = reference.transforms.Normalize(args.mean, args.std)
    for height, width in (270, 480), (340, 256), (100, 99):
        clip = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
        resized = F.resize(clip.permute(0, 3, 1, 2).float() / 255, own.resize_size, antialias=False)
        expected = F.normalize(F.center_crop(resized, own.crop_size), own.mean, own.std).transpose(0, 1)
        assert (normalize(preset(clip)[None])[0] - expected).abs().max() < 1e-4, f"{height} x {width}"


def test_keep_aspect_is_the_shorter_side_and_stays(reference, capsys):
    """The checkpoint of such a run says so; a checkpoint that says otherwise is not followed with the flag."""
    flags = ["--data-path", ".", "--device", "cpu", "--keep-aspect"]
    args = reference.train.get_args_parser().parse_args(flags)
    reference.settings.complete(args, None, range(5))
    assert args.val_resize_size == args.train_resize_size == [128] and args.val_crop_size == [112, 112]
    saved = {"args": {}} | reference.settings.clip_of_run(args).as_dict()
    assert saved["resize_size"] == [128]
    later = reference.train.get_args_parser().parse_args([*flags[:-1], "--resume", "x.pth"])
    assert reference.settings.settled_clip(later, saved).resize_size == (128,)
    later.keep_aspect = True
    with pytest.raises(SystemExit):
        reference.settings.settled_clip(later, saved | {"resize_size": [128, 171]})
    assert "--keep-aspect 128, but x.pth has 128 x 171" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    """One video to train on and one to validate on, 1 s long."""
    root = tmp_path_factory.mktemp("two_videos")
    for split in "train", "val":
        folder = root / split / "squats"
        folder.mkdir(parents=True)
        write_video(folder / f"{split}.mp4", num_frames=30, height=48, width=64)
    return root


@pytest.mark.parametrize("name", ["s3d", "mvit_v2_s", "swin3d_t"])
def test_every_network_learns_and_is_validated(two_videos, tmp_path, name):
    """One step of all layers at the network's own size, from a frame cache of that size, then its checkpoint alone.

    test_readme.py trains R(2+1)D-18, most other tests mc3_18; the others left out differ from one of these in numbers
    alone, or are it with less of it switched on.
    """
    own = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    resized = own.resize_size if len(own.resize_size) == 2 else [256, 341]  # what 48 x 64 becomes: 256 the shorter side
    frames = 16 if name in ("s3d", "mvit_v2_s") else 4  # those take no fewer
    run = ["--data-path", two_videos, "--device", "cpu", "--workers", 0, "--cache-frames", tmp_path / "frames"]
    learn = ["--model", name, "--clip-len", frames, "--val-resize-size", *resized, "--trainable-layers", "all"]
    learn += ["--batch-size", 1, "--epochs", 1, "--lr-warmup-epochs", 0, "--wd", 0, "--bn-clips", 0]
    out, _ = train(*run, *learn, "--output-dir", tmp_path, "--save-every", 0)
    assert f"example_export.py --checkpoint {tmp_path}/checkpoint.pth" in out.splitlines()[-1]
    checkpoint = load(tmp_path / "checkpoint.pth")
    saved = [checkpoint[key] for key in ("model_name", "clip_len", "resize_size", "crop_size", "mean", "std")]
    assert saved == [name, frames, resized, own.crop_size, own.mean, own.std]
    (file,) = (tmp_path / "frames/train/squats").iterdir()
    assert file.stat().st_size == frames * 3 * math.prod(resized)
    with torch.device("meta"):
        parameters = list(torchvision.models.get_model(name).parameters())
    # after one step of SGD, its momentum is the gradient; of one clip, stochastic depth leaves some blocks out
    learned = [bool(of_one["momentum_buffer"].any()) for of_one in checkpoint["optimizer"]["state"].values()]
    assert len(learned) == len(parameters) and learned[0] and sum(learned) > len(learned) / 2
    out, _ = train(*run, "--resume", tmp_path / "checkpoint.pth", "--test-only")
    assert json.loads(out.splitlines()[-1])["val_loss"] == pytest.approx(checkpoint["metrics"]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_of_each_network_is_found_by_any_name(reference, name):
    args = reference.train.get_args_parser().parse_args(["--data-path", ".", "--device", "cpu", "--model", name])
    args.trainable_layers = ["fc"]
    reference.settings.complete(args, None, range(92))
    assert args.trainable_layers == ["fc" if name == "r2plus1d_18" else "classifier" if name == "s3d" else "head"]


def test_sizes_that_a_network_does_not_take_are_refused(videos, tmp_path):
    flags = ["--data-path", videos, "--device", "cpu", "--output-dir", tmp_path, "--workers", 0]
    _, err = train(*flags, "--model", "mvit_v2_s", "--train-crop-size", 112, 112, code=2)
    assert "mvit_v2_s does not take clips of 16 frames of 112 x 112" in err and "Traceback" not in err
    _, err = train(*flags, "--model", "mvit_v2_s", "--cache-frames", tmp_path / "cache", code=2)
    assert "resizes the shorter side to 256" in err
    assert "name it with --resume" in train(*flags, "--resume-weights-only", code=2)[1]
    _, err = train(*flags, "--model", "resnet18", code=2)
    assert "there is no video model resnet18; there are" in err and "s3d" in err
    _, err = train(*flags, "--trainable-layers", "layer5", code=2)
    assert "r2plus1d_18 has no layer layer5" in err
