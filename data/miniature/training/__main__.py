"""``python -m data.miniature.training STAGE WORK_DIR``: train the family, one stage at a time.

Stages, in order: ``pool`` renders the training images; ``autoencoder``, ``clip``, ``dino`` and ``segmenter`` need the
pool and may run in parallel; ``unet`` needs ``autoencoder`` and ``clip``, and writes mini-sd, or with ``--width``
mini-sd-x0.5 or mini-sd-x2; ``transformer`` needs the same and writes mini-sd3. The models are written to
WORK_DIR/family.
"""

# The constructors of diffusers and transformers accept more types than their annotations allow.
# pyright: reportArgumentType=false, reportCallIssue=false

import argparse
import time
from pathlib import Path

import torch

from data.miniature import MINI_CLIP, MINI_SD
from data.miniature.training import autoencoder, clip, dino, encoding, segmenter, transformer, unet
from data.miniature.training.pool import load_pool, render_pool
from data.miniature.training.tokenizer import write_tokenizer
from delora_diffusers.atomic import atomic_folder

STAGES = ("pool", "autoencoder", "clip", "dino", "segmenter", "unet", "transformer")


def wait_for(path: Path) -> Path:
    while not path.exists():
        time.sleep(0.5)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.miniature.training", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--subjects", type=int, default=21_000, help="pool: how many different toys")
    parser.add_argument("--photographs", type=int, default=4, help="pool: images of each toy")
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, help="time limit for training; --steps may end it earlier")
    parser.add_argument("--batch", type=int, help="batch size (default: depends on the stage)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="torch.compile the autoencoder and the denoisers")
    parser.add_argument(
        "--width", type=float, choices=list(unet.RECIPES), default=1.0, help="unet: factor of its channels; default: 1"
    )
    parser.add_argument(
        "--included_parts",
        action="store_true",
        help="unet, transformer: use the included models' autoencoder and text encoder, not those of earlier stages",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.width != 1 and options.stage != "unet":
        parser.error(f"--width is for the stage unet, not {options.stage}; leave it out.")
    if options.included_parts and options.stage not in ("unet", "transformer"):
        parser.error(f"--included_parts is for the stages unet and transformer, not {options.stage}; leave it out.")
    name = "mini-sd3" if options.stage == "transformer" else "mini-sd"
    if options.width != 1:
        name += f"-x{options.width:g}"
    pipeline = options.work_dir / "family" / name
    if options.stage in ("unet", "transformer") and pipeline.exists():
        parser.error(f"{pipeline} already exists; remove it or choose another WORK_DIR.")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    work, start = options.work_dir, time.monotonic()
    if options.stage == "pool":
        render_pool(work, options.subjects, options.photographs, options.seed, options.device)
        print(f"pool: {options.subjects} x {options.photographs} images, {time.monotonic() - start:.0f} s")
        return
    settings = {"seconds": options.seconds, "steps": options.steps, "seed": options.seed}
    if options.batch:
        settings["batch"] = options.batch
    family, parts = work / "family", work / "parts"
    # Compilation is slow, so it runs before waiting for the outputs of earlier stages.
    prepared = ()
    if options.stage == "autoencoder":
        batch = options.batch or autoencoder.BATCH
        prepared = autoencoder.prepare_autoencoder(options.device, options.seed, options.compiled, batch)
    elif options.stage == "unet":
        shapes = (options.device, autoencoder.LATENT_CHANNELS, 128, 32, options.seed, options.compiled)
        prepared = unet.prepare_unet(*shapes, options.width, options.batch)
        settings["width"] = options.width
    elif options.stage == "transformer":
        shapes = (options.device, autoencoder.LATENT_CHANNELS, 128, 32, options.seed, options.compiled)
        prepared = transformer.prepare_transformer(*shapes, options.batch or transformer.BATCH)
    wait_for(work / "pool.safetensors")
    pool = load_pool(work, options.device)
    parts.mkdir(exist_ok=True)
    done = 0
    if options.stage == "autoencoder":
        model, done = autoencoder.train_autoencoder(pool, *prepared, **settings)
        model.save_pretrained(parts / "vae.part")
        (parts / "vae.part").rename(parts / "vae")
    elif options.stage == "clip":
        tokenizer = write_tokenizer(parts / "tokenizer")
        model, done = clip.train_clip(pool, tokenizer, **settings)
        clip.write_clip(model, parts / "tokenizer", family / "mini-clip")
        clip.text_encoder_of(model, tokenizer).save_pretrained(parts / "text_encoder.part")
        (parts / "text_encoder.part").rename(parts / "text_encoder")
    elif options.stage == "dino":
        model, done = dino.train_dino(pool, **settings)
        dino.write_dino(model, family / "mini-dino")
    elif options.stage == "segmenter":
        model, done = segmenter.train_segmenter(pool, **settings)
        segmenter.write_segmenter(model, family / "mini-segmenter")
    else:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        mini_clip = family / "mini-clip"
        if options.included_parts:
            parts, mini_clip = MINI_SD, MINI_CLIP
        vae = AutoencoderKL.from_pretrained(wait_for(parts / "vae")).to(options.device)
        text_encoder = CLIPTextModel.from_pretrained(wait_for(parts / "text_encoder")).float().eval()
        tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
        if options.stage == "unet":
            model, done = unet.train_unet(pool, *prepared, vae, text_encoder, tokenizer, **settings)
            write_pipeline = unet.write_pipeline
        else:
            text_encoder = encoding.projected(text_encoder, mini_clip)
            model, done = transformer.train_transformer(pool, *prepared, vae, text_encoder, tokenizer, **settings)
            write_pipeline = transformer.write_pipeline
        with atomic_folder(pipeline) as folder:
            write_pipeline(folder, model, vae, text_encoder, tokenizer)
    print(f"{options.stage}: {done} steps, {time.monotonic() - start:.0f} s including start-up", flush=True)


if __name__ == "__main__":
    main()
