"""Score the generated images of one subject against its photos: DINO, CLIP-I and CLIP-T."""

import argparse
import json
from pathlib import Path
from typing import Any

from data.photographs import find_photographs
from delora_diffusers.atomic import write_text
from delora_diffusers.outputs import check_new
from eval.commands.arguments import add_encoder_arguments, add_scorer_arguments
from eval.metrics.generated import read_generated
from eval.metrics.protocols import PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="an output folder of generate")
    parser.add_argument("--reference_dir", type=Path, required=True, help="photos of the subject")
    add_scorer_arguments(parser)
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
    lines.append(f"{counts['generated']} images against {counts['reference']} photos; {models}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    check_new(options.output, "--output")
    generated = read_generated(options.generated_dir)
    references = [photo.path for photo in find_photographs(options.reference_dir)]

    from eval.metrics.encoders import default_device, load_encoders  # imports torch
    from eval.metrics.subjects import score_subject

    protocol = PROTOCOLS[options.protocol]
    device = options.device or default_device()
    encoders = load_encoders(protocol, options.dino, options.clip, device, options.precision)
    result = score_subject(generated, references, protocol, encoders, options.identifier, options.batch_size)
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"wrote {options.output}")
