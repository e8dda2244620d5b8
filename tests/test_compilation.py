"""Tests that a module is traced once, and the compilation of programs that run once."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from flax.traverse_util import unflatten_dict

import compacter_jax as cj
from compacter_jax.compilation import initial_shapes, initialiser, run_once
from compacter_jax.trees import check_params


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


TRACED: list[int] = []


class Counted(nn.Module):
    """A backbone that notes when it is traced; `widths` makes it one that has no hash."""

    width: int = 4
    widths: object = None

    sites = {"feed_forward": r"layer_(?P<layer>\d+)"}  # noqa: RUF012 - a table, as families have

    def dummy_inputs(self):
        return (jnp.ones((2, 3)),)

    @nn.compact
    def __call__(self, x):
        TRACED.append(self.width)
        return nn.Dense(self.width, name="layer_0")(x)


METHOD = cj.LoRAConfig(sites=("feed_forward",), rank=2, train_head=False)


@pytest.fixture
def traced():
    jax.clear_caches()  # of models that another test has traced
    TRACED.clear()
    return TRACED


def params_of(module, seed=0):
    return unflatten_dict(run_once(initialiser(module), jax.random.key(seed)), sep="/")


def test_a_model_is_traced_once_for_all_that_asks(tmp_path, traced):
    """Adapters are created, checked, saved and loaded again, each time for an equal model."""
    for seed in range(3):
        backbone = types.SimpleNamespace(module=Counted(), params=params_of(Counted()))
        given = {} if seed == 0 else {"sites": dict(Counted.sites)}
        model = cj.Adapted(Counted(), METHOD, **given)
        params = cj.init_adapters(model, backbone, jax.random.key(seed))
        check_params(model, freeze(params), "saving")
        cj.save_adapter(tmp_path / str(seed), model, params)
        _, again = cj.load_adapter(tmp_path / str(seed), backbone)
        jax.tree.map(np.testing.assert_array_equal, params, again)
    assert len(traced) == 3  # the backbone, and the adapted model without and with its own sites


def test_what_is_traced_once_is_that_of_the_module_and_the_key(traced):
    """Other widths have their own shapes, and other keys their own numbers."""
    for width in (4, 5, 4):
        shapes = initial_shapes(Counted(width))
        assert {path: leaf.shape for path, leaf in shapes.items()} == {
            "layer_0/bias": (width,),
            "layer_0/kernel": (3, width),
        }
        shapes.clear()  # belongs to the caller
    assert traced == [4, 5]
    first, other, again = (params_of(Counted(), seed)["layer_0"]["kernel"] for seed in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    expected = Counted().init(jax.random.key(1), jnp.ones((2, 3)))["params"]["layer_0"]["kernel"]
    np.testing.assert_array_equal(first, expected)


def test_inputs_and_modules_without_a_hash_are_traced_each_time(traced):
    for _ in range(2):
        assert initial_shapes(Counted(), jnp.ones((1, 7)))["layer_0/kernel"].shape == (7, 4)
        assert initial_shapes(Counted(widths=[1]))["layer_0/kernel"].shape == (3, 4)
    assert traced == [4] * 4
    with pytest.raises(ValueError, match=r"Dense has no dummy_inputs\(\); pass example inputs"):
        initial_shapes(nn.Dense(3))
