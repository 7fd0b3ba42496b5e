"""Save adapters: a safetensors file with one entry per tensor of each adapted module.

The names are ``unet.NAME.delora_A`` and so on (``text_encoder.NAME...`` if it was trained). The header's only metadata
entry, ``delora_diffusers``, contains the format version, the base model and the configurations as JSON.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from delora_diffusers.adapter.control import Control
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.atomic import atomic_write
from delora_diffusers.files.reading import CONTROL_PREFIX, FORMAT_VERSION
from delora_diffusers.names import METADATA_KEY, WEIGHTS_NAME


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike,
    *,
    component: str = "unet",
    text_encoders: Mapping[str, Adapter] | None = None,
    control: Control | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    pipeline: str | None = None,
    training: dict[str, Any] | None = None,
    subject: int = 0,
) -> Path:
    """Write an adapter to one safetensors file.

    Args:
        adapter: the adapter of ``component``, which is ``"unet"`` or ``"transformer"``.
        path: a folder (the file is named ``pytorch_delora_weights.safetensors``) or a ``.safetensors`` file.
        text_encoders: the text encoders' adapters by name, ``text_encoder`` and ``text_encoder_2``, if trained.
        control: the control signal that was trained with the adapter; its encoder and palette are saved too.
        base_model: hub id or folder of the base model. revision, variant: with which it was loaded.
        model_config: folder or hub id with the configuration of a base model in a single file.
        prediction_type, rescale_betas_zero_snr: what the base model was trained with, if it does not say that itself.
        pipeline: class of the base model's pipeline, which exports to other formats need.
        training: settings to record: steps, rates, prompt.
        subject: index of the subject to save, if the adapter has several.

    Returns:
        The file's path. The same adapter always gives the same bytes.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    components = {component: adapter, **(text_encoders or {})}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "config": {name: part.config.as_recorded() for name, part in components.items()},
    }
    optional = {"revision": revision, "variant": variant, "pipeline": pipeline, "training": training}
    optional |= {"model_config": model_config, "prediction_type": prediction_type}
    optional["rescale_betas_zero_snr"] = rescale_betas_zero_snr
    header |= {name: value for name, value in optional.items() if value is not None}
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
        # A single entry, because the order of several entries would differ between processes.
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
    return file
