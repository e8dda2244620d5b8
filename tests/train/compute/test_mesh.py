"""A backbone divided over a mesh computes the same as on one device; each device holds a part."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

import compacter_jax as cj
from benchmarks import devices
from tests.train.compute.test_step import make_batch, setup, text_batch
from train.compute import mesh, step
from train.compute.compute import make_compute

T5_CONFIG = cj.T5Config(
    vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.1
)
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def t5(**changes):
    module = cj.T5(cj.T5Config(**{**vars(T5_CONFIG), **changes}))
    params = module.init(jax.random.key(0), *module.dummy_inputs())["params"]
    model = cj.Adapted(module, cj.preset("compacter", reduction_factor=2))
    params = cj.init_adapters(model, cj.Backbone(module, params, None, "random"), jax.random.key(1))
    return model, params, cj.label_params(params, model.method)


def bert():
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 1}
    config = cj.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, **rates)
    return setup(config=config)


BERT = (bert, ("input_ids", "attention_mask", "token_type_ids"), "classification", make_batch())
T5 = (t5, ("input_ids", "attention_mask", "decoder_input_ids"), "tokens", text_batch(real=7))


def compute(model, labels, inputs, loss, **where):
    return make_compute(
        step.apply_function(model, inputs),
        step.loss_function(loss),
        cj.optimizer(optax.sgd(1.0), labels),
        seed=0,
        **where,
    )


def update(made, params, labels, batch):
    """Returns the loss, the gradient of the trained half, and the outputs, on the host."""
    trained, frozen = cj.partition(jax.device_get(params), labels)
    state, placed = made.init_state(trained), made.place(frozen)
    outputs = made.outputs(state.trained, placed, batch)
    state, metrics = made.step(state, placed, batch)
    moved = jax.tree.map(np.subtract, trained, made.host_state(state).trained)
    return float(metrics.loss), moved, outputs


@pytest.mark.parametrize(("make", "inputs", "loss", "batch"), [BERT, T5], ids=["bert", "t5"])
@pytest.mark.contract
def test_a_mesh_gives_what_one_device_gives(make, inputs, loss, batch):
    model, params, labels = make()
    run = functools.partial(update, params=params, labels=labels, batch=batch)
    one = run(compute(model, labels, inputs, loss, devices=jax.devices()[:1]))
    divided = run(compute(model, labels, inputs, loss, mesh="data=2,model=2"))
    for a, b in zip(jax.tree.leaves(divided), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rows_of_the_mesh_fetch_weights_and_add_up_gradients_alone():
    model, params, labels = t5(**GATED)
    laid_out = mesh.make_mesh("data=4")
    trained, frozen = cj.partition(params, labels)
    tx = cj.optimizer(optax.adamw(1e-3), labels)
    update = functools.partial(
        step.loss_and_update,
        apply=step.apply_function(model, T5[1]),
        loss=step.loss_function("tokens"),
        tx=tx,
        mesh=laid_out,
    )
    state = step.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    arguments = (mesh.replicate(state, laid_out), mesh.place(frozen, laid_out))
    batch = mesh.shard_batch(T5[3], laid_out)
    whole = NamedSharding(laid_out, PartitionSpec())
    jitted = jax.jit(lambda s, f, b: update(s, f, b, jax.random.key(0)), out_shardings=whole)
    lowered = jitted.lower(*arguments, batch)
    kernels = sum("kernel" in path for path in flatten_dict(frozen, sep="/"))
    # The backward pass gathers the kernels again, except those that it does not need.
    assert lowered.as_text().count("sharding_constraint") > 1.5 * kernels
    moved = {"all-gather": 0, "all-reduce": 0, "all-to-all": 0, "collective-permute": 0}
    for line in lowered.compile().as_text().splitlines():
        if match := re.search(rf"= (.*?) ({'|'.join(moved)})(-start)?\(", line):
            for shape in re.findall(r"f32\[([\d,]*)\]", match[1]):
                moved[match[2]] += int(np.prod([int(n) for n in shape.split(",") if n]))
    # Reduced are the gradients (of adapters as dense weights), the loss, and the number of tokens.
    dense = model.clone(method=model.method.dense_equivalent())
    shapes = jax.eval_shape(dense.init, jax.random.key(0), *model.backbone.dummy_inputs())["params"]
    made = cj.count(shapes, cj.label_params(shapes, dense.method)).trained
    assert moved["all-reduce"] == made + 2
    assert moved["all-to-all"] == moved["collective-permute"] == 0
    assert moved["all-gather"] > 0


@pytest.mark.contract
def test_every_device_has_its_part():
    model, params, labels = t5(**GATED)
    made = compute(model, labels, T5[1], "tokens", mesh="data=2,model=2")
    trained, frozen = cj.partition(params, labels)
    placed, state = made.place(frozen), made.init_state(trained)
    for path, leaf in flatten_dict(placed, sep="/").items():
        if leaf is None:
            continue
        parts = {shard.data.nbytes for shard in leaf.addressable_shards}
        divided = path.endswith("kernel") or path == "shared/embedding"
        assert parts == {leaf.nbytes // (4 if divided else 1)}, path
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("backbone", ["bert-base-uncased", "t5-base", "google/mt5-base"])
def test_rules_cover_every_method(backbone):
    from compacter_jax.compilation import initial_shapes
    from compacter_jax.models.loading import module_from_name

    module = module_from_name(backbone)
    for head in {module.head, "masked_lm"} if isinstance(module, cj.Bert) else {module.head}:
        for name in ("compacter", "prefix-tuning", "intrinsic-said"):
            shapes = initial_shapes(cj.Adapted(module.clone(head=head), cj.preset(name)))
            for path, leaf in shapes.items():
                mesh.spec_of(path, leaf.shape, {"data": 2, "model": 4})


def test_what_does_not_divide_stays_whole():
    sizes = {"data": 2, "model": 4}
    assert mesh.spec_of("a/wi/kernel", (6, 8), sizes) == PartitionSpec("data", "model")
    assert mesh.spec_of("a/wi/kernel", (6, 10), sizes) == PartitionSpec("data", None)
    assert mesh.spec_of("shared/embedding", (31, 6), sizes) == PartitionSpec(None, "data")
    with pytest.raises(ValueError, match=r"no rule says how strange/matrix of shape \(2, 2\)"):
        mesh.spec_of("strange/matrix", (2, 2), sizes)


@pytest.mark.parametrize("text", ["", "2x4", "data=0", "data=2,data=2", "data=2,tensor=2"])
def test_what_is_no_mesh(text):
    with pytest.raises(ValueError, match="data=2,model=4"):
        mesh.parse(text)


def test_devices_and_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="needs 8 devices, but a host has 4; the product"):
        mesh.make_mesh("data=2,model=4")
    made = mesh.make_mesh("data=4")
    with pytest.raises(ValueError, match="a batch of 6 on a host cannot be divided over data=4"):
        mesh.shard_batch({"labels": np.zeros(6)}, made)


@pytest.mark.slow
def test_generation_over_a_mesh():
    model, params, labels = t5()

    def outputs(params, batch):
        return cj.generate(
            model,
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=4,
            eos_token_id=1,
            pad_token_id=0,
            decoder_start_token_id=0,
        )

    def run(**where):
        made = compute(model, labels, T5[1], "tokens", outputs=outputs, **where)
        trained, frozen = cj.partition(params, labels)
        return made.outputs(made.init_state(trained).trained, made.place(frozen), T5[3])

    one, divided = run(devices=jax.devices()[:1]), run(mesh="data=2,model=2")
    np.testing.assert_array_equal(divided, one)


def test_eight_devices_give_the_losses_of_one():
    (result,) = devices.launch(devices.Arrangement(devices=8, mesh="data=2,model=4"))
    for rate, values in result.items():
        expected = devices.train(float(rate), jax.devices()[:1])
        for name in ("losses", "gradient_norms"):
            np.testing.assert_allclose(values[name], expected[name], rtol=0, atol=devices.LIMIT)
        np.testing.assert_allclose(values["logits"], expected["logits"], rtol=1e-5)
        # Kernels take an eighth on each device; small arrays such as position embeddings are whole.
        assert 1 / 8 < values["fraction"] < 1 / 2
