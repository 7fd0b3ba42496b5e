"""How fast pictures are scored: images a second, against the encoders alone and against the pairwise definition.

``python -m benchmarks.scoring_speed OUT_DIR`` writes 3,000 pictures of 512 x 512 (PNG) and 158 photographs of 1,024 x
1,024 (JPEG), scores them with a DINO ViT-S/16 and a CLIP ViT-L/14 of true size (random weights), and prints a table.
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

from delora_diffusers.image_files import load_rgb
from eval.metrics.embedding import embed
from eval.metrics.encoders import ClipEncoder, DinoEncoder

SUBJECTS, PICTURES, PHOTOGRAPHS, DIFFERENT = 30, 3000, 158, 160


def write_picture(task: tuple[Path, int, int]) -> None:
    """Structure at all scales and some noise, so that the file is about as large as a drawn picture's."""
    path, seed, side = task
    random = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells, weight in ((4, 1.0), (16, 0.4), (64, 0.2)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    picture = total / 1.6 + random.normal(0, 2, total.shape)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def write_encoders(folder: Path) -> tuple[str, str]:
    """DINO ViT-S/16 and CLIP ViT-L/14 with random weights, as ``local-dir:`` names."""
    import open_clip
    import timm
    from safetensors.torch import save_model

    torch.manual_seed(0)
    dino, clip = folder / "dino", folder / "clip"
    for place in (dino, clip):
        place.mkdir(parents=True, exist_ok=True)
    save_model(timm.create_model("vit_small_patch16_224", num_classes=0), str(dino / "model.safetensors"))
    config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "global_pool": "token"}
    (dino / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"input_size": [3, 224, 224]}}))
    model = (open_clip.get_model_config("ViT-L-14") or {}) | {"quick_gelu": True}
    save_model(open_clip.create_model("ViT-L-14", force_quick_gelu=True), str(clip / "open_clip_model.safetensors"))
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return f"local-dir:{dino}", f"local-dir:{clip}"


def encoders_alone(encoders: dict, batch_size: int, repeats: int = 20) -> float:
    """Images a second through all encoders, of batches that lie on the GPU."""
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


def pairwise_seconds(encoders: dict, pictures: list[Path], photographs: list[Path], count: int) -> float:
    """Seconds a pair where every pair decodes and encodes its two pictures anew."""
    random = np.random.default_rng(0)
    begun = time.perf_counter()
    for _ in range(count):
        pair = [load_rgb(some[random.integers(len(some))]) for some in (pictures, photographs)]
        for encoder in encoders.values():
            a, b = (encoder.encode(encoder.transform(picture)[None]) for picture in pair)
            float((a * b).sum())
    return (time.perf_counter() - begun) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=50, help="timed one at a time, for the pairwise definition")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    folder: Path = options.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [folder / f"{i:05}.png" for i in range(options.pictures)]
    photographs = [folder / f"photograph-{i:03}.jpg" for i in range(PHOTOGRAPHS)]
    tasks = [(p, i, 512) for i, p in enumerate(pictures)] + [(p, i, 1024) for i, p in enumerate(photographs)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_picture, [*tasks[:DIFFERENT], *tasks[len(pictures) :]], chunksize=8))
    for number, path in enumerate(pictures[DIFFERENT:]):  # a few bytes after the end make another file of a picture
        path.write_bytes(pictures[number % DIFFERENT].read_bytes() + str(number).encode())
    size = sum(path.stat().st_size for path in pictures) / len(pictures) / 1024
    dino_name, clip_name = write_encoders(folder)
    files = [*pictures, *photographs]
    pairs = len(pictures) * len(photographs) // SUBJECTS
    lines = [
        f"| {len(pictures):,} pictures of 512 x 512, {len(photographs)} photographs | fp32 | bf16 |",
        "| --- | ---: | ---: |",
    ]
    rows: dict[str, list[str]] = {}

    def say(name: str, value: str) -> None:
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
        cached = folder / f"cache-{time.time()}-{precision}"
        begun = time.perf_counter()
        embed(files, encoders, cache_dir=cached, **settings)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        embed(files, encoders, cache_dir=cached, **settings)
        again = time.perf_counter() - begun
        say("images a second, file to feature", f"{len(files) / seconds:.0f}")
        say("images a second, encoders alone", f"{alone:.0f}")
        say("share of the encoders alone", f"{len(files) / seconds / alone:.2f}")
        say("seconds, all", f"{seconds:.1f}")
        say("seconds, all, again from the cache", f"{again:.1f}")
        if options.pairs:
            a_pair = pairwise_seconds(encoders, pictures, photographs, options.pairs)
            say(f"seconds, {pairs:,} pairs one at a time ({options.pairs} timed)", f"{a_pair * pairs:.0f}")
            say("pairwise over ours", f"{a_pair * pairs / seconds:.0f}")
        say("encodings, pairwise over ours", f"{2 * pairs / len(files):.1f}")
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    gpu = torch.cuda.get_device_name()
    print("\n".join(lines))
    print(f"\n{gpu}, {options.workers} worker processes, torch {torch.__version__}; PNG files of {size:.0f} KiB.")


if __name__ == "__main__":
    main()
