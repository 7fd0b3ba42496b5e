"""What the tab Train shows of a run: its status, its curves, its samples and its log."""

from pathlib import Path
from typing import Any

import gradio as gr

from delora_diffusers.errors import InputError
from studio import charts, markup, progress, runs
from studio.scorer import Scorer
from studio.workspace import Workspace

ACTIVE = ("starting", "training", "stopping")
SCORE_SPAN = 0.1
"""The least length of the axes of DINO and CLIP-T, so that small differences look small."""


def looked(workspace: Workspace, scorer: Scorer, name: str | None, download: bool, before: Any) -> list[Any]:
    """What the page shows of a run; what has not changed since the last look is not sent again."""
    if not name:
        nothing = markup.paragraph("No run yet: fill in the form and press Start training.")
        return [nothing, "", "", "", *buttons_of(None), None]
    try:
        state = runs.state(workspace, name)
        folder = workspace.run(name)
        samples = progress.samples(folder)
        parts = [
            status_of(state, samples),
            curves_of(progress.curves(folder), scorer.look(folder, samples, download), state.steps),
            samples_of(workspace, samples),
            markup.text_block(state.log_tail, "last lines of the log", "tail") if state.log_tail else "",
            *buttons_of(state.status),
        ]
    except InputError as error:
        parts = [markup.paragraph(str(error), "failed"), "", "", "", *buttons_of(None)]
    seen = [name, *(hash(str(part)) for part in parts)]
    shown = [
        gr.skip() if before and old == new else part for part, old, new in zip(parts, (before or [])[1:], seen[1:])
    ]
    return [*(shown if before and before[0] == name else parts), seen]


def buttons_of(status: str | None) -> list[Any]:
    """Which of Stop and Resume can be pressed."""
    can_go_on = status is not None and status not in ACTIVE
    return [gr.update(interactive=status in ACTIVE), gr.update(interactive=can_go_on)]


def status_of(state: runs.RunState, samples: list[progress.Samples]) -> str:
    """What happens, how far it is and the time left, for people who look once in a while; at the end, what came out."""
    left = ""
    if state.status == "finished":
        left = verdict_of(samples)
    if state.seconds_left is not None and state.status in ACTIVE:
        left = f" About {markup.duration(state.seconds_left)} left."
    kind = {"failed": "failed", "lost": "failed", "finished": "done"}.get(state.status, "")
    return (
        f'<p class="status {kind}" role="status">{markup.escape(state.message + left)}</p>'
        + markup.progress(f"training of {state.name}: step {state.step} of {state.steps}", state.step, state.steps)
        + markup.paragraph(f"Step {state.step} of {state.steps}", "small")
    )


def verdict_of(samples: list[progress.Samples]) -> str:
    """How close the last samples come to the photos, and where to go on."""
    verdict = ""
    if samples and samples[-1].dino is not None:
        verdict = f" DINO {samples[-1].dino:.2f}"
        if samples[-1].photos_dino is not None:
            verdict += f", {progress.OF_PHOTOS} {samples[-1].photos_dino:.2f}"
        verdict += "."
    return f"{verdict} Try it in the tab Play."


def curves_of(curves: list[progress.Curve], note: str, steps: int) -> str:
    """The curves of the log and of the samples' scores over all steps of the run, and a note about scoring."""
    if not curves:
        return markup.paragraph("The curves begin with the first logged step.")
    parts = [
        charts.line_chart(
            curve.title,
            {curve.title: (curve.steps, curve.values)},
            x_end=steps,
            least=SCORE_SPAN if curve.tag in progress.SCORE_TITLES else 0,
            reference=curve.reference,
        )
        for curve in curves
    ]
    return f'<div class="charts">{"".join(parts)}</div>' + markup.paragraph(note)


def samples_of(workspace: Workspace, samples: list[progress.Samples]) -> str:
    """The images of each validation, newest first."""
    parts = []
    for sample in reversed(samples):
        scores = [f"DINO {sample.dino:.3f}"] if sample.dino is not None else []
        scores += [f"CLIP-T {sample.clip_t:.3f}"] if sample.clip_t is not None else []
        title = f"Samples at step {sample.step}" + (f" ({', '.join(scores)})" if scores else "")
        figures = [
            markup.figure(markup.file_url(workspace, Path(path)), f"sample of {prompt}", f"{prompt}, seed {seed}")
            for path, prompt, seed in sample.images
        ]
        parts.append(markup.heading(title) + markup.grid(figures, title, 150))
    return "".join(parts)
