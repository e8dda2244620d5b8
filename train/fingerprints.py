"""Fingerprints of input files: hashes by which a resumed run recognises them."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from compacter_jax.adapter_files import CONFIG_NAME
from compacter_jax.files import expanded, is_there
from compacter_jax.messages import listing
from train import tasks
from train.cli.compositions import folder_of
from train.cli.options import TrainingOptions
from train.tasks import speech
from train.tasks.benchmarks import find as find_benchmark
from train.tasks.own_files import SENTIMENT

# Flag -> name -> file.
Inputs: TypeAlias = dict[str, dict[str, Path]]
# Flag -> name -> size and hash.
Fingerprints: TypeAlias = dict[str, dict[str, dict[str, Any]]]

_SPLIT_FLAGS = {split: f"--{split}-file" for split in tasks.SPLITS}
# Files in a backbone's folder that are read beside its weights.
_OF_BACKBONE = re.compile(
    r"config\.json|preprocessor_config\.json|tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|.*\.model"
)


def files_read(options: TrainingOptions) -> Inputs:
    """Returns the files that a run reads: data with their recordings, backbone, adapters.

    A data set from the hub is not included; a backbone from the hub is included once it is in the
    hub's cache.

    Args:
      options: the options of `fit` or of `compare`.
    """
    found: Inputs = {}
    for name in options.task.split(","):
        found |= _data_files(name.strip(), options)
    if folder := _backbone_folder(options.backbone):
        found["--backbone"] = files_of_backbone(folder)
    if options.composition is not None:
        for name, leaf in options.composition.leaves().items():
            if leaf.folder is not None:
                found[f"{name} in --method"] = _files_of_adapter(leaf.folder)
    return found


def fingerprints(inputs: Inputs) -> Fingerprints:
    """Returns sizes and hashes of files; a file is read again only after it has changed."""
    return {
        flag: {name: _fingerprint(path) for name, path in files.items() if path.is_file()}
        for flag, files in inputs.items()
    }


def changes(before: Mapping[str, Any], now: Fingerprints, *, whole: bool = True) -> list[str]:
    """Returns the differences between two fingerprints, one phrase for each flag.

    Args:
      before: the earlier fingerprints; flags that it lacks are not compared.
      now: the current fingerprints.
      whole: whether all current files exist; if not, only files in both fingerprints are compared.
    """
    found = []
    for flag in before.keys() & now.keys():
        old, new = before[flag], now[flag]
        names = [f"{name} has changed" for name in new if name in old and old[name] != new[name]]
        if whole:
            names += [f"{name} is missing" for name in old.keys() - new.keys()]
            names += [f"{name} is new" for name in new.keys() - old.keys()]
        if names:
            found.append(f"{flag}: {listing(sorted(names), 3)}")
    return sorted(found)


def _data_files(task: str, options: TrainingOptions) -> Inputs:
    given = {
        _SPLIT_FLAGS[split]: path
        for split in tasks.SPLITS
        if (path := getattr(options, f"{split}_file")) is not None
    }
    found: Inputs = {flag: {path.name: path} for flag, path in given.items()}
    recordings = {flag: speech.recordings_of(path) for flag, path in given.items()}
    found |= {f"recordings of {flag}": files for flag, files in recordings.items() if files}
    for place, path in enumerate(getattr(options, "parallel_files", None) or ()):
        found.setdefault("--parallel-files", {})[f"{place + 1}: {path.name}"] = path
    if task in tasks.BUILT_IN:
        own = [s for s, flag in _SPLIT_FLAGS.items() if flag not in given]
        paths = {f"{split}.parquet": SENTIMENT / task / f"{split}.parquet" for split in own}
        found[f"--task {task}"] = paths
    benchmark = find_benchmark(task)
    if benchmark is not None and options.data_dir is not None:
        folder = options.data_dir / benchmark.configuration
        paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.parquet"))}
        found[f"--data-dir of {task}"] = paths
    return found


def _backbone_folder(name: str) -> Path | None:
    """Returns the folder of a backbone, or that in the hub's cache; None without either."""
    folder = expanded(name)
    if is_there(folder) and folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow to import

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no id of the hub either
        return None
    return Path(config).parent if isinstance(config, str) else None


def files_of_backbone(folder: Path) -> dict[str, Path]:
    """Returns name -> file, for the weights in the folder of a backbone and what is read beside."""
    single = folder / "model.safetensors"
    weights = [single] if single.is_file() else sorted(folder.glob("*.safetensors*"))
    others = [path for path in sorted(folder.iterdir()) if _OF_BACKBONE.fullmatch(path.name)]
    return {path.name: path for path in (*weights, *others)}


def _files_of_adapter(folder: Path) -> dict[str, Path]:
    folder = folder_of(folder)
    paths = [folder / CONFIG_NAME, *sorted(folder.glob("*.safetensors"))]
    return {path.name: path for path in paths}


def _fingerprint(path: Path) -> dict[str, Any]:
    status = path.stat()
    digest = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    return {"bytes": status.st_size, "sha256": digest}


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Returns the hash of a file's content; cached by its size and time of change."""
    del size, changed
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
