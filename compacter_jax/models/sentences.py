"""Sentence embeddings: from hidden states to a vector, as sentence-transformers' folders say."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jax import Array

from compacter_jax.embeddings import normalize as normalized
from compacter_jax.files import (
    LARGEST_JSON,
    check_fields,
    parse_json,
    read_json,
    read_text,
    replace_file,
)
from compacter_jax.messages import quote
from compacter_jax.models.pooling import (
    MODULES_FILE,
    POOLING_FILE,
    PROMPTS_FILE,
    SENTENCE_FILES,
    TOKENIZING_FILE,
    Pooling,
    pool,
    read_pooling,
    write_pooling,
)

EMBEDDING_POOLINGS: tuple[Pooling, ...] = ("mean", "cls")
_NORMALIZE = "2_Normalize"
_TYPES = "sentence_transformers.models."


@dataclasses.dataclass(frozen=True)
class SentenceEmbedding:
    """The embedding of a sentence: a pooling of the last hidden states, perhaps of norm 1.

    Attributes:
      pooling: "mean" for the mean of the tokens that are not padding, "cls" for the first token.
      normalize: True if the result is divided by its norm.
      lower_case: True if texts are put in lower case before they are tokenised.

    Raises:
      ValueError: for another pooling.

    References:
      Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv:1908.10084.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    lower_case: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in EMBEDDING_POOLINGS:
            raise ValueError(
                f"pooling={quote(self.pooling)} is not one of sentence embeddings; use 'mean' or "
                "'cls', the first token"
            )

    def __call__(self, states: Array, attention_mask: Array | None) -> Array:
        """Returns the embeddings of sentences.

        Args:
          states: `[batch, length, hidden]`, the last hidden states.
          attention_mask: `[batch, length]`, zero at padding; None for no padding.

        Returns:
          `[batch, hidden]`, in float32 at least if they are normalised.
        """
        pooled = pool(states, attention_mask, self.pooling)
        return normalized(pooled) if self.normalize else pooled


def read_folder(folder: Path, pooling: Pooling | None = None) -> SentenceEmbedding:
    """Reads a folder as `compacter_jax.read_sentence_embedding` does."""
    _check_prompt(folder / PROMPTS_FILE)
    lower_case = lowers_case(folder)
    file, normalize = POOLING_FILE, False
    if (folder / MODULES_FILE).is_file():
        place, normalize = _modules(folder / MODULES_FILE)
        file = f"{place}/config.json"
        if pooling is None and not (folder / file).is_file():
            raise ValueError(
                f"{folder / MODULES_FILE} names a pooling in {quote(file, 60)}, which is missing; "
                "put the file there, or say which pooling it is"
            )
    pooling = pooling or read_pooling(folder, file) or "mean"
    return SentenceEmbedding(pooling, normalize, lower_case)


def sentence_files(folder: Path) -> list[str]:
    """Returns the paths of the files of sentence-transformers that are in a folder.

    Raises:
      ValueError: if the folder has modules that are not supported.
    """
    names = [*SENTENCE_FILES, f"{_NORMALIZE}/config.json"]
    if (folder / MODULES_FILE).is_file():
        names.append(f"{_modules(folder / MODULES_FILE)[0]}/config.json")
    return [name for name in dict.fromkeys(names) if (folder / name).is_file()]


def write_sentence_embedding(
    directory: str | os.PathLike[str], embedding: SentenceEmbedding, width: int, max_length: int
) -> None:
    """Writes the files by which sentence-transformers loads a checkpoint.

    They lie beside the weights, the configuration and the tokenizer of the checkpoint, which
    `save_backbone` and the tokenizer write.

    Args:
      directory: the folder of the checkpoint, which exists.
      embedding: how hidden states become embeddings.
      width: width of the hidden states.
      max_length: maximum length of a text in tokens.

    Raises:
      OSError: if the folder cannot be written.
    """
    folder = Path(directory)
    modules = [_module(0, "", "Transformer"), _module(1, "1_Pooling", "Pooling")]
    write_pooling(folder, embedding.pooling, width)
    if embedding.normalize:
        modules.append(_module(2, _NORMALIZE, "Normalize"))
        (folder / _NORMALIZE).mkdir(exist_ok=True)
        _write(folder / _NORMALIZE / "config.json", {})
    _write(
        folder / TOKENIZING_FILE,
        {"max_seq_length": max_length, "do_lower_case": embedding.lower_case},
    )
    _write(
        folder / PROMPTS_FILE,
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    _write(folder / MODULES_FILE, modules)


def _module(index: int, path: str, name: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": f"{_TYPES}{name}"}


def _write(path: Path, value: Any) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _modules(path: Path) -> tuple[str, bool]:
    """Returns the folder of the pooling, and True if the embeddings are normalised."""
    modules = parse_json(read_text(path, LARGEST_JSON), str(path))
    fields = {"type": str, "path": str}
    if not isinstance(modules, list) or not all(
        isinstance(each, dict) and fields.keys() <= each.keys() for each in modules
    ):
        raise ValueError(f"{path} must hold a list of modules, each with a type and a path")
    for each in modules:
        check_fields(str(path), each, fields)
    # The module of a class has moved between releases, its name has not.
    names = [each["type"].rpartition(".")[2] for each in modules]
    for name in names:
        if name not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(
                f"{path} has the module {quote(name, 60)}, which is not supported; embeddings can "
                "have a Transformer, a Pooling and a Normalize alone"
            )
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{path} has the modules {', '.join(names)}; supported are Transformer, Pooling and "
            "perhaps Normalize, in this order"
        )
    if modules[0]["path"]:
        raise ValueError(
            f"{path} has its Transformer in {quote(modules[0]['path'], 60)}, as in old releases of "
            "sentence-transformers; load and save it with a newer one, which puts it beside "
            f"{MODULES_FILE}"
        )
    place = modules[1]["path"]
    if Path(place).is_absolute() or ".." in Path(place).parts:
        raise ValueError(f"{path} has its Pooling in {quote(place, 60)}, outside of its folder")
    return place, "Normalize" in names


def lowers_case(folder: Path) -> bool:
    """Returns True if sentence-transformers puts texts in lower case before the tokenizer."""
    path = folder / TOKENIZING_FILE
    if not path.is_file():
        return False
    settings = read_json(path, {"do_lower_case": bool}, what="settings of sentence-transformers")
    return bool(settings.get("do_lower_case", False))


def _check_prompt(path: Path) -> None:
    """Raises ValueError if sentence-transformers puts a prompt before every text."""
    if not path.is_file():
        return
    fields = {"prompts": dict[str, str], "default_prompt_name": str | None}
    settings = read_json(path, fields, what="settings of sentence-transformers")
    name = settings.get("default_prompt_name")
    prompt = settings.get("prompts", {}).get(name, "") if name is not None else ""
    if prompt:
        raise ValueError(
            f"{path} puts the prompt {quote(prompt, 60)} before every text, which is not "
            "supported; put it into the texts, and set default_prompt_name to null"
        )
