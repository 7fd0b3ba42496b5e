"""Score images generated from semantic maps: mIoU, accuracies, and the Frechet distance to real images."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.miniature import MINI_DINO, MINI_SEGMENTER
from data.palettes import generated_palette, read_palette
from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from delora_diffusers.maps import IGNORED
from delora_diffusers.outputs import check_new
from eval.metrics.generated import read_generated_from_maps

if TYPE_CHECKING:
    from eval.metrics.maps import GeneratedFromMaps, Truth
    from eval.metrics.segmentation import Segmenter

ADE20K_SEGMENTER, ADE20K_DINO = "openmmlab/upernet-convnext-small", "vit_small_patch16_224.dino"
FEATURES = ("inception", "dino", "none")
IN_SHEET = 6
"""Number of best and of worst images in the sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="an output folder of generate --map_dir")
    parser.add_argument("--map_dir", type=Path, required=True, help="folder with the maps and the real images")
    parser.add_argument(
        "--protocol", choices=("ade20k", "toybox"), default="ade20k", help="sets the defaults of the flags below"
    )
    parser.add_argument("--segmenter", help="a transformers segmentation model: folder or hub id")
    parser.add_argument(
        "--label_map", type=Path, help="JSON object: class of the maps to class of the segmenter, for those that differ"
    )
    parser.add_argument("--ignore_index", type=int, default=IGNORED, help="class of the maps to ignore")
    parser.add_argument(
        "--reduce_labels", action="store_true", help="index 0 means no class, index i class i - 1 (ADE20K)"
    )
    parser.add_argument("--palette", help="for maps in colour: ade20k, generated or a file")
    parser.add_argument(
        "--frechet_features", choices=FEATURES, help="encoder of the Frechet distance; with inception it is the FID"
    )
    parser.add_argument("--inception_weights", type=Path, help="file with torch-fidelity's Inception weights")
    parser.add_argument("--dino", help="encoder for --frechet_features dino: timm name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="JSON file to write; a PNG sheet of the best and worst images is written beside it",
    )


def write_sheet(
    file: Path,
    accuracies: Sequence[tuple[int, float]],
    generated: "GeneratedFromMaps",
    segmenter: "Segmenter",
    truth: "Truth",
) -> None:
    """The best and the worst images by pixel accuracy: map, generated image, its segmentation, the real image."""
    from matplotlib.figure import Figure

    colours = np.zeros((256, 3), np.uint8)
    colours[:IGNORED] = generated_palette(IGNORED)
    ranked = sorted(accuracies, key=lambda row: row[1])
    count = min(IN_SHEET, (len(ranked) + 1) // 2)
    rows = [("best", row) for row in ranked[::-1][:count]] + [("worst", row) for row in ranked[:count]]
    figure = Figure(figsize=(8.8, 2.35 * len(rows)), dpi=80, layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes, (kind, (number, accuracy)) in zip(grid, rows):
        path, pair = generated[number]
        image = load_rgb(path)
        labels, real = truth.of(pair, image.width)
        titles = ("map", f"{kind}: {accuracy:.0%} of pixels correct", "segmentation", "real")
        for axis, title, shown in zip(axes, titles, (colours[labels], image, colours[segmenter([image])[0]], real)):
            axis.axis("off")
            axis.set_title(title, fontsize=9)
            if shown is not None:
                axis.imshow(shown)
    figure.savefig(file, format="png")


def table(result: dict[str, Any]) -> str:
    """The scores as a few lines for a terminal."""
    lines = [f"{'':14}{'mIoU':>8}{'mAcc':>8}{'aAcc':>8}{'Frechet':>10}"]
    for label, row in (("generated", result["scores"]), ("real images", result["real"])):
        if row is not None:
            cells = "".join(f"{row[name]:8.3f}" for name in ("miou", "mean_accuracy", "pixel_accuracy"))
            distance = row.get("frechet")
            lines.append(f"{label:14}{cells}" + ("" if distance is None else f"{distance:10.3f}"))
    lines.append(f"{result['counts']['pictures']} images; {result['segmenter']}; {result['frechet']['name']}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    sheet = options.output.with_suffix(".png")
    if sheet == options.output:
        raise InputError(f"--output {options.output} is the name of the sheet; give a .json file.")
    for file in (options.output, sheet):
        check_new(file, "--output")
    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}; give at least 1.")
    generated = read_generated_from_maps(options.generated_dir, options.map_dir)
    palette = read_palette(options.palette) if options.palette else None

    from delora_diffusers.launching import launched_accelerator  # imports torch
    from eval.metrics.maps import Truth, count, load_map_models, read_label_map, summarize

    truth = Truth(options.reduce_labels, options.ignore_index, palette, read_label_map(options.label_map))
    toybox = options.protocol == "toybox"
    accelerator = launched_accelerator()
    models = load_map_models(
        options.segmenter or (str(MINI_SEGMENTER) if toybox else ADE20K_SEGMENTER),
        options.frechet_features or ("dino" if toybox else "inception"),
        options.dino or (f"local-dir:{MINI_DINO}" if toybox else ADE20K_DINO),
        options.inception_weights,
        accelerator.device,
    )
    counts = count(generated, truth, models, options.batch_size, accelerator)
    if not accelerator.is_main_process:
        return
    result = {"protocol": options.protocol, **summarize(counts, generated, models, truth)}
    with atomic_write(sheet) as temporary, atomic_write(options.output) as scores:  # both or neither
        write_sheet(temporary, counts.accuracies, generated, models.segmenter, truth)
        scores.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(f"wrote {options.output} and {sheet}")
