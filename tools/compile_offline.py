"""Is it under 34 ms? Qualcomm's own compiler and emulator on this machine: no account, no device, under a minute.

Reads one of: what example_export.py made on the local hub, an ONNX file, a checkpoint of train.py, or nothing but a
network's name (random weights: the latency does not depend on them). Writes, into `output_dir`:
  qevd_r2plus1d-v73.bin    a real QNN context binary for the chip (qevd_r2plus1d-w8a8-v73.bin for 8 bits)
  qevd_r2plus1d-v73.json   what it takes and gives, what it was made of, its estimated latency
  latency.png, .jsonl      of --compare
Latencies are the compiler's estimates, logits (--num-clips) those of Qualcomm's HTP emulator, with the device's
arithmetic. On first use the wheels are installed into `qnn_dir`, never into the project's environment. The last line
of output is one JSON object.

$ python tools/compile_offline.py
$ python tools/compile_offline.py --checkpoint checkpoint.pth --precision w8a8 --num-clips 4
$ python tools/compile_offline.py --checkpoint a.pth b.pth c.pth --precision w8a8
$ python tools/compile_offline.py --model r3d_18 --num-frames 32 --precision w8a8 --num-classes 92
$ python tools/compile_offline.py --compare r2plus1d_18 r3d_18 mc3_18
"""

import functools
import json
import re
import shutil
import signal
import sys
import time
from itertools import product
from pathlib import Path

import common
from common import flags, json_lines, machine
from common.checkpoints import ENDINGS
from common.weights import check_network

from aihub import logits_file, model_io, onnx_graphs, own_onnx, tensors
from qualcomm import binary_runs, clip_runs, compiler, latency, sources

# ----------------------------------------------------------------------------------------------------------------------
source = "./export_assets/resnet_2plus1d.bin"  # what example_export.py made on the local hub, or an .onnx file
checkpoint = []                       # instead: weights as train.py wrote them; several vote, in one model
checkpoint_weights = []               # how much each checkpoint's vote counts, say 2 1 1; [] = all alike
mirror = False                        # True = the mirror image of a clip votes, too; twice the time
model = []                            # instead: an untrained network, any of torchvision's; several vote, in one model
num_frames = 0                        # frames a clip; 0 = as the source says, 16 for an untrained network
crop_size = 0                         # pixels of a side of an untrained network's frames; 0 = as its weights have it
num_classes = 0                       # 0 = as the source says, as many as class_map.json for an untrained network
precision = ""                        # float, w8a8 or w8a16; "" = as the source is, float for one without bits
soc = 77                              # Qualcomm's number of the chip; 77 is that of the Dragonwing IQ-9075
CALIBRATION_DIR = "./calibration_tensors"  # clips of training videos, which w8a8 and w8a16 are calibrated with
num_calibration_samples = 100         # how many of them, as many of each class
output_dir = "./export_assets"        # where everything but the logits is saved
qnn_dir = str(common.REPO / ".qnn")   # folder of Qualcomm's wheels, 287 MB, installed on first use
num_processes = 0                     # compilers or emulators at a time; 0 = one a core
# --- Emulator ---
num_clips = 0                         # clips to run in it, as many of each class; 10 to 30 s of a core each
data_dir = "./preprocessed_tensors"   # where they are: OUT_ROOT of preprocess_and_save.py
OUTPUT_H5 = "dataset-export-htp.h5"   # their logits, for evaluate.py
# --- Comparison ---
compare = []                          # untrained networks to compare instead, in one table and one picture
compare_frames = [8, 16, 32]          # frames a clip that each is compared with
compare_precisions = ["float", "w8a8"]  # float, w8a8, w8a16: precisions that each is compared in
results = []                          # accuracies to show beside: r2plus1d_18/16/float=report/report.json, or =89.6
# ----------------------------------------------------------------------------------------------------------------------


def check_compilation():
    """Refuse what could only fail later."""
    for name in [precision] * bool(precision) + compare_precisions:
        own_onnx.check_precision(name)
    if soc not in compiler.SOCS:
        known = ", ".join(f"{number} ({chip})" for number, chip in compiler.SOCS.items())
        common.refuse(f"soc is {soc}, which this compiler has no chip for; it has {known}")
    if sum(map(bool, (checkpoint, model, compare))) > 1:
        common.refuse("checkpoint, model and compare exclude one another: set one of them")
    for name in dict.fromkeys(model + compare):
        check_network(name)
    if num_calibration_samples == 0:
        common.refuse("num_calibration_samples is 1 or more")
    if compare and not (compare_precisions and compare_frames and all(compare_frames)):
        common.refuse("compare_frames and compare_precisions each need a value or more, frames from 1 on")
    if (checkpoint_weights or mirror) and not checkpoint:
        common.refuse("checkpoint_weights and mirror are about the votes of checkpoints: name them with --checkpoint")
    if compare and num_clips:
        common.refuse("the networks of --compare are untrained: the emulator would run them for nothing")
    if num_clips and not Path(data_dir, "manifest.jsonl").is_file():
        common.refuse(f"the emulator runs clips of a manifest.jsonl, and there is none in {data_dir}; set data_dir")


def find_source():
    """The UncompiledNetwork that the constants name. Exits with code 2 and one sentence if it cannot be used."""
    uncompiled = source_named()
    if not model and crop_size not in (0, uncompiled.shape[-1]):
        common.refuse(f"crop_size is {crop_size}, but {uncompiled.made_from} takes frames of {uncompiled.shape[-1]}")
    if num_classes and uncompiled.classes and num_classes != len(uncompiled.classes):
        own = len(uncompiled.classes)
        common.refuse(f"num_classes is {num_classes}, but {uncompiled.made_from} tells {own} classes apart")
    return uncompiled


def source_named():
    """The UncompiledNetwork of model, checkpoint or source, whose num_frames and precision are as the constants say."""
    if model:
        return sources.untrained_source(model, num_frames, num_classes, precision, crop_size)
    if checkpoint:
        vote = {"weights": checkpoint_weights, "mirrored": mirror}
        return sources.trained(checkpoint, num_frames, num_classes, precision, **vote)
    path = Path(source)
    if not path.exists():
        common.refuse(
            f"there is no {path}: make it with `python tools/local_hub.py python tools/example_export.py`, or name a "
            f"--checkpoint, an .onnx file with --source, or an untrained network, say --model r2plus1d_18"
        )
    if path.suffix in ENDINGS:
        common.refuse(f"{path} looks like a checkpoint: name it with --checkpoint")
    is_onnx = path.suffix == ".onnx" and not onnx_graphs.read_hub_binary(path)
    uncompiled = sources.from_onnx(path, num_frames, precision) if is_onnx else sources.from_local_hub(path)
    if num_frames not in (0, uncompiled.frames):
        common.refuse(f"num_frames is {num_frames}, but {path} takes {uncompiled.frames} frames a clip")
    if precision not in ("", uncompiled.precision):
        own = uncompiled.precision
        common.refuse(f"precision is {precision}, but {path} is {own}; for the other, name a --checkpoint")
    return uncompiled


# --- one network ------------------------------------------------------------------------------------------------------


def rows_to_calibrate_with(uncompiled):
    """The manifest's rows to calibrate with: [] if there is nothing to calibrate or no weights to heed.

    Exits with code 2 and one sentence if there are no clips, or clips of classes that it does not know.
    """
    if uncompiled.precision == "float" or uncompiled.io or uncompiled.is_quantised or model:
        return []
    clips = f" --checkpoint {checkpoint[0]}" if checkpoint else f" --clip-len {uncompiled.frames}"
    own_onnx.check_calibration(uncompiled.precision, CALIBRATION_DIR, clips)
    return choose_rows(uncompiled, CALIBRATION_DIR, num_calibration_samples)[0]


def choose_rows(uncompiled, folder, number):
    """(`number` rows of a folder's manifest, as many of each class; how many it has), checked for the network."""
    from torchvision_patches import clip

    description = clip.described(uncompiled.about["clip"])[0] if uncompiled.about.get("clip") else None
    return tensors.rows_for(uncompiled.made_from, folder, number, uncompiled.classes, description)


def calibration_clips(uncompiled, rows):
    """Yield float32 clips (1, 3, T, H, W) in [0, 1]: those of the rows or, for random weights, a random one."""
    import numpy as np
    from tqdm import tqdm

    if not rows:
        yield np.random.default_rng(0).random(uncompiled.shape, dtype=np.float32)
        return
    print(f"calibrating with {len(rows)} clips of {len({row['label'] for row in rows})} classes")
    for row in tqdm(rows, desc="calibrating", unit="clip"):
        yield tensors.read_clip(CALIBRATION_DIR, row, uncompiled.shape)


def key_of_binary(uncompiled, rows):
    """A hash of all that decides a binary: what was made with another key is another binary."""
    parts = [compiler.WHEELS, soc, uncompiled.sha256, uncompiled.network, uncompiled.shape, uncompiled.precision]
    stands_beside = "clip", "classes", "temperature", "threshold"
    parts += [uncompiled.about.get(name) for name in stands_beside]
    if rows:
        parts += [onnx_graphs.QUANTIZATION_VERSION]
        parts += [[clip_runs.identity_of(CALIBRATION_DIR, row) for row in rows]]
    return common.json_hash(parts)


def stem_of(uncompiled):
    return uncompiled.name + ("" if uncompiled.precision == "float" else f"-{uncompiled.precision}")


def compiled_before(uncompiled, key):
    """The CompiledBinary in output_dir that has this key, or None."""
    for file in sorted(Path(output_dir).glob(f"{stem_of(uncompiled)}-v*.json")):
        path, described = file.with_suffix(".bin"), common.read_json(file)
        if described.get("key") == key and path.is_file() and described.get("sha256") == common.sha256_of(path):
            print(f"{path} is compiled already; delete it to compile it again")
            return binary_runs.CompiledBinary(path, described)
    return None


def compile_and_save(uncompiled, key, graph, io):
    """Compile for the chip and save the binary, then its description, in output_dir; returns the CompiledBinary."""
    print(f"compiling {uncompiled.made_from}, {uncompiled.precision}, for SoC {soc}; some 10 to 60 s …", flush=True)
    start = time.monotonic()
    with compiler.compiling(graph, soc, qnn_dir) as finish:
        binary, figures = finish()
        chip = figures["hexagon"] + ("" if soc == latency.DEVICE_SOC else f"-soc{soc}")
        path = Path(output_dir, f"{stem_of(uncompiled)}-{chip}.bin")
        with common.written_then_renamed(path) as temporary:
            shutil.copyfile(binary, temporary)
    description = {"file": path.name, "sha256": common.sha256_of(path), "key": key, **io}
    description |= {"layout": model_io.layout_of(io["input"]["shape"]), "output_kind": "logits"}
    description |= {"classes": uncompiled.classes, **uncompiled.about}
    description |= {"target_runtime": "qnn_context_binary", "soc": soc, "frames": uncompiled.frames}
    description |= {"precision": uncompiled.precision, "network": uncompiled.network}
    description |= {"made_from": uncompiled.made_from, "made_from_sha256": uncompiled.sha256}
    description |= {**figures, "operations": len(graph.graph.node), "seconds": round(time.monotonic() - start, 1)}
    common.write_text(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    return binary_runs.CompiledBinary(path, description)


def print_unsupported(error):
    """Say on stderr why a network does not compile: each operation, and the layers of the network it comes from."""
    print(f"error: Qualcomm's compiler refuses the network: {error}", file=sys.stderr)
    layers = {}
    for operation, node in error.unsupported:
        layers.setdefault(operation, {})[module_of(node)] = None  # each layer once, in order
    for operation, names in sorted((operation, list(of_it)) for operation, of_it in layers.items()):
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        print(f"  {operation} of {', '.join(names[:6])}{more}", file=sys.stderr)
    if layers:
        print("  a limit of the compiler in this wheel, not a proof that AI Hub refuses them", file=sys.stderr)


def module_of(node):
    """The module that a traced node comes from: "/model/features/features.5/branch3/branch3.0/MaxPool" is of
    features.5.branch3.0, "/model.1/fc/Gemm" of 1.fc, the second that votes. Another exporter's name stays as it is.
    """
    parts = [part for part in node.split("/") if part][:-1]
    parts = [part for part, after in zip(parts, parts[1:] + [""]) if not after.startswith(f"{part}.")]
    return re.sub(r"^model\.(0\.)?", "", ".".join(parts)) or node or "(no name)"


def print_report(binary):
    """The table: what was made, for which chip, and how fast it should be there."""
    d = binary.description
    float_note = " (fp16 on the chip)" if d["precision"] == "float" else ""
    print(f"network   {d['made_from']}, {d['frames']} frames, {d['precision']}{float_note}")
    device = f", {latency.DEVICE}" if d["soc"] == latency.DEVICE_SOC else ""
    print(f"chip      {d['chip']} (SoC {d['soc']}{device}), Hexagon {d['hexagon']}")
    print(f"binary    {binary.path}, {d['bytes'] / 1e6:.1f} MB, QAIRT {d['qairt']}")
    print(f"input     {model_io.describe(d['input'])}")
    print(f"output    {model_io.describe(d['output'])}, {d['output_kind']}")
    print(f"runs on   the Hexagon processor alone: {d['operations']} operations, one graph, nothing on the CPU")
    if d["estimated_ms"]:
        spill, fill = d["spill_bytes"] / 1e6, d["fill_bytes"] / 1e6
        print(f"memory    {spill:.1f} MB spilled to it and {fill:.1f} MB filled from it a clip")
        print(f"costs     {d['ops_without_cost']} of the operations have none that the compiler knows")
    latency.print_latency(d, d["network"], d["precision"], d["frames"], d["soc"])


def compile_one():
    """Compile what the constants name, run clips in the emulator if asked to; returns the figures for the last line."""
    uncompiled = find_source()
    rows = rows_to_calibrate_with(uncompiled)
    compiler.install(qnn_dir)
    key = key_of_binary(uncompiled, rows)
    deployed = functools.cache(lambda: sources.deployed_graph(uncompiled, calibration_clips(uncompiled, rows)))
    binary = compiled_before(uncompiled, key) or compile_and_save(uncompiled, key, *deployed())
    print_report(binary)
    kept = ("estimated_ms", "bytes", "ops_without_cost", "qairt", "precision", "network", "frames", "soc", "chip")
    figures = {"binary": str(binary.path)} | {name: binary.description[name] for name in kept}
    figures["gate"] = latency.verdict(binary.description, uncompiled.precision)
    return figures | (run_clips(uncompiled, binary, deployed) if num_clips else {})


def run_clips(uncompiled, binary, deployed):
    """Run num_clips of the manifest in the emulator, write OUTPUT_H5, compare; returns how the logits agree."""
    if uncompiled.frames == 0:
        common.refuse(
            f"{uncompiled.made_from} takes {uncompiled.shape}, which is no RGB clip: there is nothing to emulate"
        )
    rows, number = choose_rows(uncompiled, data_dir, num_clips)
    outputs = clip_runs.outputs_of(binary, data_dir, rows, OUTPUT_H5, qnn_dir, num_processes)
    clips = map(clip_runs.loader(binary, data_dir), rows)
    figures = clip_runs.compare(uncompiled, deployed()[0], binary, clips, outputs)
    clip_runs.write_h5(OUTPUT_H5, rows, outputs, binary)
    manifest, report_dir = Path(data_dir, "manifest.jsonl"), Path(OUTPUT_H5).with_name("report-htp")
    command = logits_file.evaluate_command(OUTPUT_H5, manifest, uncompiled.classes, report_dir=report_dir)
    partial = " --allow-partial" if len(rows) < number else ""
    print(f"wrote {OUTPUT_H5}: {len(rows)} clips; next: {command}{partial}")
    return {"num_clips": len(rows), **figures}


# --- many networks ----------------------------------------------------------------------------------------------------


def compare_networks():
    """Compile every network, number of frames and precision; one table, one picture. Returns (figures, exit code).

    Each is noted in output_dir/latency.jsonl when it is done: a run that was killed goes on, and another network is
    added in no time.
    """
    from tqdm import tqdm

    accuracies = latency.read_results(results)
    compiler.install(qnn_dir)
    file = Path(output_dir, "latency.jsonl")
    common_part = {"soc": soc, "num_classes": num_classes, "crop_size": crop_size, "wheels": compiler.WHEELS}
    wanted = [{"network": name, "frames": frames, "precision": of, **common_part}
              for name, frames, of in dict.fromkeys(product(compare, compare_frames, compare_precisions))]
    rows = [row for row in json_lines.read_rows(file) if {key: row.get(key) for key in wanted[0]} in wanted]
    missing = [row for row in wanted if not any(row.items() <= other.items() for other in rows)]

    def graphs():
        for row in missing:
            of_row = [row["network"]], row["frames"], num_classes, row["precision"], crop_size
            uncompiled = sources.untrained_source(*of_row)
            yield row, sources.deployed_graph(uncompiled, calibration_clips(uncompiled, []))[0]

    number = machine.num_workers(num_processes)
    with tqdm(total=len(wanted), initial=len(rows), unit="network", desc="comparing") as bar:
        for row, figures in compiler.compile_each(graphs(), soc, qnn_dir, number):
            rows.append(row | figures)
            if "error" not in figures or figures["unsupported"]:  # for want of memory, say, it is tried again
                json_lines.append_row(file, rows[-1])
            bar.update()
    return latency.summarise(rows, accuracies, Path(output_dir, "latency.png"))


def main():
    flags.set_constants_from_flags(globals())
    check_compilation()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go
    try:
        figures, code = compare_networks() if compare else (compile_one(), 0)
    except compiler.CompilerError as e:
        print_unsupported(e)
        raise SystemExit(1) from None
    print(json.dumps(figures))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
