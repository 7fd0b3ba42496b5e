"""A model's modules under their own names, whatever the model is wrapped in."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

_COMPILED = "_orig_mod"
"""The name under which torch.compile registers the module that it wraps."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without torch.compile, DistributedDataParallel and DataParallel around it."""
    while True:
        if _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        elif isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        else:
            return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module, as in ``named_modules()`` before any of them was compiled."""
    for name, module in unwrap(model).named_modules():
        if _COMPILED not in module._modules:
            yield ".".join(part for part in name.split(".") if part != _COMPILED), module


def keep_own_keys(module: nn.Module, parameter: str) -> list[RemovableHandle]:
    """Let a module's state dict name a parametrized parameter as if it were not; returns the hooks that do."""
    original = f"parametrizations.{parameter}.original"

    def rename_saved(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
        state_dict[prefix + parameter] = state_dict.pop(prefix + original)

    def rename_loaded(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
        if prefix + parameter in state_dict:
            state_dict[prefix + original] = state_dict.pop(prefix + parameter)

    return [
        module.register_state_dict_post_hook(rename_saved),
        module.register_load_state_dict_pre_hook(rename_loaded),
    ]
