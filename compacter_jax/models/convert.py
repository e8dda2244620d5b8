"""Hugging Face checkpoints <-> parameters of the linen backbones, read without PyTorch."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.models.bert import HEADS as BERT_HEADS
from compacter_jax.models.bert import Bert, BertConfig

Dtype = Any
Params = dict[str, Any]

logger = logging.getLogger("compacter_jax")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Backbone:
    """A pretrained model: `module.apply({"params": params}, input_ids, attention_mask)`.

    Attributes:
      module: the linen module.
      params: nested plain dict of arrays, in structure and shapes what `module.init` makes.
      config: the configuration of transformers, as it was loaded.
      name: the folder or hub id it was loaded from.
      new_parameters: `/`-joined paths of the parameters that the checkpoint does not have and
        that were initialised.
    """

    module: nn.Module
    params: Params
    config: Any
    name: str
    new_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """What loading needs to know of one `model_type`.

    Attributes:
      architectures: name in config.json -> head.
      module: `(config of transformers, head, num_labels, dropout_rate, **module attributes)`
        -> module.
      from_hugging_face: tensors -> nested parameters.
      parts: path prefixes that a checkpoint may lack (they are initialised) or have in excess
        (they are left out), each as a whole: heads and poolers.
      ties: path -> the path of the same values under another name, transposed if one is a kernel
        and the other an embedding. Checkpoints may hold such a copy though the module has none.
      ambiguous_parts: those of `parts` that several heads call by the same name; they are left out
        where config.json names an architecture with another head.
    """

    architectures: Mapping[str, str | None]
    module: Callable[..., nn.Module]
    from_hugging_face: Callable[[Mapping[str, np.ndarray]], Params]
    parts: tuple[str, ...]
    ties: Mapping[str, str]
    ambiguous_parts: tuple[str, ...] = ()


def load_backbone(
    path_or_hub_id: str | Path,
    *,
    head: str | None = "auto",
    num_labels: int | None = None,
    dropout_rate: float | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    remat: bool = False,
    seed: int = 0,
) -> Backbone:
    """Reads a Hugging Face checkpoint: config.json and safetensors, whole or in shards.

    A head or pooler that the checkpoint does not have is initialised from `seed`, logged as a
    warning and listed in `new_parameters`; one that the module does not have is left out and
    logged.

    Args:
      path_or_hub_id: a folder, or the id of a repository on the Hugging Face hub.
      head: "auto" is the head that config.json names in `architectures`; otherwise a head of the
        module, for BERT one of `compacter_jax.models.bert.HEADS` (None: hidden states).
      num_labels: width of a classification head; None is what config.json says (2 if nothing).
      dropout_rate: in place of all the dropout rates of config.json.
      dtype: of the computation; None promotes inputs and parameters as flax does.
      param_dtype: what the parameters are converted to.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      seed: of the parameters that the checkpoint does not have.

    Returns:
      Module, parameters and configuration.

    Raises:
      ValueError: if the folder, its configuration or its weights are not those of a supported
        model, or do not fit the head asked for.
      OSError: if the hub does not answer or has no such repository.
    """
    folder = _folder_of(path_or_hub_id)
    config = _read_config(folder)
    family = _family_of(config)
    module = module_from_config(
        config,
        head=head,
        num_labels=num_labels,
        dropout_rate=dropout_rate,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
    )
    found = flatten_dict(family.from_hugging_face(_read_tensors(folder)), sep="/")
    if _other_task(config, family, module):
        found = _leave_out(found, family.ambiguous_parts, folder)
    params, new = _fit(found, module, family, folder=folder, seed=seed)
    return Backbone(module, params, config, str(path_or_hub_id), new)


def module_from_config(
    config: Any,
    *,
    head: str | None = "auto",
    num_labels: int | None = None,
    dropout_rate: float | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    remat: bool = False,
) -> nn.Module:
    """The module that a configuration of transformers describes, without weights.

    Args:
      config: a configuration of transformers, for instance a `transformers.BertConfig`.
      head: "auto" is the head that `config.architectures` names; otherwise a head of the module.
      num_labels: width of a classification head; None is what the configuration says.
      dropout_rate: in place of all the dropout rates of the configuration.
      dtype: of the computation; None promotes inputs and parameters as flax does.
      param_dtype: of the parameters.
      remat: recompute each layer in the backward pass instead of keeping its activations.

    Returns:
      A linen module, for `init` or `jax.eval_shape`.

    Raises:
      ValueError: if the configuration is not of a supported model, "auto" finds no known
        architecture in it, or `num_labels` is given for a head without labels.
    """
    family = _family_of(config)
    if head == "auto":
        head = _head_of_architecture(config, family)
    return family.module(
        config, head, num_labels, dropout_rate, dtype=dtype, param_dtype=param_dtype, remat=remat
    )


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
        path, array = _from_hugging_face(name, tensor)
        if path in flat:
            raise ValueError(f"{origin[path]!r} and {name!r} both mean the parameter {path}")
        flat[path], origin[path] = array, name
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
    flat = flatten_dict(params, sep="/")
    strangers = [path for path in flat if not _BERT_PATH.fullmatch(path)]
    if strangers:
        raise ValueError(
            f"not parameters of BERT: {_listing(strangers)}; take adapters out of the parameters "
            "before converting them"
        )
    has_head = any(top in params for top in ("classifier", "qa_outputs", "cls"))
    tensors = {}
    for path, leaf in flat.items():
        *parents, kind = path.split("/")
        array = np.asarray(leaf)
        name = ".".join([*parents, "bias" if kind == "bias" else "weight"])
        if has_head and parents[0] in ("embeddings", "encoder", "pooler"):
            name = f"bert.{name}"
        tensors[name] = np.ascontiguousarray(array.T if kind == "kernel" else array)
    return tensors


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


def _from_hugging_face(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    modern = name.removeprefix("bert.")
    for old, new in _LEGACY_NAMES.items():
        if modern.endswith(old):
            modern = modern.removesuffix(old) + new
    *parents, kind = modern.split(".")
    if kind == "bias":
        return "/".join([*parents, "bias"]), tensor
    if kind != "weight" or not parents:
        raise ValueError(
            f"tensor {name!r} is not one of BERT: its name ends in neither weight nor bias"
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
                f"{name}={value!r} in the configuration is not supported; only {supported!r} is"
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


_FAMILIES = {
    "bert": Family(
        architectures={
            "BertModel": None,
            "BertForSequenceClassification": "sequence_classification",
            "BertForTokenClassification": "token_classification",
            "BertForMaskedLM": "masked_lm",
            "BertForPreTraining": "masked_lm",
            "BertForQuestionAnswering": "question_answering",
        },
        module=_bert_module,
        from_hugging_face=bert_from_hugging_face,
        parts=("pooler", "classifier", "qa_outputs", "cls/predictions", "cls/seq_relationship"),
        ties={"cls/predictions/decoder/kernel": "embeddings/word_embeddings/embedding"},
        ambiguous_parts=("classifier",),
    ),
}


# --- configuration ------------------------------------------------------------------------------


def _family_of(config: Any) -> Family:
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported; supported: "
            f"{', '.join(map(repr, _FAMILIES))}"
        )
    return _FAMILIES[config.model_type]


def _head_of_architecture(config: Any, family: Family) -> str | None:
    names = config.architectures or ["none"]
    if names[0] not in family.architectures:
        raise ValueError(
            f"config.json names the architecture {names[0]}; known: "
            f"{', '.join(family.architectures)}. To load the weights all the same, pass head=…"
        )
    return family.architectures[names[0]]


def _other_task(config: Any, family: Family, module: Any) -> bool:
    """Whether the configuration names an architecture with a head, and not that of the module."""
    if not config.architectures:
        return False
    return family.architectures.get(config.architectures[0], "unknown") not in (None, module.head)


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415 (importing compacter_jax stays light)

    file = folder / "config.json"
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json; it must be a folder written by save_pretrained"
        ) from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
    if model_type not in _FAMILIES:
        raise ValueError(
            f"{file} says model_type={model_type!r}; supported: {', '.join(map(repr, _FAMILIES))}"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its classes of errors change between versions of transformers
        raise ValueError(f"{file} is not a configuration of {model_type!r}: {error}") from error


# --- files --------------------------------------------------------------------------------------


def _folder_of(path_or_hub_id: str | Path) -> Path:
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{name} is not a folder, and not the id of a repository on the hub")

    from huggingface_hub import snapshot_download  # noqa: PLC0415 (only needed for hub ids)

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["config.json", "model*.safetensors", INDEX_FILE]
            )
        )
    except Exception as error:  # the classes of the hub's errors change between its versions
        raise OSError(
            f"{name!r} is not a folder here, and could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Check the name and the connection, or download "
            "config.json and *.safetensors and give their folder"
        ) from error


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return _read_safetensors(single)
    if index.is_file():
        return _read_shards(folder, index)
    others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".h5", ".msgpack"))
    raise ValueError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}"
        + (f", only {', '.join(others)}" if others else "")
        + ". Pickled weights (pytorch_model.bin) are never unpickled here, since that can run any "
        "code: convert them where PyTorch is installed, with transformers' "
        "model.save_pretrained(folder, safe_serialization=True)"
    )


def _read_shards(folder: Path, index: Path) -> dict[str, np.ndarray]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: {error!r}") from error
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}, which is not in its folder")
        wanted = [name for name, file in weight_map.items() if file == shard]
        tensors |= _read_safetensors(folder / shard, wanted)
    return tensors


def _read_safetensors(file: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 (only needed for weights)

    try:
        # framework="np" hands out bfloat16 as the dtype of that name which jax registers.
        with safe_open(file, framework="np") as opened:
            tensors = {n: opened.get_tensor(n) for n in (opened.keys() if names is None else names)}
    except FileNotFoundError:
        raise ValueError(
            f"{file.parent / INDEX_FILE} names {file.name}, which is missing"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be read, it is truncated or not what it is said to be: {error}"
        ) from error
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating) and not name.endswith("position_ids"):
            raise ValueError(
                f"{name} in {file} is of type {tensor.dtype}; weights must be floating-point "
                "(quantised checkpoints are not supported)"
            )
    return tensors


# --- fitting tensors to a module ----------------------------------------------------------------


def _fit(
    found: dict[str, np.ndarray], module: Any, family: Family, *, folder: Path, seed: int
) -> tuple[Params, tuple[str, ...]]:
    """Parameters exactly as `module.init` makes them, and the paths of those not in `found`."""

    def initial(key):
        return flatten_dict(module.init(key, *module.dummy_inputs())["params"], sep="/")

    key = jax.random.key(seed)
    wanted = jax.eval_shape(initial, key)
    unused = [part for part in family.parts if not _within(part, wanted)]
    found = _leave_out(found, unused, folder)
    _drop_tied_copies(found, wanted, family, folder)

    absent = [part for part in family.parts if not _within(part, found)]
    new = tuple(path for part in absent for path in _within(part, wanted))
    _check_shapes(found, {p: leaf for p, leaf in wanted.items() if p not in new}, folder)
    fresh: dict[str, Any] = {}
    if new:
        logger.warning(
            "%s does not have %s: newly initialised, to be trained before use",
            folder,
            ", ".join(new),
        )
        # Only these leave the compiled function, so that nothing else is computed.
        fresh = jax.jit(lambda key: {path: initial(key)[path] for path in new})(key)
    flat = {
        path: fresh[path] if path in fresh else jnp.asarray(found[path], leaf.dtype)
        for path, leaf in wanted.items()
    }
    return unflatten_dict(flat, sep="/"), new


def _within(part: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if path.startswith(f"{part}/")]


def _leave_out(
    found: dict[str, np.ndarray], parts: Iterable[str], folder: Path
) -> dict[str, np.ndarray]:
    dropped = [path for part in parts for path in _within(part, found)]
    if dropped:
        logger.info("left out of %s, as of another head: %s", folder, ", ".join(dropped))
    return {path: array for path, array in found.items() if path not in dropped}


def _drop_tied_copies(
    found: dict[str, np.ndarray], wanted: Mapping[str, Any], family: Family, folder: Path
) -> None:
    for path, original in family.ties.items():
        if path in wanted or path not in found or original not in found:
            continue
        copy = found.pop(path)
        kinds = {path.rsplit("/", 1)[-1], original.rsplit("/", 1)[-1]}
        if not np.array_equal(
            copy.T if kinds == {"kernel", "embedding"} else copy, found[original]
        ):
            raise ValueError(
                f"{path} in {folder} differs from {original}, but the configuration ties the two; "
                "set tie_word_embeddings to false in config.json if they are to differ"
            )


def _check_shapes(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, jax.ShapeDtypeStruct], folder: Path
) -> None:
    missing = [f"{p} {leaf.shape}" for p, leaf in wanted.items() if p not in found]
    excess = [f"{p} {array.shape}" for p, array in found.items() if p not in wanted]
    differing = [
        f"{p} (checkpoint {found[p].shape}, module {leaf.shape})"
        for p, leaf in wanted.items()
        if p in found and found[p].shape != leaf.shape
    ]
    if not (missing or excess or differing):
        return
    if not (missing or excess) and all(d.startswith("classifier/") for d in differing):
        have, want = found["classifier/bias"].shape[0], wanted["classifier/bias"].shape[0]
        raise ValueError(
            f"the classifier in {folder} has num_labels={have}, not {want}; use num_labels={have}, "
            "or start from a checkpoint without a classifier"
        )
    lines = [f"the weights in {folder} do not fit the module"]
    for title, items in (
        ("missing in the checkpoint", missing),
        ("not in the module", excess),
        ("of another shape", differing),
    ):
        if items:
            lines.append(f"{title}: {_listing(items)}")
    raise ValueError("; ".join(lines))


def _listing(items: list[str], most: int = 20) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
