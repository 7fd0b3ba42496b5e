"""How good the miniature family is, on toys that no model of it was trained on.

``python -m benchmarks.miniature_family OUT_DIR`` renders held-out pictures, measures the autoencoder, mini-clip,
mini-dino, the segmenter and mini-sd's samples, and writes a table (``family.md``, ``family.json``) and sheets to see.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.miniature import MINI_CLIP, MINI_DINO, MINI_SEGMENTER
from data.toybox.captions import full_caption
from data.toybox.places import STUFF
from data.toybox.render import render
from data.toybox.scenes import SEMANTIC_CLASSES, Scene, photograph, unseen_subject
from data.toybox.shapes import CLASSES
from delora_diffusers.image_grid import labelled_grid
from delora_diffusers.pipelines.base_model import load_pipeline
from delora_diffusers.pipelines.sampling import sample_images
from eval.metrics.encoders import ClipEncoder, DinoEncoder

PICTURES, SUBJECTS_PER_CLASS, PHOTOGRAPHS, AMONG = 500, 10, 5, 100
SEED = 8128
"""Views are drawn from it; no training pool is rendered from this seed."""
STEPS, GUIDANCE = 25, 4.0


def held_out_scenes(count: int) -> list[Scene]:
    """Pictures of ``count`` different unseen subjects anywhere."""
    return [photograph(unseen_subject(10_000 + i), SEED, i) for i in range(count)]


def to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())


def psnr(error: Tensor) -> float:
    """Decibels of a mean squared error, of values 0 to 1."""
    return float(-10 * torch.log10(error))


@torch.no_grad()
def autoencoder_scores(vae, pictures: Tensor, maps: Tensor, sheet: Path) -> dict[str, float]:
    """PSNR over whole pictures, and inside the toys' masks (of the mean error over all pictures)."""
    x = pictures.float() / 255
    y = torch.cat([vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in x.split(50)])
    y = ((y / 2 + 0.5).clamp(0, 1) * 255).round() / 255
    error, inside = (y - x).square(), (maps >= len(STUFF))[:, None].float()
    shown = [[to_image(picture) for picture in half[:8]] for half in (pictures, (y[:8] * 255).to(torch.uint8))]
    labelled_grid([("Held-out renders", shown[0]), ("Their reconstructions", shown[1])], 192).save(sheet)
    return {
        "autoencoder PSNR, dB": psnr(error.mean()),
        "autoencoder PSNR inside the toy, dB": psnr((error * inside).sum() / (3 * inside.sum())),
    }


def retrieval_at_1(images: Tensor, texts: Tensor, captions: list[str]) -> float:
    """Share of pictures whose own caption is the nearest of ``AMONG``; like captions count as one."""
    hits = 0
    for first in range(0, len(images), AMONG):
        best = (images[first : first + AMONG] @ texts[first : first + AMONG].T).argmax(dim=1)
        hits += sum(captions[first + int(j)] == captions[first + i] for i, j in enumerate(best))
    return hits / len(images)


def encode(encoder: DinoEncoder | ClipEncoder, images: list[Image.Image]) -> Tensor:
    views: Any = [encoder.transform(image) for image in images]
    return torch.cat([encoder.encode(torch.stack(views[i : i + 64])).cpu() for i in range(0, len(views), 64)])


def verification(features: Tensor, subjects: Tensor, kinds: Tensor) -> dict[str, float]:
    """ROC AUC of same subject against another subject of its class, over all such pairs of photographs."""
    pairs = torch.ones(len(features), len(features)).triu(1).bool() & (kinds[:, None] == kinds[None])
    same, cosine = subjects[:, None] == subjects[None], features @ features.T

    def auc(chosen: Tensor) -> float:
        positive, negative = cosine[chosen & same], cosine[chosen & ~same].sort().values
        below = torch.searchsorted(negative, positive)
        ties = torch.searchsorted(negative, positive, right=True) - below
        return float(((below + 0.5 * ties) / len(negative)).mean())

    result = {"mini-dino AUC": auc(pairs)}
    for index, kind in enumerate(CLASSES):
        result[f"mini-dino AUC, {kind}"] = auc(pairs & (kinds == index)[:, None])
    result["mini-dino cosine, same subject"] = float(cosine[pairs & same].mean())
    result["mini-dino cosine, another of its class"] = float(cosine[pairs & ~same].mean())
    return result


@torch.no_grad()
def mean_iou(pictures: list[Image.Image], maps: Tensor, device: str) -> float:
    """Over the classes of toybox, from one confusion matrix."""
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    model: Any = AutoModelForSemanticSegmentation.from_pretrained(MINI_SEGMENTER).float().eval().to(device)
    processor: Any = AutoImageProcessor.from_pretrained(MINI_SEGMENTER)
    classes = len(SEMANTIC_CLASSES)
    confusion = torch.zeros(classes * classes, dtype=torch.long)
    for first in range(0, len(pictures), 50):
        batch = pictures[first : first + 50]
        output = model(**processor(images=batch, return_tensors="pt").to(device))
        sizes = [(picture.height, picture.width) for picture in batch]
        found = torch.stack(processor.post_process_semantic_segmentation(output, sizes)).cpu()
        truth = maps[first : first + 50].cpu().long()
        confusion += torch.bincount((truth * classes + found).flatten(), minlength=classes * classes)
    matrix = confusion.view(classes, classes)
    hit = matrix.diagonal()
    return float((hit / (matrix.sum(0) + matrix.sum(1) - hit).clamp(min=1)).mean())


def drawn_samples(pipeline, captions: list[str]) -> list[Image.Image]:
    from tqdm.auto import tqdm

    pictures = []
    for first in tqdm(range(0, len(captions), 20), desc="sampling", disable=None):
        prompts = captions[first : first + 20]
        seeds = list(range(first, first + len(prompts)))
        pictures += sample_images(
            pipeline, seeds, None, prompt=prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
    return pictures


def sheet_of(pictures: list[Image.Image], captions: list[str], file: Path, columns: int = 4, rows: int = 6) -> None:
    """Pictures under their captions."""
    cells = [labelled_grid([(text, [picture])], 256) for text, picture in zip(captions, pictures)]
    height = max(cell.height for cell in cells[: columns * rows])
    page = Image.new("RGB", (columns * cells[0].width, rows * height), "white")
    for index, cell in enumerate(cells[: columns * rows]):
        page.paste(cell, ((index % columns) * cell.width, (index // columns) * height + height - cell.height))
    page.save(file)


def main(typed: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature_family", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pretrained_model_name_or_path", help="another mini-sd")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(typed)
    out, device = options.out_dir, options.device
    out.mkdir(parents=True, exist_ok=True)

    scenes = held_out_scenes(PICTURES)
    captions = [full_caption(scene) for scene in scenes]
    pictures, maps = (tensor.to(device) for tensor in render(scenes, device=device))
    images = [to_image(picture) for picture in pictures]
    sheet_of(images, captions, out / "renders.png")

    pipeline = load_pipeline(options.pretrained_model_name_or_path).to(device)
    scores = autoencoder_scores(pipeline.vae, pictures, maps, out / "reconstructions.png")
    scores["mini-segmenter mIoU"] = mean_iou(images, maps, device)

    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, device)
    texts = clip.encode_texts(captions).cpu()
    scores[f"mini-clip R@1 among {AMONG}, renders"] = retrieval_at_1(encode(clip, images), texts, captions)

    subjects = [unseen_subject(i) for i in range(SUBJECTS_PER_CLASS * len(CLASSES))]
    walk = [photograph(subject, SEED + i, j) for i, subject in enumerate(subjects) for j in range(PHOTOGRAPHS)]
    seen = [to_image(picture) for picture in render(walk, device=device)[0]]
    dino = DinoEncoder(f"local-dir:{MINI_DINO}", "straight", device)
    number = torch.arange(len(subjects)).repeat_interleave(PHOTOGRAPHS)
    scores |= verification(encode(dino, seen), number, number % len(CLASSES))

    samples = drawn_samples(pipeline, captions[: 2 * AMONG])
    sheet_of(samples, captions, out / "samples.png")
    found = encode(clip, samples)
    scores[f"mini-clip R@1 among {AMONG}, mini-sd samples"] = retrieval_at_1(found, texts, captions)
    scores["CLIP-T, renders"] = float((encode(clip, images[: 2 * AMONG]) * texts[: 2 * AMONG]).sum(1).mean())
    scores["CLIP-T, mini-sd samples"] = float((found * texts[: 2 * AMONG]).sum(1).mean())

    table = "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value:.3f} |" for name, value in scores.items())])
    (out / "family.md").write_text(table + "\n")
    (out / "family.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
