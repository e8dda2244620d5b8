"""The one reader of safetensors, and the checks of dtypes and numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from compacter_jax.files import check_file
from compacter_jax.messages import listing, shorten

# safetensors' name of a type that weights may have -> the NumPy type that holds it.
_WEIGHT_TYPES: Mapping[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_tensors(
    path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    skip: Callable[[str], bool] = lambda name: False,
) -> dict[str, np.ndarray]:
    """Reads the weights in a safetensors file.

    Args:
      path: path of the file.
      names: names of the tensors to read; None for all.
      skip: predicate on names; a tensor for which it returns True is ignored and may have any type.

    Returns:
      Name -> array on the host, with unchanged dtypes; bfloat16 is the dtype of `jax.numpy`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is truncated or is not a safetensors file; if it lacks a name; or if a
        tensor is not floating-point of 16 to 64 bits, or holds NaN or an infinite number. The
        message names the file and the tensor.
    """
    path = Path(path)
    check_file(path)
    try:
        # framework="np" returns bfloat16 as the dtype of that name which jax registers.
        with safetensors.safe_open(path, framework="np") as opened:
            there = [name for name in opened.keys() if not skip(name)]  # noqa: SIM118
            wanted = there if names is None else [name for name in names if not skip(name)]
            if absent := sorted(set(wanted) - set(there)):
                raise ValueError(f"{path} has no tensor {listing(absent)}")
            return {name: _tensor(path, opened, name) for name in wanted}
    except safetensors.SafetensorError as error:
        reason = shorten(str(error), 200)
        raise ValueError(f"{path} is truncated or not a safetensors file: {reason}") from None


def parse_tensors(
    data: bytes, where: str, *, is_boolean: Callable[[str], bool] = lambda name: False
) -> dict[str, np.ndarray]:
    """Reads weights from the bytes of a safetensors file, with the checks of `read_tensors`.

    Args:
      data: all bytes of the file.
      where: origin of the bytes, for messages.
      is_boolean: predicate on names; a tensor for which it returns True may be of booleans.
    """
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        reason = shorten(str(error), 200)
        raise ValueError(f"{where} is truncated or not a safetensors file: {reason}") from None
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] == "BOOL" and is_boolean(name):
            tensors[name] = np.frombuffer(tensor["data"], np.uint8).reshape(tensor["shape"]) != 0
            continue
        check_weight_type(where, name, tensor["dtype"])
        array = np.frombuffer(tensor["data"], _WEIGHT_TYPES[tensor["dtype"]])
        tensors[name] = array.reshape(tensor["shape"])
        check_finite(where, name, tensors[name])
    return tensors


def check_weight_type(where: str | Path, name: str, dtype: str) -> None:
    """Checks the type that a safetensors file gives for a tensor, before the tensor is read.

    Raises:
      ValueError: if the type is not floating-point of 16 to 64 bits.
    """
    if dtype not in _WEIGHT_TYPES:
        raise ValueError(
            f"{shorten(name, 100)} in {where} has dtype {dtype}; weights must be floating-point "
            "of 16 bits or more (quantised weights are not supported: save them as float32 where "
            "they were made)"
        )


def check_finite(where: str | Path, name: str, array: np.ndarray) -> None:
    """Checks that a floating-point array has neither NaN nor infinite numbers.

    Raises:
      ValueError: if it has; the message names the place and the tensor.
    """
    if count := _count_not_finite(array):
        raise ValueError(
            f"{shorten(name, 100)} in {where} has {count:,} of {array.size:,} numbers that are "
            "NaN or infinite; use weights from before the run diverged"
        )


def _count_not_finite(array: np.ndarray) -> int:
    if array.dtype == ml_dtypes.bfloat16:  # the functions of ml_dtypes are slow
        return int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    return int(np.count_nonzero(~np.isfinite(array)))


def converted(where: str | Path, name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns a floating-point array in another type.

    Args:
      where: origin of the array, for messages.
      name: name of the tensor.
      array: array of any floating-point type.
      dtype: floating-point type of the result.

    Raises:
      ValueError: if a number is too large for a smaller type, or was NaN or infinite before.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        changed = array.astype(dtype)
    largest = ml_dtypes.finfo(dtype).max
    if ml_dtypes.finfo(array.dtype).max > largest and (count := _count_not_finite(changed)):
        check_finite(where, name, array)
        raise ValueError(
            f"{shorten(name, 100)} in {where} has {count:,} of {array.size:,} numbers too large "
            f"for {np.dtype(dtype)}, which holds {float(largest):.5g} at most; use a dtype with a "
            "wider range, or other weights"
        )
    return changed


def _tensor(path: Path, opened: Any, name: str) -> np.ndarray:
    check_weight_type(path, name, opened.get_slice(name).get_dtype())
    array = opened.get_tensor(name)
    check_finite(path, name, array)
    return array
