"""How names of files and classes are printed."""


def shortened(names, most=20):
    """The first names of many, as text: "a, b, … and 1,234 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … and {len(names) - most:,} more" if len(names) > most else "")
