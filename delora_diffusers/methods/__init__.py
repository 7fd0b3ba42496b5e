"""The methods, a file each. A method is a module with two functions over n stacked matrices of one shape:

``initialize(weight, config, generator) -> (trainable, fixed)``: two dicts of float32 tensors, n their first dimension;
``adapted_weight(weight, tensors, config) -> W'``: (n, out, in), in the dtype of the weight.

A file holds a method and its variants, which ``config.method`` tells apart.

A low-rank method has a third, ``factors(tensors, config) -> (B~, A~)`` with ``W' = W + B~ A~``, and can run the split
path. ``NO_WEIGHT_DECAY`` names the tensors that weight decay must leave alone; ``CAPTURABLE = False`` says that the
method cannot be recorded in a CUDA graph.
"""

from types import ModuleType

from delora_diffusers.methods import delora, dora, ether, full, lora, oft, relaxations

METHODS: dict[str, ModuleType] = {
    "delora": delora,
    "lora": lora,
    "dora": dora,
    "dora_fixed_magnitude": dora,
    "ether": ether,
    "etherplus": ether,
    "etherplus_onesided": ether,
    "oft": oft,
    "delora_symmetric": relaxations,
    "delora_multiplicative": relaxations,
    "full": full,
}
