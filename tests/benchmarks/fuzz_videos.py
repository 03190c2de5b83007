"""Give check_videos.py mutated videos: nothing may crash, hang or get lost, and the counts must add up.

Writes 1,000 videos (H.264, HEVC, MPEG-4; mp4, fragmented mp4, AVI, Matroska) with flipped bytes, cuts, splices of two
files, swapped boxes or overwritten stretches into a temporary folder, judges them in a dry run, which must call those
sound that the index and `read_frames` take, and then checks and repairs them with every flag on.

    $ python tests/benchmarks/fuzz_videos.py [number of files] [seed]

Prints what was flagged by kind of mutation; the last line is one JSON object. Exit code 1 if an original is lost, a
file left in the dataset does not decode or is not taken, frame for frame, by the index and `read_frames`, the verdicts
differ, or a count is wrong.
"""

import collections
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tools"), str(REPO / "tests")]

from make_videos import write_video
from torchvision_patches.decoding import UnreadableVideo, frame_times, read_frames
from videos import judging

TIMEOUT = 20  # seconds a file may take
LIMIT = 1800  # seconds the whole run may take
SAME = {"threads": "1", "x264-params": "mbtree=0"}  # x264 gives the same file each time only so
HEVC = dict(codec="libx265", options={"x265-params": "log-level=error:pools=none:frame-threads=1"})


def healthy_videos(folder):
    """{file ending: [bytes]} of small videos to mutate; the same for a seed, as far as encoders can be made to."""
    small = {"height": 48, "width": 64, "num_frames": 24}
    fast = small | {"container_options": {"movflags": "faststart"}}
    fragments = small | {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
    write_video(folder / "a.mp4", **small, options=SAME)
    write_video(folder / "b.mp4", **fast, options=SAME | {"bf": "3", "g": "12"})
    write_video(folder / "c.mp4", **fast, **HEVC)
    write_video(folder / "d.mp4", **fast, codec="mpeg4")
    write_video(folder / "e.mp4", **fragments, options=SAME | {"g": "8"})
    write_video(folder / "f.avi", **small, options=SAME)
    write_video(folder / "g.avi", **small, codec="mpeg4")
    write_video(folder / "h.mkv", **small, options=SAME, container_options={"fflags": "bitexact"})
    videos = collections.defaultdict(list)
    for path in sorted(folder.iterdir()):
        videos[path.suffix].append(path.read_bytes())
        path.unlink()
    return videos


def flip_bytes(rng, data, _):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 10, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(rng, data, _):
    return data[: rng.randrange(len(data))]


def splice(rng, data, other):
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def swap_boxes(rng, data, _):
    """Swap two boxes or stretches; for mp4 their ends are the outermost boxes' where that can be told."""
    ends, position = [0], 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if not 8 <= size <= len(data) - position:
            break
        position += size
        ends.append(position)
    if len(ends) < 3:
        ends = sorted(rng.sample(range(len(data)), 4))
    parts = [data[a:b] for a, b in zip(ends, ends[1:])] + [data[ends[-1] :]]
    i, j = rng.sample(range(len(parts) - 1), 2)
    parts[i], parts[j] = parts[j], parts[i]
    return data[: ends[0]] + b"".join(parts)


def overwrite(rng, data, _):
    size, fill = rng.randrange(1, len(data) // 3), rng.choice([bytes, rng.randbytes])
    start = rng.randrange(len(data) - size)
    return data[:start] + fill(size) + data[start + size :]


def change_header(rng, data, _):
    """Numbers of the header set to extremes, where decoders allocate and loop."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 2, 5])):
        start = rng.randrange(min(len(data), 1500) - 4)
        data[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"])
    return bytes(data)


def is_taken(path):
    """Whether the index takes a file and `read_frames` gives all its frames: one by one, and all at once."""
    try:
        pts, _ = frame_times(path)
        first_pixel = dict(convert=lambda pixels: pixels[:1, :1])
        read_frames(path, pts, range(len(pts)), **first_pixel)
        for number in {0, len(pts) // 3, len(pts) - 1}:
            read_frames(path, pts[number : number + 1], [number], **first_pixel)
        return True
    except UnreadableVideo:
        return False


MUTATIONS = [flip_bytes, cut, splice, swap_boxes, overwrite, change_header]


def write_mutants(root, num_files, seed):
    """Write the dataset; returns {path: (mutation's name, bytes)}."""
    rng, mutants = random.Random(seed), {}
    videos = healthy_videos(root)
    (root / "train/a").mkdir(parents=True)
    for i in range(num_files):
        ending = rng.choice([".mp4"] * 5 + [".avi"] * 2 + [".mkv"])
        mutation = MUTATIONS[i % len(MUTATIONS)]
        path = root / f"train/a/{i:05}{ending}"
        data = mutation(rng, rng.choice(videos[ending]), rng.choice(videos[ending]))
        path.write_bytes(data)
        mutants[path] = mutation.__name__, data
    return mutants


def wrongs(mutants, root, rows, result):
    """Sentences about everything that is not as it must be."""
    found = [] if result.returncode in (0, 1) else [f"exit code {result.returncode}: {result.stderr[-2000:]}"]
    if len(rows) != len(mutants) or f"{'sum':20}{len(mutants):9,}" not in result.stdout:
        found.append(f"{len(rows)} rows for {len(mutants)} files, or a sum that is not theirs")
    for path, (_, data) in mutants.items():
        row = rows.get(str(path), {"action": "no row"})
        quarantined = row.get("quarantined_to") and Path(row["quarantined_to"]).read_bytes() == data
        intact = path.exists() and path.read_bytes() == data
        right = {
            "kept": intact,
            "replaced": quarantined and path.exists(),
            "quarantined": quarantined and not path.exists(),
        }
        if not right.get(row["action"]):
            found.append(f"{path}: {row}")
        if path.exists() and judging.examine(path)["decodes"] != "yes":
            found.append(f"{path} stays and does not decode: {row}")
        if path.exists() and not is_taken(path):
            found.append(f"{path} stays and the index or read_frames does not take it: {row}")
    found += [f"left behind: {path}" for path in root.rglob(".*")]
    return found


def rows_of(report):
    with open(report, newline="") as file:
        return {row["video"]: row for row in csv.DictReader(file)}


def main(num_files=1000, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        root, report, quarantine = Path(folder, "root"), Path(folder, "report.csv"), Path(folder, "bad")
        root.mkdir()
        mutants = write_mutants(root, num_files, seed)
        command = [sys.executable, str(REPO / "tools/check_videos.py"), "--root", str(root), "--report", str(report)]
        command += ["--quarantine", str(quarantine), "--jobs", "2", "--timeout", str(TIMEOUT)]
        start = time.perf_counter()
        subprocess.run([*command, "--dry-run"], capture_output=True, timeout=LIMIT)
        rows = rows_of(report)
        found = [
            f"{path} {'is' if is_taken(path) else 'is not'} taken, and check_videos.py says: {rows.get(str(path))}"
            for path in mutants
            if is_taken(path) != (rows.get(str(path), {}).get("decodes") == "yes")
        ]
        command += ["--remux", "--replace", "--reencode"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        seconds = time.perf_counter() - start
        rows = rows_of(report)
        found += wrongs(mutants, root, rows, result)

    print(result.stdout)
    print(f"{'mutation':16}{'files':>7}{'flagged':>9}{'replaced':>10}")
    for mutation in MUTATIONS:
        mine = [
            rows[str(path)] for path, (name, _) in mutants.items() if name == mutation.__name__ and str(path) in rows
        ]
        flagged = sum(row["reason"] != "healthy" for row in mine)
        print(f"{mutation.__name__:16}{len(mine):7}{flagged:9}{sum(row['action'] == 'replaced' for row in mine):10}")
    for wrong in found[:20]:
        print("WRONG:", wrong)
    reasons = collections.Counter(row["reason"] for row in rows.values())
    flagged = len(rows) - reasons["healthy"]
    print(
        json.dumps(
            {
                "files": num_files,
                "seed": seed,
                "flagged": flagged,
                "reasons": reasons,
                "wrong": len(found),
                "seconds": round(seconds, 1),
            }
        )
    )
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
