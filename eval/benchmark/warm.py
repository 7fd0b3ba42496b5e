"""Slow imports, done once by the process that the commands of a benchmark are forked from."""

import threading

import accelerate
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils import tensorboard
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

IMPORTED = (accelerate, torch, tensorboard, CLIPTextModel, CLIPTokenizer)
IMPORTED += (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel)

# The default lock of progress bars is a semaphore of the system, which a command that is ended leaves behind.
tqdm.set_lock(threading.RLock())
