"""Which videos of a dataset are trained on and which validated on: folders, --extra-data, --hold-out."""

import hashlib
import os
import shlex
import socket
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import common
from common import finding
from common.groups import read_groups
from common.held_out import NOTHING, HeldOut, held_out_name, read_held_out
from common.names import composed, looks_like

from torchvision_patches.video_utils import stamp

# run on the dataset's root: the class folders of both splits, no files and no hidden folders
MAP_FROM_FOLDERS = (
    "python -c 'import json, pathlib, sys; "
    'splits = [pathlib.Path(sys.argv[1], split) for split in ("train", "val")]; '
    'names = sorted({f.name for split in splits for f in split.glob("[!.]*") if f.is_dir()}); '
    "print(json.dumps({name: i for i, name in enumerate(names)}))'"
)


def list_videos(data_path, split, class_map, class_map_path, say=print):
    """The videos of a split: a sorted list of (path, class index). A class without a folder or videos is no error.

    say: gets a sentence about each kind of file that is left out.

    Exits with code 2 if the split is missing or empty, or has a folder that the class map does not know.
    """
    folder = Path(data_path) / split
    if not folder.is_dir():
        common.refuse(
            f"there is no folder {folder}; --data-path is the folder that holds train/ and val/, which "
            f"tools/refactor_dataset.py makes of QEVD and tools/split_videos.py of videos of your own"
        )
    folders = finding.class_folders(folder)
    unknown = [name for name in folders if composed(name) not in class_map]
    if unknown:
        what = f"{folder} has {len(unknown)} class folders that are not in {class_map_path}, the first is "
        what += f"{unknown[0]!r}{looks_like(unknown[0], class_map)}"
        if own := common.class_map_with(folders):
            common.refuse(f"{what}; {own} has them: add --class-map {own}")
        common.refuse(
            f"{what}. Move them away, or, if these are your own classes, name their map with --class-map; "
            f"tools/split_videos.py writes one, and so does this:\n"
            f"  {MAP_FROM_FOLDERS} {shlex.quote(str(data_path))} > my_class_map.json"
        )
    found = finding.find_videos(folder)
    paths = sorted(tuple(path.split("/")) for path in found.videos)  # by class: "-" comes before "/"
    samples = [(str(folder / name / video), class_map[composed(name)]) for name, video in paths]
    if found.misplaced:
        say(f"{split}: {len(found.misplaced):,} videos are not in a class folder itself and left out")
    if found.failures:
        first, reason = min(found.failures.items())
        say(f"{split}: {len(found.failures):,} names are left out, the first is {folder / first}: {reason}")
    if others := finding.about_other_endings(found):
        say(f"{split}: {others}")
    empty = sorted(set(folders) - {name for name, _ in paths})
    if empty:
        say(f"{split}: no video in {len(empty):,} class folders: {', '.join(empty)}")
    if not samples:
        common.refuse(f"{folder} has no videos; it must hold <class>/<video>.mp4")
    return samples


def videos_of_split(split, class_map, args, held_out):
    """The videos of train or val, a list of (path, class index), as --train-splits, --extra-data and `held_out` say.

    held_out: a HeldOut; without videos, val is the folder of that name. Exits with code 2 if an extra video is one to
    validate on, by its content; one that train has already is left out, and said.
    """
    if split == "val" and not held_out.videos:
        return list_videos(args.data_path, "val", class_map, args.class_map)
    folders = args.train_splits if split == "train" else sorted({name.split("/")[0] for name in held_out.videos})
    listed = [pair for name in folders for pair in list_videos(args.data_path, name, class_map, args.class_map)]
    kept, samples, val = set(held_out.videos), [], []
    for pair in listed:
        (val if held_out_name(pair[0], args.data_path) in kept else samples).append(pair)
    if split == "val":
        if len(val) < len(kept):
            print(f"val: {len(kept) - len(val):,} of the {len(kept):,} videos that were held out are no longer there")
        return val
    if args.extra_data and not held_out.videos:
        val = list_videos(args.data_path, "val", class_map, args.class_map)
    for root in args.extra_data:
        extra = of_other_groups(list_videos(root, "train", class_map, args.class_map), root, held_out, args)
        for path, same in duplicates(extra, val):
            common.refuse(f"{path} is {same}, a video to validate on: take it out of {root}")
        known = duplicates(extra, samples)
        if known:
            (path, same), *_ = known
            print(f"{len(known):,} videos of {root} are in train already and left out, the first is {path}, as {same}")
        left_out = {path for path, _ in known}
        samples += [pair for pair in extra if pair[0] not in left_out]
    return samples


def of_other_groups(samples, root, held_out, args):
    """The samples of an extra root without those of groups that are held out."""
    if not (args.groups and held_out.groups):
        return samples
    group_of = read_groups(args.groups, sorted({within_split(path) for path, _ in samples}))
    others = [pair for pair in samples if group_of.get(within_split(pair[0])) not in held_out.groups]
    if len(others) < len(samples):
        print(f"{len(samples) - len(others):,} videos of {root} are of groups that are held out, and left out")
    return others


def within_split(path):
    return "/".join(Path(path).parts[-2:])


def settled_hold_out(args, checkpoint, class_map):
    """The HeldOut of a run: a new one by --hold-out, else the checkpoint's.

    Exits with code 2 where flag and checkpoint contradict each other, or nothing can be held out.
    """
    source = args.resume or args.weights
    known = read_held_out(checkpoint, source) if checkpoint else NOTHING
    if args.hold_out is None:
        if args.groups and not known.videos:
            common.refuse("--groups says who is in which video, for --hold-out SHARE to keep together: give both")
        return known
    goes_on = args.resume and not args.resume_weights_only
    if not args.hold_out and (args.test_only or not goes_on):
        return NOTHING
    if goes_on:
        if (args.hold_out, args.hold_out_seed) != (known.share, known.seed):
            common.refuse(
                f"--hold-out {args.hold_out:g} --hold-out-seed {args.hold_out_seed}, but {args.resume} has "
                f"{known.share:g} and {known.seed}; leave out the flags"
            )
        return known
    drawn = draw_hold_out(args, class_map)
    if known.videos and (learned := len(set(drawn.videos) - set(known.videos))):
        print(f"{source} has learned from {learned:,} of the videos that are held out now: they flatter it")
    return drawn


def draw_hold_out(args, class_map):
    """A new HeldOut: a part of the videos of --train-splits that has no group in common with the others."""
    lists = (list_videos(args.data_path, name, class_map, args.class_map, say=len) for name in args.train_splits)
    samples = [pair for listed in lists for pair in listed]
    group_of = read_groups(args.groups, sorted({within_split(path) for path, _ in samples})) if args.groups else {}
    chosen, groups = hold_out(samples, args.hold_out, group_of, args.hold_out_seed)
    if not chosen:
        what = f"{args.groups} puts {len(group_of):,} of them into {len(set(group_of.values())):,} groups"
        common.refuse(
            f"--hold-out {args.hold_out:g}: nothing can be held out of {len(samples):,} videos, because each class "
            f"must keep {'a group' if args.groups else 'a video'} to learn from{f' ({what})' if args.groups else ''}"
        )
    text = f"{len(chosen):,} of {len(samples):,} videos held out"
    if args.groups:
        with_group = sum(within_split(path) in group_of for path, _ in samples)
        text = f"{with_group:,} of {len(samples):,} videos have a group; "
        text += f"{len(chosen):,} videos of {len(groups):,} groups held out"
    print(text, flush=True)
    names = tuple(sorted(held_out_name(path, args.data_path) for path, _ in chosen))
    return HeldOut(names, tuple(sorted(groups & set(group_of.values()))), args.hold_out, args.hold_out_seed)


def hold_out(samples, share, group_of, seed):
    """At least `share` of the videos of each class, in whole groups: ([(path, class index)], the set of their groups).

    group_of: {<class>/<video>: group}; a video without a group is one of its own. A group is left where it is the last
    one of a class.
    """
    groups = {}
    for path, label in samples:
        alone = "/".join(Path(path).parts[-3:])  # train and val may have videos of one name
        groups.setdefault(group_of.get(within_split(path), alone), []).append((path, label))
    total, held, chosen, taken = Counter(label for _, label in samples), Counter(), [], set()
    # a draw that depends on the names alone, not on their order or number
    for group in sorted(groups, key=lambda group: hashlib.sha256(os.fsencode(f"{seed} {group}")).digest()):
        labels = Counter(label for _, label in groups[group])
        wanted = any(held[label] < share * total[label] for label in labels)
        if wanted and all(held[label] + count < total[label] for label, count in labels.items()):
            held += labels
            chosen += groups[group]
            taken.add(group)
    return chosen, taken


def duplicates(samples, others):
    """[(path, path in others)] of the samples whose file is also one of the others, by size and then content."""
    of_size = {}
    for path, _ in others:
        of_size.setdefault(stamp(path)[0], []).append(path)
    of_size.pop(-1, None)  # files that cannot be looked at
    found = []
    for path, _ in samples:
        digest = None
        for other in of_size.get(stamp(path)[0], ()):
            digest = digest or common.sha256_of(path)
            if digest == common.sha256_of(other):
                found.append((path, other))
                break
    return found


def refuse_unlike_machines(samples, own_samples, split):
    """Exit with code 2 and the first difference, unless this machine has the videos and labels of the first one."""
    for first, own in zip_longest(samples, own_samples):
        if first != own:
            first, own = (f"{pair[0]} (class {pair[1]})" if pair else "no more" for pair in (first, own))
            common.refuse(
                f"{split} is not the same on all machines: {socket.gethostname()} has {own} where the first process "
                f"has {first}; give them the same folders and class map"
            )
