"""Recipes: the settings of a published experiment as defaults of the flags of ``eval benchmark`` and ``eval study``."""

import argparse
import dataclasses
from collections.abc import Mapping

from eval.benchmark.tasks import flag_values

Flags = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults of one experiment. Flags that are given override them.

    Attributes:
        train, generate: flags of the training script and of ``generate``.
        train_by_method: further training flags of single methods.
        identifier, images_per_prompt, score_every: the flags of that name; None to leave them as they are.
        multipliers: of the learning rates that ``comparison`` tries.
    """

    train: Flags
    generate: Flags
    train_by_method: Mapping[str, Flags] = dataclasses.field(default_factory=dict)
    identifier: str | None = None
    images_per_prompt: int | None = None
    score_every: int | None = None
    multipliers: tuple[float, ...] | None = None


SUBJECTS = {
    # Table 3 of DeLoRA (Bini et al., ICLR 2025). It follows ETHER (Bini et al., ICML 2024, appendix C.1), which follows
    # OFT's code (Qiu et al., NeurIPS 2023). Learning rates, rank and batch size are the training script's defaults.
    "paper": Recipe(
        train={
            "recipe": "paper",
            "max_train_steps": 1400,  # ETHER, C.1
            "with_prior_preservation": True,  # OFT's scripts, as are the next two
            "num_class_images": 200,
            "prior_loss_weight": 1.0,
        },
        generate={"scheduler": "dpm++", "num_inference_steps": 25},  # OFT's training script
        train_by_method={"oft": {"coft_eps": 6e-5}},  # OFT's scripts
        identifier="qwe",  # OFT's scripts
        images_per_prompt=4,  # DreamBooth (Ruiz et al., CVPR 2023); DeLoRA, section 3.1
        score_every=200,  # ETHER, C.1
        multipliers=(1.0,),  # DeLoRA prints the rates that its search found
    )
}
MAPS = {
    # Table 2 of DeLoRA, which follows OFT's control code.
    "paper": Recipe(
        train={
            "max_train_steps": 13910,  # DeLoRA, section 3.2: ten epochs; OFT's list of ADE20K has 22,244 pairs
            "train_batch_size": 16,  # OFT's control code
            "mixed_precision": "bf16",  # DeLoRA, section 3.2
        },
        generate={"scheduler": "ddim", "num_inference_steps": 50, "guidance_scale": 9},  # OFT's control code
    )
}
NAMES = tuple(SUBJECTS)


def with_recipe(options: argparse.Namespace, recipes: Mapping[str, Recipe] = SUBJECTS) -> argparse.Namespace:
    """The options with the defaults of ``--recipe`` where they were not given.

    Existing images (``--generated_dir``) are neither trained for nor generated. The studies ``prolonged`` and
    ``frontier`` vary the number of steps, so their images are those of the last step and not of the best.

    Raises:
        InputError: a word of ``--train`` or ``--generate`` is not FLAG=VALUE.
    """
    if options.recipe is None:
        return options
    options, recipe = argparse.Namespace(**vars(options)), recipes[options.recipe]
    existing = getattr(options, "generated_dir", None) is not None
    if existing or getattr(options, "name", None) in ("prolonged", "frontier"):
        recipe = dataclasses.replace(recipe, score_every=None)
    for flag in () if existing else ("train", "generate"):
        given = flag_values(getattr(options, flag), f"--{flag}")
        defaults = [f"{name}={_word(v)}" for name, v in getattr(recipe, flag).items() if name not in given]
        setattr(options, flag, [*defaults, *getattr(options, flag)])
    for name in ("identifier", "images_per_prompt", "score_every"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(recipe, name))
    return options


def with_papers_training(options: argparse.Namespace) -> argparse.Namespace:
    """The options with ``recipe=paper`` among the training flags, unless another recipe is given: a study of the paper
    does not follow this project's defaults."""
    if "recipe" in flag_values(options.train, "--train"):
        return options
    return argparse.Namespace(**vars(options) | {"train": ["recipe=paper", *options.train]})


def training_flags(options: argparse.Namespace, method: str, recipes: Mapping[str, Recipe] = SUBJECTS) -> dict:
    """The values of ``--train``, with what the recipe sets for the method only.

    A flag that the recipe sets for single methods is left out for all others, also if it is given.

    Raises:
        InputError: a word is not FLAG=VALUE.
    """
    given = flag_values(options.train, "--train")
    by_method = {} if options.recipe is None else recipes[options.recipe].train_by_method
    of_others = {name for flags in by_method.values() for name in flags} - set(by_method.get(method, {}))
    return {**by_method.get(method, {}), **{name: v for name, v in given.items() if name not in of_others}}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
