"""Reads files of other libraries, refuses unsafe ones, and checks that no code in them runs."""

import builtins
import json
import os
import pickle
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from compacter_jax.checkpoint import save_backbone
from compacter_jax.exchange.tensors import read_tensors
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.encoder import HEADS as BERT_HEADS
from compacter_jax.models.families import hugging_face_names
from compacter_jax.models.t5.config import HEADS as T5_HEADS
from compacter_jax.models.t5.model import T5
from tests.helpers import ONE_LAYER, TINY_T5, backbone_of
from tests.hosts import CompactHost

STEMS = ("adapter", "pytorch_adapter")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "matrix": np.float32(rng.standard_normal((3, 4))),
        "half": rng.standard_normal((2, 3)).astype(np.float16),
        "brain": rng.standard_normal(5).astype(jnp.bfloat16),
        "scalar": np.array(rng.standard_normal(), np.float32),
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def to_torch(array):
    """Returns the same values as a PyTorch tensor of the same type."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    return torch.tensor(array)


def test_safetensors_are_read(tmp_path):
    save_file(arrays(), tmp_path / "adapter.safetensors")
    assert_equal(read_tensors(tmp_path, STEMS), arrays())


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_read(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    tensors = {name: to_torch(array) for name, array in arrays().items()}
    # A view of a larger tensor, and a parameter that an optimizer updates.
    tensors["matrix"] = to_torch(np.pad(arrays()["matrix"].T, 1))[1:-1, 1:-1].T
    tensors["brain"] = torch.nn.Parameter(tensors["brain"])
    file = tmp_path / "pytorch_adapter.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    assert_equal(read_tensors(tmp_path, STEMS), arrays())


def test_safetensors_come_before_pickles_and_stems_in_order(tmp_path):
    for suffix in ("bin", "safetensors"):
        (tmp_path / f"adapter.{suffix}").write_bytes(b"nothing")
    save_file(arrays(1), tmp_path / "pytorch_adapter.safetensors")
    with pytest.raises(ValueError, match=r"/adapter\.safetensors is truncated"):
        read_tensors(tmp_path, STEMS)
    save_file(arrays(2), tmp_path / "adapter.safetensors")
    assert_equal(read_tensors(tmp_path, STEMS), arrays(2))
    (tmp_path / "adapter.safetensors").unlink()
    assert_equal(read_tensors(tmp_path, STEMS), arrays(1))


def test_missing_files_are_listed(tmp_path):
    (tmp_path / "adapter.bin").mkdir()
    names = "adapter.safetensors, pytorch_adapter.safetensors, adapter.bin, pytorch_adapter.bin"
    with pytest.raises(FileNotFoundError, match=f"has none of {names}$"):
        read_tensors(tmp_path, STEMS)


@pytest.mark.parametrize("keep", [0, 5, 200])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    file = tmp_path / f"adapter.{suffix}"
    if suffix == "bin":
        pytest.importorskip("torch").save({"a": to_torch(arrays()["matrix"])}, file)
    else:
        save_file(arrays(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"adapter\.{suffix} is truncated"):
        read_tensors(tmp_path, STEMS)


class Malicious:
    """An object whose unpickling creates a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("written_by", ["pickle", "torch", "torch, not zipped"])
def test_nothing_in_a_pickle_runs(tmp_path, written_by):
    torch = pytest.importorskip("torch")
    content = {"weight": Malicious(tmp_path / "made")}
    file = tmp_path / "adapter.bin"
    if written_by == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=written_by == "torch")
    with pytest.raises(
        ValueError, match="objects other than tensors, which are never unpickled"
    ) as caught:
        read_tensors(tmp_path, STEMS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: [torch.ones(2)], "holds a list, not a dictionary of tensors"),
        (lambda torch: {"a": {"b": torch.ones(2)}}, "holds 'a', which is a dict and not a tensor"),
        (lambda torch: {3: torch.ones(2)}, "holds 3, which is a Tensor and not a tensor"),
        (lambda torch: {"a": torch.eye(2).to_sparse()}, "has 'a', which NumPy cannot represent"),
        (
            lambda torch: {"a": torch.empty(2, device="meta")},
            "has 'a', which NumPy cannot represent",
        ),
        (
            lambda torch: {"a": torch.ones(2).to(torch.float8_e4m3fn)},
            "a in .*float8_e4m3fn; weights",
        ),
        (lambda torch: {"a": torch.ones(2, dtype=torch.complex64)}, "a in .*complex64; weights"),
        # A tensor that is small in the file, but takes 4 TB as an array.
        (
            lambda torch: {"a": torch.ones(1).expand(10**12)},
            "a in .* is a small tensor that is expanded",
        ),
        (
            lambda torch: {"a": torch.tensor([1, torch.nan])},
            "a in .* has 1 of 2 numbers that are N",
        ),
        (
            lambda torch: {"a": torch.tensor([-torch.inf], dtype=torch.bfloat16)},
            "a in .* has 1 of 1 numbers that are NaN or infinite",
        ),
    ],
)
def test_pickles_of_anything_but_named_tensors_are_refused(tmp_path, make, message):
    torch = pytest.importorskip("torch")
    torch.save(make(torch), tmp_path / "adapter.bin")
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path, STEMS)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_tensors_of_whole_numbers_are_refused(tmp_path, suffix, dtype):
    content = {"half": arrays()["half"], "count": np.ones(2, dtype)}
    if suffix == "bin":
        torch = pytest.importorskip("torch")
        torch.save({k: to_torch(v) for k, v in content.items()}, tmp_path / "adapter.bin")
    else:
        save_file(content, tmp_path / "adapter.safetensors")
    message = rf"count in .*{suffix} has dtype \S+; weights must be floating-point of 16 bits"
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path, STEMS)


def test_safetensors_of_a_type_numpy_lacks_are_refused(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match=r"a in .* has dtype F8_E4M3; weights must be floating"):
        read_tensors(tmp_path, STEMS)


def test_a_pickle_without_pytorch_is_refused(tmp_path, monkeypatch):
    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_torch)
    (tmp_path / "adapter.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="reading it needs PyTorch; install PyTorch, or save"):
        read_tensors(tmp_path, STEMS)


def test_a_pickle_with_an_unsafe_pytorch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.5.1+cpu"))
    (tmp_path / "adapter.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"PyTorch 2\.5\.1\+cpu does not read safely"):
        read_tensors(tmp_path, STEMS)


MODULES = {f"Bert {head}": Bert(ONE_LAYER, head=head) for head in BERT_HEADS} | {
    f"T5 {head}": T5(TINY_T5, head=head) for head in T5_HEADS
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_names_are_those_of_a_saved_backbone(tmp_path, module):
    transformers = pytest.importorskip("transformers")
    params = backbone_of(module).params
    kind = type(module).__name__
    save_backbone(tmp_path, module, params, getattr(transformers, f"{kind}Config")())
    saved = load_file(tmp_path / "model.safetensors")
    names = hugging_face_names(module, params)
    flat = flatten_dict(params, sep="/")
    assert names.keys() == flat.keys()
    assert set(names.values()) == saved.keys()
    for path, name in names.items():
        expected = saved[name].T if path.endswith("/kernel") else saved[name]
        np.testing.assert_array_equal(flat[path], expected, err_msg=path)


def test_names_of_other_backbones_are_refused():
    with pytest.raises(ValueError, match="CompactHost is a backbone that transformers has no"):
        hugging_face_names(CompactHost(), {})
