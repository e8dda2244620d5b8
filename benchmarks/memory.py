"""Peak memory of a training step, predicted by `train.compute.memory` and measured.

    python -m benchmarks.memory --backbone DIR --label MiniLM --batch 32 --output minilm
    python -m benchmarks.memory --backbone t5-base --batch 16 --length 128 --target-length 8

Every setting runs in its own process, on one device, with random weights. On a GPU or TPU the peak
is that of the device's allocator. On a CPU it is the peak resident memory of the process during the
steps after the first, minus the resident memory before them, plus the weights and the optimizer
state that existed before.

With `--topology v5e:2x2x1` nothing is run: the step is compiled for this TPU, which requires libtpu
but no TPU, and the peak is the memory that the compiler allocates. These variables keep libtpu from
looking for a TPU:

    export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4
    export TPU_TOPOLOGY=2x2 TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0

Dropout is off unless `--dropout` sets it: on a CPU, the random bits of all layers are computed
first and would take more memory than everything else. On a CPU, XLA is also told to order
operations for memory. Its default, for speed, starts recomputation so early that nothing is saved.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("full", "houlsby", "compacter++")
REMAT, DTYPES = ("off", "full"), ("float32", "bfloat16")
_ENVIRONMENT = {
    # Freed memory is returned to the system, so that resident memory is used memory.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def main(arguments: list[str] | None = None) -> None:
    """Measures every setting, prints a table, and writes it and JSON if requested."""
    options = _parser().parse_args(arguments)
    if options.single:
        print(json.dumps(measure(options)))
        return
    records = []
    for method, remat, dtype in itertools.product(
        options.methods.split(","), options.remat.split(","), options.dtype.split(",")
    ):
        records.append(_in_new_process(options, method, remat, dtype))
        print(_row(records[-1]), flush=True)
    if options.output:
        kept = ("batch", "length", "target_length", "reduction_factor", "dropout", "steps")
        settings = {"backbone": options.label or options.backbone}
        settings |= {name: getattr(options, name) for name in kept}
        report = {"settings": settings, "runs": records}
        path = Path(options.output)
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(report), encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one setting in this process; returns its row of the table."""
    import jax  # noqa: PLC0415 - the parent process leaves the device to this one
    import optax  # noqa: PLC0415

    import compacter_jax as cj  # noqa: PLC0415
    from compacter_jax.models.families import family_of_module  # noqa: PLC0415
    from train.compute import step  # noqa: PLC0415
    from train.estimate import plan  # noqa: PLC0415

    shape = plan.Workload(
        backbone=options.backbone,
        method=cj.preset(options.methods, **_overrides(options)),
        num_labels=2,
        rows=options.batch,
        length=options.length,
        target_length=options.target_length,
        dtype=options.dtype,
        backbone_dtype="float32",
        remat=options.remat,
        mesh=(),
        accumulation_steps=1,
        dropout_rate=options.dropout,
    )
    model = plan.model_of(shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.backbone.dummy_inputs())["params"]
    labels = cj.label_params(shapes, model.method)
    work = Work(
        step.apply_function(model, family_of_module(model.backbone).inputs),
        step.loss_function("tokens" if shape.target_length else "classification"),
        cj.optimizer(optax.adamw(1e-3), labels),
        *cj.partition(shapes, labels),
        plan.batch_of(shape, shape.rows),
    )
    predicted = plan.cost_of(shape).memory
    measured = _compiled(work, options.topology) if options.topology else _run(work, options.steps)
    return {
        "method": options.methods,
        "remat": options.remat,
        "dtype": options.dtype,
        "predicted_bytes": predicted.total,
        "predicted_parts": {name: getattr(predicted, name) for name in plan.PARTS},
        **measured,
    }


class Work(NamedTuple):
    """A step, and the shapes of its arguments.

    Attributes:
      apply: the model.
      loss: the loss, as in `train.compute.step.loss_and_update`.
      tx: the optimizer.
      trained: the trained half of `compacter_jax.partition`.
      frozen: the frozen half.
      batch: the rows.
    """

    apply: Any
    loss: Any
    tx: Any
    trained: Any
    frozen: Any
    batch: Any


def _run(work: Work, steps: int) -> dict[str, Any]:
    """Measures steps with random weights on the first device."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from train.compute import compute, memory  # noqa: PLC0415

    made = compute.make_compute(
        work.apply, work.loss, work.tx, seed=0, devices=jax.local_devices()[:1]
    )
    generator = np.random.default_rng(0)

    def random(leaf: Any) -> np.ndarray:
        return np.float32(0.02) * generator.standard_normal(leaf.shape, np.float32)

    state = made.init_state(jax.tree.map(random, work.trained))
    frozen = made.place(jax.tree.map(random, work.frozen))
    batch = {name: np.ones(array.shape, array.dtype) for name, array in work.batch.items()}
    state, _ = jax.block_until_ready(made.step(state, frozen, batch))  # compiles the step
    resident = _start_of_peak()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(made.step(state, frozen, batch))
        seconds.append(time.perf_counter() - started)
    return {
        "measured_bytes": _peak(memory.size((state, frozen)), resident),
        "examples_per_second": len(batch["weights"]) / statistics.median(seconds),
        "device": jax.devices()[0].device_kind,
    }


def _compiled(work: Work, topology: str) -> dict[str, Any]:
    """Returns the memory that the compiler allocates for a TPU that need not exist."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    from jax.experimental import topologies  # noqa: PLC0415

    from train.compute import step  # noqa: PLC0415

    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def update(state: Any, frozen: Any, batch: Any, seed: Any) -> Any:
        functions = {"apply": work.apply, "loss": work.loss, "tx": work.tx}
        return step.loss_and_update(state, frozen, batch, jax.random.key(seed), **functions)

    def on_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = step.TrainState(number, work.trained, jax.eval_shape(work.tx.init, work.trained))
    arguments = jax.tree.map(on_device, (state, work.frozen, work.batch, number))
    analysis = jax.jit(update, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {
        "measured_bytes": held - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
        "examples_per_second": None,
        "device": f"{device.device_kind}, compiled for it",
    }


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.methods == "full" else {"reduction_factor": options.reduction_factor}


def _start_of_peak() -> int:
    """Resets Linux's peak of resident memory; returns the bytes that are resident now."""
    import jax  # noqa: PLC0415

    from train.fit import timing  # noqa: PLC0415

    if jax.default_backend() != "cpu":
        return 0
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return timing.peak_memory()


def _peak(held: int, resident: int) -> int:
    """Returns the peak in bytes, of which `held` existed before the steps."""
    import jax  # noqa: PLC0415

    from train.fit import timing  # noqa: PLC0415

    if jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return held + timing.peak_memory() - resident


def _in_new_process(
    options: argparse.Namespace, method: str, remat: str, dtype: str
) -> dict[str, Any]:
    kept = ("backbone", "batch", "length", "target_length", "steps", "reduction_factor", "dropout")
    flags = {name: getattr(options, name) for name in kept}
    if options.topology:
        flags["topology"] = options.topology
    flags |= {"methods": method, "remat": remat, "dtype": dtype}
    words = [word for name, x in flags.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    flags_of_xla = f"{os.environ.get('XLA_FLAGS', '')} {_SCHEDULER}".strip()
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--single", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_ENVIRONMENT, "XLA_FLAGS": flags_of_xla},
        cwd=Path(__file__).parents[1],
    )
    return json.loads(result.stdout.splitlines()[-1])


def table(report: dict[str, Any]) -> str:
    """Returns the runs as a table in Markdown."""
    settings, runs = report["settings"], report["runs"]
    lines = [
        f"{settings['backbone']}, {settings['batch']} rows of {settings['length']} tokens, on "
        f"{runs[0]['device']}; MB",
        "",
        "| method | remat | dtype | predicted | measured | measured / predicted | examples/s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        *map(_row, runs),
    ]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any]) -> str:
    predicted, measured = record["predicted_bytes"], record["measured_bytes"]
    cells = [record["method"], record["remat"], record["dtype"]]
    cells += [f"{predicted / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{measured / predicted:.2f}"]
    speed = record["examples_per_second"]
    return "| " + " | ".join([*cells, "" if speed is None else f"{speed:.1f}"]) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--backbone", required=True, help="published size, or folder of a config")
    parser.add_argument("--label", help="of the backbone in the table; by default its name")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="of the inputs, in tokens")
    parser.add_argument("--target-length", type=int, default=0, help="for a T5, in tokens")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--remat", default=",".join(REMAT))
    parser.add_argument("--dtype", default=",".join(DTYPES))
    parser.add_argument("--reduction-factor", type=int, default=32, help="of adapters")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=2, help="after the first, which compiles")
    parser.add_argument("--topology", help="of a TPU to compile for, such as v5e:2x2x1")
    parser.add_argument("--output", help="path of a .json and a .md file, without the ending")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
