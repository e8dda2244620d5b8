"""Flags that several subcommands share, as dataclasses that tyro turns into a command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from train.cli.compositions import Node

EvaluateBy: TypeAlias = Literal["scoring", "generation"]


SplitProtocol: TypeAlias = Literal["official", "paper"]


BackboneDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]


EmbeddingLoss: TypeAlias = Literal["multiple-negatives", "cosine", "triplet"]


# As in `compacter_jax.models.pooling`, which imports JAX.
Pooling: TypeAlias = Literal["first", "mean", "cls"]


# Values of --mix beside numbers.
EQUAL, ENTROPY = "equal", "entropy"
# Of its steps, and of its numbers in size: float32 can add up as many of them.
_MOST_STEPS, _LARGEST = 1_000_000, 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """The backbone, and its dtypes.

    Attributes:
      backbone: folder of a Hugging Face checkpoint, or its id on the hub.
      dtype: dtype of matrix products; trained parameters stay float32.
      backbone_dtype: dtype in which frozen weights are stored; int8 applies to kernels and the
        vocabulary, with one scale per channel.
      pooling: input of an encoder's classifier: first, the first token through the pooler, as in
        transformers; mean, the mean of the tokens that are not padding; cls, the first token
        without a pooler. The default is that of 1_Pooling/config.json beside the weights, a file of
        sentence-transformers, or else first. Sentence embeddings are mean, their default, or cls.
        For a ModernBERT, first is what config.json says, and all have the same layers before the
        classifier.
    """

    backbone: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    backbone_dtype: BackboneDtype = "float32"
    pooling: Pooling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The task to learn, and its data.

    Attributes:
      task: movie, product, tweet or editorial; a benchmark: cola, sst2, mrpc, qqp, stsb, mnli,
        qnli, rte, wnli, boolq, cb, copa, multirc, record, wic, wsc, squad, or a translation such as
        wmt16-ro-en; any other name for your own files; or span_corruption and masked_lm, the
        pre-training tasks of T5 and BERT, whose files are plain text.
      train_file: your own examples: .parquet, .jsonl, .csv or .tsv with a column sentence,
        optionally sentence2, and one of label, score or target; a target is text, which T5 learns
        to write. For tags of words: .parquet or .jsonl with the columns tokens and tags, lists of
        text, or .conll or .txt with a word, a tab or spaces and its tag in each line, and blank
        lines between sentences. For sentence embeddings: anchor and positive, perhaps negative; or
        sentence1 and sentence2, perhaps score, from -1 to 1.
      validation_file: validation examples in the same format; the best epoch is chosen on them.
        Without this file, span_corruption and masked_lm hold out a part of the training text.
      test_file: test examples in the same format; scored once, at the end.
      data_dir: folder of a benchmark's data set, laid out like its repository on the hub (for mnli
        mnli/train-*.parquet ...); by default the hub is read.
      split_protocol: splits of benchmarks: official uses the splits of the hub, with a test split
        where its labels are published; paper halves the validation split of small data sets into
        validation and test, and holds out 1,000 training examples of large ones, with seed 42.
      regression: predict the column score instead of label.
      label_names: labels of your own files, in the order of the adapter's outputs; integers 0, 1, 2
        in the files stand for the first, second and third. By default the sorted labels of
        train_file.
      max_length: maximum input length in tokens; longer inputs are truncated and counted.
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
    """Format of a task as text; for T5 only.

    Attributes:
      prefix: beginning of every input, instead of the task's name: "PREFIX sentence: ...", for
        pairs "PREFIX sentence1: ... sentence2: ...", for your own targets "PREFIX: ...".
      max_target_length: maximum target length in tokens; longer targets are truncated and counted.
      score_step: step to which regression rounds the scores before it writes them as text.
      evaluate_by: prediction of labels: scoring compares the likelihoods of the labels' texts,
        generation generates text, which may be no label. Scores and texts are always generated.
      num_beams: number of beams for generation; 1 is greedy.
      noise_density: fraction of the tokens that span_corruption masks, or masked_lm predicts.
      mean_span_length: mean number of tokens per masked span of span_corruption.
    """

    prefix: str | None = None
    max_target_length: int = 64
    score_step: float = 0.2
    evaluate_by: EvaluateBy = "scoring"
    num_beams: int = 1
    noise_density: float = 0.15
    mean_span_length: float = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """Sentence embeddings, from an encoder.

    Attributes:
      embedding_loss: multiple-negatives takes the positives of the other rows of a batch, and any
        column negative, as negatives; cosine compares the cosine of a pair with its score; triplet
        compares the distances to positive and negative. By default cosine for files with scores,
        otherwise multiple-negatives. Giving it makes embeddings of files with the columns sentence,
        sentence2 and score, and of stsb, whose scores are divided by 5.
      similarity_scale: factor of the cosines in multiple-negatives.
      triplet_margin: how much nearer the positive must be, in Euclidean distance.
      matryoshka_dimensions: numbers of first dimensions of an embedding that the loss is summed
        over, such as 384 128 64.
    """

    embedding_loss: EmbeddingLoss | None = None
    similarity_scale: float = 20.0
    triplet_margin: float = 5.0
    matryoshka_dimensions: tuple[int, ...] = ()

    def check_embedding(self) -> None:
        """Raises ValueError for a number out of range."""
        dimensions = self.matryoshka_dimensions
        wanted = {
            "similarity_scale": (0 < self.similarity_scale < float("inf"), "above 0"),
            "triplet_margin": (0 <= self.triplet_margin < float("inf"), "at least 0"),
            "matryoshka_dimensions": (
                all(each >= 1 for each in dimensions) and len(set(dimensions)) == len(dimensions),
                "different numbers, each at least 1",
            ),
        }
        check(self, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(EmbeddingOptions, TextToTextOptions, TaskOptions, BackboneOptions):
    """Settings of training that do not depend on the method.

    Attributes:
      epochs: number of passes over the training data.
      max_evaluations: maximum number of evaluations, evenly spaced over the epochs; by default one
        after every epoch. The adapter of the best evaluation is kept.
      batch_size: examples per update, over all devices.
      accumulation_steps: number of parts into which each device divides its share of a batch, to
        save memory.
      eval_batch_size: number of examples per evaluation batch.
      learning_rate: peak of the schedule; by default that of the method, listed in
        `train/objectives/learning_rates.py`.
      warmup_fraction: fraction of the steps over which the learning rate rises from 0.
      weight_decay: weight decay of AdamW on every trained parameter.
      clip_norm: maximum norm of the gradient of the trained parameters; 0 disables clipping.
      backbone_dropout: dropout rate of the backbone, instead of its configuration's; or inside, for
        dropout within attention and feed-forward networks alone, at the configuration's rates.
      remat: activations to recompute in the backward pass, to save memory: full recomputes each
        layer from its input; dots recomputes all but the products with weights.
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
    backbone_dropout: float | Literal["inside"] | None = None
    remat: Literal["off", "full", "dots"] = "off"

    @property
    def composition(self) -> Node | None:
        """Composition that the command is given; None for commands that accept none."""
        return None

    def check(self) -> None:
        """Raises ValueError for a number out of range."""
        self.check_embedding()
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
                not isinstance(self.backbone_dropout, float) or 0 <= self.backbone_dropout < 1,
                "in [0, 1), or inside",
            ),
        }
        check(self, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixOptions:
    """The weights of a mix in --adapter.

    Attributes:
      mix: weights of the members of a mix in --adapter: equal; numbers for all rows, as in
        0.5,0.3,0.2; or entropy, which finds, for each row, the weights that make its labels most
        certain.
      mix_steps: steps of gradient descent of --mix entropy.
      mix_learning_rate: learning rate of --mix entropy.
      mix_sites: weights of --mix entropy: each, separate ones for each module where the members
        act; one, the same at all of them.
      mix_positions: tokens that --mix entropy makes certain in sentences with tags: words, the
        first token of each word; all, every position of the padded sentence, special tokens and
        padding included.
      write_weights: file for the weights of --mix entropy, .parquet, .jsonl, .csv or .tsv: a
        line for each row and module, with the entropy before and after; a figure of the mean
        weights lies beside it, with .png.
    """

    mix: str | None = None
    mix_steps: int = 10
    mix_learning_rate: float = 10.0
    mix_sites: Literal["each", "one"] = "each"
    mix_positions: Literal["words", "all"] = "words"
    write_weights: Path | None = None

    def check_mix(self) -> None:
        """Raises ValueError for unknown weights, a number out of range, or a useless flag."""
        check(
            self,
            {
                "mix_steps": (0 <= self.mix_steps <= _MOST_STEPS, f"from 0 to {_MOST_STEPS:,}"),
                "mix_learning_rate": (
                    0 < self.mix_learning_rate <= _LARGEST,
                    f"above 0 and at most {_LARGEST:g}",
                ),
            },
        )
        self.given_weights()
        if self.mix == ENTROPY:
            return
        for field in dataclasses.fields(MixOptions):
            if field.name != "mix" and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} is for --mix {ENTROPY}, but --mix is "
                    f"{self.mix or 'not given'}; leave it out"
                )

    def given_weights(self) -> tuple[float, ...] | None:
        """Returns the weights of `--mix 0.5,0.3,0.2`; None where it has none.

        Raises:
          ValueError: if `mix` is neither a word that is known nor numbers that float32 can add up.
        """
        if self.mix in (None, EQUAL, ENTROPY):
            return None
        try:
            weights = tuple(map(float, str(self.mix).split(",")))
        except ValueError:
            weights = (math.nan,)
        if not all(abs(weight) <= _LARGEST for weight in weights):
            raise ValueError(
                f"--mix {self.mix!r:.100} must be {EQUAL}, {ENTROPY}, or a number for each member, "
                "as in 0.5,0.3,0.2"
            )
        return weights


def check(options: Any, wanted: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ValueError for the first field whose condition does not hold.

    Args:
      options: the dataclass with the fields.
      wanted: field -> whether its value is valid, and the valid values in words.
    """
    for name, (holds, want) in wanted.items():
        if not holds:
            raise ValueError(f"{name}={getattr(options, name)} must be {want}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Several processes, on one host or on several, that train one model together.

    Attributes:
      distributed: let JAX find the other processes: on a TPU slice, under SLURM or Open MPI.
      coordinator_address: host:port of the first process, where JAX cannot find it; every process
        is then started with its own process_id.
      num_processes: number of processes.
      process_id: index of this process, starting at 0.
    """

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def check_hosts(self) -> None:
        """Raises ValueError for flags that do not go together."""
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
