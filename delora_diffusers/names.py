"""Names that several packages share: files in an output folder, model names, hub ids. Imports no torch."""

from pathlib import Path

WEIGHTS_NAME = "pytorch_delora_weights.safetensors"
"""The adapter in an output folder. It is written last, so a run that has it is finished."""
CONFIG_NAME = "config.json"
"""The flags, versions and results of a training run."""
METADATA_NAME = "metadata.jsonl"
"""Captions or prompts of the images in a folder, one JSON object per line (the imagefolder convention)."""
CHECKPOINT_PREFIX = "checkpoint-"

MINIATURE = "mini-sd"
"""The base model that ships with the repository; the default."""
SD_PIPELINE, SDXL_PIPELINE = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


def is_miniature(name_or_path: str | None) -> bool:
    """Whether the model is the one that ships with the repository: no name was given, or its name."""
    return name_or_path is None or (name_or_path == MINIATURE and not Path(name_or_path).exists())


def is_xl(pipeline_class: str | None) -> bool:
    """Whether a pipeline of this class takes pooled embeddings and image sizes, like Stable Diffusion XL."""
    return pipeline_class == SDXL_PIPELINE


def may_be_hub_id(name: str) -> bool:
    """Whether a name that is not a local path could be a repository on the hub: ``owner/model`` or ``model``."""
    is_path = name.startswith(("/", ".")) or name.endswith(("/", ".safetensors")) or Path(name).is_absolute()
    return bool(name) and not is_path and name.count("/") <= 1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a training run, oldest first."""
    folders = [path for path in output_dir.glob(CHECKPOINT_PREFIX + "*") if path.is_dir() and is_checkpoint(path)]
    return sorted(folders, key=checkpoint_step)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a complete checkpoint."""
    return folder.name.startswith(CHECKPOINT_PREFIX) and folder.name.removeprefix(CHECKPOINT_PREFIX).isdigit()


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))
