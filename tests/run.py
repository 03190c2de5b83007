"""Set up `.venv` beside the README, then check the code style and run all tests: the project's one test command.

    $ python3 tests/run.py            # everything
    $ python3 tests/run.py --quick    # the main path of each part, for the loop while developing: two minutes
    $ python3 tests/run.py -k clips   # arguments go to pytest
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
sys.path.append(str(REPO / "tools"))

from common.environment import make_environment  # noqa: E402 (tools/ has to be on the path first)
from common.machine import num_cores  # noqa: E402

QUICK = [
    "test_common.py",
    "test_runs.py::test_what_belongs_to_a_run",
    "test_runs.py::test_names_that_are_no_folder_are_refused",
    "test_clips.py",
    "test_refactor_dataset.py",
    "test_compile_and_profile.py",
    "test_sample_dataset.py::test_layout_is_that_of_a_qevd_download",
    "test_check_videos.py::test_every_fault_is_found_and_no_healthy_file_flagged",
    "test_train.py::test_a_run_writes_what_later_steps_read",
    "test_train.py::test_only_trainable_layers_move",
    "test_frame_cache.py::test_values_are_those_of_decoding_within_half_a_grey_level",
    "test_preprocess.py::test_values_manifest_and_counts",
    "test_export.py::test_the_network_normalises_and_gives_logits",
    "test_local_hub.py::test_onnx_runs_on_every_runtime_in_both_layouts",
    "test_run_inference.py::test_chunks_order_and_form_of_the_output",
    "test_run_inference.py::test_killed_and_started_again",
    "test_evaluate.py::test_main_figures_by_hand",
    "test_evaluate.py::test_joins_by_path_not_by_order",
    "test_quickstart.py::test_the_readme_teaches_the_commands_that_quickstart_runs",
    "test_readme.py::test_every_command_is_run_somewhere",
    "test_readme.py::test_what_it_refers_to_exists",
]

python = make_environment(REPO / "requirements.txt", TESTS / "requirements.txt")
arguments = [word for word in sys.argv[1:] if word != "--quick"]
chosen = [TESTS / name for name in QUICK] if "--quick" in sys.argv else [TESTS]
style = subprocess.run([python, "-m", "ruff", "check", REPO])
# a file's tests share what it made; one process more than cores, since many tests wait
shared = ["-n", str(min(4, num_cores() + 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
tests = subprocess.run([python, "-m", "pytest", *chosen, *shared, "--durations=10", *arguments], cwd=REPO)
sys.exit(style.returncode or tests.returncode)
