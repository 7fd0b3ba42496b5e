"""The warm process of the Play tab: its images are those of the command, and it ends when it should."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from delora_diffusers import AdapterConfig, attach, save_adapter
from delora_diffusers.commands import generate
from delora_diffusers.dispatch import run_command
from delora_diffusers.errors import InputError
from studio.player import ROOT, Player, StoppedError
from tests.helpers import randomize

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def adapters(tiny_sd, tmp_path_factory) -> list[Path]:
    """Two adapters of different modules, the second also of the text encoder."""
    from diffusers import StableDiffusionPipeline

    folders = []
    for number in range(2):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
        models = {"unet": pipeline.unet} | ({"text_encoder": pipeline.text_encoder} if number else {})
        parts = {}
        for name, model in models.items():
            targets = {
                "targets": ("q_proj", "v_proj")
                if name != "unet"
                else ("to_q", "ff.net.0.proj")
                if number
                else ("to_v",)
            }
            parts[name] = attach(model, AdapterConfig(rank=2 + number, **targets))
            randomize(parts[name], 0.5)
        folder = tmp_path_factory.mktemp("adapter")
        save_adapter(parts.pop("unet"), folder, text_encoders=parts, base_model=str(tiny_sd))
        folders.append(folder)
    return folders


def flags(adapters: list[Path], output: Path, *more: object) -> list[str]:
    words = ["--adapter", *adapters] if adapters else []
    words += ["--num_inference_steps", 2, "--num_images", 1, "--resolution", 32, "--output_dir", output, *more]
    return [str(word) for word in words]


def test_a_kept_model_generates_the_bytes_of_the_command(tiny_sd, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process, or sums round differently
    dog, mug = adapters
    base = ["--pretrained_model_name_or_path", tiny_sd]
    requests = [
        ([dog], ["--prompt", "a sks dog", "--strength", 1]),
        ([dog], ["--prompt", "a sks dog", "--strength", 0.3]),
        ([dog], ["--prompt", "a sks dog", "--strength", 0.3, "--scheduler", "euler"]),
        ([dog], ["--prompt", "a sks dog", "--seed", 5, "--strength", 0, 0.5, 1]),
        ([dog, mug], ["--prompt", "a sks dog", "--adapter_weights", 0.4, 0.7]),
        ([mug], ["--prompt", "a sks dog", "--strength", 0.5]),
        ([mug], ["--prompt", "a sks dog", "--strength", 1.5]),
        ([], ["--prompt", "a sks dog", *base]),
        ([dog], ["--prompt", "another", "a third", "--negative_prompt", "blurred", "--strength", 1]),
        ([dog], ["--prompt", "a sks dog", "--strength", 1]),
    ]
    player = Player()
    try:
        processes = set()
        for number, (used, more) in enumerate(requests):
            player.generate(flags(used, tmp_path / f"kept-{number}", *more))
            processes.add(player.pid)
        assert len(processes) == 1
    finally:
        player.close()
    for number, (used, more) in enumerate(requests):
        run_command("test", "", {"generate": generate}, ["generate", *flags(used, tmp_path / f"cold-{number}", *more)])
        kept, cold = (
            {path.name: path.read_bytes() for path in (tmp_path / f"{kind}-{number}").iterdir()}
            for kind in ("kept", "cold")
        )
        assert kept == cold and len(kept) >= 3, number


def test_a_refused_command_is_one_sentence_and_the_process_goes_on(adapters, tmp_path):
    player = Player()
    try:
        with pytest.raises(InputError, match="--num_inference_steps is 0; give at least 1"):
            player.generate(flags(adapters[:1], tmp_path / "a", "--prompt", "a dog", "--num_inference_steps", 0))
        with pytest.raises(InputError, match="--frobnicate"):
            player.generate(flags(adapters[:1], tmp_path / "a", "--prompt", "a dog", "--frobnicate", 0))
        process = player.pid
        player.generate(flags(adapters[:1], tmp_path / "a", "--prompt", "a dog"))
        assert player.pid == process
        os.kill(process, signal.SIGKILL)
        with pytest.raises(InputError, match="press Generate to start it again"):
            player.generate(flags(adapters[:1], tmp_path / "b", "--prompt", "a dog"))
        player.generate(flags(adapters[:1], tmp_path / "b", "--prompt", "a dog"))
        assert (tmp_path / "b" / "metadata.jsonl").is_file()
        with ThreadPoolExecutor(1) as pool:
            long = flags(adapters[:1], tmp_path / "c", "--prompt", "a dog", "--num_inference_steps", 900)
            stopped = pool.submit(player.generate, long)
            while not player._lock.locked():
                time.sleep(0.05)
            time.sleep(0.2)
            player.close()
            with pytest.raises(StoppedError):
                stopped.result()
    finally:
        player.close()


def ends(process: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_the_process_ends_when_idle_and_when_its_parent_is_killed():
    player = Player(idle_seconds=0.1)
    with pytest.raises(InputError):
        player.generate(["--prompt", "x"])  # no folder for the images
    process = player.pid
    assert process is None or ends(process)
    code = (
        "from studio.player import Player; p = Player(); p._started(); print(p.pid, flush=True); import time;"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert ends(child)
