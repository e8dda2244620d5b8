"""Imports point one way, and importing the library loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compacter_jax

ROOT = Path(compacter_jax.__file__).parent
# Each module imports from those before it alone.
ORDER = (
    "messages",
    "files",
    "patterns",
    "limits",
    "sites",
    "quantize",
    "dropout",
    "config",
    "groups",
    "trees",
    "activations",
    "phm",
    "intrinsic",
    "kernels",
    "hosts",
    "adapters",
    "compose",
    "hooks",
    "inject",
    "models",
    "params",
    "leftovers",
    "checkpoint",
    "banks",
    "foreign",
    "adapterhub",
    "peft",
    "decode",
    "public",
)
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
# Beyond the order: a backbone knows nothing of adapters, labels nothing of how they got in, and
# what is left below knows neither.
NEVER = {
    "models": {"adapters", "compose", "hooks", "inject", "params", "checkpoint", "config", "phm"},
    "params": {"hooks", "inject", "models", "adapters", "phm"},
    "hooks": {"models"},
    "inject": {"models"},
}


def place(module):
    """Its name in `ORDER`; a folder is one place."""
    return module.parts[0].removesuffix(".py")


def imported(path):
    """Dotted names of every import in the file, inside functions too."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_places(path):
    names = [name.split(".") for name in imported(path)]
    return {parts[1] for parts in names if parts[0] == "compacter_jax" and len(parts) > 1}


def test_every_module_has_its_place():
    assert {place(module) for module in MODULES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module):
    name = place(module)
    if name == "__init__":
        assert own_places(module) <= set(ORDER)
        return
    allowed = set(ORDER[: ORDER.index(name)])
    if len(module.parts) > 1:
        allowed.add(name)  # the files of a folder know each other
    assert own_places(module) <= allowed - NEVER.get(name, set())


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_library_imports_no_jobs_tests_or_oracles(module):
    foreign = {name.partition(".")[0] for name in imported(module)}
    # What others wrote with PyTorch's pickle only PyTorch reads, where it is installed.
    allowed = {"torch"} if place(module) == "foreign" else set()
    never = {"train", "tests", "benchmarks", "torch", "adapters", "datasets"}
    assert not foreign & never - allowed


@pytest.mark.parametrize("module", ["messages.py", "config.py"])
def test_the_configuration_needs_the_standard_library_alone(module):
    """Beside the messages, which do, too."""
    names = {n.partition(".")[0] for n in imported(Path(module)) if "compacter_jax.mess" not in n}
    assert names <= sys.stdlib_module_names


def test_importing_the_library_loads_nothing_heavy():
    heavy = ("transformers", "datasets", "torch", "orbax", "matplotlib", "adapters", "train")
    program = f"import sys, compacter_jax; print([m for m in {heavy!r} if m in sys.modules])"
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"


def test_what_is_exported_is_there():
    exported = compacter_jax.__all__  # ruff sorts it
    assert len(exported) == len(set(exported))
    assert all(getattr(compacter_jax, name).__doc__ for name in exported)
