"""Turn running out of memory into a sentence that says what helps. Imports no torch before that."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from delora_diffusers.errors import InputError

SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What the errors of libraries say that have no type of their own for it."""

ANYWHERE = ("--mixed_precision bf16 or fp16", "a smaller batch size", "a smaller --resolution")
"""What helps wherever memory runs out."""


@contextmanager
def explain_out_of_memory(
    activity: str, remedies: Sequence[str], checkpoint: Callable[[], Path | None] = lambda: None
) -> Iterator[None]:
    """Explain an error for lack of memory that occurs inside.

    Args:
        activity: what is being done, such as ``training on batches of 4 at 512 x 512``.
        remedies: what to change, in the order of its effect.
        checkpoint: finds the last checkpoint of a training.

    Raises:
        InputError: memory ran out. Other errors stay as they are.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(out_of_memory_sentence(activity, remedies, checkpoint())) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def out_of_memory_sentence(activity: str, remedies: Sequence[str], checkpoint: Path | None = None) -> str:
    """What ran out of memory, and what helps; see ``explain_out_of_memory``."""
    import torch

    memory = "memory ran out"
    if torch.cuda.is_available():
        free, total = free_bytes() / 2**30, torch.cuda.mem_get_info()[1] / 2**30
        memory = f"the GPU's memory ran out, with {free:.1f} of {total:.1f} GiB free"
    last = "" if checkpoint is None else f" The last good checkpoint is {checkpoint}."
    return f"{memory}, while {activity}; in the order of their effect, use {', '.join(remedies)}.{last}"


def free_bytes() -> int:
    """GPU memory that this process can still allocate, within its limit if it has one."""
    import torch

    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free + unused, int(fraction * total) - torch.cuda.memory_allocated())
