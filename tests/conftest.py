"""Shared pieces of the tests: the tiny models, some photographs, a clean accelerate state."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import multiprocessing
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """Folder of a tiny Stable Diffusion pipeline."""
    from data.tiny_sd import write

    return write(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_scorers(tmp_path_factory) -> Path:
    """Folder with a tiny ``dino`` and ``clip``."""
    from data.tiny_scorers import write

    return write(tmp_path_factory.mktemp("scorers"))


def draw_photographs(folder: Path, count: int = 5) -> Path:
    """Smooth coloured pictures of several sizes, with a disc that stays the same."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = (96, 128) if number % 2 else (112, 112)
        y, x = np.mgrid[:height, :width] / 100
        colours = random.uniform(0, 255, (2, 3))
        picture = colours[0] * y[..., None] + colours[1] * (1 - x[..., None])
        picture[(y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.08] = (230, 60, 20)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Folder of five pictures to train on."""
    return draw_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def unet(tiny_sd):
    """A fresh tiny UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()


@pytest.fixture
def unet_inputs():
    """(sample, timestep, encoder_hidden_states) for the tiny UNet."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 7, 32, generator=generator),
    )


def randomize(adapter, scale: float = 0.1) -> None:
    """Move an adapter away from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def training_flags(tiny_sd: Path, photographs: Path, output_dir: Path, *more: object) -> list[str]:
    """Flags of a short run; later ones win."""
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--instance_data_dir", photographs]
    flags += ["--instance_prompt", "a photo of sks toy", "--output_dir", output_dir, "--resolution", 32, "--rank", 4]
    flags += ["--max_train_steps", 6, "--report_to", "none", *more]
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


def run_in_two_processes(*typed: object) -> None:
    """Run a script, or ``-m MODULE``, in two processes of one host."""
    # `accelerate launch --cpu --num_processes 2` starts one process; on CPUs torchrun starts as many as it is told.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, *map(str, typed)], cwd=ROOT, env=environment, check=True)


def _eval(words: list[str], folder: Path) -> None:
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


def run_eval(*words: object) -> subprocess.CompletedProcess[str]:
    """``python -m eval WORDS`` in a fresh process whose imports are warm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_in_child(_eval, [str(word) for word in words], folder)
        out, err, code = ((folder / file).read_text() for file in ("out", "err", "code"))
    return subprocess.CompletedProcess(words, int(code), out, err)


def run_in_child(function, *arguments) -> int:
    """Run a function in a fresh process (whose imports are warm) and return its exit code; its errors are raised."""
    # CUDA does not survive a fork, not even one of a process that has only asked for it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    multiprocessing.set_forkserver_preload(
        ["train_dreambooth_delora", "diffusers", "torch", "accelerate", "tests.warm"]
    )
    reports = context.SimpleQueue()
    process = context.Process(target=_child, args=(function, arguments, reports))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return process.exitcode
    report = reports.get()
    assert report is None, report
    assert process.exitcode is not None
    return process.exitcode
