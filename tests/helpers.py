"""Shared test helpers: small photos and maps, flags for short training runs, functions run in separate processes."""

import copy
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.palettes import generated_palette
from delora_diffusers import attach

ROOT = Path(__file__).parent.parent


def write_photos(folder: Path, count: int = 5) -> Path:
    """Write smooth coloured images of several sizes that share the same disc."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = (96, 128) if number % 2 else (112, 112)
        y, x = np.mgrid[:height, :width] / 100
        colours = random.uniform(0, 255, (2, 3))
        image = colours[0] * y[..., None] + colours[1] * (1 - x[..., None])
        image[(y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.08] = (230, 60, 20)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


def randomize(adapter, scale: float = 0.1) -> None:
    """Move an adapter's parameters away from their initial values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def training_flags(tiny_sd: Path, photographs: Path, output_dir: Path, *more: object) -> list[str]:
    """Flags for a short DreamBooth run; later flags override earlier ones. With a constant rate it can be prolonged."""
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--instance_data_dir", photographs]
    flags += ["--instance_prompt", "a photo of sks toy", "--output_dir", output_dir, "--resolution", 32, "--rank", 4]
    flags += ["--max_train_steps", 6, "--lr_scheduler", "constant", "--report_to", "none", *more]
    return [str(flag) for flag in flags]


def _child(function, arguments, reports) -> None:
    torch.set_num_threads(1)
    try:
        function(*arguments)
        reports.put(None)
    except SystemExit as stop:
        reports.put(f"SystemExit: {stop.code}")
    except BaseException:
        reports.put(traceback.format_exc())


@dataclasses.dataclass(frozen=True)
class Child:
    """A process that was started by ``start_in_child``."""

    process: Any
    reports: Any

    def error(self) -> str | None:
        """Wait for its end; returns its error, if there was one."""
        self.process.join()
        return f"it ended with {self.process.exitcode}" if self.reports.empty() else self.reports.get()

    def wait(self) -> int:
        """Wait for its end; returns its exit code and raises its error."""
        error = self.error()
        assert error is None or self.process.exitcode == -signal.SIGKILL, error
        return self.process.exitcode


def start_in_child(function, *arguments) -> Child:
    """Start a function in a new process with its imports already loaded."""
    # CUDA does not survive a fork, even if the parent process has only checked for a GPU.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    multiprocessing.set_forkserver_preload(
        ["train_dreambooth_delora", "diffusers", "torch", "accelerate", "tests.warm"]
    )
    reports = context.SimpleQueue()
    process = context.Process(target=_child, args=(function, arguments, reports))
    process.start()
    return Child(process, reports)


def run_in_child(function, *arguments) -> int:
    """Run a function in a new process with its imports already loaded; returns its exit code and raises its errors."""
    return start_in_child(function, *arguments).wait()


def share_server() -> None:
    """Have the children of this process, such as the commands of a study, forked from the server it was forked from.

    Otherwise it starts its own server, which takes as long to import everything as any new process.
    """
    server = multiprocessing.forkserver._forkserver
    if server._forkserver_address:
        server.ensure_running = lambda: None


def _in_rank(rank: int, port: int, output: Path, function, arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    share_server()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    function(*arguments)


def start_two_processes(output: Path, function, *arguments) -> list[Child]:
    """Start a function in two processes on this machine, with what torchrun sets; both append to the file ``output``.

    They are forked from a process that has loaded the imports, so they start in an instant.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [start_in_child(_in_rank, rank, port, output, function, arguments) for rank in range(2)]


def wait_for_both(children: list[Child]) -> None:
    """Wait for two processes; if one fails, end the other, as torchrun does, and raise the error."""
    running = {child.process.sentinel: child for child in children}
    try:
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                assert running.pop(sentinel).wait() == 0, "a process was killed"
    finally:
        for child in children:
            child.process.terminate()
            child.process.join()


def run_in_two_processes(function, *arguments) -> str:
    """Run a function in two processes on this machine; returns what they print."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "output"
        wait_for_both(start_two_processes(output, function, *arguments))
        return output.read_text()


def start_eval(*words: object) -> Child:
    """Start ``python -m eval WORDS`` with its own server, in a process group that a test can kill as a whole."""
    return start_in_child(_eval_in_group, [str(word) for word in words])


def _eval_in_group(words: list[str]) -> None:
    from eval.__main__ import main

    os.setpgid(0, 0)
    main(words)


def _eval(words: list[str], folder: Path, cwd: Path) -> None:
    os.chdir(cwd)
    share_server()
    for stream, file in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    code: object = 0
    try:
        from eval.__main__ import main

        main(words)
    except SystemExit as stop:
        code = stop.code
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
    (folder / "code").write_text("1" if isinstance(code, str) else str(code or 0))
    sys.stdout.flush()


def run_eval(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``python -m eval WORDS`` in a new process with its imports already loaded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_in_child(_eval, [str(word) for word in words], folder, cwd)
        out, err, code = ((folder / file).read_text() for file in ("out", "err", "code"))
    return subprocess.CompletedProcess(words, int(code), out, err)


def train(flags: list[str]) -> None:
    """Run the DreamBooth script."""
    import train_dreambooth_delora

    train_dreambooth_delora.main(flags)


def fixed_loss(model: Path, photographs: Path, adapter: Path) -> tuple[float, float]:
    """Losses of the base model and of the adapter with fixed noise and timesteps."""
    from data.photographs import find_photographs
    from delora_diffusers import load_adapter
    from delora_diffusers.crops import views_of
    from delora_diffusers.families.loading import load_pipeline
    from delora_diffusers.families.table import family_of
    from delora_diffusers.pipelines.conditions import encode_prompts
    from delora_diffusers.pipelines.noise_schedule import ddpm_schedule
    from delora_diffusers.training.encoding import encode_images
    from delora_diffusers.training.noising import Diffusion
    from delora_diffusers.training.objective import denoising_losses

    pipeline = load_pipeline(str(model))
    attached = load_adapter(pipeline.unet, adapter)
    noising, family = Diffusion(ddpm_schedule(pipeline.scheduler, None)), family_of(type(pipeline).__name__)
    photos = find_photographs(photographs)
    views = [views_of(photo.load(), (64, 64), None, False) for photo in photos]
    cache = encode_images(family, pipeline.vae, views, len(views), torch.device("cpu"))
    losses = []
    with torch.no_grad():
        text = encode_prompts(pipeline, ["a photo of sks dog"] * len(photos), torch.device("cpu"))[
            "encoder_hidden_states"
        ]
        for strength in (0, 1):
            attached.strength = strength
            total = 0.0
            for seed in range(12):
                generator = torch.Generator().manual_seed(seed)
                latents = cache.sample(range(len(photos)), generator, seed)
                batch = noising(latents, generator)
                total += denoising_losses(family, pipeline.unet, **batch, encoder_hidden_states=text).item()
            losses.append(total / 12)
    return losses[0], losses[1]


def write_subjects(folder: Path, photographs, **more) -> str:
    """Write a subjects file with one line per folder of photos; returns its path."""
    lines = [
        {"instance_data_dir": str(photos), "instance_prompt": f"a sks {photos.name}", "seed": seed, **more}
        | {"output_dir": str(folder / photos.name)}
        for seed, photos in enumerate(photographs)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "subjects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "subjects.jsonl")


def together_flags(tiny_sd: Path, folder: Path, photographs, *more: object) -> list[str]:
    """Flags for training several subjects at once."""
    flags = training_flags(tiny_sd, folder, folder / "run", "--train_batch_size", 2, *more)
    index = flags.index("--instance_data_dir")
    return [*flags[:index], *flags[index + 4 :], "--subjects_file", write_subjects(folder, photographs)]


def outputs_and_gradients(unet, inputs, config, dtype=torch.float32):
    """The output of a copy of the UNet with a randomized adapter, and the adapter's gradients."""
    unet = copy.deepcopy(unet).to(dtype)
    adapter = attach(unet, config, torch.Generator().manual_seed(0))
    randomize(adapter)
    sample, timestep, text = inputs
    output = unet(sample.to(dtype), timestep, text.to(dtype)).sample
    output.float().square().sum().backward()
    return output.detach().float(), {name: p.grad for name, p in adapter.named_parameters()}


PALETTE = generated_palette(6)


def painted_map(seed: int, size: tuple[int, int] = (40, 30)) -> tuple[Image.Image, Image.Image]:
    """An image painted in the colours of its map, and the map."""
    blocks = np.random.default_rng(seed).integers(0, 6, (3, 4), dtype=np.uint8)
    indices = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))
    return Image.fromarray(PALETTE[indices]), Image.fromarray(indices)


def write_map_folders(folder: Path, names=("a", "b", "c")) -> Path:
    """Write ``images/`` with captions, and ``maps/``."""
    for part in ("images", "maps"):
        (folder / part).mkdir(parents=True)
    for seed, name in enumerate(names):
        image, indices = painted_map(seed)
        image.save(folder / "images" / f"{name}.png")
        indices.save(folder / "maps" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text(f"scene {name}")
    return folder


def map_flags(tiny_sd: Path, pairs: Path, out: Path, *more: object) -> list[str]:
    """Flags for a short training run on maps; later flags override earlier ones."""
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", pairs, "--output_dir", out]
    flags += ["--resolution", 32, "--rank", 4, "--max_train_steps", 6, "--report_to", "none", "--random_flip"]
    flags += ["--train_batch_size", 2, "--validation_inference_steps", 2, "--num_validation_images", 2]
    return [str(flag) for flag in [*flags, "--proportion_empty_prompts", 0.3, *more]]
