import jax
import jax.numpy as jnp
import optax
import pytest

import compacter_jax as cj
from train.compute import memory, program
from train.compute.step import apply_function, loss_function

ROWS, WIDTH = 512, 64
STATES, WEIGHT = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH


def predicted(apply, trained, frozen, rows=ROWS):
    """Returns outputs and other arrays at the peak of a step of `apply`; the loss is the sum."""
    batch = {"x": jnp.ones((rows, WIDTH)), "labels": jnp.zeros(rows), "weights": jnp.ones(rows)}
    made = program.gradient_program(
        apply, lambda logits, labels: logits.sum(-1), trained, frozen, batch
    )
    return memory.at_peak(made)


def layers(number, activation=jnp.tanh, remat=False):
    """Returns a chain of layers `x -> activation(x @ w_i)`, followed by a scale."""

    def layer(x, weight):
        return activation(x @ weight)

    def apply(params, batch, key):
        x = batch["x"]
        for i in range(number):
            x = (jax.checkpoint(layer) if remat else layer)(x, params[f"w{i}"])
        return x * params["scale"]

    weights = {f"w{i}": jnp.ones((WIDTH, WIDTH)) for i in range(number)}
    return apply, weights, {"scale": jnp.ones(WIDTH)}


def split(weights, scale, trained):
    """Splits parameters into halves, with either the weights or the scale trained."""
    none = dict.fromkeys(weights)
    if trained == "weights":
        return {**weights, "scale": None}, {**none, **scale}
    return {**none, **scale}, {**weights, "scale": None}


def test_activations_of_dense_layers_by_hand():
    apply, weights, scale = layers(5)
    gradients, activations = predicted(apply, *split(weights, scale, "weights"))
    # The tanh of each layer, from which its gradient is computed, and the last gradient.
    assert activations == 6 * STATES
    assert gradients < 2 * WEIGHT


def test_without_trained_layers_nothing_is_kept():
    apply, weights, scale = layers(5)
    _, activations = predicted(apply, *split(weights, scale, "scale"))
    assert activations == 2 * STATES


def test_gradients_are_all_there_at_the_end():
    apply, weights, scale = layers(5)
    gradients, _ = predicted(apply, *split(weights, scale, "weights"), rows=1)
    assert gradients == 5 * WEIGHT + 4


def test_what_is_cheap_is_computed_again():
    def chain(x):
        return jnp.tanh(2 * jnp.tanh(jnp.sin(x) + 1))

    apply, weights, scale = layers(5, chain)
    _, activations = predicted(apply, *split(weights, scale, "weights"))
    # For each layer its product, and its result as the input of the next; nothing inside it.
    assert activations == 10 * STATES


def test_remat_keeps_the_inputs_of_layers_alone():
    wide = jnp.ones((WIDTH, 8 * WIDTH))

    def block(x):
        return jnp.tanh(jnp.tanh(x) @ wide) @ wide.T

    kept = {}
    for remat in (False, True):
        apply, weights, scale = layers(6, block, remat)
        kept[remat] = predicted(apply, *split(weights, scale, "weights"))[1]
    within = (1 + 8 + 1) * STATES
    assert kept[False] > 6 * within
    assert 6 * STATES < kept[True] < 6 * STATES + 3 * within


BERT = cj.BertConfig(
    vocab_size=31,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=32,
    # On a CPU, random numbers take more memory than everything else.
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def bert(method, rows=16, length=32, **attributes):
    """Returns the program, the halves of the parameters, and a batch for a step of a small BERT."""
    module = cj.Bert(BERT, head="sequence_classification", **attributes)
    model = cj.Adapted(module, cj.preset(method))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *module.dummy_inputs())["params"]
    trained, frozen = cj.partition(shapes, cj.label_params(shapes, model.method))
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), jnp.int32)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    batch |= {"labels": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    batch |= {"weights": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    loss = loss_function("classification")
    made = program.gradient_program(apply_function(model), loss, trained, frozen, batch)
    return made, trained, frozen, batch, model


def test_parts_of_a_step():
    made, trained, frozen, batch, model = bert("houlsby")
    parts = memory.of_step(made, trained, frozen, batch, optax.adamw(1e-3))
    count = cj.count(
        cj.merge(trained, frozen), cj.label_params(cj.merge(trained, frozen), model.method)
    )
    assert parts.trained == 4 * count.trained
    assert parts.frozen == 4 * (count.total - count.trained)
    assert parts.optimizer == 2 * parts.trained + 4  # two moments and the step count
    assert parts.batch == 3 * 4 * 16 * 32 + 2 * 4 * 16
    assert parts.total == sum(
        (
            parts.frozen,
            parts.trained,
            parts.optimizer,
            parts.batch,
            parts.gradients,
            parts.activations,
        )
    )
    accumulated = memory.of_step(
        made, trained, frozen, batch, optax.adamw(1e-3), accumulation_steps=2
    )
    assert accumulated.gradients == parts.gradients + parts.trained


@pytest.mark.parametrize("method", ["full", "houlsby"])
def test_bfloat16_remat_and_fewer_rows_save(method):
    whole = sum(memory.at_peak(bert(method)[0]))
    assert sum(memory.at_peak(bert(method, dtype=jnp.bfloat16)[0])) < 0.75 * whole
    assert sum(memory.at_peak(bert(method, remat="full")[0])) < 0.6 * whole
    assert sum(memory.at_peak(bert(method, rows=8)[0])) < 0.65 * whole


@pytest.mark.parametrize("method", ["full", "houlsby"])
def test_xla_on_a_cpu_takes_somewhat_more(method):
    made, trained, frozen, batch, model = bert(method)

    def run(trained, frozen, batch):
        def total(trained):
            logits = apply_function(model)(cj.merge(trained, frozen), batch, jax.random.key(0))
            return jnp.sum(loss_function("classification")(logits, batch["labels"]))

        return jax.value_and_grad(total)(trained)

    analysis = jax.jit(run).lower(trained, frozen, batch).compile().memory_analysis()
    measured = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    assert 1 < measured / sum(memory.at_peak(made)) < 2.5
