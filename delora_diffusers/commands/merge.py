"""Merge adapters into the base model and write the complete pipeline folder, or one file for other tools."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora_diffusers.commands.arguments import add_adapter_arguments, add_base_model_arguments, weighted_adapters
from delora_diffusers.errors import InputError
from delora_diffusers.outputs import check_new

if TYPE_CHECKING:
    from delora_diffusers.families.loading import OpenModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    outputs = parser.add_mutually_exclusive_group(required=True)
    outputs.add_argument("--output_dir", type=Path, help="new folder")
    outputs.add_argument(
        "--single_file",
        type=Path,
        help="new .safetensors file, for AUTOMATIC1111 and ComfyUI: Stable Diffusion 1.x, 2.x and XL",
    )
    add_base_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    adapters = weighted_adapters(options)
    if options.single_file is not None:
        check_new(options.single_file, "--single_file")
        if options.single_file.suffix != ".safetensors":
            raise InputError(f"--single_file {options.single_file} is not named .safetensors; give such a name.")
    else:
        check_new(options.output_dir, "--output_dir")
    from delora_diffusers.families.checks import is_single_file
    from delora_diffusers.families.pipeline_files import pipeline_folder
    from delora_diffusers.files.merging import merge_folder
    from delora_diffusers.pipelines.adapted_pipeline import base_model_of

    base = base_model_of(
        options.adapter, options.pretrained_model_name_or_path, options.revision, options.variant, options.model_config
    )
    if options.single_file is None and not is_single_file(base.name) and not base.is_described():
        folder = pipeline_folder(base.name, revision=base.revision, variant=base.variant)
        merge_folder(folder, adapters, options.output_dir)
        print(f"wrote {options.output_dir}")
        return
    model = base.open(pickles=False)
    if options.single_file is None:
        _write_folder(model, adapters, options.output_dir)
    elif model.family.DENOISER != "unet":
        raise InputError(
            "--single_file writes Stable Diffusion 1.x, 2.x and XL, but the base model is a "
            f"{type(model.pipeline).__name__}; give --output_dir."
        )
    elif model.file is not None:
        _merge_file(model, adapters, options.single_file)
    else:
        _write_file(model, adapters, options.single_file)
    print(f"wrote {options.single_file or options.output_dir}")


def _write_folder(model: "OpenModel", adapters: list[tuple[Path, float]], output_dir: Path) -> None:
    """Write a pipeline folder from a single file, or from a folder with another scheduler than it had."""
    from delora_diffusers.files.merging import merge_folder, merge_into_new_folder, read_changes
    from delora_diffusers.files.single_files import check_changes

    if model.file is None:
        merge_folder(model.folder, adapters, output_dir, lambda copy: write_scheduler(model, copy))
        return
    assert model.file.path is not None
    changes = read_changes(adapters)
    if model.family.DENOISER == "unet":
        in_file = {component: modules for component, modules in changes.items() if component in model.in_file}
        check_changes(model.file.path, _layout(model), _shapes(model), in_file)
    merge_into_new_folder(lambda copy: write_parts(model, copy), changes, output_dir)


def write_parts(model: "OpenModel", folder: Path) -> None:
    """Write the parts of a base model in a single file as those of a pipeline folder, one at a time."""
    import shutil

    from delora_diffusers.families.single_file import dtype_of_part

    for component, skeleton in model.skeletons.items():
        if component in model.in_file:
            assert model.file is not None
            model.load(component, dtype_of_part(model.file, component, skeleton)).save_pretrained(folder / component)
            model.drop(component)
        else:
            shutil.copytree(model.folder / component, folder / component, copy_function=shutil.copyfile)
    for name, part in model.pipeline.components.items():
        if name not in model.skeletons and hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)
    write_scheduler(model, folder)


def write_scheduler(model: "OpenModel", folder: Path) -> None:
    """Write the scheduler of a base model, and the pipeline's index with its class."""
    from delora_diffusers.text_files import read_json

    scheduler = model.pipeline.scheduler
    scheduler.save_pretrained(folder / "scheduler")
    index = read_json(model.folder / "model_index.json")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _merge_file(model: "OpenModel", adapters: list[tuple[Path, float]], output: Path) -> None:
    from delora_diffusers.files.single_files import merge_single_file

    assert model.file is not None and model.file.path is not None
    merge_single_file(model.file.path, _layout(model), _shapes(model), adapters, output)


def _write_file(model: "OpenModel", adapters: list[tuple[Path, float]], output: Path) -> None:
    from delora_diffusers.families.checkpoint_names import new_layout
    from delora_diffusers.families.checks import WEIGHTS
    from delora_diffusers.files.reading import visible_weights
    from delora_diffusers.files.single_files import write_single_file

    config = model.pipeline.scheduler.config
    predicts_v = config.get("prediction_type") == "v_prediction"
    marks = [*(["v_pred"] if predicts_v else []), *(["ztsnr"] if config.get("rescale_betas_zero_snr") else [])]
    metadata = {"format": "pt", "modelspec.prediction_type": "v" if predicts_v else "epsilon"}
    files = {}
    for component in model.skeletons:
        variant, paths = model.variant_of(component), visible_weights(model.folder / component)
        files[component] = [p for p in paths if (match := WEIGHTS.fullmatch(p.name)) and match["variant"] == variant]
    write_single_file(model.folder, files, new_layout(model.skeletons), adapters, marks, metadata, output)


def _layout(model: "OpenModel") -> Any:
    from delora_diffusers.families.checkpoint_names import layout_of

    assert model.file is not None
    return layout_of(model.file, {component: model.skeletons[component] for component in model.in_file})


def _shapes(model: "OpenModel") -> dict[str, dict[str, tuple[int, ...]]]:
    return {c: {n: tuple(t.shape) for n, t in s.state_dict().items()} for c, s in model.skeletons.items()}
