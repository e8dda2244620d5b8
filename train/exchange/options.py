"""The flags of convert, merge and create-backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from train.cli.options import TextToTextOptions

AdapterFormat: TypeAlias = Literal["compacter_jax", "adapterhub", "peft"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(TextToTextOptions):
    """Turn an adapter of another library into one of ours, or the other way round.

    What the other library's folder does not say of a task, and `evaluate` and `predict` have to
    know, is taken from flags.

    Attributes:
      to: folder to make.
      to_format: what to write.
      backbone: the backbone the adapter was trained with; of an adapter of ours, by default where
        it was then.
      label_names: of classification, in the order of the head's outputs.
      task: a built-in task, whose label names are taken, and its name as T5's prefix.
      regression: the adapter predicts scores.
      max_length: longest input in tokens.
      dtype: what matrix products compute in.
    """

    source: Annotated[
        tuple[str, Path],
        tyro.conf.arg(
            name="from",
            help="what to read, and its folder.",
            metavar="{compacter_jax,adapterhub,peft} DIR",
        ),
    ]
    to: Path
    to_format: AdapterFormat = "compacter_jax"
    backbone: str | None = None
    label_names: tuple[str, ...] = ()
    task: str | None = None
    regression: bool = False
    max_length: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Write a backbone with a method merged into its weights, as a Hugging Face checkpoint.

    Attributes:
      adapter: folder that `fit` or `convert` wrote, or adapter/ in it.
      backbone: the backbone it was trained with; by default where it was then.
      to: folder to make.
    """

    adapter: Path
    backbone: str | None = None
    to: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class CreateOptions:
    """Make a T5 from scratch: a tokenizer trained on text files, and random weights.

    Attributes:
      text_files: UTF-8 text to train the tokenizer on.
      output_dir: where config.json, model.safetensors, tokenizer.json and what belongs to them go.
      vocab_size: tokens in all, 359 of them special tokens, sentinels and bytes; 512 or more.
      d_model: width of the hidden states.
      d_kv: width of an attention head.
      d_ff: width inside the feed-forward networks.
      num_layers: layers of the encoder, and as many of the decoder.
      num_heads: attention heads.
      feed_forward: relu is that of T5 v1.0, gated-gelu that of v1.1.
      tie_word_embeddings: use the embedding for the output too, as T5 v1.0 does and v1.1 does not.
      seed: of the weights.
      overwrite: replace the backbone that this command made in output_dir.
    """

    text_files: tuple[Path, ...]
    output_dir: Path
    vocab_size: int = 8000
    d_model: int = 256
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 6
    num_heads: int = 4
    feed_forward: Literal["relu", "gated-gelu", "gated-silu"] = "relu"
    tie_word_embeddings: bool = True
    seed: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """ValueError for a value that cannot work."""
        for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**31 - 1")
        if not self.text_files:
            raise ValueError("text_files is empty; give at least one file of text")
