"""How names of files and classes are printed, and when two of them are the same."""

import unicodedata


def shortened(names, most=20):
    """The first names of many, as text: "a, b, … and 1,234 more"."""
    names = list(names)
    more = f", … and {len(names) - most:,} more" if len(names) > most else ""
    return printable(", ".join(map(str, names[:most]))) + more


def printable(text):
    """A text with names in it, with escapes for what no terminal shows: bytes that are no UTF-8, control characters."""
    if text.isprintable():
        return text
    raw = {chr(0xDC00 + byte): f"\\x{byte:02x}" for byte in range(128, 256)}  # bytes, as Python decodes names
    return "".join(c if c.isprintable() else raw.get(c) or c.encode("unicode_escape").decode() for c in text)


def class_name(label):
    """The name of a class as class maps and folders have it: composed (NFC), without blanks at its ends, others "_"."""
    return unicodedata.normalize("NFC", label).strip().replace(" ", "_")


def look_alikes(names):
    """["'Squats' and 'squats '", …] of the names that a reader may take for one: but for case, blanks, composition."""
    alike = {}
    for name in names:
        alike.setdefault(class_name(name).casefold(), []).append(name)
    return [" and ".join(map(repr, sorted(same))) for same in alike.values() if len(same) > 1]
