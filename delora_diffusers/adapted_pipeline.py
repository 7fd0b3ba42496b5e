"""A pipeline with a saved adapter merged into it, so that sampling costs what the base model costs."""

from pathlib import Path

from delora_diffusers.attachment import merge
from delora_diffusers.base_model import load_pipeline
from delora_diffusers.errors import InputError
from delora_diffusers.files import load_adapter, load_control, read_header


def load_adapted_pipeline(
    adapter: Path | None,
    name_or_path: str | None = None,
    *,
    strength: float = 1.0,
    revision: str | None = None,
    variant: str | None = None,
):
    """A ``StableDiffusionPipeline`` with W' in its weights, and the control signal attached where the adapter has one.

    Args:
        adapter: output folder or file; None for the base model alone.
        name_or_path: the base model; by default the one that the adapter records.
        strength: scales W' - W, and the control signal.

    Raises:
        InputError: the adapter or the base model cannot be loaded, or they do not belong together.
    """
    if adapter is None:
        return load_pipeline(name_or_path, revision=revision, variant=variant)
    header = read_header(adapter)
    name_or_path = name_or_path or header["base_model"]
    if not name_or_path:
        raise InputError(f"{adapter} records no base model; name it with --pretrained_model_name_or_path.")
    pipeline = load_pipeline(name_or_path, revision=revision, variant=variant)
    for component in header["config"]:
        model = getattr(pipeline, component)
        load_adapter(model, adapter, component).strength = strength
        merge(model)
    control = load_control(pipeline.unet, adapter)
    if control is not None:
        control.strength = strength
    return pipeline
