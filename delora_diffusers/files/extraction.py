"""The difference of two models' weights as an adapter, one matrix at a time."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.errors import InputError
from delora_diffusers.files.equal_weights import as_delora, best_factors
from delora_diffusers.files.low_rank import as_lora, balanced
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import low_rank_functions

TEXT_MODEL = "text_model."
"""A prefix of CLIP's weights that newer versions of transformers leave out."""


class StoredWeights(Mapping[str, Tensor]):
    """The tensors in safetensors files by name, each read when it is asked for.

    Raises:
        InputError: a file is damaged.
    """

    def __init__(self, files: Sequence[Path]):
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} cannot be read ({error}); save or download it again.") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclasses.dataclass
class Extracted:
    """An adapter of one component.

    Attributes:
        tensors: by module and key. errors: the relative error ``|dW - dW'|_F / |dW|_F`` of each module.
        total: the squared change of all weights. covered: that of the adapted ones. missed: what is left of that.
        uncovered: the other weights that differ.
    """

    tensors: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    total: float = 0.0
    covered: float = 0.0
    missed: float = 0.0
    uncovered: list[str] = dataclasses.field(default_factory=list)


def extract(
    modules: Sequence[str], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], config: AdapterConfig, name: str
) -> Extracted:
    """An adapter of one component whose updates are the best low-rank approximations of ``tuned - base``.

    Args:
        modules: to adapt. base, tuned: the weights by name. config: of a LoRA, or of a DeLoRA with a zero start.
        name: of the component, for messages.

    Raises:
        InputError: a weight is missing or not finite, or DeLoRA cannot express the change.
    """
    of_module = {f"{module}.weight".removeprefix(TEXT_MODEL): module for module in modules}
    of_tuned = {weight.removeprefix(TEXT_MODEL): weight for weight in tuned}
    result, generator = Extracted(), torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for stored in tqdm(sorted(base), desc=f"extracting {name}", leave=False):
        weight = stored.removeprefix(TEXT_MODEL)
        if weight not in of_tuned:
            raise InputError(f"the fine-tuned model has no {stored} in its {name}; give a complete model.")
        before, after = base[stored], tuned[of_tuned[weight]]
        if not before.is_floating_point():
            continue
        difference = after.to(device, torch.float64) - before.to(device, torch.float64)
        if not torch.isfinite(difference).all():
            raise InputError(f"{stored} of {name} has values that are not finite; give other models.")
        squared = float(difference.square().sum())
        result.total += squared
        if weight not in of_module:
            result.uncovered += [stored] if squared > 0 else []
            continue
        module = of_module.pop(weight)
        result.covered += squared
        tensors, error = approximated(module, before.float(), difference, config, generator)
        result.tensors[module], result.errors[module] = tensors, error
        result.missed += error**2 * squared
    if of_module:
        raise InputError(f"the base model's files have no {min(of_module)} in {name}; give a complete model.")
    return result


def approximated(
    module: str, weight: Tensor, difference: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """The tensors of one module, and the relative error of its update.

    Args:
        weight: the base model's, (out, in). difference: ``W' - W``.
    """
    factors, error = best_factors(difference, config.rank)
    trainable, fixed = low_rank_functions(config.method).initialize(weight[None], config, generator)
    tensors = {key: tensor[0] for key, tensor in (trainable | fixed).items()}  # with no update
    if config.method == "lora":
        return tensors | as_lora(balanced(factors), config, tensors["A"]), error
    return tensors | as_delora(module, factors, tensors["w_norm"], config.rank, generator), error
