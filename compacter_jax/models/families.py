"""What loading and saving need to know of each family: architectures, Hugging Face names, ties."""

import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.files import check_fields
from compacter_jax.messages import listing, quote, shorten
from compacter_jax.models.bert import HEADS as BERT_HEADS
from compacter_jax.models.bert import Bert, BertConfig
from compacter_jax.models.t5 import HEADS as T5_HEADS
from compacter_jax.models.t5 import T5, T5Config

Params = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What loading needs to know of one `model_type`.

    Attributes:
      architectures: name in config.json -> head.
      heads: all that its modules have.
      module: `(config of transformers, head, num_labels, dropout_rate, **module attributes)`
        -> module.
      from_hugging_face: tensors -> nested parameters.
      parts: path prefixes that a checkpoint may lack (they are initialised) or have in excess
        (they are left out), each as a whole: heads and poolers.
      ties: path -> the path of the same values under another name, transposed if one is a kernel
        and the other an embedding. Checkpoints may hold such a copy though the module has none.
      to_hugging_face: inverse of `from_hugging_face`.
      surplus: path prefixes that a checkpoint may have in excess, but not lack.
      untie: a module whose parameters of `ties` are its own takes the values of the other name
        where the checkpoint has only those and its configuration ties them. transformers 5 ties
        every T5 and saves one copy.
      config_class: what the module is told; its fields are those of config.json.
      depths: field of config.json -> path of the layers that it counts.
      ambiguous_parts: those of `parts` that several heads call by the same name; they are left out
        where config.json names an architecture with another head.
    """

    architectures: Mapping[str, str | None]
    heads: tuple[str | None, ...]
    module: Callable[..., nn.Module]
    from_hugging_face: Callable[[Mapping[str, np.ndarray]], Params]
    parts: tuple[str, ...]
    ties: Mapping[str, str]
    to_hugging_face: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    config_class: type[Any]
    depths: Mapping[str, str]
    surplus: tuple[str, ...] = ()
    untie: bool = False
    ambiguous_parts: tuple[str, ...] = ()


def _add(
    flat: dict[str, np.ndarray], origin: dict[str, str], path: str, array: np.ndarray, name: str
) -> None:
    if path in flat:
        raise ValueError(
            f"{quote(origin[path], 100)} and {quote(name, 100)} both mean the parameter "
            f"{shorten(path, 100)}"
        )
    flat[path], origin[path] = array, name


def _to_tensors(params: Mapping[str, Any], known: re.Pattern[str], family: str) -> dict[str, Any]:
    """`.`-joined name without any prefix -> C-contiguous array in PyTorch's orientation."""
    flat = flatten_dict(params, sep="/")
    strangers = [path for path in flat if not known.fullmatch(path)]
    if strangers:
        raise ValueError(
            f"not parameters of {family}: {listing(strangers, most=4)}; take adapters out of the "
            "parameters before converting them"
        )
    tensors = {}
    for path, leaf in flat.items():
        *parents, kind = path.split("/")
        array = np.asarray(leaf)
        name = ".".join([*parents, "bias" if kind == "bias" else "weight"])
        tensors[name] = np.ascontiguousarray(array.T if kind == "kernel" else array)
    return tensors


# --- BERT ---------------------------------------------------------------------------------------

_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_DECODER_BIAS, _PREDICTIONS_BIAS = "cls/predictions/decoder/bias", "cls/predictions/bias"


def bert_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Parameters of `Bert` from the tensors of a Hugging Face checkpoint.

    Names may carry the prefix `bert.` or not. Layer norms may be called gamma and beta as in the
    oldest checkpoints. The buffer `embeddings.position_ids` is left out, and so is the copy of
    `cls.predictions.bias` that is called `cls.predictions.decoder.bias`.

    Args:
      tensors: name -> array; PyTorch's `[out, in]` weights of dense layers.

    Returns:
      Nested dict of arrays with `[in, out]` kernels, dtypes unchanged; kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, two names mean the same parameter, or
        the two biases of the masked language model differ.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.removeprefix("bert.") == "embeddings.position_ids":
            continue
        _add(flat, origin, *_bert_parameter(name, tensor), name)
    if _DECODER_BIAS in flat:
        copy = flat.pop(_DECODER_BIAS)
        if not np.array_equal(copy, flat.setdefault(_PREDICTIONS_BIAS, copy)):
            raise ValueError(
                f"{origin[_DECODER_BIAS]!r} and {origin[_PREDICTIONS_BIAS]!r} differ, but are two "
                "names of one parameter; remove the wrong one"
            )
    return unflatten_dict(flat, sep="/")


def bert_to_hugging_face(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `bert_from_hugging_face`: tensors under the names that transformers saves.

    With a head, the encoder's names start with `bert.`; without one they do not. A tied decoder
    of a masked language model is not repeated.

    Args:
      params: nested parameters of `Bert`, without adapters.

    Returns:
      Name -> C-contiguous array on the host, fit for `safetensors.numpy.save_file` (which writes
      a view's memory in the wrong order), dtypes unchanged.

    Raises:
      ValueError: if a parameter is not one that `Bert` makes.
    """
    has_head = any(top in params for top in ("classifier", "qa_outputs", "cls"))
    encoder = ("embeddings", "encoder", "pooler")
    return {
        f"bert.{name}" if has_head and name.partition(".")[0] in encoder else name: tensor
        for name, tensor in _to_tensors(params, _BERT_PATH, "BERT").items()
    }


_BERT_DENSE = (
    r"encoder/layer/\d+/(attention/self/(query|key|value)|(attention/output|intermediate|output)"
    r"/dense)|pooler/dense|classifier|qa_outputs|cls/predictions/transform/dense"
)
_BERT_NORM = (
    r"(embeddings|encoder/layer/\d+/(attention/)?output|cls/predictions/transform)/LayerNorm"
)
_BERT_PATH = re.compile(
    rf"embeddings/(word|position|token_type)_embeddings/embedding|({_BERT_DENSE})/(kernel|bias)|"
    rf"({_BERT_NORM})/(scale|bias)|cls/predictions/(decoder/kernel|bias)"
)


def _bert_parameter(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    modern = name.removeprefix("bert.")
    for old, new in _LEGACY_NAMES.items():
        if modern.endswith(old):
            modern = modern.removesuffix(old) + new
    *parents, kind = modern.split(".")
    if kind == "bias":
        return "/".join([*parents, "bias"]), tensor
    if kind != "weight" or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of BERT: its name ends in neither weight nor "
            "bias"
        )
    if parents[-1] == "LayerNorm":
        return "/".join([*parents, "scale"]), tensor
    if parents[-1].endswith("_embeddings"):
        return "/".join([*parents, "embedding"]), tensor
    return "/".join([*parents, "kernel"]), tensor.T


def _bert_module(
    config: Any, head: str | None, num_labels: int | None, dropout_rate: float | None, **attributes
) -> Bert:
    for name, supported in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        value = getattr(config, name, supported)
        if value != supported:
            raise ValueError(
                f"{name}={quote(value, 100)} in the configuration is not supported; only "
                f"{supported!r} is"
            )
    ours = BertConfig(**{f.name: getattr(config, f.name) for f in fields(BertConfig)})
    if dropout_rate is not None:
        ours = replace(
            ours,
            hidden_dropout_prob=dropout_rate,
            attention_probs_dropout_prob=dropout_rate,
            classifier_dropout=dropout_rate,
        )
    if head in ("sequence_classification", "token_classification"):
        attributes["num_labels"] = config.num_labels if num_labels is None else num_labels
    elif num_labels is not None and head in BERT_HEADS:
        raise ValueError(
            f"num_labels={num_labels} was given, but head={head!r} has no labels; leave it out or "
            "use head='sequence_classification' or 'token_classification'"
        )
    return Bert(ours, head=head, **attributes)


# --- T5 -----------------------------------------------------------------------------------------

_T5_ATTENTION = r"layer/0/SelfAttention|layer/1/EncDecAttention"
_T5_PATH = re.compile(
    rf"shared/embedding|lm_head/kernel|(encoder|decoder)/(final_layer_norm/scale|block/\d+/"
    rf"(layer/[012]/layer_norm/scale|({_T5_ATTENTION})/[qkvo]/kernel|"
    r"layer/0/SelfAttention/relative_attention_bias/embedding|"
    r"layer/[12]/DenseReluDense/(wi|wi_0|wi_1|wo)/kernel))"
)
_T5_LEFTOVER = "EncDecAttention.relative_attention_bias.weight"
_T5_COPIES = ("encoder/embed_tokens/embedding", "decoder/embed_tokens/embedding")


def t5_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Parameters of `T5` from the tensors of a Hugging Face checkpoint.

    The relative attention bias of the cross-attention that old checkpoints have, and no model
    reads, is left out; so are the copies `…embed_tokens.weight` of `shared.weight`, for which one
    of them may stand.

    Args:
      tensors: name -> array; PyTorch's `[out, in]` weights of dense layers.

    Returns:
      Nested dict of arrays with `[in, out]` kernels, dtypes unchanged; kernels are views.

    Raises:
      ValueError: if a name is not that of a weight, two names mean the same parameter, or two
        copies of the embedding differ.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.endswith(_T5_LEFTOVER):
            continue
        _add(flat, origin, *_t5_parameter(name, tensor), name)
    for path in _T5_COPIES:
        if path not in flat:
            continue
        copy = flat.pop(path)
        if not np.array_equal(copy, flat.setdefault("shared/embedding", copy)):
            raise ValueError(
                f"{origin[path]!r} differs from the shared embedding, but every T5 has one "
                "embedding for encoder and decoder; remove the wrong one"
            )
    return unflatten_dict(flat, sep="/")


def t5_to_hugging_face(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `t5_from_hugging_face`: tensors under the names that transformers saves.

    Args:
      params: nested parameters of `T5`, without adapters.

    Returns:
      Name -> C-contiguous array on the host, dtypes unchanged. `shared.weight` is not repeated.

    Raises:
      ValueError: if a parameter is not one that `T5` makes.
    """
    return _to_tensors(params, _T5_PATH, "T5")


def _t5_parameter(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    *parents, kind = name.split(".")
    if kind != "weight" or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of T5: its name does not end in weight"
        )
    if parents[-1].endswith("layer_norm"):
        return "/".join([*parents, "scale"]), tensor
    if parents[-1] in ("shared", "embed_tokens", "relative_attention_bias"):
        return "/".join([*parents, "embedding"]), tensor
    return "/".join([*parents, "kernel"]), tensor.T


def _t5_module(
    config: Any, head: str | None, num_labels: int | None, dropout_rate: float | None, **attributes
) -> T5:
    if num_labels is not None:
        raise ValueError(
            f"num_labels={num_labels} was given, but T5 has no classifier: it answers in text"
        )
    values = {f.name: getattr(config, f.name) for f in fields(T5Config) if hasattr(config, f.name)}
    values["tie_word_embeddings"] = _is_tied(config)
    if isinstance(values["eos_token_id"], list):
        values["eos_token_id"] = values["eos_token_id"][0]
    if values.get("decoder_start_token_id") is None:
        values["decoder_start_token_id"] = values["pad_token_id"]
    if dropout_rate is not None:
        values["dropout_rate"] = dropout_rate
    return T5(T5Config(**values), head=head, **attributes)


def _is_tied(config: Any) -> bool:
    """Whether the head is the embedding and its input is scaled.

    transformers 5 says `tie_word_embeddings=True` of every T5 and mT5, whatever config.json says.
    It scales a T5 where `scale_decoder_outputs`, which keeps what config.json says, and never mT5.
    """
    if config.model_type == "mt5":
        written_by = getattr(config, "transformers_version", None) or ""
        if type(config)().tie_word_embeddings or written_by.startswith("5."):
            return False
    return config.tie_word_embeddings and getattr(config, "scale_decoder_outputs", True)


def _t5_family(prefix: str) -> Family:
    return Family(
        architectures={
            f"{prefix}ForConditionalGeneration": "conditional_generation",
            f"{prefix}WithLMHeadModel": "conditional_generation",
            f"{prefix}Model": None,
            f"{prefix}EncoderModel": "encoder",
        },
        heads=T5_HEADS,
        module=_t5_module,
        from_hugging_face=t5_from_hugging_face,
        to_hugging_face=t5_to_hugging_face,
        config_class=T5Config,
        depths={"num_layers": "encoder/block", "num_decoder_layers": "decoder/block"},
        parts=(),
        surplus=("decoder", "lm_head"),
        ties={"lm_head/kernel": "shared/embedding"},
        untie=True,
    )


FAMILIES = {
    "bert": Family(
        architectures={
            "BertModel": None,
            "BertForSequenceClassification": "sequence_classification",
            "BertForTokenClassification": "token_classification",
            "BertForMaskedLM": "masked_lm",
            "BertForPreTraining": "masked_lm",
            "BertForQuestionAnswering": "question_answering",
        },
        heads=BERT_HEADS,
        module=_bert_module,
        from_hugging_face=bert_from_hugging_face,
        to_hugging_face=bert_to_hugging_face,
        config_class=BertConfig,
        depths={"num_hidden_layers": "encoder/layer"},
        parts=("pooler", "classifier", "qa_outputs", "cls/predictions", "cls/seq_relationship"),
        ties={"cls/predictions/decoder/kernel": "embeddings/word_embeddings/embedding"},
        ambiguous_parts=("classifier",),
    ),
    "t5": _t5_family("T5"),
    "mt5": _t5_family("MT5"),
}
"""`model_type` of config.json -> what is known of it."""


# Fields of config.json that every family has -> type.
_COMMON_FIELDS: Mapping[str, Any] = {
    "architectures": list[str] | None,
    "id2label": dict[str, Any] | None,
    "label2id": dict[str, Any] | None,
    "num_labels": int | None,
    "tie_word_embeddings": bool,
    "transformers_version": str | None,
    "is_decoder": bool,
    "add_cross_attention": bool,
    "position_embedding_type": str | None,
    "scale_decoder_outputs": bool | None,
}
# Larger than any model that was published, and small enough to be described in seconds.
_MOST_LAYERS = 512
_MOST_LABELS = 2**20
_LARGEST_SIZE = 2**28


def check_settings(where: str, settings: Mapping[str, Any], family: Family) -> None:
    """Checks fields of config.json, or attributes of what transformers makes of it.

    Args:
      where: they are from, for messages.
      settings: name -> value.
      family: of the model.

    Raises:
      ValueError: if one is of another type than the module wants, or too large for any model.
    """
    own = typing.get_type_hints(family.config_class)
    # transformers reads a list here, too, and null as the number of layers of the encoder.
    others = {"eos_token_id": int | list[int] | None, "num_decoder_layers": int | None}
    fields = {**own, **{name: others[name] for name in others.keys() & own.keys()}}
    check_fields(where, settings, {**_COMMON_FIELDS, **fields})
    for name in ("id2label", "label2id"):
        if len(settings.get(name) or ()) > _MOST_LABELS:
            raise ValueError(f"{where}: {name} has more than {_MOST_LABELS:,} labels")
    for name in (*fields, "num_labels"):
        most = _LARGEST_SIZE
        if name in family.depths:
            most = _MOST_LAYERS
        elif name == "num_labels":
            most = _MOST_LABELS
        value = settings.get(name)
        if type(value) is int and value > most:
            raise ValueError(
                f"{where}: {name}={quote(value, 40)} is too large; at most {most:,} is supported"
            )


def check_depths(where: str, config: Any, family: Family, paths: Iterable[str]) -> None:
    """Checks that there are weights for as many layers as a configuration says.

    Raises:
      ValueError: if there are fewer, before a module of so many is made.
    """
    paths = list(paths)
    for field, prefix in family.depths.items():
        layer = re.compile(rf"{prefix}/(\d{{1,9}})/")
        found = {int(match[1]) for match in map(layer.match, paths) if match}
        said = getattr(config, field)
        if found and said > max(found) + 1:
            raise ValueError(
                f"{where}: {field}={said}, but the weights are of {max(found) + 1} layers; weights "
                "are missing in the checkpoint, or config.json is of another model"
            )


def family_of(config: Any) -> Family:
    """The family of a configuration of transformers; ValueError if it is not supported."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={quote(config.model_type)} is not supported; supported: "
            f"{', '.join(map(repr, FAMILIES))}"
        )
    return FAMILIES[config.model_type]
