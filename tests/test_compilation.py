"""Tests the compilation of programs that run once."""

import jax
import numpy as np
import pytest

from compacter_jax.compilation import run_once


@pytest.fixture
def without_flags(monkeypatch):
    jax.jit(lambda x: x + 1)(1.0)  # XLA reads its flags once, and other tests want theirs
    monkeypatch.delenv("XLA_FLAGS")


@pytest.mark.contract
def test_values_are_those_of_a_program_with_all_optimisations(without_flags):
    """A program without sums has the same bits, whatever its level of optimisation."""

    def draw(key):
        return jax.random.normal(key, (5, 3)), jax.random.uniform(key, (7,))

    key = jax.random.key(3)
    usual = jax.jit(draw).lower(key).compile({"xla_backend_optimization_level": 3})(key)
    for found, expected in zip(run_once(draw, key), usual, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.contract
def test_it_may_be_a_part_of_another_program(without_flags):
    """Traced arguments, and concrete ones within a trace, give what they give outside."""

    def draw(key):
        return jax.random.normal(key, (4,))

    key = jax.random.key(1)
    alone = run_once(draw, key)
    np.testing.assert_array_equal(jax.jit(lambda key: run_once(draw, key))(key), alone)
    np.testing.assert_array_equal(jax.jit(lambda x: run_once(draw, key) + x)(0.0), alone)
    assert jax.eval_shape(lambda key: run_once(draw, key), key).shape == (4,)


def test_a_level_in_the_environment_is_kept(monkeypatch):
    """The tests themselves ask for no optimisation, and get it."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")

    class Compiled:
        def __call__(self, x):
            return x + 1

        def lower(self, *_):
            raise AssertionError("compiled with options of its own")

    monkeypatch.setattr(jax, "jit", lambda _: Compiled())
    assert run_once(None, 1) == 2
