"""The encoders of the protocols: unit features of images and prompts."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from delora_diffusers.errors import LOADING_ERRORS, InputError, printable
from eval.metrics.protocols import Protocol

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dino_transform(kind: str, size: int = 224) -> transforms.Compose:
    """Preprocessing of the DINO encoder; see ``Protocol.dino_transform``."""
    if kind == "straight":
        scaling = [transforms.Resize((size, size), transforms.InterpolationMode.BILINEAR)]
    else:
        bicubic = transforms.InterpolationMode.BICUBIC
        scaling = [transforms.Resize(round(size * 256 / 224), bicubic), transforms.CenterCrop(size)]
    return transforms.Compose([*scaling, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def view(transform: transforms.Compose, image: Image.Image) -> Tensor:
    """The image resized and cropped for a model, (height, width, 3) uint8.

    ``encode`` does the last two steps of the transform, conversion to float and normalization, on its device.
    """
    for step in transform.transforms[:-2]:
        image = step(image)
    return torch.from_numpy(np.array(image))


class FloorCenterCrop(transforms.CenterCrop):
    """The centre crop of transformers' processors: an odd margin loses its extra pixel on the right or bottom.

    Torchvision rounds half to even instead, so the two crops can differ by one pixel.
    """

    def forward(self, img: Image.Image) -> Image.Image:
        (height, width), left, top = self.size, (img.width - self.size[1]) // 2, (img.height - self.size[0]) // 2
        return img.crop((left, top, left + width, top + height))


class Encoder:
    """A model on its device and in its precision, with its preprocessing.

    Attributes:
        transform: the preprocessing, on which the features depend.
        view: the part of it that is done to an image in a worker process; ``encode`` takes a batch of its results.
        norm_eps: the epsilon that the LayerNorms were given; None for the model's.
    """

    model: Any
    transform: Any
    norm_eps: float | None = None
    view: Callable[[Image.Image], Tensor]

    def __init__(self, device: torch.device | str, precision: str):
        self.device, self.precision, self.dtype = (
            device,
            precision,
            {"bf16": torch.bfloat16, "fp32": torch.float32}[precision],
        )

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the weights, the preprocessing and the precision: everything that an image's features depend on."""
        weights = sorted(self.model.state_dict().items())

        def content_hash(tensor: Tensor) -> str:
            content: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return hashlib.sha256(content).hexdigest()

        with ThreadPoolExecutor() as pool:  # the weights of a large model are gigabytes
            hashes = pool.map(content_hash, [tensor for _, tensor in weights])
        contents = [(name, content) for (name, _), content in zip(weights, hashes)]
        described = f"{type(self).__name__} {self.dtype} {self.transform} {contents}"
        if self.norm_eps is not None:
            described += f" {self.norm_eps}"
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def encode(self, batch: Tensor) -> Tensor:
        """Unit features (batch, width) of views."""
        raise NotImplementedError

    def unit(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def _prepared(self, batch: Tensor) -> Tensor:
        """Views (batch, height, width, 3) uint8, or outputs of ``transform``, as the batch that the model takes."""
        batch = batch.to(self.device, non_blocking=True)
        if batch.dtype == torch.uint8:
            normalize: transforms.Normalize = self.transform.transforms[-1]
            batch = normalize(batch.permute(0, 3, 1, 2).float() / 255)
        return batch.to(self.dtype)


class DinoEncoder(Encoder):
    """CLS features of a DINO ViT, of norm 1.

    Args:
        name: a timm name, ``hf-hub:ID`` or ``local-dir:FOLDER`` (config.json and model.safetensors).
        kind: see ``Protocol.dino_transform``.
        device: where to run.
        precision: ``fp32`` or ``bf16``; features are float32.
        norm_eps: see ``Protocol.dino_norm_eps``.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(
        self, name: str, kind: str, device: torch.device | str, precision: str = "fp32", norm_eps: float | None = None
    ):
        super().__init__(device, precision)
        import timm

        _check_local_dir(name, "--dino", "config.json")
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0).eval().to(device, self.dtype)
        except LOADING_ERRORS as error:
            raise InputError(_load_error("--dino", name, error)) from error
        for module in self.model.modules():
            if norm_eps is not None and isinstance(module, torch.nn.LayerNorm):
                module.eps = norm_eps
        self.norm_eps = norm_eps
        self.transform = dino_transform(kind, self.model.pretrained_cfg["input_size"][-1])
        self.view = functools.partial(view, self.transform)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Unit features (batch, width) of views (batch, height, width, 3), or of outputs of ``transform``."""
        return self.unit(self.model.forward_features(self._prepared(batch))[:, 0])


class ClipEncoder(Encoder):
    """Image and text features of a CLIP, of norm 1.

    Args:
        name: an open_clip model name, ``hf-hub:ID`` or ``local-dir:FOLDER`` (open_clip_config.json and weights).
        pretrained: open_clip's tag for the weights, used with a plain model name.
        device: where to run.
        crop: see ``Protocol.clip_crop``.
        precision: ``fp32`` or ``bf16``; features are float32.

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
                # OpenAI's weights need QuickGELU; for a plain name open_clip builds GELU and only warns.
                force_quick_gelu=":" not in name and pretrained == "openai",
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except LOADING_ERRORS as error:
            raise InputError(_load_error("--clip", name, error)) from error
        self.transform = transform
        if crop == "floor":
            steps = [
                FloorCenterCrop(s.size) if isinstance(s, transforms.CenterCrop) else s for s in transform.transforms
            ]
            self.transform = transforms.Compose(steps)
        self.view = functools.partial(view, self.transform)
        self.model = model.eval().to(device, self.dtype)  # pyright: ignore[reportCallIssue]

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Unit features (batch, width) of views (batch, height, width, 3), or of outputs of ``transform``."""
        return self.unit(self.model.encode_image(self._prepared(batch)))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit features (texts, width)."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        padding = self.tokenizer([""])[0, -1].item()
        full = [text for text, row in zip(texts, tokens.tolist()) if row[-2] != padding]
        if full:
            message = f"truncated: of {full[0]!r} CLIP reads only the first {tokens.shape[1]} tokens"
            logger.warning(printable(f"{message}; {len(full)} of {len(texts)} prompts are this long."))
        return self.unit(self.model.encode_text(tokens))


def _check_local_dir(name: str, flag: str, file: str) -> None:
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / file).is_file():
            raise InputError(f"{flag} {name}: {folder} has no {file}; give a folder that the model was saved to.")


def _load_error(flag: str, name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{flag} {name} could not be loaded ({reason}); give an existing model, or local-dir:FOLDER."


def device_of(given: str | None) -> str:
    """A device that was given, or ``cuda`` if there is a GPU, else ``cpu``.

    Raises:
        InputError: it cannot be used.
    """
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=given)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--device {given} cannot be used ({reason}); leave it out, or give cpu.") from error
    return given


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of one protocol."""

    dino: DinoEncoder
    clip: ClipEncoder
    dino_name: str
    clip_name: str

    def by_key(self) -> dict[str, Encoder]:
        """The encoders by key, as ``embed`` takes them."""
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
        DinoEncoder(dino_name, protocol.dino_transform, device, precision, protocol.dino_norm_eps),
        ClipEncoder(clip_name, protocol.clip_pretrained, device, protocol.clip_crop, precision),
        dino_name,
        clip_name,
    )
