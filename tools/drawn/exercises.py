"""The exercises that can be drawn: where hips, chest, hands and feet of a body are at each phase of a repetition.

Lengths are in body heights. Axes: x to the person's left, y up from the floor, z to where the person faces. A pose
function takes the phase of one repetition (1 = a whole one) and its strength (about 0.85 to 1), and says where hips,
chest, hands and feet are; knees and elbows follow from the lengths of the limbs.
"""

import math

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


def jabs(phase, strength):
    reaches = [strength * reach for reach in turns(phase)]
    return pose(
        lean=6,
        feet=[(HALF_HIPS, ANKLE_HEIGHT, 0.10), (-HALF_HIPS, ANKLE_HEIGHT, -0.10)],
        hands_from_shoulders=[(-side * 0.06, 0.03, 0.10 + 0.20 * reach) for side, reach in zip(SIDES, reaches)],
        elbows=(0.3, -1, -0.2),
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
    "jabs": (jabs, (0.9, 1.4), (50, 80), STANDING),
    "pushups": (pushups, (1.2, 1.6), (75, 88), LYING),
    "leg_lifts": (leg_lifts, (1.6, 2.0), (75, 88), LYING),
}
