"""What a finished run writes beside its adapter: its configuration and a model card."""

import argparse
import hashlib
import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError, reason
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import (
    CONFIG_NAME,
    NOT_UPLOADED,
    SD_PIPELINE,
    SDXL_PIPELINE,
    WEIGHTS_NAME,
    hub_file,
    is_miniature,
)

SECRETS = ("hub_token",)
OF_ONE_MACHINE = ("resume_from_checkpoint",)
"""Flags that make no sense to others, who have no checkpoints of the run."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON values, without secrets."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in SECRETS}


def command_line(published: bool = False) -> str:
    """The command that started this process, ready to paste, without secrets.

    Args:
        published: whether it is for others, see ``without_folders`` and ``OF_ONE_MACHINE``.
    """
    words = without_folders(sys.argv) if published else list(sys.argv)
    for flag in (*SECRETS, *OF_ONE_MACHINE) if published else SECRETS:
        words = [w for i, w in enumerate(words) if not w.startswith(f"--{flag}") and words[i - 1] != f"--{flag}"]
    script = Path(words[0]).name if published or Path(words[0]).is_absolute() else words[0]
    return "accelerate launch " + shlex.join([script, *words[1:]])


def without_folders(value: Any) -> Any:
    """A value of a flag as it may be published: of an absolute path, which names folders of the machine, the last part.

    Args:
        value: also a list or a dictionary of such values; a text may be ``--flag=PATH``.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.partition("=") if value.startswith("--") else ("", "", value)
    return f"{flag}{equals}{Path(path).name}" if Path(path).is_absolute() else value


def data_digests(items: Iterable[tuple[str, Sequence[Path], str | None]]) -> dict[str, str]:
    """A digest of the contents of each example, by name.

    Args:
        items: (name, files, caption).
    """
    digests = {}
    for name, files, caption in items:
        digest = hashlib.sha256(b"" if caption is None else caption.encode())
        for file in files:
            digest.update(b"\0" + file.read_bytes())
        digests[name] = digest.hexdigest()[:16]
    return digests


def write_config(
    output_dir: Path, args: argparse.Namespace, data: dict[str, str], reached: dict[str, float] | None = None
) -> None:
    """Write ``config.json``: flags, digests of the data, versions, the command, and the final readings of training."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    record: dict[str, Any] = {
        "arguments": settings(args),
        "command": command_line(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "data": data,
    }
    if reached is not None:
        record["reached"] = reached
    write_text(output_dir / CONFIG_NAME, json.dumps(record, indent=2) + "\n")


TAGS_AND_LICENCES: dict[str, tuple[str, str | None]] = {
    SD_PIPELINE: ("stable-diffusion", "creativeml-openrail-m"),
    SDXL_PIPELINE: ("stable-diffusion-xl", "openrail++"),
    "StableDiffusion3Pipeline": ("sd3", None),
    "FluxPipeline": ("flux", None),
    "Flux2Pipeline": ("flux2", None),
    "Flux2KleinPipeline": ("flux2", None),
    "ZImagePipeline": ("z-image", None),
    "QwenImagePipeline": ("qwen-image", None),
}
"""The tag on the hub of a pipeline's models, and their licence, if all of them have the same."""


def write_model_card(
    output_dir: Path,
    args: argparse.Namespace,
    trained_on: str,
    prompt: str,
    follows_maps: bool = False,
    components: Sequence[str] = ("unet",),
    pipeline: str = SD_PIPELINE,
) -> None:
    """Write ``README.md``: metadata for the hub, sample images, how to use the adapter, the command."""
    grids = sorted((output_dir / "validation").glob("*.png"))
    grid = f"![Samples](validation/{grids[-1].name})\n\n" if grids else ""
    base = args.pretrained_model_name_or_path
    method, title = METHODS[args.method].title, without_folders(base)
    of_rank = f" of rank {args.rank}" if METHODS[args.method].has_rank else ""
    start = (
        "" if args.init_adapter is None else f", starting from the adapter `{without_folders(str(args.init_adapter))}`"
    )
    samples = zip(getattr(args, "validation_prompt", []), sorted((output_dir / "samples").glob("*.png")))
    tag, licence = TAGS_AND_LICENCES[pipeline]
    metadata: dict[str, Any] = {"library_name": "diffusers"}
    if is_miniature(base) or licence is not None:
        metadata["license"] = "apache-2.0" if is_miniature(base) else licence
    if not Path(base).exists() and not is_miniature(base):  # the hub's validator rejects a local folder
        remote = hub_file(base)
        metadata["base_model"] = base if remote is None else remote.repo_id
    metadata["tags"] = ["text-to-image", "diffusers", tag, args.method, "delora-diffusers"]
    widget = [{"text": text, "output": {"url": f"samples/{image.name}"}} for text, image in samples]
    if widget:
        metadata["widget"] = widget
    if not follows_maps:
        metadata["instance_prompt"] = prompt
    loading = "\n".join(
        f'load_adapter(pipeline.{name}, "{WEIGHTS_NAME}", "{name}")\nmerge(pipeline.{name})' for name in components
    )
    flags, sampling = f"--prompt {shlex.quote(prompt)}", f"image = pipeline({prompt!r}).images[0]"
    imports = "load_adapter, merge"
    if follows_maps:
        flags, imports = "--map_dir maps", "load_adapter, load_control, merge"
        loading += f'\ncontrol = load_control(pipeline.unet, "{WEIGHTS_NAME}")'
        sampling = f"control.see(maps)  # a tensor (1, 3, height, width), values 0 to 1\n{sampling}"
    if args.max_prompt_chunks > 1:
        flags += f" --max_prompt_chunks {args.max_prompt_chunks}"
    use = f"python -m delora_diffusers generate --adapter . {flags} --output_dir images"
    imported, dtype = ("import torch\n", ", torch_dtype=torch.bfloat16") if components[0] == "transformer" else ("", "")
    imported, loaded = f"{imported}from diffusers import {pipeline}\n", f"{pipeline}.{loaded_from(args)}{dtype})"
    if is_miniature(base):
        imported, loaded = "", "load_pipeline(None)  # the miniature"
        imports += "\nfrom delora_diffusers.families.loading import load_pipeline"
    code = f"""{imported}from delora_diffusers import {imports}

pipeline = {loaded}
{loading}
{sampling}"""
    card = f"""---
{yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False)}---

# {output_dir.resolve().name}

A {method} adapter{of_rank} for `{title}`, trained on {trained_on} for {args.max_train_steps} steps{start}.

{grid}## Use

{fenced(use)}

{fenced(code, "python")}

## Training

{fenced(command_line(published=True))}
"""
    write_text(output_dir / "README.md", card)


def loaded_from(args: argparse.Namespace) -> str:
    """The call of diffusers that loads the base model, without its closing parenthesis."""
    base, remote = args.pretrained_model_name_or_path, hub_file(args.pretrained_model_name_or_path)
    if is_miniature(base) or Path(base).is_dir() or not (Path(base).is_file() or remote):
        return f"from_pretrained({base!r}"
    if not Path(base).is_file() and remote is not None:
        base = f"https://huggingface.co/{remote.repo_id}/blob/{remote.revision or 'main'}/{remote.path}"
    config = "" if args.model_config is None else f", config={args.model_config!r}"
    return f"from_single_file({base!r}{config}"


def fenced(code: str, language: str = "") -> str:
    """A Markdown code block, whatever backticks the code contains."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def check_hub_login(args: argparse.Namespace) -> None:
    """Reject ``--push_to_hub`` before training if the hub cannot be reached or does not know the user.

    Raises:
        InputError
    """
    from huggingface_hub import whoami

    try:
        whoami(token=args.hub_token)
    except Exception as error:  # see push_to_hub
        raise InputError(
            f"--push_to_hub cannot log in to the hub ({reason(error)}); run `hf auth login`, or leave it out and "
            "upload the finished run with `hf upload`."
        ) from error


def push_to_hub(output_dir: Path, args: argparse.Namespace) -> str:
    """Upload the run without its checkpoints, logs and class images; returns the repository's id."""

    from huggingface_hub import create_repo, upload_file, upload_folder

    name = args.hub_model_id or output_dir.resolve().name
    try:
        repo_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message="Train",
            ignore_patterns=[*NOT_UPLOADED, CONFIG_NAME],
            token=args.hub_token,
        )
        record = json.loads((output_dir / CONFIG_NAME).read_text())
        record |= {"arguments": without_folders(record["arguments"]), "command": command_line(published=True)}
        upload_file(
            repo_id=repo_id,
            path_or_fileobj=json.dumps(record, indent=2).encode(),
            path_in_repo=CONFIG_NAME,
            commit_message="Settings of the training",
            token=args.hub_token,
        )
    except Exception as error:  # of the network too, whose libraries have errors of their own
        raise InputError(
            f"the adapter is saved in {output_dir}, but could not be uploaded as {name} ({reason(error)}); upload it "
            "with `hf upload`."
        ) from error
    return repo_id
