"""Classify videos that no one has labelled: the five best classes of each, and a picture of what the model saw.

Reads   VIDEOS: files, folders (searched to the bottom) and patterns; CHECKPOINT. No labels, no class folders.
Writes  OUT/<name>.png for each video: the frames that the model saw, with their times, and the five best classes;
        CSV and JSONL, one row a video, if they are named, with whether it is right where the video's folder has the
        name of a class, and whether the network is sure. With --timeline, for each recording:
        OUT/<name>-timeline.png, -segments.csv and -annotated.mp4 (the label burnt in, sound kept)

    $ python tools/predict.py squats.mp4 more_videos/ --checkpoint checkpoint.pth
    $ python tools/predict.py session.mp4 --timeline

A video is judged by its first clip of the official frame rule, made as the network was trained on, and a timeline by
all clips of that rule that start STRIDE seconds apart. Probabilities are those after the temperature that training or
teach.py fitted; where the best is below the threshold that they found, the label is "not sure".

Exit codes: 0 all videos are classified, 1 some cannot be (listed), 2 wrong usage, unusable model, full disk.
"""

import contextlib
import csv
import glob
import json
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import common
from common import finding, flags, machine, names
from common.calibration import NO_NUMBERS, NOT_SURE, best, label_of
from common.checkpoints import ENDINGS, best_beside, load_checkpoint

import numpy as np

from aihub.description import read_description

# ----------------------------------------------------------------------------------------------------------------------
VIDEOS = []  # files, folders, patterns such as 'clips/*.mp4'
CHECKPOINT = ["./checkpoint.pth"]  # of train.py, several vote; or an ONNX file or folder, or a binary of the local hub
CHECKPOINT_WEIGHTS = []  # how much each checkpoint's vote counts, say 2 1 1; []: all alike
MIRROR = False  # true: the mirror image of a clip votes, too
BEST = False  # true: model_best.pth beside each of them, of the best validation, instead
OUT = "./predictions"  # folder for the pictures
PICTURES = True  # false: no pictures
CSV = ""  # a file for one row a video ("": none)
JSONL = ""  # the same with all logits, one JSON object a line ("": none)
TIMELINE = False  # true: label every moment of long recordings
STRIDE = 1.0  # seconds between the clips of a timeline
FRAME_RATE = 0  # frames per second at which a video is sampled; 0: as the model was trained
ROTATE = None  # true: turn videos upright as their files ask players to; None: as the model was trained
NUM_WORKERS = 0  # processes that decode; 0: one a core
TIMEOUT = 120  # seconds after which a video that does not finish decoding has failed
# ----------------------------------------------------------------------------------------------------------------------

BAR = 30  # characters of the longest bar in the terminal
YES_NO = "no", "yes"
WITH_BARS = 10  # with more videos than these, each gets one line


def clip_with_flags(classifier, path):
    """The ClipDescription of what the network in `path` takes, with FRAME_RATE and ROTATE where it does not tell them.

    Exits with code 2 and one sentence if they contradict it.
    """
    from torchvision_patches import clip

    wanted = {"frame_rate": float(FRAME_RATE)} if FRAME_RATE else {}
    wanted |= {} if ROTATE is None else {"rotate": ROTATE}
    if not wanted:
        return classifier.description
    if Path(path).suffix in ENDINGS:
        saved = load_checkpoint(path)
        _, untold = clip.described(saved, saved["args"])
    else:
        _, untold = clip.described(read_description(path).get("clip") or {})
    try:
        return clip.agreed(classifier.description, untold, wanted, path)
    except ValueError as e:
        common.refuse(str(e))


def videos_that_are_named():
    """The files that VIDEOS names: ([path], {path: why not}), each once, in the order of VIDEOS."""
    videos, failed = {}, {}
    for word in VIDEOS:
        paths = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not paths:
            failed[word] = "there is no such file"
        for path in paths:
            if os.path.isdir(path):
                found = finding.find_videos(path)
                inside = sorted(found.videos + found.misplaced)
                videos |= dict.fromkeys(os.path.join(path, video) for video in inside)
                failed |= {os.path.join(path, video): why for video, why in found.failures.items()}
                if not inside:
                    failed.setdefault(path, f"no video in this folder ({', '.join(sorted(finding.VIDEO_ENDINGS))})")
            else:
                videos[path] = None
    return list(videos), failed


def output_names(videos):
    """{video: name of its files in OUT}: the file's, with ending, folder and number where two have the same."""
    result, taken = {}, set()
    stems = Counter(Path(video).stem.lower() for video in videos)
    for video in videos:
        path = Path(video)
        name = path.stem if stems[path.stem.lower()] == 1 else f"{path.absolute().parent.name}__{path.name}"
        number = 1
        while name.lower() in taken:  # on Windows and macOS A.png is a.png
            number += 1
            name = f"{name.rpartition(' ')[0] if number > 2 else name} {number}"
        taken.add(name.lower())
        result[video] = name
    return result


# --- one prediction a video -------------------------------------------------------------------------------------------


def predictions_of(videos, classifier):
    """Yield (video, FirstClip or None, its probabilities and logits or None, why not), in order, as they come.

    Probabilities and logits are float32 (num_classes,).
    """
    from torchvision_patches.clip import first_clip, resize_function
    from torchvision_patches.pool import outcomes_of

    resize_function()  # once, before the processes are forked, not in each of them
    read, waiting = partial(first_clip, description=classifier.description), []
    for outcome in outcomes_of(read, deque(videos), machine.num_workers(NUM_WORKERS), TIMEOUT, in_order=True):
        waiting.append(outcome)
        if sum(1 for each in waiting if each.value) == classifier.batch_size:
            yield from classified(waiting, classifier)
            waiting = []
    yield from classified(waiting, classifier)


def classified(outcomes, classifier):
    """What `predictions_of` yields, of some outcomes of `first_clip`."""
    clips = [outcome.value.pixels for outcome in outcomes if outcome.value]
    rows = zip(*classifier.probabilities(np.stack(clips))) if clips else iter(())
    for outcome in outcomes:
        found, why = next(rows) if outcome.value else None, outcome.why_not()
        if found and np.isnan(found[0]).any():
            why = NO_NUMBERS
        yield outcome.item, outcome.value, found, why


def predict_all(videos, failed, names_in_out, classifier):
    """Classify each video by its first clip; print, draw and list it. Videos that fail go to `failed`.

    Returns (number of videos of which it is not sure, [(right, sure)] of those whose folder has the name of a class).
    """
    from tqdm import tqdm

    from see.drawing import draw_clip

    few, unsure, right = len(videos) <= WITH_BARS, 0, []
    labels = {names.class_name(name): name for name in classifier.classes}
    with (
        table_of_videos() as write,
        tqdm(total=len(videos), unit="video", disable=few or None) as bar,
        ThreadPoolExecutor(1) as painter,  # draws while the network classifies the next
    ):
        drawing = None
        for video, clip, found, why in predictions_of(videos, classifier):
            bar.update()
            if why:
                failed[video] = why
                write({"video": video, "error": why})
                continue
            probabilities, logits = found
            five = best(probabilities, classifier.classes)
            sure = label_of(five[0], classifier.threshold) != NOT_SURE
            unsure += not sure
            label = labels.get(names.class_name(Path(video).absolute().parent.name), "")
            right += [(five[0][0] == label, sure)] if label else []
            verdict = verdict_on(five, sure, label)
            upright = classifier.description.rotate
            bar.write(lines_of(video, clip, five, verdict, upright) if few else line_of(video, five, verdict))
            if PICTURES:
                if drawing:
                    drawing.result()  # one at a time: each holds a clip
                picture = Path(OUT, names.file_name(names_in_out[video], ".png"))
                drawing = painter.submit(draw_clip, picture, video, clip, five, classifier.about, sure)
            row = {"video": video, "error": "", "classes": five, "logits": logits.tolist(), "label": label}
            row["right"] = YES_NO[right[-1][0]] if label else ""
            row["sure"] = "" if classifier.threshold is None else YES_NO[sure]
            write(row | {key: value for key, value in clip._asdict().items() if key != "pixels"})
        for video, why in failed.items():
            if video not in names_in_out:  # what names no file at all
                write({"video": video, "error": why})
        if drawing:
            drawing.result()
    return unsure, right


@contextlib.contextmanager
def table_of_videos():
    """Yields a function that writes one row, a dict, to CSV and JSONL; both are complete at the end, or absent."""
    columns = ["video", "error", *(f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability"))]
    columns += ["num_frames", "fps", "rotation", "label", "right", "sure"]
    with contextlib.ExitStack() as stack:
        files = {}
        for name in filter(None, (CSV, JSONL)):
            Path(name).absolute().parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(common.written_then_renamed(name))
            exact = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names are bytes
            files[name] = stack.enter_context(open(temporary, "w", **exact))
        if CSV:
            table = csv.DictWriter(files[CSV], columns, extrasaction="ignore")
            table.writeheader()

        def write(row):
            if JSONL:
                files[JSONL].write(json.dumps(row) + "\n")
            if CSV:
                cells = [cell for name, p in row.get("classes", []) for cell in (name, f"{p:.4f}")]
                table.writerow(row | dict(zip(columns[2:], cells)))

        yield write


def lines_of(video, clip, five, verdict, upright):
    """What is printed of a video: its file, what is odd about it, and its five best classes with bars.

    upright: whether the clip is turned as players turn the video.
    """
    from see.drawing import about_rotation

    five = [(names.printable(name), p) for name, p in five]
    width, about = max(len(name) for name, _ in five), f"{clip.num_frames / clip.fps:.1f} s, {clip.fps:.3g} fps"
    about += about_rotation(0 if upright else clip.rotation) + verdict
    lines = [f"\n{names.printable(video)}: {about}"]
    lines += [f"  {name:{width}}  {'█' * round(BAR * p):{BAR}} {100 * p:5.1f} %" for name, p in five]
    return "\n".join(lines)


def line_of(video, five, verdict):
    """The one line of a video among many."""
    two = ", ".join(f"{names.printable(name)} {100 * p:.1f} %" for name, p in five[:2])
    return f"{names.printable(video)}: {two}{verdict}"


def verdict_on(five, sure, label):
    """Whether the network is not sure, and whether its best class is the one that the video's folder names, as text."""
    verdict = "; right" if five[0][0] == label else f"; wrong: its folder is {names.printable(label)}"
    return f"; {NOT_SURE}" * (not sure) + verdict * bool(label)


# --- the end ----------------------------------------------------------------------------------------------------------


def report_labels(videos, failed, unsure, right):
    """Print what failed, how many there are of each, the accuracy where folders name classes, and what was written.

    unsure, right: as `predict_all` returns them.
    """
    for video, why in failed.items():
        print(f"failed: {names.printable(video)}: {why}")
    done = sum(video not in failed for video in videos)
    print(f"\n{done + len(failed):,} videos = {done:,} classified + {len(failed):,} failed")
    if unsure:
        print(f"{NOT_SURE}: {unsure:,} of {done:,} videos")
    print_share([is_right for is_right, _ in right], "videos whose folder names a class")
    print_share([is_right for is_right, sure in right if sure] if unsure else [], "of them of which it is sure")
    written = [f"pictures in {OUT}/"] * (PICTURES or TIMELINE) + list(filter(None, (CSV, JSONL)))
    if done and written:
        print("see: " + ", ".join(written))


def print_share(right, what):
    """Print how many of some videos are right, bool each; nothing if there are none."""
    if right:
        print(f"right: {sum(right):,} of {len(right):,} {what}, {100 * sum(right) / len(right):.1f} %")


def main():
    flags.set_constants_from_flags(globals(), words="VIDEOS")
    if not VIDEOS:
        before = " (before --checkpoint, which takes several)" * (len(CHECKPOINT) > 1)
        common.refuse(f"name videos, folders or patterns{before}: python tools/predict.py squats.mp4 more_videos/")
    if TIMELINE and (CSV or JSONL):
        common.refuse("CSV and JSONL list one prediction a video; a timeline writes its segments into OUT")
    videos, failed = videos_that_are_named()
    if not videos:
        common.refuse("no video found: " + "; ".join(f"{path}: {why}" for path, why in list(failed.items())[:3]))
    from see.classifier import load

    paths = [best_beside(path) if BEST else path for path in CHECKPOINT]
    classifier = load(paths, CHECKPOINT_WEIGHTS, MIRROR)
    classifier = classifier._replace(description=clip_with_flags(classifier, paths[0]))
    print(classifier.in_words())
    names_in_out, unsure, right = output_names(videos), 0, []
    try:
        Path(OUT).mkdir(parents=True, exist_ok=True)
        if TIMELINE:
            from see import timeline

            for video in videos:
                limits = machine.num_workers(NUM_WORKERS), TIMEOUT
                why = timeline.label_recording(video, Path(OUT, names_in_out[video]), classifier, STRIDE, *limits)
                failed |= {video: why} if why else {}
        else:
            unsure, right = predict_all(videos, failed, names_in_out, classifier)
    except OSError as e:
        common.refuse(f"{names.printable(e.filename or OUT)} cannot be written ({e.strerror}); mend this, start again")
    if classifier.latency:
        print(classifier.latency())
    report_labels(videos, failed, unsure, right)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
