"""Helpers of several test files: a small adapter, its float64 oracle, and a small backbone."""

import dataclasses
import functools
import importlib.metadata
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.compilation import initial_shapes
from compacter_jax.methods.bottleneck import Bottleneck, BottleneckConfig
from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.t5.checkpoint import t5_to_hugging_face
from compacter_jax.models.t5.config import T5Config


def weights_of(folder):
    """Returns the only file of weights in the folder of an adapter."""
    (path,) = folder.glob("adapter*.safetensors")
    return path


WIDTH = 12
# A bottleneck of 6 for a width of 12.
SMALL = {"reduction_factor": 2, "phm_dim": 3}
# Presets that represent all others; test_methods.py tests every preset.
SOME_PRESETS = ("full", "houlsby", "phm", "compacter", "compacter++")


class Model(nn.Module):
    """A single adapter; parameters that adapters share are at the top of its tree."""

    config: BottleneckConfig
    width: int = WIDTH
    dtype: object = None
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, deterministic=True):
        shared = self.config.shared(self.param, self.width, [], self.param_dtype)
        adapter = Bottleneck(self.config, self.dtype, self.param_dtype, name="adapter")
        return adapter(x, **shared, deterministic=deterministic)


def shapes_of(model):
    x = jax.ShapeDtypeStruct((1, model.width), jnp.float32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x)["params"], sep="/")


def random_params(model, seed=0):
    """Returns path -> float32 values that are large enough to give every parameter an effect."""
    rng = np.random.default_rng(seed)
    return {
        path: np.float32(path.endswith("scale") + 0.5 * rng.standard_normal(leaf.shape))
        for path, leaf in shapes_of(model).items()
    }


ACTIVATIONS = {
    "gelu": np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2)))),
    "gelu_new": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "tanh": np.tanh,
}


def projection(params, x, name):
    """Computes `x W + b` from parameters by name; `W` is dense or a sum of `np.kron`."""

    def stored(*places):
        return next((params[place] for place in places if place in params), None)

    own = f"adapter/{name}/"
    weight = stored(f"{own}kernel")
    if weight is None:
        blocks = stored(f"{own}blocks", f"phm_{name}_blocks")
        if blocks is None:
            left = stored(f"{own}left", f"phm_{name}_left")
            blocks = left @ stored(f"{own}right", f"phm_{name}_right")
        if blocks.ndim == 2:  # low rank
            return x @ blocks + params[f"{own}bias"]
        rule = stored(f"{own}phm_rule", "phm_rule")
        if rule is None:
            left = stored(f"{own}phm_rule_left", "phm_rule_left")
            rule = left @ stored(f"{own}phm_rule_right", "phm_rule_right")
        weight = sum(np.kron(A, B) for A, B in zip(rule, blocks, strict=True))
    return x @ weight + params[f"{own}bias"]


def layer_norm(params, x, name):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * params[f"adapter/{name}/scale"] + params[f"adapter/{name}/bias"]


def adapter_update(config, params, x):
    """Computes the update that an adapter adds to the residual."""
    h = layer_norm(params, x, "layer_norm_before") if config.layer_norm_before else x
    h = ACTIVATIONS[config.non_linearity](projection(params, h, "down"))
    h = projection(params, h, "up")
    h = layer_norm(params, h, "layer_norm_after") if config.layer_norm_after else h
    return config.scaling * h


def expected_output(config, params, x):
    return x + adapter_update(config, params, x)


def expected_gradients(config, params, x, cotangent):
    """Computes gradients by central differences in float64, one entry of a parameter at a time."""
    step = 1e-5

    def objective(operands):
        return np.sum(cotangent * expected_output(config, operands, operands["x"]))

    operands = {path: np.float64(value) for path, value in (*params.items(), ("x", x))}
    gradients = {path: np.zeros(value.shape) for path, value in operands.items()}
    for path, value in operands.items():
        for index in np.ndindex(value.shape):
            there = {}
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * step
                there[sign] = objective({**operands, path: moved})
            gradients[path][index] = (there[1] - there[-1]) / (2 * step)
    return gradients


KNOBS = {
    "dense": ("houlsby", {}),
    "dense, reduction of 3, relu": ("houlsby", {"reduction_factor": 3, "non_linearity": "relu"}),
    "dense, layer norms": ("houlsby", {"layer_norm_before": True, "layer_norm_after": True}),
    "compacter": ("compacter", {}),
    "rank three": ("compacter", {"phm_rank": 3}),
    "exact gelu": ("compacter", {"non_linearity": "gelu"}),
    "silu": ("compacter", {"non_linearity": "silu"}),
    "scaled": ("compacter", {"scaling": -0.7, "non_linearity": "tanh"}),
    "layer norm before": ("compacter", {"layer_norm_before": True}),
    "layer norm after, scaled": ("compacter", {"layer_norm_after": True, "scaling": 0.3}),
    "full blocks, shared rule": ("compacter", {"factorized_phm_W": False}),
    "own rules": ("compacter", {"shared_phm_rule": False}),
    "own rules, factorized": ("compacter", {"shared_phm_rule": False, "factorized_phm_rule": True}),
    "shared rule, factorized": ("compacter", {"factorized_phm_rule": True}),
    "shared blocks": ("compacter", {"shared_W_phm": True}),
    "shared full blocks": ("compacter", {"shared_W_phm": True, "factorized_phm_W": False}),
    "shared blocks, own rules": ("compacter", {"shared_W_phm": True, "shared_phm_rule": False}),
    "PHM-Adapter": ("phm", {}),
    # These options change the trained parameters, not the output.
    "rule not learned": ("compacter", {"learn_phm": False}),
    "low rank": ("low-rank", {}),
    "low rank, of three": ("low-rank", {"rank": 3}),
}


def method_of(knob):
    name, overrides = KNOBS[knob]
    small = SMALL if name in ("compacter", "phm") else {"reduction_factor": 2}
    return preset(name, **(small | overrides))


def random_states(seed):
    return np.float32(np.random.default_rng(seed).standard_normal((2, 2, WIDTH)))


def output_and_gradients(model, params, x, cotangent):
    """Returns the output and the gradients by path; "x" is the gradient to the input."""

    @jax.jit
    def run(params, x):
        def apply(params, x):
            return model.apply({"params": unflatten_dict(params, sep="/")}, x)

        y, pull_back = jax.vjp(apply, params, x)
        return y, *pull_back(cotangent)

    y, gradients, x_gradient = run(params, x)
    return y, {**gradients, "x": x_gradient}


def assert_equal_to_rounding(actual, expected):
    """Checks float32 values against float64.

    Each entry is a sum of at most about 50 products. They may cancel, so the bound is relative to
    the largest entry of the array; gradients pass through twice as many sums.
    """
    (y, gradients), (expected_y, expected) = actual, expected
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=1e-5 * np.abs(expected_y).max())
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        scale = np.abs(expected[path]).max()
        assert scale > 0, path
        np.testing.assert_allclose(
            gradient, expected[path], rtol=0, atol=3e-5 * scale, err_msg=path
        )


TINY_BERT = BertConfig(
    vocab_size=17,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=10,
    max_position_embeddings=9,
    hidden_act="gelu",
    # Large enough that attention is not uniform and every parameter has an effect.
    initializer_range=0.3,
)
ONE_LAYER = dataclasses.replace(TINY_BERT, num_hidden_layers=1)
IDS = np.array([[3, 5, 1, 7, 2], [4, 4, 6, 9, 12]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

# The heads do not divide the width, and distances exceed the last bucket.
TINY_T5 = T5Config(
    vocab_size=19,
    d_model=WIDTH,
    d_kv=5,
    d_ff=14,
    num_layers=2,
    num_decoder_layers=1,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
)


def t5_inputs(seed, config, length=None):
    """Returns ids and masks of encoder and decoder: padding on the left, on the right, and none."""
    rng = np.random.default_rng(seed)
    inputs = []
    for tokens in (length or int(rng.integers(7, 14)), int(rng.integers(5, 12))):
        ids = rng.integers(0, config.vocab_size, (3, tokens))
        mask = np.ones((3, tokens), np.int64)
        mask[rng.integers(3), tokens - 2 :] = 0
        mask[rng.integers(3), :2] = 0
        inputs += [ids, mask]
    if not importlib.metadata.version("transformers").startswith("4."):
        # A query that attends to nothing would send no gradient to the position biases.
        inputs[3][:, :2] = 1
    return inputs


def torch_t5(module, params, family="T5"):
    """Returns transformers' PyTorch model with the same weights; `family` is "T5" or "MT5"."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = {None: "Model", "encoder": "EncoderModel"}.get(module.head, "ForConditionalGeneration")
    config = getattr(transformers, f"{family}Config")(**dataclasses.asdict(module.config))
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    tensors = {name: torch.tensor(t) for name, t in t5_to_hugging_face(params).items()}
    if "lm_head.weight" in tensors:
        # transformers 5 ties the head to the embedding, whatever the configuration says.
        model.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"])
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    copies = {"lm_head.weight"} - tensors.keys()
    assert set(missing) <= copies | {f"{s}.embed_tokens.weight" for s in ("encoder", "decoder")}
    return model


def torch_t5_outputs(model, inputs):
    """Returns the logits, or the states of decoder and encoder, as PyTorch tensors."""
    import torch

    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    output = model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=False)})
    if hasattr(output, "logits"):
        return [output.logits]
    states = [output.last_hidden_state]
    return states + ([output.encoder_last_hidden_state] if len(inputs) > 2 else [])


def mean_square(outputs):
    """Returns the mean of squares of arrays or tensors, so that gradients are of order one."""
    return sum((y**2).mean() for y in outputs) / len(outputs)


def random_tree(shapes, seed=0):
    """Draws normal values for a tree of shapes; scales are about 1."""
    flat = flatten_dict(shapes, sep="/")
    rng = np.random.default_rng(seed)
    return unflatten_dict(
        {
            path: jnp.asarray(
                path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype
            )
            for path, leaf in flat.items()
        },
        sep="/",
    )


def backbone_of(module, seed=0):
    """Returns `module` with random parameters, in the form that `init_adapters` takes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    return types.SimpleNamespace(module=module, params=random_tree(shapes, seed))


def adapted_shapes(model):
    """Returns the shapes of the parameters of an `Adapted`."""
    return unflatten_dict(initial_shapes(model), sep="/")


# Tests spend more time on compilation than on computation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def quick_key(seed):
    """Returns a key whose random draws compile in a fraction of the default's time."""
    return jax.random.key(seed, impl="unsafe_rbg")


def assert_equal_trees(ours, theirs):
    """Checks that paths, types and bits are the same."""
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype, path
        assert np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes(), path
