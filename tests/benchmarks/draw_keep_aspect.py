"""Draw .pictures/keep_aspect.png: a portrait frame, and what the network sees of it without and with --keep-aspect.

    $ python tests/benchmarks/draw_keep_aspect.py

The squares are made by the function that every step uses.
"""

import itertools
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "tools"))
import common

import numpy as np
from PIL import Image, ImageDraw

from drawn.scene import HEIGHT, WIDTH, frames_of
from see.drawing import GREY, INK, PAPER, font
from torchvision_patches import clip

PORTRAIT = HEIGHT * 9 // 16  # pixels across, as of a phone held upright
SIDE = 224  # pixels of a square that the network sees, drawn twice as large


def seen(frame, resize_size):
    """The square of a frame uint8 (H, W, 3) that a network sees, a Pillow image."""
    description = clip.of_network()._replace(resize_size=resize_size)
    pixels = clip.resized_and_cropped(frame[None], description)[:, 0].transpose(1, 2, 0)
    return Image.fromarray((255 * pixels).round().astype(np.uint8)).resize((SIDE, SIDE), Image.LANCZOS)


def main():
    frame = next(itertools.islice(frames_of("squats", [0, 7], 40, 30), 24, None))
    left = (WIDTH - PORTRAIT) // 2
    frame = np.ascontiguousarray(frame[:, left : left + PORTRAIT])
    height, width = clip.of_network().resize_size
    panels = [
        (Image.fromarray(frame), "the video, 9:16", "as a phone takes it"),
        (seen(frame, (height, width)), "the default", "all of it, squeezed to 4:3"),
        (seen(frame, (height,)), "--keep-aspect", "its middle, in proportion"),
    ]
    sheet = Image.new("RGB", (PORTRAIT + 2 * SIDE + 200, HEIGHT + 70), PAPER)
    draw, x = ImageDraw.Draw(sheet), 50
    for picture, title, text in panels:
        sheet.paste(picture, (x, 10 + (HEIGHT - picture.height) // 2))
        draw.text((x + picture.width / 2, HEIGHT + 28), title, INK, font(16), anchor="mm")
        draw.text((x + picture.width / 2, HEIGHT + 50), text, GREY, font(13), anchor="mm")
        x += picture.width + 50
    sheet = sheet.quantize(64)
    with common.written_then_renamed(REPO / ".pictures/keep_aspect.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
