"""Tests the reader of JSON, the reader of safetensors, and the atomic writer."""

import json
import os
import struct
import threading
from typing import Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from compacter_jax import files, messages, weights


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "more than 64 deep"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("9" * 5000, "limit"),
        ('{"a": 1', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_what_is_no_json_is_one_short_message(tmp_path, text, reason):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < messages.LONGEST


@pytest.mark.parametrize("data", [b"[]", b"3", b"null", b'"x"', b"\xff{}", b"\xef\xbb\xbf{}"])
def test_what_is_no_object_is_refused(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json"):
        files.read_json(path)


def test_a_file_that_is_missing_a_folder_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.read_json(tmp_path / "no.json")
    with pytest.raises(ValueError, match="not a file"):
        files.read_json(tmp_path)
    monkeypatch.setattr(files, "LARGEST_JSON", 10)
    (tmp_path / "x.json").write_text('{"a": "12345"}')
    with pytest.raises(ValueError, match="14 bytes"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, int, True),
        (True, int, False),
        (3, float, True),
        (False, float, False),
        (None, int | None, True),
        ("3", int | None, False),
        (["a"], list[str], True),
        (["a", 1], list[str], False),
        ("a", list[str], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": 1.5}, dict[str, int], False),
        ([["a"]], list[list[str]], True),
        ("b", Literal["a", "b"], True),
        (1, Literal[True], False),
    ],
)
def test_types_of_fields(tmp_path, value, hint, fits):
    assert files.conforms(value, hint) is fits
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"field": value}))
    if fits:
        assert files.read_json(path, {"field": hint, "absent": int}) == {"field": value}
        return
    with pytest.raises(ValueError, match=r"x\.json: field=.* must be"):
        files.read_json(path, {"field": hint})


def raw(dtype, data, shape):
    header = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def both_readers(path):
    return (
        lambda: weights.read_tensors(path),
        lambda: weights.parse_tensors(path.read_bytes(), str(path)),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 3, 2)])
def test_tensors_come_back_as_they_were_written(tmp_path, dtype, shape):
    path = tmp_path / "x.safetensors"
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), jnp.dtype(dtype))
    safetensors.numpy.save_file({"x": array, "y": np.zeros(1, np.int64)}, path)
    np_array = weights.read_tensors(path, skip=lambda name: name == "y")["x"]
    assert np_array.dtype == array.dtype
    np.testing.assert_array_equal(np_array, array)
    parsed = weights.parse_tensors(safetensors.numpy.save({"x": array}), "bytes")["x"]
    assert parsed.dtype == array.dtype
    np.testing.assert_array_equal(parsed, array)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("F8_E8M0", 1),
        ("I8", 1),
        ("U32", 4),
        ("I64", 8),
        ("BOOL", 1),
    ],
)
def test_weights_of_other_types_are_refused_by_name(tmp_path, dtype, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(dtype, bytes(4 * size), [4]))
    for read in both_readers(path):
        with pytest.raises(ValueError, match=f"x in .*x.safetensors has dtype {dtype}; weights"):
            read()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, dtype, bad):
    path = tmp_path / "x.safetensors"
    array = np.ones((2, 3), jnp.dtype(dtype))
    array[1, 2] = bad
    safetensors.numpy.save_file({"fine": np.ones(2, np.float32), "x": array}, path)
    for read in both_readers(path):
        with pytest.raises(
            ValueError, match=r"x in .* has 1 of 6 numbers that are NaN or infinite"
        ):
            read()


def test_a_number_too_large_for_a_type_is_no_diverged_run():
    array = np.array([1.0, -70_000.0, 80_000.0], np.float32)
    with pytest.raises(
        ValueError,
        match=r"^w in x has 2 of 3 numbers too large for float16, which "
        r"holds 65504 at most; use a dtype with a wider range, or other weights$",
    ):
        weights.converted("x", "w", array, np.float16)
    with pytest.raises(ValueError, match="w in x has 1 of 1 numbers too large for bfloat16"):
        weights.converted("x", "w", np.array([3.4e38], np.float32), ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"w in x has 1 of 2 numbers that are NaN .* diverged"):
        weights.converted("x", "w", np.array([np.nan, 1e9], np.float32), np.float16)
    kept = weights.converted("x", "w", array, ml_dtypes.bfloat16)
    assert kept.tolist() == [1.0, -70144.0, 79872.0]


def test_the_largest_numbers_of_every_type_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    for dtype in (np.float16, jnp.bfloat16, np.float32, np.float64):
        extreme = np.array([jnp.finfo(dtype).max, jnp.finfo(dtype).min, -0.0], dtype)
        safetensors.numpy.save_file({"x": extreme}, path)
        for read in both_readers(path):
            np.testing.assert_array_equal(read()["x"], extreme)


def test_a_truncated_file_and_a_tensor_that_is_missing(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw("F32", bytes(16), [4])[:-1])
    for read in both_readers(path):
        with pytest.raises(ValueError, match="truncated"):
            read()
    path.write_bytes(raw("F32", bytes(16), [4]))
    with pytest.raises(ValueError, match="has no tensor y"):
        weights.read_tensors(path, ["x", "y"])


def test_a_new_file_has_the_mode_of_other_new_files(tmp_path):
    (tmp_path / "other").touch()
    with files.replace_file(tmp_path / "new") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other"]


def test_an_error_leaves_the_file_and_names_it(tmp_path):
    path = tmp_path / ("n" * 250)  # nearly the longest name that file systems allow
    path.write_text("old")
    with pytest.raises(OSError, match="disk") as caught, files.replace_file(path) as temporary:
        raise OSError(28, "disk full", str(temporary))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    missing = tmp_path / "no" / "file"
    with pytest.raises(FileNotFoundError) as caught, files.replace_file(missing):
        pass
    assert caught.value.filename == str(missing)


def test_a_name_that_was_guessed_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".x.json.{os.getpid()}.tmp").symlink_to(victim)
    with files.replace_file(tmp_path / "x.json") as temporary:
        temporary.write_text("{}")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "x.json").is_symlink()


def test_threads_write_one_file_at_once(tmp_path):
    failed = []

    def write(text):
        try:
            for _ in range(20):
                with files.replace_file(tmp_path / "x") as temporary:
                    temporary.write_text(text)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(str(i) * 1000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set((tmp_path / "x").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_quotation_is_short():
    deep = [["x" * 500] * 100] * 100
    for value in ("a" * 100_000, 10**5000, deep, dict.fromkeys(range(10**5)), b"a" * 10**6):
        assert len(messages.quote(value)) <= messages.LONGEST_VALUE


def test_a_short_quotation_is_repr():
    for value in ("a", 3, None, [1, "b"], {"c": (1.5, True)}):
        assert messages.quote(value) == repr(value)


def test_a_listing_counts_the_rest():
    assert messages.listing(["a", "b"]) == "a, b"
    assert messages.listing(map(str, range(100)), most=2) == "0, 1 and 98 more"
    assert len(messages.listing(["x" * 10**6] * 10**4)) < messages.LONGEST + 60
