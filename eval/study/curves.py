"""The studies in ``settings.STUDIES``: every setting on every subject and seed, as curves or as a table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from eval.study import captions
from eval.study.settings import STUDIES
from eval.study.trials import Trial, run_study, write_rows


def run(options: argparse.Namespace) -> None:
    """Run the study ``options.name``; write its rows, its figure, its caption and an image per setting."""
    study, path = STUDIES[options.name], options.output_dir / options.name

    def write_all(rows: pd.DataFrame, trials: Sequence[Trial]) -> Path:
        write_rows(path.with_suffix(".parquet"), rows)
        caption = captions.write(path, study, rows, captions.unfinished(trials, rows))
        captions.write_images(path, study.axis, trials)
        return caption

    run_study(options, study.settings(options.methods, options.multipliers or study.multipliers), write_all)
