"""The files of a base model, in a folder, in a single file or on the hub: found, and downloaded as far as needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora_diffusers.errors import LOADING_ERRORS, InputError, reason
from delora_diffusers.families.checks import WEIGHTS, check_model_folder, check_variant, is_single_file, known_class
from delora_diffusers.families.family import Family
from delora_diffusers.families.table import family_of
from delora_diffusers.names import MINIATURE, is_miniature
from delora_diffusers.text_files import read_json

if TYPE_CHECKING:
    from delora_diffusers.families.single_file import SingleFile

MINIATURE_FOLDER = Path(__file__).resolve().parents[2] / "data" / "miniature" / MINIATURE


def family_named(
    name_or_path: str | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
) -> Family:
    """The family of a base model; see ``model_index``."""
    index = model_index(name_or_path, revision=revision, variant=variant, model_config=model_config)
    return family_of(index["_class_name"])


def model_index(
    name_or_path: str | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
) -> dict[str, Any]:
    """The ``model_index.json`` of a base model. Of a model on the hub nothing else is downloaded.

    Raises:
        InputError: see ``loading.open_model``.
    """
    if is_single_file(name_or_path):
        _, folder, _ = open_file(str(name_or_path), revision, variant, model_config, with_weights=False)
        known_class(name_or_path, folder / "model_index.json")
        return read_json(folder / "model_index.json")
    check_model_folder(name_or_path, variant, model_config)
    file: Path | str = MINIATURE_FOLDER / "model_index.json"
    if name_or_path is not None and not is_miniature(name_or_path):
        file = Path(name_or_path) / "model_index.json"
        if not Path(name_or_path).is_dir():
            from huggingface_hub import hf_hub_download

            try:
                file = hf_hub_download(name_or_path, "model_index.json", revision=revision)
            except LOADING_ERRORS as error:
                raise loading_error(name_or_path, "", error) from error
    known_class(name_or_path, Path(file))
    return read_json(Path(file))


def pipeline_folder(
    name_or_path: str | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    pickles: bool = False,
    without: Sequence[str] = (),
) -> Path:
    """The folder of a pipeline. A hub id is downloaded.

    Args:
        pickles: whether weights may be pickles if there are none in safetensors.
        without: models that need not be downloaded.

    Raises:
        InputError: see ``loading.open_model``.
    """
    check_model_folder(name_or_path, variant)
    if name_or_path is None or is_miniature(name_or_path):
        return MINIATURE_FOLDER
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from diffusers import DiffusionPipeline

    try:
        with quiet():
            folder = DiffusionPipeline.download(
                name_or_path,
                revision=revision,
                variant=variant,
                use_safetensors=None if pickles else True,
                **{name: None for name in ("safety_checker", *without)},
            )
    except LOADING_ERRORS as error:
        raise loading_error(name_or_path, variant, error) from error
    return Path(folder)


def configurations_folder(name_or_path: str | None, revision: str | None) -> Path:
    """The folder of a pipeline; of a model on the hub, only its configurations and tokenizers are downloaded."""
    model_index(name_or_path, revision=revision)
    if name_or_path is None or is_miniature(name_or_path) or Path(name_or_path).is_dir():
        return pipeline_folder(name_or_path)
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer*/*"]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except LOADING_ERRORS as error:
        raise loading_error(name_or_path, "", error) from error


def open_file(
    name: str, revision: str | None, variant: str | None, model_config: str | None, with_weights: bool
) -> tuple["SingleFile", Path, dict[str, Any]]:
    """A single file, the folder of its configuration, and its tokenizers if that folder has none."""
    from delora_diffusers.families.single_file import open_single_file, shipped_configuration, shipped_tokenizers

    check_model_folder(name, variant, model_config)
    file = open_single_file(name, revision, with_weights)
    if model_config is not None:
        try:
            return file, configurations_folder(model_config, None), {}
        except InputError as error:
            raise InputError(f"--model_config cannot be used: {error}") from error
    folder = shipped_configuration(file)
    return file, folder, shipped_tokenizers(folder)


def folder_with_weights(
    parts: Sequence[str] | dict[str, Any],
    others: Sequence[str],
    folder: Path,
    name: str,
    model_config: str | None,
    variant: str | None,
) -> Path:
    """The folder with the weights of those parts that a single file lacks; of a hub id, only these are downloaded.

    Raises:
        InputError: it has no weights of one of them.
    """
    if model_config is not None and not Path(model_config).is_dir():
        folder = pipeline_folder(model_config, variant=variant, pickles=True, without=others)
    for part in parts:
        if not any(WEIGHTS.fullmatch(file.name) for file in (folder / part).glob("*")):
            source = "" if model_config is None else f", and neither does --model_config {model_config}"
            raise InputError(
                f"{name} has no {part}{source}; give a pipeline that has its weights with --model_config, or a "
                "complete model."
            )
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Only while loading: the user should see later warnings, such as of a truncated prompt."""
    import diffusers
    import transformers

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, verbosities):
            logger.set_verbosity(verbosity)


def loading_error(name_or_path: str | None, variant: str | None, error: Exception) -> InputError:
    if name_or_path is not None and variant is None and not Path(name_or_path).exists():
        check_variant(name_or_path, _files_on_hub(name_or_path), None)
    where = "" if name_or_path is None or Path(name_or_path).exists() else "there is no such folder here; "
    return InputError(
        f"the base model {name_or_path} could not be loaded ({where}{reason(error)}); "
        "give --pretrained_model_name_or_path a pipeline folder or hub id."
    )


def _files_on_hub(repo_id: str) -> list[str]:
    """The files of a repository; empty if they cannot be listed."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return list_repo_files(repo_id)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):  # the error that led here says what is wrong
        return []
