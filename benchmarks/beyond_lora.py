"""What moves DeLoRA's trade-off between subject and prompt fidelity, and what moves LoRA's as much.

    python -m benchmarks.beyond_lora OUT [--tries NAME ...] [--finalists] [--seeds 1] [--workers 16]

Every try changes one or a few settings of a reference (cosine decay from the paper's rate, a relative bound of 0.2), is
trained on ten toys that the miniature never saw, and is generated at three strengths; see ``benchmarks.strength_dial``.
The number that counts is DINO where CLIP-T is 0.01 below the base model's. ``--finalists`` trains a few tries on ten
other toys, which had no part in choosing. Writes ``table.md`` and ``rows.parquet`` to OUT. Finished runs are kept, so
the same command continues after an interruption. ``--from_rows ROWS.parquet`` writes the table of earlier rows instead.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.beyond_lora_tries import FINALISTS, REFERENCE, TRIES
from benchmarks.miniature_runs import run_all, toy_number
from benchmarks.reporting import print_and_save
from benchmarks.strength_dial import (
    CHOOSING,
    CLIP_T_LOSS,
    JUDGING,
    Toys,
    as_rows,
    at_equal_clip_t,
    difference,
    run_toys,
    write_photos,
)
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.outputs import check_writable
from delora_diffusers.training.arguments import positive_int
from delora_diffusers.wording import counted
from eval.benchmark.tables import markdown
from eval.study.saved_rows import read_rows

BASE = "base model"
COLUMNS = ("name", "seed", "subject", "strength", "dino", "clip_t")
"""What the rows have."""


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)


def titles_of(rows: pd.DataFrame, tries: Sequence[str] | None, reference: str) -> dict[str, str]:
    """The titles of tries by the ``name`` in the rows; ``tries`` are those to keep, None for all.

    Without another choice the reference may be missing; then nothing is compared.

    Raises:
        InputError: the base model or a try is not among the rows.
    """
    names = set(rows["name"])
    for title in (BASE, reference, *(tries or ())):
        if slug(title) not in names and title != REFERENCE:
            raise InputError(f"the rows have no {title!r}; they have {', '.join(sorted(names))}.")
    return {slug(title): title for title in tries or TRIES if slug(title) in names}


def report(rows: pd.DataFrame, names: dict[str, str], reference: str = REFERENCE) -> str:
    """A row per try, the best first, as Markdown.

    Args:
        names: titles of the tries that finished, by the ``name`` in the rows. reference: the title of the try that the
            others are compared with.
    """
    base = pd.DataFrame(rows[rows["name"] == slug(BASE)])
    values = {title: at_equal_clip_t(pd.DataFrame(rows[rows["name"] == name]), base) for name, title in names.items()}
    cells = []
    for name, title in sorted(names.items(), key=lambda item: -values[item[1]][0]):
        full = rows[(rows["name"] == name) & (rows["strength"] == 1)]
        against = ""
        if reference in values and title != reference:
            change, low, high = difference(values[title], values[reference])
            against = f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
        scores = [f"{full['dino'].mean():.3f}", f"{full['clip_t'].mean():.3f}"]
        cells.append([title, f"{values[title][0]:.3f}", *([against] if reference in values else []), *scores])
    compared = [f"minus {reference}"] if reference in values else []
    header = ["", "DINO at equal CLIP-T", *compared, "DINO at strength 1", "CLIP-T at strength 1"]
    subjects, seeds = rows["subject"].nunique(), rows["seed"].nunique()
    return (
        f"{markdown(header, cells)}\n{counted(subjects, 'toy')}, {counted(seeds, 'seed')}. "
        f"Base model: DINO {base['dino'].mean():.3f}, CLIP-T {base['clip_t'].mean():.3f}. Equal CLIP-T: "
        f"{CLIP_T_LOSS} below the base model's. In brackets: 95% bootstrap interval of the paired difference over toys "
        "and seeds."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beyond_lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--tries", nargs="+", choices=list(TRIES), metavar="NAME", help="default: all")
    parser.add_argument(
        "--reference", choices=list(TRIES), default=REFERENCE, metavar="NAME", help="compare with this try"
    )
    parser.add_argument("--from_rows", type=Path, metavar="ROWS.parquet", help="write the table of these rows")
    parser.add_argument("--finalists", action="store_true", help="judge the finalists on ten other toys")
    parser.add_argument("--subjects", type=toy_number, nargs="+", help="numbers of unseen toys")
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--steps", type=positive_int, default=300, help="of the tries that do not set their own")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="mixed precision of training")
    parser.add_argument("--workers", type=positive_int, default=16, help="runs at the same time")
    options = parser.parse_args(argv)
    if options.from_rows:
        for flag in ("finalists", "subjects", "seeds", "steps", "precision", "workers"):
            if getattr(options, flag) != parser.get_default(flag):
                raise InputError(f"--{flag} belongs to training; leave it out with --from_rows.")
        rows = read_rows(options.from_rows, COLUMNS, "give the rows.parquet of an earlier run")
        check_writable(options.out_dir / "table.md", "OUT")
        tries = [*options.tries, options.reference] if options.tries else None
        text = report(rows, titles_of(rows, tries, options.reference), options.reference)
        options.out_dir.mkdir(parents=True, exist_ok=True)
        print_and_save(text, options.out_dir / "table.md")
        return
    check_writable(options.out_dir / "runs", "OUT")
    chosen = list(options.tries or (FINALISTS if options.finalists else TRIES))
    subjects = tuple(options.subjects or (JUDGING if options.finalists else CHOOSING))
    shared = {"max_train_steps": options.steps, "mixed_precision": options.precision}
    photos = options.out_dir / "photos"
    runs, titles = [], {}
    for title in [BASE, *chosen]:
        train = None if title == BASE else shared | TRIES[title].flags()
        schedule = () if title == BASE else TRIES[title].boundary
        titles[slug(title)] = title
        for seed in range(options.seeds):
            folder = options.out_dir / "runs" / f"{slug(title)}-seed-{seed}"
            with_seed = None if train is None else train | {"seed": seed}
            runs.append(Toys(folder, photos, subjects, seed, with_seed, schedule))
    runs.sort(key=lambda run: -(run.train or {}).get("max_train_steps", 0))  # the longest start first
    write_photos(photos, subjects)
    results = []
    for result in run_all(run_toys, runs, options.workers):
        results.append(result)
        print(f"{result['folder']}: finished, {len(results)} of {len(runs)}", flush=True)
    rows = as_rows(results)
    rows.to_parquet(options.out_dir / "rows.parquet", index=False)
    complete = rows.groupby("name")["seed"].nunique() == options.seeds
    finished = {name: title for name, title in titles.items() if complete.get(name, False)}
    failed = [title for title in titles.values() if title not in finished.values()]
    finished.pop(slug(BASE))
    text = report(rows, finished, options.reference)
    print_and_save(text + (f"\n\nFailed: {', '.join(failed)}." if failed else ""), options.out_dir / "table.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
