"""Names of files and classes that are not plain text: printed escaped, written exactly, compared and shortened."""

import json
import os

import common
from common import names

import pytest

from test_training_run import reference  # noqa: F401

BYTES = os.fsdecode(b"caf\xe9.mp4")


@pytest.mark.parametrize(("name", "text"), [
    ("squats (1).mp4", "squats (1).mp4"),
    ("深蹲.mp4", "深蹲.mp4"),
    ("تمرين.mp4", "تمرين.mp4"),
    (BYTES, r"caf\xe9.mp4"),
    ("a\u202e4pm.exe", r"a\u202e4pm.exe"),
    ("two\nlines\x1b[2J", r"two\nlines\x1b[2J"),
    ("no\u00a0break", r"no\xa0break"),
    ("\ud800.mp4", r"\ud800.mp4"),
])  # fmt: skip
def test_what_is_printed(name, text):
    assert names.printable(name) == text
    text.encode()  # any terminal and any page takes it
    assert names.shortened([name, "b", "c"], 1) == f"{text}, … and 2 more"


def test_bytes_are_written_exactly(tmp_path):
    common.write_text(tmp_path / "list.csv", f"{BYTES}\n")
    assert (tmp_path / "list.csv").read_bytes() == b"caf\xe9.mp4\n"


@pytest.mark.parametrize("stem", ["a" * 300, "深蹲" * 80, os.fsdecode(b"\xe9" * 260), "e\u0301" * 100])
def test_long_names_become_names_of_files(tmp_path, stem):
    made = names.file_name(stem, "-with-labels.mp4")
    with common.written_then_renamed(tmp_path / made) as temporary:  # its own name is longer, and still one
        temporary.touch()
    assert os.listdir(tmp_path) == [made] and made.endswith("-with-labels.mp4")
    assert names.file_name(stem + "b", "-with-labels.mp4") != made, "two long names become one"
    assert names.file_name("short", ".png") == "short.png"


def test_look_alikes_are_grouped():
    one, two = "caf\u00e9", "cafe\u0301"
    assert names.composed(two) == one
    groups = ["'Squats' and 'squats' and 'squats '", f"{two!r} and {one!r}"]
    assert names.look_alikes(["squats", "Squats", "squats ", "jab", one, two]) == groups
    assert names.look_alikes(["squats", "squat", "squat-s", "squats_2"]) == []


@pytest.mark.parametrize("name", ["ＳＱＵＡＴＳ", "squats.", "squats_", "squ\u0430ts", "squats\u200b", "squats\u00a0"])
def test_look_alikes_of_other_characters(name):
    assert names.look_alikes(["jab", "squats", name]) == [" and ".join(map(repr, sorted(["squats", name])))]
    assert names.looks_like(name, ["jab", "squats"]) == " (it looks like 'squats', and is another name)"
    assert names.looks_like(name, ["jab"]) == ""


def test_class_maps_in_every_encoding_and_form(tmp_path, capsys):
    path, text = tmp_path / "map.json", json.dumps({"cafe\u0301": 0, "深蹲": 1}, ensure_ascii=False)
    for encoding in "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32":
        path.write_bytes(text.replace(", ", ",\r\n").encode(encoding))
        assert common.load_class_map(path) == {"caf\u00e9": 0, "深蹲": 1}, encoding
    path.write_text('{"squats": 0, "Squats": 1}')
    assert len(common.load_class_map(path)) == 2 and "almost one name: 'Squats' and 'squats'" in capsys.readouterr().out
    path.write_text(json.dumps({"cafe\u0301": 0, "caf\u00e9": 1}))
    with pytest.raises(SystemExit):
        common.load_class_map(path)
    path.write_text('{"caf\u00e9": 0}', encoding="latin-1")
    with pytest.raises(SystemExit):
        common.load_class_map(path)
    assert "save it as UTF-8" in capsys.readouterr().err


def test_folders_may_be_composed_otherwise_than_their_class_map(tmp_path, capsys, reference):  # noqa: F811
    """As macOS writes them; training and manifests go by the map's names."""
    splits = reference.splits
    for name in "cafe\u0301", "jab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.mp4").touch()
    videos = splits.list_videos(tmp_path, "train", {"jab": 0, "caf\u00e9": 1}, "map.json")
    assert [label for _, label in videos] == [1, 0]
    row = {"video_path": "a", "label": "cafe\u0301", "tensor_path": "a.npy"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    assert common.read_manifest(tmp_path / "manifest.jsonl")[0]["label"] == "caf\u00e9"
    with pytest.raises(SystemExit):
        splits.list_videos(tmp_path, "train", {"Jab": 0, "caf\u00e9": 1}, "map.json")
    assert "the first is 'jab' (it looks like 'Jab', and is another name). Move" in capsys.readouterr().err


def test_a_refusal_shows_any_name(capsys):
    with pytest.raises(SystemExit):
        common.refuse(f"{os.fsdecode(b'caf' + bytes([0xE9]))} and \u202ename\x1b[0m;\nsecond line")
    assert capsys.readouterr().err == "error: caf\\xe9 and \\u202ename\\x1b[0m;\nsecond line\n"
