"""Safe reading of tensor files that other libraries wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from compacter_jax import weights
from compacter_jax.messages import quote, shorten
from compacter_jax.weights import check_finite, check_weight_type

# Before this release, `torch.load(weights_only=True)` could be made to run code: CVE-2025-32434.
_SAFE_TORCH = (2, 6)


def read_tensors(directory: Path, stems: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of the first existing file of `STEM.safetensors`, then `STEM.bin`.

    Pickled tensors (`.bin`) need PyTorch, whose restricted reader creates tensors and nothing else.

    Args:
      directory: the folder.
      stems: names of the file without their suffix.

    Returns:
      Name -> array on the host, with unchanged dtypes; bfloat16 is the dtype of `jax.numpy`.

    Raises:
      FileNotFoundError: if there is no such file; the message lists the names.
      ValueError: if the file is truncated, is not what its suffix says, or holds anything but
        named, finite, floating-point tensors of 16 to 64 bits; or if it is pickled and PyTorch is
        missing or reads unsafely.
    """
    path = find_tensors(directory, stems)
    if path is None:
        raise FileNotFoundError(f"{directory} has none of {', '.join(_file_names(stems))}")
    return weights.read_tensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def find_tensors(directory: Path, stems: Sequence[str]) -> Path | None:
    """Returns the file that `read_tensors` reads, or None if there is none."""
    paths = (directory / name for name in _file_names(stems))
    return next((path for path in paths if path.is_file()), None)


def _file_names(stems: Sequence[str]) -> list[str]:
    return [f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # noqa: PLC0415 (only to read pickled tensors, and not a dependency)
    except ImportError:
        raise ValueError(
            f"{path} is a pickle, and reading it needs PyTorch; install PyTorch, or save the "
            "adapter as safetensors where it was made"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise ValueError(
            f"{path} is a pickle, which PyTorch {torch.__version__} does not read safely: install "
            "2.6 or newer, or save the adapter as safetensors where it was made"
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a broken pickle raises nearly any class of error
        raise ValueError(
            f"{path} is truncated, was not written by PyTorch, or holds objects other than "
            "tensors, which are never unpickled because that can run arbitrary code; save the "
            "adapter as safetensors"
        ) from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dictionary of tensors")
    return {name: _to_numpy(path, name, value) for name, value in stored.items()}


def _to_numpy(path: Path, name: Any, value: Any) -> np.ndarray:
    import torch  # noqa: PLC0415 (see above)

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{path} holds {quote(name, 100)}, which is a {type(value).__name__} and not a "
            "tensor; save the adapter as safetensors"
        )
    check_weight_type(path, name, _TORCH_TYPES.get(str(value.dtype), str(value.dtype)))
    try:
        tensor = value.detach()
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{shorten(name, 100)} in {path} is a small tensor that is expanded to shape "
                f"{tuple(tensor.shape)} by repetition; save the adapter as safetensors where it "
                "was made"
            )
        if tensor.dtype == torch.bfloat16:  # PyTorch cannot convert this type to NumPy
            array = tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
        else:
            array = tensor.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, or without data
        reason = shorten(str(error).partition("\n")[0], 100)
        raise ValueError(
            f"{path} has {quote(name, 100)}, which NumPy cannot represent: {reason}"
        ) from None
    check_finite(path, name, array)
    return array


# PyTorch's name of a type that weights may have -> safetensors' name.
_TORCH_TYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}
