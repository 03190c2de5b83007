"""The deployed network: clip in [0, 1] -> normalise -> a video network, or several that vote -> logits.

Reads checkpoints of references/video_classification/train.py and the clips of tools/preprocess_and_save.py; writes
labels.txt and clip.json into the bundle that qai_hub_models makes. Any video network of torchvision's registry will do:
sizes, mean and std are those of the checkpoint's description of a clip.

$ python tools/example_export.py --checkpoint checkpoint.pth --data-dir preprocessed_tensors
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import common
from common import checkpoints
from common.calibration import Calibration, calibration_of

import torch
from qai_hub_models.utils.base_model import BaseModel
from qai_hub_models.utils.input_spec import ColorFormat, ImageMetadata, IoType, TensorSpec
from torchvision.models import get_model

from aihub import tensors
from torchvision_patches import clip, mirror
from torchvision_patches.videomae import VideoMAE

MODEL_ID = "qevd_r2plus1d"
# What several networks vote with. A mean of logits is one sum on the chip; a mean of probabilities needs a softmax of
# each network in integers, whose small values are lost.
VOTE_WITH = "logits"
WHAT_VOTERS_SHARE = tuple(field for field in clip.ClipDescription._fields if field != "model_name")


class Trained(NamedTuple):
    """A checkpoint's network, in evaluation mode, with what is known of it."""

    path: str
    sha256: str
    network: torch.nn.Module  # float (B, 3, T, H, W), normalised -> logits (B, num_classes)
    num_classes: int
    classes: list | None  # names in index order; None where neither checkpoint nor class_map.json has them
    description: clip.ClipDescription
    train_splits: tuple = ()  # folders that it was trained on, as far as its checkpoint says
    calibration: Calibration | None = None  # None where its checkpoint has none


def read_trained(path, num_classes=0, num_frames=0):
    """The Trained of a checkpoint. `num_classes` and `num_frames` 0 mean: what the checkpoint says.

    What the checkpoint does not say of its clips is assumed, and printed. Exits with code 2 and one sentence where the
    file cannot be used, or contradicts an argument.
    """
    advice = "name one that train.py wrote with --checkpoint, or export an untrained network with --random-weights"
    saved = checkpoints.load_checkpoint(path, advice)
    try:
        description, assumed = clip.described(saved, saved["args"])
        clip.of_network(description.model_name)  # is there such a network?
    except ValueError as e:
        common.refuse(f"{path} holds no network that can be used here ({e})")
    if num_frames and num_frames != description.clip_len:
        if saved.get("clip_len"):
            common.refuse(
                f"num_frames is {num_frames}, but {path} was trained with {description.clip_len} frames a clip"
            )
        # the original's --clip-len is 8 unless given, though its organisers export with 16
        if "clip_len" not in assumed:
            print(f"{path} says --clip-len {description.clip_len}, exported with num_frames = {num_frames}")
        description = description._replace(clip_len=num_frames)
        assumed = [field for field in assumed if field != "clip_len"]
    if assumed := [field for field in assumed if field != "rule_version"]:
        print(f"{path} does not say all of how its clips are made; assumed: {description.says(assumed)}")
    network = network_of(path, saved, description.model_name, num_classes)
    number = len(network.get_parameter(head_of(network)))
    classes = saved.get("classes") or common.official_classes(number)
    return Trained(str(path), common.sha256_of(path), network, number, classes, description,
                   tuple(saved.get("train_splits", ())), calibration_of(saved))  # fmt: skip


def untrained(name, num_frames=0, num_classes=0, seed=0):
    """The Trained of a network of the registry with random weights, the same for a seed; 0 means: as officially."""
    description = clip.of_network(name, num_frames or clip.OFFICIAL_CLIP_LEN)
    number = num_classes or len(common.load_class_map(common.REPO / "class_map.json"))
    torch.manual_seed(seed)
    network = for_devices(get_model(name, weights=None, num_classes=number).eval())
    return Trained("", "", network, number, common.official_classes(number), description)


def head_of(network):
    """The name of the weights of a network's last layer, say "fc.weight": those of its last child."""
    name, child = list(network.named_children())[-1]
    return f"{name}.{[own for own, parameter in child.named_parameters() if parameter.ndim > 1][-1]}"


def network_of(path, saved, name, num_classes):
    """The network `name` of the registry with a checkpoint's weights, in evaluation mode.

    `num_classes` 0 takes the checkpoint's. Exits with code 2 and one sentence where they contradict each other.
    """
    weights, names = saved["model"], saved.get("classes")
    with torch.device("meta"):
        head = head_of(get_model(name))
    if head not in weights:
        common.refuse(f"{path} has no weights of {name}'s last layer, {head}; it is no checkpoint of train.py")
    found = len(weights[head])
    if num_classes and num_classes != found:
        common.refuse(f"num_classes is {num_classes}, but {path} was trained with {found} classes")
    if names and len(names) != found:
        common.refuse(f"{path} names {len(names)} classes but its last layer has {found}")
    network = get_model(name, weights=None, num_classes=found)
    try:
        network.load_state_dict(weights)
    except RuntimeError as e:
        common.refuse(f"the weights in {path} do not fit {name}: {str(e).splitlines()[-1].strip()}")
    return for_devices(network.eval())


def for_devices(network):
    """The network with its average pool over all of time and space, if it has one, in an op that NPUs run faster."""
    pool = getattr(network, "avgpool", None)
    if isinstance(pool, torch.nn.AdaptiveAvgPool3d) and pool.output_size in (1, (1, 1, 1)):
        network.avgpool = MeanOverTimeAndSpace()
    return network


def check_voters(voters):
    """Exit with code 2 and one sentence unless all checkpoints take the same clips and tell the same classes apart."""
    first = voters[0]
    for number, voter in enumerate(voters):
        if differences := first.description.differences(voter.description, WHAT_VOTERS_SHARE):
            common.refuse(
                f"{first.path} and {voter.path} take different clips ({', '.join(differences)}): only networks of the "
                f"same clips vote in one model"
            )
        if first.num_classes != voter.num_classes:
            common.refuse(f"{first.path} has {first.num_classes} classes, {voter.path} {voter.num_classes}: no vote")
        if bool(first.classes) != bool(voter.classes):
            silent = (voter if first.classes else first).path
            common.refuse(f"{silent} does not name its classes, so nobody knows that they are those of the others")
        for i, (mine, theirs) in enumerate(zip(first.classes or (), voter.classes or ())):
            if mine != theirs:
                common.refuse(f"class {i} is {mine!r} in {first.path} and {theirs!r} in {voter.path}: no vote")
        for earlier in voters[:number]:
            if have_same_weights(earlier.network, voter.network):  # model_best.pth of the last epoch is another file
                common.refuse(f"{voter.path} is {earlier.path} once more: name it once, and let its weight be more")


def have_same_weights(network, other):
    ours, theirs = network.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def shares_of(weights, voters):
    """Each checkpoint's share of the vote, 1 in all. `weights` [] means: all alike. Exits with code 2 for bad ones."""
    weights = list(weights) or [1] * len(voters)
    try:
        weights = [float(weight) for weight in weights]
    except ValueError:
        common.refuse(f"weights are numbers, not {', '.join(map(str, weights))}")
    if len(weights) != len(voters) or not all(0 < weight < math.inf for weight in weights):
        common.refuse(f"there are {len(voters)} checkpoints and the weights {weights}: one above 0 for each is needed")
    return [weight / sum(weights) for weight in weights]


def bundle_of(networks):
    """What names a bundle of these networks of the registry."""
    name = networks[0] if len(networks) == 1 else f"{'_'.join(dict.fromkeys(networks))}_of_{len(networks)}"
    return MODEL_ID if name == clip.DEFAULT_MODEL else f"qevd_{name}"


class MeanOverTimeAndSpace(torch.nn.Module):
    """(B, C, T, H, W) -> (B, C). The same mean as torchvision's average pool, in an op that NPUs run faster."""

    def forward(self, x):
        return x.flatten(2).mean(2)


class QevdR2Plus1D(BaseModel):
    """What is exported. Input `video`: float32 (1, 3, T, H, W), RGB in [0, 1]; output: logits (1, num_classes).

    voters: [Trained], which share clips and classes. shares: of the vote, one each, 1 in all. mirrored: whether the
    mirror image of a clip is looked at, too. data_dir, calibration_dir: as from_pretrained has them.
    """

    def __init__(self, voters, shares=(1.0,), mirrored=False, data_dir="", calibration=("", 0)):
        super().__init__(torch.nn.ModuleList([voter.network for voter in voters]))
        self.voters, self.shares, self.mirrored = [voter._replace(network=None) for voter in voters], shares, mirrored
        first = voters[0]
        self.description, self.classes, self.num_classes = first.description, first.classes, first.num_classes
        self.data_dir = data_dir
        self.calibration_dir, self.num_calibration_clips = calibration
        # not named mean and std: torch.export 2.11 mistakes those for the methods (pytorch issue 168211)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.description, name)).view(1, 3, 1, 1, 1)
            self.register_buffer(f"input_{name}", values, persistent=False)
        self.normalises = not all(isinstance(network, VideoMAE) for network in self.model)
        if not self.normalises:
            for network in self.model:
                network.take_unnormalised(self.description.mean, self.description.std)
        if mirrored:
            self.prepare_mirror()

    def prepare_mirror(self):
        """Make what the mirrored look needs: the columns from right to left; of each class its mirror image's logit.

        A class that names a side has the logit of the other side in a mirror; where the other side is no class, the
        mirror image says nothing of it, and the clip as it is decides alone.
        """
        if not self.classes:
            common.refuse(f"{self.voters[0].path} does not name its classes, so nobody knows which of them name a side")
        images = mirror.seen_in_mirror(self.classes)
        shares = torch.tensor([[0.0 if image is None else 0.5 for image in images]])
        order = torch.tensor([i if image is None else image for i, image in enumerate(images)])
        # columns by their number, not `flip`: a slice of step -1 is no operation of every compiler
        columns = torch.arange(self.description.crop_size[1] - 1, -1, -1)
        for name, value in (("mirror_shares", shares), ("mirror_order", order), ("mirror_columns", columns)):
            self.register_buffer(name, value, persistent=False)

    @property
    def num_frames(self):
        return self.description.clip_len

    @property
    def bundle_id(self):
        """What names the bundle: the network, or how many vote."""
        return bundle_of([voter.description.model_name for voter in self.voters])

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: list = ("./checkpoint.pth",),
        num_classes: int = 0,
        num_frames: int = 0,
        weights: list = (),
        mirrored: bool = False,
        data_dir: str = "./preprocessed_tensors",
        calibration: tuple = ("./calibration_tensors", 100),
        random_weights: bool = False,
        built: BaseModel | None = None,
    ):
        """Build the model from checkpoint files, or untrained with `random_weights`.

        `checkpoint`: a path, or several of networks that vote, with `weights` of their votes ([]: all alike).
        `num_classes` and `num_frames` 0 mean: what the checkpoint says. `data_dir` holds the manifest of the clips that
        serve as sample inputs, "" means one random clip; `calibration`: the folder with those of training videos, and
        how many of them are used. `built`: a model that there is already, for the pipeline. Exits with code 2 and one
        sentence if a checkpoint cannot be used, or contradicts an argument or another one.
        """
        if built:
            return built
        if random_weights:
            voters = [untrained(clip.DEFAULT_MODEL, num_frames, num_classes)]
        else:
            paths = [checkpoint] if isinstance(checkpoint, (str, Path)) else checkpoint
            voters = [read_trained(path, num_classes, num_frames) for path in paths]
            check_voters(voters)
        return cls(voters, shares_of(weights, voters), mirrored, data_dir, calibration)

    def about(self):
        """What later steps must know of the model, as JSON holds it: its clips, classes and checkpoints.

        checkpoint and checkpoint_sha256 are text, or lists where several vote. temperature and threshold are those of
        the checkpoint; of several that vote only where all agree, because a vote is surer or less sure than each.
        """
        calibrations = {voter.calibration for voter in self.voters}
        agreed = calibrations.pop() if len(calibrations) == 1 else None
        paths, hashes = ([getattr(voter, field) for voter in self.voters] for field in ("path", "sha256"))
        one = len(paths) == 1
        return {
            "clip": self.description.as_dict(),
            "classes": self.classes,
            "checkpoint": paths[0] if one else paths,
            "checkpoint_sha256": hashes[0] if one else hashes,
            "train_splits": sorted({split for voter in self.voters for split in voter.train_splits}),
            "weights": list(self.shares),
            "vote_with": VOTE_WITH,
            "mirrored": self.mirrored,
            **(agreed._asdict() if agreed else {}),
        }

    def vote(self, clips):
        """Clips as the networks take them -> the mean of their logits, by their shares."""
        if len(self.model) == 1:
            return self.model[0](clips)
        return sum(share * network(clips) for share, network in zip(self.shares, self.model))

    def forward(self, video):
        """Float (B, 3, T, H, W), RGB in [0, 1] -> logits (B, num_classes)."""
        clips = (video - self.input_mean) / self.input_std if self.normalises else video
        logits = self.vote(clips)
        if not self.mirrored:
            return logits
        image = self.vote(clips.index_select(4, self.mirror_columns)).index_select(1, self.mirror_order)
        return logits * (1 - self.mirror_shares) + image * self.mirror_shares

    def get_input_spec(self):
        return {
            "video": TensorSpec(
                shape=(1, 3, self.num_frames, *self.description.crop_size),
                dtype="float32",
                description="RGB clip, not normalised",
                io_type=IoType.IMAGE,
                value_range=(0.0, 1.0),
                image_metadata=ImageMetadata(color_format=ColorFormat.RGB),
                # as in every release of the package: runtimes that work channel last take (1, T, H, W, 3)
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
        rows = tensors.class_balanced(common.read_manifest(Path(self.data_dir, "manifest.jsonl")), 8)
        return {"video": [tensors.read_clip(self.data_dir, row, shape) for row in rows]}

    def get_calibration_dataset_cls(self):
        """A dataset class of this model's own clips; the pipeline instantiates it without arguments of ours."""
        folder, shape = self.calibration_dir, self.get_input_spec()["video"].shape
        rows = tensors.calibration_rows(folder, self.num_calibration_clips, self.classes, self.description)

        class CalibrationClips(torch.utils.data.Dataset):
            """Exactly these clips: the pipeline would draw at random from more and lose the balance."""

            def __init__(self, split):
                pass

            def __len__(self):
                return len(rows)

            def __getitem__(self, i):
                return tensors.read_clip(folder, rows[i], shape)[0], rows[i]["label"]

            @staticmethod
            def default_num_calibration_samples():
                return len(rows)

        return CalibrationClips

    def write_supplementary_files(self, output_dir, metadata):
        """Write labels.txt, one class name a line in index order, and clip.json, what `about` says, into the bundle."""
        if self.classes:
            Path(output_dir, "labels.txt").write_text("\n".join(self.classes) + "\n", encoding="utf-8")
            metadata.supplementary_files["labels.txt"] = "class names, line i names logit i"
        Path(output_dir, "clip.json").write_text(json.dumps(self.about(), indent=2) + "\n", encoding="utf-8")
        metadata.supplementary_files["clip.json"] = "how a clip is made that the model takes, and of which checkpoint"
