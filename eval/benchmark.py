"""Run a whole benchmark: train every subject, draw its prompts, score, and write tables and a page to look at.

Each step is skipped where its result is there and whole, so the same command continues a run that was stopped. Under
``accelerate launch`` the subjects are spread over the processes, one GPU each.
"""

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import Benchmark, Subject, find_subjects, load_benchmark, render_subjects
from data.errors import InputError
from data.photographs import find_photographs
from eval import report, running
from eval.dreambooth import read_generated
from eval.protocols import PRECISIONS, PROTOCOLS, Protocol
from eval.scores import IDENTIFIERS, without_identifier

METHODS = ("delora", "lora", "none")
LPIPS = ("alex", "vgg", "squeeze", "none")
PACKAGES = ("accelerate", "diffusers", "open_clip_torch", "pillow", "timm", "torch", "torchvision", "transformers")
LONGEST_WAIT = datetime.timedelta(days=14)
"""For the slowest process, before the others give up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", help="dreambooth, toybox or a YAML file in the same form")
    parser.add_argument("--output_dir", type=Path, required=True, help="the results folder, its own record")
    parser.add_argument("--photographs", type=Path, help="holds a folder for each subject; toybox renders its own")
    group = parser.add_argument_group("what is trained and drawn")
    group.add_argument("--pretrained_model_name_or_path", help="base model; by default the miniature, for toybox")
    group.add_argument("--method", choices=METHODS, default="delora", help="none draws with the base model")
    group.add_argument("--train", nargs="+", default=[], metavar="FLAG=VALUE", help="of the training: rank=16")
    group.add_argument("--generate", nargs="+", default=[], metavar="FLAG=VALUE", help="num_inference_steps=25")
    group.add_argument("--seeds", type=int, default=1, help="trainings of each subject, seeds 0, 1, ...")
    group.add_argument("--subjects", nargs="+", help="only these")
    group.add_argument("--jobs", type=int, default=1, help="subjects at once in each process")
    group.add_argument("--generated_dir", type=Path, help="score pictures that are there, SUBJECT/metadata.jsonl")
    group = parser.add_argument_group("how it is scored")
    group.add_argument("--protocol", nargs="+", choices=sorted(PROTOCOLS), help="by default delora, toybox for toys")
    group.add_argument("--dino", help="another DINO: timm name, hf-hub:ID or local-dir:FOLDER")
    group.add_argument("--clip", help="another CLIP: open_clip name, hf-hub:ID or local-dir:FOLDER")
    group.add_argument("--lpips", choices=LPIPS, help="backbone; by default alex, none for toybox")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoders")
    group.add_argument("--batch_size", type=int, default=64, help="of the encoders")
    group.add_argument("--workers", type=int, help="processes that decode pictures")


def pairs(typed: Sequence[str], flag: str) -> dict[str, object]:
    """``rank=16 center_crop`` as flags and values.

    Raises:
        InputError: something that is no FLAG=VALUE.
    """
    found: dict[str, object] = {}
    for word in typed:
        name, equals, value = word.lstrip("-").partition("=")
        if not name.isidentifier():
            raise InputError(f"{flag} {word} is not FLAG=VALUE; write for example {flag} seed=1.")
        found[name] = value if equals else True
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: which subjects, whose photographs, what is made, in which folders.

    Attributes:
        photographs: by subject. made: the settings that the pictures depend on.
    """

    benchmark: Benchmark
    folder: Path
    photographs: dict[str, list[Path]]
    made: dict[str, Any]

    @property
    def seeds(self) -> range:
        return range(self.made["seeds"])

    def place(self, subject: Subject, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / subject.name

    def base(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / ".base"

    def drifts(self) -> bool:
        """Whether pictures without the subject are drawn and compared."""
        return self.made["method"] != "none" and bool(self.benchmark.drift_prompts)


def check(options: argparse.Namespace) -> Plan:
    """Refuse bad input before anything is made; render the toys, if they are the subjects.

    Raises:
        InputError
    """
    benchmark = load_benchmark(options.benchmark)
    for flag in ("seeds", "jobs", "batch_size"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    if options.subjects:
        known = {subject.name for subject in benchmark.subjects}
        unknown = [name for name in options.subjects if name not in known]
        if unknown:
            raise InputError(f"--subjects {unknown[0]}: {benchmark.name} has {', '.join(sorted(known))}.")
        kept = tuple(subject for subject in benchmark.subjects if subject.name in options.subjects)
        benchmark = dataclasses.replace(benchmark, subjects=kept)
    toys = all(subject.toybox is not None for subject in benchmark.subjects)
    if options.photographs is None:
        if not toys:
            raise InputError(f"{benchmark.name} has no photographs of its own; name their folder with --photographs.")
        options.photographs = options.output_dir / "photographs"
        render_subjects(benchmark, options.photographs)
    if options.pretrained_model_name_or_path is None and not toys and options.generated_dir is None:
        raise InputError(f"{benchmark.name} needs a base model; name it with --pretrained_model_name_or_path.")
    options.protocol = options.protocol or (["toybox"] if toys else ["delora"])
    options.lpips = options.lpips or ("none" if options.protocol == ["toybox"] else "alex")
    found = find_subjects(benchmark, options.photographs)
    if found.missing:
        raise InputError(
            f"{options.photographs} holds no photographs of {', '.join(found.missing)}; add them, or name the others "
            "with --subjects."
        )
    photographs = {}
    for subject in benchmark.subjects:
        folder = options.photographs / subject.name
        photographs[subject.name] = [photograph.path for photograph in find_photographs(folder)]
        if len(photographs[subject.name]) < 2:
            raise InputError(f"{folder} holds one photograph; real images are scored in pairs, so add another.")
    if not running.TRAINING_SCRIPT.is_file() and options.generated_dir is None:
        raise InputError(f"{running.TRAINING_SCRIPT} is missing; run benchmarks from a clone of the repository.")
    made = {
        "benchmark": dataclasses.asdict(dataclasses.replace(benchmark, subjects=())),
        "photographs": {name: _content(paths) for name, paths in photographs.items()},
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "method": options.method,
        "train": pairs(options.train, "--train"),
        "generate": pairs(options.generate, "--generate"),
        "seeds": options.seeds,
    }
    if options.generated_dir is not None:
        if options.train or options.generate or options.seeds != 1:
            raise InputError(
                "--generated_dir scores pictures that are there; --train, --generate and --seeds make them."
            )
        made |= {"generated_dir": str(options.generated_dir), "method": "none"}
    return Plan(benchmark, options.output_dir, photographs, made)


def _content(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_settings(plan: Plan, options: argparse.Namespace) -> None:
    """Record what is asked, and with which versions and commit this start of the run works.

    More subjects and more seeds continue a run.

    Raises:
        InputError: the folder holds a run with other settings, or something else.
    """
    file = plan.folder / "settings.json"
    made = json.loads(json.dumps(plan.made))
    starts: list[Any] = []
    if file.is_file():
        before = json.loads(file.read_text())
        starts = before["starts"]
        for name, value in made.items():
            old = before["made"].get(name)
            if name == "photographs":
                other = [n for n in value if old.get(n, value[n]) != value[n]]
                if other:
                    raise InputError(
                        f"the photographs of {other[0]} are not those {plan.folder} was made with; name another --output_dir."
                    )
                made[name] = old | value
            elif name != "seeds" and old != value:
                raise InputError(
                    f"{plan.folder} was made with {name} {json.dumps(old)}, not {json.dumps(value)}; name another "
                    "--output_dir."
                )
    elif plan.folder.is_dir() and any(path.name != "photographs" for path in plan.folder.iterdir()):
        raise InputError(f"--output_dir {plan.folder} holds something else; name a new folder.")
    scored = {name: getattr(options, name) for name in ("protocol", "dino", "clip", "lpips", "precision")}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    starts.append({"started": now, "git_commit": git_commit(), "versions": versions(), "command": sys.argv[1:]})
    _write(file, json.dumps({"made": made, "scored": scored, "starts": starts}, indent=2) + "\n")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit that runs, ``-dirty`` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(running.ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def tasks(plan: Plan) -> list[running.Task]:
    """Everything that is to be trained and drawn."""
    made, benchmark, found = plan.made, plan.benchmark, []
    base_model = {"pretrained_model_name_or_path": made["pretrained_model_name_or_path"]}
    for seed in plan.seeds:
        drawing = {"num_images": benchmark.images_per_prompt, "seed": 1000 * seed, **made["generate"]}
        if plan.drifts():
            prompts = dict.fromkeys(p for s in benchmark.subjects for p in benchmark.drift_prompts_of(s))
            step = running.drawing_step(plan.base(seed) / "pictures", list(prompts), base_model | drawing)
            found.append(running.Task(plan.base(seed), [step]))
        for subject in benchmark.subjects:
            folder, prompts = plan.place(subject, seed), benchmark.prompts_of(subject)
            steps, source = [], base_model
            if made["method"] != "none":
                values = base_model | {
                    "instance_data_dir": plan.photographs[subject.name][0].parent,
                    "instance_prompt": benchmark.instance_prompt(subject),
                    "method": made["method"],
                    "seed": seed,
                }
                steps.append(running.training_step(folder / "adapter", values | made["train"]))
                source = {"adapter": folder / "adapter"}
                prompts = prompts + benchmark.drift_prompts_of(subject)
            steps.append(running.drawing_step(folder / "pictures", prompts, source | drawing))
            found.append(running.Task(folder, steps))
    return found


def collect(plan: Plan, options: argparse.Namespace, failed: dict[str, str]) -> list[Any]:
    """What there is to score; a subject whose pictures are not all there is added to ``failed``."""
    from eval.results import Drawn

    words = [*IDENTIFIERS, plan.benchmark.identifier]
    given: Path | None = options.generated_dir
    if given is not None:
        if not given.is_dir():
            raise InputError(
                f"--generated_dir {given} is not a folder; name the one that holds a folder for each subject."
            )
        extra = sorted({p.name for p in given.iterdir() if p.is_dir()} - {s.name for s in plan.benchmark.subjects})
        if extra:
            raise InputError(f"{given} holds {', '.join(extra)}, no subject of {plan.benchmark.name}; remove it.")
    found = []
    for seed in plan.seeds:
        base = {}
        if plan.drifts() and str(plan.base(seed)) not in failed:
            base = _by_prompt(read_generated(plan.base(seed) / "pictures"))
        for subject in plan.benchmark.subjects:
            place = plan.place(subject, seed)
            if str(place) in failed:
                continue
            try:
                drawn = _by_prompt(read_generated(place / "pictures" if given is None else given / subject.name), words)
                pictures = _pictures_of(plan.benchmark, subject, drawn, words)
            except InputError as error:
                failed[str(place)] = str(error)
                continue
            drift = [
                pair
                for prompt in plan.benchmark.drift_prompts_of(subject)
                if prompt in base
                for pair in zip(drawn[without_identifier(prompt, words)], base[prompt])
            ]
            paths, prompts = [path for path, _ in pictures], [prompt for _, prompt in pictures]
            references = plan.photographs[subject.name]
            found.append(Drawn(subject.name, subject.class_name, seed, paths, prompts, references, drift))
    return found


def _by_prompt(generated: list[tuple[Path, str]], identifiers: Sequence[str] = ()) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path, prompt in generated:
        found.setdefault(without_identifier(prompt, identifiers) if identifiers else prompt, []).append(path)
    return found


def _pictures_of(
    benchmark: Benchmark, subject: Subject, drawn: dict[str, list[Path]], words: Sequence[str]
) -> list[tuple[Path, str]]:
    """(picture, prompt without identifier) of the subject's prompts in order.

    Raises:
        InputError: a prompt has fewer or more pictures than the benchmark asks for.
    """
    found = []
    for prompt in benchmark.prompts_of(subject):
        bare = without_identifier(prompt, words)
        paths = drawn.get(bare, [])
        if len(paths) != benchmark.images_per_prompt:
            wanted = benchmark.images_per_prompt
            raise InputError(f"{subject.name} has {len(paths)} pictures of {bare!r}, not {wanted}; draw them again.")
        found += [(path, bare) for path in paths]
    return found


class Scorers:
    """The models of one protocol."""

    def __init__(self, protocol: Protocol, options: argparse.Namespace, device: Any):
        from eval.encoders import ClipEncoder, DinoEncoder

        self.names = {"dino": options.dino or protocol.dino, "clip": options.clip or protocol.clip}
        dino = DinoEncoder(self.names["dino"], protocol.dino_transform, device, options.precision)
        pretrained = protocol.clip_pretrained
        clip = ClipEncoder(self.names["clip"], pretrained, device, protocol.clip_crop, options.precision)
        self.encoders: dict[str, Any] = {"dino": dino, "clip": clip}

    def described(self) -> dict[str, str]:
        transforms = {f"{key}_transform": str(encoder.transform) for key, encoder in self.encoders.items()}
        return self.names | transforms | {f"{k}_identity": e.identity for k, e in self.encoders.items()}


def score(plan: Plan, options: argparse.Namespace, accelerator: Any, failed: dict[str, str]) -> dict[str, Any] | None:
    """Encode on every process, then make the numbers on the first; None on the others."""
    import pandas as pd

    from eval.embedding import embed
    from eval.perceptual import Perceptual, perceptual_scores
    from eval.results import score as score_one
    from eval.results import summarize

    cache = plan.folder / "embeddings"
    settings = {"batch_size": options.batch_size, "workers": options.workers, "cache_dir": cache}
    perceptual = None if options.lpips == "none" else Perceptual(options.lpips, accelerator.device)
    drawn, kept = collect(plan, options, failed), []
    index, count = accelerator.process_index, accelerator.num_processes
    scorers = {name: Scorers(PROTOCOLS[name], options, accelerator.device) for name in options.protocol}
    for one in scorers.values():
        files = list(dict.fromkeys(path for d in drawn for path in d.files()))[index::count]
        try:
            embed(files, one.encoders, **settings)
        except InputError:
            pass  # the first process says which subject it belongs to
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    features = []
    for d in drawn:
        try:
            features.append({name: embed(d.files(), one.encoders, **settings) for name, one in scorers.items()})
            kept.append(d)
        except InputError as error:
            failed[str(plan.folder / f"seed-{d.seed}" / d.subject)] = str(error)
    if not kept:
        raise InputError(f"no subject could be scored; the first problem: {next(iter(failed.values()), 'none drawn')}")
    templates = _templates(plan.benchmark)
    perceived = []
    for d in kept:
        groups = [[d.pictures[i] for i in group] for group in d.groups()]
        perceived.append(None if perceptual is None else perceptual_scores(perceptual, groups, d.references))
    summary: dict[str, Any] = {"benchmark": plan.benchmark.name, "method": plan.made["method"], "failed": failed}
    summary["references"] = {name: [_within(plan.folder, p) for p in paths] for name, paths in plan.photographs.items()}
    summary["protocols"], all_pictures, all_subjects = {}, [], []
    for name, one in scorers.items():
        prompts = list(dict.fromkeys(prompt for d in kept for prompt in d.prompts))
        texts = dict(zip(prompts, one.encoders["clip"].encode_texts(prompts).cpu()))
        scored = []
        for d, found, seen in zip(kept, features, perceived):
            dino, clip = (dict(zip(d.files(), found[name][key])) for key in ("dino", "clip"))
            scored.append(score_one(d, dino, clip, texts, seen))
        pictures = pd.concat([rows for rows, _ in scored], ignore_index=True)
        pictures.insert(0, "protocol", name)
        pictures["template"] = [templates[s, p] for s, p in zip(pictures["subject"], pictures["prompt"])]
        subjects = pd.DataFrame([row for _, row in scored])
        subjects.insert(0, "protocol", name)
        summary["protocols"][name] = summarize(subjects, pictures) | {
            "source": PROTOCOLS[name].source,
            "models": one.described() | {"lpips": options.lpips, "precision": options.precision},
        }
        all_pictures.append(pictures)
        all_subjects.append(subjects)
    _write_scores(plan.folder, pd.concat(all_pictures), pd.concat(all_subjects), summary)
    return summary


def _templates(benchmark: Benchmark) -> dict[tuple[str, str], str]:
    """The prompt as the benchmark has it, by (subject, prompt without identifier)."""
    words = [*IDENTIFIERS, benchmark.identifier]
    return {
        (subject.name, without_identifier(prompt, words)): without_identifier(
            template.replace("{identifier}", benchmark.identifier), words
        )
        for subject in benchmark.subjects
        for template, prompt in zip(benchmark.prompts[subject.kind], benchmark.prompts_of(subject))
    }


def _within(folder: Path, path: Path) -> str:
    """A file's name from the results folder where it lies there, its whole path elsewhere."""
    root, path = folder.resolve(), path.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _write_scores(folder: Path, pictures: Any, subjects: Any, summary: dict[str, Any]) -> None:
    pictures["file"] = [_within(folder, Path(name)) for name in pictures["file"]]
    temporary = folder / f".scores.parquet.{os.getpid()}.part"
    pictures.reset_index(drop=True).to_parquet(temporary, index=False)
    temporary.replace(folder / "scores.parquet")
    _write(folder / "subjects.csv", subjects.to_csv(index=False))
    _write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def run(options: argparse.Namespace) -> None:
    plan = check(options)

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, gather_object

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    if accelerator.is_main_process:
        write_settings(plan, options)
        for name in options.protocol:
            Scorers(PROTOCOLS[name], options, "cpu")
        if options.lpips != "none":
            from eval.perceptual import Perceptual

            Perceptual(options.lpips, "cpu")
    accelerator.wait_for_everyone()
    failed: dict[str, str] = {}
    if options.generated_dir is None:
        waiting = [task for task in tasks(plan) if not task.is_done()]
        accelerator.wait_for_everyone()  # every process has looked before the first one writes
        index, count = accelerator.process_index, accelerator.num_processes
        on_gpu = accelerator.device.type == "cuda"
        environment = running.child_environment(options.jobs, count, accelerator.local_process_index, on_gpu)
        mine = running.run_tasks(waiting[index::count], options.jobs, environment, accelerator.is_local_main_process)
        for path, problem in gather_object(list(mine.items())):
            failed[path] = problem
    accelerator.wait_for_everyone()
    summary = score(plan, options, accelerator, failed)
    if summary is None:
        return
    page = report.write([plan.folder], plan.folder / "index.html", overwrite=True)
    print(report.terminal(plan.folder))
    print(f"wrote {page}; open it in a browser")
    if failed:
        for place, problem in failed.items():
            print(f"failed: {place}: {problem}", file=sys.stderr)
        sys.exit(f"error: {len(failed)} failed and are in no mean; run the same command again to try them anew.")
