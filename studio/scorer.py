"""Score the samples of running trainings in a process of its own, so that the page stays quick and imports no torch."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from studio import progress
from studio.adapters import on_miniature, settings_of
from studio.jobs import ROOT, reason_in
from studio.workspace import Workspace

NICE = 10
"""Training goes first."""


class Scorer:
    """One process at a time, whichever pages look at the run."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self._process: subprocess.Popen[bytes] | None = None
        self._log = workspace.root / ".scoring.log"
        self._tried: dict[str, tuple] = {}
        self._current = ""
        self._notes: dict[str, str] = {}

    def look(self, run: Path, samples: list[progress.Samples], download: bool) -> str:
        """Start scoring if there are samples without a score; returns what there is to say about it.

        Args:
            download: whether encoders may be downloaded for runs of other models than the miniature.
        """
        self._collect()
        unscored = tuple(str(sample.grid) for sample in samples if sample.images and sample.dino is None)
        if not unscored:
            return ""
        if not download and not on_miniature(run):
            return "The samples are not scored; tick the box below the log to download DINO and CLIP for that."
        if self._process is not None:
            return "Scoring the samples ..."
        if self._tried.get(run.name) == unscored:
            return self._notes.get(run.name, "")
        try:
            photos = self.workspace.within(str(settings_of(run).get("instance_data_dir") or ""))
        except InputError as error:
            return f"The samples are not scored: {error}"
        self._tried[run.name], self._current = unscored, run.name
        words = [sys.executable, "-m", "studio.scorer", str(run), str(photos)] + (["--download"] if download else [])
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        return "Scoring the samples ..."

    def close(self) -> None:
        """End the process, if one runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _collect(self) -> None:
        if self._process is None or self._process.poll() is None:
            return
        code, self._process = self._process.returncode, None
        self._notes.pop(self._current, None)
        if code:
            output = self._log.read_text(encoding="utf-8", errors="replace")
            self._notes[self._current] = f"The samples are not scored: {reason_in(output, code)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studio.scorer", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--download", action="store_true")
    options = parser.parse_args()
    os.nice(NICE)
    names: tuple[str | None, str | None] = (None, None)
    if options.download and not on_miniature(options.run):
        from eval.metrics.protocols import DELORA

        names = (DELORA.dino, DELORA.clip)
    progress.score_samples(options.run, options.photos, *names)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
