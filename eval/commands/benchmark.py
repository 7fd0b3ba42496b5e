"""Run a benchmark: train every subject, generate images for its prompts, score them, and write tables and a page.

Steps whose results are complete are skipped, so the same command continues a run that was stopped. Under
``accelerate launch`` the subjects are spread over the processes, one GPU each.
"""

import argparse
from pathlib import Path

from delora_diffusers.locking import locked_folders
from delora_diffusers.methods.table import METHODS
from delora_diffusers.outputs import check_results_folder, is_first_process
from eval.benchmark.checks import check, with_defaults
from eval.benchmark.plan import Plan, make_plan, write_settings
from eval.benchmark.recipes import with_recipe
from eval.benchmark.run import exit_with_failures, run_plans, start_accelerator
from eval.commands.arguments import add_run_arguments

RESULTS = ("settings.json", "photographs", "class-images")
"""Names in the output folder of a run that was started before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="dreambooth, toybox or a YAML file in the same format")
    parser.add_argument("--method", choices=[*METHODS, "none"], default="delora", help="none scores the base model")
    parser.add_argument(
        "--generated_dir", type=Path, help="score existing images instead: a folder with SUBJECT/metadata.jsonl"
    )
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> None:
    options = with_recipe(options)
    check(options)
    check_results_folder(options.output_dir, RESULTS.__contains__, "a benchmark run")
    options = with_defaults(options)
    plan = make_plan(options)
    with locked_folders([plan.folder] if is_first_process() else []):
        run_plan(plan, options)


def run_plan(plan: Plan, options: argparse.Namespace) -> None:
    """Train, generate, score and report."""
    from eval.benchmark import report, scoring  # imports torch

    accelerator = start_accelerator()
    if accelerator.is_main_process:
        write_settings(plan, options)
        scoring.load_models(options, "cpu")  # fails now instead of after hours of training
    accelerator.wait_for_everyone()
    failed: dict[str, str] = {}
    if options.generated_dir is None:
        failed = run_plans(accelerator, [plan], options.together, options.jobs)
    models = scoring.load_models(options, accelerator.device)
    summary = scoring.score(plan, options, accelerator, failed, models)
    if summary is None:
        return
    page = report.write([plan.folder], plan.folder / "index.html", overwrite=True)
    print(report.terminal(plan.folder))
    print(f"wrote {page}; open it in a browser")
    exit_with_failures(failed)
