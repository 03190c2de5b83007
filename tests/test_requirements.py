"""What is imported is declared: for the product in requirements.txt, for tests alone in tests/requirements.txt."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest

from conftest import REPO

pytestmark = pytest.mark.quick

NOT_PIPS = {"onnxruntime_qnn", "torchcodec"}  # compile_offline.py installs one into .qnn; bench_gpu.py does without


def imported(*folders):
    """{top-level name of a package that is neither Python's nor ours: a file that imports it}."""
    files = [path for folder in folders for path in (REPO / folder).rglob("*.py")]
    everywhere = [*REPO.glob("t*/**/*.py"), *REPO.glob("references/**/*.py")]
    ours = {path.stem for path in everywhere} | {path.parent.name for path in everywhere}
    names = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [part.name for part in node.names]
                names |= {module.split(".")[0]: path.relative_to(REPO) for module in modules}
    return {name: path for name, path in names.items() if name not in sys.stdlib_module_names | ours | NOT_PIPS}


def declared(*files):
    """Names of distributions that requirement files ask for, as pip compares them."""
    lines = "\n".join((REPO / file).read_text(encoding="utf-8") for file in files)
    return {re.sub("[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)", lines, re.MULTILINE)}


@pytest.mark.parametrize(("folders", "files"), [
    (("tools", "references", "torchvision_patches"), ("requirements.txt",)),
    (("tests",), ("requirements.txt", "tests/requirements.txt")),
])  # fmt: skip
def test_what_is_imported_is_declared(folders, files):
    known, distributions = declared(*files), packages_distributions()
    for name, path in imported(*folders).items():
        if name not in distributions and sys.version_info < (3, 11):
            continue  # 3.10 finds only what has a top_level.txt
        wanted = {re.sub("[-_.]+", "-", each).lower() for each in distributions.get(name, [name])}
        assert wanted & known, f"{path} imports {name}, which {' and '.join(files)} do not name"
