"""A table of runs: what each was made with, its accuracies, its latency, its score on the leaderboard.

Reads   runs/*/ and FOLDERS: checkpoint.pth, metrics.jsonl, export_assets/*.json, report/report.json, as the steps write
        them; leaderboard.json, which --score writes
Writes  OUT.csv and OUT.html, a page that sorts by any column. Nothing leaves this machine.

$ python tools/runs.py                                  # the runs that have a name
$ python tools/runs.py . ../earlier/training            # and other folders that hold a checkpoint
$ python tools/runs.py --score w8a8 87.5                # what the leaderboard says of runs/w8a8

Exit code 0: every run is in the table; 1: a checkpoint of some cannot be read; 2: a wrong flag, or no run.
"""

import json
from pathlib import Path

import common
from common import checkpoints, flags

# ----------------------------------------------------------------------------------------------------------------------
FOLDERS = []  # folders beside runs/* that hold a checkpoint.pth; "." is the run without a name
SCORE = []    # a run and its leaderboard score in percent, as NAME 87.5: kept in the run's leaderboard.json
OUT = "runs/table"  # of the two files, without their endings
# ----------------------------------------------------------------------------------------------------------------------

# flags of training that say where and on what machine, not what was trained
NO_RECIPE = {"output_dir", "resume", "data_path", "class_map", "device", "workers", "print_freq", "rank", "world_size"}
NO_RECIPE |= {"gpu", "distributed", "dist_url", "local_rank", "local_world_size", "overwrite", "tensorboard", "run"}
NO_RECIPE |= {"cache_dataset", "cache_frames", "save_every", "eval_every", "start_epoch", "test_only", "save_logits"}
AFTER = ("commit", "checkpoint", "epoch", "validated_on", "val_top1", "val_low", "val_high", "val_videos",
         "precision", "float_top1", "w8a8_top1", "deployed_low", "deployed_high", "estimated_ms", "profiled_ms",
         "compile_job", "shared", "leaderboard", "local_minus_leaderboard", "notes")  # fmt: skip


def main():
    flags.set_constants_from_flags(globals(), words="FOLDERS")
    folders = find_runs()
    if SCORE:
        keep_score(folders)
    from tqdm import tqdm

    runs, failed = [], []
    for name, folder in tqdm(folders.items(), desc="reading", unit="run", delay=2):
        run = read_run(folder)
        run["name"] = name
        runs.append(run)
        failed += [name] * run["unreadable"]
    rows, columns = table(runs)
    write_tables(rows, columns)
    for row in rows:
        print("  ".join(f"{key} {row[key]}" for key in ("run", *AFTER) if row.get(key) not in ("", None)))
    print(f"{len(rows)} runs: {OUT}.csv, {OUT}.html")
    if failed:
        print(f"the checkpoints of {len(failed)} cannot be read: {', '.join(failed)}")
    raise SystemExit(1 if failed else 0)


def find_runs():
    """{name: folder} of the runs with a name, then of FOLDERS. Exits with code 2 if there is none."""
    folders = {path.name: path for path in sorted(Path(flags.RUNS).glob("*")) if path.is_dir() and any(path.iterdir())}
    for folder in FOLDERS:
        if not Path(folder).is_dir():
            common.refuse(f"there is no folder {folder} (looked in {Path(folder).absolute()})")
        folders[folder] = Path(folder)
    if not folders:
        common.refuse(f"there is no run in {Path(flags.RUNS).absolute()}; --run NAME makes one, or name a folder")
    return folders


def keep_score(folders):
    """Write SCORE into its run's leaderboard.json."""
    try:
        name, score = SCORE[0], float(SCORE[1])
    except (IndexError, ValueError):
        score = -1
    if len(SCORE) != 2 or not 0 <= score <= 100:
        common.refuse(f"--score takes a run and a percentage, as --score w8a8 87.5, not {' '.join(SCORE)}")
    if name not in folders:
        common.refuse(f"there is no run {name}; there are {', '.join(folders)}")
    common.write_text(folders[name] / "leaderboard.json", json.dumps({"score": score}) + "\n")


# --- one run ----------------------------------------------------------------------------------------------------------


def read_run(folder):
    """What the files of a run's folder say: a dict of dicts, {} for a file that is not there."""
    assets = [common.read_json(path) for path in sorted(folder.glob("export_assets/*.json"))]
    export = next((of for of in assets if "compile_job" in of), {})
    return {
        "export": export,
        "estimate": next((of for of in reversed(assets) if "estimated_ms" in of), {}),
        "report": common.read_json(folder / "report/report.json"),
        "score": common.read_json(folder / "leaderboard.json").get("score"),
        **read_checkpoint(folder, export),
    }


def read_checkpoint(folder, export):
    """{"checkpoint": its keys without weights, "sha256", "unreadable"}: a run's own, or the one that it exported."""
    exported = export.get("checkpoint")
    others = [Path(exported)] if isinstance(exported, str) and exported else []
    path = next(filter(Path.is_file, [folder / "checkpoint.pth", folder / "soup.pth", *others]), None)
    if not path:
        sha256 = export.get("checkpoint_sha256") or ""
        return {"checkpoint": {}, "sha256": sha256 if isinstance(sha256, str) else "", "unreadable": False}
    try:
        saved = checkpoints.load_checkpoint(path, say=lambda sentence: None)
    except SystemExit:  # its sentence is printed; the others' rows are still wanted
        return {"checkpoint": {}, "sha256": "", "unreadable": True}
    return {
        "checkpoint": {key: saved[key] for key in ("args", "epoch", "metrics", "git", "train_splits") if key in saved},
        "sha256": common.sha256_of(path),
        "unreadable": False,
    }


def validated_on(saved):
    """Which videos a run's own accuracy is of, from its checkpoint."""
    args = saved.get("args", {})
    if args.get("hold_out"):
        return f"held out of train ({100 * args['hold_out']:g} % wanted{', by group' if args.get('groups') else ''})"
    return "val, which it was trained on" if "val" in saved.get("train_splits", []) else "val"


def stale(run):
    """Sentences where the files of a run are not of one another."""
    lines, exported, evaluated = [], run["export"], run["report"].get("about", {})
    of = exported.get("checkpoint_sha256")
    if run["sha256"] and isinstance(of, str) and of and of != run["sha256"]:
        lines.append("the export is of another checkpoint")
    if exported.get("sha256") and evaluated.get("model_sha256") not in (None, exported["sha256"]):
        lines.append("the report is of another model than the export")
    if run["unreadable"]:
        lines.append("the checkpoint cannot be read")
    return lines


# --- the table --------------------------------------------------------------------------------------------------------


def deployed_figures(runs):
    """{(checkpoint's hash, precision): main figures} of all reports, so that float and w8a8 of one checkpoint meet."""
    figures = {}
    for run in runs:
        report, against, export = run["report"], run["report"].get("comparison", {}), run["export"]
        first, second = dict(report.get("about", {})), against.get("about", {})
        if first.get("model_sha256") == export.get("sha256"):  # the model may have been moved since
            first = {"precision": export.get("precision")} | first
        for about, of, prefix in (first, report.get("figures", {}), ""), (second, against, "other_"):
            if about.get("precision") and prefix + "top1" in of:
                key = about.get("checkpoint_sha256") or run["sha256"], about["precision"]
                figures.setdefault(str(key), {"top1": of[prefix + "top1"], "n": of["n"]})
    return figures


def row_of(run, figures):
    """The columns of AFTER, "" for what is not known."""
    from report.figures import wilson

    saved, export, report = run["checkpoint"], run["export"], run["report"]
    git, metrics, row = saved.get("git", {}), saved.get("metrics", {}), dict.fromkeys(AFTER, "")
    about = report.get("about", {})
    row |= {"run": run["name"], "checkpoint": run["sha256"][:12], "epoch": saved.get("epoch", "")}
    if git:
        row["commit"] = f"{git['commit'][:10]}{'' if git['clean'] else ', changed'}"
    if "video_acc1" in metrics:
        n = metrics["num_videos"]
        row["val_low"], row["val_high"] = wilson(round(metrics["video_acc1"] * n / 100), n)
        row |= {"validated_on": validated_on(saved), "val_top1": round(metrics["video_acc1"], 3)}
        row["val_videos"] = n
    row["precision"] = export.get("precision") or about.get("precision", "")
    of_checkpoint = about.get("checkpoint_sha256") or export.get("checkpoint_sha256") or run["sha256"]
    for precision in "float", "w8a8":
        row[f"{precision}_top1"] = figures.get(str((of_checkpoint, precision)), {}).get("top1", "")
    deployed = report.get("figures", {})
    row |= {"deployed_low": deployed.get("ci95_low", ""), "deployed_high": deployed.get("ci95_high", "")}
    estimate = run["estimate"].get("estimated_ms")  # low, middle, high; None for a chip without a model of time
    row |= {"estimated_ms": round(estimate[1], 2) if estimate else "", "profiled_ms": export.get("profiled_ms", "")}
    row |= {"compile_job": export.get("compile_job", ""), "shared": export.get("shared", "")}
    local = deployed.get("top1", row["val_top1"])
    if run["score"] is not None:
        row["leaderboard"] = run["score"]
        row["local_minus_leaderboard"] = round(local - run["score"], 3) if local != "" else ""
    row["notes"] = "; ".join(stale(run))
    return row


def table(runs):
    """(rows, columns): the run, the flags that differ between the runs that have them, then AFTER."""
    recipes = [run["checkpoint"].get("args", {}) for run in runs]
    recipes = [{key: value for key, value in of.items() if key not in NO_RECIPE} for of in recipes]
    keys = dict.fromkeys(key for of in recipes for key in of)
    differing = [key for key in keys if len({json.dumps(of.get(key), default=str) for of in recipes if of}) > 1]
    figures = deployed_figures(runs)
    rows = []
    for run, recipe in zip(runs, recipes):
        own = {f"--{key.replace('_', '-')}": as_text(recipe[key]) if key in recipe else "" for key in differing}
        rows.append(row_of(run, figures) | own)
    return rows, ["run", *(f"--{key.replace('_', '-')}" for key in differing), *AFTER]


def as_text(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def write_tables(rows, columns):
    """OUT.csv and OUT.html."""
    import jinja2

    common.write_csv(f"{OUT}.csv", columns, rows)
    folder = Path(__file__).parent / "report"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True)
    empty = [column for column in columns if not any(row[column] not in ("", None) for row in rows)]
    shown = [column for column in columns if column not in empty]
    common.write_text(f"{OUT}.html", environment.get_template("runs.html").render(rows=rows, columns=shown))


if __name__ == "__main__":
    main()
