"""A fine-tuning method as a frozen dataclass: what to train, and where it goes."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from compacter_jax.messages import listing, quote
from compacter_jax.paths import ADAPTER, BIAS, GROUPS, OCCUPIED, REPLACED, SHARED, Groups, group_of

# Of a size or an index: products of two are still numbers of 64 bits, which shapes are made of.
_LARGEST_INT = 2**31 - 1


WEIGHT_INITS = ("glorot-uniform", "glorot-normal", "normal", "lora")


_FACTOR_INITS = WEIGHT_INITS[:3]


PROMPT_INITS = ("random", "vocabulary")


RULE_INITS = ("normal", "uniform")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (lists become tuples, ints floats); ValueError otherwise."""
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{name}={quote(value)} must be a list")
        element = typing.get_args(hint)[0]
        return tuple(_typed(name, item, element) for item in value)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            wanted = ", ".join(map(repr, choices))
            raise ValueError(f"{name}={quote(value)} must be one of {wanted}")
        return value
    if hint is float and type(value) is int:
        # JSON has whole numbers that no float can hold.
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        # Exactly the type, for a bool is an int too; but a kind of method is a method.
        fits = isinstance(value, hint) if issubclass(hint, MethodConfig) else type(value) is hint
    else:
        fits = True
    if not fits:
        raise ValueError(f"{name}={quote(value)} must be of type {hint.__name__}")
    if hint is int and abs(value) > _LARGEST_INT:
        raise ValueError(f"{name}={quote(value, 40)} is too large; use at most {_LARGEST_INT:,}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={quote(value)} must be {wanted}")


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name}={quote(value)}; use one of {', '.join(choices)}")


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:100], known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _either(values: list[int]) -> str:
    """`1, 2 or 4`."""
    head = ", ".join(map(str, values[:-1]))
    return f"{head} or {values[-1]}" if head else str(values[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method says about the parameters of the backbone.

    Attributes:
      train_layer_norms: train the backbone's layer norms too. The paper does for every method
        (arXiv:2106.04647, section 5.1), AdapterHub does not.
      train_head: train the task's head. A pre-trained language-modelling head stays frozen.
      train_pooler: train the pooler of an encoder that has one.
    """

    kind: ClassVar[str] = ""

    train_layer_norms: bool = False
    train_head: bool = True
    train_pooler: bool = False

    def replace(self, **overrides: Any) -> Self:
        """A copy with `overrides`; a field this method does not have is a ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                raise ValueError(
                    f"method {self.kind!r} has no field {quote(name, 100)}{_near(name, known)}; "
                    f"its fields are {', '.join(known)}"
                )
        return dataclasses.replace(self, **overrides)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, _typed(field.name, getattr(self, field.name), hints[field.name])
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuningConfig(MethodConfig):
    """Every parameter of the backbone and its head is trained; nothing is inserted."""

    kind: ClassVar[str] = "full"

    train_layer_norms: bool = True
    train_pooler: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsertedConfig(MethodConfig):
    """What every method says that acts at sites of the backbone.

    Attributes:
      sites: where the method acts, names from the backbone's table of sites.
      leave_out: indices of layers in which it does not.
    """

    # Whether the sites named by default are passed over in a backbone that does not have them.
    passes_over: ClassVar[bool] = False

    sites: tuple[str, ...] = ()
    leave_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.all_sites():
            raise ValueError("sites is empty; name at least one, 'feed_forward' for example")
        for site, count in collections.Counter(self.all_sites()).items():
            if count > 1:
                raise ValueError(f"sites names {quote(site, 100)} twice; name each site once")
        for index in self.leave_out:
            _require(index >= 0, "leave_out", index, "layer indices from 0 on")

    def all_sites(self) -> tuple[str, ...]:
        """Every site the method acts at."""
        return self.sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(InsertedConfig):
    """A bottleneck adapter, `x + scaling * up(act(down(x)))`, with dense projections.

    Attributes:
      reduction_factor: the bottleneck is `width // reduction_factor` wide.
      non_linearity: the activation: gelu, gelu_10, gelu_accurate, gelu_fast, gelu_new, gelu_python,
        gelu_python_tanh, gelu_pytorch_tanh, leaky_relu, linear, mish, quick_gelu, relu, relu2,
        relu6, sigmoid, silu, swish or tanh.
      w_init: distribution of the projections' initial weights; one of `WEIGHT_INITS`. The Glorot
        kinds have gain sqrt(2), as the authors of Compacter use; `lora` starts `up` at zero, for
        dense projections and LoRA alone.
      w_init_range: standard deviation of `w_init="normal"`.
      scaling: factor on the adapter's output.
      dropout: rate on the method's output before it is added.
      layer_norm_before: a layer norm of the adapter's own, on its input.
      layer_norm_after: a layer norm of the adapter's own, on its output before the skip connection.
      parallel: the adapter reads the sub-layer's input (at the sites `residual_...`, its residual)
        and is added to the sub-layer's output; for the sites `parallel_...` and `residual_...`.
      original_ln_before: at the sites `residual_...`, the adapter reads the sub-layer's output with
        its residual added and, in a backbone that normalises after, normalised.
      original_ln_after: at the sites `residual_...`, residual and norm of the sub-layer follow the
        adapter; otherwise its output is the sub-layer's.
      residual_before_ln: with `original_ln_before`, the adapter's skip connection starts before
        residual and norm are applied; False: after both; `post_add`: between the two, at the sum.

    References:
      Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019, arXiv:1902.00751;
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022,
      arXiv:2110.04366 (parallel); `original_ln_...` and `residual_before_ln` are AdapterHub's.
    """

    kind: ClassVar[str] = "bottleneck"
    linear: ClassVar[str] = "dense"

    sites: tuple[str, ...] = ("attention", "feed_forward")
    reduction_factor: int = 32
    non_linearity: str = "gelu_new"
    w_init: str = "normal"
    w_init_range: float = 1e-2
    scaling: float = 1.0
    dropout: float = 0.0
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: Literal[True, False, "post_add"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.reduction_factor >= 1, "reduction_factor", self.reduction_factor, "at least 1"
        )
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError(
                "residual_before_ln='post_add' is for adapters that read the sum with the "
                "residual; set original_ln_before=True"
            )
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        _require(self.w_init_range > 0, "w_init_range", self.w_init_range, "above 0")
        _choose("w_init", self.w_init, self._weight_inits())

    def _weight_inits(self) -> tuple[str, ...]:
        return WEIGHT_INITS

    def bottleneck_width(self, width: int) -> int:
        """Width of the bottleneck beside a hidden state of `width`; ValueError if it would be 0."""
        bottleneck = width // self.reduction_factor
        if bottleneck < 1:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck beside a width of "
                f"{width}; use at most {width}"
            )
        return bottleneck


@dataclasses.dataclass(frozen=True, kw_only=True)
class PHMBottleneckConfig(BottleneckConfig):
    """A bottleneck adapter whose projections are sums of Kronecker products.

    `W = sum_i rule[i] (x) blocks[i]`: with `shared_phm_rule` and `factorized_phm_W` this is
    Compacter, with neither the PHM-Adapter. Names are those of the reference implementation.

    Attributes:
      phm_dim: `n`, the number of Kronecker products; divides the width and the bottleneck.
      phm_rank: rank of the blocks where `factorized_phm_W`.
      factorized_phm_W: blocks are products `left @ right` of rank `phm_rank`.
      shared_phm_rule: one rule for the whole model; otherwise each projection has its own.
      factorized_phm_rule: the rule itself is a product of rank one, `[n, n, 1] @ [n, 1, n]`.
      shared_W_phm: one set of blocks for all adapters (down and up), owned by the model.
      learn_phm: train the rule; otherwise it stays at its initial value.
      phm_c_init: distribution of the rule's initial values; one of `RULE_INITS`
        (`uniform` is on [-1, 1]).
      phm_init_range: standard deviation of the rule, and of the blocks where `w_init="normal"`.

    References:
      Karimi Mahabadi et al., Compacter, NeurIPS 2021, arXiv:2106.04647, section 3.
    """

    kind: ClassVar[str] = "phm_bottleneck"
    linear: ClassVar[str] = "phm"

    w_init: str = "glorot-uniform"
    phm_dim: int = 4
    phm_rank: int = 1
    factorized_phm_W: bool = True
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    shared_W_phm: bool = False
    learn_phm: bool = True
    phm_c_init: str = "normal"
    phm_init_range: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.phm_dim >= 1, "phm_dim", self.phm_dim, "at least 1")
        _require(self.phm_rank >= 1, "phm_rank", self.phm_rank, "at least 1")
        _require(self.phm_init_range > 0, "phm_init_range", self.phm_init_range, "above 0")
        _choose("phm_c_init", self.phm_c_init, RULE_INITS)

    def _weight_inits(self) -> tuple[str, ...]:
        return _FACTOR_INITS

    def bottleneck_width(self, width: int) -> int:
        """As for the dense bottleneck; ValueError unless `phm_dim` divides both widths."""
        bottleneck = super().bottleneck_width(width)
        if width % self.phm_dim or bottleneck % self.phm_dim:
            fits = [n for n in range(1, bottleneck + 1) if not (width % n or bottleneck % n)]
            raise ValueError(
                f"phm_dim={self.phm_dim} does not divide both the width {width} and the "
                f"bottleneck width {bottleneck} ({width} // {self.reduction_factor}); "
                f"use {_either(fits)}"
            )
        return bottleneck


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankBottleneckConfig(BottleneckConfig):
    """A bottleneck adapter whose projections are products `left @ right` of low rank.

    The released code multiplies the two element by element, which is the product at rank 1 alone.

    Attributes:
      rank: of each projection.

    References:
      arXiv:2106.04647, section 5.2 ("Low-rank").
    """

    kind: ClassVar[str] = "low_rank_bottleneck"
    linear: ClassVar[str] = "low_rank"

    w_init: str = "glorot-uniform"
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.rank >= 1, "rank", self.rank, "at least 1")

    def _weight_inits(self) -> tuple[str, ...]:
        return _FACTOR_INITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(InsertedConfig):
    """A low-rank update of linear layers, `x @ W + lora_alpha / rank * (x @ left) @ right`.

    `left` starts as PyTorch's linear layers do, `right` at zero.

    Attributes:
      rank: of each update.
      lora_alpha: the update is multiplied by `lora_alpha / rank`.
      use_rslora: divide by `sqrt(rank)` instead, arXiv:2312.03732.
      dropout: rate on the update's input.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685.
    """

    kind: ClassVar[str] = "lora"

    sites: tuple[str, ...] = ("query", "value")
    rank: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.rank >= 1, "rank", self.rank, "at least 1")
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")

    @property
    def factor(self) -> float:
        """What the update is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(InsertedConfig):
    """Learned factors on keys, values and the inner activations of the feed-forward network.

    Attributes:
      sites: linear layers whose outputs are multiplied, element by element.
      input_sites: linear layers whose inputs are multiplied, element by element.

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
      Learning, NeurIPS 2022, arXiv:2205.05638.
    """

    kind: ClassVar[str] = "ia3"

    sites: tuple[str, ...] = ("key", "value")
    input_sites: tuple[str, ...] = ("feed_forward",)

    def all_sites(self) -> tuple[str, ...]:
        """Those of outputs, then those of inputs."""
        return self.sites + self.input_sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(InsertedConfig):
    """Learned keys and values in front of those of each attention.

    Attributes:
      prefix_length: how many.
      flat: learn them directly; otherwise they are `kernel_layer^T act(W e + b) + bias_layer` of
        learned embeddings `e`, with `W` and `e` shared by the layers of a site.
      bottleneck_size: width of `W e`, where not flat.
      non_linearity: the activation, where not flat.
      dropout: rate on the keys and values.
      shift_positions: where positions are relative (T5), count those of tokens' keys from the first
        prefix, but not those of queries, as AdapterHub does; otherwise the prefixes have no bias
        and tokens keep theirs.

    References:
      Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021,
      arXiv:2101.00190.
    """

    kind: ClassVar[str] = "prefix_tuning"
    passes_over: ClassVar[bool] = True

    sites: tuple[str, ...] = ("encoder_key_value", "decoder_key_value", "cross_key_value")
    prefix_length: int = 30
    flat: bool = False
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    shift_positions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.prefix_length >= 1, "prefix_length", self.prefix_length, "at least 1")
        _require(self.bottleneck_size >= 1, "bottleneck_size", self.bottleneck_size, "at least 1")
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        if self.shift_positions and self.leave_out:
            raise ValueError(
                f"shift_positions=True and leave_out={self.leave_out} do not go together: layers "
                "share one bias of positions, prefixes counted or not"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(InsertedConfig):
    """Learned embeddings in front of those of the (encoder's) input tokens.

    Attributes:
      prompt_length: how many.
      prompt_init: `random`, uniform, or `vocabulary`, embeddings of the backbone's tokens.
      prompt_init_range: half the width of `random`.
      prompt_token_ids: the tokens of `vocabulary`, repeated where there are fewer than
        `prompt_length`.

    References:
      Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021,
      arXiv:2104.08691.
    """

    kind: ClassVar[str] = "prompt_tuning"

    sites: tuple[str, ...] = ("embedding",)
    prompt_length: int = 100
    prompt_init: str = "random"
    prompt_init_range: float = 0.5
    prompt_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.prompt_length >= 1, "prompt_length", self.prompt_length, "at least 1")
        _require(self.prompt_init_range > 0, "prompt_init_range", self.prompt_init_range, "above 0")
        _choose("prompt_init", self.prompt_init, PROMPT_INITS)
        for token in self.prompt_token_ids:
            _require(token >= 0, "prompt_token_ids", token, "ids of tokens, from 0 on")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(InsertedConfig):
    """Train the biases of the backbone, or new ones where it has none.

    Attributes:
      sites: linear layers, norms and logits that get a new bias, initially zero.

    References:
      Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
      Language-models, ACL 2022, arXiv:2106.10199; new biases: the released code of
      arXiv:2106.04647.
    """

    kind: ClassVar[str] = "bitfit"
    passes_over: ClassVar[bool] = True

    sites: tuple[str, ...] = ("linear", "norm", "logits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntrinsicConfig(MethodConfig):
    """Move all of the backbone within a random subspace of few dimensions.

    `theta_j = theta_j(0) + scale_layer(j) (P v)_j`, `P` a fixed Fastfood projection: `v` and, where
    `structure_aware`, one scale for each layer are trained, `dimension` numbers in all.

    Attributes:
      dimension: numbers trained, the scales counted.
      structure_aware: learn a scale for each layer (SAID); otherwise all are 1.
      projection_seed: of the random projection; it is not stored, but drawn again when needed.

    References:
      Aghajanyan et al., Intrinsic Dimensionality Explains the Effectiveness of Language Model
      Fine-Tuning, ACL 2021, arXiv:2012.13255; Le et al., Fastfood, ICML 2013, arXiv:1408.3060.
    """

    kind: ClassVar[str] = "intrinsic"

    dimension: int = 20_000
    structure_aware: bool = True
    projection_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.dimension >= 1, "dimension", self.dimension, "at least 1")
        _require(
            0 <= self.projection_seed < 2**31,
            "projection_seed",
            self.projection_seed,
            "from 0 to 2**31 - 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinedConfig(MethodConfig):
    """Several methods at once, at different sites.

    Attributes:
      parts: the methods; what they say of norms, head and pooler is not read.
    """

    kind: ClassVar[str] = "combined"

    parts: tuple[InsertedConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("parts is empty; name at least one method")
        sharing = [
            part
            for part in self.parts
            if isinstance(part, PHMBottleneckConfig) and (part.shared_phm_rule or part.shared_W_phm)
        ]
        if len(sharing) > 1:
            raise ValueError(
                f"{len(sharing)} of the parts share a rule or blocks under the same names; set "
                "shared_phm_rule=False and shared_W_phm=False in all but one"
            )

    def replace(self, **overrides: Any) -> Self:
        """A copy with `overrides` of its own fields or of those that one part alone has."""
        own = {field.name for field in dataclasses.fields(self)}
        hint = tuple[InsertedConfig, ...]
        parts = list(_typed("parts", overrides.get("parts", self.parts), hint))
        for name in overrides.keys() - own:
            having = [
                i
                for i, part in enumerate(parts)
                if name in {field.name for field in dataclasses.fields(part)}
            ]
            if len(having) != 1:
                kinds = ", ".join(part.kind for part in parts)
                raise ValueError(
                    f"{name!r} is a field of {len(having) or 'none'} of the parts {kinds}; "
                    "replace `parts` instead"
                )
            parts[having[0]] = parts[having[0]].replace(**{name: overrides[name]})
        kept = {name: value for name, value in overrides.items() if name in own}
        return super().replace(**{**kept, "parts": tuple(parts)})


@dataclasses.dataclass(frozen=True, init=False)
class Composition(MethodConfig):
    """What all compositions of adapters have in common; a composition is a method.

    Members may be compositions themselves. Layer norms, head, pooler and, with BitFit, biases that
    a member trains are its own: the backbone keeps the ones it had, so the fields `train_…` are
    those of the members.

    Attributes:
      members: methods, given by position.
      names: of the members in the tree of parameters, `…/adapter/NAME/…`; by default 0, 1, ….
      frozen: names of members that are not trained.
    """

    members: tuple[MethodConfig, ...] = ()
    names: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __init__(self, *members: MethodConfig, **fields: Any) -> None:
        if members:
            fields["members"] = members
        known = {field.name: field.default for field in dataclasses.fields(self)}
        for name in fields.keys() - known.keys():
            raise ValueError(
                f"method {self.kind!r} has no field {quote(name, 100)}{_near(name, list(known))}; "
                f"its fields are {', '.join(known)}"
            )
        for name, default in known.items():
            object.__setattr__(self, name, fields.get(name, default))
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members:
            raise ValueError(f"{self.kind} has no members; name at least one method")
        for name in ("train_layer_norms", "train_head", "train_pooler"):
            if getattr(self, name) != getattr(MethodConfig, name):
                raise ValueError(f"{name} is for the members of {self.kind!r} to say; set it there")
        for member in self.members:
            if not isinstance(member, InsertedConfig | CombinedConfig | Composition):
                raise ValueError(
                    f"method {member.kind!r} cannot be a member of {self.kind!r}: it changes "
                    "weights of the backbone; use one that inserts something"
                )
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.members)))))
        self._check_names()
        copies_of(self)

    def _check_names(self) -> None:
        if len(self.names) != len(self.members) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"names={quote(self.names)} must be {len(self.members)} different names, one for "
                "each "
                "member"
            )
        for name in self.names:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (REPLACED, OCCUPIED):
                raise ValueError(
                    f"{quote(name, 100)} cannot name a member; use letters, digits, '_', '-' and "
                    "'.', and "
                    f"neither {REPLACED!r} nor {OCCUPIED!r}"
                )
        for name in self.frozen:
            if name not in self.names:
                raise ValueError(
                    f"frozen names {quote(name, 100)}{_near(name, list(self.names))}, but the "
                    f"members are {listing(self.names)}"
                )

    def _refuse(self, kinds: type | types.UnionType, why: str) -> None:
        """ValueError if a method anywhere in the composition is one of `kinds`."""
        for part in parts_of(self):
            if isinstance(part, kinds):
                raise ValueError(f"method {part.kind!r} cannot be in {self.kind!r}: {why}")

    def _refuse_unjoined(self) -> None:
        for part in parts_of(self):
            if isinstance(part, BottleneckConfig) and not part.original_ln_after:
                raise ValueError(
                    f"original_ln_after=False cannot be in {self.kind!r}: what a member returns "
                    "would take the place of the residual that others read; set it to True"
                )


@dataclasses.dataclass(frozen=True, init=False)
class Bank(Composition):
    """Adapters of one shape, of which each row of a batch uses one, or a mixture.

    Their parameters are those of one adapter with a leading axis `size`. A model with a bank is
    called with `adapter_ids` `[batch]`, the member of each row (-1: the plain backbone), or with
    `mix`, weights of the members' outputs.

    `stack_adapters` makes one of saved adapters; `Bank(method, size=n)` is a method like any other,
    with `init_adapters` for parameters to train.

    Attributes:
      size: how many there is room for; a program that is compiled for a size serves all members
        that come and go.
      shared_rule: all members have one rule, if each has one for the whole model; otherwise each
        has its own.
    """

    kind: ClassVar[str] = "bank"

    size: int = 1
    shared_rule: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.size >= 1, "size", self.size, "at least 1")
        if len(self.members) != 1 or isinstance(self.members[0], Composition):
            raise ValueError(
                "a bank has one method, which is no composition, and `size` adapters of it; "
                "compose banks, rather than to bank compositions"
            )
        if self.shared_rule:
            self._check_rule()

    def _check_rule(self) -> None:
        rules = [part for part in parts_of(self.member) if isinstance(part, PHMBottleneckConfig)]
        if not any(part.shared_phm_rule for part in rules):
            has = "has a rule in every projection" if rules else "has no rule"
            fix = "set shared_phm_rule=True in it, or " if rules else ""
            raise ValueError(
                f"shared_rule=True is for a method with one rule for the whole model, and "
                f"{self.member.kind!r} {has}; {fix}leave shared_rule out"
            )

    @property
    def member(self) -> MethodConfig:
        """The method of every member."""
        return self.members[0]

    @property
    def has_plain(self) -> bool:
        """Whether a row can be one of the plain backbone: not with tokens or positions put in."""
        return not any(
            isinstance(part, PromptTuningConfig) or getattr(part, "shift_positions", False)
            for part in parts_of(self.member)
        )


@dataclasses.dataclass(frozen=True, init=False)
class Stack(Composition):
    """Adapters one on top of the other: at each site a member reads what the one before returns.

    Layer norms (or biases, of BitFit) can be one member's alone; the head is the last member's.

    References:
      Pfeiffer et al., MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer,
      EMNLP 2020, arXiv:2005.00052.
    """

    kind: ClassVar[str] = "stack"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unjoined()
        prompts = [part for part in parts_of(self) if isinstance(part, PromptTuningConfig)]
        if len(prompts) > 1:
            raise ValueError("a stack can have one member that is 'prompt_tuning', not several")
        owners = [
            name
            for name, member in zip(self.names, self.members, strict=True)
            if any(own.replaces & {"layer norms", "biases"} for own in members_of(member, True))
        ]
        if len(owners) > 1:
            raise ValueError(
                f"the members {', '.join(owners)} of a stack each have layer norms or biases of "
                "their own, and a host can have one; set train_layer_norms=False in all but one"
            )


@dataclasses.dataclass(frozen=True, init=False)
class Parallel(Composition):
    """Adapters beside each other: the rows of a batch go through each, and a call returns a tuple.

    Rows are copied for each member where the backbone begins, so a call costs what one call for
    each would, in one program. A T5 is called like any other backbone, but `generate` takes a model
    of one member, and the command line has adapters beside each other on encoders alone, for tasks
    with labels or scores.
    """

    kind: ClassVar[str] = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unjoined()
        self._refuse(
            PrefixTuningConfig | PromptTuningConfig,
            "its rows are longer than those of the other members; call each model by itself",
        )


@dataclasses.dataclass(frozen=True, init=False)
class Average(Composition):
    """The weighted sum of the members' outputs at every site, `sum_m w_m y_m`.

    What is missing from a sum of 1 is what there would be without adapters, so the weights can be
    those of task arithmetic, too. Heads and layer norms are averaged likewise.

    Attributes:
      weights: one for each member; by default the mean.

    References:
      Wang et al., Efficient Test Time Adapter Ensembling for Low-resource Language Varieties,
      Findings of EMNLP 2021, arXiv:2109.04877.
    """

    kind: ClassVar[str] = "average"

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            count = len(self.members)
            object.__setattr__(self, "weights", (1 / count,) * count)
        if len(self.weights) != len(self.members):
            raise ValueError(
                f"weights={self.weights} must be {len(self.members)}, one for each member"
            )
        self._refuse_unjoined()
        self._refuse(
            PrefixTuningConfig | PromptTuningConfig,
            "what it adds are tokens to attend to, and no output that could be averaged",
        )


@dataclasses.dataclass(frozen=True, init=False)
class AverageMaps(Average):
    """One adapter whose linear maps are the weighted sums of the members' maps.

    `down` is `sum_m w_m W_m`, and so are `up`, biases and layer norms; the non-linearity is between
    them, so this costs one adapter and is not the average of outputs. Nor is it the average of
    parameters, where maps are products of factors: with `W_m = sum_i A_i (x) l_i r_i`, averaged
    factors bring in `A_i (x) l_i r_i` with each factor from another member, `M^3` terms where
    the average of maps has the `M` whose factors belong together. For methods without a
    non-linearity (LoRA, IA3, BitFit) it is equal to `Average`.

    References:
      Wang et al., AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, EMNLP 2022,
      arXiv:2205.12410 (averages parameters of dense adapters, which are their maps).
    """

    kind: ClassVar[str] = "average_maps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(isinstance(member, Composition | CombinedConfig) for member in self.members):
            raise ValueError("average_maps is of single methods; compositions have no one map")
        if isinstance(self.members[0], BottleneckConfig):
            twins = [_without_init(member) for member in self.members]
            if any(twin != twins[0] for twin in twins):
                raise ValueError(
                    f"the members {', '.join(self.names)} of average_maps differ in more than how "
                    "their projections are stored; their widths, sites and activations must agree"
                )
        elif len({type(member) for member in self.members}) > 1:
            kinds = ", ".join(member.kind for member in self.members)
            raise ValueError(f"average_maps is of members of one kind, not of {kinds}")


@dataclasses.dataclass(frozen=True)
class Member:
    """A single method of a composition.

    Attributes:
      path: names that lead to it; none outside of compositions and in a bank that is the method.
      method: what it is.
      bank: the bank whose members it describes, or None.
      trained: whether it is.
      replaces: groups of the backbone's parameters of which it has its own: "layer norms", "head",
        "pooler" or "biases".
    """

    path: tuple[str, ...]
    method: MethodConfig
    bank: Bank | None = None
    trained: bool = True
    replaces: frozenset[str] = frozenset()


def members_of(method: MethodConfig, composed: bool = False) -> tuple[Member, ...]:
    """The single methods of a composition, or the one that `method` is, in order.

    Args:
      method: any method.
      composed: whether it is a member of a composition.
    """
    if isinstance(method, Bank):
        replaces = _replaced_groups(method.member)
        return (Member((), method.member, method, method.names[0] not in method.frozen, replaces),)
    if not isinstance(method, Composition):
        return (Member((), method, replaces=_replaced_groups(method) if composed else frozenset()),)
    members: list[Member] = []
    for name, child in zip(method.names, method.members, strict=True):
        # The head follows the whole stack.
        keeps_head = not isinstance(method, Stack) or name == method.names[-1]
        members += [
            dataclasses.replace(
                member,
                path=(name, *member.path),
                trained=member.trained and name not in method.frozen,
                replaces=member.replaces - (set() if keeps_head else {"head", "pooler"}),
            )
            for member in members_of(child, composed=True)
        ]
    return tuple(members)


def _replaced_groups(method: MethodConfig) -> frozenset[str]:
    choices = {
        # Made for the task, so it is the member's whether it is trained or not.
        "head": True,
        "layer norms": method.train_layer_norms,
        "pooler": method.train_pooler,
        "biases": any(isinstance(part, BitFitConfig) for part in parts_of(method)),
    }
    return frozenset(group for group, chosen in choices.items() if chosen)


def own_path(members: tuple[Member, ...], path: str) -> tuple[Member, str] | None:
    """Whose a leaf of a composition is, and its path in a model of that member alone.

    Args:
      members: of the composition.
      path: `/`-joined.

    Returns:
      None for what is the backbone's, or says which places of a bank are occupied.
    """
    parts = path.split("/")
    if parts[0] == SHARED:
        host, inside = [], parts[1:]
    elif ADAPTER in parts:
        split = parts.index(ADAPTER)
        host, inside = parts[:split], parts[split + 1 :]
    else:
        is_inserted = any(re.fullmatch(GROUPS[group], path) for group in ("rule", "adapters"))
        at_root = not members[0].path and is_inserted
        return (members[0], path) if at_root else None
    member = next(m for m in members if tuple(inside[: len(m.path)]) == m.path)
    rest = inside[len(member.path) :]
    if rest == [OCCUPIED]:
        return None
    if rest[0] == REPLACED:
        return member, "/".join((*host, *rest[1:]))
    own = rest if parts[0] == SHARED else (*host, ADAPTER, *rest)
    return member, "/".join(own)


def copies_of(method: MethodConfig) -> int:
    """How many times a model of `method` has every row of a batch."""
    if not isinstance(method, Composition):
        return 1
    copies = [copies_of(member) for member in method.members]
    if isinstance(method, Parallel):
        return sum(copies)
    if len(set(copies) - {1}) > 1:
        raise ValueError(
            f"the members {', '.join(method.names)} of {method.kind!r} have {copies} copies of a "
            "row; those with several must have as many"
        )
    return max(copies)


METHODS: dict[str, type[MethodConfig]] = {
    cls.kind: cls
    for cls in (
        FullFineTuningConfig,
        BottleneckConfig,
        PHMBottleneckConfig,
        LowRankBottleneckConfig,
        LoRAConfig,
        IA3Config,
        PrefixTuningConfig,
        PromptTuningConfig,
        BitFitConfig,
        IntrinsicConfig,
        CombinedConfig,
    )
}


COMPOSITIONS: dict[str, type[Composition]] = {
    cls.kind: cls for cls in (Bank, Stack, Parallel, Average, AverageMaps)
}


_PARALLEL = BottleneckConfig(
    sites=("parallel_feed_forward",),
    parallel=True,
    reduction_factor=2,
    non_linearity="relu",
    w_init="lora",
)


_PRESETS: dict[str, MethodConfig] = {
    "full": FullFineTuningConfig(),
    "houlsby": BottleneckConfig(train_layer_norms=True),
    "pfeiffer-attention": BottleneckConfig(sites=("attention",), train_layer_norms=True),
    "pfeiffer-feed-forward": BottleneckConfig(
        sites=("residual_feed_forward",),
        reduction_factor=16,
        non_linearity="relu",
        w_init_range=2e-2,
        original_ln_before=True,
    ),
    "adapterdrop": BottleneckConfig(leave_out=(0, 1, 2, 3, 4), train_layer_norms=True),
    "low-rank": LowRankBottleneckConfig(train_layer_norms=True),
    "phm": PHMBottleneckConfig(
        phm_dim=12,
        factorized_phm_W=False,
        shared_phm_rule=False,
        phm_init_range=1e-2,
        train_layer_norms=True,
    ),
    "compacter": PHMBottleneckConfig(train_layer_norms=True),
    "compacter++": PHMBottleneckConfig(sites=("feed_forward",), train_layer_norms=True),
    "bitfit": BitFitConfig(),
    "prompt-tuning-random": PromptTuningConfig(),
    "prompt-tuning-vocabulary": PromptTuningConfig(prompt_init="vocabulary"),
    "intrinsic-said": IntrinsicConfig(),
    "intrinsic": IntrinsicConfig(structure_aware=False),
    "lora": LoRAConfig(),
    "ia3": IA3Config(),
    "prefix-tuning": PrefixTuningConfig(),
    "parallel": _PARALLEL,
    "scaled-parallel": _PARALLEL.replace(scaling=4.0),
    "mam": CombinedConfig(
        parts=(PrefixTuningConfig(bottleneck_size=800), _PARALLEL.replace(scaling=4.0))
    ),
}


def parallel_names(method: MethodConfig) -> tuple[str, ...]:
    """Of what a call of a model returns, if that is a tuple: names of members, `/`-joined."""
    if not isinstance(method, Composition):
        return ()
    inner = [parallel_names(member) for member in method.members]
    if not isinstance(method, Parallel):
        return max(inner, key=len)
    return tuple(
        "/".join(filter(None, (name, each)))
        for name, names in zip(method.names, inner, strict=True)
        for each in names or ("",)
    )


def parts_of(method: MethodConfig) -> tuple[InsertedConfig, ...]:
    """What `method` inserts: itself, its parts, those of all its members, or nothing."""
    if isinstance(method, CombinedConfig):
        return method.parts
    if isinstance(method, Composition):
        return tuple(part for member in method.members for part in parts_of(member))
    return (method,) if isinstance(method, InsertedConfig) else ()


def dense_twin(method: BottleneckConfig) -> BottleneckConfig:
    """The dense bottleneck that computes what `method` does once its weights are built."""
    fields = {field.name for field in dataclasses.fields(BottleneckConfig)}
    return BottleneckConfig(**{name: getattr(method, name) for name in fields})


def _without_init(method: MethodConfig) -> MethodConfig:
    """The dense twin of a bottleneck, its initial values and what it trains left out of account."""
    if not isinstance(method, BottleneckConfig):
        return method
    default = BottleneckConfig()
    names = ("w_init", "w_init_range", "train_layer_norms", "train_head", "train_pooler")
    return dense_twin(method).replace(**{name: getattr(default, name) for name in names})


def presets() -> tuple[str, ...]:
    """The names `preset` knows."""
    return tuple(_PRESETS)


def preset(name: str, **overrides: Any) -> MethodConfig:
    """A method by name, with any of its fields replaced.

    Those of the paper's comparison are as in its released configurations for T5-base (bottlenecks
    of `width // 32`, tanh GELU, learning rate as given), and train the backbone's layer norms where
    these do; the others are as in the papers and libraries named. All train the head.

    | preset | what | learning rate | source |
    |---|---|---|---|
    | `full` | every parameter | 3e-4 | arXiv:2106.04647 |
    | `houlsby` | dense bottlenecks after attention and feed-forward | 3e-4 | arXiv:2106.04647 |
    | `pfeiffer-attention` | the same after self-attention alone: the authors' Pfeiffer | 3e-4 |
      arXiv:2106.04647 |
    | `pfeiffer-feed-forward` | AdapterHub's (`seq_bn`): after feed-forward, reading the normalised
      sum with the residual; ReLU, `width // 16`, layer norms frozen | 1e-4 | arXiv:2005.00052 |
    | `adapterdrop` | `houlsby` without the first five layers of encoder and decoder | 3e-4 |
      arXiv:2106.04647, arXiv:2010.11918 |
    | `low-rank` | projections of rank 1, both sites | 3e-3 | arXiv:2106.04647 |
    | `phm` | PHM-Adapter: `phm_dim=12`, own rule per projection (standard deviation 0.01, whatever
      the released flags say), full blocks, both sites | 3e-3 | arXiv:2106.04647 |
    | `compacter` | `phm_dim=4`, one shared rule, rank-one blocks, both sites | 3e-3 |
      arXiv:2106.04647 |
    | `compacter++` | Compacter after feed-forward alone | 3e-3 | arXiv:2106.04647 |
    | `bitfit` | biases, of T5 new ones at all linear layers, at norms within layers and at the
      logits | 3e-4 | arXiv:2106.04647, arXiv:2106.10199 |
    | `prompt-tuning-random` | 100 embeddings before the input, uniform on [-0.5, 0.5] | 3e-2 |
      arXiv:2106.04647, arXiv:2104.08691 |
    | `prompt-tuning-vocabulary` | the same from the embeddings of `prompt_token_ids` | 3e-1 |
      arXiv:2106.04647, arXiv:2104.08691 |
    | `intrinsic-said` | all weights within 20,000 dimensions, a scale for each layer | 3e-2 |
      arXiv:2106.04647, arXiv:2012.13255 |
    | `intrinsic` | the same without scales | 3e-2 | arXiv:2012.13255; the rate is that of
      arXiv:2106.04647 for `intrinsic-said` |
    | `lora` | rank 8 on queries and values, `lora_alpha` 8 | 5e-4 | arXiv:2106.09685, table 9
      (RoBERTa) |
    | `ia3` | factors on keys, values and inner feed-forward activations | 3e-3 |
      arXiv:2205.05638 |
    | `prefix-tuning` | 30 keys and values before each attention's, through a bottleneck of 512 |
      2e-4 | AdapterHub's `prefix_tuning`, arXiv:2101.00190; the rate was chosen here |
    | `parallel` | a bottleneck of `width // 2` beside feed-forward, ReLU, `up` zero at first |
      1e-4 | arXiv:2110.04366 |
    | `scaled-parallel` | the same times 4 | 1e-4 | arXiv:2110.04366 |
    | `mam` | `scaled-parallel` with 30 prefixes, through a bottleneck of 800 | 1e-4 |
      AdapterHub's `mam`; arXiv:2110.04366 |

    Args:
      name: one of `presets()`.
      **overrides: fields of that preset's dataclass.

    Raises:
      ValueError: unknown name or field, or a value that cannot work; it says which would.

    Example:
      >>> preset("compacter++", reduction_factor=16).bottleneck_width(768)
      48
      >>> preset("lora", rank=4, sites=("query", "key")).factor
      2.0
    """
    if name not in _PRESETS:
        raise ValueError(
            f"unknown method preset {quote(name, 100)}{_near(name, list(_PRESETS))}; "
            f"known are {', '.join(_PRESETS)}"
        )
    return _PRESETS[name].replace(**overrides)


def to_dict(method: MethodConfig) -> dict[str, Any]:
    """The method as JSON-ready values, with its `kind`."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"kind": method.kind, **{name: _to_json(value) for name, value in values.items()}}


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return to_dict(value) if isinstance(value, MethodConfig) else value


def from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """Inverse of `to_dict`; ValueError for an unknown kind, field or value."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a method must be a mapping of its fields, not {quote(values)}")
    fields = dict(values)
    kind = fields.pop("kind", None)
    classes = METHODS | COMPOSITIONS
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"unknown kind of method {quote(kind)}; known are {', '.join(classes)}")
    cls = classes[kind]
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ValueError(
                f"method {kind!r} has no field {quote(name, 100)}{_near(name, known)}; "
                f"its fields are {', '.join(known)}"
            )
    for name in ("parts", "members"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(from_dict(part) for part in fields[name])
    return cls(**fields)


def replaces(member: Member, path: str, groups: Groups | None = None) -> bool:
    """Whether a composition's member has a leaf of its own in place of the backbone's at `path`."""
    group = group_of(path, groups)
    bias = "biases" in member.replaces and group != "head" and BIAS.fullmatch(path)
    return bool(bias) or group in member.replaces
