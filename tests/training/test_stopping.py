"""Training that a signal ends: the checkpoint that it leaves, and its continuation."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from delora_diffusers.names import WEIGHTS_NAME, list_checkpoints
from delora_diffusers.training import stopping
from tests.helpers import run_in_child, start_in_child, start_two_processes, train, training_flags, wait_for_both


def train_with_signal(flags: list[str], number: int, step: int, rank: str = "0", output: str | None = None) -> None:
    """Train; the process of this rank gets the signal, twice at once, as from a terminal and a launcher, in a step."""
    from delora_diffusers.training.loss_monitor import LossMonitor

    add = LossMonitor.add

    def add_and_signal(self, losses, current):
        add(self, losses, current)
        if current + 1 == step and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    LossMonitor.add = add_and_signal
    if output is not None:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    train(flags)


@pytest.fixture(scope="module")
def uninterrupted(tiny_sd, photographs, tmp_path_factory):
    """The adapter of a whole run of six steps."""
    out = tmp_path_factory.mktemp("stopping") / "out"
    run_in_child(train, training_flags(tiny_sd, photographs, out))
    return (out / WEIGHTS_NAME).read_bytes()


def steps_saved(out) -> list[str]:
    return [path.name for path in list_checkpoints(out)]


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_its_step_and_the_run_continues_exactly(
    tiny_sd, photographs, tmp_path, uninterrupted, number
):
    flags = training_flags(tiny_sd, photographs, tmp_path / "out")
    child = start_in_child(train_with_signal, flags, number, 3, "0", str(tmp_path / "text"))
    assert child.error() == f"SystemExit: {128 + number}"
    assert steps_saved(tmp_path / "out") == ["checkpoint-3"] and not (tmp_path / "out" / WEIGHTS_NAME).exists()
    text = (tmp_path / "text").read_text()
    assert "stopped after step 3, which is saved; continue with: accelerate launch " in text
    assert text.rstrip().endswith("--resume_from_checkpoint latest")
    run_in_child(train, [*flags, "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == uninterrupted


@pytest.mark.integration
def test_a_signal_in_the_last_step_changes_nothing(tiny_sd, photographs, tmp_path, uninterrupted):
    run_in_child(train_with_signal, training_flags(tiny_sd, photographs, tmp_path / "out"), signal.SIGTERM, 6)
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == uninterrupted


@pytest.mark.integration
def test_the_images_of_the_step_of_the_signal_are_generated_when_the_run_continues(tiny_sd, photographs, tmp_path):
    more = ["--validation_prompt", "a toy", "--num_validation_images", 1, "--validation_inference_steps", 1]
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", "--validation_steps", 3, *more)
    assert start_in_child(train_with_signal, flags, signal.SIGTERM, 3).error() == "SystemExit: 143"
    assert not (tmp_path / "out" / "validation").exists()
    run_in_child(train, [*flags, "--resume_from_checkpoint", "latest"])
    images = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert images == ["step-000003.png", "step-000006.png"]


def be_launched(flags: list[str], folder: str) -> None:
    """Train in a child of this process, which is killed when the first step is done."""
    from delora_diffusers.training.loss_monitor import LossMonitor

    launcher = os.getpid()
    os.environ[stopping.LAUNCHED[0]] = "NO"
    if os.fork():
        signal.pause()
    os.dup2(os.open(f"{folder}/text", os.O_WRONLY | os.O_CREAT), 1)
    add = LossMonitor.add

    def add_and_kill(self, losses, current):
        add(self, losses, current)
        if current == 1:
            os.kill(launcher, signal.SIGTERM)
            while os.getppid() == launcher:
                time.sleep(0.01)

    LossMonitor.add = add_and_kill
    try:
        train(flags)
    except SystemExit as stop:
        Path(folder, "code").write_text(str(stop.code))
    os._exit(0)


@pytest.mark.integration
def test_training_ends_with_a_checkpoint_when_its_launcher_ends(tiny_sd, photographs, tmp_path):
    child = start_in_child(be_launched, training_flags(tiny_sd, photographs, tmp_path / "out"), str(tmp_path))
    child.process.join()
    assert child.process.exitcode == -signal.SIGTERM
    deadline = time.monotonic() + 30
    while not (tmp_path / "code").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "code").read_text() == "143" and steps_saved(tmp_path / "out") == ["checkpoint-2"]


@pytest.mark.integration
def test_two_processes_of_which_one_gets_the_signal_stop_together(tiny_sd, photographs, tmp_path):
    """They end at the next step that is logged."""
    flags = training_flags(tiny_sd, photographs, tmp_path / "out", "--logging_steps", 2)
    children = start_two_processes(tmp_path / "text", train_with_signal, flags, signal.SIGTERM, 3, "1")
    assert [child.error() for child in children] == ["SystemExit: 143"] * 2
    assert steps_saved(tmp_path / "out") == ["checkpoint-4"]
    wait_for_both(start_two_processes(tmp_path / "text", train, [*flags, "--resume_from_checkpoint", "latest"]))
    wait_for_both(start_two_processes(tmp_path / "text", train, [*flags, "--output_dir", str(tmp_path / "whole")]))
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (tmp_path / "whole" / WEIGHTS_NAME).read_bytes()


def test_a_later_signal_ends_the_process_at_once(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with stopping.stop_on_signals() as request:
        for seconds in (0.0, 0.1, 1.9):
            now[0] = 10.0 + seconds
            signal.raise_signal(signal.SIGINT)
        assert request.signal == signal.SIGINT
        now[0] = 12.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_another_thread_leaves_signals_alone():
    failures = []

    def use() -> None:
        try:
            with stopping.stop_on_signals() as request:
                assert not request.signal
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failures
