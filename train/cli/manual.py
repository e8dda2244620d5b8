"""Help of a command as a manual page: usage, examples, and options in groups."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from compacter_jax import catalogue
from train.cli import method_flags, options

INDENT, COLUMN = 2, 28
_KEPT = "\u00a0"  # a non-breaking space

# Command -> (description, arguments after `python -m train COMMAND`); the tests parse them all.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "fit": (
        (
            "Compacter++ on film reviews, from a folder with a checkpoint (no network is needed):",
            "--backbone DIR --task movie --method compacter++ --output-dir runs/movie",
        ),
        (
            "Your own files, with bottlenecks four times as wide:",
            "--backbone bert-base-uncased --train-file train.csv --validation-file valid.csv "
            "--reduction-factor 8 --output-dir runs/own",
        ),
        (
            "Tags of words, a word and its tag in each line:",
            "--backbone DIR --train-file train.conll --validation-file valid.conll "
            "--output-dir runs/tags",
        ),
        (
            "Sentence embeddings, from a file of pairs with the columns anchor and positive:",
            "--backbone DIR --train-file pairs.csv --validation-file valid.csv "
            "--output-dir runs/embeddings",
        ),
        (
            "A benchmark on T5, from the settings of the paper; flags win over the file:",
            "--config train/configs/glue_compacter_pp.toml --backbone t5-base --task rte "
            "--epochs 3 --output-dir runs/rte",
        ),
        (
            "Three seeds at two learning rates, six runs in one program:",
            "--backbone DIR --task movie --seeds 0,1,2 --learning-rates 1e-3,3e-3 "
            "--output-dir runs/grid",
        ),
        (
            "A new adapter on top of a saved one, which stays frozen:",
            "--backbone DIR --task movie --method 'stack(runs/english,compacter++)' "
            "--output-dir runs/stack",
        ),
        (
            "An adapter for each direction of a translation model, in one run:",
            "--backbone DIR --method ciat --parallel-files train.parquet valid.parquet "
            "--directions en-de,de-en --adapters per_direction --output-dir runs/ciat",
        ),
        (
            "Speech into several languages, an adapter for each:",
            "--backbone DIR --method st --train-file train.jsonl --validation-file valid.jsonl "
            "--adapters per_target --output-dir runs/st",
        ),
        (
            "An adapter of a language, from plain text, on an encoder with a head for words:",
            "--backbone DIR --task masked_lm --method mad-x --train-file danish.txt "
            "--output-dir runs/danish",
        ),
        (
            "Continue an interrupted run:",
            "--backbone DIR --task movie --method compacter++ --output-dir runs/movie --resume",
        ),
    ),
    "evaluate": (
        (
            "On the test split of the task that it was trained on:",
            "--adapter runs/movie/adapter --task movie",
        ),
        (
            "On another task with the same labels:",
            "--adapter runs/movie/adapter --task product --split validation",
        ),
        (
            "On several files of your own, with a table:",
            "--adapter runs/tags/adapter --test-files nn=nn.conll,fo=fo.conll "
            "--output metrics.json",
        ),
        (
            "Every direction of a translation, each by its adapter:",
            "--adapter runs/ciat --parallel-files test.parquet",
        ),
        (
            "A task on language adapters, mixed for each sentence by the entropy of its tags:",
            "--adapter 'stack(lang=mix(nb=runs/nb,da=runs/da),task=runs/tags#task)' "
            "--mix entropy --test-files nn=nn.conll,fo=fo.conll",
        ),
        (
            "The backbone has moved since:",
            "--adapter runs/movie/adapter --task movie --backbone OTHER_DIR",
        ),
    ),
    "predict": (
        (
            "Label the rows of a file that has a column sentence:",
            "--adapter runs/movie/adapter --input new.csv --output labelled.csv",
        ),
        (
            "With the logits, as Parquet:",
            "--adapter runs/movie/adapter --input new.csv --output labelled.parquet --logits",
        ),
        (
            "Predict every row with the adapter in a folder that its column adapter names:",
            "--adapter runs --input mixed.csv --output labelled.csv",
        ),
        (
            "Embeddings of the texts in a column sentence, as an array of NumPy:",
            "--adapter runs/embeddings --input texts.csv --output embeddings.npy",
        ),
        (
            "Tags on a mixture of language adapters, with the weights of each sentence:",
            "--adapter 'stack(lang=mix(nb=runs/nb,da=runs/da),task=runs/tags#task)' "
            "--mix entropy --input fo.conll --output tagged.jsonl --write-weights weights.csv",
        ),
        (
            "Write every recording of a folder in two languages:",
            "--adapter runs/st --input clips --target-languages de,fr --output written.jsonl",
        ),
        (
            "Use two adapters at once, with their outputs averaged in every layer:",
            "--adapter 'average(0.7*runs/a,0.3*runs/b)' --input new.csv --output labelled.csv",
        ),
    ),
    "plan": (
        (
            "A run of the paper, on a device that this machine lacks:",
            '--config train/configs/glue_compacter_pp.toml --device-kind "TPU v4"',
        ),
        (
            "Memory of a large backbone, sharded over eight devices:",
            "--backbone t5-11b --task mnli --method compacter --mesh data=2,model=4 "
            "--backbone-dtype bfloat16 --max-steps 10000",
        ),
    ),
    "params": (
        ("Compacter on your backbone, by group:", "--backbone DIR --method compacter"),
        ("Every method on T5-base, without its weights:", "--backbone-config t5-base --method all"),
        (
            "Memory of each device if the backbone is sharded:",
            "--backbone-config t5-11b --mesh data=1,model=4 --backbone-dtype bfloat16",
        ),
    ),
    "compare": (
        (
            "Three methods, three seeds each, on 2,000 examples:",
            "--backbone DIR --task movie --methods full,compacter,compacter++ "
            "--train-size 2000 --output-dir runs/compare",
        ),
        (
            "Every method, two runs side by side on a CPU:",
            "--backbone DIR --task movie --train-size 2000 --processes 2 --output-dir runs/compare",
        ),
        (
            "Scores of methods by training set size:",
            "--backbone DIR --task movie --methods full,compacter++ "
            "--train-size 100,500,1000,4000 --seeds 5 --steps 300 --output-dir runs/sizes",
        ),
    ),
    "convert": (
        (
            "From AdapterHub, with the names of the labels, which its folder lacks:",
            "--from adapterhub FOLDER --backbone DIR --label-names negative positive "
            "--to my-adapter",
        ),
        (
            "To PEFT:",
            "--from compacter_jax my-adapter --to-format peft --to FOLDER",
        ),
    ),
    "merge": (
        (
            "Merge LoRA into the weights, for PyTorch's transformers:",
            "--adapter runs/lora/adapter --to merged-backbone",
        ),
    ),
    "create-backbone": (
        (
            "A small T5 with a tokenizer trained on your text, to pre-train with fit --task "
            "span_corruption:",
            "--text-files corpus.txt --vocab-size 8000 --num-layers 4 --output-dir runs/t5-random",
        ),
        (
            "A small translation model of the kind of M2M-100, with a token for each language:",
            "--model-type m2m_100 --languages en de --text-files en.txt de.txt --vocab-size 8000 "
            "--output-dir runs/m2m-random",
        ),
        (
            "A small translator of speech into two languages:",
            "--model-type speech_to_text --languages de fr --text-files de.txt fr.txt --vocab-size "
            "2000 --d-model 128 --num-layers 4 --num-decoder-layers 2 --output-dir runs/st-random",
        ),
    ),
    "trim-vocabulary": (
        (
            "A multilingual backbone for a few languages:",
            "--backbone DIR --text-files da.txt nb.txt --output-dir runs/small-vocabulary",
        ),
    ),
}

_REQUIRED, _OF_COMMAND = "required", "of this command"
# Class that declares options -> their heading; options of other classes are `_OF_COMMAND`.
_HEADINGS: dict[type, str] = {
    options.BackboneOptions: "backbone",
    options.TaskOptions: "task and data",
    options.TextToTextOptions: "text to text, for T5",
    options.EmbeddingOptions: "sentence embeddings",
    options.TrainingOptions: "training",
    options.MixOptions: "weights of a mix of adapters",
    options.HostOptions: "several processes",
}


@dataclasses.dataclass(frozen=True)
class _Option:
    """Entry of one option: `--flag VALUE`, its explanation, and its heading."""

    flag: str
    text: str
    heading: str


def page(command: str, options_class: type, *, width: int = 100) -> str:
    """Returns the manual page of a command.

    Args:
      command: a key of `EXAMPLES`.
      options_class: the dataclass of its options, whose docstring explains them.
      width: the width of a line in characters.

    Returns:
      Text without a newline at its end.
    """
    summary, *paragraphs = _description(options_class)
    entries = list(_entries(options_class))
    required = [entry.flag for entry in entries if entry.heading == _REQUIRED]
    usage = " ".join([f"usage: python -m train {command}", *required, "[OPTIONS]"])
    parts = [_wrapped(usage, width, hanging=len("usage: ")), _wrapped(summary, width)]
    parts += [_wrapped(paragraph, width) for paragraph in paragraphs]
    parts.append(_examples(command, width))
    for heading in (_REQUIRED, _OF_COMMAND, *_HEADINGS.values(), *_method_headings()):
        if of_heading := [entry for entry in entries if entry.heading == heading]:
            lines = [line for entry in of_heading for line in _entry_lines(entry, width)]
            parts.append("\n".join([f"{heading}:", *lines]))
    return "\n\n".join(parts)


def _method_headings() -> list[str]:
    """Returns the headings of methods, each after that of the class it derives from."""
    return list(
        dict.fromkeys(
            vars(declaring)["heading"]
            for cls in catalogue.METHODS.values()
            for declaring in reversed(cls.__mro__)
            if "heading" in vars(declaring)
        )
    )


def _description(cls: type) -> list[str]:
    """Returns the paragraphs of a class's docstring before its attributes."""
    text = inspect.cleandoc(cls.__doc__ or "").split("\nAttributes:")[0]
    return [" ".join(part.replace("`", "").split()) for part in text.strip().split("\n\n")]


def _entries(cls: type) -> Iterator[_Option]:
    """Yields the options of a command, in the order of its dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    texts = method_flags.documented(cls)
    for field in dataclasses.fields(cls):
        if field.name == "method_options":
            yield from _method_entries()
            continue
        hint, told = _plain(hints[field.name])
        name = told.name if told is not None and told.name else field.name.replace("_", "-")
        text = texts.get(field.name) or (told.help if told is not None else "")
        metavar = told.metavar if told is not None and told.metavar else _metavar(hint)
        flag = f"--{name} {metavar}" if metavar else f"--{'[no-]' * (field.default is True)}{name}"
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield _Option(flag, text, _REQUIRED)
        else:
            yield _Option(flag, text + _default(field.default), _heading((cls,), field.name))


def _method_entries() -> Iterator[_Option]:
    """Yields the options of presets, each under the first class of methods that has it."""
    for entry in _entries(method_flags.MethodOptions):
        name = entry.flag.split()[0].removeprefix("--").replace("-", "_")
        heading = _heading(tuple(catalogue.METHODS.values()), name)
        yield dataclasses.replace(entry, heading=heading)


def _heading(classes: Sequence[type], name: str) -> str:
    """Returns the heading of the class that declares a field, among the first class that has it."""
    for cls in classes:
        for declaring in reversed(cls.__mro__):
            if name in vars(declaring).get("__annotations__", {}):
                return _HEADINGS.get(declaring) or vars(declaring).get("heading", _OF_COMMAND)
    raise ValueError(f"no class of options declares {name!r}")


def _plain(hint: Any) -> tuple[Any, Any]:
    """Returns a type without `Annotated` and `| None`, and its settings for tyro."""
    told = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, *rest = typing.get_args(hint)
        told = next((note for note in rest if hasattr(note, "metavar")), None)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = tuple(part for part in typing.get_args(hint) if part is not type(None))
        hint = parts[0] if len(parts) == 1 else typing.Union[parts]  # noqa: UP007
    return hint, told


def _metavar(hint: Any) -> str:
    """Returns the placeholder of a value; empty for a switch."""
    if hint is bool:
        return ""
    if typing.get_origin(hint) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(hint)))}}}"
    if typing.get_origin(hint) is typing.Union:
        return "|".join(map(_metavar, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"{typing.get_args(hint)[0].__name__.upper()} [...]"
    return hint.__name__.upper()


def _default(value: Any) -> str:
    """Returns the text of a default value; empty if there is none or the explanation has it."""
    if value is dataclasses.MISSING or value is None or isinstance(value, bool | tuple):
        return ""
    return f" (default: {value})"


def _examples(command: str, width: int) -> str:
    lines = ["examples:"]
    for what, arguments in EXAMPLES[command]:
        # A flag and its values stay on one line.
        units = re.sub(r"(?<= )(?=--)", "\n", f"python -m train {command} {arguments}")
        kept = units.replace(" ", _KEPT).replace(f"{_KEPT}\n", " ")
        folded = textwrap.wrap(kept, width - 8, break_long_words=False, break_on_hyphens=False)
        lines += textwrap.wrap(what, width, initial_indent="  # ", subsequent_indent="  # ")
        lines += [f"  {'    ' if i else ''}{line}" for i, line in enumerate(_continued(folded))]
    return "\n".join(lines)


def _continued(lines: Sequence[str]) -> list[str]:
    """Returns the lines of one shell command."""
    spaced = [line.replace(_KEPT, " ") for line in lines]
    return [*(f"{line} \\" for line in spaced[:-1]), spaced[-1]]


def _entry_lines(entry: _Option, width: int) -> list[str]:
    flag, margin = " " * INDENT + entry.flag, " " * COLUMN
    wrapped = textwrap.wrap(entry.text, width - COLUMN, break_on_hyphens=False)
    if len(flag) + 2 <= COLUMN and wrapped:
        first, *wrapped = wrapped
        flag = flag.ljust(COLUMN) + first
    return [flag, *(margin + line for line in wrapped)]


def _wrapped(text: str, width: int, hanging: int = 0) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * hanging, break_on_hyphens=False)
