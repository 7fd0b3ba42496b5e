"""Read the rows that a study or a benchmark has written."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from delora_diffusers.errors import InputError, reason


def read_rows(file: Path, columns: Iterable[str], remedy: str) -> pd.DataFrame:
    """Rows of a parquet file.

    Args:
        columns: which the rows must have. remedy: the end of messages, such as "give the boundary.parquet of a study".

    Raises:
        InputError: the file does not exist, is damaged, or has other rows or none.
    """
    if not file.is_file():
        raise InputError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}; {remedy}.")
    try:
        rows = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a parquet file ({reason(error)}); {remedy}.") from error
    if not set(columns) <= set(rows.columns):
        raise InputError(f"{file} has rows of something else; {remedy}.")
    if rows.empty:
        raise InputError(f"{file} has no rows; {remedy}.")
    return rows
