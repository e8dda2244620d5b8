"""Command `predict` with an array of NumPy as output: the embeddings of a file's texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compacter_jax.files import replace_file
from train.data.rows import column_names, column_values, read_rows

SUFFIX = ".npy"


def write_array(
    input_path: Path,
    output_path: Path,
    predict_chunk: Callable[[dict[str, list[Any]]], Any],
    *,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Writes `[rows, width]` float32 embeddings of the texts of a file, in the order of its rows.

    The file is read twice, so that a row that cannot be read is found before anything is computed,
    and no more than a chunk of embeddings is in memory.

    Args:
      input_path: a .parquet, .jsonl, .csv or .tsv file with a column `sentence`.
      output_path: the .npy file; it appears, or is replaced, only when it is complete.
      predict_chunk: columns -> a list of embeddings, as of `Embedder.predictions`.
      progress: a function that is called after each chunk with the number of its rows.

    Returns:
      The number of rows.

    Raises:
      FileNotFoundError, ValueError: as `read_rows`, or if the rows are pairs, which have a cosine.
    """
    number = 0
    for rows in read_rows(input_path):
        if "sentence2" in column_names(rows):
            raise ValueError(
                f"{input_path} has pairs of texts, and {output_path} is for embeddings of single "
                "texts; remove the column sentence2, or write .parquet for the cosines of pairs"
            )
        number += len(rows)
    written = 0
    with replace_file(output_path) as temporary, temporary.open("wb") as file:
        for rows in read_rows(input_path):
            texts = column_values(rows, "sentence")
            embeddings = np.array(predict_chunk({"sentence": texts}), np.float32)
            if not written:
                shape = (number, embeddings.shape[1])
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(embeddings, "<f4").tobytes())
            written += len(embeddings)
            if progress is not None:
                progress(len(embeddings))
    return number
