"""Score the generated images of one subject against its photos: DINO, CLIP-I and CLIP-T."""

import argparse
import json
from pathlib import Path
from typing import Any

from data.photographs import NO_MASKS, Photo, find_photographs
from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.outputs import check_new
from delora_diffusers.wording import counted
from eval.commands.arguments import add_encoder_arguments, add_scorer_arguments
from eval.metrics.generated import Generated, check_base_images, read_generated
from eval.metrics.protocols import PEFT_IMAGEGEN, PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="an output folder of generate")
    parser.add_argument("--reference_dir", type=Path, required=True, help="photos of the subject")
    add_scorer_arguments(parser, PEFT_IMAGEGEN)
    parser.add_argument("--drift_dir", type=Path, help=f"{PEFT_IMAGEGEN}: images of prompts without the subject")
    parser.add_argument("--base_dir", type=Path, help=f"{PEFT_IMAGEGEN}: the base model's images for those prompts")
    add_encoder_arguments(parser, batch_size=32)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")


def table(result: dict[str, Any]) -> str:
    """The scores as a few lines for a terminal."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.3f}"

    lines = [f"{'':12}{'DINO':>8}{'CLIP-I':>8}{'CLIP-T':>8}"]
    for label, row in (("generated", result["scores"]), ("real images", result["real"])):
        cells = (cell(row.get(name)) for name in ("dino", "clip_i", "clip_t"))
        lines.append(f"{label:12}" + "".join(f"{c:>8}" for c in cells))
    counts = result["counts"]
    models = f"protocol {result['protocol']}: {result['models']['dino']}, {result['models']['clip']}"
    lines.append(f"{counted(counts['generated'], 'image')} against {counted(counts['reference'], 'photo')}; {models}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    check_new(options.output, "--output")
    peft = options.protocol == PEFT_IMAGEGEN
    if not peft and (options.drift_dir or options.base_dir):
        raise InputError(f"--drift_dir and --base_dir belong to --protocol {PEFT_IMAGEGEN}; leave them out.")
    if bool(options.drift_dir) != bool(options.base_dir):
        raise InputError("--drift_dir and --base_dir are needed together; give both, or neither.")
    if options.base_dir:
        check_base_images(options.base_dir, "--base_dir")
    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}; give at least 1.")
    generated, photos = read_generated(options.generated_dir), find_photographs(options.reference_dir, NO_MASKS)
    if peft:
        score_as_peft(options, generated, photos)
        return
    references = [photo.path for photo in photos]

    from eval.metrics.encoders import device_of, load_encoders  # imports torch
    from eval.metrics.subjects import score_subject

    protocol = PROTOCOLS[options.protocol]
    device = device_of(options.device)
    encoders = load_encoders(protocol, options.dino, options.clip, device, options.precision)
    result = score_subject(generated, references, protocol, encoders, options.identifier, options.batch_size)
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"wrote {options.output}")


def score_as_peft(options: argparse.Namespace, generated: Generated, photos: list[Photo]) -> None:
    """Score as PEFT's image benchmark does."""
    from eval.metrics import peft_imagegen  # imports torch
    from eval.metrics.encoders import device_of

    photo_of_each = peft_imagegen.photo_of_each(generated, photos)
    drift = []
    if options.drift_dir is not None:
        drift = peft_imagegen.drift_pairs(read_generated(options.drift_dir), read_generated(options.base_dir))
    name = options.dino or peft_imagegen.DINO
    encoder = peft_imagegen.Dinov2Encoder(name, device_of(options.device), options.precision)
    result = peft_imagegen.score(generated, photo_of_each, drift, encoder, name, options.batch_size)
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    scores, counts = result["scores"], result["counts"]
    print(f"DINOv2 similarity {scores['dino']:.4f} ({counts['generated']} images, {counts['reference']} photos)")
    if scores["drift"] is not None:
        print(f"drift             {scores['drift']:.4f} ({counts['drift']} pairs)")
    print(f"wrote {options.output}")
