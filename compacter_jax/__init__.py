"""Compacter and other parameter-efficient fine-tuning methods for JAX and Flax.

`import compacter_jax as cj` gives all public names. Importing the package does not import JAX: the
first use of a public name does. A program that needs only one module, such as
`compacter_jax.catalogue`, loads only that module and its imports.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compacter_jax.public import *  # noqa: F403
    from compacter_jax.public import __all__ as __all__

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    """Returns a module of the package, or one of its public names."""
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("__") and name != "__all__":
        raise missing
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    public = importlib.import_module(f"{__name__}.public")
    if not hasattr(public, name):
        raise missing
    value = globals()[name] = getattr(public, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
