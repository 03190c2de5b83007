"""Every video decoded once: the frames that any clip of it can use, resized, as raw uint8 files that are read in µs.

One file a video, FOLDER/<class>/<video>.<size>-<mtime>.rgb: uint8 (frames, height, width, 3), RGB, the frames of the
resampled grid, each once, in order; every clip is made of a run of them. The name holds the size and mtime of the
video: another file under its name, or a changed one, gets frames of its own. FOLDER/settings.json holds what else
the pixels depend on. A frame of 128 x 171 takes 65,664 bytes. As JPEG of quality 95 it would take a sixth of that or
less, but be read at a twentieth of the speed and lose one to two grey levels: tests/benchmarks/bench_frame_cache.py.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from pathlib import Path

import common

import numpy as np
import torch

from torchvision_patches.frame_rule import RULE_VERSION
from torchvision_patches.spatial import resize_and_crop
from torchvision_patches.video_utils import UnreadableVideo, VideoClips, read_frames, stamp

FORM_VERSION = 2  # of the files, and of how pixels are made
OTHERS = "name another folder, or delete this one, and each video is decoded anew"
OURS = re.compile(r"(.+)\.\d+-\d+\.rgb", re.DOTALL)  # the path of a video's frames; the group is the video's
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # errors that the next file would meet, too


class CachedVideoClips(VideoClips):
    """VideoClips that gives resized frames, uint8 (T, height, width, 3), and decodes each video only once.

    They are the resized frames of the decoded video rounded to whole grey levels. The first time that a clip of a video
    is asked for, all its frames are decoded and stored; a file that is missing or too short is made anew. What cannot
    be stored is decoded each time, as without a cache: a video of which some frames do not decode, or that has changed
    since it was indexed, and all that are missing once the disk is full. `missing`: bytes to be stored, which
    `prepare_cache` sets.
    """

    def __init__(self, metadata, clip_len, frame_rate, root, folder, resize_size):
        super().__init__(metadata["video_paths"], clip_len, 1, frame_rate, metadata)
        self.stamps, self.root, self.folder = metadata["stamps"], root, folder
        self.resize_size, self.missing = tuple(resize_size), 0
        self.can_write, self.given_up = True, set()  # in this process

    def file_of(self, video_idx):
        """The path of a video's frames, and how many bytes they are.

        The grid rises by whole steps of 1 or more, or visits every frame up to its last: a file whose clock jumps by an
        hour has a grid of 14,000 entries for its 60 frames.
        """
        size, mtime = self.stamps[video_idx]
        name = os.path.relpath(self.video_paths[video_idx], self.root)
        indices = self.resampling_idxs[video_idx]
        num_frames = min(len(indices) + self.num_frames - 1, int(indices[-1, -1]) + 1)
        height, width = self.resize_size
        return os.path.join(self.folder, f"{name}.{size}-{mtime}.rgb"), num_frames * height * width * 3

    def get_clip(self, idx):
        """`VideoClips.get_clip`, but for the size of the frames: video is uint8 (T, height, width, 3)."""
        video_idx, clip_idx = self.get_clip_location(idx)
        positions = self.positions(video_idx)[clip_idx : clip_idx + self.num_frames]
        frames = self.read(self.file_of(video_idx)[0], positions)
        if frames is None and self.can_write and video_idx not in self.given_up:
            frames = self.fill(video_idx)
            frames = None if frames is None else frames[positions]
        if frames is None:
            pts, frame_indices = (table[video_idx][clip_idx].numpy() for table in (self.clips, self.resampling_idxs))
            frames = read_frames(self.video_paths[video_idx], pts, frame_indices, self.resize, self.rotate)
        info = {"video_fps": self.frame_rate or self.video_fps[video_idx]}
        return torch.from_numpy(frames), torch.empty(1, 0), info, video_idx

    def grid(self, table, video_idx):
        """The frames of a video's whole grid, by their times or indices: (clips + T - 1,).

        Clips are all windows of it: it is their first frames, then the rest of the last window.
        """
        windows = table[video_idx].numpy()
        return np.concatenate([windows[:, 0], windows[-1, 1:]])

    def positions(self, video_idx):
        """Where in a video's file each frame of its grid lies: (clips + T - 1,), from 0."""
        return np.unique(self.grid(self.resampling_idxs, video_idx), return_inverse=True)[1]

    def read(self, file, positions):
        """The frames at `positions` (T,) of a file, uint8 (T, height, width, 3); None if they cannot be had from there.

        One read of 1 MB: as fast as mapping the file where it is in memory, and not in pieces of 4 kB where it is not.
        """
        run = np.empty((positions[-1] - positions[0] + 1, *self.resize_size, 3), np.uint8)
        try:
            with open(file, "rb") as f:
                f.seek(int(positions[0]) * run[0].nbytes)
                complete = f.readinto(run) == run.nbytes
        except OSError:
            return None
        if not complete:
            return None
        return run if len(run) == len(positions) else run[positions - positions[0]]

    def fill(self, video_idx):
        """Decode and store all frames of a video's grid; returns them as stored, None if one does not decode."""
        path, (file, _) = self.video_paths[video_idx], self.file_of(video_idx)
        frame_indices, first = np.unique(self.grid(self.resampling_idxs, video_idx), return_index=True)
        pts = self.grid(self.clips, video_idx)[first]
        try:
            frames = read_frames(path, pts, frame_indices, self.resize, self.rotate)
        except UnreadableVideo:
            self.given_up.add(video_idx)
            return None
        if stamp(path) == self.stamps[video_idx]:
            self.store(video_idx, file, frames)
        else:
            self.given_up.add(video_idx)
            print(f"{path} is not the file that was indexed: it is decoded each time in this run", flush=True)
        return frames

    def store(self, video_idx, file, frames):
        """Write a video's frames; what prevents it is said, and not tried again."""
        try:
            with common.written_then_renamed(file) as temporary:
                temporary.write_bytes(frames)
        except OSError as e:
            self.given_up.add(video_idx)
            self.can_write = e.errno not in OF_THE_DISK
            others = "" if self.can_write else ", nor are any others by this process: they are decoded each time"
            print(f"the frames of {file} are not stored ({e.strerror or e}){others}", flush=True)

    def resize(self, pixels):
        """One frame, uint8 (H, W, 3) -> (height, width, 3)."""
        resized = resize_and_crop(torch.from_numpy(pixels)[None], self.resize_size, self.resize_size)
        return resized[:, 0].permute(1, 2, 0).mul(255).round().byte().numpy()


def prepare_cache(clips, split, promised=0):
    """Make a cache's folders, drop frames of videos that have changed, and say what is missing; sets `clips.missing`.

    promised: bytes that another split will take on the same disk. Exits with code 2 if the folder was filled with other
    settings or cannot be used, or the disk has too little space. Other runs may be at work on the same folder.
    """
    settings = {"form_version": FORM_VERSION, "rule_version": RULE_VERSION, "clip_len": clips.num_frames}
    settings |= {"frame_rate": clips.frame_rate, "resize_size": list(clips.resize_size), "rotate": clips.rotate}
    wanted = dict(clips.file_of(i) for i in range(len(clips.video_paths)) if len(clips.clips[i]))
    try:
        common.same_settings(Path(clips.folder, "settings.json"), settings, OTHERS)
        found = tidy(wanted)
        free = shutil.disk_usage(clips.folder).free
    except OSError as e:
        common.refuse(f"the frame cache {clips.folder} cannot be used: {e}")
    clips.missing = sum(size for file, size in wanted.items() if file not in found)
    print(f"{split}: the frames of {len(found):,} of {len(wanted):,} videos are in {clips.folder}", flush=True)
    if not clips.missing:
        return
    needed, free = clips.missing / 1e9, (free - promised) / 1e9
    space = f"{needed:,.3f} GB, and {max(0, free):,.1f} GB are free on {socket.gethostname()}"
    if needed > free:
        common.refuse(f"{clips.folder} needs {space}: name a folder on another disk, or leave --cache-frames away")
    if os.access(clips.folder, os.W_OK):
        print(f"the others are decoded once, when first asked for; they need {space}", flush=True)
    else:
        clips.can_write = False
        print(f"the others are decoded each time: {clips.folder} is not writable", flush=True)


def tidy(wanted):
    """Make the folders of `wanted`, {file: bytes}, and delete what a cache has that is of no use.

    That is: frames of one of these videos as it was before it changed, files of another size, and temporary files of a
    process that was killed. Anything else in the folders is left alone. Returns the set of files that are whole.
    """
    found, videos = set(), {OURS.fullmatch(file)[1] for file in wanted}
    for folder in sorted({os.path.dirname(file) for file in wanted}):
        os.makedirs(folder, exist_ok=True)
        for entry in os.scandir(folder):
            ours = OURS.fullmatch(entry.path)
            with contextlib.suppress(FileNotFoundError):  # another run has renamed or dropped it
                if wanted.get(entry.path) == entry.stat().st_size:
                    found.add(entry.path)
                elif (ours and ours[1] in videos) or is_left_over(entry):
                    os.unlink(entry.path)
    return found


def is_left_over(entry):
    """Whether a file was being written when its process was killed: more than an hour ago, to be sure."""
    return entry.name.startswith(".") and entry.name.endswith(".tmp") and entry.stat().st_mtime < time.time() - 3600
