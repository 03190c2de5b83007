"""How a video gets from its source to its place in a dataset: as a copy, a hard link or a symbolic link."""

import contextlib
import errno
import filecmp
import os
import secrets
import shutil
import stat
from pathlib import Path

import common

from tqdm import tqdm

MODES = ("copy", "hardlink", "symlink")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next video would meet them, too


def check_mode(mode):
    """Exit with code 2 for a MODE that does not exist."""
    if mode not in MODES:
        common.refuse(f"MODE is {mode!r}; it must be one of {', '.join(MODES)}")


def nearest_existing(folder):
    """The folder itself or the nearest of its parents that exists."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def size_or_zero(path):
    """Size of a file in bytes; 0 if it cannot be read, which placing it will report."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def check_disk(videos, folder, mode):
    """Exit with code 2 if `folder` is not to be written, has no room for copies of the `videos`, or takes no links.

    Of links one is made for each folder of sources, and deleted: drives refuse them with many kinds of errors.
    """
    folder = nearest_existing(folder)
    if videos and not os.access(folder, os.W_OK):
        common.refuse(f"nothing may be written into {folder}, which is another user's or write-protected; name another")
    if mode == "copy" and videos:
        advice = f"{len(videos):,} videos need them; make room, or use MODE hardlink or symlink"
        common.check_space(folder, sum(size_or_zero(video.source) for video in videos), advice)
    if mode == "copy":
        return
    for source in {os.path.dirname(video.source): video.source for video in videos}.values():
        trial = folder / f".{secrets.randbelow(10**9)}.link.tmp"
        try:
            link_or_copy(source, trial, mode)
        except FileNotFoundError:  # the source has just gone, which placing it will report
            continue
        except OSError as e:
            cure = "put that right" if e.errno in FULL else "use --mode copy"
            other = " (it lies on another file system)" if e.errno == errno.EXDEV else ""
            common.refuse(f"no {mode} can be made in {folder} of {source}{other}: {e.strerror}; {cure}")
        finally:
            trial.unlink(missing_ok=True)


def link_or_copy(source, target, mode):
    """Make `target`, which does not exist, a link to `source` or a copy with its time."""
    if mode == "hardlink":
        os.link(os.path.realpath(source), target)
    elif mode == "symlink":
        os.symlink(os.path.realpath(source), target)
    else:
        shutil.copyfile(source, target)
        with contextlib.suppress(OSError):  # some network drives keep neither times nor permissions
            shutil.copystat(source, target)


def is_placed(source, target, mode):
    """Whether the file `target` is what placing `source` would give: for a copy, equal size, and equal time or content.

    FAT keeps times to 2 s.
    """
    there, here = os.lstat(target), os.stat(source)
    if mode == "symlink":
        return stat.S_ISLNK(there.st_mode) and os.path.realpath(target) == os.path.realpath(source)
    if mode == "hardlink":
        return os.path.samestat(there, here)
    if not stat.S_ISREG(there.st_mode) or there.st_size != here.st_size:
        return False
    return abs(there.st_mtime_ns - here.st_mtime_ns) <= 2e9 or filecmp.cmp(source, target, shallow=False)


def place_all(videos, mode):
    """Put each video's `source` at its `target`, replacing what is there; a target is whole or as before at any moment.

    Yields (video, None) or (video, why it could not be placed). Exits with code 2 and one sentence on a full disk.
    """
    for count, video in enumerate(tqdm(videos, mode, unit="video", disable=None)):
        try:
            os.makedirs(os.path.dirname(video.target), exist_ok=True)
            with common.written_then_renamed(video.target) as temporary:
                link_or_copy(video.source, temporary, mode)
        except OSError as e:
            if e.errno in FULL:
                common.refuse(f"stopped after {count:,} videos: {e}; put that right and start again")
            yield video, f"it could not be placed: {e.strerror}"
        else:
            yield video, None
