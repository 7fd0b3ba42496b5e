"""What ``generate`` makes: the requests that its flags describe, and the batches of images that are missing."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from delora_diffusers.commands.arguments import weighted_adapters
from delora_diffusers.errors import InputError
from delora_diffusers.names import INSTANCE, MINIATURE
from delora_diffusers.text_files import is_text, read_lines

if TYPE_CHECKING:
    from delora_diffusers.pipelines.adapted_pipeline import BaseModel
    from delora_diffusers.pipelines.encoded_prompts import EncodedPrompts

OPTION = re.compile(r"(?<!\S)--[A-Za-z]{1,3}(?!\S)")
"""An option inside a prompt, such as ``--w 512`` in the prompt files of sd-scripts."""
Records = list[dict[str, Any]]
Planned = tuple[Any, Records]
"""A ``Request`` and the records of all its images; see ``files/records.py``."""


class Batch(NamedTuple):
    """Images that are generated together.

    Attributes:
        request: the ``Request`` that they belong to.
        records: of all images of the batch. missing: of those that are written.
    """

    request: Any
    records: Records
    missing: Records


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts from ``--prompt`` or ``--prompts_file``, without blank lines and lines that start with #.

    Raises:
        InputError: the file is missing or contains no prompt, or a prompt has a placeholder or an option.
    """
    prompts = _given_prompts(options)
    if any(INSTANCE in prompt for prompt in prompts):
        raise InputError(f"a prompt contains {INSTANCE}, which stands for a name in training only; write the name.")
    return prompts


def _given_prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        broken = next((prompt for prompt in options.prompt if not is_text(prompt)), None)
        if broken is not None:
            raise InputError(f"--prompt {broken!r} is not UTF-8; set the terminal's encoding, or use --prompts_file.")
        return options.prompt
    if not options.prompts_file.is_file():
        raise InputError(
            f"--prompts_file {options.prompts_file} is not a file; give a text file with one prompt per line."
        )
    prompts = []
    for number, line in read_lines(options.prompts_file):
        if line.startswith("#"):
            continue
        option = OPTION.search(line)
        if option:
            raise InputError(
                f"--prompts_file {options.prompts_file}, line {number}: {option[0]} would be read as words of the "
                "prompt; take it out, and give sizes, seeds and the like as flags."
            )
        prompts.append(line)
    if not prompts:
        raise InputError(f"--prompts_file {options.prompts_file} contains no prompt; write one prompt per line.")
    return prompts


def build_requests(options: argparse.Namespace) -> list[Any]:
    """The requests described by the flags or by ``--requests_file``.

    Raises:
        InputError: flags that cannot be combined, or an invalid file.
    """
    from delora_diffusers.files.records import Request, read_requests

    by_name: dict[str, float] = {}
    for strength in options.strength:
        by_name.setdefault(f"{strength:g}", strength)  # as in the names of images
    strengths = tuple(by_name.values())
    if options.requests_file is not None:
        for flag in ("adapter", "adapter_weights", "output_dir"):
            if getattr(options, flag):
                raise InputError(f"--{flag} cannot be combined with --requests_file; leave out one of them.")
        return read_requests(options.requests_file, options.seed, strengths)
    if options.output_dir is None:
        raise InputError("no folder for the images was given; specify one with --output_dir.")
    prompts = [] if options.map_dir is not None else read_prompts(options)
    adapters = tuple(weighted_adapters(options))
    if not adapters and strengths != (1.0,):
        raise InputError(
            "--strength scales the update of an adapter, and none is given; add --adapter, or leave it out."
        )
    return [Request(adapters, tuple(prompts), options.output_dir, options.seed, strengths)]


def check_maps(options: argparse.Namespace, requests: list[Any]) -> bool:
    """Whether the adapter follows maps.

    Raises:
        InputError: maps are given to an adapter that does not follow maps, or the other way round.
    """
    from delora_diffusers.files.reading import read_header

    paths = [path for request in requests for path, _ in request.adapters]
    following = [path for path in paths if "control_encoder" in read_header(path)]
    if following and options.map_dir is None:
        raise InputError(f"{following[0]} was trained to follow maps; give a folder of maps with --map_dir.")
    if options.map_dir is not None and paths and not following:
        raise InputError(f"{paths[0]} was not trained to follow maps; give --prompt instead of --map_dir.")
    return bool(following)


def plan_images(requests: list[Any], options: argparse.Namespace, base_model: "BaseModel") -> list[Planned]:
    """The records of all images of each request.

    Raises:
        InputError: a folder contains images of other prompts, maps or settings.
    """
    from delora_diffusers.files.records import check_same_images, plan

    prediction = {
        flag: value
        for flag in ("prediction_type", "rescale_betas_zero_snr")
        if (value := getattr(base_model, flag)) is not None
    }
    planned = [(request, plan(request, options, base_model.name or MINIATURE, prediction)) for request in requests]
    for request, records in planned:
        check_same_images(request.output_dir, records)
    return planned


def missing_batches(planned: list[Planned], size: int) -> list[Batch]:
    """The batches with at least one image that is still to generate, each at a single strength.

    They are the same wherever an earlier run stopped, because the last bits of an image depend on its batch.
    """
    from delora_diffusers.files.records import is_done

    batches = []
    for request, records in planned:
        for strength in request.strengths:
            at_strength = [record for record in records if record["strength"] == strength]
            for start in range(0, len(at_strength), size):
                batch = at_strength[start : start + size]
                missing = [record for record in batch if not is_done(request.output_dir, record)]
                if missing:
                    batches.append(Batch(request, batch, missing))
    return batches


def check_palette(adapter: Path, batches: list[Batch]) -> None:
    """Check every map that will be used against the palette that the adapter was trained with.

    Raises:
        InputError: a map does not fit the palette.
    """
    from delora_diffusers.files.reading import read_header
    from delora_diffusers.maps import paint, read_map

    palette = read_header(adapter)["control_encoder"]["palette"]
    for source in dict.fromkeys(record["map_source"] for batch in batches for record in batch.records):
        paint(read_map(Path(source), source), palette, source)


def of_equal_length(batch: Batch, prompts: "EncodedPrompts") -> list[Batch]:
    """A batch by the number of chunks of its prompts, so that an image does not depend on the other prompts."""
    parts: dict[int, Records] = {}
    for record in batch.records:
        parts.setdefault(prompts.chunks_of(record["prompt"]), []).append(record)
    of_parts = [Batch(batch.request, part, [r for r in part if r in batch.missing]) for part in parts.values()]
    return [part for part in of_parts if part.missing]


def scaled(batch: Batch) -> list[tuple[Path, float]]:
    """The adapters of a batch with their weights times its strength."""
    return [(path, weight * batch.records[0]["strength"]) for path, weight in batch.request.adapters]
