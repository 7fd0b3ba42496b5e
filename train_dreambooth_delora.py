"""DreamBooth with DeLoRA: teach Stable Diffusion one subject from a few photographs.

    accelerate launch train_dreambooth_delora.py                      # the shipped miniature, on a toy of its world

    accelerate launch train_dreambooth_delora.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir PHOTOS --instance_prompt "a photo of sks dog" --output_dir OUT

With --subjects_file many subjects are trained at once on one frozen model, each to the adapter that it gets alone.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import InputError as DataError
from data.photographs import EXTENSIONS, Photograph, find_photographs, variants, view_sizes
from data.subjects import Subject, read_subjects
from delora_diffusers.base_model import check_model_folder, is_miniature
from delora_diffusers.config import TEXT_ENCODER_TARGETS
from delora_diffusers.errors import InputError
from delora_diffusers.training import arguments


def parse_arguments(typed: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("subject")
    group.add_argument("--instance_data_dir", type=Path, help="folder of photographs, with captions or without")
    group.add_argument("--instance_prompt", help="prompt of every photograph without a caption: a photo of sks dog")
    group.add_argument(
        "--subjects_file", type=Path, help="many subjects at once, a line of JSON for each: see docs/training.md"
    )
    group.add_argument("--center_crop", action="store_true", help="instead of random crops along the long side")
    group.add_argument("--random_flip", action="store_true")
    group.add_argument("--train_text_encoder", action="store_true", help="adapt the text encoder's attention too")
    group.add_argument("--validation_prompt", nargs="+", default=[], help="one or several prompts")
    group = parser.add_argument_group("prior preservation")
    group.add_argument("--with_prior_preservation", action="store_true")
    group.add_argument("--class_data_dir", type=Path, help="by default class_images in the output folder")
    group.add_argument("--class_prompt", help="a photo of a dog")
    group.add_argument("--num_class_images", type=arguments.positive_int, default=100)
    group.add_argument("--prior_loss_weight", type=float, default=1.0)
    group.add_argument("--sample_batch_size", type=arguments.positive_int, default=4, help="for class images")
    arguments.add_adapter_arguments(parser)
    arguments.add_training_arguments(parser)
    return arguments.parse_with_config(parser, typed)


def check(args: argparse.Namespace) -> list[Subject]:
    """Refuse bad input before anything is loaded; return the subjects."""
    miniature = is_miniature(args.pretrained_model_name_or_path)
    rates = arguments.MINIATURE_SUBJECT_RATES if miniature else arguments.DEFAULT_LEARNING_RATES
    arguments.check_training_arguments(args, rates)
    check_model_folder(args.pretrained_model_name_or_path)
    if args.subjects_file is not None:
        subjects = check_subjects(args)
    else:
        if args.instance_data_dir is None:
            if not miniature:
                raise InputError("no photographs were given; name their folder with --instance_data_dir.")
            from data.toybox.__main__ import write_unseen_subject  # imports torch

            args.instance_data_dir = args.output_dir.with_name(f"{args.output_dir.name}-photographs")
            kind = write_unseen_subject(args.instance_data_dir)
            args.instance_prompt = args.instance_prompt or f"a photo of sks {kind}"
        photographs = find_photographs(args.instance_data_dir)
        own = (args.instance_data_dir, args.instance_prompt, args.output_dir, args.seed, args.class_prompt)
        subjects = [Subject(photographs, *own)]
    for subject in subjects:
        bare = [photograph.path for photograph in subject.photographs if photograph.caption is None]
        if bare and not subject.instance_prompt:
            raise InputError(f"{bare[0]} has no caption; give --instance_prompt, for example 'a photo of sks dog'.")
        if args.with_prior_preservation and not subject.class_prompt:
            raise InputError("--with_prior_preservation needs --class_prompt, for example 'a photo of a dog'.")
    return subjects


def check_subjects(args: argparse.Namespace) -> list[Subject]:
    """The subjects of ``--subjects_file``; refuses what several subjects at once do not have."""
    alone = ("instance_data_dir", "instance_prompt", "class_data_dir", "hub_model_id", "train_text_encoder")
    for flag in (*alone, "validation_prompt"):
        if getattr(args, flag):
            raise InputError(f"--{flag} is of one subject; leave it out, or leave out --subjects_file.")
    if args.mixed_precision == "fp16":
        raise InputError("fp16 scales the losses of all subjects together; use --mixed_precision bf16 or no.")
    subjects = read_subjects(args.subjects_file, args.seed, args.class_prompt)
    for subject in subjects:
        if subject.output_dir.resolve() == args.output_dir.resolve():
            raise InputError(f"--output_dir {args.output_dir} is also a subject's; checkpoints need one of their own.")
        arguments.check_output_dir(subject.output_dir, args.resume_from_checkpoint)
    return subjects


def make_class_images(accelerator, pipeline, subject: Subject, args: argparse.Namespace) -> list[Photograph]:
    """Draw the subject's class images that are missing, spread over the processes, and return all of them."""
    from tqdm.auto import tqdm

    from delora_diffusers.sampling import sample_pictures

    folder = args.class_data_dir or subject.output_dir / "class_images"
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())
    names = [folder / f"class-{subject.seed}-{number:05}.png" for number in range(args.num_class_images)]
    missing = [(n, path) for n, path in enumerate(names) if not path.exists()][
        : max(0, args.num_class_images - present)
    ]
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    batches = [mine[i : i + args.sample_batch_size] for i in range(0, len(mine), args.sample_batch_size)]
    for batch in tqdm(batches, desc="class images", disable=not accelerator.is_local_main_process or not batches):
        pictures = sample_pictures(
            pipeline,
            [subject.seed * 1_000_003 + number for number, _ in batch],
            args.resolution,
            prompt=[subject.class_prompt] * len(batch),
            num_inference_steps=args.validation_inference_steps,
        )
        for (_, path), picture in zip(batch, pictures):
            temporary = path.with_name(f".{path.name}.part")
            picture.save(temporary, format="PNG")
            temporary.replace(path)
    accelerator.wait_for_everyone()
    return find_photographs(folder)[: args.num_class_images]


def main(typed: list[str] | None = None) -> None:
    args = parse_arguments(typed)
    subjects = check(args)

    # Imported after the checks, which then answer at once.
    import torch

    from delora_diffusers import attach
    from delora_diffusers.conditions import encode_prompts, encode_tokens, is_xl, text_encoders, tokenize
    from delora_diffusers.training import order
    from delora_diffusers.training.encoding import crop_offsets, encode_pictures, index
    from delora_diffusers.training.loop import train
    from delora_diffusers.training.objective import denoising_losses, noised
    from delora_diffusers.training.setup import begin_run, load_frozen, save_run, start_accelerator
    from delora_diffusers.training.validation import validator

    accelerator = start_accelerator(args)
    device = accelerator.device
    pipeline, noise_scheduler = load_frozen(accelerator, args)
    unet, vae, kind = pipeline.unet, pipeline.vae, type(pipeline).__name__

    # The adapters; refused settings end here, before anything is written.
    starts = [torch.Generator().manual_seed(subject.seed) for subject in subjects]
    adapters = {"unet": attach(unet, arguments.adapter_config(args), starts)}
    if args.train_text_encoder:
        config = arguments.adapter_config(args, targets=TEXT_ENCODER_TARGETS)
        for number, (name, text_encoder) in enumerate(text_encoders(pipeline).items(), 1):
            adapters[name] = attach(text_encoder, config, torch.Generator().manual_seed(args.seed + number))
            if args.gradient_checkpointing:
                text_encoder.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
                text_encoder.train()
    begin_run(accelerator, args, "dreambooth-delora")

    # What never changes is computed once: class images, posteriors of the latents, embeddings of the prompts.
    vae.to(device)

    def cache(pictures: list[Photograph], seed: int):
        views = (
            variants(
                picture.load(),
                args.resolution,
                crop_offsets(seed, number, not args.center_crop),
                args.random_flip,
            )
            for number, picture in enumerate(pictures)
        )
        sizes = None
        if is_xl(pipeline):
            offsets = [crop_offsets(seed, number, not args.center_crop) for number in range(len(pictures))]
            told = [view_sizes(p.size(), args.resolution, o, args.random_flip) for p, o in zip(pictures, offsets)]
            sizes = [one for of_picture in told for one in of_picture]
        return encode_pictures(vae, views, len(pictures), device, sizes=sizes)

    instance_latents = [cache(subject.photographs, subject.seed) for subject in subjects]
    class_latents = []
    if args.with_prior_preservation:
        for adapter in adapters.values():
            adapter.strength = 0  # the base model draws them
        class_images = [make_class_images(accelerator, pipeline, subject, args) for subject in subjects]
        for adapter in adapters.values():
            adapter.strength = 1
        class_latents = [cache(images, subject.seed) for images, subject in zip(class_images, subjects)]
    of_subjects = [prompt for s in subjects for prompt in (*s.prompts, s.class_prompt or "")]
    prompts = list(dict.fromkeys([*of_subjects, *args.validation_prompt, ""]))
    conditions_of = functools.partial(encode_prompts, pipeline, device=device)
    place = {prompt: index for index, prompt in enumerate(prompts)}
    if args.train_text_encoder:
        cached_prompts = tokenize(pipeline, prompts, device)
    else:
        with torch.no_grad():
            cached_prompts = conditions_of(prompts)
        for name in text_encoders(pipeline):
            setattr(pipeline, name, None)

        def conditions_of(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
            return {name: tensor[[place[prompt] for prompt in prompts]] for name, tensor in cached_prompts.items()}

    vae.to("cpu")
    if not args.validation_prompt:
        pipeline.vae = vae = None

    def batch_of(microbatch: int) -> dict[str, torch.Tensor]:
        parts = [part_of(number, microbatch) for number in range(len(subjects))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]

    def part_of(number: int, microbatch: int) -> dict[str, torch.Tensor]:
        subject, cached = subjects[number], instance_latents[number]
        generator = order.generator(subject.seed, microbatch, device)
        seed = order.mixed_seed(subject.seed, microbatch, 1)
        chosen = order.sample_indices(subject.seed, microbatch, args.train_batch_size, len(cached))
        latents, sizes = cached.sample(chosen, generator, seed), cached.sizes_of(chosen, seed)
        texts, weights = [subject.prompts[index] for index in chosen], None
        if class_latents:
            prior = class_latents[number]
            others = order.sample_indices(subject.seed + 1, microbatch, args.train_batch_size, len(prior))
            latents = torch.cat((latents, prior.sample(others, generator, seed + 1)))
            sizes += prior.sizes_of(others, seed + 1)
            texts += [subject.class_prompt or ""] * len(others)
            # The two losses are each a mean over their half, and are added.
            weights = torch.tensor([2.0] * len(chosen) + [2.0 * args.prior_loss_weight] * len(others))
            weights = weights.to(device, non_blocking=True)
        batch = noised(noise_scheduler, latents, generator, weights, args.noise_offset, args.snr_gamma)
        if sizes:
            batch["time_ids"] = torch.cat(sizes)
        chosen_prompts = index([place[text] for text in texts], device)
        return batch | {name: tensor[chosen_prompts] for name, tensor in cached_prompts.items()}

    def losses_of(**batch: torch.Tensor) -> torch.Tensor:
        if args.train_text_encoder:
            batch |= encode_tokens(pipeline, {name: batch.pop(name) for name in cached_prompts})
        return denoising_losses(unet, **batch, subjects=len(subjects))  # pyright: ignore[reportArgumentType]

    validate = validator(accelerator, pipeline, conditions_of, args) if args.validation_prompt else None
    failed = train(accelerator, adapters, batch_of, losses_of, args, validate)
    for number, subject in enumerate(subjects):
        if number not in failed:
            own = argparse.Namespace(**vars(args) | subject.own_flags())
            trained_on = f"{len(subject.photographs)} photographs"
            save_run(accelerator, own, adapters, trained_on, subject.prompts[0], subject=number, pipeline=kind)
    accelerator.end_training()
    if failed:
        names = ", ".join(f"{subjects[number].output_dir} at step {step}" for number, step in failed.items())
        raise InputError(f"the loss was not finite for {names}; lower --learning_rate; the others are saved.")


if __name__ == "__main__":
    try:
        main()
    except (InputError, DataError) as error:
        sys.exit(f"error: {error}")
