"""What a teacher says of each clip: logits computed once by `train.py --test-only --save-logits`, or by any network.

FILE, a .npy: float16 (windows, classes), NaN where nothing is known yet. FILE.json beside it: {"classes": names in the
order of the logits, "clip_len": frames, "frame_rate": fps, "rule_version": of the rule that picks frames, "views": how
many views were averaged, "made_with": the teacher, "videos": {"<class>/<video>.mp4": [row of its first window, number
of windows]}}; what train.py writes has all of the teacher's ClipDescription. The windows of a video are all runs of
`clip_len` frames in its resampled grid, one frame apart: `VideoClips.compute_clips_for_video` lists them.
190,254 videos of QEVD have 1.3 million windows: 245 MB.
"""

import json
import os
import time
from pathlib import Path

import common

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import datasets
import models
import presets
import processes
import settings
import transforms
import utils

OF_WINDOWS = ("clip_len", "frame_rate", "rule_version")  # what of a clip's description says which windows there are
SAVE_EVERY = 60  # s between two moments at which what was computed is surely on the disk


class Distillation(torch.nn.Module):
    """(1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher, student) at temperature T (Hinton et al., 2015).

    output: logits (N, classes). labels, teacher: float (N, classes), probabilities, the teacher's at that temperature.
    What a row of `teacher` lacks to 1 is the share of a clip, mixed or not, that no teacher knows: it learns from
    its label alone, by the cross-entropy in full.
    """

    def __init__(self, alpha, temperature, label_smoothing=0.0):
        super().__init__()
        self.alpha, self.temperature, self.label_smoothing = alpha, temperature, label_smoothing

    def forward(self, output, labels, teacher):
        hard = F.cross_entropy(output, labels, label_smoothing=self.label_smoothing, reduction="none")
        soft = F.kl_div((output / self.temperature).log_softmax(1), teacher, reduction="none").sum(1)
        return ((1 - self.alpha * teacher.sum(1)) * hard + self.alpha * self.temperature**2 * soft).mean()


def probabilities(logits, temperature):
    """Logits of several teachers (N, teachers, classes), NaN where one is not known -> the mean of what they say.

    Returns float32 (N, classes): softmax at that temperature, or all 0 where no teacher knows the clip.
    """
    each = (logits.float() / temperature).softmax(2)
    known = each.isfinite().all(2, keepdim=True)
    return torch.where(known, each, 0.0).sum(1) / known.sum(1).clamp(min=1)


def videos_of(dataset, split_folder):
    """{path of a video below the split's folder: [its first window, number of windows]}, as FILE.json has it."""
    names = [os.path.relpath(path, split_folder).replace(os.sep, "/") for path, _ in dataset.samples]
    return dict(zip(names, map(list, zip(dataset.starts.tolist(), dataset.counts.tolist()))))


# --- reading --------------------------------------------------------------------------------------------------------


class Teachers:
    """The logits of one or more files for the windows of a dataset; worker processes map the files into memory."""

    def __init__(self, paths, dataset, split_folder, classes, args):
        """Exits with code 2 as `read_about` does, or if a file has none of the videos; names what it lacks."""
        self.paths, self.first, self.starts, self.tables = list(paths), [], dataset.starts, None
        ours = videos_of(dataset, split_folder)
        for path in self.paths:
            about = read_about(path, classes, args)
            theirs, rows = about["videos"], []
            for name, (_, count) in ours.items():
                first, windows = theirs.get(name, (0, -1))
                rows.append(first if windows == count else -1)
            lacking = [name for name, row in zip(ours, rows) if row < 0 and ours[name][1]]
            foreign = theirs.keys() - ours.keys()
            utils.log(f"{path}: logits for {len(ours) - len(lacking):,} of {len(ours):,} videos")
            if lacking:
                utils.log(f"  {len(lacking):,} videos have none and learn from their label alone, first {lacking[0]}")
            if foreign:
                utils.log(f"  {len(foreign):,} of its videos are not here, first {min(foreign)}")
            if len(lacking) == len(ours):
                common.refuse(f"{path} has logits for none of the videos of {split_folder}")
            self.first.append(torch.tensor(rows))

    def __getstate__(self):
        return self.__dict__ | {"tables": None}  # a mapped file would be sent as a copy

    def of(self, clip_idx, video_idx):
        """The logits of a clip: float16 (teachers, classes), NaN where a file has none."""
        if self.tables is None:
            self.tables = [np.load(path, mmap_mode="r") for path in self.paths]
        window = clip_idx - int(self.starts[video_idx])
        rows = [int(first[video_idx]) for first in self.first]
        nothing = np.full(self.tables[0].shape[1], np.nan, np.float16)
        found = [table[row + window] if row >= 0 else nothing for table, row in zip(self.tables, rows)]
        return torch.from_numpy(np.stack(found))


def read_about(path, classes, args):
    """What FILE.json says; exits with code 2 if it cannot be read, or was made for other classes or clips."""
    try:
        about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        shape = np.load(path, mmap_mode="r").shape
        if not isinstance(about.get("videos"), dict) or shape[1] != len(about["classes"]):
            raise ValueError("its two files do not fit together")
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as e:
        common.refuse(f"the teacher's logits {path} cannot be used ({e}); train.py --save-logits makes such a file")
    wanted = {"classes": classes, **{field: getattr(settings.clip_of_run(args), field) for field in OF_WINDOWS}}
    for key in (key for key, value in wanted.items() if about.get(key) != value):
        common.refuse(f"{path} has logits for another {key} than this run; let the teacher make them anew")
    return about


# --- writing --------------------------------------------------------------------------------------------------------


def open_table(path, about, windows):
    """The file to fill, mapped for writing; what an earlier run has computed stays.

    Exits with code 2 if it holds other logits, or cannot be written.
    """
    description = Path(f"{path}.json")
    try:
        if description.exists() and Path(path).exists():
            before = json.loads(description.read_text(encoding="utf-8"))
            for key in (key for key in about if before.get(key) != about[key]):
                common.refuse(f"{path} holds logits of another {key}: name another file, or delete it")
            return np.load(path, mmap_mode="r+")
        table = np.lib.format.open_memmap(path, "w+", np.float16, (windows, len(about["classes"])))
        table[:] = np.nan
        table.flush()
        common.write_text(description, json.dumps(about) + "\n")
        return table
    except (OSError, ValueError) as e:
        common.refuse(f"{path} cannot be written ({getattr(e, 'strerror', None) or e})")


def save_logits(model, class_map, held_out, bad_videos, args):
    """What the network says of all windows of --split, the mean over --views, into --save-logits.

    Every process computes, the first one writes. Killed and started again, it goes on.
    """
    preset = presets.for_validation(args, at_random=args.views > 1)
    dataset = datasets.load_dataset(args.split, class_map, preset, bad_videos, args, held_out)
    classes = sorted(class_map, key=class_map.get)
    dataset.replace_bad = False
    about = settings.clip_of_run(args).as_dict() | {"classes": classes, "views": args.views}
    about["made_with"] = f"{args.model}, {common.sha256_of(args.resume)[:16]}"
    about["videos"] = videos_of(dataset, Path(dataset.samples[0][0]).parents[1])  # held-out ones lie in train, too
    flip = transforms.RandomHorizontalFlip(classes, args.hflip_prob if args.views > 1 else 0.0).to(args.device)
    normalize = transforms.Normalize(args.mean, args.std).to(args.device)

    table = open_table(args.save_logits, about, len(dataset)) if processes.is_main_process() else None
    todo = processes.from_main_process(lambda: np.isnan(table[:, 0]).nonzero()[0])
    utils.log(f"{args.save_logits}: {len(dataset) - len(todo):,} of {len(dataset):,} windows are there")
    if not len(todo):
        return
    bad_videos.start(len(todo) * args.views)
    own = todo[np.arange(args.rank, len(todo) + args.rank, args.world_size) % len(todo)]  # as many in each process
    sampler = [(int(window), view) for window in own for view in range(args.views)]
    loader = datasets.make_loader(dataset, sampler, args)
    views, saved = {}, time.monotonic()
    for batch in utils.MetricLogger().log_every(loader, args.print_freq, "Logits:"):
        bad_videos.report(batch.failures)
        logits = torch.empty(0)
        if len(batch.clips):
            clips = transforms.as_float(batch.clips.to(args.device, non_blocking=True))
            logits = predict(model, normalize(flip(clips, batch.labels.to(args.device))), args)
        for window, row in zip(*gathered(batch.clip_idx.tolist(), logits, args)):
            views.setdefault(window, []).append(row)
            if len(views[window]) == args.views:
                table[window] = torch.stack(views.pop(window)).mean(0).half().numpy()
        if table is not None and time.monotonic() - saved > SAVE_EVERY:
            table.flush()
            saved = time.monotonic()
    if table is not None:
        table.flush()
        left = int(np.isnan(table[:, 0]).sum())
        print(f"{args.save_logits}: {len(dataset) - left:,} of {len(dataset):,} windows; {left:,} did not decode")


@torch.inference_mode()
def predict(model, clips, args):
    """Logits, float32 (N, classes) on the CPU, of clips that are normalised."""
    device_type = torch.device(args.device).type
    with torch.autocast(device_type, models.amp_dtype(args), enabled=args.amp):
        return model.eval()(clips.to(memory_format=torch.channels_last_3d)).float().cpu()


def gathered(windows, logits, args):
    """All processes' windows and logits in the first process; nothing in the others."""
    if not args.distributed:
        return windows, logits
    parts = [None] * args.world_size if args.rank == 0 else None
    dist.gather_object((windows, logits), parts)
    parts = parts or []
    return [window for part in parts for window in part[0]], [row for part in parts for row in part[1]]
