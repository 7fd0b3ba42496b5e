"""Gradients between the backward and the optimizer: averaged over processes, clipped."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

BUCKET = 16 * 2**20
"""Numbers averaged in one exchange, 64 MiB; adapters of Stable Diffusion 1.5 have 3 million, so one is enough."""


@torch.no_grad()
def broadcast_parameters(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the first one's parameters."""
    if accelerator.num_processes > 1:
        broadcast([parameter.data for parameter in parameters])


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes, in as few exchanges as ``BUCKET`` allows.

    After the backward and not within it, as DistributedDataParallel would: a recorded backward cannot wait for other
    processes, and an adapter's gradients are too few for the overlap to be worth anything.
    """
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        mean = accelerator.reduce(flat, "mean")
        assert isinstance(mean, Tensor)
        pieces = mean.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(gradient) for piece, gradient in zip(pieces, bucket)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    waiting: list[Tensor] = []
    for gradient in gradients:
        if waiting and sum(g.numel() for g in waiting) + gradient.numel() > BUCKET:
            yield waiting
            waiting = []
        waiting.append(gradient)
    if waiting:
        yield waiting


@torch.no_grad()
def clip_gradients(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], max_norm: float, subjects: int
) -> None:
    """Scale the gradients down to a norm of ``max_norm``, each subject's by itself.

    Args:
        parameters: with several subjects stacked, (subjects * n, ...), a subject's tensors one after the other.
    """
    if subjects == 1:
        accelerator.clip_grad_norm_(list(parameters), max_norm)
        return
    accelerator.unscale_gradients()
    gradients = [p.grad.view(subjects, -1) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([row for g in gradients for row in g])).view(len(gradients), subjects)
    scale = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_max(1)
    torch._foreach_mul_(gradients, [scale[:, None]] * len(gradients))
