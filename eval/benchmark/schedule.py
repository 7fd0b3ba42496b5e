"""Divide benchmark runs into tasks: the commands that train and generate everything that is missing."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from eval.benchmark.plan import Plan
from eval.benchmark.tasks import ClassImages, SubjectCommands, SubjectRun, Task, in_order


def class_image_tasks(plans: Sequence[Plan]) -> list[Task]:
    """The tasks that generate the class images that are missing, each class once."""
    missing: dict[Path, ClassImages] = {}
    for plan in plans:
        for subject in () if plan.class_images is None or plan.gives_class_images else plan.benchmark.subjects:
            prompt = plan.benchmark.class_prompt(subject)
            images = ClassImages(plan.class_folder(subject), prompt, plan.class_generation())
            if not images.is_done():
                missing[images.folder] = images
    return [images.task() for images in missing.values()]


def tasks(plan: Plan, together: int = 1, failed: Collection[str] = ()) -> list[Task]:
    """The tasks that train and generate everything that is missing.

    Args:
        together: how many subjects and seeds one command trains on one model; full fine-tuning needs a model for each.
        failed: subjects' folders for which nothing is done.
    """
    settings, benchmark = plan.settings, plan.benchmark
    base_model = {"pretrained_model_name_or_path": settings["pretrained_model_name_or_path"]}
    generation = base_model | {"num_images": benchmark.images_per_prompt, **settings["generate"]}
    seed_flag = generation.pop("seed", None)
    base_runs, subject_runs = [], []
    for seed in plan.seeds:
        image_seed = int(seed_flag) if seed_flag is not None else 1000 * seed
        if plan.measures_drift():
            prompts = dict.fromkeys(p for s in benchmark.subjects for p in benchmark.drift_prompts_of(s))
            base_runs.append(SubjectRun(plan.base_folder(seed), None, list(prompts), image_seed))
        for subject in benchmark.subjects:
            folder, prompts = plan.subject_folder(subject, seed), benchmark.prompts_of(subject)
            if str(folder) in failed:
                continue
            if settings["method"] == "none":
                base_runs.append(SubjectRun(folder, None, prompts, image_seed))
                continue
            flags = {
                "instance_data_dir": plan.photographs[subject.name][0].parent,
                "instance_prompt": benchmark.instance_prompt(subject),
                "seed": seed,
            }
            if plan.class_images is not None:
                flags |= {
                    "class_prompt": benchmark.class_prompt(subject),
                    "class_data_dir": plan.class_folder(subject),
                }
            prompts = prompts + benchmark.drift_prompts_of(subject)
            steps = [step for step in plan.steps if step is not None]
            subject_runs.append(SubjectRun(folder, flags, prompts, image_seed, steps, plan.strengths))
    # Square crops, as in the published protocols; subjects that are trained at once need photos of one size.
    training = base_model | {"method": settings["method"], "square": True, **settings["train"]}
    if "score_every" in settings:
        training |= {"checkpointing_steps": settings["score_every"], "keep_checkpoint_adapters": True}
    tasks_left = [SubjectCommands(run.folder, [run], {}, generation).task() for run in base_runs if not run.is_done()]
    # An adapter records its base model, so generate needs no flag for it.
    generation = {name: value for name, value in generation.items() if name not in base_model}
    remaining = [run for run in subject_runs if not run.is_done()]
    size = 1 if settings["method"] == "full" else together
    for runs in [remaining[i : i + size] for i in range(0, len(remaining), size)]:
        names = " ".join(str(run.folder.relative_to(plan.folder)) for run in runs)
        digest = hashlib.sha256(names.encode()).hexdigest()[:12]
        folder = plan.folder / "together" / digest if len(runs) > 1 else runs[0].folder
        shorter = None if plan.continues is None else plan.continues.folder / folder.relative_to(plan.folder)
        tasks_left.append(SubjectCommands(folder, runs, training, generation, shorter).task())
    return tasks_left


def tasks_of_all(plans: Sequence[Plan], together: int, failed: Collection[str] = ()) -> list[Task]:
    """The tasks of several runs, each folder once; a run that continues another follows it in the same task."""
    by_folder: dict[Path, list[Task]] = {}
    for plan in {plan.folder: plan for plan in plans}.values():
        first = plan
        while first.continues is not None:
            first = first.continues
        for task in tasks(plan, together, failed):
            if not task.folder.is_relative_to(plan.folder):  # the base model's images, which several runs share
                by_folder[task.folder] = [task]
                continue
            by_folder.setdefault(first.folder / task.folder.relative_to(plan.folder), []).append(task)
    return [in_order(chain) for chain in by_folder.values()]
