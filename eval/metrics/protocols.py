"""Scoring protocols: which encoders, which preprocessing, which pairs. Different ones give different numbers."""

import dataclasses

from data.miniature import MINI_CLIP, MINI_DINO

IDENTIFIERS = ("sks", "qwe")
"""Rare tokens that stand for a subject, which are removed from a prompt for CLIP-T."""

PRECISIONS = ("bf16", "fp32")
"""That the encoders can compute in; published numbers are made in fp32."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How DINO, CLIP-I and CLIP-T are made.

    Attributes:
        name: as given to ``--protocol``.
        dino: timm name (or ``local-dir:``, ``hf-hub:``) of the ViT whose CLS feature is compared.
        dino_transform: ``"straight"`` scales to 224 x 224 bilinear whatever the aspect (facebook/dino-vits16's own
            preprocessing); ``"crop"`` scales the short side to 256 bicubic and cuts the centre 224 x 224 (the
            evaluation transform of the DINO repository). Both normalize with ImageNet's mean and deviation.
        clip: open_clip model name (or ``local-dir:``, ``hf-hub:``).
        clip_pretrained: open_clip's tag of the weights.
        clip_crop: where CLIP's centre crop lies when an odd number of pixels is left over: ``"floor"`` as in the
            processor of transformers, ``"torchvision"`` as in OpenAI's code.
        source: where the protocol is from.
    """

    name: str
    dino: str
    dino_transform: str
    clip: str
    clip_pretrained: str | None
    clip_crop: str
    source: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="delora",
            dino="vit_small_patch16_224.dino",
            dino_transform="straight",
            clip="ViT-L-14",
            clip_pretrained="openai",
            clip_crop="floor",
            source="OFT's evaluation, used by ETHER and DeLoRA: mean cosine of all (reference, generated) pairs",
        ),
        Protocol(
            name="dreambooth",
            dino="vit_small_patch16_224.dino",
            dino_transform="crop",
            clip="ViT-B-32",
            clip_pretrained="openai",
            clip_crop="torchvision",
            source="Ruiz et al., CVPR 2023, section 4.1: mean cosine over all (reference, generated) pairs",
        ),
        Protocol(
            name="toybox",
            dino=f"local-dir:{MINI_DINO}",
            dino_transform="straight",
            clip=f"local-dir:{MINI_CLIP}",
            clip_pretrained=None,
            clip_crop="torchvision",
            source="the embedded miniature DINO and CLIP, which know toybox's pictures only",
        ),
    )
}
