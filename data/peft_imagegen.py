"""The data of PEFT's image benchmark as folders that this project takes.

``python -m data.peft_imagegen PEFT OUT`` reads ``method_comparison/image-gen/default_training_params.json`` of a clone
of PEFT and the dataset that it names, and writes ``OUT/train``, ``OUT/valid`` and ``OUT/test``, each with its photos
and captions, ``OUT/test_prompts.txt`` and ``OUT/drift_prompts.txt``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from delora_diffusers.atomic import atomic_folder, write_text
from delora_diffusers.errors import LOADING_ERRORS, InputError, reason
from delora_diffusers.json_lines import write_json_lines
from delora_diffusers.names import METADATA_NAME
from delora_diffusers.outputs import check_new
from delora_diffusers.text_files import read_json

PARAMETERS = Path("method_comparison") / "image-gen" / "default_training_params.json"
KEYS = ("dataset_id", "dataset_split", "image_column", "valid_size", "test_size", "instance_prompts")


def read_parameters(peft: Path) -> dict[str, Any]:
    """The benchmark's parameters.

    Raises:
        InputError: the folder is no clone of PEFT, or the file has no list of prompts.
    """
    file = peft / PARAMETERS
    if not file.is_file():
        raise InputError(f"{file} is missing; give a clone of https://github.com/huggingface/peft.")
    parameters = read_json(file)
    missing = [key for key in KEYS if not isinstance(parameters, dict) or key not in parameters]
    if missing or not isinstance(parameters["instance_prompts"], list):
        raise InputError(f"{file} has no {(missing or ['list of instance_prompts'])[0]}; use another version of PEFT.")
    return parameters


def split(count: int, valid: int, test: int) -> dict[str, list[int]]:
    """The rows of each part, as PEFT's ``data.py`` shuffles them.

    Raises:
        InputError: there are too few rows.
    """
    if count <= valid + test:
        raise InputError(f"the dataset has {count} photos, too few for {valid} to validate and {test} to test with.")
    indices = np.arange(count)
    np.random.RandomState(0).shuffle(indices)
    train = count - valid - test
    parts = {"train": indices[:train], "valid": indices[train : train + valid], "test": indices[train + valid :]}
    return {name: [int(index) for index in rows] for name, rows in parts.items()}


def write(peft: Path, folder: Path) -> None:
    """Write the three parts and the prompts.

    Raises:
        InputError: see ``read_parameters`` and ``split``; or the dataset cannot be loaded, or has another length.
    """
    import datasets

    parameters = read_parameters(peft)
    name, captions = parameters["dataset_id"], parameters["instance_prompts"]
    try:
        dataset: Any = datasets.load_dataset(name, split=parameters["dataset_split"])
        images = dataset[parameters["image_column"]]
    except (*LOADING_ERRORS, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"the dataset {name} could not be loaded ({reason(error)}).") from error
    if len(images) != len(captions):
        raise InputError(
            f"{name} has {len(images)} photos, but PEFT lists {len(captions)} prompts; use another version."
        )
    parts = split(len(images), parameters["valid_size"], parameters["test_size"])
    with atomic_folder(folder) as temporary:
        for part, rows in parts.items():
            (temporary / part).mkdir()
            for row in rows:
                ImageOps.exif_transpose(images[row].convert("RGB")).save(temporary / part / f"{row:02}.png")
            lines = [{"file_name": f"{row:02}.png", "text": captions[row]} for row in rows]
            write_json_lines(temporary / part / METADATA_NAME, lines)
        write_text(temporary / "test_prompts.txt", "".join(f"{captions[row]}\n" for row in parts["test"]))
        drift = parameters.get("drift_image_prompts", [])
        write_text(temporary / "drift_prompts.txt", "".join(f"{prompt}\n" for prompt in drift))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.peft_imagegen", description=__doc__)
    parser.add_argument("peft", type=Path, help="a clone of PEFT")
    parser.add_argument("folder", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        check_new(options.folder, "folder")
        write(options.peft, options.folder)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
