"""Models with saved adapters written into their weights, so that sampling is as fast as with the base model."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delora_diffusers.adapter.attach import adapted_parameters, attached_adapter
from delora_diffusers.adapter.control import attached_control, detach_control
from delora_diffusers.adapter.detach import detach
from delora_diffusers.adapter.modules import named_modules
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.errors import InputError
from delora_diffusers.families.loading import OpenModel, open_model
from delora_diffusers.files.loading import load_adapter, load_control
from delora_diffusers.files.reading import adapter_path, parse_config, read_header

Weighted = tuple[Path, float]
"""An adapter (an output folder or the file in it) and its strength."""


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model; the fields are the arguments of ``open_model``. No name stands for the included miniature."""

    name: str | None
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None

    def files(self) -> dict[str, str | None]:
        """Where its files are, as keyword arguments."""
        return {"revision": self.revision, "variant": self.variant, "model_config": self.model_config}

    def is_described(self) -> bool:
        """Whether more is said about it than where its files are."""
        return any(x is not None for x in (self.model_config, self.prediction_type, self.rescale_betas_zero_snr))

    def open(self, **arguments: Any) -> OpenModel:
        """Open it; see ``open_model``."""
        prediction: dict[str, Any] = {
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
        }
        return open_model(self.name, **self.files(), **prediction, **arguments)


def base_model_of(
    adapters: Iterable[Path],
    name_or_path: str | None,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
) -> BaseModel:
    """The base model that is given, or the one that all adapters record.

    What the base model predicts is part of what an adapter was trained for: that is always taken from the adapters,
    unless it is given.

    Raises:
        InputError: an adapter records no base model, or one that is not here, or two adapters record different ones.
    """
    headers = {adapter: read_header(adapter) for adapter in adapters}
    recorded = {adapter: header["base_model"] for adapter, header in headers.items()}
    if prediction_type is None:
        prediction_type = _agreed("prediction_type", headers)
    if rescale_betas_zero_snr is None:
        rescale_betas_zero_snr = _agreed("rescale_betas_zero_snr", headers)
    prediction = (prediction_type, rescale_betas_zero_snr)
    if name_or_path or not recorded:
        return BaseModel(name_or_path, revision, variant, model_config, *prediction)
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
    if os.path.isabs(base) and not os.path.exists(base):
        what = "in the file" if base.endswith(".safetensors") else "in the folder"
        raise InputError(
            f"{adapter} was trained on the base model {what} {base}, which is not here; give it with "
            "--pretrained_model_name_or_path."
        )
    model_config = model_config or header.get("model_config")
    if model_config is not None and os.path.isabs(model_config) and not os.path.isdir(model_config):
        raise InputError(
            f"{adapter} was trained with the configuration in the folder {model_config}, which is not here; give it "
            "with --model_config."
        )
    variant = variant or header.get("variant")
    return BaseModel(base, revision or header.get("revision"), variant, model_config, *prediction)


def _agreed(field: str, headers: dict[Path, dict[str, Any]]) -> Any:
    """What all adapters record in this field of their header, None included.

    Raises:
        InputError: two adapters record different values.
    """
    values = {adapter: header.get(field) for adapter, header in headers.items()}
    if len(set(values.values())) > 1:
        (first, value), (second, other) = next((a, b) for a in values.items() for b in values.items() if a[1] != b[1])
        raise InputError(
            f"{first} was trained with {field} {value} and {second} with {other}; choose one with --{field}."
        )
    return next(iter(values.values()), None)


class AdaptedModel:
    """One model of a pipeline, whose weights can be switched between sets of adapters.

    The weights are ``W + sum_i s_i (W_i' - W)``, computed in float32 and rounded once. They are linear in each strength
    and do not depend on the order of the adapters, up to rounding. Each term keeps its bound, so the sum is bounded by
    the sum of the bounds times the strengths: two DeLoRA adapters may together move as far as each of them alone,
    added up.

    Args:
        model: without adapters, in the dtype and on the device that it is used in. If it is quantized, its weights stay
            as they are and a single adapter can be attached to them.
        component: its name in the adapters' files.
        adapters: every adapter that ``use`` will be given; a copy of the weights that they adapt is kept on the CPU.
    """

    def __init__(self, model: nn.Module, component: str, adapters: Iterable[Path]):
        self.model = model
        self.component = component
        self._quantized = any(is_quantized(module) for module in model.modules())
        self._masters: dict[tuple[str, str], Tensor] = {}
        modules = dict(named_modules(model))
        for adapter in adapters if not self._quantized else ():
            values = read_header(adapter)["config"].get(component)
            if values is not None:
                for name, parameter in adapted_parameters(model, parse_config(adapter_path(adapter), values)):
                    if (name, parameter) not in self._masters:
                        master = modules[name].get_parameter(parameter).detach()
                        self._masters[name, parameter] = master.to("cpu", copy=True)

    @torch.no_grad()
    def use(self, adapters: Sequence[Weighted]) -> None:
        """Write the weights of these adapters into the model; without adapters, the pretrained weights.

        Raises:
            InputError: an adapter does not fit the model, or several are given and the model is quantized.
        """
        selected = [pair for pair in adapters if self.component in read_header(pair[0])["config"]]
        if self._quantized:
            self._attach(selected)
            return
        modules = dict(named_modules(self.model))
        names = {module: name for name, module in modules.items()}

        def parameter_at(site: tuple[str, str]) -> nn.Parameter:
            return modules[site[0]].get_parameter(site[1])

        for site, master in self._masters.items():
            parameter_at(site).data.copy_(master)
        adapted: dict[tuple[str, str], Tensor] = {}
        for path, strength in selected:
            adapter = load_adapter(self.model, path, self.component)
            adapter.strength = strength
            for name, module, parameter in adapter.sites():
                site = (names[module], parameter)
                if len(selected) == 1:
                    weight = adapter.weight(name)
                else:
                    sum_so_far = adapted[site] if site in adapted else self._masters[site]
                    weight = sum_so_far.to(parameter_at(site).device).float() + adapter.delta_weight(name)
                adapted[site] = weight.cpu()  # beside the model there may be no room for all of them
            detach(self.model)
        for site, weight in adapted.items():
            parameter_at(site).data.copy_(weight)

    def _attach(self, selected: Sequence[Weighted]) -> None:
        if attached_adapter(self.model) is not None:
            detach(self.model)
        if len(selected) > 1:
            raise InputError("several adapters cannot be mixed in a quantized model; leave out --base_precision.")
        for path, strength in selected:
            load_adapter(self.model, path, self.component).strength = strength


class AdaptedPipeline:
    """A complete pipeline that can switch between sets of adapters; see ``AdaptedModel``.

    Args:
        pipeline: without adapters; it is moved to the device and cast.
        adapters: every adapter that ``use`` will be given.
    """

    def __init__(
        self,
        pipeline: Any,
        adapters: Iterable[Path],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.pipeline = pipeline.to(device, dtype)
        adapters = list(adapters)
        self._models = [
            AdaptedModel(adapted_component(pipeline, component, adapters), component, adapters)
            for component in adapted_components(adapters)
        ]

    def use(self, adapters: Sequence[Weighted]) -> None:
        """Write the weights of these adapters into the pipeline; without adapters, the pretrained weights.

        Raises:
            InputError: an adapter does not fit the model, or one of several adapters follows maps.
        """
        for model in self._models:
            model.use(adapters)
        if hasattr(self.pipeline, "unet"):
            use_control(self.pipeline.unet, adapters)


def adapted_components(adapters: Iterable[Path]) -> list[str]:
    """The components that any of the adapters adapts."""
    return list(dict.fromkeys(name for adapter in adapters for name in read_header(adapter)["config"]))


def adapted_component(pipeline: Any, component: str, adapters: Iterable[Path]) -> nn.Module:
    """A component of a pipeline.

    Raises:
        InputError: the pipeline does not have it.
    """
    model = getattr(pipeline, component, None)
    if model is None:
        raise missing_component(pipeline, component, adapters)
    return model


def missing_component(pipeline: Any, component: str, adapters: Iterable[Path]) -> InputError:
    """The error for adapters of a component that the pipeline does not have."""
    adapter = next(adapter for adapter in adapters if component in read_header(adapter)["config"])
    return InputError(
        f"{adapter} adapts {component}, but a {type(pipeline).__name__} has no {component}; give the adapter's base "
        "model."
    )


def use_control(unet: nn.Module, adapters: Sequence[Weighted]) -> None:
    """Attach the control signal of an adapter that follows maps, in place of any other.

    Raises:
        InputError: there are several adapters, and one follows maps.
    """
    if attached_control(unet) is not None:
        detach_control(unet)
    for adapter, _ in adapters if len(adapters) > 1 else ():
        if "control_encoder" in read_header(adapter):
            raise InputError(f"{adapter} follows maps and cannot be mixed; give it as the only adapter.")
    if len(adapters) == 1:
        control = load_control(unet, adapters[0][0])
        if control is not None:
            control.strength = adapters[0][1]
