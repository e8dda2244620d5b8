"""The flags of plan and params."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from compacter_jax.catalogue import presets
from train.cli.compositions import ChoosesMethod
from train.cli.method_flags import ALL, MethodFlags, MethodOptions
from train.cli.options import BackboneDtype, check
from train.fit.options import FitOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(FitOptions):
    """Print what a run of fit would cost: steps, programs, memory, time; no data, no weights.

    Takes the flags of fit. Of several tasks with commas, each is planned as a run of its own.

    Attributes:
      backbone: name of a published size, such as t5-base or google/flan-t5-xl, or a config.json.
      output_dir: not used.
      devices: how many share a batch; a mesh says it, too.
      device_kind: of JAX, such as "TPU v4" or "NVIDIA H100 80GB HBM3", whose peak is known.
      utilisation: what part of the peak to count on.
      json: print JSON instead of text.
    """

    output_dir: Path = Path()
    devices: int = 1
    device_kind: str | None = None
    utilisation: float = 0.4
    json: bool = False

    def check(self) -> None:
        """ValueError for a number that cannot work."""
        super().check()
        if self.is_grid:
            flags = "--seeds, --learning-rates, --train-sizes"
            raise ValueError(f"plan is for one run; leave {flags} out")
        wanted = {
            "devices": (self.devices >= 1, "at least 1"),
            "utilisation": (0 < self.utilisation <= 1, "above 0, at most 1"),
        }
        check(self, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamsOptions(ChoosesMethod):
    """Print what a method trains on a backbone, by group, or what each of all methods does.

    Attributes:
      backbone: folder of a Hugging Face checkpoint, or its id on the hub.
      backbone_config: in place of a backbone, the name of a published size, such as t5-base or
        google/flan-t5-xl, or a config.json; needs no weights.
      train_members: which members of a composition are trained, as for fit.
      mesh: with one method, print what each device has to hold if the backbone is divided so, as by
        fit; no device is needed.
      backbone_dtype: with a mesh, what weights that are not trained are stored in.
      num_labels: width of the classification head, where the backbone has one.
      vocab_size: count as if the vocabulary had so many entries. A T5 of 32,128 is by default
        counted with 32,100, too, its tokens without padding, which the paper's percentages are of.
      json: print JSON instead of a table.
      method_options: changes to the preset, where not None; with all, to the presets that have the
        field.
    """

    backbone: str | None = None
    backbone_config: str | None = None
    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"preset of the method, or all: {', '.join(presets())}; or a composition, as fit "
            "takes it."
        ),
    ] = "compacter++"
    train_members: str | None = None
    mesh: str | None = None
    backbone_dtype: BackboneDtype = "float32"
    num_labels: int = 2
    vocab_size: int | None = None
    json: bool = False
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)

    def check_method(self) -> None:
        """ValueError for an unknown preset, or options that it does not have; `all` has each."""
        if self.method != ALL:
            super().check_method()
