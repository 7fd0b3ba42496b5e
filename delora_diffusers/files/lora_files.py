"""Read LoRAs that other tools saved: sd-scripts (kohya), diffusers and PEFT.

A file says what it adapts by names only, and every tool writes them in its own way. So the names that each module of
the base model can have are listed first, and a file's names are looked up in that list: a name is a module, or several
that the original code computes by one matrix, or an error. A LoRA computes ``W + s B A``. In sd-scripts' files s is
``alpha / r``, with alpha stored beside the matrices (r if it is missing); in PEFT's a ``LoraConfig`` gives it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from delora_diffusers.adapter.modules import named_modules
from delora_diffusers.errors import LOADING_ERRORS, InputError
from delora_diffusers.files.formats import DIFFUSERS_NAME, KOHYA_NAME, PEFT_FILES, sgm_name
from delora_diffusers.files.low_rank import Factors, as_lora
from delora_diffusers.files.original_names import modules_by_original_name
from delora_diffusers.files.reading import COMPONENTS, adapter_path, from_hub, read_tensors
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.lora import kaiming
from delora_diffusers.names import FAMILIES, METADATA_KEY, WEIGHTS_NAME, is_xl, may_be_hub_id
from delora_diffusers.text_files import parse_json, read_json

MERGE = "merge it into the base model with the tool that trained it, and give the result as the base model"
OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA with a learned magnitude",
    "lora_magnitude_vector": "a DoRA with a learned magnitude",
    "lora_mid": "a LoCon, which adapts convolutions",
    "oft_": "an OFT",
    "delora_": "a DeLoRA that PEFT saved",
    "on_input": "an IA3",
    "lora_B.bias": "a LoRA with biases",
    "lora_embedding": "a LoRA of embeddings",
    "diff": "a difference of full weights",
}
"""How the last parts of tensor names begin that a plain LoRA does not have."""
MATRIX = re.compile(
    r"(?P<module>.+?)(?:\.processor)?"
    r"(?:[._](?P<projection>to_q|to_k|to_v|to_out)_lora\.|\.lora(?:_linear_layer)?\.|\.lora_)"
    r"(?P<side>down|up|A|B)(?:\.default)?\.weight"
)
ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora)?\.alpha")
CLIP_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What diffusers' first LoRAs of text encoders called CLIP's projections."""
ADAPTED_WEIGHTS = ("pissa", "olora", "corda")
"""Initializations with which PEFT changes the base model's weights too."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A module, or the rows of a fused module's output that belong to it."""

    component: str
    module: str
    first: int = 0
    last: int | None = None


def adapter_files(path: Path) -> list[Path]:
    """The files of an adapter, ours or another tool's: one, or a configuration and weights for each of PEFT's folders.

    Args:
        path: a file, a folder that a tool saved, one of our output folders or checkpoints, or a hub id.

    Raises:
        InputError: there is no adapter.
    """
    if path.is_dir():
        for names in ((WEIGHTS_NAME,), PEFT_FILES, (DIFFUSERS_NAME,), (KOHYA_NAME,)):
            if all((path / name).is_file() for name in names):
                return [path / name for name in names]
        folders = [path / name for name in COMPONENTS if (path / name / PEFT_FILES[0]).is_file()]
        if folders:
            return [folder / name for folder in folders for name in PEFT_FILES]
    elif not path.exists() and "/" in str(path) and may_be_hub_id(str(path)):
        for names in ((WEIGHTS_NAME,), PEFT_FILES, (DIFFUSERS_NAME,)):
            try:
                return [from_hub(str(path), name) for name in names]
            except InputError:
                continue
    return [adapter_path(path)]


def is_ours(files: Sequence[Path]) -> bool:
    """Whether an adapter was saved by this library."""
    return len(files) == 1 and METADATA_KEY in read_tensors(files[0], tensors=False)[0]


def read_lora(files: Sequence[Path], models: Mapping[str, nn.Module], pipeline: str) -> dict[str, dict[str, Factors]]:
    """The factors of every adapted module by component and module, with the scale in b.

    Args:
        files: as ``adapter_files`` returns them.
        models: the base model's components, which need no values. pipeline: the class of its pipeline.

    Raises:
        InputError: a file is damaged, is not a plain LoRA of linear modules, or is for another base model.
    """
    names = _names(models, pipeline)
    layers = {(component, n): m for component, model in models.items() for n, m in named_modules(model)}
    components: dict[str, dict[str, Factors]] = {}
    for file, tensors, scale_of in _opened(files):
        pairs, strange = _pairs(file, tensors)
        if not any(module in names for module in pairs):
            converted = _pairs(file, _converted_by_diffusers(tensors, pipeline))
            pairs, strange = converted if any(module in names for module in converted[0]) else (pairs, strange)
        if strange:
            raise InputError(f"{file} contains {strange[0]}, which is not a tensor of a LoRA; {MERGE}.")
        _check_linear(file, pairs, names, layers)
        for module, pair in pairs.items():
            if module not in names:
                raise InputError(
                    f"{file} adapts {module}, which the base model does not have; give the LoRA's base model."
                )
            for rows, factors in _factors(pair, names[module], scale_of):
                linear = layers[rows.component, rows.module]
                assert isinstance(linear, nn.Linear)
                shape, expected = (len(factors.b), factors.a.shape[1]), (linear.out_features, linear.in_features)
                if shape != expected:
                    raise InputError(
                        f"{file} does not fit the base model: {rows.component}.{rows.module} is {shape} in the file "
                        f"and {expected} in the model; give the LoRA's base model."
                    )
                if rows.module in components.setdefault(rows.component, {}):
                    raise InputError(f"{file} adapts {rows.component}.{rows.module} twice; save it again.")
                components[rows.component][rows.module] = factors
    if not components:
        raise InputError(f"{files[-1]} changes no module of the base model; give a trained LoRA.")
    return components


def as_adapter(modules: Mapping[str, Factors]) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    """A LoRA of ours with these updates: its configuration, and its tensors by module and key."""
    rank = max(factors.rank for factors in modules.values())
    config = AdapterConfig("lora", rank, alpha=rank, targets=tuple(sorted(modules)))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, factors in modules.items():
        width = factors.a.shape[1]
        tensors[module] = as_lora(factors, config, kaiming((rank, width), width, generator))
    return config, tensors


def highest_rank(files: Sequence[Path]) -> int:
    """The largest rank of the matrices in the files of a LoRA, read from their headers; 0 if there is none.

    Raises:
        InputError: a file is damaged.
    """
    from safetensors import safe_open

    ranks = [0]
    for file in files:
        if file.suffix == ".json":
            continue
        read_tensors(file, tensors=False)
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                match = MATRIX.fullmatch(name)
                if match and match["side"] in ("down", "A"):
                    ranks.append(opened.get_slice(name).get_shape()[0])
    return max(ranks)


def _names(models: Mapping[str, nn.Module], pipeline: str) -> dict[str, list[Rows]]:
    """What every name that a tool may give to a module of these models stands for."""
    names: dict[str, list[Rows]] = {}
    for component, model in models.items():
        layers = {n: m for n, m in named_modules(model) if isinstance(m, nn.Linear | nn.Conv2d)}
        if component.startswith("text_encoder"):
            number = component.rpartition("_")[2]
            prefixes = [f"lora_te{number}"] if number.isdigit() else ["lora_te1", "lora_te"]
            for module in layers:
                plain = module.removeprefix("text_model.")
                for name in (plain, f"text_model.{plain}"):
                    names[f"{component}.{name}"] = [Rows(component, module)]
                    for prefix in prefixes:
                        names[f"{prefix}_{name.replace('.', '_')}"] = [Rows(component, module)]
            continue
        originals: dict[str, list[Rows]] = {module: [Rows(component, module)] for module in layers}
        for module in layers if is_xl(pipeline) else ():
            try:
                originals[sgm_name(module)] = [Rows(component, module)]
            except InputError:
                continue  # it has no such name
        if component == "transformer":
            rows = {n: m.out_features for n, m in layers.items() if isinstance(m, nn.Linear)}
            for name, members in modules_by_original_name(FAMILIES[pipeline], rows).items():
                originals[name] = [Rows(component, *member) for member in members]
        for name, rows_of_name in originals.items():
            for prefix in ("", f"{component}.", "diffusion_model.", "base_model.model."):
                names[prefix + name] = rows_of_name
            for prefix in ("lora_unet_", f"lora_{component}_"):
                names[prefix + name.replace(".", "_")] = rows_of_name
    return names


def _opened(files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Tensor], Any]]:
    """Each file with its tensors and the function that gives the scale of a module."""
    weights = [file for file in files if file.suffix != ".json"]
    for file in weights:
        if file.suffix != ".safetensors":
            raise InputError(f"{file} is not a safetensors file; convert it, because other formats can contain code.")
        metadata, tensors = read_tensors(file)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{file} contains values that are not finite in {name}; use another file.")
        settings: dict[str, Any] = {}
        config = file.with_name(PEFT_FILES[0])
        if config in files:
            settings = {"": _lora_config(config)}
            component = file.parent.name
            if len(weights) > 1:  # PEFT's names do not say which component they belong to
                tensors = {f"{component}.{n.removeprefix('base_model.model.')}": t for n, t in tensors.items()}
        elif "lora_adapter_metadata" in metadata:
            settings = _diffusers_settings(file, metadata["lora_adapter_metadata"])

        def scale_of(rows: Rows, rank: int, alpha: float | None, file=file, settings=settings) -> float:
            config = settings.get(rows.component, settings.get(""))
            scale = 1.0 if alpha is None else alpha / rank
            if config is not None:
                scale = _peft_scale(config, rows.module, rank)
            if not math.isfinite(scale):
                raise InputError(f"{file} has an alpha of {rows.module} that is not finite; save it again.")
            return scale

        yield file, tensors, scale_of


def _lora_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind == "DELORA":
        raise InputError(
            f"{file.parent} contains a DELORA adapter; convert it with `python -m delora_diffusers import --peft_dir "
            f"{file.parent}` first."
        )
    if kind != "LORA":
        raise InputError(f"{file.parent} contains a {kind} adapter; only LORA is supported.")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(ADAPTED_WEIGHTS):
        raise InputError(
            f"{file.parent} was initialized by {start}, which also changes the base model's weights; convert it with "
            "PEFT (path_initial_model_for_weight_conversion) first."
        )
    return config


def _diffusers_settings(file: Path, text: str) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each component in the header of diffusers' file, whose keys are ``unet.r`` and so on."""
    try:
        flat = parse_json(text)
        settings: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            settings.setdefault(component, {})[name] = value
        return {component: config for component, config in settings.items() if "lora_alpha" in config}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} has a lora_adapter_metadata that is not valid ({error}); save it again.") from error


def _peft_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilized LoRA; r is that of the module's tensors."""
    patterns = config.get("alpha_pattern") or {}
    try:
        # PEFT's rule: a key is a regular expression for the end of the name, and the first that matches counts.
        matches = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
        alpha = float(matches[0] if matches else config.get("lora_alpha", 8))
    except re.error as error:
        raise InputError(f"the LoraConfig has an alpha_pattern that is not valid ({error}); save it again.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the LoraConfig has an alpha of {module} that is not a number; save it again.") from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A, B and, if it is stored, alpha of each module, float32, by the name that the file gives it; and other tensors.

    Raises:
        InputError: a tensor shows that it is not a plain LoRA, or A and B do not fit together.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        kind = next(
            (kind for part, kind in OTHER_KINDS.items() if re.search(rf"\.{re.escape(part)}(?!usion)", name)), None
        )
        if kind is not None:
            raise InputError(f"{file} is {kind}, as {name} shows, and not a plain LoRA; {MERGE}.")
        if match := MATRIX.fullmatch(name):
            module, projection = match["module"], match["projection"]
            if projection is not None:
                in_clip = module.startswith("text_encoder")
                inner = CLIP_PROJECTIONS[projection] if in_clip else projection.replace("to_out", "to_out.0")
                module = f"{module}.{inner}"
            pairs.setdefault(module, {})[{"down": "A", "up": "B"}.get(match["side"], match["side"])] = tensor.float()
        elif match := ALPHA.fullmatch(name):
            pairs.setdefault(match["module"], {})["alpha"] = tensor.float()
        else:
            strange.append(name)
    for module, pair in pairs.items():
        missing = [key for key in "AB" if key not in pair]
        if missing:
            raise InputError(f"{file} has no {missing[0]} of {module}; save or download it again.")
        a, b = pair["A"], pair["B"]
        if min(a.ndim, b.ndim) < 2 or len(a) != b.shape[1] or pair.get("alpha", a[0, 0]).numel() != 1:
            shapes = " and ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in pair.items())
            raise InputError(f"{file} has {shapes} of {module}, which do not fit together; save it again.")
    return pairs, strange


def _check_linear(
    file: Path,
    pairs: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, Sequence[Rows]],
    layers: Mapping[tuple[str, str], nn.Module],
) -> None:
    convolutions = [
        module
        for module, pair in pairs.items()
        if math.prod(pair["A"].shape[2:]) > 1
        or any(isinstance(layers[rows.component, rows.module], nn.Conv2d) for rows in names.get(module, ()))
    ]
    if convolutions:
        raise InputError(
            f"{file} adapts convolutions, such as {convolutions[0]} ({len(convolutions)} of its {len(pairs)} modules), "
            f"and only linear modules can be adapted here; {MERGE}."
        )


def _converted_by_diffusers(tensors: Mapping[str, Tensor], pipeline: str) -> dict[str, Tensor]:
    """The tensors in diffusers' names; empty if its pipeline does not know those that they have, such as XLabs'."""
    try:
        converted = getattr(diffusers, pipeline).lora_state_dict(dict(tensors))
    except (*LOADING_ERRORS, AssertionError):
        return {}
    return converted[0] if isinstance(converted, tuple) else converted


def _factors(pair: Mapping[str, Tensor], members: Sequence[Rows], scale_of: Any) -> Iterator[tuple[Rows, Factors]]:
    """The factors of a module, or of each member of a fused one."""
    a, b, alpha = pair["A"].flatten(1), pair["B"].flatten(1), pair.get("alpha")
    b = b * scale_of(members[0], len(a), None if alpha is None else float(alpha.flatten()[0]))
    for rows in members:
        last = None if rows is members[-1] else rows.last  # of the last member all, so that its shape shows a misfit
        factors = Factors(b[rows.first : last], a)
        if len(members) > 1:
            # Terms that only change other members, and members without any, were not there before they were combined.
            used = factors.b.abs().amax(dim=0) > 0
            factors = Factors(factors.b[:, used], a[used])
        if factors.rank:
            yield rows, factors
