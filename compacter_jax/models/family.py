"""The description of a family of backbones: everything but its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from compacter_jax.messages import listing, quote, shorten
from compacter_jax.models.names import Names

Params = dict[str, Any]
DropoutRate: TypeAlias = float | Literal["inside"]


def max_position_embeddings(config: Any) -> int | None:
    """Returns this field of a configuration; None where positions are relative."""
    return getattr(config, "max_position_embeddings", None)


@dataclasses.dataclass(frozen=True)
class Family:
    """The description of one `model_type`: everything but its modules.

    Attributes:
      names: names of the parameters of its modules, a row of `compacter_jax.models.names`.
      architectures: name in config.json -> head.
      heads: all heads of its modules.
      module: `(config of transformers, head, num_labels, **module attributes)` -> module.
      from_hugging_face: tensors -> nested parameters.
      optional: path prefixes that a checkpoint may lack (these parameters are initialised) or have
        in excess (these are left out), each as a whole: heads and poolers.
      ties: path -> path of the same values under another name, transposed if one is a kernel and
        the other an embedding. A checkpoint may hold this copy though the module does not have it.
      to_hugging_face: `(nested parameters, head) -> tensors`, inverse of `from_hugging_face`.
      zeros: path prefixes that a checkpoint may lack, which are then zero.
      droppable: path prefixes that a checkpoint may have in excess, but not lack.
      copies_tied_head: True if a module with its own parameters of `ties` takes the values of the
        other name, where the checkpoint has only those and its configuration ties them.
        transformers 5 ties every T5 and saves one copy.
      config_class: class of the module's configuration; its fields are those of config.json. Other
        modules read `vocab_size` and `hidden_size` of it, of an encoder `max_position_embeddings`,
        and with `ties` `tie_word_embeddings`; where config.json has another name, as a property.
      depths: field of config.json -> path of the layers that it counts.
      shared_head_names: those of `optional` that several heads have under the same name; they are
        left out if config.json names an architecture with another head.
      pooled_heads: heads that take a `pooling` of `compacter_jax.models.pooling`.
      module_class: class of its modules.
      published: hub id -> configuration, for the sizes that are known without a download.
      of_size: `(published configuration, head, num_labels) -> module`; head "auto" is the usual
        head.
      inputs: keys of a batch of `train` that are the positional arguments of its modules.
      dropout_fields: fields of the configuration that are rates of dropout.
      output_dropout_fields: those of them that are the rates of the outputs of sub-layers and of
        embeddings; none if the configuration does not tell them from those within sub-layers.
      width_fields: fields of the configuration that merging an adapter may change.
      writes_text: True for encoder-decoders, which are trained to write text.
      max_tokens: configuration of transformers, or of the module -> largest number of tokens; None
        if there is no limit.
      tokenizers: names of transformers' classes of tokenizers, without "Fast", if those of other
        families do not fit.
      tokens: size of a vocabulary -> number of its entries without padding, where they differ.
      check_layers: `(configuration, paths of a checkpoint)`: raises ValueError if the layers are of
        another kind than the configuration says.
    """

    names: Names
    architectures: Mapping[str, str | None]
    heads: tuple[str | None, ...]
    module: Callable[..., nn.Module]
    from_hugging_face: Callable[[Mapping[str, np.ndarray]], Params]
    optional: tuple[str, ...]
    ties: Mapping[str, str]
    to_hugging_face: Callable[[Mapping[str, Any], str | None], dict[str, np.ndarray]]
    config_class: type[Any]
    depths: Mapping[str, str]
    module_class: type[nn.Module]
    published: Mapping[str, Any]
    of_size: Callable[[Any, str | None, int | None], nn.Module]
    inputs: tuple[str, ...]
    dropout_fields: tuple[str, ...]
    output_dropout_fields: tuple[str, ...] = ()
    width_fields: tuple[str, ...] = ()
    droppable: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    copies_tied_head: bool = False
    writes_text: bool = False
    tokens: Mapping[int, int] = dataclasses.field(default_factory=dict)
    shared_head_names: tuple[str, ...] = ()
    max_tokens: Callable[[Any], int | None] = max_position_embeddings
    tokenizers: tuple[str, ...] = ()
    pooled_heads: tuple[str, ...] = ()
    check_layers: Callable[[Any, Iterable[str]], None] = lambda config, paths: None

    def with_dropout(self, module: nn.Module, dropout: DropoutRate) -> nn.Module:
        """Returns the module with other rates of dropout.

        Args:
          module: a module of the family.
          dropout: value for all rates; or "inside" to turn off dropout of the outputs of sub-layers
            and of embeddings, and to keep it within attention and feed-forward networks.

        Raises:
          ValueError: for "inside", if the configuration does not tell these rates apart.
        """
        rates = dict.fromkeys(self.dropout_fields, dropout)
        if dropout == "inside":
            rates = dict.fromkeys(self.output_dropout_fields, 0.0)
            if not rates:
                raise ValueError(
                    f"dropout 'inside' of sub-layers alone is not possible: "
                    f"{type(module).__name__} has one rate for all dropout, "
                    f"{', '.join(self.dropout_fields)}; give a number"
                )
        config = dataclasses.replace(module.config, **rates)  # type: ignore[attr-defined]
        return module.clone(config=config)


def add_parameter(
    flat: dict[str, np.ndarray], origin: dict[str, str], path: str, array: np.ndarray, name: str
) -> None:
    """Adds a parameter under its path, and records its name in the checkpoint.

    Raises:
      ValueError: if another name means the same path.
    """
    if path in flat:
        raise ValueError(
            f"{quote(origin[path], 100)} and {quote(name, 100)} both mean the parameter "
            f"{shorten(path, 100)}"
        )
    flat[path], origin[path] = array, name


def to_tensors(params: Mapping[str, Any], names: Names, family: str) -> dict[str, Any]:
    """Converts parameters to `.`-joined names and C-contiguous arrays, oriented as in PyTorch."""
    flat = flatten_dict(params, sep="/")
    not_allowed = [path for path in flat if not names.has(path)]
    if not_allowed:
        raise ValueError(
            f"not parameters of {family}: {listing(not_allowed, most=4)}; take adapters out of the "
            "parameters before converting them"
        )
    tensors = {}
    for path, leaf in flat.items():
        *parents, kind = path.split("/")
        array = np.asarray(leaf)
        name = ".".join([*parents, "bias" if kind == "bias" else "weight"])
        tensors[name] = np.ascontiguousarray(array.T if kind == "kernel" else array)
    return tensors
