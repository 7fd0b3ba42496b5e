"""Attach an adapter to a model."""

import dataclasses
from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils import parametrize

from delora_diffusers.adapter.base_weights import weight_shape
from delora_diffusers.adapter.modules import named_modules, unwrap
from delora_diffusers.adapter.paths import choose_path
from delora_diffusers.adapter.projections import Projection
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.adapter.sites import (
    STOCK_PROCESSORS,
    AdaptedAttention,
    AdaptedWeight,
    Handle,
    adapt_modules,
    calls_fused_projections,
    fused_error,
)
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import EVERYTHING, AdapterConfig

FUSED = ("to_q", "to_k", "to_v")
_ATTACHMENT = "_delora_attachment"


@dataclasses.dataclass(frozen=True)
class Attachment:
    """What ``detach`` needs to undo ``attach``.

    Attributes:
        handles: the handles of the hooks. trainable: the model's parameters that required gradients before.
    """

    adapter: Adapter
    handles: list[Handle]
    trainable: list[nn.Parameter]


def attach(
    model: nn.Module,
    config: AdapterConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    compute_device: torch.device | None = None,
) -> Adapter:
    """Adapt the targeted linear modules of a model and freeze everything else.

    Attention modules with diffusers' scaled dot-product processors get an ``AdaptedAttnProcessor``. All other targets
    (the text encoder, feed-forward layers, attention with another processor) keep their code and get their weights from
    the same adapter through ``torch.nn.utils.parametrize`` (on the lean path by another ``forward``, on the split path
    through a forward hook).

    Args:
        model: a UNet, a text encoder or any other module that contains ``nn.Linear`` modules; modified in place.
        config: the adapter's configuration.
        generator: CPU generator for the random initialization; None means torch's global generator. A sequence has
            one per subject: ``model(...)`` then takes batches with the same number of samples per subject, ordered by
            subject.
        compute_device: where the model computes, if it keeps weights elsewhere and brings them there when they are
            needed; None if its weights stay where they are.

    Returns:
        The adapter. Only its parameters are trainable, and ``model(...)`` now computes with W'.

    Raises:
        InputError: a target matches no module or one that is not linear, the rank is too large, an adapter is already
            attached, or there are several subjects and a target outside attention or the split path.
    """
    model = unwrap(model)
    if attached_adapter(model) is not None:
        raise InputError("the model already has an adapter attached; call detach(model) or merge(model) first.")
    if EVERYTHING in config.targets:
        return _attach(model, config, [], _every_parameter(model), generator, compute_device)
    linears = find_targets(model, config.targets)
    attentions = {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, Attention) and type(module.processor) in STOCK_PROCESSORS
    }
    by_attention: list[AdaptedAttention] = []
    for prefix, attention in attentions.items():
        members = {
            name: linears.pop(f"{prefix}.{name}") for name in (*FUSED, "to_out.0") if f"{prefix}.{name}" in linears
        }
        projections = [
            Projection(tuple(f"{prefix}.{name}" for name in names), tuple(members[name] for name in names))
            for names in _same_input(attention, members)
        ]
        by_attention += [AdaptedAttention(prefix, attention, projections)] if projections else []
    standalone = [Projection((name,), (linear,)) for name, linear in linears.items()]
    return _attach(model, config, by_attention, standalone, generator, compute_device)


def _every_parameter(model: nn.Module) -> list[Projection]:
    for name, module in named_modules(model):
        if parametrize.is_parametrized(module):
            raise _already_parametrized(name)
    return [
        Projection((prefix if name == "weight" else f"{prefix}.{name}",), (module,), name)
        for prefix, module in named_modules(model)
        for name, _ in module.named_parameters(recurse=False)
    ]


def _already_parametrized(name: str) -> InputError:
    return InputError(
        f"{name} is already parametrized, so its weight cannot be adapted; call "
        "torch.nn.utils.parametrize.remove_parametrizations first."
    )


def _attach(
    model: nn.Module,
    config: AdapterConfig,
    by_attention: list[AdaptedAttention],
    standalone: list[Projection],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    compute_device: torch.device | None,
) -> Adapter:
    """Build the adapter and attach it: one processor per attention, a parametrization or hook per standalone module."""
    attention_projections = [projection for adapted in by_attention for projection in adapted.projections]
    generators = generator if isinstance(generator, Sequence) else [generator or torch.default_generator]
    projections = attention_projections + standalone
    offloaded = compute_device is not None
    path = choose_path(config, projections, len(generators), offloaded)
    if len(generators) > 1 and (standalone or path != "fast"):
        reason = f"the path is {path}"
        if standalone:
            reason = f"{standalone[0].names[0]} is not an attention projection"
        raise InputError(
            f"several subjects can be trained together only with attention targets on the fast path, but {reason}."
        )
    quantized = any(is_quantized(module) for projection in projections for module in projection.linears)
    adapter = Adapter(config, projections, generators, path, resident=not quantized and not offloaded)
    if compute_device is not None and next(adapter.parameters()).device != compute_device:
        adapter.to(compute_device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    handles: list[Handle] = []
    for adapted in by_attention:
        adapted.adapt(adapter, handles)
    for projection in standalone:
        adapt_modules(adapter, projection, handles)
    standalone_modules = {module for projection in standalone for module in projection.linears}
    fusible = [
        (name, module)
        for name, module in named_modules(model)
        if hasattr(module, "fused_projections") and not standalone_modules.isdisjoint(module.children())
    ]

    @torch.compiler.disable
    def refresh_once(*_: object) -> None:
        for adapted in by_attention:
            adapted.adapt(adapter, handles)
        for name, module in fusible:
            if calls_fused_projections(module):
                raise fused_error(name)
        if not adapter.prepared:
            adapter.refresh()
        adapter.prepared = False
        if path == "lean":
            adapter.release_after_use(torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False))

    handles.append(model.register_forward_pre_hook(refresh_once))  # pyright: ignore[reportArgumentType]
    # nn.Module's __setattr__ would register the adapter as a submodule, which would change the model's state dict and
    # parameters.
    model.__dict__[_ATTACHMENT] = Attachment(adapter, handles, trainable)
    return adapter


def attachment(model: nn.Module) -> Attachment:
    """The record of what ``attach`` did to a model.

    Raises:
        InputError: nothing is attached.
    """
    attached = unwrap(model).__dict__.get(_ATTACHMENT)
    if attached is None:
        raise InputError(f"no adapter is attached to this {type(model).__name__}; call attach or load_adapter first.")
    return attached


def forget_attachment(model: nn.Module) -> None:
    """Delete the record of an attachment; the last step of ``detach``."""
    del unwrap(model).__dict__[_ATTACHMENT]


def attached_adapter(model: nn.Module) -> Adapter | None:
    """The adapter attached to a model, or None."""
    attached = unwrap(model).__dict__.get(_ATTACHMENT)
    return None if attached is None else attached.adapter


def find_targets(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear modules whose name is a target or ends with ``.target``, in the model's order.

    A name may belong to a linear module in some blocks and to a container in others, which is passed over.

    Raises:
        InputError: a target matches no linear module.
    """
    linears: dict[str, nn.Linear] = {}
    wanted, unused = set(targets), set(targets)
    others: dict[str, tuple[str, nn.Module]] = {}
    for name, module in named_modules(model):
        parts = name.split(".")
        for target in wanted.intersection(".".join(parts[i:]) for i in range(len(parts))):
            if not isinstance(module, nn.Linear):
                if hasattr(module, "base_layer"):
                    raise InputError(
                        f"{name} already has an adapter of another library; unload or fuse that first, or load it "
                        "after this one."
                    )
                others.setdefault(target, (name, module))
                continue
            if parametrize.is_parametrized(module, "weight") and not parametrized_by_adapter(module):
                raise _already_parametrized(name)
            linears[name] = module
            unused.discard(target)
    for target in sorted(unused & others.keys()):
        name, module = others[target]
        inner = [f"{target}.{child}" for child, part in module.named_modules() if isinstance(part, nn.Linear)]
        remedy = f"give {' or '.join(inner[:3])}" if inner else "give linear modules only"
        raise InputError(f"target {target} matches {name} of type {type(module).__name__}; {remedy}.")
    if unused:
        endings = sorted({name.split(".")[-1] for name, m in named_modules(model) if isinstance(m, nn.Linear)})
        raise InputError(
            f"target {sorted(unused)[0]} matches no module of {type(model).__name__}; "
            f"the names of its linear modules end in {', '.join(endings)}."
        )
    return linears


def adapted_parameters(model: nn.Module, config: AdapterConfig) -> list[tuple[str, str]]:
    """(module, parameter) names of everything that an adapter with this configuration adapts."""
    if EVERYTHING in config.targets:
        return [
            (prefix, name)
            for prefix, module in named_modules(model)
            for name, _ in module.named_parameters(recurse=False)
        ]
    return [(name, "weight") for name in find_targets(model, config.targets)]


def parametrized_by_adapter(module: nn.Module) -> list[str]:
    """The parameters of a module that an adapter has parametrized."""
    if not parametrize.is_parametrized(module):
        return []
    chains = module.get_submodule("parametrizations").named_children()
    return [name for name, chain in chains if isinstance(chain.get_submodule("0"), AdaptedWeight)]


def _same_input(attention: Attention, members: dict[str, nn.Linear]) -> list[list[str]]:
    """Group the adapted modules of an attention by input and shape; each group is computed as one product."""
    groups: list[list[str]] = []
    for name, linear in members.items():
        if groups and name in FUSED and not (attention.is_cross_attention and groups[-1] == ["to_q"]):
            previous = members[groups[-1][-1]]
            if weight_shape(previous) == weight_shape(linear) and (previous.bias is None) == (linear.bias is None):
                groups[-1].append(name)
                continue
        groups.append([name])
    return groups
