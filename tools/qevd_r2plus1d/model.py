"""The deployed network: clip in [0, 1] -> normalise -> torchvision video network -> logits.

Reads a checkpoint of references/video_classification/train.py and the clips of tools/preprocess_and_save.py; writes
labels.txt into the bundle that qai_hub_models makes.

$ python tools/example_export.py --checkpoint checkpoint.pth --data-dir preprocessed_tensors
"""

import random
from pathlib import Path

import common
from common import checkpoints

import numpy as np
import torch
from qai_hub_models.utils.base_model import BaseModel
from qai_hub_models.utils.input_spec import ColorFormat, ImageMetadata, IoType, TensorSpec
from torchvision.models import get_model
from torchvision.models.video import R2Plus1D_18_Weights

MODEL_ID = "qevd_r2plus1d"
NETWORKS = ("r2plus1d_18", "r3d_18", "mc3_18")  # torchvision's video networks with this normalisation and a 112 crop
OFFICIAL_NUM_FRAMES = 16  # what the organisers feed; used where neither checkpoint nor user says otherwise


def load_checkpoint(path):
    """What the recipe needs of `checkpoints.load_checkpoint`, which exits with code 2 where the file cannot be used.

    Returns {state_dict, model_name, classes (names in index order, or None), clip_len (frames, or None),
    clip_len_is_sure (False where it is the original's --clip-len, 8 unless given), crop_size (pixels),
    mean, std (a value a colour); the last three None in checkpoints that do not say}.
    """
    advice = "name one that train.py wrote with --checkpoint, or export an untrained network with --random-weights"
    checkpoint = checkpoints.load_checkpoint(path, advice)
    args = checkpoint["args"]
    return {
        "state_dict": checkpoint["model"],
        "model_name": checkpoint.get("model_name") or args.get("model") or NETWORKS[0],
        "classes": checkpoint.get("classes"),
        "clip_len": checkpoint.get("clip_len") or args.get("clip_len"),
        "clip_len_is_sure": bool(checkpoint.get("clip_len")),
        **{key: checkpoint.get(key) for key in ("crop_size", "mean", "std")},
    }


def build_network(checkpoint_path, checkpoint, num_classes):
    """A torchvision video network with the checkpoint's weights, in evaluation mode.

    Input float (B, 3, T, H, W), normalised; output logits (B, num_classes). `num_classes` 0 takes the checkpoint's.
    Exits with code 2 and one sentence where checkpoint and arguments contradict each other.
    """
    weights, name = checkpoint["state_dict"], checkpoint["model_name"]
    if name not in NETWORKS:
        common.refuse(f"{checkpoint_path} holds the network {name!r}; this recipe exports {', '.join(NETWORKS)}")
    preset = R2Plus1D_18_Weights.KINETICS400_V1.transforms()
    for key in ("crop_size", "mean", "std"):
        trained, own = checkpoint[key], list(getattr(preset, key))
        if trained and list(trained) != own:
            common.refuse(f"{checkpoint_path} was trained with {key} {trained}; this recipe deploys with {own} only")
    if "fc.weight" not in weights:
        common.refuse(f"{checkpoint_path} has no weights of a final layer `fc`; it is no checkpoint of train.py")
    found, names = len(weights["fc.weight"]), checkpoint["classes"]
    if num_classes and num_classes != found:
        common.refuse(f"num_classes is {num_classes}, but {checkpoint_path} was trained with {found} classes")
    if names and len(names) != found:
        common.refuse(f"{checkpoint_path} names {len(names)} classes but its last layer has {found}")
    network = get_model(name, weights=None, num_classes=found)
    try:
        network.load_state_dict(weights)
    except RuntimeError as e:
        common.refuse(f"the weights in {checkpoint_path} do not fit {name}: {str(e).splitlines()[-1].strip()}")
    return network.eval()


def class_balanced(rows, number):
    """`number` of the manifest rows (all, if there are fewer), as equally many of each label as can be had.

    The same rows for the same manifest, in any order of its lines.
    """
    by_label = {}
    for row in sorted(rows, key=lambda row: row["tensor_path"]):
        by_label.setdefault(row["label"], []).append(row)
    for rows_of_label in by_label.values():
        random.Random(0).shuffle(rows_of_label)
    rounds = range(max(map(len, by_label.values()), default=0))
    labels = sorted(by_label)
    return [by_label[label][i] for i in rounds for label in labels if i < len(by_label[label])][:number]


def read_clip(data_dir, row, shape):
    """The clip of a manifest row as float32 `shape` = (1, 3, T, H, W), RGB in [0, 1].

    Exits with code 2 and one sentence if the file is missing or has another shape.
    """
    path = Path(data_dir, row["tensor_path"])
    try:
        clip = np.load(path)
    except (OSError, ValueError) as e:
        common.refuse(f"the clip {path} cannot be read ({e}); run tools/preprocess_and_save.py again")
    if clip.shape != tuple(shape):
        common.refuse(
            f"the clip {path} has shape {clip.shape}, the network takes {tuple(shape)}; preprocess with --clip-len "
            f"{shape[2]}, into a folder of its own (--out-root)"
        )
    return clip.astype(np.float32)


class MeanOverTimeAndSpace(torch.nn.Module):
    """(B, C, T, H, W) -> (B, C). The same mean as torchvision's average pool, in an op that NPUs run faster."""

    def forward(self, x):
        return x.flatten(2).mean(2)


class QevdR2Plus1D(BaseModel):
    """What is exported. Input `video`: float32 (1, 3, T, 112, 112), RGB in [0, 1]; output: logits (1, num_classes)."""

    def __init__(self, network, num_frames, classes=None, data_dir="", calibration_dir="", num_calibration_clips=100):
        super().__init__(network)
        preset = R2Plus1D_18_Weights.KINETICS400_V1.transforms()
        # not named mean and std: torch.export 2.11 mistakes those for the methods (pytorch issue 168211)
        self.input_mean = torch.tensor(preset.mean).view(1, 3, 1, 1, 1)
        self.input_std = torch.tensor(preset.std).view(1, 3, 1, 1, 1)
        self.num_frames, self.classes = num_frames, classes
        self.data_dir = data_dir
        self.calibration_dir, self.num_calibration_clips = calibration_dir, num_calibration_clips

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str = "./checkpoint.pth",
        num_classes: int = 0,
        num_frames: int = 0,
        data_dir: str = "./preprocessed_tensors",
        calibration_dir: str = "./calibration_tensors",
        num_calibration_clips: int = 100,
        random_weights: bool = False,
    ):
        """Build the model from a checkpoint file, or untrained with `random_weights`.

        `num_classes` and `num_frames` 0 mean: what the checkpoint says. `data_dir` holds the manifest of the clips
        that serve as sample inputs, "" means one random clip; `calibration_dir` those of training videos. Exits with
        code 2 and one sentence if the checkpoint cannot be used or contradicts an argument.
        """
        class_map = common.load_class_map(common.REPO / "class_map.json")
        official = sorted(class_map, key=class_map.get)
        classes, clip_len = None, None
        if random_weights:
            torch.manual_seed(0)
            network = get_model(NETWORKS[0], weights=None, num_classes=num_classes or len(official))
        else:
            loaded = load_checkpoint(checkpoint)
            network = build_network(checkpoint, loaded, num_classes)
            classes, clip_len = loaded["classes"], loaded["clip_len"]
            if num_frames and clip_len and num_frames != clip_len:
                if loaded["clip_len_is_sure"]:
                    common.refuse(
                        f"num_frames is {num_frames}, but {checkpoint} was trained with {clip_len} frames a clip"
                    )
                print(f"{checkpoint} says --clip-len {clip_len}, exported with num_frames = {num_frames}")
        if classes is None and network.fc.out_features == len(official):
            classes = official
        network.avgpool = MeanOverTimeAndSpace()
        frames = num_frames or clip_len or OFFICIAL_NUM_FRAMES
        return cls(network, frames, classes, data_dir, calibration_dir, num_calibration_clips)

    def forward(self, video):
        """Float (B, 3, T, 112, 112), RGB in [0, 1] -> logits (B, num_classes)."""
        return self.model((video - self.input_mean) / self.input_std)

    def get_input_spec(self):
        return {
            "video": TensorSpec(
                shape=(1, 3, self.num_frames, 112, 112),
                dtype="float32",
                description="RGB clip, not normalised",
                io_type=IoType.IMAGE,
                value_range=(0.0, 1.0),
                image_metadata=ImageMetadata(color_format=ColorFormat.RGB),
                # as in every release of the package: runtimes that work channel last take (1, T, 112, 112, 3)
                apply_runtime_channel_reordering=True,
            )
        }

    def get_output_spec(self):
        # `class_probs` is what the package and the organisers' solution call this output; the values are logits
        return {
            "class_probs": TensorSpec(
                description="logits, one a class; softmax is not applied",
                softmax_applied=False,
                labels_file="labels.txt" if self.classes else None,
            )
        }

    def serialize(self, output_dir, input_spec=None):
        """Export with torch.export and check the saved program against this model on a real clip, before any upload."""
        path = super().serialize(output_dir, input_spec)
        clip = torch.from_numpy(self.sample_inputs(use_channel_last_format=False)["video"][0])
        with torch.no_grad():
            difference = (torch.export.load(path).module()(clip) - self(clip)).abs().max().item()
        if not difference <= 1e-4:
            common.refuse(f"the exported program's logits differ from torch's by {difference:.3g}; nothing uploaded")
        kind = "a real clip" if self.data_dir else "a random clip"
        print(f"exported program against torch on {kind}: logits differ by at most {difference:.1e}")
        return path

    def _sample_inputs_impl(self, input_spec=None):
        shape = self.get_input_spec()["video"].shape
        if not self.data_dir:
            return {"video": [torch.rand(shape, generator=torch.Generator().manual_seed(0)).numpy()]}
        rows = class_balanced(common.read_manifest(Path(self.data_dir, "manifest.jsonl")), 8)
        return {"video": [read_clip(self.data_dir, row, shape) for row in rows]}

    def get_calibration_dataset_cls(self):
        """A dataset class of this model's own clips; the pipeline instantiates it without arguments of ours."""
        folder, number, shape = self.calibration_dir, self.num_calibration_clips, self.get_input_spec()["video"].shape
        rows = common.read_manifest(Path(folder, "manifest.jsonl"))
        unknown = {row["label"] for row in rows} - set(self.classes or [row["label"] for row in rows])
        if unknown:
            common.refuse(
                f"the clips in {folder} are of other classes than the model's {len(self.classes)}, say "
                f"{min(unknown)!r}: calibrate with clips of the videos that it was trained on"
            )

        class CalibrationClips(torch.utils.data.Dataset):
            """Exactly `number` clips: the pipeline would draw at random from more and lose the balance."""

            def __init__(self, split):
                self.rows = class_balanced(rows, number)
                labels = {row["label"] for row in self.rows}
                fewer = f"; {number} were asked for, there are no more" if len(self.rows) < number else ""
                print(f"calibrating with {len(self.rows)} clips of {len(labels)} classes from {folder}{fewer}")

            def __len__(self):
                return len(self.rows)

            def __getitem__(self, i):
                return read_clip(folder, self.rows[i], shape)[0], self.rows[i]["label"]

            @staticmethod
            def default_num_calibration_samples():
                return number

        return CalibrationClips

    def write_supplementary_files(self, output_dir, metadata):
        """Write labels.txt, one class name a line in index order, into the bundle."""
        if self.classes:
            Path(output_dir, "labels.txt").write_text("\n".join(self.classes) + "\n", encoding="utf-8")
            metadata.supplementary_files["labels.txt"] = "class names, line i names logit i"
