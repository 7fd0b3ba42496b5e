"""DeLoRA for diffusers: attach, train, save, load and merge adapters of Stable Diffusion."""

from delora_diffusers.adapter import Adapter
from delora_diffusers.attach import attach, attached_adapter, detach, merge
from delora_diffusers.config import AdapterConfig
from delora_diffusers.errors import InputError
from delora_diffusers.files import load_adapter, save_adapter

__all__ = [
    "Adapter",
    "AdapterConfig",
    "InputError",
    "attach",
    "attached_adapter",
    "detach",
    "load_adapter",
    "merge",
    "save_adapter",
]
