"""Compiled programs of the command line are cached, and a cache that fails stops nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.compute.compilation_cache import enable

pytest.importorskip("filelock")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def environment(tmp_path):
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.mark.contract
def test_the_folder_is_the_users_own(environment, tmp_path):
    folder = enable(environment)
    assert environment.pop("XDG_CACHE_HOME") == str(tmp_path / "cache")
    assert environment == {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    assert folder.parent == tmp_path / "cache" / "compacter_jax"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert enable({"HOME": "/", "XDG_CACHE_HOME": str(tmp_path / "cache")}) == folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_COMPILATION_CACHE_DIR", "/elsewhere"),
        ("JAX_COMPILATION_CACHE_DIR", ""),
        ("JAX_ENABLE_COMPILATION_CACHE", "false"),
        ("JAX_ENABLE_COMPILATION_CACHE", "0"),
    ],
)
def test_the_users_own_choice_comes_first(environment, tmp_path, name, value):
    environment[name] = value
    before = dict(environment)
    assert enable(environment) is None
    assert environment == before
    assert not (tmp_path / "cache").exists()


def test_the_users_size_is_kept(environment):
    environment["JAX_COMPILATION_CACHE_MAX_SIZE"] = "5"
    assert enable(environment)
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == "5"


def test_a_folder_that_cannot_be_used_is_left_alone(environment, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert enable(environment) is None
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    assert "compiled programs are not kept for the next run" in caplog.text


def test_a_folder_that_others_can_write_to_is_left_alone(environment, caplog):
    enable(environment).chmod(0o777)
    del environment["JAX_COMPILATION_CACHE_DIR"]
    assert enable(environment) is None
    assert "not be writable for anybody else" in caplog.text


def test_what_was_left_half_written_is_removed(environment):
    folder = enable(environment)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_text("")
    del environment["JAX_COMPILATION_CACHE_DIR"]
    enable(environment)
    assert {path.name for path in folder.iterdir()} - {".lockfile"} == {
        "whole-cache",
        "whole-atime",
    }


PROGRAM = """
import os
from train.compute import compilation_cache
compilation_cache.enable(os.environ)
import jax, numpy as np
def run(x):
    for i in range(40):
        x = jax.numpy.sin(x @ x + i)
    return x
print(np.asarray(jax.jit(run)(np.ones((8, 8), np.float32))).tobytes().hex())
"""


# As an experiment, which has imported JAX and compiled something when its first command runs.
LATE = PROGRAM.replace("enable(os.environ)\nimport jax, numpy as np", "enable_late()").replace(
    "import os\n", "import os\nimport jax, numpy as np\njax.jit(lambda x: x + 1)(1.0)\n"
)


@pytest.mark.contract
@pytest.mark.parametrize("program", [PROGRAM, LATE], ids=["early", "late"])
def test_jax_finds_what_another_process_compiled(environment, program):
    own = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    own |= environment | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=own,
            capture_output=True,
            text=True,
            check=True,
        )
        entries = Path(environment["XDG_CACHE_HOME"]).rglob("*-cache")
        return done.stdout, {entry: entry.stat().st_mtime_ns for entry in entries}

    first, second = run(), run()
    assert first == second  # both the result and the cache entries
    assert first[1]
