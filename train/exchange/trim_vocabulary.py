"""Command `trim-vocabulary`: a backbone with the pieces of its vocabulary that some texts need."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from compacter_jax.files import read_json, replace_file
from compacter_jax.models import loading
from compacter_jax.models.sentences import lowers_case, sentence_files
from train.data.corpus import TOKENIZED_AT_ONCE, check_text_file, read_documents
from train.exchange.convert import check_new
from train.exchange.options import TrimOptions
from train.folders import new_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOKENIZER, _SETTINGS, _WORDS = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
# A file that names tokens without their ids.
_SPECIAL = "special_tokens_map.json"
# Tensors with a row, or a column, for each piece, by the ends of their names.
_WITH_PIECES = re.compile(
    r"(.*\.)?(word_embeddings|shared|embed_tokens|tok_embeddings)\.weight"
    r"|lm_head\.(weight|bias|decoder\.(weight|bias))|final_logits_bias"
    r"|cls\.predictions\.(bias|decoder\.(weight|bias))|decoder\.(weight|bias)"
    r"|vocab_projector\.(weight|bias)|generator_lm_head\.(weight|bias)"
)
_MODELS = {"WordPiece": "##", "Unigram": "▁"}
_OF_TOKEN = re.compile(r".*_token_ids?")


def trim_vocabulary(options: TrimOptions) -> None:
    """Writes a backbone without the pieces that do not occur in some texts.

    Special tokens, pieces of one character and the pieces that occur stay, in their order, with
    their rows of the embeddings and of the logits; all other tensors are copied. A WordPiece or
    Unigram tokenizer then divides the texts as before, which is checked before anything is written.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file cannot be read, the tokenizer is of another kind, or the output folder
        is not new.
    """
    if not options.text_files:
        raise ValueError("text_files is empty; give at least one file of text")
    check_new(options.output_dir, "--output-dir")
    for path in options.text_files:
        check_text_file(path)
    folder = loading.folder_of(options.backbone)
    config = read_json(folder / "config.json", {"vocab_size": int})
    source = read_json(folder / _TOKENIZER, {"model": dict[str, Any]})
    tokenizer = _plain(source)
    texts = functools.partial(_batches, options.text_files, lower=lowers_case(folder))
    used = _used(tokenizer, texts("counting pieces of"))
    kept = _kept(source, used | _special_ids(folder, tokenizer), config["vocab_size"])
    trimmed = _trimmed(source, kept)
    _check_same(tokenizer, _plain(trimmed), kept, texts("comparing pieces of"))
    copied = [*sentence_files(folder), *([_SPECIAL] if (folder / _SPECIAL).is_file() else [])]
    tensors = loading.read_checkpoint(folder)
    smaller = _smaller(tensors, kept, config["vocab_size"])
    with new_folder(options.output_dir) as temporary:
        with replace_file(temporary / loading.SINGLE_FILE) as file:
            safetensors.numpy.save_file(smaller, file, metadata={"format": "pt"})
        _write_json(temporary / _TOKENIZER, trimmed)
        _write_settings(folder, temporary, kept)
        for name in copied:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
    before, after = (sum(array.nbytes for array in each.values()) for each in (tensors, smaller))
    print(f"pieces: {config['vocab_size']:,} -> {len(kept):,}, {len(used):,} of them in the texts")
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB, in {options.output_dir}")


# --- tokenizer ----------------------------------------------------------------------------------


def _plain(source: Mapping[str, Any]) -> Tokenizer:
    """Returns a tokenizer that neither truncates nor pads.

    Raises:
      ValueError: if it is not of a kind that can be trimmed.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - help should not wait for it

    kind = _kind(source)
    if kind not in _MODELS:
        raise ValueError(
            f"{_TOKENIZER} is of the kind {kind:.40}, whose pieces are needed to build "
            f"others; a vocabulary of {' or '.join(_MODELS)} can be trimmed"
        )
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _kind(source: Mapping[str, Any]) -> str:
    """Returns the kind of a tokenizer's model, which early files of WordPiece do not name."""
    model = source["model"]
    return str(model.get("type", "WordPiece" if "max_input_chars_per_word" in model else None))


def _used(tokenizer: Tokenizer, batches: Iterable[list[str]]) -> set[int]:
    """Returns the ids that occur in some texts."""
    found: set[int] = set()
    for texts in batches:
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            found.update(encoding.ids)
    return found


def _batches(text_files: Iterable[Path], what: str, *, lower: bool) -> Iterator[list[str]]:
    """Yields the documents of some files, about a million characters at once.

    With `lower`, each comes in lower case, too, as embeddings of it are computed.
    """
    texts: list[str] = []
    for path in text_files:
        for document in read_documents(path, description=f"{what} {Path(path).name}"):
            texts += [document, document.lower()] if lower else [document]
            if sum(map(len, texts)) >= TOKENIZED_AT_ONCE:
                yield texts
                texts = []
    if texts:
        yield texts


def _special_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Returns the ids of the tokens with a role of their own."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a tokenizer's file can fail in any way
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error!s:.300}") from error
    return {*loaded.all_special_ids, *tokenizer.get_added_tokens_decoder()}


def _pieces(source: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Returns the pieces of the model of a tokenizer, with their ids."""
    vocabulary = source["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(piece, i) for i, (piece, _) in enumerate(vocabulary)]


def _kept(source: Mapping[str, Any], needed: set[int], most: int) -> dict[int, int]:
    """Returns the ids that stay, in their order, with the new ones.

    Raises:
      ValueError: if the tokenizer has ids that the backbone lacks.
    """
    model = source["model"]
    before = _MODELS[_kind(source)]
    ids = set(needed)
    for piece, i in _pieces(source):
        if len(piece.removeprefix(before)) <= 1 or piece == model.get("unk_token"):
            ids.add(i)
    if isinstance(model.get("unk_id"), int):
        ids.add(model["unk_id"])
    if beyond := sorted(i for i in ids if i >= most):
        raise ValueError(
            f"{_TOKENIZER} has the id {beyond[0]}, but the backbone has {most} embeddings; give "
            "the tokenizer of this backbone"
        )
    return {old: new for new, old in enumerate(sorted(ids))}


def _trimmed(source: Mapping[str, Any], kept: Mapping[int, int]) -> dict[str, Any]:
    """Returns the contents of tokenizer.json with the kept pieces alone."""
    trimmed = copy.deepcopy(dict(source))
    model = trimmed["model"]
    if isinstance(model["vocab"], dict):
        pieces = sorted(_pieces(source), key=lambda item: item[1])
        model["vocab"] = {piece: kept[i] for piece, i in pieces if i in kept}
    else:
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in kept]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = kept[model["unk_id"]]
    for token in trimmed.get("added_tokens") or ():
        token["id"] = kept[token["id"]]
    trimmed["post_processor"] = _renumbered(trimmed.get("post_processor"), kept)
    if trimmed.get("padding"):
        trimmed["padding"]["pad_id"] = kept[trimmed["padding"]["pad_id"]]
    return trimmed


def _renumbered(processor: Any, kept: Mapping[int, int]) -> Any:
    """Returns the description of a post-processor with the new ids of its special tokens."""
    if isinstance(processor, list):
        return [_renumbered(one, kept) for one in processor]
    if not isinstance(processor, dict):
        return processor
    changed = {name: _renumbered(value, kept) for name, value in processor.items()}
    if "ids" in changed:
        changed["ids"] = [kept[i] for i in changed["ids"]]
    for name in ("sep", "cls"):  # pairs of a token and its id
        if isinstance(changed.get(name), list):
            token, i = changed[name]
            changed[name] = [token, kept[i]]
    return changed


def _check_same(
    before: Tokenizer, after: Tokenizer, kept: Mapping[int, int], batches: Iterable[list[str]]
) -> None:
    """Raises ValueError if the trimmed tokenizer divides a text in another way."""
    for texts in batches:
        both = (each.encode_batch(texts, add_special_tokens=False) for each in (before, after))
        for text, old, new in zip(texts, *both, strict=True):
            if [kept[i] for i in old.ids] != new.ids:
                raise ValueError(
                    f"a trimmed tokenizer would divide {text.strip()!r:.80} in another way, so "
                    "this one cannot be trimmed"
                )


# --- weights and settings -----------------------------------------------------------------------


def _smaller(
    tensors: Mapping[str, np.ndarray], kept: Mapping[int, int], size: int
) -> dict[str, np.ndarray]:
    """Returns the tensors with the rows or columns of the kept pieces.

    Raises:
      ValueError: if no tensor has a row for each piece.
    """
    ids = np.fromiter(kept, np.int64)
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        axes = [axis for axis, length in enumerate(array.shape) if length == size]
        has_pieces = _WITH_PIECES.fullmatch(name) and axes
        found[name] = np.take(array, ids, axis=axes[0]) if has_pieces else array
    if all(found[name] is array for name, array in tensors.items()):
        raise ValueError(f"no tensor of the backbone has {size:,} rows, its vocab_size")
    return found


def _write_settings(folder: Path, new: Path, kept: Mapping[int, int]) -> None:
    """Writes the settings of model and tokenizer with the new ids."""
    config = _with_ids(read_json(folder / "config.json"), kept)
    _write_json(new / "config.json", config | {"vocab_size": len(kept)})
    if (folder / "generation_config.json").is_file():
        settings = _with_ids(read_json(folder / "generation_config.json"), kept)
        _write_json(new / "generation_config.json", settings)
    if (folder / _SETTINGS).is_file():
        settings = read_json(folder / _SETTINGS)
        if isinstance(tokens := settings.get("added_tokens_decoder"), dict):
            settings["added_tokens_decoder"] = {
                str(kept[int(i)]): token for i, token in tokens.items() if int(i) in kept
            }
        _write_json(new / _SETTINGS, settings)
    if (folder / _WORDS).is_file():
        words = (folder / _WORDS).read_text("utf-8").split("\n")
        text = "".join(f"{words[i]}\n" for i in kept if i < len(words))
        (new / _WORDS).write_text(text, "utf-8")


def _with_ids(settings: Mapping[str, Any], kept: Mapping[int, int]) -> dict[str, Any]:
    """Returns settings with the new ids of tokens; those of tokens that are gone are left out."""
    changed = dict(settings)
    for name, value in settings.items():
        if not _OF_TOKEN.fullmatch(name):
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            changed[name] = kept.get(value)
        elif isinstance(value, list):
            changed[name] = [kept[i] for i in value if i in kept]
    return changed


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
