"""The flags of every subcommand, as dataclasses that tyro draws the command line from."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import docstring_parser
import tyro

from compacter_jax.catalogue import METHODS, preset, presets
from compacter_jax.messages import about, quote
from compacter_jax.methods import bottleneck, compacter, prompt_tuning
from compacter_jax.methods.base import MethodConfig
from train import toml

if TYPE_CHECKING:
    from train import compositions

EvaluateBy: TypeAlias = Literal["scoring", "generation"]
SplitProtocol: TypeAlias = Literal["official", "paper"]
BackboneDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]
AdapterFormat: TypeAlias = Literal["compacter_jax", "adapterhub", "peft"]
# In place of a preset, where a command takes them all.
ALL = "all"
MethodName: TypeAlias = Annotated[
    str,
    tyro.conf.arg(
        help=f"preset of the method: {', '.join(presets())}; or a composition of presets, which "
        "are trained, and of folders of adapters, which are not: "
        "'stack(runs/english,compacter++)', with parallel, average and average_maps likewise."
    ),
]


def _method_options() -> type:
    """A dataclass of every method's fields, None where the preset's value stands.

    Methods share a flag where they share a name. `parts` has none: methods are no flags.
    """
    hints: dict[str, Any] = {}
    texts: dict[str, dict[str, list[str]]] = {}  # field -> explanation -> kinds of method
    for kind, cls in METHODS.items():
        told = documented(cls)
        for name, hint in _flag_fields(cls).items():
            if hints.setdefault(name, hint) != hint:
                raise TypeError(f"{name} of {kind} is of type {hint}, elsewhere of {hints[name]}")
            texts.setdefault(name, {}).setdefault(told[name], []).append(kind)
    made = [
        (
            name,
            Annotated[
                hint | None, tyro.conf.arg(help=_joined(texts[name]), metavar=_metavar(hint))
            ],
            dataclasses.field(default=None),
        )
        for name, hint in hints.items()
    ]
    return dataclasses.make_dataclass("MethodOptions", made, frozen=True, kw_only=True)


def _flag_fields(cls: type[MethodConfig]) -> dict[str, Any]:
    """Field -> type, of the fields that have a flag."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "parts"}


def _joined(texts: Mapping[str, list[str]]) -> str:
    """The first explanation, and those of the kinds for which the name means something else."""
    (first, _), *others = texts.items()
    return " ".join([first, *(f"Of {', '.join(kinds)}: {text}" for text, kinds in others)])


# Constants that docstrings of methods name, for what there is to choose from.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "WEIGHT_INITS": bottleneck.WEIGHT_INITS,
    "PROMPT_INITS": prompt_tuning.PROMPT_INITS,
    "RULE_INITS": compacter.RULE_INITS,
}


def documented(cls: type) -> dict[str, str]:
    """Field -> its explanation in the docstring of the class that declares it."""
    texts = {}
    for base in reversed(cls.__mro__):
        for attribute in docstring_parser.parse(base.__doc__ or "").params:
            for name in attribute.arg_name.split(", "):
                text = re.sub(r"`([A-Z_]+)`", _values_of, attribute.description or "")
                texts[name] = " ".join(text.replace("`", "").split())
    return texts


def _values_of(name: re.Match[str]) -> str:
    """What is to choose from, in place of the name of the constant that lists it."""
    values = _CHOICES.get(name[1])
    return ", ".join(values) if isinstance(values, tuple) else name[0]


def _metavar(hint: Any) -> str:
    if hint is bool:
        return "{True,False}"
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{typing.get_args(hint)[0].__name__.upper()} [...]"
    return hint.__name__.upper()


MethodOptions = _method_options()
MethodFlags: TypeAlias = tyro.conf.OmitArgPrefixes[MethodOptions]  # type: ignore[valid-type]


def method_of(name: str, options: Any) -> MethodConfig:
    """The preset with the options that were given."""
    return preset(name, **given_options(options))


def is_composition(text: str) -> bool:
    """Whether `train.compositions.parse` is to read it, and not a name."""
    return "(" in text


def given_options(options: Any) -> dict[str, Any]:
    """Field -> value, of the `MethodOptions` that were given."""
    return {key: value for key, value in vars(options).items() if value is not None}


def options_of(name: str, options: Any) -> Any:
    """Those of the `MethodOptions` that are for the preset, where several presets share them."""
    method = preset(name)
    known = {field.name for field in dataclasses.fields(method)}
    # A combined method passes on what one part alone has.
    fields = [field.name for part in method.inserted() for field in dataclasses.fields(part)]
    known |= {field for field in fields if fields.count(field) == 1}
    given = {key: value for key, value in given_options(options).items() if key in known}
    return MethodOptions(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Which backbone, and how it computes.

    Attributes:
      backbone: folder of a Hugging Face checkpoint, or its id on the hub.
      dtype: what matrix products compute in; what is trained stays float32.
      backbone_dtype: what weights that are not trained are stored in; int8 is for kernels and the
        vocabulary, with a scale for each of their channels.
    """

    backbone: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    backbone_dtype: BackboneDtype = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What to learn.

    Attributes:
      task: movie, product, tweet or editorial; a benchmark: cola, sst2, mrpc, qqp, stsb, mnli,
        qnli, rte, wnli, boolq, cb, copa, multirc, record, wic, wsc, squad, or a translation such as
        wmt16-ro-en; any other name for your own files; or span_corruption, the pre-training of T5,
        whose files are plain text.
      train_file: your own examples: .parquet, .jsonl, .csv or .tsv with the columns sentence, maybe
        sentence2, and label, score or target; a target is text, which T5 learns to write.
      validation_file: the same; the best epoch is chosen on it. span_corruption holds out a part of
        the text where there is none.
      test_file: the same; scored once, at the end.
      data_dir: folder of a benchmark's data set, laid out as its repository on the hub (for mnli
        mnli/train-*.parquet ...); by default it is read from the hub.
      split_protocol: of benchmarks: official takes the hub's splits, and a test split where its
        labels are published; paper halves the validation split of small data sets into validation
        and test, and holds out 1,000 training examples of large ones, with seed 42.
      regression: predict the column score instead of label.
      label_names: the labels of your own files, in the order of the adapter's outputs; integers 0,
        1, 2 in them stand for the first, second, third. By default the labels of train_file,
        sorted.
      max_length: longest input in tokens; what is longer is cut, and counted.
    """

    task: str = "custom"
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    data_dir: Path | None = None
    split_protocol: SplitProtocol = "official"
    regression: bool = False
    label_names: tuple[str, ...] | None = None
    max_length: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToTextOptions:
    """How a task is cast as text; for T5 alone.

    Attributes:
      prefix: what inputs begin with, in place of the task's name: "PREFIX sentence: ...", for pairs
        "PREFIX sentence1: ... sentence2: ...", for your own targets "PREFIX: ...".
      max_target_length: longest target in tokens; what is longer is cut, and counted.
      score_step: regression rounds scores to multiples of it, and learns these as text.
      evaluate_by: how labels are predicted: by the likelihood of each label's text, or by
        generating text, which may be no label; scores and texts are always generated.
      num_beams: of generation; 1 is greedy.
      noise_density: of span_corruption, the part of the tokens that is taken out.
      mean_span_length: of span_corruption, tokens taken out at one place, on average.
    """

    prefix: str | None = None
    max_target_length: int = 64
    score_step: float = 0.2
    evaluate_by: EvaluateBy = "scoring"
    num_beams: int = 1
    noise_density: float = 0.15
    mean_span_length: float = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(TextToTextOptions, TaskOptions, BackboneOptions):
    """How to train, whatever the method.

    Attributes:
      epochs: passes over the training data.
      max_evaluations: evaluate after so many of the epochs at most, evenly spread, instead of after
        each; the adapter is that of the best of them.
      batch_size: examples per update, over all devices.
      accumulation_steps: parts to divide a device's share of a batch into, to save memory.
      eval_batch_size: examples per batch of evaluation.
      learning_rate: peak of the schedule; by default the method's own, `train/learning_rates.py`
        lists them.
      warmup_fraction: part of all steps in which the learning rate rises from 0.
      weight_decay: of AdamW, on every trained parameter.
      clip_norm: largest norm of the gradient of the trained parameters; 0 does not clip.
      backbone_dropout: rate in the backbone, in place of its configuration's.
      remat: what the backward pass computes again, to save memory: full, each layer from its input;
        dots, all but the products with weights.
    """

    epochs: int = 10
    max_evaluations: int | None = None
    batch_size: int = 32
    accumulation_steps: int = 1
    eval_batch_size: int = 64
    learning_rate: float | None = None
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    backbone_dropout: float | None = None
    remat: Literal["off", "full", "dots"] = "off"

    def check(self) -> None:
        """ValueError for a number that cannot work."""
        wanted = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "max_evaluations": (
                self.max_evaluations is None or self.max_evaluations >= 1,
                "at least 1",
            ),
            "max_target_length": (self.max_target_length >= 2, "at least 2"),
            "score_step": (0 < self.score_step < float("inf"), "above 0"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "accumulation_steps": (self.accumulation_steps >= 1, "at least 1"),
            "eval_batch_size": (self.eval_batch_size >= 1, "at least 1"),
            "learning_rate": (
                self.learning_rate is None or 0 < self.learning_rate < float("inf"),
                "above 0",
            ),
            "warmup_fraction": (0 <= self.warmup_fraction < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "at least 0"),
            "clip_norm": (0 <= self.clip_norm < float("inf"), "at least 0"),
            "backbone_dropout": (
                self.backbone_dropout is None or 0 <= self.backbone_dropout < 1,
                "in [0, 1)",
            ),
        }
        _check(self, wanted)


def _check(options: Any, wanted: Mapping[str, tuple[bool, str]]) -> None:
    """ValueError for the first field whose condition does not hold."""
    for name, (holds, want) in wanted.items():
        if not holds:
            raise ValueError(f"{name}={getattr(options, name)} must be {want}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Several processes, on one host or on many, that train one model together.

    Attributes:
      distributed: let JAX find the other processes: on a slice of TPUs, under SLURM or Open MPI.
      coordinator_address: host:port of the first process, where JAX cannot find it; then every
        process is started with its own process_id.
      num_processes: how many there are.
      process_id: of this one, from 0 on.
    """

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def check_hosts(self) -> None:
        """ValueError for flags that do not go together."""
        given = {
            "--coordinator-address": self.coordinator_address,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        missing = [flag for flag, value in given.items() if value is None]
        if missing and len(missing) < len(given) and not self.distributed:
            raise ValueError(
                f"{', '.join(missing)} must be given, too, for several processes to find each "
                "other; or --distributed alone, where JAX can find them"
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        last = (self.num_processes or float("inf")) - 1
        if self.process_id is not None and not 0 <= self.process_id <= last:
            raise ValueError(f"process_id={self.process_id} must be from 0 to {last}")


class _ChoosesMethod:
    """Of the commands that take a preset or a composition."""

    method: str
    train_members: str | None
    method_options: Any

    def check_method(self) -> None:
        """Checks the name and the options of a preset; a composition is read only when it is used.

        Raises:
          ValueError: for an unknown preset, or options that it does not have.
        """
        if not is_composition(self.method):
            method_of(self.method, self.method_options)

    def check_members(self) -> None:
        """ValueError if members of a composition are named where there is none."""
        if self.train_members is not None and not is_composition(self.method):
            raise ValueError(
                f"--train-members are those of a composition, and --method {self.method} is none"
            )

    @functools.cached_property
    def composition(self) -> compositions.Node | None:
        """What `method` says, where it is no preset; raises as `train.compositions.parse`."""
        from train import compositions  # noqa: PLC0415 - it needs these options

        return compositions.parse(self.method) if is_composition(self.method) else None

    def method_config(self) -> MethodConfig:
        """The preset with the changes that are given, or the composition."""
        if self.composition is None:
            return method_of(self.method, self.method_options)
        from train import compositions  # noqa: PLC0415 - it needs these options

        return compositions.composed(self.composition, self.method_options, self.train_members)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions(_ChoosesMethod, HostOptions, TrainingOptions):
    """Fine-tune a backbone on a task and save the adapter of the best epoch.

    Several tasks with commas are trained together, a batch of one after a batch of another; each
    then has a folder of its own in output_dir.

    Attributes:
      output_dir: where adapter/, metrics.json, curves.png, report.md and checkpoints/ go.
      config: a TOML file of flags (`learning_rate = 3e-3`); flags on the command line win. It may
        name a base, and hold tables [tasks.NAME] for single tasks.
      train_size: train on a random sample of this size.
      seed: of initial values, order of the data and dropout.
      seeds: several seeds with commas: as many runs at once, each in a folder of its own in
        output_dir, which says what each gives and mean and spread of all.
      learning_rates: several learning rates with commas; with seeds, all pairs.
      train_sizes: several training sizes with commas, likewise.
      mixture: how often each of several tasks comes: temperature=1 in proportion to its examples,
        temperature=10 almost equally, limit=65536 as if none had more.
      adapters: of several tasks, one that they share, or one for each; heads are never shared.
      max_steps: stop after so many updates, within an epoch or not.
      checkpoint_steps: save the training state every so many steps as well as at every evaluation;
        0 does not.
      keep_checkpoints: how many of the last to keep, beside the best.
      mesh: data=2,model=4 to divide a backbone too large for one device over those of a host: two
        rows, each with a part of every batch, of four devices that divide its products.
      resume: go on where an interrupted run in output_dir stopped.
      overwrite: replace the run in output_dir.
      log: csv, or tensorboard as well: losses, learning rate, norm of the gradient and speed of
        every step, and every evaluation.
      profile: write a trace of some steps, for Perfetto or TensorBoard.
      peak_flops: floating-point operations per second that one device can do, to say what part of
        them is used; by default those of its kind, where known.
      prompt_words: for prompts that start as embeddings of the vocabulary, the words whose tokens
        they are; by default the commonest tokens of the training texts.
      train_members: which members of a composition to train, by name, with commas between them; by
        default the presets in it.
      method_options: changes to the preset, where not None; of a composition, to the presets that
        have the field.
    """

    output_dir: Path
    method: MethodName = "compacter++"
    train_members: str | None = None
    config: Path | None = None
    train_size: int | None = None
    seed: int = 0
    seeds: str | None = None
    learning_rates: str | None = None
    train_sizes: str | None = None
    mixture: str = "temperature=1"
    adapters: Literal["shared", "per_task"] = "shared"
    max_steps: int | None = None
    checkpoint_steps: int = 500
    keep_checkpoints: int = 2
    mesh: str | None = None
    resume: bool = False
    overwrite: bool = False
    log: Literal["csv", "tensorboard"] = "csv"
    profile: bool = False
    peak_flops: float | None = None
    prompt_words: str | None = None
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)

    def check(self) -> None:
        """ValueError for a number that cannot work, or flags that do not go together."""
        super().check()
        self.check_hosts()
        wanted = {
            "train_size": (self.train_size is None or self.train_size >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2**31 - 1"),
            "max_steps": (self.max_steps is None or self.max_steps >= 1, "at least 1"),
            "checkpoint_steps": (self.checkpoint_steps >= 0, "at least 0"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "at least 1"),
            "peak_flops": (
                self.peak_flops is None or 0 < self.peak_flops < float("inf"),
                "above 0",
            ),
        }
        _check(self, wanted)
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other; give one")
        self.check_members()
        if is_composition(self.method) and "," in self.task and self.adapters == "shared":
            raise ValueError("tasks cannot share a composition; give --adapters per_task")

    @property
    def is_grid(self) -> bool:
        """Whether there are several runs to be trained at once."""
        lists = (self.seeds, self.learning_rates, self.train_sizes)
        return any(values is not None for values in lists)

    def peak_learning_rate(self, defaults: Mapping[str, float]) -> float:
        """The learning rate given, or of `defaults` the method's.

        Raises:
          ValueError: for a composition whose presets do not have one between them.
        """
        if self.learning_rate is not None or self.composition is None:
            return self.learning_rate or defaults[self.method]
        names = self.composition.presets()
        rates = {defaults[name] for name in names}
        if len(rates) != 1:
            told = ", ".join(f"{name} {defaults[name]:g}" for name in names) or "none of a preset"
            raise ValueError(
                f"a composition of saved adapters, or of presets with different learning rates, is "
                f"trained at one rate ({told}); give --learning-rate"
            )
        return rates.pop()


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
        _check(self, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """Train methods with several seeds, and compare what they give.

    Each run is a `fit` in a process of its own, at its method's learning rate. What was interrupted
    goes on with the same command; methods, sizes and seeds that are added are trained beside those
    there are.

    Attributes:
      output_dir: where results.json, report.md, the figures and runs/ go.
      config: a TOML file of flags, as fit takes it; its method is --methods here.
      task: movie, product, tweet, editorial, several of them with commas, or a name for your files.
      methods: all, or presets with commas between them.
      train_size: train on random samples of this size, or of each of several (100,500,1000); by
        default on all there is. Sizes above a task's number of examples are left out.
      seeds: how many runs of each method, or for each size how many (5,5,3).
      at_once: how many seeds of a method to train at once, in one process: pays on an accelerator
        that small batches leave idle; the times of these runs are then shares of their process.
      processes: how many runs to train side by side, each on its share of the processors: on a CPU
        more is done in the same time, though each run takes longer; not for an accelerator.
      steps: updates of each run, or for each size how many, instead of epochs.
      epochs: passes over the training data, where steps are not given.
      max_length: longest input in tokens; what is longer is cut.
      max_evaluations: evaluate so many times in a run at most, evenly spread.
      keep_adapters: keep the adapters, which are otherwise removed once their scores are known.
      overwrite: train finished runs again whose settings were others.
      method_options: changes to the presets that have the field, where not None.
    """

    output_dir: Path
    config: Path | None = None
    task: str = "movie"
    methods: str = "all"
    train_size: str | None = None
    seeds: str = "3"
    at_once: int = 1
    processes: int = 1
    steps: str | None = None
    epochs: int = 2
    max_length: int = 64
    max_evaluations: int | None = 10
    keep_adapters: bool = False
    overwrite: bool = False
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A saved adapter and its backbone.

    Attributes:
      adapter: folder that `fit` wrote, or adapter/ in it; or a composition of such folders, such
        as 'average(0.7*runs/a/adapter,0.3*runs/b/adapter)', with stack, parallel and average_maps
        likewise.
      backbone: the backbone it was trained with; by default where it was then.
      dtype: what matrix products compute in; by default as in training.
      backbone_dtype: how what was not trained is stored; by default as in training.
      eval_batch_size: examples per batch.
      num_beams: of T5's generation; by default as in training.
    """

    adapter: Path
    backbone: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    backbone_dtype: BackboneDtype | None = None
    eval_batch_size: int = 64
    num_beams: int | None = None

    def check(self) -> None:
        """ValueError for a number that cannot work."""
        for name in ("eval_batch_size", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AdapterOptions):
    """Evaluate a saved adapter on a split of a task.

    Attributes:
      task: movie, product, tweet or editorial; a benchmark, such as mnli; or any other name for
        your own files.
      split: which split; validation_mismatched is of mnli alone.
      train_file: your own examples, with the columns that fit wants; for --split train.
      validation_file: the same, for --split validation.
      test_file: the same, for --split test.
      data_dir: folder of a benchmark's data set, laid out as its repository on the hub; by default
        it is read from the hub.
      split_protocol: of benchmarks: official are the hub's splits, paper those of the Compacter
        paper.
      label_names: which of the adapter's labels integers 0, 1, 2 in your own files stand for, in
        this order. Without it they are read where the adapter's labels are integers, or those of a
        built-in task or a benchmark, and refused where they are other names.
      evaluate_by: how T5's labels are predicted: by the likelihood of each label's text, or by
        generating text; by default as in training.
      output: JSON file for the metrics; by default evaluation_TASK_SPLIT.json in the adapter's
        folder; of a composition of several, in the current one.
    """

    task: str = "custom"
    split: Literal["train", "validation", "validation_mismatched", "test"] = "test"
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    data_dir: Path | None = None
    split_protocol: SplitProtocol = "official"
    label_names: tuple[str, ...] | None = None
    evaluate_by: EvaluateBy | None = None
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(AdapterOptions):
    """Predict every row of a file with a saved adapter, or each row with the one that it names.

    Attributes:
      adapter: folder that `fit` wrote, or adapter/ in it; or a folder of such folders, and then the
        input has a column adapter with the name of one in every row: adapters of one shape on one
        backbone, for tasks of one kind, whatever their labels; or a composition of folders, as
        `evaluate` takes it.
      input: .parquet, .jsonl, .csv or .tsv with a column sentence, for pairs also sentence2; or
        with the columns that the adapter's benchmark has on the hub.
      output: file of one of these formats: the input's columns, prediction, and for labels
        label_id and probability.
      logits: add the column logits too.
    """

    input: Path
    output: Path
    logits: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(TextToTextOptions):
    """Turn an adapter of another library into one of ours, or the other way round.

    What the other library's folder does not say of a task, and `evaluate` and `predict` have to
    know, is taken from flags.

    Attributes:
      to: folder to make.
      to_format: what to write.
      backbone: the backbone the adapter was trained with; of an adapter of ours, by default where
        it was then.
      label_names: of classification, in the order of the head's outputs.
      task: a built-in task, whose label names are taken, and its name as T5's prefix.
      regression: the adapter predicts scores.
      max_length: longest input in tokens.
      dtype: what matrix products compute in.
    """

    source: Annotated[
        tuple[str, Path],
        tyro.conf.arg(
            name="from",
            help="what to read, and its folder.",
            metavar="{compacter_jax,adapterhub,peft} DIR",
        ),
    ]
    to: Path
    to_format: AdapterFormat = "compacter_jax"
    backbone: str | None = None
    label_names: tuple[str, ...] = ()
    task: str | None = None
    regression: bool = False
    max_length: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Write a backbone with a method merged into its weights, as a Hugging Face checkpoint.

    Attributes:
      adapter: folder that `fit` or `convert` wrote, or adapter/ in it.
      backbone: the backbone it was trained with; by default where it was then.
      to: folder to make.
    """

    adapter: Path
    backbone: str | None = None
    to: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamsOptions(_ChoosesMethod):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CreateOptions:
    """Make a T5 from scratch: a tokenizer trained on text files, and random weights.

    Attributes:
      text_files: UTF-8 text to train the tokenizer on.
      output_dir: where config.json, model.safetensors, tokenizer.json and what belongs to them go.
      vocab_size: tokens in all, 359 of them special tokens, sentinels and bytes; 512 or more.
      d_model: width of the hidden states.
      d_kv: width of an attention head.
      d_ff: width inside the feed-forward networks.
      num_layers: layers of the encoder, and as many of the decoder.
      num_heads: attention heads.
      feed_forward: relu is that of T5 v1.0, gated-gelu that of v1.1.
      tie_word_embeddings: use the embedding for the output too, as T5 v1.0 does and v1.1 does not.
      seed: of the weights.
      overwrite: replace the backbone that this command made in output_dir.
    """

    text_files: tuple[Path, ...]
    output_dir: Path
    vocab_size: int = 8000
    d_model: int = 256
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 6
    num_heads: int = 4
    feed_forward: Literal["relu", "gated-gelu", "gated-silu"] = "relu"
    tie_word_embeddings: bool = True
    seed: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """ValueError for a value that cannot work."""
        for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**31 - 1")
        if not self.text_files:
            raise ValueError("text_files is empty; give at least one file of text")


def _number(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """How a number, or none, is read; tyro itself answers what is no number with Python's types."""
    is_union = typing.get_origin(info.type) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(info.type)) if is_union else {info.type}
    if kinds - {type(None)} not in ({int}, {float}):
        return None
    (kind,) = kinds - {type(None)}

    def read(values: list[str]) -> Any:
        try:
            return None if values == ["None"] and is_union else kind(values[0])
        except ValueError:
            wanted = "whole number" if kind is int else "number"
            raise ValueError(f"{values[0]!r} is no {wanted}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (kind, *kinds)),
        str_from_instance=lambda value: [str(value)],
    )


# Within it, tyro reads numbers by `_number`.
NUMBERS = tyro.constructors.ConstructorRegistry()
NUMBERS.primitive_rule(_number)


def expand_config(arguments: Sequence[str], options_class: type = FitOptions) -> list[str]:
    """Puts the flags of `--config FILE.toml` before those of the command line, so that these win.

    `base = "OTHER.toml"`, of the same folder, is a file whose keys this one has too unless it says
    otherwise. A table `[tasks.NAME]` holds what is different where the run has this task alone.
    The key `method` is `--methods` for `compare`.

    Args:
      arguments: of the command line.
      options_class: of the command, whose flags the keys must be.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if it is no TOML, or has a key that is no flag or a value of another type.
    """
    path = _value_of("--config", arguments)
    if path is None:
        return list(arguments)
    values, of_tasks = _read_config(Path(path))
    hints = _hints_of_keys(options_class)
    if options_class is CompareOptions:
        hints["method"] = str
    for table in (values, *of_tasks.values()):
        _check_keys(path, table, hints)
    if options_class is CompareOptions and "method" in values:
        values["methods"] = values.pop("method")
    values |= of_tasks.get(_value_of("--task", arguments) or values.get("task", ""), {})
    own = {field.name for field in dataclasses.fields(MethodOptions)}
    flags = [part for key, value in values.items() for part in flag(key, value, key not in own)]
    return [*flags, *arguments]


def _hints_of_keys(options_class: type) -> dict[str, Any]:
    """Key that a configuration may have -> type."""
    hints = typing.get_type_hints(options_class) | typing.get_type_hints(MethodOptions)
    return {key: hint for key, hint in hints.items() if key not in ("method_options", "config")}


def _check_keys(path: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """ValueError for a key that is no flag, or a value of another type."""
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            near = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{path}: unknown key {quote(key)}{near}; keys are the flags that --help lists"
            )
    toml.check_values(path, values, hints)


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """What follows a flag where it comes last, as `--flag value` or `--flag=value`."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The keys of a file and its base, and those of each of its tables by task."""
    values, of_tasks = _read_tables(path)
    if "base" not in values:
        return values, of_tasks
    base = values.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base={quote(base)} must be text, the name of a file beside it")
    base_path = path.parent / base
    with about(f"{path}: base={quote(base, 100)}"):
        base, of_tasks_in_base = _read_tables(base_path)
    if "base" in base:
        raise ValueError(f"{base_path} is the base of {path} and has a base itself; name that one")
    tasks = of_tasks_in_base | of_tasks
    merged = {task: of_tasks_in_base.get(task, {}) | of_tasks.get(task, {}) for task in tasks}
    return base | values, merged


def _read_tables(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The keys of a file, and those of its tables `[tasks.NAME]`."""
    values = toml.read_toml(path)
    tables = values.pop("tasks", {})
    if not isinstance(tables, dict) or not all(isinstance(x, dict) for x in tables.values()):
        raise ValueError(
            f"{path}: tasks must be tables such as [tasks.rte], not {quote(tables)}; the tasks "
            "themselves are named by the key task"
        )
    return values, tables


def flag(key: str, value: Any, toggle: bool) -> list[str]:
    """A field as arguments of the command line; a bool is `--key` or, without `toggle`, a value."""
    name = key.replace("_", "-")
    if isinstance(value, bool) and toggle:
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    if str(value).startswith("-"):  # which would be a flag by itself
        return [f"--{name}={value}"]
    return [f"--{name}", str(value)]
