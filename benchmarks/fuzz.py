"""Fuzzer of everything that is read: adapters, backbones, data, TOML; counts the outcomes.

    python -m benchmarks.fuzz --inputs 15000 --seconds 3600 --seed 0

Each input is a valid file with seeded damage (`benchmarks.mutations`). It may be accepted, if the
result is valid, or refused with a ValueError or an OSError of at most 500 characters. Anything else
is a finding: another exception, an accepted NaN or wrong dtype, more than 15 seconds of
computation, a longer message, or rows that are not those of the file. The input of each new finding
is kept under `--keep`. The exit code is 1 if there is a finding.

Each kind of input is a row of `KINDS`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import fuzz_data, fuzz_models
from benchmarks.fuzz_assets import Assets, Case, Kind, Random, remembered_shapes
from compacter_jax import messages

MOST_SECONDS = 15.0
# Wall-clock limit for code that waits without computing; the machine may be busy.
_MOST_WAITING = 300.0

KINDS: Mapping[str, Kind] = {
    "adapter, config": Kind(fuzz_models.ours("config"), 3),
    "adapter, weights": Kind(fuzz_models.ours("weights"), 3),
    "adapter, files": Kind(fuzz_models.ours("files")),
    "bank": Kind(fuzz_models.bank),
    "AdapterHub, config": Kind(fuzz_models.foreign("hub", "config"), 3),
    "AdapterHub, weights": Kind(fuzz_models.foreign("hub", "weights"), 2),
    "AdapterHub, files": Kind(fuzz_models.foreign("hub", "files")),
    "PEFT, config": Kind(fuzz_models.foreign("peft", "config"), 3),
    "PEFT, weights": Kind(fuzz_models.foreign("peft", "weights"), 2),
    "PEFT, files": Kind(fuzz_models.foreign("peft", "files")),
    "BERT, config": Kind(fuzz_models.backbone("bert", "config"), 2),
    "BERT, weights": Kind(fuzz_models.backbone("bert", "weights"), 2),
    "BERT, index": Kind(fuzz_models.backbone("bert", "index")),
    "T5, config": Kind(fuzz_models.backbone("t5", "config")),
    "T5, weights": Kind(fuzz_models.backbone("t5", "weights")),
    "settings of predict": Kind(fuzz_data.settings, 2),
    "data, .csv": Kind(fuzz_data.data(".csv")),
    "data, .tsv": Kind(fuzz_data.data(".tsv")),
    "data, .jsonl": Kind(fuzz_data.data(".jsonl")),
    "data, .parquet": Kind(fuzz_data.data(".parquet")),
    "predictions": Kind(fuzz_data.predictions, 2),
    "TOML": Kind(fuzz_data.toml, 2),
}


class _TooLong(BaseException):
    pass


def _too_long(*_: Any) -> None:
    raise _TooLong


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Ends code inside the block that computes or waits too long."""
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, MOST_SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, _MOST_WAITING),
    }
    before = {number: signal.signal(number, _too_long) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(case: Case) -> tuple[str, str]:
    """Reads an input.

    Returns:
      "accepted", "ValueError", "OSError", or the name of a finding; and the message.
    """
    try:
        with _limited():
            result = case.read()
        return case.complaint(result) or "accepted", ""
    except _TooLong:
        return f"more than {MOST_SECONDS:.0f} s", ""
    except (ValueError, OSError) as error:
        message = str(error)
        if len(message) > messages.LONGEST:
            return f"a message of more than {messages.LONGEST} characters", message
        return ("ValueError" if isinstance(error, ValueError) else "OSError"), message
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return f"{type(error).__name__} at {place}", str(error)


REFUSED = ("ValueError", "OSError")
Counts = dict[str, collections.Counter[str]]


def fuzz(
    assets: Assets, inputs: int, seconds: float, seed: int, keep: Path | None = None
) -> tuple[Counts, dict[str, str]]:
    """Reads inputs of all kinds in turn until their number or the time is exhausted.

    Args:
      assets: the valid files.
      inputs: the maximum number of inputs.
      seconds: the maximum wall-clock time.
      seed: the seed of the first input; each input has its own.
      keep: the folder for the first input of each finding.

    Returns:
      Kind -> outcome -> count; and finding -> kind, seed, damage and message of its first input.
    """
    rows = [name for name, kind in KINDS.items() for _ in range(kind.weight)]
    counts: Counts = {name: collections.Counter() for name in KINDS}
    findings: dict[str, str] = {}
    start, folder = time.monotonic(), Path(tempfile.mkdtemp())
    with remembered_shapes():
        for number in range(inputs):
            if time.monotonic() - start > seconds:
                break
            name = rows[number % len(rows)]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            case = KINDS[name].make(assets, Random(f"{name} {seed + number}"), folder)
            key, message = outcome(case)
            counts[name][key] += 1
            if key not in (*REFUSED, "accepted") and f"{name}: {key}" not in findings:
                text = f"input {seed + number}: {case.what[:300]}: {message[:300]}"
                findings[f"{name}: {key}"] = text
                if keep is not None:
                    shutil.copytree(folder, keep / str(seed + number), symlinks=True)
            if number % 200 == 199:
                jax.clear_caches()
    shutil.rmtree(folder, ignore_errors=True)
    return counts, findings


def table(counts: Counts) -> str:
    """Returns the counts as a table of Markdown."""
    names = ("accepted", *REFUSED)
    lines = ["| kind | inputs | accepted | ValueError | OSError | findings |"]
    lines.append("|---|---|---|---|---|---|")
    total: collections.Counter[str] = collections.Counter()
    for kind, own in counts.items():
        lines.append(_line(kind, own, names))
        total += own
    return "\n".join([*lines, _line("all", total, names)])


def _line(title: str, own: Mapping[str, int], names: tuple[str, ...]) -> str:
    found = sum(count for key, count in own.items() if key not in names)
    cells = [sum(own.values()), *(own.get(name, 0) for name in names), found]
    return f"| {title} | {' | '.join(f'{cell:,}' for cell in cells)} |"


def _limit_memory(more: int) -> None:
    """Limits the process to `more` additional bytes, so that excessive use raises a MemoryError."""
    statistics = Path("/proc/self/status")
    if statistics.is_file():
        lines = statistics.read_text().splitlines()
        now = next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (now * 1024 + more,) * 2)


def main() -> int:
    """Runs the fuzzer, and prints the table and the findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs of findings")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        assets = Assets(Path(folder))
        _limit_memory(8 * 2**30)
        counts, findings = fuzz(assets, given.inputs, given.seconds, given.seed, given.keep)
    print(table(counts))
    for finding, text in findings.items():
        print(f"FINDING {finding}: {text}", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
