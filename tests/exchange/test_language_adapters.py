"""Compares language adapters, and task adapters on their mixtures, with AdapterHub's `adapters`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.methods.invertible import Invertible
from tests.exchange.test_adapterhub import add, hub_model, inputs_of, logits, randomise, with_head
from tests.helpers import random_tree

adapters = pytest.importorskip("adapters")
torch = pytest.importorskip("torch")

from adapters.composition import Average, Stack  # noqa: E402 - after the check that it is there
from adapters.methods.modeling import NICECouplingBlock  # noqa: E402

TOLERANCE = 2e-5
LANGUAGES = ("en", "hi", "ar")
WEIGHTS = (0.5, 0.3, 0.2)


def test_the_coupling_is_that_of_adapters():
    """Outputs, inverses and gradients equal those of the block NICE."""
    width, config = 14, cj.InvertibleConfig(reduction_factor=3)
    layer = Invertible(config)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, width)))["params"]
    params = random_tree(shapes, seed=1)
    x, direction = np.random.default_rng(2).standard_normal((2, 2, 5, width)).astype(np.float32)
    block = NICECouplingBlock([[width]], reduction_factor=3)
    named = dict(block.named_parameters())
    paths = {
        f"{half}/{name}/{ours}": f"{half.upper()}.{number}.{theirs}"
        for half in "fg"
        for name, number in (("down", 0), ("up", 2))
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    flat = flatten_dict(params, sep="/")
    with torch.no_grad():
        for path, name in paths.items():
            named[name].copy_(torch.tensor(np.array(flat[path]).T))
    for method, rev in ((Invertible.__call__, False), (Invertible.inverse, True)):

        def loss(params, x, method=method):
            return (layer.apply({"params": params}, x, method=method) * direction).sum()

        own, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
        theirs = torch.tensor(x, requires_grad=True)
        block.zero_grad()
        y = block(theirs, rev=rev)
        (y * torch.tensor(direction)).sum().backward()
        ours = layer.apply({"params": params}, x, method=method)
        np.testing.assert_allclose(ours, y.detach(), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(of_x, theirs.grad, rtol=0, atol=TOLERANCE)
        for path, slope in flatten_dict(own, sep="/").items():
            expected = named[paths[path]].grad.numpy().T
            scale = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(slope, expected, rtol=0, atol=TOLERANCE * scale)


def settings(**changed):
    """Returns AdapterHub's settings of the authors' adapters in layers."""
    placed = {"original_ln_before": True, "original_ln_after": True, "residual_before_ln": True}
    return adapters.SeqBnConfig(
        **{"reduction_factor": 2, "non_linearity": "gelu"} | changed, **placed
    )


def test_a_task_on_a_mixture_of_languages(tmp_path):
    """Logits and gradients equal those of `Stack(Average(…, weights), "task")`."""
    backbone = with_head("token_classification", 4)
    model = hub_model(backbone, "BertForTokenClassification")
    for number, name in enumerate((*LANGUAGES, "task")):
        is_task = name == "task"
        changed = {"reduction_factor": 3, "non_linearity": "relu"} if is_task else {}
        model.add_adapter(name, config=settings(**changed))
        randomise(model, number, f".{name}.")
        model.save_adapter(str(tmp_path / name), name)
    # `adapters` divides the weighted sum of bottlenecks by their number once more.
    counted = [len(LANGUAGES) * weight for weight in WEIGHTS]
    mixture = Average(*LANGUAGES, weights=counted, normalize_weights=False)
    model.set_active_adapters(Stack(mixture, "task"))
    model.requires_grad_(True).eval()
    inputs = inputs_of(backbone)
    output = model(*map(torch.tensor, inputs)).logits
    direction = np.random.default_rng(3).standard_normal(output.shape).astype(np.float32)
    (output * torch.tensor(direction)).sum().backward()

    singles = {
        name: cj.import_adapterhub(tmp_path / name, backbone) for name in (*LANGUAGES, "task")
    }
    bank = cj.Bank(singles["en"][0].method, size=len(LANGUAGES))
    method = cj.Stack(bank, singles["task"][0].method, names=("language", "task"))
    ours = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(ours, backbone, jax.random.key(0))
    for number, name in enumerate(LANGUAGES):
        params = cj.set_member(ours, params, f"language/{number}", singles[name])
    params = cj.set_member(ours, params, "task", singles["task"])
    mix = np.tile(np.float32(WEIGHTS), (len(inputs[0]), 1))

    def loss(params):
        found = ours.apply({"params": params}, *map(jnp.asarray, inputs), mix=mix)
        return (found * direction).sum(), found

    (_, found), slopes = jax.value_and_grad(loss, has_aux=True, allow_int=True)(params)
    np.testing.assert_allclose(found, output.detach(), rtol=0, atol=TOLERANCE)
    named = dict(model.named_parameters())
    flat, compared = flatten_dict(slopes, sep="/"), 0
    for layer in range(backbone.module.config.num_hidden_layers):
        host = f"encoder/layer/{layer}/output"
        for part, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
            for number, name in enumerate((*LANGUAGES, "task")):
                stem = f"bert.{host.replace('/', '.')}.adapters.{name}.{theirs}.weight"
                path = "task" if name == "task" else "language"
                slope = flat[f"{host}/adapter/{path}/{part}/kernel"]
                slope = slope if name == "task" else slope[number]
                expected = named[stem].grad.numpy().T
                assert np.abs(expected).max() > 1e-3
                scale = max(1.0, np.abs(expected).max())
                np.testing.assert_allclose(slope, expected, rtol=0, atol=TOLERANCE * scale)
                compared += 1
    assert compared == 8 * backbone.module.config.num_hidden_layers


def test_an_imported_language_is_written_as_it_was(tmp_path):
    """The tensors of a folder with an invertible adapter come back bit for bit."""
    backbone = with_head("masked_lm")
    model = add(
        hub_model(backbone, "BertAdapterModel"), adapters.SeqBnInvConfig(reduction_factor=2)
    )
    model.save_adapter(str(tmp_path / "saved"), "a", use_safetensors=True)
    ours, params = cj.import_adapterhub(tmp_path / "saved", backbone, with_head=False)
    assert [part.kind for part in ours.method.inserted()] == ["bottleneck", "invertible"]
    cj.export_adapterhub(tmp_path / "written", ours, params, name="a", with_head=False)
    before, after = (
        cj.import_adapterhub(tmp_path / name, backbone, with_head=False)[1]
        for name in ("saved", "written")
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)
    without = unflatten_dict(
        {path: leaf for path, leaf in flatten_dict(params).items() if "f" not in path}
    )
    bare = cj.Adapted(ours.backbone, ours.method.parts[0])
    difference = logits(bare, without, inputs_of(backbone)) - logits(
        ours, params, inputs_of(backbone)
    )
    assert np.abs(difference).max() > 0.05
