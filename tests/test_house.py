"""The house's own rules, read from the source: names, sizes, who imports whom, and that what is imported is there."""

import ast
import collections
import functools
import graphlib

import common

import pytest

pytestmark = pytest.mark.quick

REPO = common.REPO
REFERENCES = "references/video_classification"
FOLDERS = ("tools", REFERENCES, "torchvision_patches")
HOUSE = [path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))]
USERS = sorted((REPO / "tests").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in HOUSE + USERS}
SCRIPTS = {path.stem for path in (REPO / "tools").glob("*.py")}
ROOMS = {path.name for path in (REPO / "tools").iterdir() if (path / "__init__.py").exists()} | {"page"}
OF_REFERENCES = {path.stem for path in (REPO / REFERENCES).glob("*.py")}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 450, 60, 7
# the command line of train.py; what qai_hub_models asks of a recipe's from_pretrained: its flags are the parameters
EXCEPTED = {"get_args_parser", "from_pretrained"}


def relative(path):
    return path.relative_to(REPO).as_posix()


def functions_of(path):
    return [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]


def modules_imported(path):
    """[(dotted name of a module, name taken from it or "")] of all imports of a file, inside functions, too."""
    package = relative(path.parent).removeprefix("tools").strip("/").replace("/", ".")
    imports = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            imports += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, (package if node.level else "", node.module)))
            imports += [(module, alias.name) for alias in node.names]
    return imports


def place_of(path):
    """The script, room or package that a file of the house belongs to."""
    parts = path.relative_to(REPO).parts
    if parts[0] != "tools":
        return parts[0]
    return parts[1] if len(parts) > 2 else path.stem


def file_of(module, start):
    """The file of the house that a dotted name means to a file `start`, or None for another package."""
    folders = [REPO, REPO / "tools", start.parent, REPO / "tests", REPO / REFERENCES]
    for folder in folders:
        base = folder / module.replace(".", "/")
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate in TREES:
                return candidate
    return None


@functools.cache
def names_in(path):
    """All names that a module has at its top, conditional ones included."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def doubles(named):
    """{name: places} of those that stand at more than one."""
    places = collections.defaultdict(set)
    for name, path in named:
        places[name].add(relative(path))
    return {name: sorted(paths) for name, paths in places.items() if len(paths) > 1}


def test_no_two_files_no_two_classes_and_no_two_functions_have_one_name():
    files = [(path.name, path) for path in HOUSE if path.name != "__init__.py"]
    classes = [(node.name, path) for path in HOUSE for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef)]
    functions = [(node.name, path) for path in HOUSE for node in TREES[path].body if isinstance(node, ast.FunctionDef)]
    functions = [(name, path) for name, path in functions if name != "main"]
    twice = doubles(files) | doubles(classes) | doubles(functions)
    assert not twice, "one idea: keep one of them; two: a name says what it holds"


def test_files_and_functions_are_of_a_size_that_is_read_at_once():
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in HOUSE}
    assert not {path: number for path, number in lines.items() if number > LONGEST_FILE}, "it has two subjects"
    large = {}
    for path in HOUSE:
        for node in functions_of(path):
            given = node.args
            number = len(given.posonlyargs + given.args + given.kwonlyargs)
            size = node.end_lineno - node.lineno + 1
            if (size > LONGEST_FUNCTION or number > MOST_PARAMETERS) and node.name not in EXCEPTED:
                large[f"{relative(path)}: {node.name}"] = f"{size} lines, {number} parameters"
    assert not large


def test_who_imports_whom():
    wrong, below = [], collections.defaultdict(set)
    for path in HOUSE:
        place = place_of(path)
        for module, _ in modules_imported(path):
            other = module.split(".")[0]
            if other == place or not file_of(module, path):
                continue
            if place == "torchvision_patches":
                allowed = False
            elif place == "references":
                allowed = other in OF_REFERENCES | {"common", "torchvision_patches"}
            else:
                allowed = other in ROOMS | {"torchvision_patches"} and (other != "hub_server" or place == "local_hub")
            if not allowed:
                wrong.append(f"{relative(path)} imports {module}")
            if place in ROOMS:
                below[place].add(other)
    assert not wrong, "see the rules of the house: scripts know rooms, rooms those below, the patch none of them"
    list(graphlib.TopologicalSorter(below).static_order())  # a circle of rooms is a CycleError that names it


def test_what_a_user_edits_stands_in_scripts_alone():
    """A ruled block of constants is what flags set: in a file that others import, two scripts would share it."""
    ruled = {path for path in HOUSE if "\n# -------" in path.read_text(encoding="utf-8")}
    assert {relative(path) for path in ruled} <= {f"tools/{name}.py" for name in SCRIPTS}


def test_what_is_imported_from_the_house_is_there():
    """Also in benchmarks, which no test runs, and in functions, which not every test enters."""
    missing = [f"{relative(path)}: {name}" for path in HOUSE + USERS for name in names_missing(path)]
    assert not missing


def names_missing(path):
    """What a file takes of modules of the house and does not find there, as module.name."""
    modules, missing = {}, []
    for module, name in modules_imported(path):
        part = name and file_of(f"{module}.{name}", path)
        whole = file_of(module, path)
        if name and whole and not part and name not in names_in(whole):
            missing.append(f"{module}.{name}")
        if source := part if name else whole:
            modules[name or module] = source
    nodes = list(ast.walk(TREES[path]))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}  # not the module of that name
    for node in nodes:
        taken = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in own
        if source := taken and modules.get(node.value.id):
            there = node.attr in names_in(source) or file_of(f"{node.value.id}.{node.attr}", path)
            if not there and not node.attr.startswith("__"):
                missing.append(f"{node.value.id}.{node.attr}")
    return missing
