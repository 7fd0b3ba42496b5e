"""Detach an adapter from a model, or merge it into the weights."""

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils import parametrize

from delora_diffusers.adapter.attach import attachment, forget_attachment, parametrized_by_adapter
from delora_diffusers.adapter.modules import unwrap
from delora_diffusers.adapter.processors import AdaptedAttnProcessor


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


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write W' (computed in float32, rounded once) into the weights and detach the adapter.

    Raises:
        InputError: no adapter is attached.
    """
    adapter = attachment(model).adapter
    merged = [(module, parameter, adapter.weight(name)) for name, module, parameter in adapter.sites()]
    detach(model)
    model = unwrap(model)
    for module, parameter, weight in merged:
        module.get_parameter(parameter).copy_(weight)
    for module in model.modules():
        if isinstance(module, Attention) and module.fused_projections:
            module.fuse_projections()
