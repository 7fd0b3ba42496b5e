"""Imported once by the server that forks test processes, so that each of them starts at once."""

import diffusers.optimization  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

import eval.captions
import eval.encoders
import eval.warm  # noqa: F401
