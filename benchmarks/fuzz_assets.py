"""Sound files that the fuzzer damages, and the types of its inputs."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax import banks
from compacter_jax.exchange.peft import folder as peft_folder
from compacter_jax.inject import initial
from compacter_jax.models.loading import module_from_config

Random = random.Random
Params = Mapping[str, Any]


class Case(NamedTuple):
    """One input.

    Attributes:
      what: the damage to the input.
      read: the function that reads the input.
      complaint: a function of the result that returns its defect, None if it is valid.
    """

    what: str
    read: Callable[[], Any]
    complaint: Callable[[Any], str | None] = lambda result: None


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
      make: a function that writes an input into an empty folder.
      weight: the relative frequency of the kind.
    """

    make: Callable[[Assets, Random, Path], Case]
    weight: int = 1


class Assets:
    """Valid folders of everything, for a tiny BERT and a tiny T5, and the backbone itself.

    Attributes:
      folder: the folder with `bert`, `t5`, and `ours`, `hub` and `peft`, which have a folder for
        each method.
      backbone: the backbone of the adapters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bert = transformers.BertConfig(
            vocab_size=20,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=160,
            architectures=["BertForSequenceClassification"],
        )
        t5 = transformers.T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            architectures=["T5ForConditionalGeneration"],
        )
        for name, config in (("bert", bert), ("t5", t5)):
            module = module_from_config(config)
            shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())
            cj.save_backbone(folder / name, module, _numbers(shapes["params"]), config)
        self.backbone = cj.load_backbone(folder / "bert")
        for name, overrides in _METHODS.items():
            self._save(name, cj.preset(name, **overrides))

    def _save(self, name: str, method: cj.MethodConfig) -> None:
        """Saves an adapter in this package's format, and in those of libraries with the method."""
        model = cj.Adapted(self.backbone.module, method)
        shapes = jax.eval_shape(
            lambda: initial.init_adapters(model, self.backbone, jax.random.key(0))
        )
        own = flatten_dict(self.backbone.params, sep="/")
        flat = flatten_dict(_numbers(shapes), sep="/")
        params = unflatten_dict({**flat, **own}, sep="/")
        cj.save_adapter(self.folder / "ours" / name, model, params, metadata=_METADATA)
        with contextlib.suppress(ValueError):  # PEFT does not have the method
            cj.export_peft(self.folder / "peft" / name, model, params)
        model = model.clone(method=method.replace(train_layer_norms=False))
        with contextlib.suppress(ValueError):  # AdapterHub does not
            cj.export_adapterhub(self.folder / "hub" / name, model, params)

    def copy(self, r: Random, source: str, folder: Path) -> tuple[str, Path]:
        """Copies one of the folders of a kind; returns its name and its new path."""
        found = sorted(path for path in (self.folder / source).iterdir() if any(path.iterdir()))
        chosen = r.choice(found)
        shutil.copytree(chosen, folder / "input")
        return chosen.name, folder / "input"


_METHODS: Mapping[str, dict[str, Any]] = {
    "compacter": {"reduction_factor": 2},
    "houlsby": {"reduction_factor": 4},
    "ia3": {},
    "lora": {"rank": 2},
    "prefix-tuning": {"prefix_length": 3, "bottleneck_size": 5},
    "prompt-tuning-random": {"prompt_length": 3},
}
_METADATA = {
    "backbone": "bert",
    "backbone_dtype": "float32",
    "dtype": "float32",
    "kind": "classification",
    "label_names": ["negative", "positive"],
    "max_length": 32,
    "task": "custom",
}


def _numbers(shapes: Any) -> Any:
    """Returns random parameters of the given shapes; nothing is compiled for them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@contextlib.contextmanager
def remembered_shapes() -> Iterator[None]:
    """Caches the shapes of each method inside the block: reading an adapter is mostly tracing."""
    original, known = initial.init_adapters, {}

    def init_adapters(model: Any, backbone: Any, key: Any, *inputs: Any) -> Any:
        own = (model.method, repr(model.sites), backbone.module)
        if own not in known:
            known[own] = jax.eval_shape(lambda key: original(model, backbone, key, *inputs), key)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), known[own])

    places = (initial, peft_folder, banks)
    for place in places:
        place.init_adapters = init_adapters
    try:
        yield
    finally:
        for place in places:
            place.init_adapters = original
