"""The adapter: all trainable tensors of an adapted model, stacked by shape, and what is computed from them once a step.

On the fast path this is W' of every adapted projection, with a few kernels per distinct shape; each projection gets its
slice. Stable Diffusion's 128 attention projections have 6 shapes. On the lean and the split path it is the factors of
the updates, which are small.

An adapter can train several subjects at once on one frozen model. Each stack then contains the n tensors of the first
subject, then those of the second and so on, and batches are ordered by subject in the same way.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delora_diffusers.adapter.base_weights import (
    Site,
    StackedWeights,
    base_parameter,
    compute_dtype,
    dense_weight,
    weight_shape,
)
from delora_diffusers.adapter.projections import Projection
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.errors import InputError
from delora_diffusers.methods import update
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.functions import ConstrainedFunctions, low_rank_functions, method_functions
from delora_diffusers.methods.table import METHODS


class Stack(nn.Module):
    """The adapter's tensors of n adapted weights of one shape, (subjects * n, ...).

    Args:
        projections: that have the weights.
        path: the fast path stacks all weights, the others those of each projection.
        resident: whether the weights stay on the device, dense; otherwise they are read each time they are needed.

    Attributes:
        weights: the pretrained weights, one per projection or a single one of all; empty if they are not resident.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        config: AdapterConfig,
        generators: Sequence[torch.Generator],
        path: str,
        resident: bool,
    ):
        super().__init__()
        self.projections = list(projections)
        self.names = [name for projection in projections for name in projection.names]
        self.sites = [(module, part.parameter) for part in projections for module in part.linears]
        self.weights: list[StackedWeights] = []
        if path == "fast":
            self.weights = [StackedWeights(self.sites)]
            weight, initialize = self.weights[0].tensor(), method_functions(config.method).initialize
            starts = [initialize(weight, config, generator) for generator in generators]
        else:
            if resident:
                grouped = ([(module, part.parameter) for module in part.linears] for part in projections)
                self.weights = [StackedWeights(sites) for sites in grouped]
                for weights in self.weights:  # now, so that the first step needs no more memory than the others
                    weights.tensor()
            initialize = low_rank_functions(config.method).initialize
            starts = [initialize(_OneByOne(self.sites), config, generator) for generator in generators]
        device = base_parameter(*self.sites[0]).device
        trainable, fixed = (
            {key: torch.cat([tensors[key].to(device) for tensors in by_subject]) for key in by_subject[0]}
            for by_subject in zip(*starts)
        )
        self.trainable = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in trainable.items()})
        for key, tensor in fixed.items():
            self.register_buffer(key, tensor)

    def base_weights(self) -> list[Tensor]:
        """The pretrained weights as ``weights`` stacks them, (m, out, in) or (n, ...), on the model's device.

        If the model has been moved, the adapter's tensors move to the new device.

        Raises:
            InputError: the weights are offloaded.
        """
        stacked = [weights.tensor() for weights in self.weights]
        if stacked and any(tensor.device != stacked[0].device for tensor in self.tensors().values()):
            if stacked[0].is_meta:
                raise InputError(
                    "the model's weights are offloaded, so they cannot be adapted; merge before offloading."
                )
            self.to(stacked[0].device)
        return stacked

    def base_weight(self, index: int) -> Tensor:
        """The pretrained weight of one module, (1, out, in) or (1, ...), dense, on the adapter's device."""
        return dense_weight(*self.sites[index])[None].to(next(iter(self.trainable.values())).device)

    def release(self) -> None:
        """Give each module of the model a separate weight again."""
        for weights in self.weights:
            weights.release()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by key, trainable and fixed, each with leading dimension n, or subjects * n."""
        return dict(self.trainable.items()) | dict(self.named_buffers(recurse=False))

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a tensor that W' is computed from changes in place."""
        weights = (base_parameter(*site) for site in self.sites)
        return tuple(t._version for t in (*self.trainable.values(), *weights))


class _OneByOne:
    """The pretrained weights of these modules, dense, one at a time; see ``update.Matrices``."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = sites
        out_features, in_features = weight_shape(*sites[0])
        self.shape = (len(sites), out_features, in_features)

    def __iter__(self) -> Iterator[Tensor]:
        return (dense_weight(*site) for site in self.sites)


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
        path: how adapted products are computed, ``fast``, ``lean`` or ``split``.
        resident: see ``Stack``.

    Attributes:
        prepared: whether ``refresh`` has been called since the last forward of the model.
    """

    def __init__(
        self,
        config: AdapterConfig,
        projections: Sequence[Projection],
        generators: Sequence[torch.Generator],
        path: str,
        resident: bool = True,
    ):
        super().__init__()
        self.config = config
        self.path = path
        self.subjects = len(generators)
        self.method = METHODS[config.method]
        self._functions = method_functions(config.method)
        functions = self._functions  # isinstance of a protocol is slow, so not in every step
        self._constrain = functions.constrain if isinstance(functions, ConstrainedFunctions) else None
        by_shape: dict[tuple[int, ...], list[Projection]] = {}
        for projection in projections:
            projection.lean = path == "lean"
            shape = weight_shape(projection.linears[0], projection.parameter)
            if self.method.has_rank and config.rank > min(shape):
                raise InputError(
                    f"rank is {config.rank}, but {projection.names[0]} is {' x '.join(map(str, shape))}; "
                    f"choose a rank of at most {min(shape)}."
                )
            by_shape.setdefault(shape, []).append(projection)
        self.stacks: Iterable[Stack] = nn.ModuleList(
            Stack(members, config, generators, path, resident) for members in by_shape.values()
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

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, while it lasts: strength 0. Weights that are computed already stay for the next forward."""
        before = self._strength, self.prepared
        self._strength = 0.0
        try:
            yield
        finally:
            self._strength, self.prepared = before

    @property
    def names(self) -> list[str]:
        """The adapted modules, as in ``model.named_modules()``."""
        return [name for stack in self.stacks for name in stack.names]

    def refresh(self) -> None:
        """Compute the adapted weights, or the factors of the updates, and give each projection its slice.

        With gradients enabled they are always recomputed, since a graph supports one backward only; without, only if
        a tensor that they depend on has changed.
        """
        if self._strength != 0:
            bases = [stack.base_weights() for stack in self.stacks]
            computed_from = None
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
                self.constrain()
            else:
                identities = ((*map(id, weights), *stack.versions()) for weights, stack in zip(bases, self.stacks))
                computed_from = tuple(identities)
            if computed_from is None or computed_from != self._computed_from:
                device = next(self.parameters()).device.type
                for weights, stack in zip(bases, self.stacks):
                    with torch.autocast(device, enabled=False):
                        self._refresh(weights, stack)
                self._computed_from = computed_from
        self.prepared = True

    @torch.no_grad()
    def constrain(self) -> None:
        """Apply the method's constraint, if it has one. Each forward with gradients does so first; a training loop also
        does after its last step."""
        if self._constrain is not None:
            for stack in self.stacks:
                self._constrain(stack.tensors(), self.config)

    def _refresh(self, bases: list[Tensor], stack: Stack) -> None:
        # split's backward is a single concatenation; indexing would add n zero-padded gradients.
        sizes = [len(projection.names) for projection in stack.projections]
        if self.path != "fast":
            b, a = self._factors_in(self._factor_dtype(stack), stack.tensors())
            weights = [base.flatten(0, 1) for base in bases] or [None] * len(sizes)
            for projection, *pieces in zip(stack.projections, weights, a.split(sizes), b.split(sizes)):
                projection.weight, projection.a, projection.b = pieces
            return
        (base,) = bases
        rows = [size * base.shape[1] for size in sizes]
        adapted = self._adapted_weight(self._repeated(base), stack.tensors()).flatten(0, 1)
        several_subjects = self.subjects > 1
        if several_subjects:
            adapted = adapted.unflatten(0, (self.subjects, -1))
        for projection, weight in zip(stack.projections, adapted.split(rows, dim=1 if several_subjects else 0)):
            projection.weight = weight

    def release_after_use(self, checkpointed: bool) -> None:
        """Let each projection release its factors in the forward, if gradient checkpointing will repeat its product.

        Otherwise all factors would be in memory at the end of the forward, where the most memory is needed.
        """
        for stack in self.stacks:
            for projection in stack.projections:
                projection.restore = functools.partial(self._restore_factors, stack) if checkpointed else None
                projection.restored = False

    @torch.no_grad()
    def _restore_factors(self, stack: Stack) -> None:
        # Only values are needed, since gradients flow through the factors of the forward. But they must ask for a
        # gradient as those do, so that the recomputation saves the same tensors.
        with torch.autocast(next(stack.parameters()).device.type, enabled=False):
            self._refresh(stack.base_weights(), stack)
        for projection in stack.projections:
            assert projection.a is not None and projection.b is not None
            projection.a, projection.b = projection.a.requires_grad_(), projection.b.requires_grad_()
            projection.restored = True

    def _factor_dtype(self, stack: Stack) -> torch.dtype:
        """The dtype in which the factors are multiplied; their own is float32."""
        module = stack.projections[0].linears[0]
        in_float32 = self.config.split_dtype == "float32" or not (self.config.split_dtype or is_quantized(module))
        return torch.float32 if self.path == "split" and in_float32 else compute_dtype(module)

    def _factors_in(self, dtype: torch.dtype, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors in a dtype. If it is not their own, what autograd needs of them is computed again in the
        backward, so that nothing in float32 is kept in between."""
        keys, values = list(tensors), list(tensors.values())
        if dtype == values[0].dtype:
            return self._factors(tensors)

        def cast(*values: Tensor) -> tuple[Tensor, Tensor]:
            b, a = self._factors(dict(zip(keys, values)))
            return b.to(dtype), a.to(dtype)

        if not torch.is_grad_enabled():
            return cast(*values)
        factors = checkpoint(cast, *values, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(factors, tuple)
        return factors

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
                return stack.base_weight(index), tensors
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
                (base,) = stack.base_weights()
                distances = self._delta(self._repeated(base), stack.tensors()).flatten(1).norm(dim=1)
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
