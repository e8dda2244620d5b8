"""Command `create-backbone`: a tokenizer trained on text, and a random model to go with it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import string
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.files import expanded
from compacter_jax.models import loading
from train.data.corpus import check_text_file, read_documents
from train.exchange.options import CreateOptions
from train.folders import new_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0, 1, 2
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# The first has the highest id, as in the published checkpoints.
SENTINELS = tuple(f"<extra_id_{i}>" for i in reversed(range(100)))
RECORD_NAME = "create.json"
_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

_KINDS = {"t5": "a T5", "m2m_100": "an M2M-100", "speech_to_text": "a Speech2Text"}
_RESERVED = len(SPECIAL_TOKENS) + len(BYTES)
# Without further special tokens.
_SMALLEST_VOCABULARY = 412
_SPACE = "▁"  # in place of the space before a word, as in SentencePiece
_ALPHABET = frozenset(string.digits + string.ascii_letters + string.punctuation + _SPACE)
_CHARACTER_COVERAGE = 0.9995  # SentencePiece's default
# Text that spells a special token or a byte is tokenised as letters instead.
_NEVER_CHOSEN = -1000.0


def create_backbone(options: CreateOptions) -> None:
    """Writes a folder that `cj.load_backbone` and transformers can load, and prints a summary.

    The folder appears, or is replaced, only when it is complete. transformers has no compressed
    decoder, so that only `cj.load_backbone` can load one.

    Raises:
      FileNotFoundError: if a text file does not exist.
      ValueError: if an option is out of range, a text file cannot be read or has too few words, or
        `output_dir` holds files that may not be replaced.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
      Transformer, JMLR 2020, arXiv:1910.10683; Fan et al., Beyond English-Centric Multilingual
      Machine Translation, JMLR 2021, arXiv:2010.11125; Wang et al., fairseq S2T, AACL 2020,
      arXiv:2010.05171.
    """
    options.check()
    languages = tuple(f"<{language}>" for language in options.languages)
    # Only the pre-training of a T5 needs sentinels.
    more = SENTINELS if options.model_type == "t5" else languages
    _check_vocab_size(options.vocab_size, len(more))
    folder = expanded(options.output_dir).resolve()
    check_output_folder(folder, overwrite=options.overwrite)
    for path in options.text_files:
        check_text_file(path)
    with new_folder(folder, replace=True) as temporary:
        tokenizer = train_tokenizer(options.text_files, options.vocab_size, more)
        write_tokenizer(tokenizer, temporary, more)
        num_parameters = _write_model(options, temporary)
        record = dataclasses.asdict(options) | {"parameters": num_parameters}
        _write_json(temporary / RECORD_NAME, record)
        # Checked again, since the folder may have changed while the tokenizer was trained.
        check_output_folder(folder, overwrite=options.overwrite)
    kind, tokens = _KINDS[options.model_type], options.vocab_size
    print(f"{folder}: {kind} with {num_parameters:,} parameters and {tokens:,} tokens")


def train_tokenizer(
    text_files: Sequence[str | Path], vocab_size: int, more: tuple[str, ...] = SENTINELS
) -> Tokenizer:
    """Trains a Unigram tokenizer like T5's, of `vocab_size` tokens, which appends `</s>`.

    Text is normalised by NFKC; line breaks and runs of white space become one space, and those at
    the ends are removed. Decoding restores the normalised text exactly for all characters, except
    for `▁`, which means a space, and for text that spells a special token. Characters outside of
    the vocabulary are encoded as the bytes of their UTF-8; T5's own tokenizer has no bytes and
    encodes them as `<unk>`. The vocabulary has the characters of ASCII, and the most frequent other
    characters that make up 99.95 % of the text and at most half of the pieces.

    Ids 0, 1 and 2 are `<pad>`, `</s>` and `<unk>`, followed by 256 bytes, the pieces of words by
    probability, and further special tokens, by default `<extra_id_99>` to `<extra_id_0>`. Training
    again gives the same tokenizer, except where rounding decides between equally good pieces.

    Args:
      text_files: the UTF-8 files.
      vocab_size: the number of tokens.
      more: further special tokens, sentinels or those of languages; they have the highest ids.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file cannot be read, or `vocab_size` is below 412 and the number of further
        special tokens, or exceeds the pieces that the text gives.

    References:
      Kudo, Subword Regularization, ACL 2018, arXiv:1804.10959; Kudo and Richardson, SentencePiece,
      EMNLP 2018, arXiv:1808.06226.
    """
    _check_vocab_size(vocab_size, len(more))
    reserved = _RESERVED + len(more)
    num_pieces = vocab_size - reserved
    pieces = _train_pieces(text_files, num_pieces)
    if len(pieces) < num_pieces:
        size = len(pieces) + reserved
        smallest = _SMALLEST_VOCABULARY + len(more)
        smaller = f"vocab_size={size} or less, or " if size >= smallest else ""
        raise ValueError(
            f"vocab_size={vocab_size} is too large: the text yields only {size} tokens; use "
            f"{smaller}more text"
        )
    return _assemble(pieces, more)


def new_module(options: CreateOptions) -> tuple[nn.Module, Any]:
    """Returns the linen module that the options describe, and its configuration of transformers."""
    configs = {"t5": _t5_config, "m2m_100": _m2m_config, "speech_to_text": _speech_config}
    config = configs[options.model_type](options)
    return loading.module_from_config(config, head="conditional_generation"), config


def _t5_config(options: CreateOptions) -> Any:
    from transformers import T5Config  # noqa: PLC0415 - slow to import

    return T5Config(
        architectures=["T5ForConditionalGeneration"],
        vocab_size=options.vocab_size,
        d_model=options.d_model,
        d_kv=options.d_kv,
        d_ff=options.d_ff,
        num_layers=options.num_layers,
        num_decoder_layers=options.num_decoder_layers,
        num_heads=options.num_heads,
        feed_forward_proj=options.feed_forward,
        tie_word_embeddings=options.tie_word_embeddings,
        decoder_start_token_id=0,
    )


def _m2m_config(options: CreateOptions) -> Any:
    from transformers import M2M100Config  # noqa: PLC0415 - slow to import

    fields = ("decoder_layer", "decoder_value_dim") if options.decoder_layer != "standard" else ()
    return M2M100Config(
        architectures=["M2M100ForConditionalGeneration"],
        **_of_both(options),
        **{name: getattr(options, name) for name in fields},
    )


def _speech_config(options: CreateOptions) -> Any:
    from transformers import Speech2TextConfig  # noqa: PLC0415 - slow to import

    return Speech2TextConfig(
        architectures=["Speech2TextForConditionalGeneration"],
        conv_channels=options.conv_channels or 4 * options.d_model,
        # Rows do not depend on padding, and frames have positions though the padding token is 0.
        mask_between_convolutions=True,
        **_of_both(options),
    )


def _of_both(options: CreateOptions) -> dict[str, Any]:
    """Returns the fields that translation models and speech models have."""
    layers = {"encoder": options.num_layers, "decoder": options.num_layers}
    if options.num_decoder_layers is not None:
        layers["decoder"] = options.num_decoder_layers
    of_stack = {
        "attention_heads": options.num_heads,
        "ffn_dim": options.d_ff,
        "layerdrop": 0.0,
    }
    return {
        "vocab_size": options.vocab_size,
        "d_model": options.d_model,
        "init_std": options.d_model**-0.5,
        "tie_word_embeddings": options.tie_word_embeddings,
        # The ids of `SPECIAL_TOKENS`; the decoder starts with the end of a sequence.
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
        **{f"{stack}_layers": number for stack, number in layers.items()},
        **{f"{stack}_{name}": value for stack in layers for name, value in of_stack.items()},
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, more: tuple[str, ...] = SENTINELS) -> None:
    """Writes tokenizer.json and the settings with which transformers 4 and 5 load it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        # T5's own class is different in transformers 5, and has no bytes.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL_TOKENS,
        "additional_special_tokens": more[::-1] if more == SENTINELS else more,
        "model_input_names": ["input_ids", "attention_mask"],  # T5 has no token types
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Checks the output folder without writing anything.

    Raises:
      ValueError: if it is a file; or if it is not empty and either `overwrite` is not set or it
        holds files that `create_backbone` did not write.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return
    if RECORD_NAME not in names:
        raise ValueError(
            f"{folder} holds files, but no backbone that this command wrote; choose another "
            "--output-dir"
        )
    if foreign := sorted(names - _FILES - {RECORD_NAME}):
        raise ValueError(
            f"{folder} holds files that this command did not write, for instance {foreign[0]}; "
            "choose another --output-dir"
        )
    if not overwrite:
        raise ValueError(
            f"{folder} already holds a backbone; replace it with --overwrite, or choose another "
            "--output-dir"
        )


def _check_vocab_size(vocab_size: int, more: int) -> None:
    if vocab_size < _SMALLEST_VOCABULARY + more:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: special tokens, bytes and ASCII "
            f"already take {_RESERVED + more + len(_ALPHABET)}; use "
            f"{_SMALLEST_VOCABULARY + more} or more"
        )


# --- tokenizer ----------------------------------------------------------------------------------


def _train_pieces(text_files: Sequence[str | Path], num_pieces: int) -> list[tuple[str, float]]:
    """Returns at most `num_pieces` pieces of words and their log-probabilities, descending."""
    from tokenizers.trainers import UnigramTrainer  # noqa: PLC0415 - help should not wait for it

    # The trainer keeps every character that it sees, even if they exceed `num_pieces`.
    outside = _characters_outside(text_files, num_pieces)
    spaces = str.maketrans(dict.fromkeys(outside, " "))
    tokenizer = _tokenizer_of([(_SPACE, 0.0)])
    tokenizer.train_from_iterator(
        (
            _normalized(document).translate(spaces)
            for document in _documents(text_files, "training")
        ),
        UnigramTrainer(
            vocab_size=num_pieces,
            initial_alphabet=sorted(_ALPHABET),
            special_tokens=[],
            show_progress=sys.stderr.isatty(),
        ),
    )
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    # A text of a few words gives scores that are no numbers, and in any case too few pieces.
    return _in_order([(piece, round(score or 0.0, 6)) for piece, score in pieces])


def _in_order(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Returns the pieces, most probable first, in the same order in every run.

    The trainer sums in no fixed order, so that only rounded scores agree between runs. It also
    assigns scores to unused characters in the order in which it finds them, in steps of 0.0001 from
    the lowest; these characters all get the lowest score here.
    """
    floor = min((score for _, score in pieces), default=0.0)
    steps = 1e-4 * sum(len(piece) == 1 for piece, _ in pieces)
    levelled = [
        (piece, floor if len(piece) == 1 and score <= floor + steps else score)
        for piece, score in pieces
    ]
    return sorted(levelled, key=lambda item: (-item[1], item[0]))


def _characters_outside(text_files: Sequence[str | Path], num_pieces: int) -> set[str]:
    """Returns the characters of the text that get no piece of their own."""
    counts: collections.Counter[str] = collections.Counter()
    for document in _documents(text_files, "counting characters"):
        counts.update(_normalized(document))
    counted = [(c, n) for c, n in counts.items() if not c.isspace()]
    counted.sort(key=lambda item: (-item[1], item[0]))
    uncovered = sum(n for _, n in counted)
    allowed = (1 - _CHARACTER_COVERAGE) * uncovered
    room = num_pieces // 2 - len(_ALPHABET)
    outside = set()
    for character, count in counted:
        if character not in _ALPHABET:
            if uncovered <= allowed or room <= 0:
                outside.add(character)
            room -= 1
        uncovered -= count
    return outside


def _documents(text_files: Sequence[str | Path], description: str) -> Iterator[str]:
    visible = sys.stderr.isatty()
    for path in text_files:
        name = Path(path).name
        yield from read_documents(path, description=f"{description}: {name}" if visible else None)


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _assemble(pieces: Sequence[tuple[str, float]], more: tuple[str, ...]) -> Tokenizer:
    from tokenizers import AddedToken, processors  # noqa: PLC0415

    reserved = [(token, _NEVER_CHOSEN) for token in (*SPECIAL_TOKENS.values(), *BYTES)]
    tokenizer = _tokenizer_of([*reserved, *pieces], unk_id=2, byte_fallback=True)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*SPECIAL_TOKENS.values(), *more)
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _tokenizer_of(vocabulary: list[tuple[str, float]], **settings: Any) -> Tokenizer:
    """Returns a tokenizer of these pieces that splits at spaces."""
    from tokenizers import (  # noqa: PLC0415
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    tokenizer = Tokenizer(models.Unigram(vocabulary, **settings))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


# --- model --------------------------------------------------------------------------------------


def _write_model(options: CreateOptions, folder: Path) -> int:
    """Writes configuration and random weights; returns the number of parameters."""
    module, config = new_module(options)
    params = random_params(module, jax.random.key(options.seed))
    cj.save_backbone(folder, module, params, config)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def random_params(module: nn.Module, key: jax.Array) -> Any:
    """Returns random parameters; all kernels but those of a T5 are Glorot-uniform."""
    params = _initial_params(module, key)
    return params if isinstance(module, cj.T5) else _with_glorot(params, key)


@functools.partial(jax.jit, static_argnums=0)
def _initial_params(module: Any, key: jax.Array) -> Any:
    return module.init(key, *module.dummy_inputs())["params"]


@jax.jit
def _with_glorot(params: Any, key: jax.Array) -> Any:
    """Returns the parameters with Glorot-uniform kernels."""
    flat = flatten_dict(params, sep="/")
    init = nn.initializers.glorot_uniform()
    for i, path in enumerate(sorted(flat)):
        if path.endswith("/kernel"):
            flat[path] = init(jax.random.fold_in(key, i), flat[path].shape, flat[path].dtype)
    return unflatten_dict(flat, sep="/")


# --- files --------------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")
