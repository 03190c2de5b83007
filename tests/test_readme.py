"""README.md, its two further pages, the notebook: their commands run here, in quickstart.py, or where ELSEWHERE says.

What they refer to exists, flags too.

$ python -m pytest tests/test_readme.py
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common import flags
from common.held_out import HeldOut

import pytest
import torch
import torchvision

import quickstart
import warm_python
from conftest import REPO
from make_videos import write_video
from torchvision_patches import clip

pytestmark = pytest.mark.slow

PAGES = {page: (REPO / page).read_text(encoding="utf-8")
         for page in ("README.md", "tools/README.md", "tests/benchmarks/README.md")}  # fmt: skip
README = PAGES["README.md"]
ALL = "\n".join(PAGES.values())

TRAIN = "python references/video_classification/train.py"


def commands(text):
    """The commands in the bash blocks of a text, one line each, without comments; a heredoc belongs to its command."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        block = re.sub(r"\\\n\s*", "", block)
        while block.strip():
            heredoc = re.match(r"[^\n]*<<'END'\n.*?^END$", block, re.DOTALL | re.MULTILINE)
            command, rest = (heredoc[0], block[heredoc.end() :]) if heredoc else block.lstrip().partition("\n")[::2]
            found.append(command if heredoc else command.split("  #")[0].strip())
            block = rest.lstrip()
    return found


def commands_of_notebook(path):
    """The commands that a notebook's cells give to a shell, one line each."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = [line.strip() for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    return [line[1:] for line in lines if line.startswith("!")]


def section(title):
    return re.search(rf"^## {title}\n(.*?)^(?:---|## )", ALL, re.DOTALL | re.MULTILINE)[1]


FLOAT_AND_W8A8 = commands(section("Several runs"))
NOTEBOOK = commands_of_notebook(REPO / "tools/quickstart.ipynb")

TEACHING = "test_training_run.py::test_a_teacher_is_asked_once_and_listened_to"
WINNER = [  # a test for each of the five commands
    "test_training_run.py::test_every_network_learns_and_is_validated",
    TEACHING,
    TEACHING,
    "test_average_checkpoints.py::test_equal_checkpoints_and_means",
    "test_export.py::test_w8a8_is_calibrated_with_training_clips_on_a_hub_of_tomorrow",
]
STARTED = ["it wants a network", *["test_checkpoints.py::test_the_winners_published_form"] * 2]
TO_WIN = [  # a test for each of the ten commands
    "test_training_run.py::test_who_is_held_out_is_in_a_list_that_later_steps_follow",
    *["test_readme.py::test_seeds_that_vote"] * 6,
    *["test_deployed_network.py::test_several_and_their_mirror_image_deployed"] * 2,
    "test_readme.py::test_seeds_that_vote",
]
TO_WIN_ON_SAMPLE = [WINNER[0], TEACHING, *TO_WIN]

# Commands that run neither here nor in quickstart.py as they stand: the test that runs them with other paths, or why
# none can.
ELSEWHERE = {
    "python3 tools/quickstart.py": "test_quickstart.py::test_every_step_runs_and_the_two_accuracies_agree",
    "python3 tests/run.py": "it is what runs this test",
    "conda create --name lpcvc python=3.11 -y": "conda may not be there",
    "conda activate lpcvc": "conda may not be there",
    "pip install -r requirements.txt": "tests/run.py and quickstart.py install that file with pip",
    **dict(zip(commands(section("3. Training the Model :weight_lifting:"))[1:], TO_WIN, strict=True)),
    **dict(zip(commands(section("The 2026 winner")), WINNER + TO_WIN_ON_SAMPLE, strict=True)),
    **dict(zip(commands(section("Start from a trained network")), STARTED, strict=True)),
    **dict.fromkeys(NOTEBOOK, "test_kernel.py::test_the_notebook_in_small"),
    **dict.fromkeys(commands(section("VideoMAE")), "test_videomae.py::test_the_recipe_in_miniature"),
    "torchrun --nproc-per-node 4 -- tools/preprocess_and_save.py": "test_preprocess.py::test_torchrun_itself_and_a_bad_"
    "video_that_ends_none_of_its_processes",
    commands(section("On a cluster"))[0]: "it writes the file that the next command gives to SLURM",
    "sbatch train.sbatch": "there is no SLURM here; what it sets: test_train.py::test_srun_starts_one_run",
    "python tools/predict.py squats.mp4 more_videos/": "test_predict.py::test_a_folder_of_all_kinds_of_files",
    "python tools/predict.py session.mp4 --timeline": "test_predict.py::test_a_recording_of_three_exercises",
    "python tools/live.py": "test_live.py::test_from_the_camera_to_the_label",
    "python tools/compile_offline.py --model r2plus1d_18": "test_compile_offline.py::test_r2plus1d_float_and_w8a8_two_"
    "at_a_time",
    "python tools/compile_offline.py --checkpoint checkpoint.pth --precision w8a8 --num-clips 4": "test_compile_"
    "offline.py::test_w8a8_in_the_emulator_is_within_one_step_of_onnxruntime",
    "python tools/compile_offline.py --compare r2plus1d_18 r3d_18 mc3_18": "test_compile_offline.py::test_a_comparison_"
    "goes_on_where_it_was_killed",
    "python tools/refactor_dataset.py --dry-run": "test_refactor_dataset.py::test_dry_run_touches_nothing",
    "python tools/refactor_dataset.py": "test_refactor_dataset.py::test_parts_are_sorted_and_named",
    "python tools/check_videos.py --root ./QEVD_organized --quarantine ./bad_videos --remux --replace --ext mp4 "
    "--jobs 8 --report bad_videos.csv": "test_check_videos.py::test_every_fault_is_found_and_no_healthy_file_flagged",
    "python references/video_classification/train.py --data-path ./QEVD_organized --weights KINETICS400_V1 "
    "--cache-dataset --epochs 15 --batch-size 24 --lr 0.01": "test_train.py::test_a_run_writes_what_later_steps_read",
    "python references/video_classification/train.py --data-path ./QEVD_organized --resume ./checkpoint.pth "
    "--test-only": "test_train.py::test_validation_is_the_same_at_any_world_size",
    "python tools/preprocess_and_save.py": "test_preprocess.py::test_values_manifest_and_counts",
    "python tools/example_export.py": "test_export.py::test_the_real_network_gives_torchs_logits",
    'python tools/example_export.py --device "Samsung Galaxy S25"': "test_export.py::test_jobs_of_the_real_network",
    "python tools/example_export.py --skip-profiling false --skip-inferencing false": "test_export.py::test_jobs_"
    "of_the_real_network",
    "python tools/preprocess_and_save.py --data-root ./QEVD_organized/train --out-root ./calibration_tensors "
    "--max-per-class 2": "test_export.py::test_w8a8_is_calibrated_with_training_clips_on_a_hub_of_tomorrow",
    "python tools/example_export.py --precision w8a8": "test_export.py::test_w8a8_is_calibrated_with_training_clips_on_"
    "a_hub_of_tomorrow",
    "python tools/example_export.py --skip-profiling false --share ADDRESS": "test_export.py::test_w8a8_is_calibrated_"
    "with_training_clips_on_a_hub_of_tomorrow",
    "python tools/compile_and_profile.py --onnx-dir /path/to/onnx_directory": "test_compile_and_profile.py::"
    "test_compiles_as_the_seed_says_and_profiles",
    "python tools/run_inference.py": "test_run_inference.py::test_chunks_order_and_form_of_the_output",
    'python tools/run_inference.py --dlc-path "" --onnx-dir /path/to/onnx_dir': "test_run_inference.py::"
    "test_onnx_source_is_compiled_first",
    "python tools/run_inference.py --use-single-tensor --output-h5 one.h5": "test_run_inference.py::test_one_clip",
    "python tools/evaluate.py --h5 dataset-export.h5 --manifest ./preprocessed_tensors/manifest.jsonl "
    "--class_map class_map.json": "test_evaluate.py::test_main_figures_by_hand",
    **dict.fromkeys(FLOAT_AND_W8A8, "test_runs.py::test_a_run_with_a_name_and_float_and_w8a8_side_by_side"),
    'sbatch --array 0-7 --wrap "python tools/preprocess_and_save.py"': "there is no SLURM here; what it sets: "
    "test_preprocess.py::test_shares_of_the_work_end_in_one_manifest",
}
RUN_HERE = [*commands(section("Use your own videos")), commands(section("On a cluster"))[2]]
EVERY = [*commands(ALL), *NOTEBOOK]


@pytest.mark.quick
def test_every_command_is_run_somewhere():
    run = {command for _, command in [*quickstart.steps(), quickstart.offline_step()]}
    missing = set(EVERY) - run - set(RUN_HERE) - set(ELSEWHERE)
    assert not missing, "no test is known to run:\n" + "\n".join(sorted(missing))
    assert not set(ELSEWHERE) - set(EVERY), "the pages no longer have these commands"
    for file, name in set(re.findall(r"(test_\w+\.py)::(test_\w+)", "\n".join(ELSEWHERE.values()))):
        assert f"def {name}(" in (REPO / "tests" / file).read_text(), f"there is no {name} in {file}"


def flags_of(script):
    """The flags that a script takes."""
    source = (REPO / script).read_text(encoding="utf-8")
    if script.startswith("references/"):
        return set(re.findall(r'"(--[a-z-]+)"', (REPO / script).with_name("arguments.py").read_text(encoding="utf-8")))
    names = {name.lower().replace("_", "-") for name in flags.constants_of(source)}
    names |= {name.replace("skip-", "do-") for name in names if name.startswith("skip-")}
    return {f"--{name}" for name in names | {"run", "help"}}


@pytest.mark.quick
def test_every_script_and_flag_of_a_command_exists():
    checked = 0
    for command in EVERY:
        words = shlex.split(command)
        places = [i for i, word in enumerate(words) if re.fullmatch(r"(\./)?(tools|references)/.*\.py", word)]
        if not places or "quickstart.py" in command:
            continue
        known = flags_of(words[places[-1]])  # local_hub.py stands before another
        given = {word.partition("=")[0].replace("_", "-") for word in words[places[-1] :] if word.startswith("--")}
        assert given <= known, f"{words[places[-1]]} has no {', '.join(given - known)}: {command}"
        checked += len(given)
    assert checked > 200


@pytest.mark.quick
def test_every_flag_that_is_named_exists():
    """A flag in a sentence or a table is one of some script, or of a program that is named beside it."""
    scripts = [*(REPO / "tools").glob("*.py"), REPO / "references/video_classification/train.py"]
    known = {flag for path in scripts for flag in flags_of(path.relative_to(REPO).as_posix())} | OF_OTHER_PROGRAMS
    text = re.sub(r"^```.*?^```", "", ALL, flags=re.DOTALL | re.MULTILINE)
    named = {flag for code in re.findall(r"`([^`]+)`", text) for flag in re.findall(r"(?<![\w-])--[a-z]\w[\w-]*", code)}
    assert len(named) > 80
    wrong = {flag for flag in named if flag.replace("_", "-") not in known}
    assert not wrong, f"no script has {', '.join(sorted(wrong))}"


def test_the_notebook_is_stored_without_output():
    for cell in json.loads((REPO / "tools/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count"), "clear the notebook's output"


@pytest.mark.quick
def test_what_it_refers_to_exists():
    evidence = re.findall(r"`(test_\w+\.py)(?: -k (\w+))?`(?:, `-k (\w+)`)?", ALL)
    assert len(evidence) > 10
    for file, *words in evidence:
        text = (REPO / "tests" / file).read_text()
        for word in words:
            assert re.search(rf"^def test_\w*{word}", text, re.MULTILINE), f"no test of {file} has {word} in its name"
    paths = re.findall(r"\]\((\.pictures/[^)]+)\)", README)
    paths += re.findall(r"(?:tools|tests|references/video_classification|torchvision_patches)/[\w/]+\.py", ALL)
    assert len(paths) > 30
    for path in paths:
        assert (REPO / path).exists(), f"a page names {path}, which is not there"
    house = re.search(r"^## Contributing\n(.*)", PAGES["tools/README.md"], re.DOTALL | re.MULTILINE)[1]
    for path in (REPO / "tools").glob("*/__init__.py"):
        assert f"| `tools/{path.parent.name}/` |" in house, f"the table of rooms lacks {path.parent.name}"
    for path in (REPO / "tools").glob("*.py"):
        assert path.name in README + PAGES["tools/README.md"], f"no page names {path.name}"


# of qai-hub, torchrun, pip, the benchmarks, tests/run.py, the options of jobs
OF_OTHER_PROGRAMS = {"--api-token", "--nproc-per-node", "--run-path", "--index-url", "--quick", "--qairt-version"}
OF_OTHER_PROGRAMS |= {"--small", "--rows", "--modes", "--w8a8", "--train-on"}

# messages of the table that others print
OF_OTHERS = {
    "torchrun: error: ambiguous option: --run could match --run-path, --run_path",
    "error: AI Hub: Internal API failure. Could not connect to Qualcomm AI Hub.",
    "QNN_VERSION_MISMATCH",
}


def texts_of_the_code():
    """Every text of the scripts and rooms, as one string each, with … where an f-string puts something in."""
    for folder in "tools", "references", "torchvision_patches":
        for path in sorted((REPO / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_quoted_messages_are_those_of_the_code():
    """Every message in the table of errors: its words, in their order, stand in one text of the code."""
    rows = re.search(r"^\| message \| what to do \|\n\|.*\n((?:\|.*\n)+)", ALL, re.MULTILINE)[1].splitlines()
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(quoted) > 30
    texts = "\0".join(texts_of_the_code())
    for message in quoted:
        words = [re.escape(part.strip()) for part in message.removeprefix("error: ").split("…") if part.strip()]
        said = message in OF_OTHERS or re.search("[^\0]*?".join(words), texts)
        assert said, f"tools/README.md quotes a message that no code prints: {message}"


def test_links_resolve():
    anchors = {}
    for page, text in PAGES.items():
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors[page] = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            if "://" in path:
                continue
            target = (REPO / page).parent / path if path else REPO / page
            assert target.exists(), f"{page} links to {link}, which is not there"
            if anchor:
                known = anchors[target.resolve().relative_to(REPO).as_posix()]
                assert anchor in known, f"{page} links to {link}, and there is no such heading"


@pytest.fixture
def shell(tmp_path):
    """shell(command) runs a command of the README as it stands, in a folder where tools/ and the like are found.

    One of Python, in a fork of one that has imported torch: each script is started by itself in its own tests.
    """
    for name in ("tools", "references", "torchvision_patches"):
        (tmp_path / name).symlink_to(REPO / name)
    cache = tmp_path / "hub/checkpoints/r2plus1d_18-91a641e6.pth"
    cache.parent.mkdir(parents=True)
    torch.save(torchvision.models.get_model("r2plus1d_18").state_dict(), cache)
    path = f"{Path(sys.executable).parent.resolve()}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(command, code=0):
        words = shlex.split(command)
        if words[0] == "python":
            (result,) = warm_python.run(words[1], words[2:], [environment], tmp_path)
        else:
            options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
            result = subprocess.run(["bash", "-c", command], **options)
        assert result.returncode == code, f"$ {command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    return run


@pytest.fixture
def own_videos(tmp_path):
    """Eight videos of two classes, and a small network that knows five others, by the name of the winner's."""
    for name in ("waving", "clapping hands"):
        (tmp_path / "my_videos" / name).mkdir(parents=True)
        (tmp_path / "my_videos" / name / ".DS_Store").touch()
        for i in range(4):
            write_video(tmp_path / "my_videos" / name / f"{i}.mp4", 60 + 20 * i, height=72, width=96, seed=i)
    network = torchvision.models.get_model("mc3_18", num_classes=5)
    own = clip.of_network("mc3_18")._replace(resize_size=(32, 43), crop_size=(28, 28))
    saved = {"model": network.state_dict(), "classes": list("abcde"), **own.as_dict()}
    torch.save(saved, tmp_path / "r2plus1d_r18_16x4_QEVD_sup.pth")


def test_own_videos_are_taught_and_evaluated(shell, own_videos, tmp_path):
    printed = [shell(command) for command in RUN_HERE[:6]]
    assert "videos left out in turn" in printed[0] and '"n": 2' in printed[5].splitlines()[-1], printed
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 2
    assert (tmp_path / "report/report.html").exists()


def test_own_videos_are_trained_on_and_processes_share_the_check(shell, own_videos, tmp_path):
    for command in RUN_HERE[6:9]:
        shell(command + (" --epochs 1 --batch-size 4 --device cpu --bn-clips 0" if TRAIN in command else ""))
    shell(RUN_HERE[9] + " --epochs 1 --device cpu")  # the other way, with clips of 8 frames
    saved = torch.load(tmp_path / "checkpoint.pth")
    assert saved["clip_len"] == 8 and saved["rotate"]
    (tmp_path / "QEVD_organized").symlink_to("my_dataset")
    shell(RUN_HERE[10])
    assert len((tmp_path / "bad_videos.csv").read_text().splitlines()) == 1 + 2 * 8  # under both names of the folder


def test_seeds_that_vote(shell, tmp_path):
    """"To win" from the trained checkpoints on, two small networks: each step takes what the one before it wrote."""
    (tmp_path / "class_map.json").symlink_to(REPO / "class_map.json")
    people = []
    for label in "pushups", "squats":
        (tmp_path / "QEVD_organized/train" / label).mkdir(parents=True)
        for _ in range(5):
            people.append({"video_path": f"./{len(people):08d}.mp4", "worker_id": len(people)})
            path = tmp_path / "QEVD_organized/train" / label / people[-1]["video_path"]
            write_video(path, 60, height=48, width=64, seed=len(people))
    (tmp_path / "fine_grained_labels_with_worker_ids.json").write_text(json.dumps(people))
    videos = sorted(path.relative_to(tmp_path / "QEVD_organized") for path in tmp_path.glob("QEVD_organized/*/*/*"))
    kept_out = HeldOut(tuple(path.as_posix() for path in videos if int(path.stem) % 5), share=0.8)
    class_map = json.loads((REPO / "class_map.json").read_text())
    names = sorted(class_map, key=class_map.get)
    own = clip.of_network("mc3_18")._replace(resize_size=(32, 43), crop_size=(28, 28))
    for seed in 1, 2:
        folder = tmp_path / f"runs/seed{seed}"
        folder.mkdir(parents=True)
        kept_out.write(folder)
        for epoch in 12, 13, 14:
            torch.manual_seed(100 * seed + epoch)
            network = torchvision.models.get_model("mc3_18", num_classes=92)
            saved = {"model": network.state_dict(), "epoch": epoch, "args": {"model": "mc3_18"}, "classes": names}
            torch.save(saved | {"held_out": kept_out.key()} | own.as_dict(), folder / f"model_{epoch}.pth")
    (folder / "model_14.pth").rename(folder / "soup.pth")
    _, *of_a_seed, choose, _, _, table = commands(section("3. Training the Model :weight_lifting:"))[1:]
    for seed in 1, 2:
        for command in of_a_seed if seed == 1 else of_a_seed[-2:]:  # the clips are the same for both
            hub = "python tools/local_hub.py " if re.search("example_export|run_inference", command) else ""
            out = shell(hub + command.replace("seed1", f"seed{seed}") + " --device cpu" * ("average" in command))
            of_run = f"{'example_export' if 'preprocess' in command else ''}.py --run seed{seed} "
            assert of_run in out, "the next command leaves the run"
    printed = shell(choose.replace("runs/seed3/dataset-export.h5 ", "")).splitlines()
    assert json.loads(printed[-1])["steps"] and any("example_export.py" in line for line in printed), printed
    assert "2 runs: runs/table.csv" in shell(table)
