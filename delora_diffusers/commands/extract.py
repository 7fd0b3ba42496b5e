"""Extract an adapter from a fine-tuned model: the best low-rank approximation of its difference from its base model.

For both methods it is the best in the Frobenius norm of each layer's difference: DeLoRA expresses every update of its
rank exactly.
"""

import argparse
import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora_diffusers.commands.arguments import add_base_model_arguments, recorded_files
from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS, AdapterConfig
from delora_diffusers.names import recorded_model_name
from delora_diffusers.outputs import check_new

if TYPE_CHECKING:
    from torch import Tensor

    from delora_diffusers.families.loading import OpenModel
    from delora_diffusers.files.extraction import Extracted

METHODS = ("delora", "lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_base_model_arguments(parser, required=True)
    parser.add_argument("--tuned_model", required=True, help="the fine-tuned model: a folder, file or hub id")
    parser.add_argument("--rank", type=int, default=AdapterConfig().rank, help=f"default: {AdapterConfig().rank}")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default: delora")
    parser.add_argument(
        "--targets", nargs="+", help="suffixes of the names of the denoiser's modules; default: attention's projections"
    )
    parser.add_argument(
        "--text_encoders", action="store_true", help="also extract the attention of CLIP's text encoders that differ"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")


def run(options: argparse.Namespace) -> None:
    if options.rank < 1:
        raise InputError(f"--rank is {options.rank}; give at least 1.")
    check_new(options.output_dir, "--output_dir")
    from delora_diffusers.adapter.attach import attach, find_targets
    from delora_diffusers.families.loading import open_model
    from delora_diffusers.files.extraction import extract
    from delora_diffusers.files.formats import write_adapter

    name, tuned_name = options.pretrained_model_name_or_path, options.tuned_model
    base = open_model(name, revision=options.revision, variant=options.variant, model_config=options.model_config)
    # A checkpoint in one file, of a base model in a folder, has that folder's configuration.
    config = options.model_config or (None if base.file else name)
    is_file = Path(tuned_name).is_file() or tuned_name.endswith(".safetensors")
    tuned = open_model(tuned_name, variant=options.variant, model_config=config if is_file else None)
    denoiser = base.family.DENOISER
    components = [denoiser, *base.trainable_encoders] if options.text_encoders else [denoiser]
    targets: dict[str, tuple[str, ...]] = dict.fromkeys(components, TEXT_ENCODER_TARGETS)
    targets[denoiser] = tuple(options.targets or base.family.TARGETS)
    alpha = options.rank if options.method == "lora" else None
    configs = {
        c: AdapterConfig(options.method, options.rank, start="zero", alpha=alpha, targets=targets[c])
        for c in components
    }
    for component, config in configs.items():
        check_same_architecture(base, tuned, component)
        attach(copy.deepcopy(base.skeletons[component]), config)  # finds a rank or targets that do not fit

    extracted: dict[str, Extracted] = {}
    for component, config in configs.items():
        modules = list(find_targets(base.skeletons[component], config.targets))
        before, after = weights_of(base, component), weights_of(tuned, component)
        extracted[component] = extract(modules, before, after, config, component)
    changed = {component: part for component, part in extracted.items() if part.total > 0}
    if not changed:
        remedy = "check the names" if options.text_encoders else "check the names, or give --text_encoders"
        raise InputError(f"{tuned_name} and {name} have the same weights in {' and '.join(components)}; {remedy}.")
    for component, part in changed.items():
        if part.covered == 0:
            raise InputError(
                f"no target of {component} differs between {tuned_name} and {name}; other modules do, such as "
                f"{part.uncovered[0]}, so give --targets."
            )
    report(extracted, options)
    for component in [name for name in base.trainable_encoders if name not in components]:
        if component in tuned.skeletons and differ(base, tuned, component):
            print(f"warning: {component} differs too and is not in the adapter (see --text_encoders)")
    header: dict[str, Any] = {"base_model": recorded_model_name(name), "pipeline": type(base.pipeline).__name__}
    header |= {key: value for key, value in recorded_files(options).items() if value is not None}
    header["training"] = {"extracted_from": recorded_model_name(tuned_name)}
    parts = {component: (configs[component], part.tensors) for component, part in changed.items()}
    print(f"wrote {write_adapter(parts, header, options.output_dir, options.output_dir)}")


def report(extracted: "Mapping[str, Extracted]", options: argparse.Namespace) -> None:
    """Print the relative error of each layer, a summary, and what the adapter leaves out."""
    print("relative error |dW - dW'| / |dW| per layer:")
    for component, part in extracted.items():
        for module, error in part.errors.items():
            print(f"  {error:.3e}  {component}.{module}")
    for component, part in extracted.items():
        if part.total == 0:
            print(f"{component}: no difference; left out")
            continue
        overall = math.sqrt(part.missed / part.covered)
        print(f"{component}: {len(part.errors)} layers of rank {options.rank}, relative error {overall:.3e} together")
        if part.uncovered:
            share = 1 - part.covered / part.total
            print(
                f"warning: {len(part.uncovered)} other modules of {component} differ too, such as {part.uncovered[0]}; "
                f"they have {share:.1%} of the squared change and are not in the adapter (see --targets)"
            )


def check_same_architecture(base: "OpenModel", tuned: "OpenModel", component: str) -> None:
    """Reject two models whose weights cannot be subtracted.

    Raises:
        InputError: the message gives the first difference.
    """
    if component not in tuned.skeletons:
        raise InputError(f"{tuned.name} has no {component}, but {base.name} has; give a fine-tuned version of it.")
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in model.skeletons[component].state_dict().items()}
        for model in (base, tuned)
    ]
    for name in shapes[0].keys() | shapes[1].keys():
        sizes = [str(of_model.get(name, "missing")) for of_model in shapes]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{tuned.name} is not a fine-tuned {base.name}: {name} of its {component} is {sizes[1]} and not "
                f"{sizes[0]}; give models of one architecture."
            )


def differ(base: "OpenModel", tuned: "OpenModel", component: str) -> bool:
    """Whether a component has other weights."""
    before, after = weights_of(base, component), weights_of(tuned, component)
    return any(name not in after or not before[name].float().equal(after[name].float()) for name in before)


def weights_of(model: "OpenModel", component: str) -> "Mapping[str, Tensor]":
    """The weights of a component by name, each read when it is asked for, if they are stored as safetensors."""
    import torch

    from delora_diffusers.families.checks import WEIGHTS
    from delora_diffusers.files.extraction import StoredWeights
    from delora_diffusers.files.reading import visible_weights

    named = ((file, WEIGHTS.fullmatch(file.name)) for file in visible_weights(model.folder / component))
    variants = {file: match["variant"] for file, match in named if match}
    for variant in (model.variant, None) if component not in model.in_file else ():
        files = [file for file in variants if variants[file] == variant]
        if files:
            return StoredWeights(files)
    weights = dict(model.load(component, torch.float32).state_dict())
    model.drop(component)
    return weights
