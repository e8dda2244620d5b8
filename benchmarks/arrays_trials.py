"""Trials of `benchmarks.arrays`: cases, methods with the settings to choose from, and scores."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compacter_jax import arrays

# The first source lies up to this many separations beside broadside.
_SPREAD = 1.0
# Strong interferers lie outside the searched sector.
_INTERFERERS = (35.0, 55.0, 125.0, 145.0)

Setting = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sources and sensors of a case.

    Attributes:
      sensors: M, the number of sensors.
      snapshots: N, the number of snapshots.
      snr: power of each of the two sources over that of the noise, in decibels.
      separation: degrees between the two sources.
      correlation: correlation of the two sources.
      interferers: number of uncorrelated sources outside the searched sector, at most 4.
      interferer_snr: their power over that of the noise, in decibels.
    """

    sensors: int
    snapshots: int
    snr: float
    separation: float
    correlation: float
    interferers: int = 0
    interferer_snr: float = 30.0

    @property
    def sources(self) -> int:
        """Number of all sources."""
        return 2 + self.interferers


Shapes = Callable[[Case], list[dict[str, Any]]]
# Values to choose from; those of loading are an option of the command.
_FORGETTING = (0.998, 0.95)


@dataclasses.dataclass(frozen=True)
class Method:
    """Method of the comparison.

    Attributes:
      shapes: function of the case that returns windows and ranks to choose from.
      estimate: function of snapshots, grid, case and a setting that returns directions in degrees.
      spectrum: function of the same that returns the spectrum; None if the method has none.
      memory: names among "forgetting" and "loading" of what else is chosen.
    """

    shapes: Shapes
    estimate: Callable[..., jax.Array]
    spectrum: Callable[..., jax.Array] | None = None
    memory: tuple[str, ...] = ()


def _recursive(shapes: Sequence[tuple[float, int]], **fixed: Any) -> Shapes:
    """Returns a function that lists windows, given as shares of all sensors, and ranks."""
    return lambda case: [
        {"window": round(share * case.sensors), "rank": rank, **fixed} for share, rank in shapes
    ]


def _smoothing(case: Case) -> list[dict[str, Any]]:
    """Returns windows of spatial smoothing: none, and parts of the line."""
    return [{"window": None}, *({"window": round(share * case.sensors)} for share in (0.85, 0.65))]


def _alrd(x: jax.Array, grid: jax.Array, case: Case, setting: Setting) -> jax.Array:
    return arrays.alrd(x, grid, **setting)


def _capon(x: jax.Array, grid: jax.Array, case: Case, setting: Setting) -> jax.Array:
    return arrays.capon(x, grid, **setting)


def _music(x: jax.Array, grid: jax.Array, case: Case, setting: Setting) -> jax.Array:
    return arrays.music(x, grid, case.sources, **setting)


def _jio(x: jax.Array, grid: jax.Array, case: Case, setting: Setting) -> jax.Array:
    return arrays.jio(x, grid, **setting)


def _esprit(x: jax.Array, grid: jax.Array, case: Case, setting: Setting) -> jax.Array:
    return arrays.esprit(x, case.sources, **setting)


def _highest(spectrum: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def estimate(x: jax.Array, grid: jax.Array, case: Case, setting: Setting) -> jax.Array:
        return arrays.peaks(spectrum(x, grid, case, setting), grid, 2)

    return estimate


def _of(spectrum: Callable[..., jax.Array], shapes: Shapes, *memory: str) -> Method:
    return Method(shapes, _highest(spectrum), spectrum, memory)


_BOTH = ("forgetting", "loading")
# The first two are after the abstract of Qiu, Cai, de Lamare and Zhao.
METHODS = {
    "ALRD-RLS": _of(_alrd, _recursive([(0.25, 4), (0.5, 4), (0.75, 4)]), *_BOTH),
    "MARLD-RLS": _of(_alrd, _recursive([(0.5, 5), (0.9, 5)], modified=True), *_BOTH),
    "JIO-RLS": _of(_jio, lambda case: [{"rank": 4}], *_BOTH),
    "Capon": _of(_capon, _smoothing, "loading"),
    "MUSIC": _of(_music, _smoothing),
    "ESPRIT": Method(_smoothing, _esprit),
}
# Settings that are arguments of the compiled program, so that it serves all their values.
_TRACED = ("forgetting", "loading")


def draw(case: Case, trials: int, seed: int) -> tuple[np.ndarray, jax.Array]:
    """Returns the directions `[T, K]` of trials, and their snapshots `[T, N, M]`.

    The first two of the directions are those that count.
    """
    generator = np.random.default_rng((seed, case.sensors, case.snapshots))
    middle = 90 + case.separation * generator.uniform(-_SPREAD, _SPREAD, (trials, 1))
    pair = middle + case.separation / 2 * np.array([-1.0, 1.0])
    others = np.broadcast_to(_INTERFERERS[: case.interferers], (trials, case.interferers))
    angles = np.concatenate([pair, others], axis=1)
    keys = jax.random.split(jax.random.key(seed), trials)
    shape = dataclasses.replace(case, snr=0, separation=0, correlation=0)
    values = (jnp.asarray(value, float) for value in (case.snr, case.correlation))
    return angles, _received(keys, jnp.asarray(angles), *values, case=shape)


@functools.partial(jax.jit, static_argnames="case")
def _received(keys: jax.Array, angles: jax.Array, snr: Any, correlation: Any, case: Case) -> Any:
    def one(key: jax.Array, angles: jax.Array) -> jax.Array:
        pair, others = jax.random.split(key)
        x = arrays.simulate(pair, angles[:2], case.sensors, case.snapshots, snr, correlation)
        if case.interferers:
            responses = arrays.steering(angles[2:], case.sensors)
            signals = jax.random.normal(others, (case.snapshots, case.interferers), x.dtype)
            x += 10 ** (case.interferer_snr / 20) * signals @ responses
        return x

    return jax.vmap(one)(keys, angles)


class Programs:
    """Compiled programs that run trials, one for each method, shape of a case and fixed setting.

    Args:
      grid: angles in degrees at which spectra are computed.
      chunk: number of trials that are computed at once.
    """

    def __init__(self, grid: np.ndarray, chunk: int):
        self.grid = grid
        self.chunk = chunk
        self._programs: dict[Any, Any] = {}

    def estimates(
        self, method: str, case: Case, setting: Setting, x: jax.Array
    ) -> tuple[np.ndarray, float]:
        """Returns the directions found in trials, `[T, …]`, and the seconds of one trial.

        Args:
          method: a key of `METHODS`.
          case: the case.
          setting: one of the method's candidates.
          x: the snapshots of all trials, `[T, N, M]`.
        """
        traced = {name: setting[name] for name in _TRACED if name in setting}
        fixed = {name: value for name, value in setting.items() if name not in traced}
        values = {name: jnp.asarray(value, float) for name, value in traced.items()}
        trials = len(x)
        # One program for any number of trials, in parts of `chunk`; the last part is filled up.
        x = x[jnp.arange(-(-trials // self.chunk) * self.chunk) % trials]
        x = x.reshape(-1, self.chunk, *x.shape[1:])
        key = (method, x.shape[1:], case.sources, tuple(fixed.items()))
        if key not in self._programs:
            estimate = functools.partial(METHODS[method].estimate, grid=self.grid, case=case)
            run = jax.vmap(lambda x, values: estimate(x, setting=fixed | values), in_axes=(0, None))
            self._programs[key] = jax.jit(run).lower(x[0], values).compile()
        start = time.perf_counter()
        found = [np.asarray(self._programs[key](part, values)) for part in x]
        return np.concatenate(found)[:trials], (time.perf_counter() - start) / x[:, :, 0, 0].size


def score(found: np.ndarray, angles: np.ndarray, separation: float) -> dict[str, float | None]:
    """Returns the share of trials that resolve both sources, and the error of these.

    A trial resolves both sources if each has a found direction within half the separation.

    Args:
      found: directions found, `[T, …]`, NaN where there are none.
      angles: true directions `[T, K]`; the first two count.
      separation: degrees between the two.

    Returns:
      "resolved", the share of trials, and "rmse" in degrees, None if no trial resolves both.
    """
    distances = np.abs(found[:, None, :] - angles[:, :2, None])
    errors = np.min(np.where(np.isnan(distances), np.inf, distances), axis=2)
    resolved = (errors < separation / 2).all(axis=1)
    rmse = float(np.sqrt(np.mean(errors[resolved] ** 2))) if resolved.any() else None
    return {"resolved": float(resolved.mean()), "rmse": rmse}


def choose(
    programs: Programs, method: str, case: Case, loadings: Sequence[float], drawn: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the setting that resolves most trials, of equal ones that of the least error.

    Window and rank are chosen first, with the first loading and forgetting, then the other two one
    after the other.

    Args:
      programs: the compiled programs.
      method: a key of `METHODS`.
      case: the case.
      loadings: loadings to choose from.
      drawn: the trials, which `draw` returned for another seed than that of the measured ones.

    Returns:
      The setting, and all that were tried with their scores.
    """
    angles, x = drawn
    tried: list[dict[str, Any]] = []

    def best(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for setting in settings:
            if setting not in [each["setting"] for each in tried]:
                found, _ = programs.estimates(method, case, setting, x)
                tried.append({"setting": setting, **score(found, angles, case.separation)})
        return min(tried, key=_rank)["setting"]

    values = {"forgetting": _FORGETTING, "loading": loadings}
    memory = METHODS[method].memory
    first = {name: values[name][0] for name in memory}
    chosen = best([{**shape, **first} for shape in METHODS[method].shapes(case)])
    for name in memory:
        chosen = best([{**chosen, name: value} for value in values[name]])
    return chosen, tried


def _rank(scored: Mapping[str, Any]) -> tuple[float, float]:
    return -scored["resolved"], np.inf if scored["rmse"] is None else scored["rmse"]


def bound(case: Case, angles: np.ndarray) -> float:
    """Returns the Cramer-Rao bound of the two sources in degrees, root mean square over trials.

    Interferers are left out: the bound is that of the two sources alone.
    """
    pairs = jnp.asarray(angles[:, :2])
    one = jax.jit(
        jax.vmap(
            lambda pair: arrays.cramer_rao(
                pair, case.sensors, case.snapshots, case.snr, case.correlation
            )
        )
    )
    return float(jnp.sqrt(jnp.mean(one(pairs) ** 2)))
