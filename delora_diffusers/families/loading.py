"""Open a base model and load its parts one at a time, so that only what is needed now takes memory."""

import dataclasses
import gc
import importlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from delora_diffusers.errors import LOADING_ERRORS, InputError
from delora_diffusers.families.checks import (
    COMPONENTS,
    NOT_STORED,
    WEIGHTS,
    check_model_folder,
    is_single_file,
    known_class,
    plain_name,
)
from delora_diffusers.families.family import Family
from delora_diffusers.families.pipeline_files import (
    configurations_folder,
    folder_with_weights,
    loading_error,
    open_file,
    pipeline_folder,
    quiet,
)
from delora_diffusers.families.prediction import set_prediction
from delora_diffusers.families.table import family_of
from delora_diffusers.text_files import read_json

if TYPE_CHECKING:
    from delora_diffusers.families.single_file import SingleFile


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A base model whose parts are loaded when they are needed, and dropped when they are not.

    Attributes:
        name: as the user gave it; None for the included miniature.
        folder: of the pipeline; a hub id has been downloaded.
        variant: of the weight files.
        pipeline: diffusers' pipeline with the tokenizers and the scheduler; its models are None until they are loaded.
        skeletons: each model on the meta device: its modules, shapes and configuration without values.
        file: the checkpoint, if the base model is a single file. The folder then has its configuration.
        in_file: the models whose weights are in that file; those of the others are in the folder.
    """

    name: str | None
    folder: Path
    variant: str | None
    pipeline: Any
    skeletons: dict[str, Any]
    file: "SingleFile | None" = None
    in_file: Sequence[str] = ()

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(type(self.pipeline).__name__)

    @property
    def text_encoders(self) -> list[str]:
        """The names of the text encoders that the model has."""
        return [name for name in self.family.TEXT_ENCODERS if name in self.skeletons]

    @property
    def trainable_encoders(self) -> list[str]:
        """The names of those text encoders that can be trained."""
        return [name for name in self.text_encoders if name in self.family.TRAINABLE_ENCODERS]

    @property
    def patch_pixels(self) -> int:
        """Side in pixels of the denoiser's patches."""
        return self.family.PATCH * self.family.latent_shape(self.skeletons["vae"].config)[1]

    def load(
        self, component: str, dtype: torch.dtype, device: torch.device | str = "cpu", quantization: Any = None
    ) -> Any:
        """Load one model into the pipeline, straight in this dtype, frozen.

        Args:
            component: one of ``COMPONENTS``.
            quantization: diffusers' configuration for a quantized model, or None.

        Raises:
            InputError: its files are damaged.
        """
        options: dict[str, Any] = {"subfolder": component, "torch_dtype": dtype, "variant": self.variant_of(component)}
        kind = type(self.skeletons[component])
        missing: list[str] = []
        if quantization is not None:
            # Quantizing is done on the device, weight by weight, which a map of devices asks for.
            options |= {"quantization_config": quantization, "device_map": {"": torch.device(device)}}
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchao's, about what is not used here
                if self.file is not None and component in self.in_file:
                    from delora_diffusers.families.single_file import load_part

                    skeleton = self.skeletons[component]
                    model = load_part(self.file, component, skeleton, self.folder, dtype, quantization, device)
                else:
                    model, loaded = kind.from_pretrained(str(self.folder), **options, output_loading_info=True)
                    missing = [name for name in loaded["missing_keys"] if not name.endswith(NOT_STORED)]
        except (*LOADING_ERRORS, StrictDataclassError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise loading_error(self.name, self.variant, error) from error
        missing += [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise InputError(
                f"the base model {self.name} has no weight {min(missing)} in its {component}; choose another."
            )
        model.requires_grad_(False)
        if quantization is None:
            # T5 overflows in fp16, so transformers keeps a part of it in float32.
            model.to(device, None if getattr(model, "_keep_in_fp32_modules", None) else dtype)
        setattr(self.pipeline, component, model)
        return model

    def drop(self, *components: str) -> None:
        """Free the memory of these models, wherever they are."""
        for component in components:
            setattr(self.pipeline, component, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def variant_of(self, component: str) -> str | None:
        """The variant, if this model's weights have it."""
        files = (WEIGHTS.fullmatch(path.name) for path in (self.folder / component).glob("*"))
        return self.variant if any(match and match["variant"] == self.variant for match in files) else None


def open_model(
    name_or_path: str | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    with_weights: bool = True,
    pickles: bool = True,
) -> OpenModel:
    """Open a base model without loading its weights.

    Args:
        name_or_path: a pipeline folder, a hub id, or a single file here or on the hub; None or ``"mini-sd"`` for the
            included miniature.
        model_config: of a single file: the pipeline folder or hub id with its configuration, its tokenizers, and the
            weights that the file lacks; None for the configuration of Stable Diffusion that the file looks like.
        prediction_type, rescale_betas_zero_snr: what the denoiser was trained with, if neither the scheduler's
            configuration nor the file says it.
        with_weights: otherwise those of a model on the hub are not downloaded, and no part can be loaded.
        pickles: see ``pipeline_files.pipeline_folder``.

    Raises:
        InputError: it is not a complete pipeline, cannot be downloaded, or its configuration asks for something that is
            not supported.
    """
    file, tokenizers = None, {}
    if is_single_file(name_or_path):
        file, folder, tokenizers = open_file(str(name_or_path), revision, variant, model_config, with_weights)
        prediction_type = prediction_type or file.prediction_type
        rescale_betas_zero_snr = file.zero_snr if rescale_betas_zero_snr is None else rescale_betas_zero_snr
    elif with_weights:
        check_model_folder(name_or_path, variant, model_config)
        folder = pipeline_folder(name_or_path, revision=revision, variant=variant, pickles=pickles)
    else:
        folder = configurations_folder(name_or_path, revision)
    kind = known_class(name_or_path, folder / "model_index.json")
    from diffusers import DiffusionPipeline

    # This logger warns about "modules that should be kept in float32: []" at every cast.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    try:
        with quiet():
            skeletons, unused = _skeletons(folder), _unused(folder)
            parts: dict[str, Any] = unused | skeletons | {"safety_checker": None, "requires_safety_checker": False}
            pipeline: Any = DiffusionPipeline.from_pretrained(folder, **parts, **tokenizers)
    except (*LOADING_ERRORS, StrictDataclassError) as error:
        raise loading_error(name_or_path, variant, error) from error
    family, in_folder, in_file = family_of(kind), skeletons, []
    if file is not None:
        from delora_diffusers.families.single_file import check_parts

        in_file = check_parts(file, family.DENOISER, skeletons)
        in_folder = {name: skeleton for name, skeleton in skeletons.items() if name not in in_file}
        if in_folder and with_weights:
            folder = folder_with_weights(in_folder, in_file, folder, file.name, model_config, variant)
    problem = _unsupported(family, skeletons) or _incomplete(in_folder, folder)
    if problem is not None:
        raise InputError(f"the base model {name_or_path} {problem}; choose another.")
    _limit_prompts(pipeline, family, name_or_path)
    if not family.IS_FLOW:
        set_prediction(pipeline, name_or_path, prediction_type, rescale_betas_zero_snr)
    elif prediction_type is not None or rescale_betas_zero_snr:
        flag = "--prediction_type" if prediction_type is not None else "--rescale_betas_zero_snr"
        raise InputError(f"{flag} does not apply to {name_or_path}, which is a flow model; leave it out.")
    for component in skeletons:
        setattr(pipeline, component, None)
    return OpenModel(name_or_path, folder, variant, pipeline, skeletons, file, in_file)


def load_pipeline(name_or_path: str | None, *, revision: str | None = None, variant: str | None = None) -> Any:
    """Load a complete pipeline on the CPU, in float32.

    Raises:
        InputError: see ``open_model``.
    """
    model = open_model(name_or_path, revision=revision, variant=variant)
    for component in model.skeletons:
        model.load(component, torch.float32)
    return model.pipeline


def _skeletons(folder: Path) -> dict[str, Any]:
    """The models of a pipeline folder on the meta device, without reading their weights."""
    skeletons = {}
    for component, entry in read_json(folder / "model_index.json").items():
        if component not in COMPONENTS or entry is None or entry[0] is None:
            continue
        library, name = entry
        kind = getattr(importlib.import_module(library), name)
        with torch.device("meta"):
            if library == "diffusers":
                skeletons[component] = kind.from_config(kind.load_config(folder, subfolder=component))
            else:
                skeletons[component] = kind(kind.config_class.from_pretrained(folder, subfolder=component))
    return skeletons


def _unused(folder: Path) -> dict[str, None]:
    """The optional parts that a pipeline does not have, by name. Diffusers needs to be given some of them as None."""
    index = read_json(folder / "model_index.json")
    return {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}


def _unsupported(family: Family, skeletons: dict[str, Any]) -> str | None:
    """What the configuration of a model asks for that diffusers' pipeline or this project would ignore."""
    missing = [name for name in (family.DENOISER, "vae", *family.TEXT_ENCODERS[:1]) if name not in skeletons]
    if missing:
        return f"has no {missing[0]}"
    for name, model in skeletons.items():
        if getattr(model.config, "quantization_config", None) is not None:
            return f"has a quantized {name}, whose weights cannot be adapted"
    return family.unsupported(skeletons[family.DENOISER].config, skeletons["vae"].config)


def _incomplete(skeletons: dict[str, Any], folder: Path) -> str | None:
    """What is missing in the weight files of a folder; None if nothing is.

    Language models may have other names in their files, or share weights; what they lack is found when they are loaded.
    """
    from delora_diffusers.files.reading import visible_weights, weight_names

    for component, model in skeletons.items():
        if not (hasattr(model, "load_config") or type(model).__name__.startswith("CLIP")):
            continue
        stored = {plain_name(name) for name in weight_names(folder / component)}
        if not stored and list(visible_weights(folder / component)):
            return f"has weights in {folder / component} that cannot be read, so download it again"
        names = [plain_name(name) for name in model.state_dict()]
        missing = [name for name in names if name not in stored and not name.endswith(NOT_STORED)] if stored else []
        if missing:
            return f"has no weight {missing[0]} in {folder / component}, nor {len(missing) - 1} others"
    return None


def _limit_prompts(pipeline: Any, family: Family, name: str | None) -> None:
    """Give every CLIP tokenizer the length that its text encoder reads: some files name none, or a longer one.

    Raises:
        InputError: a tokenizer does not distinguish words, because its vocabulary is missing.
    """
    for component in family.TEXT_ENCODERS:
        tokenizer, encoder = (
            getattr(pipeline, part, None) for part in (component.replace("text_encoder", "tokenizer"), component)
        )
        if tokenizer is None or encoder is None:
            continue
        if component in family.TRAINABLE_ENCODERS:
            own, longest = tokenizer.model_max_length, encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(own, longest) if isinstance(own, int) and own > 2 else longest
        words = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        if words("dog").input_ids == words("cat").input_ids:
            raise InputError(f"the base model {name} has a tokenizer without vocabulary; download it again.")
