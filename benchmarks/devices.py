"""Losses of a training run on one device, on several, and on several hosts: they must be equal.

    python -m benchmarks.devices --json devices.json

Every arrangement runs in its own processes, whose devices are emulated on the CPU; several hosts
communicate by Gloo. The model is a small random BERT with adapters. Its batches differ in length,
and the last has rows of padding. Dropout draws one mask for the whole batch on one device and over
a mesh, and one mask per device if each has a whole backbone. These are two kinds of run with
different losses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# Tolerance for the difference of a loss from that on a single device, due to another order of
# sums.
LIMIT = 1e-6
DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Processes and devices of a run.

    Attributes:
      processes: the number of processes, each in the place of a host.
      devices: the number of devices of each process.
      mesh: the `--mesh` that divides the backbone over the devices of each process.
    """

    processes: int = 1
    devices: int = 1
    mesh: str | None = None

    def __str__(self) -> str:
        number = f"{self.processes} x {self.devices}" if self.processes > 1 else f"{self.devices}"
        return f"{number} as {self.mesh}" if self.mesh else number


ARRANGEMENTS = (
    Arrangement(),
    Arrangement(devices=4),
    Arrangement(processes=2, devices=2),
    Arrangement(devices=8, mesh="data=2,model=4"),
    Arrangement(processes=2, devices=4, mesh="data=2,model=2"),
)

# Dropout rate -> arrangements whose runs are compared.
KINDS = {
    "without dropout": (0.0, ARRANGEMENTS),
    "with dropout, one mask for a batch": (DROPOUT, (ARRANGEMENTS[0], *ARRANGEMENTS[3:])),
    "with dropout, one on every device": (DROPOUT, ARRANGEMENTS[1:3]),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every arrangement, prints a table, and writes JSON if requested.

    Raises:
      SystemExit: if losses differ by more than `LIMIT`.
    """
    options = _parser().parse_args(arguments)
    if options.process_id is not None:
        print(json.dumps(work(options)))
        return
    runs = {str(where): launch(where) for where in ARRANGEMENTS}
    report = {
        kind: {str(where): [result[str(rate)] for result in runs[str(where)]] for where in of_kind}
        for kind, (rate, of_kind) in KINDS.items()
    }
    largest = max(_difference(runs) for runs in report.values())
    _print(report, largest)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"runs": report, "largest_difference": largest}, file, indent=2)
            file.write("\n")
    if largest > LIMIT:
        sys.exit(f"losses differ by {largest:.2e}, more than {LIMIT:.0e}")


def launch(where: Arrangement) -> list[dict[str, Any]]:
    """Returns the results of `work` in each process of an arrangement, in their order.

    Raises:
      RuntimeError: if a process fails; the message has its output.
    """
    with contextlib.closing(socket.create_server(("localhost", 0))) as server:
        port = server.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={where.devices}"
    # If the variable has a flag twice, the last one counts.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    command = [sys.executable, "-m", "benchmarks.devices"]
    command += ["--coordinator-address", f"localhost:{port}"]
    command += ["--num-processes", str(where.processes)]
    command += ["--mesh", where.mesh] if where.mesh else []
    started = [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        for i in range(where.processes)
    ]
    written = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, written, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of {where} failed:\n{errors}")
    return [json.loads(output.splitlines()[-1]) for output, _ in written]


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Joins the other processes; returns the results of `train` for each dropout rate."""
    from train.cli.options import HostOptions  # noqa: PLC0415
    from train.compute import distributed  # noqa: PLC0415

    if options.num_processes > 1:
        distributed.start(
            HostOptions(
                coordinator_address=options.coordinator_address,
                num_processes=options.num_processes,
                process_id=options.process_id,
            )
        )
    return {str(dropout): train(dropout, mesh=options.mesh) for dropout in (0.0, DROPOUT)}


def train(
    dropout: float, devices: Sequence[Any] | None = None, mesh: str | None = None
) -> dict[str, Any]:
    """Trains a few steps on all devices, or on the given ones.

    Returns:
      `losses` and `gradient_norms` of the steps; `examples`, the positions of the examples that
      this process has built; `logits`, the sum of the squares of those of its own evaluation;
      `fraction`, the part of the frozen weights' bytes on its first device.
    """
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    import optax  # noqa: PLC0415

    import compacter_jax as cj  # noqa: PLC0415
    from train.compute import distributed, step  # noqa: PLC0415
    from train.compute.compute import make_compute  # noqa: PLC0415

    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    config = cj.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, **rates)
    module = cj.Bert(config, head="sequence_classification", num_labels=3)
    params = jax.jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
    model = cj.Adapted(module, cj.preset("compacter++", reduction_factor=3))
    params = cj.init_adapters(model, cj.Backbone(module, params, None, "random"), jax.random.key(1))
    labels = cj.label_params(params, model.method)
    compute = make_compute(
        step.apply_function(model),
        step.loss_function("classification"),
        cj.optimizer(optax.adamw(1e-2), labels),
        seed=0,
        devices=devices,
        mesh=mesh,
    )
    trained, frozen = cj.partition(jax.device_get(params), labels)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    state, frozen = compute.init_state(trained), compute.place(frozen)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(frozen))
    losses, norms, examples = [], [], []
    for batch in _batches(distributed.index(), distributed.number()):
        state, metrics = compute.step(state, frozen, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
        examples += [int(i) for i in batch["indices"] if i >= 0]
    logits = compute.outputs(state.trained, frozen, next(_batches(0, 1)))
    return {
        "losses": losses,
        "gradient_norms": norms,
        "examples": sorted(examples),
        "logits": float(np.sum(np.square(logits, dtype=np.float64))),
        "fraction": held / size,
    }


def _batches(index: int, number: int) -> Iterator[Any]:
    """Yields a host's part of the batches: 20 examples in batches of 8."""
    import numpy as np  # noqa: PLC0415

    from train.data import batching, tokens  # noqa: PLC0415

    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 13, 20)
    encoded = tokens.Encoded(
        input_ids=generator.integers(1, 31, lengths.sum()).astype(np.int32),
        token_type_ids=np.zeros(lengths.sum(), np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        targets=generator.integers(0, 3, 20).astype(np.int32),
        max_length=16,
        pad_token_id=0,
        num_truncated=0,
    )
    return batching.batches(encoded, 8, shuffle=True, seed=0, part=(index, number))


def _difference(runs: dict[str, list[dict[str, Any]]]) -> float:
    """Returns the largest difference of a loss from that of the first arrangement."""
    first, *others = [results[0]["losses"] for results in runs.values()]
    return max(abs(a - b) for losses in others for a, b in zip(first, losses, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", help="file to write the report to")
    # Options of the processes that this program starts itself.
    parser.add_argument("--coordinator-address", help=argparse.SUPPRESS)
    parser.add_argument("--num-processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    return parser


def _print(report: dict[str, dict[str, list[dict[str, Any]]]], largest: float) -> None:
    for kind, runs in report.items():
        print(f"{kind}:")
        print(f"{'devices':>24}  {'examples':>8}  {'backbone':>8}  losses")
        for where, results in runs.items():
            built = ", ".join(str(len(result["examples"])) for result in results)
            losses = "  ".join(f"{loss:.8f}" for loss in results[0]["losses"])
            print(f"{where:>24}  {built:>8}  {results[0]['fraction']:>8.1%}  {losses}")
    print("examples: that each host builds; backbone: the part of it on each device")
    print(f"largest difference of a loss: {largest:.1e} (limit {LIMIT:.0e})")


if __name__ == "__main__":
    main()
