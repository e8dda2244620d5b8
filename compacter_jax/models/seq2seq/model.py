"""The encoder-decoders of the BART line in Flax linen; parameters have their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compacter_jax.models import names
from compacter_jax.models.seq2seq.config import Seq2SeqConfig
from compacter_jax.models.seq2seq.sites import NOT_COMPRESSED, SitesOfDecoder
from compacter_jax.models.seq2seq.transformer import Transformer
from compacter_jax.nn.dense import Embed


class Seq2Seq(Transformer):
    """M2M-100, NLLB-200, mBART, mBART-50, BART and Marian (OPUS-MT).

    Parameters have their Hugging Face names without the prefix `model.`. Where encoder and decoder
    do not share their embeddings, those of the encoder are `shared`, and those of the decoder
    `decoder_embed_tokens`.

    Attributes:
      config: sizes, dropout rates, and the `model_type`.
      head: "conditional_generation" (logits over the vocabulary) or None (hidden states of the
        decoder and the encoder).
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. Attention
        scores, their softmax and the statistics of norms are computed in float32 at least.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.

    Raises:
      ValueError: if `head` is unknown.

    References:
      Lewis et al., BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
      Generation, Translation, and Comprehension, ACL 2020, arXiv:1910.13461; Liu et al., mBART,
      arXiv:2001.08210; Fan et al., M2M-100, arXiv:2010.11125; Junczys-Dowmunt et al., Marian,
      ACL 2018, arXiv:1804.00344; Li et al., An Efficient Transformer Decoder with Compressed
      Sub-layers, AAAI 2021, arXiv:2101.00542.
    """

    config: Seq2SeqConfig

    sites = SitesOfDecoder()
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = names.SEQ2SEQ.embeddings
    """Path of the vocabulary's embeddings, `[vocab, d_model]`."""

    @property
    def layers(self) -> Seq2SeqConfig:
        """Configuration of the layers, that of the model."""
        return self.config

    @property
    def absent_sites(self) -> Mapping[str, str]:
        """Names of sites that only another decoder has, and why."""
        return NOT_COMPRESSED if self.config.is_compressed else {}

    def tables(self) -> tuple[Embed, Embed]:
        """Creates the embeddings of tokens, shared by encoder and decoder or not."""
        config = self.config
        shared = self.table(config.vocab_size, "shared")
        if config.share_encoder_decoder_embeddings:
            return shared, shared
        return shared, self.table(config.target_vocab_size, "decoder_embed_tokens")
