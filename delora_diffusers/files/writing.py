"""Save adapters: one safetensors file with an entry for each tensor of each adapted module.

The names are ``unet.NAME.delora_A`` and so on (``text_encoder.NAME...`` if it was trained). The header's only metadata
entry, ``delora_diffusers``, is JSON with the format version, the base model and the configurations.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from delora_diffusers.adapter.control import Control
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.atomic import atomic_write
from delora_diffusers.files.reading import CONTROL_PREFIX, FORMAT_VERSION, METADATA_KEY
from delora_diffusers.names import WEIGHTS_NAME


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike,
    *,
    component: str = "unet",
    text_encoders: Mapping[str, Adapter] | None = None,
    control: Control | None = None,
    base_model: str | None = None,
    pipeline: str | None = None,
    training: dict[str, Any] | None = None,
    subject: int = 0,
) -> Path:
    """Write an adapter to one safetensors file.

    Args:
        adapter: the UNet's adapter, or that of ``component``, which may be ``"transformer"``.
        path: a folder (the file gets the name ``pytorch_delora_weights.safetensors``) or a ``.safetensors`` file.
        text_encoders: their adapters by name, ``text_encoder`` and ``text_encoder_2``, where they were trained.
        control: the control signal that was trained with it; its encoder and palette go into the file.
        base_model: hub id or folder of the model that the adapter belongs to.
        pipeline: class of the base model's pipeline, which tells the formats of other tools what it is.
        training: settings to remember: steps, rates, prompt.
        subject: which one, of an adapter that holds several.

    Returns:
        The file's path. The same adapter always gives the same bytes.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    components = {component: adapter, **(text_encoders or {})}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "config": {name: dataclasses.asdict(part.config) for name, part in components.items()},
    }
    header |= {name: value for name, value in (("pipeline", pipeline), ("training", training)) if value is not None}
    tensors = {
        f"{component}.{name}": tensor.detach().float().cpu().contiguous().clone()
        for component, part in components.items()
        for name, tensor in part.named_tensors(subject)
    }
    if control is not None:
        header["control_encoder"] = {"palette": None if control.palette is None else control.palette.tolist()}
        tensors |= {
            CONTROL_PREFIX + name: tensor.detach().float().cpu().contiguous().clone()
            for name, tensor in control.encoder.state_dict().items()
        }
    with atomic_write(file) as temporary:
        # One entry: several would come in an order that changes from one process to the next.
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
    return file
