"""Tests that gathered and grouped products agree, and that their measurement is complete."""

import json

import jax
import numpy as np

from benchmarks import grouped
from tests.helpers import quick_jit


def test_both_ways_give_the_same_gradients():
    """Gradients of weights and input agree to rounding; a member without rows has none."""
    weights, x, _ = grouped.arguments_of(5, 3, 8, 4)
    members = np.array([2, 0, 2, 3, 0])
    found = [
        quick_jit(lambda *given, way=way: grouped.gradients(way, *given))(weights, x, members)
        for way in grouped.WAYS.values()
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)
    np.testing.assert_array_equal(found[0][0]["down"][1], 0)


def test_the_measurement_counts_and_writes(tmp_path, capsys):
    """The report has every size, with its operations."""
    flags = ["--widths", 8, "--members", 2, 3, "--rows", 4, "--length", 2, "--rounds", 2]
    grouped.main([str(flag) for flag in [*flags, "--json", tmp_path / "grouped.json"]])
    report = json.loads((tmp_path / "grouped.json").read_text())
    assert [size["members"] for size in report["sizes"]] == [2, 3]
    assert report["sizes"][0]["flops"] == 3 * 2 * 2 * (4 * 2) * 8 * 4
    assert "d 8, 3 members: gathered " in capsys.readouterr().out
