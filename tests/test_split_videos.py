"""split_videos.py on folders of small files: content decides, so most tests need no real video."""

import csv
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

import check_videos
import split_videos
from drawn.scene import HEIGHT, WIDTH
from drawn_exercises import write_exercises
from make_videos import write_video

SCRIPT = "tools/split_videos.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(code=0, **constants) runs the script in this process on in/ -> out/; returns what it printed."""

    def run(code=0, **constants):
        values = {"SOURCE": tmp_path / "in", "DEST": tmp_path / "out", "CLASS_MAP": tmp_path / "map.json"}
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["split_videos.py"])
            for name, value in (values | constants).items():
                patch.setattr(split_videos, name, str(value) if isinstance(value, Path) else value)
            split_videos.main()
        printed = capsys.readouterr()
        assert stop.value.code == code, printed.out + printed.err
        return printed.out + printed.err

    return run


def add(root, name, content=None):
    """A file in/<name> that passes for a video."""
    path = root / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode() if content is None else content)
    return path


def placed(root, folder="out"):
    """{side: {class/file name: content}} of out/."""
    found = {side: {} for side in ("train", "val")}
    for path in (root / folder).glob("*/*/*"):
        assert not path.name.startswith("."), f"{path} was left behind"
        found[path.parts[-3]][f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


def side_of(root):
    """{class/file name: side} of out/; fails if one is on both sides."""
    paths = list((root / "out").glob("*/*/*"))
    sides = {f"{path.parent.name}/{path.name}": path.parts[-3] for path in paths}
    assert len(sides) == len(paths), "a name is on both sides"
    return sides


# --- what one run does ------------------------------------------------------------------------------------------------


def test_a_folder_of_classes_becomes_a_dataset(tmp_path, run_script):
    for k in range(10):
        add(tmp_path, f"push ups/{k}.MP4")
        add(tmp_path, f"squats/monday/{k}.mov")
        add(tmp_path, f"squats/tuesday/{k}.mov", f"other {k}".encode())
    for junk in (".git/objects/x.mp4", "__MACOSX/._a.mp4", "squats/._0.mov", "squats/.hidden/x.mp4", "notes/read.txt",
                 "squats/readme.txt", "@eaDir/x.mp4", "loose.mp4"):  # fmt: skip
        add(tmp_path, junk)
    (tmp_path / "in/empty").mkdir()
    (tmp_path / "in/squats/loop").symlink_to(tmp_path / "in/squats")
    add(tmp_path, "squats/nothing.mp4", b"")
    (tmp_path / "in/squats/dangling.mp4").symlink_to("nowhere")
    flags = ("--source", "in", "--dest", "out", "--class-map", "map.json")
    printed = run_script(SCRIPT, *flags, code=1).stdout
    assert json.loads((tmp_path / "map.json").read_text()) == {"push_ups": 0, "squats": 1}
    sides = side_of(tmp_path)
    assert Counter(name.split("/")[0] for name in sides) == {"push_ups": 10, "squats": 20}
    assert Counter(name.split("/")[0] for name, side in sides.items() if side == "val") == {"push_ups": 2, "squats": 4}
    assert {"squats/monday__3.mov", "squats/tuesday__3.mov", "push_ups/3.MP4"} <= sides.keys()
    assert all((tmp_path / "out" / side / name).is_symlink() for name, side in sides.items())
    for name in (".git", "__MACOSX", "@eaDir", "empty", "notes"):
        assert f"left out: {name}/" in printed, printed
    assert "left out: 2 x .txt, 1 that lie in no class: loose.mp4" in printed
    assert "nothing.mp4: it is empty" in printed and "dangling.mp4: it is a link to nothing" in printed
    assert "found 32 = placed 30 + failed 2" in printed
    again = run_script(SCRIPT, *flags, code=1).stdout
    assert "found 32 = placed 0 + already there 30 + failed 2" in again and side_of(tmp_path) == sides


@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_add_delete_rename_relabel_and_replace(tmp_path, run, mode):
    for k in range(30):
        add(tmp_path, f"jabs/{k:02d}.mp4", os.urandom(200))
    assert "placed 30 + failed 0" in run(MODE=mode)
    before = side_of(tmp_path)
    assert Counter(before.values())["val"] == 6
    source = tmp_path / "in/jabs"
    (source / "00.mp4").unlink()
    (source / "01.mp4").rename(source / "renamed.mp4")
    (tmp_path / "in/hooks").mkdir()
    (source / "02.mp4").rename(tmp_path / "in/hooks/02.mp4")
    (source / "03.mp4").unlink()
    add(tmp_path, "jabs/03.mp4", b"another cut of the same recording")
    (source / "04.mp4").rename(source / "05.mp4")  # over another
    add(tmp_path, "jabs/new.mp4", os.urandom(200))
    run(MODE=mode)
    after, both = side_of(tmp_path), placed(tmp_path)
    assert after["jabs/renamed.mp4"] == before["jabs/01.mp4"] and "jabs/01.mp4" not in after
    assert after["hooks/02.mp4"] == before["jabs/02.mp4"] and "jabs/02.mp4" not in after
    assert both[before["jabs/03.mp4"]]["jabs/03.mp4"] == b"another cut of the same recording"
    assert both[before["jabs/04.mp4"]]["jabs/05.mp4"] == (source / "05.mp4").read_bytes()
    assert ("jabs/00.mp4" in after) == (mode != "symlink"), "a copy may be the last one, a link leads nowhere"
    assert "jabs/new.mp4" in after
    assert json.loads((tmp_path / "map.json").read_text()) == {"jabs": 0, "hooks": 1}, "indices must never change"
    rest = {name: side for name, side in before.items() if name[5:7] not in ("00", "01", "02", "04", "05")}
    assert rest.items() <= after.items()
    assert "placed 0 + already there" in run(MODE=mode)
    assert side_of(tmp_path) == after


def test_no_video_and_no_group_is_on_both_sides_or_changes_side_whatever_is_done(tmp_path, run):
    """Random edits of the source, a run after each few: the sides of contents and of groups, ever, are one each."""
    for seed in range(6):
        rng, root = random.Random(seed), tmp_path / str(seed)
        history, number = {}, 0
        groups = r"p(\d+)_" if seed % 2 else ""
        constants = {"SOURCE": root / "in", "DEST": root / "out", "CLASS_MAP": root / "map.json", "GROUPS": groups}
        constants["MODE"] = ("symlink", "copy", "hardlink")[seed % 3]
        for step in range(12):
            files = sorted(path for path in (root / "in").rglob("*.mp4"))
            for _ in range(rng.randint(1, 25 if step == 0 else 6)):
                number += 1
                name = f"class{rng.randrange(4)}/p{rng.randrange(12)}_{number}.mp4"
                copied = files and rng.random() < 0.2
                same_group = copied and rng.choice(files)
                if copied:  # a copy under another name: of the same group, or else the groups would have to be joined
                    name = f"class{rng.randrange(4)}/{same_group.name.split('_')[0]}_{number}.mp4"
                add(root, name, same_group.read_bytes() if copied else rng.randbytes(50))
            for path in rng.sample(files, min(len(files), rng.randint(0, 3))):
                action = rng.choice(["delete", "rename", "relabel", "change"])
                prefix, number = path.name.split("_")[0], number + 1
                if action == "delete":
                    path.unlink()
                elif action == "change":
                    path.unlink()
                    path.write_bytes(rng.randbytes(50))
                else:
                    label = path.parent.name if action == "rename" else f"class{rng.randrange(4)}"
                    (root / "in" / label).mkdir(exist_ok=True)
                    path.rename(root / "in" / label / f"{prefix}_{number}.mp4")
            run(VAL_SHARE=rng.choice([0.1, 0.2, 0.4]), **constants)
            both = placed(root)
            for side, videos in both.items():
                for name, content in videos.items():
                    keys = [content] + [name.split("/")[1].split("_")[0]] * bool(groups)
                    for key in keys:
                        assert history.setdefault(key, side) == side, f"seed {seed}, step {step}: {name} is on {side}"
            wanted = {path.relative_to(root / "in").as_posix() for path in (root / "in").rglob("*.mp4")}
            there = {name for videos in both.values() for name in videos}
            assert wanted <= there if constants["MODE"] != "symlink" else wanted == there, f"seed {seed}, step {step}"


def test_groups_stay_together_by_pattern_and_by_table(tmp_path, run):
    for person in range(12):
        for k in range(5):
            add(tmp_path, f"{'jabs' if k % 2 else 'hooks'}/person{person}_{k}.mp4")
    table = tmp_path / "groups.csv"
    for groups in (r"person(\d+)_", str(table)):
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([["video", "group"]] + [[f"person{p}_{k}.mp4", f"p {p}"]
                                                                  for p in range(12) for k in range(5)])  # fmt: skip
        run(GROUPS=groups, DEST=tmp_path / Path(groups).name[:5])
        sides = {}
        for path in (tmp_path / Path(groups).name[:5]).glob("*/*/*.mp4"):
            sides.setdefault(path.name.split("_")[0], set()).add(path.parts[-3])
        assert len(sides) == 12 and all(len(found) == 1 for found in sides.values())
        assert {"train", "val"} == set().union(*sides.values())


def test_groups_that_cannot_be_used_are_refused(tmp_path, run):
    for k in range(20):
        add(tmp_path, f"jabs/{k}.mp4")
    assert "no regular expression" in run(GROUPS="(", code=2)
    assert "finds a group for none of 20 videos" in run(GROUPS="person", code=2)
    assert "cannot read the groups nowhere.csv" in run(GROUPS="nowhere.csv", code=2)
    (tmp_path / "g.csv").write_text("file,person\n1.mp4,a\n")
    assert "it must be a table with the head `video,group`" in run(GROUPS=tmp_path / "g.csv", code=2)
    (tmp_path / "g.csv").write_text("video,group\n1.mp4,a\n1.mp4,b\n")
    assert "puts jabs/1.mp4 into 'a' as '1.mp4' and into 'b'" in run(GROUPS=tmp_path / "g.csv", code=2)
    assert not (tmp_path / "out").exists()
    run()
    assert "different sides" in run(GROUPS="(jabs)", code=2), "all in one group now, on both sides before"


def test_a_class_has_both_sides_as_soon_as_it_can(tmp_path, run):
    for k in range(40):
        add(tmp_path, f"class{k:02d}/a.mp4")
    printed = run()
    assert set(side_of(tmp_path).values()) == {"train"}, "a single video is to be learned from"
    assert "no val video, so it is not judged: class00, " in printed
    for k in range(40):
        add(tmp_path, f"class{k:02d}/b.mp4")
    assert "no val video" not in run()
    sides = side_of(tmp_path)
    assert all((sides[f"class{k:02d}/a.mp4"], sides[f"class{k:02d}/b.mp4"]) == ("train", "val") for k in range(40))


def test_copies_share_a_side_and_two_labels_of_one_video_are_said(tmp_path, run):
    for k in range(20):
        add(tmp_path, f"jabs/{k}.mp4", b"%d" % k)
        add(tmp_path, f"jabs/{k} (1).mp4", b"%d" % k)
    add(tmp_path, "hooks/3.mp4", b"3")
    printed, sides = run(), side_of(tmp_path)
    assert all(sides[f"jabs/{k}.mp4"] == sides[f"jabs/{k} (1).mp4"] for k in range(20))
    assert sides["hooks/3.mp4"] == sides["jabs/3.mp4"]
    assert "21 videos are copies of others" in printed and "1 videos lie in two classes" in printed
    assert "one of which is wrong: hooks/3.mp4 and jabs/3 (1).mp4 and jabs/3.mp4" in printed


def test_a_class_that_has_no_videos_any_more_is_said(tmp_path, run):
    for k in range(4):
        add(tmp_path, f"jabs/{k}.mp4")
        add(tmp_path, f"hooks/{k}.mp4", b"%d" % k)
    assert "no video at all" not in run()
    (tmp_path / "in/jabs").rename(tmp_path / "in/left jabs")
    printed = run()
    assert f"no video at all, yet in {tmp_path / 'map.json'}: jabs" in printed, printed
    (tmp_path / "map.json").unlink()
    run()
    kept = {"hooks": 0, "jabs": 1, "left_jabs": 2}
    assert json.loads((tmp_path / "map.json").read_text()) == kept, "an index got another meaning"
    other = tmp_path / "other.json"
    other.write_text('{"jabs": 0, "hooks": 1, "left_jabs": 2}')
    assert "0 is hooks, not 1, 1 is jabs, not 0 as in" in run(CLASS_MAP=other, code=2)
    assert json.loads(other.read_text()) == {"jabs": 0, "hooks": 1, "left_jabs": 2}
    run(CLASS_MAP=tmp_path / "new.json", DEST=tmp_path / "new")
    assert json.loads((tmp_path / "new.json").read_text()) == {"hooks": 0, "left_jabs": 1}


def test_a_folder_that_is_one_class_is_told_from_one_of_classes(tmp_path, run):
    add(tmp_path, "0.mp4")
    assert "if it is one of your classes, name the folder above" in run(code=2)


# --- what videos show -------------------------------------------------------------------------------------------------


def encode_again(source, target, mirrored=False, begin=0.0, end=9e9):
    """Half the size, worse quality, perhaps mirrored or only a part, in s."""
    with av.open(str(source)) as original, av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "32"})
        stream.width, stream.height, stream.pix_fmt = WIDTH // 4 * 2, HEIGHT // 4 * 2, "yuv420p"
        for frame in original.decode(video=0):
            if begin <= frame.time < end:
                picture = frame.reformat(stream.width, stream.height, "rgb24").to_ndarray()
                picture = np.ascontiguousarray(picture[:, ::-1] if mirrored else picture)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Thirteen videos of one class: nine recordings, two twins, one part, and one that does not decode."""
    folder = tmp_path_factory.mktemp("filmed") / "in/squats"
    folder.mkdir(parents=True)
    for k in range(9):
        write_exercises(folder / f"{k}.mp4", ["squats"], seconds=2, seed=k)
    encode_again(folder / "0.mp4", folder / "sent by a messenger.mp4")
    encode_again(folder / "1.mp4", folder / "selfie.mp4", mirrored=True)
    encode_again(folder / "2.mp4", folder / "cut.mp4", begin=0.8, end=1.5)
    (folder / "broken.mp4").write_bytes((folder / "3.mp4").read_bytes()[:3000])
    return folder.parent


def test_what_shows_the_same_shares_a_side_and_counts_once(tmp_path, run, filmed):
    """At any share the twins lie together; shares are of videos that differ and decode: 2 of 10, not 3 of 13."""
    for share in (0.2, 0.3, 0.5, 0.7):
        printed = run(SOURCE=filmed, DEST=tmp_path / f"{share}", CLASS_MAP=tmp_path / f"{share}.json", VAL_SHARE=share)
        paths = [path for path in (tmp_path / f"{share}").glob("*/*/*.mp4")]
        sides = {path.name: path.parts[-3] for path in paths}
        assert len(sides) == len(paths) == 13
        assert sides["0.mp4"] == sides["sent by a messenger.mp4"] and sides["1.mp4"] == sides["selfie.mp4"]
        counting = sides.keys() - {"sent by a messenger.mp4", "selfie.mp4", "broken.mp4"}
        assert sum(sides[name] == "val" for name in counting) == round(10 * share), sides
    assert "2 pairs show the same" in printed and "squats/0.mp4 and squats/sent by a messenger.mp4" in printed, printed
    assert "1 pairs may be parts of one recording: squats/2.mp4 and squats/cut.mp4; --groups would" in printed, printed
    assert "1 videos show no picture and count in no share; see check_videos.py: squats/broken.mp4" in printed, printed
    (tmp_path / "groups.csv").write_text("video,group\ncut,a\n2,a\n")
    groups = {"GROUPS": tmp_path / "groups.csv", "DEST": tmp_path / "grouped", "CLASS_MAP": tmp_path / "g.json"}
    printed = run(SOURCE=filmed, **groups)
    assert "2 of 13 videos have a group, of 1 groups" in printed and "parts of one recording" not in printed, printed


def test_a_group_goes_where_it_brings_the_shares_nearest(tmp_path, run):
    """Groups of 8, 3, 1, 1: 0.2 of 13 are 3; never the group of 8, whatever its hash."""
    for name, size in ("tim", 8), ("ann", 3), ("bob", 1), ("eve", 1):
        for k in range(size):
            add(tmp_path, f"jabs/{name}_{k}.mp4")
    run(GROUPS="/([a-z]+)_")
    assert 2 <= Counter(side_of(tmp_path).values())["val"] <= 3


def test_classes_whose_names_look_alike_are_named(tmp_path, run):
    add(tmp_path, "Squats/1.mp4")
    add(tmp_path, "squats/2.mp4")
    assert "'Squats' and 'squats' in" in run(code=2)
    (tmp_path / "in/Squats").rename(tmp_path / "in/squats ")
    assert "'squats' and 'squats '" in run(code=2).replace("'squats ' and 'squats'", "'squats' and 'squats '")
    shutil.rmtree(tmp_path / "in/squats")
    add(tmp_path, "pli\u00e9/1.mp4")
    add(tmp_path, "plie\u0301/2.mp4")
    assert "would be one class" in run(code=2)
    shutil.rmtree(tmp_path / "in/pli\u00e9")
    (tmp_path / "map.json").write_text('{"pli\u00e9": 0, "squats": 1}', encoding="utf-16")
    run()
    assert side_of(tmp_path).keys() == {"squats/1.mp4", "pli\u00e9/2.mp4"}


def test_the_next_command_is_check_videos_with_a_quoted_folder(tmp_path, run_script):
    add(tmp_path, "jabs/1.mp4")
    flags = ("--source", "in", "--dest", "my data", "--class-map", "my map.json")
    assert "next: python tools/check_videos.py --root 'my data'\n" in run_script(SCRIPT, *flags).stdout
    (tmp_path / "my data").rename(tmp_path / "my_dataset")
    flags = ("--root", "my_dataset", "--quarantine", "bad", "--report", "bad.csv", "--jobs", 1)
    printed = run_script("tools/check_videos.py", *flags, code=1).stdout
    assert "--data-path my_dataset --class-map my_dataset/class_map.json" in printed, printed


# --- repaired and quarantined videos ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_what_check_videos_repaired_or_took_away_is_not_undone(tmp_path, run, run_script, mode):
    for name in ("good", "cut", "hopeless"):
        path = tmp_path / f"in/jabs/{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, 30, height=32, width=32, seed=len(name), container_options={"movflags": "faststart"})
    whole = (tmp_path / "in/jabs/cut.mp4").read_bytes()
    (tmp_path / "in/jabs/cut.mp4").write_bytes(whole[: len(whole) * 4 // 5])
    (tmp_path / "in/jabs/hopeless.mp4").write_bytes(b"no video at all")
    run(MODE=mode)
    sides = side_of(tmp_path)
    arguments = ("--root", "out", "--quarantine", "bad", "--report", "bad.csv", "--remux", "--replace", "--jobs", 1)
    run_script("tools/check_videos.py", *arguments, code=1)
    repaired = tmp_path / "out" / sides["jabs/cut.mp4"] / "jabs/cut.mp4"
    assert check_videos.examine(repaired)["reason"] == "healthy"
    content = repaired.read_bytes()
    for _ in range(2):
        printed = run(MODE=mode)
        assert "already there 1 + kept as repaired 1 + taken out before 1" in printed, printed
        counted = re.search(r"^all +(\d+) +(\d+) ", printed, re.MULTILINE).groups()
        assert sum(map(int, counted)) == 2, "the table counts what lies in DEST"
    assert repaired.read_bytes() == content and side_of(tmp_path).keys() == {"jabs/good.mp4", "jabs/cut.mp4"}
    (tmp_path / "in/jabs/cut.mp4").rename(tmp_path / "in/jabs/name.mp4")
    assert "kept as repaired 1 + taken out before 1" in run(MODE=mode)
    assert repaired.with_name("name.mp4").read_bytes() == content and not repaired.exists()
    assert placed(tmp_path)[sides["jabs/good.mp4"]]["jabs/good.mp4"] == (tmp_path / "in/jabs/good.mp4").read_bytes()


def test_a_changed_source_replaces_its_copy(tmp_path, run):
    for k in range(5):
        add(tmp_path, f"jabs/{k}.mp4")
    run(MODE="copy")
    add(tmp_path, "jabs/1.mp4", b"better")
    assert "placed 1 + already there 4" in run(MODE="copy")
    assert b"better" in [*placed(tmp_path)["train"].values(), *placed(tmp_path)["val"].values()]
    assert "placed 5 + failed 0" in run(MODE="symlink"), "links take the place of copies that no one has changed"


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_wrong_usage_is_refused_and_nothing_is_touched(tmp_path, run):
    assert "there is no folder SOURCE" in run(code=2)
    (tmp_path / "in").mkdir()
    assert "no video lies at" in run(code=2)
    for k in range(5):
        add(tmp_path, f"jabs/{k}.mp4")
    assert "MODE is 'move'" in run(MODE="move", code=2)
    assert "VAL_SHARE is 20" in run(VAL_SHARE=20.0, code=2)
    assert "lie within one another" in run(DEST=tmp_path / "in/out", code=2)
    assert "is split into train, val already" in run(SOURCE=split_source(tmp_path), code=2)
    (tmp_path / "map.json").write_text('{"hooks": 0}')
    assert "lacks jabs" in run(code=2)
    (tmp_path / "map.json").unlink()
    add(tmp_path, "push ups/1.mp4")
    add(tmp_path, "push_ups/1.mp4")
    assert "'push ups' and 'push_ups'" in run(code=2)
    assert not (tmp_path / "out").exists() and not (tmp_path / "map.json").exists()
    (tmp_path / "out/train/jabs").mkdir(parents=True)
    assert "holds train but no split.csv" in run(code=2)


def split_source(root):
    for name in ("train/a.mp4", "val/b.mp4"):
        add(root / "split", name)
    return root / "split/in"


def test_a_damaged_split_is_refused(tmp_path, run):
    add(tmp_path, "jabs/1.mp4")
    run()
    table = tmp_path / "out/split.csv"
    whole = table.read_text()
    for damaged in (whole.replace("train", "tr"), whole + "x,y\n", whole.replace("side", "s")):
        table.write_text(damaged)
        assert "split.csv is damaged" in run(code=2)


def test_names_that_would_share_a_place_are_named(tmp_path, run):
    for name in ("jabs/a/b.mp4", "jabs/a__b.mp4", "jabs/C.mp4", "jabs/c.MP4", "jabs/\udcff.mp4", "jabs/a,\n\"b.mp4"):
        add(tmp_path, name, name.encode("utf-8", "surrogateescape"))
    printed = run(code=1)
    assert printed.count("it would lie where") == 2 and "found 6 = placed 4 + failed 2" in printed
    assert "already there 4" in run(code=1)


def die_at_rename(number):
    rename, left = os.replace, iter(range(number - 1))
    os.replace = lambda *paths: os.kill(os.getpid(), 9) if next(left, None) is None else rename(*paths)


@pytest.mark.parametrize("mode", ["symlink", "copy"])
def test_killed_again_and_again_it_ends_as_if_never(tmp_path, run, mode):
    """A process that is killed before one of its renames: of the class map, of a video, of split.csv."""
    for k in range(60):
        add(tmp_path, f"class{k % 7}/{k}.mp4", b"%d" % k * 3000)
    run(MODE=mode, DEST=tmp_path / "whole", CLASS_MAP=tmp_path / "whole.json")
    for renames in (1, 2, 3, 20, 10, 32):
        child = os.fork()
        if not child:
            die_at_rename(renames)
            run(MODE=mode)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 9, f"it ended before rename {renames}"
    assert "failed 0" in run(MODE=mode)
    assert placed(tmp_path) == placed(tmp_path, "whole")
    assert (tmp_path / "map.json").read_text() == (tmp_path / "whole.json").read_text()
    assert (tmp_path / "out/split.csv").read_text() == (tmp_path / "whole/split.csv").read_text()


def test_a_full_disk_ends_in_one_sentence(tmp_path, run, monkeypatch):
    for k in range(3):
        add(tmp_path, f"jabs/{k}.mp4", os.urandom(2000))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        assert "use MODE hardlink or symlink" in run(MODE="copy", code=2)
    copyfile, left = shutil.copyfile, iter("x")

    def full(source, target):
        if next(left, None):
            return copyfile(source, target)
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert "stopped after 1 videos: [Errno 28] No space left" in run(MODE="copy", code=2)
    assert len(side_of(tmp_path)) == 1
    assert "placed 2 + already there 1 + failed 0" in run(MODE="copy")


def test_two_thousand_files(tmp_path, run):
    for k in range(2_000):
        add(tmp_path, f"class{k % 50:02d}/{k}.mp4")
    printed, sides = run(GROUPS=r"(\d\d)\.mp4"), side_of(tmp_path)
    assert "found 2,000 = placed 2,000 + failed 0" in printed and len(sides) == 2_000
    assert len({(name[-6:-4], side) for name, side in sides.items() if len(name) > 14}) == 100
    assert "already there 2,000" in run(GROUPS=r"(\d\d)\.mp4") and side_of(tmp_path) == sides
