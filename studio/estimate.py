"""What a training step with some flags needs of the GPU's memory, and the table of ``info --memory``.

    python -m studio.estimate FLAGS OF train_dreambooth_delora.py

A process of its own, since it imports torch and may start CUDA, which would keep memory of the GPU.
"""

import sys

import torch

import train_dreambooth_delora as script
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.families.loading import open_model
from delora_diffusers.families.pipeline_files import family_named
from delora_diffusers.memory import free_bytes
from delora_diffusers.training.arguments import adapter_config
from delora_diffusers.training.defaults import with_family_defaults
from delora_diffusers.training.memory_estimate import LIBRARIES
from delora_diffusers.training.memory_report import (
    GIB,
    MARGIN,
    described,
    memory_table,
    plan_of,
    savings,
    smallest_gpu,
    step_memory,
)


def estimate(argv: list[str]) -> str:
    """A sentence about these flags on the GPU that is there, and the table for this base model.

    Raises:
        InputError: the base model cannot be read.
    """
    args = script.parse_arguments(argv)
    name, config = args.pretrained_model_name_or_path, args.model_config
    family = family_named(name, revision=args.revision, variant=args.variant, model_config=config)
    args = with_family_defaults(args, family)
    model = open_model(name, revision=args.revision, variant=args.variant, model_config=config, with_weights=False)
    plan = plan_of(args, adapter_config(args), args.mixed_precision or "no", 1, args.max_prompt_chunks)
    memory = step_memory(model, plan)
    needed = f"A training step needs about {described(memory)} of GPU memory"
    if not torch.cuda.is_available():
        sentence = f"{needed}: a GPU of {smallest_gpu(memory.total)}. There is no GPU on this machine."
    else:
        free, total = free_bytes(), torch.cuda.mem_get_info()[1]
        sentence = f"{needed}; {torch.cuda.get_device_name()} has {free / GIB:.1f} of {total / GIB:.1f} GiB free: "
        if MARGIN * memory.total + LIBRARIES <= free:
            sentence += "it fits."
        else:
            helps = [f"{flag} (saves {saved / GIB:.1f} GiB)" for flag, saved in savings(model, plan, memory.total)]
            sentence += f"it does not fit; use {', '.join(helps) or 'a smaller --resolution'}."
    return f"{sentence}\n\n{memory_table(model, args.resolution)}"


if __name__ == "__main__":
    with exit_on_bad_input():
        print(estimate(sys.argv[1:]))
