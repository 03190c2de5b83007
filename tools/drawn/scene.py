"""The frames of a drawn video: a person of simple shapes exercises in a room, and the camera shakes a little."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from drawn.exercises import EXERCISES, FOOT, FOREARM, HALF_HIPS, SHIN, SIDES, THIGH, TRUNK, UPPER_ARM

WIDTH, HEIGHT = 340, 256  # pixels
SCALE = 2  # the picture is drawn this many times larger and then reduced, which smooths its edges
MARGIN = 8 * SCALE  # pixels the camera may shake in each direction

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


# --- the frames -------------------------------------------------------------------------------------------------------


def frames_of(class_name, seeds, num_frames, fps, person_seeds=None):
    """Yield the `num_frames` frames of a video, uint8 (HEIGHT, WIDTH, 3) RGB.

    person_seeds: equal ones show a person of equal colours; by default a person of the video's own.
    """
    rng = np.random.default_rng(seeds)
    pose_function, repetition, views, (floors, sizes) = EXERCISES[class_name]
    seconds_per_repetition, first_phase, strength = rng.uniform(*repetition), rng.random(), rng.uniform(0.85, 1)
    view = math.radians(rng.uniform(*views) * rng.choice([-1, 1]))
    floor = HEIGHT * SCALE * rng.uniform(*floors) + MARGIN
    horizon = int(floor - HEIGHT * SCALE * rng.uniform(0.10, 0.22))
    size, centre = HEIGHT * SCALE * rng.uniform(*sizes), WIDTH * SCALE * rng.uniform(0.485, 0.515) + MARGIN
    camera = Camera(view, size, centre, floor)
    room, floor_colour = draw_room(rng, horizon)
    person = random_person(np.random.default_rng(person_seeds or seeds), floor_colour)
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
