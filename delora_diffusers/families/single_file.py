"""Base models in one ``.safetensors`` file: what it contains, and its parts as diffusers' models.

Diffusers' converters do the renaming. They are run once on tensors without values, of the shapes in the file's header,
to find what is missing before anything is loaded, and then on the tensors of one part at a time.
"""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_model
from diffusers.loaders import single_file_utils as converters
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from diffusers.quantizers import DiffusersAutoQuantizer
from safetensors import safe_open
from torch import Tensor

from delora_diffusers.errors import LOADING_ERRORS, InputError, reason
from delora_diffusers.families.checks import NOT_STORED, check_single_file, plain_name
from delora_diffusers.families.clip_tokenizer import END, clip_tokenizer
from delora_diffusers.files.headers import safetensors_header
from delora_diffusers.files.reading import MAX_DIMENSIONS
from delora_diffusers.names import hub_file

CONFIGURATIONS = Path(__file__).parent / "configurations"
"""Pipeline folders without weights and tokenizers."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LOADABLE = (torch.float32, torch.float16, torch.bfloat16)

PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": (converters.LDM_UNET_KEY,),
    "vae": tuple(converters.LDM_VAE_KEYS),
    "text_encoder": (
        *converters.LDM_CLIP_PREFIX_TO_REMOVE,
        "cond_stage_model.model.",
        "conditioner.embedders.0.model.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
"""How the names of a part begin in checkpoints with a UNet."""
OTHER_MODELS = {
    "inpainting": "an inpainting model",
    "inpainting_v2": "an inpainting model",
    "xl_inpaint": "an inpainting model",
    "xl_refiner": "the refiner of Stable Diffusion XL",
    "upscale": "an upscaler",
    "instruct-pix2pix": "an InstructPix2Pix model, which edits images",
    "playground-v2-5": "Playground 2.5, whose noise schedule is EDM's",
}
"""Diffusers' names of models that are not trained here, whatever configuration is given."""
TRANSFORMERS = ("sd3", "sd35", "flux-dev", "flux-schnell", "flux-2", "z-image")
"""How diffusers' names of models with a transformer begin that can be trained here."""


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """A checkpoint whose tensors are read when they are needed.

    Attributes:
        name: as the user gave it.
        path: the file; None if only its header was downloaded.
        tensors: by their names in the file, on the meta device. metadata: of the file.
    """

    name: str
    path: Path | None
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def read(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of the file, mapped into memory and not copied."""
        assert self.path is not None
        with safe_open(self.path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}

    @property
    def prediction_type(self) -> str | None:
        """What the file says that its denoiser predicts; see ``modelspec`` and the marks of v-prediction models."""
        recorded = self.metadata.get("modelspec.prediction_type", "").lower()
        if recorded in ("v", "v_prediction") or "v_pred" in self.tensors:
            return "v_prediction"
        return "epsilon" if recorded == "epsilon" else None

    @property
    def zero_snr(self) -> bool | None:
        """Whether the file says that its schedule has a terminal SNR of zero."""
        return True if "ztsnr" in self.tensors else None


def open_single_file(name: str, revision: str | None = None, with_weights: bool = True) -> SingleFile:
    """Read the header of a checkpoint here or on the hub.

    Args:
        with_weights: otherwise only the header of a file on the hub is downloaded.

    Raises:
        InputError: it is not a safetensors file, cannot be downloaded, or is not a text-to-image model.
    """
    path: Path | None = Path(name)
    if not path.is_file():
        path = _download(name, revision, with_weights)
    if path is None:
        shapes, metadata = _remote_header(name, revision)
    else:
        check_single_file(path)
        safetensors_header(path, "a base model")
        try:
            with safe_open(path, framework="pt") as opened:
                pieces = ((key, opened.get_slice(key)) for key in opened.keys())  # noqa: SIM118
                shapes = {key: (piece.get_dtype(), piece.get_shape()) for key, piece in pieces}
                metadata = opened.metadata() or {}
        except LOADING_ERRORS as error:
            raise InputError(f"{name} is damaged ({reason(error)}); download it again.") from error
    deep = next((key for key, (_, shape) in shapes.items() if len(shape) > MAX_DIMENSIONS), None)
    if deep is not None:
        raise InputError(f"{name} has {deep} with {len(shapes[deep][1])} dimensions; give a base model.")
    tensors = {
        key: torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
        for key, (dtype, shape) in shapes.items()
    }
    file = SingleFile(name, path, tensors, metadata)
    kind = _inferred(file)
    if kind in OTHER_MODELS:
        raise InputError(f"{name} is {OTHER_MODELS[kind]}, not a text-to-image model; choose another base model.")
    if "edm_vpred.sigma_max" in tensors:
        raise InputError(f"{name} was trained with EDM's noise schedule, which is not supported; choose another.")
    return file


def shipped_configuration(file: SingleFile) -> Path:
    """The folder with the configuration of Stable Diffusion 1.x, 2.x or XL, by the names and shapes in a file.

    Raises:
        InputError: the file is none of these.
    """
    kind = _inferred(file)
    cross = file.tensors.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if kind == "v1" and cross is not None and cross.shape[-1] == 768:
        return CONFIGURATIONS / "sd1"
    if kind == "v2":
        return CONFIGURATIONS / ("sd2-v" if _is_v2_with_v_prediction(file) else "sd2-base")
    if kind == "xl_base":
        return CONFIGURATIONS / "sdxl"
    raise InputError(f"{file.name} {_described(file, kind)}.")


def shipped_tokenizers(configuration: Path) -> dict[str, Any]:
    """The tokenizers that belong to ``shipped_configuration``, by component."""
    if configuration.name == "sdxl":
        return {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    return {"tokenizer": clip_tokenizer("!" if configuration.name.startswith("sd2") else END)}


def converted(component: str, skeleton: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of a file that belong to a part, under the names of diffusers' model; empty if there are none.

    Args:
        component: the part's name in the pipeline. skeleton: its model. tensors: of the file.
    """
    names = {plain_name(name): name for name in skeleton.state_dict()}
    selected = part_of_file(component, skeleton, tensors)
    if not selected:
        return {}
    if names.keys() <= selected.keys():  # a file in diffusers' names
        renamed: Mapping[str, Tensor] = selected
    elif not hasattr(skeleton, "load_config"):
        prefix = next(p for p in PREFIXES[component] if any(name.startswith(p) for name in selected))
        if prefix.endswith(".model."):
            renamed = converters.convert_open_clip_checkpoint(skeleton, selected, prefix)
        else:
            renamed = converters.convert_ldm_clip_checkpoint(selected)
    else:
        loadable: Any = single_file_model._get_single_file_loadable_mapping_class(type(skeleton))
        if loadable is None:
            return {}
        convert: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[loadable]["checkpoint_mapping_fn"]
        renamed = convert(checkpoint=selected, config=dict(skeleton.config))
    return {names[plain_name(n)]: tensor for n, tensor in renamed.items() if plain_name(n) in names}


def part_of_file(component: str, skeleton: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a file that belong to a part, by their names in the file; empty if there are none."""
    if component == "transformer":
        inner = {name: tensor for name, tensor in tensors.items() if name.startswith(converters.LDM_UNET_KEY)}
        return inner or dict(tensors)
    for prefix in PREFIXES.get(component, ()):
        selected = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if selected:
            return selected
    if component == "unet" and {plain_name(name) for name in skeleton.state_dict()} <= tensors.keys():
        return dict(tensors)
    return {}


def check_parts(file: SingleFile, denoiser: str, skeletons: Mapping[str, Any]) -> list[str]:
    """The parts that a file contains, each of them complete.

    Of models with a transformer, only that is read from the file: the autoencoder and the text encoders, which have
    other names in every tool, come from ``--model_config``.

    Raises:
        InputError: a part lacks a weight, or has one of another shape, or the denoiser is missing.
    """
    parts = []
    for component, skeleton in skeletons.items():
        if denoiser == "transformer" and component != denoiser:
            continue
        try:
            tensors = converted(component, skeleton, file.tensors)
        except LOADING_ERRORS as error:
            raise InputError(
                f"the {component} in {file.name} is not that of its configuration ({reason(error)}); give the pipeline "
                "that it was made from with --model_config."
            ) from error
        if not tensors and component != denoiser:
            continue
        problem = _misfit(skeleton, tensors)
        if problem is not None:
            raise InputError(
                f"{file.name} {problem} its {component}; give a complete text-to-image model, or the pipeline that it "
                "was made from with --model_config."
            )
        parts.append(component)
    return parts


def _misfit(skeleton: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """What keeps tensors of a file from being the weights of a model."""
    for name, weight in skeleton.state_dict().items():
        if name not in tensors:
            if name.endswith(NOT_STORED):
                continue
            return f"has no weight {name} for" if tensors else "has no weights for"
        if tensors[name].shape != weight.shape:
            return f"has {name} of shape {tuple(tensors[name].shape)} instead of {tuple(weight.shape)} for"
        if tensors[name].dtype not in LOADABLE:
            return f"stores {name} as neither fp32, fp16 nor bf16 for"
    return None


def load_part(
    file: SingleFile,
    component: str,
    skeleton: Any,
    folder: Path,
    dtype: torch.dtype,
    quantization: Any = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load one part of a file, straight in this dtype.

    Args:
        folder: with the pipeline's configurations.
        quantization: diffusers' configuration for a quantized model, or None. device: of such a model.
    """
    tensors = converted(component, skeleton, file.read(part_of_file(component, skeleton, file.tensors)))
    kind = type(skeleton)
    if quantization is not None:
        return _quantized(skeleton, tensors, dtype, quantization, torch.device(device))
    if hasattr(skeleton, "load_config"):
        settings = {"config": str(folder), "subfolder": component, "torch_dtype": dtype}
        return kind.from_single_file(tensors, **settings)
    return kind.from_pretrained(None, config=copy.deepcopy(skeleton.config), state_dict=tensors, torch_dtype=dtype)


def _quantized(
    skeleton: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, quantization: Any, device: torch.device
) -> Any:
    """Quantize a model weight by weight while it is loaded.

    This is what ``from_pretrained`` does. ``from_single_file`` expects weights that are quantized already, and would
    leave these as they are.
    """
    quantizer: Any = DiffusersAutoQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.validate_environment(torch_dtype=dtype, device_map={"": device})
    dtype = quantizer.update_torch_dtype(dtype)
    with init_empty_weights():
        model = type(skeleton).from_config(skeleton.config)
    keep = getattr(quantizer, "use_keep_in_fp32_modules", False) and model._keep_in_fp32_modules
    settings: dict[str, Any] = {"device_map": {"": device}, "keep_in_fp32_modules": keep or []}
    quantizer.preprocess_model(model=model, **settings)
    load_model_dict_into_meta(
        model, OrderedDict(tensors), dtype=dtype, hf_quantizer=quantizer, unexpected_keys=[], **settings
    )
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model.eval()


def dtype_of_part(file: SingleFile, component: str, skeleton: Any) -> torch.dtype:
    """The dtype that holds every weight of a part without rounding."""
    dtypes = {tensor.dtype for tensor in converted(component, skeleton, file.tensors).values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _inferred(file: SingleFile) -> str | None:
    """Diffusers' name of the kind of model; ``v1`` for everything that it does not know."""
    try:
        return converters.infer_diffusers_model_type(file.tensors)
    except (*LOADING_ERRORS, NameError):
        return None


def _is_v2_with_v_prediction(file: SingleFile) -> bool:
    """Whether a Stable Diffusion 2.x is the one for 768 pixels, which predicts v.

    Both have the same shapes. If the file does not say it, a bias that differs much between them does, as ComfyUI has
    found (``SD20.model_type`` in its ``supported_models.py``).
    """
    if file.prediction_type is not None:
        return file.prediction_type == "v_prediction"
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if file.path is None or name not in file.tensors:
        return True
    return file.read({name: None})[name].float().std(correction=0).item() > 0.09


def _described(file: SingleFile, kind: str | None) -> str:
    """Why a file is not a base model that is recognised, and the remedy."""
    names = file.tensors.keys()
    if kind is not None and kind.startswith(TRANSFORMERS):
        repository = converters.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        return (
            "contains a transformer without configuration and text encoders; give the pipeline that has them with "
            f"--model_config, for example {repository}"
        )
    if any(name.startswith(("down_blocks.", "transformer_blocks.", "conv_in.")) for name in names):
        return "contains a denoiser under diffusers' names; give the pipeline that it belongs to with --model_config"
    if not any(name.startswith(converters.LDM_UNET_KEY) for name in names):
        return "contains no denoiser, so it is not a base model; give a complete text-to-image model"
    return (
        "is not recognised as Stable Diffusion 1.x, 2.x or XL; give the pipeline that has its configuration with "
        "--model_config"
    )


def _download(name: str, revision: str | None, with_weights: bool) -> Path | None:
    """A file of the hub; None if it is not here and only its header is needed."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    remote = hub_file(name)
    assert remote is not None
    arguments: dict[str, Any] = {"revision": remote.revision or revision}
    try:
        cached = try_to_load_from_cache(remote.repo_id, remote.path, **arguments)
        if not with_weights:
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(remote.repo_id, remote.path, **arguments))
    except LOADING_ERRORS as error:
        raise _not_found(name, error) from error


def _remote_header(name: str, revision: str | None) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    from huggingface_hub import HfApi

    remote = hub_file(name)
    assert remote is not None
    try:
        header = HfApi().parse_safetensors_file_metadata(
            remote.repo_id, remote.path, revision=remote.revision or revision
        )
    except LOADING_ERRORS as error:
        raise _not_found(name, error) from error
    return {key: (entry.dtype, list(entry.shape)) for key, entry in header.tensors.items()}, dict(header.metadata)


def _not_found(name: str, error: Exception) -> InputError:
    return InputError(
        f"the base model {name} is not a file here and cannot be downloaded ({reason(error)}); give "
        "--pretrained_model_name_or_path a file, a pipeline folder or a hub id."
    )
