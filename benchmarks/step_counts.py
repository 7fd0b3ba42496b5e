"""Count the operations of a training step, and the bytes it reads and writes, without running it.

    python -m benchmarks.step_counts [--targets attention|maps] [--batch_size 1]

The steps are those of ``benchmarks.train_step`` at the true shapes, on tensors that have shapes but no values. So no
GPU is needed, and the counts are the same on every machine. An operation is a call that PyTorch dispatches and that is
not a view; it launches about one kernel.
"""

import argparse
import warnings
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.train_step import TARGETS, VARIANTS, Prepare, Trial

BOOKKEEPING = ("prim.", "profiler.")


class Counter(TorchDispatchMode):
    """Counts what PyTorch dispatches inside ``with``: ``operations``, the same ``by_name``, and their ``bytes``."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = str(func)
        if not func.is_view and not name.startswith(BOOKKEEPING):
            self.operations += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def count_step(prepare: Prepare, targets: tuple[str, ...], batch_size: int = 1) -> Counter:
    """Count the second step of a trial; the first also does the work that is needed only once."""
    # Tensors without values cannot be moved, but PEFT also moves adapters that are on the right device already.
    no_moves = mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), no_moves:
        warnings.simplefilter("ignore")  # a tensor without values has a null data pointer, and reading it warns
        trial = Trial(prepare, targets, batch_size, device="cpu")
        trial.step()
        with Counter() as counter:
            trial.step()
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--batch_size", type=int, default=1)
    options = parser.parse_args()
    print(f"| batch {options.batch_size}, {options.targets} | operations | minus the floor's | GiB read and written |")
    print("| --- | ---: | ---: | ---: |")
    floor = None
    for name, prepare in VARIANTS.items():
        counter = count_step(prepare, TARGETS[options.targets], options.batch_size)
        floor = counter.operations if floor is None else floor
        difference = f"{counter.operations - floor:+,}"
        print(f"| {name} | {counter.operations:,} | {difference} | {counter.bytes / 2**30:.1f} |", flush=True)


if __name__ == "__main__":
    main()
