"""Write a page about one subject: its photos, images before and after training, the scores, the training curves."""

import argparse
from pathlib import Path

from data.photographs import NO_MASKS, find_photographs
from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.outputs import check_new
from eval.commands.arguments import add_encoder_arguments, add_scorer_arguments
from eval.commands.dreambooth import table
from eval.metrics.generated import by_prompt, check_base_images, read_generated
from eval.metrics.protocols import PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="images generated with the adapter")
    parser.add_argument("--base_dir", type=Path, required=True, help="images of the same prompts without it")
    parser.add_argument("--reference_dir", type=Path, required=True, help="photos of the subject")
    parser.add_argument("--training_dir", type=Path, help="output folder of the training run, for its curves")
    add_scorer_arguments(parser)
    add_encoder_arguments(parser, batch_size=32)
    parser.add_argument(
        "--output", type=Path, required=True, help="HTML file to write; a PNG version is written beside it"
    )


def run(options: argparse.Namespace) -> None:
    png_file = options.output.with_suffix(".png")
    for file in (options.output, png_file):
        check_new(file, "--output")
    check_base_images(options.base_dir, "--base_dir")
    before, after = read_generated(options.base_dir), read_generated(options.generated_dir)
    missing = [prompt for prompt in by_prompt(after) if prompt not in by_prompt(before)]
    if missing:
        raise InputError(f"--base_dir {options.base_dir} has no image of {missing[0]!r}; generate the same prompts.")
    photos = [photo.path for photo in find_photographs(options.reference_dir, NO_MASKS)]

    from eval.metrics.encoders import device_of, load_encoders  # imports torch
    from eval.metrics.subjects import score_subject
    from eval.page import Page, read_curves

    curves = read_curves(options.training_dir)
    protocol = PROTOCOLS[options.protocol]
    device = device_of(options.device)
    encoders = load_encoders(protocol, options.dino, options.clip, device, options.precision)
    scores = [
        score_subject(images, photos, protocol, encoders, options.identifier, options.batch_size)
        for images in (before, after)
    ]
    page = Page(photos, by_prompt(before), by_prompt(after), scores[0], scores[1], curves)
    with atomic_write(png_file) as png, atomic_write(options.output) as html:  # both or neither
        png.write_bytes(page.png())
        html.write_bytes(page.html().encode())
    print(table(scores[1]))
    print(f"wrote {options.output} and {png_file}; open the first in a browser")
