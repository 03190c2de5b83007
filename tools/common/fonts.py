"""Fonts of this machine that have given characters: DejaVu Sans, matplotlib's own, has no Chinese, Korean or Thai."""


def fonts_with(text):
    """Returns (font files that the text needs beside DejaVu Sans, its characters that no font here has).

    Files are opened only where DejaVu Sans does not do: some 10 ms each.
    """
    from matplotlib import font_manager

    files, missing = [], {c for c in text if c.isprintable() and not c.isspace()}
    missing -= characters_of(font_manager.findfont("DejaVu Sans"))
    if missing:
        had = {file: missing & characters_of(file) for file in sorted(font_manager.findSystemFonts())}
        while missing and (most := max(had, key=lambda file: len(had[file] & missing), default=None)):
            if not had[most] & missing:
                break
            files.append(most)
            missing = missing - had[most]
    return files, "".join(sorted(missing))


def characters_of(file):
    """The characters that a font file can draw in any size; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):
        return set()
    return set(map(chr, font.get_charmap())) if font.scalable else set()
