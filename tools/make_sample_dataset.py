"""Draw a small QEVD-shaped dataset, so that every step of the README runs with nothing downloaded.

Reads:  nothing
Writes: OUT/QEVD-FIT-300k-Part-1 … -Part-4/NNNNNNNN.mp4    an articulated figure exercising in a room, H.264, 3 to 6 s
        OUT/fine_grained_labels_release.json                [{"video_path", "label", "split"}, …], as QEVD's own
        OUT/contact_sheet.png                               frames of each class over time, for people
        OUT/settings.json                                   what the videos were drawn with

    $ python tools/make_sample_dataset.py

The same SEED, CLASSES and counts give the same pixels on every run, with any NUM_WORKERS (and the same bytes with the
same PyAV). A second run keeps what is complete and draws what is missing or cut off.
"""

import json
import math
import multiprocessing
import os
import shlex
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import common
from common import flags

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ----------------------------------------------------------------------------------------------------------------------
OUT = "./sample/dataset"  # folder to write, in the layout of a QEVD download
CLASSES = ["jumping_jacks", "squats", "toe_touch",  # names of class_map.json; see EXERCISES for what can be drawn
           "standing_kicks", "pushups", "leg_lifts"]
TRAIN_VIDEOS_PER_CLASS = 16  # videos
VAL_VIDEOS_PER_CLASS = 8  # videos
SEED = 0  # another seed gives other people, rooms and video ids
NUM_WORKERS = os.cpu_count() or 1  # processes that draw and encode
# ----------------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 340, 256  # pixels
NUM_PARTS = 4
LABELS = "fine_grained_labels_release.json"
SCALE = 2  # the picture is drawn this many times larger and then reduced, which smooths its edges
MARGIN = 8 * SCALE  # pixels the camera may shake in each direction
LARGEST = 300_000  # bytes that a video has at most; 0.1 MB on average

# --- the exercises ----------------------------------------------------------------------------------------------------
# Lengths are in body heights. Axes: x to the person's left, y up from the floor, z to where the person faces.
# A pose function takes the phase of one repetition (1 = a whole one) and its strength (about 0.85 to 1), and says where
# hips, chest, hands and feet are; knees and elbows follow from the lengths of the limbs.

THIGH, SHIN, TRUNK, UPPER_ARM, FOREARM, FOOT = 0.245, 0.245, 0.30, 0.165, 0.165, 0.11
HIPS_HEIGHT, ANKLE_HEIGHT = 0.53, 0.05
HALF_HIPS, HALF_SHOULDERS = 0.07, 0.115
SIDES = (1, -1)  # left, right


def wave(phase):
    """0 at phase 0, 1 at phase 1/2, 0 again at phase 1."""
    return (1 - math.cos(2 * math.pi * phase)) / 2


def turns(phase):
    """The waves of two limbs that take turns: one rests while the other goes from 0 to 1 and back."""
    phase %= 1
    return (wave(2 * phase), 0.0) if phase < 0.5 else (0.0, wave(2 * phase))


def pose(hips=(0, HIPS_HEIGHT, 0), lean=0.0, feet=None, hands=None, hands_from_shoulders=None, elbows=(1, -0.5, -0.6),
         knees=(0.25, 0, 1)):
    """Place hips, shoulders, hands and ankles.

    lean: forward tilt of the trunk in degrees. feet, hands: (left, right) places in the room. hands_from_shoulders:
    the same as steps from the shoulders. elbows, knees: where they point, with x counted away from the body.
    """
    tilt = math.radians(lean)
    chest = (hips[0], hips[1] + TRUNK * math.cos(tilt), hips[2] + TRUNK * math.sin(tilt))
    shoulders = [(chest[0] + side * HALF_SHOULDERS, chest[1], chest[2]) for side in SIDES]
    if hands is None:
        steps = hands_from_shoulders or [(side * 0.06, -0.30, 0.02) for side in SIDES]
        hands = [tuple(a + b for a, b in zip(shoulder, step)) for shoulder, step in zip(shoulders, steps)]
    feet = feet or [(side * HALF_HIPS, ANKLE_HEIGHT, 0) for side in SIDES]
    return dict(hips=hips, chest=chest, shoulders=shoulders, hands=hands, feet=feet, elbows=elbows, knees=knees)


def jumping_jacks(phase, strength):
    apart = wave(phase) * strength
    jump = 0.05 * abs(math.sin(2 * math.pi * phase))
    angle = math.radians(12 + 155 * apart)
    hand = 0.32 * math.sin(angle), -0.32 * math.cos(angle), 0.03
    return pose(
        hips=(0, HIPS_HEIGHT + jump - 0.03 * apart, 0),
        feet=[(side * (0.05 + 0.17 * apart), ANKLE_HEIGHT + jump, 0) for side in SIDES],
        hands_from_shoulders=[(side * hand[0], hand[1], hand[2]) for side in SIDES],
    )


def squats(phase, strength):
    down = wave(phase) * strength
    angle = math.radians(12 + 78 * down)
    return pose(
        hips=(0, HIPS_HEIGHT - 0.26 * down, -0.16 * down),
        lean=4 + 38 * down,
        feet=[(side * 0.12, ANKLE_HEIGHT, 0) for side in SIDES],
        hands_from_shoulders=[(-side * 0.03, -0.31 * math.cos(angle), 0.31 * math.sin(angle)) for side in SIDES],
        knees=(0.5, 0, 1),
    )


def high_knees(phase, strength):
    lifts = [strength * lift for lift in turns(phase)]
    return pose(
        hips=(0, HIPS_HEIGHT + 0.02 * max(lifts), 0),
        feet=[(side * HALF_HIPS, ANKLE_HEIGHT + 0.30 * lift, 0.10 * lift) for side, lift in zip(SIDES, lifts)],
        hands_from_shoulders=[(0, -0.15 + 0.12 * lift, 0.04 + 0.20 * lift) for lift in lifts[::-1]],
        elbows=(0.3, -0.8, -1),
        knees=(0, 0.3, 1),
    )


def arm_circles(phase, strength):
    up, ahead = (0.22 * strength * f(2 * math.pi * phase) for f in (math.sin, math.cos))
    return pose(hands_from_shoulders=[(side * 0.25, up, ahead) for side in SIDES], elbows=(0, -1, -0.3))


def toe_touch(phase, strength):
    down = wave(phase) * strength
    angle = math.radians(170 * (1 - down))
    return pose(
        hips=(0, HIPS_HEIGHT - 0.01 * down, -0.10 * down),
        lean=118 * down,
        feet=[(side * 0.09, ANKLE_HEIGHT, 0) for side in SIDES],
        hands_from_shoulders=[(0, -0.325 * math.cos(angle), 0.325 * math.sin(angle)) for _ in SIDES],
    )


def standing_kicks(phase, strength):
    kicks = [math.radians(92 * strength * kick) for kick in turns(phase)]
    leg = HIPS_HEIGHT - ANKLE_HEIGHT
    return pose(
        lean=-10 * math.sin(max(kicks)),
        feet=[(side * HALF_HIPS, HIPS_HEIGHT - leg * math.cos(a), leg * math.sin(a)) for side, a in zip(SIDES, kicks)],
        hands_from_shoulders=[(-side * 0.04, -0.03, 0.17) for side in SIDES],
        elbows=(0.6, -1, 0),
    )


def lunges(phase, strength):
    steps = [strength * step for step in turns(phase)]
    down = max(steps)
    feet = []
    for side, step in zip(SIDES, steps):
        ahead = 0.25 * step if step else -0.24 * down
        feet.append((side * HALF_HIPS, ANKLE_HEIGHT + (0 if step else 0.07 * down), ahead))
    return pose(
        hips=(0, HIPS_HEIGHT - 0.23 * down, 0),
        feet=feet,
        hands=[(side * 0.11, HIPS_HEIGHT - 0.23 * down + 0.05, 0.03) for side in SIDES],
        elbows=(1, 0, -0.5),
    )


def pushups(phase, strength):
    chest_height = 0.36 - 0.23 * wave(phase) * strength
    heels = -0.42, 0.09  # z, y of the ankles
    slope = math.asin((chest_height - heels[1]) / (THIGH + SHIN + TRUNK))
    leg = 0.99 * (THIGH + SHIN)
    return pose(
        hips=(0, heels[1] + leg * math.sin(slope), heels[0] + leg * math.cos(slope)),
        lean=90 - math.degrees(slope),
        feet=[(side * 0.06, heels[1], heels[0]) for side in SIDES],
        hands=[(side * 0.15, 0.025, 0.33) for side in SIDES],
        elbows=(0.8, 0.6, -1),
        knees=(0, -1, 0),
    )


def leg_lifts(phase, strength):
    angle = math.radians(6 + 84 * wave(phase) * strength)
    leg = 0.99 * (THIGH + SHIN)
    hips = 0, 0.075, 0.02
    return pose(
        hips=hips,
        lean=-90,
        feet=[(side * 0.05, hips[1] + leg * math.sin(angle), hips[2] + leg * math.cos(angle)) for side in SIDES],
        hands=[(side * 0.17, 0.03, 0.02) for side in SIDES],
        knees=(0, 1, -0.3),
    )


# floor's distance from the top and size of a body, in heights of the picture: a lying one is in the middle, too
STANDING = (0.86, 0.90), (0.66, 0.70)
LYING = (0.68, 0.72), (0.70, 0.74)

# pose function, duration of one repetition in s, view in degrees (0: the person faces the camera, 90: from the side)
EXERCISES = {
    "jumping_jacks": (jumping_jacks, (1.1, 1.6), (0, 20), STANDING),
    "squats": (squats, (1.5, 2.0), (60, 80), STANDING),
    "high_knees": (high_knees, (1.2, 1.8), (30, 75), STANDING),
    "arm_circles": (arm_circles, (1.1, 1.7), (0, 30), STANDING),
    "toe_touch": (toe_touch, (1.6, 2.2), (60, 85), STANDING),
    "standing_kicks": (standing_kicks, (1.6, 2.2), (60, 85), STANDING),
    "lunges": (lunges, (2.2, 3.0), (45, 85), STANDING),
    "pushups": (pushups, (1.2, 1.6), (75, 88), LYING),
    "leg_lifts": (leg_lifts, (1.6, 2.0), (75, 88), LYING),
}


# --- the figure -------------------------------------------------------------------------------------------------------


def bend(start, end, upper, lower, towards):
    """The joint and the end of a limb of two bones that reaches from `start` for `end` and bends `towards`."""
    start, end, towards = (np.asarray(v, float) for v in (start, end, towards))
    reach = end - start
    distance = np.linalg.norm(reach)
    along = reach / distance
    distance = min(max(distance, 1.05 * abs(upper - lower) + 1e-3), 0.999 * (upper + lower))
    across = towards - along * (towards @ along)
    across /= max(np.linalg.norm(across), 1e-6)
    to_joint = (upper**2 - lower**2 + distance**2) / (2 * distance)
    joint = start + along * to_joint + across * math.sqrt(max(upper**2 - to_joint**2, 0))
    return joint, start + along * distance


def toe_of(knee, ankle):
    """Where the tip of a foot is: at a right angle to the shin, and flat where that would be under the floor."""
    shin = (ankle - knee) / np.linalg.norm(ankle - knee)
    toe = ankle + FOOT * np.array([0.0, shin[2], -shin[1]])
    toe[1] = max(toe[1], 0.02)
    return toe


def draw_disc(draw, centre, radius, colour):
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def draw_limb(draw, start, end, start_radius, end_radius, colour):
    """A tapered limb with round ends, in pixels of the enlarged picture."""
    (x0, y0), (x1, y1) = start, end
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    across = (y1 - y0) / length, (x0 - x1) / length
    draw.polygon(
        [(x + sign * r * across[0], y + sign * r * across[1])
         for x, y, r, sign in ((x0, y0, start_radius, 1), (x1, y1, end_radius, 1), (x1, y1, end_radius, -1),
                               (x0, y0, start_radius, -1))],
        fill=colour,
    )
    draw_disc(draw, start, start_radius, colour)
    draw_disc(draw, end, end_radius, colour)


def shade(colour, factor):
    return tuple(min(255, int(c * factor)) for c in colour)


class Camera:
    """Projects a place in the room (body heights) to pixels of the enlarged picture, seen a little from above."""

    def __init__(self, view, size, centre, floor):
        self.sin, self.cos, self.size, self.centre, self.floor = math.sin(view), math.cos(view), size, centre, floor

    def depth(self, place):
        """Distance towards the camera, in body heights."""
        return place[2] * self.cos - place[0] * self.sin

    def __call__(self, place):
        x = place[0] * self.cos + place[2] * self.sin
        return self.centre + self.size * x, self.floor - self.size * (place[1] - 0.15 * self.depth(place))


def draw_person(draw, camera, body, person):
    """Draw a posed body: shadow, then limbs and trunk from far to near."""
    size = camera.size
    x, y = camera((body["hips"][0], 0, (body["hips"][2] + body["chest"][2]) / 2))
    half = size * (0.16 + 0.5 * abs(body["chest"][2] - body["hips"][2]) * abs(camera.sin))
    draw.ellipse((x - half, y - 0.035 * size, x + half, y + 0.035 * size), fill=person["shadow"])

    parts = [(camera.depth(body["hips"]), lambda: draw_trunk(draw, camera, body, person))]
    for i, side in enumerate(SIDES):
        for draw_part, root in ((draw_arm, body["shoulders"][i]), (draw_leg, (side * HALF_HIPS, *body["hips"][1:]))):
            light = 1.0 + 0.9 * (camera.depth(root) - camera.depth(body["hips"]))
            parts.append((camera.depth(root) + 0.01 * (draw_part is draw_arm),
                          lambda d=draw_part, r=root, i=i, s=light: d(draw, camera, body, person, r, i, s)))
    for _, draw_part in sorted(parts, key=lambda part: part[0]):
        draw_part()


def draw_trunk(draw, camera, body, person):
    size, hips, chest = camera.size, body["hips"], body["chest"]
    up = [(c - h) / TRUNK for c, h in zip(chest, hips)]
    neck, head, hair = ([c + k * u for c, u in zip(chest, up)] for k in (0.03, 0.155, 0.18))
    draw_limb(draw, camera(neck), camera(head), 0.035 * size, 0.035 * size, shade(person["skin"], 0.85))
    corners = [camera((x + side * w, y, z)) for (x, y, z), w in ((chest, 0.085), (hips, 0.045)) for side in SIDES]
    for a, b in ((0, 1), (1, 3), (3, 2), (2, 0)):
        draw_limb(draw, corners[a], corners[b], 0.055 * size, 0.055 * size, person["shirt"])
    draw.polygon([corners[i] for i in (0, 1, 3, 2)], fill=person["shirt"])
    draw_limb(draw, corners[2], corners[3], 0.062 * size, 0.062 * size, person["trousers"])
    draw_disc(draw, camera(hair), 0.075 * size, person["hair"])
    draw_disc(draw, camera(head), 0.07 * size, person["skin"])


def draw_arm(draw, camera, body, person, shoulder, i, light):
    size, side = camera.size, SIDES[i]
    x, y, z = body["elbows"]
    elbow, hand = bend(shoulder, body["hands"][i], UPPER_ARM, FOREARM, (side * x, y, z))
    shoulder, elbow, hand = camera(shoulder), camera(elbow), camera(hand)
    draw_limb(draw, elbow, hand, 0.033 * size, 0.026 * size, shade(person["skin"], light))
    draw_limb(draw, shoulder, elbow, 0.046 * size, 0.036 * size, shade(person["sleeves"], light))
    draw_disc(draw, hand, 0.036 * size, shade(person["skin"], light))


def draw_leg(draw, camera, body, person, hip, i, light):
    size, side = camera.size, SIDES[i]
    x, y, z = body["knees"]
    knee, ankle = bend(hip, body["feet"][i], THIGH, SHIN, (side * x, y, z))
    toe = camera(toe_of(knee, ankle))
    hip, knee, ankle = camera(hip), camera(knee), camera(ankle)
    draw_limb(draw, knee, ankle, 0.047 * size, 0.034 * size, shade(person["calves"], light))
    draw_limb(draw, hip, knee, 0.066 * size, 0.05 * size, shade(person["trousers"], light))
    draw_limb(draw, ankle, toe, 0.036 * size, 0.026 * size, shade(person["shoes"], light))


# --- the room ---------------------------------------------------------------------------------------------------------


def random_person(rng, floor_colour):
    """Colours of skin, hair, clothes and shadow, each (r, g, b)."""
    skins = [(245, 208, 178), (226, 178, 140), (198, 146, 106), (160, 110, 78), (124, 84, 62)]
    skin = skins[rng.integers(len(skins))]
    hairs = [(40, 30, 26), (90, 58, 32), (196, 160, 92), (120, 116, 112)]
    shirt, trousers, shoes = (bright_colour(rng) for _ in range(3))
    return dict(
        skin=skin,
        hair=shade(hairs[rng.integers(len(hairs))], rng.uniform(0.8, 1.1)),
        shirt=shirt,
        sleeves=shirt if rng.random() < 0.75 else skin,
        trousers=trousers,
        calves=trousers if rng.random() < 0.75 else skin,
        shoes=shoes,
        shadow=shade(floor_colour, 0.7),
    )


def bright_colour(rng):
    """A colour of sportswear, bright enough to stand out from any of the rooms."""
    colour = rng.integers(150, 256, 3)
    colour[rng.integers(3)] = rng.integers(230, 256)
    return tuple(int(c) for c in colour)


def draw_room(rng, horizon):
    """A room without people: wall, floor, skirting board and some furniture.

    Returns the picture, (HEIGHT + margins) x (WIDTH + margins) enlarged, and the floor's colour.
    """
    width, height = WIDTH * SCALE + 2 * MARGIN, HEIGHT * SCALE + 2 * MARGIN
    wall = np.array([96, 102, 110]) + rng.uniform(-3, 3) + rng.uniform(-3, 3, 3)
    floor = np.array([1.1, 1.0, 0.85]) * rng.uniform(86, 94)
    blotches = rng.normal(0, 4, (rng.integers(3, 7), rng.integers(3, 7), 1)) + rng.normal(0, 1, 3)
    light = np.linspace(rng.uniform(-7, 7), rng.uniform(-7, 7), width)[None, :, None]
    picture = np.where(np.arange(height)[:, None, None] < horizon, wall, floor) + light
    blotches = Image.fromarray((blotches + 128).clip(0, 255).astype(np.uint8)).resize((width, height), Image.BICUBIC)
    picture = picture + np.asarray(blotches, float) - 128 + rng.normal(0, 5, (height, width, 1))
    room = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(1))
    draw = ImageDraw.Draw(room)

    edge = shade(wall, 0.82)
    for _ in range(rng.integers(1, 4)):  # pictures, windows, shelves
        w, h = rng.integers(60, 170), rng.integers(50, 140)
        x, y = rng.integers(0, width - w), rng.integers(0, max(horizon - h - 40, 1))
        draw.rectangle((x, y, x + w, y + h), fill=shade(wall, rng.uniform(0.88, 1.12)), outline=edge, width=5)
    if rng.random() < 0.6:  # a cupboard or a sofa at one side
        w, h = rng.integers(90, 170), rng.integers(90, 260)
        x = -20 if rng.random() < 0.5 else width - w + 20
        draw.rectangle((x, horizon + 18 - h, x + w, horizon + 18), fill=shade(wall, rng.uniform(0.85, 1.1)))
    draw.rectangle((0, horizon - 8, width, horizon), fill=shade(wall, 1.15))
    for x in range(-width, 2 * width, int(rng.integers(70, 130))):  # floor boards, in perspective
        draw.line((width / 2 + (x - width / 2) * 0.6, horizon + 1, x, height), fill=shade(floor, 0.88), width=3)
    return room, floor


# --- one video --------------------------------------------------------------------------------------------------------


def frames_of(class_name, seeds, num_frames, fps):
    """Yield the `num_frames` frames of a video, uint8 (HEIGHT, WIDTH, 3) RGB."""
    rng = np.random.default_rng(seeds)
    pose_function, repetition, views, (floors, sizes) = EXERCISES[class_name]
    seconds_per_repetition, first_phase, strength = rng.uniform(*repetition), rng.random(), rng.uniform(0.85, 1)
    view = math.radians(rng.uniform(*views) * rng.choice([-1, 1]))
    floor = HEIGHT * SCALE * rng.uniform(*floors) + MARGIN
    horizon = int(floor - HEIGHT * SCALE * rng.uniform(0.10, 0.22))
    size, centre = HEIGHT * SCALE * rng.uniform(*sizes), WIDTH * SCALE * rng.uniform(0.485, 0.515) + MARGIN
    camera = Camera(view, size, centre, floor)
    room, floor_colour = draw_room(rng, horizon)
    person = random_person(rng, floor_colour)
    shake, shake_rates, shake_phases = rng.uniform(0, 1.5), rng.uniform(0.5, 3, 2), rng.uniform(0, 6, 2)
    grain = rng.normal(0, rng.uniform(1, 3), (2 * HEIGHT, 2 * WIDTH, 1)).astype(np.int16)

    for i in range(num_frames):
        picture = room.copy()
        body = pose_function(first_phase + i / fps / seconds_per_repetition, strength)
        draw_person(ImageDraw.Draw(picture), camera, body, person)
        x, y = (MARGIN + SCALE * shake * np.sin(shake_rates * i / fps * 2 + shake_phases)).astype(int)
        picture = picture.crop((x, y, x + WIDTH * SCALE, y + HEIGHT * SCALE)).reduce(SCALE)
        top, left = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
        yield (np.asarray(picture) + grain[top : top + HEIGHT, left : left + WIDTH]).clip(0, 255).astype(np.uint8)


def is_complete(path, num_frames):
    """Whether `path` is a readable mp4 that declares `num_frames` frames (a cut-off mp4 has lost its index)."""
    import av

    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].frames == num_frames
    except (av.error.FFmpegError, OSError, IndexError):
        return False


def make_video(video):
    """Draw and encode one planned video unless it is already there; returns whether it was written."""
    import av

    path = Path(video["path"])
    if is_complete(path, video["num_frames"]):
        return False
    with common.written_then_renamed(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # one thread: several share the picture between them differently from machine to machine
        # without mbtree, whose lookahead reads memory it never set: the same frames gave different files
        options = {"preset": "veryfast", "bf": "2", "crf": "24", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=video["fps"], options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = WIDTH, HEIGHT, "yuv420p", 1
        for picture in frames_of(video["class_name"], video["seeds"], video["num_frames"], video["fps"]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return True


# --- the dataset ------------------------------------------------------------------------------------------------------


def plan_videos():
    """What is to be drawn: a dict a video, sorted by id.

    Ids have gaps and the four parts take a quarter of them each, as in QEVD. In every class and split the lengths are
    spread evenly over 3 to 6 s, so that some are too short for 16 frames at 4 fps.
    """
    rng = np.random.default_rng(SEED)
    splits = {"train": TRAIN_VIDEOS_PER_CLASS, "val": VAL_VIDEOS_PER_CLASS}
    videos = []
    for class_name in CLASSES:
        for split, count in splits.items():
            for seconds in rng.permutation(np.linspace(3.0, 5.9, count)):
                fps = int(rng.choice([24, 25, 30]))
                videos.append(dict(class_name=class_name, split=split, fps=fps, num_frames=round(float(seconds) * fps)))
    ids = np.sort(rng.choice(300_000, len(videos), replace=False))
    videos = [videos[i] for i in rng.permutation(len(videos))]
    for k, (video, number) in enumerate(zip(videos, ids.tolist())):
        part = f"QEVD-FIT-300k-Part-{1 + k * NUM_PARTS // len(videos)}"
        video.update(path=str(Path(OUT, part, f"{number:08d}.mp4")), seeds=[SEED, number])
    return videos


def check_settings():
    """Exit with code 2 if CLASSES or a count makes no sense, or if OUT was drawn with other settings; note ours."""
    unknown = [name for name in CLASSES if name not in EXERCISES]
    if unknown or not CLASSES or len(set(CLASSES)) < len(CLASSES):
        common.refuse(f"CLASSES = {CLASSES} must name different exercises of these: {', '.join(EXERCISES)}")
    for name, least in (("TRAIN_VIDEOS_PER_CLASS", 1), ("VAL_VIDEOS_PER_CLASS", 1), ("SEED", 0), ("NUM_WORKERS", 1)):
        if globals()[name] < least:
            common.refuse(f"{name} = {globals()[name]} must be at least {least}")
    settings = {name: globals()[name] for name in ("CLASSES", "TRAIN_VIDEOS_PER_CLASS", "VAL_VIDEOS_PER_CLASS", "SEED")}
    path = Path(OUT, "settings.json")
    text = json.dumps(settings, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        common.refuse(f"{OUT} was drawn with other settings ({path}); delete that folder, or choose another OUT")
    if not path.exists() and Path(OUT).is_dir() and any(Path(OUT).iterdir()):
        common.refuse(f"{OUT} holds files that this tool did not write; choose another OUT")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_text(path, text)


def end_with_parent():
    """Let this process of the pool end when its parent is killed; it would wait for work for ever."""

    def wait_then_end():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_then_end, daemon=True).start()


def make_videos(videos):
    """Draw what is missing, NUM_WORKERS videos at a time; returns how many were written."""
    from tqdm import tqdm

    if needed := LARGEST * sum(not os.path.exists(video["path"]) for video in videos):
        common.check_space(OUT, needed, "make room, or choose another OUT or fewer videos; nothing was drawn")
    for part in {Path(video["path"]).parent for video in videos}:
        part.mkdir(exist_ok=True)
        for left_by_a_kill in part.glob(".*.mp4.*.tmp"):
            left_by_a_kill.unlink()
    with ProcessPoolExecutor(NUM_WORKERS, initializer=end_with_parent) as pool:
        jobs = [pool.submit(make_video, video) for video in videos]
        return sum(job.result() for job in tqdm(as_completed(jobs), "drawing", len(jobs), unit="video"))


def write_contact_sheet(path, videos):
    """Two videos a class side by side, frames of about one and a half repetitions each, and the class's name."""
    import av

    width, height, columns = 120, 90, 7
    sheet = Image.new("RGB", (2 * columns * width + 16, len(CLASSES) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, class_name in enumerate(CLASSES):
        top = row * (height + 18)
        draw.text((4, top + 2), class_name.replace("_", " "), "black")
        chosen = [video for video in videos if video["class_name"] == class_name][:2]
        for k, video in enumerate(chosen):
            last = min(1.5 * sum(EXERCISES[class_name][1]) / 2 * video["fps"], video["num_frames"] - 1)
            wanted = np.linspace(0, last, columns).astype(int)
            with av.open(video["path"]) as container:
                frames = [frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in wanted]
            for column, frame in enumerate(frames):
                sheet.paste(frame.resize((width, height)), (k * (columns * width + 16) + column * width, top + 18))
    with common.written_then_renamed(path) as temporary:
        sheet.save(temporary, format="PNG")


def main():
    flags.set_constants_from_flags(globals())
    check_settings()
    videos = plan_videos()
    written = make_videos(videos)
    labels = [{"video_path": f"./{Path(video['path']).name}", "label": video["class_name"].replace("_", " "),
               "split": video["split"]} for video in videos]
    common.write_text(Path(OUT, LABELS), json.dumps(labels, indent=1) + "\n")
    write_contact_sheet(Path(OUT, "contact_sheet.png"), videos)
    num_train = sum(video["split"] == "train" for video in videos)
    print(f"{OUT}: {len(videos)} videos = {written} drawn + {len(videos) - written} already there = "
          f"{num_train} train + {len(videos) - num_train} val, {len(CLASSES)} classes")
    parts = [str(Path(OUT, f"QEVD-FIT-300k-Part-{1 + k}")) for k in range(NUM_PARTS)]
    into = ["--labels-json", str(Path(OUT, LABELS)), "--dest", str(Path(OUT).parent / "QEVD_organized")]
    print("next:", shlex.join(["python", "tools/refactor_dataset.py", "--srcs", *parts, *into]))


if __name__ == "__main__":
    main()
