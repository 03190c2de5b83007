"""What a video looks like, in a few numbers: copies that were encoded again or mirrored, and parts of one recording.

Of each of five frames the signs of the 63 lowest frequencies of a discrete cosine transform are kept (a perceptual
hash; Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010). Mirroring a picture changes
the signs of the odd horizontal frequencies, and nothing else.
"""

from collections import defaultdict

SIDE = 8  # frequencies in each direction
WHOLE = 32  # pixels of a side of the picture that is transformed
NUM_FRAMES = 5
# of 64 bits, measured on 20 drawn and filmed videos: encoded again at half the size or mirrored, the frames of a video
# differ in 5 bits at most, those of others in 14 at least; a part of a recording has a frame that differs in 3 at most,
# others in 8 at least
SAME_FRAME, SAME_SCENE = 9, 4
SAME_LENGTH = 20  # hundredths of a second; takes before one wall may look alike, but do not last as long
ODD_COLUMNS = sum(1 << (row * SIDE + column) for row in range(SIDE) for column in range(1, SIDE, 2))
UNREADABLE = "-"  # instead of an appearance


def appearance_of(path):
    """The duration in hundredths of a second and the hashes of five frames, spread evenly: six times 16 hex digits.

    The hash of a frame of one grey is 0. A video without frames gives UNREADABLE. Runs in a worker process.
    """
    from torchvision_patches.decoding import UnreadableVideo, opened

    try:
        with opened(path) as (container, stream):
            base = stream.time_base
            start = (stream.start_time or 0) * base
            duration = stream.duration * base if stream.duration else (container.duration or 0) / 1_000_000
            frames = [frame_at(container, stream, start + duration * (2 * k + 1) / (2 * NUM_FRAMES))
                      for k in range(NUM_FRAMES)]  # fmt: skip
            return "".join(f"{number:016x}" for number in [round(duration * 100), *map(hash_of, frames)])
    except UnreadableVideo:
        return UNREADABLE


def frame_at(container, stream, time):
    """The frame that is shown at `time`, in s, or the last one before the end. Raises StopIteration without any."""
    container.seek(int(time / stream.time_base), stream=stream)
    frames = container.decode(stream)
    shown = next(frames)
    for frame in frames:
        if shown.time is None or shown.time >= time:
            break
        shown = frame
    return shown


def hash_of(frame):
    """The signs of the low frequencies of a frame's grey levels, as a number of 64 bits; 0 where all is one grey."""
    import numpy as np
    from scipy.fft import dctn

    grey = frame.reformat(WHOLE, WHOLE, "gray").to_ndarray().astype(float)
    if grey.std() < 4:
        return 0
    bits = dctn(grey)[:SIDE, :SIDE].flatten() > 0
    return sum(1 << int(k) for k in np.flatnonzero(bits))


def alike(appearances):
    """Pairs of videos that show the same.

    appearances: {video: appearance}. Returns (twins, parts), lists of pairs: twins show the same from start to end,
    mirrored or not; parts have a picture in common, as trims of one recording or takes before one wall.
    """
    looks = {video: [int(text[k : k + 16], 16) for k in range(0, len(text), 16)]
             for video, text in appearances.items() if text != UNREADABLE}  # fmt: skip
    near, twins, parts = defaultdict(list), [], []
    for video, (duration, *hashes) in looks.items():
        candidates = {}
        for seen in {*hashes, *(value ^ ODD_COLUMNS for value in hashes if value)} - {0}:
            for band in bands_of(seen):
                candidates |= dict.fromkeys(near[band])
        for other in candidates:
            other_duration, *others = looks[other]
            if abs(duration - other_duration) <= SAME_LENGTH and is_twin(hashes, others):
                twins.append((other, video))
            elif any(a and b and (a ^ b).bit_count() <= SAME_SCENE for a in hashes for b in others):
                parts.append((other, video))
        for seen in {*hashes} - {0}:
            for band in bands_of(seen):
                near[band].append(video)
    return twins, parts


def bands_of(value):
    """A hash cut into four: [(number, part)]. Two hashes that differ in three bits or fewer have a part in common."""
    return [(k, sum((value >> bit & 1) << bit for bit in range(k, 64, 4))) for k in range(4)]


def is_twin(hashes, others):
    """Whether two videos show the same at all their frames, mirrored or not, and at least at one that is a picture."""
    if not any(a and b for a, b in zip(hashes, others)):
        return False
    return any(
        all((a ^ b ^ (mask if a and b else 0)).bit_count() <= SAME_FRAME for a, b in zip(hashes, others))
        for mask in (0, ODD_COLUMNS)
    )
