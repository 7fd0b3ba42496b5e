"""Where the tensors of Stable Diffusion's models are in a checkpoint of the original code (LDM, SGM).

Diffusers converts checkpoints to its own names only. Its converters are run here on tensors that contain the numbers of
their rows, so that the result tells where every row came from. To write a checkpoint, the same is done with all names
that the original code could give, of which those are kept that become names of the model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.families.single_file import PREFIXES, SingleFile, converted, part_of_file
from delora_diffusers.files.single_files import Layout, Stored

RESNET = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3", "emb_layers.1", "skip_connection")
AUTOENCODER_RESNET = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
AUTOENCODER_ATTENTION = ("norm", "q", "k", "v", "proj_out")
OPEN_CLIP = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj")


def layout_of(file: SingleFile, parts: Mapping[str, Any]) -> Layout:
    """Where the weights of these parts (skeletons by component) are in a file."""
    layout: Layout = {}
    for component, skeleton in parts.items():
        shapes = {n: t.shape for n, t in part_of_file(component, skeleton, file.tensors).items()}
        layout[component] = _traced(component, skeleton, shapes)
    return layout


def new_layout(parts: Mapping[str, Any]) -> Layout:
    """Where the weights of these parts (skeletons by component) of Stable Diffusion belong in a new checkpoint.

    Raises:
        InputError: a part has weights for which the original code has no name.
    """
    layout: Layout = {}
    is_xl = "text_encoder_2" in parts
    for component, skeleton in parts.items():
        layout[component] = _traced(component, skeleton, dict(_candidates(component, skeleton, is_xl)))
        missing = skeleton.state_dict().keys() - layout[component].keys()
        if missing:
            raise InputError(
                f"the base model's {component} has {min(missing)}, which has no name in a single file; merge into a "
                "folder with --output_dir."
            )
    return layout


def _traced(component: str, skeleton: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Where each weight of a model comes from, by converting numbered rows.

    Args:
        shapes: by name in the file; only the number of rows and of dimensions matter.
    """
    numbered: dict[str, Tensor] = {}
    first: list[tuple[int, str]] = []
    count = 0
    for name, shape in shapes.items():
        rows = shape[0] if len(shape) else 1
        numbers = torch.arange(count, count + rows)
        numbered[name] = numbers.reshape(rows, *(1,) * (len(shape) - 1)) if len(shape) else numbers.reshape(())
        first += [(count, name)] * rows
        count += rows
    stored = {}
    for name, numbers in converted(component, skeleton, numbered).items():
        start, source = first[int(numbers.flatten()[0])]
        transposed = numbers.ndim == 2 and numbers.shape[1] > 1  # the others have rows of one number
        stored[name] = Stored(source, int(numbers.flatten()[0]) - start, transposed, len(shapes[source]))
    return stored


def _candidates(component: str, skeleton: Any, is_xl: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names that a part may have in a checkpoint, and a shape that has the right number of dimensions.

    Convolutions that diffusers replaces by linear layers have four; the rows matter where several matrices are one.
    """
    if component == "unet":
        names, prefix = _unet_names(skeleton), PREFIXES["unet"][0]
    elif component == "vae":
        names, prefix = _autoencoder_names(skeleton), PREFIXES["vae"][0]
    elif skeleton.config.hidden_act == "gelu":  # OpenCLIP's; OpenAI's has quick_gelu
        names = _open_clip_names(skeleton)
        prefix = "conditioner.embedders.1.model." if is_xl else "cond_stage_model.model."
    else:
        outer = {f"text_model.{name.removeprefix('text_model.')}" for name in skeleton.state_dict()}
        names = ((name, (1,)) for name in sorted(outer))
        prefix = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    for name, shape in names:
        yield prefix + name, shape


def _unet_names(unet: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2"):
        yield from _pair(name)
    yield from _pair("input_blocks.0.0")
    weights = list(unet.state_dict())
    attention = {name.partition(".attentions.")[2].partition(".")[2] for name in weights if ".attentions." in name}
    per_block = unet.config.layers_per_block + 1
    blocks = len(unet.config.down_block_types) * per_block
    for number in range(blocks):
        upsampler = 2 if f"up_blocks.{number // per_block}.attentions.0.norm.weight" in weights else 1
        for block in (f"input_blocks.{number}", f"output_blocks.{number}"):
            for part in RESNET:
                yield from _pair(f"{block}.0.{part}")
            for part in sorted(attention):
                yield f"{block}.1.{part}", (1,)
        if number:
            yield from _pair(f"input_blocks.{number}.0.op")
        yield from _pair(f"output_blocks.{number}.{upsampler}.conv")
    for part in RESNET:
        yield from _pair(f"middle_block.0.{part}")
        yield from _pair(f"middle_block.2.{part}")
    for part in sorted(attention):
        yield f"middle_block.1.{part}", (1,)


def _autoencoder_names(autoencoder: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("quant_conv", "post_quant_conv"):
        yield from _pair(name)
    layers = autoencoder.config.layers_per_block
    for half, direction in (("encoder", "down"), ("decoder", "up")):
        for name in ("conv_in", "conv_out", "norm_out"):
            yield from _pair(f"{half}.{name}")
        for block in range(len(autoencoder.config.block_out_channels)):
            for layer in range(layers + 1):
                for part in AUTOENCODER_RESNET:
                    yield from _pair(f"{half}.{direction}.{block}.block.{layer}.{part}")
            yield from _pair(f"{half}.{direction}.{block}.{direction}sample.conv")
        for block in ("block_1", "block_2"):
            for part in AUTOENCODER_RESNET:
                yield from _pair(f"{half}.mid.{block}.{part}")
        for part in AUTOENCODER_ATTENTION:
            yield f"{half}.mid.attn_1.{part}.weight", (1,) if part == "norm" else (1, 1, 1, 1)
            yield f"{half}.mid.attn_1.{part}.bias", (1,)


def _open_clip_names(encoder: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = encoder.config.hidden_size
    yield from (("positional_embedding", (1,)), ("token_embedding.weight", (1,)), ("text_projection", (width, 1)))
    yield from _pair("ln_final")
    for layer in range(encoder.config.num_hidden_layers):
        block = f"transformer.resblocks.{layer}"
        for part in OPEN_CLIP:
            yield from _pair(f"{block}.{part}")
        yield from ((f"{block}.attn.in_proj_weight", (3 * width, 1)), (f"{block}.attn.in_proj_bias", (3 * width,)))


def _pair(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (1,)), (f"{name}.bias", (1,)))
