"""What a finished run writes beside its adapter: its configuration and a model card."""

import argparse
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delora_diffusers.atomic import atomic_write
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import CONFIG_NAME, WEIGHTS_NAME, is_miniature

SECRETS = ("hub_token",)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON values, without secrets."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in SECRETS}


def command_line() -> str:
    """The command that started this process, ready to paste, without secrets."""
    words = list(sys.argv)
    for flag in SECRETS:
        words = [w for i, w in enumerate(words) if not w.startswith(f"--{flag}") and words[i - 1] != f"--{flag}"]
    return "accelerate launch " + shlex.join([Path(words[0]).name, *words[1:]])


def write_config(output_dir: Path, args: argparse.Namespace, reached: dict[str, float] | None = None) -> None:
    """Write ``config.json``: every flag, the versions, the command, and the final readings of the training."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    record: dict[str, Any] = {
        "arguments": settings(args),
        "command": command_line(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    if reached is not None:
        record["reached"] = reached
    with atomic_write(output_dir / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def write_model_card(
    output_dir: Path,
    args: argparse.Namespace,
    trained_on: str,
    prompt: str,
    follows_maps: bool = False,
    components: Sequence[str] = ("unet",),
    xl: bool = False,
) -> None:
    """Write ``README.md``: metadata for the hub, sample images, how to use the adapter, the exact command."""
    grids = sorted((output_dir / "validation").glob("*.png"))
    grid = f"![Samples](validation/{grids[-1].name})\n\n" if grids else ""
    base = args.pretrained_model_name_or_path
    method = METHODS[args.method].title
    of_rank = f" of rank {args.rank}" if METHODS[args.method].has_rank else ""
    # The hub's validator rejects a local folder as base_model.
    base_line = "" if Path(base).exists() or is_miniature(base) else f"base_model: {base}\n"
    licence = "apache-2.0" if is_miniature(base) else "openrail++" if xl else "creativeml-openrail-m"
    samples = zip(getattr(args, "validation_prompt", []), sorted((output_dir / "samples").glob("*.png")))
    widget = "".join(
        f"- text: {json.dumps(text)}\n  output:\n    url: samples/{image.name}\n" for text, image in samples
    )
    widget = f"widget:\n{widget}" if widget else ""
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    loading = "\n".join(
        f'load_adapter(pipeline.{name}, "{WEIGHTS_NAME}", "{name}")\nmerge(pipeline.{name})' for name in components
    )
    flags, sampling = f"--prompt {shlex.quote(prompt)}", f"image = pipeline({prompt!r}).images[0]"
    imports = "load_adapter, merge"
    if follows_maps:
        flags, imports = "--map_dir maps", "load_adapter, load_control, merge"
        loading += f'\ncontrol = load_control(pipeline.unet, "{WEIGHTS_NAME}")'
        sampling = f"control.see(maps)  # a tensor (1, 3, height, width), values 0 to 1\n{sampling}"
    card = f"""---
{base_line}library_name: diffusers
license: {licence}
tags:
- text-to-image
- diffusers
- stable-diffusion{"-xl" if xl else ""}
- {args.method}
- delora-diffusers
{widget}{"" if follows_maps else f"instance_prompt: {json.dumps(prompt)}{chr(10)}"}---

# {output_dir.resolve().name}

A {method} adapter{of_rank} for `{base}`, trained on {trained_on} for {args.max_train_steps} steps.

{grid}## Use

```
python -m delora_diffusers generate --adapter . {flags} --output_dir images
```

```python
from diffusers import {kind}
from delora_diffusers import {imports}

pipeline = {kind}.from_pretrained({base!r})
{loading}
{sampling}
```

## Training

```
{command_line()}
```
"""
    with atomic_write(output_dir / "README.md") as temporary:
        temporary.write_text(card)


def push_to_hub(output_dir: Path, args: argparse.Namespace) -> str:
    """Upload the run without its checkpoints, logs and class images; returns the repository's id."""

    from huggingface_hub import create_repo, upload_folder

    repo_id = create_repo(args.hub_model_id or output_dir.resolve().name, exist_ok=True, token=args.hub_token).repo_id
    upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        commit_message="Train",
        ignore_patterns=["checkpoint-*", ".checkpoint-*", "logs/*", "class_images/*"],
        token=args.hub_token,
    )
    return repo_id
