"""Tests every preset on BERT, T5 and a compressed decoder, some on others, with shared code."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.encoder import Encoder
from compacter_jax.models.t5.config import PUBLISHED
from tests import modernbert_models
from tests.helpers import (
    IDS,
    MASK,
    ONE_LAYER,
    TINY_T5,
    adapted_shapes,
    backbone_of,
    quick_jit,
    quick_key,
    random_tree,
    t5_inputs,
    weights_of,
)
from tests.methods.rows import ROWS
from tests.methods.sizes import sizes_of, t5_sizes
from tests.reference import Reference
from tests.speech_models import speech_inputs, tiny_speech

CLASSIFIES = {"head": "sequence_classification", "num_labels": 3}
# The inputs have no padding token, whose embedding would get no gradient.
ROBERTA = {"pad_token_id": 8, "max_position_embeddings": 18, "type_vocab_size": 1}
SMALL_SPEECH = tiny_speech(
    vocab_size=19,
    d_model=12,
    encoder_layers=1,
    decoder_ffn_dim=14,
    encoder_attention_heads=3,
    decoder_attention_heads=2,
    mask_between_convolutions=True,
)
BACKBONES = {
    "bert": cj.Bert(ONE_LAYER, **CLASSIFIES),
    "roberta": cj.Bert(
        dataclasses.replace(ONE_LAYER, model_type="roberta", **ROBERTA), **CLASSIFIES
    ),
    "electra": cj.Bert(
        dataclasses.replace(ONE_LAYER, model_type="electra", embedding_size=8), **CLASSIFIES
    ),
    "distilbert": cj.DistilBert(
        cj.DistilBertConfig(
            vocab_size=17,
            dim=12,
            n_layers=1,
            n_heads=2,
            hidden_dim=10,
            max_position_embeddings=9,
            initializer_range=0.3,
        ),
        **CLASSIFIES,
    ),
    "modernbert": cj.ModernBert(modernbert_models.tiny(), **CLASSIFIES),
    "t5": cj.T5(dataclasses.replace(TINY_T5, num_layers=1)),
    "m2m": cj.Seq2Seq(
        cj.Seq2SeqConfig(
            vocab_size=19,
            d_model=12,
            encoder_layers=1,
            encoder_attention_heads=3,
            encoder_ffn_dim=14,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=14,
        )
    ),
    # Values narrower than keys.
    "compressed": cj.Seq2Seq(
        cj.Seq2SeqConfig(
            vocab_size=19,
            d_model=12,
            encoder_layers=1,
            encoder_attention_heads=3,
            encoder_ffn_dim=14,
            decoder_layer="compressed",
            decoder_value_dim=10,
            decoder_layers=1,
            decoder_attention_heads=2,
        )
    ),
    "speech": cj.SpeechToText(SMALL_SPEECH),
    "gated t5": cj.T5(
        dataclasses.replace(
            TINY_T5, num_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False
        )
    ),
}
# These methods differ on the gated feed-forward network and the separate head.
GATED = ("bitfit", "ia3", "mam")
# These presets differ from another one by a number, a site or a layer: no step is compiled.
TWINS = (
    *("houlsby", "pfeiffer-attention", "adapterdrop", "compacter++", "prompt-tuning-random"),
    *("compacter++-short", "intrinsic", "parallel", "compacter-ciat", "serial-ciat", "st"),
    "compacter-st",
)
# Nor is a step of these compiled on T5, for which they have no code of their own: test_inject_t5.py
# compares the gradients of bottlenecks with PyTorch, and test_method_variants.py tests which leaves
# a step moves.
ALIKE_ON_T5 = (
    *("full", "pfeiffer-feed-forward", "low-rank", "phm", "lora", "ia3", "scaled-parallel", "mam"),
    "ciat",
)
# An M2M-100 has the code of T5 where methods act, so one preset of each kind is enough, and a step
# is compiled of those that depend on what differs: embeddings, attention and the feed-forward
# network.
ON_M2M = (
    *("bitfit", "adapterdrop", "pfeiffer-feed-forward", "compacter", "intrinsic", "lora", "ia3"),
    *("compacter-ciat", "serial-ciat", "st", "compacter-st"),
)
# A speech model has the layers of an M2M-100 behind convolutions.
ON_SPEECH = ("bitfit", "compacter-st", "lora", "prefix-tuning", "ciat", "intrinsic", "full")
COMPILED_ON_SPEECH = ("st",)
# A ModernBERT has its own places of adapters, and one step is compiled for every kind of them.
ON_MODERNBERT = ("adapterdrop", "intrinsic", "ia3", "scaled-parallel", "full")
COMPILED_ON_MODERNBERT = (
    *("bitfit", "pfeiffer-feed-forward", "compacter", "prompt-tuning-vocabulary", "lora", "mam"),
    "ciat",
)
COMPILED_ON_M2M = ("prompt-tuning-vocabulary", "prefix-tuning", "scaled-parallel", "ciat")
# A step on a compressed decoder is compiled of the method that acts on its joined keys.
COMPILED_ON_COMPRESSED = ("prefix-tuning",)
# RoBERTa and ELECTRA have the layers of BERT, and other embeddings and heads. DistilBERT has other
# names for all of them.
ON_ENCODERS = {
    "roberta": ("compacter", "prompt-tuning-random", "prefix-tuning"),
    "electra": ("bitfit", "lora", "compacter-ciat"),
    "distilbert": (
        *("adapterdrop", "pfeiffer-feed-forward", "compacter", "lora", "ia3"),
        *("prompt-tuning-random", "ciat"),
    ),
}
COMPILED_ON_ENCODERS = (("roberta", "full"), ("electra", "prompt-tuning-vocabulary"))
COMPILED_ON_ENCODERS += (("distilbert", "mam"),)
NOT_COMPILED = [
    *((name, backbone) for backbone, names in ON_ENCODERS.items() for name in names),
    *((name, "bert") for name in TWINS),
    *((name, "t5") for name in (*TWINS, *ALIKE_ON_T5)),
    *((name, "m2m") for name in ON_M2M),
    *((name, "speech") for name in ON_SPEECH),
    *((name, "compressed") for name in cj.presets() if name not in COMPILED_ON_COMPRESSED),
    *((name, "modernbert") for name in ON_MODERNBERT),
]
# Enough methods to show what a new version of JAX or Flax changes.
FAST_ON_T5 = ("bitfit", "prompt-tuning-vocabulary", "prefix-tuning")


def slow_unless(fast, *values):
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


CASES = [
    *((name, "bert") for name in cj.presets() if (name, "bert") not in NOT_COMPILED),
    *(
        slow_unless(name in FAST_ON_T5, name, "t5")
        for name in cj.presets()
        if (name, "t5") not in NOT_COMPILED
    ),
    *(slow_unless(False, name, "gated t5") for name in GATED),
    *(slow_unless(False, name, "m2m") for name in COMPILED_ON_M2M),
    *(slow_unless(False, name, "speech") for name in COMPILED_ON_SPEECH),
    *(slow_unless(False, name, "compressed") for name in COMPILED_ON_COMPRESSED),
    *(slow_unless(False, name, backbone) for backbone, name in COMPILED_ON_ENCODERS),
    *(slow_unless(name == "lora", name, "modernbert") for name in COMPILED_ON_MODERNBERT),
]
every_case = pytest.mark.parametrize(("name", "backbone"), CASES)
every_other = pytest.mark.parametrize(("name", "backbone"), NOT_COMPILED)
# Files know nothing of decoders, so some methods are enough for those of a compressed one.
SAVED_OF_COMPRESSED = ("compacter", "bitfit", "lora", "ciat")
every_saved = pytest.mark.parametrize(
    ("name", "backbone"),
    [case for case in NOT_COMPILED if case[1] != "compressed" or case[0] in SAVED_OF_COMPRESSED],
)
# One method of each kind that inserts parameters.
KINDS = (
    *("pfeiffer-feed-forward", "low-rank", "phm", "compacter", "prompt-tuning-vocabulary"),
    *("bitfit", "intrinsic-said", "lora", "ia3", "prefix-tuning", "mam"),
)


def small(name, **overrides):
    return cj.preset(name, **(ROWS[name].fields | overrides))


def test_the_table_has_every_preset():
    assert tuple(ROWS) == cj.presets()


def module_of(name, backbone):
    module = BACKBONES[backbone]
    if name != "adapterdrop":
        return module
    names = {cj.T5: "num_layers", cj.Seq2Seq: "encoder_layers", cj.DistilBert: "n_layers"}
    layers = names.get(type(module), "num_hidden_layers")
    return module.clone(config=dataclasses.replace(module.config, **{layers: 2}))


def inputs_of(module, seed=0):
    """Returns ids and masks with padding on the left and on the right."""
    if isinstance(module, Encoder):
        return IDS, MASK
    if isinstance(module, cj.SpeechToText):
        return speech_inputs(module.config, seed)
    return tuple(t5_inputs(seed, module.config, length=7)[:3])


def relative_difference(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


class Case:
    """A preset on a backbone, with one compiled step."""

    def __init__(self, name, backbone):
        self.backbone = backbone_of(module_of(name, backbone))
        self.method = small(name)
        self.model = cj.Adapted(self.backbone.module, self.method)
        self.inputs = inputs_of(self.backbone.module)
        self.params = cj.init_adapters(self.model, self.backbone, quick_key(1))
        self.random = random_tree(self.params, seed=2)
        self.labels = cj.label_params(self.params, self.method)
        self.trained = {
            path for path, label in flatten_dict(self.labels, sep="/").items() if label == "train"
        }
        tx = cj.optimizer(optax.sign_sgd(0.01), self.labels)
        shape = jax.eval_shape(self.apply, self.params).shape
        self.cotangent = np.random.default_rng(3).standard_normal(shape).astype(np.float32)

        @quick_jit
        def step(trained, frozen):
            def objective(trained):
                logits = self.apply(cj.merge(trained, frozen))
                return jnp.sum(self.cotangent * logits), logits

            gradient, logits = jax.grad(objective, has_aux=True)(trained)
            updates, _ = tx.update(gradient, tx.init(trained), trained)
            return logits, gradient, cj.merge(optax.apply_updates(trained, updates), frozen)

        self._step = step

    def apply(self, params):
        return self.model.apply({"params": params}, *self.inputs)

    def step(self, params):
        """Returns logits, gradients of trained leaves by path, and parameters after a step."""
        logits, gradient, after = jax.device_get(self._step(*cj.partition(params, self.labels)))
        flat = flatten_dict(gradient, sep="/")
        return logits, {path: flat[path] for path in self.trained}, after

    @functools.cached_property
    def _merged(self):
        return quick_jit(lambda params: cj.merge_adapter(self.model, params))

    def reference_params(self, params):
        """Returns float64 parameters by path for `Reference`, which has no intrinsic dimension."""
        if isinstance(self.method, cj.IntrinsicConfig):
            params = self._merged(params)
        return {path: np.float64(leaf) for path, leaf in flatten_dict(params, sep="/").items()}

    @functools.cached_property
    def at_random(self):
        """Returns the logits and the gradient at random parameters."""
        return self.step(self.random)[:2]

    @functools.cached_property
    def first(self):
        return self.step(self.params)

    @functools.cached_property
    def second(self):
        return self.step(self.first[2])


case_of = functools.cache(Case)


@functools.cache
def plain_program(module):
    return quick_jit(lambda params: module.apply({"params": params}, *inputs_of(module)))


@functools.cache
def plain_logits(module):
    return plain_program(module)(backbone_of(module).params)


# --- where they go ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        *((name, b) for b in ("bert", "modernbert", "t5", "compressed") for name in cj.presets()),
        *((name, "m2m") for name in (*ON_M2M, *COMPILED_ON_M2M)),
        *((name, "speech") for name in (*ON_SPEECH, *COMPILED_ON_SPEECH)),
        *((name, backbone) for name, backbone in NOT_COMPILED if backbone in ON_ENCODERS),
        *((name, backbone) for backbone, name in COMPILED_ON_ENCODERS),
    ],
)
def test_the_modules_that_have_an_adapter(name, backbone):
    shapes = adapted_shapes(cj.Adapted(module_of(name, backbone), small(name)))
    paths = ["/" + path for path in flatten_dict(shapes, sep="/")]
    hosts = {path.split("/adapter/")[0][1:] for path in paths if "/adapter/" in path}
    assert hosts == ROWS[name].places_in(backbone)


# --- what a step moves --------------------------------------------------------------------------


@every_case
def test_a_step_moves_the_trained_leaves_and_no_other(name, backbone):
    case = case_of(name, backbone)
    start, once, twice = (
        flatten_dict(params, sep="/") for params in (case.params, case.first[2], case.second[2])
    )
    unmoved = {
        count: {
            path
            for path in start
            if np.asarray(start[path]).tobytes() == np.asarray(after[path]).tobytes()
        }
        for count, after in ((1, once), (2, twice))
    }
    frozen = start.keys() - case.trained
    # The softmax ignores a constant that is added to all the scores of a query.
    no_gradient = {path for path in start if re.fullmatch(ROWS[name].no_gradient, path)}
    still = {path for path in start if re.fullmatch(ROWS[name].still, path)}
    assert unmoved[2] - no_gradient == frozen
    assert unmoved[1] - no_gradient == frozen | still
    gradient = case.second[1]
    largest = max((np.abs(leaf).max() for leaf in gradient.values()), default=0.0)
    for path in no_gradient:
        assert np.abs(gradient[path]).max() < 1e-6 * largest


# --- the start ----------------------------------------------------------------------------------


def check_start(name, changed):
    largest = ROWS[name].start
    assert changed > 1e-2 if largest is None else changed < largest


@every_case
def test_the_start_is_the_backbones_where_that_is_promised(name, backbone):
    case = case_of(name, backbone)
    changed = relative_difference(case.first[0], plain_logits(case.backbone.module))
    check_start(name, changed)


# --- against float64 NumPy ----------------------------------------------------------------------


@pytest.mark.slow
@every_other
def test_logits_of_the_others(name, backbone):
    module, method = module_of(name, backbone), small(name)
    model = cj.Adapted(module, method)
    params = random_tree(adapted_shapes(model), seed=2)
    logits = model.apply({"params": params}, *inputs_of(module))
    if isinstance(method, cj.IntrinsicConfig):
        params = cj.merge_adapter(model, params)
    assert relative_difference(logits, Reference(module, method, params)(*inputs_of(module))) < 1e-5


@every_case
def test_logits_and_gradients_equal_the_equations(name, backbone):
    """Parameters are random; gradients are checked by central differences in random directions."""
    case = case_of(name, backbone)
    logits, gradient = case.at_random
    at = case.reference_params(case.random)

    def reference(params):
        params = unflatten_dict(params, sep="/")
        return Reference(case.backbone.module, case.method, params)(*case.inputs)

    # Float32 through up to two layers in each stack.
    assert relative_difference(logits, reference(at)) < 1e-5
    rng, step = np.random.default_rng(4), 1e-6
    flat = flatten_dict(case.random, sep="/")
    for _ in range(3):
        direction = {p: np.float32(rng.standard_normal(g.shape)) for p, g in gradient.items()}
        there, back = (
            case.reference_params(
                unflatten_dict(
                    {p: v + sign * direction.get(p, 0) for p, v in flat.items()}, sep="/"
                )
            )
            for sign in (1, -1)
        )
        along = {path: (there[path] - back[path]) / 2 for path in at}
        ahead, behind = (
            np.sum(case.cotangent * reference({p: at[p] + sign * step * along[p] for p in at}))
            for sign in (1, -1)
        )
        products = [np.sum(np.float64(gradient[p]) * direction[p]) for p in gradient]
        size = np.linalg.norm([np.linalg.norm(gradient[p] * direction[p]) for p in gradient])
        expected = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(sum(products), expected, atol=3e-5 * size, rtol=0)


# --- merging ------------------------------------------------------------------------------------


def merges(name, backbone):
    model = cj.Adapted(module_of(name, backbone), small(name))
    return model.method.unmergeable(model.sites_of) is None


MERGED = [
    (name, backbone)
    for name, backbone in (
        *((name, backbone) for backbone in ("bert", "t5") for name in cj.presets()),
        *((name, "modernbert") for name in (*ON_MODERNBERT, *COMPILED_ON_MODERNBERT)),
        *((name, backbone) for name, backbone in NOT_COMPILED if backbone in ON_ENCODERS),
    )
    if merges(name, backbone)
]


@pytest.mark.parametrize(
    ("name", "backbone"), [slow_unless(case[1] == "bert", *case) for case in MERGED]
)
def test_the_merged_backbone_computes_the_same(name, backbone):
    module, method = module_of(name, backbone), small(name)
    if (name, backbone) in NOT_COMPILED:
        model = cj.Adapted(module, method)
        params = random_tree(adapted_shapes(model), seed=2)
        logits = model.apply({"params": params}, *inputs_of(module))
    else:
        case = case_of(name, backbone)
        model, params, logits = case.model, case.random, case.at_random[0]
    if (reason := ROWS[name].unmerged.get(backbone)) is not None:
        with pytest.raises(ValueError, match=reason):
            cj.merge_adapter(model, params)
        return
    merged = cj.merge_adapter(model, params)
    assert relative_difference(plain_program(module)(merged), logits) < 1e-5


@pytest.mark.parametrize(
    ("name", "backbone"),
    [(n, b) for n, b in MERGED if small(n).inserted() and b not in ROWS[n].unmerged],
)
def test_merging_keeps_the_dtypes_of_the_backbone(name, backbone):
    """The backbone is bfloat16, the adapters are float32."""
    model = cj.Adapted(module_of(name, backbone), small(name))
    shapes, own = map(flatten_dict, (adapted_shapes(model), backbone_of(model.backbone).params))
    narrow = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if path in own else leaf.dtype)
        for path, leaf in shapes.items()
    }
    merged = jax.eval_shape(functools.partial(cj.merge_adapter, model), unflatten_dict(narrow))
    merged = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten_dict(merged).items()}
    assert merged == {path: (leaf.shape, jnp.bfloat16) for path, leaf in own.items()}


# --- files --------------------------------------------------------------------------------------


@every_case
def test_files_hold_what_was_trained_and_what_the_backbone_lacks(name, backbone, tmp_path):
    case = case_of(name, backbone)
    labels = flatten_dict(case.labels, sep="/")
    check_files(case.model, case.backbone, case.second[2], labels, tmp_path)


@pytest.mark.slow
@every_saved
def test_start_and_files_of_the_others(name, backbone, tmp_path):
    backbone = backbone_of(module_of(name, backbone))
    model = cj.Adapted(backbone.module, small(name))
    params = cj.init_adapters(model, backbone, quick_key(1))
    logits = model.apply({"params": params}, *inputs_of(backbone.module))
    changed = relative_difference(logits, plain_logits(backbone.module))
    check_start(name, changed)
    labels = flatten_dict(cj.label_params(params, model.method), sep="/")
    flat, drawn = (flatten_dict(tree, sep="/") for tree in (params, random_tree(params, seed=2)))
    moved = {path: drawn[path] if labels[path] == "train" else leaf for path, leaf in flat.items()}
    check_files(model, backbone, unflatten_dict(moved, sep="/"), labels, tmp_path)


def check_files(model, backbone, params, labels, folder):
    """Checks that a saved adapter loads bit for bit on an equal backbone."""
    cj.save_adapter(folder, model, params)
    params, own = (flatten_dict(tree, sep="/") for tree in (params, backbone.params))
    stored = safetensors.numpy.load_file(weights_of(folder))
    trained = {path for path, label in labels.items() if label == "train"}
    assert stored.keys() == trained | (params.keys() - own.keys())
    fresh = types.SimpleNamespace(
        module=backbone.module.clone(), params=jax.tree.map(np.array, backbone.params)
    )
    loaded_model, loaded = cj.load_adapter(folder, fresh)
    assert loaded_model == model
    assert loaded_model.method == model.method
    loaded = flatten_dict(loaded, sep="/")
    assert loaded.keys() == params.keys()
    for path, leaf in params.items():
        assert np.asarray(loaded[path]).tobytes() == np.asarray(leaf).tobytes(), path


# --- ways to run --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_jit_changes_nothing(name):
    case = case_of(name, "bert")
    assert relative_difference(case.at_random[0], case.apply(case.random)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        *((name, backbone) for backbone in ("bert", "t5") for name in KINDS),
        *((name, "gated t5") for name in GATED),
    ],
)
def test_bfloat16_computes_on_float32_parameters(name, backbone):
    case = case_of(name, backbone)
    model = case.model.clone(backbone=case.backbone.module.clone(dtype=jnp.bfloat16))
    logits = model.apply({"params": case.random}, *case.inputs)
    at = unflatten_dict(case.reference_params(case.random), sep="/")
    expected = Reference(case.backbone.module, case.method, at)(*case.inputs)
    assert logits.dtype == jnp.bfloat16
    # About ten successive roundings of 2^-9 each; more through encoder and decoder.
    bound = 0.04 if backbone == "bert" else 0.06
    assert relative_difference(np.float32(logits), expected) < bound
    shapes = adapted_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


# --- counts -------------------------------------------------------------------------------------


@every_other
def test_counts_of_the_others(name, backbone):
    method, module = small(name), module_of(name, backbone)
    shapes = adapted_shapes(cj.Adapted(module, method))
    counted = cj.count(shapes, cj.label_params(shapes, method))
    sizes = sizes_of(module.config, backbone)
    assert counted.trained == ROWS[name].count(sizes) + sizes.head


@every_case
def test_counts(name, backbone):
    case, config = case_of(name, backbone), module_of(name, backbone).config
    sizes = sizes_of(config, backbone)
    counted = cj.count(case.params, case.labels)
    assert counted.trained == ROWS[name].count(sizes) + sizes.head
    own = sum(leaf.size for leaf in jax.tree.leaves(case.backbone.params))
    assert own == sizes.everything
    assert counted.total == sum(leaf.size for leaf in jax.tree.leaves(case.params))


def test_the_formulas_give_the_papers_counts():
    """T5-base with the vocabulary of its tokenizer; PHM-Adapter with 12 summands."""
    config = dataclasses.replace(PUBLISHED["t5-base"], vocab_size=32_100)
    settings = {"r": 24, "prompt": 100, "dimension": 20_000}
    sizes = {n: t5_sizes(config, dropped=(5, 5), n=n, **settings) for n in (4, 12)}
    expected = {
        ("full", 4): 222_882_048,
        ("houlsby", 4): 1_855_104,
        ("pfeiffer-attention", 4): 951_360,
        ("adapterdrop", 4): 1_101_984,
        ("low-rank", 4): 161_664,
        ("prompt-tuning-random", 4): 76_800,
        ("prompt-tuning-vocabulary", 4): 76_800,
        ("intrinsic-said", 4): 20_000,
        ("bitfit", 4): 280_932,
        ("phm", 12): 398_976,
        ("compacter", 4): 161_728,
        ("compacter++", 4): 104_704,
        ("compacter++-short", 4): 104_704,
        ("compacter", 12): 163_392,
        ("compacter++", 12): 106_368,
    }
    assert {(name, n): ROWS[name].count(sizes[n]) for name, n in expected} == expected
