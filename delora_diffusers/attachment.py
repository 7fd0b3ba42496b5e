"""Attach an adapter to a model, take it off, or write it into the weights: the only code that changes a model."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.utils import parametrize

from delora_diffusers.adapter import Adapter, Projection, low_rank_product
from delora_diffusers.config import AdapterConfig
from delora_diffusers.errors import InputError
from delora_diffusers.processors import AdaptedAttnProcessor

FUSED = ("to_q", "to_k", "to_v")
EVERYTHING = "*"
"""The target that is every parameter."""


def attach(
    model: nn.Module, config: AdapterConfig, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Adapter:
    """Adapt the targeted linear modules of a model and freeze everything else.

    Attention that runs diffusers' scaled dot-product processors gets ``AdaptedAttnProcessor``. Any other target (the
    text encoder, feed-forward layers, attention with another processor) keeps its code and gets its weight from the
    same adapter through ``torch.nn.utils.parametrize`` (a forward hook on the split path).

    Args:
        model: a UNet, text encoder or any module with ``nn.Linear`` inside; changed in place.
        config: what to attach.
        generator: source of the random start, on the CPU; None takes torch's global one. Several are several
            subjects: ``model(...)`` then takes a batch of equally many samples of each, one subject after the other.

    Returns:
        The adapter, whose parameters are all that trains. ``model(...)`` now computes with W'.

    Raises:
        InputError: a target that matches nothing or no linear module, a rank too large, an adapter attached already,
            several subjects where an adapted module is no attention's or the path is split.
    """
    if attached_adapter(model) is not None:
        raise InputError("the model has an adapter attached already; call detach(model) or merge(model) first.")
    if EVERYTHING in config.targets:
        return _attach(model, config, [], _every_parameter(model), generator)
    linears = find_targets(model, config.targets)
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and type(module.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0)
    }
    attended: list[tuple[str, Attention, list[Projection]]] = []
    for prefix, attention in attentions.items():
        members = {
            name: linears.pop(f"{prefix}.{name}") for name in (*FUSED, "to_out.0") if f"{prefix}.{name}" in linears
        }
        parts = [
            Projection(tuple(f"{prefix}.{name}" for name in names), tuple(members[name] for name in names))
            for names in _same_input(attention, members)
        ]
        attended += [(prefix, attention, parts)] if parts else []
    alone = [Projection((name,), (linear,)) for name, linear in linears.items()]
    return _attach(model, config, attended, alone, generator)


def _every_parameter(model: nn.Module) -> list[Projection]:
    return [
        Projection((prefix if name == "weight" else f"{prefix}.{name}",), (module,), name)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    ]


def _attach(
    model: nn.Module,
    config: AdapterConfig,
    attended: list[tuple[str, Attention, list[Projection]]],
    alone: list[Projection],
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Adapter:
    """Build the adapter and put it in: ``attended`` by a processor for each attention, ``alone`` one by one."""
    projections = [part for _, _, parts in attended for part in parts]
    generators = generator if isinstance(generator, Sequence) else [generator or torch.default_generator]
    if len(generators) > 1 and (alone or config.path == "split"):
        what = f"{alone[0].names[0]} is no projection of an attention" if alone else "path is 'split'"
        raise InputError(f"several subjects share one model on the fast path of attention only, but {what}.")
    adapter = Adapter(config, projections + alone, generators)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for prefix, attention, parts in attended:
        processor: Any = AdaptedAttnProcessor(adapter, attention.processor, parts, prefix)
        attention.set_processor(processor)
    handles = []
    for projection in alone:
        linear = projection.linears[0]
        if config.path == "split":
            handles.append(linear.register_forward_hook(_LowRankHook(adapter, projection)))
        else:
            adapted = _AdaptedWeight(adapter, projection)
            parametrize.register_parametrization(linear, projection.parameter, adapted)

    @torch.compiler.disable
    def make_weights(*_: object) -> None:
        if not adapter.prepared:
            adapter()
        adapter.prepared = False

    handles.append(model.register_forward_pre_hook(make_weights))  # pyright: ignore[reportArgumentType]
    # Kept out of the model's modules, so that neither its state dict nor its parameters change.
    model.__dict__["_delora_attachment"] = (adapter, handles, trainable)
    return adapter


def attached_adapter(model: nn.Module) -> Adapter | None:
    """The adapter attached to a model, or None."""
    attachment = model.__dict__.get("_delora_attachment")
    return None if attachment is None else attachment[0]


def detach(model: nn.Module) -> None:
    """Give the untouched model back, with its stock processors and the very same weights.

    Raises:
        InputError: no adapter is attached.
    """
    adapter, handles, trainable = _attachment(model)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, AdaptedAttnProcessor):
            module.set_processor(module.processor.stock)
        for name in _adapted_parameters(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for stack in adapter.stacks:
        stack.release()
    for parameter in trainable:
        parameter.requires_grad_(True)
    del model.__dict__["_delora_attachment"]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write W' into the weights (summed in float32, rounded once) and take the adapter off.

    Raises:
        InputError: no adapter is attached.
    """
    adapter = _attachment(model)[0]
    merged = [(module, parameter, adapter.weight(name)) for name, module, parameter in adapter.sites()]
    detach(model)
    for module, parameter, weight in merged:
        module.get_parameter(parameter).copy_(weight)
    for module in model.modules():
        if isinstance(module, Attention) and module.fused_projections:
            module.fuse_projections()


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear modules whose name is a target or ends with ``.target``, in the model's order.

    Raises:
        InputError: a target that no module's name ends with, or that is not a linear module.
    """
    found: dict[str, nn.Linear] = {}
    unused = set(targets)
    for name, module in model.named_modules():
        for target in targets:
            if name == target or name.endswith("." + target):
                if not isinstance(module, nn.Linear):
                    raise InputError(f"target {target} is {name}, a {type(module).__name__}; name linear modules only.")
                found[name] = module
                unused.discard(target)
    if unused:
        endings = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(
            f"target {sorted(unused)[0]} matches no module of {type(model).__name__}; "
            f"its linear modules end with {', '.join(endings)}."
        )
    return found


def adapted_parameters(model: nn.Module, config: AdapterConfig) -> list[tuple[str, str]]:
    """(module, parameter) names of all that an adapter with this configuration adapts."""
    if EVERYTHING in config.targets:
        return [tuple(name.rpartition(".")[::2]) for name, _ in model.named_parameters()]  # pyright: ignore
    return [(name, "weight") for name in find_targets(model, config.targets)]


def _adapted_parameters(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    chains = module.get_submodule("parametrizations").named_children()
    return [name for name, chain in chains if isinstance(chain.get_submodule("0"), _AdaptedWeight)]


def _attachment(model: nn.Module) -> tuple:
    attachment = model.__dict__.get("_delora_attachment")
    if attachment is None:
        raise InputError(f"no adapter is attached to this {type(model).__name__}; call attach or load_adapter first.")
    return attachment


def _same_input(attention: Attention, members: dict[str, nn.Linear]) -> list[list[str]]:
    """The adapted modules of one attention in groups that read one input, have one shape and so are one product."""
    groups: list[list[str]] = []
    for name, linear in members.items():
        if groups and name in FUSED and not (attention.is_cross_attention and groups[-1] == ["to_q"]):
            previous = members[groups[-1][-1]]
            if previous.weight.shape == linear.weight.shape and (previous.bias is None) == (linear.bias is None):
                groups[-1].append(name)
                continue
        groups.append([name])
    return groups


class _AdaptedWeight(nn.Module):
    """Parametrization of a linear module's weight: W' while the adapter has a strength, else W."""

    def __init__(self, adapter: Adapter, projection: Projection):
        super().__init__()
        self.unregistered = (adapter, projection)  # a tuple hides them: neither is a part of the model

    def forward(self, weight: Tensor) -> Tensor:
        adapter, projection = self.unregistered
        return weight if projection.weight is None or adapter.strength == 0 else projection.weight


class _LowRankHook:
    """Forward hook of a linear module that adds the low-rank product to its output."""

    def __init__(self, adapter: Adapter, projection: Projection):
        self.adapter = adapter
        self.projection = projection

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.adapter.strength == 0:
            return output
        assert self.projection.a is not None and self.projection.b is not None
        return output + low_rank_product(inputs[0], self.projection.a, self.projection.b)[0].to(output.dtype)
