"""DeLoRA for diffusers: attach, train, save, load and merge adapters for Stable Diffusion models."""

import logging
from typing import TYPE_CHECKING, Any

from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import AdapterConfig

if TYPE_CHECKING:
    from delora_diffusers.adapter.attach import attach, attached_adapter
    from delora_diffusers.adapter.control import Control, attach_control, detach_control
    from delora_diffusers.adapter.detach import detach, merge
    from delora_diffusers.adapter.tensors import Adapter
    from delora_diffusers.files.loading import load_adapter, load_control
    from delora_diffusers.files.writing import save_adapter
    from delora_diffusers.pipelines.adapted_pipeline import AdaptedPipeline

# Where torchao is installed, importing diffusers warns about a file format and about registrations in torchao itself.
for _name in ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_MODULES = {
    "AdaptedPipeline": "pipelines.adapted_pipeline",
    "Adapter": "adapter.tensors",
    "Control": "adapter.control",
    "attach": "adapter.attach",
    "attach_control": "adapter.control",
    "attached_adapter": "adapter.attach",
    "detach": "adapter.detach",
    "detach_control": "adapter.control",
    "load_adapter": "files.loading",
    "load_control": "files.loading",
    "merge": "adapter.detach",
    "save_adapter": "files.writing",
}

__all__ = [
    "AdaptedPipeline",
    "Adapter",
    "AdapterConfig",
    "Control",
    "InputError",
    "attach",
    "attach_control",
    "attached_adapter",
    "detach",
    "detach_control",
    "load_adapter",
    "load_control",
    "merge",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # Modules are imported on first use: a command that rejects its arguments should not wait seconds for torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
