"""Pictures of predictions, drawn with Pillow: the frames of a clip with the five best classes, and a timeline.

The font is matplotlib's DejaVu Sans, which every installation of it brings along, and another of this machine for what
that lacks.
"""

import functools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import common
from common.calibration import NOT_SURE
from common.fonts import fonts_with
from common.names import printable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, GREY, PAPER, BLUE, PALER, PALE = "#1d2733", "#5a6675", "#ffffff", "#2a6fb0", "#8fb4d6", "#e8ecf1"
# eight hues that differ in lightness too, after Okabe and Ito 2008, "Color Universal Design", then paler ones
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6bb1", "#b8a000",
           "#7f7f7f", "#99c9e5", "#f5cf80", "#80cfb9", "#eaae80", "#e5bcd3", "#abdaf4", "#c5b5d8"]  # fmt: skip
LANES, RUNNERS_UP, NEARLY = 12, 4, 0.1  # of a timeline: classes at most; probability
said = set()  # characters that no font has, once they are named


@functools.cache
def font(size, text=""):
    """A font of `size` pixels for a text: DejaVu Sans or, where that lacks characters, the one with most of them."""
    import matplotlib

    files = [] if text.isascii() else font_files("".join(sorted(set(text))))
    return ImageFont.truetype(*files or [str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))], size)


@functools.cache
def font_files(characters):
    """[font file] that has most of those characters that DejaVu Sans lacks, []; what none has is said once."""
    files, missing = fonts_with(characters)
    if new := "".join(sorted(set(missing) - said)):
        said.update(new)
        print(f"no font here has {new}: boxes stand for them in pictures; on Debian: apt install fonts-noto-cjk")
    return files[:1]


def text_that_fits(text, size, width):
    """The text, with its middle left out if it is wider than `width` pixels."""
    text = printable(text)
    if font(size, text).getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font(size, text).getlength(f"{text[: kept // 2]}…{text[len(text) - kept // 2 :]}") > width:
        kept -= 2
    return f"{text[: kept // 2]}…{text[len(text) - kept // 2 :]}"


def draw_text(draw, place, text, colour, size, width, anchor="la"):
    """Write a text of at most `width` pixels, shortened where it is longer; `anchor` is Pillow's."""
    text = text_that_fits(text, size, width)
    draw.text(place, text, colour, font(size, text), anchor=anchor)


class Segment(NamedTuple):
    """A stretch of a recording with one label; "" where nothing could be read, NOT_SURE where no class is named."""

    start: float  # s
    end: float  # s
    label: str
    probability: float  # of the best class, mean over the stretch

    @property
    def in_words(self):
        """(label, percent), the latter "" where no class is named."""
        percent = f"{100 * self.probability:.0f} %" if self.label not in ("", NOT_SURE) else ""
        return self.label or "no label", percent


def about_rotation(degrees):
    """Words for a video that players turn, by degrees clockwise."""
    return f"; players turn it by {degrees}° clockwise, the official preprocessing does not" if degrees else ""


def save_picture(image, path):
    with common.written_then_renamed(path) as temporary:
        # run lengths alone: a third of the time of the default, 3 % larger
        image.save(temporary, format="png", compress_level=1, compress_type=3)


def images_of(pixels, side):
    """A clip float (3, T, H, W) in [0, 1] as T images of `side` x `side` pixels."""
    frames = (pixels.transpose(1, 2, 3, 0) * 255).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC) for frame in frames]


def draw_clip(path, video, clip, five, model, sure=True):
    """Draw the frames that the model saw, in their crop, each with its time, and bars of the best classes.

    clip: a clip.FirstClip. five: [(class, probability)]. model: what the classifier is, for the bottom line. Unless it
    is sure, that stands above the bars, which are pale then.
    """
    columns, side, gap, margin = 8, 160, 8, 32
    rows = -(-len(clip.times) // columns)
    width = 2 * margin + columns * (side + gap) - gap
    top, row_height = 76, side + 34
    bars = top + rows * row_height + 16 + (0 if sure else 38)
    height = bars + 38 * len(five) + 56
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw_text(draw, (margin, 22), video, INK, 26, width - 2 * margin - 480)
    about = f"{clip.num_frames / clip.fps:.1f} s, {clip.fps:.3g} fps, {len(clip.times)} frames"
    about += f", players turn it by {clip.rotation}°" if clip.rotation else ""
    draw.text((width - margin, 30), about, GREY, font(17), anchor="ra")
    for i, (frame, time) in enumerate(zip(images_of(clip.pixels, side), clip.times)):
        x, y = margin + i % columns * (side + gap), top + i // columns * row_height
        image.paste(frame, (x, y))
        draw.text((x + side / 2, y + side + 5), f"{time:.2f} s", GREY, font(15), anchor="ma")
    if not sure:
        draw.text((margin, bars - 24), NOT_SURE, INK, font(24), anchor="lm")
    draw_bars(draw, margin, bars, width - 2 * margin, five, BLUE if sure else PALER)
    draw_text(draw, (margin, height - 34), model, GREY, 15, width - 2 * margin)
    save_picture(image, path)


def draw_bars(draw, x, y, width, five, colour):
    """Bars of probabilities, 38 pixels a class, the first in `colour`; the name on the left, percent on the right."""
    names = min(480, max(font(20, name).getlength(printable(name)) for name, _ in five)) + 18
    longest = width - names - 90
    for i, (name, p) in enumerate(five):
        line = y + 38 * i
        draw_text(draw, (x + names - 18, line + 14), name, INK, 20, 480, "rm")
        draw.rounded_rectangle((x + names, line, x + names + longest, line + 28), 5, PALE)
        if p * longest >= 1:
            end = x + names + p * longest
            draw.rounded_rectangle((x + names, line, end, line + 28), min(5, p * longest / 2), PALER if i else colour)
        draw.text((x + width, line + 14), f"{100 * p:.1f} %", INK, font(20), anchor="rm")


def colours_of(segments):
    """{label: colour} in the order in which labels come; what cannot be read is pale, what is not sure grey."""
    labels = list(dict.fromkeys(segment.label for segment in segments if segment.label not in ("", NOT_SURE)))
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)} | {"": "#d5dae1", NOT_SURE: "#9aa5b1"}


def draw_strip(segment, colours, width, height):
    """The strip below a frame of the annotated copy: the label in white on dark, a square of its colour before it."""
    image = Image.new("RGB", (width, height), INK)
    draw, size = ImageDraw.Draw(image), max(10, round(height * 0.52))
    square = height - 2 * (height // 4)
    draw.rectangle((height // 4, height // 4, height // 4 + square, height // 4 + square), colours[segment.label])
    label, percent = segment.in_words
    left, right = height // 2 + square, width - height // 4
    draw.text((right, height / 2), percent, "#c3ccd6", font(size), anchor="rm")
    room = right - left - font(size).getlength(percent) - height // 4
    draw_text(draw, (left, height / 2), label, "white", size, room, "lm")
    return image


def draw_timeline(path, about, edges, moments, segments, shown, classes):
    """Draw a recording: some frames, the coloured strip of its labels, and the probability of each over time.

    about: two lines of text. edges: s (S + 1,). moments: float (S, num_classes), NaN where nothing could be read.
    segments: Segments. shown: [(s, float32 (3, 1, H, W))]. Below the lanes of classes that are best somewhere come
    runners-up, in grey.
    """
    colours, duration = colours_of(segments), float(edges[-1])
    labels = lanes_of(segments, moments, classes)
    margin, names, width = 32, 330, 1400
    left, right, top = margin + names, width - margin, 112
    side = (right - left) // max(1, len(shown)) - 6
    strip = top + side + 14
    height = strip + 64 + 44 + 58 * len(labels) + 24
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)

    def x_of(s):
        return left + (right - left) * min(1.0, s / duration)

    draw_text(draw, (margin, 22), about[0], INK, 26, width - 2 * margin)
    draw_text(draw, (margin, 60), about[1], GREY, 17, width - 2 * margin)
    for i, (_, pixels) in enumerate(shown):
        image.paste(images_of(np.nan_to_num(pixels, nan=0.85), side)[0], (left + i * (side + 6), top))
    for segment in segments:
        draw.rectangle((x_of(segment.start), strip, x_of(segment.end), strip + 44), colours[segment.label])
    for s in ticks_of(duration):
        draw.line((x_of(s), strip + 44, x_of(s), strip + 52), GREY)
        draw.text((x_of(s), strip + 56), f"{s // 60}:{s % 60:02d}", GREY, font(15), anchor="ma")
    for i, label in enumerate(labels):
        y = strip + 108 + 58 * i
        colour = colours.get(label, GREY)
        draw.rectangle((margin, y + 14, margin + 18, y + 32), colour)
        draw_text(draw, (margin + 28, y + 23), label, INK, 18, names - 44, "lm")
        draw.rectangle((left, y, right, y + 46), PALE)
        for s, p in enumerate(moments[:, classes.index(label)]):
            if p * 46 >= 1:  # not for NaN
                draw.rectangle((x_of(edges[s]), y + 46 - 46 * p, x_of(edges[s + 1]) - 1, y + 46), colour)
    save_picture(image, path)


def lanes_of(segments, moments, classes):
    """The classes whose probability a timeline shows: the best somewhere, in their order, then those next to them.

    Of the best the LANES that last longest; of the others, up to RUNNERS_UP that reach NEARLY, by their mean.
    """
    seconds = Counter()
    for segment in segments:
        if segment.label in classes:
            seconds[segment.label] += segment.end - segment.start
    longest = {label for label, _ in seconds.most_common(LANES)}
    labels = [label for label in seconds if label in longest]
    read = moments[~np.isnan(moments).any(axis=1)]
    if len(read):
        order = np.argsort(-read.mean(axis=0), kind="stable")
        others = [classes[i] for i in order if read[:, i].max() >= NEARLY and classes[i] not in seconds]
        labels += others[:RUNNERS_UP]
    return labels


def ticks_of(duration):
    """Whole seconds to write under a time axis, 12 at most."""
    step = next((s for s in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800) if duration / s <= 12), 3600)
    return range(0, int(duration) + 1, step)
