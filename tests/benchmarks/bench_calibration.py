"""How to find the ranges of a w8a8 network: calibration methods by PSNR and Top-1 against float, on held-out clips.

Calibrates with clips of one folder of preprocess_and_save.py, as many of each class, and judges on those of another,
with onnxruntime on this CPU. Prints one row a method; ranges are collected once for each kind of statistic.

$ python tests/benchmarks/bench_calibration.py checkpoint.pth tensors_train tensors_val [NUMBER]
"""

import functools
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import common

import numpy as np
import onnxruntime.quantization
from onnxruntime.quantization import CalibrationMethod

from aihub import logits_file, model_io, onnx_graphs
from aihub.tensors import class_balanced, read_clip
from qualcomm import sources

# by its name: the package has a function of the same one
ort_quantize = importlib.import_module("onnxruntime.quantization.quantize")
create_calibrator = ort_quantize.create_calibrator
METHODS = {
    # name: (onnxruntime's method, options of its calibrator, percentile)
    "min-max": (CalibrationMethod.MinMax, {}, None),
    "min-max, mean over clips": (CalibrationMethod.MinMax, {"moving_average": True}, None),
    "percentile 99.999": (CalibrationMethod.Percentile, {}, 99.999),
    "percentile 99.99": (CalibrationMethod.Percentile, {}, 99.99),
    "percentile 99.9": (CalibrationMethod.Percentile, {}, 99.9),
    "entropy": (CalibrationMethod.Entropy, {}, None),
}
calibrators = {}


class Ranges:
    """Stands in for onnxruntime's calibrator: one clip in memory at a time, and each statistic collected once."""

    def __init__(self, name, clips, model, op_types, **options):
        method, extra, self.percentile = METHODS[name]
        key = (method, *extra)
        if key not in calibrators:
            options |= {"calibrate_method": method, "extra_options": extra}
            calibrators[key] = create_calibrator(model, op_types, **options)
            for clip in clips:
                clips_left = iter([{"video": clip}])
                calibrators[key].collect_data(SimpleNamespace(get_next=lambda left=clips_left: next(left, None)))
        self.calibrator = calibrators[key]

    def collect_data(self, reader):
        """It has been."""

    def compute_data(self):
        if self.percentile:
            self.calibrator.collector.percentile = self.percentile
        return self.calibrator.compute_data()


def quantize_static(by_channel, *arguments, **options):
    return ort_quantize.quantize_static(*arguments, **(options | {"per_channel": by_channel}))


def logits_of(graph, io, clips):
    session = onnx_graphs.cpu_session(graph.SerializeToString())
    inputs = (model_io.as_model_input(clip, io["input"]) for clip in clips)
    return np.concatenate([model_io.as_logits(session.run(None, {"video": x})[0], io["output"]) for x in inputs])


def main():
    checkpoint, calibration, held_out = sys.argv[1:4]
    number = int(sys.argv[4]) if len(sys.argv) > 4 else 48
    network = sources.trained([checkpoint], 0, 0, "w8a8")
    rows = class_balanced(common.read_manifest(Path(calibration, "manifest.jsonl")), number)
    test_rows = common.read_manifest(Path(held_out, "manifest.jsonl"))
    clips = [read_clip(calibration, row, network.shape) for row in rows]
    test_clips = [read_clip(held_out, row, network.shape) for row in test_rows]
    labels = np.array([network.classes.index(row["label"]) for row in test_rows])

    network.precision = "float"
    expected = logits_of(*sources.deployed_graph(network), test_clips)
    print(f"calibrated with {len(rows)} clips, judged on {len(labels)} others; float: "
          f"{(expected.argmax(1) == labels).mean():.1%} Top-1\n")  # fmt: skip
    print("| ranges of activations | weights | PSNR, dB | the same Top-1 | Top-1 | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in METHODS:
        for per_channel in (True, False) if name in ("min-max", "percentile 99.999") else (True,):
            start = time.monotonic()
            ort_quantize.create_calibrator = functools.partial(Ranges, name, clips)
            proto = onnx_graphs.torch_to_onnx(network.torch_model, network.shape)
            # as onnx_graphs.quantize_onnx calls it
            onnxruntime.quantization.quantize_static = functools.partial(quantize_static, per_channel)
            proto = sources.quantised_here(proto, (), 8, 8)
            quantizers = onnx_graphs.expose_quantized_io(proto.graph)
            onnx_graphs.channel_last_input(proto.graph, onnx_graphs.graph_inputs(proto.graph)[0])
            logits = logits_of(proto, onnx_graphs.io_of_graph(proto.graph, quantizers), test_clips)
            agreed = logits_file.agreement(logits, expected)
            print(f"| {name} | {'per channel' if per_channel else 'per tensor'} | {agreed['psnr_db']} | "
                  f"{agreed['same_top1']} of {len(labels)} | {(logits.argmax(1) == labels).mean():.1%} | "
                  f"{time.monotonic() - start:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
