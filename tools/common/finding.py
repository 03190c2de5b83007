"""Which files of a folder are videos of which class: one walk for checking, training, preprocessing, prediction."""

import os
from collections import Counter
from typing import NamedTuple

VIDEO_ENDINGS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"}  # what every step takes for a video, in any case
VIDEO_ENDINGS |= {".3gp", ".flv", ".gif", ".m2ts", ".mpeg", ".mpg", ".mts", ".ts", ".wmv"}
# folders of an unpacked archive, a network drive or a file manager, none of them a class; hidden ones count, too
JUNK = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


class Found(NamedTuple):
    """What `find_videos` found: paths relative to the folder, with "/", sorted."""

    videos: list  # of paths <class>/<video>, of regular files
    misplaced: list  # of paths of videos at another depth: they have no class
    failures: dict  # {path: why it cannot be read} of links to nothing, pipes, sockets, devices, locked folders
    other_endings: Counter  # {ending in lower case, "" for none: number of files}


def class_folders(root):
    """The sorted names of the folders in `root` that stand for classes: not hidden, no junk, links to folders too."""
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not (e.name.startswith(".") or e.name in JUNK))


def find_videos(root, endings=VIDEO_ENDINGS):
    """Walk the folder `root`, links to folders included, each folder once; hidden files and folders and junk are left.

    check_videos.py, training and preprocessing all find their videos by this walk. No file is opened, so that a pipe
    or a stalled drive under a video's name stops nothing. Returns Found; a `root` that cannot be read is a failure ".".
    """
    found, folders, links, visited = Found([], [], {}, Counter()), [""], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder goes by its own name if it has one
        place = os.path.realpath(os.path.join(root, folder))
        if place in visited:
            continue
        visited.add(place)
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as e:
            found.failures[folder or "."] = f"this folder cannot be read: {e.strerror}"
            continue
        for entry in entries:
            path, linked = f"{folder}/{entry.name}".lstrip("/"), entry.is_symlink()
            if entry.name.startswith(".") or entry.name in JUNK:
                continue
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                (links if linked else folders).append(path)
            elif (ending := os.path.splitext(entry.name)[1].lower()) not in endings:
                found.other_endings[ending] += 1
            elif os.path.isfile(entry.path) if linked else entry.is_file():
                (found.videos if path.count("/") == 1 else found.misplaced).append(path)
            else:
                to_nothing = linked and not os.path.exists(entry.path)
                found.failures[path] = "it is a link to nothing" if to_nothing else "it is a pipe, a socket or a device"
    found.videos.sort()
    found.misplaced.sort()
    return found


def about_other_endings(found):
    """A sentence on the files of a Found that are no videos by their endings, "" if there are none."""
    counts = ", ".join(f"{ending or 'none'} {count:,}" for ending, count in sorted(found.other_endings.items()))
    number = sum(found.other_endings.values())
    return f"{number:,} files have endings that no step takes for videos ({counts})" if number else ""
