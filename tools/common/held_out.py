"""Which videos a model was kept from: the list beside its checkpoint, which all later steps follow."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from common import refuse, write_text


class HeldOut(NamedTuple):
    """The videos that a training left out of what it learned from, to be validated on. Without any: NOTHING."""

    videos: tuple  # paths relative to the dataset's root, with "/", sorted: train/squats/1.mp4
    groups: tuple = ()  # the groups of --groups that these are all videos of, sorted
    share: float = 0.0  # --hold-out
    seed: int = 0  # --hold-out-seed

    def key(self):
        """What a checkpoint says of it: the name of the list beside it, share, seed and number of videos."""
        digest = hashlib.sha256(self.text().encode()).hexdigest()[:16]
        about = {"file": f"held_out-{digest}.json", "share": self.share, "seed": self.seed}
        return about | {"num_videos": len(self.videos)}

    def text(self):
        """The list as JSON, one video a line. Bytes of a name that are not UTF-8 are kept as escapes."""
        parts = [f'"{key}": {json.dumps(getattr(self, key))}' for key in ("share", "seed", "groups")]
        return "{%s, \"videos\": [\n%s\n]}\n" % (", ".join(parts), ",\n".join(map(json.dumps, self.videos)))  # noqa: UP031

    def write(self, folder):
        """Write the list into a folder where a checkpoint is, or will be."""
        if self.videos:
            write_text(Path(folder, self.key()["file"]), self.text())


NOTHING = HeldOut(())


def read_held_out(checkpoint, path):
    """The HeldOut of a checkpoint that lies at `path`; NOTHING if it was kept from no video.

    checkpoint: its keys. Exits with code 2 and one sentence if the list is not there, or is another one.
    """
    about = checkpoint.get("held_out")
    if not about:
        return NOTHING
    file = Path(path).parent / about["file"]
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        found = HeldOut(tuple(read["videos"]), tuple(read["groups"]), read["share"], read["seed"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = getattr(e, "strerror", None) or repr(e)
        refuse(
            f"{path} was kept from {about['num_videos']:,} videos, and their list {file} cannot be read ({reason}): "
            f"put it beside the checkpoint, as training did"
        )
    if found.key() != about:
        refuse(f"{file} is not the list that {path} was trained with: put that one beside the checkpoint")
    return found


def held_out_name(path, root):
    """How the list names a video: its path relative to the dataset's root, with "/"."""
    return os.path.relpath(path, root).replace(os.sep, "/")
