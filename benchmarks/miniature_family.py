"""Quality of the miniature family on toys that none of its models was trained on.

``python -m benchmarks.miniature_family OUT_DIR`` renders held-out images, measures the autoencoder, mini-clip,
mini-dino, the segmenter and samples of mini-sd, and writes a table (``family.md``, ``family.json``) and sheets of
images (``renders.png``, ``reconstructions.png``, ``samples.png``).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.reporting import print_and_save
from data.miniature import MINI_CLIP, MINI_DINO, MINI_SEGMENTER
from data.toybox.captions import full_caption
from data.toybox.places import STUFF
from data.toybox.render import render
from data.toybox.scenes import SEMANTIC_CLASSES, Scene, photograph, unseen_subject
from data.toybox.shapes import CLASSES
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.image_grid import labelled_grid
from delora_diffusers.pipelines.sampling import sample_images
from eval.metrics.encoders import ClipEncoder, DinoEncoder

IMAGES, SUBJECTS_PER_CLASS, PHOTOS_PER_SUBJECT = 500, 10, 5
CANDIDATES = 100
"""Captions that the caption of an image is retrieved from."""
SEED = 8128
"""For the views; no training image was rendered with this seed."""
STEPS, GUIDANCE = 25, 4.0


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes of ``count`` different unseen subjects, each in any place."""
    return [photograph(unseen_subject(10_000 + i), SEED, i) for i in range(count)]


def to_image(pixels: Tensor) -> Image.Image:
    """An image from (3, height, width) uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def psnr(error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, for a mean squared error of values from 0 to 1."""
    return float(-10 * torch.log10(error))


@torch.no_grad()
def autoencoder_scores(vae, pixels: Tensor, maps: Tensor, sheet: Path) -> dict[str, float]:
    """PSNR of the mean error over all images, over every pixel and over the pixels of the toys.

    Args:
        pixels: (images, 3, height, width), uint8. maps: (images, height, width), semantic classes.
        sheet: file to write, a few images above their reconstructions.
    """
    x = pixels.float() / 255
    y = torch.cat([vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in x.split(50)])
    y = ((y / 2 + 0.5).clamp(0, 1) * 255).round() / 255
    error, inside = (y - x).square(), (maps >= len(STUFF))[:, None].float()
    renders, reconstructions = ([to_image(image) for image in row[:8]] for row in (pixels, (y * 255).to(torch.uint8)))
    labelled_grid([("Held-out renders", renders), ("Their reconstructions", reconstructions)], 192).save(sheet)
    return {
        "autoencoder PSNR, dB": psnr(error.mean()),
        "autoencoder PSNR inside the toy, dB": psnr((error * inside).sum() / (3 * inside.sum())),
    }


def retrieval_at_1(images: Tensor, texts: Tensor, captions: list[str]) -> float:
    """Share of images whose caption is the nearest of ``CANDIDATES``; the same text from another image also counts."""
    hits = 0
    for first in range(0, len(images), CANDIDATES):
        chunk = slice(first, first + CANDIDATES)
        nearest = (images[chunk] @ texts[chunk].T).argmax(dim=1)
        hits += sum(captions[first + int(j)] == captions[first + i] for i, j in enumerate(nearest))
    return hits / len(images)


def encode(encoder: DinoEncoder | ClipEncoder, images: list[Image.Image]) -> Tensor:
    """Unit features (images, width), on the CPU."""
    views: Any = [encoder.transform(image) for image in images]
    return torch.cat([encoder.encode(torch.stack(views[i : i + 64])).cpu() for i in range(0, len(views), 64)])


def verification(features: Tensor, subjects: Tensor, kinds: Tensor) -> dict[str, float]:
    """ROC AUC of same subject against another subject of the same class, over all such pairs of photos.

    Args:
        features: (photos, width). subjects, kinds: (photos,), the number of the subject and of its class.
    """
    pairs = torch.ones(len(features), len(features)).triu(1).bool() & (kinds[:, None] == kinds[None])
    same, cosine = subjects[:, None] == subjects[None], features @ features.T

    def auc(mask: Tensor) -> float:
        positive, negative = cosine[mask & same], cosine[mask & ~same].sort().values
        below = torch.searchsorted(negative, positive)
        ties = torch.searchsorted(negative, positive, right=True) - below
        return float(((below + 0.5 * ties) / len(negative)).mean())

    scores = {"mini-dino AUC": auc(pairs)}
    for index, kind in enumerate(CLASSES):
        scores[f"mini-dino AUC, {kind}"] = auc(pairs & (kinds == index)[:, None])
    scores["mini-dino cosine, same subject"] = float(cosine[pairs & same].mean())
    scores["mini-dino cosine, another of its class"] = float(cosine[pairs & ~same].mean())
    return scores


@torch.no_grad()
def mean_iou(images: list[Image.Image], maps: Tensor, device: str) -> float:
    """mIoU of mini-segmenter over the classes of toybox, from one confusion matrix of all images.

    Args:
        maps: (images, height, width), the true classes.
    """
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    model: Any = AutoModelForSemanticSegmentation.from_pretrained(MINI_SEGMENTER).float().eval().to(device)
    processor: Any = AutoImageProcessor.from_pretrained(MINI_SEGMENTER)
    classes = len(SEMANTIC_CLASSES)
    confusion = torch.zeros(classes * classes, dtype=torch.long)
    for first in range(0, len(images), 50):
        batch = images[first : first + 50]
        output = model(**processor(images=batch, return_tensors="pt").to(device))
        sizes = [(image.height, image.width) for image in batch]
        predicted = torch.stack(processor.post_process_semantic_segmentation(output, sizes)).cpu()
        truth = maps[first : first + 50].cpu().long()
        confusion += torch.bincount((truth * classes + predicted).flatten(), minlength=classes * classes)
    matrix = confusion.view(classes, classes)
    intersection = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - intersection
    return float((intersection / union.clamp(min=1)).mean())


def sample_captions(pipeline, captions: list[str]) -> list[Image.Image]:
    """An image per caption; image k has seed k."""
    from tqdm.auto import tqdm

    images = []
    for first in tqdm(range(0, len(captions), 20), desc="sampling", disable=None):
        prompts = captions[first : first + 20]
        seeds = list(range(first, first + len(prompts)))
        images += sample_images(
            pipeline, seeds, None, prompt=prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
    return images


def save_sheet(images: list[Image.Image], captions: list[str], file: Path, columns: int = 4, rows: int = 6) -> None:
    """The first images, each below its caption."""
    count = columns * rows
    cells = [labelled_grid([(text, [image])], 256) for text, image in zip(captions[:count], images[:count])]
    height = max(cell.height for cell in cells)
    page = Image.new("RGB", (columns * cells[0].width, rows * height), "white")
    for index, cell in enumerate(cells):
        page.paste(cell, ((index % columns) * cell.width, (index // columns) * height + height - cell.height))
    page.save(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_family", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pretrained_model_name_or_path", help="another pipeline than the included mini-sd")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    out, device = options.out_dir, options.device
    out.mkdir(parents=True, exist_ok=True)

    scenes = held_out_scenes(IMAGES)
    captions = [full_caption(scene) for scene in scenes]
    pixels, maps = (tensor.to(device) for tensor in render(scenes, device=device))
    images = [to_image(image) for image in pixels]
    save_sheet(images, captions, out / "renders.png")

    pipeline = load_pipeline(options.pretrained_model_name_or_path).to(device)
    scores = autoencoder_scores(pipeline.vae, pixels, maps, out / "reconstructions.png")
    scores["mini-segmenter mIoU"] = mean_iou(images, maps, device)

    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, device)
    texts = clip.encode_texts(captions).cpu()
    scores[f"mini-clip R@1 among {CANDIDATES}, renders"] = retrieval_at_1(encode(clip, images), texts, captions)

    subjects = [unseen_subject(i) for i in range(SUBJECTS_PER_CLASS * len(CLASSES))]
    views = [photograph(subject, SEED + i, j) for i, subject in enumerate(subjects) for j in range(PHOTOS_PER_SUBJECT)]
    photos = [to_image(photo) for photo in render(views, device=device)[0]]
    dino = DinoEncoder(f"local-dir:{MINI_DINO}", "straight", device)
    numbers = torch.arange(len(subjects)).repeat_interleave(PHOTOS_PER_SUBJECT)
    scores |= verification(encode(dino, photos), numbers, numbers % len(CLASSES))

    count = 2 * CANDIDATES
    samples = sample_captions(pipeline, captions[:count])
    save_sheet(samples, captions, out / "samples.png")
    features = encode(clip, samples)
    scores[f"mini-clip R@1 among {CANDIDATES}, mini-sd samples"] = retrieval_at_1(features, texts, captions)
    scores["CLIP-T, renders"] = float((encode(clip, images[:count]) * texts[:count]).sum(1).mean())
    scores["CLIP-T, mini-sd samples"] = float((features * texts[:count]).sum(1).mean())

    table = "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value:.3f} |" for name, value in scores.items())])
    (out / "family.json").write_text(json.dumps(scores, indent=1) + "\n")
    print_and_save(table, out / "family.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
