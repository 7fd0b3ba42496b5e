"""Load a Stable Diffusion pipeline from a folder or the hub, with a clear error if that fails."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from delora_diffusers.errors import LOADING_ERRORS, InputError, reason
from delora_diffusers.names import MINIATURE, SD_PIPELINE, SDXL_PIPELINE, is_miniature, is_xl, may_be_hub_id
from delora_diffusers.text_files import read_json

PIPELINES = (SD_PIPELINE, SDXL_PIPELINE)
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""Names of weight files, with their variant."""

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
        InputError: the folder is not a complete pipeline, the hub id cannot be loaded, or its configuration asks for
            something that is not supported.
    """
    check_model_folder(name_or_path, variant)
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
    except LOADING_ERRORS as error:
        raise _loading_error(name_or_path, variant, error) from error
    finally:
        for logger, verbosity in zip(loggers, verbosities):
            logger.set_verbosity(verbosity)
    problem = _unsupported(pipeline) or _incomplete(pipeline, Path(folder_or_id))
    if problem is not None:
        raise InputError(f"the base model {name_or_path} {problem}; choose another.")
    _limit_prompts(pipeline, name_or_path)
    return pipeline.to(dtype=torch.float32)  # transformers loads weights in the file's dtype


def _unsupported(pipeline: Any) -> str | None:
    """What the configuration of a pipeline asks for that diffusers' pipeline or this project would ignore."""
    kind = type(pipeline).__name__
    if kind not in PIPELINES:
        return f"is a {kind} and not a {' or '.join(PIPELINES)}"
    unet, vae = pipeline.unet.config, pipeline.vae.config
    for name in COMPONENTS:
        if getattr(getattr(getattr(pipeline, name, None), "config", None), "quantization_config", None) is not None:
            return f"has a quantized {name}, whose weights cannot be adapted"
    if unet.in_channels != vae.latent_channels:
        return f"has a UNet with {unet.in_channels} input channels for {vae.latent_channels} latent channels"
    if not isinstance(getattr(vae, "scaling_factor", None), int | float):
        return f"has an autoencoder with scaling_factor {getattr(vae, 'scaling_factor', None)}, which is no number"
    if getattr(vae, "shift_factor", None):
        return f"has an autoencoder with shift_factor {vae.shift_factor}, which a {kind} ignores"
    scales = [getattr(vae, name, None) is not None for name in ("latents_mean", "latents_std")]
    if any(scales) and not (all(scales) and is_xl(kind)):
        return f"has an autoencoder with latents_mean or latents_std, which a {kind} ignores"
    if all(scales) and not len(vae.latents_mean) == len(vae.latents_std) == vae.latent_channels:
        return f"has an autoencoder with latents_mean or latents_std of other than {vae.latent_channels} values"
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if getattr(unet, name, None) is not None:
            return f"has a UNet with {name} {getattr(unet, name)}, which needs other inputs than a prompt"
    if getattr(unet, "addition_embed_type", None) != ("text_time" if is_xl(kind) else None):
        return f"has a UNet with addition_embed_type {unet.addition_embed_type}, which a {kind} does not serve"
    return None


LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the files of older autoencoders, and those that diffusers gives them."""
NOT_STORED = ("position_ids",)
"""Last parts of names that files may lack. The libraries initialize all other missing weights at random."""


def _incomplete(pipeline: Any, folder: Path) -> str | None:
    """What is missing in the weight files of a local folder; None if nothing is, or there are none."""
    from delora_diffusers.files.reading import weight_names  # imports torch

    for component in COMPONENTS:
        model = getattr(pipeline, component, None)
        if model is None:
            continue
        stored = {_plain_name(name) for name in weight_names(folder / component)}
        names = [_plain_name(name) for name in model.state_dict()]
        missing = [name for name in names if name not in stored and not name.endswith(NOT_STORED)] if stored else []
        missing += [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            return f"has no weight {missing[0]} in {folder / component}, nor {len(missing) - 1} others"
    return None


def _plain_name(name: str) -> str:
    parts = [LEGACY_NAMES.get(part, part) for part in name.removeprefix("text_model.").split(".")]
    return ".".join(parts)


def _limit_prompts(pipeline: Any, name: str | None) -> None:
    """Give every tokenizer the length that its text encoder reads: some files name none, or a longer one.

    Raises:
        InputError: a tokenizer does not distinguish words, because its vocabulary is missing.
    """
    for suffix in ("", "_2"):
        tokenizer, encoder = (getattr(pipeline, name + suffix, None) for name in ("tokenizer", "text_encoder"))
        if tokenizer is not None and encoder is not None:
            own, longest = tokenizer.model_max_length, encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(own, longest) if isinstance(own, int) and own > 2 else longest
            if tokenizer("dog").input_ids == tokenizer("cat").input_ids:
                raise InputError(f"the base model {name} has a tokenizer without vocabulary; download it again.")


def pipeline_folder(name_or_path: str | None, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a pipeline. A hub id is downloaded, weights in safetensors only.

    Raises:
        InputError: see ``load_pipeline``.
    """
    check_model_folder(name_or_path, variant)
    if name_or_path is None or is_miniature(name_or_path):
        return _MINIATURE_FOLDER
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(name_or_path, revision=revision, variant=variant, use_safetensors=True)
    except LOADING_ERRORS as error:
        raise _loading_error(name_or_path, variant, error) from error
    return Path(folder)


def _loading_error(name_or_path: str | None, variant: str | None, error: Exception) -> InputError:
    if name_or_path is not None and variant is None and not Path(name_or_path).exists():
        check_variant(name_or_path, _files_on_hub(name_or_path), None)
    where = "" if name_or_path is None or Path(name_or_path).exists() else "there is no such folder here; "
    return InputError(
        f"the base model {name_or_path} could not be loaded ({where}{reason(error)}); "
        "give --pretrained_model_name_or_path a Stable Diffusion pipeline folder or hub id."
    )


def _files_on_hub(repo_id: str) -> list[str]:
    """The files of a repository; empty if they cannot be listed."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return list_repo_files(repo_id)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):  # the error that led here says what is wrong
        return []


def check_model_folder(name_or_path: str | None, variant: str | None = None) -> None:
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
    if folder.is_file():
        raise InputError(
            f"the base model {name_or_path} is a single file; convert it to a folder with diffusers: "
            f"StableDiffusionPipeline.from_single_file({name_or_path!r}).save_pretrained('FOLDER')."
        )
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
    for file in (folder / "model_index.json", *(folder / name / "config.json" for name in COMPONENTS)):
        config = read_json(file) if file.is_file() else {}
        if not isinstance(config, dict):
            raise InputError(f"{file} is not a JSON object; download the base model again.")
        if config.get("quantization_config") is not None:
            raise InputError(
                f"the {file.parent.name} of the base model {name_or_path} is quantized, so its weights cannot be "
                "adapted; give the model without quantization."
            )
    check_variant(name_or_path, (path.relative_to(folder).as_posix() for path in folder.glob("*/*")), variant)


def check_variant(name: str, files: Iterable[str], variant: str | None) -> None:
    """Reject a model whose weights exist only in a variant that was not asked for.

    Args:
        files: paths relative to the model's folder.

    Raises:
        InputError: the message gives the variant.
    """
    variants: dict[str, set[str | None]] = {}
    for path in files:
        component, _, file = path.rpartition("/")
        match = WEIGHTS.fullmatch(file)
        if match and component in COMPONENTS:
            variants.setdefault(component, set()).add(match["variant"])
    for component, available in variants.items():
        if None not in available and variant not in available:
            names = " or ".join(sorted(str(other) for other in available))
            raise InputError(
                f"the base model {name} has the weights of its {component} only as variant {names}; pass --variant "
                f"{sorted(str(other) for other in available)[0]}."
            )
