"""Score generated pictures of one subject against its photographs: DINO, CLIP-I and CLIP-T."""

import argparse
import json
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.photographs import find_photographs
from eval.protocols import PRECISIONS, PROTOCOLS
from eval.scores import IDENTIFIERS
from eval.writing import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="pictures and metadata.jsonl of generate")
    parser.add_argument("--reference_dir", type=Path, required=True, help="photographs of the subject")
    add_scorer_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")


def add_scorer_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how ``score`` is to score."""
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="delora")
    parser.add_argument("--dino", help="another DINO: timm name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--clip", help="another CLIP: open_clip name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--identifier", nargs="+", default=list(IDENTIFIERS), help="words taken out of the prompts")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoders")
    parser.add_argument("--device", help="by default a GPU where there is one")


def read_generated(folder: Path) -> list[tuple[Path, str]]:
    """(picture, prompt) of every line of a folder's ``metadata.jsonl``.

    Raises:
        InputError: no folder, no metadata, a line without prompt, a picture that is missing.
    """
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise InputError(f"{file} is missing; --generated_dir wants a finished output folder of generate.")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            path, prompt = folder / record["file_name"], record["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} line {number} has no file_name and prompt; generate the pictures again."
            ) from error
        if not path.is_file():
            raise InputError(f"{path} is missing, though {file.name} names it; run generate again to draw it.")
        found.append((path, prompt))
    if not found:
        raise InputError(f"{file} is empty; generate pictures first.")
    return found


def score(options: argparse.Namespace) -> dict[str, Any]:
    """The scores, what they were made with, and each picture's own.

    Raises:
        InputError: input that cannot be read, a model that cannot be loaded.
    """
    generated = read_generated(options.generated_dir)
    reference = find_photographs(options.reference_dir)

    import torch

    from eval.embedding import embed
    from eval.encoders import ClipEncoder, DinoEncoder
    from eval.scores import pair_scores, real_score, text_scores, without_identifier

    protocol = PROTOCOLS[options.protocol]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pictures, photographs = [path for path, _ in generated], [photograph.path for photograph in reference]
    prompts = [without_identifier(prompt, options.identifier) for _, prompt in generated]

    dino = DinoEncoder(options.dino or protocol.dino, protocol.dino_transform, device, options.precision)
    clip_name = options.clip or protocol.clip
    clip = ClipEncoder(clip_name, protocol.clip_pretrained, device, protocol.clip_crop, options.precision)
    features = embed([*pictures, *photographs], {"dino": dino, "clip": clip}, batch_size=options.batch_size)
    dino_generated, dino_reference = features["dino"].split([len(pictures), len(photographs)])
    clip_generated, clip_reference = features["clip"].split([len(pictures), len(photographs)])
    unique = list(dict.fromkeys(prompts))
    texts = clip.encode_texts(unique).cpu()[[unique.index(prompt) for prompt in prompts]]

    per_picture = {
        "dino": pair_scores(dino_generated, dino_reference),
        "clip_i": pair_scores(clip_generated, clip_reference),
        "clip_t": text_scores(clip_generated, texts),
    }
    return {
        "protocol": protocol.name,
        "source": protocol.source,
        "scores": {name: float(values.mean()) for name, values in per_picture.items()},
        "real": {"dino": real_score(dino_reference), "clip_i": real_score(clip_reference)},
        "counts": {"generated": len(pictures), "reference": len(photographs), "prompts": len(unique)},
        "models": {
            "dino": options.dino or protocol.dino,
            "dino_transform": str(dino.transform),
            "clip": clip_name,
            "clip_pretrained": None if options.clip else protocol.clip_pretrained,
            "clip_transform": str(clip.transform),
            "precision": options.precision,
        },
        "identifiers_removed": list(options.identifier),
        "pictures": [
            {"file_name": path.name, "prompt": prompt, **{k: round(float(v[i]), 6) for k, v in per_picture.items()}}
            for i, (path, prompt) in enumerate(generated)
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The scores as a few lines to read in a terminal."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.3f}"

    lines = [f"{'':12}{'DINO':>8}{'CLIP-I':>8}{'CLIP-T':>8}"]
    for label, row in (("generated", result["scores"]), ("real images", result["real"])):
        cells = (cell(row.get(name)) for name in ("dino", "clip_i", "clip_t"))
        lines.append(f"{label:12}" + "".join(f"{c:>8}" for c in cells))
    counts = result["counts"]
    models = f"protocol {result['protocol']}: {result['models']['dino']}, {result['models']['clip']}"
    lines.append(f"{counts['generated']} pictures against {counts['reference']} photographs; {models}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    if options.output.exists():
        raise InputError(f"--output {options.output} exists already; remove it or name another file.")
    result = score(options)
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"wrote {options.output}")
