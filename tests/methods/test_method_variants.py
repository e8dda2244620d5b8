"""Tests placements and sizes beyond the presets, against float64 NumPy; decoding and merging."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.methods.bottleneck import LowRankLinear
from tests.helpers import (
    IDS,
    MASK,
    ONE_LAYER,
    SMALL,
    TINY_T5,
    WIDTH,
    adapted_shapes,
    backbone_of,
    quick_jit,
    random_tree,
    t5_inputs,
)
from tests.reference import Reference
from train.compute import step as train_step
from train.compute.compute import make_compute
from train.data import tokens

# Without dropout in the backbone, all dropout is that of the methods.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = cj.Bert(
    dataclasses.replace(ONE_LAYER, **NO_DROPOUT), head="sequence_classification", num_labels=3
)
T5 = cj.T5(dataclasses.replace(TINY_T5, num_layers=1, dropout_rate=0.0))
GATED = T5.clone(
    config=dataclasses.replace(T5.config, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
)
T5_INPUTS = tuple(t5_inputs(0, TINY_T5, length=7)[:3])


def inputs_of(module):
    return (IDS, MASK) if isinstance(module, cj.Bert) else T5_INPUTS


@functools.cache
def own_params(module):
    return backbone_of(module).params


@functools.cache
def plain_logits(module):
    return module.apply({"params": own_params(module)}, *inputs_of(module))


def adapted(module, method, seed=0):
    """Returns the model and random parameters; the backbone's are the same for all methods."""
    model = cj.Adapted(module, method)
    own = flatten_dict(own_params(module))
    new = flatten_dict(random_tree(adapted_shapes(model), seed + 1))
    return model, unflatten_dict({**new, **own})


def assert_close(actual, expected, tolerance=1e-5):
    """Checks float32 results of a layer or two, relative to the largest value."""
    bound = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


# --- placements and sizes -----------------------------------------------------------------------


def residual(before, after, from_output, **overrides):
    sites = ("residual_attention", "residual_feed_forward")
    return cj.preset(
        "pfeiffer-feed-forward",
        sites=sites,
        reduction_factor=2,
        original_ln_before=before,
        original_ln_after=after,
        residual_before_ln=from_output,
        **overrides,
    )


PREFIX = {"prefix_length": 2, "bottleneck_size": 5}
ALL_LINEAR = ("query", "key", "value", "output_projection", "intermediate", "feed_forward")
BESIDE = ("parallel_attention", "parallel_feed_forward")
PLACEMENTS = {
    f"norm before {before}, after {after}, skip before {skip}": residual(before, after, skip)
    for before, after, skip in itertools.product((True, False), repeat=3)
}
VARIANTS = {
    **PLACEMENTS,
    "skip from the sum": residual(True, True, "post_add"),
    "beside, with the residual": residual(True, False, False, parallel=True, scaling=0.7),
    "parallel at both": cj.preset("scaled-parallel", sites=BESIDE, layer_norm_before=True),
    "low rank of 3": cj.preset("low-rank", reduction_factor=2, rank=3),
    "LoRA everywhere": cj.preset("lora", sites=ALL_LINEAR, rank=3, use_rslora=True),
    "IA3 everywhere": cj.preset("ia3", sites=ALL_LINEAR[:3], input_sites=ALL_LINEAR[3:]),
    "flat prefixes": cj.preset("prefix-tuning", prefix_length=4, flat=True),
    "ReLU prefixes": cj.preset("prefix-tuning", **PREFIX, non_linearity="relu"),
}
CROSS = ("parallel_cross_attention",)
T5_VARIANTS = VARIANTS | {
    "parallel at cross-attention": cj.preset("parallel", sites=CROSS),
    "residual of cross-attention": residual(True, True, False).replace(
        sites=("residual_cross_attention",)
    ),
    "after cross-attention": cj.preset("houlsby", sites=("cross_attention",), reduction_factor=2),
    "prefixes of one attention": cj.preset("prefix-tuning", sites=("cross_key_value",), **PREFIX),
    "prefixes that shift": cj.preset("prefix-tuning", shift_positions=True, **PREFIX),
    "BitFit of norms": cj.preset("bitfit", sites=("norm",)),
}


def all_at_once(*more):
    """Returns a method with every kind of layer; the biases of norms are those of BERT."""
    return cj.CombinedConfig(
        parts=(
            cj.preset("prompt-tuning-random", prompt_length=3),
            cj.preset("prefix-tuning", **PREFIX),
            cj.preset("lora", rank=2),
            cj.preset("ia3", sites=("key",)),
            cj.preset("compacter", **SMALL, parallel=True, sites=("parallel_feed_forward",)),
            *more,
        ),
        train_layer_norms=True,
    )


ALL_AT_ONCE = {"bert": all_at_once(), "t5": all_at_once(cj.preset("bitfit", sites=("norm",)))}
MODULES = {"bert": BERT, "t5": T5}


@pytest.mark.parametrize(
    ("module", "method"),
    [
        *(pytest.param(BERT, method, id=f"bert: {name}") for name, method in VARIANTS.items()),
        *(
            pytest.param(GATED, method, id=f"t5: {name}", marks=pytest.mark.slow)
            for name, method in T5_VARIANTS.items()
        ),
        *(
            pytest.param(MODULES[name], method, id=f"{name}: all at once")
            for name, method in ALL_AT_ONCE.items()
        ),
    ],
)
def test_logits_equal_the_equations(module, method):
    model, params = adapted(module, method)
    inputs = inputs_of(module)
    expected = Reference(module, method, params)(*inputs)
    assert_close(model.apply({"params": params}, *inputs), expected)
    assert np.abs(plain_logits(module) - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("positions", [None, [[3, 2, 0, 4, 1]], [[0, 1, 2, 3, 4], [5, 5, 2, 0, 1]]])
def test_a_prompt_before_token_types_and_positions(positions):
    """Token types and positions count from the end of the prompt, whose tokens have type 0."""
    method = cj.preset("prompt-tuning-random", prompt_length=3)
    model, params = adapted(BERT, method)
    types = np.array([[0, 0, 1, 1, 0], [1, 0, 0, 1, 1]])
    positions = None if positions is None else np.array(positions)
    inputs = (IDS, MASK, types, positions)
    expected = Reference(BERT, method, params)(*inputs)
    assert_close(model.apply({"params": params}, *inputs), expected)


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (None, (2, 5, WIDTH)),
        ("token_classification", (2, 5, 3)),
        ("masked_lm", (2, 5, ONE_LAYER.vocab_size)),
        ("question_answering", (2, 5, 2)),
    ],
)
def test_outputs_are_of_the_tokens_behind_the_prompt(head, shape):
    module = BERT.clone(head=head)
    model = cj.Adapted(module, cj.preset("prompt-tuning-random", prompt_length=3))
    params = random_tree(adapted_shapes(model))
    output = model.apply({"params": params}, IDS, MASK)
    y = output.last_hidden_state if head is None else output
    assert y.shape == shape
    # The same tokens after their prompt, as embeddings that the backbone receives.
    embedding = params["embeddings"]["word_embeddings"]
    prompt = embedding.pop("adapter")["prompt"]
    embedding["embedding"] = jnp.concatenate([embedding["embedding"], prompt])
    words = ONE_LAYER.vocab_size
    wider = module.clone(config=dataclasses.replace(ONE_LAYER, vocab_size=words + 3))
    if head == "masked_lm":
        return  # the logits cover only the words
    ids = np.concatenate([np.full((2, 3), words) + np.arange(3), IDS], 1)
    longer = wider.apply({"params": params}, ids, np.pad(MASK, ((0, 0), (3, 0)), constant_values=1))
    longer = longer.last_hidden_state if head is None else longer
    np.testing.assert_allclose(y, longer[:, 3:], atol=1e-6)


def test_low_rank_is_not_the_authors_product_of_elements():
    """Both products agree at rank 1, where each broadcasts to the outer product."""
    rng = np.random.default_rng(0)
    for rank, equal in ((1, True), (3, False)):
        left, right = rng.standard_normal((3, rank)), rng.standard_normal((rank, 3))
        assert np.allclose(left @ right, left * right) == equal
    layer = LowRankLinear(3, rank=3)
    params = {"left": left, "right": right, "bias": np.zeros(3)}
    x = rng.standard_normal((2, 3))
    assert_close(layer.apply({"params": params}, x), x @ (left @ right))


# --- ways to run --------------------------------------------------------------------------------


def others_at_once(**bitfit):
    """Returns a method with the kinds of bottlenecks that `all_at_once` lacks, and BitFit."""
    half = {"reduction_factor": 2}
    return cj.CombinedConfig(
        parts=(
            cj.preset("pfeiffer-feed-forward", **half),
            cj.preset("phm", **SMALL, sites=("attention",)),
            cj.preset("low-rank", **half, sites=("feed_forward",)),
            cj.preset("bitfit", **bitfit),
        )
    )


RUNS = {
    "bert": (BERT, ALL_AT_ONCE["bert"]),
    "t5": (T5, ALL_AT_ONCE["t5"]),
    "intrinsic": (BERT, cj.preset("intrinsic-said", dimension=30)),
    "bert, others": (BERT, others_at_once()),
    "gated t5, others": (GATED, others_at_once(sites=("norm", "logits"))),
    "t5, BitFit and at the residual": (
        T5,
        cj.CombinedConfig(
            parts=(
                cj.preset("pfeiffer-feed-forward", reduction_factor=2),
                cj.preset("bitfit"),
            )
        ),
    ),
}
# The softmax ignores a constant that is added to all the scores of a query.
NO_GRADIENT = re.compile(r".*(/self/key/bias|/k/adapter/bias)")


def batch_of(module):
    """Returns a training batch of four rows with padding, and how a step reads them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 17, (4, 5), np.int32)
    batch = {
        "input_ids": ids,
        "attention_mask": (np.arange(5) < rng.integers(1, 6, (4, 1))).astype(np.int32),
        "weights": np.ones(4, np.float32),
    }
    if isinstance(module, cj.Bert):
        batch["labels"] = rng.integers(0, 3, 4, np.int32)
        return batch, ("input_ids", "attention_mask"), "classification"
    batch["labels"] = np.where(np.arange(5) < [[2], [5], [1], [3]], ids, tokens.IGNORED)
    batch["decoder_input_ids"] = np.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    return batch, ("input_ids", "attention_mask", "decoder_input_ids"), "tokens"


@pytest.mark.parametrize(
    ("module", "method"),
    [
        pytest.param(
            *run, id=name, marks=pytest.mark.contract if name == "bert" else pytest.mark.slow
        )
        for name, run in RUNS.items()
    ],
)
def test_four_devices_that_recompute_do_what_one_does(module, method):
    _, params = adapted(module, method)
    labels = cj.label_params(params, method)
    batch, names, kind = batch_of(module)
    trained, frozen = cj.partition(params, labels)

    def run(devices, remat):
        made = make_compute(
            train_step.apply_function(cj.Adapted(module.clone(remat=remat), method), names),
            train_step.loss_function(kind),
            cj.optimizer(optax.sgd(0.1), labels),
            seed=0,
            devices=jax.local_devices()[:devices],
        )
        state, metrics = made.step(made.init_state(trained), made.place(frozen), batch)
        return float(metrics.loss), made.host_state(state).trained

    (one, after_one), (four, after_four) = run(1, remat="off"), run(4, remat="dots")
    np.testing.assert_allclose(four, one, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), after_four, after_one)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after_one, trained)
    # None marks leaves that are not trained.
    still = [path for path, has in flatten_dict(moved, sep="/").items() if has is False]
    assert [path for path in still if not NO_GRADIENT.fullmatch(path)] == []


# --- decoding -----------------------------------------------------------------------------------

DECODING = {
    "prefixes": cj.preset("prefix-tuning", **PREFIX),
    "prefixes that shift": T5_VARIANTS["prefixes that shift"],
    "prompt": cj.preset("prompt-tuning-random", prompt_length=3),
    "LoRA": cj.preset("lora", rank=2),
    "IA3": cj.preset("ia3"),
    "BitFit": cj.preset("bitfit"),
    "parallel": cj.preset("scaled-parallel", sites=(*BESIDE, *CROSS)),
    "residual": residual(True, True, True),
    "all at once": ALL_AT_ONCE["t5"],
}


@pytest.mark.parametrize("method", DECODING.values(), ids=DECODING)
def test_decoding_token_by_token_gives_the_logits_of_all_at_once(method):
    model, params = adapted(T5, method)
    apply = functools.partial(model.apply, {"params": params})
    ids, mask, decoder_ids = T5_INPUTS
    expected = apply(ids, mask, decoder_ids)
    states = apply(ids, mask, method="encode")
    cache = apply(states, 4, method="start_cache")
    for i in range(4):
        token = decoder_ids[:, i : i + 1]
        y, cache = apply(token, None, mask, cache=cache, index=i, method="decode")
        assert_close(y[:, 0], expected[:, i])


def test_generation_is_greedy():
    new_tokens = ALL_AT_ONCE["t5"].parts[:2]
    model, params = adapted(T5, cj.CombinedConfig(parts=new_tokens))
    ids, mask, _ = T5_INPUTS
    made = cj.generate(model, params, ids, mask, max_new_tokens=3, eos_token_id=())
    logits = model.apply({"params": params}, ids, mask, made[:, :-1])
    np.testing.assert_array_equal(made[:, 1:], logits.argmax(-1))


# --- merging ------------------------------------------------------------------------------------

MERGED = {
    "LoRA": cj.preset("lora", sites=ALL_LINEAR, rank=3, lora_alpha=2.0),
    "IA3": cj.preset("ia3", sites=("key", "intermediate"), input_sites=("value", "feed_forward")),
    "intrinsic": cj.preset("intrinsic-said", dimension=30),
    "full": cj.preset("full"),
}
# The factors differ, so that an exchange of two parts would be noticed.
SEVERAL = (
    cj.preset("lora", sites=("query", "output_projection"), rank=3, lora_alpha=2.0),
    cj.preset("lora", sites=("key",), rank=2, lora_alpha=5.0),
    cj.preset("ia3", sites=("value",)),
)
MERGES = [
    *((BERT, method) for method in (*MERGED.values(), cj.preset("bitfit"))),
    (BERT, cj.CombinedConfig(parts=(*SEVERAL, cj.preset("bitfit")))),
    *((GATED, MERGED[name]) for name in ("LoRA", "IA3", "intrinsic")),
    (GATED, cj.CombinedConfig(parts=SEVERAL)),
]


def merge(model, params):
    merged = quick_jit(functools.partial(cj.merge_adapter, model))(params)
    own = own_params(model.backbone)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, own)
    return merged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "method"),
    MERGES,
    ids=[f"{type(module).__name__}: {method.kind}" for module, method in MERGES],
)
def test_merged_weights_give_equal_logits_in_pytorch_too(module, method, tmp_path):
    model, params = adapted(module, method)
    inputs = inputs_of(module)
    logits = model.apply({"params": params}, *inputs)
    merged = merge(model, params)
    # Float32: the sums have another order.
    assert_close(module.apply({"params": merged}, *inputs), logits, 3e-6)
    twin, built = model.precomputed(params)
    assert_close(twin.apply({"params": built}, *inputs), logits, 3e-6)

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, kind = ("Bert", "ForSequenceClassification")
    if isinstance(module, cj.T5):
        family, kind = ("T5", "ForConditionalGeneration")
    settings = dataclasses.asdict(module.config)
    config = getattr(transformers, f"{family}Config")(**settings)
    cj.save_backbone(tmp_path, module, merged, config)
    torch_model = getattr(transformers, family + kind).from_pretrained(tmp_path).eval()
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        output = torch_model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=False)})
    np.testing.assert_allclose(output.logits.numpy(), logits, rtol=0, atol=2e-5)


def test_parts_of_a_union_are_merged_where_each_acts():
    """Two parts act at the same site, in different layers."""
    module = BERT.clone(config=dataclasses.replace(BERT.config, num_hidden_layers=2))
    first, second = (
        cj.preset("lora", rank=2, lora_alpha=alpha, leave_out=left)
        for alpha, left in ((2.0, (1,)), (5.0, (0,)))
    )
    model, params = adapted(module, cj.CombinedConfig(parts=(first, second)))
    logits = model.apply({"params": params}, IDS, MASK)
    merged = cj.merge_adapter(model, params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, own_params(module))
    assert_close(module.apply({"params": merged}, IDS, MASK), logits, 3e-6)
    assert np.abs(plain_logits(module) - logits).max() > 1e-2 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("module", "method", "reason"),
    [
        (
            BERT,
            residual(True, True, True),
            "adapters have a non-linearity, which weights of the ba",
        ),
        (T5, cj.preset("compacter", **SMALL), "'phm_bottleneck' cannot be merged .* non-linearity"),
        (T5, cj.preset("bitfit"), "its biases are new, and the backbone's architecture has no pla"),
        (BERT, cj.preset("prompt-tuning-random", prompt_length=2), "adds tokens to attend to, not"),
        (BERT, cj.preset("prefix-tuning", **PREFIX), "it adds tokens to attend to, not weights"),
        (
            T5,
            ALL_AT_ONCE["t5"],
            "its part 'prompt_tuning' cannot be merged: it adds tokens to attend to",
        ),
        (
            BERT,
            cj.CombinedConfig(parts=(*SEVERAL, residual(True, True, True))),
            "its part 'bottleneck' cannot be merged: its adapters have a non-linearity",
        ),
    ],
)
def test_what_cannot_be_merged_says_why(module, method, reason):
    model = cj.Adapted(module, method)
    params = adapted_shapes(model)
    with pytest.raises(ValueError, match=reason):
        cj.merge_adapter(model, params)


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        residual(True, True, True, dropout=0.5),
        cj.preset("parallel", dropout=0.5),
        cj.preset("lora", rank=2, dropout=0.5),
        cj.preset("prefix-tuning", **PREFIX, dropout=0.5),
        cj.preset("mam", **PREFIX).replace(
            parts=(
                cj.preset("prefix-tuning", **PREFIX, dropout=0.5),
                cj.preset("parallel"),
            )
        ),
    ],
    ids=lambda method: method.kind,
)
@pytest.mark.parametrize(
    "module", [BERT, pytest.param(GATED, marks=pytest.mark.slow)], ids=["bert", "t5"]
)
def test_dropout_acts_in_training_alone(module, method):
    model, params = adapted(module, method)
    apply = functools.partial(model.apply, {"params": params}, *inputs_of(module))
    expected = Reference(module, method, params)(*inputs_of(module))
    assert_close(apply(), expected)
    one, same, other = (
        apply(deterministic=False, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - expected).max() > 1e-3
    assert np.abs(one - other).max() > 1e-3
