"""The report of a benchmark run, or of two side by side: tables as text, and one HTML page that needs no network."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.text_files import read_json
from delora_diffusers.wording import counted
from eval.benchmark import report_page, tables
from eval.benchmark.results import SCORES
from eval.benchmark.results_folder import Run, read_run


def write(folders: Sequence[Path], output: Path, labels: Sequence[str] | None = None, overwrite: bool = False) -> Path:
    """Write the page, and its tables as Markdown and LaTeX beside it.

    Raises:
        InputError: a folder is not a finished run, the runs are of different benchmarks, an output file already exists.
    """
    if len(folders) > 2:
        raise InputError(f"{len(folders)} runs were given; a report shows one run, or two side by side.")
    if labels is not None and len(labels) != len(folders):
        raise InputError(f"--labels has {len(labels)} labels for {len(folders)} runs; give one per run.")
    runs = [read_run(folder, label) for folder, label in zip(folders, labels or [None] * len(folders))]
    if len({run.label for run in runs}) < len(runs):
        runs = [dataclasses.replace(run, label=f"{run.label} ({run.folder.name})") for run in runs]
    if len({run.summary["benchmark"] for run in runs}) > 1:
        raise InputError(
            f"{folders[0]} and {folders[1]} are runs of different benchmarks; compare runs of the same one."
        )
    protocols = [name for name in runs[0].summary["protocols"] if all(name in r.summary["protocols"] for r in runs)]
    if not protocols:
        raise InputError(f"{folders[0]} and {folders[1]} share no protocol; score both with the same one.")
    files = {output: report_page.render(runs, protocols)}
    files |= {output.with_suffix(suffix): text for suffix, text in text_tables(runs, protocols).items()}
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(f"{file} already exists; remove it or give another --output.")
    with contextlib.ExitStack() as stack:  # all files or none
        for file, text in files.items():
            stack.enter_context(atomic_write(file)).write_text(text, encoding="utf-8")
    return output


def terminal(folder: Path) -> str:
    """The summary as lines for a terminal."""
    summary = read_json(folder / "summary.json")
    lines = []
    if "step" in summary:
        kept = f"by {SCORES[summary['kept_best_by']]} under protocol {next(iter(summary['protocols']))}"
        lines.append(f"kept: the images after {summary['step']} training steps, {kept}")
    for protocol, scored in summary["protocols"].items():
        counts = scored["counts"]
        lines.append(
            f"protocol {protocol}: {counted(counts['subjects'], 'subject')}, "
            f"{counted(counts['seeds'], 'seed')}, {counted(counts['pictures'], 'image')}, "
            f"{counted(counts['pairs'], 'pair')}; mean [95% interval over subjects]"
        )
        for name, value in scored["scores"].items():
            real = scored["real"].get(name)
            beside = f"   real images {real['mean']:.3f}" if real else ""
            lines.append(f"  {name:16}{value['mean']:7.3f} [{value['low']:.3f}, {value['high']:.3f}]{beside}")
    return "\n".join(lines)


def text_tables(runs: Sequence[Run], protocols: Sequence[str]) -> dict[str, str]:
    """The tables as Markdown and LaTeX, by file suffix."""
    markdown, latex = "", ""
    for protocol in protocols:
        summaries = [(run.label, run.summary["protocols"][protocol]) for run in runs]
        benchmark = runs[0].summary["benchmark"]
        caption = f"{benchmark}, protocol {protocol}: mean [95% interval over subjects]"
        blocks = [(caption, *tables.summary_rows(summaries, protocol, benchmark))]
        if len(runs) == 2:
            blocks.append(("Paired differences over subjects", *report_page.difference_rows(runs, protocol)))
        for run, (label, summary) in zip(runs, summaries):
            if summary["counts"]["seeds"] > 1:
                blocks.append((f"{label}, by seed", *tables.seed_rows(summary)))
            if "steps" in run.summary:
                blocks.append((f"{label}, along the training", *tables.step_rows(run.summary, protocol)))
            blocks.append((f"{label}, by subject", *tables.subject_rows(run.of(run.subjects, protocol))))
            blocks.append((f"{label}, by prompt", *tables.prompt_rows(summary)))
        for caption, header, rows in blocks:
            markdown += f"**{caption}**\n\n{tables.markdown(header, rows)}\n"
            latex += tables.latex(header, rows, caption) + "\n"
    return {".md": markdown, ".tex": latex}
