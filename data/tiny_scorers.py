"""A tiny, randomly initialised DINO and CLIP in the folder layouts of timm and open_clip.

``python -m data.tiny_scorers OUT_DIR`` writes ``OUT_DIR/dino`` and ``OUT_DIR/clip``. They load through the same code as
the pretrained models (``local-dir:`` or ``hf-hub:``). They are untrained: their scores only show that scoring runs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write(out_dir: Path, seed: int = 0) -> Path:
    """Write both models to a new folder."""
    import timm
    from open_clip import CLIP
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import save_file

    architecture: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dino = timm.create_model("vit_small_patch16_224", pretrained=False, **architecture)
        clip = CLIP(**CLIP_CONFIG)
    for name in ("dino", "clip"):
        (out_dir / name).mkdir(parents=True)
    save_file(dino.state_dict(), out_dir / "dino" / "model.safetensors")
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "num_features": 32,
        "global_pool": "token",
        "model_args": architecture,
        "pretrained_cfg": {"input_size": [3, 224, 224], "num_classes": 0, "classifier": "head"},
    }
    (out_dir / "dino" / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        out_dir / "clip" / "open_clip_model.safetensors",
    )
    config = {
        "model_cfg": CLIP_CONFIG,
        "preprocess_cfg": {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)},
    }
    (out_dir / "clip" / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    return out_dir


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny_scorers", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args(arguments)
    if options.out_dir.exists():
        sys.exit(f"error: {options.out_dir} already exists; remove it or choose another folder.")
    write(options.out_dir)
    print(f"wrote {options.out_dir}")


if __name__ == "__main__":
    main()
