"""Input that does not fit is refused in one sentence that names the value and the fix."""

import re
from pathlib import Path

import numpy as np
import pytest

from compacter_jax import arrays
from tests.repository.test_imports import MODULES, imported

GRID = np.linspace(60, 120, 7)
ONES = np.ones((5, 12), np.complex64)
WITH_NAN = ONES.copy()
WITH_NAN[3, 5] = np.nan
GOOD = {"window": 5, "rank": 4}

CASES = [
    ({"rank": 1}, "rank=1 is one window, and window=5 of 12 sensors needs several; use rank=3"),
    ({"window": 13}, "window=13 is more than the 12 sensors; use 12 or less"),
    ({"rank": 2}, "2 windows of 5 sensors leave some of 12 out; use rank=3 or more, or window=6"),
    ({"rank": 0}, "window=5 and rank=0 should be at least 1"),
    ({"sources": 5}, "sources=5 cannot be told apart by a window of 5 sensors; they can be 1 to 4"),
    ({"angles": GRID[:1]}, "angles of shape [1] should be at least 2 angles, [G]"),
    ({"angles": GRID[::-1]}, "angles[1] is not above angles[0]; sort the grid"),
    ({"angles": [80.0, 181.0]}, "angles has 181; directions are degrees from 0 to 180"),
    ({"angles": [80.0, np.nan]}, "angles has nan; directions are degrees from 0 to 180"),
    ({"forgetting": 0.0}, "forgetting=0.0 should be above 0 and at most 1"),
    ({"forgetting": 1.01}, "forgetting=1.01 should be above 0 and at most 1"),
    ({"forgetting": np.nan}, "forgetting=nan should be above 0 and at most 1"),
    ({"loading": 0.0}, "loading=0.0 should be positive"),
    ({"loading": -1}, "loading=-1 should be positive"),
    ({"recursion": "lms"}, "recursion='lms' should be 'rls' or 'covariance'"),
    ({"snapshots": ONES.real}, "snapshots are float32, not complex"),
    ({"snapshots": WITH_NAN}, "snapshots[3, 5] is (nan+0j); remove snapshot 3"),
    ({"snapshots": ONES[0]}, "snapshots of shape [12] should be [snapshots, sensors]"),
    ({"snapshots": ONES[:0]}, "snapshots of shape [0, 12] should be [snapshots, sensors]"),
]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=lambda case: str(case)[:40])
def test_alrd_refuses(changes, message):
    """Each wrong setting has a message of its own."""
    given = {"snapshots": ONES, "angles": GRID, **GOOD, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        arrays.alrd(given.pop("snapshots"), given.pop("angles"), **given)


OTHERS = {
    "window=13 should be from 1 to the number of sensors, 12": lambda: arrays.capon(
        ONES, GRID, window=13
    ),
    "sources=4 cannot be told apart by a window of 4 sensors": lambda: arrays.music(
        ONES, GRID, 4, window=4
    ),
    "sources=0 cannot be told apart": lambda: arrays.esprit(ONES, 0),
    "6 sources have no subspace in 5 snapshots": lambda: arrays.music(ONES, GRID, 6),
    "rank=13 should be from 1 to the number of sensors, 12": lambda: arrays.jio(
        ONES, GRID, rank=13
    ),
    "sources=6 should be from 1 to 5 on 7 angles": lambda: arrays.peaks(np.ones(7), GRID, 6),
    "spectrum of shape [8] should end with 7": lambda: arrays.peaks(np.ones(8), GRID, 2),
    "sensors=0 should be at least 1": lambda: arrays.steering(GRID, 0),
    "angles of shape [] should be one angle or more": lambda: arrays.steering(90.0, 4),
    "correlation=1.5 should be from 0 to 1": lambda: arrays.cramer_rao(GRID, 12, 5, 0.0, 1.5),
    "snapshots=0 should be at least 1": lambda: arrays.simulate(None, GRID, 12, 0, 0.0),
    "snapshots[3, 5] is (nan+0j)": lambda: arrays.music(WITH_NAN, GRID, 2),
    "forgetting=2 should be above 0": lambda: arrays.alrd_step(None, ONES[0], 2),
}


@pytest.mark.parametrize("message", OTHERS)
def test_others_refuse(message):
    """The functions beside `alrd` check what they are given, too."""
    with pytest.raises(ValueError, match=re.escape(message)):
        OTHERS[message]()


def test_the_package_stands_alone():
    """It imports JAX, NumPy and itself, and no module of the library imports it."""
    inside = [path for path in MODULES if "arrays" in path.parts]
    names = {name for path in inside for name in imported(path)}
    standard = {"__future__", "collections", "functools", "typing"}
    tops = {name.split(".")[0] for name in names} - standard
    assert tops == {"jax", "numpy", "compacter_jax"}
    own = {name for name in names if name.startswith("compacter_jax")}
    assert all(name.startswith("compacter_jax.arrays") for name in own)
    others = [path for path in MODULES if path not in inside]
    assert Path("compacter_jax/public.py") in others
    assert not [p for p in others if any(".arrays" in name for name in imported(p))]
