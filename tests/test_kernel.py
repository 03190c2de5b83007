"""Scripts in a kernel, as Jupyter, Colab and Spyder run them by `%run`: as from a shell."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision

from conftest import REPO
from drawn_exercises import write_exercises, write_onnx
from torchvision_patches import clip

pytest.importorskip("ipykernel", reason="no ipykernel: pip install ipykernel")
from jupyter_client.manager import KernelManager


@pytest.fixture
def cell(tmp_path):
    """cell(code) -> what a cell prints, its errors too; `until` presses the kernel's interrupt at these words."""
    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path), extra_arguments=["--log-level=40"])
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code, until=None):
        number, printed, deadline = client.execute(code), "", time.monotonic() + 120
        while time.monotonic() < deadline:
            message = client.get_iopub_msg(timeout=120)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != number:
                continue
            if kind == "stream":
                printed += content["text"]
                if until and until in printed:
                    manager.interrupt_kernel()
                    until = None
            elif kind == "error":
                printed += f"ERROR {content['ename']}: {content['evalue']}"
            elif kind == "display_data":
                printed += f"[{', '.join(content['data'])}]"
            elif kind == "status" and content["execution_state"] == "idle":
                return printed
        raise AssertionError(f"the cell does not end:\n{printed}")

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_scripts_run_in_a_kernel(cell, tmp_path):
    for label in "squats", "pushups":
        for i in range(2):
            (tmp_path / "my_videos" / label).mkdir(parents=True, exist_ok=True)
            write_exercises(tmp_path / f"my_videos/{label}/{i}.mp4", [label], seconds=4, seed=i)
    odd = os.fsdecode(b"caf\xe9.mp4")
    os.rename(tmp_path / "my_videos/squats/1.mp4", tmp_path / "my_videos/squats" / odd)
    write_onnx(tmp_path / "tiny.onnx")
    printed = cell(f"%run '{REPO}/tools/split_videos.py'")
    assert "ERROR" not in printed and (tmp_path / "my_dataset/val").is_dir(), printed
    printed = cell(f"%run '{REPO}/tools/preprocess_and_save.py' --data-root my_dataset/train")
    assert "found 2 = saved 2" in printed and "ERROR" not in printed, printed
    printed = cell(f"%run '{REPO}/tools/predict.py' my_videos/squats --checkpoint tiny.onnx")
    assert r"caf\xe9.mp4" in printed and "ERROR" not in printed, printed
    printed = cell(f"%run '{REPO}/tools/evaluate.py' --h5 absent.h5")
    assert printed.startswith("error: there is no absent.h5"), printed  # then IPython's own words on a SystemExit
    live = f"%run '{REPO}/tools/live.py' --checkpoint tiny.onnx --port 0 --open-browser false"
    printed = cell(live, until="(Ctrl-C ends it)")
    assert "open http://127.0.0.1:" in printed and "interrupted; start it again" in printed, printed


@pytest.mark.slow
def test_the_notebook_in_small(cell, tmp_path):
    """Its cells one after another, with a small network, few videos and no pip; its pictures are shown in it."""
    try:
        for end in os.openpty():
            os.close(end)
    except OSError:
        pytest.skip("no pseudo-terminal, which `!` of a notebook needs: mount -t devpts devpts /dev/pts")
    notebook = json.loads((REPO / "tools/quickstart.ipynb").read_text(encoding="utf-8"))
    codes = ["".join(part["source"]) for part in notebook["cells"] if part["cell_type"] == "code"]
    for name in ("tools", "torchvision_patches", "class_map.json"):
        (tmp_path / name).symlink_to(REPO / name)
    network = torchvision.models.get_model("mc3_18", num_classes=5)
    own = clip.of_network("mc3_18", clip_len=4)._replace(resize_size=(32, 43), crop_size=(28, 28))
    torch.save({"model": network.state_dict(), "classes": list("abcde"), **own.as_dict()}, tmp_path / "small.pth")
    small = {"VIDEOS = 8": "VIDEOS = 4", "KINETICS400_V1": "small.pth", "squats pushups toe_touch": "squats pushups"}
    for words, others in small.items():
        assert codes[0].count(words) == 1
        codes[0] = codes[0].replace(words, others)
    pip = "!python -m pip install --quiet -r requirements.txt"
    assert codes[1].endswith(pip)
    codes[1] = codes[1].removesuffix(pip)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cell(f"import os; os.environ.update(PATH={path!r}, OMP_NUM_THREADS='1')")
    printed = [cell(code) for code in codes]
    for code, said in zip(codes, printed):
        assert "ERROR" not in said and "error:" not in said and "Traceback" not in said, f"{code}\n{said}"
    assert any("videos left out in turn" in said for said in printed), printed
    assert (tmp_path / "checkpoint.pth").exists()
    assert sum(said.count("image/png") for said in printed) == 2, "of each of the two classes one is set aside"
    assert "ERROR AssertionError: this failed, and says above why: false" in cell("!false"), "a cell that fails goes on"
    printed = cell(f"%cd -q {tmp_path.parent}\n{codes[1]}")
    assert "ERROR AssertionError: set REPOSITORY, in the first cell" in printed, printed
