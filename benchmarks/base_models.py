"""How well base models of the miniature world follow captions that they were not trained on.

``python -m benchmarks.base_models OUT_DIR MODEL ...`` samples 100 captions of unseen toys from each pipeline folder
(25 steps, guidance scale 4). It writes a table of mini-clip's scores (``base_models.md``, ``base_models.json``) and a
sheet of samples of each model (``NAME.png``). ``mini-sd`` is the included model.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.miniature_family import (
    CANDIDATES,
    encode,
    held_out_scenes,
    retrieval_at_1,
    sample_captions,
    save_sheet,
    to_image,
)
from benchmarks.reporting import print_and_save
from data.miniature import MINI_CLIP
from data.toybox.captions import full_caption
from data.toybox.render import render
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.families.checks import check_model_folder
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.families.table import family_of
from eval.metrics.encoders import ClipEncoder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base_models", description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="pipeline folder, or mini-sd for the included model")
    parser.add_argument("--captions", type=int, default=CANDIDATES, help="number of captions; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    out, device = options.out_dir, options.device
    for model in options.models:
        check_model_folder(None if model == "mini-sd" else model)
    out.mkdir(parents=True, exist_ok=True)

    scenes = held_out_scenes(options.captions)
    captions = [full_caption(scene) for scene in scenes]
    clip = ClipEncoder(f"local-dir:{MINI_CLIP}", None, device)
    texts = clip.encode_texts(captions).cpu()

    images = {"renders": [to_image(image) for image in render(scenes, device=device)[0]]}
    parameters = {}
    for model in options.models:
        pipeline = load_pipeline(None if model == "mini-sd" else model).to(device)
        name, denoiser = Path(model).name, getattr(pipeline, family_of(type(pipeline).__name__).DENOISER)
        parameters[name] = f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f}M"
        images[name] = sample_captions(pipeline, captions)
        save_sheet(images[name], captions, out / f"{name}.png")

    scores = {}
    lines = ["| model | parameters | mini-clip recall@1 | CLIP-T |", "| --- | ---: | ---: | ---: |"]
    for name, samples in images.items():
        features = encode(clip, samples)
        recall, clip_t = retrieval_at_1(features, texts, captions), float((features * texts).sum(1).mean())
        scores[name] = {"recall@1": recall, "CLIP-T": clip_t}
        lines.append(f"| {name} | {parameters.get(name, '')} | {recall:.3f} | {clip_t:.3f} |")
    (out / "base_models.json").write_text(json.dumps(scores, indent=1) + "\n")
    print_and_save("\n".join(lines), out / "base_models.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
