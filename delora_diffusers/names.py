"""Names that several packages share: files in an output folder, model names, hub ids. Imports no torch."""

import re
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from urllib.parse import unquote

WEIGHTS_NAME = "pytorch_delora_weights.safetensors"
"""The adapter in an output folder. It is written last, so a run that has it is finished."""
METADATA_KEY = "delora_diffusers"
"""The entry of an adapter file's header that contains its settings as JSON."""
CONFIG_NAME = "config.json"
"""The flags, versions and results of a training run."""
METADATA_NAME = "metadata.jsonl"
"""Captions or prompts of the images in a folder, one JSON object per line (the imagefolder convention)."""
CONTACT_SHEET_NAME = "contact_sheet.png"
"""The overview that generate writes beside its images."""
CHECKPOINT_PREFIX = "checkpoint-"
BEST_FOLDER = "best"
"""The folder in an output folder that has the best adapter of a run."""
BEST_WEIGHTS_NAME = "best.safetensors"
"""In a checkpoint, a copy of the best adapter of the steps before it."""
NOT_UPLOADED = ("checkpoint-*", ".*", "*/.*", "logs/*", "class_images/*", "cache/*")
"""Patterns of what stays here when a run is uploaded to the hub."""

INSTANCE = "{instance}"
"""Stands for the subject's name in prompts and captions of a training."""
MINIATURE = "mini-sd"
"""The base model that ships with the repository; the default."""
SD_PIPELINE, SDXL_PIPELINE = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
FAMILIES = {
    SD_PIPELINE: "sd",
    SDXL_PIPELINE: "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "ZImagePipeline": "zimage",
    "QwenImagePipeline": "qwenimage",
}
"""The model family by the class of its pipeline; each has a file in ``families``."""


PREDICTION_TYPES = ("epsilon", "v_prediction")
"""What the denoiser of a DDPM predicts; diffusers' names."""


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


class HubFile(NamedTuple):
    """A file in a repository on the hub; the revision is that of its address, if it has one."""

    repo_id: str
    path: str
    revision: str | None


def hub_file(name: str) -> HubFile | None:
    """The file that ``owner/model/FILE.safetensors`` or its address on huggingface.co names; None for other names."""
    address = re.fullmatch(
        r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:blob|resolve|raw)/([^/?#]+)/([^?#]+)(?:[?#].*)?",
        name,
    )
    if address:
        repo_id, revision, path = address[1], unquote(address[2]), unquote(address[3])
    else:
        plain = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)/([^:?#\\]+)", name)
        if not plain:
            return None
        repo_id, revision, path = plain[1], None, plain[2]
    return HubFile(repo_id, path, revision) if path.endswith(".safetensors") and stays_inside(path) else None


def recorded_model_name(name_or_path: str) -> str:
    """A base model as an adapter records it: a hub id as it is, a local path so that it is found from anywhere."""
    is_local = not is_miniature(name_or_path) and Path(name_or_path).exists()
    return str(Path(name_or_path).resolve()) if is_local else name_or_path


def stays_inside(path: str) -> bool:
    """Whether a path that a file gives, relative to a folder, stays in that folder on every system."""
    parts = PureWindowsPath(path).parts  # Windows separates at both slashes
    return bool(parts) and ".." not in parts and "\0" not in path and not re.match(r"[/\\]|[A-Za-z]:[/\\]", path)


def is_folder_name(name: str) -> bool:
    """Whether a name that a file gives can be the name of a new folder: one visible part of a path."""
    parts = PureWindowsPath(name).parts
    return len(parts) == 1 and stays_inside(name) and name.isprintable() and name[0] != "." and len(name) <= 100


CHECKPOINT_SIZES, CHECKPOINT_STATE = "sizes.json", "random_states_0.pkl"
"""Files of a checkpoint from which training can continue: the size of every file (earlier versions do not write it),
and the state of the first process's random numbers."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints from which a training run can continue, oldest first."""
    names = (CHECKPOINT_SIZES, CHECKPOINT_STATE)
    return [path for path in checkpoint_folders(output_dir) if any((path / name).is_file() for name in names)]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders of complete checkpoints, also of those that contain only the adapter, oldest first."""
    folders = [path for path in output_dir.glob(CHECKPOINT_PREFIX + "*") if path.is_dir() and is_checkpoint(path)]
    return sorted(folders, key=checkpoint_step)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a complete checkpoint."""
    return re.fullmatch(f"{CHECKPOINT_PREFIX}[0-9]+", folder.name) is not None


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))
