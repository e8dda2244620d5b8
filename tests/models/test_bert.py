"""Compares Bert with the PyTorch implementation of transformers, and tests it by itself."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.models.bert.checkpoint import bert_from_hugging_face, bert_to_hugging_face
from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.encoder import HEADS, EncoderOutput
from compacter_jax.nn.activations import ACTIVATIONS, get_activation

TINY = BertConfig(
    vocab_size=13,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=9,
    initializer_range=0.3,
)
ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)
MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
IDS = np.array([[3, 5, 1, 7, 2], [4, 4, 6, 9, 12]])
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def random_config(seed: int, **changes) -> BertConfig:
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    config = {
        "vocab_size": int(rng.integers(11, 40)),
        "hidden_size": heads * int(rng.integers(2, 7)),
        "num_hidden_layers": int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 30)),
        "max_position_embeddings": int(rng.integers(12, 20)),
        "type_vocab_size": int(rng.integers(1, 4)),
        "pad_token_id": [0, 3, None][int(rng.integers(3))],
        # Large enough that attention is not uniform and every parameter has an effect.
        "initializer_range": 0.3,
    }
    return BertConfig(**(config | changes))


def random_inputs(seed: int, config: BertConfig):
    """Returns inputs of odd or even length; padding left, right and none; every token type."""
    rng = np.random.default_rng(seed)
    batch, length = 3, int(rng.integers(4, config.max_position_embeddings + 1))
    ids = rng.integers(0, config.vocab_size, (batch, length))
    mask = np.ones((batch, length), np.int64)
    mask[0, length - 2 :] = 0
    mask[1, :2] = 0
    if config.pad_token_id is not None:
        ids[mask == 0] = config.pad_token_id
    types = rng.integers(0, config.type_vocab_size, (batch, length))
    return ids, mask, types


def shapes_of(module: Bert):
    return jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]


def random_params(module: Bert, seed: int):
    """Draws weights of the configured range; biases and scales differ from 0 and 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path.rsplit("/", 1)[-1]
        std = 0.1 if kind in ("bias", "scale") else module.config.initializer_range
        return np.float32((kind == "scale") + std * rng.standard_normal(leaf.shape))

    flat = flatten_dict(shapes_of(module), sep="/")
    return unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()}, sep="/")


# Compilation takes nearly all the time of these tests; without optimisation, half of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def apply(module: Bert, params, *inputs, **named):
    return jit(lambda params: module.apply({"params": params}, *inputs, **named))(params)


def loss_of(output):
    """Returns the mean of squares of all outputs, so that gradients are of order one."""
    leaves = jax.tree.leaves(output)
    return sum((leaf**2).mean() for leaf in leaves) / len(leaves)


def gradient_of(module: Bert, params, *inputs):
    return jit(jax.grad(lambda p: loss_of(module.apply({"params": p}, *inputs))))(params)


@pytest.fixture(scope="module")
def torch_model():
    """Returns a function that makes the PyTorch model of a module and its parameters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    classes = dict(
        zip(
            HEADS,
            (
                transformers.BertModel,
                transformers.BertForSequenceClassification,
                transformers.BertForTokenClassification,
                transformers.BertForMaskedLM,
                transformers.BertForQuestionAnswering,
            ),
            strict=True,
        )
    )

    def build(module: Bert, params):
        config = transformers.BertConfig(
            **dataclasses.asdict(module.config),
            num_labels=2 if module.head == "question_answering" else module.num_labels,
            attn_implementation="eager",
        )
        model = classes[module.head](config).eval()
        tensors = {k: torch.tensor(v) for k, v in bert_to_hugging_face(params).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert unexpected == []
        tied = module.head == "masked_lm" and module.config.tie_word_embeddings
        assert set(missing) <= {"cls.predictions.decoder.bias"} | (
            {"cls.predictions.decoder.weight"} if tied else set()
        )
        return model

    return build


def torch_outputs(model, module: Bert, ids, mask, types):
    import torch

    output = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        token_type_ids=torch.tensor(types),
    )
    if module.head is None:
        return [output.last_hidden_state, output.pooler_output]
    if module.head == "question_answering":
        return [torch.stack([output.start_logits, output.end_logits], -1)]
    return [output.logits]


def assert_equals_torch(module: Bert, seed: int, torch_model):
    params = random_params(module, seed)
    ids, mask, types = random_inputs(seed, module.config)
    model = torch_model(module, params)
    theirs = torch_outputs(model, module, ids, mask, types)
    loss = sum((t**2).mean() for t in theirs) / len(theirs)
    loss.backward()

    @jit
    def run(params):
        def loss_and_output(params):
            output = module.apply({"params": params}, ids, mask, types)
            return loss_of(output), output

        return jax.value_and_grad(loss_and_output, has_aux=True)(params)

    (_, output), gradient = run(params)
    ours = jax.tree.leaves(output)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5, rtol=0)
    named = {name: p.grad for name, p in model.named_parameters()}
    gradient = bert_to_hugging_face(gradient)
    assert gradient.keys() == named.keys()
    for name, g in gradient.items():
        np.testing.assert_allclose(g, named[name].numpy(), atol=2e-5, rtol=0, err_msg=name)
    largest = max(np.abs(g).max() for g in gradient.values())
    assert largest > 1e-2, "the comparison of gradients would be empty"


# Every function occurs once under one of its names; the heads take turns.
NAMES = sorted({function: name for name, function in ACTIVATIONS.items()}.values())


@pytest.mark.parametrize(("seed", "activation"), list(enumerate(NAMES)))
def test_outputs_and_gradients_equal_pytorch(seed, activation, torch_model):
    config = random_config(seed, hidden_act=activation)
    module = Bert(config, head=HEADS[seed % len(HEADS)], num_labels=1 + seed % 3)
    assert_equals_torch(module, seed, torch_model)


def test_untied_decoder_equals_pytorch(torch_model):
    module = Bert(random_config(7, tie_word_embeddings=False), head="masked_lm")
    assert_equals_torch(module, 7, torch_model)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_equals_pytorch_pointwise(name):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-12, 12, 402, dtype=np.float32)  # without 0, where relu has no derivative
    x_torch = torch.tensor(x, requires_grad=True)
    theirs = activations.ACT2FN[name](x_torch)
    theirs.sum().backward()
    ours, slopes = jax.vmap(jax.value_and_grad(get_activation(name)))(x)
    # Relative to the value: relu2 reaches 144, where one unit in the last place is 1.5e-5.
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-6, rtol=1e-6)
    np.testing.assert_allclose(slopes, x_torch.grad.numpy(), atol=2e-5, rtol=1e-6)


def test_unknown_activation_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown activation 'gelo'; known.*gelu_new.*tanh"):
        get_activation("gelo")


def test_fully_padded_row_equals_pytorch_and_leaves_the_others_alone(torch_model):
    module = Bert(random_config(2, pad_token_id=0))
    params = random_params(module, 2)
    ids, _, types = random_inputs(2, module.config)
    mask = np.ones_like(ids)
    mask[1] = 0
    output = apply(module, params, ids, mask, types)
    assert np.isfinite(output.last_hidden_state).all()
    theirs, _ = torch_outputs(torch_model(module, params), module, ids, mask, types)
    np.testing.assert_allclose(output.last_hidden_state, theirs.detach().numpy(), atol=2e-5, rtol=0)
    alone = apply(module, params, ids[:1], mask[:1], types[:1])
    np.testing.assert_allclose(
        output.last_hidden_state[:1], alone.last_hidden_state, atol=1e-6, rtol=0
    )
    gradient = gradient_of(module, params, ids, mask, types)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_padding_cannot_be_seen():
    module = Bert(TINY, head="sequence_classification")
    params = random_params(module, 0)
    other = np.where(MASK == 1, IDS, 11)
    assert (other != IDS).any()
    np.testing.assert_array_equal(
        apply(module, params, IDS[:1], MASK[:1]),
        apply(module, params, other[:1], MASK[:1]),
    )
    np.testing.assert_array_equal(
        apply(module, params, IDS, MASK),
        apply(module, params, IDS, MASK.astype(bool)),
    )


def test_defaults_are_no_padding_type_zero_and_positions_from_zero():
    module = Bert(TINY)
    params = random_params(module, 0)
    short = apply(module, params, IDS).last_hidden_state
    full = apply(
        module, params, IDS, np.ones_like(IDS), np.zeros_like(IDS), np.arange(5)[None]
    ).last_hidden_state
    np.testing.assert_array_equal(short, full)
    shifted = apply(module, params, IDS, position_ids=np.arange(5)[None] + 1)
    assert np.abs(shifted.last_hidden_state - short).max() > 1e-2


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_stays_near_float32(head):
    module = Bert(random_config(5, initializer_range=0.1, num_hidden_layers=1), head=head)
    params = random_params(module, 5)
    ids, mask, types = random_inputs(5, module.config)
    exact = apply(module, params, ids, mask, types)
    rough = apply(module.clone(dtype=jnp.bfloat16), params, ids, mask, types)
    for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        # bfloat16 rounds to one part in 256, and a few successive roundings add up.
        bound = 8 / 256 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=bound, rtol=0)
    halves = module.clone(param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(halves))} == {jnp.dtype(jnp.bfloat16)}


def test_float16_stays_near_float32_where_a_row_is_all_padding():
    module = Bert(ONE_LAYER, head="token_classification")
    params, mask = random_params(module, 5), np.array(MASK)
    mask[0] = 0
    exact = apply(module, params, IDS, mask)
    half = apply(module.clone(dtype=jnp.float16), params, IDS, mask)
    assert half.dtype == jnp.float16
    # float16 rounds to one part in 2048, and a few successive roundings add up.
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=8 / 2048 * np.abs(exact).max())


def test_softmax_and_norm_statistics_are_float32_in_bfloat16():
    module = Bert(TINY, dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(module.apply)({"params": shapes_of(module)}, IDS, MASK))
    assert re.search(r"f32\[[\d,]+\] = exp ", text)
    assert not re.search(r"bf16\[[\d,]*\] = (exp|rsqrt|reduce_sum)", text)


@pytest.mark.parametrize("deterministic", [True, False])
def test_remat_changes_nothing(deterministic):
    params = random_params(Bert(ONE_LAYER), 0)

    def loss(params, remat):
        output = Bert(ONE_LAYER, remat=remat).apply(
            {"params": params},
            IDS,
            MASK,
            deterministic=deterministic,
            rngs={"dropout": jax.random.key(4)},
        )
        return loss_of(output), output

    run = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    plain, *recomputed = (jax.tree.leaves(run(params, r)) for r in ("off", "full", "dots"))
    for again in recomputed:
        for a, b in zip(again, plain, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


def test_remat_has_the_same_initial_values():
    key, inputs = jax.random.key(1), Bert(ONE_LAYER).dummy_inputs()
    plain, remat = (jit(Bert(ONE_LAYER, remat=r).init)(key, *inputs) for r in ("off", "full"))
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


@pytest.mark.contract
def test_remat_recomputes_the_layers():
    def checkpoints(remat):
        module = Bert(TINY, remat=remat)
        variables = {"params": shapes_of(module)}
        jaxpr = jax.make_jaxpr(lambda v: module.apply(v, IDS).pooler_output)(variables)
        return sum(e.primitive.name in ("checkpoint", "remat", "remat2") for e in jaxpr.eqns)

    assert checkpoints("off") == 0
    assert checkpoints("full") == checkpoints("dots") == TINY.num_hidden_layers


def test_unknown_remat():
    module = Bert(TINY, remat="all")
    with pytest.raises(ValueError, match="unknown remat='all'; use 'off', 'full' or 'dots'"):
        shapes_of(module)


def test_dropout_is_a_function_of_its_key():
    module = Bert(TINY, head="token_classification", num_labels=3)
    params = random_params(module, 0)

    @jit
    def run(key):
        return module.apply(
            {"params": params}, IDS, deterministic=False, rngs={"dropout": jax.random.key(key)}
        )

    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 1e-3
    assert np.abs(run(0) - apply(module, params, IDS)).max() > 1e-3


RESIDUALS = {f"encoder/layer/{i}/{at}output/dropout" for i in "01" for at in ("", "attention/")}


@pytest.mark.parametrize(
    ("rates", "paths"),
    [
        # The dropout rate of the classifier follows hidden_dropout_prob.
        ({"hidden_dropout_prob": 0.5}, RESIDUALS | {"embeddings/dropout", "dropout"}),
        (
            {"attention_probs_dropout_prob": 0.5},
            {f"encoder/layer/{i}/attention/self/dropout" for i in "01"},
        ),
        ({"classifier_dropout": 0.5}, {"dropout"}),
        (
            {"hidden_dropout_prob": 0.5, "classifier_dropout": 0.0},
            RESIDUALS | {"embeddings/dropout"},
        ),
    ],
)
def test_dropout_acts_where_transformers_has_it(rates, paths):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    module = Bert(dataclasses.replace(TINY, **(none | rates)), head="sequence_classification")
    acting = set()

    def watch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if isinstance(context.module, nn.Dropout) and y is not args[0]:
            acting.add("/".join(context.module.path))
        return y

    def run(deterministic):
        with nn.intercept_methods(watch):
            return module.apply(
                {"params": random_params(module, 0)},
                IDS,
                deterministic=deterministic,
                rngs={"dropout": jax.random.key(0)},
            )

    jax.eval_shape(lambda: run(deterministic=True))
    assert acting == set()
    jax.eval_shape(lambda: run(deterministic=False))
    assert acting == paths


def test_lookups_send_the_padding_embedding_no_gradient():
    module = Bert(dataclasses.replace(TINY, pad_token_id=3))
    params = random_params(module, 0)
    gradient = gradient_of(module, params, IDS)
    rows = np.abs(gradient["embeddings"]["word_embeddings"]["embedding"]).max(axis=1)
    assert rows[3] == 0
    assert (rows[[5, 1, 7, 2, 4, 6, 9, 12]] > 0).all()
    assert rows[0] == 0  # not in the input


def test_initial_values():
    config = dataclasses.replace(TINY, hidden_size=128, vocab_size=500, initializer_range=0.05)
    module = Bert(config)
    params = jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
    for path, leaf in flatten_dict(params, sep="/").items():
        if path.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        elif path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif leaf.size > 10_000:
            assert abs(leaf.std() - 0.05) < 0.001, path
            assert abs(leaf.mean()) < 0.001, path


def test_parameter_count_of_minilm():
    leaves = jax.tree.leaves(shapes_of(Bert(MINILM)))
    assert sum(leaf.size for leaf in leaves) == 22_713_216


ENCODER_PATHS = {
    "embeddings/word_embeddings/embedding": (13, 8),
    "embeddings/position_embeddings/embedding": (9, 8),
    "embeddings/token_type_embeddings/embedding": (2, 8),
    "embeddings/LayerNorm/scale": (8,),
    "embeddings/LayerNorm/bias": (8,),
} | {
    f"encoder/layer/{i}/{path}": shape
    for i in range(2)
    for path, shape in {
        "attention/self/query/kernel": (8, 8),
        "attention/self/query/bias": (8,),
        "attention/self/key/kernel": (8, 8),
        "attention/self/key/bias": (8,),
        "attention/self/value/kernel": (8, 8),
        "attention/self/value/bias": (8,),
        "attention/output/dense/kernel": (8, 8),
        "attention/output/dense/bias": (8,),
        "attention/output/LayerNorm/scale": (8,),
        "attention/output/LayerNorm/bias": (8,),
        "intermediate/dense/kernel": (8, 12),
        "intermediate/dense/bias": (12,),
        "output/dense/kernel": (12, 8),
        "output/dense/bias": (8,),
        "output/LayerNorm/scale": (8,),
        "output/LayerNorm/bias": (8,),
    }.items()
}
POOLER_PATHS = {"pooler/dense/kernel": (8, 8), "pooler/dense/bias": (8,)}
PREDICTION_PATHS = {
    "cls/predictions/bias": (13,),
    "cls/predictions/transform/dense/kernel": (8, 8),
    "cls/predictions/transform/dense/bias": (8,),
    "cls/predictions/transform/LayerNorm/scale": (8,),
    "cls/predictions/transform/LayerNorm/bias": (8,),
}


@pytest.mark.parametrize(
    ("head", "tied", "paths"),
    [
        (None, True, POOLER_PATHS),
        (
            "sequence_classification",
            True,
            POOLER_PATHS | {"classifier/kernel": (8, 3), "classifier/bias": (3,)},
        ),
        ("token_classification", True, {"classifier/kernel": (8, 3), "classifier/bias": (3,)}),
        ("masked_lm", True, PREDICTION_PATHS),
        ("masked_lm", False, PREDICTION_PATHS | {"cls/predictions/decoder/kernel": (8, 13)}),
        ("question_answering", True, {"qa_outputs/kernel": (8, 2), "qa_outputs/bias": (2,)}),
    ],
)
def test_parameter_paths(head, tied, paths):
    module = Bert(dataclasses.replace(TINY, tie_word_embeddings=tied), head=head, num_labels=3)
    flat = {path: leaf.shape for path, leaf in flatten_dict(shapes_of(module), sep="/").items()}
    assert flat == ENCODER_PATHS | paths
    assert module.has_pooler == ("pooler/dense/kernel" in paths)


@pytest.mark.parametrize("remat", ["off", "full"])
def test_sites_are_the_outputs_before_dropout_and_residual(remat):
    module = Bert(TINY, remat=remat)
    params = random_params(module, 0)
    hits = []

    def silence(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        for site in ("attention", "feed_forward"):
            matched = re.fullmatch(Bert.sites[site], path)
            if context.method_name == "__call__" and (m := matched):
                hits.append((site, int(m["layer"]), type(context.module)))
                return jnp.zeros_like(y)
        return y

    with nn.intercept_methods(silence):
        output = apply(module, params, IDS).last_hidden_state
    assert sorted(hits, key=str) == sorted(
        [(site, i, nn.Dense) for site in ("attention", "feed_forward") for i in range(2)], key=str
    )

    # If every sub-layer returns zero, only the residual stream and its layer norms remain.
    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * p["scale"] + p["bias"]

    e = params["embeddings"]
    x = e["word_embeddings"]["embedding"][IDS] + e["token_type_embeddings"]["embedding"][0]
    x = norm(x + e["position_embeddings"]["embedding"][:5], e["LayerNorm"])
    for i in "01":
        layer = params["encoder"]["layer"][i]
        x = norm(norm(x, layer["attention"]["output"]["LayerNorm"]), layer["output"]["LayerNorm"])
    np.testing.assert_allclose(output, x, atol=1e-5, rtol=0)


def test_module_is_hashable_and_compares_by_value():
    assert Bert(TINY) == Bert(dataclasses.replace(TINY))
    assert hash(Bert(TINY)) == hash(Bert(dataclasses.replace(TINY)))
    assert Bert(TINY) != Bert(TINY, head="masked_lm")
    assert "sites" not in {field.name for field in dataclasses.fields(Bert)}


def test_without_a_head_hidden_states_and_pooler_output():
    module = Bert(TINY)
    params = random_params(module, 0)
    output = apply(module, params, IDS)
    assert isinstance(output, EncoderOutput)
    dense = params["pooler"]["dense"]
    expected = np.tanh(output.last_hidden_state[:, 0] @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(output.pooler_output, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"num_attention_heads=3 .* hidden_size=8; use .*1, 2, 4, 8"),
        ({"hidden_act": "gelo"}, r"unknown activation 'gelo'; known activations: gelu"),
        ({"vocab_size": 0}, r"vocab_size=0 is not positive"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 is not positive"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0 .* use 0 <="),
        ({"classifier_dropout": -0.1}, r"classifier_dropout=-0.1 .* use 0 <="),
        ({"pad_token_id": 13}, r"pad_token_id=13 .* vocab_size=13"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps=0.0 is not positive"),
        ({"initializer_range": -1.0}, r"initializer_range=-1.0 is negative"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_modules_that_cannot_be():
    with pytest.raises(ValueError, match=r"unknown head 'regression'; use one of .*'masked_lm'"):
        Bert(TINY, head="regression")
    with pytest.raises(ValueError, match=r"num_labels=0 is not positive"):
        Bert(TINY, num_labels=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.zeros((1, 10), int),), r"10 tokens long.*max_position_embeddings=9; truncate"),
        ((IDS[0],), r"input_ids has shape \(5,\); it must be \[batch, length\]"),
        ((IDS, MASK[:, :4]), r"attention_mask has shape \(2, 4\); .*\(2, 5\)"),
        ((IDS, MASK, MASK[:1]), r"token_type_ids has shape \(1, 5\); .*\(2, 5\)"),
        ((IDS, MASK, MASK, np.arange(5)), r"position_ids has shape \(5,\); .*\(1, 5\)"),
        (
            (IDS, MASK.astype(np.float32)),
            r"attention_mask has dtype float32; .*integers or booleans",
        ),
    ],
)
def test_inputs_that_cannot_be(inputs, message):
    module = Bert(TINY)
    variables = {"params": shapes_of(module)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.apply, variables, *inputs)


def test_training_step_moves_every_parameter_that_the_loss_reads():
    module = Bert(TINY, head="sequence_classification")
    params = random_params(module, 0)
    gradient = gradient_of(module, params, IDS, MASK, IDS % 2)
    still = {path for path, g in flatten_dict(gradient, sep="/").items() if np.abs(g).max() < 1e-7}
    # The softmax ignores a constant that is added to all keys.
    assert still == {f"encoder/layer/{i}/attention/self/key/bias" for i in range(2)}


def test_names_round_trip():
    for head in HEADS:
        params = random_params(Bert(TINY, head=head), 0)
        back = bert_from_hugging_face(bert_to_hugging_face(params))
        jax.tree.map(np.testing.assert_array_equal, back, params)
