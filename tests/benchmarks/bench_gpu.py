"""How fast a GPU trains and validates, in every way that may be faster, and what the winning recipe costs on QEVD.

Measures each row of ROWS, the most telling ones first: clips/s and the GPU's memory; for the loop from the frame cache
its share of the step alone, too, and for decoding how far the pixels are from ours. Rows run in another process: one
that fails (memory, a compiler, a crash) becomes a sentence of the table, and the others go on in a new process. OUTPUT
is written anew after each row, and names what is missing, so that nothing is lost when all of it is killed. BUDGET s
after its start it ends, with the row at work.

    $ python tests/benchmarks/bench_gpu.py                        # on a GPU: under eight minutes
    $ python tests/benchmarks/bench_gpu.py --rows max-autotune    # those whose name holds this text
    $ python tests/benchmarks/bench_gpu.py --small --budget 1800  # tried on a CPU: all rows, on 4 frames of 32 x 32

TorchCodec is no requirement: `pip install torchcodec==0.11.0 nvidia-npp==13.0.3.3`; it gets FFmpeg from PyAV.
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("references/video_classification", "tools", "tests", "tests/benchmarks", ".")
sys.path[:0] = [str(REPO / folder) for folder in FOLDERS]

import av
import bench_train
import numpy as np
import torch
from torch.nn import functional as F

import layers
import models
import train
import utils
from odd_videos import with_tags
from torchvision_patches.decoding import frame_times, read_frames

SECONDS = 1.5  # that a step is timed
SHORTEST = 10.0  # s that a row may need: with less left none is begun
NUM_FILES = 96  # videos of 5 s and 320 x 240 that the loop and TorchCodec read
VIDEOS, WINDOWS = 190_254, 1_300_000  # training videos of QEVD; their windows, which a teacher is asked for
TEACHER_EPOCHS, STUDENT_EPOCHS = 20, 30  # of the winner's recipe
OF_EIGHT = 0.95  # share of eight times one GPU's rate that eight reach together: assumed


class Row(NamedTuple):
    """One way to compute. kind: what is measured, a key of MEASURES."""

    name: str
    batch: int
    flags: list
    kind: str = "step"
    flat: int = 0  # convolutions on 2-D views, with channels that are multiples of this
    folded: int = 0  # all BatchNorm, in validation, with channels that are multiples of this
    compiled: str = ""  # "learning part" or "step", by torch.compile; "graph": the step is one CUDA graph
    mode: str = "default"  # of torch.compile; "aot_eager": traced, and computed as without it


def sizes(resized, cropped):
    """Flags of train.py for clips of other sizes, (height, width) each."""
    resized, cropped = [*map(str, resized)], [*map(str, cropped)]
    of_training = ["--train-resize-size", *resized, "--train-crop-size", *cropped]
    return [*of_training, "--val-resize-size", *resized, "--val-crop-size", *cropped]


FRONT, ALL = ["--amp", "--fold-frozen"], ["--amp", "--trainable-layers", "all"]
OF_8, OF_16, OF_32 = (["--pad-channels", str(multiple)] for multiple in (8, 16, 32))
TEACHER, MAE = ["--model", "mvit_v2_s", *ALL], ["--model", "videomae_base", *ALL]
MAE_112, MAE_224 = [*MAE, *sizes((128, 171), (112, 112))], [*MAE, *sizes((256, 341), (224, 224))]
ROWS = [
    Row("layer4 + fc", 24, FRONT),
    Row("layer4 + fc, channels of 8", 24, FRONT + OF_8),
    Row("all layers", 24, ALL),
    Row("all layers, channels of 8", 24, ALL + OF_8),
    Row("all layers, channels of 16", 24, ALL + OF_16),
    Row("all layers, channels of 32", 24, ALL + OF_32),
    Row("all layers, 2-D views", 24, ALL, flat=1),
    Row("all layers, channels of 8, 2-D views", 24, ALL, flat=8),
    Row("layer4 + fc, from the cache", 64, FRONT, "cache"),
    Row("all layers, channels of 8, from the cache", 24, ALL + OF_8, "cache"),
    Row("teacher: a step", 16, TEACHER),
    Row("teacher: logits", 64, TEACHER, "logits"),
    Row("all layers, channels of 8", 64, ALL + OF_8),
    Row("layer4 + fc, channels of 8", 64, FRONT + OF_8),
    Row("validation", 24, [], "validation"),
    Row("validation, folded", 24, [], "validation", folded=1),
    Row("validation, folded", 64, [], "validation", folded=1),
    Row("validation, folded, channels of 8", 64, [], "validation", folded=8),
    Row("VideoMAE-B at 112", 64, MAE_112),
    Row("VideoMAE-B at 224", 16, MAE_224),
    Row("all layers, channels of 8, a CUDA graph", 24, ALL + OF_8, compiled="graph"),
    Row("layer4 + fc, channels of 8, a CUDA graph", 24, FRONT + OF_8, compiled="graph"),
    Row("all layers, channels of 8, step compiled", 24, ALL + OF_8, compiled="step"),
    Row("layer4 + fc, channels of 8, learning part compiled", 24, FRONT + OF_8, compiled="learning part"),
    Row("decoding by TorchCodec", 1, [], "decoding"),
    *(Row("all layers, channels of 8", batch, ALL + OF_8) for batch in (16, 32)),
    *(Row("all layers, channels of 8, from the cache", batch, ALL + OF_8, "cache") for batch in (16, 32, 64)),
    Row("all layers, from the cache", 24, ALL, "cache"),
    Row("layer4 + fc, channels of 8, step compiled", 24, FRONT + OF_8, compiled="step"),
    Row("VideoMAE-B at 112, step compiled", 64, MAE_112, compiled="step"),
    *(Row("teacher: a step", batch, TEACHER) for batch in (24, 32, 64)),
    *(Row("VideoMAE-B at 112", batch, MAE_112) for batch in (16, 24, 32)),
    *(Row("VideoMAE-B at 224", batch, MAE_224) for batch in (24, 32, 64)),
    Row("VideoMAE-B at 112, from the cache", 64, MAE_112, "cache"),
    Row("VideoMAE-B at 224, from the cache", 16, MAE_224, "cache"),
    Row("teacher: a step, from the cache", 16, [*TEACHER, *sizes((256, 341), (224, 224))], "cache"),
    Row("all layers, channels of 8, step by max-autotune", 24, ALL + OF_8, compiled="step", mode="max-autotune"),
    Row("layer4 + fc, learning part by max-autotune", 24, FRONT, compiled="learning part", mode="max-autotune"),
]


def settled(row, small, folder):
    """train.py's arguments of a row, completed as it completes them."""
    flags = ["--data-path", str(folder), "--lr", "1e-5", "--batch-size", str(row.batch), *row.flags]
    if small:
        flags += ["--workers", "1", "--batch-size", "1" if "mvit_v2_s" in flags else "2"]
        # torchvision's own teacher takes no other size
        flags += [] if "mvit_v2_s" in flags else ["--clip-len", "4", *sizes((32, 43), (32, 32))]
    args = train.get_args_parser().parse_args(flags)
    args.print_freq = 10**6
    models.settle_device(args)
    train.processes.join(args)
    if row.kind == "cache":  # a folder for each size
        args.cache_frames = str(Path(folder, f"frames {args.train_resize_size}"))
    train.settings.complete(args, None, range(92))
    return args


# --- a step, or a forward pass, on clips that lie on the device already -----------------------------------------------


def make_step(model, clips, labels, row, args):
    """One training step as a function that returns its loss; compiled as the row says."""
    optimizer, key = models.make_optimizer(model, args), "backend" if row.mode == "aot_eager" else "mode"
    if row.compiled == "learning part":
        for name, child in model.named_children():
            if models.learns(name, args):
                child.compile(dynamic=False, **{key: row.mode})
    elif row.compiled == "step":
        model.compile(dynamic=False, **{key: row.mode})
        optimizer.step = torch.compile(optimizer.step, dynamic=False, **{key: row.mode})

    def step():
        with torch.autocast(torch.device(args.device).type, models.amp_dtype(args), enabled=args.amp):
            output = model(clips)
        loss = F.cross_entropy(output.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return captured(step) if row.compiled == "graph" else step


def captured(step):
    """A step as one CUDA graph, which the host launches at once; on a CPU the step itself."""
    if not torch.cuda.is_available():
        return step
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what is chosen or allocated at first must not be in the graph
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def prepared(row, args):
    """A function that computes one batch of a row."""
    torch.manual_seed(0)
    model = models.make_model(args, None)
    if row.flat:
        layers.pad_channels(model, row.flat, flat=True)
    if row.folded:
        layers.fold(model, [name for name, _ in model.named_children()], "cuda" in args.device, row.folded)
    clips = torch.randn(args.batch_size, 3, args.clip_len, *args.train_crop_size, device=args.device)
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    if row.kind == "step":
        models.set_train_mode(model, args)
        labels = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
        return make_step(model, clips, labels, row, args)
    model.eval()
    in_16_bits = torch.autocast(torch.device(args.device).type, models.amp_dtype(args), enabled=args.amp)

    @torch.inference_mode()
    def forward():
        with models.float32_on_gpu() if row.kind == "validation" else in_16_bits:
            model(clips)

    return forward


def bare(row, small, folder):
    """Clips/s of a row's computation; first_s: until it has run three times."""
    begin, args = time.perf_counter(), settled(row, small, folder)
    compute = prepared(row._replace(mode="aot_eager") if small else row, args)
    rate_of(lambda: [compute() for _ in range(1 if small else 3)], 0)
    first = time.perf_counter() - begin
    number, rate = 0, math.inf
    while not number or (number * args.batch_size / rate < SECONDS and not small):
        number = 2 * number or 1
        rate = rate_of(lambda: [compute() for _ in range(number)], number * args.batch_size)  # noqa: B023
    return {"clips_per_s": rate, "first_s": first}


def rate_of(run, num_clips):
    """Clips/s of one call."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_clips / (time.perf_counter() - start)


# --- with a loader ----------------------------------------------------------------------------------------------------


def files_in(folder, small):
    """The paths of the videos that loaders read, written when first asked for."""
    if not Path(folder, "train").exists():
        bench_train.write_videos(Path(folder), 2 if small else NUM_FILES)
    return sorted(Path(folder, "train").rglob("*.mp4"))


def from_cache(row, small, folder):
    """Clips/s of train.py's loop from the frame cache, and its share of the loop on batches that are there already."""
    number = len(files_in(folder, small))
    begin, args = time.perf_counter(), settled(row, small, folder)
    loader = bench_train.make_loader(args)
    bench_train.drain(loader)  # fills the cache
    batch, stepper = next(iter(loader)), bench_train.Stepper(args)
    batch = batch._replace(clips=batch.clips.to(args.device), labels=batch.labels.to(args.device))
    stepper.run(loader)
    first = time.perf_counter() - begin
    steps = 2 if small else math.ceil(2 * SECONDS * rate_of(lambda: stepper.run([batch] * 5), 5))
    step = rate_of(lambda: stepper.run([batch] * steps), steps * len(batch.clips))
    loader = bench_train.make_loader(args, math.ceil(steps * len(batch.clips) / number))
    rate = rate_of(lambda: stepper.run(loader), len(loader.sampler))
    return {"clips_per_s": rate, "first_s": first, "note": f"{rate / step:.2f} of the loop without it, {step:,.1f}"}


BT709 = {"colorspace": 1, "color_trc": 1, "color_primaries": 1}
TAGGED = {"untagged": {}, "BT.709": {"color_range": 1} | BT709, "BT.709 full range": {"color_range": 2} | BT709}


def by_torchcodec(row, small, folder):
    """Clips/s that TorchCodec decodes, on the GPU if there is one, and how far its pixels are from ours."""
    from torchcodec.decoders import VideoDecoder, set_cuda_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "beta" if device == "cuda" else "ffmpeg"  # which, on a GPU, wants an FFmpeg that was built with CUDA

    def decoded(path, indices):
        with set_cuda_backend(backend):
            decoder = VideoDecoder(path, dimension_order="NHWC", device=device)
        return decoder.get_frames_at(indices).data, decoder.cpu_fallback

    notes = []
    for name, tags in TAGGED.items():
        path = str(with_tags(Path(folder, f"{name}.mp4"), **tags))
        pixels, fallback = decoded(path, [5])
        apart = np.abs(read_frames(path, frame_times(path)[0][5:6], [5]).astype(int) - pixels.cpu().numpy())
        notes.append(f"{name}: {apart.max()} grey levels at most, {apart.mean():.1f} on average")
        if fallback:
            notes.append(str(fallback))
    clip = [int(7.5 * i) for i in range(16)]
    paths = [str(path) for path in files_in(folder, small)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        everything = lambda: list(pool.map(lambda path: len(decoded(path, clip)[0]), paths))  # noqa: E731
        rate_of(everything, 0)
        return {"clips_per_s": rate_of(everything, len(paths)), "note": "; ".join(notes)}


# --- rows in another process ------------------------------------------------------------------------------------------

MEASURES = {kind: bare for kind in ("step", "logits", "validation")} | {"cache": from_cache, "decoding": by_torchcodec}


def serve(connection, small, folder):
    """In a process of its own: answer each row that comes with its figures, or {"failed": why}."""
    os.setsid()  # so that the parent can end what this process starts, too
    for row in iter(connection.recv, None):
        said = io.StringIO()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                result = MEASURES[row.kind](row, small, folder)
            result["GB"] = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            torch.compiler.reset()
        except Exception as e:  # memory, cuDNN, a compiler: whatever it is, the other rows are wanted
            result = {"failed": f"{type(e).__name__}: {utils.first_line(e)[:150] if str(e) else ''}"}
        except SystemExit:  # one of train.py's refusals
            result = {"failed": said.getvalue().strip().rpartition("\n")[2]}
        connection.send(result)


class Worker:
    """The process that runs rows, and a new one after each that failed."""

    def __init__(self, small, folder):
        self.arguments, self.process = (small, folder), None

    def measure(self, row, seconds):
        """The figures of a row, or {"failed": why}; at most `seconds` are waited for."""
        if not self.process:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other, *self.arguments))
            self.process.start()
            other.close()
        try:
            self.connection.send(row)
            result = {"failed": f"stopped after {seconds:.0f} s"}
            if self.connection.poll(seconds):
                result = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            result = {"failed": f"its process ended, exit code {self.process.exitcode}"}
        if "failed" in result:
            self.end()
        return result

    def end(self):
        if not self.process:
            return
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(2)
        for end in (os.killpg, os.kill):  # it may not have had the time to be a group of its own
            with contextlib.suppress(ProcessLookupError):
                end(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.process = None


def let_torchcodec_find_libraries(folder):
    """TorchCodec wants FFmpeg under its own names: PyAV's. Processes that start from now on find it, and CUDA's."""
    packages = Path(av.__file__).parents[1]
    for file in (packages / "av.libs").glob("lib[as][vw]*"):
        Path(folder, re.sub(r"-\w+(\.so\.\d+).*", r"\1", file.name)).symlink_to(file)
    places = [folder, packages / "av.libs", *packages.glob("nvidia/*/lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, filter(None, places)))


# --- the table --------------------------------------------------------------------------------------------------------


def recipe(results, price):
    """Lines of a table: hours and cost of the winner's recipe on one and on eight GPUs, by the best rates above."""

    def best(start):
        """(clips/s, name) of the fastest row; of those from the cache, if one was measured."""
        found = [(r["clips_per_s"], row) for row, r in results if row.name.startswith(start) and "clips_per_s" in r]
        found = [one for one in found if one[1].kind == "cache"] or found
        return max(((rate, f"{row.name} ({row.batch})") for rate, row in found), default=(0, ""))

    parts = [
        (f"teacher, {TEACHER_EPOCHS} epochs", TEACHER_EPOCHS * VIDEOS, best("teacher: a step")),
        (f"its logits of {WINDOWS:,} windows", WINDOWS, best("teacher: logits")),
        (f"student, {STUDENT_EPOCHS} epochs", STUDENT_EPOCHS * VIDEOS, best("all layers")),
    ]
    if not all(rate for _, _, (rate, _) in parts):
        return []
    lines = ["", "| part | by | h on 1 GPU | cost | h on 8 GPUs | cost |", "| --- | --- | --- | --- | --- | --- |"]
    hours = [(name, f"{by}, {rate:,.0f} clips/s", count / rate / 3600) for name, count, (rate, by) in parts]
    for name, by, alone in [*hours, ("all", "", sum(alone for *_, alone in hours))]:
        shared = alone / 8 / OF_EIGHT
        of_one, of_eight = (f"{h:.1f} | {gpus * h * price:,.0f} $" for gpus, h in ((1, alone), (8, shared)))
        lines.append(f"| {name} | {by} | {of_one} | {of_eight} |")
    assumed = f"{price:g} $ for an hour of a GPU, {OF_EIGHT} of eight times one's rate on eight, loading that keeps up"
    return [*lines, "", f"Assumed: {assumed}."]


def table(where, results, missing, price):
    lines = [f"{where}, torch {torch.__version__}", "", "| way | batch | clips/s | GB | s to start | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row, r in results:
        cells = [f"{r[key]:,.1f}" if key in r else "" for key in ("clips_per_s", "GB", "first_s")]
        lines.append(f"| {row.name} | {row.batch} | {' | '.join(cells)} | {r.get('failed', r.get('note', ''))} |")
    left_out = [f"Not measured: {'; '.join(f'{row.name} ({row.batch})' for row in missing)}."] if missing else []
    return "\n".join([*lines, *recipe(results, price), "", *left_out])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="bench_gpu.md", help="the table, as Markdown")
    parser.add_argument("--budget", default=460, type=float, help="s after which it ends")
    parser.add_argument("--price", default=3.0, type=float, help="$ of an hour of one GPU: assumed")
    parser.add_argument("--rows", default="", help="only those whose name holds this text")
    parser.add_argument("--small", action="store_true", help="tiny clips, to see whether every row runs")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    where += ", tiny clips: no figures" if options.small else ""
    rows, results = [row for row in ROWS if options.rows in row.name], []
    if not rows:
        parser.error(f"no row's name holds {options.rows}: {', '.join(dict.fromkeys(row.name for row in ROWS))}")
    text = table(where, results, rows, options.price)
    with tempfile.TemporaryDirectory() as folder:
        let_torchcodec_find_libraries(folder)
        worker = Worker(options.small, folder)
        try:
            for number, row in enumerate(rows, 1):
                left = end - time.monotonic()
                if left < SHORTEST:
                    break
                results.append((row, worker.measure(row, left)))
                print(f"{row.name}, {row.batch}: {json.dumps(results[-1][1])}", flush=True)
                text = table(where, results, rows[number:], options.price)
                Path(options.output).write_text(text + "\n", encoding="utf-8")
        finally:
            worker.end()
    print(text)


if __name__ == "__main__":
    main()
