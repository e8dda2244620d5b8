"""Compilation of programs that run once, such as those that draw initial values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

_LEVEL = "xla_backend_optimization_level"


def run_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles a function and calls it; on a CPU with few optimisations, in half of the time.

    The random numbers of dozens of parameters take XLA seconds to compile, and milliseconds to
    compute. Other devices compile as ever, and a level of optimisation in the environment variable
    XLA_FLAGS takes precedence.

    Args:
      function: a function of arrays.
      *arguments: trees of arrays, which may be traced.

    Returns:
      What the function returns.
    """
    compiled = jax.jit(function)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    is_given = _LEVEL in os.environ.get("XLA_FLAGS", "")
    if is_traced or is_given or jax.default_backend() != "cpu":
        return compiled(*arguments)
    return compiled.lower(*arguments).compile(compiler_options={_LEVEL: "1"})(*arguments)
