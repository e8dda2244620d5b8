"""Tests of the benchmark of machine limits: counted operations and the numbers of its report."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from benchmarks import contest, jax_worker, limits
from benchmarks.contest import Size
from train.compute import program

T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
SIZE = Size("tiny", "t5", T5, rows=3, length=6, target_length=4)
BATCH = contest.batch_of(SIZE, T5["vocab_size"])
NARROW = {"reduction_factor": 8}
D, INNER, FF, VOCABULARY, LAYERS = 32, 16, 48, 40, 2
ROWS, LENGTH, TARGETS = SIZE.rows, SIZE.length, SIZE.target_length


class Rates:
    """A machine with known rates: 1 GFLOP/s and 2 GB/s."""

    bandwidth, square, side = 2e9, 1e9, 8

    def __init__(self, dtype=jnp.float32):
        self.dtype = jnp.dtype(dtype)

    def seconds_of(self, need):
        return need.flops / 1e9


@pytest.fixture(scope="module")
def backbone():
    return jax_worker.random_backbone(SIZE)


def forward_flops():
    """Counts the forward FLOPs of a T5 by hand: projections, feed-forward and attention."""
    rows = {"encoder": ROWS * LENGTH, "decoder": ROWS * TARGETS}
    layers = sum(tokens * (4 * D * INNER + 2 * D * FF) for tokens in rows.values())
    layers += rows["decoder"] * 2 * D * INNER + rows["encoder"] * 2 * D * INNER  # cross-attention
    keys = rows["encoder"] * LENGTH + rows["decoder"] * (TARGETS + LENGTH)
    layers += 2 * INNER * keys
    return 2 * (LAYERS * layers + rows["decoder"] * D * VOCABULARY)


def of_step(backbone, method, **changes):
    model = cj.Adapted(backbone.module, cj.preset(method, **changes))
    params = backbone.params
    if method != "full":
        params = cj.init_adapters(model, backbone, jax.random.key(0))
    labels = cj.label_params(params, model.method)
    return limits.need_of_step(model, params, labels, BATCH, SIZE), params, labels


def test_a_forward_pass_by_hand(backbone):
    model = cj.Adapted(backbone.module, cj.preset("full"))
    need = limits.need_of_forward(model, backbone.params, BATCH, SIZE)
    assert need.flops == forward_flops()
    kernels = LAYERS * (2 * (4 * D * INNER + 2 * D * FF) + 4 * D * INNER)
    read = 4 * (kernels + VOCABULARY * D)
    looked_up = 4 * D * ROWS * (LENGTH + TARGETS)
    # Norms and position biases are small, but not negligible.
    assert read + looked_up < need.weight_bytes < 1.05 * (read + looked_up)
    assert need.bytes == need.weight_bytes


def test_full_fine_tuning_by_hand(backbone):
    need, params, _ = of_step(backbone, "full")
    assert need.flops == 3 * forward_flops()
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    # The gradient, the parameter and two moments are each read and written; so is the step count.
    assert need.update_bytes == 4 * 2 * (4 * numbers + 1)
    assert need.bytes == need.weight_bytes + need.kept_bytes + need.update_bytes


def test_a_step_with_adapters_by_hand(backbone):
    need, params, labels = of_step(backbone, "houlsby", **NARROW)
    tokens, bottleneck = ROWS * (LENGTH + TARGETS), D // 8
    adapters = LAYERS * 2 * 2 * tokens * 2 * D * bottleneck
    # A product with a frozen weight has one gradient, a product of attention has two. The first
    # layer norm is the lowest trained layer: no gradient reaches the embeddings, and no product is
    # below it.
    attention = LAYERS * 2 * ROWS * 2 * INNER * (LENGTH**2 + TARGETS * (TARGETS + LENGTH))
    assert need.flops == 2 * forward_flops() + attention + 3 * adapters
    count = cj.count(params, labels).trained
    assert need.update_bytes == 4 * 2 * (4 * count + 1)


def test_weights_count_for_each_operation_that_reads_them():
    def function(params, ids):
        table, kernel, bias = params
        x = jnp.take(table, ids, axis=0, mode="clip")
        return (x @ kernel + bias) @ kernel.T @ table.T

    shapes = [(7, 3), (3, 3), (3,)]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    made = program.traced(function, params, jax.ShapeDtypeStruct((5,), jnp.int32))
    looked_up = 5 * 3
    expected = 4 * (looked_up + 2 * 3 * 3 + 3 + 7 * 3)
    assert limits._weight_bytes(made, params) == expected


def test_without_adapters_the_gradient_goes_as_deep(backbone):
    labels = limits.labels_without(backbone.params)
    need = limits.need_of_step(
        cj.Adapted(backbone.module, cj.preset("full")), backbone.params, labels, BATCH, SIZE
    )
    beside, params, with_adapters = of_step(backbone, "houlsby", **NARROW)
    tokens = ROWS * (LENGTH + TARGETS)
    adapters = 3 * LAYERS * 2 * 2 * tokens * 2 * D * (D // 8)
    assert need.flops == beside.flops - adapters
    trained = cj.count(backbone.params, labels).trained
    assert trained == cj.count(params, with_adapters).groups["layer norms"][0] > 0


def test_seconds_of_products_are_those_of_their_shapes(monkeypatch):
    rates = object.__new__(limits.Rates)
    monkeypatch.setattr(limits.Rates, "product_seconds", lambda self, size: math.prod(size) / 10)
    need = limits.Need(products={(1, 2, 3, 4): 5, (2, 2, 2, 2): 1}, weight_bytes=0)
    assert need.flops == 2 * (5 * 24 + 16)
    assert rates.seconds_of(need) == pytest.approx(5 * 2.4 + 1.6)
    # Next to these products, the small one takes only the time of its operations.
    need = limits.Need(products={(1, 200, 300, 400): 5, (1, 1, 1, 1): 1}, weight_bytes=0)
    assert rates.seconds_of(need) == pytest.approx(need.flops / 20)


def test_rates_of_this_machine_are_finite(monkeypatch):
    monkeypatch.setattr(limits, "_TRY_SECONDS", 1e-4)
    monkeypatch.setattr(limits, "_STREAM_BYTES", 2**12)
    monkeypatch.setattr(limits, "_SIDES", {"cpu": 8})
    rates = limits.Rates(jnp.float32)
    assert np.isfinite([rates.bandwidth, rates.square]).all()
    assert rates.square == 2 * 8**3 / rates.product_seconds((1, 8, 8, 8))


@pytest.mark.slow
def test_the_report(tmp_path, monkeypatch, capsys):
    for module in (contest, limits):
        small = Size("tiny", "t5", {**T5, "num_layers": 1}, rows=3, length=6, target_length=4)
        monkeypatch.setattr(module, "SIZES", {"tiny": small})
    monkeypatch.setattr(limits, "Rates", Rates)
    preset = cj.preset
    monkeypatch.setattr(
        cj, "preset", lambda name, **kw: preset(name, **kw, **({} if name == "full" else NARROW))
    )
    file = tmp_path / "limits.json"
    limits.main(["--case", "tiny/compacter++/step", "--repeats", "2", "--json", str(file)])
    (case,) = json.loads(file.read_text())["cases"]
    seconds, need = case["seconds"], case["need"]
    assert len(seconds) == 2
    moved = need["weight_bytes"] + need["kept_bytes"] + need["update_bytes"]
    assert case["limit_seconds"] == {"products": need["flops"] / 1e9, "bytes": moved / 2e9}
    limit = max(case["limit_seconds"].values())
    assert case["of_limit"]["median"] == pytest.approx(np.median(limit / np.array(seconds)))
    assert case["flops_per_second"] == pytest.approx(need["flops"] / case["median_seconds"])
    assert case["adapters_share"]["highest"] < 1
    assert sum(2 * math.prod(shape) for shape in need["products"]) == need["flops"]
    assert "tiny/compacter++/step" in capsys.readouterr().out


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match="error: no case is called 'minilm/ia3/step'"):
        limits.main(["--case", "minilm/ia3/step"])
