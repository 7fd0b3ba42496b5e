"""The largest changes of DINO and CLIP-T over rates and steps, of every method on several base models.

    python -m benchmarks.flatness_table ROWS.parquet [ROWS.parquet ...] [--output_dir OUT]

Joins the rows of ``python -m eval study flatness``; a file may have several base models, and a base model several
files. Writes ``flatness.md``, and ``flatness.png`` and ``.svg`` with all settings, to OUT.
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.reporting import print_and_save
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from delora_diffusers.outputs import check_writable
from eval.benchmark.tables import markdown
from eval.study.flatness_joint import COLUMNS, difference_table, joined, joint_table, noise_table, note_of, plot_joint
from eval.study.saved_rows import read_rows

REMEDY = "give the flatness.parquet of a finished study"


def read(file: Path) -> pd.DataFrame:
    """Rows of the study.

    Raises:
        InputError: the file does not exist, or has other rows.
    """
    rows = read_rows(file, COLUMNS, REMEDY)
    if not set(rows["method"]) <= set(METHODS):
        raise InputError(f"{file} has rows of another study; {REMEDY}.")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flatness_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path, nargs="+", help="flatness.parquet of a study")
    parser.add_argument("--output_dir", type=Path)
    options = parser.parse_args(argv)
    rows = joined([read(file) for file in options.rows])
    out: Path | None = options.output_dir
    if out is not None:
        check_writable(out / "flatness.md", "--output_dir")
        plot_joint(rows, out / "flatness")
    parts = [
        markdown(*joint_table(rows), left=2),
        f"{note_of(rows)}\n",
        "What noise alone would make of it, if no setting were better than another:\n",
        markdown(*noise_table(rows), left=2),
        "Paired differences:\n",
        markdown(*difference_table(rows), left=2),
    ]
    text = "\n".join(parts).rstrip()
    print_and_save(text, None if out is None else out / "flatness.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
