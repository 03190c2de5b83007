"""Clips of a folder of videos, DATA_PATH/<split>/<class>/<video>.mp4, with class indices from the class map."""

import hashlib
import json
import math
import os
from collections import Counter
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from torch.utils.data import Sampler, WeightedRandomSampler
from torchvision.datasets import VisionDataset
from torchvision.datasets.samplers import RandomClipSampler, UniformClipSampler

import common
import frame_cache
import utils
from torchvision_patches.video_utils import VIDEO_EXTENSIONS, UnreadableVideo, VideoClips, index_videos

MAX_REPLACEMENTS = 10  # clips that are tried in place of one that does not decode

MAP_FROM_FOLDERS = (
    "python -c 'import json, os, sys; print(json.dumps({c: i for i, c in enumerate(sorted(os.listdir(sys.argv[1])))}))'"
)


def list_videos(data_path, split, class_map, class_map_path):
    """The videos of a split: a sorted list of (path, class index). A class without a folder or videos is no error.

    Exits with code 2 if the split is missing or empty, or has a folder that the class map does not know.
    """
    folder = Path(data_path) / split
    if not folder.is_dir():
        common.refuse(f"there is no folder {folder}; --data-path is the folder that holds train/ and val/")
    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    unknown = [f.name for f in folders if f.name not in class_map]
    if unknown:
        common.refuse(
            f"{folder} has {len(unknown)} class folders that are not in {class_map_path}, the first is {unknown[0]}. "
            f"Move them away, or, if these are your own classes, make a map of them and name it with --class-map:\n"
            f"  {MAP_FROM_FOLDERS} {Path(data_path) / 'train'} > my_class_map.json"
        )
    samples, nested = [], 0
    for class_folder in folders:
        for parent, _, files in os.walk(class_folder):
            videos = [f for f in files if Path(f).suffix.lower() in VIDEO_EXTENSIONS and not f.startswith(".")]
            if parent == str(class_folder):
                samples += [(str(class_folder / video), class_map[class_folder.name]) for video in sorted(videos)]
            else:
                nested += len(videos)
    if nested:
        utils.log(f"{split}: {nested:,} videos in folders below the class folders are left out")
    if not samples:
        common.refuse(f"{folder} has no videos; it must hold <class>/<video>.mp4")
    return samples


def index_split(samples, num_workers, cache_file, root):
    """The frame times of all videos of a split; under torchrun read once, by the first process, for all."""
    paths = [path for path, _ in samples]
    return utils.from_main_process(lambda: index_videos(paths, num_workers, cache_file, root))


class KineticsWithVideoId(VisionDataset):
    """Clips of a split in Kinetics' folder layout, each with the number of its video.

    torchvision's own Kinetics numbers the classes by the folders it meets and stops at an empty one; here the class
    map numbers them. Items are asked for by (clip index, seed); all randomness of an item comes from its seed.
    An item is (clip, class index, video index, failures): clip is what `transform` makes of uint8 (T, H, W, 3), or
    None if nothing could be decoded; failures lists the UnreadableVideo met on the way. With `replace_bad`, a clip
    that does not decode is replaced by one of another video of the same class.
    """

    def __init__(self, root, samples, video_clips, transform, replace_bad=False):
        super().__init__(root, transform=transform)
        self.samples, self.video_clips, self.replace_bad = samples, video_clips, replace_bad
        self.videos_of = {}
        for video_idx, (_, label) in enumerate(samples):
            if len(self.video_clips.clips[video_idx]):
                self.videos_of.setdefault(label, []).append(video_idx)
        if not self.videos_of:
            common.refuse(f"no video under {root} can be read; tools/check_videos.py says what is wrong with each")

    def __len__(self):
        return self.video_clips.num_clips()

    def summary(self):
        """The number of videos and clips, and a hash of each video's path below the root, class and clip count."""
        clips = zip(self.samples, self.video_clips.clips)
        rows = [(os.path.relpath(path, self.root), label, len(of_video)) for (path, label), of_video in clips]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        return f"{len(rows)} videos with {len(self)} clips ({digest})"

    def random_clip_of(self, video_idx):
        """The index of one of a video's clips."""
        count = len(self.video_clips.clips[video_idx])
        return self.video_clips.cumulative_sizes[video_idx] - 1 - int(torch.randint(count, ()))

    def replacements(self, clip_idx):
        """Yield clips of other videos of the same class, in random order."""
        video_idx, _ = self.video_clips.get_clip_location(clip_idx)
        videos = self.videos_of[self.samples[video_idx][1]]
        for i in torch.randperm(len(videos)).tolist():
            if videos[i] != video_idx:
                yield self.random_clip_of(videos[i])

    def __getitem__(self, clip_and_seed):
        clip_idx, seed = clip_and_seed
        video_idx, _ = self.video_clips.get_clip_location(clip_idx)
        label, failures = self.samples[video_idx][1], []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU as well
            others = islice(self.replacements(clip_idx), MAX_REPLACEMENTS) if self.replace_bad else ()
            for candidate in chain([clip_idx], others):
                try:
                    video, _, _, video_idx = self.video_clips.get_clip(candidate)
                    return self.transform(video), label, video_idx, failures
                except UnreadableVideo as e:
                    failures.append(e)
        return None, label, video_idx, failures


def collate_fn(items):
    """Items -> clips (N, …), class indices int64 (N,), video indices int64 (N,), failures.

    Items without a clip are left out, so N may be less than the batch size, and 0.
    """
    failures = [failure for item in items for failure in item[3]]
    good = [item[:3] for item in items if item[0] is not None]
    if not good:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), failures
    clips, targets, video_idx = zip(*good)
    return torch.stack(clips), torch.tensor(targets), torch.tensor(video_idx), failures


class TrainSampler(Sampler):
    """The clips of an epoch in random order, this process's share of them, each with a seed of its own.

    Everything follows from (seed, epoch): not from workers, processes, or whether the run was interrupted. Shares are
    made equally long by repeating the first clips, because every process must take part in every step. `balanced`
    draws clips, with replacement, so that all classes are equally likely.
    """

    def __init__(self, dataset, clips_per_video, seed, rank=0, world_size=1, balanced=False):
        self.dataset, self.clips_per_video, self.balanced = dataset, clips_per_video, balanced
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.clips = RandomClipSampler(dataset.video_clips, clips_per_video)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return math.ceil(len(self.clips) / self.world_size)

    def __iter__(self):
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU as well, and all processes' alike
            torch.default_generator.manual_seed(self.seed + 1000 * self.epoch)
            clips = list(self.clips)
            if self.balanced:
                videos = [self.dataset.video_clips.get_clip_location(clip)[0] for clip in clips]
                labels = torch.tensor([self.dataset.samples[video][1] for video in videos])
                weights = 1 / labels.bincount()[labels]
                clips = [clips[i] for i in WeightedRandomSampler(weights, len(clips))]
            clips = list(islice(cycle(clips), len(self) * self.world_size))
            seeds = torch.randint(2**62, (len(clips),)).tolist()
        return islice(zip(clips, seeds), self.rank, None, self.world_size)


def val_clips(dataset, clips_per_video, rank=0, world_size=1):
    """`clips_per_video` clips of each video, evenly spread: this process's share, every clip in exactly one share.

    Returns a list of (clip index, seed 0), for use as a sampler. It may be empty.
    """
    clips = list(UniformClipSampler(dataset.video_clips, clips_per_video))
    return [(clip, 0) for clip in clips[rank::world_size]]


def load_dataset(split, class_map, preset, sizes, bad_videos, args, promised=0):
    """Index a split, print its data card and return it as a dataset.

    preset: a class of presets.py; sizes: what it takes; promised: bytes that another split will add to --cache-frames.
    """
    samples = list_videos(args.data_path, split, class_map, args.class_map)
    cache_file = Path(args.data_path) / f"{split}.index.npz" if args.cache_dataset else None
    if cache_file and not cache_file.exists() and not os.access(args.data_path, os.W_OK):
        common.refuse(
            f"--cache-dataset keeps the index in {cache_file}, and that folder is not writable: leave it away"
        )
    metadata = index_split(samples, args.workers, cache_file, args.data_path)
    bad_videos.check(len(metadata["unreadable"]), len(samples), f"videos of {split}")
    if args.cache_frames:
        roots = Path(args.data_path, split), Path(args.cache_frames, split)
        clips = frame_cache.CachedVideoClips(metadata, args.clip_len, args.frame_rate, *roots, sizes["resize_size"])
    else:
        clips = VideoClips(metadata["video_paths"], args.clip_len, 1, args.frame_rate, metadata)
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


def print_data_card(split, dataset, class_map, args):
    clips = dataset.video_clips
    lengths = [len(pts) / fps for pts, fps in zip(clips.video_pts, clips.video_fps) if len(pts)]
    counts = Counter(label for _, label in dataset.samples).most_common()
    names = sorted(class_map, key=class_map.get)
    (most, most_count), (least, least_count) = counts[0], counts[-1]
    short = sum(length * args.frame_rate < args.clip_len for length in lengths)
    utils.log(
        f"{split}: {len(dataset.samples):,} videos, {len(clips.unreadable)} unusable; {len(dataset):,} clips of "
        f"{args.clip_len} frames at {args.frame_rate:g} fps; videos of {min(lengths):.1f} to {max(lengths):.1f} s, "
        f"{short:,} too short for a clip and so sampled faster; {len(counts)} of {len(names)} classes, "
        f"from {least_count:,} videos ({names[least]}) to {most_count:,} ({names[most]})"
    )
