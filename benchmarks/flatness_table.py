"""The largest changes of DINO and CLIP-T over rates and steps, of every method on several base models.

    python -m benchmarks.flatness_table studies-a/flatness.parquet studies-b/flatness.parquet [--output TABLE.md]

Joins the rows of ``python -m eval study flatness`` on several base models.
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.reporting import print_and_save
from eval.benchmark.tables import markdown
from eval.study.flatness import joint_table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flatness_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path, nargs="+", help="flatness.parquet of each base model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    missing = [file for file in options.rows if not file.is_file()]
    if missing:
        parser.error(f"{missing[0]} does not exist; give the flatness.parquet of a finished study.")
    print_and_save(markdown(*joint_table([pd.read_parquet(file) for file in options.rows])), options.output)


if __name__ == "__main__":
    main()
