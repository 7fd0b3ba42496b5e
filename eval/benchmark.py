"""Run a whole benchmark: train every subject, draw its prompts, score, and write tables and a page to look at.

Each step is skipped where its result is there and whole, so the same command continues a run that was stopped. Under
``accelerate launch`` the subjects are spread over the processes, one GPU each.
"""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

from eval import report, running
from eval.methods import TITLES
from eval.plan import check, tasks, write_settings
from eval.protocols import PRECISIONS, PROTOCOLS

LPIPS = ("alex", "vgg", "squeeze", "none")
LONGEST_WAIT = datetime.timedelta(days=14)
"""For the slowest process, before the others give up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="dreambooth, toybox or a YAML file in the same form")
    parser.add_argument("--method", choices=[*TITLES, "none"], default="delora", help="none draws with the base model")
    parser.add_argument("--generated_dir", type=Path, help="score pictures that are there, SUBJECT/metadata.jsonl")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What a study takes too."""
    parser.add_argument("--output_dir", type=Path, required=True, help="the results folder, its own record")
    parser.add_argument("--photographs", type=Path, help="holds a folder for each subject; toybox renders its own")
    group = parser.add_argument_group("what is trained and drawn")
    group.add_argument("--pretrained_model_name_or_path", help="base model; by default the miniature, for toybox")
    group.add_argument("--train", nargs="+", default=[], metavar="FLAG=VALUE", help="of the training: rank=16")
    group.add_argument("--generate", nargs="+", default=[], metavar="FLAG=VALUE", help="num_inference_steps=25")
    group.add_argument("--seeds", type=int, default=1, help="trainings of each subject, seeds 0, 1, ...")
    group.add_argument("--subjects", nargs="+", help="only these")
    group.add_argument("--jobs", type=int, default=1, help="subjects at once in each process")
    group.add_argument("--together", type=int, default=1, help="subjects trained at once on one model by each job")
    group = parser.add_argument_group("how it is scored")
    group.add_argument("--protocol", nargs="+", choices=sorted(PROTOCOLS), help="by default delora, toybox for toys")
    group.add_argument("--dino", help="another DINO: timm name, hf-hub:ID or local-dir:FOLDER")
    group.add_argument("--clip", help="another CLIP: open_clip name, hf-hub:ID or local-dir:FOLDER")
    group.add_argument("--lpips", choices=LPIPS, help="backbone; by default alex, none for toybox")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoders")
    group.add_argument("--batch_size", type=int, default=64, help="of the encoders")
    group.add_argument("--workers", type=int, help="processes that decode pictures")


def start() -> Any:
    """The accelerator of a run whose processes may wait long for one another."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


def run(options: argparse.Namespace) -> None:
    plan = check(options)

    from eval.scoring import load_models, score

    accelerator = start()
    if accelerator.is_main_process:
        write_settings(plan, options)
        load_models(options, "cpu")  # refused now, not after hours of training
    accelerator.wait_for_everyone()
    failed: dict[str, str] = {}
    if options.generated_dir is None:
        failed = running.run_on_all(accelerator, tasks(plan, options.together), options.jobs)
    summary = score(plan, options, accelerator, failed, load_models(options, accelerator.device))
    if summary is None:
        return
    page = report.write([plan.folder], plan.folder / "index.html", overwrite=True)
    print(report.terminal(plan.folder))
    print(f"wrote {page}; open it in a browser")
    if failed:
        for place, problem in failed.items():
            print(f"failed: {place}: {problem}", file=sys.stderr)
        sys.exit(f"error: {len(failed)} failed and are in no mean; run the same command again to try them anew.")
