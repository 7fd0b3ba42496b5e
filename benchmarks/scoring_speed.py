"""Scoring speed in images per second, compared with the encoders alone and with a loop over all pairs.

``python -m benchmarks.scoring_speed OUT_DIR`` writes 3,000 images of 512 x 512 (PNG) and 158 photos of 1,024 x 1,024
(JPEG), encodes them on a GPU with a DINO ViT-S/16 and a CLIP ViT-L/14 of full size with random weights, and prints a
table.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.image_files import load_rgb
from eval.metrics.embedding import embed
from eval.metrics.encoders import ClipEncoder, DinoEncoder

SUBJECTS, IMAGES, PHOTOS = 30, 3000, 158
DISTINCT = 160
"""Images that are rendered; the others are copies with different bytes."""


def write_image(task: tuple[Path, int, int]) -> None:
    """Write a random image, given (path, seed, side length in pixels).

    It has structure at all scales and some noise, so that the file is about as large as that of a generated image.
    """
    path, seed, side = task
    random = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells, weight in ((4, 1.0), (16, 0.4), (64, 0.2)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    pixels = total / 1.6 + random.normal(0, 2, total.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def write_encoders(folder: Path) -> tuple[str, str]:
    """Write a DINO ViT-S/16 and a CLIP ViT-L/14 with random weights; returns their ``local-dir:`` names."""
    import open_clip
    import timm
    from safetensors.torch import save_model

    torch.manual_seed(0)
    dino, clip = folder / "dino", folder / "clip"
    for model_folder in (dino, clip):
        model_folder.mkdir(parents=True, exist_ok=True)
    save_model(timm.create_model("vit_small_patch16_224", num_classes=0), str(dino / "model.safetensors"))
    config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "global_pool": "token"}
    (dino / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 224, 224]}}))
    model = (open_clip.get_model_config("ViT-L-14") or {}) | {"quick_gelu": True}
    save_model(open_clip.create_model("ViT-L-14", force_quick_gelu=True), str(clip / "open_clip_model.safetensors"))
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return f"local-dir:{dino}", f"local-dir:{clip}"


def encoders_alone(encoders: dict, batch_size: int, repeats: int = 20) -> float:
    """Images per second through all encoders, for batches that are already on the GPU."""
    views = torch.randint(0, 256, (batch_size, 224, 224, 3), dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for encoder in encoders.values():
            encoder.encode(views)
        end.record()
        torch.cuda.synchronize()
        if repeat >= 5:
            times.append(start.elapsed_time(end) / 1000)
    return batch_size / statistics.median(times)


def seconds_per_pair(encoders: dict, images: list[Path], photos: list[Path], count: int) -> float:
    """Seconds per pair in a loop that decodes and encodes both images again for every pair."""
    random = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(count):
        pair = [load_rgb(paths[random.integers(len(paths))]) for paths in (images, photos)]
        for encoder in encoders.values():
            a, b = (encoder.encode(encoder.transform(image)[None]) for image in pair)
            float((a * b).sum())
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pictures", type=int, default=IMAGES, help="images to score")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=50, help="pairs to time in the pairwise loop; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images")
    options = parser.parse_args()
    folder: Path = options.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    images = [folder / f"{i:05}.png" for i in range(options.pictures)]
    photos = [folder / f"photograph-{i:03}.jpg" for i in range(PHOTOS)]
    tasks = [(p, i, 512) for i, p in enumerate(images)] + [(p, i, 1024) for i, p in enumerate(photos)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_image, [*tasks[:DISTINCT], *tasks[len(images) :]], chunksize=8))
    for number, path in enumerate(images[DISTINCT:]):  # bytes after the end of a PNG change the file, not the image
        path.write_bytes(images[number % DISTINCT].read_bytes() + str(number).encode())
    size = sum(path.stat().st_size for path in images) / len(images) / 1024
    dino_name, clip_name = write_encoders(folder)
    files = [*images, *photos]
    pairs = len(images) * len(photos) // SUBJECTS
    lines = [f"| {len(images):,} images of 512 x 512, {len(photos)} photos | fp32 | bf16 |", "| --- | ---: | ---: |"]
    rows: dict[str, list[str]] = {}

    def add(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)
        print(name, value, flush=True)

    for precision in ("fp32", "bf16"):
        device = "cuda"
        encoders = {
            "dino": DinoEncoder(dino_name, "straight", device, precision),
            "clip": ClipEncoder(clip_name, None, device, "floor", precision),
        }
        settings = {"batch_size": options.batch_size, "workers": options.workers}
        alone = encoders_alone(encoders, options.batch_size)
        embed(files[:256], encoders, **settings)
        cache_dir = folder / f"cache-{time.time()}-{precision}"
        start = time.perf_counter()
        embed(files, encoders, cache_dir=cache_dir, **settings)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        embed(files, encoders, cache_dir=cache_dir, **settings)
        seconds_from_cache = time.perf_counter() - start
        add("images per second, from file to feature", f"{len(files) / seconds:.0f}")
        add("images per second, encoders alone", f"{alone:.0f}")
        add("speed relative to the encoders alone", f"{len(files) / seconds / alone:.2f}")
        add("seconds in total", f"{seconds:.1f}")
        add("seconds when scored again from the cache", f"{seconds_from_cache:.1f}")
        if options.pairs:
            pairwise = pairs * seconds_per_pair(encoders, images, photos, options.pairs)
            label = f"seconds for {pairs:,} pairs, one at a time (extrapolated from {options.pairs})"
            add(label, f"{pairwise:.0f}")
            add("time of the pairwise loop relative to ours", f"{pairwise / seconds:.0f}")
        add("number of encodings of the pairwise loop relative to ours", f"{2 * pairs / len(files):.1f}")
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    gpu = torch.cuda.get_device_name()
    print("\n".join(lines))
    print(f"\n{gpu}, {options.workers} worker processes, torch {torch.__version__}; PNG files of {size:.0f} KiB.")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
