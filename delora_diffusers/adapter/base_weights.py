"""The pretrained weights that an adapter changes: parametrized or not, dense or quantized."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from delora_diffusers.adapter.quantized import dequantized, is_quantized, quantized_dtype

Site = tuple[nn.Module, str]
"""A module and the name of its adapted parameter."""


def base_parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """The pretrained parameter of a module as it is stored, whether or not it is parametrized."""
    if parametrize.is_parametrized(module, name):
        return module.get_parameter(f"parametrizations.{name}.original")
    return module.get_parameter(name)


def dense_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The pretrained parameter of a module, (out, in) if linear; dequantized in the dtype it is computed in."""
    return dequantized(module) if is_quantized(module) else base_parameter(module, name).detach()


def weight_shape(module: nn.Module, name: str = "weight") -> tuple[int, ...]:
    """The shape of a dense weight."""
    if is_quantized(module):
        return (int(module.out_features), int(module.in_features))  # pyright: ignore[reportArgumentType]
    return tuple(base_parameter(module, name).shape)


def compute_dtype(module: nn.Module, name: str = "weight") -> torch.dtype:
    """The dtype in which a module's products are computed."""
    return quantized_dtype(module) if is_quantized(module) else base_parameter(module, name).dtype


class StackedWeights:
    """The weights of modules of one shape as one tensor, of which the modules' parameters are views.

    So it takes no extra memory, and several modules that read the same input are one product.

    Args:
        sites: the modules and the names of their parameters.
    """

    def __init__(self, sites: Sequence[Site]):
        self.sites = sites
        self._stacked: Tensor | None = None
        self._pointers: list[int] = []

    def tensor(self) -> Tensor:
        """The weights (n, out, in) or (n, ...), in the model's dtype and on its device.

        If the model has been moved or cast since the last call, they are stacked again.
        """
        parameters = [base_parameter(*site) for site in self.sites]
        if self._stacked is None or [p.data_ptr() for p in parameters] != self._pointers:
            self._stacked = torch.stack([p.detach() for p in parameters])
            for parameter, view in zip(parameters, self._stacked):
                parameter.data = view
            self._pointers = [p.data_ptr() for p in parameters]
        return self._stacked

    def release(self) -> None:
        """Give each module a separate weight again."""
        if self._stacked is not None:
            for site in self.sites:
                parameter = base_parameter(*site)
                parameter.data = parameter.data.clone()
            self._stacked = None
