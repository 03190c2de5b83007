"""Clips of a folder of videos, DATA_PATH/<split>/<class>/<video>.mp4, with class indices from the class map."""

import csv
import hashlib
import json
import math
import os
import shlex
import socket
from collections import Counter
from itertools import chain, islice, zip_longest
from pathlib import Path

import common
from common import finding

import torch
from torch.utils.data import DataLoader, Sampler, default_collate, get_worker_info
from torchvision.datasets import VisionDataset

import frame_cache
import utils
from torchvision_patches.video_utils import UnreadableVideo, VideoClips, index_videos, stamp

MAX_REPLACEMENTS = 10  # clips that are tried in place of one that does not decode
MAX_WORKERS = 1024  # of one loader

# run on the dataset's root: the class folders of both splits, no files and no hidden folders
MAP_FROM_FOLDERS = (
    "python -c 'import json, pathlib, sys; "
    'splits = [pathlib.Path(sys.argv[1], split) for split in ("train", "val")]; '
    'names = sorted({f.name for split in splits for f in split.glob("[!.]*") if f.is_dir()}); '
    "print(json.dumps({name: i for i, name in enumerate(names)}))'"
)


def list_videos(data_path, split, class_map, class_map_path):
    """The videos of a split: a sorted list of (path, class index). A class without a folder or videos is no error.

    Exits with code 2 if the split is missing or empty, or has a folder that the class map does not know.
    """
    folder = Path(data_path) / split
    if not folder.is_dir():
        common.refuse(
            f"there is no folder {folder}; --data-path is the folder that holds train/ and val/, which "
            f"tools/refactor_dataset.py makes of QEVD and tools/split_videos.py of videos of your own"
        )
    folders = finding.class_folders(folder)
    unknown = [name for name in folders if name not in class_map]
    if unknown:
        what = f"{folder} has {len(unknown)} class folders that are not in {class_map_path}, the first is {unknown[0]}"
        if own := common.class_map_with(folders):
            common.refuse(f"{what}; {own} has them: add --class-map {own}")
        common.refuse(
            f"{what}. Move them away, or, if these are your own classes, name their map with --class-map; "
            f"tools/split_videos.py writes one, and so does this:\n"
            f"  {MAP_FROM_FOLDERS} {shlex.quote(str(data_path))} > my_class_map.json"
        )
    found = finding.find_videos(folder)
    paths = sorted(tuple(path.split("/")) for path in found.videos)  # by class: "-" comes before "/"
    samples = [(str(folder / name / video), class_map[name]) for name, video in paths]
    if found.misplaced:
        print(f"{split}: {len(found.misplaced):,} videos are not in a class folder itself and left out")
    if found.failures:
        first, reason = min(found.failures.items())
        print(f"{split}: {len(found.failures):,} names are left out, the first is {folder / first}: {reason}")
    empty = sorted(set(folders) - {name for name, _ in paths})
    if empty:
        print(f"{split}: no video in {len(empty):,} class folders: {', '.join(empty)}")
    if not samples:
        common.refuse(f"{folder} has no videos; it must hold <class>/<video>.mp4")
    return samples


def videos_of_split(split, class_map, args):
    """The videos of train or val, a list of (path, class index), as --train-splits, --extra-data and --hold-out say.

    Exits with code 2 if an extra video is one of val, by its content; one that train has already is left out and named.
    """
    if split == "val" and not args.hold_out:
        return list_videos(args.data_path, "val", class_map, args.class_map)
    samples = [
        pair for name in args.train_splits for pair in list_videos(args.data_path, name, class_map, args.class_map)
    ]
    held_out = set(hold_out(samples, args.hold_out, read_groups(args.groups), args.seed))
    if split == "val":
        return sorted(held_out)
    val = held_out
    if args.extra_data and not args.hold_out:
        val = list_videos(args.data_path, "val", class_map, args.class_map)
    samples = [pair for pair in samples if pair not in held_out]
    for root in args.extra_data:
        extra = list_videos(root, "train", class_map, args.class_map)
        for path, same in duplicates(extra, val):
            common.refuse(f"{path} is {same}, a video to validate on: take it out of {root}")
        known = duplicates(extra, samples)
        if known:
            (path, same), *_ = known
            print(f"{len(known):,} videos of {root} are in train already and left out, the first is {path}, as {same}")
        left_out = {path for path, _ in known}
        samples += [pair for pair in extra if pair[0] not in left_out]
    return samples


def read_groups(path):
    """{video: group} of a CSV with these two columns, without a header; {} without a file.

    A video is named by its path below the split, its file name, or that without its ending.
    """
    if not path:
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return dict(row for row in csv.reader(file) if row)
    except (OSError, ValueError) as e:
        common.refuse(f"{path} is no table of `video,group`: {getattr(e, 'strerror', None) or e}")


def hold_out(samples, share, group_of, seed):
    """A part of the videos, at least `share` of each class, that has no group in common with the others.

    A video without a group is one of its own. A group is left where it is the last one of a class.
    """
    groups = {}
    for path, label in samples if share else ():
        names = "/".join(Path(path).parts[-2:]), Path(path).name, Path(path).stem
        group = next((group_of[name] for name in names if name in group_of), path)
        groups.setdefault(group, []).append((path, label))
    total, held, chosen = Counter(label for _, label in samples), Counter(), []
    # a draw that depends on the names alone, not on their order or number
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"{seed} {Path(group).name}".encode()).digest()):
        labels = Counter(label for _, label in groups[group])
        wanted = any(held[label] < share * total[label] for label in labels)
        if wanted and all(held[label] + count < total[label] for label, count in labels.items()):
            held += labels
            chosen += groups[group]
    return chosen


def duplicates(samples, others):
    """[(path, path in others)] of the samples whose file is also one of the others, by size and then content."""
    of_size = {}
    for path, _ in others:
        of_size.setdefault(stamp(path)[0], []).append(path)
    of_size.pop(-1, None)  # files that cannot be looked at
    found = []
    for path, _ in samples:
        digest = None
        for other in of_size.get(stamp(path)[0], ()):
            digest = digest or common.sha256_of(path)
            if digest == common.sha256_of(other):
                found.append((path, other))
                break
    return found


def refuse_other_videos(samples, own_samples, split):
    """Exit with code 2 and the first difference, unless this machine has the videos and labels of the first one."""
    for first, own in zip_longest(samples, own_samples):
        if first != own:
            first, own = (f"{pair[0]} (class {pair[1]})" if pair else "no more" for pair in (first, own))
            common.refuse(
                f"{split} is not the same on all machines: {socket.gethostname()} has {own} where the first process "
                f"has {first}; give them the same folders and class map"
            )


class KineticsWithVideoId(VisionDataset):
    """Clips of a split in Kinetics' folder layout, each with the number of its video.

    torchvision's own Kinetics numbers the classes by the folders it meets and stops at an empty one; here the class
    map numbers them. Items are asked for by (clip index, seed); all randomness of an item comes from its seed.
    An item is (clip, class index, video index, failures), with `teachers` (clip, (class index, float16 (teachers,
    classes)), …): clip is what `transform` makes of uint8 (T, H, W, 3), or
    None if nothing could be decoded; failures lists the UnreadableVideo met on the way. With `replace_bad`, a clip
    that does not decode is replaced by one of another video of the same class.

    `labels`, `counts` and `starts`: int64 (videos,), class index, number of clips and first clip of each. Workers read
    these: of a list, each would in time copy the pages that hold its items' reference counts.
    """

    def __init__(self, root, samples, video_clips, transform, replace_bad=False):
        super().__init__(root, transform=transform)
        self.samples, self.video_clips, self.replace_bad = samples, video_clips, replace_bad
        ends = torch.tensor(video_clips.cumulative_sizes)
        self.starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.counts = ends - self.starts
        self.labels = torch.tensor([label for _, label in samples])
        usable = self.counts.nonzero()[:, 0]
        self.by_label = usable[self.labels[usable].argsort(stable=True)]  # usable videos in the order of their labels
        if not len(usable):
            common.refuse(f"no video under {root} can be read; tools/check_videos.py says what is wrong with each")
        self.teachers = None  # of --teacher-logits
        self.current = torch.full((MAX_WORKERS,), -1).share_memory_()  # the video that each worker is reading

    def __len__(self):
        return int(self.counts.sum())

    def summary(self):
        """The number of videos and clips, and a hash of each video's path below the root, class and clip count."""
        below = {folder: os.path.relpath(folder, self.root) for folder in {os.path.dirname(p) for p, _ in self.samples}}
        names = [os.path.join(below[os.path.dirname(path)], os.path.basename(path)) for path, _ in self.samples]
        rows = list(zip(names, self.labels.tolist(), self.counts.tolist()))
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        return f"{len(rows)} videos with {len(self)} clips ({digest})"

    def replacements(self, video_idx):
        """Yield clips of other videos of the same class, in random order."""
        labels, label = self.labels[self.by_label], self.labels[video_idx]
        first, end = (torch.searchsorted(labels, label, right=right) for right in (False, True))
        videos = self.by_label[first:end]
        for other in videos[torch.randperm(len(videos))].tolist():
            if other != video_idx:
                yield int(self.starts[other] + torch.randint(self.counts[other], ()))

    def being_read(self):
        """The paths of the videos that workers were reading last, or are."""
        return [self.samples[video_idx][0] for video_idx in self.current.tolist() if video_idx >= 0]

    def __getitem__(self, clip_and_seed):
        clip_idx, seed = clip_and_seed
        video_idx, _ = self.video_clips.get_clip_location(clip_idx)
        worker = get_worker_info()
        self.current[worker.id if worker else 0] = video_idx
        label, failures = int(self.labels[video_idx]), []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU as well
            others = islice(self.replacements(video_idx), MAX_REPLACEMENTS) if self.replace_bad else ()
            for candidate in chain([clip_idx], others):
                try:
                    video, _, _, video_idx = self.video_clips.get_clip(candidate)
                    target = (label, self.teachers.of(candidate, video_idx)) if self.teachers else label
                    return self.transform(video), target, video_idx, failures
                except UnreadableVideo as e:
                    failures.append(e)
        return None, label, video_idx, failures


def collate_fn(items):
    """Items -> clips (N, …), class indices int64 (N,), video indices int64 (N,), failures.

    With teachers, the second is [class indices, float16 (N, teachers, classes)].

    Items without a clip are left out, so N may be less than the batch size, and 0.
    """
    failures = [failure for item in items for failure in item[3]]
    good = [item[:3] for item in items if item[0] is not None]
    if not good:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), failures
    clips, targets, video_idx = zip(*good)
    # in a worker default_collate puts them into shared memory at once; torch.stack would make a copy that is copied
    return default_collate(clips), default_collate(targets), torch.tensor(video_idx), failures


class TrainSampler(Sampler):
    """The clips of an epoch in random order, this process's share of them, each with a seed of its own.

    `clips_per_video` different clips of each video, or all where it has fewer. Everything follows from (seed, epoch):
    not from workers, processes, or whether the run was interrupted. Shares are made equally long by repeating the first
    clips, because every process must take part in every step. `balanced` draws clips, with replacement, so that all
    classes are equally likely. As torchvision's RandomClipSampler draws them, but without a loop over the videos.
    """

    def __init__(self, dataset, clips_per_video, seed, rank=0, world_size=1, balanced=False):
        self.dataset, self.clips_per_video, self.balanced = dataset, clips_per_video, balanced
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        total = int(dataset.counts.clamp(max=clips_per_video).sum())
        self.length = math.ceil(total / world_size)  # asked for at each step: it must not be computed anew

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def draw(self, generator):
        """Clips of all videos, at most `clips_per_video` of each, and their labels: two int64 (clips,), in order."""
        counts, starts, chosen = self.dataset.counts, self.dataset.starts, []
        for k in reversed(range(self.clips_per_video)):
            # Floyd's way: one of the clips up to the last but k, or that one itself if it is taken
            last = counts - 1 - k
            drawn = (torch.rand(len(counts), dtype=torch.float64, generator=generator) * (last + 1)).long()
            for earlier in chosen:
                drawn = torch.where(drawn == earlier, last, drawn)
            chosen.append(torch.where(last >= 0, drawn, -1))
        chosen = torch.stack(chosen, 1)
        labels = self.dataset.labels[:, None].expand_as(chosen)
        return (starts[:, None] + chosen)[chosen >= 0], labels[chosen >= 0]

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + 1000 * self.epoch)
        clips, labels = self.draw(generator)
        if self.balanced:
            weights = 1 / labels.bincount()[labels]
            clips = clips[torch.multinomial(weights, len(clips), replacement=True, generator=generator)]
        else:
            clips = clips[torch.randperm(len(clips), generator=generator)]
        clips = clips[torch.arange(self.length * self.world_size) % len(clips)]
        seeds = torch.randint(2**62, (len(clips),), generator=generator)
        own = slice(self.rank, None, self.world_size)
        for pair in zip(clips[own].split(4096), seeds[own].split(4096)):  # never an object for each clip at once
            yield from zip(*(part.tolist() for part in pair))


def val_clips(dataset, clips_per_video, rank=0, world_size=1):
    """`clips_per_video` clips of each video, evenly spread: this process's share, every clip in exactly one share.

    As torchvision's UniformClipSampler takes them, in whole numbers. Returns a list of (clip index, seed 0), for use as
    a sampler. It may be empty.
    """
    usable = dataset.counts > 0
    places = torch.arange(clips_per_video) * (dataset.counts[usable, None] - 1) // max(1, clips_per_video - 1)
    clips = (dataset.starts[usable, None] + places).flatten()
    return [(clip, 0) for clip in clips[rank::world_size].tolist()]


def load_dataset(split, class_map, preset, sizes, bad_videos, args, promised=0):
    """Index a split, print its data card and return it as a dataset.

    preset: a class of presets.py; sizes: what it takes; promised: bytes that another split will add to --cache-frames.
    """
    name = "hold_out" if split == "val" and args.hold_out else split
    cache_file = Path(args.data_path) / f"{name}.index.npz" if args.cache_dataset else None
    if cache_file and not cache_file.exists() and not os.access(args.data_path, os.W_OK):
        common.refuse(
            f"--cache-dataset keeps the index in {cache_file}, and that folder is not writable: leave it away"
        )

    def listed():
        return videos_of_split(split, class_map, args)

    def read():
        samples = listed()
        paths = [path for path, _ in samples]
        return samples, index_videos(paths, args.workers, cache_file, args.data_path)

    # videos and labels come from one process, so that they cannot be mixed up
    samples, metadata = utils.from_main_process(read)
    if args.rank and args.local_rank == 0:
        refuse_other_videos(samples, listed(), split)
    bad_videos.check(len(metadata["unreadable"]), len(samples), f"videos of {split}")
    if args.cache_frames:
        folder = "train" if args.hold_out else split
        roots = Path(args.data_path, folder), Path(args.cache_frames, folder)
        clips = frame_cache.CachedVideoClips(metadata, args.clip_len, args.frame_rate, *roots, sizes["resize_size"])
    else:
        clips = VideoClips(metadata["video_paths"], args.clip_len, 1, args.frame_rate, metadata)
    clips.rotate = args.rotate
    transform = preset(**sizes, resized=bool(args.cache_frames))
    dataset = KineticsWithVideoId(args.data_path, samples, clips, transform, replace_bad=split == "train")
    print_data_card(split, dataset, class_map, args)
    if args.cache_frames:
        if args.local_rank == 0:  # in one process of each machine: the folder may be on a disk of its own
            frame_cache.prepare(clips, split, promised)
        done = torch.zeros((), device=args.device)
        utils.reduce_across_processes(done)
        done.item()  # until then the others wait
    return dataset


def name_untrained_classes(train, val, classes):
    """Say which classes have videos to validate on and none to learn from."""
    missing = set(val.labels.tolist()) - set(train.labels[train.counts > 0].tolist())
    if missing:
        names = ", ".join(classes[label] for label in sorted(missing))
        utils.log(f"{len(missing):,} classes of val have no training video that can be read: {names}")


def print_data_card(split, dataset, class_map, args):
    clips = dataset.video_clips
    lengths = [len(pts) / fps for pts, fps in zip(clips.video_pts, clips.video_fps) if len(pts)]
    counts = Counter(label for _, label in dataset.samples).most_common()
    names = sorted(class_map, key=class_map.get)
    (most, most_count), (least, least_count) = counts[0], counts[-1]
    short = sum(length * args.frame_rate < args.clip_len for length in lengths)
    k = args.clips_per_video  # of a video with fewer clips training takes each once, validation some twice
    taken = int(k * (dataset.counts > 0).sum() if split == "val" else dataset.counts.clamp(max=k).sum())
    taker = "validation" if split == "val" else "an epoch"
    utils.log(
        f"{split}: {len(dataset.samples):,} videos, {len(clips.unreadable)} unusable; of their {len(dataset):,} clips "
        f"of {args.clip_len} frames at {args.frame_rate:g} fps {taker} takes {k} a video (--clips-per-video), in all "
        f"{taken:,}; videos of {min(lengths):.1f} to {max(lengths):.1f} s, "
        f"{short:,} too short for a clip and so sampled faster; {len(counts)} of {len(names)} classes, "
        f"from {least_count:,} videos ({names[least]}) to {most_count:,} ({names[most]})"
    )


def make_loader(dataset, sampler, args):
    return DataLoader(
        dataset,
        args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        collate_fn=collate_fn,
        pin_memory="cuda" in args.device,
        timeout=utils.STALLED if args.workers else 0,
        persistent_workers=args.workers > 0,
        # a generator of its own: starting workers draws a number, and an interrupted run starts them more often
        generator=torch.Generator(),
    )
