"""The adapter: all trainable tensors of one adapted model, stacked by shape, and the adapted weights made from them.

Once a step the adapter makes W' of every adapted projection, a few kernels for each distinct shape, and hands each
projection its piece. Stable Diffusion's 128 attention projections have 6 shapes.

An adapter can hold several subjects, trained at once on one frozen model: each stack then has the n tensors of the
first subject, those of the second and so on, and the batch's first samples are the first subject's, and so on.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from delora_diffusers import update
from delora_diffusers.config import RANKED, AdapterConfig
from delora_diffusers.errors import InputError
from delora_diffusers.methods import METHODS


def base_parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """The pretrained parameter of a module, of a linear one (out, in), parametrized or not."""
    if parametrize.is_parametrized(module, name):
        return module.get_parameter(f"parametrizations.{name}.original")
    return module.get_parameter(name)


class Projection:
    """One product: a linear module, or several of one shape that read the same input and are computed as one.

    Holds the current adapted weights; the adapter refreshes them. Not a module: it owns no state that is saved.

    Args:
        names: of the modules; full fine-tuning also takes one parameter of any module, under the parameter's name.
        linears: the modules.
        parameter: which parameter of theirs is adapted.
    """

    def __init__(self, names: tuple[str, ...], linears: tuple[nn.Module, ...], parameter: str = "weight"):
        self.names = names
        self.linears: tuple[Any, ...] = linears
        self.parameter = parameter
        # (g * out, in): W' on the fast path, W on the split path; (subjects, g * out, in) with several subjects.
        self.weight: Tensor | None = None
        self.a: Tensor | None = None  # (g, k, in), split path only
        self.b: Tensor | None = None  # (g, out, k), split path only

    def __call__(self, x: Tensor, first: int = 0, count: int | None = None) -> Sequence[Tensor]:
        """The outputs (..., out) of ``count`` members from ``first`` on, one product for all of them.

        Args:
            x: (..., in).
        """
        assert self.weight is not None, "the adapter has not made its weights yet; call adapter() first"
        weight, a, b, linears = self.weight, self.a, self.b, self.linears
        if count is not None and count != len(linears):
            # Only here: the backward of a slice fills a whole tensor with zeros.
            members, out_features = slice(first, first + count), linears[0].out_features
            weight = weight[..., first * out_features : (first + count) * out_features, :]
            linears = linears[members]
            a, b = (None, None) if a is None or b is None else (a[members], b[members])
        bias = linears[0].bias
        if bias is not None and len(linears) > 1:
            bias = torch.cat([linear.bias for linear in linears])
        y = nn.functional.linear(x, weight, bias) if weight.ndim == 2 else by_subject(x, weight, bias)
        outputs = y.chunk(len(linears), dim=-1) if len(linears) > 1 else (y,)
        if a is None or b is None:
            return outputs
        return [y + d.to(y.dtype) for y, d in zip(outputs, low_rank_product(x, a, b))]


def by_subject(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W'^T`` with the W' of each sample's subject: x (subjects * batch, ..., in), W' (subjects, out, in)."""
    y = x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[1])


def low_rank_product(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """``(x A~^T) B~^T`` in the factors' dtype for x (..., in), A~ (g, k, in), B~ (g, out, k): g tensors (..., out)."""
    with torch.autocast(x.device.type, enabled=False):
        hidden = nn.functional.linear(x.to(a.dtype), a.flatten(0, 1)).chunk(len(a), dim=-1)
        return [nn.functional.linear(h, b_i) for h, b_i in zip(hidden, b)]


class Stack(nn.Module):
    """The tensors of n adapted weights of one shape, (out, in) where linear, stacked: (n, ...), (subjects * n, ...)."""

    def __init__(self, projections: Sequence[Projection], config: AdapterConfig, generators: Sequence[torch.Generator]):
        super().__init__()
        self.projections = list(projections)
        self.names = [name for projection in projections for name in projection.names]
        self.sites = [(module, part.parameter) for part in projections for module in part.linears]
        self._weight: Tensor | None = None
        self._pointers: list[int] = []
        weight = self.base_weight()
        starts = [METHODS[config.method].initialize(weight, config, generator) for generator in generators]
        trainable, fixed = (
            {key: torch.cat([one[key].to(weight.device) for one in of_subjects]) for key in of_subjects[0]}
            for of_subjects in zip(*starts)
        )
        self.trainable = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in trainable.items()})
        for key, tensor in fixed.items():
            self.register_buffer(key, tensor)

    def base_weight(self) -> Tensor:
        """The pretrained weights, (n, out, in), or (n, ...), in the model's dtype and on its device.

        The model's own parameters are views of this one tensor, so it costs no memory. Where the model was moved or
        cast since, they are stacked anew, and the adapter's tensors follow to the new device.
        """
        parameters = [base_parameter(*site) for site in self.sites]
        if self._weight is None or [p.data_ptr() for p in parameters] != self._pointers:
            self._weight = torch.stack([p.detach() for p in parameters])
            for parameter, view in zip(parameters, self._weight):
                parameter.data = view
            self._pointers = [p.data_ptr() for p in parameters]
            self.to(self._weight.device)
        return self._weight

    def release(self) -> None:
        """Give each module of the model a weight of its own again."""
        for site in self.sites:
            parameter = base_parameter(*site)
            parameter.data = parameter.data.clone()
        self._weight = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by key, trainable and fixed, each with leading dimension n, or subjects * n."""
        return dict(self.trainable.items()) | dict(self.named_buffers(recurse=False))

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a tensor that W' is made from changes in place."""
        weights = (base_parameter(*site) for site in self.sites)
        return tuple(t._version for t in (*self.trainable.values(), *weights))


class Adapter(nn.Module):
    """Everything that trains in one adapted model. Made by ``attach``; call it to make the adapted weights.

    The model's forward calls it by itself, so that user code need not. A training loop that wraps the adapter (in
    DistributedDataParallel, say) calls the wrapper before each forward of the model instead.

    Args:
        config: what to build.
        projections: the products to adapt, in the model's order.
        generators: source of each subject's random start, on the CPU.
    """

    def __init__(self, config: AdapterConfig, projections: Sequence[Projection], generators: Sequence[torch.Generator]):
        super().__init__()
        self.config = config
        self.subjects = len(generators)
        self.method = METHODS[config.method]
        self._has_factors = hasattr(self.method, "factors")
        by_shape: dict[tuple[int, ...], list[Projection]] = {}
        for projection in projections:
            shape = tuple(base_parameter(projection.linears[0], projection.parameter).shape)
            if config.method in RANKED and config.rank > min(shape):
                raise InputError(
                    f"rank is {config.rank}, but {projection.names[0]} is {' x '.join(map(str, shape))}; "
                    f"choose a rank of at most {min(shape)}."
                )
            by_shape.setdefault(shape, []).append(projection)
        self.stacks: Iterable[Stack] = nn.ModuleList(
            Stack(members, config, generators) for members in by_shape.values()
        )
        self._strength = 1.0
        self._made_from: tuple | None = None
        self.prepared = False

    @property
    def strength(self) -> float:
        """Scales W' - W; 0 is the base model exactly, computed by the stock modules."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = float(value)
        self._made_from = None

    @property
    def names(self) -> list[str]:
        """The adapted modules, as in ``model.named_modules()``."""
        return [name for stack in self.stacks for name in stack.names]

    def forward(self) -> None:
        """Make the adapted weights and hand each projection its own.

        With gradients enabled they are made anew, since a graph serves one backward; without, only where something
        that they are made from has changed.
        """
        if self._strength != 0:
            bases = [stack.base_weight() for stack in self.stacks]
            made_from = None
            if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
                made_from = tuple((id(base), *stack.versions()) for base, stack in zip(bases, self.stacks))
            if made_from is None or made_from != self._made_from:
                for base, stack in zip(bases, self.stacks):
                    with torch.autocast(base.device.type, enabled=False):
                        self._make(base, stack)
                self._made_from = made_from
        self.prepared = True

    def _make(self, base: Tensor, stack: Stack) -> None:
        # Taken apart with split, whose backward is one concatenation; indexing would add up n padded gradients.
        sizes = [len(projection.names) for projection in stack.projections]
        rows = [size * base.shape[1] for size in sizes]
        if self.config.path == "split":
            b, a = self._factors(stack.tensors())
            pieces = zip(base.flatten(0, 1).split(rows), a.split(sizes), b.split(sizes))
            for projection, (weight, a_piece, b_piece) in zip(stack.projections, pieces):
                projection.weight, projection.a, projection.b = weight, a_piece, b_piece
        else:
            adapted = self._adapted_weight(self._of_subjects(base), stack.tensors()).flatten(0, 1)
            several = self.subjects > 1
            if several:
                adapted = adapted.unflatten(0, (self.subjects, -1))
            for projection, weight in zip(stack.projections, adapted.split(rows, dim=1 if several else 0)):
                projection.weight = weight

    def _of_subjects(self, base: Tensor) -> Tensor:
        """The pretrained weights (n, ...) once for each subject."""
        return base if self.subjects == 1 else base.repeat(self.subjects, *[1] * (base.ndim - 1))

    def _factors(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        b, a = self.method.factors(tensors, self.config)
        return (b if self._strength == 1 else b * self._strength), a

    def _adapted_weight(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        if self._strength == 1:
            return self.method.adapted_weight(weight, tensors, self.config)
        exact = weight.float()
        adapted = self.method.adapted_weight(exact, tensors, self.config)
        return torch.lerp(exact, adapted, self._strength).to(weight.dtype)

    def _locate(self, name: str, subject: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The pretrained weight (1, out, in) of one module, and its tensors."""
        for stack in self.stacks:
            if name in stack.names:
                index = stack.names.index(name)
                place = subject * len(stack.names) + index
                tensors = {key: tensor[place : place + 1] for key, tensor in stack.tensors().items()}
                return stack.base_weight()[index : index + 1], tensors
        raise InputError(f"{name} is not an adapted module; the first one is {self.names[0]}.")

    @torch.no_grad()
    def weight(self, name: str, subject: int = 0) -> Tensor:
        """W' (out, in) of one module, summed in float32 and given in the model's dtype."""
        base, tensors = self._locate(name, subject)
        return self._adapted_weight(base.float(), tensors)[0].to(base.dtype)

    @torch.no_grad()
    def delta_weight(self, name: str, subject: int = 0) -> Tensor:
        """W' - W of one module, (out, in), float32."""
        return self._delta(*self._locate(name, subject))[0]

    def _delta(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        if self._has_factors:
            b, a = self._factors(tensors)
            return b @ a
        exact = weight.float()
        return self._adapted_weight(exact, tensors) - exact

    def distances(self, subject: int = 0) -> dict[str, float]:
        """``|W' - W|_F`` of every adapted module."""
        return dict(zip(self.names, self.all_distances()[subject].tolist()))

    @torch.no_grad()
    def all_distances(self) -> Tensor:
        """``|W' - W|_F``, (subjects, modules)."""
        norms = []
        for stack in self.stacks:
            if self._has_factors:
                found = update.frobenius_norm(*self._factors(stack.tensors()))
            else:
                found = self._delta(self._of_subjects(stack.base_weight()), stack.tensors()).flatten(1).norm(dim=1)
            norms.append(found.view(self.subjects, -1))
        return torch.cat(norms, dim=1)

    def lambdas(self, subject: int = 0) -> dict[str, float]:
        """The boundary lambda of every adapted module; empty for methods that have none."""
        found = self.all_lambdas()
        return {} if found is None else dict(zip(self.names, found[subject].tolist()))

    def all_lambdas(self) -> Tensor | None:
        """The boundaries, (subjects, modules); None for methods that have none."""
        found = [stack.trainable["lambda"].detach() for stack in self.stacks if "lambda" in stack.trainable]
        return torch.cat([one.view(self.subjects, -1) for one in found], dim=1) if found else None

    def sites(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Name, module and parameter of everything that is adapted."""
        for stack in self.stacks:
            for name, (module, parameter) in zip(stack.names, stack.sites):
                yield name, module, parameter

    def parameter_groups(
        self, learning_rate: float, lambda_learning_rate: float, weight_decay: float
    ) -> list[dict[str, object]]:
        """Optimizer groups: the factors, and (without weight decay) the boundaries at a rate of their own."""
        exempt = self.method.NO_WEIGHT_DECAY
        keyed = [(key, p) for stack in self.stacks for key, p in stack.trainable.items()]
        groups: list[dict[str, object]] = [
            {
                "params": [p for key, p in keyed if key not in exempt],
                "lr": learning_rate,
                "weight_decay": weight_decay,
            }
        ]
        if exempt:
            groups.append(
                {"params": [p for key, p in keyed if key in exempt], "lr": lambda_learning_rate, "weight_decay": 0.0}
            )
        return groups

    def named_tensors(self, subject: int = 0) -> Iterator[tuple[str, Tensor]]:
        """``("NAME.delora_A", (r, in))`` and so on: what a file holds, one entry for each tensor of each module."""
        for stack in self.stacks:
            for key, stacked in stack.tensors().items():
                for name, tensor in zip(stack.names, stacked[subject * len(stack.names) :]):
                    yield f"{name}.{self.method.SUFFIX}{key}", tensor
