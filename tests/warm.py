"""Imported once by the server that forks test processes, so that each process starts quickly."""

import atexit
import gc
import importlib
import pkgutil

import diffusers.optimization  # noqa: F401
import PIL.Image
import transformers.models.clip.modeling_clip  # noqa: F401
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

import delora_diffusers
import eval

for package in (delora_diffusers, eval):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
PIL.Image.init()
# What is imported here lives as long as any process. Without this, each collection in a process visits all of it.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # or libraries complain of leaks at the end
