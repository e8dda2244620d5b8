"""A saved adapter at work: the commands `evaluate` and `predict`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.checkpoint import replace_file
from train import data, metrics, predictions, step, tasks
from train.options import AdapterOptions, EvaluateOptions, PredictOptions

LogitsFunction = Callable[[step.Batch], np.ndarray]


def apply_function(module: Any) -> step.ApplyFunction:
    """How the steps call a module: dropout where there is a key."""

    def apply(params: step.Params, batch: step.Batch, dropout_key: jax.Array | None) -> jax.Array:
        return module.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            batch["token_type_ids"],
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )

    return apply


def split_logits(
    logits: LogitsFunction, encoded: data.Encoded, batch_size: int, *, description: str | None
) -> np.ndarray:
    """Logits of every example, in the order of the data.

    Args:
      logits: batch -> `[batch_size, num_labels]`.
      encoded: the examples.
      batch_size: rows of a batch.
      description: of the progress bar; None shows none.

    Returns:
      `[examples, num_labels]` float32.
    """
    rows: np.ndarray | None = None
    with tqdm(
        total=len(encoded),
        desc=description,
        # Short beside training: of use to who watches, noise in a log file.
        disable=True if description is None else None,
        leave=False,
        unit="ex",
    ) as bar:
        for batch in data.batches(encoded, batch_size, shuffle=False):
            y = logits(batch)
            if rows is None:
                rows = np.zeros((len(encoded), *y.shape[1:]), np.float32)
            real = batch["indices"] >= 0
            rows[batch["indices"][real]] = y[real]
            bar.update(int(real.sum()))
    if rows is None:
        raise ValueError("no examples to compute logits of")
    return rows


def score(kind: tasks.Kind, logits: np.ndarray, encoded: data.Encoded) -> dict[str, float]:
    """Metrics of a split from its logits; ValueError if it has no targets."""
    if encoded.targets is None:
        raise ValueError("these examples have no label and no score to compare predictions with")
    return metrics.compute_metrics(kind, logits, encoded.targets)


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its backbone, ready to compute.

    Attributes:
      settings: of `adapter_config.json`.
      tokenizer: the backbone's.
      logits: batch -> `[batch, num_labels]` float32.
    """

    settings: dict[str, Any]
    tokenizer: Any
    logits: LogitsFunction

    def encode(self, dataset: Any) -> data.Encoded:
        """Tokenises with the limits of training."""
        return data.tokenize(dataset, self.tokenizer, self.settings["max_length"])


def load(options: AdapterOptions) -> LoadedAdapter:
    """Loads an adapter, and the backbone it names unless another folder is given.

    Raises:
      FileNotFoundError, ValueError: as `compacter_jax.load_adapter`, or if `fit` did not write it.
    """
    settings = cj.read_adapter_config(options.adapter)
    missing = {"backbone", "max_length", "kind", "label_names", "dtype"} - settings.keys()
    if missing:
        raise ValueError(
            f"the adapter in {options.adapter} was not saved by `python -m train fit`: its "
            f"adapter_config.json has no {sorted(missing)}"
        )
    name = options.backbone or settings["backbone"]
    backbone = cj.load_backbone(
        name,
        head=settings["head"],
        num_labels=settings["num_labels"],
        dtype=jnp.dtype(options.dtype or settings["dtype"]),
    )
    model, params = cj.load_adapter(options.adapter, backbone)
    tokenizer = data.load_tokenizer(
        name,
        vocab_size=backbone.config.vocab_size,
        max_position_embeddings=backbone.config.max_position_embeddings,
        max_length=settings["max_length"],
    )
    apply = apply_function(model)

    @jax.jit
    def forward(params: step.Params, batch: step.Batch) -> jax.Array:
        return apply(params, batch, None).astype(jnp.float32)

    return LoadedAdapter(settings, tokenizer, lambda batch: np.asarray(forward(params, batch)))


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """The command `evaluate`: metrics of a split, printed and written as JSON."""
    adapter = load(options)
    kind = adapter.settings["kind"]
    task = tasks.load_task(
        options.task,
        regression=kind == "regression",
        train_file=options.train_file,
        validation_file=options.validation_file,
        test_file=options.test_file,
        splits=(options.split,),
        label_names=adapter.settings["label_names"] or None,
    )
    encoded = adapter.encode(task.splits[options.split])
    logits = split_logits(
        adapter.logits, encoded, options.eval_batch_size, description=options.split
    )
    scores = score(kind, logits, encoded)
    result = {
        "adapter": str(options.adapter),
        "task": options.task,
        "split": options.split,
        "examples": len(encoded),
        "truncated": encoded.num_truncated,
        "metrics": scores,
    }
    output = options.output or options.adapter / f"evaluation_{options.task}_{options.split}.json"
    write_json(output, result)
    for name, value in scores.items():
        print(f"{options.split} {name}: {value:.4f}")
    print(f"written to {output}")
    return result


def predict(options: PredictOptions) -> int:
    """The command `predict`: a file with predictions added, streamed; returns its rows."""
    predictions.check_files(options.input, options.output)
    adapter = load(options)

    def predict_chunk(sentences: list[str], sentences2: list[str] | None) -> np.ndarray:
        columns = {"sentence": sentences}
        if sentences2 is not None:
            columns["sentence2"] = sentences2
        encoded = adapter.encode(columns)
        truncated.append(encoded.num_truncated)
        return split_logits(adapter.logits, encoded, options.eval_batch_size, description=None)

    truncated: list[int] = []
    with tqdm(desc="predict", unit="row") as bar:
        rows = predictions.predict_file(
            options.input,
            options.output,
            predict_chunk,
            label_names=adapter.settings["label_names"],
            write_logits=options.logits,
            progress=bar.update,
        )
    if sum(truncated):
        limit = adapter.settings["max_length"]
        print(f"{sum(truncated)} of {rows} rows were cut to {limit} tokens")
    print(f"{rows} rows written to {options.output}")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
