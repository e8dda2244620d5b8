"""Recordings of tones that spell words of invented languages, and a small model that reads them."""

import json
import shutil

import jax
import numpy as np

import compacter_jax as cj
from tests.helpers import quick_key
from tests.parallel_data import write_jsonl, write_model
from tests.tones import RATE, spoken, write_spoken
from train.speech.audio import as_pcm16

LANGUAGES = ("de", "en", "fr")
_WORDS = {
    "de": ("sch", "ech", "ung", "ein", "ber"),
    "en": ("ba", "do", "ki", "lu", "me"),
    "fr": ("eau", "oix", "tre", "que", "ais"),
}
BINS = 12


def utterances(number, seed=0):
    """Returns lists of 2 or 3 symbols."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 5, generator.integers(2, 4)).tolist() for _ in range(number)]


def said(symbols, language):
    """Returns the words of symbols; those of "fr" in reverse."""
    words = [_WORDS[language][s] for s in symbols]
    return " ".join(words[::-1] if language == "fr" else words)


def write_split(folder, name, number, seed=0, languages=("de", "fr"), **more):
    """Writes recordings and a file with a row for each in every language; returns the file."""
    (folder / name).mkdir(parents=True)
    rows = []
    for i, symbols in enumerate(utterances(number, seed)):
        write_spoken(folder / name / f"{i}.wav", symbols, seed=i)
        rows += [
            {
                "audio": f"{name}/{i}.wav",
                "source": said(symbols, "en"),
                "target": said(symbols, language),
                "target_language": language,
                "speaker": "nobody",
                **more,
            }
            for language in languages
        ]
    return write_jsonl(folder / f"{name}.jsonl", rows)


def write_files(folder):
    """Writes the files of training and validation of a short run; returns split -> file."""
    return {
        "train": write_split(folder, "train", 12),
        "validation": write_split(folder, "validation", 4, seed=1),
    }


def as_bytes(rows, seed=0):
    """Returns the rows of `write_split` with samples in place of names of files."""
    symbols = utterances(len(rows), seed)
    found = []
    for row in rows:
        number = int(row["audio"].split("/")[1].removesuffix(".wav"))
        rest = {key: value for key, value in row.items() if key != "audio"}
        found.append({**rest, "pcm16": as_pcm16(spoken(symbols[number], RATE, number))})
    return found


def write_speech_model(folder, seed=0, **changes):
    """Writes a model of speech with a tokenizer of three languages; returns its folder."""
    from transformers import Speech2TextConfig

    text = write_model(folder)
    sizes = {
        "vocab_size": json.loads((text / "config.json").read_text())["vocab_size"],
        "d_model": 16,
        **{f"{stack}_layers": 1 for stack in ("encoder", "decoder")},
        **{f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")},
        **{f"{stack}_ffn_dim": 24 for stack in ("encoder", "decoder")},
        "conv_channels": 8,
        "input_feat_per_channel": BINS,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
        "dropout": 0.0,
        "mask_between_convolutions": True,
        **changes,
    }
    module = cj.SpeechToText(cj.SpeechToTextConfig(**sizes), head="conditional_generation")
    params = jax.jit(lambda key: module.init(key, *module.dummy_inputs())["params"])(
        quick_key(seed)
    )
    made = folder / "speech"
    made.mkdir()
    cj.save_backbone(made, module, params, Speech2TextConfig(**sizes))
    for path in text.glob("tokenizer*"):
        shutil.copy(path, made)
    return made


def speech_flags(backbone, files, output, cache, **flags):
    """Returns the flags of a short `fit`."""
    settings = {
        "backbone": backbone,
        "method": "st",
        "reduction_factor": 4,
        "adapters": "per_target",
        "epochs": 1,
        "batch_size": 8,
        "max_target_length": 8,
        "learning_rate": "1e-2",
        "feature_cache": cache,
        "output_dir": output,
        **{f"{split}_file": path for split, path in files.items()},
        **flags,
    }
    parts = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            parts += [f"--{flag}", str(value)]
    return parts
