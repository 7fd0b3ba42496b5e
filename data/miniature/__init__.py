"""The miniature family: a complete Stable Diffusion stack, trained on toybox, that ships with the repository."""

from pathlib import Path

FAMILY = Path(__file__).parent
MINI_SD = FAMILY / "mini-sd"
MINI_CLIP = FAMILY / "mini-clip"
MINI_DINO = FAMILY / "mini-dino"
MINI_SEGMENTER = FAMILY / "mini-segmenter"
