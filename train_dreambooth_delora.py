"""DreamBooth with DeLoRA: teach a text-to-image model a subject from a few photos.

    accelerate launch train_dreambooth_delora.py                      # the included miniature, on a rendered toy

    accelerate launch train_dreambooth_delora.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir PHOTOS --instance_prompt "a photo of sks dog" --output_dir OUT

--subjects_file trains several subjects at once on one frozen model. Each gets the adapter that it would get alone.
"""

import argparse
import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.captions import tag_orders, with_instance
from data.concepts import Concept, read_concepts
from data.photographs import Masks, Photo, find_photographs
from data.subjects import Subject, check_class_prompts, read_subjects
from delora_diffusers.dispatch import Parser, exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from delora_diffusers.methods.config import TEXT_ENCODER_TARGETS
from delora_diffusers.names import INSTANCE, is_miniature
from delora_diffusers.outputs import check_run_folder, held_folders, is_first_process
from delora_diffusers.training import arguments
from delora_diffusers.training.config_file import parse_with_config
from delora_diffusers.training.defaults import with_defaults, with_family_defaults
from delora_diffusers.training.subject_arguments import (
    add_subject_arguments,
    check_arguments,
    check_class_folder,
    with_subject_defaults,
)

if TYPE_CHECKING:
    import torch

    from delora_diffusers import Adapter
    from delora_diffusers.training.init_adapter import InitialAdapter


def build_parser(parser_class: type[argparse.ArgumentParser] = Parser) -> argparse.ArgumentParser:
    parser = parser_class(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_model_arguments(parser)
    add_subject_arguments(parser)
    arguments.add_adapter_arguments(parser)
    arguments.add_training_arguments(parser)
    return parser


def parse_arguments(
    argv: list[str] | None = None, parser_class: type[argparse.ArgumentParser] = Parser
) -> argparse.Namespace:
    args = with_subject_defaults(parse_with_config(build_parser(parser_class), argv))
    return with_defaults(args)


def with_rendered_photos(args: argparse.Namespace) -> argparse.Namespace:
    """Render photos of a toy from the miniature's world if no photos were given; returns the updated arguments."""
    if any((args.subjects_file, args.instance_data_dir, args.concepts_list)):
        return args
    from data.toybox.write import write_unseen_subject  # imports torch

    folder = Path(f"{os.path.abspath(args.output_dir)}-photographs")
    kind = write_unseen_subject(folder)
    prompt = args.instance_prompt or f"a photo of sks {kind}"
    if is_first_process():
        print(
            f"no --instance_data_dir was given, so the subject is a rendered toy, a {kind}; its photos are in {folder}"
        )
    return argparse.Namespace(**vars(args) | {"instance_data_dir": folder, "instance_prompt": prompt})


def find_subjects(args: argparse.Namespace) -> list[Subject]:
    """The subjects to train, with their photos.

    Raises:
        InputError: photos or prompts are missing or unreadable, or an output folder contains another run.
    """
    if args.subjects_file is None:
        subjects = [Subject(find_concepts(args), args.output_dir, args.seed)]
    else:
        subjects = read_subjects(args.subjects_file, args.seed, args.class_prompt)
        for subject in subjects:
            if subject.output_dir.resolve() == args.output_dir.resolve():
                raise InputError(
                    f"--output_dir {args.output_dir} is also a subject's output_dir; give a separate folder for the "
                    "checkpoints."
                )
            check_run_folder(subject.output_dir, args.resume_from_checkpoint)
    concepts = [concept for subject in subjects for concept in subject.concepts]
    for concept in concepts:
        if args.with_prior_preservation:
            check_class_folder(concept.class_data_dir, concept.instance_data_dir)
        for flag in ("with_prior_preservation", "with_output_preservation"):
            if getattr(args, flag) and not (concept.class_prompt or "").strip():
                raise InputError(f"--{flag} needs --class_prompt, for example 'a photo of a dog'.")
        if INSTANCE in (concept.class_prompt or ""):
            raise InputError(f"--class_prompt {concept.class_prompt!r} contains {INSTANCE}; give the class only.")
        concept.check_prompts()
    if args.with_prior_preservation:
        check_class_prompts(subjects)
        for path in {path for concept in concepts for path in concept.class_images()}:
            load_rgb(path)
    return subjects


def find_concepts(args: argparse.Namespace) -> list[Concept]:
    """The concepts of a single subject.

    Raises:
        InputError
    """
    texts = ("instance_prompt", "instance_name", "class_prompt")
    if args.concepts_list is not None:
        keys = (*texts, "class_data_dir", "mask_data_dir")
        defaults = {key: str(value) for key in keys if (value := getattr(args, key)) is not None}
        return read_concepts(args.concepts_list, defaults, args.use_masks)
    photos = find_photographs(args.instance_data_dir, Masks(args.use_masks, args.mask_data_dir))
    prompts = {key: getattr(args, key) for key in texts}
    return [Concept(photos, args.instance_data_dir, **prompts, class_data_dir=args.class_data_dir)]


def split_photos(args: argparse.Namespace, subjects: Sequence[Subject]) -> tuple[Sequence[Subject], list[Concept]]:
    """The subjects with the photos to train on, and their concepts with those that are held out, if there are any.

    Raises:
        InputError: there are too few photos.
    """
    from delora_diffusers.training.held_out import split

    (subject, *_) = subjects
    if args.validation_data_dir is not None:
        photos = find_photographs(args.validation_data_dir, Masks(args.use_masks, required=False))
        held_out = [dataclasses.replace(subject.concepts[0], photographs=photos)]
        held_out[0].check_prompts()
        return subjects, held_out
    if not args.validation_split:
        return subjects, []
    trained, held_out = [], []
    for concept in subject.concepts:
        photos = concept.photographs
        if len(photos) < 2:
            raise InputError(f"--validation_split needs at least 2 photos, but {concept.instance_data_dir} has 1.")
        held = split(len(photos), args.validation_split, subject.seed)
        held_out.append(dataclasses.replace(concept, photographs=[photos[number] for number in held]))
        rest = [photo for number, photo in enumerate(photos) if number not in held]
        trained.append(dataclasses.replace(concept, photographs=rest))
    return [dataclasses.replace(subject, concepts=trained)], held_out


def prompts_of(subject: Subject, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """The prompts of each photo, of which one is chosen in each step: its caption, or that with its tags shuffled."""
    if not args.shuffle_tags:
        return [(prompt,) for prompt in subject.prompts]
    numbered = enumerate(subject.prompts)
    return [tag_orders(prompt, (subject.seed, number), args.keep_tags) for number, prompt in numbered]


def trained_prompts(args: argparse.Namespace, subjects: Sequence[Subject]) -> list[str]:
    """The prompts that micro-batches have."""
    uses_classes = args.with_prior_preservation or args.with_output_preservation
    classes = [prompt for subject in subjects for prompt in subject.class_prompts if uses_classes]
    return [p for subject in subjects for prompts in prompts_of(subject, args) for p in prompts] + classes


def count_trained_chunks(args: argparse.Namespace, subjects: Sequence[Subject], pipeline: Any) -> int:
    """The chunks in which the prompts of micro-batches are encoded; see ``--max_prompt_chunks``.

    Raises:
        InputError: a subject's prompts would be padded to the length of another's, which changes its adapter.
    """
    from delora_diffusers.pipelines.conditions import count_chunks

    counts = [count_chunks(pipeline, trained_prompts(args, [s]), args.max_prompt_chunks) for s in subjects]
    if len(set(counts)) > 1:
        other = next(number for number, count in enumerate(counts) if count != counts[0])
        raise InputError(
            f"the prompts of {subjects[0].output_dir} fill {counts[0]} chunks and those of "
            f"{subjects[other].output_dir} {counts[other]}; train these subjects separately, or leave out "
            "--max_prompt_chunks."
        )
    return counts[0]


def digest_data(args: argparse.Namespace, subjects: Sequence[Subject], held_out: Sequence[Concept]) -> dict[str, str]:
    """A digest of each photo and its prompt, and of the class images that were given; a continued run has the same.

    Args:
        held_out: photos that are not the subjects', with their prompts.
    """
    from delora_diffusers.training.run_folder import data_digests

    photos: dict[str, str] = {}
    for subject in subjects:
        for number, concept in enumerate(subject.concepts):
            again = "" if len(subject.concepts) == 1 else f" as concept {number + 1}"
            photos |= data_digests(
                (f"{photo.path.resolve()}{again}", files_of(photo), json.dumps(trained_as(prompt, subject, concept)))
                for photo, prompt in zip(concept.photographs, concept.prompts)
            )
    for concept in held_out:
        photos |= data_digests(
            (str(photo.path.resolve()), files_of(photo), prompt)
            for photo, prompt in zip(concept.photographs, concept.prompts)
        )
    if not args.with_prior_preservation:
        return photos
    given = {
        path
        for subject in subjects
        for concept in subject.concepts
        for path in concept.class_images()
        if not path.name.startswith(f"class-{subject.seed}-")
    }
    return photos | data_digests((str(path.resolve()), [path], None) for path in sorted(given))


def files_of(photo: Photo) -> list[Path]:
    """A photo, and its mask if that is another file."""
    return [photo.path] if photo.mask in (None, photo.path) else [photo.path, photo.mask]


def trained_as(prompt: str, subject: Subject, concept: Concept) -> list[Any]:
    """What a photo is trained with."""
    counts = [] if (concept.repeats, concept.weight) == (1, 1.0) else [concept.repeats, concept.weight]
    return [prompt, subject.seed, concept.class_prompt, *counts]


def attach_adapters(
    models: dict[str, Any],
    subjects: Sequence[Subject],
    args: argparse.Namespace,
    compute_device: "torch.device | None" = None,
    start: "InitialAdapter | None" = None,
) -> dict[str, "Adapter"]:
    """Attach adapters to the denoiser and to the text encoders that are trained; returns them by component.

    Args:
        models: the denoiser and those text encoders, by component.
        compute_device: where the denoiser computes, if its weights are offloaded.
        start: the adapter to start from.
    """
    import torch

    from delora_diffusers import attach

    generators = [torch.Generator().manual_seed(subject.seed) for subject in subjects]
    (name, denoiser), *text_encoders = models.items()
    adapters = {name: attach(denoiser, arguments.adapter_config(args), generators, compute_device)}
    for number, (name, text_encoder) in enumerate(text_encoders, start=1):
        targets = start.targets_of_encoder(name, TEXT_ENCODER_TARGETS) if start else TEXT_ENCODER_TARGETS
        config = arguments.adapter_config(args, targets=targets)
        adapters[name] = attach(text_encoder, config, torch.Generator().manual_seed(args.seed + number))
    if start is not None:
        start.copy_into(adapters, models)
    return adapters


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    args = with_rendered_photos(args)
    prompts = [with_instance(text, args.instance_name, "--validation_prompt") for text in args.validation_prompt]
    args.validation_prompt = prompts
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

    from delora_diffusers.families.checks import check_patches
    from delora_diffusers.families.pipeline_files import family_named
    from delora_diffusers.pipelines.conditions import (
        conditions,
        count_chunks,
        first_chunks,
        tokenize,
        warn_of_truncation,
    )
    from delora_diffusers.pipelines.offload import offload_blocks
    from delora_diffusers.training.adapter_files import AdapterFiles
    from delora_diffusers.training.batches import SubjectBatches, SubjectData
    from delora_diffusers.training.class_images import ClassImages, generate_class_images
    from delora_diffusers.training.encoding import PromptTable
    from delora_diffusers.training.held_out import BestAdapter, HeldOutLoss
    from delora_diffusers.training.init_adapter import adapter_digest, read_initial_adapter
    from delora_diffusers.training.loop import train
    from delora_diffusers.training.memory_report import plan_of, report_memory
    from delora_diffusers.training.objective import Losses
    from delora_diffusers.training.photos import check_masks, class_image_sizes, encode_concepts
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
    args = with_family_defaults(args, family)
    trained_on, held_out = split_photos(args, subjects)
    others = held_out if args.validation_data_dir is not None else []
    data = digest_data(args, subjects, others) | adapter_digest(args.init_adapter)
    subjects = trained_on
    accelerator = start_accelerator(args, data)
    device = accelerator.device
    model, noising = open_base_model(accelerator, args)
    pipeline, denoiser = model.pipeline, model.family.DENOISER
    trained_encoders = model.trainable_encoders if args.train_text_encoder else []
    trained = [denoiser, *trained_encoders]
    start = read_initial_adapter(args, model)
    # A rehearsal on models without values finds what does not fit the base model.
    attach_adapters({name: copy.deepcopy(model.skeletons[name]) for name in trained}, subjects, args, start=start)
    if args.cuda_graph:
        dropped = [model.family.NO_PROMPT] * (args.caption_dropout > 0)
        check_prompt_lengths(model, trained_prompts(args, subjects) + dropped)
    for subject in subjects:
        photos = [photo for concept in subject.concepts for photo in concept.photographs]
        check_masks(photos, subject.seed, args, model.patch_pixels)
    trained_chunks = count_trained_chunks(args, subjects, pipeline)
    for flag in ("validation_width", "validation_height"):
        check_patches(model.patch_pixels, getattr(args, flag) or args.resolution, flag)
    similarity = None
    if args.keep_best == "dino":
        from eval.metrics.similarity import MINIATURE_DINO, DinoSimilarity

        dino = args.dino or (MINIATURE_DINO if is_miniature(args.pretrained_model_name_or_path) else None)
        photos = [photo.load() for concept in subjects[0].concepts for photo in concept.photographs]
        similarity = DinoSimilarity(photos, dino, device)
    report_memory(
        accelerator,
        model,
        plan_of(args, arguments.adapter_config(args), accelerator.mixed_precision, len(subjects), trained_chunks),
    )
    # All checks have passed, and nothing was written before this.
    begin_run(accelerator, args, data, "dreambooth-delora")

    # What stays constant during training is computed once, with one part of the model on the device at a time: prompt
    # embeddings, class images, latent posteriors.
    classes = [prompt for subject in subjects for prompt in subject.class_prompts]
    prompts = [prompt for subject in subjects for photo in prompts_of(subject, args) for prompt in photo] + classes
    prompts += [prompt for concept in held_out for prompt in concept.prompts]
    prompts = list(dict.fromkeys([*prompts, *args.validation_prompt, model.family.NO_PROMPT]))
    if accelerator.is_main_process:
        warn_of_truncation(pipeline, prompts, args.max_prompt_chunks)
    # Validation prompts may change when a run is resumed, so they do not decide how prompts are padded in training.
    validation_chunks = count_chunks(
        pipeline, [*args.validation_prompt, model.family.NO_PROMPT], args.max_prompt_chunks
    )
    chunks = max(trained_chunks, validation_chunks)
    encoded: dict[str, torch.Tensor] = {}
    of_base_model = args.with_prior_preservation or args.with_output_preservation
    for name in model.text_encoders:
        if of_base_model or name not in trained_encoders:
            encoded |= encode_with(model, name, accelerator, prompts, chunks)
    config = model.skeletons[denoiser].config
    if of_base_model or not args.train_text_encoder:
        encoded_prompts = conditions(pipeline, encoded, config)
        base_table = PromptTable(prompts, first_chunks(encoded_prompts, trained_chunks, chunks))
    if args.with_prior_preservation:
        wanted: dict[Path, ClassImages] = {}
        for subject in subjects:
            sizes = class_image_sizes(subject.concepts, args, model.patch_pixels)
            for number, prompt in enumerate(subject.class_prompts):
                folder = subject.class_folder(number)
                wanted.setdefault(folder, ClassImages(folder, prompt, subject.seed, sizes[number]))
        generate_class_images(accelerator, model, list(wanted.values()), base_table, args)
    load_part(model, "vae", accelerator, torch.float32)
    encoded_subjects = []
    for subject in subjects:
        class_images = None
        if args.with_prior_preservation:
            folders = [subject.class_folder(number) for number in range(len(subject.concepts))]
            class_images = [find_photographs(folder)[: args.num_class_images] for folder in folders]
        photo_prompts = prompts_of(subject, args)
        buckets = encode_concepts(model, subject.concepts, photo_prompts, class_images, subject.seed, args, device)
        encoded_subjects.append(SubjectData(subject.seed, buckets))
    whole = argparse.Namespace(**vars(args) | {"center_crop": True, "random_flip": False})
    held_out_prompts = [(prompt,) for concept in held_out for prompt in concept.prompts]
    held_out_buckets = encode_concepts(model, held_out, held_out_prompts, None, args.seed, whole, device)
    if args.validation_prompt:
        pipeline.vae.to("cpu", training_dtype(accelerator))
    else:
        model.drop("vae")

    models = {name: load_text_encoder_to_train(model, name, accelerator, args) for name in trained_encoders}
    models = {denoiser: load_denoiser_to_train(model, accelerator, args), **models}
    adapters = attach_adapters(models, subjects, args, device if args.offload else None, start)
    if args.offload:
        offload_blocks(models[denoiser], device)
    if args.train_text_encoder:
        outputs = {n: tensor for n, tensor in encoded.items() if n.partition("/")[0] not in trained_encoders}
        table, validation_table = (
            PromptTable(prompts, outputs | tokenize(pipeline, prompts, device, trained_encoders, count))
            for count in (trained_chunks, validation_chunks)
        )
        conditions_of: Conditions = TrainedConditions(pipeline, validation_table, config)
    else:
        table = base_table
        conditions_of = PromptTable(prompts, first_chunks(encoded_prompts, validation_chunks, chunks)).lookup

    batches = SubjectBatches(
        noising,
        encoded_subjects,
        table,
        args.train_batch_size,
        args.prior_loss_weight,
        device,
        args.output_preservation_weight if args.with_output_preservation else None,
        base_table if args.with_output_preservation and args.train_text_encoder else None,
        args.caption_dropout,
        model.family.NO_PROMPT,
    )
    trained_pipeline = pipeline if args.train_text_encoder else None
    losses = Losses(model.family, models[denoiser], len(subjects), trained_pipeline, loss_type=args.loss_type)
    settings = [args]
    if args.subjects_file is not None:
        settings = [argparse.Namespace(**vars(args) | subject.flag_overrides()) for subject in subjects]
    files = AdapterFiles(
        adapters, settings, [s.instance_prompt for s in subjects], {"pipeline": type(pipeline).__name__}
    )
    loss = None
    if held_out:
        loss = HeldOutLoss(held_out_buckets, noising, table, losses, args.train_batch_size, device)
    best = BestAdapter(files, args.keep_best) if args.keep_best else None
    readings = (loss, similarity, best)
    validate = None
    if args.validation_prompt or loss is not None:
        validate = SubjectValidation(accelerator, pipeline, conditions_of, args, args.validation_prompt, *readings)
    shapes = {"same_length": batches.have_same_length, "examples": batches.examples}
    failed = train(accelerator, adapters, batches, losses, args, validate, files=files, **shapes)
    for number, subject in enumerate(subjects):
        if number not in failed:
            save_run(accelerator, files, number, f"{len(subject.prompts)} photos", data)
    accelerator.end_training()
    if failed:
        steps = ", ".join(f"{subjects[number].output_dir} at step {step}" for number, step in failed.items())
        raise InputError(f"the loss was not finite for {steps}; lower --learning_rate (the other adapters are saved).")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
