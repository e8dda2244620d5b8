"""A row for each preset: its behaviour on encoders, a T5, two M2M-100s and a speech model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import compacter_jax as cj
from tests.helpers import SMALL
from tests.methods.sizes import bottleneck, compacter, invertible, prefix

HALF = {"reduction_factor": 2}
PREFIX = {"prefix_length": 2, "bottleneck_size": 5}
LAYER, ENCODER, DECODER = "encoder/layer/0", "encoder/block/0/layer", "decoder/block/0/layer"
T5_ATTENTIONS = (
    f"{ENCODER}/0/SelfAttention",
    f"{DECODER}/0/SelfAttention",
    f"{DECODER}/1/EncDecAttention",
)
M2M_LAYERS = ("encoder/layers/0", "decoder/layers/0")
M2M_ATTENTIONS = (
    f"{M2M_LAYERS[0]}/self_attn",
    f"{M2M_LAYERS[1]}/self_attn",
    f"{M2M_LAYERS[1]}/encoder_attn",
)
# The only attention of a compressed decoder's layer.
JOINED = f"{M2M_LAYERS[1]}/encoder_attn"
MODERN_LAYERS = ("layers/0", "layers/1")
T5_FEED_FORWARD = (f"{ENCODER}/1/DenseReluDense", f"{DECODER}/2/DenseReluDense")


def of_modernbert(*places):
    """Returns paths in both layers of the ModernBERT."""
    return {f"{layer}/{place}" for layer in MODERN_LAYERS for place in places}


def both(one, other):
    return {backbone: one[backbone] | other[backbone] for backbone in one}


SERIAL = {
    "attention": {
        "bert": {f"{LAYER}/attention/output/dense"},
        "modernbert": of_modernbert("attn/Wo"),
        "t5": {f"{place}/o" for place in T5_ATTENTIONS[:2]},
        "m2m": {f"{place}/out_proj" for place in M2M_ATTENTIONS[:2]},
        "compressed": {f"{M2M_ATTENTIONS[0]}/out_proj"},
    },
    "feed_forward": {
        "bert": {f"{LAYER}/output/dense"},
        "modernbert": of_modernbert("mlp/Wo"),
        "t5": {f"{place}/wo" for place in T5_FEED_FORWARD},
        "m2m": {f"{layer}/fc2" for layer in M2M_LAYERS},
        "compressed": {f"{M2M_LAYERS[0]}/fc2", f"{JOINED}/out_proj"},
    },
}
BOTH = both(SERIAL["attention"], SERIAL["feed_forward"])


def projections(names):
    """Returns the paths of projections in attention, by their names in BERT."""
    return {
        "bert": {f"{LAYER}/attention/self/{name}" for name in names},
        "modernbert": of_modernbert(*(f"attn/Wqkv/{name}" for name in names)),
        "t5": {f"{place}/{name[0]}" for place in T5_ATTENTIONS for name in names},
        "m2m": {f"{place}/{name[0]}_proj" for place in M2M_ATTENTIONS for name in names},
        "compressed": {
            *(f"{place}/{n[0]}_proj" for place in (M2M_ATTENTIONS[0], JOINED) for n in names),
            *(f"{JOINED}/encoder_{name[0]}_proj" for name in names if name != "query"),
        },
    }


PREFIXED = {
    "bert": {f"{LAYER}/attention/self"},
    "modernbert": of_modernbert("attn"),
    "t5": set(T5_ATTENTIONS),
    "m2m": set(M2M_ATTENTIONS),
    "compressed": {M2M_ATTENTIONS[0], JOINED},
}
PARALLEL = {
    "bert": {f"{LAYER}/output"},
    "modernbert": of_modernbert("mlp"),
    "t5": set(T5_FEED_FORWARD),
    "m2m": set(M2M_LAYERS),
    "compressed": set(M2M_LAYERS),
}
AFTER_RESIDUAL = {
    "bert": {f"{LAYER}/output"},
    "modernbert": of_modernbert("mlp_residual"),
    "t5": {f"{ENCODER}/1", f"{DECODER}/2"},
    "m2m": {f"{layer}/feed_forward_residual" for layer in M2M_LAYERS},
    "compressed": {f"{layer}/feed_forward_residual" for layer in M2M_LAYERS},
}
NOWHERE = {backbone: set() for backbone in PREFIXED}
PROMPTED = {
    "bert": {"embeddings/word_embeddings"},
    "modernbert": {"embeddings/tok_embeddings"},
    "t5": {""},
    "m2m": {""},
    "compressed": {""},
}


# Path in a layer of BERT -> path in a layer of DistilBERT.
IN_DISTILBERT = {
    "attention/self": "attention",
    "attention/self/query": "attention/q_lin",
    "attention/self/key": "attention/k_lin",
    "attention/self/value": "attention/v_lin",
    "attention/output": "attention_residual",
    "attention/output/dense": "attention/out_lin",
    "output": "output_residual",
    "output/dense": "ffn/lin2",
}

# The layers of a speech model are those of an M2M-100.
SAME_PLACES = {"speech": "m2m"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The expected behaviour of a preset.

    Attributes:
      cls: the class of the method.
      values: the fields of the preset, as published.
      changed: another value for every field of the class, in the first row of each class.
      fields: settings that make it fit a width of 12.
      places: for BERT, ModernBERT, T5 and both M2M-100s, the paths of the modules that have an
        adapter.
      start: the largest change of a logit by an untrained adapter, relative to the largest logit:
        from rounding alone, or from weights drawn with a small deviation; None where it is large,
        as for new tokens or weights of order one.
      count: the number of trained parameters apart from the task's head, by the papers; the
        sub-layers are of one kind, in all layers.
      still: a regular expression for the paths that the first step cannot move, because they are
        multiplied by zero.
      no_gradient: a regular expression for the paths that have no effect on the logits.
      unmerged: backbone -> the message of `merge_adapter` if the method cannot be merged there.
    """

    cls: type
    values: Mapping[str, Any]
    changed: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    places: Mapping[str, set[str]]
    start: float | None
    count: Callable[[Any], int]
    still: str = ""
    no_gradient: str = ""
    unmerged: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def places_in(self, backbone: str) -> set[str]:
        """Returns the places in a backbone; the encoders have those of BERT."""
        backbone = SAME_PLACES.get(backbone, backbone)
        if backbone in self.places:
            return self.places[backbone]
        if backbone != "distilbert":
            return self.places["bert"]
        return {_in_distilbert(path) for path in self.places["bert"]}


def _in_distilbert(path: str) -> str:
    if not path.startswith("encoder/layer/"):
        return path
    _, _, layer, rest = path.split("/", 3)
    return f"transformer/layer/{layer}/{IN_DISTILBERT[rest]}"


BOTH_SITES = ("attention", "feed_forward")
# Bottlenecks of the paper's comparison, with the values of its released configurations.
OF_THE_PAPER = {
    "reduction_factor": 32,
    "non_linearity": "gelu_new",
    "scaling": 1.0,
    "dropout": 0.0,
    "layer_norm_before": False,
    "layer_norm_after": False,
    "parallel": False,
    "original_ln_before": False,
    "leave_out": (),
    "train_layer_norms": True,
}
DENSE = OF_THE_PAPER | {"w_init": "normal", "w_init_up": "same", "w_init_range": 1e-2}
PHM = OF_THE_PAPER | {
    "sites": BOTH_SITES,
    "phm_rank": 1,
    "factorized_phm_rule": False,
    "shared_W_phm": False,
    "learn_phm": True,
    "phm_c_init": "normal",
    "w_init": "glorot-uniform",
    "w_init_up": "same",
}
COMPACTER = PHM | {
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_phm_rule": True,
    "phm_init_range": 1e-4,
}
# Presets of AdapterHub and of the methods' own papers: they freeze the layer norms.
PARALLEL_VALUES = {
    "sites": ("parallel_feed_forward",),
    "parallel": True,
    "reduction_factor": 2,
    "non_linearity": "relu",
    "w_init": "lora",
}
BOTTLENECK_CHANGED = {
    "sites": ("residual_attention",),
    "leave_out": (0, 3),
    "reduction_factor": 8,
    "expansion_factor": 3,
    "non_linearity": "relu",
    "w_init": "glorot-normal",
    "w_init_up": "zeros",
    "w_init_range": 0.5,
    "scaling": -0.25,
    "dropout": 0.1,
    "inner_dropout": 0.2,
    "layer_norm_before": True,
    "layer_norm_after": True,
    "parallel": True,
    "original_ln_before": True,
    "original_ln_after": False,
    "residual_before_ln": False,
}

ROUNDING = 1e-6
# Only the second layer is adapted in BERT, ModernBERT and the encoders; the decoders have only one
# layer, which is left out.
WITHOUT_FIRST = {
    "bert": {path.replace("/0/", "/1/") for path in BOTH["bert"]},
    "modernbert": {path.replace("/0/", "/1/") for path in BOTH["modernbert"]},
    "t5": {f"encoder/block/1/layer/{p}" for p in ("0/SelfAttention/o", "1/DenseReluDense/wo")},
    "m2m": {f"encoder/layers/1/{p}" for p in ("self_attn/out_proj", "fc2")},
    "compressed": {f"encoder/layers/1/{p}" for p in ("self_attn/out_proj", "fc2")},
}
WITHOUT_BIASES = {
    "bert": set(),
    "m2m": set(),
    "compressed": set(),
    # The first layer has no norm before its attention.
    "modernbert": projections(("query", "key", "value"))["modernbert"]
    | of_modernbert("attn/Wo", "mlp_norm", "mlp/Wi", "mlp/Wo")
    | {f"{MODERN_LAYERS[1]}/attn_norm"},
    "t5": projections("qkvo")["t5"]
    | {f"{place}/{name}" for place in T5_FEED_FORWARD for name in ("wi", "wo")}
    | {f"{ENCODER}/{i}/layer_norm" for i in range(2)}
    | {f"{DECODER}/{i}/layer_norm" for i in range(3)}
    | {""},
}
PROMPT = Row(
    cls=cj.PromptTuningConfig,
    values={
        "sites": ("embedding",),
        "prompt_length": 100,
        "prompt_init": "random",
        "prompt_init_range": 0.5,
    },
    fields={"prompt_length": 3},
    places=PROMPTED,
    start=None,
    count=lambda s: s.prompt * s.e,
)
INTRINSIC = Row(
    cls=cj.IntrinsicConfig,
    values={"dimension": 20_000, "structure_aware": False},
    fields={"dimension": 30},
    places=NOWHERE,
    start=ROUNDING,
    count=lambda s: s.dimension,
)
AFTER_FEED_FORWARD = Row(
    cls=cj.PHMBottleneckConfig,
    values=COMPACTER | {"sites": ("feed_forward",)},
    fields=SMALL,
    places=SERIAL["feed_forward"],
    start=1e-5,
    count=lambda s: compacter(s, s.sublayers) + s.norms,
)
BESIDE = Row(
    cls=cj.BottleneckConfig,
    values=PARALLEL_VALUES | {"scaling": 1.0},
    places=PARALLEL,
    start=ROUNDING,
    count=lambda s: s.sublayers * bottleneck(s),
    still=r".*/adapter/down/.*",
    unmerged=dict.fromkeys(
        ("bert", "modernbert", "t5", "distilbert"),
        "cannot become wider by the bottlenecks beside them",
    ),
)
STACKS = {
    "bert": {"embeddings"},
    "modernbert": {"embeddings"},
    "t5": {"encoder", "decoder"},
    "m2m": {"encoder", "decoder"},
    "compressed": {"encoder", "decoder"},
}
BESIDE_ATTENTION = {
    "bert": {f"{LAYER}/attention/output"},
    "modernbert": of_modernbert("attn"),
    "t5": set(T5_ATTENTIONS[:2]),
    "m2m": set(M2M_ATTENTIONS[:2]),
    "compressed": {M2M_ATTENTIONS[0]},
}
RELU_HALF = {"reduction_factor": 2, "non_linearity": "relu"}
ZERO_UP = {"w_init": "glorot-uniform", "w_init_up": "zeros"}
CIAT_PARTS = (
    {
        "sites": ("encoder_embedding", "decoder_embedding"),
        "layer_norm_before": True,
        **RELU_HALF,
    },
    {"sites": ("parallel_attention", "parallel_feed_forward"), "parallel": True, **RELU_HALF},
)
CIAT = Row(
    cls=cj.CombinedConfig,
    values={"parts": tuple(cj.BottleneckConfig(**part, **ZERO_UP) for part in CIAT_PARTS)},
    places=both(STACKS, both(BESIDE_ATTENTION, PARALLEL)),
    start=ROUNDING,
    count=lambda s: (
        s.stacks * (2 * s.d + bottleneck(s)) + (s.self_attentions + s.sublayers) * bottleneck(s)
    ),
    still=r".*/adapter/(down|layer_norm_before)/.*",
)
# Weights have a deviation of 0.01, or 0.02 in AdapterHub's presets; rules have 0.01 in PHM-Adapter
# and 0.0001 in Compacter.
ROWS = {
    "full": Row(
        cls=cj.FullFineTuningConfig,
        values={"train_layer_norms": True, "train_pooler": True},
        changed={"train_layer_norms": False, "train_pooler": False},
        places=NOWHERE,
        start=ROUNDING,
        count=lambda s: s.everything - s.head,
        no_gradient=r".*(/self/key|/k_proj|/k_lin)/bias",
    ),
    "head-only": Row(
        cls=cj.HeadOnlyConfig,
        values={"train_head": True, "train_layer_norms": False, "train_pooler": False},
        changed={"train_layer_norms": True, "train_pooler": True},
        places=NOWHERE,
        start=ROUNDING,
        count=lambda s: 0,
    ),
    "houlsby": Row(
        cls=cj.BottleneckConfig,
        values=DENSE | {"sites": BOTH_SITES},
        changed=BOTTLENECK_CHANGED,
        fields=HALF,
        places=BOTH,
        start=1e-2,
        count=lambda s: (s.self_attentions + s.sublayers) * bottleneck(s) + s.norms,
    ),
    "pfeiffer-attention": Row(
        cls=cj.BottleneckConfig,
        values=DENSE | {"sites": ("attention",)},
        fields=HALF,
        places=SERIAL["attention"],
        start=1e-2,
        count=lambda s: s.self_attentions * bottleneck(s) + s.norms,
    ),
    "pfeiffer-feed-forward": Row(
        cls=cj.BottleneckConfig,
        values={
            "sites": ("residual_feed_forward",),
            "reduction_factor": 16,
            "non_linearity": "relu",
            "w_init": "normal",
            "w_init_range": 2e-2,
            "original_ln_before": True,
            "original_ln_after": True,
            "residual_before_ln": True,
        },
        fields=HALF,
        places=AFTER_RESIDUAL,
        start=2e-2,
        count=lambda s: s.sublayers * bottleneck(s),
    ),
    "adapterdrop": Row(
        cls=cj.BottleneckConfig,
        values=DENSE | {"sites": BOTH_SITES, "leave_out": (0, 1, 2, 3, 4)},
        fields=HALF | {"leave_out": (0,)},
        places=WITHOUT_FIRST,
        start=1e-2,
        count=lambda s: 2 * s.kept * bottleneck(s) + s.norms,
    ),
    "low-rank": Row(
        cls=cj.LowRankBottleneckConfig,
        values=OF_THE_PAPER | {"sites": BOTH_SITES, "rank": 1, "w_init": "glorot-uniform"},
        changed=BOTTLENECK_CHANGED | {"rank": 3},
        fields=HALF,
        places=BOTH,
        start=None,
        count=lambda s: (s.self_attentions + s.sublayers) * (2 * (s.d + s.r) + s.r + s.d) + s.norms,
    ),
    "phm": Row(
        cls=cj.PHMBottleneckConfig,
        values=PHM
        | {
            "phm_dim": 12,
            "factorized_phm_W": False,
            "shared_phm_rule": False,
            "phm_init_range": 1e-2,
        },
        changed=BOTTLENECK_CHANGED
        | {
            "phm_dim": 2,
            "phm_rank": 3,
            "factorized_phm_W": False,
            "shared_phm_rule": False,
            "factorized_phm_rule": True,
            "shared_W_phm": True,
            "learn_phm": False,
            "phm_c_init": "uniform",
            "phm_init_range": 0.125,
        },
        fields=SMALL,
        places=BOTH,
        start=1e-2,
        count=lambda s: (
            (s.self_attentions + s.sublayers) * (2 * (s.n**3 + s.d * s.r // s.n) + s.r + s.d)
            + s.norms
        ),
    ),
    "compacter": Row(
        cls=cj.PHMBottleneckConfig,
        values=COMPACTER,
        fields=SMALL,
        places=BOTH,
        start=1e-5,
        count=lambda s: compacter(s, s.self_attentions + s.sublayers) + s.norms,
    ),
    "compacter++": AFTER_FEED_FORWARD,
    "compacter++-short": dataclasses.replace(
        AFTER_FEED_FORWARD,
        values={**AFTER_FEED_FORWARD.values, "phm_c_init": "glorot", "w_init_up": "zeros"},
        start=ROUNDING,
    ),
    "bitfit": Row(
        cls=cj.BitFitConfig,
        values={"sites": ("linear", "norm", "logits")},
        changed={"sites": ("norm",), "leave_out": (1,)},
        places=WITHOUT_BIASES,
        start=ROUNDING,
        count=lambda s: s.biases,
        no_gradient=r".*(/self/key/bias|/k/adapter/bias|/k_proj/bias|/k_lin/bias)",
    ),
    "prompt-tuning-random": dataclasses.replace(
        PROMPT,
        changed={
            "sites": ("words",),
            "leave_out": (1,),
            "prompt_length": 7,
            "prompt_init": "vocabulary",
            "prompt_init_range": 0.125,
            "prompt_token_ids": (5, 0, 5),
        },
    ),
    "prompt-tuning-vocabulary": dataclasses.replace(
        PROMPT,
        values={**PROMPT.values, "prompt_init": "vocabulary"},
        fields={"prompt_length": 3, "prompt_token_ids": (5, 2)},
    ),
    "intrinsic-said": dataclasses.replace(
        INTRINSIC,
        values={**INTRINSIC.values, "structure_aware": True},
        changed={"dimension": 7, "structure_aware": False, "projection_seed": 2**31 - 1},
        # The scales have no effect while the vector is zero.
        still=r"intrinsic_scale",
    ),
    "intrinsic": INTRINSIC,
    "lora": Row(
        cls=cj.LoRAConfig,
        values={"sites": ("query", "value"), "rank": 8, "lora_alpha": 8.0, "use_rslora": False},
        changed={
            "sites": ("key",),
            "leave_out": (1,),
            "rank": 2,
            "lora_alpha": 3.0,
            "use_rslora": True,
            "dropout": 0.1,
        },
        fields={"rank": 2, "lora_alpha": 3.0},
        places=projections(("query", "value")),
        start=ROUNDING,
        count=lambda s: s.k * s.query_value,
        still=r".*/adapter/left",
    ),
    "ia3": Row(
        cls=cj.IA3Config,
        values={"sites": ("key", "value"), "input_sites": ("feed_forward",)},
        changed={"sites": ("query",), "input_sites": ("key", "value"), "leave_out": (2,)},
        places=both(projections(("key", "value")), SERIAL["feed_forward"]),
        start=ROUNDING,
        count=lambda s: s.key_value + s.units,
    ),
    "prefix-tuning": Row(
        cls=cj.PrefixTuningConfig,
        values={
            "sites": ("encoder_key_value", "decoder_key_value", "cross_key_value"),
            "prefix_length": 30,
            "flat": False,
            "bottleneck_size": 512,
            "non_linearity": "tanh",
            "shift_positions": False,
        },
        changed={
            "sites": ("cross_key_value",),
            "prefix_length": 3,
            "flat": True,
            "bottleneck_size": 4,
            "non_linearity": "relu",
            "dropout": 0.25,
            "shift_positions": True,
        },
        fields=PREFIX,
        places=PREFIXED,
        start=None,
        count=prefix,
    ),
    "parallel": BESIDE,
    "scaled-parallel": dataclasses.replace(BESIDE, values=PARALLEL_VALUES | {"scaling": 4.0}),
    "mam": Row(
        cls=cj.CombinedConfig,
        values={
            "parts": (
                cj.PrefixTuningConfig(bottleneck_size=800),
                cj.BottleneckConfig(**PARALLEL_VALUES, scaling=4.0),
            )
        },
        changed={
            "parts": (
                cj.LoRAConfig(rank=3),
                cj.PHMBottleneckConfig(phm_dim=2),
                cj.BitFitConfig(leave_out=(1,)),
            )
        },
        fields=PREFIX,
        places=both(PREFIXED, PARALLEL),
        start=None,
        count=lambda s: prefix(s) + s.sublayers * bottleneck(s),
        still=r".*/adapter/down/.*",
    ),
    "ciat": CIAT,
    "compacter-ciat": Row(
        cls=cj.CombinedConfig,
        values={"parts": tuple(cj.PHMBottleneckConfig(**part) for part in CIAT_PARTS)},
        fields={"phm_dim": 3},
        places=CIAT.places,
        start=1e-5,
        count=lambda s: (
            compacter(s, s.stacks + s.self_attentions + s.sublayers) + s.stacks * 2 * s.d
        ),
    ),
    "serial-ciat": Row(
        cls=cj.BottleneckConfig,
        values={
            "sites": ("residual_feed_forward",),
            "layer_norm_before": True,
            "original_ln_before": True,
            "original_ln_after": False,
            "residual_before_ln": False,
            **RELU_HALF,
            **ZERO_UP,
        },
        places=AFTER_RESIDUAL,
        start=ROUNDING,
        count=lambda s: s.sublayers * (2 * s.d + bottleneck(s)),
        still=CIAT.still,
    ),
    "mad-x": Row(
        cls=cj.CombinedConfig,
        values={
            "parts": (
                cj.BottleneckConfig(
                    sites=("residual_feed_forward",),
                    reduction_factor=2,
                    non_linearity="gelu",
                    w_init_range=0.02,
                    original_ln_before=True,
                ),
                cj.InvertibleConfig(),
            )
        },
        places=both(
            AFTER_RESIDUAL,
            {name: hosts - {"decoder"} for name, hosts in STACKS.items()},
        ),
        start=1e-2,
        count=lambda s: s.sublayers * bottleneck(s) + invertible(s),
    ),
    "st": Row(
        cls=cj.BottleneckConfig,
        values={
            "sites": ("feed_forward",),
            "layer_norm_before": True,
            "w_init": "normal",
            "w_init_up": "same",
            "w_init_range": 1e-2,
            **RELU_HALF,
        },
        places=SERIAL["feed_forward"],
        start=1e-2,
        count=lambda s: s.sublayers * (2 * s.d + bottleneck(s)),
    ),
    "compacter-st": Row(
        cls=cj.PHMBottleneckConfig,
        values=COMPACTER
        | {
            "sites": ("feed_forward",),
            "layer_norm_before": True,
            "train_layer_norms": False,
            **RELU_HALF,
        },
        fields={"phm_dim": 3},
        places=SERIAL["feed_forward"],
        start=1e-5,
        count=lambda s: compacter(s, s.sublayers) + s.sublayers * 2 * s.d,
    ),
}
# Kind -> another value for every field.
CHANGED = {row.cls.kind: row.changed for row in ROWS.values() if row.changed is not None}
# A part of presets alone; its coupling has one value.
CHANGED["invertible"] = {
    "sites": ("encoder_embedding",),
    "leave_out": (1,),
    "reduction_factor": 3,
    "non_linearity": "gelu",
    "w_init_range": 0.125,
}
# A part that `fit --trained-sites` adds to a method.
CHANGED["trained_sites"] = {"sites": ("query",), "leave_out": (1,)}
