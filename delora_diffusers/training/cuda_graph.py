"""Forward and backward of a micro-batch; on CUDA, recorded once as a graph and replayed.

A step of Stable Diffusion launches some two thousand kernels, and below a batch size of about 16 a fast GPU waits for
the CPU to launch them. A CUDA graph launches all of them at once. It reads and writes fixed memory addresses, so
batches are copied into its inputs, and gradients are written, or accumulated, in place.
"""

import gc
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError

Batch = Mapping[str, Tensor]
"""Tensors of a micro-batch by name, on the device, with the same shapes in every micro-batch of a run. They are new in
every micro-batch: those with which the graph is recorded become its inputs and are overwritten."""

EAGER_FIRST = 3
"""Micro-batches that run before recording, so that kernels choose their workspaces and gradients are allocated."""


class MicroBatches:
    """Accumulates the gradients of micro-batches.

    Args:
        accelerator: scales the loss for accumulation and for fp16.
        adapters: their adapted weights are computed before each forward.
        parameters: everything that is trained.
        losses_of: returns each subject's loss in a batch, (subjects,); it must not be random or wait for the device.
        capture: whether to record a graph. If so, gradients must be set to zero, not to None, between steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        adapters: Sequence[Adapter],
        parameters: Sequence[Parameter],
        losses_of: Callable[..., Tensor],
        capture: bool,
    ):
        self.accelerator = accelerator
        self.adapters = adapters
        self.parameters = parameters
        self.losses_of = losses_of
        self.capture = capture
        self._eager_left = EAGER_FIRST
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream() if capture else None
        self._inputs: dict[str, Tensor] = {}
        self._losses: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Add a batch's gradients to the parameters' and return its losses, detached.

        Raises:
            InputError: the graph cannot be recorded.
        """
        if not self.capture:
            return self._forward_and_backward(batch)
        if self._eager_left:
            self._eager_left -= 1
            return self._run_on_side_stream(batch)
        if self._graph is None:
            self._record(batch)
        for name, static_input in self._inputs.items():
            static_input.copy_(batch[name])
        assert self._graph is not None and self._losses is not None
        self._graph.replay()
        return self._losses

    def _forward_and_backward(self, batch: Batch) -> Tensor:
        for adapter in self.adapters:
            adapter.refresh()
        losses = self.losses_of(**batch)
        self.accelerator.backward(losses.sum())  # a subject's gradients depend on its loss alone
        return losses.detach()

    def _run_on_side_stream(self, batch: Batch) -> Tensor:
        """Run eagerly on the recording's stream: autograd remembers the stream of a gradient's first accumulation."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = self._forward_and_backward(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _record(self, batch: Batch) -> None:
        self._inputs = dict(batch)
        if self.accelerator.gradient_accumulation_steps == 1:
            # Then the graph allocates the gradients itself, at its end, in memory that activations no longer need.
            for parameter in self.parameters:
                parameter.grad = None
        # What the first micro-batches left in PyTorch's cache cannot be used by the graph, which has a pool of its own.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # Capture only this thread: with several processes, another thread monitors their communication.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._losses = self._forward_and_backward(self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise InputError(
                f"the training step cannot be recorded as a CUDA graph ({reason}); give --no-cuda_graph."
            ) from error
        self._graph = graph


def can_capture(accelerator: Accelerator, adapters: Sequence[Adapter]) -> bool:
    """Whether a training step with these adapters can be recorded."""

    return accelerator.device.type == "cuda" and all(adapter.method.capturable for adapter in adapters)
