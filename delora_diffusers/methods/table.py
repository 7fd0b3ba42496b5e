"""The table of methods: one row per ``--method``. Imports no torch, so commands can check flags without delay.

To add a method, add a file with its functions (see ``functions.py``) to this folder and a row here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """What the rest of the project needs to know about a method.

    Attributes:
        title: the name in tables and figures.
        module: the file in this folder; variants of a method share a file that tells them apart by ``config.method``.
        learning_rate: the default for subject-driven generation with Stable Diffusion.
        map_learning_rate: the default for semantic maps; None if it is the same.
        key_prefix: prefix of the last part of its tensors' names in an adapter file.
        has_rank: whether ``--rank`` has an effect.
        has_factors: whether W' - W is a low-rank product, which the split path and the LoRA exports need.
        no_weight_decay: keys of the tensors without weight decay; they are trained with ``--lambda_learning_rate``.
        capturable: whether a training step can be recorded as a CUDA graph.
    """

    title: str
    module: str
    learning_rate: float
    key_prefix: str
    has_rank: bool
    has_factors: bool = False
    no_weight_decay: tuple[str, ...] = ()
    capturable: bool = True
    map_learning_rate: float | None = None

    def default_rate(self, maps: bool) -> float:
        """The default learning rate for semantic maps, or for subjects."""
        return self.map_learning_rate if maps and self.map_learning_rate is not None else self.learning_rate


METHODS = {
    "delora": Method("DeLoRA", "delora", 2e-2, "delora_", True, has_factors=True, no_weight_decay=("lambda",)),
    "lora": Method("LoRA", "lora", 6e-4, "lora_", True, has_factors=True),
    "dora": Method("DoRA", "dora", 6e-4, "dora_", True),
    "dora_fixed_magnitude": Method("DoRA with fixed magnitude", "dora", 6e-4, "dora_", True),
    "ether": Method("ETHER", "ether", 6e-3, "ether_", False, map_learning_rate=1e-3),
    "etherplus": Method("ETHER+", "ether", 6e-3, "ether_", False, map_learning_rate=1e-3),
    "etherplus_onesided": Method("one-sided ETHER+", "ether", 6e-3, "ether_", False, map_learning_rate=1e-3),
    # Solving linear equations cannot be recorded in a CUDA graph.
    "oft": Method("OFT", "oft", 6e-5, "oft_", False, capturable=False, map_learning_rate=1e-5),
    "delora_symmetric": Method(
        "symmetric multiplicative DeLoRA", "relaxations", 2e-2, "relaxed_", True, no_weight_decay=("lambda",)
    ),
    "delora_multiplicative": Method(
        "multiplicative DeLoRA", "relaxations", 2e-2, "relaxed_", True, no_weight_decay=("lambda",)
    ),
    "full": Method("full fine-tuning", "full", 5e-6, "full_", False),
}
"""Where the default learning rates were printed. Subjects: DeLoRA's, LoRA's and DoRA's in DeLoRA (Bini et al., ICLR
2025, appendix B); ETHER+'s, OFT's and full fine-tuning's in ETHER (Bini et al., ICML 2024, appendix C.1), whose setting
DeLoRA follows. Maps: ETHER+'s and OFT's in ETHER, appendix C.2. DeLoRA chose its rates for maps by a search that it
does not print, so they are those for subjects. No paper prints a rate for ETHER, one-sided ETHER+, DoRA with fixed
magnitude or the two relaxations; they have that of the closest method."""

LAMBDA_LEARNING_RATE = 1e-3
"""DeLoRA's learning rate for the boundary (Bini et al., ICLR 2025, appendix B)."""


def title_of(name: str) -> str:
    """The title of a method; ``none`` is the base model without an adapter."""
    return "base model" if name == "none" else METHODS[name].title
