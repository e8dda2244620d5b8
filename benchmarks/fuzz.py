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
import csv
import hashlib
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from benchmarks import mutations
from compacter_jax import banks, messages
from compacter_jax.adapter_files import CONFIG_NAME
from compacter_jax.exchange.peft import folder as peft_folder
from compacter_jax.inject import initial
from compacter_jax.models.fitting import CONFIG_FILE
from compacter_jax.models.loading import INDEX_FILE, SINGLE_FILE, module_from_config
from train import tasks
from train.cli import config_files
from train.data import rows as data_rows
from train.fit.options import FitOptions
from train.inference import prediction_files
from train.inference.saved import settings_of

MOST_SECONDS = 15.0
# Wall-clock limit for code that waits without computing; the machine may be busy.
_MOST_WAITING = 300.0

Random = random.Random
Params = Mapping[str, Any]


class Case(NamedTuple):
    """One input.

    Attributes:
      what: the damage to the input.
      read: the function that reads the input.
      complaint: a function of the result that returns its defect, None if it is valid.
    """

    what: str
    read: Callable[[], Any]
    complaint: Callable[[Any], str | None] = lambda result: None


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
      make: a function that writes an input into an empty folder.
      weight: the relative frequency of the kind.
    """

    make: Callable[[Assets, Random, Path], Case]
    weight: int = 1


# --- sound files --------------------------------------------------------------------------------


class Assets:
    """Valid folders of everything, for a tiny BERT and a tiny T5, and the backbone itself.

    Attributes:
      folder: the folder with `bert`, `t5`, and `ours`, `hub` and `peft`, which have a folder for
        each method.
      backbone: the backbone of the adapters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bert = transformers.BertConfig(
            vocab_size=20,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=160,
            architectures=["BertForSequenceClassification"],
        )
        t5 = transformers.T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            architectures=["T5ForConditionalGeneration"],
        )
        for name, config in (("bert", bert), ("t5", t5)):
            module = module_from_config(config)
            shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())
            cj.save_backbone(folder / name, module, _numbers(shapes["params"]), config)
        self.backbone = cj.load_backbone(folder / "bert")
        for name, overrides in _METHODS.items():
            self._save(name, cj.preset(name, **overrides))

    def _save(self, name: str, method: cj.MethodConfig) -> None:
        """Saves an adapter in this package's format, and in those of libraries with the method."""
        model = cj.Adapted(self.backbone.module, method)
        shapes = jax.eval_shape(
            lambda: initial.init_adapters(model, self.backbone, jax.random.key(0))
        )
        own = flatten_dict(self.backbone.params, sep="/")
        flat = flatten_dict(_numbers(shapes), sep="/")
        params = unflatten_dict({**flat, **own}, sep="/")
        cj.save_adapter(self.folder / "ours" / name, model, params, metadata=_METADATA)
        with contextlib.suppress(ValueError):  # PEFT does not have the method
            cj.export_peft(self.folder / "peft" / name, model, params)
        model = model.clone(method=method.replace(train_layer_norms=False))
        with contextlib.suppress(ValueError):  # AdapterHub does not
            cj.export_adapterhub(self.folder / "hub" / name, model, params)

    def copy(self, r: Random, source: str, folder: Path) -> tuple[str, Path]:
        """Copies one of the folders of a kind; returns its name and its new path."""
        found = sorted(path for path in (self.folder / source).iterdir() if any(path.iterdir()))
        chosen = r.choice(found)
        shutil.copytree(chosen, folder / "input")
        return chosen.name, folder / "input"


_METHODS: Mapping[str, dict[str, Any]] = {
    "compacter": {"reduction_factor": 2},
    "houlsby": {"reduction_factor": 4},
    "ia3": {},
    "lora": {"rank": 2},
    "prefix-tuning": {"prefix_length": 3, "bottleneck_size": 5},
    "prompt-tuning-random": {"prompt_length": 3},
}
_METADATA = {
    "backbone": "bert",
    "backbone_dtype": "float32",
    "dtype": "float32",
    "kind": "classification",
    "label_names": ["negative", "positive"],
    "max_length": 32,
    "task": "custom",
}


def _numbers(shapes: Any) -> Any:
    """Returns random parameters of the given shapes; nothing is compiled for them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@contextlib.contextmanager
def remembered_shapes() -> Iterator[None]:
    """Caches the shapes of each method inside the block: reading an adapter is mostly tracing."""
    original, known = initial.init_adapters, {}

    def init_adapters(model: Any, backbone: Any, key: Any, *inputs: Any) -> Any:
        own = (model.method, repr(model.sites), backbone.module)
        if own not in known:
            known[own] = jax.eval_shape(lambda key: original(model, backbone, key, *inputs), key)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), known[own])

    places = (initial, peft_folder, banks)
    for place in places:
        place.init_adapters = init_adapters
    try:
        yield
    finally:
        for place in places:
            place.init_adapters = original


# --- kinds: the library -------------------------------------------------------------------------


def _unsound(params: Params) -> str | None:
    """Returns the defect of the parameters of a float32 model; None if they are valid."""
    for path, leaf in flatten_dict(params, sep="/").items():
        if path.endswith("/occupied"):
            continue
        if leaf.dtype != jnp.float32:
            return f"accepted {leaf.dtype}"
        if not np.isfinite(np.asarray(leaf)).all():
            return "accepted NaN"
    return None


def _edit_json(r: Random, path: Path) -> str:
    data, what = mutations.mutated_json(r, json.loads(path.read_text("utf-8")))
    path.write_bytes(data)
    return f"{path.name}: {what}"


def _edit_tensors(r: Random, path: Path) -> str:
    data, what = mutations.mutated_tensors(r, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {what}"


def _ours(what: str) -> Callable[[Assets, Random, Path], Case]:
    def make(assets: Assets, r: Random, folder: Path) -> Case:
        name, adapter = assets.copy(r, "ours", folder)
        return Case(
            f"{name}: {_damage(what, r, adapter)}",
            lambda: cj.load_adapter(adapter, assets.backbone)[1],
            _unsound,
        )

    return make


def _damage(what: str, r: Random, adapter: Path) -> str:
    """Damages one file of an adapter, mostly with a matching hash of the damaged weights."""
    config = adapter / CONFIG_NAME
    (weights,) = adapter.glob("*.safetensors")
    if what == "config":
        return _edit_json(r, config)
    if what == "files":
        return mutations.odd_file(r, r.choice([config, weights]))
    done = _edit_tensors(r, weights)
    if r.random() < 0.9:
        settings = json.loads(config.read_text("utf-8"))
        settings["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        config.write_text(json.dumps(settings), "utf-8")
    return done


def _bank(assets: Assets, r: Random, folder: Path) -> Case:
    name, adapter = assets.copy(r, "ours", folder)
    done = _damage(r.choice(["config", "weights"]), r, adapter)
    sources = [assets.folder / "ours" / name, adapter]
    return Case(f"{name}: {done}", lambda: cj.stack_adapters(sources, assets.backbone)[1], _unsound)


def _foreign(library: str, what: str) -> Callable[[Assets, Random, Path], Case]:
    suffix = {"config": ".json", "weights": ".safetensors", "files": ""}[what]
    edit = {"config": _edit_json, "weights": _edit_tensors, "files": mutations.odd_file}[what]
    read = {"hub": cj.import_adapterhub, "peft": cj.import_peft}[library]

    def make(assets: Assets, r: Random, folder: Path) -> Case:
        name, adapter = assets.copy(r, library, folder)
        file = r.choice(sorted(adapter.glob(f"*{suffix}")))
        done = f"{name}: {edit(r, file)}"
        return Case(done, lambda: read(adapter, assets.backbone)[1], _unsound)

    return make


def _backbone(family: str, what: str) -> Callable[[Assets, Random, Path], Case]:
    def make(assets: Assets, r: Random, folder: Path) -> Case:
        checkpoint = folder / "input"
        shutil.copytree(assets.folder / family, checkpoint)
        if what == "config":
            done = _edit_json(r, checkpoint / CONFIG_FILE)
        elif what == "weights":
            done = _edit_tensors(r, checkpoint / SINGLE_FILE)
        else:
            done = _edit_index(r, checkpoint)
        return Case(done, lambda: cj.load_backbone(checkpoint).params, _unsound)

    return make


def _edit_index(r: Random, checkpoint: Path) -> str:
    shard = "model-00001-of-00001.safetensors"
    (checkpoint / SINGLE_FILE).rename(checkpoint / shard)
    names, _ = mutations.split_tensors((checkpoint / shard).read_bytes())
    index = checkpoint / INDEX_FILE
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    return _edit_json(r, index)


# --- kinds: the command line --------------------------------------------------------------------

_TEXTS = (
    *("good film", "a", " ", "", "\t", "a\x00b", "\U0001f600\u200d\U0001f525", "\u202eRTL", 'a"b'),
    *('"', "'", "new\nline", "car\rriage", "comma, here", "tab\there", "a" * 99_999, "a" * 100_001),
    *("\ufeffbom", "NaN", "null", "None", "=cmd()", "1e5", "\u2028", "\x85", "\x1c", "\x7f"),
)
_LABELS = (
    *("negative", "positive", "0", "1", "2", "-1", "01", "1.0", " 1", "", "NaN", "true", "\u0661"),
    *("a" * 5000, "x,y", 'x"y', "x\ny", "1" * 5000, "-", "--1", "+1", "\u00b2"),
)
_COLUMNS = ("sentence2", "score", "target", "prediction", "adapter", "row", "", "a" * 9999, "x\ny")
_VALUES = (None, True, 0, -1, 1.5, 10**30, [], ["a"], {}, {"a": 1}, "\ud800", 2**63, 1e308)


def _table(r: Random, values: tuple[Any, ...] = ()) -> tuple[list[str], list[list[Any]]]:
    """Returns column names and rows, some of which have unusual content."""
    names = ["sentence", "label"]
    for _ in range(r.choice([0, 0, 1, 2])):
        names.insert(r.randrange(len(names) + 1), r.choice(_COLUMNS))
    if r.random() < 0.1:
        names.remove(r.choice(names))
    rows = []
    for i in range(r.choice([0, 1, 2, 5, 40, 1100])):
        row: list[Any] = []
        for name in names:
            value: Any = f"good film {i}"
            if name == "label":
                value = ("negative", "positive")[i % 2]
            if r.random() < 0.03:
                value = r.choice([*(_LABELS if name == "label" else _TEXTS), *values])
            row.append(value)
        rows.append(row)
    return names, rows


def _write_separated(r: Random, path: Path) -> str:
    names, rows = _table(r)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n")
    writer.writerows([names, *rows])
    data, how = mutations.mutated_text(r, text.getvalue().encode())
    path.write_bytes(data)
    return f"{len(rows)} rows, {how}"


def _write_lines(r: Random, path: Path) -> str:
    names, rows = _table(r, _VALUES)
    lines = []
    for row in rows:
        line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=r.random() < 0.5)
        if r.random() < 0.01:
            line = r.choice(
                ["[]", "1", line[:-1], line * 2, "[" * 99_999, '{"a": NaN}', "9" * 5000]
            )
        lines.append(line)
    data, how = mutations.mutated_text(r, "\n".join(lines).encode(errors="surrogatepass"))
    path.write_bytes(data)
    return f"{len(rows)} rows, {how}"


def _write_parquet(r: Random, path: Path) -> str:
    count = r.choice([0, 1, 2, 40, 1100])
    kinds: dict[str, Callable[[], Any]] = {
        "text": lambda: pa.array([f"good film {i}" for i in range(count)], pa.string()),
        "labels": lambda: pa.array([("negative", "positive")[i % 2] for i in range(count)]),
        "odd": lambda: pa.array([r.choice([*_TEXTS, None]) for _ in range(count)], pa.string()),
        "whole": lambda: pa.array([i % 2 for i in range(count)], pa.int64()),
        "numbers": lambda: pa.array(np.full(count, r.choice([0.5, np.nan]))),
        "bytes": lambda: pa.array([b"\xff"] * count, pa.binary()),
        "lists": lambda: pa.array([["a"]] * count, pa.list_(pa.string())),
        "none": lambda: pa.nulls(count),
        "times": lambda: pa.array(range(count), pa.timestamp("s")),
        "categories": pa.array(["a", "b"] * count)[:count].dictionary_encode,
        "large": lambda: pa.array([2**64 - 1] * count, pa.uint64()),
    }
    chosen = [r.choice(["text"] * 6 + [*kinds]), r.choice(["labels"] * 6 + [*kinds])]
    sentences, labels = (kinds[kind]() for kind in chosen)
    pq.write_table(pa.table({"sentence": sentences, "label": labels}), path)
    data, how = path.read_bytes(), r.choice(["as it is", "as it is", "truncate", "flip", "foot"])
    if how == "truncate":
        data = data[: r.randrange(len(data))]
    elif how == "flip":
        data = mutations.flipped(r, data, r.choice([1, 4]))
    elif how == "foot":
        at = len(data) - r.randrange(1, min(300, len(data)))
        data = data[:at] + mutations.flipped(r, data[at:], 1)
    path.write_bytes(data)
    return f"{count} rows of {chosen}, {how}"


_WRITERS: Mapping[str, Callable[[Random, Path], str]] = {
    ".csv": _write_separated,
    ".tsv": _write_separated,
    ".jsonl": _write_lines,
    ".parquet": _write_parquet,
}


def _data(suffix: str) -> Callable[[Assets, Random, Path], Case]:
    def make(assets: Assets, r: Random, folder: Path) -> Case:
        path = folder / f"data{suffix}"
        done = _WRITERS[suffix](r, path)
        regression = r.random() < 0.1

        def read() -> Any:
            return tasks.load_task(
                "mine", train_file=path, validation_file=path, regression=regression
            )

        return Case(done, read, _wrong_labels)

    return make


def _wrong_labels(task: Any) -> str | None:
    if task.kind != "classification":
        return None
    known = range(len(task.label_names))
    labels = task.splits["train"]["label"]
    return None if all(label in known for label in labels) else "accepted wrong labels"


def _predictions(assets: Assets, r: Random, folder: Path) -> Case:
    path = folder / f"data{(suffix := r.choice(list(_WRITERS)))}"
    done = _WRITERS[suffix](r, path)
    target = folder / f"out{r.choice(list(_WRITERS))}"

    def read() -> int:
        return prediction_files.predict_file(
            path,
            target,
            lambda columns: np.tile([0.1, 0.9], (len(columns["sentence"]), 1)),
            label_names=("negative", "positive"),
        )

    def complaint(count: int) -> str | None:
        given, found = _sentences(path), _sentences(target)
        return None if given == found and len(given) == count else "wrote other rows"

    return Case(f"{path.name} to {target.name}: {done}", read, complaint)


def _sentences(path: Path) -> list[Any]:
    return [
        sentence
        for rows in data_rows.read_rows(path)
        for sentence in data_rows.column_values(rows, "sentence")
    ]


def _settings(assets: Assets, r: Random, folder: Path) -> Case:
    name, adapter = assets.copy(r, "ours", folder)
    done = _edit_json(r, adapter / CONFIG_NAME)
    return Case(f"{name}: {done}", lambda: settings_of(adapter))


_TOML = {
    "backbone": '"DIR"',
    "epochs": "3",
    "learning_rate": "3e-3",
    "method": '"compacter++"',
    "output_dir": '"runs/x"',
    "reduction_factor": "16",
    "regression": "false",
    "sites": '["attention"]',
    "task": '"movie"',
    "train_file": '"t.csv"',
    "train_pooler": "true",
}
_TOML_KEYS = (*_TOML, "base", "tasks", "config", "resume", "seeds", "mesh", "zzz", '"a b"', '""')
_TOML_VALUES = (
    *("0", "-1", "1e999", "nan", "inf", "true", '""', '"a"', '"--overwrite"', '["--overwrite"]'),
    *("[]", "[[]]", "{}", "{a = 1}", "1979-05-27", "07:32:00", '"\\u0000"', "9" * 400, "9" * 5000),
    *("[1, 'a']", '"""x\ny"""', "[" * 2000 + "]" * 2000, "0x10", '["attention", "attention"]'),
    *(
        '"' + "a" * 100_000 + '"',
        '"c.toml"',
        '"/etc/passwd"',
        '"."',
        '"nothing.toml"',
        '["c.toml"]',
    ),
)
_TOML_TABLES = ("[tasks.movie]\nepochs = 5\n", "[tasks]\nmovie = 5\n", "[[tasks]]\nx=1\n")


def _toml(assets: Assets, r: Random, folder: Path) -> Case:
    values, path = dict(_TOML), folder / "c.toml"
    done = []
    for _ in range(r.choice([1, 1, 2, 3])):
        key = r.choice(_TOML_KEYS)
        values[key] = r.choice(_TOML_VALUES)
        done.append(f"{key} = {values[key]:.40}")
    text = "".join(f"{key} = {value}\n" for key, value in values.items())
    text += r.choice(["", "", "", *_TOML_TABLES])
    data, how = mutations.mutated_text(r, text.encode())
    path.write_bytes(data)
    arguments = ["--config", str(path)]
    return Case(
        f"{'; '.join(done)}; {how}", lambda: config_files.expand_config(arguments, FitOptions)
    )


KINDS: Mapping[str, Kind] = {
    "adapter, config": Kind(_ours("config"), 3),
    "adapter, weights": Kind(_ours("weights"), 3),
    "adapter, files": Kind(_ours("files")),
    "bank": Kind(_bank),
    "AdapterHub, config": Kind(_foreign("hub", "config"), 3),
    "AdapterHub, weights": Kind(_foreign("hub", "weights"), 2),
    "AdapterHub, files": Kind(_foreign("hub", "files")),
    "PEFT, config": Kind(_foreign("peft", "config"), 3),
    "PEFT, weights": Kind(_foreign("peft", "weights"), 2),
    "PEFT, files": Kind(_foreign("peft", "files")),
    "BERT, config": Kind(_backbone("bert", "config"), 2),
    "BERT, weights": Kind(_backbone("bert", "weights"), 2),
    "BERT, index": Kind(_backbone("bert", "index")),
    "T5, config": Kind(_backbone("t5", "config")),
    "T5, weights": Kind(_backbone("t5", "weights")),
    "settings of predict": Kind(_settings, 2),
    "data, .csv": Kind(_data(".csv")),
    "data, .tsv": Kind(_data(".tsv")),
    "data, .jsonl": Kind(_data(".jsonl")),
    "data, .parquet": Kind(_data(".parquet")),
    "predictions": Kind(_predictions, 2),
    "TOML": Kind(_toml, 2),
}


# --- running ------------------------------------------------------------------------------------


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
