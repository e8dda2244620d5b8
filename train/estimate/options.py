"""The flags of plan and params."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from compacter_jax.catalogue import presets
from train.cli.compositions import ChoosesMethod
from train.cli.method_flags import ALL, MethodFlags, MethodOptions
from train.cli.options import BackboneDtype, Pooling, check
from train.fit.options import FitOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(FitOptions):
    """Print what a run of fit would cost: steps, programs, memory, time; reads no data or weights.

    Accepts the flags of fit. Several tasks joined by commas are planned as separate runs.

    Attributes:
      backbone: name of a published size, such as t5-base or google/flan-t5-xl, or path of a
        config.json.
      output_dir: ignored.
      devices: number of devices that share a batch; a mesh takes precedence.
      device_kind: device kind as JAX names it, such as "TPU v4" or "NVIDIA H100 80GB HBM3", to look
        up its peak.
      utilisation: fraction of the peak that the estimate of the time assumes.
      json: print JSON instead of text.
    """

    output_dir: Path = Path()
    devices: int = 1
    device_kind: str | None = None
    utilisation: float = 0.4
    json: bool = False

    def check(self) -> None:
        """Raises ValueError for a number out of range."""
        super().check()
        if self.is_grid:
            flags = "--seeds, --learning-rates, --train-sizes"
            raise ValueError(f"plan estimates one run; leave {flags} out")
        if self.parallel_files is not None or self.directions is not None or self.has_members:
            raise ValueError(
                "plan reads no data, and does not know the directions of a translation; leave "
                "--parallel-files, --directions and --adapters out, or count with "
                "`python -m benchmarks.translation --predict-only`"
            )
        wanted = {
            "devices": (self.devices >= 1, "at least 1"),
            "utilisation": (0 < self.utilisation <= 1, "above 0, at most 1"),
        }
        check(self, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamsOptions(ChoosesMethod):
    """Print how many parameters a method trains on a backbone, by group; or compare all methods.

    Attributes:
      backbone: folder of a Hugging Face checkpoint, or its id on the hub.
      backbone_config: instead of a backbone, name of a published size, such as t5-base or
        google/flan-t5-xl, or path of a config.json; no weights are read.
      train_members: members of a composition to train, as for fit.
      mesh: device mesh, as for fit; with a single method, also print the bytes that each device
        holds. No device is needed.
      backbone_dtype: with a mesh, dtype in which frozen weights are stored.
      num_labels: number of outputs of the classification head, where the backbone has one.
      pooling: input of this head, as for fit.
      vocab_size: count with this many vocabulary entries. By default, a T5 with 32,128 entries is
        also counted with its 32,100 tokens without padding, the base of the paper's percentages.
      json: print JSON instead of a table.
      method_options: changes to the preset, where not None; with all, to the presets that have the
        field.
    """

    backbone: str | None = None
    backbone_config: str | None = None
    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"preset of the method, or all: {', '.join(presets())}; or a composition, as for "
            "fit."
        ),
    ] = "compacter++"
    train_members: str | None = None
    mesh: str | None = None
    backbone_dtype: BackboneDtype = "float32"
    num_labels: int = 2
    pooling: Pooling | None = None
    vocab_size: int | None = None
    json: bool = False
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)

    def check_method(self) -> None:
        """Raises ValueError for an unknown preset or for options that it lacks; accepts `all`."""
        if self.method != ALL:
            super().check_method()
