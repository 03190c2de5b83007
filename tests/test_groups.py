"""The file of --groups: whose video is whose, in every form in which one gets it; nobody is on both sides in silence.

$ python -m pytest tests/test_groups.py
"""

import json

from common.groups import read_groups

import pytest

VIDEOS = ["elbow_plank/00000003.mp4", "squats/00004411.mp4", "squats/00004412.mov"]
TABLE = "video,group\n{0}00000003{1},ann\n{0}00004411{1},ben\n{0}00004412{1},ann\n"
GROUPS = {VIDEOS[0]: "ann", VIDEOS[1]: "ben", VIDEOS[2]: "ann"}


@pytest.mark.parametrize(
    "content",
    [
        TABLE.format("", ""),
        TABLE.format("./", ".mp4"),
        TABLE.format("videos\\QEVD-FIT-300k-Part-1\\", ".MP4").replace("\n", "\r\n"),
        TABLE.format("", ".mp4").replace(",", ";"),
        TABLE.format("", ".mp4").replace("ann", '"ann"') + "not/here.mp4,carl\nnobody.mp4,\n",
        "group,video\nann,elbow plank/00000003\nben,squats/00004411\nann,squats/00004412.mov\n",
        json.dumps([{"video_path": f"./{v[-12:-4]}.mp4", "worker_id": g} for v, g in GROUPS.items()]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_each_form_names_the_same_people(tmp_path, content, encoding):
    (tmp_path / "groups").write_text(content, encoding=encoding)
    assert read_groups(tmp_path / "groups", VIDEOS) == GROUPS


def test_the_file_of_workers_as_it_is_shipped(tmp_path):
    """Numbers for people, more videos than there are here, and one of nobody."""
    rows = [{"video_path": f"./{k:08}.mp4", "worker_id": k % 7} for k in range(5000)]
    rows += [{"video_path": "./00005000.mp4", "worker_id": None}]
    (tmp_path / "workers.json").write_text(json.dumps(rows))
    assert read_groups(tmp_path / "workers.json", [*VIDEOS, "squats/00005000.mp4"]) == {
        VIDEOS[0]: "3",
        VIDEOS[1]: "1",
        VIDEOS[2]: "2",
    }


def test_people_as_pandas_writes_them(tmp_path):
    """Numbers with decimals where somebody is not known, who is NaN and no person of that name."""
    rows = [{"video_path": v[-12:], "worker_id": g} for v, g in zip(VIDEOS, [71.0, 71, float("nan")])]
    (tmp_path / "workers.json").write_text(json.dumps(rows))
    assert read_groups(tmp_path / "workers.json", VIDEOS) == {VIDEOS[0]: "71", VIDEOS[1]: "71"}


def test_the_closest_name_counts(tmp_path):
    """Two videos of one name are told apart by their folders or endings; letters composed in another way are equal."""
    videos = ["squats/1.mp4", "lunges/1.mp4", "lunges/1.mov", "lunges/caf\u00e9.mp4", "lunges/monday/2.mp4"]
    rows = ["x/squats/1.mp4,a", "lunges/1.mov,b", "lunges/1.mp4,c", "cafe\u0301,d", "monday/2,e", "other/3,f"]
    (tmp_path / "groups.csv").write_text("video,group\n" + "\n".join(rows), encoding="utf-8")
    assert read_groups(tmp_path / "groups.csv", videos) == {
        "squats/1.mp4": "a",
        "lunges/1.mp4": "c",
        "lunges/1.mov": "b",
        "lunges/caf\u00e9.mp4": "d",
        "lunges/monday/2.mp4": "e",
    }


@pytest.mark.parametrize(
    "content, words",
    [
        ("1.mp4,ann\n", "the first line of groups is '1.mp4,ann'; it must be a table with the head"),
        ("", "the first line of groups is ''"),
        ("video,group\n1.mp4,ann\n", "'1.mp4' may be each of squats/1.mp4, lunges/1.mp4; write it there with its"),
        (
            "video,group\nsquats/1,ann\nsquats/1.mp4,ann\n./squats/1.mp4,ben\n",
            "into 'ann' as 'squats/1.mp4' and into 'ben'",
        ),
        ("video,group\nx/7.mp4,ann\n", "names none of the 2 videos; it has 1 rows with a group, as 'x/7.mp4'"),
        ("video,group\nsquats/1.mp4,\n", "names none of the 2 videos; it has 0 rows with a group"),
        ("video,group\nlunge, left.mp4,ann\n", "has more in the row of 'lunge' than in its head"),
        ('[{"video": "1.mp4"}]', "is no file of groups (KeyError('video_path'))"),
        ("[1, 2", "is no file of groups"),
        (b"video,group\n\xff,\xfe\n", "is no file of groups"),
        (None, "cannot read the groups groups: No such file or directory"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "groups").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as end:
        read_groups("groups", ["squats/1.mp4", "lunges/1.mp4"])
    assert end.value.code == 2 and words in capsys.readouterr().err
