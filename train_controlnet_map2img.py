"""Semantic map to image with DeLoRA: Stable Diffusion learns to paint pictures that follow a map.

    accelerate launch train_controlnet_map2img.py                     # the shipped miniature, on maps of its world

    accelerate launch train_controlnet_map2img.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir DATA --output_dir OUT
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from data.errors import InputError as DataError
from data.maps import MapPair, check_pairs, find_hub_pairs, find_pairs, pair_views, upright_size
from data.palettes import read_palette
from data.photographs import crop_boxes
from delora_diffusers.base_model import check_model_folder, is_miniature
from delora_diffusers.config import MAP_TARGETS
from delora_diffusers.errors import InputError
from delora_diffusers.training import arguments

MINIATURE = {"max_train_steps": 1000, "validation_steps": 500, "proportion_empty_prompts": 0.5}
MINIATURE_PAIRS = 512
HIGHEST_CONTROL_RATE = 1e-4
"""The paper's: the encoder must not run ahead of the adapters."""


def parse_arguments(typed: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("pictures and maps")
    group.add_argument("--train_data_dir", type=Path, help="a folder; docs/maps.md says how it may be laid out")
    group.add_argument("--dataset_name", help="instead: a dataset on the hub, or a folder that datasets can load")
    group.add_argument("--dataset_config_name")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--image_column", default="image")
    group.add_argument("--map_column", default="map")
    group.add_argument("--caption_column", default="text", help="'' where there is none")
    group.add_argument("--default_caption", help="of pictures that have none")
    group.add_argument("--palette", help="ade20k, generated or a file; by default generated for index maps")
    group.add_argument("--reduce_labels", action="store_true", help="index 0 is no class, i is class i - 1 (ADE20K)")
    group.add_argument("--center_crop", action="store_true", help="instead of random crops along the long side")
    group.add_argument("--num_crops", type=arguments.positive_int, default=4, help="random crops of each picture")
    group.add_argument("--random_flip", action="store_true")
    group.add_argument("--proportion_empty_prompts", type=float, default=0.0)
    group.add_argument("--max_train_samples", type=arguments.positive_int)
    group.add_argument("--cache_dir", type=Path, help="by default the folder cache in the output folder")
    group.add_argument("--validation_data_dir", type=Path, help="pairs to draw while training; by default training's")
    group = parser.add_argument_group("control signal")
    group.add_argument("--controlnet_model_name_or_path", help="start from this ControlNet's encoder, not afresh")
    group.add_argument("--control_learning_rate", type=float, default=HIGHEST_CONTROL_RATE, help="0 freezes it")
    arguments.add_adapter_arguments(parser)
    arguments.add_training_arguments(parser)
    parser.set_defaults(targets=list(MAP_TARGETS))
    return arguments.parse_with_config(parser, typed, MINIATURE)


def check(args: argparse.Namespace) -> tuple[list[MapPair], list[MapPair], np.ndarray | None]:
    """Refuse bad input before anything is loaded; return the pairs, those to validate with, and the palette."""
    arguments.check_training_arguments(args, arguments.DEFAULT_LEARNING_RATES)
    check_model_folder(args.pretrained_model_name_or_path)
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise InputError(
            f"--proportion_empty_prompts {args.proportion_empty_prompts} is not from 0 to 1; give a share."
        )
    if not 0 <= args.control_learning_rate <= HIGHEST_CONTROL_RATE:
        raise InputError(
            f"--control_learning_rate {args.control_learning_rate} is not from 0 to {HIGHEST_CONTROL_RATE}; the paper "
            "trains the encoder at 1e-4 at most, and 0 freezes it."
        )
    if args.control_learning_rate == 0 and args.controlnet_model_name_or_path is None:
        raise InputError(
            "--control_learning_rate 0 freezes an encoder that is fresh and shows nothing; give one to "
            "start from with --controlnet_model_name_or_path."
        )
    if args.train_data_dir is not None and args.dataset_name is not None:
        raise InputError("--train_data_dir and --dataset_name are both given; choose one.")
    if args.dataset_name is not None:
        columns = (args.image_column, args.map_column, args.caption_column or None)
        pairs = find_hub_pairs(args.dataset_name, args.dataset_config_name, args.dataset_split, columns)
    else:
        if args.train_data_dir is None:
            if not is_miniature(args.pretrained_model_name_or_path):
                raise InputError("no data was given; name a folder with --train_data_dir, or a --dataset_name.")
            args.train_data_dir = args.output_dir.with_name(f"{args.output_dir.name}-pairs")
            from data.toybox.__main__ import write_map_pairs  # imports torch

            write_map_pairs(args.train_data_dir, MINIATURE_PAIRS)
        pairs = find_pairs(args.train_data_dir)
    pairs = pairs[: args.max_train_samples]
    shown = find_pairs(args.validation_data_dir) if args.validation_data_dir else pairs
    shown = shown[: args.num_validation_images]
    palette = read_palette(args.palette) if args.palette else None
    if palette is None and pairs[0].load_map().ndim == 2:
        palette = read_palette("generated")
    for some in (pairs, shown) if args.validation_data_dir else (pairs,):
        # Colours are checked against a palette that was named only.
        check_pairs(some, palette, args.reduce_labels, need_captions=args.default_caption is None)
    return pairs, shown, palette


def main(typed: list[str] | None = None) -> None:
    args = parse_arguments(typed)
    pairs, shown, palette = check(args)

    # Imported after the checks, which then answer at once.
    import torch
    from PIL import Image

    from delora_diffusers import attach, attach_control
    from delora_diffusers.conditions import encode_prompts, is_xl
    from delora_diffusers.control import as_signal, new_encoder, pretrained_encoder
    from delora_diffusers.training import order
    from delora_diffusers.training.disk_cache import build_cache, file_stamp, fingerprint
    from delora_diffusers.training.encoding import crop_offsets, index
    from delora_diffusers.training.loop import train
    from delora_diffusers.training.objective import denoising_losses, noised
    from delora_diffusers.training.setup import begin_run, load_frozen, save_run, start_accelerator
    from delora_diffusers.training.validation import map_validator

    accelerator = start_accelerator(args)
    device = accelerator.device
    pipeline, noise_scheduler = load_frozen(accelerator, args)
    unet, vae = pipeline.unet, pipeline.vae
    if is_xl(pipeline):
        raise InputError(f"maps need Stable Diffusion 1.x or 2.x, not {args.pretrained_model_name_or_path}; name one.")

    # The adapter and the control signal; refused settings end here, before anything is written.
    random = torch.Generator().manual_seed(args.seed)
    adapters = {"unet": attach(unet, arguments.adapter_config(args), random)}
    if args.controlnet_model_name_or_path:
        encoder = pretrained_encoder(args.controlnet_model_name_or_path, unet, pipeline.vae_scale_factor)
    else:
        encoder = new_encoder(unet, pipeline.vae_scale_factor, random)
    control = attach_control(unet, encoder.to(device), palette)
    frozen = args.control_learning_rate == 0
    encoder.requires_grad_(not frozen)
    begin_run(accelerator, args, "map2img-delora")

    # What never changes is computed once and kept on disk: posteriors of the latents, maps, embeddings of the captions.
    def offsets(number: int) -> list[float] | None:
        return crop_offsets(args.seed, number, not args.center_crop, args.num_crops)

    def views(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        pair = pairs[number]
        found = pair_views(
            pair.load_picture(), pair.load_map(args.reduce_labels), args.resolution, offsets(number), args.random_flip
        )
        return [found[i % len(found)] for i in range(each)]

    each = (1 + args.random_flip) * max(
        len(crop_boxes(upright_size(pair.picture, pair.name), args.resolution, offsets(number)))
        for number, pair in enumerate(pairs)
        if pair.picture is not None
    )
    captions = [args.default_caption if pair.caption is None else pair.caption for pair in pairs]
    names = ("pretrained_model_name_or_path", "revision", "variant", "resolution", "seed", "center_crop", "num_crops")
    made_from = {name: str(getattr(args, name)) for name in (*names, "random_flip", "reduce_labels", "dataset_name")}
    made_from["files"] = [file_stamp(f) for pair in pairs for f in (pair.picture, pair.map) if isinstance(f, Path)]
    made_from |= {"names": [pair.name for pair in pairs], "captions": captions, "dtype": str(unet.dtype)}
    vae.to(device)
    cache = build_cache(
        accelerator,
        (args.cache_dir or args.output_dir / "cache") / fingerprint(made_from),
        len(pairs),
        views,
        captions,
        lambda pictures: vae.encode(pictures.to(device, vae.dtype)).latent_dist,
        lambda texts: encode_prompts(pipeline, texts, device)["encoder_hidden_states"],
    )
    examples = []
    for pair in shown:
        picture, semantic = pair_views(
            pair.load_picture(), pair.load_map(args.reduce_labels), args.resolution, None, False
        )[0]
        examples.append((pair.caption or args.default_caption or "", semantic, Image.fromarray(picture)))
    with torch.no_grad():
        prompts = list(dict.fromkeys(["", *(caption for caption, _, _ in examples)]))
        embedded = dict(zip(prompts, encode_prompts(pipeline, prompts, device)["encoder_hidden_states"]))
    pipeline.text_encoder = None
    vae.to("cpu")

    def batch_of(microbatch: int) -> dict[str, torch.Tensor]:
        generator = order.generator(args.seed, microbatch, device)
        seed = order.mixed_seed(args.seed, microbatch, 1)
        batch = cache.read(order.sample_indices(args.seed, microbatch, args.train_batch_size, len(cache)), seed)
        mean, std = batch.mean.to(device, non_blocking=True), batch.std.to(device, non_blocking=True)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        unprompted = np.random.default_rng((seed, 2)).uniform(size=len(mean)) < args.proportion_empty_prompts
        texts = batch.embeddings.to(device, non_blocking=True)
        if unprompted.any():
            texts[index(unprompted.nonzero()[0].tolist(), device)] = embedded[""].to(texts.dtype)
        latents = (mean + std * noise) * vae.config.scaling_factor
        signal = as_signal(list(batch.maps.numpy()), palette).to(device, non_blocking=True)
        drawn = noised(noise_scheduler, latents, generator, None, args.noise_offset, args.snr_gamma)
        return drawn | {"encoder_hidden_states": texts, "maps": signal}

    def losses_of(maps: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        control.see(maps)
        return denoising_losses(unet, **batch)

    def conditions_of(prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.stack([embedded[prompt] for prompt in prompts])}

    validate = map_validator(accelerator, pipeline, conditions_of, examples, args)
    train(accelerator, adapters, batch_of, losses_of, args, validate, None if frozen else encoder)
    trained_on = f"{len(pairs)} pictures and their maps"
    save_run(accelerator, args, adapters, trained_on, captions[0], control=control, pipeline=type(pipeline).__name__)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (InputError, DataError) as error:
        sys.exit(f"error: {error}")
