"""Parallel texts in invented languages, and a small model that translates between them."""

import json

import numpy as np

from train.exchange.create_backbone import create_backbone
from train.exchange.options import CreateOptions

LANGUAGES = ("en", "de", "fr")
SIZES = {"vocab_size": 423, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}
_SYLLABLES = {"en": ("ba", "do", "ki", "lu", "me"), "de": ("sch", "ech", "ung", "ein", "ber")}
_SYLLABLES["fr"] = ("eau", "oix", "tre", "que", "ais")


def sentences(number, seed=0, longest=2):
    """Returns rows with a sentence in each language: the same words, spelled in its syllables.

    Words have up to `longest` syllables.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        words = [
            generator.integers(0, 5, generator.integers(1, 1 + longest))
            for _ in range(generator.integers(1, 4))
        ]
        rows.append(
            {
                language: " ".join("".join(_SYLLABLES[language][i] for i in word) for word in words)
                for language in LANGUAGES
            }
        )
    return rows


def write_jsonl(path, rows):
    """Writes one JSON object a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tables(folder, train=40, validation=12):
    """Writes tables of parallel texts, of which one row in three of the first has no French."""
    rows = sentences(train)
    for row in rows[::3]:
        row["fr"] = None
    tables = {"train": rows, "validation": sentences(validation, seed=1)}
    return {name: write_jsonl(folder / f"{name}.jsonl", each) for name, each in tables.items()}


def write_model(folder, **changes):
    """Writes a model like M2M-100 with a tokenizer of the three languages; returns its folder."""
    text = folder / "corpus.txt"
    text.write_text(
        "\n".join(text for row in sentences(400, 2, longest=4) for text in row.values()), "utf-8"
    )
    options = CreateOptions(
        text_files=(text,),
        output_dir=folder / "m2m",
        model_type="m2m_100",
        languages=LANGUAGES,
        **{**SIZES, **changes},
    )
    create_backbone(options)
    return options.output_dir


def fit_flags(backbone, tables, output, **flags):
    """Returns the flags of a short `fit`."""
    settings = {
        "backbone": backbone,
        "method": "ciat",
        "directions": "en-de,de-en,en-fr",
        "adapters": "per_direction",
        "epochs": 1,
        "max_evaluations": 1,
        "batch_size": 8,
        # One bucket each, so that a step is compiled once.
        "max_length": 16,
        "max_target_length": 4,
        "learning_rate": "1e-2",
        "backbone_dropout": 0.0,
        "output_dir": output,
        **flags,
    }
    listed = [
        part
        for name, value in settings.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["--parallel-files", *map(str, tables.values()), *listed]
