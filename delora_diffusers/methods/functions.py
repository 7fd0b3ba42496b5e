"""The interface that a method's file implements, as typed protocols, and the functions that look it up."""

import functools
import importlib
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.table import METHODS
from delora_diffusers.methods.update import Matrices

Tensors = dict[str, Tensor]
"""The tensors of n stacked matrices of one shape, by key; n is the first dimension."""
Shape = tuple[int, ...]


@runtime_checkable
class MethodFunctions(Protocol):
    """The functions of every method. W is (n, out, in): n stacked matrices of one shape."""

    def initialize(self, weight: Tensor, config: AdapterConfig, generator: torch.Generator) -> tuple[Tensors, Tensors]:
        """The initial trainable and fixed tensors, float32."""
        ...

    def shapes(self, weight: Shape, config: AdapterConfig) -> dict[str, Shape]:
        """The shape of every tensor of one matrix W of this shape, by key."""
        ...

    def adapted_weight(self, weight: Tensor, tensors: Tensors, config: AdapterConfig) -> Tensor:
        """W' (n, out, in) in the dtype of the weight."""
        ...


@runtime_checkable
class LowRankFunctions(MethodFunctions, Protocol):
    """A method whose update is a low-rank product (``has_factors`` in the table)."""

    def initialize(
        self, weight: Tensor | Matrices, config: AdapterConfig, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        """The initial trainable and fixed tensors, float32."""
        ...

    def factors(self, tensors: Tensors, config: AdapterConfig) -> tuple[Tensor, Tensor]:
        """B~ (n, out, k) and A~ (n, k, in) with ``W' - W = B~ A~``."""
        ...


@runtime_checkable
class ConstrainedFunctions(MethodFunctions, Protocol):
    """A method whose tensors may have to stay in a set."""

    def constrain(self, tensors: Tensors, config: AdapterConfig) -> None:
        """Project the tensors onto that set, in place; called after every optimizer step."""
        ...


@functools.cache
def method_functions(name: str) -> MethodFunctions:
    """The functions of a method in the table."""
    return cast(MethodFunctions, importlib.import_module(f"{__package__}.{METHODS[name].module}"))


@functools.cache
def low_rank_functions(name: str) -> LowRankFunctions:
    """The functions of a method with low-rank factors."""
    functions = method_functions(name)
    assert METHODS[name].has_factors and isinstance(functions, LowRankFunctions), f"{name} has no low-rank factors"
    return functions
