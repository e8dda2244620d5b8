"""Inputs of the fuzzer for the library: adapters, banks, other libraries' adapters, backbones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from benchmarks import mutations
from benchmarks.fuzz_assets import Assets, Case, Params, Random
from compacter_jax.adapter_files import CONFIG_NAME
from compacter_jax.models.fitting import CONFIG_FILE
from compacter_jax.models.loading import INDEX_FILE, SINGLE_FILE


def _unsound(params: Params) -> str | None:
    """Returns the defect of the parameters of a float32 model; None if they are valid."""
    for path, leaf in flatten_dict(params, sep="/").items():
        if path.endswith("/occupied"):
            continue
        if leaf.dtype != jnp.float32:
            return f"accepted {leaf.dtype}"
        if not np.isfinite(np.asarray(leaf)).all():
            return "accepted NaN"
    return None


def edit_json(r: Random, path: Path) -> str:
    """Damages a JSON file, and returns what was done."""
    data, what = mutations.mutated_json(r, json.loads(path.read_text("utf-8")))
    path.write_bytes(data)
    return f"{path.name}: {what}"


def _edit_tensors(r: Random, path: Path) -> str:
    data, what = mutations.mutated_tensors(r, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {what}"


def ours(what: str) -> Callable[[Assets, Random, Path], Case]:
    """Returns a maker of damaged adapters of this library."""

    def make(assets: Assets, r: Random, folder: Path) -> Case:
        name, adapter = assets.copy(r, "ours", folder)
        return Case(
            f"{name}: {_damage(what, r, adapter)}",
            lambda: cj.load_adapter(adapter, assets.backbone)[1],
            _unsound,
        )

    return make


def _damage(what: str, r: Random, adapter: Path) -> str:
    """Damages one file of an adapter, mostly with a matching hash of the damaged weights."""
    config = adapter / CONFIG_NAME
    (weights,) = adapter.glob("*.safetensors")
    if what == "config":
        return edit_json(r, config)
    if what == "files":
        return mutations.odd_file(r, r.choice([config, weights]))
    done = _edit_tensors(r, weights)
    if r.random() < 0.9:
        settings = json.loads(config.read_text("utf-8"))
        settings["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        config.write_text(json.dumps(settings), "utf-8")
    return done


def bank(assets: Assets, r: Random, folder: Path) -> Case:
    """Writes two adapters, one of them damaged, to be read as a bank."""
    name, adapter = assets.copy(r, "ours", folder)
    done = _damage(r.choice(["config", "weights"]), r, adapter)
    sources = [assets.folder / "ours" / name, adapter]
    return Case(f"{name}: {done}", lambda: cj.stack_adapters(sources, assets.backbone)[1], _unsound)


def foreign(library: str, what: str) -> Callable[[Assets, Random, Path], Case]:
    """Returns a maker of damaged adapters of AdapterHub or PEFT."""
    suffix = {"config": ".json", "weights": ".safetensors", "files": ""}[what]
    edit = {"config": edit_json, "weights": _edit_tensors, "files": mutations.odd_file}[what]
    read = {"hub": cj.import_adapterhub, "peft": cj.import_peft}[library]

    def make(assets: Assets, r: Random, folder: Path) -> Case:
        name, adapter = assets.copy(r, library, folder)
        file = r.choice(sorted(adapter.glob(f"*{suffix}")))
        done = f"{name}: {edit(r, file)}"
        return Case(done, lambda: read(adapter, assets.backbone)[1], _unsound)

    return make


def backbone(family: str, what: str) -> Callable[[Assets, Random, Path], Case]:
    """Returns a maker of damaged checkpoints of a family."""

    def make(assets: Assets, r: Random, folder: Path) -> Case:
        checkpoint = folder / "input"
        shutil.copytree(assets.folder / family, checkpoint)
        if what == "config":
            done = edit_json(r, checkpoint / CONFIG_FILE)
        elif what == "weights":
            done = _edit_tensors(r, checkpoint / SINGLE_FILE)
        else:
            done = _edit_index(r, checkpoint)
        return Case(done, lambda: cj.load_backbone(checkpoint).params, _unsound)

    return make


def _edit_index(r: Random, checkpoint: Path) -> str:
    shard = "model-00001-of-00001.safetensors"
    (checkpoint / SINGLE_FILE).rename(checkpoint / shard)
    names, _ = mutations.split_tensors((checkpoint / shard).read_bytes())
    index = checkpoint / INDEX_FILE
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    return edit_json(r, index)
