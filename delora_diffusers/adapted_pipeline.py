"""A pipeline with a saved adapter merged into it, so that sampling costs what the base model costs."""

from pathlib import Path

from delora_diffusers.attachment import attached_adapter, merge
from delora_diffusers.base_model import load_pipeline
from delora_diffusers.errors import InputError
from delora_diffusers.files import load_adapter, read_header


def load_adapted_pipeline(
    adapter: Path | None,
    name_or_path: str | None = None,
    *,
    strength: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
):
    """A ``StableDiffusionPipeline`` with W' in its weights.

    Args:
        adapter: output folder or file; None for the base model alone.
        name_or_path: the base model; by default the one that the adapter records.
        strength: scales W' - W.

    Raises:
        InputError: the adapter or the base model cannot be loaded, or they do not belong together.
    """
    header = read_header(adapter) if adapter is not None else {"config": {}, "base_model": None}
    name_or_path = name_or_path or header["base_model"]
    if not name_or_path and adapter is not None:
        raise InputError(f"{adapter} records no base model; name it with --pretrained_model_name_or_path.")
    pipeline = load_pipeline(name_or_path, revision=revision, variant=variant)
    for component in header["config"]:
        model = getattr(pipeline, component)
        load_adapter(model, adapter, component)  # type: ignore[arg-type]  # a component came from it
        attached = attached_adapter(model)
        assert attached is not None
        attached.strength = strength
        merge(model)
    return pipeline
