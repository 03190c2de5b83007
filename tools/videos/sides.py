"""Which side of a split, train or val, a video is on: for good, and together with all that is bound to it.

Videos of one content or one group, and twins, are a bundle. Its side is decided once, by a hash, and the caller
remembers it.
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


def counted(bundles):
    """The videos that count for the shares: [Counter {label: number} of each bundle].

    Copies of one video count once, and those that do not decode not at all, unless no video of the class decodes.
    """
    decoding = {video.label for bundle in bundles for video in bundle if video.decodes}
    shown = ({(v.label, v.shows) for v in bundle if v.decodes or v.label not in decoding} for bundle in bundles)
    return [Counter(label for label, _ in videos) for videos in shown]


def set_sides(videos, sides, val_share):
    """Set `side` of each video: the known one or, in a new bundle, val for the lowest hashes and train for the others.

    videos: objects with `video` (name), `label`, `keys` (content, group, twins, as tuples), `decodes`, `shows` (equal
    for copies and twins) and `side`. sides: {key, or ("name", name): side} of all that was decided before.
    val_share: of the videos of a class, in (0, 1), as near as the bundles allow. A class with two bundles or more has
    one in val, and one in train, if the groups allow it.
    Exits with code 2 and one sentence if a bundle is on both sides already.
    """
    bundles = sorted(bundles_of(videos), key=position_of)
    total, val, new = Counter(), Counter(), []  # videos of each class
    for bundle, numbers in zip(bundles, counted(bundles)):
        side = known_side(bundle, sides)
        put(bundle, side or "train")
        total += numbers
        val += numbers if side == "val" else Counter()
        new += [] if side else [(bundle, numbers)]
    missing = Counter({label: max(1, round(val_share * number)) - val[label] for label, number in total.items()})

    def move(bundle, numbers, wanted):
        """Put a new bundle into val if that is wanted, and each of its classes keeps a video in train."""
        in_train = bundle[0].side == "train" and all(val[label] + n < total[label] for label, n in numbers.items())
        if numbers and wanted and in_train:
            put(bundle, "val")
            val.update(numbers)
            missing.subtract(numbers)

    # whole groups first that fit into what is missing, then those that come nearer to the shares than without them
    for bundle, numbers in new:
        move(bundle, numbers, all(n <= missing[label] for label, n in numbers.items()))
    for bundle, numbers in new:
        move(bundle, numbers, sum(abs(missing[label]) - abs(missing[label] - n) for label, n in numbers.items()) > 0)
    for bundle, numbers in sorted(new, key=lambda pair: pair[1].total()):  # the smallest where a class would have none
        move(bundle, numbers, any(not val[label] for label in numbers))


def put(bundle, side):
    """Set the side of all videos of a bundle."""
    for video in bundle:
        video.side = side
