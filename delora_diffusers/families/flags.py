"""Flags that describe a base model beyond its name. Imports no torch."""

import argparse
from typing import Any

from delora_diffusers.names import PREDICTION_TYPES


def add_single_file_arguments(group: Any, prediction: bool = True) -> None:
    """``--model_config`` and, with ``prediction``, ``--prediction_type`` and ``--rescale_betas_zero_snr``."""
    group.add_argument(
        "--model_config",
        help="of a base model in a single file: the pipeline folder or hub id with its configuration, tokenizers and "
        "what the file lacks; default: that of Stable Diffusion 1.x, 2.x or XL, which is included",
    )
    if not prediction:
        return
    group.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="what the base model predicts; default: what its configuration or its file says",
    )
    group.add_argument(
        "--rescale_betas_zero_snr",
        action=argparse.BooleanOptionalAction,
        help="whether the base model was trained with a terminal SNR of zero; default: what its configuration or its "
        "file says",
    )
