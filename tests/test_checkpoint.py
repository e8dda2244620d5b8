"""Saves and loads adapters, refuses those that do not fit, and interrupts writing."""

import ast
import dataclasses
import json
import os
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from compacter_jax import checkpoint
from compacter_jax.adapter_files import CONFIG_NAME, read_adapter_config
from compacter_jax.catalogue import preset
from compacter_jax.checkpoint import hash_params, load_adapter, save_adapter
from compacter_jax.inject.adapted import Adapted
from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.encoder import HEADS
from compacter_jax.params import label_params
from tests.helpers import (
    ONE_LAYER,
    SMALL,
    SOME_PRESETS,
    adapted_shapes,
    backbone_of,
    random_tree,
    weights_of,
)

SIZES = {"full": {}, "houlsby": {"reduction_factor": 2}}
HEAD = "sequence_classification"


def small(name, **overrides):
    return preset(name, **(SIZES.get(name, SMALL) | overrides))


def bert(config=ONE_LAYER, **settings):
    return Bert(config, **({"head": HEAD} | settings))


def fine_tuned(backbone, method, seed=1):
    """Returns a model, its backbone's parameters, and random values for all trained parameters."""
    model = Adapted(backbone.module, method)
    params = flatten_dict(random_tree(adapted_shapes(model), seed), sep="/")
    own = flatten_dict(backbone.params, sep="/")
    labels = flatten_dict(label_params(adapted_shapes(model), method), sep="/")
    kept = {path: own[path] for path in own if labels[path] == "freeze" and path[:6] != "classi"}
    return model, unflatten_dict({**params, **kept}, sep="/")


def assert_same(actual, expected):
    """Checks that structure, dtypes and bits are the same."""
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype, path
        assert np.asarray(actual[path]).tobytes() == np.asarray(leaf).tobytes(), path


METHODS = {name: small(name) for name in SOME_PRESETS} | {
    "rule frozen": small("compacter", learn_phm=False),
    "own rules frozen": small("phm", learn_phm=False),
    "layer norms and head frozen": small("compacter", train_layer_norms=False, train_head=False),
    "pooler": small("compacter++", train_pooler=True),
    "shared blocks": small("compacter", shared_W_phm=True, factorized_phm_rule=True),
}


@pytest.fixture(scope="module")
def backbone():
    return backbone_of(bert())


@pytest.fixture
def saved(tmp_path, backbone):
    """Saves an adapter; returns the folder and its contents."""
    model, params = fine_tuned(backbone, METHODS["compacter"])
    save_adapter(tmp_path, model, params, metadata={"labels": ["no", "yes"]})
    return types.SimpleNamespace(path=tmp_path, model=model, params=params)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_round_trip_is_exact(tmp_path, backbone, method):
    model, params = fine_tuned(backbone, method)
    save_adapter(tmp_path / "made" / "for it", model, params)
    loaded_model, loaded = load_adapter(tmp_path / "made" / "for it", backbone)
    assert loaded_model == model
    assert_same(loaded, params)


@pytest.mark.parametrize("head", HEADS)
def test_round_trip_with_every_head(tmp_path, head):
    backbone = backbone_of(bert(head=head))
    model, params = fine_tuned(backbone, METHODS["compacter"])
    save_adapter(tmp_path, model, params)
    assert_same(load_adapter(tmp_path, backbone)[1], params)


def test_round_trip_in_bfloat16(tmp_path):
    backbone = backbone_of(bert(param_dtype=jnp.bfloat16))
    model, params = fine_tuned(backbone, METHODS["compacter"])
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_adapter(tmp_path, model, params)
    loaded = load_adapter(tmp_path, backbone)[1]
    # The same numbers, in the dtypes of the model.
    assert_same(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded), params)
    own = adapted_shapes(model)
    assert jax.tree.map(lambda leaf: leaf.dtype, loaded) == jax.tree.map(lambda x: x.dtype, own)


def test_round_trip_with_sites_of_the_callers(tmp_path, backbone):
    sites = {"feed_forward": r"encoder/layer/(?P<layer>\d+)/intermediate/dense"}
    method = small("compacter++", reduction_factor=1, phm_dim=2)
    model = Adapted(backbone.module, method, sites)
    new = random_tree(adapted_shapes(model))
    params = unflatten_dict({**flatten_dict(new), **flatten_dict(backbone.params)})
    save_adapter(tmp_path, model, params)
    loaded_model, loaded = load_adapter(tmp_path, backbone)
    assert dict(loaded_model.sites) == sites
    assert_same(loaded, params)


@pytest.mark.parametrize("name", ["compacter", "rule frozen", "own rules frozen", "pooler"])
def test_what_is_stored(tmp_path, backbone, name):
    """An adapter stores only trained parameters and those that the checkpoint lacks."""
    model, params = fine_tuned(backbone, METHODS[name])
    save_adapter(tmp_path, model, params)
    stored = load_file(weights_of(tmp_path))
    expected = {
        path
        for path in flatten_dict(params, sep="/")
        if "/adapter/" in path or "phm_rule" in path or "LayerNorm" in path
        if not path.startswith("cls")
    } | {"classifier/kernel", "classifier/bias"}
    if name == "pooler":
        expected |= {"pooler/dense/kernel", "pooler/dense/bias"}
    assert stored.keys() == expected
    names = [weights_of(tmp_path).name, CONFIG_NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert read_adapter_config(tmp_path)["weights"] == names[0]
    assert re.fullmatch(r"adapter-[0-9a-f]{16}\.safetensors", names[0])


def test_metadata_and_settings(saved):
    settings = read_adapter_config(saved.path)
    assert settings["labels"] == ["no", "yes"]
    assert settings["format_version"] == 1
    assert (settings["head"], settings["num_labels"]) == (HEAD, 2)
    assert settings["method"]["kind"] == "phm_bottleneck"


def test_metadata_may_not_replace_the_librarys_own(tmp_path, saved):
    with pytest.raises(ValueError, match=r"metadata must not have the key \['head', 'method'\]"):
        save_adapter(tmp_path / "new", saved.model, saved.params, metadata={"method": 1, "head": 2})
    assert not (tmp_path / "new").exists()


def test_metadata_that_is_no_json_leaves_nothing(tmp_path, saved):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_adapter(tmp_path / "new", saved.model, saved.params, metadata={"labels": {1, 2}})
    assert not (tmp_path / "new").exists()


def test_files_are_the_same_each_time(tmp_path, saved):
    save_adapter(tmp_path / "again", saved.model, saved.params, metadata={"labels": ["no", "yes"]})
    for name in (weights_of(saved.path).name, CONFIG_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (saved.path / name).read_bytes()


@pytest.mark.parametrize(("name", "limit"), [("compacter++", 80_000), ("compacter", 115_000)])
def test_an_adapter_of_minilm_is_small(tmp_path, monkeypatch, name, limit):
    """Compacter++ has 17,946 numbers of four bytes, including head and layer norms."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = Adapted(bert(config), preset(name))
    # Broadcast, so that frozen weights take no memory. Their hash does not matter here.
    params = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0.5), leaf.shape), adapted_shapes(model)
    )
    monkeypatch.setattr(checkpoint, "hash_params", lambda params: "0" * 64)
    monkeypatch.setattr(
        "safetensors.flax.save",
        lambda leaves, save=checkpoint.safetensors.flax.save: save(jax.tree.map(jnp.array, leaves)),
    )
    save_adapter(tmp_path, model, params)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < limit < 200_000


# --- The hash -----------------------------------------------------------------------------------


def test_hash_is_of_values_rounded_to_bfloat16():
    rng = np.random.default_rng(0)
    rounded = jnp.asarray(rng.standard_normal((3, 5)), jnp.bfloat16)
    exact = {"a/b": rounded.astype(jnp.float32), "c": jnp.ones(2)}
    assert hash_params(exact) == hash_params({**exact, "a/b": rounded})
    assert hash_params(exact) == hash_params(dict(reversed(exact.items())))
    assert hash_params(exact) == hash_params({path: np.asarray(v) for path, v in exact.items()})
    others = [
        {**exact, "a/b": rounded.at[1, 2].add(1)},
        {**exact, "a/b": rounded.T},
        {**exact, "a/b": rounded.reshape(5, 3)},
        {"a/c": exact["a/b"], "c": exact["c"]},
        {"a/b": exact["a/b"]},
    ]
    hashes = {hash_params(other) for other in (exact, *others)}
    assert len(hashes) == 1 + len(others)


def test_a_backbone_in_the_other_dtype_is_the_same(tmp_path, backbone):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), backbone.params)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    one, other = (types.SimpleNamespace(module=bert(), params=params) for params in (half, single))
    model, params = fine_tuned(one, METHODS["compacter"])
    save_adapter(tmp_path, model, params)
    _, loaded = load_adapter(tmp_path, other)
    np.testing.assert_array_equal(loaded["classifier"]["kernel"], params["classifier"]["kernel"])


# --- What does not fit --------------------------------------------------------------------------


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_backbone(saved, backbone):
    flat = flatten_dict(backbone.params, sep="/")
    path = "encoder/layer/0/intermediate/dense/kernel"
    flat[path] = flat[path].at[0, 0].add(0.1)
    other = types.SimpleNamespace(module=backbone.module, params=unflatten_dict(flat, sep="/"))
    with pytest.raises(
        ValueError, match=r"made for a backbone with the hash \w{12}…, but this backbone has"
    ):
        load_adapter(saved.path, other)
    edit_config(saved.path, backbone="a/b")
    with pytest.raises(
        ValueError, match="load the backbone that the adapter was trained with, a/b"
    ):
        load_adapter(saved.path, other)


def test_what_is_stored_is_no_part_of_the_hash(saved, backbone):
    """The stored head and layer norms replace those of the backbone, so they may differ."""
    fresh = random_tree(jax.tree.map(lambda leaf: leaf, backbone.params), seed=9)
    replaced = ("LayerNorm/", "classifier/")
    flat, new = flatten_dict(backbone.params, sep="/"), flatten_dict(fresh, sep="/")
    flat = {p: new[p] if any(part in p for part in replaced) else flat[p] for p in flat}
    other = types.SimpleNamespace(module=backbone.module, params=unflatten_dict(flat, sep="/"))
    assert_same(load_adapter(saved.path, other)[1], saved.params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"head": None},
            r"with head='sequence_classification', but the backbone has head=None; load",
        ),
        ({"head": "token_classification"}, "the backbone has head='token_classification'"),
        ({"num_labels": 3}, "with num_labels=2, but the backbone has num_labels=3"),
        ({"config": dataclasses.replace(ONE_LAYER, num_hidden_layers=2)}, "missing: encoder/"),
        ({"config": dataclasses.replace(ONE_LAYER, hidden_size=24)}, "of another shape: "),
    ],
)
def test_another_module(saved, settings, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(saved.path, backbone_of(bert(**settings)))


def truncate(folder):
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-10])


def truncate_to_nothing(folder):
    weights_of(folder).write_bytes(b"")


def foreign_weights(folder):
    save_file({"a": np.zeros(3, np.float32)}, weights_of(folder))


def swapped_weights(folder):
    """Replaces the weights by those of another adapter with the same shapes."""
    path = weights_of(folder)
    save_file({name: leaf + 1 for name, leaf in load_file(path).items()}, path)


def config_text(text):
    return lambda folder: (folder / CONFIG_NAME).write_text(text)


def config_bytes(folder):
    (folder / CONFIG_NAME).write_bytes(b"\xff\xfe{}")


def config_without(name):
    def edit(folder):
        values = json.loads((folder / CONFIG_NAME).read_text())
        del values[name]
        (folder / CONFIG_NAME).write_text(json.dumps(values))

    return edit


def config_with(**changes):
    return lambda folder: edit_config(folder, **changes)


def method_with(**changes):
    def edit(folder):
        method = json.loads((folder / CONFIG_NAME).read_text())["method"]
        edit_config(folder, method={**method, **changes})

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"adapter-\w+.safetensors is truncated or not a safetensors file"),
        (truncate_to_nothing, r"adapter-\w+.safetensors is truncated or not a safetensors file"),
        (foreign_weights, "is not the file that adapter_config.json in the same folder describes"),
        (swapped_weights, "is not the file that adapter_config.json in the same folder describes"),
        (config_text('{"format_version": 1,'), "adapter_config.json is not valid JSON"),
        (config_text(""), "is not valid JSON"),
        (config_bytes, "is not UTF-8"),
        (config_text("[1]"), "must hold an adapter of this library, a JSON object, not a list"),
        (config_text("null"), "must hold an adapter of this library, a JSON object, not null"),
        (
            config_text('{"architecture": "x"}'),
            "is not an adapter of .*: it has no backbone_sha256",
        ),
        (config_without("weights_sha256"), "is not an adapter of .*: it has no weights_sha256"),
        (config_with(format_version=2), "has format_version 2, but this release reads 1; install"),
        (config_with(method=None), "json: method=None must be an object"),
        (config_with(method={"kind": "dora"}), "unknown kind of method 'dora'; use one of"),
        (config_with(sites={"attention": {"hots": ""}}), "'attention' is not a valid Site: .*hots"),
        (method_with(phm_dims=4), r"no field 'phm_dims' \(did you mean 'phm_dim'\?\)"),
        (method_with(phm_dim="4"), "phm_dim='4' must be of type int"),
        (method_with(phm_dim=2), "of another shape: "),
        (method_with(sites=["feed_forward"]), "left over: "),
        (method_with(train_pooler=True), "missing: pooler/dense/bias"),
        (config_with(sites={"attention": r"(?P<layer>\d)"}), "unknown site 'feed_forward'"),
        (config_with(sites="attention"), "json: sites='attention' must be an object"),
    ],
)
def test_damaged_files(saved, backbone, damage, message):
    damage(saved.path)
    with pytest.raises(ValueError, match=message):
        load_adapter(saved.path, backbone)


@pytest.mark.parametrize("name", [CONFIG_NAME, "weights"])
def test_missing_files(saved, backbone, name):
    path = weights_of(saved.path) if name == "weights" else saved.path / name
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} does not exist"):
        load_adapter(saved.path, backbone)


# --- Writing ------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def broken(*args, **kwargs):
    raise OSError("no space left")


@pytest.mark.parametrize(
    ("owner", "function"),
    [(os, "fsync"), (Path, "replace"), (Path, "write_bytes")],
    ids=["fsync", "rename", "write"],
)
def test_an_interrupted_save_leaves_the_old_files(saved, backbone, owner, function, monkeypatch):
    before = contents(saved.path)
    changed = jax.tree.map(lambda leaf: leaf + 1, saved.params)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, broken)
        with pytest.raises(OSError, match="no space left"):
            save_adapter(saved.path, saved.model, changed)
    assert contents(saved.path) == before
    assert_same(load_adapter(saved.path, backbone)[1], saved.params)


def test_a_save_interrupted_between_the_files_leaves_the_old_adapter(saved, backbone, monkeypatch):
    changed = flatten_dict(saved.params, sep="/")
    changed = {p: leaf + 1 if "adapter" in p else leaf for p, leaf in changed.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", broken)
        with pytest.raises(OSError, match="no space left"):
            save_adapter(saved.path, saved.model, unflatten_dict(changed, sep="/"))
    assert_same(load_adapter(saved.path, backbone)[1], saved.params)


def test_saving_again_replaces(saved, backbone):
    changed = flatten_dict(saved.params, sep="/")
    changed = {p: leaf + 1 if "adapter" in p else leaf for p, leaf in changed.items()}
    changed = unflatten_dict(changed, sep="/")
    save_adapter(saved.path, saved.model, changed)
    assert_same(load_adapter(saved.path, backbone)[1], changed)
    assert sorted(contents(saved.path)) == [weights_of(saved.path).name, CONFIG_NAME]
    assert "labels" not in read_adapter_config(saved.path)


def test_no_source_file_reads_or_writes_pickles():
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in Path(checkpoint.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not unsafe & {name.partition(".")[0] for name in names}, path
            assert "allow_pickle" not in path.read_text(encoding="utf-8"), path
