"""Draw a small QEVD-shaped dataset, so that every step of the README runs with nothing downloaded.

Reads:  nothing
Writes: OUT/QEVD-FIT-300k-Part-1 … -Part-4/NNNNNNNN.mp4    an articulated figure exercising in a room, H.264, 3 to 6 s
        OUT/QEVD-FIT-300k-Part-1 …/fine_grained_labels.json the raw labels, [{"video_path", "labels", "split"}, …]
        OUT/QEVD-FIT-300k-Additional-Labels/fine_grained_labels_with_worker_ids.json    who is in which video
        OUT/fine_grained_labels_release.json                [{"video_path", "label", "split"}, …], as the contest's
        OUT/contact_sheet.png                               frames of each class over time, for people
        OUT/settings.json                                   what the videos were drawn with

A person is in about four videos of one split, in equal colours. The raw labels name EXTRA_VIDEOS_PER_CLASS more.

    $ python tools/make_sample_dataset.py

The same SEED, CLASSES and counts give the same pixels on every run, with any NUM_WORKERS (and the same bytes with the
same PyAV). A second run keeps what is complete and draws what is missing or cut off.
"""

import json
import os
from collections import Counter, deque
from pathlib import Path

import common
from common import flags

import numpy as np
from PIL import Image, ImageDraw

from drawn.exercises import EXERCISES
from drawn.scene import HEIGHT, WIDTH, frames_of
from torchvision_patches.pool import WorkerLost, outcomes_of

# ----------------------------------------------------------------------------------------------------------------------
OUT = "./sample/dataset"  # folder to write, in the layout of a QEVD download
CLASSES = ["jumping_jacks", "squats", "toe_touch",  # names of class_map.json; see EXERCISES for what can be drawn
           "standing_kicks", "pushups", "leg_lifts"]
TRAIN_VIDEOS_PER_CLASS = 16  # videos
VAL_VIDEOS_PER_CLASS = 8  # videos
EXTRA_VIDEOS_PER_CLASS = 1  # videos of the raw labels alone, for refactor_dataset.py --raw-labels
SEED = 0  # another seed gives other people, rooms and video ids
NUM_WORKERS = os.cpu_count() or 1  # processes that draw and encode
# ----------------------------------------------------------------------------------------------------------------------

NUM_PARTS = 4
LABELS = "fine_grained_labels_release.json"
RAW_LABELS = "fine_grained_labels.json"  # in each part
WORKERS = "QEVD-FIT-300k-Additional-Labels/fine_grained_labels_with_worker_ids.json"
MANNERS = ["", " - stopping early", " - rom=5", " - fast"]  # what raw labels say behind the exercise
VIDEOS_PER_PERSON = 4
TIME_LIMIT = 600  # s for one video, which takes one or two
LARGEST = 300_000  # bytes that a video has at most; 0.1 MB on average

# --- one video --------------------------------------------------------------------------------------------------------


def is_whole_video(path, num_frames):
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
    if is_whole_video(path, video["num_frames"]):
        return False
    with common.written_then_renamed(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # one thread: several share the picture between them differently from machine to machine
        # without mbtree, whose lookahead reads memory it never set: the same frames gave different files
        options = {"preset": "veryfast", "bf": "2", "crf": "24", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=video["fps"], options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = WIDTH, HEIGHT, "yuv420p", 1
        drawn = (video[key] for key in ("class_name", "seeds", "num_frames", "fps", "person_seeds"))
        for picture in frames_of(*drawn):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return True


# --- the dataset ------------------------------------------------------------------------------------------------------


def plan_videos():
    """What is to be drawn: a dict a video, sorted by id.

    Ids have gaps and the four parts take a quarter of them each, as in QEVD. In every class and split the lengths are
    spread evenly over 3 to 6 s, so that some are too short for 16 frames at 4 fps. A person is in one split.
    """
    rng, videos, num_people = np.random.default_rng(SEED), [], 0
    splits = {"train": TRAIN_VIDEOS_PER_CLASS, "val": VAL_VIDEOS_PER_CLASS, "extra": EXTRA_VIDEOS_PER_CLASS}
    for split, count in splits.items():
        people = max(1, count * len(CLASSES) // VIDEOS_PER_PERSON)
        for class_name in CLASSES:
            for seconds in rng.permutation(np.linspace(3.0, 5.9, count)):
                fps, number = int(rng.choice([24, 25, 30])), sum(video["split"] == split for video in videos)
                video = dict(class_name=class_name, split=split, person=num_people + number % people, fps=fps)
                videos.append(video | dict(num_frames=round(float(seconds) * fps)))
        num_people += people
    ids = np.sort(rng.choice(300_000, len(videos), replace=False))
    videos = [videos[i] for i in rng.permutation(len(videos))]
    for k, (video, number) in enumerate(zip(videos, ids.tolist())):
        part = f"QEVD-FIT-300k-Part-{1 + k * NUM_PARTS // len(videos)}"
        video.update(seeds=[SEED, number], person_seeds=[SEED, 1, video["person"]])
        video["path"] = str(Path(OUT, part, f"{number:08d}.mp4"))
    return videos


def write_labels(videos):
    """Write the release file, the raw labels of each part and who is in which video, in the forms of QEVD."""
    release, workers, raw = [], [], {f"QEVD-FIT-300k-Part-{1 + k}": [] for k in range(NUM_PARTS)}
    for video in videos:
        path, label = Path(video["path"]), video["class_name"].replace("_", " ")
        name, number = {"video_path": f"./{path.name}"}, int(path.stem)
        if video["split"] != "extra":
            release.append(name | {"label": label, "split": video["split"]})
        workers.append(name | {"worker_id": video["person"]})
        labels = [label + MANNERS[(number + k) % len(MANNERS)] for k in range(1 + number % 2)]
        described = {"labels": labels, "labels_descriptive": [f"{text}." for text in labels]}
        raw[path.parent.name].append(name | described | {"split": "test" if video["split"] == "val" else "train"})
    Path(OUT, WORKERS).parent.mkdir(exist_ok=True)
    files = {LABELS: release, WORKERS: workers} | {f"{part}/{RAW_LABELS}": rows for part, rows in raw.items()}
    for name, rows in files.items():
        Path(OUT, name).parent.mkdir(exist_ok=True)
        common.write_text(Path(OUT, name), json.dumps(rows, indent=1) + "\n")


def check_and_note_settings():
    """Exit with code 2 if CLASSES or a count makes no sense, or if OUT was drawn with other settings; note ours."""
    unknown = [name for name in CLASSES if name not in EXERCISES]
    if unknown or not CLASSES or len(set(CLASSES)) < len(CLASSES):
        common.refuse(f"CLASSES = {CLASSES} must name different exercises of these: {', '.join(EXERCISES)}")
    for name, least in (("TRAIN_VIDEOS_PER_CLASS", 1), ("VAL_VIDEOS_PER_CLASS", 1), ("EXTRA_VIDEOS_PER_CLASS", 0),
                        ("SEED", 0), ("NUM_WORKERS", 1)):
        if globals()[name] < least:
            common.refuse(f"{name} = {globals()[name]} must be at least {least}")
    settings = {name: globals()[name] for name in ("CLASSES", "TRAIN_VIDEOS_PER_CLASS", "VAL_VIDEOS_PER_CLASS",
                                                   "EXTRA_VIDEOS_PER_CLASS", "SEED")}  # fmt: skip
    path = Path(OUT, "settings.json")
    if not path.exists() and Path(OUT).is_dir() and any(Path(OUT).iterdir()):
        common.refuse(f"{OUT} holds files that this tool did not write; choose another OUT")
    common.same_settings(path, settings, "delete that folder, or choose another OUT")


def make_videos(videos):
    """Draw what is missing, NUM_WORKERS videos at a time; returns how many were written."""
    from tqdm import tqdm

    if needed := LARGEST * sum(not os.path.exists(video["path"]) for video in videos):
        common.check_space(OUT, needed, "make room, or choose another OUT or fewer videos; nothing was drawn")
    for part in {Path(video["path"]).parent for video in videos}:
        part.mkdir(exist_ok=True)
        for left_by_a_kill in part.glob(".*.mp4.*.tmp"):
            left_by_a_kill.unlink()
    written, outcomes = 0, outcomes_of(make_video, deque(videos), NUM_WORKERS, TIME_LIMIT)
    for outcome in tqdm(outcomes, "drawing", len(videos), unit="video"):
        if isinstance(outcome.error, WorkerLost):
            common.refuse(f"{outcome.item['path']} was not drawn ({outcome.error.reason}); start again to go on")
        if outcome.error:
            raise outcome.error
        written += outcome.value
    return written


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
    check_and_note_settings()
    videos = plan_videos()
    written = make_videos(videos)
    write_labels(videos)
    write_contact_sheet(Path(OUT, "contact_sheet.png"), videos)
    count = Counter(video["split"] for video in videos)
    print(f"{OUT}: {len(videos)} videos = {written} drawn + {len(videos) - written} already there = "
          f"{count['train']} train + {count['val']} val + {count['extra']} of raw labels alone, {len(CLASSES)} classes")
    parts, beside = [Path(OUT, f"QEVD-FIT-300k-Part-{1 + k}") for k in range(NUM_PARTS)], Path(OUT).parent
    into = {"labels_json": Path(OUT, LABELS), "dest": beside / "QEVD_organized", "missing_csv": beside / "missing.csv"}
    print(f"next: {flags.next_command('refactor_dataset.py', srcs=parts, **into)}")


if __name__ == "__main__":
    main()
