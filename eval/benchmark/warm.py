"""Slow imports, done once by the process that the commands of a benchmark are forked from."""

import accelerate
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils import tensorboard
from transformers import CLIPTextModel, CLIPTokenizer

IMPORTED = (accelerate, torch, tensorboard, CLIPTextModel, CLIPTokenizer)
IMPORTED += (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel)
