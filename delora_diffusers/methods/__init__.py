"""The methods, a file each. A method is a module with two functions over n stacked matrices of one shape:

``initialize(weight, config, generator) -> (trainable, fixed)``: two dicts of tensors whose first dimension is n;
``adapted_weight(weight, tensors, config) -> W'``: (n, out, in), in the dtype of the weight.

A low-rank method has a third, ``factors(tensors, config) -> (B~, A~)`` with ``W' = W + B~ A~``, and can run the split
path. ``NO_WEIGHT_DECAY`` names the tensors that weight decay must leave alone.
"""

from types import ModuleType

from delora_diffusers.methods import delora, lora

METHODS: dict[str, ModuleType] = {"delora": delora, "lora": lora}
