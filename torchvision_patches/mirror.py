"""What a mirror does to classes: those whose name says a side become another class, or one that there is not."""

import re

OTHER_SIDE = {"left": "right", "right": "left"}
SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)


def names_a_side(class_name):
    """Whether a class stops being itself in a mirror: `left` or `right` is one of the words of its name."""
    return SIDE.search(class_name) is not None


def seen_in_mirror(classes):
    """For each class the index of the class that its mirror image is, or None: it names a side and the other is absent.

    classes: names in index order. Returns a list of as many.
    """
    index = {name.lower(): i for i, name in enumerate(classes)}
    mirrored = [SIDE.sub(lambda side: OTHER_SIDE[side[0].lower()], name.lower()) for name in classes]
    return [index.get(mirrored[i]) if names_a_side(name) else i for i, name in enumerate(classes)]
