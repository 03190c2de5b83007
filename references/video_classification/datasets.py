"""Clips of a folder of videos, DATA_PATH/<split>/<class>/<video>.mp4, with class indices from the class map."""

import math
import os
import shutil
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import common
from common import machine

import torch
from torch.utils.data import DataLoader, Sampler, default_collate, get_worker_info
from torchvision.datasets import VisionDataset

import frame_cache
import processes
import splits
import utils
from torchvision_patches.frame_rule import spread
from torchvision_patches.video_utils import UnreadableVideo, VideoClips, index_videos

MAX_REPLACEMENTS = 10  # clips that are tried in place of one that does not decode
MAX_WORKERS = 1024  # of one loader

class Item(NamedTuple):
    """One clip of KineticsWithVideoId."""

    clip: object  # what the dataset's `transform` makes of uint8 (T, H, W, 3); None if nothing could be decoded
    label: int  # class index
    clip_idx: int
    video_idx: int
    logits: object  # of --teacher-logits, float16 (teachers, classes); None without
    failures: list  # of the UnreadableVideo met on the way


class Batch(NamedTuple):
    """Items without those that have no clip: N may be less than the batch size, and 0."""

    clips: torch.Tensor  # (N, …)
    labels: torch.Tensor  # int64 (N,)
    clip_idx: torch.Tensor  # int64 (N,)
    video_idx: torch.Tensor  # int64 (N,)
    logits: object  # float16 (N, teachers, classes), or None
    failures: list


class KineticsWithVideoId(VisionDataset):
    """Clips of a split in Kinetics' folder layout, each with the number of its video.

    torchvision's own Kinetics numbers the classes by the folders it meets and stops at an empty one; here the class
    map numbers them. Items are asked for by (clip index, seed); all randomness of an item comes from its seed.
    With `replace_bad`, a clip that does not decode is replaced by one of another video of the same class.

    labels, counts, starts, scored: int64 (videos,), class index, number of clips, first clip and the clip that the
    contest scores, of each video. They are tensors, not lists, because each worker that reads a list's objects changes
    their reference counts, and so copies the memory that it shares with the others.
    """

    def __init__(self, root, samples, video_clips, transform, replace_bad=False):
        super().__init__(root, transform=transform)
        self.samples, self.video_clips, self.replace_bad = samples, video_clips, replace_bad
        ends = torch.tensor(video_clips.cumulative_sizes)
        self.starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.counts = ends - self.starts
        self.scored = self.starts + torch.from_numpy(spread(self.counts.numpy(), 1)[:, 0])
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
        return f"{len(rows)} videos with {len(self)} clips ({common.json_hash(rows)[:16]})"

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
                    logits = self.teachers.of(candidate, video_idx) if self.teachers else None
                    return Item(self.transform(video), label, candidate, video_idx, logits, failures)
                except UnreadableVideo as e:
                    failures.append(e)
        return Item(None, label, clip_idx, video_idx, None, failures)


def collate_fn(items):
    """[Item] -> Batch."""
    failures = [failure for item in items for failure in item.failures]
    good = [item for item in items if item.clip is not None]
    # in a worker default_collate puts them into shared memory at once; torch.stack would make a copy that is copied
    clips = default_collate([item.clip for item in good]) if good else torch.empty(0)
    logits = torch.stack([item.logits for item in good]) if good and good[0].logits is not None else None
    numbers = torch.tensor([item[1:4] for item in good], dtype=torch.int64).reshape(-1, 3)
    return Batch(clips, *numbers.T.contiguous(), logits, failures)


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
    places = torch.from_numpy(spread(dataset.counts[usable].numpy(), clips_per_video))
    clips = (dataset.starts[usable, None] + places).flatten()
    return [(clip, 0) for clip in clips[rank::world_size].tolist()]


def load_dataset(split, class_map, preset, bad_videos, args, held_out, promised=0):
    """Index a split, print its data card and return it as a dataset.

    preset: of presets.py, with its sizes. held_out: a HeldOut, which says what val is. promised: bytes that another
    split will add to --cache-frames.
    """
    name = "hold_out" if split == "val" and held_out.videos else split
    cache_file = Path(args.data_path) / f"{name}.index.npz" if args.cache_dataset else None
    if cache_file and not cache_file.exists() and not os.access(args.data_path, os.W_OK):
        common.refuse(
            f"--cache-dataset keeps the index in {cache_file}, and that folder is not writable: leave it out"
        )

    def listed():
        return splits.videos_of_split(split, class_map, args, held_out)

    def read():
        samples = listed()
        paths = [path for path, _ in samples]
        return samples, index_videos(paths, args.workers, cache_file, args.data_path)

    # videos and labels come from one process, so that they cannot be mixed up
    samples, metadata = processes.from_main_process(read)
    if args.rank and args.local_rank == 0:
        splits.refuse_unlike_machines(samples, listed(), split)
    bad_videos.check(len(metadata["unreadable"]), len(samples), f"videos of {split}")
    if args.cache_frames:
        folder = "train" if held_out.videos else split
        roots = Path(args.data_path, folder), Path(args.cache_frames, folder)
        size = preset.keywords["resize_size"]
        clips = frame_cache.CachedVideoClips(metadata, args.clip_len, args.frame_rate, *roots, size)
    else:
        clips = VideoClips(metadata["video_paths"], args.clip_len, 1, args.frame_rate, metadata)
    clips.rotate = args.rotate
    transform = preset(resized=bool(args.cache_frames))
    dataset = KineticsWithVideoId(args.data_path, samples, clips, transform, replace_bad=split == "train")
    print_data_card(split, dataset, class_map, args)
    if args.cache_frames:
        if args.local_rank == 0:  # in one process of each machine: the folder may be on a disk of its own
            frame_cache.prepare_cache(clips, split, promised)
        done = torch.zeros((), device=args.device)
        processes.reduce_across_processes(done)
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
        timeout=processes.STALLED if args.workers else 0,
        persistent_workers=args.workers > 0,
        # a generator of its own: starting workers draws a number, and an interrupted run starts them more often
        generator=torch.Generator(),
    )


def refuse_small_shared_memory(args):
    """Exit with code 2 if the batches that workers send do not fit into /dev/shm, as with Docker's default of 64 MB."""
    folder = Path("/dev/shm")
    if not args.workers or not folder.is_dir():
        return
    of_train, of_val = (math.prod(getattr(args, f"{split}_crop_size")) for split in ("train", "val"))
    values = of_val * 4 + (0 if args.test_only else of_train)  # bytes of one colour of a frame: float32, uint8
    batch = args.batch_size * args.clip_len * 3 * values
    needed = batch * (2 * args.workers + 1) * machine.launcher(array=False).local_world_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        common.refuse(
            f"workers send batches through {folder}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are "
            f"free; give fewer --workers or a smaller --batch-size, or make it larger (Docker: --shm-size 4g)"
        )
