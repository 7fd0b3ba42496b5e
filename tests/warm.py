"""Imported once by the server that forks test processes, so that each process starts quickly."""

import diffusers.optimization  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

import eval.benchmark.warm
import eval.metrics.encoders
import eval.study.captions  # noqa: F401
