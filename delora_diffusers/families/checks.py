"""Reject what cannot be a base model before anything is loaded. Imports no torch."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from delora_diffusers.errors import InputError
from delora_diffusers.files.headers import safetensors_header
from delora_diffusers.names import FAMILIES, METADATA_KEY, hub_file, is_miniature, may_be_hub_id
from delora_diffusers.text_files import read_json

if TYPE_CHECKING:
    from delora_diffusers.families.family import Family

COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The models of a pipeline that are loaded; others, such as a safety checker, are not used."""
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""Names of weight files, with their variant."""


NOT_STORED = ("position_ids",)
"""Last parts of names that files may lack. The libraries initialize all other missing weights at random."""
LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the files of older autoencoders, and those that diffusers gives them."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def is_single_file(name_or_path: str | None) -> bool:
    """Whether a base model is one file, here or on the hub."""
    if is_miniature(name_or_path) or not name_or_path or Path(name_or_path).is_dir():
        return False
    return Path(name_or_path).is_file() or hub_file(name_or_path) is not None


MOST_PIXELS = 8192
"""The longest side of an image; beyond it memory runs out on any machine, before anything could say so."""


def check_side(flag: str, side: int) -> None:
    """Reject a side of images, in pixels, that no model here can have.

    Raises:
        InputError
    """
    if side > MOST_PIXELS:
        raise InputError(f"--{flag} {side} is more than {MOST_PIXELS} pixels; give for example 1024.")
    if side < 8:
        raise InputError(f"--{flag} {side} is less than 8 pixels; give for example 512.")
    if side % 8:
        raise InputError(f"--{flag} {side} is not a multiple of 8; use {round(side / 8) * 8}.")


def check_model_folder(name_or_path: str | None, variant: str | None = None, model_config: str | None = None) -> None:
    """Reject at once what cannot be a base model. A name that is not a local path may be on the hub and is accepted.

    Args:
        model_config: see ``--model_config``.

    Raises:
        InputError
    """
    if is_single_file(name_or_path):
        assert name_or_path is not None
        if Path(name_or_path).is_file():
            check_single_file(Path(name_or_path))
        if variant is not None and model_config is None:
            raise InputError(f"--variant chooses files of a folder, but {name_or_path} is a single file; leave it out.")
        if model_config is not None:
            if is_single_file(model_config):
                raise InputError(f"--model_config {model_config} is not a pipeline; give a folder or a hub id.")
            try:
                check_model_folder(model_config, variant)
            except InputError as error:
                raise InputError(f"--model_config cannot be used: {error}") from error
        return
    if model_config is not None:
        raise InputError("--model_config belongs to a base model in a single file; leave it out, or give such a file.")
    if is_miniature(name_or_path):
        return
    assert name_or_path is not None
    if not name_or_path:
        raise InputError("--pretrained_model_name_or_path is empty; give a folder or a hub id, or leave it out.")
    folder = Path(name_or_path)
    if "://" in name_or_path:
        raise InputError(
            f"the base model {name_or_path} is not the address of a .safetensors file on huggingface.co; download it, "
            "and give the file."
        )
    if not folder.is_dir():
        if not may_be_hub_id(name_or_path):
            raise InputError(f"the base model {name_or_path} does not exist; check the path.")
        return
    index = folder / "model_index.json"
    if index.is_file():
        known_class(name_or_path, index)
    denoiser = "transformer" if (folder / "transformer").is_dir() else "unet"
    parts = (f"{name}/config.json" for name in (denoiser, "vae", "text_encoder"))
    for part in (index.name, *parts, "tokenizer"):
        if not (folder / part).exists():
            raise InputError(
                f"the base model folder {name_or_path} has no {part.split('/')[0]}; give a complete pipeline folder, "
                "as pipeline.save_pretrained writes it."
            )
    for file in (folder / name / "config.json" for name in COMPONENTS):
        config = read_json(file) if file.is_file() else {}
        if not isinstance(config, dict):
            raise InputError(f"{file} is not a JSON object; download the base model again.")
        if config.get("quantization_config") is not None:
            raise InputError(
                f"the {file.parent.name} of the base model {name_or_path} is quantized, so its weights cannot be "
                "adapted; give the model without quantization."
            )
    check_variant(name_or_path, (path.relative_to(folder).as_posix() for path in folder.glob("*/*")), variant)


def check_single_file(file: Path) -> None:
    """Reject at once a file that cannot be a base model.

    Raises:
        InputError
    """
    if file.suffix.lower() in PICKLES:
        raise InputError(
            f"the base model {file} is a pickle, which can run any code when it is read; give it as .safetensors."
        )
    if file.suffix.lower() != ".safetensors":
        raise InputError(f"the base model {file} is not a .safetensors file; give such a file, or a pipeline folder.")
    header = safetensors_header(file, "a base model")
    header = header if isinstance(header, dict) else {}
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and METADATA_KEY in metadata:
        raise InputError(f"the base model {file} is an adapter; give it to --adapter, and here its base model.")
    if any(part in name for name in header for part in (".lora_", "lora_unet_", ".lokr_", ".hada_w1")):
        raise InputError(f"the base model {file} is a LoRA; give the model that it was trained on.")


def known_class(name_or_path: str | None, index: Path) -> str:
    """The class of a pipeline from its ``model_index.json``.

    Raises:
        InputError: no family claims it.
    """
    config = read_json(index)
    if not isinstance(config, dict):
        raise InputError(f"{index} is not a JSON object; download the base model again.")
    kind = config.get("_class_name")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"the base model {name_or_path} is a {kind}; choose a model with one of these: {known}.")
    return kind


def check_patches(pixels: int, resolution: int, flag: str = "resolution") -> None:
    """Reject a side in pixels that is not a multiple of that of the denoiser's patches.

    Args:
        pixels: side of a patch in pixels. flag: that gives ``resolution``, for the message.

    Raises:
        InputError
    """
    if resolution % pixels:
        nearest = max(pixels, round(resolution / pixels) * pixels)
        raise InputError(
            f"--{flag} {resolution} is not a multiple of {pixels}, as this base model needs; use {nearest}."
        )


PROMPT_CHUNKS_HELP = "read up to N x 75 tokens of a prompt, in N chunks (Stable Diffusion 1.x, 2.x and XL); default: 1"
"""Of ``--max_prompt_chunks``."""


def check_prompt_chunks(family: "Family", name: str | None, chunks: int) -> None:
    """Reject ``--max_prompt_chunks`` for a family that has no use for it.

    Raises:
        InputError
    """
    if chunks > 1 and not family.CHUNKS_PROMPTS:
        raise InputError(
            f"--max_prompt_chunks {chunks} is for Stable Diffusion 1.x, 2.x and XL, which {name} is not; leave it out: "
            "T5 or a language model reads the long prompts of other models."
        )


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


def plain_name(name: str) -> str:
    """The name of a weight in every version of diffusers and transformers: CLIP's may begin with ``text_model``."""
    parts = [LEGACY_NAMES.get(part, part) for part in name.removeprefix("text_model.").split(".")]
    return ".".join(parts)
