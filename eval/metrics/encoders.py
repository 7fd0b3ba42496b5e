"""The encoders of the protocols: unit features of pictures and prompts, each computed once."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from delora_diffusers.errors import InputError
from eval.metrics.protocols import Protocol

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dino_transform(kind: str, size: int = 224) -> transforms.Compose:
    """Preprocessing of the DINO encoder; see ``Protocol.dino_transform``."""
    if kind == "straight":
        scaling = [transforms.Resize((size, size), transforms.InterpolationMode.BILINEAR)]
    else:
        bicubic = transforms.InterpolationMode.BICUBIC
        scaling = [transforms.Resize(round(size * 256 / 224), bicubic), transforms.CenterCrop(size)]
    return transforms.Compose([*scaling, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def view(transform: transforms.Compose, picture: Image.Image) -> Tensor:
    """What of a picture a model sees: scaled and cut, (height, width, 3) uint8.

    The last two steps of the transform, to floats and normalized, are left to ``encode`` and its device.
    """
    for step in transform.transforms[:-2]:
        picture = step(picture)
    return torch.from_numpy(np.array(picture))


class FloorCenterCrop(transforms.CenterCrop):
    """The centre crop of transformers' processors: of an odd leftover, the far side loses the larger half.

    Torchvision's rounds to the even half instead, so the two can lie one pixel apart.
    """

    def forward(self, img: Image.Image) -> Image.Image:
        (height, width), left, top = self.size, (img.width - self.size[1]) // 2, (img.height - self.size[0]) // 2
        return img.crop((left, top, left + width, top + height))


class _Encoder:
    """A model on its device in its precision, and the preprocessing that it wants."""

    model: Any
    transform: Any

    def __init__(self, device: torch.device | str, precision: str):
        self.device, self.precision, self.dtype = (
            device,
            precision,
            {"bf16": torch.bfloat16, "fp32": torch.float32}[precision],
        )

    @functools.cached_property
    def identity(self) -> str:
        """Stands for the weights, the preprocessing and the precision: what features of a picture depend on."""
        weights = sorted(self.model.state_dict().items())

        def of(tensor: Tensor) -> str:
            content: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return hashlib.sha256(content).hexdigest()

        with ThreadPoolExecutor() as pool:  # the weights of a large model are gigabytes
            contents = pool.map(of, [tensor for _, tensor in weights])
        made_of = [(name, content) for (name, _), content in zip(weights, contents)]
        described = f"{type(self).__name__} {self.dtype} {self.transform} {made_of}"
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def _unit(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def _placed(self, batch: Tensor) -> Tensor:
        """Views (batch, height, width, 3) uint8, or what ``transform`` makes of pictures, as the model takes them."""
        batch = batch.to(self.device, non_blocking=True)
        if batch.dtype == torch.uint8:
            normalize: transforms.Normalize = self.transform.transforms[-1]
            batch = normalize(batch.permute(0, 3, 1, 2).float() / 255)
        return batch.to(self.dtype)


class DinoEncoder(_Encoder):
    """CLS features of a DINO ViT, of norm 1.

    Args:
        name: a timm name, ``hf-hub:ID`` or ``local-dir:FOLDER`` (config.json and model.safetensors).
        kind: see ``Protocol.dino_transform``.
        device: where to run.
        precision: ``fp32`` or ``bf16``; features come out in float32.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, name: str, kind: str, device: torch.device | str, precision: str = "fp32"):
        super().__init__(device, precision)
        import timm

        _check_local_dir(name, "--dino", "config.json")
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0).eval().to(device, self.dtype)
        except Exception as error:  # whatever the hub, timm and safetensors raise
            raise InputError(_refusal("--dino", name, error)) from error
        self.transform = dino_transform(kind, self.model.pretrained_cfg["input_size"][-1])

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Unit features (batch, width) of views (batch, height, width, 3), or of transformed pictures as floats."""
        return self._unit(self.model.forward_features(self._placed(batch))[:, 0])


class ClipEncoder(_Encoder):
    """Image and text features of a CLIP, of norm 1.

    Args:
        name: an open_clip model name, ``hf-hub:ID`` or ``local-dir:FOLDER`` (open_clip_config.json and weights).
        pretrained: open_clip's tag of the weights, for a plain model name.
        device: where to run.
        crop: see ``Protocol.clip_crop``.
        precision: ``fp32`` or ``bf16``; features come out in float32.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        device: torch.device | str,
        crop: str = "torchvision",
        precision: str = "fp32",
    ):
        super().__init__(device, precision)
        import open_clip

        _check_local_dir(name, "--clip", "open_clip_config.json")
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                name,
                None if ":" in name else pretrained,
                # OpenAI's weights want QuickGELU; from a plain name open_clip builds GELU and only warns.
                force_quick_gelu=":" not in name and pretrained == "openai",
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # whatever the hub, open_clip and safetensors raise
            raise InputError(_refusal("--clip", name, error)) from error
        self.transform = transform
        if crop == "floor":
            steps = [
                FloorCenterCrop(s.size) if isinstance(s, transforms.CenterCrop) else s for s in transform.transforms
            ]
            self.transform = transforms.Compose(steps)
        self.model = model.eval().to(device, self.dtype)  # pyright: ignore[reportCallIssue]

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Unit features (batch, width) of views (batch, height, width, 3), or of transformed pictures as floats."""
        return self._unit(self.model.encode_image(self._placed(batch)))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit features (texts, width)."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return self._unit(self.model.encode_text(tokens))


def _check_local_dir(name: str, flag: str, file: str) -> None:
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / file).is_file():
            raise InputError(f"{flag} {name}: {folder} has no {file}; name a folder that the model was saved to.")


def _refusal(flag: str, name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{flag} {name} could not be loaded ({reason}); name a model that is there, or local-dir:FOLDER."


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of one protocol."""

    dino: DinoEncoder
    clip: ClipEncoder
    dino_name: str
    clip_name: str

    def by_key(self) -> dict[str, DinoEncoder | ClipEncoder]:
        """Under the keys of ``embed``."""
        return {"dino": self.dino, "clip": self.clip}


def load_encoders(
    protocol: Protocol, dino: str | None, clip: str | None, device: torch.device | str, precision: str
) -> Encoders:
    """The encoders of a protocol.

    Args:
        dino, clip: other models instead of the protocol's.

    Raises:
        InputError: a model cannot be loaded.
    """
    dino_name, clip_name = dino or protocol.dino, clip or protocol.clip
    return Encoders(
        DinoEncoder(dino_name, protocol.dino_transform, device, precision),
        ClipEncoder(clip_name, protocol.clip_pretrained, device, protocol.clip_crop, precision),
        dino_name,
        clip_name,
    )
