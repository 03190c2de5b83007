"""Which side of a split, train or val, a video is on: for good, and together with all that is bound to it.

Videos of one content or one group are a bundle. Its side is decided once, by a hash, and remembered by the caller.
"""

import hashlib
from collections import Counter, defaultdict

import common


def bundles_of(videos):
    """Lists of videos that content or group holds together."""
    parent = {}

    def root(key):
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for video in videos:
        for key in video.keys[1:]:
            parent[root(key)] = root(video.keys[0])
    bundles = defaultdict(list)
    for video in videos:
        bundles[root(video.keys[0])].append(video)
    return list(bundles.values())


def position_of(bundle):
    """Where a bundle's hash lies in [0, 1)."""
    # a group's name before content, so that a new video does not change where the group lies
    key = min((video.keys[-1] for video in bundle), key=lambda key: (key[0] == "content", key))
    return int(hashlib.sha256("/".join(key).encode("utf-8", "surrogateescape")).hexdigest()[:13], 16) / 16**13


def known_side(bundle, sides):
    """The side that `sides` gives a bundle, or None. Exits with code 2 if it gives both."""
    found = {}
    for video in bundle:
        found |= {sides[key]: video.video for key in video.keys if key in sides}
    if not found:  # a video whose content has changed is the same video as long as its name is
        found = {sides["name", video.video]: video.video for video in bundle if ("name", video.video) in sides}
    if len(found) == 2:
        common.refuse(
            f"{found['train']} and {found['val']} belong together now, but an earlier run put them on different sides,"
            f" and a model may have learned from one of them: set GROUPS as it was, or name a new DEST"
        )
    return next(iter(found), None)


def set_sides(videos, sides, val_share):
    """Set `side` of each video: the known one or, in a new bundle, val for the lowest hashes and train for the others.

    videos: objects with `video` (name), `label`, `keys` (its content and its group, as tuples) and `side`. sides: {key,
    or ("name", name): side} of all that was decided before. val_share: of the bundles of a class, in (0, 1); a class
    with two bundles or more has one in val, and one in train, if the groups allow it.
    Exits with code 2 and one sentence if a bundle is on both sides already.
    """
    bundles = [(bundle, {video.label for video in bundle}) for bundle in sorted(bundles_of(videos), key=position_of)]
    total, val, new = Counter(), Counter(), []  # bundles of each class
    for bundle, labels in bundles:
        side = known_side(bundle, sides)
        put(bundle, side or "train")
        total.update(labels)
        val.update(labels if side == "val" else ())
        new += [] if side else [(bundle, labels)]
    missing = Counter({label: max(1, round(val_share * number)) - val[label] for label, number in total.items()})
    for is_second_round in (False, True):
        for bundle, labels in new:
            # a group in several classes goes to val if they lack more there than they have too much …
            wanted = sum(missing[label] for label in labels) > 0
            if is_second_round:  # … or if one of them would have none
                wanted = any(not val[label] for label in labels)
            in_train = bundle[0].side == "train" and all(val[label] + 1 < total[label] for label in labels)
            if wanted and in_train:
                put(bundle, "val")
                val.update(labels)
                missing.subtract(labels)


def put(bundle, side):
    for video in bundle:
        video.side = side
