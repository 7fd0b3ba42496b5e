"""What is changed in a model to adapt it: an attention's processor, or single modules by parametrization, by a hook or
by another ``forward``."""

import dataclasses
from typing import Any, Protocol

from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.utils import parametrize

from delora_diffusers.adapter.modules import keep_own_keys
from delora_diffusers.adapter.processors import AdaptedAttnProcessor, copy_error
from delora_diffusers.adapter.projections import Projection, low_rank_product, stock_forward
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError


class Handle(Protocol):
    """Undoes a change of a module."""

    def remove(self) -> None: ...


STOCK_PROCESSORS = (AttnProcessor2_0, FusedAttnProcessor2_0)
"""The processors that ``AdaptedAttnProcessor`` replaces; with any other, the modules that it calls are adapted."""


def adapt_modules(adapter: Adapter, projection: Projection, handles: list[Handle]) -> None:
    """Adapt each module of a projection by itself, whoever calls it; adds hooks to ``handles``."""
    for index, module in enumerate(projection.linears):
        if adapter.path == "split":
            handles.append(module.register_forward_hook(LowRankHook(adapter, projection, index)))
        elif adapter.path == "lean":
            handles.append(ReplacedForward(module, LeanForward(adapter, projection, index)))
        else:
            adapted = AdaptedWeight(adapter, projection, index)
            parametrize.register_parametrization(module, projection.parameter, adapted)
            handles += keep_own_keys(module, projection.parameter)


@dataclasses.dataclass
class AdaptedAttention:
    """An attention module whose projections are adapted, whatever processor it is given.

    Attributes:
        prefix: its name. by_module: whether its linear modules are adapted one by one, for a processor that calls them.
    """

    prefix: str
    attention: Attention
    projections: list[Projection]
    by_module: bool = False

    def adapt(self, adapter: Adapter, handles: list[Handle]) -> None:
        """Adapt the attention, unless it is; called again before every forward, since its processor may be replaced.

        Diffusers replaces processors for attention slicing, xformers, fused projections, IP-Adapters and so on.

        Raises:
            InputError: the processor that it was given does not call the adapted modules.
        """
        processor: Any = self.attention.processor
        wrapped = self._has_wrapped_modules()
        if wrapped and isinstance(processor, AdaptedAttnProcessor):
            processor = processor.stock
            self.attention.set_processor(processor)
        if isinstance(processor, AdaptedAttnProcessor):
            return
        if type(processor) in STOCK_PROCESSORS and not wrapped:
            adapted: Any = AdaptedAttnProcessor(adapter, processor, self.projections, self.prefix)
            self.attention.set_processor(adapted)
            return
        if calls_fused_projections(self.attention):
            raise fused_error(self.prefix)
        if adapter.subjects > 1:
            raise InputError(
                f"{self.prefix} has a {type(processor).__name__}, but several subjects can be trained together only "
                "with diffusers' default attention processors; set those again."
            )
        if not self.by_module:
            self.by_module = True
            for projection in self.projections:
                adapt_modules(adapter, projection, handles)

    def _has_wrapped_modules(self) -> bool:
        """Whether another library, such as PEFT, has wrapped one of the adapted modules.

        Raises:
            InputError: an adapted module was replaced, or its weight parametrized, by something else.
        """
        wrapped = False
        for projection in self.projections:
            for name, linear in zip(projection.names, projection.linears):
                current = self.attention.get_submodule(name.removeprefix(self.prefix + "."))
                if linear not in current.modules() or (
                    parametrize.is_parametrized(linear, "weight") and not self.by_module
                ):
                    raise InputError(
                        f"{name} was changed after the adapter was attached; detach it, and attach it again."
                    )
                wrapped = wrapped or current is not linear
        return wrapped


def calls_fused_projections(attention: Any) -> bool:
    """Whether an attention calls fused projections; diffusers keeps them, unused, after it has unfused them."""
    return attention.fused_projections and "Fused" in type(attention.processor).__name__


def fused_error(name: str) -> InputError:
    return InputError(
        f"the projections of {name} were fused, which copies their weights without the adapter; call "
        "unfuse_qkv_projections(), or detach the adapter, fuse, and attach it again."
    )


class AdaptedWeight(nn.Module):
    """Parametrization of one module's weight: W', or W while the adapter's strength is 0.

    Args:
        index: of the module among those of the projection.
    """

    def __init__(self, adapter: Adapter, projection: Projection, index: int):
        super().__init__()
        self.unregistered = (adapter, projection)  # in a tuple, so that neither becomes a submodule of the model
        self.index = index

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        raise copy_error()

    def forward(self, weight: Tensor) -> Tensor:
        adapter, projection = self.unregistered
        if projection.weight is None or adapter.strength == 0:
            return weight
        if len(projection.linears) == 1:
            return projection.weight
        return projection.weight[self.index * len(weight) : (self.index + 1) * len(weight)]


class LeanForward:
    """A linear module's ``forward`` on the lean path."""

    def __init__(self, adapter: Adapter, projection: Projection, index: int):
        self.adapter = adapter
        self.projection = projection
        self.index = index

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        raise copy_error()

    def __call__(self, x: Tensor) -> Tensor:
        if self.adapter.strength == 0:
            return stock_forward(self.projection.linears[self.index], x)
        return self.projection(x, self.index, 1)[0]


class ReplacedForward:
    """Replaces a module's ``forward`` until ``remove``; whatever else has replaced it since then is kept."""

    def __init__(self, module: nn.Module, forward: LeanForward):
        self.module = module
        self.forward = forward
        module.forward = forward

    def remove(self) -> None:
        """Give the module the ``forward`` of its class again."""
        if self.module.__dict__.get("forward") is self.forward:
            del self.module.__dict__["forward"]


class LowRankHook:
    """Forward hook of a linear module that adds the low-rank product to its output."""

    def __init__(self, adapter: Adapter, projection: Projection, index: int):
        self.adapter = adapter
        self.projection = projection
        self.member = slice(index, index + 1)

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        raise copy_error()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.adapter.strength == 0:
            return output
        assert self.projection.a is not None and self.projection.b is not None
        a, b = self.projection.a[self.member], self.projection.b[self.member]
        return output + low_rank_product(inputs[0], a, b)[0].to(output.dtype)
