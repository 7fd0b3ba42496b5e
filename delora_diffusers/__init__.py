"""DeLoRA for diffusers: attach, train, save, load and merge adapters of Stable Diffusion."""

from typing import TYPE_CHECKING, Any

from delora_diffusers.config import AdapterConfig
from delora_diffusers.errors import InputError

if TYPE_CHECKING:
    from delora_diffusers.adapted_pipeline import AdaptedPipeline
    from delora_diffusers.adapter import Adapter
    from delora_diffusers.attachment import attach, attached_adapter, detach, merge
    from delora_diffusers.control import Control, attach_control, detach_control
    from delora_diffusers.files import load_adapter, load_control, save_adapter

_HOMES = {
    "AdaptedPipeline": "adapted_pipeline",
    "Adapter": "adapter",
    "Control": "control",
    "attach": "attachment",
    "attach_control": "control",
    "detach_control": "control",
    "attached_adapter": "attachment",
    "detach": "attachment",
    "merge": "attachment",
    "load_adapter": "files",
    "load_control": "files",
    "save_adapter": "files",
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
    # Torch and diffusers take seconds to import; a command that refuses its arguments should not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
