"""A row for each preset: what it is to do on a BERT and on a T5."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

from tests.helpers import SMALL

HALF = {"reduction_factor": 2}
PREFIX = {"prefix_length": 2, "bottleneck_size": 5}
LAYER, ENCODER, DECODER = "encoder/layer/0", "encoder/block/0/layer", "decoder/block/0/layer"
T5_ATTENTIONS = (
    f"{ENCODER}/0/SelfAttention",
    f"{DECODER}/0/SelfAttention",
    f"{DECODER}/1/EncDecAttention",
)
T5_FEED_FORWARD = (f"{ENCODER}/1/DenseReluDense", f"{DECODER}/2/DenseReluDense")


def both(one, other):
    return {backbone: one[backbone] | other[backbone] for backbone in one}


SERIAL = {
    "attention": {
        "bert": {f"{LAYER}/attention/output/dense"},
        "t5": {f"{place}/o" for place in T5_ATTENTIONS[:2]},
    },
    "feed_forward": {
        "bert": {f"{LAYER}/output/dense"},
        "t5": {f"{place}/wo" for place in T5_FEED_FORWARD},
    },
}
BOTH = both(SERIAL["attention"], SERIAL["feed_forward"])


def projections(names):
    """Paths of projections of attention, by BERT's names and T5's."""
    return {
        "bert": {f"{LAYER}/attention/self/{name}" for name in names},
        "t5": {f"{place}/{name[0]}" for place in T5_ATTENTIONS for name in names},
    }


PREFIXED = {"bert": {f"{LAYER}/attention/self"}, "t5": set(T5_ATTENTIONS)}
PARALLEL = {"bert": {f"{LAYER}/output"}, "t5": set(T5_FEED_FORWARD)}
NOWHERE = {"bert": set(), "t5": set()}
PROMPTED = {"bert": {"embeddings/word_embeddings"}, "t5": {""}}


def bert_sizes(config, num_labels, **method):
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = d * num_labels + num_labels
    embedded = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    return types.SimpleNamespace(
        d=d,
        f=f,
        inner=d,
        sublayers=layers,
        kept=layers - 1,
        attentions=layers,
        prefix_sites=1,
        norms=2 * d * (2 * layers + 1),
        head=head,
        # Of the norm of the embeddings, four projections, two linear layers and two norms in each
        # layer, the pooler.
        biases=d + layers * (7 * d + f) + d,
        everything=embedded * d
        + 2 * d
        + layers * (4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d)
        + (d * d + d)
        + head,
        **method,
    )


def t5_sizes(config, dropped=(1, 1), **method):
    """`dropped`: layers of encoder and decoder without adapters in AdapterDrop."""
    d, f, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv
    encoder, decoder, words = config.num_layers, config.num_decoder_layers, config.vocab_size
    blocks, attentions = encoder + decoder, encoder + 2 * decoder
    norms = 2 * encoder + 3 * decoder + 2
    into = 2 if config.is_gated else 1  # projections to the inner width
    return types.SimpleNamespace(
        d=d,
        f=f,
        inner=inner,
        sublayers=blocks,
        kept=blocks - sum(dropped),
        attentions=attentions,
        prefix_sites=3,
        norms=norms * d,
        head=0,
        # Of all linear layers, of the norms but the two last, of the logits.
        biases=attentions * (3 * inner + d) + blocks * (into * f + d) + (norms - 2) * d + words,
        everything=words * d * (1 if config.tie_word_embeddings else 2)
        + 2 * config.relative_attention_num_buckets * config.num_heads
        + attentions * 4 * d * inner
        + blocks * (into + 1) * d * f
        + norms * d,
        **method,
    )


def bottleneck(s):
    return s.d * s.r + s.r + s.r * s.d + s.d


def compacter(s, adapters):
    # `left`, `right` and bias of each projection; one rule.
    return s.n**3 + adapters * ((s.d + s.r + s.r) + (s.r + s.d + s.d))


def prefix(s):
    shared = s.prefix * s.d + s.d * s.b + s.b
    return s.prefix_sites * shared + s.attentions * (s.b * 2 * s.inner + 2 * s.inner)


TINY_METHOD = {"r": 6, "n": 3, "prompt": 3, "dimension": 30, "k": 2, "prefix": 2, "b": 5}


def sizes_of(config, backbone):
    if backbone == "bert":
        return bert_sizes(config, 3, **TINY_METHOD)
    return t5_sizes(config, **TINY_METHOD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a preset is to do.

    Attributes:
      fields: make it fit a width of 12.
      places: of BERT and of T5, the paths of the modules that have an adapter.
      start: the largest change of a logit by an untrained adapter, in terms of the largest logit:
        of rounding alone, or of weights drawn with a small deviation; None where it is large, for
        new tokens or weights of order one.
      count: how many numbers are trained beside the task's head, by the papers; sublayers are of
        one kind, in all layers.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    places: Mapping[str, set[str]]
    start: float | None
    count: Callable[[Any], int]


ROUNDING = 1e-6
# In BERT and in T5's encoder the first of two layers is left out, and T5's decoder has no other.
WITHOUT_FIRST = {
    "bert": {path.replace("/0/", "/1/") for path in BOTH["bert"]},
    "t5": {f"encoder/block/1/layer/{p}" for p in ("0/SelfAttention/o", "1/DenseReluDense/wo")},
}
WITHOUT_BIASES = {
    "bert": set(),
    "t5": projections("qkvo")["t5"]
    | {f"{place}/{name}" for place in T5_FEED_FORWARD for name in ("wi", "wo")}
    | {f"{ENCODER}/{i}/layer_norm" for i in range(2)}
    | {f"{DECODER}/{i}/layer_norm" for i in range(3)}
    | {""},
}
PROMPT = Row(
    fields={"prompt_length": 3}, places=PROMPTED, start=None, count=lambda s: s.prompt * s.d
)
INTRINSIC = Row(
    fields={"dimension": 30}, places=NOWHERE, start=ROUNDING, count=lambda s: s.dimension
)
# The deviations of the weights are 0.01 each way, 0.02 in AdapterHub's; of the rules 0.01 in
# PHM-Adapter and 0.0001 in Compacter, each way.
HOULSBY = Row(
    fields=HALF,
    places=BOTH,
    start=1e-2,
    count=lambda s: 2 * s.sublayers * bottleneck(s) + s.norms,
)
AFTER_FEED_FORWARD = Row(
    fields=SMALL,
    places=SERIAL["feed_forward"],
    start=1e-5,
    count=lambda s: compacter(s, s.sublayers) + s.norms,
)
BESIDE = Row(places=PARALLEL, start=ROUNDING, count=lambda s: s.sublayers * bottleneck(s))
ROWS = {
    "full": Row(places=NOWHERE, start=ROUNDING, count=lambda s: s.everything - s.head),
    "houlsby": HOULSBY,
    "pfeiffer-attention": Row(
        fields=HALF,
        places=SERIAL["attention"],
        start=1e-2,
        count=lambda s: s.sublayers * bottleneck(s) + s.norms,
    ),
    "pfeiffer-feed-forward": Row(
        fields=HALF,
        places={"bert": {f"{LAYER}/output"}, "t5": {f"{ENCODER}/1", f"{DECODER}/2"}},
        start=2e-2,
        count=lambda s: s.sublayers * bottleneck(s),
    ),
    "adapterdrop": Row(
        fields=HALF | {"leave_out": (0,)},
        places=WITHOUT_FIRST,
        start=1e-2,
        count=lambda s: 2 * s.kept * bottleneck(s) + s.norms,
    ),
    "low-rank": Row(
        fields=HALF,
        places=BOTH,
        start=None,
        count=lambda s: 2 * s.sublayers * (2 * (s.d + s.r) + s.r + s.d) + s.norms,
    ),
    "phm": Row(
        fields=SMALL,
        places=BOTH,
        start=1e-2,
        count=lambda s: 2 * s.sublayers * (2 * (s.n**3 + s.d * s.r // s.n) + s.r + s.d) + s.norms,
    ),
    "compacter": Row(
        fields=SMALL,
        places=BOTH,
        start=1e-5,
        count=lambda s: compacter(s, 2 * s.sublayers) + s.norms,
    ),
    "compacter++": AFTER_FEED_FORWARD,
    "compacter++-short": dataclasses.replace(AFTER_FEED_FORWARD, start=ROUNDING),
    "bitfit": Row(places=WITHOUT_BIASES, start=ROUNDING, count=lambda s: s.biases),
    "prompt-tuning-random": PROMPT,
    "prompt-tuning-vocabulary": dataclasses.replace(
        PROMPT, fields={"prompt_length": 3, "prompt_token_ids": (5, 2)}
    ),
    "intrinsic-said": INTRINSIC,
    "intrinsic": INTRINSIC,
    "lora": Row(
        fields={"rank": 2, "lora_alpha": 3.0},
        places=projections(("query", "value")),
        start=ROUNDING,
        count=lambda s: 2 * s.attentions * s.k * (s.d + s.inner),
    ),
    "ia3": Row(
        places=both(projections(("key", "value")), SERIAL["feed_forward"]),
        start=ROUNDING,
        count=lambda s: s.attentions * 2 * s.inner + s.sublayers * s.f,
    ),
    "prefix-tuning": Row(fields=PREFIX, places=PREFIXED, start=None, count=prefix),
    "parallel": BESIDE,
    "scaled-parallel": BESIDE,
    "mam": Row(
        fields=PREFIX,
        places=both(PREFIXED, PARALLEL),
        start=None,
        count=lambda s: prefix(s) + s.sublayers * bottleneck(s),
    ),
}
