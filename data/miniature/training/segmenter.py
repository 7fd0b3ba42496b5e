"""mini-segmenter: a small SegFormer that predicts the semantic class of every pixel of a toybox image."""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from torch import Tensor

from data.miniature.training.pool import Pool
from data.miniature.training.steps import train
from data.toybox.render import SIZE
from data.toybox.scenes import SEMANTIC_CLASSES

BATCH = 128
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build(seed: int):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    labels = dict(enumerate(SEMANTIC_CLASSES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SegformerForSemanticSegmentation(
            SegformerConfig(
                hidden_sizes=[32, 64, 96, 160],
                depths=[1, 2, 2, 1],
                num_attention_heads=[1, 2, 4, 5],
                sr_ratios=[8, 4, 2, 1],
                patch_sizes=[7, 3, 3, 3],
                strides=[2, 2, 2, 2],
                mlp_ratios=[3, 3, 3, 3],
                decoder_hidden_size=96,
                drop_path_rate=0.0,
                classifier_dropout_prob=0.0,
                image_size=SIZE,
                id2label=labels,
                label2id={name: index for index, name in labels.items()},
            )
        )


def train_segmenter(pool: Pool, *, seconds: float, steps: int, seed: int, batch: int = BATCH):
    device = pool.images.device
    model = build(seed).to(device).train()
    torch.manual_seed(seed)
    images, maps = pool.images.flatten(0, 1), pool.maps.flatten(0, 1)

    def compute_loss() -> Tensor:
        chosen = torch.randint(len(images), (batch,), device=device)
        flip = torch.rand(batch, 1, 1, device=device) < 0.5
        x, target = images[chosen], maps[chosen]
        target = torch.where(flip, target.flip(2), target)
        x = torch.where(flip[:, None], x.flip(3), x).float() / 127.5 - 1
        x = x * (0.85 + 0.3 * torch.rand(batch, 1, 1, 1, device=device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            logits = model(pixel_values=x).logits
        logits = torch.nn.functional.interpolate(logits.float(), size=x.shape[-2:], mode="bilinear")
        return torch.nn.functional.cross_entropy(logits, target.long())

    done = train([model], compute_loss, rate=1.5e-3, steps=steps, seconds=seconds, ema=0.998, label="segmenter")
    return model.eval(), done


def write_segmenter(model, folder) -> None:
    """Write the folder that transformers loads, with weights in float16."""
    from transformers import SegformerImageProcessor

    folder.mkdir(parents=True, exist_ok=True)
    model.cpu().half().save_pretrained(folder)
    SegformerImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)
