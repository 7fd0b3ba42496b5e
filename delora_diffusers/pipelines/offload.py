"""Keep the blocks of a denoiser in host memory, and bring each to the GPU only while it computes.

Diffusers' group offloading makes the copies, through a stream of its own from pinned memory. It offloads a block at the
end of its forward, which is too early in training: when gradient checkpointing recomputes a block, its backward still
needs the weights. So here a block stays until the next one is entered. Autograd runs in the reverse order of the
forward, so in the backward a block is entered only after the backward of the block after it has ended.
"""

from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from torch import nn


class OneResident(ModelHook):
    """Offloads the block that is on the device before another one is brought there.

    Args:
        group: the block's weights. resident: shared by all blocks: those that are on the device, at most one.
    """

    def __init__(self, group: Any, resident: list[Any]):
        super().__init__()
        self.group, self.resident = group, resident

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called before the group's own hook, which brings its weights to the device."""
        for group in self.resident:
            if group is not self.group:
                group.offload_()
        self.resident[:] = [self.group]
        return args, kwargs


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a denoiser consists of; gradient checkpointing recomputes each of them by itself."""
    kinds = set(getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def offload_blocks(model: nn.Module, device: torch.device) -> None:
    """Offload the repeated blocks of a frozen model that is on the CPU, and move the rest of it to the device.

    Gradient checkpointing must be on for these blocks whenever gradients are computed.
    """
    blocks = repeated_blocks(model)
    pinned = device.type == "cuda"  # then the CPU's copy is kept, and offloading only drops the device's
    container = nn.Module()
    container.blocks = nn.ModuleList(blocks)
    apply_group_offloading(
        container,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=pinned,
        record_stream=pinned,
    )
    resident: list[Any] = []
    for block in blocks:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        offloading: Any = registry.get_hook("group_offloading")
        group = offloading.group
        group.offload_leader = None  # so that diffusers' hook does not offload at the end of the forward
        group.non_blocking = False  # a copy is waited for, since nothing is brought ahead of time
        registry.register_hook(OneResident(group, resident), "one_resident")
    _move_rest(model, set(blocks), device)


def _move_rest(module: nn.Module, blocks: set[nn.Module], device: torch.device) -> None:
    """Move everything outside the blocks to the device."""
    for child in module.children():
        if child not in blocks:
            if blocks.isdisjoint(child.modules()):
                child.to(device)
            else:
                _move_rest(child, blocks, device)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            tensor.data = tensor.data.to(device)
