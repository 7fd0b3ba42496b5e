"""mini-dino: a timm ViT that recognizes individual toys, trained without labels.

The only training signal is which photos show the same toy, as if someone walked around it with a camera. Class, colour,
pattern and place are not used.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.miniature.training.pool import Pool, as_input
from data.miniature.training.steps import train
from data.toybox.render import SIZE

BATCH = 1024
"""Subjects, with two photos each. A larger batch contains more similar subjects, the most informative negatives."""
TEMPERATURE = 0.07
ARCHITECTURE: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 192, "depth": 5, "num_heads": 6}


def random_crops(x: Tensor) -> Tensor:
    """Zoom by 1 to 1.25 around a random point, and flip half of the images."""
    batch = len(x)
    zoom = 1 - 0.2 * torch.rand(batch, device=x.device)
    flip = torch.where(torch.rand(batch, device=x.device) < 0.5, -1.0, 1.0)
    shift = (torch.rand(batch, 2, device=x.device) * 2 - 1) * (1 - zoom)[:, None]
    zero = torch.zeros_like(zoom)
    rows = torch.stack((zoom * flip, zero, shift[:, 0], zero, zoom, shift[:, 1]), -1).view(batch, 2, 3)
    grid = torch.nn.functional.affine_grid(rows, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def train_dino(pool: Pool, *, seconds: float, steps: int, seed: int, batch: int = BATCH):
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    device = pool.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, **ARCHITECTURE)
    model = model.to(device)
    torch.manual_seed(seed)
    # The scorer's normalization, for inputs from -1 to 1.
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device)[:, None, None] * 2 - 1
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=device)[:, None, None] * 2
    images = pool.images
    batch = min(batch, len(images))
    target = torch.arange(batch, device=device)

    def compute_loss() -> Tensor:
        subject = torch.rand(len(images), device=device).argsort()[:batch]
        pair = torch.rand(batch, images.shape[1], device=device).argsort(dim=1)[:, :2]
        x = torch.cat((images[subject, pair[:, 0]], images[subject, pair[:, 1]]))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            z = model.forward_features((random_crops(as_input(x)) - mean) / std)[:, 0]
        a, b = torch.nn.functional.normalize(z.float(), dim=-1).chunk(2)
        logits = a @ b.T / TEMPERATURE
        loss = torch.nn.functional.cross_entropy
        return 0.5 * (loss(logits, target) + loss(logits.T, target))

    done = train(
        [model], compute_loss, rate=1e-3, steps=steps, seconds=seconds, weight_decay=0.05, ema=0.999, label="dino"
    )
    return model.eval(), done


def write_dino(model, folder: Path) -> None:
    """Write the folder that timm loads as ``local-dir:``, with weights in float16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    record = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "num_features": ARCHITECTURE["embed_dim"],
        "global_pool": "token",
        "model_args": ARCHITECTURE,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "num_classes": 0, "classifier": "head"},
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
