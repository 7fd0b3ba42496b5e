"""A pipeline with saved adapters written into its weights, so that sampling costs what the base model costs."""

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
"""An adapter, an output folder or the file in it, and its strength."""


def base_model_of(adapters: Iterable[Path], name_or_path: str | None) -> str | None:
    """The base model: the one named, else the one that all adapters record.

    Raises:
        InputError: an adapter records none, or two record different ones.
    """
    recorded = {adapter: read_header(adapter)["base_model"] for adapter in adapters}
    if name_or_path or not recorded:
        return name_or_path
    for adapter, base in recorded.items():
        if not base:
            raise InputError(f"{adapter} records no base model; name it with --pretrained_model_name_or_path.")
    if len(set(recorded.values())) > 1:
        (first, one), (second, other), *_ = recorded.items()
        raise InputError(
            f"{first} was trained on {one} and {second} on {other}; name one of them with "
            "--pretrained_model_name_or_path."
        )
    return next(iter(recorded.values()))


class AdaptedPipeline:
    """A pipeline whose weights are those of one set of adapters after another.

    ``W + sum_i s_i (W_i' - W)``, summed in float32 and rounded once: linear in each strength, and the same in any order
    of the adapters up to rounding. Each term keeps its own bound, so the sum is bounded by the sum of the bounds times
    the strengths: two DeLoRA adapters together may go as far as both apart.

    Args:
        pipeline: in float32, without adapters; moved to the device and cast here.
        adapters: all that ``use`` will be given; the pretrained weights that they adapt are kept in float32.
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
                kept = self._masters.setdefault(component, {})
                model = self._model(component, adapter)
                for site in adapted_parameters(model, parse_config(adapter_path(adapter), values)):
                    kept[site] = _parameter(model, site).detach().clone()
        pipeline.to(device, dtype)

    def _model(self, component: str, adapter: Path) -> nn.Module:
        model = getattr(self.pipeline, component, None)
        if model is None:
            raise InputError(f"{adapter} has a {component}, which a {type(self.pipeline).__name__} lacks.")
        return model

    @torch.no_grad()
    def use(self, adapters: Sequence[Weighted]) -> None:
        """Write these adapters' weights; of none, the pretrained ones.

        Raises:
            InputError: an adapter does not fit, or one of several follows maps.
        """
        headers = [read_header(adapter) for adapter, _ in adapters]
        if len(adapters) > 1:
            for (adapter, _), header in zip(adapters, headers):
                if "control_encoder" in header:
                    raise InputError(f"{adapter} follows maps and cannot be mixed; name it alone.")
        for component, masters in self._masters.items():
            model = getattr(self.pipeline, component)
            device, dtype = next(model.parameters()).device, model.dtype
            for site, master in masters.items():
                _parameter(model, site).data = master.to(device, copy=True)
            mine = [one for one, header in zip(adapters, headers) if component in header["config"]]
            changed: dict[tuple[str, str], Tensor] = {}
            for path, strength in mine:
                adapter = load_adapter(model, path, component)
                adapter.strength = strength
                place = {module: name for name, module in model.named_modules()}
                for name, module, parameter in adapter.sites():
                    site = (place[module], parameter)
                    if len(mine) == 1:
                        changed[site] = adapter.weight(name)
                    else:
                        before = changed[site] if site in changed else masters[site].to(device)
                        changed[site] = before + adapter.delta_weight(name)
                detach(model)
            for site in masters:
                parameter = _parameter(model, site)
                parameter.data = changed.get(site, parameter.data).to(dtype)
        if attached_control(self.pipeline.unet) is not None:
            detach_control(self.pipeline.unet)
        if len(adapters) == 1:
            control = load_control(self.pipeline.unet, adapters[0][0])
            if control is not None:
                control.strength = adapters[0][1]


def _parameter(model: nn.Module, site: tuple[str, str]) -> nn.Parameter:
    return model.get_submodule(site[0]).get_parameter(site[1])
