"""Operations and bytes of one training step, counted without running it: no GPU, no time, the same on every machine.

    python -m benchmarks.step_counts [--targets attention|maps] [--batch_size 1]

The steps are those of ``train_step``, at the true shapes, on tensors that have shapes but no values. An operation is a
call that PyTorch dispatches and that is no view, about one kernel launch each; bytes are what it reads and writes.
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
    """Counts what is dispatched while it is entered: ``operations`` and ``bytes``, and ``by_name``."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = str(func)
        if not func.is_view and not name.startswith(BOOKKEEPING):
            self.operations += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found


def count_step(prepare: Prepare, targets: tuple[str, ...], batch_size: int = 1) -> Counter:
    """The second step of a trial; the first makes what is made once."""
    # Tensors without values cannot be moved, which PEFT does to adapters that lie on the right device already.
    still = mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), still:
        warnings.simplefilter("ignore")  # asked for pointers, which stay null, a weight is seen as unchanged
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
    print(f"| batch {options.batch_size}, {options.targets} | operations | over the floor | GiB read and written |")
    print("| --- | ---: | ---: | ---: |")
    floor = None
    for name, prepare in VARIANTS.items():
        counter = count_step(prepare, TARGETS[options.targets], options.batch_size)
        floor = counter.operations if floor is None else floor
        more = f"{counter.operations - floor:+,}"
        print(f"| {name} | {counter.operations:,} | {more} | {counter.bytes / 2**30:.1f} |", flush=True)


if __name__ == "__main__":
    main()
