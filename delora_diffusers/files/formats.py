"""Write adapters in the formats of other tools, and read PEFT's DeLoRA."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from delora_diffusers.atomic import atomic_folder, atomic_write, write_text
from delora_diffusers.errors import InputError
from delora_diffusers.files.low_rank import (
    Factors,
    as_peft_delora,
    balanced,
    low_rank_factors,
    module_tensors,
    summed,
    truncated,
)
from delora_diffusers.files.original_names import in_original_layout
from delora_diffusers.files.reading import (
    FORMAT_VERSION,
    adapter_path,
    check_shapes,
    check_tensors,
    parse_config,
    read_adapter,
    read_tensors,
)
from delora_diffusers.methods import update
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import FAMILIES, METADATA_KEY, WEIGHTS_NAME, is_xl
from delora_diffusers.text_files import read_json

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "lora.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SDXL_WIDTH, SD2_WIDTH = 2048, 1024
"""Widths of the text embeddings that cross-attention reads; Stable Diffusion 1.x has 768."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Adapters as plain low-rank factors, by component and module, with their base model and its pipeline class."""

    factors: dict[str, dict[str, Factors]]
    base_model: str | None
    pipeline: str | None

    @property
    def is_sdxl(self) -> bool:
        if self.pipeline is not None:
            return is_xl(self.pipeline)
        return "text_encoder_2" in self.factors or self._width() == SDXL_WIDTH

    @property
    def family(self) -> str:
        """The base model's family.

        Raises:
            InputError: the adapter does not record it.
        """
        if self.pipeline not in FAMILIES:
            raise InputError(
                f"the adapter records {self.pipeline} as its pipeline class, and the names of a transformer's modules "
                "depend on it; save it again with pipeline='FluxPipeline', for example."
            )
        return FAMILIES[self.pipeline]

    @property
    def version(self) -> str:
        """The base model's version, as sd-scripts names it."""
        if "transformer" in self.factors:
            return {"sd3": "sd3", "flux": "flux1"}.get(self.family, self.family)
        return "sdxl_base_v1-0" if self.is_sdxl else "sd_v2" if self._width() == SD2_WIDTH else "sd_v1"

    def _width(self) -> int | None:
        unet = self.factors.get("unet", {})
        return next((factors.a.shape[1] for name, factors in unet.items() if name.endswith("attn2.to_k")), None)


def read_source(adapters: Sequence[tuple[Path, float]], rank: int | None) -> tuple[Source, dict[str, float]]:
    """The weighted sum of adapters as plain factors of at most ``rank``, and each module's relative error.

    Raises:
        InputError: a file is invalid, its update is not low-rank, it was trained on maps, or the models differ.
    """
    terms: dict[str, list[tuple[dict[str, Factors], float]]] = {}
    bases, pipelines = [], []
    for path, weight in adapters:
        file = adapter_path(path)
        header, tensors = read_adapter(file)
        if "control_encoder" in header:
            raise InputError(f"{file} was trained on maps, which other tools do not support; use it with generate.")
        bases.append(header["base_model"])
        pipelines.append(header.get("pipeline"))
        for component, values in header["config"].items():
            by_module = low_rank_factors(component, parse_config(file, values), tensors)
            terms.setdefault(component, []).append((by_module, weight))
    factors: dict[str, dict[str, Factors]] = {}
    errors = {}
    for component, component_terms in terms.items():
        for module, total in summed(component_terms).items():
            kept, error = truncated(total, rank)
            factors.setdefault(component, {})[module] = balanced(kept)
            errors[f"{component}.{module}"] = error
    return Source(factors, bases[0], pipelines[0]), errors


def long_name(component: str, module: str) -> str:
    """A module's name in other tools, which keep the ``text_model`` prefix that newer transformers omit."""
    if component.startswith("text_encoder") and not module.startswith("text_model."):
        return f"text_model.{module}"
    return module


def write_diffusers(source: Source, path: Path, dtype: torch.dtype) -> Path:
    """A file for ``pipe.load_lora_weights``: ``unet.NAME.lora_A.weight`` (k, in) and ``.lora_B.weight`` (out, k)."""
    tensors = {}
    for component, modules in source.factors.items():
        for module, factors in modules.items():
            name = f"{component}.{long_name(component, module)}"
            tensors |= {f"{name}.lora_A.weight": factors.a, f"{name}.lora_B.weight": factors.b}
    with atomic_output(path, DIFFUSERS_NAME) as file:
        _save(tensors, file, dtype, {"format": "pt"})
    return output_file(path, DIFFUSERS_NAME)


def write_kohya(source: Source, path: Path, dtype: torch.dtype) -> Path:
    """A file for AUTOMATIC1111, ComfyUI and sd-scripts.

    ``lora_unet_NAME.lora_down.weight`` (k, in), ``.lora_up.weight`` (out, k), ``.alpha`` (), with underscores for the
    dots in NAME; ``lora_te_NAME`` for the text encoder, ``lora_te1_`` and ``lora_te2_`` where a model has several.
    SDXL's UNet and transformers have the names from their original code. Alpha is the rank, so the scale alpha / rank
    is 1.

    Raises:
        InputError: a module has no name in this format.
    """
    prefixes = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te"}
    if source.is_sdxl or "transformer" in source.factors:
        prefixes |= {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors, ranks = {}, set()
    for component, modules in source.factors.items():
        if component == "transformer":
            modules = in_original_layout(source.family, modules)
        for module, factors in modules.items():
            name = long_name(component, module)
            if component == "unet" and source.is_sdxl:
                name = sgm_name(name)
            name = f"{prefixes[component]}_{name.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": factors.a, f"{name}.lora_up.weight": factors.b}
            tensors[f"{name}.alpha"] = torch.tensor(float(factors.rank))
            ranks.add(factors.rank)
    rank, version = str(max(ranks)), source.version
    metadata = {
        "ss_network_module": {"sd3": "networks.lora_sd3", "flux1": "networks.lora_flux"}.get(version, "networks.lora"),
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
    }
    with atomic_output(path, KOHYA_NAME) as file:
        _save(tensors, file, dtype, metadata)
    return output_file(path, KOHYA_NAME)


def sgm_name(module: str) -> str:
    """A UNet module's name in SDXL's original code, which numbers the blocks, three per level, consecutively."""
    per_level = 3
    for pattern, new_prefix in (
        (r"down_blocks\.(\d{1,3})\.attentions\.(\d{1,3})\.", lambda i, j: f"input_blocks.{1 + i * per_level + j}.1."),
        (r"up_blocks\.(\d{1,3})\.attentions\.(\d{1,3})\.", lambda i, j: f"output_blocks.{i * per_level + j}.1."),
        (r"mid_block\.attentions\.(\d{1,3})\.()", lambda i, j: "middle_block.1."),
    ):
        match = re.match(pattern, module)
        if match:
            numbers = [int(group or 0) for group in match.groups()]
            return new_prefix(*numbers) + module[match.end() :]
    raise InputError(f"{module} has no name in the kohya format; use --format diffusers.")


def write_peft(source: Source, path: Path, dtype: torch.dtype) -> Path:
    """A LoraConfig folder for ``PeftModel.from_pretrained``, with one subfolder per component if there are several."""
    with atomic_folder(path) as folder:
        for component, modules in source.factors.items():
            ranks = {module: factors.rank for module, factors in modules.items()}
            max_rank = max(ranks.values())
            config = {
                "peft_type": "LORA",
                "r": max_rank,
                "lora_alpha": max_rank,
                "rank_pattern": {module: rank for module, rank in ranks.items() if rank != max_rank},
                "alpha_pattern": {module: rank for module, rank in ranks.items() if rank != max_rank},
            }
            tensors = {}
            for module, factors in modules.items():
                tensors |= {f"{module}.lora_A.weight": factors.a, f"{module}.lora_B.weight": factors.b}
            _write_peft_component(folder, component, source.factors, config, tensors, dtype, source.base_model)
    return path


def write_peft_delora(adapter: Path, path: Path, dtype: torch.dtype) -> Path:
    """A DeloraConfig folder; a frozen start becomes a zero start of twice the rank, exactly.

    Raises:
        InputError: the method is not DeLoRA, or its scale is not supported by PEFT.
    """
    file = adapter_path(adapter)
    header, tensors = read_adapter(file)
    with atomic_folder(path) as folder:
        for component, values in header["config"].items():
            config = parse_config(file, values)
            if config.method != "delora" or config.weight_norm != "column":
                kind = config.method if config.method != "delora" else f"DeLoRA with weight_norm {config.weight_norm}"
                raise InputError(f"{file} is {kind}; PEFT has only DeLoRA with the column scale, so use --format peft.")
            component_tensors = {
                n.removeprefix(component + "."): t for n, t in tensors.items() if n.startswith(component + ".")
            }
            written: dict[str, Tensor] = {}
            rank = config.rank
            for module, keys in module_tensors(component_tensors).items():
                converted = as_peft_delora(config, {key: component_tensors[name] for key, name in keys.items()})
                rank = converted.pop("rank")
                written |= {f"{module}.delora_{key}": tensor for key, tensor in converted.items()}
            settings = {"peft_type": "DELORA", "r": rank, "delora_lambda": 15, "bias": "none", "module_dropout": 0.0}
            components = dict.fromkeys(header["config"])
            base = header["base_model"]
            _write_peft_component(folder, component, components, settings, written, dtype, base)
    return path


def _write_peft_component(
    folder: Path,
    component: str,
    components: Mapping[str, Any],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    base_model: str | None,
) -> None:
    subfolder = folder if len(components) == 1 else folder / component
    subfolder.mkdir(parents=True, exist_ok=True)
    modules = sorted({name.rpartition(".lora_")[0] or name.rpartition(".delora_")[0] for name in tensors})
    common = {
        "base_model_name_or_path": base_model,
        "target_modules": modules,
        "inference_mode": True,
        "task_type": None,
    }
    write_text(subfolder / PEFT_FILES[0], json.dumps(config | common, indent=2, sort_keys=True) + "\n")
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    _save(named, subfolder / PEFT_FILES[1], dtype, {"format": "pt"})


def read_peft_delora(
    folder: Path, base_weights: Mapping[str, Tensor], base: Mapping[str, str], component: str, output: Path
) -> Path:
    """Convert a denoiser's DeloraConfig folder to an adapter file with a zero start.

    Args:
        base_weights: the denoiser's weights by module name, to compute the scale if the folder does not have it.
        base: ``base_model`` and ``pipeline`` as an adapter file records them. component: ``unet`` or ``transformer``.

    Raises:
        InputError: the folder is not a DeLoRA that PEFT saved, or does not fit the model.
    """
    files = [folder / name for name in PEFT_FILES]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder} has no {file.name}; give a folder saved by PEFT.")
    config = read_json(files[0])
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "DELORA":
        raise InputError(f"{folder} contains a {kind} adapter; only DELORA can be imported; give a LORA with --lora.")
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(files[1])[1].items():
        module, _, key = name.removeprefix("base_model.model.").rpartition(".delora_")
        if not module:
            raise InputError(f"{files[1]} has the tensor {name}, which is not one of DeLoRA; save the adapter again.")
        by_module.setdefault(module, {})[key] = tensor.float()
    if not by_module:
        raise InputError(f"{files[1]} has no tensors; save the adapter again.")
    tensors: dict[str, dict[str, Tensor]] = {}
    ranks = set()
    for module, saved in by_module.items():
        if module not in base_weights or not {"A", "B", "lambda"} <= saved.keys():
            raise InputError(f"{folder} does not fit {base['base_model']}: it adapts {module}; give its base model.")
        weight, (a, b) = base_weights[module], (saved["A"], saved["B"])
        of_model = f"{folder} does not fit {base['base_model']}: {module}"
        if saved["lambda"].numel() != 1:
            raise InputError(f"{files[1]} has {saved['lambda'].numel()} lambdas for {module}; save the adapter again.")
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise InputError(
                f"{of_model} has A {tuple(a.shape)} and B {tuple(b.shape)} in the folder and is {tuple(weight.shape)} "
                "in the model; give its base model."
            )
        scale = saved.get("w_norm")
        if scale is None:
            norm = update.weight_norm(weight[None], "column")
            assert norm is not None
            scale = norm[0]
        ranks.add(a.shape[0])
        converted = {"A": a, "B": b, "lambda": saved["lambda"].reshape(()), "w_norm": scale}
        config = AdapterConfig(rank=a.shape[0], start="zero")
        check_shapes(files[1], module, config, converted, tuple(weight.shape))
        tensors[module] = converted
    if len(ranks) != 1:
        raise InputError(
            f"{folder} has ranks {sorted(ranks)}; import an adapter that has the same rank in all modules."
        )
    adapter = AdapterConfig(rank=ranks.pop(), start="zero", targets=tuple(sorted(by_module)))
    return write_adapter({component: (adapter, tensors)}, base, files[1], output)


def write_adapter(
    components: Mapping[str, tuple[AdapterConfig, Mapping[str, Mapping[str, Tensor]]]],
    base: Mapping[str, Any],
    source: Path,
    output: Path,
) -> Path:
    """Write one of our adapter files; returns it.

    Args:
        components: the configuration of each component, and its tensors by module and key.
        base: ``base_model``, ``pipeline`` and so on, as an adapter file records them. source: for error messages.

    Raises:
        InputError: a tensor is not finite.
    """
    configs = {component: config.as_recorded() for component, (config, _) in components.items()}
    header = {"format_version": FORMAT_VERSION, **base, "config": configs}
    tensors = {
        f"{component}.{module}.{METHODS[config.method].key_prefix}{key}": tensor
        for component, (config, by_module) in components.items()
        for module, of_module in by_module.items()
        for key, tensor in of_module.items()
    }
    check_tensors(source, header, tensors)
    with atomic_output(output, WEIGHTS_NAME) as file:
        _save(tensors, file, torch.float32, {METADATA_KEY: json.dumps(header, sort_keys=True)})
    return output_file(output, WEIGHTS_NAME)


def output_file(path: Path, name: str) -> Path:
    """The file to write: ``path`` itself if it names a safetensors file, else ``name`` in that folder."""
    return path if path.suffix == ".safetensors" else path / name


@contextmanager
def atomic_output(path: Path, name: str) -> Iterator[Path]:
    """Where to write ``output_file(path, name)``; a new folder appears together with the file in it."""
    if path.suffix == ".safetensors":
        yield path
    else:
        with atomic_folder(path) as folder:
            yield folder / name


def _save(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    cast = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} overflows in {str(dtype)[6:]}; export with --dtype fp32 or bf16.")
    with atomic_write(file) as temporary:
        save_file(cast, temporary, metadata=metadata)
