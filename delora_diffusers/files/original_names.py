"""Transformer modules by their names in the models' original code, which ComfyUI and sd-scripts use.

The original code computes several of diffusers' modules by one matrix, for example q, k and v. The update of such a
fused module is exact: the members' A are stacked and their B are the diagonal blocks of a larger B.
"""

import re
from collections.abc import Mapping

import torch

from delora_diffusers.errors import InputError
from delora_diffusers.files.low_rank import Factors

JOINT_ATTENTION = {
    r"transformer_blocks\.(\d+)\.attn\.to_(?P<rows>[qkv])": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.add_(?P<rows>[qkv])_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
}
Z_IMAGE_BLOCK = r"((?:layers|noise_refiner|context_refiner)\.\d+)"
ORIGINAL_NAMES = {
    "sd3": {
        r"transformer_blocks\.(\d+)\.(attn2?)\.to_(?P<rows>[qkv])": r"joint_blocks.\1.x_block.\2.qkv",
        r"transformer_blocks\.(\d+)\.attn\.add_(?P<rows>[qkv])_proj": r"joint_blocks.\1.context_block.attn.qkv",
        r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0": r"joint_blocks.\1.x_block.\2.proj",
        r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
        r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
        r"transformer_blocks\.(\d+)\.ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
        r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
        r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
        r"transformer_blocks\.(\d+)\.norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
    },
    "flux": {
        **JOINT_ATTENTION,
        r"transformer_blocks\.(\d+)\.ff\.net\.([02])(?:\.proj)?": r"double_blocks.\1.img_mlp.\2",
        r"transformer_blocks\.(\d+)\.ff_context\.net\.([02])(?:\.proj)?": r"double_blocks.\1.txt_mlp.\2",
        r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.lin",
        r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
        r"single_transformer_blocks\.(\d+)\.(?:attn\.to|proj)_(?P<rows>[qkv]|mlp)": r"single_blocks.\1.linear1",
        r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
        r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
    },
    "flux2": {
        **JOINT_ATTENTION,
        r"transformer_blocks\.(\d+)\.ff\.linear_in": r"double_blocks.\1.img_mlp.0",
        r"transformer_blocks\.(\d+)\.ff\.linear_out": r"double_blocks.\1.img_mlp.2",
        r"transformer_blocks\.(\d+)\.ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
        r"transformer_blocks\.(\d+)\.ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
        r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
        r"single_transformer_blocks\.(\d+)\.attn\.to_out": r"single_blocks.\1.linear2",
    },
    "zimage": {
        rf"{Z_IMAGE_BLOCK}\.attention\.to_(?P<rows>[qkv])": r"\1.attention.qkv",
        rf"{Z_IMAGE_BLOCK}\.attention\.to_out\.0": r"\1.attention.out",
        rf"{Z_IMAGE_BLOCK}\.(feed_forward\.w[123]|adaLN_modulation\.0)": r"\1.\2",
    },
    "qwenimage": {".+": r"\g<0>"},
}
"""Diffusers' names to original names, by family. The group ``rows`` is the member of a fused module.

Embeddings, output layers and FLUX.2's shared modulations are omitted: diffusers cannot read the original names of most
of them. So is SD3's ``norm1_context``, of which the original code swaps the halves in the last block only.
"""
FUSED_ROWS = {"qkv": {"q": 1, "k": 1, "v": 1}, "linear1": {"q": 1, "k": 1, "v": 1, "mlp": 4}}
"""The members of fused modules in the order of their rows, each with its rows relative to q's."""


def original_name(family: str, module: str) -> tuple[str, str | None]:
    """A module's original name, and which member of it the module is, or None if it is the whole.

    Raises:
        InputError: the module is not in the table.
    """
    for pattern, original in ORIGINAL_NAMES[family].items():
        if match := re.fullmatch(pattern, module):
            return match.expand(original), match.groupdict().get("rows")
    raise InputError(f"{module} has no name in the kohya format; use --format diffusers.")


def modules_by_original_name(family: str, rows: Mapping[str, int]) -> dict[str, list[tuple[str, int, int | None]]]:
    """The modules that a transformer computes in place of each module of its original code.

    Args:
        rows: the output rows of every linear module.

    Returns:
        By original name, (module, first row, last row) of its members; the last row is None if it is the whole.
    """
    modules: dict[str, list[tuple[str, int, int | None]]] = {}
    members: dict[str, dict[str, str]] = {}
    for module in rows:
        try:
            name, member = original_name(family, module)
        except InputError:
            continue
        if member is None:
            modules[name] = [(module, 0, None)]
        else:
            members.setdefault(name, {})[member] = module
    for name, by_member in members.items():
        first = 0
        for member in FUSED_ROWS[name.rpartition(".")[2]]:
            last = first + rows[by_member[member]]
            modules.setdefault(name, []).append((by_member[member], first, last))
            first = last
    return modules


def in_original_layout(family: str, modules: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of a transformer's modules by original name, with those of fused modules combined.

    The update is zero in the rows of members that are not adapted.

    Raises:
        InputError: a module has no original name, or members of a fused module do not fit together.
    """
    by_name: dict[str, dict[str | None, Factors]] = {}
    for module, factors in modules.items():
        name, member = original_name(family, module)
        by_name.setdefault(name, {})[member] = factors
    return {name: members.get(None) or _fused(name, members) for name, members in by_name.items()}


def _fused(name: str, members: Mapping[str | None, Factors]) -> Factors:
    rows = FUSED_ROWS[name.rpartition(".")[2]]
    sizes = {(factors.b.shape[0] / rows[member or ""], factors.a.shape[1]) for member, factors in members.items()}
    if len(sizes) > 1:
        raise InputError(f"the adapted parts of {name} have different widths; give an adapter of one model.")
    width = int(sizes.pop()[0])
    b = torch.block_diag(*(members[m].b if m in members else torch.zeros(n * width, 0) for m, n in rows.items()))
    return Factors(b, torch.cat([members[m].a for m in rows if m in members]))
