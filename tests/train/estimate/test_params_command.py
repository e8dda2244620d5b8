"""Checks that `params --mesh` predicts the memory of a device without any device."""

import json

import jax
import numpy as np
import optax
import pytest

import compacter_jax as cj
from compacter_jax.params import Count
from tests.train.compute.test_mesh import T5_CONFIG
from train.__main__ import main
from train.compute import step
from train.compute.compute import make_compute
from train.estimate import params as estimate_params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bytes_are_those_of_a_device(dtype):
    module = cj.T5(T5_CONFIG)
    method = cj.preset("compacter", reduction_factor=2)
    model = cj.Adapted(module, method)
    params = model.init(jax.random.key(0), *module.dummy_inputs())["params"]
    labels = cj.label_params(params, method)
    trained, frozen = cj.partition(params, labels)
    made = make_compute(
        step.apply_function(model),
        step.loss_function("tokens"),
        cj.optimizer(optax.adamw(1e-3), labels),
        seed=0,
        mesh="data=2,model=2",
    )
    held = estimate_params.device_bytes(module, method, {"data": 2, "model": 2}, dtype)
    state = made.init_state(trained)
    assert held.frozen == on_first_device(made.place(cj.cast_frozen(frozen, dtype)))
    assert held.trained == held.gradients == on_first_device(state.trained)
    assert held.optimizer == on_first_device(state.opt_state)


def on_first_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_t5_11b_on_four_chips(capsys):
    command = ["params", "--backbone-config", "t5-11b", "--mesh", "data=4,model=1"]
    assert main([*command, "--backbone-dtype", "bfloat16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    held = record["bytes_per_device"]
    # Everything but layer norms and position biases is divided by four.
    np.testing.assert_allclose(held["frozen"], 2 * record["backbone_total"] / 4, rtol=1e-3)
    assert held["trained"] == 4 * record["trained"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "divided as data=4,model=1" in printed
    assert "of a chip of a TPU v4 (v4-8: 4 of them)" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "4"], "--mesh '4' must give the devices along each axis"),
        (["--mesh", "data=2", "--method", "all"], "--mesh works with one method"),
    ],
)
def test_meshes_that_cannot_be(flags, message, capsys):
    assert main(["params", "--backbone-config", "t5-small", *flags]) == 2
    assert message in capsys.readouterr().err


def test_every_method_has_its_row_as_soon_as_it_is_counted(capsys, monkeypatch):
    printed = []

    def counts(method, backbones):
        printed.append(capsys.readouterr().out)
        if method.kind == "lora":
            raise ValueError("no\nplace")
        return [Count(1000, 2000, {}) for _ in backbones]

    monkeypatch.setattr(estimate_params, "counts", counts)
    assert main(["params", "--backbone-config", "t5-small", "--method", "all"]) == 0
    header, *rows = printed
    assert header.split()[:2] == ["method", "trained"]
    assert [row.split()[0] for row in rows] == list(cj.presets()[:-1])
    assert rows[0].split()[1:] == ["1,000", "0.0017", "%", "1,000", "0.0017", "%"]
    assert rows[cj.presets().index("lora")].split()[1:] == ["no", "place"]
