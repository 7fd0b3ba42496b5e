"""Forward and backward of a micro-batch; on CUDA, recorded once for each shape as a graph and replayed.

A step of Stable Diffusion launches some two thousand kernels, and below a batch size of about 16 a fast GPU waits for
the CPU to launch them. A CUDA graph launches all of them at once. It reads and writes fixed memory addresses, so
batches are copied into its inputs, and gradients are written, or accumulated, in place.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError

Batch = Mapping[str, Tensor]
"""Tensors of a micro-batch by name, on the device. They are new in every micro-batch: those with which a graph is
recorded become its inputs and are overwritten."""
Shapes = tuple[tuple[str, torch.Size], ...]
"""The names and shapes of a micro-batch's tensors."""


def shapes_of(batch: Batch) -> Shapes:
    """The shapes of a micro-batch."""
    return tuple((name, tensor.shape) for name, tensor in batch.items())


EAGER_FIRST = 3
"""Micro-batches that run before recording, so that kernels choose their workspaces and gradients are allocated."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recorded step: its graph, the tensors that it reads, and the losses that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    losses: Tensor


class MicroBatches:
    """Adds up the gradients of micro-batches.

    Args:
        accelerator: scales the loss for accumulation and for fp16.
        adapters: their adapted weights are computed before each forward.
        parameters: everything that is trained.
        losses_of: returns each subject's loss in a batch, (subjects,); it must not be random or wait for the device.
        capture: whether to record graphs. If so, gradients must be set to zero, not to None, between steps.
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
        # With one graph and no accumulation, the graph allocates the gradients itself, at its end, in memory that
        # activations no longer need. Several graphs must add to the same gradients.
        self._allocates_gradients = accelerator.gradient_accumulation_steps == 1
        self._eager_left = EAGER_FIRST
        self._recordings: dict[Shapes, Recording] = {}
        self._stream = torch.cuda.Stream() if capture else None

    def record_each(self, batches: Sequence[Batch]) -> None:
        """Record a graph for the shapes of each of these batches, before training.

        The gradients of the micro-batches that run for this are not used. All of them run before the first recording,
        since a graph keeps its memory; and the largest is recorded first, so that the others fit into its memory.
        """
        self._allocates_gradients = False
        self._eager_left = 0
        ordered = sorted(batches, key=lambda batch: -sum(tensor.numel() for tensor in batch.values()))
        for batch in ordered * EAGER_FIRST:
            self._run_on_side_stream(batch)
        for batch in ordered:
            self._recordings[shapes_of(batch)] = self._record(batch)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

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
        shapes = shapes_of(batch)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(batch)
        recording = self._recordings[shapes]
        for name, static_input in recording.inputs.items():
            static_input.copy_(batch[name])
        recording.graph.replay()
        return recording.losses

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

    def _record(self, batch: Batch) -> Recording:
        inputs = dict(batch)
        if self._allocates_gradients:
            for parameter in self.parameters:
                parameter.grad = None
        # What the first micro-batches left in PyTorch's cache cannot be used by the graph, which has a pool of its own.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Graphs run one after another, and nothing but gradients and losses outlives a run, so they share their memory.
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        try:
            # Capture only this thread: with several processes, another thread monitors their communication.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                losses = self._forward_and_backward(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise InputError(
                f"the training step cannot be recorded as a CUDA graph ({reason}); give --no-cuda_graph."
            ) from error
        return Recording(graph, inputs, losses)


def can_capture(accelerator: Accelerator, adapters: Sequence[Adapter]) -> bool:
    """Whether a training step with these adapters can be recorded."""

    return accelerator.device.type == "cuda" and all(adapter.method.capturable for adapter in adapters)
