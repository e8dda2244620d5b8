"""Folders of adapters."""

from __future__ import annotations

from pathlib import Path

from train.cli import compositions


def members_of(folder: Path) -> dict[str, Path]:
    """Returns name -> folder of the adapters in a folder.

    They are in `NAME/`, or in `NAME/adapter/` as `fit` writes them.
    """
    # An adapter, and the folder of a single run, are no banks.
    if not folder.is_dir() or compositions.holds_adapter(folder):
        return {}
    inside = [path for path in sorted(folder.iterdir()) if compositions.holds_adapter(path)]
    return {path.name: compositions.folder_of(path) for path in inside}
