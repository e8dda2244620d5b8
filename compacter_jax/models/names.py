"""The names of the parameters in the backbones of each family: plain data, read by all modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of the parameters in the backbones of a family.

    A path is the `/`-joined path of a parameter; adapters are not in the backbone and have names of
    their own. The heads, the poolers and the norms of all families are also the names that
    `label_params` knows in modules of others.

    Attributes:
      parameters: regular expression that matches every path, of all heads too.
      embeddings: path of the vocabulary's embeddings, `[vocab, hidden]`, which every backbone has.
      heads: modules at the top that belong to a task, not to the backbone.
      labelled: modules in `heads`, by their whole paths, with a column for each label.
      norms: modules that are layer norms, by the last name in their paths.
      columns: linear layers, by the last names in their paths, whose outputs a mesh divides: the
        first ones of a sub-layer, and those that make logits of the vocabulary.
      rows: linear layers, by the last names in their paths, whose inputs a mesh divides: the last
        one of a sub-layer. Other layers are whole on every device.
      poolers: modules at the top between the backbone and a head.
      frozen_heads: modules at the top that belong to the pre-training; their norms stay frozen.
      more_embeddings: further embeddings of a vocabulary, which some models have.
      fused: module, by the last name in its path -> its linear layers, in the order in which a
        checkpoint holds their weights as one matrix.
    """

    parameters: str
    embeddings: str
    heads: tuple[str, ...]
    labelled: tuple[str, ...]
    norms: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    poolers: tuple[str, ...] = ()
    frozen_heads: tuple[str, ...] = ()
    more_embeddings: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Returns True if a path is one of the family's."""
        return re.fullmatch(self.parameters, path) is not None

    def has_labels(self, path: str) -> bool:
        """Returns True if the last axis of a parameter has an entry for each label."""
        module, _, leaf = path.rpartition("/")
        return module in self.labelled and leaf in ("kernel", "bias")


_BERT_DENSE = (
    r"encoder/layer/\d+/(attention/self/(query|key|value)|(attention/output|intermediate|output)"
    r"/dense)|pooler/dense|classifier(/dense|/out_proj)?|qa_outputs"
    r"|(cls/predictions/transform|lm_head|generator_predictions)/dense|embeddings_project"
    r"|generator_lm_head"
)

_BERT_NORM = (
    r"(embeddings|encoder/layer/\d+/(attention/)?output|cls/predictions/transform)/LayerNorm"
    r"|lm_head/layer_norm|generator_predictions/LayerNorm"
)

BERT = Names(
    parameters=(
        rf"embeddings/(word|position|token_type)_embeddings/embedding|({_BERT_DENSE})/(kernel|bias)"
        rf"|({_BERT_NORM})/(scale|bias)|(cls/predictions|lm_head)/(decoder/kernel|bias)"
    ),
    embeddings="embeddings/word_embeddings/embedding",
    heads=("classifier", "qa_outputs"),
    labelled=("classifier", "classifier/out_proj"),
    norms=("LayerNorm", "layer_norm"),
    columns=(
        *("query", "key", "value", "intermediate/dense"),
        *("predictions/decoder", "lm_head/decoder", "generator_lm_head"),
    ),
    rows=("output/dense",),
    poolers=("pooler",),
    frozen_heads=("cls", "lm_head", "generator_predictions", "generator_lm_head"),
)

_DISTILBERT_LAYER = (
    r"(attention/(q|k|v|out)_lin|ffn/lin[12])/(kernel|bias)"
    r"|(sa_layer_norm|output_layer_norm)/(scale|bias)"
)

DISTILBERT = Names(
    parameters=(
        r"embeddings/((word|position)_embeddings/embedding|LayerNorm/(scale|bias))"
        rf"|transformer/layer/\d+/({_DISTILBERT_LAYER})|vocab_layer_norm/(scale|bias)"
        r"|(pre_classifier|classifier|qa_outputs|vocab_transform|vocab_projector)/(kernel|bias)"
    ),
    embeddings="embeddings/word_embeddings/embedding",
    heads=("pre_classifier", "classifier", "qa_outputs"),
    labelled=("classifier",),
    norms=("LayerNorm", "sa_layer_norm", "output_layer_norm", "vocab_layer_norm"),
    columns=("q_lin", "k_lin", "v_lin", "lin1", "vocab_projector"),
    rows=("out_lin", "lin2"),
    frozen_heads=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
)

_T5_ATTENTION = r"layer/0/SelfAttention|layer/1/EncDecAttention"

T5 = Names(
    parameters=(
        rf"shared/embedding|lm_head/kernel|(encoder|decoder)/(final_layer_norm/scale|block/\d+/"
        rf"(layer/[012]/layer_norm/scale|({_T5_ATTENTION})/[qkvo]/kernel|"
        r"layer/0/SelfAttention/relative_attention_bias/embedding|"
        r"layer/[12]/DenseReluDense/(wi|wi_0|wi_1|wo)/kernel))"
    ),
    embeddings="shared/embedding",
    heads=(),
    labelled=(),
    norms=("layer_norm", "final_layer_norm"),
    columns=("q", "k", "v", "wi", "wi_0", "wi_1", "lm_head"),
    rows=("o", "wo"),
)

_SEQ2SEQ_LAYER = (
    r"((self|encoder)_attn/(q|k|v|out)_proj|encoder_attn/(encoder_k|encoder_v|r)_proj|fc1|fc2)"
    r"/(kernel|bias)"
    r"|(self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm)/(scale|bias)"
)

SEQ2SEQ = Names(
    parameters=(
        r"(shared|decoder_embed_tokens)/embedding|lm_head/kernel|final_logits_bias/bias"
        r"|(encoder|decoder)/(embed_positions/embedding"
        rf"|(layernorm_embedding|layer_norm)/(scale|bias)|layers/\d+/({_SEQ2SEQ_LAYER}))"
    ),
    embeddings="shared/embedding",
    more_embeddings=("decoder_embed_tokens/embedding",),
    heads=(),
    labelled=(),
    norms=(
        "layernorm_embedding",
        "layer_norm",
        "self_attn_layer_norm",
        "encoder_attn_layer_norm",
        "final_layer_norm",
    ),
    columns=(
        *("q_proj", "k_proj", "v_proj", "encoder_k_proj", "encoder_v_proj", "r_proj", "fc1"),
        "lm_head",
    ),
    rows=("out_proj", "fc2"),
)

SPEECH_TO_TEXT = dataclasses.replace(
    SEQ2SEQ,
    parameters=(
        r"decoder_embed_tokens/embedding|lm_head/kernel|encoder_conv/conv_layers/\d+/(kernel|bias)"
        rf"|(encoder|decoder)/(layer_norm/(scale|bias)|layers/\d+/({_SEQ2SEQ_LAYER}))"
    ),
    embeddings="decoder_embed_tokens/embedding",
    more_embeddings=(),
)

_MODERNBERT_DENSE = (
    r"layers/\d+/(attn/(Wqkv/(query|key|value)|Wo)|mlp/(Wi|Wo))|head/dense|classifier|decoder"
)

_MODERNBERT_NORM = r"embeddings/norm|layers/\d+/(attn|mlp)_norm|final_norm|head/norm"

MODERNBERT = Names(
    parameters=(
        rf"embeddings/tok_embeddings/embedding|({_MODERNBERT_DENSE})/(kernel|bias)"
        rf"|({_MODERNBERT_NORM})/(scale|bias)"
    ),
    embeddings="embeddings/tok_embeddings/embedding",
    heads=("classifier",),
    labelled=("classifier",),
    norms=("embeddings/norm", "attn_norm", "mlp_norm", "final_norm"),
    columns=("query", "key", "value", "Wi", "decoder"),
    rows=("Wo",),
    # Every head has them, that of the pre-training, too, and checkpoints hold them trained.
    poolers=("head/dense", "head/norm"),
    fused={"Wqkv": ("query", "key", "value")},
)

NAMES: Mapping[str, Names] = {
    "Bert": BERT,
    "DistilBert": DISTILBERT,
    "ModernBert": MODERNBERT,
    "T5": T5,
    "Seq2Seq": SEQ2SEQ,
    "SpeechToText": SPEECH_TO_TEXT,
}
"""Class of the modules -> the names of their parameters."""
