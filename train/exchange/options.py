"""The flags of convert, merge and create-backbone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from train.cli.options import TextToTextOptions

AdapterFormat: TypeAlias = Literal["compacter_jax", "adapterhub", "peft"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(TextToTextOptions):
    """Convert an adapter of another library to this package's format, or the other way round.

    Flags supply the facts about the task that the other library's folder does not record but
    evaluate and predict need.

    Attributes:
      to: folder to create.
      to_format: format to write.
      backbone: backbone that the adapter was trained with; for an adapter of this package, by
        default the recorded one.
      label_names: names of the classes, in the order of the head's outputs.
      task: built-in task that provides the label names, and the prefix for T5.
      regression: the adapter predicts scores.
      max_length: maximum input length in tokens.
      dtype: dtype of matrix products.
    """

    source: Annotated[
        tuple[str, Path],
        tyro.conf.arg(
            name="from",
            help="format to read, and the folder of the adapter.",
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
    """Write a Hugging Face checkpoint of a backbone with an adapter merged into its weights.

    Attributes:
      adapter: folder that `fit` or `convert` wrote, or its subfolder adapter/.
      backbone: backbone that the adapter was trained with; by default the recorded one.
      to: folder to create.
    """

    adapter: Path
    backbone: str | None = None
    to: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimOptions:
    """Write a backbone without the pieces of its vocabulary that some texts do not need.

    The pieces that occur, all single characters and the special tokens stay. The tokenizer divides
    the texts as before, and the hidden states of their tokens stay the same. Tokenizers of the
    kinds WordPiece (BERT) and Unigram (XLM-R, T5) can be trimmed; those of the kind BPE (RoBERTa,
    ModernBERT) cannot, since they build longer pieces from shorter ones.

    Attributes:
      backbone: folder of a Hugging Face checkpoint with tokenizer.json, or its id on the hub.
      text_files: UTF-8 text files, all that the backbone is to read.
      output_dir: folder to create.
    """

    backbone: str
    text_files: tuple[Path, ...]
    output_dir: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class CreateOptions:
    """Create an encoder-decoder from scratch: a tokenizer trained on text, and random weights.

    Attributes:
      text_files: UTF-8 text files to train the tokenizer on, of all languages.
      output_dir: folder for config.json, model.safetensors and tokenizer.json, with their companion
        files.
      model_type: t5, m2m_100 for a translation model of the kind of M2M-100, or speech_to_text for
        one that reads speech, as 80 log-mel energies every 10 ms. The last two have normal
        embeddings of deviation d_model ** -0.5 and Glorot-uniform weights.
      languages: for m2m_100 and speech_to_text, languages that get a token each, such as <de> for
        de.
      vocab_size: number of tokens, 359 of them special tokens, sentinels and bytes; at least 512.
      d_model: width of the hidden states.
      d_kv: width of each attention head of a T5; in other models it is d_model / num_heads.
      d_ff: width of the feed-forward networks.
      decoder_layer: for m2m_100, standard, or compressed for a decoder whose layers are one
        attention to source and target each, with the feed-forward network in it
        (arXiv:2101.00542). transformers cannot load the latter.
      decoder_value_dim: width of the values of a compressed decoder; by default d_ff.
      num_layers: number of layers of the encoder, and of the decoder.
      num_decoder_layers: number of layers of the decoder, where they are not as many.
      conv_channels: for speech_to_text, channels of the first convolution, an even number; by
        default 4 * d_model.
      num_heads: number of attention heads.
      feed_forward: relu as in T5 v1.0, gated-gelu as in T5 v1.1, or gated-silu; relu for
        others.
      tie_word_embeddings: share the embedding with the output layer, as T5 v1.0 and M2M-100 do and
        T5 v1.1 does not.
      seed: seed of the random weights.
      overwrite: replace a backbone that this command created in output_dir.
    """

    text_files: tuple[Path, ...]
    output_dir: Path
    model_type: Literal["t5", "m2m_100", "speech_to_text"] = "t5"
    languages: tuple[str, ...] = ()
    vocab_size: int = 8000
    d_model: int = 256
    d_kv: int = 64
    d_ff: int = 1024
    decoder_layer: Literal["standard", "compressed"] = "standard"
    decoder_value_dim: int | None = None
    num_layers: int = 6
    num_decoder_layers: int | None = None
    conv_channels: int | None = None
    num_heads: int = 4
    feed_forward: Literal["relu", "gated-gelu", "gated-silu"] = "relu"
    tie_word_embeddings: bool = True
    seed: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        sizes = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "num_decoder_layers")
        for name in (*sizes, "conv_channels"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self._check_type()
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**31 - 1")
        if not self.text_files:
            raise ValueError("text_files is empty; give at least one file of text")

    def _check_type(self) -> None:
        """Raises ValueError for a field that the type of the model does not have."""
        if self.model_type != "speech_to_text" and self.conv_channels is not None:
            raise ValueError(
                f"conv_channels={self.conv_channels} is for model_type=speech_to_text; leave it out"
            )
        if self.conv_channels is not None and self.conv_channels % 2:
            raise ValueError(
                f"conv_channels={self.conv_channels} is odd, and a gated linear unit halves it; "
                "use an even number"
            )
        if self.model_type == "t5":
            if self.decoder_layer != "standard" or self.decoder_value_dim is not None:
                raise ValueError(
                    "decoder_layer and decoder_value_dim are for model_type=m2m_100; a T5 has no "
                    "compressed layers"
                )
            if self.languages:
                raise ValueError("languages are for model_type=m2m_100; a T5 has no tokens of them")
            return
        if self.model_type == "speech_to_text" and self.decoder_layer != "standard":
            raise ValueError(
                "decoder_layer=compressed is for model_type=m2m_100; a speech_to_text has standard "
                "layers"
            )
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("d_kv", "feed_forward"):
            if getattr(self, name) != default[name]:
                raise ValueError(f"{name}={getattr(self, name)} is for model_type=t5; leave it out")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        self._check_decoder()
        for language in self.languages:
            if not re.fullmatch(r"\w+([-_]\w+)*", language) or self.languages.count(language) > 1:
                raise ValueError(
                    f"languages: {language!r:.80} is given twice, or is no name of a language such "
                    "as de or pt_BR"
                )

    def _check_decoder(self) -> None:
        """Raises ValueError for values that the kind of decoder does not have."""
        width, name = self.decoder_value_dim, "decoder_value_dim"
        if self.decoder_layer == "standard":
            if width is not None:
                raise ValueError(
                    f"decoder_value_dim={width} is for decoder_layer=compressed; leave it out"
                )
            return
        if width is None:
            width, name = self.d_ff, "d_ff"
        if width < 1 or width % self.num_heads:
            raise ValueError(
                f"{name}={width}, the width of a compressed decoder's values, must be a positive "
                f"multiple of num_heads={self.num_heads}"
            )
