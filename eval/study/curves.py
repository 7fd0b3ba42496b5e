"""The studies in ``settings.STUDIES``: every setting on every subject and seed, as curves or as a table."""

import argparse

from eval.benchmark.run import start_accelerator
from eval.study import captions
from eval.study.settings import STUDIES
from eval.study.trials import exclusive, finish, gather, plan_trials, run_trials, write_rows


def run(options: argparse.Namespace) -> None:
    """Run the study ``options.name``; write its rows, its figure, its caption and an image per setting."""
    study, path = STUDIES[options.name], options.output_dir / options.name
    trials = plan_trials(options, study.settings(options.methods, options.multipliers or study.multipliers))
    accelerator = start_accelerator()
    with exclusive(accelerator, options.output_dir):
        failed = run_trials(accelerator, options, trials)
        if accelerator.is_main_process:
            rows = gather(trials, failed)
            write_rows(path.with_suffix(".parquet"), rows)
            caption = captions.write(path, study, rows, captions.unfinished(trials, rows))
            captions.write_images(path.with_name(f"{path.name}-pictures"), study.axis, trials)
            finish(caption, failed)
