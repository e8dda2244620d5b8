"""Imports between folders have one direction, and importing the library loads nothing heavy."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compacter_jax
from compacter_jax import catalogue
from compacter_jax.models.names import NAMES

ROOT = Path(compacter_jax.__file__).parents[1]
# A file or folder of a package imports from the lines before its own; the files of a folder also
# import each other.
ARROWS = {
    "compacter_jax": (
        {"messages", "limits", "fastfood", "phm", "hosts", "arrays", "compilation"},
        {"files", "patterns", "sites", "nn", "embeddings"},
        {"leftovers", "weights"},
        {"models"},
        {"paths"},
        {"methods", "trees"},
        {"compositions"},
        {"adapter_files", "catalogue", "inject", "params"},
        {"checkpoint", "decode", "exchange"},
        {"banks"},
        {"public"},
        {"__init__"},
    ),
    "train": (
        {"__init__", "errors", "figures", "folders", "report", "cli", "data"},
        {"compute", "speech", "tasks"},
        {"fingerprints", "objectives"},
        {"inference"},
        {"exchange"},
        {"fit"},
        {"compare", "estimate"},
        {"__main__"},
    ),
}
# Backbones must not import adapters, and inserted methods must not import families of backbones.
# `paths` reads the names of all families, and nothing else of them.
NEVER = {
    "compacter_jax/models": {"paths", "leftovers"},
    "compacter_jax/methods": {"models"},
    "compacter_jax/compositions": {"models"},
    "compacter_jax/inject": {"models", "catalogue"},
    "compacter_jax/params": {"models", "inject"},
}


def files_of(*folders):
    """Returns the Python files in folders of the repository."""
    return sorted(
        path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


MODULES = files_of(*ARROWS)
# Files whose docstrings are checked, too.
OTHERS = files_of("tests", "benchmarks")
# Classes of methods are named only in their own files, in the presets, in the exchange with other
# libraries, and in the list of public names.
NAMES_METHODS = ("methods", "exchange", "catalogue.py", "public.py")
# First words of sentences that have no subject.
WITHOUT_SUBJECT = ("What", "Whether", "Those", "That", "Where", "As", "Of", "Not")


@functools.cache
def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(path, *, with_types=False):
    """Returns the dotted names of the imports in a file, including those inside functions."""
    for_types = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= {id(inner) for inner in ast.walk(node)}
    names = []
    for node in ast.walk(tree_of(path)):
        if id(node) in for_types and not with_types:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def place(path):
    """Returns the file or folder of its package that a module belongs to."""
    return path.parts[1].removesuffix(".py")


def places_imported(path):
    names = [name.split(".") for name in imported(path)]
    return {parts[1] for parts in names if parts[0] == path.parts[0] and len(parts) > 1}


@pytest.mark.parametrize("package", ARROWS)
def test_every_file_and_folder_has_its_place(package):
    there = {place(path) for path in MODULES if path.parts[0] == package}
    named = [name for line in ARROWS[package] for name in line]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    lines, name = ARROWS[path.parts[0]], place(path)
    line = next(i for i, names in enumerate(lines) if name in names)
    below = {other for names in lines[:line] for other in names} | {"__version__"}
    never = NEVER.get(f"{path.parts[0]}/{name}", set())
    beside = places_imported(path) - {name}
    # A line has an order, too: two places that import each other would form a cycle.
    assert beside <= (below | lines[line]) - never
    for other in beside & lines[line]:
        files = [
            each for each in MODULES if each.parts[0] == path.parts[0] and place(each) == other
        ]
        assert not any(name in places_imported(each) for each in files), (name, other)


def test_paths_reads_names_of_families_alone():
    of_models = {name for name in imported(Path("compacter_jax/paths.py")) if ".models." in name}
    assert {name.rpartition(".")[0] for name in of_models} == {"compacter_jax.models.names"}
    assert modules_after("from compacter_jax import paths", ("jax", "flax")) == "[]"


def test_no_file_imports_one_that_imports_it():
    files = {str(path.with_suffix("")).replace("/", "."): path for path in MODULES}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    imports = {
        name: {
            next((each for each in (other, other.rpartition(".")[0]) if each in files), name)
            for other in imported(path)
        }
        - {name}
        for name, path in files.items()
    }
    while leaves := [name for name, others in imports.items() if not others & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, f"a circle among {sorted(imports)}"


def test_classes_of_methods_are_named_where_methods_are():
    classes = {cls.__name__ for cls in catalogue.METHODS.values()}
    outside = [
        path
        for path in MODULES
        if path.parts[0] != "compacter_jax" or path.parts[1] not in NAMES_METHODS
    ]
    named = {
        f"{path}: {node.id if isinstance(node, ast.Name) else node.attr}"
        for path in outside
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Name) and node.id in classes)
        or (isinstance(node, ast.Attribute) and node.attr in classes)
    }
    assert not named


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_paths_of_parameters_are_written_where_families_are(path):
    if path.parts[1] in ("models", "exchange"):
        return
    tops = ("heads", "poolers", "frozen_heads")
    begin = {name for own in NAMES.values() for top in tops for name in getattr(own, top)}
    known = re.compile(
        "|".join([rf"\b{name}/" for name in begin] + [own.embeddings for own in NAMES.values()])
    )
    tree = tree_of(path)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    }
    assert not {text for text in texts if known.search(text)}


@pytest.mark.parametrize("path", [*MODULES, *OTHERS], ids=str)
def test_docstrings_begin_with_a_subject_or_a_verb(path):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]
    assert not [t for t in texts if t and re.match(r"\W*(\w*)", t)[1] in WITHOUT_SUBJECT]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_library_imports_no_jobs_tests_or_oracles(path):
    if path.parts[0] != "compacter_jax":
        return
    foreign = {name.partition(".")[0] for name in imported(path, with_types=True)}
    # Only PyTorch can read files of its own pickle format, if it is installed.
    allowed = {"torch"} if path == Path("compacter_jax/exchange/tensors.py") else set()
    never = {"train", "tests", "benchmarks", "torch", "adapters", "datasets"}
    assert not foreign & never - allowed


def modules_after(program, names):
    """Returns the modules among `names` that a program has imported at its end."""
    program += f"; import sys; print([name for name in {names!r} if name in sys.modules])"
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip().splitlines()[-1]


def test_importing_the_library_loads_nothing_heavy():
    heavy = ("jax", "transformers", "datasets", "torch", "orbax", "matplotlib", "adapters", "train")
    assert modules_after("import compacter_jax", heavy) == "[]"


def test_the_base_of_methods_needs_no_jax():
    assert modules_after("from compacter_jax.methods import base", ("jax", "flax")) == "[]"


def test_what_is_exported_is_there():
    exported = compacter_jax.__all__  # ruff sorts it
    assert len(exported) == len(set(exported))
    assert all(getattr(compacter_jax, name).__doc__ for name in exported)


def test_files_of_tests_have_names_of_their_own():
    """pytest imports test files by their base names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
