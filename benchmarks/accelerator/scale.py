"""Sizes of the measurements: those of an accelerator, and small ones to rehearse on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.contest import Size
from compacter_jax.models.t5.config import PUBLISHED

# Widths of the published sizes of T5, as `benchmarks.contest` wants them.
_OF_T5 = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_TINY_BERT = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_TINY_T5 = {
    "vocab_size": 256,
    "d_model": 128,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
}


def _t5(name: str, rows: int = 64) -> Size:
    config = PUBLISHED[name]
    widths = {field: getattr(config, field) for field in _OF_T5}
    return Size(name, "t5", widths, rows=rows, length=128, target_length=8)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of all sections.

    Attributes:
      name: "full" or "toy".
      bert: the BERT that is compared with a CPU.
      t5: the T5 that is compared with a CPU.
      methods: methods whose steps are timed, by worth.
      timed: backbones whose steps and forward passes are timed, by worth.
      generating: backbones that generate text.
      generated: the number of generated tokens.
      generating_rows: the batch sizes of generation.
      dtype: the dtype of what is timed.
      largest: the T5 of which the largest batch is searched.
      largest_rows: the batch sizes that the search starts and ends with.
      members: the number of members of a bank.
      bank: the BERT of the bank, and the batch routed over its members.
      runs: the number of runs trained at once.
      run_batches: their batch sizes.
      run_rounds: the number of rounds of each.
      rounds: the number of rounds of other timings.
      square_side: the side of the matrices that the rate of products is measured with; None is
        that of `benchmarks.limits`.
    """

    name: str
    bert: Size
    t5: Size
    methods: tuple[str, ...]
    timed: tuple[Size, ...]
    generating: Size
    generated: int
    generating_rows: tuple[int, ...]
    dtype: str
    largest: Size
    largest_rows: tuple[int, int]
    members: int
    bank: Size
    runs: int
    run_batches: tuple[int, ...]
    run_rounds: int
    rounds: int
    square_side: int | None

    @property
    def is_toy(self) -> bool:
        """True for the scale of a rehearsal."""
        return self.name == "toy"


def _full() -> Scale:
    bert: dict[str, Any] = {"num_hidden_layers": 4}
    t5 = dataclasses.replace(_t5("t5-base", rows=8), name="t5 of base width, 4 layers")
    t5 = dataclasses.replace(t5, config={**t5.config, "num_layers": 4})
    return Scale(
        name="full",
        bert=Size("bert of base width, 4 layers", "bert", bert, rows=8, length=64),
        t5=dataclasses.replace(t5, length=64),
        methods=("compacter++", "lora", "full"),
        timed=(_t5("t5-base"), Size("bert-base", "bert", {}, rows=64, length=128), _t5("t5-large")),
        generating=_t5("t5-base"),
        generated=64,
        generating_rows=(8, 64),
        dtype="bfloat16",
        largest=_t5("t5-3b"),
        largest_rows=(8, 2048),
        members=1000,
        bank=Size("bert-base", "bert", {}, rows=64, length=128),
        runs=5,
        run_batches=(8, 32),
        run_rounds=15,
        rounds=9,
        square_side=None,
    )


def _toy() -> Scale:
    bert = Size("tiny bert", "bert", _TINY_BERT, rows=2, length=8)
    t5 = Size("tiny t5", "t5", _TINY_T5, rows=2, length=8, target_length=4)
    return Scale(
        name="toy",
        bert=bert,
        t5=t5,
        methods=("compacter++",),
        timed=(t5,),
        generating=t5,
        generated=4,
        generating_rows=(2,),
        dtype="float32",
        largest=t5,
        largest_rows=(2, 2),
        members=3,
        bank=bert,
        runs=2,
        run_batches=(2,),
        run_rounds=1,
        rounds=1,
        square_side=128,
    )


FULL, TOY = _full(), _toy()
SCALES = {scale.name: scale for scale in (FULL, TOY)}
