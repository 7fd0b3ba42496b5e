"""Scoring protocols: which encoders, which preprocessing, which pairs. Do not compare scores across protocols."""

import dataclasses

from data.miniature import MINI_CLIP, MINI_DINO

IDENTIFIERS = ("sks", "qwe")
"""Rare tokens that stand for a subject; they are removed from prompts for CLIP-T."""

PEFT_IMAGEGEN = "peft-imagegen"
"""The protocol of PEFT's image benchmark, which compares other pairs; see ``eval.metrics.peft_imagegen``."""

PRECISIONS = ("bf16", "fp32")
"""Of the encoders; published numbers were computed in fp32."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How DINO, CLIP-I and CLIP-T are computed.

    Attributes:
        name: as given to ``--protocol``.
        dino: timm name (or ``local-dir:``, ``hf-hub:``) of the ViT whose CLS feature is compared.
        dino_transform: ``"straight"`` resizes to 224 x 224, bilinear, and ignores the aspect ratio, like
            facebook/dino-vits16; ``"crop"`` resizes the short side to 256, bicubic, and crops the centre 224 x 224,
            like the DINO repository's evaluation. Both normalize with ImageNet's mean and standard deviation.
        clip: open_clip model name (or ``local-dir:``, ``hf-hub:``).
        clip_pretrained: open_clip's tag for the weights.
        clip_crop: how CLIP's centre crop rounds an odd margin: ``"floor"`` as in the processor of transformers,
            ``"torchvision"`` as in OpenAI's code.
        source: who defined the protocol.
        dino_norm_eps: the epsilon of DINO's LayerNorms; None for the model's own.
        pairs_by_name: whether photos are also compared with the images of subjects whose name ends like theirs, and
            black images are skipped; see ``eval.metrics.pairing``.
    """

    name: str
    dino: str
    dino_transform: str
    clip: str
    clip_pretrained: str | None
    clip_crop: str
    source: str
    dino_norm_eps: float | None = None
    pairs_by_name: bool = False

    def same_encoders(self, other: "Protocol") -> bool:
        """Whether both protocols have the same encoders and preprocessing."""
        differ = {"name", "source", "pairs_by_name"}
        names = {field.name for field in dataclasses.fields(self)} - differ
        return all(getattr(self, name) == getattr(other, name) for name in names)


DELORA = Protocol(
    name="delora",
    dino="vit_small_patch16_224.dino",
    dino_transform="straight",
    clip="ViT-L-14",
    clip_pretrained="openai",
    clip_crop="floor",
    source="OFT's evaluation, used by ETHER and DeLoRA: mean cosine over all (reference, generated) pairs",
    dino_norm_eps=1e-12,  # as transformers has it in facebook/dino-vits16; the DINO repository and timm have 1e-6
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        DELORA,
        dataclasses.replace(
            DELORA,
            name="oft",
            source="OFT's evaluation script to the letter: photos of dog are also compared with images of backpack_dog",
            pairs_by_name=True,
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
            source="the included miniature DINO and CLIP, trained on toybox images only",
        ),
    )
}
