"""Detach an adapter from a model, or merge it into the weights."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils import parametrize

from delora_diffusers.adapter.attach import attachment, forget_attachment, parametrized_by_adapter
from delora_diffusers.adapter.modules import unwrap
from delora_diffusers.adapter.processors import AdaptedAttnProcessor
from delora_diffusers.adapter.quantized import is_quantized


def detach(model: nn.Module) -> None:
    """Restore the base model: its stock processors and exactly its original weights.

    Raises:
        InputError: no adapter is attached.
    """
    attached = attachment(model)
    model = unwrap(model)
    for handle in attached.handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, AdaptedAttnProcessor):
            module.set_processor(module.processor.stock)
        for name in parametrized_by_adapter(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for stack in attached.adapter.stacks:
        stack.release()
    for parameter in attached.trainable:
        parameter.requires_grad_(True)
    forget_attachment(model)


def _dense(module: Any, weight: torch.Tensor) -> nn.Linear:
    """A linear module with this weight and the bias of another, frozen."""
    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
    return dense


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write W' (computed in float32, rounded once) into the weights and detach the adapter.

    In a quantized model the adapted modules are replaced by dense ones with W', in the dtype they compute in; the other
    modules stay quantized.

    Raises:
        InputError: no adapter is attached.
    """
    adapter = attachment(model).adapter
    merged = [(*site, adapter.weight(site[0])) for site in adapter.sites()]
    detach(model)
    model = unwrap(model)
    for name, module, parameter, weight in merged:
        if is_quantized(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _dense(module, weight))
        else:
            module.get_parameter(parameter).copy_(weight)
    for module in model.modules():
        if isinstance(module, Attention) and module.fused_projections:
            module.fuse_projections()
