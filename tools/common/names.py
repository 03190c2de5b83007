"""How names and percentages are printed, how names are shortened, and when two are the same. A name is bytes."""

import functools
import hashlib
import math
import os
import unicodedata

LONGEST = 255  # bytes of a file's name on nearly all file systems


def shortened(names, most=20):
    """The first names of many, as text: "a, b, … and 1,234 more"."""
    names = list(names)
    more = f", … and {len(names) - most:,} more" if len(names) > most else ""
    return printable(", ".join(map(str, names[:most]))) + more


def digits(n):
    """Decimals of a percentage of n clips: as few as keep two counts apart, so 60 % of 8 and 89.608 % of 11,452."""
    return max(0, math.ceil(math.log10(n / 100))) if n else 0


def printable(text):
    """A path or text as it is printed, with escapes for what no terminal shows: bytes that are no UTF-8, controls."""
    text = str(text)
    if text.isprintable():
        return text
    raw = {chr(0xDC00 + byte): f"\\x{byte:02x}" for byte in range(128, 256)}  # bytes, as Python decodes names
    return "".join(c if c.isprintable() else raw.get(c) or c.encode("unicode_escape").decode() for c in text)


def file_name(stem, ending=""):
    """`stem` + `ending`, or where that is longer than a name may be: a shorter stem, with a hash that tells it apart.

    The ending stays whole; no character is cut in two.
    """
    room = LONGEST - len(os.fsencode(ending))
    if len(os.fsencode(stem)) <= room:
        return stem + ending
    mark = "~" + hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
    short = stem[:room]
    while len(os.fsencode(short)) > room - len(mark):
        short = short[:-1]
    return short + mark + ending


def composed(name):
    """A name in the form in which names are compared, é as one character (NFC); macOS makes two of it (NFD)."""
    return unicodedata.normalize("NFC", name)


def class_name(label):
    """The name of a class as class maps and folders have it: composed (NFC), without blanks at its ends, others "_"."""
    return composed(label).strip().replace(" ", "_")


# letters of Cyrillic and Greek that look like Latin ones, in lower case
LATIN = str.maketrans("\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0456\u0455\u03bf\u03b1", "aceopxyisoa")


@functools.lru_cache(10_000)
def as_seen(name):
    """What a reader takes a name for: without case, width, what cannot be seen, blanks and dots at its ends."""
    seen = unicodedata.normalize("NFKC", name).casefold().translate(LATIN)
    seen = "".join(c for c in seen if unicodedata.category(c) not in ("Cf", "Cc"))
    return seen.replace(" ", "_").strip("_.")  # Windows takes dots off the end, too


def look_alikes(names):
    """["'Squats' and 'squats '", …] of the names that a reader may take for one, as `as_seen` has them."""
    alike = {}
    for name in names:
        alike.setdefault(as_seen(name), []).append(name)
    return [" and ".join(map(repr, sorted(same))) for same in alike.values() if len(same) > 1]


def looks_like(name, others):
    """A clause that names which of the `others` looks like a name that is none of them, "" if none does."""
    like = next((other for other in others if as_seen(other) == as_seen(name)), None)
    return "" if like is None else f" (it looks like {like!r}, and is another name)"
