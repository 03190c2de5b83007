"""torchvision's VideoClips with the official frame rule of LPCVC 2026 Track 2, decoding by PyAV and a robust index.

What is overridden, and why; all else is torchvision 0.26's:

    _compute_frame_pts       reads frame times through PyAV: upstream needs TorchCodec, and one bad file stops it
    _init_from_metadata      also takes over which files could not be indexed, and why
    compute_clips            videos with equal frame times share their clips: 0.3 s instead of 15 s for QEVD
    compute_clips_for_video  a video too short for one clip is sampled faster, where upstream drops it
    get_clip                 decodes the frames of the clip only, where upstream decodes the whole span, and audio
    __getstate__             sends a spawned process equal frame times once, where upstream sends each video's own
    __setstate__             shares them between the videos again
    subset                   keeps whether frames are turned upright

    $ python torchvision_patches/video_utils.py     # prints each override as a diff against the installed torchvision
"""

import difflib
import inspect
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.datasets import video_utils as upstream

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on the path
from torchvision_patches import frame_rule
from torchvision_patches.decoding import UnreadableVideo, frame_times, read_frames, stamp
from torchvision_patches.video_index import index_videos

__all__ = ["UnreadableVideo", "VideoClips", "frame_times", "index_videos", "read_frames", "stamp"]

WRITTEN_FOR = "0.26.0"
if torchvision.__version__.split("+")[0] != WRITTEN_FOR:
    raise ImportError(
        f"torchvision_patches is written for torchvision {WRITTEN_FOR}, and {torchvision.__version__} is installed: "
        f"run `pip install -r requirements.txt`, or compare the overrides with the new version and change WRITTEN_FOR"
    )


class VideoClips(upstream.VideoClips):
    """torchvision's VideoClips, with its name so that its clip samplers take it; see the head of this file.

    `unreadable` is {path: reason} of the videos that could not be indexed; they give no clip. With `rotate`, set on the
    object, frames are turned as their files ask players to; the official pipeline does not turn them.
    """

    rotate = False

    def _compute_frame_pts(self):
        self._init_from_metadata(index_videos(self.video_paths, self.num_workers))

    def _init_from_metadata(self, metadata):
        super()._init_from_metadata(metadata)
        self.unreadable = metadata.get("unreadable", {})

    def compute_clips(self, num_frames, step, frame_rate=None):
        """All clips of all videos, as upstream; `clips` and `resampling_idxs` of equal videos are the same tensors."""
        self.num_frames, self.step, self.frame_rate = num_frames, step, frame_rate
        found, of_video = {}, []
        for pts, fps in zip(self.video_pts, self.video_fps):
            if (id(pts), fps) not in found:
                found[id(pts), fps] = self.compute_clips_for_video(pts, num_frames, step, fps, frame_rate)
            of_video.append(found[id(pts), fps])
        self.clips, self.resampling_idxs = map(list, zip(*of_video)) if of_video else ([], [])
        self.cumulative_sizes = np.cumsum([len(clips) for clips in self.clips], dtype=np.int64).tolist()

    def __getstate__(self):
        """For another process: each different frame table once, as an array, and which video has which."""
        tables = {id(pts): pts for pts in self.video_pts}
        number = {key: i for i, key in enumerate(tables)}
        state = self.__dict__ | {"video_pts": np.array([number[id(pts)] for pts in self.video_pts], np.int64)}
        state["tables"] = [pts.numpy() for pts in tables.values()]
        for derived in ("clips", "resampling_idxs", "cumulative_sizes"):
            del state[derived]
        return state

    def __setstate__(self, state):
        tables = [torch.from_numpy(pts) for pts in state.pop("tables")]
        self.__dict__ = state | {"video_pts": [tables[number] for number in state["video_pts"].tolist()]}
        self.compute_clips(self.num_frames, self.step, self.frame_rate)

    def subset(self, indices):
        subset = super().subset(indices)
        subset.rotate = self.rotate
        return subset

    @staticmethod
    def compute_clips_for_video(video_pts, num_frames, step, fps, frame_rate=None):
        """All clips of one video by the official rule: `num_frames` frames at `frame_rate`, `step` apart.

        The frames are those of `frame_rule.sampled_frames`. A video without frames has no clip.

        Returns (pts, frame indices), both int64 (num_clips, num_frames).
        """
        n = len(video_pts)
        if n == 0:
            return torch.empty(0, num_frames, dtype=torch.int64), torch.empty(0, num_frames, dtype=torch.int64)
        sampled = torch.from_numpy(frame_rule.sampled_frames(n, num_frames, fps, frame_rate or fps).copy())
        return upstream.unfold(video_pts[sampled], num_frames, step), upstream.unfold(sampled, num_frames, step)

    def get_clip(self, idx):
        """Decode clip `idx`. Returns (video, audio, info, video index), as upstream.

        video: uint8 (T, H, W, 3), or (T, 3, H, W) for output_format "TCHW"; RGB. audio: float32 (1, 0),
        never read. info: {"video_fps": the rate asked for, or the file's if none was}.
        Raises IndexError past the last clip, UnreadableVideo if the clip cannot be decoded.
        """
        if idx >= self.num_clips():
            raise IndexError(f"clip {idx} is asked for, there are {self.num_clips()}")
        video_idx, clip_idx = self.get_clip_location(idx)
        pts, frame_indices = self.clips[video_idx][clip_idx], self.resampling_idxs[video_idx][clip_idx]
        path = self.video_paths[video_idx]
        video = torch.from_numpy(read_frames(path, pts.numpy(), frame_indices.numpy(), rotate=self.rotate))
        if self.output_format == "TCHW":
            video = video.permute(0, 3, 1, 2)
        info = {"video_fps": self.frame_rate or self.video_fps[video_idx]}
        return video, torch.empty(1, 0), info, video_idx


OVERRIDES = ("_compute_frame_pts", "_init_from_metadata", "compute_clips", "compute_clips_for_video", "get_clip")
OVERRIDES += ("subset", "__getstate__", "__setstate__")


def print_patch():
    """Print each override as a unified diff against the function of the installed torchvision that it replaces."""
    for name in OVERRIDES:
        before, after = (
            inspect.getsource(getattr(cls, name)).splitlines() for cls in (upstream.VideoClips, VideoClips)
        )
        titles = f"torchvision {torchvision.__version__}: VideoClips.{name}", f"ours: VideoClips.{name}"
        print("\n".join(difflib.unified_diff(before, after, *titles, lineterm="")), end="\n\n")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that ends, as in `… | head`, ends it without a word
    print_patch()
