"""How fast a GPU trains and validates, in every way that may be faster, and what the winning recipe costs on QEVD.

Measures the step alone, on clips that lie on the GPU already: clips/s and memory of each row, the most telling rows
first; bench_train.py --batch-size 64 --modes 3 measures the loop with its loader. Rewrites OUTPUT after each row, so
that nothing is lost when time runs out. No row is begun after BUDGET seconds; one takes some ten, a compiled one up to
two minutes. A row that fails (memory, a compiler) says so, and the others go on.

    $ python tests/benchmarks/bench_gpu.py                       # on a GPU: under eight minutes
    $ python tests/benchmarks/bench_gpu.py --small --budget 60   # tried on a CPU: 4 frames of 32 x 32
"""

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / folder) for folder in ("references/video_classification", "tools", "tests", ".")]

import torch
from torch.nn import functional as F

import layers
import models
import train
import utils

SECONDS = 2.0  # that a row is timed
VIDEOS, WINDOWS = 190_254, 1_300_000  # training videos of QEVD; their windows, which a teacher is asked for
TEACHER_EPOCHS, STUDENT_EPOCHS = 20, 30  # of the winner's recipe
OF_EIGHT = 0.95  # share of eight times one GPU's rate that eight reach together: assumed
WINNERS = ["--trainable-layers", "all", "--amp"]
DEFAULT = ["--amp", "--fold-frozen"]
AT_112 = ["--train-resize-size", "128", "171", "--train-crop-size", "112", "112"]
AT_112 += ["--val-resize-size", "128", "171", "--val-crop-size", "112", "112"]


class Row(NamedTuple):
    """One way to compute."""

    name: str
    batch: int
    flags: list = DEFAULT
    kind: str = "step"  # or "forward", in --amp; "validation", in float32
    flat: bool = False  # convolutions on views
    compiled: str = ""  # a mode of torch.compile
    folded: bool = False  # all BatchNorm, in validation


TEACHER = ["--model", "mvit_v2_s", *WINNERS]
VIDEOMAE = ["--model", "videomae_base", *WINNERS]
ROWS = [
    Row("layer4 + fc", 24),
    Row("layer4 + fc, channels of 8", 24, [*DEFAULT, "--pad-channels", "8"]),
    Row("all layers", 24, WINNERS),
    Row("all layers, channels of 8", 24, [*WINNERS, "--pad-channels", "8"]),
    Row("all layers, channels of 16", 24, [*WINNERS, "--pad-channels", "16"]),
    Row("all layers, channels of 32", 24, [*WINNERS, "--pad-channels", "32"]),
    Row("all layers, channels of 8, 2-D views", 24, [*WINNERS, "--pad-channels", "8"], flat=True),
    Row("teacher: a step", 8, TEACHER),
    Row("teacher: logits", 32, TEACHER, "forward"),
    *(Row("all layers, channels of 8", batch, [*WINNERS, "--pad-channels", "8"]) for batch in (16, 32, 64)),
    Row("layer4 + fc, channels of 8", 64, [*DEFAULT, "--pad-channels", "8"]),
    Row("VideoMAE-B at 112", 32, [*VIDEOMAE, *AT_112]),
    Row("VideoMAE-B at 224", 16, VIDEOMAE),
    Row("validation, float32", 24, [], "validation"),
    Row("validation, float32, folded", 24, [], "validation", folded=True),
    Row("validation, float32, folded", 64, [], "validation", folded=True),
    Row("all layers, channels of 8, compiled", 24, [*WINNERS, "--pad-channels", "8"], compiled="default"),
    Row("layer4 + fc, channels of 8, compiled", 24, [*DEFAULT, "--pad-channels", "8"], compiled="default"),
    Row("all layers, CUDA graphs", 24, [*WINNERS, "--pad-channels", "8"], compiled="reduce-overhead"),
    Row("VideoMAE-B at 112, compiled", 32, [*VIDEOMAE, *AT_112], compiled="default"),
    Row("all layers, max-autotune", 24, [*WINNERS, "--pad-channels", "8"], compiled="max-autotune"),
]


def settled(flags, small):
    """train.py's arguments, completed as it completes them."""
    if small:
        sides = ("--train-resize-size", "--val-resize-size", "--train-crop-size", "--val-crop-size")
        # a teacher takes no other size than its own
        tiny = [value for side in sides for value in (side, "32", "32")] if "mvit_v2_s" not in flags else []
        flags = [*flags, *tiny, *([] if "mvit_v2_s" in flags else ["--clip-len", "4"])]
    args = train.get_args_parser().parse_args(["--data-path", "", "--lr", "1e-5", *flags])
    models.settle_device(args)
    train.processes.join(args)
    train.settings.complete(args, None, range(92))
    return args


def prepared(row, small):
    """A function that computes one batch of a row, and the number of clips in it."""
    args, batch = settled(row.flags, small), min(row.batch, 2) if small else row.batch
    torch.manual_seed(0)
    model = models.make_model(args, None)
    if row.flat:
        layers.pad_channels(model, args.pad_channels, flat=True)
    if row.folded:
        layers.fold(model, [name for name, _ in model.named_children()], "cuda" in args.device, 8)
    clips = torch.randn(batch, 3, args.clip_len, *args.val_crop_size, device=args.device)
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    labels = torch.zeros(batch, dtype=torch.long, device=args.device)
    network = torch.compile(model, mode=row.compiled) if row.compiled else model
    in_16_bits = torch.autocast(torch.device(args.device).type, models.amp_dtype(args), enabled=args.amp)
    optimizer = models.make_optimizer(model, args)

    def step():
        with in_16_bits:
            output = network(clips)
        F.cross_entropy(output.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def forward():
        with models.float32_on_gpu() if row.kind == "validation" else in_16_bits:
            network(clips)

    if row.kind == "step":
        models.set_train_mode(model, args)
        return step, batch
    model.eval()
    return forward, batch


def measured(row, small):
    """{"clips_per_s", "GB" of the GPU's memory at most, "first_s": until the third batch was done}."""
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        compute, batch = prepared(row, small)
    for _ in range(3):
        compute()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < (0.1 if small else SECONDS):
        for _ in range(1 if small else 5):
            compute()
            count += batch
        wait()
    rate = count / (time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    torch.compiler.reset()
    return {"clips_per_s": round(rate, 1), "GB": round(memory, 1), "first_s": round(start - begin, 1)}


def recipe(results, price):
    """Lines of a table: hours and cost of the winner's recipe on one and on eight GPUs, by the best rates above."""

    def best(start):
        return max((r.get("clips_per_s", 0) for name, _, r in results if name.startswith(start)), default=0)

    parts = [
        (f"teacher, {TEACHER_EPOCHS} epochs", TEACHER_EPOCHS * VIDEOS, best("teacher: a step")),
        (f"its logits of {WINDOWS:,} windows", WINDOWS, best("teacher: logits")),
        (f"student, {STUDENT_EPOCHS} epochs", STUDENT_EPOCHS * VIDEOS, best("all layers")),
    ]
    if not all(rate for _, _, rate in parts):
        return []
    hours = [(name, count / rate / 3600) for name, count, rate in parts]
    hours.append(("all", sum(time for _, time in hours)))
    lines = ["", "| part | h on 1 GPU | h on 8 | cost |", "| --- | --- | --- | --- |"]
    for name, time_of_one in hours:
        of_eight = time_of_one / 8 / OF_EIGHT
        lines.append(f"| {name} | {time_of_one:.1f} | {of_eight:.1f} | {time_of_one * price:,.0f} $ |")
    return lines


def table(where, results, price):
    lines = [f"{where}, torch {torch.__version__}", "", "| way | batch | clips/s | GB | s to start |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, batch, r in results:
        cells = [r["clips_per_s"], r["GB"], r["first_s"]] if "clips_per_s" in r else [r["failed"], "", ""]
        lines.append(f"| {name} | {batch} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *recipe(results, price), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="bench_gpu.md", help="the table, as Markdown")
    parser.add_argument("--budget", default=400, type=float, help="s after which no row is begun")
    parser.add_argument("--price", default=3.0, type=float, help="$ of an hour of one GPU: assumed")
    parser.add_argument("--small", action="store_true", help="tiny clips, to see whether every row runs")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    begin, results = time.perf_counter(), []
    for row in ROWS:
        if time.perf_counter() - begin > options.budget:
            print(f"{row.name}: not begun, the time is up")
            continue
        try:
            result = measured(row, options.small)
        except Exception as e:  # memory, cuDNN, a compiler: whatever it is, the other rows are wanted
            result = {"failed": f"{type(e).__name__}: {utils.first_line(e)[:80] if str(e) else ''}"}
        results.append((row.name, row.batch, result))
        print(f"{row.name}, {row.batch}: {json.dumps(result)}", flush=True)
        Path(options.output).write_text(table(where, results, options.price), encoding="utf-8")
    print(table(where, results, options.price))


if __name__ == "__main__":
    main()
