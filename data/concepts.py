"""The concepts of an adapter: one, given by flags, or several from a YAML file; each has photos and prompts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.captions import with_instance
from data.photographs import Masks, Photo, find_photographs
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import list_images
from delora_diffusers.text_files import as_int, read_json, read_yaml


@dataclasses.dataclass(frozen=True)
class Concept:
    """Photos that share their prompts.

    Attributes:
        photographs: at least one photo.
        instance_prompt: for photos without a caption.
        instance_name: replaces ``{instance}`` in prompts and captions.
        class_prompt: for prior preservation and output preservation.
        class_data_dir: folder of class images; without it they go to the output folder.
        repeats: how often each photo is seen, relative to those of other concepts.
        weight: of the loss on its photos.
    """

    photographs: list[Photo]
    instance_data_dir: Path
    instance_prompt: str | None = None
    instance_name: str | None = None
    class_prompt: str | None = None
    class_data_dir: Path | None = None
    repeats: int = 1
    weight: float = 1.0

    @property
    def prompts(self) -> list[str]:
        """The prompt for each photo.

        Raises:
            InputError: a photo has neither a caption nor an ``instance_prompt``, or a template has no name.
        """
        prompts = []
        for photo in self.photographs:
            text = photo.caption or self.instance_prompt
            if not (text or "").strip():
                raise InputError(
                    f"{photo.path} has no caption; give --instance_prompt, for example 'a photo of sks dog'."
                )
            source = f"the caption of {photo.path}" if photo.caption else "--instance_prompt"
            prompts.append(with_instance(text or "", self.instance_name, source))
        return prompts

    def check_prompts(self) -> None:
        """Reject photos without a prompt; see ``prompts``."""
        len(self.prompts)

    def class_images(self) -> list[Path]:
        """The images that its folder of class images contains; none without a folder."""
        folder = self.class_data_dir
        return [] if folder is None or not folder.is_dir() else list_images(folder)


TEXTS = ("instance_data_dir", "instance_prompt", "instance_name", "class_prompt", "class_data_dir", "mask_data_dir")
NUMBERS = ("repeats", "weight")
EXAMPLE = "- {instance_data_dir: photos/dog, instance_prompt: a photo of sks dog}"


def read_concepts(file: Path, defaults: Mapping[str, Any], use_masks: bool) -> list[Concept]:
    """Read concepts from a YAML (or JSON) file: a list of mappings.

    Args:
        file: its folders are relative to the working directory, like those of flags.
        defaults: values for what a concept does not give, by key.
        use_masks: whether masks beside photos weight the loss.

    Raises:
        InputError: the file is missing, or a concept is not such a mapping or has no usable photos.
    """
    if not file.is_file():
        raise InputError(f"--concepts_list {file} is not a file; write a YAML file with a list of concepts.")
    records = read_json(file) if file.suffix.lower() == ".json" else read_yaml(file)
    if not isinstance(records, list) or not records:
        raise InputError(f"--concepts_list {file} is not a list of concepts; write lines like {EXAMPLE}")
    concepts = []
    for number, record in enumerate(records, start=1):
        where = f"concept {number} of {file}"
        values = dict(defaults) | _checked(record, where)
        if not values.get("instance_data_dir"):
            raise InputError(f"{where} has no instance_data_dir; give the folder of its photos.")
        masks = Masks(use_masks or bool(values.get("mask_data_dir")), _path(values.pop("mask_data_dir", None)))
        folder = Path(values.pop("instance_data_dir"))
        class_folder = _path(values.pop("class_data_dir", None))
        concepts.append(
            Concept(find_photographs(folder, masks), instance_data_dir=folder, class_data_dir=class_folder, **values)
        )
    return concepts


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _checked(record: Any, where: str) -> dict[str, Any]:
    """The values of a concept, by key."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a mapping; write lines like {EXAMPLE}")
    unknown = next((key for key in record if key not in (*TEXTS, *NUMBERS)), None)
    if unknown is not None:
        raise InputError(f"{where} has an unknown key {unknown!r}; the keys are {', '.join((*TEXTS, *NUMBERS))}.")
    values: dict[str, Any] = {key: value for key, value in record.items() if value is not None}
    for key in TEXTS:
        if not isinstance(values.get(key, ""), str):
            raise InputError(f"{where} has {key} {values[key]!r}; give a text.")
    if "repeats" in values:
        values["repeats"] = as_int(values["repeats"])
        if values["repeats"] is None or not 1 <= values["repeats"] <= 1000:
            raise InputError(f"{where} has repeats {record['repeats']}; give a whole number from 1 to 1000.")
    if "weight" in values:
        values["weight"] = _number(values["weight"])
        if values["weight"] is None or not 0 <= values["weight"] <= 1e6:
            raise InputError(f"{where} has weight {record['weight']}; give a number from 0 to 1,000,000.")
    return values


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
