"""Tests adapters on T5: the paper's equations in PyTorch, placement, and trained parameters."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.checkpoint import load_adapter, save_adapter
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig, build_weights
from compacter_jax.models.loading import module_from_name
from compacter_jax.models.t5.model import T5
from compacter_jax.params import count, label_params, merge, optimizer, partition
from tests.helpers import (
    KNOBS,
    SMALL,
    SOME_PRESETS,
    TINY_T5,
    Model,
    adapted_shapes,
    backbone_of,
    expected_output,
    mean_square,
    method_of,
    quick_jit,
    quick_key,
    random_params,
    random_states,
    random_tree,
    shapes_of,
    t5_inputs,
    torch_t5,
    torch_t5_outputs,
)
from tests.hosts import assert_same, run, split

GATED = dataclasses.replace(TINY_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
ONE_LAYER = dataclasses.replace(TINY_T5, num_layers=1)
EVERYWHERE = ("attention", "cross_attention", "feed_forward")


def small(name, **overrides):
    sizes = {"full": {}, "houlsby": {"reduction_factor": 2}}
    return preset(name, **(sizes.get(name, SMALL) | overrides))


# --- where they sit -----------------------------------------------------------------------------

PLACES = {
    "attention": {"encoder": "layer/0/SelfAttention/o", "decoder": "layer/0/SelfAttention/o"},
    "cross_attention": {"decoder": "layer/1/EncDecAttention/o"},
    "feed_forward": {
        "encoder": "layer/1/DenseReluDense/wo",
        "decoder": "layer/2/DenseReluDense/wo",
    },
}


def hosts_of(config, method):
    """Returns the paths of the modules whose output is adapted."""
    layers = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    return {
        f"{stack}/block/{i}/{place}"
        for site in method.sites
        for stack, place in PLACES[site].items()
        for i in range(layers[stack])
        if i not in method.leave_out
    }


HOSTS = {
    "compacter": {
        "encoder/block/0/layer/0/SelfAttention/o",
        "encoder/block/0/layer/1/DenseReluDense/wo",
        "encoder/block/1/layer/0/SelfAttention/o",
        "encoder/block/1/layer/1/DenseReluDense/wo",
        "decoder/block/0/layer/0/SelfAttention/o",
        "decoder/block/0/layer/2/DenseReluDense/wo",
    },
    "compacter++": {
        "encoder/block/0/layer/1/DenseReluDense/wo",
        "encoder/block/1/layer/1/DenseReluDense/wo",
        "decoder/block/0/layer/2/DenseReluDense/wo",
    },
}
HOSTS |= dict.fromkeys(("phm", "houlsby"), HOSTS["compacter"])
LEAVES = {
    "compacter": {"left": (3, 0, 1), "right": (3, 1, 0), "bias": (0,)},
    "phm": {"phm_rule": (3, 3, 3), "blocks": (3, 0, 0), "bias": (0,)},
    "houlsby": {"kernel": (0, 0), "bias": (0,)},
}


@pytest.mark.parametrize(("name", "remat"), [*((name, "off") for name in HOSTS), ("phm", "full")])
def test_every_new_parameter(name, remat):
    shapes = adapted_shapes(Adapted(T5(GATED, remat=remat), small(name)))
    own, new = split(shapes)
    plain = backbone_of(T5(GATED)).params
    assert own.keys() == flatten_dict(plain, sep="/").keys()
    leaves = LEAVES["compacter" if name == "compacter++" else name]
    expected = {
        f"{host}/adapter/{projection}/{leaf}"
        for host in HOSTS[name]
        for projection in ("down", "up")
        for leaf in leaves
    } | ({"phm_rule"} if "left" in leaves else set())
    assert new.keys() == expected
    for path, leaf in new.items():
        assert len(leaf.shape) == len(leaves.get(path.split("/")[-1], (3, 3, 3)))
    assert hosts_of(GATED, small(name)) == HOSTS[name]


@pytest.mark.parametrize(
    ("head", "overrides", "message"),
    [
        ("encoder", {"sites": ("cross_attention",)}, "unknown site 'cross_attention'; T5 has"),
        (None, {"sites": ("pooler",)}, "unknown site 'pooler'; T5 has attention, cross_att"),
        (None, {"leave_out": (2,)}, r"leave_out has \[2\], but site 'attention' has layers 0 to 1"),
        (None, {"leave_out": (0, 1)}, r"leave_out leaves no layer of site 'attention'"),
    ],
)
def test_places_that_are_not_there(head, overrides, message):
    with pytest.raises(ValueError, match=message):
        adapted_shapes(Adapted(T5(GATED, head=head), small("compacter", **overrides)))


# --- the paper's equations, in PyTorch ----------------------------------------------------------


def adapt(model, method, config, leaves):
    """Adds hooks to the PyTorch T5 that adapt outputs before dropout and residual, with one rule.

    `x + up(gelu_new(down(x)))`, `W = sum_i A_i (x) B_i` and `B_i = left_i right_i`, equations 3
    to 5 of arXiv:2106.04647; `leaves` are tensors by path.
    """
    import torch

    def project(x, own):
        if f"{own}/kernel" in leaves:
            return x @ leaves[f"{own}/kernel"] + leaves[f"{own}/bias"]
        if f"{own}/blocks" in leaves:
            rule, blocks = leaves[f"{own}/phm_rule"], leaves[f"{own}/blocks"]
        else:
            rule = leaves["phm_rule"]
            blocks = torch.bmm(leaves[f"{own}/left"], leaves[f"{own}/right"])
        weight = sum(torch.kron(A, B) for A, B in zip(rule, blocks, strict=True))
        return x @ weight + leaves[f"{own}/bias"]

    def adapter(host, x):
        h = project(x, f"{host}/adapter/down")
        h = 0.5 * h * (1 + torch.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return x + project(h, f"{host}/adapter/up")

    def hook(host, _module, _inputs, output):
        if isinstance(output, tuple):  # attention also returns the position bias
            return (adapter(host, output[0]), *output[1:])
        return adapter(host, output)

    modules = dict(model.named_modules())
    for host in hosts_of(config, method):
        if host.rsplit("/", 1)[0].replace("/", ".") in modules:
            module = modules[host.rsplit("/", 1)[0].replace("/", ".")]
            module.register_forward_hook(functools.partial(hook, host))


CASES = {
    "compacter, cross-attention too, untied": (
        dataclasses.replace(GATED, num_layers=1),
        "conditional_generation",
        small("compacter", sites=EVERYWHERE),
    ),
    "compacter++, a layer left out, tied": (
        TINY_T5,
        "conditional_generation",
        small("compacter++", leave_out=(1,), phm_rank=2),
    ),
    "PHM-Adapter": (ONE_LAYER, None, small("phm")),
    "Adapter": (dataclasses.replace(GATED, num_layers=1), None, small("houlsby")),
    "compacter on an encoder": (GATED, "encoder", small("compacter")),
}


@pytest.mark.parametrize(
    ("seed", "config", "head", "method"),
    [(seed, *case) for seed, case in enumerate(CASES.values())],
    ids=CASES,
)
def test_outputs_and_gradients_equal_the_papers_equations(seed, config, head, method):
    torch = pytest.importorskip("torch")
    model = Adapted(T5(config, head=head), method)
    params = random_tree(adapted_shapes(model), seed)
    plain, new = split(params)
    inputs = t5_inputs(seed, config)[: 2 if head == "encoder" else 4]

    twin = torch_t5(model.backbone, unflatten_dict(plain, sep="/"))
    before = torch_t5_outputs(twin, inputs)
    leaves = {p: torch.tensor(np.asarray(leaf), requires_grad=True) for p, leaf in new.items()}
    adapt(twin, method, config, leaves)
    theirs = torch_t5_outputs(twin, inputs)
    mean_square(theirs).backward()

    trained, frozen = partition(params, label_params(params, method))

    def loss(trained):
        output = model.apply({"params": merge(trained, frozen)}, *inputs)
        return mean_square(jax.tree.leaves(output)), output

    gradient, output = quick_jit(jax.grad(loss, has_aux=True))(trained)
    for a, b, c in zip(jax.tree.leaves(output), theirs, before, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5, rtol=0)
        assert np.abs(a - c.detach().numpy()).max() > 0.1  # the adapters have an effect

    ours = {p: g for p, g in flatten_dict(gradient, sep="/").items() if g is not None}
    named = {
        name.replace(".", "/").removesuffix("weight") + "scale": p.grad
        for name, p in twin.named_parameters()
        if "layer_norm" in name
    } | {path: leaf.grad for path, leaf in leaves.items()}
    assert ours.keys() == named.keys()
    for name, g in ours.items():
        scale = named[name].abs().max().item()
        assert scale > 1e-5, name
        # Sums over all tokens: some hundred float32 products, some of which cancel.
        np.testing.assert_allclose(g, named[name].numpy(), atol=5e-5 * scale, rtol=0, err_msg=name)


# --- counts, and what a step moves --------------------------------------------------------------

LAYER_NORMS = 47_616


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("compacter", 161_728),
        ("compacter++", 104_704),
        ("phm", 398_976),
        ("houlsby", 1_855_104),
        ("full", 222_903_552),
    ],
)
def test_the_papers_counts(name, trained):
    """Counts the parameters of T5-base from its configuration alone."""
    method = preset(name)
    shapes = adapted_shapes(Adapted(module_from_name("t5-base"), method))
    counted = count(shapes, label_params(shapes, method))
    assert counted.trained == trained
    added = sum(counted.groups.get(group, (0, 0))[1] for group in ("adapters", "rule"))
    assert counted.total - added == 222_903_552
    if name != "full":
        assert counted.groups["layer norms"] == (LAYER_NORMS, LAYER_NORMS)
        assert trained - added == LAYER_NORMS
        assert counted.groups["backbone"][0] == 0


def found_by(words, paths):
    return {path for path in paths if any(word in path for word in words)}


@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, "conditional_generation") for name in SOME_PRESETS), ("compacter", "encoder")],
)
def test_what_each_preset_trains(name, head):
    """A language-modelling head belongs to the backbone: only full fine-tuning trains it."""
    method = small(name)
    shapes = adapted_shapes(Adapted(T5(GATED, head=head), method))
    labels = flatten_dict(label_params(shapes, method), sep="/")
    words = ("",) if name == "full" else ("/adapter/", "phm_rule", "layer_norm")
    expected = found_by(words, labels)
    assert {path for path, label in labels.items() if label == "train"} == expected
    norms = found_by(("layer_norm",), labels)
    assert len(norms) == 2 * 2 + 1 + (3 + 1 if head != "encoder" else 0)


@pytest.fixture(scope="module")
def tiny():
    """Returns an adapted model, its random parameters, and inputs."""
    config = dataclasses.replace(GATED, num_layers=1, num_decoder_layers=2)
    model = Adapted(T5(config), small("compacter", sites=EVERYWHERE))
    return model, random_tree(adapted_shapes(model), 3), t5_inputs(7, config)


def test_a_step_moves_the_trained_leaves_alone(tiny):
    model, params, inputs = tiny
    labels = label_params(params, model.method)
    tx = optimizer(optax.adamw(1e-2, weight_decay=0.1), labels)
    targets = np.roll(inputs[2], -1, axis=1)

    @quick_jit
    def step(params):
        trained, frozen = partition(params, labels)

        def loss(trained):
            logits = model.apply({"params": merge(trained, frozen)}, *inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return (losses * inputs[3]).sum() / inputs[3].sum()

        gradient = jax.grad(loss)(trained)
        updates, _ = tx.update(gradient, tx.init(trained), trained)
        return gradient, merge(optax.apply_updates(trained, updates), frozen)

    gradient, new = step(params)
    old, new = flatten_dict(params, sep="/"), flatten_dict(new, sep="/")
    moved = {path for path in old if np.any(old[path] != new[path])}
    assert moved == found_by(("/adapter/", "phm_rule", "layer_norm"), old)
    for path in old.keys() - moved:
        assert np.asarray(old[path]).tobytes() == np.asarray(new[path]).tobytes()
    # Every trained leaf has a gradient, so it does not move by weight decay alone.
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(gradient))
    assert len(jax.tree.leaves(gradient)) == len(moved)


# --- what they leave alone ----------------------------------------------------------------------


def test_initial_values_of_the_backbone_are_its_own():
    backbone = T5(ONE_LAYER, head="encoder")
    model = Adapted(backbone, small("compacter"))
    inputs, key = backbone.dummy_inputs(), quick_key(3)
    plain = quick_jit(backbone.init)(key, *inputs)["params"]
    own, new = split(quick_jit(model.init)(key, *inputs)["params"])
    assert_same(own, flatten_dict(plain, sep="/"))
    assert {path for path in new if "/" not in path} == {"phm_rule"}


def test_dropout_of_the_backbone_is_its_own():
    """Adapters that add exactly zero, with dropout inside, change no bit."""
    backbone = T5(ONE_LAYER, head="encoder")
    model = Adapted(backbone, small("compacter", scaling=0.0, dropout=0.5))
    params = random_tree(adapted_shapes(model))
    plain = unflatten_dict(split(params)[0], sep="/")
    ids, rngs = t5_inputs(0, ONE_LAYER)[0], {"dropout": quick_key(5)}
    # Not compiled: the same operations in the same order allow a comparison of every bit.
    expected = backbone.apply({"params": plain}, ids, deterministic=False, rngs=rngs)
    assert_same(model.apply({"params": params}, ids, deterministic=False, rngs=rngs), expected)
    still = backbone.apply({"params": plain}, ids)
    assert np.abs(still - expected).max() > 0.1


def test_remat_changes_no_number():
    model = Adapted(T5(ONE_LAYER, head="encoder"), small("compacter", shared_W_phm=True))
    params, (ids, mask, _, _) = random_tree(adapted_shapes(model)), t5_inputs(1, ONE_LAYER)
    outcomes = []
    for remat in ("off", "full", "dots"):
        rematted = model.clone(backbone=model.backbone.clone(remat=remat))

        def loss(params, model=rematted):
            return mean_square([model.apply({"params": params}, ids, mask)])

        outcomes.append(jax.tree.leaves(quick_jit(jax.value_and_grad(loss))(params)))
    for leaves in zip(*outcomes, strict=True):
        for again in leaves[1:]:
            # The same operations, fused in another way.
            atol = 1e-6 + 2e-5 * np.abs(leaves[0]).max()
            np.testing.assert_allclose(again, leaves[0], rtol=0, atol=atol)


# --- the parts of a call, and built weights -----------------------------------------------------


def method_call(model, name):
    return quick_jit(functools.partial(model.apply, method=name))


@pytest.fixture(scope="module")
def parts(tiny):
    """Returns the logits of a call, and the states of the encoder."""
    model, params, (ids, mask, decoder_ids, _) = tiny
    logits = run(model, params, ids, mask, decoder_ids)
    return logits, method_call(model, "encode")({"params": params}, ids, mask)


def test_encoding_and_decoding_are_the_parts_of_a_call(tiny, parts):
    model, params, (ids, mask, decoder_ids, _) = tiny
    logits, states = parts
    decoded = method_call(model, "decode")({"params": params}, decoder_ids, states, mask)
    np.testing.assert_allclose(decoded, logits, atol=1e-5, rtol=0)
    # Encoder and decoder both use their adapters.
    plain = unflatten_dict(split(params)[0], sep="/")
    bare = method_call(model.backbone, "encode")({"params": plain}, ids, mask)
    assert np.abs(bare - states).max() > 0.1
    bare = method_call(model.backbone, "decode")({"params": plain}, decoder_ids, states, mask)
    assert np.abs(bare - logits).max() > 0.1


@pytest.mark.parametrize("build", [False, True])
def test_decoding_with_a_cache_equals_decoding_at_once(tiny, parts, build):
    model, params, (_, mask, decoder_ids, _) = tiny
    logits, states = parts
    if build:
        model, params = model.precomputed(params)
        assert type(model.method) is BottleneckConfig
        assert model.method.sites == EVERYWHERE
        assert "phm_rule" not in params
        assert {path.split("/")[-1] for path in split(params)[1]} == {"kernel", "bias"}
    length = decoder_ids.shape[1]
    start = quick_jit(
        lambda params, states: model.apply({"params": params}, states, length, method="start_cache")
    )
    cache = start(params, states)

    @quick_jit
    def step(cache, ids, index):
        options = {"attention_mask": mask, "cache": cache, "index": index}
        return model.apply({"params": params}, ids, **options, method="decode")

    for i in range(length):
        y, cache = step(cache, decoder_ids[:, i : i + 1], i)
        np.testing.assert_allclose(y[:, 0], logits[:, i], atol=1e-5, rtol=0, err_msg=f"token {i}")


@pytest.mark.parametrize("knob", KNOBS)
def test_built_weights_equal_the_kronecker_sums(knob):
    method = method_of(knob)
    if not isinstance(method, PHMBottleneckConfig):
        model = Adapted(T5(TINY_T5), method)
        params = {"nothing": "to build"}
        assert model.precomputed(params) == (model, params)
        assert model.precomputed(params)[1] is params
        return
    params, x = random_params(Model(method)), random_states(4)
    built = build_weights(unflatten_dict(params, sep="/"), [".*"])
    twin = Model(method.dense_equivalent())
    shapes = {path: leaf.shape for path, leaf in shapes_of(twin).items()}
    assert {path: leaf.shape for path, leaf in flatten_dict(built, sep="/").items()} == shapes
    expected = expected_output(method, {p: np.float64(leaf) for p, leaf in params.items()}, x)
    assert np.abs(expected - x).max() > 0.1
    # Float32 compared with float64; sums of about 50 products.
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(twin.apply({"params": built}, x), expected, atol=bound, rtol=0)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("compacter", "conditional_generation"),
        ("phm", None),
        ("houlsby", "encoder"),
        ("full", "encoder"),
    ],
)
def test_adapters_survive_a_round_trip(tmp_path, name, head):
    backbone = backbone_of(T5(GATED, head=head))
    model = Adapted(backbone.module, small(name))
    trained = flatten_dict(random_tree(adapted_shapes(model), 1), sep="/")
    labels = flatten_dict(label_params(adapted_shapes(model), model.method), sep="/")
    own = flatten_dict(backbone.params, sep="/")
    params = {path: own[path] if labels[path] == "freeze" else trained[path] for path in trained}
    save_adapter(tmp_path, model, unflatten_dict(params, sep="/"))
    loaded_model, loaded = load_adapter(tmp_path, backbone)
    assert loaded_model == model
    loaded = flatten_dict(loaded, sep="/")
    assert loaded.keys() == params.keys()
    for path, leaf in params.items():
        assert np.asarray(loaded[path]).tobytes() == np.asarray(leaf).tobytes(), path
    other = backbone_of(backbone.module, seed=9)
    if name != "full":
        with pytest.raises(ValueError, match="was made for a backbone with the hash"):
            load_adapter(tmp_path, other)


def test_adapters_of_another_head(tmp_path):
    backbone = backbone_of(T5(ONE_LAYER))
    model = Adapted(backbone.module, small("compacter"))
    save_adapter(tmp_path, model, init_adapters(model, backbone, quick_key(0)))
    with pytest.raises(
        ValueError, match=r"head='conditional_generation', but the .* head='encoder'"
    ):
        load_adapter(tmp_path, backbone_of(T5(ONE_LAYER, head="encoder")))
