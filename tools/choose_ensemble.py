"""Which trained networks give the most together, under the latency gate: the members of one exported model.

Reads   HDF5 files of predictions of one and the same validation videos, one a network, as evaluate.py reads them, and
        their manifest.jsonl; the estimates of compile_offline.py beside each model. No network is run.
Prints  who joins in which order, Top-1 and latency after each, and the command that exports them as one model.
        The last line of output is one JSON object.

Half of the videos choose: one network at a time joins, the one with which the mean of the logits makes the labels most
likely, and as many stay as are right most often. The figures are those of the other half, which nothing was chosen by.
Videos of one group (a person) are on one side. The latency of several is taken as the sum of each one's; in one graph
six took a fifth less.

$ python tools/choose_ensemble.py runs/*/dataset-export.h5
$ python tools/choose_ensemble.py a.h5 b.h5 c.h5 --ms 4.4 --groups people.csv

Exit code 0: chosen; 2: the files do not fit together, or a wrong flag.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import flags, groups

import numpy as np

from aihub import service
from report import figures, predictions, two_models

# ----------------------------------------------------------------------------------------------------------------------
MEMBERS = []  # HDF5 files of predictions, one for each network that may join
manifest = "./preprocessed_tensors/manifest.jsonl"  # label and tensor path of every clip, from preprocess_and_save.py
class_map = str(common.REPO / "class_map.json")  # {class folder name: index}, for files that do not name their classes
GROUPS = ""  # file that says which videos belong together, as --groups of train.py takes it; "": none do
MS = []  # latency of each member in ms, or one number for all; []: the upper end of compile_offline.py's estimate
GATE_MS = float(service.LATENCY_GATE_MS)  # ms that all together may take
# ----------------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A network that may join."""

    h5: str
    predictions: Any  # predictions.Predictions
    logits: np.ndarray  # float64 (n, num_classes)
    checkpoint: str  # "" where nothing says it
    mirrored: bool  # whether its predictions are those of the clip and its mirror image
    milliseconds: float


def main():
    flags.set_constants_from_flags(globals(), words="MEMBERS")
    if len(set(MEMBERS)) < max(2, len(MEMBERS)):
        common.refuse("name two or more different HDF5 files of predictions, one for each network that may join")
    rows = predictions.rows_of_manifest(manifest)
    members = read_members(rows)
    chooses = choosing_half(rows, members[0].predictions.clips)
    labels = members[0].predictions.labels
    order, number = choose(members, labels, chooses)
    report = report_of(members, labels, chooses, order[:number])
    report["all"] = report_of(members, labels, chooses, order)["steps"][-1]  # better than a choice by few videos
    print_steps(members, report)
    print_command([members[i] for i in order[:number]])
    print(json.dumps(report))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_members(rows):
    """The Members in MEMBERS; exits with code 2 where they are not of the same classes, clips and videos."""
    loaded = [predictions.load_predictions(path, manifest, rows, class_map) for path in MEMBERS]
    first, described = loaded[0], [predictions.description_of(one.about) for one in loaded]
    times = latencies(loaded)
    members = []
    for path, one, known, milliseconds in zip(MEMBERS, loaded, described, times):
        refuse_strangers(first, described[0], one, known)
        predictions.refuse_other_clips(one, manifest, rows)
        for note in one.notes + figures.oddities(one):
            print(f"note: {note}")
        checkpoint = known.get("checkpoint", "")
        if not isinstance(checkpoint, str):
            common.refuse(f"{path} is of a model in which several networks vote; name each one's own predictions")
        mirrored = bool(known.get("mirrored"))
        members.append(Member(path, one, one.logits().astype(np.float64), checkpoint, mirrored, milliseconds))
    refuse_twins(members)
    return members


def refuse_twins(members):
    """Exit with code 2 where two files are of one network: by its checkpoint, the content of that, or the logits."""
    seen = {}
    for member in members:
        about = member.predictions.about
        known = [member.checkpoint, about.get("checkpoint_sha256"), about.get("model_sha256"), member.logits.tobytes()]
        for what in filter(None, dict.fromkeys(known)):
            if what in seen:
                of = f"the checkpoint {member.checkpoint}" if member.checkpoint else "one network"
                common.refuse(f"{seen[what]} and {member.h5} are both of {of}: a network joins once")
            seen[what] = member.h5


def refuse_strangers(first, of_first, one, known):
    """Exit with code 2 where a file cannot vote with the first: other classes, clips, or videos."""
    here, there = one.about["h5"], first.about["h5"]
    if odd := sorted(set(one.classes) ^ set(first.classes)):
        common.refuse(f"{here} and {there} are of other classes ({len(odd)} differ, {odd[0]!r} is one): none can vote")
    if one.classes != first.classes:
        common.refuse(f"{here} and {there} have the same classes in another order: in one model none can vote")
    if not np.array_equal(one.clips, first.clips):
        common.refuse(f"{here} and {there} hold predictions of other videos; run inference of both on {manifest}")
    ours, theirs = (dict(of.get("clip") or {}, mirrored=bool(of.get("mirrored"))) for of in (of_first, known))
    ours.pop("model_name", None)  # different networks may vote
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    if differing:
        key = differing[0]
        common.refuse(
            f"{there} has {key} {ours[key]}, {here} has {theirs[key]}: networks in one model see one clip in one way"
        )


def latencies(loaded):
    """Milliseconds of each: MS, or the upper end of what compile_offline.py estimated for its model."""
    from qualcomm import latency

    try:
        given = [float(value) for value in MS]
        if not all(0 < value < math.inf for value in given):
            raise ValueError
    except ValueError:
        common.refuse(f"--ms takes milliseconds above 0, not {' '.join(map(str, MS))}")
    if given:
        if len(given) not in (1, len(loaded)):
            common.refuse(f"--ms has {len(given)} values for {len(loaded)} files: give one for each, or one for all")
        return given * (len(loaded) // len(given))
    times = []
    for one in loaded:
        folder = Path(one.about.get("model_path") or "nowhere").parent
        beside = [read_estimate(path, one.about) for path in sorted(folder.glob("*.json"))]
        estimates = [described for described in beside if described]
        if not estimates:
            common.refuse(
                f"nothing says how long the model of {one.about['h5']} takes: tools/compile_offline.py --source "
                f"{one.about.get('model_path') or 'MODEL'} estimates it, or give it with --ms 4.4"
            )
        times.append(latency.bounds_ms(estimates[-1]["estimated_ms"], estimates[-1]["precision"])[1])
    return times


def read_estimate(path, about):
    """What compile_offline.py wrote at `path` for an HDF5's model or its checkpoint; None for anything else."""
    described = common.read_json(path)
    same = described.get("made_from_sha256", "") in (about.get("model_sha256"), about.get("checkpoint_sha256"))
    same = same or Path(str(described.get("made_from"))).name == about.get("model")
    return described if same and described.get("estimated_ms") else None


def choosing_half(rows, clips):
    """Which clips choose, bool (n,): by a checksum of the group's name, or of the video's, the same every time."""
    videos = ["/".join([rows[clip]["label"], Path(rows[clip]["video_path"]).name]) for clip in clips]
    group_of = groups.read_groups(GROUPS, videos) if GROUPS else {}
    names = [group_of.get(video, video) for video in videos]
    if GROUPS:
        print(f"{len(group_of):,} of {len(videos):,} videos have a group, {len(set(group_of.values())):,} groups")
    half = np.array([zlib.crc32(name.encode("utf-8", "surrogateescape")) % 2 == 0 for name in names])
    if half.all() or not half.any():
        common.refuse(f"{len(set(names)):,} groups or videos are too few to choose on some and report on others")
    return half


# --- choosing ---------------------------------------------------------------------------------------------------------


def mean_logits(members, chosen):
    """The vote of the chosen, float64 (n, num_classes), as the exported model computes it."""
    return np.mean([members[i].logits for i in chosen], axis=0)


def worth(logits, labels):
    """(clips that are right, mean log likelihood of the labels): the second says more of few clips."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    likelihood = shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(axis=1))
    return int((logits.argmax(axis=1) == labels).sum()), float(likelihood.mean())


def choose(members, labels, half):
    """(Indices of the members in the order in which they join, under the gate; the number of them that is best.)

    The one joins next with which the labels are most likely: that tells networks apart where as many clips are right.
    One may make things worse and the next one better: two that disagree settle nothing, three do.
    """
    order, worths, spent = [], [], 0.0
    while left := [i for i in range(len(members)) if i not in order and spent + members[i].milliseconds <= GATE_MS]:
        tried = {i: worth(mean_logits(members, [*order, i])[half], labels[half]) for i in left}
        order.append(max(tried, key=lambda i: tried[i][1]))
        worths.append(tried[order[-1]])
        spent += members[order[-1]].milliseconds
    if not order:
        fastest = min(member.milliseconds for member in members)
        common.refuse(f"none of them is under {GATE_MS:g} ms; the fastest takes {fastest:.1f}")
    return order, worths.index(max(worths)) + 1


def report_of(members, labels, half, chosen):
    """Top-1 and latency after each step, on both halves, and the ensemble against the best single network."""
    steps = []
    for number in range(1, len(chosen) + 1):
        right = mean_logits(members, chosen[:number]).argmax(axis=1) == labels
        low, high = figures.wilson(right[~half].sum(), (~half).sum())
        steps.append(
            {
                "h5": members[chosen[number - 1]].h5,
                "milliseconds": round(sum(members[i].milliseconds for i in chosen[:number]), 2),
                "top1_chosen_on": figures.percent(right[half].sum(), half.sum()),
                "top1": figures.percent(right[~half].sum(), (~half).sum()),
                "ci95_low": low,
                "ci95_high": high,
            }
        )
    best = max(members, key=lambda member: worth(member.logits[half], labels[half]))
    single = (best.logits.argmax(axis=1) == labels)[~half]
    lost, won = int((single & ~right[~half]).sum()), int((~single & right[~half]).sum())
    n = int((~half).sum())
    about = {"steps": steps, "best_single": best.h5, "n": n, "n_chosen_on": int(half.sum())}
    return about | two_models.difference(lost, won, n)


# --- text -------------------------------------------------------------------------------------------------------------


def print_steps(members, report):
    places, n = figures.digits(report["n"]), report["n"]
    print(f"{len(members)} networks; chosen on {report['n_chosen_on']:,} videos, Top-1 of the other {n:,}:")
    for number, step in enumerate(report["steps"], 1):
        low, high = (f"{step[key]:.{places}f}" for key in ("ci95_low", "ci95_high"))
        print(
            f"  {number}  {step['top1']:.{places}f} % ({low} to {high}), {step['milliseconds']:.1f} of {GATE_MS:g} ms: "
            f"{'+ ' * (number > 1)}{step['h5']}"
        )
    if len(report["steps"]) > 1:
        words, told = two_models.interval_in_words(report), two_models.can_be_told(report)
        print(f"all against {report['best_single']}, the best alone: {words}. {told}")
    else:
        print("no other network makes it right more often")
    every = report["all"]
    print(f"all that fit, with nothing chosen: {every['top1']:.{places}f} %, {every['milliseconds']:.1f} ms")


def print_command(chosen):
    """The command that exports the chosen as one model, where their checkpoints are known."""
    unknown = [member.h5 for member in chosen if not member.checkpoint]
    if unknown:
        print(f"the checkpoint of {unknown[0]} is not known; export by tools/example_export.py --checkpoint A B …")
        return
    paths = [member.checkpoint for member in chosen]
    made_of = {"checkpoint": paths} | ({"mirror": True} if chosen[0].mirrored else {})
    if len(precisions := {member.predictions.about.get("precision", "float") for member in chosen}) == 1:
        made_of["precision"] = precisions.pop()
    print(f"its latency as one graph: {flags.next_command('compile_offline.py', **made_of)}")
    print(f"next: {flags.next_command('example_export.py', **made_of, data_dir=Path(manifest).parent)}")


if __name__ == "__main__":
    main()
