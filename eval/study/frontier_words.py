"""The settings of the study ``frontier`` in words."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eval.study.frontier_settings import BASE


def in_words(record: Mapping[Any, Any]) -> str:
    """``1/4x the default rate, bound 0.15, cosine, 300 steps, strength 0.7``.

    Args:
        record: a row of the study.
    """
    if record["key"] == BASE:
        return "base model"
    rate = record["rate"]
    multiple = f"1/{round(1 / rate)}" if rate < 1 and abs(1 / rate - round(1 / rate)) < 1e-6 else f"{rate:g}"
    words = [f"{multiple}x the default rate ({record['learning_rate']:g})"]
    if not pd.isna(record["bound"]):
        words.append(f"bound {record['bound']:g}")
    return ", ".join(
        [*words, str(record["schedule"]), f"{record['steps']:g} steps", f"strength {record['strength']:g}"]
    )
