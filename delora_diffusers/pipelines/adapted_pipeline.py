"""A pipeline with saved adapters written into its weights, so that sampling is as fast as with the base model."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delora_diffusers.adapter.attach import adapted_parameters
from delora_diffusers.adapter.control import attached_control, detach_control
from delora_diffusers.adapter.detach import detach
from delora_diffusers.adapter.modules import named_modules
from delora_diffusers.errors import InputError
from delora_diffusers.files.loading import load_adapter, load_control
from delora_diffusers.files.reading import adapter_path, parse_config, read_header

Weighted = tuple[Path, float]
"""An adapter (an output folder or the file in it) and its strength."""


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model: hub id or folder (None for the included miniature), and the revision and variant of its files."""

    name: str | None
    revision: str | None = None
    variant: str | None = None


def base_model_of(
    adapters: Iterable[Path], name_or_path: str | None, revision: str | None = None, variant: str | None = None
) -> BaseModel:
    """The base model that is given, or the one that all adapters record.

    Raises:
        InputError: an adapter records no base model, or one that is not here, or two adapters record different ones.
    """
    headers = {adapter: read_header(adapter) for adapter in adapters}
    recorded = {adapter: header["base_model"] for adapter, header in headers.items()}
    if name_or_path or not recorded:
        return BaseModel(name_or_path, revision, variant)
    for adapter, base in recorded.items():
        if not base:
            raise InputError(f"{adapter} records no base model; give one with --pretrained_model_name_or_path.")
    if len(set(recorded.values())) > 1:
        (first, first_base), (second, second_base), *_ = recorded.items()
        raise InputError(
            f"{first} was trained on {first_base} and {second} on {second_base}; choose one with "
            "--pretrained_model_name_or_path."
        )
    (adapter, base), header = next(iter(recorded.items())), next(iter(headers.values()))
    if os.path.isabs(base) and not os.path.isdir(base):
        raise InputError(
            f"{adapter} was trained on the base model in the folder {base}, which is not here; give it with "
            "--pretrained_model_name_or_path."
        )
    return BaseModel(base, revision or header.get("revision"), variant or header.get("variant"))


class AdaptedPipeline:
    """A pipeline that can switch between sets of adapters.

    Its weights are ``W + sum_i s_i (W_i' - W)``, summed in float32 and rounded once. They are linear in each strength
    and do not depend on the order of the adapters, up to rounding. Each term keeps its bound, so the sum is bounded by
    the sum of the bounds times the strengths: two DeLoRA adapters may together move as far as each of them alone,
    added up.

    Args:
        pipeline: in float32, without adapters; it is moved to the device and cast.
        adapters: every adapter that ``use`` will be given; the pretrained weights that they adapt are kept in float32.
    """

    def __init__(
        self,
        pipeline: Any,
        adapters: Iterable[Path],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.pipeline = pipeline
        self._masters: dict[str, dict[tuple[str, str], Tensor]] = {}
        for adapter in adapters:
            for component, values in read_header(adapter)["config"].items():
                masters = self._masters.setdefault(component, {})
                model = self._model(component, adapter)
                modules = dict(named_modules(model))
                for name, parameter in adapted_parameters(model, parse_config(adapter_path(adapter), values)):
                    masters[name, parameter] = modules[name].get_parameter(parameter).detach().clone()
        pipeline.to(device, dtype)

    def _model(self, component: str, adapter: Path) -> nn.Module:
        model = getattr(self.pipeline, component, None)
        if model is None:
            raise InputError(
                f"{adapter} adapts {component}, but a {type(self.pipeline).__name__} has no {component}; give the "
                "adapter's base model."
            )

        return model

    @torch.no_grad()
    def use(self, adapters: Sequence[Weighted]) -> None:
        """Write the weights of these adapters into the pipeline; without adapters, the pretrained weights.

        Raises:
            InputError: an adapter does not fit the model, or one of several adapters follows maps.
        """
        headers = [read_header(adapter) for adapter, _ in adapters]
        if len(adapters) > 1:
            for (adapter, _), header in zip(adapters, headers):
                if "control_encoder" in header:
                    raise InputError(f"{adapter} follows maps and cannot be mixed; give it as the only adapter.")
        for component, masters in self._masters.items():
            model = getattr(self.pipeline, component)
            device, dtype = next(model.parameters()).device, model.dtype
            modules = dict(named_modules(model))
            for (name, parameter), master in masters.items():
                modules[name].get_parameter(parameter).data = master.to(device, copy=True)
            selected = [pair for pair, header in zip(adapters, headers) if component in header["config"]]
            adapted: dict[tuple[str, str], Tensor] = {}
            for path, strength in selected:
                adapter = load_adapter(model, path, component)
                adapter.strength = strength
                module_names = {module: name for name, module in modules.items()}
                for name, module, parameter in adapter.sites():
                    site = (module_names[module], parameter)
                    if len(selected) == 1:
                        adapted[site] = adapter.weight(name)
                    else:
                        weight = adapted[site] if site in adapted else masters[site].to(device)
                        adapted[site] = weight + adapter.delta_weight(name)
                detach(model)
            for name, parameter in masters:
                weight = modules[name].get_parameter(parameter)
                weight.data = adapted.get((name, parameter), weight.data).to(dtype)
        if attached_control(self.pipeline.unet) is not None:
            detach_control(self.pipeline.unet)
        if len(adapters) == 1:
            control = load_control(self.pipeline.unet, adapters[0][0])
            if control is not None:
                control.strength = adapters[0][1]
