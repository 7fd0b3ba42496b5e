"""Estimate the GPU memory of a training step without a GPU and without allocating the model.

The step runs on tensors that have shapes but no values, which takes seconds even for the largest models, while every
allocation and release of memory is counted:

    with shapes_only():
        unet = build_model(lambda: UNet2DConditionModel.from_config(config), torch.bfloat16)
        adapter = attach(unet, AdapterConfig(rank=16))
        noisy, timesteps, text = torch.empty(...), torch.empty(...), torch.empty(...)
        memory = estimate_step([unet], [adapter], lambda: unet(noisy, timesteps, text).sample.float().pow(2).mean())

The estimate is of an eager step, in the sense of ``torch.cuda.max_memory_allocated``. A GPU needs more than that:
``LIBRARIES`` and ``CONTEXT``, what PyTorch's allocator reserves without using it, and with a CUDA graph the memory that
the graph keeps for itself.
"""

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONTEXT = 2**29
"""Bytes of the CUDA context and the loaded kernels, about; they are outside PyTorch's allocator."""
LIBRARIES = 2**27
"""Bytes of the workspaces of cuBLAS (32 MiB per thread on Hopper) and cuDNN, about; allocated through PyTorch."""

EIGHT_BIT_MIN = 4096
"""bitsandbytes keeps float32 states for parameters with fewer elements."""
EIGHT_BIT_BLOCK = 256
"""Elements of an 8-bit state that share a float32 scale."""


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Memory of a training step at its peak, in bytes.

    Attributes:
        weights: the frozen parameters and buffers of all models.
        adapter: the trainable parameters, their gradients, optimizer states and average, and the adapters' fixed
            buffers.
        activations: everything else: the batch, the saved tensors and the temporary tensors. Since gradients appear
            one by one, a peak before the last of them needs that much less for them and more for activations.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, new tensors have a shape, a dtype and a device, but no values and no memory.

    Models with such tensors cannot be moved or cast with ``.to``; build them in the right dtype with ``build_model``.
    """
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # a tensor without values has a null data pointer, and reading it warns
        yield


def build_model(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model that a function builds, frozen and in this dtype. Call it inside ``shapes_only``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def estimate_step(
    models: Sequence[nn.Module],
    adapters: Sequence[nn.Module],
    loss: Callable[[], Tensor],
    optimizer: str = "adamw",
    use_ema: bool = False,
) -> StepMemory:
    """The memory of a training step: forward, backward and optimizer.

    Call it inside ``shapes_only``, or with models on the meta device. Gradients that exist before count as kept between
    steps, as with gradient accumulation; otherwise the backward allocates them. They are None afterwards.

    Args:
        models: all models on the GPU, with gradient checkpointing enabled or not. Their parameters that require
            gradients count as part of the adapters.
        adapters: modules that are trained and are not submodules of ``models``, such as what ``attach`` returns.
        loss: computes the loss, a scalar, from a batch that exists already.
        optimizer: see ``optimizer_bytes``. use_ema: whether an average of the trainable parameters is kept.
    """
    owned = [tensor for adapter in adapters for tensor in (*adapter.parameters(), *adapter.buffers())]
    frozen = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    trainable = [p for p in {id(t): t for t in owned + frozen}.values() if isinstance(p, nn.Parameter)]
    trainable = [parameter for parameter in trainable if parameter.requires_grad]
    adapter = _storages([*owned, *trainable])
    weights = {key: size for key, size in _storages(frozen).items() if key not in adapter}
    with _flash_attention(), LiveBytes([*owned, *frozen]) as live:
        loss().backward()
    gradients = sum(_storages([p.grad for p in trainable if p.grad is not None]).values())
    for parameter in trainable:
        parameter.grad = None
    average = sum(_storages(trainable).values()) if use_ema else 0
    return StepMemory(
        weights=sum(weights.values()),
        adapter=sum(adapter.values()) + gradients + optimizer_bytes(trainable, optimizer) + average,
        activations=live.peak - gradients,
    )


def optimizer_bytes(parameters: Iterable[nn.Parameter], optimizer: str = "adamw") -> int:
    """Bytes of an optimizer's states with its default arguments, in each parameter's dtype, or 8-bit with a scale per
    block. Lambda, which AdamW may train, is too small to matter."""
    return sum(_state_bytes(parameter, optimizer) for parameter in parameters)


def _state_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    count = parameter.numel()
    if optimizer == "adamw8bit":
        return 2 * (4 * count if count < EIGHT_BIT_MIN else count + 4 * math.ceil(count / EIGHT_BIT_BLOCK))
    # Adafactor's second moment is the product of a column and a row for each matrix, if it is a matrix.
    *leading, width = parameter.shape or (1,)
    factored = math.prod(leading) + math.prod(leading[:-1]) * width if leading else count
    elements = {
        "adamw": 2 * count,
        "adamw_schedulefree": 2 * count,
        "prodigy": 4 * count,  # both moments, the start, and the sum of gradients
        "lion": count,
        "adafactor": factored,
        "came": count + 2 * factored if leading else 2 * count,
    }
    return elements[optimizer] * parameter.element_size()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist inside ``with``, by storage: ``live`` now and ``peak``.

    A storage counts from the operation that returns it until it is freed. A storage that is first seen as an argument
    existed before, and counts from the start.

    Args:
        uncounted: tensors that do not count.
    """

    def __init__(self, uncounted: Iterable[Tensor] = ()):
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()
        for tensor in uncounted:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in tree_leaves((args, kwargs)):
            self.peak += self._count(argument)
        output = func(*args, **(kwargs or {}))
        for result in tree_leaves(output):
            self._count(result)
        self.peak = max(self.peak, self.live)
        return output

    def _count(self, tensor: Any) -> int:
        """Count a tensor's storage, unless it is known; returns the bytes added."""
        if not isinstance(tensor, Tensor):
            return 0
        storage = tensor.untyped_storage()
        return 0 if storage._cdata in self._known else self._watch(storage, storage.nbytes())

    def _watch(self, storage: torch.UntypedStorage, size: int) -> int:
        self._known.add(storage._cdata)
        self.live += size
        weakref.finalize(storage, self._free, storage._cdata, size)
        return size

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)  # it may be used again
        self.live -= size


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """Replaces scaled dot-product attention, whose kernel depends on the device, by ``_FlashAttention``."""
    # Not a TorchFunctionMode: the backward suspends it, so that checkpointing would recompute something else.
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FlashAttention.apply(
        query, key, value
    )
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


class _FlashAttention(torch.autograd.Function):
    """The allocations of a flash attention kernel: no attention matrix, and a log-sum-exp for the backward.

    Query (batch, heads, tokens, width), key and value (batch, heads, other tokens, width). The kernels work on
    (batch, tokens, heads, width), so that the transposes of the caller are views.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = _like(query, value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, logsumexp = ctx.saved_tensors
        gradients = _like(query), _like(key), _like(value)
        # The kernel sums the gradient of the query in float32, and the row sums of output * grad.
        _working = _like(query, dtype=torch.float32), torch.empty_like(logsumexp)
        return gradients


def _like(tensor: Tensor, width: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor (batch, heads, tokens, width), contiguous as (batch, tokens, heads, width)."""
    *batch, heads, tokens, own_width = tensor.shape
    return tensor.new_empty((*batch, tokens, heads, width or own_width), dtype=dtype or tensor.dtype).transpose(-3, -2)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The distinct storages of tensors: bytes by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}
