"""Semantic maps to images with DeLoRA: train Stable Diffusion to generate images that follow a map.

    accelerate launch train_controlnet_map2img.py                     # the included miniature, on rendered maps

    accelerate launch train_controlnet_map2img.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir DATA --output_dir OUT
"""

import argparse
import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data.maps import MapPair, check_pairs, find_hub_pairs, find_pairs, pair_views
from data.palettes import read_palette
from delora_diffusers.crops import Size, crop_boxes
from delora_diffusers.dispatch import Parser, exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import check_model_folder
from delora_diffusers.image_files import upright_size
from delora_diffusers.methods.config import MAP_TARGETS
from delora_diffusers.names import SD_PIPELINE, is_miniature
from delora_diffusers.outputs import held_folders
from delora_diffusers.training import arguments
from delora_diffusers.training.argument_checks import check_training_arguments
from delora_diffusers.training.config_file import parse_with_config
from delora_diffusers.training.defaults import with_defaults, with_family_defaults

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from delora_diffusers.families.loading import OpenModel
    from delora_diffusers.training.disk_cache import DiskCache
    from delora_diffusers.training.init_adapter import InitialAdapter

MINIATURE = {"max_train_steps": 1000, "validation_steps": 500, "proportion_empty_prompts": 0.5}
MINIATURE_PAIRS = 512
MAX_CONTROL_RATE = 1e-4
"""Of the control encoder; its default too (ETHER, appendix C.2)."""
FROZEN_NEW_ENCODER = (
    "--control_learning_rate 0 freezes a new encoder, which outputs only zeros; give a pretrained encoder with "
    "--controlnet_model_name_or_path."
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("images and maps")
    group.add_argument("--train_data_dir", type=Path, help="folder of images and maps; docs/maps.md shows the layout")
    group.add_argument(
        "--dataset_name", help="instead: a dataset on the hub, or a folder that the datasets library can load"
    )
    group.add_argument("--dataset_config_name", help="configuration of the dataset")
    group.add_argument("--dataset_split", default="train", help="default: train")
    group.add_argument("--image_column", default="image", help="default: image")
    group.add_argument("--map_column", default="map", help="default: map")
    group.add_argument("--caption_column", default="text", help="default: text; '' if the dataset has no captions")
    group.add_argument("--default_caption", help="caption for images that have none")
    group.add_argument("--palette", help="ade20k, generated or a file; default for index maps: generated")
    group.add_argument(
        "--reduce_labels", action="store_true", help="index 0 means no class, index i means class i - 1 (ADE20K)"
    )
    group.add_argument(
        "--center_crop", action="store_true", help="crop the centre instead of random positions along the long side"
    )
    group.add_argument("--num_crops", type=arguments.positive_int, default=4, help="random crops per image; default: 4")
    group.add_argument("--random_flip", action="store_true", help="also train on mirrored pairs")
    group.add_argument(
        "--proportion_empty_prompts", type=float, default=0.0, help="probability of dropping a caption, 0 to 1"
    )
    group.add_argument("--max_train_samples", type=arguments.positive_int, help="train on the first N pairs only")
    group.add_argument(
        "--cache_dir", type=Path, help="where to keep encoded pairs; default: cache in the output folder"
    )
    group.add_argument(
        "--validation_data_dir", type=Path, help="pairs for validation images; default: the training pairs"
    )
    group = parser.add_argument_group("control signal")
    group.add_argument(
        "--controlnet_model_name_or_path", help="start from this ControlNet's encoder instead of a new one"
    )
    group.add_argument(
        "--control_learning_rate",
        type=float,
        default=MAX_CONTROL_RATE,
        help=f"learning rate of the control encoder; default: {MAX_CONTROL_RATE}; 0 freezes it",
    )
    arguments.add_adapter_arguments(parser)
    arguments.add_training_arguments(parser)
    parser.set_defaults(targets=list(MAP_TARGETS))
    return with_defaults(parse_with_config(parser, argv, MINIATURE), maps=True)


def check_arguments(args: argparse.Namespace) -> None:
    """Reject bad flags before anything is read or loaded.

    Raises:
        InputError
    """
    check_training_arguments(args)
    check_model_folder(args.pretrained_model_name_or_path, args.variant, args.model_config)
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise InputError(
            f"--proportion_empty_prompts {args.proportion_empty_prompts} is not between 0 and 1; give a proportion."
        )
    if not 0 <= args.control_learning_rate <= MAX_CONTROL_RATE:
        raise InputError(
            f"--control_learning_rate {args.control_learning_rate} is not between 0 and {MAX_CONTROL_RATE}; use at "
            "most 1e-4, the rate of ETHER's appendix C.2, or 0 to freeze the encoder."
        )
    if args.control_learning_rate == 0 and args.controlnet_model_name_or_path is None and args.init_adapter is None:
        raise InputError(FROZEN_NEW_ENCODER)
    if len(args.resolutions) > 1:
        raise InputError("--resolution has several values; training on maps takes one.")
    if args.train_data_dir is not None and args.dataset_name is not None:
        raise InputError("--train_data_dir and --dataset_name are both given; choose one.")
    has_data = args.train_data_dir is not None or args.dataset_name is not None
    if not has_data and not is_miniature(args.pretrained_model_name_or_path):
        raise InputError("no data was given; specify a folder with --train_data_dir, or a --dataset_name.")


def with_rendered_pairs(args: argparse.Namespace) -> argparse.Namespace:
    """Render pairs from the miniature's world if no data was given; returns the updated arguments."""
    if args.train_data_dir is not None or args.dataset_name is not None:
        return args
    from data.toybox.write import write_map_pairs  # imports torch

    folder = Path(f"{os.path.abspath(args.output_dir)}-pairs")
    write_map_pairs(folder, MINIATURE_PAIRS)
    return argparse.Namespace(**vars(args) | {"train_data_dir": folder})


def find_data(args: argparse.Namespace) -> tuple[list[MapPair], list[MapPair], np.ndarray | None]:
    """The training pairs, the validation pairs and the palette. Every map is checked.

    Raises:
        InputError
    """
    if args.dataset_name is not None:
        columns = (args.image_column, args.map_column, args.caption_column or None)
        pairs = find_hub_pairs(args.dataset_name, args.dataset_config_name, args.dataset_split, columns)
    else:
        pairs = find_pairs(args.train_data_dir)
    if not pairs:
        raise InputError(f"{args.dataset_name or args.train_data_dir} contains no pairs; add images with their maps.")
    pairs = pairs[: args.max_train_samples]
    examples = find_pairs(args.validation_data_dir) if args.validation_data_dir else pairs
    examples = examples[: args.num_validation_images]
    palette = read_palette(args.palette) if args.palette else None
    if palette is None and pairs[0].load_map().ndim == 2:
        palette = read_palette("generated")
    for checked in (pairs, examples) if args.validation_data_dir else (pairs,):
        # Maps in colour are checked against a palette only if --palette is given.
        check_pairs(checked, palette, args.reduce_labels, need_captions=args.default_caption is None)
    return pairs, examples, palette


@dataclasses.dataclass(frozen=True)
class Views:
    """The views of each pair to train on, equally many per pair."""

    pairs: Sequence[MapPair]
    sizes: Sequence[Size]
    args: argparse.Namespace
    per_pair: int

    def __call__(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        pair, args = self.pairs[number], self.args
        views = pair_views(
            pair.load_image(),
            pair.load_map(args.reduce_labels),
            self.sizes[number],
            offsets_of(number, args),
            args.random_flip,
        )
        return [views[i % len(views)] for i in range(self.per_pair)]


def offsets_of(number: int, args: argparse.Namespace) -> list[float] | None:
    """Positions of a pair's crops along its long side; None for the centre crop."""
    from delora_diffusers.training.encoding import crop_offsets

    return crop_offsets(args.seed, number, not args.center_crop, args.num_crops)


def encode_data(
    accelerator: "Accelerator",
    model: "OpenModel",
    pairs: list[MapPair],
    captions: list[str],
    chunks: int,
    args: argparse.Namespace,
) -> "DiskCache":
    """Encode latent posteriors, maps and caption embeddings once and keep them on disk.

    Args:
        captions: one per pair. chunks: in which they are encoded; see ``--max_prompt_chunks``.
    """
    from delora_diffusers.pipelines.autoencoder import encode
    from delora_diffusers.pipelines.conditions import encode_prompts, family_in, warn_of_truncation
    from delora_diffusers.training.disk_cache import build_cache, file_stamp, fingerprint
    from delora_diffusers.training.photos import in_buckets

    pipeline = model.pipeline
    whole = [upright_size(pair.image, pair.name) for pair in pairs if pair.image is not None]
    buckets = in_buckets(whole, args, model.patch_pixels)
    size_of = {number: size for size, numbers in buckets.items() for number in numbers}
    sizes = [size_of[number] for number in range(len(pairs))]
    crops = max(len(crop_boxes(*both, offsets_of(number, args))) for number, both in enumerate(zip(whole, sizes)))
    if accelerator.is_main_process:
        warn_of_truncation(pipeline, list(dict.fromkeys(captions)), args.max_prompt_chunks)
    names = ("pretrained_model_name_or_path", "revision", "variant", "resolution", "seed", "center_crop", "num_crops")
    inputs: dict[str, Any] = {
        name: str(getattr(args, name)) for name in (*names, "random_flip", "reduce_labels", "dataset_name")
    }
    if list(buckets) != [(args.resolution, args.resolution)]:
        inputs["sizes"] = sizes
    if args.model_config is not None:
        inputs["model_config"] = args.model_config
    inputs["files"] = [file_stamp(f) for pair in pairs for f in (pair.image, pair.map) if isinstance(f, Path)]
    inputs |= {"names": [pair.name for pair in pairs], "captions": captions, "dtype": str(pipeline.text_encoder.dtype)}
    inputs |= {"prompt_chunks": chunks} if chunks > 1 else {}
    device, vae, family = accelerator.device, pipeline.vae, family_in(pipeline)
    return build_cache(
        accelerator,
        (args.cache_dir or args.output_dir / "cache") / fingerprint(inputs),
        list(buckets.values()),
        Views(pairs, sizes, args, (1 + args.random_flip) * crops),
        captions,
        lambda images: encode(family, vae, images.to(device, vae.dtype)),
        lambda texts: encode_prompts(pipeline, texts, device, chunks)["encoder_hidden_states"],
    )


def starting_encoder(
    args: argparse.Namespace,
    start: "InitialAdapter | None",
    palette: np.ndarray | None,
    unet: Any,
    factor: int,
    generator: "torch.Generator",
) -> Any:
    """The control encoder before training: that of the adapter to start from, a ControlNet's, or a new one.

    Raises:
        InputError: it does not fit the model or the maps, or two are given.
    """
    from delora_diffusers.adapter.control import new_encoder, pretrained_encoder
    from delora_diffusers.training.init_adapter import initial_encoder

    continued = None if start is None else initial_encoder(start, palette, unet, factor)
    if continued is not None:
        if args.controlnet_model_name_or_path:
            raise InputError(
                f"--init_adapter {args.init_adapter} has a control encoder; leave out --controlnet_model_name_or_path."
            )
        return continued
    if args.controlnet_model_name_or_path:
        return pretrained_encoder(args.controlnet_model_name_or_path, unet, factor)
    if args.control_learning_rate == 0:
        raise InputError(FROZEN_NEW_ENCODER)
    return new_encoder(unet, factor, generator)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    args = with_rendered_pairs(args)
    data = find_data(args)
    with held_folders([args.output_dir], args.resume_from_checkpoint):
        train_on_maps(args, *data)


def train_on_maps(
    args: argparse.Namespace, pairs: list[MapPair], validation_pairs: list[MapPair], palette: np.ndarray | None
) -> None:
    """Train an adapter and its control encoder and save them.

    Raises:
        InputError: something does not fit the model, or the loss is not finite.
    """
    # Imported after the checks, so that bad input is rejected at once.
    import torch

    from delora_diffusers import attach, attach_control
    from delora_diffusers.families.pipeline_files import family_named
    from delora_diffusers.families.table import family_of
    from delora_diffusers.pipelines.conditions import count_chunks, encode_prompts, first_chunks
    from delora_diffusers.pipelines.offload import offload_blocks
    from delora_diffusers.training.adapter_files import AdapterFiles
    from delora_diffusers.training.batches import MapBatches
    from delora_diffusers.training.encoding import PromptTable
    from delora_diffusers.training.init_adapter import adapter_digest, read_initial_adapter
    from delora_diffusers.training.loop import train
    from delora_diffusers.training.memory_report import plan_of, report_memory
    from delora_diffusers.training.objective import Losses
    from delora_diffusers.training.photos import in_buckets
    from delora_diffusers.training.run_folder import data_digests
    from delora_diffusers.training.setup import (
        begin_run,
        load_denoiser_to_train,
        load_part,
        open_base_model,
        save_run,
        start_accelerator,
        training_dtype,
    )
    from delora_diffusers.training.validation import MapValidation

    data = data_digests(
        (pair.name, [file for file in (pair.image, pair.map) if isinstance(file, Path)], pair.caption) for pair in pairs
    )
    data |= adapter_digest(args.init_adapter)
    family = family_named(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        model_config=args.model_config,
    )
    if family is not family_of(SD_PIPELINE):
        raise InputError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} is not Stable Diffusion 1.x or 2.x; "
            "training on maps needs one of these."
        )
    args = with_family_defaults(args, family)
    accelerator = start_accelerator(args, data)
    device = accelerator.device
    model, noising = open_base_model(accelerator, args)
    pipeline, skeleton, kind = model.pipeline, model.skeletons["unet"], type(model.pipeline).__name__

    # Invalid adapter or control settings are rejected here, before anything is written: the adapter is attached to a
    # model without values first.
    generator = torch.Generator().manual_seed(args.seed)
    start = read_initial_adapter(args, model, maps=True)
    rehearsed = attach(
        copy.deepcopy(skeleton), arguments.adapter_config(args), torch.Generator().manual_seed(args.seed)
    )
    if start is not None:
        start.copy_into({"unet": rehearsed}, {"unet": skeleton})
    encoder = starting_encoder(args, start, palette, skeleton, pipeline.vae_scale_factor, generator)
    captions = [(args.default_caption if pair.caption is None else pair.caption) or "" for pair in pairs]
    chunks = count_chunks(pipeline, captions, args.max_prompt_chunks)
    plan = plan_of(args, arguments.adapter_config(args), accelerator.mixed_precision, 1, chunks)
    report_memory(accelerator, model, plan)
    begin_run(accelerator, args, data, "map2img-delora")

    for name in model.text_encoders:
        load_part(model, name, accelerator)
    load_part(model, "vae", accelerator, torch.float32)
    cache = encode_data(accelerator, model, pairs, captions, chunks, args)
    examples = []
    for pair in validation_pairs:
        whole, semantic = pair.load_image(), pair.load_map(args.reduce_labels)
        (size,) = in_buckets([whole.size], args, model.patch_pixels)
        views = pair_views(whole, semantic, size, None, False)
        image, values = views[0]
        examples.append((pair.caption or args.default_caption or "", values, Image.fromarray(image)))
    with torch.no_grad():
        prompts = list(dict.fromkeys(["", *(caption for caption, _, _ in examples)]))
        validation_chunks = count_chunks(pipeline, prompts, args.max_prompt_chunks)
        most = max(chunks, validation_chunks)
        encoded = encode_prompts(pipeline, prompts, device, most)
    table = PromptTable(prompts, first_chunks(encoded, validation_chunks, most))
    (empty_prompt,) = PromptTable(prompts, first_chunks(encoded, chunks, most)).lookup([""])["encoder_hidden_states"]
    model.drop(*model.text_encoders)
    pipeline.vae.to("cpu", training_dtype(accelerator))

    unet = load_denoiser_to_train(model, accelerator, args)
    compute_device = device if args.offload else None
    adapters = {"unet": attach(unet, arguments.adapter_config(args), generator, compute_device)}
    if start is not None:
        start.copy_into(adapters, {"unet": unet})
    if args.offload:
        offload_blocks(unet, device)
    control = attach_control(unet, encoder.to(device), palette)
    frozen = args.control_learning_rate == 0
    encoder.requires_grad_(not frozen)

    batches = MapBatches(
        noising,
        cache,
        model.family.scale(pipeline.vae),
        empty_prompt,
        palette,
        args.seed,
        args.train_batch_size,
        args.proportion_empty_prompts,
        device,
    )
    validate = MapValidation(accelerator, pipeline, table.lookup, control, examples, args)
    files = AdapterFiles(adapters, [args], captions[:1], {"control": control, "pipeline": kind})
    trained_encoder = None if frozen else encoder
    losses = Losses(model.family, unet, control=control, loss_type=args.loss_type)
    train(accelerator, adapters, batches, losses, args, validate, trained_encoder, files, examples=batches.examples)
    save_run(accelerator, files, 0, f"{len(pairs)} images and their maps", data)
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
