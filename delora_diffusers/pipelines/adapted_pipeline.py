"""A pipeline with saved adapters written into its weights, so that sampling is as fast as with the base model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delora_diffusers.adapter.attach import adapted_parameters
from delora_diffusers.adapter.control import attached_control, detach_control
from delora_diffusers.adapter.detach import detach
from delora_diffusers.errors import InputError
from delora_diffusers.files.loading import load_adapter, load_control
from delora_diffusers.files.reading import adapter_path, parse_config, read_header

Weighted = tuple[Path, float]
"""An adapter (an output folder or the file in it) and its strength."""


def base_model_of(adapters: Iterable[Path], name_or_path: str | None) -> str | None:
    """The base model: ``name_or_path``, or the base model recorded in all adapters.

    Raises:
        InputError: an adapter records no base model, or two adapters record different ones.
    """
    recorded = {adapter: read_header(adapter)["base_model"] for adapter in adapters}
    if name_or_path or not recorded:
        return name_or_path
    for adapter, base in recorded.items():
        if not base:
            raise InputError(f"{adapter} records no base model; give one with --pretrained_model_name_or_path.")
    if len(set(recorded.values())) > 1:
        (first, first_base), (second, second_base), *_ = recorded.items()
        raise InputError(
            f"{first} was trained on {first_base} and {second} on {second_base}; choose one with "
            "--pretrained_model_name_or_path."
        )
    return next(iter(recorded.values()))


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
                for site in adapted_parameters(model, parse_config(adapter_path(adapter), values)):
                    masters[site] = _parameter(model, site).detach().clone()
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
            for site, master in masters.items():
                _parameter(model, site).data = master.to(device, copy=True)
            selected = [pair for pair, header in zip(adapters, headers) if component in header["config"]]
            adapted: dict[tuple[str, str], Tensor] = {}
            for path, strength in selected:
                adapter = load_adapter(model, path, component)
                adapter.strength = strength
                module_names = {module: name for name, module in model.named_modules()}
                for name, module, parameter in adapter.sites():
                    site = (module_names[module], parameter)
                    if len(selected) == 1:
                        adapted[site] = adapter.weight(name)
                    else:
                        weight = adapted[site] if site in adapted else masters[site].to(device)
                        adapted[site] = weight + adapter.delta_weight(name)
                detach(model)
            for site in masters:
                parameter = _parameter(model, site)
                parameter.data = adapted.get(site, parameter.data).to(dtype)
        if attached_control(self.pipeline.unet) is not None:
            detach_control(self.pipeline.unet)
        if len(adapters) == 1:
            control = load_control(self.pipeline.unet, adapters[0][0])
            if control is not None:
                control.strength = adapters[0][1]


def _parameter(model: nn.Module, site: tuple[str, str]) -> nn.Parameter:
    return model.get_submodule(site[0]).get_parameter(site[1])
