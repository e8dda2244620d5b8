"""Initial values of modules, traced once, and programs that run once, such as those that draw them.

Tracing a model takes seconds, and a run asks several times which parameters it has: to read a
checkpoint, to check that a method fits, to create adapters, and to save them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

# Random key -> `/`-joined path -> initial value.
Initialiser = Callable[[jax.Array], dict[str, jax.Array]]

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


def initialiser(module: nn.Module, *inputs: Any) -> Initialiser:
    """Returns a function of a random key that computes the initial parameters of a module.

    Without inputs, equal modules have one function, which JAX traces once. As with any jitted
    function, interceptors of its caller act only when it is traced. It is to be called in a
    function that is jitted or traced: that one computes only the leaves which it returns, on the
    device of its caller.

    Args:
      module: a backbone, or an adapted one.
      *inputs: arguments of a call; by default `dummy_inputs()` of the backbone.

    Returns:
      A function that raises ValueError if there are no inputs and the backbone has no
      `dummy_inputs`, and what the module raises when it is called.
    """
    module = hashable(module)
    return _initialiser(module, *inputs) if inputs or not _has_hash(module) else _cached(module)


def initial_shapes(module: nn.Module, *inputs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `/`-joined path -> shape and dtype of a module's parameters; nothing is computed.

    Args:
      module: a backbone, or an adapted one.
      *inputs: arguments of a call; by default `dummy_inputs()` of the backbone.

    Raises:
      ValueError: as the function that `initialiser` returns.
    """
    return jax.eval_shape(initialiser(module, *inputs), jax.random.key(0))


def hashable(module: nn.Module) -> nn.Module:
    """Returns an equal module that can be hashed, even if some fields are ordinary dicts."""
    mappings: dict[str, Any] = {
        field.name: FrozenDict(value)
        for field in dataclasses.fields(module)
        if isinstance(value := getattr(module, field.name, None), Mapping)
    }
    return module.clone(**mappings) if mappings else module


def backbone_of(module: Any) -> Any:
    """Returns the module that an adapted one adapts, and any other module itself."""
    return getattr(module, "backbone", module)


def example_inputs(backbone: Any) -> Any:
    """Returns example arguments of a call.

    Raises:
      ValueError: if the backbone has no `dummy_inputs`.
    """
    if not hasattr(backbone, "dummy_inputs"):
        raise ValueError(
            f"{type(backbone).__name__} has no dummy_inputs(); pass example inputs: "
            "init_adapters(model, backbone, key, input_ids, attention_mask), "
            "load_adapter(directory, backbone, input_ids, attention_mask), and so on"
        )
    return backbone.dummy_inputs()


def _has_hash(module: nn.Module) -> bool:
    """Returns True unless a field of a field is a dict or a list."""
    try:
        hash(module)
    except TypeError:
        return False
    return True


def _initialiser(module: nn.Module, *inputs: Any) -> Initialiser:
    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        # Made here, since arrays that were made in the trace of another function end with it.
        example = inputs or example_inputs(backbone_of(module))
        return flatten_dict(module.init(key, *example)["params"], sep="/")

    def initial(key: jax.Array) -> dict[str, jax.Array]:
        with jax.default_device(None):  # with another one, JAX would trace it again
            return draw(key)

    return initial


# Each keeps its program, of megabytes for a large model.
_cached = functools.lru_cache(maxsize=16)(_initialiser)
