"""DreamBooth with DeLoRA: teach a text-to-image model a subject from a few photos.

    accelerate launch train_dreambooth_delora.py                      # the included miniature, on a rendered toy

    accelerate launch train_dreambooth_delora.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir PHOTOS --instance_prompt "a photo of sks dog" --output_dir OUT

--subjects_file trains several subjects at once on one frozen model. Each gets the adapter that it would get alone.
"""

import argparse
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.photographs import Photo, find_photographs, variants, view_sizes
from data.subjects import Subject, read_subjects
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import check_model_folder
from delora_diffusers.families.quantization import PACKAGES
from delora_diffusers.image_files import load_rgb
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from delora_diffusers.names import is_miniature
from delora_diffusers.outputs import check_run_folder, check_writable, held_folders
from delora_diffusers.training import arguments

if TYPE_CHECKING:
    import torch

    from delora_diffusers import Adapter
    from delora_diffusers.families.loading import OpenModel
    from delora_diffusers.training.encoding import LatentCache


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("subject")
    group.add_argument("--instance_data_dir", type=Path, help="folder of photos, with or without captions")
    group.add_argument(
        "--instance_prompt", help="prompt for photos without a caption, for example 'a photo of sks dog'"
    )
    group.add_argument(
        "--subjects_file", type=Path, help="train several subjects at once, one JSON object per line: docs/training.md"
    )
    group.add_argument(
        "--center_crop", action="store_true", help="crop the centre instead of random positions along the long side"
    )
    group.add_argument("--random_flip", action="store_true", help="also train on mirror images")
    group.add_argument("--train_text_encoder", action="store_true", help="also adapt the text encoder's attention")
    group.add_argument("--validation_prompt", nargs="+", default=[], help="prompts for validation images")
    group = parser.add_argument_group("prior preservation")
    group.add_argument("--with_prior_preservation", action="store_true", help="also train on images of the class")
    group.add_argument(
        "--class_data_dir", type=Path, help="folder of class images; default: class_images in the output folder"
    )
    group.add_argument("--class_prompt", help="prompt for class images, for example 'a photo of a dog'")
    group.add_argument(
        "--num_class_images", type=arguments.positive_int, default=100, help="missing ones are generated; default: 100"
    )
    group.add_argument("--prior_loss_weight", type=float, default=1.0, help="weight of the class images' loss")
    group.add_argument(
        "--sample_batch_size", type=arguments.positive_int, default=4, help="batch size for generating class images"
    )
    arguments.add_adapter_arguments(parser)
    arguments.add_training_arguments(parser)
    args = arguments.parse_with_config(parser, argv)
    miniature = is_miniature(args.pretrained_model_name_or_path)
    return arguments.with_defaults(args, arguments.MINIATURE_SUBJECT_RATES if miniature else None)


def check_arguments(args: argparse.Namespace) -> None:
    """Reject bad flags before anything is read or loaded.

    Raises:
        InputError
    """
    arguments.check_training_arguments(args)
    check_model_folder(args.pretrained_model_name_or_path, args.variant, args.model_config)
    if args.subjects_file is None:
        if args.instance_data_dir is None and not is_miniature(args.pretrained_model_name_or_path):
            raise InputError("no photos were given; specify their folder with --instance_data_dir.")
        return
    single = ("instance_data_dir", "instance_prompt", "class_data_dir", "hub_model_id", "train_text_encoder")
    for flag in (*single, "validation_prompt"):
        if getattr(args, flag):
            raise InputError(f"--{flag} applies to a single subject; leave out either it or --subjects_file.")
    if args.offload or args.base_precision in PACKAGES:
        flag = "--offload" if args.offload else f"--base_precision {args.base_precision}"
        raise InputError(f"{flag} trains a single subject at a time; leave out either it or --subjects_file.")
    if args.mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16 scales the losses of all subjects together; use bf16 or no.")


def with_rendered_photos(args: argparse.Namespace) -> argparse.Namespace:
    """Render photos of a toy from the miniature's world if no photos were given; returns the updated arguments."""
    if args.subjects_file is not None or args.instance_data_dir is not None:
        return args
    from data.toybox.write import write_unseen_subject  # imports torch

    folder = Path(f"{os.path.abspath(args.output_dir)}-photographs")
    kind = write_unseen_subject(folder)
    prompt = args.instance_prompt or f"a photo of sks {kind}"
    return argparse.Namespace(**vars(args) | {"instance_data_dir": folder, "instance_prompt": prompt})


def find_subjects(args: argparse.Namespace) -> list[Subject]:
    """The subjects to train, with their photos.

    Raises:
        InputError: photos or prompts are missing or unreadable, or an output folder contains another run.
    """
    if args.subjects_file is None:
        fields = (args.instance_data_dir, args.instance_prompt, args.output_dir, args.seed, args.class_prompt)
        if args.with_prior_preservation:
            check_class_folder(args.class_data_dir, args.instance_data_dir)
        subjects = [Subject(find_photographs(args.instance_data_dir), *fields, args.class_data_dir)]
    else:
        subjects = read_subjects(args.subjects_file, args.seed, args.class_prompt)
        for subject in subjects:
            if subject.output_dir.resolve() == args.output_dir.resolve():
                raise InputError(
                    f"--output_dir {args.output_dir} is also a subject's output_dir; give a separate folder for the "
                    "checkpoints."
                )
            check_run_folder(subject.output_dir, args.resume_from_checkpoint)
            if args.with_prior_preservation:
                check_class_folder(subject.class_data_dir, subject.instance_data_dir)
    for subject in subjects:
        uncaptioned = [photo.path for photo in subject.photographs if photo.caption is None]
        if uncaptioned and not (subject.instance_prompt or "").strip():
            raise InputError(
                f"{uncaptioned[0]} has no caption; give --instance_prompt, for example 'a photo of sks dog'."
            )
        if args.with_prior_preservation and not (subject.class_prompt or "").strip():
            raise InputError("--with_prior_preservation needs --class_prompt, for example 'a photo of a dog'.")
    if args.with_prior_preservation:
        for path in {path for subject in subjects for path in subject.class_images()}:
            load_rgb(path)
    return subjects


def trained_prompts(args: argparse.Namespace, subjects: Sequence[Subject]) -> list[str]:
    """The prompts that micro-batches have."""
    classes = [subject.class_prompt or "" for subject in subjects if args.with_prior_preservation]
    return [prompt for subject in subjects for prompt in subject.prompts] + classes


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


def digest_data(args: argparse.Namespace, subjects: Sequence[Subject]) -> dict[str, str]:
    """A digest of each photo and its prompt, and of the class images that were given; a continued run has the same."""
    from delora_diffusers.training.run_folder import data_digests

    photos = data_digests(
        (str(photo.path.resolve()), [photo.path], json.dumps([prompt, subject.seed, subject.class_prompt]))
        for subject in subjects
        for photo, prompt in zip(subject.photographs, subject.prompts)
    )
    if not args.with_prior_preservation:
        return photos
    given = {
        path
        for subject in subjects
        for path in subject.class_images()
        if not path.name.startswith(f"class-{subject.seed}-")
    }
    return photos | data_digests((str(path.resolve()), [path], None) for path in sorted(given))


def attach_adapters(
    models: dict[str, Any],
    subjects: Sequence[Subject],
    args: argparse.Namespace,
    compute_device: "torch.device | None" = None,
) -> dict[str, "Adapter"]:
    """Attach adapters to the denoiser and to the text encoders that are trained; returns them by component.

    Args:
        models: the denoiser and those text encoders, by component.
        compute_device: where the denoiser computes, if its weights are offloaded.
    """
    import torch

    from delora_diffusers import attach

    generators = [torch.Generator().manual_seed(subject.seed) for subject in subjects]
    (name, denoiser), *text_encoders = models.items()
    adapters = {name: attach(denoiser, arguments.adapter_config(args), generators, compute_device)}
    config = arguments.adapter_config(args, targets=TEXT_ENCODER_TARGETS)
    for number, (name, text_encoder) in enumerate(text_encoders, start=1):
        adapters[name] = attach(text_encoder, config, torch.Generator().manual_seed(args.seed + number))
    return adapters


def encode_photos(
    model: "OpenModel", photos: Sequence[Photo], seed: int, args: argparse.Namespace, device: "torch.device"
) -> "LatentCache":
    """Encode all views of the photos with the autoencoder."""
    from delora_diffusers.training.encoding import crop_offsets, encode_images

    offsets = [crop_offsets(seed, number, not args.center_crop) for number in range(len(photos))]
    views = (variants(p.load(), args.resolution, o, args.random_flip) for p, o in zip(photos, offsets))
    sizes = None
    if model.family.HAS_SIZES:
        sizes_of_photos = (view_sizes(p.size(), args.resolution, o, args.random_flip) for p, o in zip(photos, offsets))
        sizes = [size for sizes_of_photo in sizes_of_photos for size in sizes_of_photo]
    return encode_images(model.family, model.pipeline.vae, views, len(photos), device, sizes=sizes)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    args = with_rendered_photos(args)
    subjects = find_subjects(args)
    folders = list(dict.fromkeys([args.output_dir, *(subject.output_dir for subject in subjects)]))
    with held_folders(folders, args.resume_from_checkpoint):
        train_subjects(args, subjects)


def train_subjects(args: argparse.Namespace, subjects: Sequence[Subject]) -> None:
    """Train the adapters of all subjects and save them.

    Raises:
        InputError: something does not fit the model, or the loss is not finite.
    """
    # Imported after the checks, so that bad input is rejected at once.
    import torch

    from delora_diffusers.families.loading import family_named
    from delora_diffusers.pipelines.conditions import conditions, tokenize, warn_of_truncation
    from delora_diffusers.pipelines.offload import offload_blocks
    from delora_diffusers.training.adapter_files import AdapterFiles
    from delora_diffusers.training.batches import SubjectBatches, SubjectData
    from delora_diffusers.training.class_images import ClassImages, generate_class_images
    from delora_diffusers.training.encoding import PromptTable
    from delora_diffusers.training.loop import train
    from delora_diffusers.training.memory_report import plan_of, report_memory
    from delora_diffusers.training.objective import Losses
    from delora_diffusers.training.setup import (
        begin_run,
        check_prompt_lengths,
        encode_with,
        load_denoiser_to_train,
        load_part,
        load_text_encoder_to_train,
        open_base_model,
        save_run,
        start_accelerator,
        training_dtype,
    )
    from delora_diffusers.training.validation import Conditions, SubjectValidation, TrainedConditions

    family = family_named(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        model_config=args.model_config,
    )
    args = arguments.with_family_defaults(args, family)
    data = digest_data(args, subjects)
    accelerator = start_accelerator(args, data)
    device = accelerator.device
    model, noising = open_base_model(accelerator, args)
    pipeline, denoiser = model.pipeline, model.family.DENOISER
    trained_encoders = model.trainable_encoders if args.train_text_encoder else []
    trained = [denoiser, *trained_encoders]
    # A rehearsal on models without values finds what does not fit the base model.
    attach_adapters({name: copy.deepcopy(model.skeletons[name]) for name in trained}, subjects, args)
    if args.cuda_graph:
        check_prompt_lengths(model, trained_prompts(args, subjects))
    report_memory(
        accelerator,
        model,
        plan_of(args, arguments.adapter_config(args), accelerator.mixed_precision, len(subjects)),
    )
    # All checks have passed, and nothing was written before this.
    begin_run(accelerator, args, data, "dreambooth-delora")

    # What stays constant during training is computed once, with one part of the model on the device at a time: prompt
    # embeddings, class images, latent posteriors.
    prompts = [prompt for subject in subjects for prompt in (*subject.prompts, subject.class_prompt or "")]
    prompts = list(dict.fromkeys([*prompts, *args.validation_prompt, model.family.NO_PROMPT]))
    if accelerator.is_main_process:
        warn_of_truncation(pipeline, prompts)
    encoded: dict[str, torch.Tensor] = {}
    for name in model.text_encoders:
        if args.with_prior_preservation or name not in trained_encoders:
            encoded |= encode_with(model, name, accelerator, prompts)
    config = model.skeletons[denoiser].config
    if args.with_prior_preservation or not args.train_text_encoder:
        encoded_prompts = PromptTable(prompts, conditions(pipeline, encoded, config))
    if args.with_prior_preservation:
        folders = [s.class_data_dir or s.output_dir / "class_images" for s in subjects]
        wanted = [ClassImages(folder, s.class_prompt or "", s.seed) for folder, s in zip(folders, subjects)]
        generate_class_images(accelerator, model, wanted, encoded_prompts, args)
    load_part(model, "vae", accelerator, torch.float32)
    latents = [encode_photos(model, s.photographs, s.seed, args, device) for s in subjects]
    class_latents: list[LatentCache | None] = [None] * len(subjects)
    if args.with_prior_preservation:
        class_images = [find_photographs(folder)[: args.num_class_images] for folder in folders]
        class_latents = [encode_photos(model, i, s.seed, args, device) for i, s in zip(class_images, subjects)]
    if args.validation_prompt:
        pipeline.vae.to("cpu", training_dtype(accelerator))
    else:
        model.drop("vae")

    models = {name: load_text_encoder_to_train(model, name, accelerator, args) for name in trained_encoders}
    models = {denoiser: load_denoiser_to_train(model, accelerator, args), **models}
    adapters = attach_adapters(models, subjects, args, device if args.offload else None)
    if args.offload:
        offload_blocks(models[denoiser], device)
    if args.train_text_encoder:
        outputs = {n: tensor for n, tensor in encoded.items() if n.partition("/")[0] not in trained_encoders}
        table = PromptTable(prompts, outputs | tokenize(pipeline, prompts, device, trained_encoders))
        conditions_of: Conditions = TrainedConditions(pipeline, table, config)
    else:
        table = encoded_prompts
        conditions_of = table.lookup
    validate = None
    if args.validation_prompt:
        validate = SubjectValidation(accelerator, pipeline, conditions_of, args)

    encoded_subjects = [
        SubjectData(s.seed, s.prompts, photo_latents, s.class_prompt, prior_latents)
        for s, photo_latents, prior_latents in zip(subjects, latents, class_latents)
    ]
    batches = SubjectBatches(noising, encoded_subjects, table, args.train_batch_size, args.prior_loss_weight, device)
    losses = Losses(model.family, models[denoiser], len(subjects), pipeline if args.train_text_encoder else None)
    settings = [argparse.Namespace(**vars(args) | subject.flag_overrides()) for subject in subjects]
    files = AdapterFiles(adapters, settings, [s.prompts[0] for s in subjects], {"pipeline": type(pipeline).__name__})
    same_shape = batches.have_same_shape
    failed = train(accelerator, adapters, batches, losses, args, validate, files=files, same_shape=same_shape)
    for number, subject in enumerate(subjects):
        if number not in failed:
            save_run(accelerator, files, number, f"{len(subject.photographs)} photos", data)
    accelerator.end_training()
    if failed:
        steps = ", ".join(f"{subjects[number].output_dir} at step {step}" for number, step in failed.items())
        raise InputError(f"the loss was not finite for {steps}; lower --learning_rate (the other adapters are saved).")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
