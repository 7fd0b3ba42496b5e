"""Load a Stable Diffusion pipeline from a folder or the hub, with one sentence where it cannot be had."""

import logging
from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.names import MINIATURE, SD_PIPELINE, SDXL_PIPELINE, is_miniature, may_be_hub_id

PIPELINES = (SD_PIPELINE, SDXL_PIPELINE)

_MINIATURE_FOLDER = Path(__file__).resolve().parents[2] / "data" / "miniature" / MINIATURE


def load_pipeline(
    name_or_path: str | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
):
    """A Stable Diffusion 1.x, 2.x or XL pipeline without its safety checker, in float32.

    Args:
        name_or_path: a pipeline folder or a hub id; None or ``"mini-sd"`` for the one that ships here.

    Raises:
        InputError: a folder that is not a pipeline (naming what is missing), a hub id that cannot be loaded.
    """
    check_model_folder(name_or_path)
    folder_or_id = _MINIATURE_FOLDER if name_or_path is None or is_miniature(name_or_path) else name_or_path
    import diffusers
    import torch
    import transformers
    from diffusers import DiffusionPipeline

    # It warns at every cast of "modules that should be kept in float32: []".
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:  # quiet while loading only: later warnings, of a prompt cut short say, are for the user
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder_or_id,
            revision=revision,
            variant=variant,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(name_or_path, error) from error
    finally:
        for logger, verbosity in zip(loggers, verbosities):
            logger.set_verbosity(verbosity)
    if type(pipeline).__name__ not in PIPELINES:
        raise InputError(
            f"the base model {name_or_path} is a {type(pipeline).__name__}; give a {' or '.join(PIPELINES)}."
        )
    return pipeline.to(dtype=torch.float32)  # transformers loads in the dtype of the file


def pipeline_folder(name_or_path: str | None, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a pipeline; one of the hub is downloaded, its parts that are in safetensors.

    Raises:
        InputError: see ``load_pipeline``.
    """
    check_model_folder(name_or_path)
    if name_or_path is None or is_miniature(name_or_path):
        return _MINIATURE_FOLDER
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from diffusers import DiffusionPipeline

    try:
        found = DiffusionPipeline.download(name_or_path, revision=revision, variant=variant, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(name_or_path, error) from error
    return Path(found)


def _cannot_be_loaded(name_or_path: str | None, error: Exception) -> InputError:
    return InputError(
        f"the base model {name_or_path} could not be loaded ({' '.join(str(error).split())}); "
        "give --pretrained_model_name_or_path a Stable Diffusion pipeline folder or hub id."
    )


def check_model_folder(name_or_path: str | None) -> None:
    """Refuse at once what cannot be a pipeline. A name that is no folder here may be a hub id and passes.

    Raises:
        InputError
    """
    if is_miniature(name_or_path):
        return
    assert name_or_path is not None
    if not name_or_path:
        raise InputError("--pretrained_model_name_or_path is empty; name a folder or a hub id, or leave it out.")
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not may_be_hub_id(name_or_path):
            raise InputError(f"the base model folder {name_or_path} does not exist; check the path.")
        return
    for part in ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer"):
        if not (folder / part).exists():
            raise InputError(
                f"the base model folder {name_or_path} has no {part.split('/')[0]}; give a whole Stable Diffusion "
                "pipeline folder, as pipeline.save_pretrained writes it."
            )
