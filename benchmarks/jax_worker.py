"""Worker of this package in `benchmarks.peers`: a process that answers requests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import compacter_jax as cj
from benchmarks.contest import ADAPTER, GENERATED, WEIGHT_DECAY, Size, Task, batch_of, cross_entropy
from benchmarks.turns import Work, serve
from compacter_jax.models.families import family_of_module
from compacter_jax.models.loading import Backbone
from compacter_jax.params import group_of
from train.compute import compute, step

# Scale of the noise added to an adapter's initial values, so that every parameter has an effect.
_NOISE = 0.05
_FAMILIES = {
    "bert": (cj.Bert, cj.BertConfig, "BertForSequenceClassification", "sequence_classification"),
    "roberta": (
        *(cj.Bert, cj.BertConfig),
        *("RobertaForSequenceClassification", "sequence_classification"),
    ),
    "modernbert": (
        *(cj.ModernBert, cj.ModernBertConfig, "ModernBertForSequenceClassification"),
        "sequence_classification",
    ),
    "t5": (cj.T5, cj.T5Config, "T5ForConditionalGeneration", "conditional_generation"),
}
# Inputs of a model in a batch.
INPUTS = {
    "bert": ("input_ids", "attention_mask", "token_type_ids"),
    "roberta": ("input_ids", "attention_mask"),
    "modernbert": ("input_ids", "attention_mask"),
    "t5": ("input_ids", "attention_mask", "decoder_input_ids"),
}
_NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {},
    "t5": {"dropout_rate": 0.0},
}
# Family -> method -> changes of its preset, so that it acts where the peer's does.
_CHANGES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "modernbert": {"lora": {"sites": ("query_key_value",)}},
}


def method_of(name: str, **changes: Any) -> cj.MethodConfig:
    """Returns the preset with layer norms frozen, as in the peers."""
    return cj.preset(name, **({} if name == "full" else {"train_layer_norms": False}), **changes)


def quick_key(seed: int) -> Array:
    """Returns a key whose draws compile in a fraction of the time of the default kind."""
    return jax.random.key(seed, impl="unsafe_rbg")


def random_backbone(size: Size) -> Backbone:
    """Returns random weights, and a module without dropout."""
    module = module_of(size)
    init = jax.jit(lambda key: module.init(key, *module.dummy_inputs())["params"])
    return Backbone(module, init(quick_key(0)), module.config, size.name)


def module_of(size: Size) -> Any:
    """Returns the module of a size, without dropout."""
    module_class, config_class, _, head = _FAMILIES[size.family]
    config = config_class(**{**size.config, **_NO_DROPOUT[size.family]})
    return module_class(config, head=head)


def random_members(stacked: Any, backbone: Any) -> Any:
    """Returns the parameters of a bank in which every place holds a member with its own values.

    Args:
      stacked: the parameters of `cj.stack_adapters`.
      backbone: the parameters of the backbone, which stay as they are.
    """
    of_backbone, rng = flatten_dict(backbone, sep="/"), np.random.default_rng(0)

    def drawn(path: str, leaf: Any) -> Any:
        if path in of_backbone:
            return leaf
        if leaf.dtype == bool:  # whether a place is taken
            return jnp.ones_like(leaf)
        return jnp.asarray(rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype))

    flat = flatten_dict(stacked, sep="/")
    return unflatten_dict({path: drawn(path, leaf) for path, leaf in flat.items()}, sep="/")


def write_backbone(size: dict[str, Any], folder: str) -> dict[str, Any]:
    """Writes random weights of a size as transformers saves them; returns the platform of JAX."""
    made = Size(**size)
    backbone = random_backbone(made)
    family = family_of_module(backbone.module)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = family.to_hugging_face(backbone.params, backbone.module.head)
    file = target / "model.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    settings = {"model_type": made.family, "architectures": [_FAMILIES[made.family][2]]}
    settings |= dataclasses.asdict(backbone.config)
    (target / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return {"platform": jax.default_backend()}


def write_adapter(
    folder: str, method: str, changes: dict[str, Any], ours: str, peers: str
) -> dict[str, Any]:
    """Writes a random adapter for the backbone in `folder`, in our format and the peer's."""
    backbone = cj.load_backbone(folder)
    changes = {**_CHANGES.get(backbone.config.model_type, {}).get(method, {}), **changes}
    model = cj.Adapted(backbone.module, method_of(method, **changes))
    params = cj.init_adapters(model, backbone, quick_key(1))
    rng = np.random.default_rng(1)
    flat = {
        path: leaf + _NOISE * rng.standard_normal(leaf.shape, np.float32)
        if group_of(path) in ("adapters", "rule")
        else leaf
        for path, leaf in flatten_dict(params, sep="/").items()
    }
    params = unflatten_dict(flat, sep="/")
    cj.save_adapter(ours, model, params)
    if method == "lora":
        cj.export_peft(peers, model, params)
    else:
        cj.export_adapterhub(peers, model, params, name=ADAPTER)
    return {}


def prepare(task: dict[str, Any]) -> Work:
    """Loads the backbone and adapter of a `Task`, and returns the work to run."""
    made = Task.from_json(task)
    # On the host: otherwise temporary arrays of the loading would count towards the device's peak.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model, params, labels = _loaded(made)
    batch = batch_of(made.size, model.backbone.config.vocab_size, made.shortest)
    targets = batch["labels"]
    value: Callable[[Any], Any]
    if made.work == "step":
        run = training_step(model, params, labels, batch, made.size, made.learning_rate)
        value = float
    elif made.work == "forward":
        run = forward(model, params, batch, made.size)

        def value(logits: Any) -> float:
            return cross_entropy(np.asarray(logits, np.float32), targets)
    else:
        run = greedy(model, params, batch, made.generated)

        def value(ids: Any) -> list[list[int]]:
            return np.asarray(ids).tolist()

    return Work(
        run=run,
        wait=jax.block_until_ready,
        value=value,
        trained=cj.count(params, labels).trained,
        platform=jax.default_backend(),
        device_peak=_device_peak,
    )


def _loaded(task: Task) -> tuple[cj.Adapted, Any, Any]:
    """Returns the model, its parameters with frozen ones in the task's dtype, and their labels."""
    plain = task.dtype == "float32"
    backbone = cj.load_backbone(task.folder, dtype=None if plain else jnp.dtype(task.dtype))
    if task.adapter is None:
        model, params = cj.Adapted(backbone.module, method_of(task.method)), backbone.params
    else:
        model, params = cj.load_adapter(task.adapter, backbone)
    labels = cj.label_params(params, model.method)
    if plain:
        return model, params, labels
    trained, frozen = cj.partition(params, labels)
    return model, cj.merge(trained, cj.cast_frozen(frozen, task.dtype)), labels


def training_step(
    model: Any, params: Any, labels: Any, batch: Any, size: Size, learning_rate: float
) -> Callable[[], Array]:
    """Returns the step of `python -m train fit`; a call updates the state and returns the loss."""
    trained, frozen = cj.partition(params, labels)
    made = compute.make_compute(
        step.apply_function(model, INPUTS[size.family]),
        loss_function(size),
        cj.optimizer(optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY), labels),
        seed=0,
        devices=jax.local_devices()[:1],
    )
    state, placed = made.init_state(trained), made.place(frozen)

    def run() -> Array:
        nonlocal state
        state, metrics = made.step(state, placed, batch)
        return metrics.loss

    return run


def loss_function(size: Size) -> step.LossFunction:
    """Returns the loss function of the family."""
    return step.loss_function("tokens" if size.family == "t5" else "classification")


def forward(model: Any, params: Any, batch: Any, size: Size) -> Callable[[], Array]:
    """Returns a function that computes the logits without dropout."""
    apply = step.apply_function(model, INPUTS[size.family])
    # The weights are arguments: constants would be folded into the program.
    compiled = jax.jit(lambda params, batch: apply(params, batch, None))
    arguments = jax.device_put((params, batch), jax.local_devices()[0])
    return lambda: compiled(*arguments)


def greedy(model: Any, params: Any, batch: Any, tokens: int = GENERATED) -> Callable[[], Array]:
    """Returns a function that runs greedy search without early ends."""
    params = jax.device_put(params, jax.local_devices()[0])
    prompt = (batch["input_ids"], batch["attention_mask"])

    def run() -> Array:
        return cj.generate(model, params, *prompt, max_new_tokens=tokens, eos_token_id=())

    return run


def _device_peak() -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


ACTIONS = {"prepare": prepare, "write_backbone": write_backbone, "write_adapter": write_adapter}

if __name__ == "__main__":
    serve(ACTIONS)
