"""Flags of the DreamBooth script beyond those of both training scripts."""

import argparse
import os
from pathlib import Path

from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import check_model_folder, check_side
from delora_diffusers.families.quantization import PACKAGES
from delora_diffusers.names import is_miniature
from delora_diffusers.outputs import check_writable
from delora_diffusers.training.argument_checks import check_training_arguments
from delora_diffusers.training.arguments import positive_int
from delora_diffusers.training.defaults import RECIPES


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("subject")
    group.add_argument("--instance_data_dir", type=Path, help="folder of photos, with or without captions")
    group.add_argument(
        "--instance_prompt", help="prompt for photos without a caption, for example 'a photo of sks dog'"
    )
    group.add_argument("--instance_name", help="replaces {instance} in prompts and captions, for example 'sks dog'")
    group.add_argument(
        "--concepts_list", type=Path, help="YAML file of several concepts for one adapter: docs/training.md"
    )
    group.add_argument(
        "--subjects_file", type=Path, help="train several subjects at once, one JSON object per line: docs/training.md"
    )
    group.add_argument(
        "--center_crop", action="store_true", help="crop the centre instead of random positions along the long side"
    )
    group.add_argument("--random_flip", action="store_true", help="also train on mirror images")
    group.add_argument("--train_text_encoder", action="store_true", help="also adapt the text encoder's attention")
    group.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="default",
        help="paper: DeLoRA's relative bound is 0.35, as it was by default before; default: default",
    )
    group = parser.add_argument_group("captions and masks")
    group.add_argument(
        "--caption_dropout", type=float, default=0.0, help="probability of training without the caption, 0 to 1"
    )
    group.add_argument("--shuffle_tags", action="store_true", help="train on captions with their tags in random order")
    group.add_argument("--keep_tags", type=int, default=0, help="leading tags that stay in place; default: 0")
    group.add_argument(
        "--use_masks", action="store_true", help="weight the loss by NAME.mask.png beside photos, or by alpha channels"
    )
    group.add_argument("--mask_data_dir", type=Path, help="folder of masks with the names of the photos; --use_masks")
    group.add_argument(
        "--mask_background_weight",
        type=float,
        help="weight of the loss where a mask is black, relative to where it is white; default: 0.1",
    )
    group = parser.add_argument_group("validation")
    group.add_argument("--validation_prompt", nargs="+", default=[], help="prompts for validation images")
    group.add_argument("--validation_width", type=int, help="in pixels; default: --resolution")
    group.add_argument("--validation_height", type=int, help="in pixels; default: --resolution")
    group.add_argument(
        "--validation_split", type=float, default=0.0, help="share of the photos to hold out for a validation loss"
    )
    group.add_argument("--validation_data_dir", type=Path, help="instead: a folder of photos for the validation loss")
    group.add_argument(
        "--keep_best",
        choices=("loss", "dino"),
        help="keep the adapter with the lowest validation loss, or with validation images most similar to the photos",
    )
    group.add_argument("--dino", help="DINO model for --keep_best dino: timm name, hf-hub:ID or local-dir:FOLDER")
    group = parser.add_argument_group("keeping what the model knew")
    group.add_argument(
        "--with_output_preservation",
        action="store_true",
        help="also train the output for --class_prompt to stay the base model's; needs no class images",
    )
    group.add_argument("--output_preservation_weight", type=float, help="weight of that loss; default: 1")
    group.add_argument("--with_prior_preservation", action="store_true", help="also train on images of the class")
    group.add_argument(
        "--class_data_dir", type=Path, help="folder of class images; default: class_images in the output folder"
    )
    group.add_argument("--class_prompt", help="prompt for class images, for example 'a photo of a dog'")
    group.add_argument("--num_class_images", type=positive_int, help="missing ones are generated; default: 100")
    group.add_argument("--prior_loss_weight", type=float, help="weight of the class images' loss; default: 1")
    group.add_argument(
        "--sample_batch_size", type=positive_int, help="batch size for generating class images; default: 4"
    )


def with_subject_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what follows from other flags; returns new arguments.

    Raises:
        InputError: a weight is given for something that is not used.
    """
    args = argparse.Namespace(**vars(args))
    args.use_masks = args.use_masks or args.mask_data_dir is not None
    args.square = args.square or args.subjects_file is not None  # one batch has the photos of all subjects
    for flag, default, user in (
        ("output_preservation_weight", 1.0, "with_output_preservation"),
        ("mask_background_weight", 0.1, "use_masks"),
        ("num_class_images", 100, "with_prior_preservation"),
        ("prior_loss_weight", 1.0, "with_prior_preservation"),
        ("sample_batch_size", 4, "with_prior_preservation"),
        ("class_data_dir", None, "with_prior_preservation"),
    ):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif not getattr(args, user):
            raise InputError(f"--{flag} belongs to --{user}, which is not given; leave it out.")
    if args.class_prompt is not None and not (args.with_prior_preservation or args.with_output_preservation):
        raise InputError(
            "--class_prompt belongs to --with_prior_preservation and --with_output_preservation; give one of them, or "
            "leave it out."
        )
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Reject bad flags before anything is read or loaded.

    Raises:
        InputError
    """
    check_training_arguments(args)
    check_model_folder(args.pretrained_model_name_or_path, args.variant, args.model_config)
    if args.learning_rate == 0 and not (args.init_adapter or args.resume_from_checkpoint):
        raise InputError("--learning_rate 0 would leave the new adapter as it starts, without effect; give a rate.")
    if args.keep_tags and not args.shuffle_tags:
        raise InputError("--keep_tags belongs to --shuffle_tags, which is not given; leave it out.")
    if args.keep_tags < 0:
        raise InputError(f"--keep_tags {args.keep_tags} is negative; give the number of leading tags to keep.")
    if args.concepts_list is not None:
        for flag in ("instance_data_dir", "subjects_file"):
            if getattr(args, flag):
                raise InputError(f"--{flag} and --concepts_list are both given; choose one.")
    if args.subjects_file is None:
        check_validation(args)
        given = args.instance_data_dir or args.concepts_list
        if given is None and not is_miniature(args.pretrained_model_name_or_path):
            raise InputError("no photos were given; specify their folder with --instance_data_dir.")
        return
    single = ("instance_data_dir", "instance_prompt", "instance_name", "class_data_dir", "hub_model_id")
    more = ("train_text_encoder", "validation_prompt", "validation_split", "validation_data_dir", "keep_best")
    for flag in (*single, "mask_data_dir", "use_masks", *more, "init_adapter"):
        if getattr(args, flag):
            raise InputError(f"--{flag} applies to a single subject; leave out either it or --subjects_file.")
    if len(args.resolutions) > 1:
        raise InputError("--resolution has several values, which apply to a single subject; give one.")
    if args.offload or args.base_precision in PACKAGES:
        flag = "--offload" if args.offload else f"--base_precision {args.base_precision}"
        raise InputError(f"{flag} trains a single subject at a time; leave out either it or --subjects_file.")
    if args.mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16 scales the losses of all subjects together; use bf16 or no.")


def check_validation(args: argparse.Namespace) -> None:
    """Reject flags of validation that do not fit together.

    Raises:
        InputError
    """
    for flag in ("validation_width", "validation_height"):
        side = getattr(args, flag)
        if side is not None:
            check_side(flag, side)
        if side is not None and not args.validation_prompt:
            raise InputError(f"--{flag} belongs to --validation_prompt, which is not given; leave it out.")
    folders = [folder.resolve() for folder in (args.instance_data_dir, args.validation_data_dir) if folder is not None]
    if len(folders) == 2 and folders[0] == folders[1]:
        raise InputError(
            "--validation_data_dir is the folder of the photos to train on; give other photos, or --validation_split."
        )
    if args.validation_split and args.validation_data_dir is not None:
        raise InputError("--validation_split and --validation_data_dir are both given; choose one.")
    if args.keep_best == "loss" and not args.validation_split and args.validation_data_dir is None:
        raise InputError("--keep_best loss needs held-out photos; give --validation_split 0.2, for example.")
    if args.keep_best == "dino" and not args.validation_prompt:
        raise InputError("--keep_best dino compares validation images with the photos; give --validation_prompt.")
    if args.dino is not None and args.keep_best != "dino":
        raise InputError("--dino belongs to --keep_best dino, which is not given; leave it out.")


def check_class_folder(class_data_dir: Path | None, instance_data_dir: Path) -> None:
    """Reject a folder of class images that cannot be used.

    Raises:
        InputError
    """
    if class_data_dir is None:
        return
    check_writable(class_data_dir, "--class_data_dir")
    if os.path.isfile(class_data_dir):
        raise InputError(f"--class_data_dir {class_data_dir} is a file; give a folder.")
    if class_data_dir.resolve() == instance_data_dir.resolve():
        raise InputError("--class_data_dir and --instance_data_dir are the same folder; give two folders.")
