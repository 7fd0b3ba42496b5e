"""Print the results of a benchmark and save them on request; read the rows of an earlier one."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from delora_diffusers.errors import InputError


def print_and_save(text: str, file: Path | None) -> None:
    """Print a Markdown table, and write it to ``file`` if one is given."""
    print(text)
    if file is not None:
        file.write_text(text + "\n")


def read_rows(file: Path, columns: Iterable[str], what: str) -> pd.DataFrame:
    """Rows of a study or of a benchmark.

    Args:
        columns: which the rows must have. what: names the right file, for messages.

    Raises:
        InputError: the file does not exist, is damaged, or has other rows or none.
    """
    if not file.is_file():
        raise InputError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}; give the {what}.")
    try:
        rows = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a parquet file ({error}); give the {what}.") from error
    if not set(columns) <= set(rows.columns):
        raise InputError(f"{file} has rows of something else; give the {what}.")
    if rows.empty:
        raise InputError(f"{file} has no rows; give the {what}.")
    return rows
