"""A sample that tools/quickstart.py made: is every logit of the deployed model torch's, and is w8a8 as good as float?

Reads FOLDER/training/checkpoint.pth, FOLDER/preprocessed_tensors and FOLDER/dataset-export.h5. torch runs torchvision's
own network on clips normalised with the published mean and std; the recipe of the export has no part in it. With --w8a8
the checkpoint is also exported in w8a8, calibrated with clips of the manifest, and run on a local hub, in FOLDER/w8a8.
Prints a line for each comparison and, as its last line, one JSON object. Exit code 1 if a clip is missing, a float
logit differs by more than 1e-4, or w8a8's Top-1 is more than 2 points below float's.

$ python tests/benchmarks/check_sample.py sample --w8a8
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO / "tools"), str(REPO / "tests")]

import common

import numpy as np
import torch
from torchvision.models import get_model

from small_models import read_h5

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
TOLERANCE = 1e-4  # largest difference of a float logit
POINTS = 2.0  # of Top-1 that w8a8 may lose against float


def torch_logits(checkpoint, paths):
    """What torchvision's network gives for clips (1, 3, T, H, W) in [0, 1]: float32 (clips, classes)."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = get_model(content["model_name"], num_classes=len(content["classes"]))
    network.load_state_dict(content["model"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (MEAN, STD))
    network.eval()
    with torch.no_grad():
        return np.concatenate([network((torch.from_numpy(np.load(path)) - mean) / std).numpy() for path in paths])


def run_w8a8(folder):
    """Export, calibrate and run in w8a8 on a local hub; returns the path of its logits."""
    tensors, made = folder / "preprocessed_tensors", folder / "w8a8"
    hub = [sys.executable, str(REPO / "tools/local_hub.py"), sys.executable]
    export = ["tools/example_export.py", "--precision", "w8a8", "--checkpoint", folder / "training/checkpoint.pth",
              "--data-dir", tensors, "--calibration-dir", tensors, "--output-dir", made,
              "--skip-inferencing", "false"]  # fmt: skip
    infer = ["tools/run_inference.py", "--dlc-path", made / "resnet_2plus1d.bin", "--data-path", tensors,
             "--output-h5", made / "dataset-export.h5"]  # fmt: skip
    for script, *flags in (export, infer):
        subprocess.run([*hub, str(REPO / script), *map(str, flags)], check=True)
    return made / "dataset-export.h5"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--w8a8", action="store_true", help="also export and run in w8a8")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    rows = common.read_manifest(folder / "preprocessed_tensors/manifest.jsonl")
    class_map = common.load_class_map(REPO / "class_map.json")
    labels = np.array([class_map[row["label"]] for row in rows])
    paths = [row["tensor_path"] for row in rows]
    expected = torch_logits(folder / "training/checkpoint.pth", [folder / "preprocessed_tensors" / p for p in paths])

    logits, written = read_h5(folder / "dataset-export.h5")
    assert written == paths, "dataset-export.h5 does not hold the manifest's clips in its order"
    difference = float(np.abs(logits - expected).max())
    top1 = 100 * float((logits.argmax(1) == labels).mean())
    print(f"float  {logits.size:,} logits of {len(paths):,} clips: at most {difference:.1e} from torch's")
    print(f"float  Top-1 {top1:.1f} %")
    figures = {"clips": len(paths), "max_difference": difference, "float_top1": top1}
    good = difference <= TOLERANCE
    if arguments.w8a8:
        quantised, written = read_h5(run_w8a8(folder))
        assert written == paths, "the w8a8 result does not hold the manifest's clips in its order"
        agree = int((quantised.argmax(1) == logits.argmax(1)).sum())
        top1_w8a8 = 100 * float((quantised.argmax(1) == labels).mean())
        print(f"w8a8   Top-1 {top1_w8a8:.1f} %, the same as float for {agree} of {len(paths)} clips")
        figures |= {"w8a8_top1": top1_w8a8, "agree": agree}
        good = good and top1 - top1_w8a8 <= POINTS
    print(json.dumps(figures))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
