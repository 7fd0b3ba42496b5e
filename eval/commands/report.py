"""Write a page about one benchmark run, or about two side by side: tables, every image, distributions."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one or two output folders of eval benchmark")
    parser.add_argument("--labels", nargs="+", help="one label per run (default: its method)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="HTML file to write; its tables are written beside it as .md and .tex",
    )


def run(options: argparse.Namespace) -> None:
    from eval.benchmark import report  # imports torch

    page = report.write(options.runs, options.output, options.labels)
    print(f"wrote {page}; open it in a browser")
