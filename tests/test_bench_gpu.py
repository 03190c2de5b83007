"""What can be shown of bench_gpu.py without a GPU: it ends with a table, and what it compiles computes the same.

$ python -m pytest tests/test_bench_gpu.py
"""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import REPO

pytestmark = pytest.mark.slow


def bench(tmp_path, code):
    """Run code that sees bench_gpu.py; returns what it prints."""
    first = f"import sys; sys.path.insert(0, {str(REPO / 'tests/benchmarks')!r}); import bench_gpu as b\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", first + code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_rows_that_fail_are_lines_of_the_table(tmp_path):
    """A refusal, a process that dies, and one that the time is too short for; the other has its figures."""
    code = """
class Deadly(b.Row):
    def __reduce__(self):  # in the process that takes it
        b.SHORTEST = 1e9  # in this one: no time is left for another
        return b.os._exit, (7,)
b.ROWS = [
    b.Row("folded", 24, ["--trainable-layers", "fc"], "validation", folded=8),
    b.Row("of no network", 24, ["--model", "r2"], "validation"),
    Deadly("deadly", 24, b.ALL),
    b.Row("all layers", 24, b.ALL),
]
sys.argv = ["bench_gpu.py", "--small", "--output", "table.md"]
b.main()
"""
    bench(tmp_path, code)
    lines = (tmp_path / "table.md").read_text().splitlines()
    folded, refused, died = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    assert folded[:2] == ["folded", "24"] and float(folded[2]) > 0
    assert refused[-1].startswith("error: there is no video model r2; there are ")
    assert died[-1] == "its process ended, exit code 7"
    assert lines[-1] == "Not measured: all layers (24)."


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler for torch.compile: apt-get install g++")
def test_compiled_steps_compute_the_same(tmp_path):
    """Losses, weights and statistics of two steps, of a frozen stem, a block that learns and a head, padded."""
    code = """
import copy, torch
from torchvision.models.video import resnet
torch.manual_seed(0)
args = b.train.get_args_parser().parse_args(["--data-path", "", "--trainable-layers", "layer4", "fc"])
args.device, args.world_size = "cpu", 1
pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
parts = dict(stem=resnet.R2Plus1dStem(), layer4=resnet.BasicBlock(64, 64, resnet.Conv2Plus1D), pool=pool)
plain = torch.nn.Sequential()
for name, part in (parts | {"fc": torch.nn.Linear(64, 5)}).items():
    plain.add_module(name, part)
plain.stem.requires_grad_(False)
b.layers.pad_channels(plain, 8)
clips = torch.randn(4, 3, 4, 16, 16).contiguous(memory_format=torch.channels_last_3d)
found = {}
for compiled in "", "learning part", "step":
    model = copy.deepcopy(plain)
    b.models.set_train_mode(model, args)
    step = b.make_step(model, clips, torch.arange(4), b.Row("", 4, [], compiled=compiled), args)
    found[compiled] = {"losses": torch.stack([step(), step()])} | model.state_dict()
    for name, value in found[compiled].items():
        torch.testing.assert_close(value, found[""][name], atol=1e-5, rtol=1e-5, msg=f"{compiled}: {name}")
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(graphs, found[""]["losses"].tolist())
"""
    graphs, first, second = bench(tmp_path, code).replace(",", "").split()
    assert int(graphs) >= 3 and float(second.strip("]")) < float(first.strip("["))
