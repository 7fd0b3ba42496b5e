"""The adapter: all trainable tensors of an adapted model, stacked by shape, and the adapted weights computed from them.

Once per step the adapter computes W' of every adapted projection, with a few kernels per distinct shape, and gives each
projection its slice. Stable Diffusion's 128 attention projections have 6 shapes.

An adapter can train several subjects at once on one frozen model. Each stack then contains the n tensors of the first
subject, then those of the second and so on, and batches are ordered by subject in the same way.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from delora_diffusers.adapter.projections import Projection, base_parameter
from delora_diffusers.errors import InputError
from delora_diffusers.methods import update
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import ConstrainedFunctions, low_rank_functions, method_functions
from delora_diffusers.methods.table import METHODS


class Stack(nn.Module):
    """The stacked tensors of n adapted weights of one shape: pretrained (n, ...), the adapter's (subjects * n, ...)."""

    def __init__(self, projections: Sequence[Projection], config: AdapterConfig, generators: Sequence[torch.Generator]):
        super().__init__()
        self.projections = list(projections)
        self.names = [name for projection in projections for name in projection.names]
        self.sites = [(module, part.parameter) for part in projections for module in part.linears]
        self._weight: Tensor | None = None
        self._pointers: list[int] = []
        weight = self.base_weight()
        initialize = method_functions(config.method).initialize
        starts = [initialize(weight, config, generator) for generator in generators]
        trainable, fixed = (
            {key: torch.cat([tensors[key].to(weight.device) for tensors in by_subject]) for key in by_subject[0]}
            for by_subject in zip(*starts)
        )
        self.trainable = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in trainable.items()})
        for key, tensor in fixed.items():
            self.register_buffer(key, tensor)

    def base_weight(self) -> Tensor:
        """The pretrained weights, (n, out, in) or (n, ...), in the model's dtype and on its device.

        The model's parameters are views of this tensor, so it takes no extra memory. If the model has been moved or
        cast since, they are stacked again and the adapter's tensors move to the new device.
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
        """Give each module of the model a separate weight again."""
        for site in self.sites:
            parameter = base_parameter(*site)
            parameter.data = parameter.data.clone()
        self._weight = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by key, trainable and fixed, each with leading dimension n, or subjects * n."""
        return dict(self.trainable.items()) | dict(self.named_buffers(recurse=False))

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a tensor that W' is computed from changes in place."""
        weights = (base_parameter(*site) for site in self.sites)
        return tuple(t._version for t in (*self.trainable.values(), *weights))


class Adapter(nn.Module):
    """All trainable tensors of one adapted model. Created by ``attach``.

    The adapted weights must be computed exactly once before each forward of the model: with gradients, a second
    ``refresh`` would build a second graph. A hook on the model therefore calls ``refresh`` before each forward, unless
    ``prepared`` shows that it was already called. User code does not have to call it. The training loop does, so that
    computing the weights of all components is part of the step that it records as a CUDA graph.

    Args:
        config: the adapter's configuration.
        projections: the projections to adapt, in the model's order.
        generators: one CPU generator per subject, for its random initialization.

    Attributes:
        prepared: whether ``refresh`` has been called since the last forward of the model.
    """

    def __init__(self, config: AdapterConfig, projections: Sequence[Projection], generators: Sequence[torch.Generator]):
        super().__init__()
        self.config = config
        self.subjects = len(generators)
        self.method = METHODS[config.method]
        self._functions = method_functions(config.method)
        functions = self._functions  # isinstance of a protocol is slow, so not in every step
        self._constrain = functions.constrain if isinstance(functions, ConstrainedFunctions) else None
        by_shape: dict[tuple[int, ...], list[Projection]] = {}
        for projection in projections:
            shape = tuple(base_parameter(projection.linears[0], projection.parameter).shape)
            if self.method.has_rank and config.rank > min(shape):
                raise InputError(
                    f"rank is {config.rank}, but {projection.names[0]} is {' x '.join(map(str, shape))}; "
                    f"choose a rank of at most {min(shape)}."
                )
            by_shape.setdefault(shape, []).append(projection)
        self.stacks: Iterable[Stack] = nn.ModuleList(
            Stack(members, config, generators) for members in by_shape.values()
        )
        self._strength = 1.0
        self._computed_from: tuple | None = None
        self.prepared = False

    @property
    def strength(self) -> float:
        """Scales W' - W; 0 is exactly the base model, computed by the stock modules."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = float(value)
        self._computed_from = None

    @property
    def names(self) -> list[str]:
        """The adapted modules, as in ``model.named_modules()``."""
        return [name for stack in self.stacks for name in stack.names]

    def refresh(self) -> None:
        """Compute the adapted weights and give each projection its slice.

        With gradients enabled they are always recomputed, since a graph supports one backward only; without, only if
        a tensor that they depend on has changed.
        """
        if self._strength != 0:
            bases = [stack.base_weight() for stack in self.stacks]
            if any(base.is_meta for base in bases):
                raise InputError(
                    "the model's weights are offloaded, so they cannot be adapted; merge before offloading."
                )
            computed_from = None
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
                self.constrain()
            else:
                computed_from = tuple((id(base), *stack.versions()) for base, stack in zip(bases, self.stacks))
            if computed_from is None or computed_from != self._computed_from:
                for base, stack in zip(bases, self.stacks):
                    with torch.autocast(base.device.type, enabled=False):
                        self._refresh(base, stack)
                self._computed_from = computed_from
        self.prepared = True

    @torch.no_grad()
    def constrain(self) -> None:
        """Apply the method's constraint, if it has one. Each forward with gradients does so first; a training loop also
        does after its last step."""
        if self._constrain is not None:
            for stack in self.stacks:
                self._constrain(stack.tensors(), self.config)

    def _refresh(self, base: Tensor, stack: Stack) -> None:
        # split's backward is a single concatenation; indexing would add n zero-padded gradients.
        sizes = [len(projection.names) for projection in stack.projections]
        rows = [size * base.shape[1] for size in sizes]
        if self.config.path == "split":
            b, a = self._factors(stack.tensors())
            pieces = zip(base.flatten(0, 1).split(rows), a.split(sizes), b.split(sizes))
            for projection, (weight, a_piece, b_piece) in zip(stack.projections, pieces):
                projection.weight, projection.a, projection.b = weight, a_piece, b_piece
        else:
            adapted = self._adapted_weight(self._repeated(base), stack.tensors()).flatten(0, 1)
            several_subjects = self.subjects > 1
            if several_subjects:
                adapted = adapted.unflatten(0, (self.subjects, -1))
            for projection, weight in zip(stack.projections, adapted.split(rows, dim=1 if several_subjects else 0)):
                projection.weight = weight

    def _repeated(self, base: Tensor) -> Tensor:
        """The pretrained weights (n, ...) repeated for every subject, (subjects * n, ...)."""
        return base if self.subjects == 1 else base.repeat(self.subjects, *[1] * (base.ndim - 1))

    def _factors(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        b, a = low_rank_functions(self.config.method).factors(tensors, self.config)
        return (b if self._strength == 1 else b * self._strength), a

    def _adapted_weight(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        if self._strength == 1:
            return self._functions.adapted_weight(weight, tensors, self.config)
        exact = weight.float()
        adapted = self._functions.adapted_weight(exact, tensors, self.config)
        return torch.lerp(exact, adapted, self._strength).to(weight.dtype)

    def _locate(self, name: str, subject: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The pretrained weight (1, out, in) and the tensors of one module."""
        for stack in self.stacks:
            if name in stack.names:
                index = stack.names.index(name)
                row = subject * len(stack.names) + index
                tensors = {key: tensor[row : row + 1] for key, tensor in stack.tensors().items()}
                return stack.base_weight()[index : index + 1], tensors
        raise InputError(f"{name} is not an adapted module; choose one of adapter.names, such as {self.names[0]}.")

    @torch.no_grad()
    def weight(self, name: str, subject: int = 0) -> Tensor:
        """W' (out, in) of one module, computed in float32 and rounded once to the model's dtype."""
        base, tensors = self._locate(name, subject)
        return self._adapted_weight(base.float(), tensors)[0].to(base.dtype)

    @torch.no_grad()
    def delta_weight(self, name: str, subject: int = 0) -> Tensor:
        """W' - W of one module, (out, in), float32."""
        return self._delta(*self._locate(name, subject))[0]

    def _delta(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        if self.method.has_factors:
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
            if self.method.has_factors:
                distances = update.frobenius_norm(*self._factors(stack.tensors()))
            else:
                distances = self._delta(self._repeated(stack.base_weight()), stack.tensors()).flatten(1).norm(dim=1)
            norms.append(distances.view(self.subjects, -1))
        return torch.cat(norms, dim=1)

    def lambdas(self, subject: int = 0) -> dict[str, float]:
        """The boundary lambda of every adapted module; empty for methods without a boundary."""
        lambdas = self.all_lambdas()
        return {} if lambdas is None else dict(zip(self.names, lambdas[subject].tolist()))

    def all_lambdas(self) -> Tensor | None:
        """The boundaries, (subjects, modules); None for methods without a boundary."""
        stacked = [stack.trainable["lambda"].detach() for stack in self.stacks if "lambda" in stack.trainable]
        return torch.cat([lambdas.view(self.subjects, -1) for lambdas in stacked], dim=1) if stacked else None

    def sites(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Name, module and parameter name of every adapted weight."""
        for stack in self.stacks:
            for name, (module, parameter) in zip(stack.names, stack.sites):
                yield name, module, parameter

    def parameter_groups(
        self, learning_rate: float, lambda_learning_rate: float, weight_decay: float
    ) -> list[dict[str, object]]:
        """Optimizer groups: the factors, and the boundaries with a separate learning rate and no weight decay."""
        exempt = self.method.no_weight_decay
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
        """The tensors as a file contains them, one per module and key: ``("NAME.delora_A", (r, in))`` and so on."""
        for stack in self.stacks:
            for key, stacked in stack.tensors().items():
                for name, tensor in zip(stack.names, stacked[subject * len(stack.names) :]):
                    yield f"{name}.{self.method.key_prefix}{key}", tensor
