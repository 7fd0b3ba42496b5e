"""Start training from a saved adapter, ours or another tool's LoRA: ``--init_adapter``.

The same kind of adapter is copied tensor by tensor. A low-rank update of any kind becomes a LoRA or a DeLoRA of at
least its rank, which is exact (see ``files.equal_weights``). Everything else is refused with the reason.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delora_diffusers.adapter.control import saved_encoder
from delora_diffusers.adapter.modules import named_modules
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError
from delora_diffusers.families.loading import OpenModel
from delora_diffusers.files.equal_weights import as_delora
from delora_diffusers.files.loading import match_names
from delora_diffusers.files.lora_files import adapter_files, highest_rank, is_ours, read_lora
from delora_diffusers.files.low_rank import Factors, as_lora, as_peft_delora, low_rank_factors, module_tensors
from delora_diffusers.files.reading import CONTROL_PREFIX, parse_config, read_adapter
from delora_diffusers.methods.config import EVERYTHING, AdapterConfig
from delora_diffusers.methods.table import METHODS
from delora_diffusers.training.run_folder import data_digests

KIND = ("method", "rank", "start", "weight_norm", "alpha", "blocks")
"""Settings that an adapter's tensors depend on."""
FROM_FILE = (*KIND, "coft_eps", "targets")
"""Flags that are taken from one of our adapters where they are not given."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What an adapter file contains for one component of the base model.

    Attributes:
        config: of our adapter; None if another tool saved it.
        tensors: of our adapter, by module and key.
        factors: of the update, by module; empty if it is not low-rank.
    """

    config: AdapterConfig | None
    tensors: dict[str, dict[str, Tensor]]
    factors: dict[str, Factors]

    @property
    def modules(self) -> set[str]:
        """The adapted modules."""
        return self.tensors.keys() | self.factors.keys()


@dataclasses.dataclass(frozen=True)
class InitialAdapter:
    """An adapter to start from.

    Attributes:
        path: as the user gave it. seed: of random numbers for what the adapter does not determine.
        trainable: the text encoders that ``--train_text_encoder`` would adapt.
        control: the state dict of its control encoder, if it follows maps. palette: of the control encoder.
    """

    path: Path
    parts: dict[str, Part]
    seed: int
    trainable: Sequence[str]
    control: dict[str, Tensor]
    palette: list[list[int]] | None

    def targets_of_encoder(self, name: str, targets: Sequence[str]) -> tuple[str, ...]:
        """The modules of a text encoder to adapt: the usual ones, and the adapter's, for which there is no flag."""
        modules = self.parts[name].modules if name in self.parts else ()
        return (*targets, *sorted(m for m in modules if not f".{m}".endswith(tuple(f".{t}" for t in targets))))

    @torch.no_grad()
    def copy_into(self, adapters: Mapping[str, Adapter], models: Mapping[str, nn.Module]) -> None:
        """Give attached adapters the tensors of this one; what it does not adapt starts at the base model.

        On adapters without values everything is checked except for what depends on the pretrained weights.

        Raises:
            InputError: it does not fit.
        """
        for component in self.parts.keys() - adapters.keys():
            remedy = "give --train_text_encoder" if component in self.trainable else "remove its tensors from the file"
            raise InputError(f"--init_adapter {self.path} adapts {component}, which is not trained; {remedy}.")
        for component, part in self.parts.items():
            self._copy_part(component, part, adapters[component], models[component])

    def _copy_part(self, component: str, part: Part, adapter: Adapter, model: nn.Module) -> None:
        named = dict(adapter.named_tensors())
        current = {m: {key: named[n] for key, n in keys.items()} for m, keys in module_tensors(named).items()}
        outside = sorted(part.modules - current.keys())
        known = {name for name, _ in (*named_modules(model), *model.named_parameters())}
        missing = [module for module in outside if module not in known]
        if missing:
            raise InputError(
                f"--init_adapter {self.path} was trained for another architecture: this {type(model).__name__} has no "
                f"{missing[0]}; give the adapter's base model."
            )
        if outside:
            targets = " ".join(targets_to_give(model, adapter.config.targets, part.modules))
            raise InputError(
                f"--init_adapter {self.path} adapts {len(outside)} modules that are not among the targets, such as "
                f"{component}.{outside[0]}; give --targets {targets}."
            )
        highest = 0 if _is_copied(part, adapter.config) else max((f.rank for f in part.factors.values()), default=0)
        if highest > adapter.config.rank:
            raise InputError(
                f"--init_adapter {self.path} has an update of rank {highest} in {component}, more than --rank "
                f"{adapter.config.rank}; give --rank {highest}."
            )
        generator = torch.Generator().manual_seed(self.seed)
        for module in [module for module in current if module in part.modules]:
            try:
                tensors = converted(part, module, adapter.config, current[module], generator)
            except InputError as error:
                raise InputError(f"--init_adapter {self.path}: {error}") from error
            for key, tensor in tensors.items():
                expected = current[module][key]
                if tensor.shape != expected.shape:
                    raise InputError(
                        f"--init_adapter {self.path} does not fit the base model: {key} of {component}.{module} is "
                        f"{tuple(tensor.shape)} in the file and {tuple(expected.shape)} in the model; give its base "
                        "model."
                    )
                expected.copy_(tensor)


def converted(
    part: Part, module: str, config: AdapterConfig, new: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of one module for an adapter of this configuration, by key; those left out stay as they are.

    Args:
        new: the tensors that a new adapter has.

    Raises:
        InputError: it cannot be converted without loss.
    """
    if _is_copied(part, config):
        return part.tensors[module]
    title = METHODS[config.method].title
    if not part.factors:
        assert part.config is not None
        before, now, flag = _difference(part.config, config)
        source = METHODS[part.config.method].title
        raise InputError(
            f"its {flag} is {before}, not {now}, and {source} cannot be converted; give --{flag} {before}."
        )
    factors = part.factors[module]
    if config.method == "lora":
        return as_lora(factors, config, new["A"].cpu() if not new["A"].is_meta else torch.zeros(new["A"].shape))
    if config.method != "delora":
        raise InputError(f"a low-rank update cannot be converted to {title}; use --method delora or lora.")
    if config.start != "zero":
        why = "--start frozen begins without an update; give --start zero"
        if part.config is None or part.config.method != "delora":
            raise InputError(f"{why}.")
        before, now, flag = _difference(part.config, config)
        raise InputError(f"its {flag} is {before}, not {now}, and {why}, or --{flag} {before}.")
    if part.config is not None and _kind(_thawed(part.config)) == _kind(config) and config.weight_norm == "column":
        peft = as_peft_delora(part.config, part.tensors[module])
        return {"A": peft["A"], "B": peft["B"], "lambda": peft["lambda"][0], "w_norm": peft["w_norm"]}
    scale = new.get("w_norm")
    known = None if scale is None or scale.is_meta else scale.float().cpu()
    return as_delora(module, factors, known, config.rank, generator)


def _kind(config: AdapterConfig) -> tuple[Any, ...]:
    """What must be equal for tensors to be copied; settings that a method does not have are None."""
    delora, lora = config.method == "delora", config.method.startswith(("lora", "dora"))
    return (
        config.method,
        config.rank if METHODS[config.method].has_rank else None,
        config.start if delora else None,
        config.weight_norm if delora else None,
        config.lora_scale * config.rank if lora else None,
        config.number_of_blocks if not METHODS[config.method].has_rank else None,
    )


def _is_copied(part: Part, config: AdapterConfig) -> bool:
    return part.config is not None and _kind(part.config) == _kind(config)


def _difference(before: AdapterConfig, now: AdapterConfig) -> tuple[Any, Any, str]:
    """The first setting that differs: its values and its flag."""
    return next((b, n, flag) for b, n, flag in zip(_kind(before), _kind(now), KIND) if b != n)


def _thawed(config: AdapterConfig) -> AdapterConfig:
    """A zero start of the same update: a frozen start has two terms for each of its rank."""
    return dataclasses.replace(config, start="zero", rank=config.rank * (2 if config.start == "frozen" else 1))


def targets_to_give(model: nn.Module, targets: Sequence[str], modules: set[str]) -> list[str]:
    """The targets with those that the modules need: the shortest endings of their names that match no other module."""
    linears = [name for name, module in named_modules(model) if isinstance(module, nn.Linear)]
    wanted = [target for target in targets if target != EVERYTHING]
    for module in sorted(modules):
        if f".{module}".endswith(tuple(f".{target}" for target in wanted)):
            continue
        parts = module.split(".")
        endings = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()] or [module]
        own = [e for e in endings if all(n in modules for n in linears if f".{n}".endswith(f".{e}"))]
        # If the adapter has only some of the blocks, the ending of all is shorter than the names of these.
        wanted.append(own[0] if own and own[0] != module else endings[0])
    return wanted


def with_settings_of_adapter(args: argparse.Namespace, given: set[str]) -> argparse.Namespace:
    """Take settings that were not given as flags from the adapter to start from; returns new arguments.

    Args:
        given: the names of the flags that were given.

    Raises:
        InputError: there is no such adapter, or it is damaged.
    """
    files = adapter_files(args.init_adapter)
    settings: dict[str, Any] = {}
    if is_ours(files):
        header, _ = read_adapter(files[0], tensors=False)
        denoisers = [values for name, values in header["config"].items() if not name.startswith("text_encoder")]
        config = parse_config(files[0], (denoisers or list(header["config"].values()))[0])
        if "method" not in given or args.method == config.method:
            settings = {name: getattr(config, name) for name in FROM_FILE} | {"targets": list(config.targets)}
        elif METHODS[config.method].has_factors:
            settings = {"rank": _thawed(config).rank if config.method == "delora" else config.rank, "start": "zero"}
        if args.start == "zero" and "start" in given and "rank" not in given and config.method == args.method:
            settings["rank"] = _thawed(config).rank
    else:
        settings = {"rank": highest_rank(files) or args.rank, "start": "zero"}
    return argparse.Namespace(**vars(args) | {k: v for k, v in settings.items() if k not in given})


def adapter_digest(path: Path | None) -> dict[str, str]:
    """A digest of the adapter to start from, as part of those of the data; a continued run has the same."""
    return {} if path is None else data_digests([("--init_adapter", adapter_files(path), None)])


def read_initial_adapter(args: argparse.Namespace, model: OpenModel, maps: bool = False) -> InitialAdapter | None:
    """The adapter of ``--init_adapter`` for a base model; None without one.

    Args:
        maps: whether training follows maps, so that the adapter may have a control encoder.

    Raises:
        InputError: it is damaged, is not an adapter that can be continued, or is for another base model.
    """
    if args.init_adapter is None:
        return None
    files = adapter_files(args.init_adapter)
    models = {name: skeleton for name, skeleton in model.skeletons.items() if name != "vae"}
    trainable = [] if maps else model.trainable_encoders
    parts: dict[str, Part] = {}
    if not is_ours(files):
        by_component = read_lora(files, models, type(model.pipeline).__name__)
        parts = {component: Part(None, {}, factors) for component, factors in by_component.items()}
        return InitialAdapter(args.init_adapter, parts, args.seed, trainable, {}, None)
    header, tensors = read_adapter(files[0])
    if "control_encoder" in header and not maps:
        raise InputError(
            f"--init_adapter {args.init_adapter} was trained on maps; continue it with train_controlnet_map2img.py."
        )
    for component, values in header["config"].items():
        if component not in models:
            raise InputError(
                f"--init_adapter {args.init_adapter} adapts {component}, which the base model does not have; give its "
                "base model."
            )
        config = parse_config(files[0], values)
        prefix = component + "."
        of_part = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
        of_part = match_names(of_part, models[component])
        by_module = {m: {k: of_part[n] for k, n in keys.items()} for m, keys in module_tensors(of_part).items()}
        low_rank = METHODS[config.method].has_factors
        renamed = {f"{prefix}{n}": t for n, t in of_part.items()}
        factors = low_rank_factors(component, config, renamed) if low_rank else {}
        parts[component] = Part(config, by_module, factors)
    control = {n.removeprefix(CONTROL_PREFIX): t for n, t in tensors.items() if n.startswith(CONTROL_PREFIX)}
    palette = header["control_encoder"]["palette"] if "control_encoder" in header else None
    return InitialAdapter(args.init_adapter, parts, args.seed, trainable, control, palette)


def initial_encoder(start: InitialAdapter, palette: Any, unet: nn.Module, factor: int) -> nn.Module | None:
    """The control encoder of the adapter to start from; None if it has none.

    Args:
        palette: the colours of the maps to train on, (classes, 3), or None. factor: pixels per latent along a side.

    Raises:
        InputError: it was trained with other colours, or for another UNet.
    """
    if not start.control:
        return None
    if (None if palette is None else palette.tolist()) != start.palette:
        raise InputError(
            f"--init_adapter {start.path} was trained on maps of other colours; give the --palette that it was trained "
            "with."
        )
    try:
        encoder: Any = saved_encoder(start.control)
    except InputError as error:
        raise InputError(f"--init_adapter {start.path}: {error}") from error
    expected = (len(unet.get_parameter("conv_in.bias")), factor)
    if (encoder.conv_out.out_channels, 2 ** (len(encoder.blocks) // 2)) != expected:
        raise InputError(f"--init_adapter {start.path} has a control encoder for another UNet; give its base model.")
    return encoder
