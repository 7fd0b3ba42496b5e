"""Read the results folder of a benchmark run."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from delora_diffusers.errors import InputError, reason
from delora_diffusers.methods.table import title_of
from delora_diffusers.text_files import read_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A results folder."""

    label: str
    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    images: pd.DataFrame
    subjects: pd.DataFrame

    def of(self, table: pd.DataFrame, protocol: str) -> pd.DataFrame:
        """The rows of one protocol."""
        return table.query("protocol == @protocol").reset_index(drop=True)


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a results folder.

    Raises:
        InputError: it is not a results folder, or it has no scores yet.
    """
    for name in ("settings.json", "summary.json", "scores.parquet", "subjects.csv"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give a finished output folder of eval benchmark.")
    settings, summary = (read_json(folder / name) for name in ("settings.json", "summary.json"))
    if not isinstance(settings, dict) or not isinstance(summary, dict) or "made" not in settings:
        raise InputError(f"{folder} has a damaged settings.json or summary.json; run eval benchmark again.")
    if label is None:
        given = settings["made"].get("generated_dir")
        label = Path(given).name if given else title_of(summary["method"])
    try:
        images = pd.read_parquet(folder / "scores.parquet")
        subjects = pd.read_csv(folder / "subjects.csv", dtype={"subject": str})
    except (ValueError, OSError) as error:
        raise InputError(f"{folder} has damaged tables ({reason(error)}); run eval benchmark again.") from error
    return Run(label, folder, settings, summary, images, subjects)
