"""Small backbones of every kind, wrapped in `Adapted` with random parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.inject.adapted import Adapted
from tests.helpers import (
    SMALL,
    WIDTH,
    adapted_shapes,
    expected_output,
    quick_jit,
    random_tree,
)

COMPACTER = preset("compacter", **SMALL)
PLUS_PLUS = preset("compacter++", **SMALL)
SITES = {"feed_forward": r"layer_(?P<layer>\d+)"}


class SetupHost(nn.Module):
    """A host that creates its submodules in setup, as third-party Flax models do."""

    def setup(self):
        self.inner = nn.Dense(WIDTH)

    def __call__(self, x):
        return self.inner(x)


class CompactHost(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(x)  # named automatically


class SuperOfCompact(CompactHost):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x)


class PlainSuperOfCompact(CompactHost):
    def __call__(self, x):
        return super().__call__(x)


class SuperOfSetup(SetupHost):
    def __call__(self, x):
        return super().__call__(x)


class ManyMethods(nn.Module):
    """A host whose `__call__` calls another of its methods; only `__call__` is adapted."""

    def setup(self):
        self.inner = nn.Dense(WIDTH)

    def project(self, x):
        return self.inner(x)

    def __call__(self, x):
        return self.project(x)


HOSTS = {
    "compact": CompactHost,
    "setup": SetupHost,
    "nn.Dense": functools.partial(nn.Dense, WIDTH),
    "super in a compact class": SuperOfCompact,
    "super in a plain class": PlainSuperOfCompact,
    "super in a setup class": SuperOfSetup,
    "two methods": ManyMethods,
}


class Chain(nn.Module):
    """A chain of the hosts layer_0, layer_1, …, each of which is called `times` times."""

    host: object = CompactHost
    layers: int = 1
    times: int = 1

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            layer = self.host(name=f"layer_{i}")
            for _ in range(self.times):
                x = layer(x)
        return x

    def dummy_inputs(self):
        return (jnp.zeros((1, WIDTH)),)


class SetupChain(nn.Module):
    """A chain with hosts made in setup; the first host is called again at the end."""

    host: object = SetupHost

    def setup(self):
        self.layer_0, self.layer_1 = self.host(), self.host()

    def __call__(self, x):
        return self.layer_0(self.layer_1(self.layer_0(x)))

    def dummy_inputs(self):
        return (jnp.zeros((1, WIDTH)),)


def adapted(backbone, method=PLUS_PLUS, sites=SITES, seed=0):
    """Returns the model, with random parameters that give every adapter an effect."""
    model = Adapted(backbone, method, sites)
    return model, random_tree(adapted_shapes(model), seed)


def run(module, params, *inputs, **options):
    return quick_jit(functools.partial(module.apply, **options))({"params": params}, *inputs)


def adapter_of(params, host, method):
    """Returns a NumPy function that computes the adapter of `host` in float64."""
    flat = flatten_dict(params, sep="/")
    own = {
        path.removeprefix(f"{host}/"): np.float64(leaf)
        for path, leaf in flat.items()
        if path.startswith(f"{host}/adapter/") or path.startswith("phm_")
    }
    return lambda x: expected_output(method, own, np.float64(x))


def split(params):
    """Splits parameters into those of the backbone and the rest, both by path."""
    flat = flatten_dict(params, sep="/")
    new = {path for path in flat if "/adapter/" in path or path.startswith("phm_")}
    return {p: v for p, v in flat.items() if p not in new}, {p: flat[p] for p in sorted(new)}


def assert_same(actual, expected):
    """Checks that trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
