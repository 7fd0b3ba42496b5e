"""Load a Stable Diffusion pipeline from a folder or the hub, with a clear error if that fails."""

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
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline without its safety checker, in float32.

    Args:
        name_or_path: a pipeline folder or a hub id; None or ``"mini-sd"`` for the included miniature.

    Raises:
        InputError: the folder is not a complete pipeline, or the hub id cannot be loaded.
    """
    check_model_folder(name_or_path)
    folder_or_id = _MINIATURE_FOLDER if name_or_path is None or is_miniature(name_or_path) else name_or_path
    import diffusers
    import torch
    import transformers
    from diffusers import DiffusionPipeline

    # This logger warns about "modules that should be kept in float32: []" at every cast.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:  # only while loading: the user should see later warnings, such as of a truncated prompt
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
        raise _loading_error(name_or_path, error) from error
    finally:
        for logger, verbosity in zip(loggers, verbosities):
            logger.set_verbosity(verbosity)
    if type(pipeline).__name__ not in PIPELINES:
        raise InputError(
            f"the base model {name_or_path} is a {type(pipeline).__name__}; give a {' or '.join(PIPELINES)}."
        )
    return pipeline.to(dtype=torch.float32)  # transformers loads weights in the file's dtype


def pipeline_folder(name_or_path: str | None, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a pipeline. A hub id is downloaded, weights in safetensors only.

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
        folder = DiffusionPipeline.download(name_or_path, revision=revision, variant=variant, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _loading_error(name_or_path, error) from error
    return Path(folder)


def _loading_error(name_or_path: str | None, error: Exception) -> InputError:
    return InputError(
        f"the base model {name_or_path} could not be loaded ({' '.join(str(error).split())}); "
        "give --pretrained_model_name_or_path a Stable Diffusion pipeline folder or hub id."
    )


def check_model_folder(name_or_path: str | None) -> None:
    """Reject at once what cannot be a pipeline. A name that is not a local folder may be a hub id and is accepted.

    Raises:
        InputError
    """
    if is_miniature(name_or_path):
        return
    assert name_or_path is not None
    if not name_or_path:
        raise InputError("--pretrained_model_name_or_path is empty; give a folder or a hub id, or leave it out.")
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not may_be_hub_id(name_or_path):
            raise InputError(f"the base model folder {name_or_path} does not exist; check the path.")
        return
    for part in ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer"):
        if not (folder / part).exists():
            raise InputError(
                f"the base model folder {name_or_path} has no {part.split('/')[0]}; give a complete Stable "
                "Diffusion pipeline folder, as pipeline.save_pretrained writes it."
            )
