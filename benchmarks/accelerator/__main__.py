"""Checks, times and explains this package on an accelerator, within minutes.

    python -m benchmarks.accelerator --json accelerator.json
    python -m benchmarks.accelerator --rehearse       # all of it on a CPU, at toy size
    python -m benchmarks.accelerator --section right --minutes 3

Sections, by worth: `right` compares results with those of a CPU; `fast` times steps, forward passes
and generation beside the peers and the device's matrix products; `many` times many adapters and
several runs at once; `why` lists the longest kernels of a step. Each runs in its own process with
its own limit of time, and what it leaves goes to the next; in a rehearsal they run side by side.
Results are written after every check, so that an interrupted run tells what it has seen.

`benchmarks/accelerator.md` says what to take along to a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.accelerator.section import run_checks
from benchmarks.contest import write
from benchmarks.turns import ROOT, processor

# Section -> its share of the time.
SECTIONS = {"right": 0.35, "fast": 0.4, "many": 0.1, "why": 0.15}
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "transformers", "datasets", "torch", "adapters", "peft"),
    *("orbax-checkpoint", "chex", "numpy"),
)
_ENVIRONMENT = {
    # The peers and the runs of `fit` share the device with the section that starts them.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Of transformers only tokenizers are used, which would otherwise load PyTorch for every section
    # and every run of `fit`. The peers ask for it themselves.
    "USE_TORCH": "0",
}
_REPORTING = threading.Lock()  # of the report and standard output
_RUNNING: set[int] = set()  # process groups of sections
_NAME_OF_WHEEL = re.compile(r"(?P<name>[^-]+)-[^-]+(-[^-]+)?-[^-]+-[^-]+-[^-]+\.whl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections and prints a line for each check.

    Returns:
      0 if every check passed or was skipped, and none was left out for want of time; otherwise 1.
    """
    options = _parser().parse_args(arguments)
    if options.checks_of:
        _answer(options.checks_of, "toy" if options.rehearse else "full")
        return 0
    if options.json is not None:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"rehearsal": options.rehearse, "minutes": options.minutes}
    report["sections"] = {}
    with _environment(options.wheels, options.rehearse) as (environment, installed):
        report["wheels"] = installed
        report |= _machine(environment)
        print(_heading(report), flush=True)
        write(options.json, report)
        run = functools.partial(_run, options=options, environment=environment, report=report)
        end = time.monotonic() + 60 * options.minutes
        left = list(options.section or SECTIONS)
        if options.rehearse:  # its times mean nothing, so that no section has to wait for another
            report["sections"] = {name: {} for name in left}  # in order, whichever begins first
            with ThreadPoolExecutor(len(left)) as pool, _killing_if_interrupted():
                list(pool.map(functools.partial(run, limit=end - time.monotonic()), left))
        else:
            while left:
                share = SECTIONS[left[0]] / sum(SECTIONS[name] for name in left)
                run(left.pop(0), limit=max(0.0, share * (end - time.monotonic())))
    return 0 if all(_is_good(section) for section in report["sections"].values()) else 1


def _run(
    name: str,
    limit: float,
    options: argparse.Namespace,
    environment: Mapping[str, str],
    report: dict[str, Any],
) -> None:
    """Runs a section; prints a line for each check, and writes the report after it."""
    results: dict[str, Any] = {"limit_seconds": round(limit), "checks": {}}
    results |= {"left_out": [], "ended": None}
    with _REPORTING:
        report["sections"][name] = results
    for check, result in _section(name, options.rehearse, limit, environment, results):
        with _REPORTING:
            results["checks"][check] = result
            print(f"{name}: {check}: {summary(result)}", flush=True)
            write(options.json, report)
    with _REPORTING:
        for line in _shortcomings(name, results):
            print(line, flush=True)
        write(options.json, report)


def _shortcomings(name: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each check that a section left out, or one for its end before them."""
    ended = results["ended"]
    if ended is not None:
        because = ended if ended.startswith("nothing") else f"it ended before its checks, {ended}"
        yield f"{name}: {because}"
        return
    for check in results["left_out"]:
        yield f"{name}: {check}: left out, {results['limit_seconds']} s were over"


def summary(result: Mapping[str, Any]) -> str:
    """Returns a result in a few words: what failed, or its main numbers."""
    if "skipped" in result:
        return f"skipped, {result['skipped']}"
    verdict = {True: "passed", False: "FAILED", None: "measured"}[result.get("passed")]
    if "error" in result:
        return f"{verdict}, {result['error'].splitlines()[0]}"
    numbers = [
        f"{name} {_number(result[name])}"
        for name in ("distances", "same_tokens", "largest_difference", "accuracy", "ratio")
        if name in result
    ]
    rates = result.get("examples_per_second", {})
    numbers += [f"{side} {_number(rate)} examples/s" for side, rate in rates.items()]
    if "of_matrix_product_rate" in result:
        numbers.append(f"{result['of_matrix_product_rate']:.1%} of the rate of matrix products")
    for failure in result.get("failures", {}):
        numbers.append(f"{failure} failed")
    if "batches" in result:
        numbers += [f"{b['rows']}: {b['examples_per_second']:.1f}/s" for b in result["batches"]]
    if result.get("kernels"):
        numbers.append(
            "; ".join(f"{k['name'][:40]} {k['share']:.1%}" for k in result["kernels"][:3])
        )
    return ", ".join([f"{verdict} in {result['check_seconds']:.0f} s", *numbers])


def _number(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"{value:.4g}"
    if "median" in value:
        return f"{value['median']:.3f}"
    return ", ".join(f"{name} {_number(each)}" for name, each in value.items())


def _is_good(section: Mapping[str, Any]) -> bool:
    passed = all(result.get("passed", True) for result in section["checks"].values())
    return passed and not section["left_out"] and not section["ended"]


# --- the process of a section -------------------------------------------------------------------


def _answer(section: str, scale: str) -> None:
    """Runs the checks of a section in this process and answers on its standard output."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    from benchmarks.accelerator.scale import SCALES  # noqa: PLC0415 - imports JAX

    module = importlib.import_module(f"benchmarks.accelerator.{section}")
    run_checks(module.checks(SCALES[scale]), channel)


def _section(
    name: str,
    rehearse: bool,
    limit: float,
    environment: Mapping[str, str],
    results: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs a section in a process with a limit of time.

    Args:
      name: the name of the section.
      rehearse: whether to run it at toy size.
      limit: the seconds after which the process and its children are killed.
      environment: the variables of the process.
      results: has the "checks" that were yielded; receives the names "left_out", and how the
        process "ended" if it died within its time.

    Yields:
      Name and result of each check when it has ended.
    """
    command = [sys.executable, "-m", "benchmarks.accelerator", "--checks-of", name]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=dict(environment),
            start_new_session=True,
        )
        _RUNNING.add(process.pid)
        announced: list[str] = []
        deadline = time.monotonic() + limit
        with _lines(process, deadline) as lines:
            for line in lines:
                answer = json.loads(line)
                if "checks" in answer:
                    announced = answer["checks"]
                    continue
                yield answer["name"], answer["result"]
            over, code = time.monotonic() >= deadline, None
            if not over:  # it has closed its output, and is about to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=5)
        results["left_out"] = [check for check in announced if check not in results["checks"]]
        if over and not announced:
            results["ended"] = f"nothing was announced within {limit:.0f} s"
        elif not announced or (results["left_out"] and not over):
            errors.seek(0)
            results["ended"] = f"code {code}: {errors.read()[-2000:].strip()}"


@contextlib.contextmanager
def _lines(process: subprocess.Popen[str], deadline: float) -> Iterator[Iterator[str]]:
    """Yields the lines that a process writes until it ends or the deadline has passed.

    At the end the process and its children are killed.
    """
    assert process.stdout is not None
    output, lines = process.stdout, queue.SimpleQueue[str | None]()

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def until_the_deadline() -> Iterator[str]:
        with contextlib.suppress(queue.Empty):
            while line := lines.get(timeout=max(0.0, deadline - time.monotonic())):
                yield line

    try:
        yield until_the_deadline()
    finally:
        _kill(process.pid)
        process.wait()
        _RUNNING.discard(process.pid)
        reader.join()
        output.close()


@contextlib.contextmanager
def _killing_if_interrupted() -> Iterator[None]:
    """Kills the sections on an interrupt, for which their threads would wait otherwise."""
    try:
        yield
    except KeyboardInterrupt:
        for group in list(_RUNNING):
            _kill(group)
        raise


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


# --- the machine --------------------------------------------------------------------------------


@contextlib.contextmanager
def _environment(wheels: Path | None, rehearse: bool) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yields the variables of the sections, and the wheels installed for them.

    Of the wheels in a folder, those of packages that are missing are installed into a temporary
    folder; this environment stays as it is.
    """
    with tempfile.TemporaryDirectory(prefix="wheels-") as target:
        missing = [] if wheels is None else _missing(wheels)
        if missing:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            subprocess.run([*command, "--target", target, *map(str, missing)], check=True)
        paths = [str(ROOT), target, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
        if rehearse:
            environment = _rehearsing(environment, Path(target) / "compiled")
        yield environment, [path.name for path in missing]


def _rehearsing(environment: Mapping[str, str], cache: Path) -> dict[str, str]:
    """Returns the variables of a rehearsal, in which compilation takes most of the time.

    Programs are compiled for the CPU, quickly, and once for all sections. What `environment` asks
    for itself, as the tests do, is left as it is.
    """
    flags = f"--xla_backend_optimization_level=0 {environment.get('XLA_FLAGS', '')}"
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OMP_NUM_THREADS": "1",
    }
    # Of a flag that is there twice the last counts.
    return {**own, **environment, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}


def _missing(wheels: Path) -> list[Path]:
    """Returns the wheels in a folder whose packages are not installed.

    Raises:
      SystemExit: if the folder has no wheel.
    """
    found = {path: _NAME_OF_WHEEL.fullmatch(path.name) for path in sorted(wheels.glob("*.whl"))}
    if not found:
        raise SystemExit(f"error: --wheels {wheels} has no file NAME-VERSION-….whl")
    missing = []
    for path, match in found.items():
        try:
            importlib.metadata.version(match["name"].replace("_", "-") if match else path.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(path)
    return missing


_DEVICE = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "device": device.device_kind,
                  "devices": jax.device_count(), "driver": device.client.platform_version}))
"""


def _machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the device and the versions, asked in a process that then frees the device.

    Raises:
      SystemExit: if JAX finds no device.
    """
    ended = subprocess.run(
        [sys.executable, "-c", _DEVICE],
        capture_output=True,
        text=True,
        check=False,
        env=dict(environment),
    )
    if ended.returncode:
        raise SystemExit(f"error: JAX finds no device: {ended.stderr.strip().splitlines()[-1]}")
    versions = {"python": platform.python_version()}
    found = importlib.metadata.distributions(
        path=[*filter(None, environment["PYTHONPATH"].split(os.pathsep)), *sys.path]
    )
    names = {name: d.version for d in found if (name := d.metadata["Name"]) in _PACKAGES}
    versions |= {name: names.get(name, "not installed") for name in _PACKAGES}
    return {
        **json.loads(ended.stdout.splitlines()[-1]),
        "processor": processor(),
        "versions": versions,
    }


def _heading(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['devices']} x {report['device']} ({report['processor']}); {versions}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--minutes", type=_positive, default=9.0, help="for all sections together")
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="repeatable")
    parser.add_argument("--wheels", type=Path, help="folder with packages that may be missing")
    parser.add_argument("--json", metavar="FILE", help="written after every check")
    parser.add_argument("--checks-of", choices=list(SECTIONS), help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
