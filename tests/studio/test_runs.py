"""Training runs that outlive the server: start, stop, resume and what is said of a run that ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from delora_diffusers import InputError
from delora_diffusers.names import WEIGHTS_NAME, list_checkpoints
from studio import flags, run_records, run_states, runs
from studio.workspace import Workspace
from tests.helpers import run_in_child, train, write_photos

SERVER = """
import json, sys, time
from pathlib import Path
from studio import runs
from studio.workspace import Workspace
root, name, values, begin = sys.argv[1:]
time.sleep(max(0, float(begin) - time.time()))
try:
    print(runs.start(Workspace(Path(root)), name, json.loads(values)).status, flush=True)
    time.sleep(600)
except ValueError as error:
    print(error, flush=True)
"""
"""A server that starts a run, at the same time as another one."""


@pytest.fixture
def workspace(tmp_path):
    """A workspace with a photo set, whose runs are ended after the test."""
    workspace = Workspace(tmp_path / "workspace")
    write_photos(workspace.photo_set("toy"))
    yield workspace
    for file in workspace.runs.glob(".studio/*/run.json"):
        record = run_records.read_record(workspace.runs / file.parent.name)
        for process in run_records.processes_of({record.token})[record.token] if record else ():
            process.kill()


def values(**more) -> dict:
    return {"photos": "toy", "instance_prompt": "a photo of sks toy", **more}


def wait(workspace, name, condition, seconds=60) -> runs.RunState:
    """The first state for which a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition(state := runs.state(workspace, name)):
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    return state


def has_ended(state: runs.RunState) -> bool:
    return state.status in ("stopped", "finished", "failed", "lost")


def at_step(step: int):
    def reached(state: runs.RunState) -> bool:
        assert not has_ended(state), state
        return state.step >= step

    return reached


@pytest.mark.integration
def test_the_life_of_a_run(workspace, tiny_sd, tmp_path, monkeypatch):
    """Two servers start it at once and are killed; it is found again, stopped, continued, killed, continued."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = values(pretrained_model_name_or_path=str(tiny_sd), resolution="32", rank=4, max_train_steps=300)
    given |= {"logging_steps": 100, "checkpointing_steps": 1000}
    begin = str(time.time() + 1.5)
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER, workspace.root, "dog", json.dumps(given), begin],
            stdout=subprocess.PIPE,
            text=True,
            cwd=flags.ROOT,
        )
        for _ in range(2)
    ]
    answers = [server.stdout.readline().strip() for server in servers]
    for server in servers:
        server.kill()
        server.wait()
    assert "starting" in answers, answers
    answers.remove("starting")
    assert answers[0] in (
        "the run dog is being started by another page; open it there.",
        "the run dog is running already; open it, or choose another name.",
    )
    with pytest.raises(InputError, match="the run dog is running already"):
        runs.start(workspace, "dog", given)

    state = wait(workspace, "dog", at_step(5))
    assert state.status == "training" and state.steps == 300 and state.seconds_left and not has_ended(state)
    assert runs.stop(workspace, "dog").status in ("stopping", "stopped")
    state = wait(workspace, "dog", has_ended)
    (checkpoint,) = list_checkpoints(workspace.run("dog"))
    assert state.status == "stopped" and checkpoint.name == f"checkpoint-{state.step}" and 5 <= state.step < 300
    assert state.message == f"Stopped after step {state.step}, which is saved: resume to continue."
    with pytest.raises(InputError, match="the run dog is not running; there is nothing to stop"):
        runs.stop(workspace, "dog")
    with pytest.raises(InputError, match="there is a run dog already; choose another name, such as dog-2, or resume"):
        runs.start(workspace, "dog", given)

    monkeypatch.setattr(runs, "LAUNCHER", [sys.executable])  # which starts faster
    assert runs.resume(workspace, "dog").step == state.step
    killed = wait(workspace, "dog", at_step(state.step + 5))
    os.kill(killed.pid, signal.SIGKILL)
    lost = wait(workspace, "dog", has_ended)
    assert lost.status == "lost" and lost.step >= killed.step
    assert lost.message == (
        f"The training process ended without a message at step {lost.step}; its last checkpoint is at step "
        f"{state.step}: resume to continue."
    )

    runs.resume(workspace, "dog")
    alone = tmp_path / "alone"
    words = flags.command(runs.planned(workspace, "dog", given) | {"output_dir": alone})
    run_in_child(train, words[len(flags.LAUNCH) :])
    finished = wait(workspace, "dog", has_ended)
    assert finished.status == "finished" and finished.step == 300
    assert (workspace.run("dog") / WEIGHTS_NAME).read_bytes() == (alone / WEIGHTS_NAME).read_bytes()
    with pytest.raises(InputError, match=r"there is a run dog already; choose another name, such as dog-2\.$"):
        runs.start(workspace, "dog", given)

    with pytest.raises(InputError, match="the run dog is finished; to train it for longer, resume up to a later step"):
        runs.resume(workspace, "dog")
    with pytest.raises(InputError, match="the run dog has 300 steps; give a later one, or leave the field empty"):
        runs.resume(workspace, "dog", 300)
    runs.resume(workspace, "dog", 310)
    prolonged = wait(workspace, "dog", at_step(1))
    os.kill(prolonged.pid, signal.SIGKILL)
    assert wait(workspace, "dog", has_ended).status == "lost", "the adapter of 300 steps is still there"
    runs.resume(workspace, "dog")
    finished = wait(workspace, "dog", has_ended)
    assert (finished.status, finished.step, finished.steps) == ("finished", 310, 310)
    assert runs.form_values(workspace, "dog") == json.loads(json.dumps(given)) | {"max_train_steps": "310"}
    assert [state.name for state in runs.states(workspace)] == ["dog"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs start a script that stands for the training script and takes no time; returns where to write it."""
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "LAUNCHER", [sys.executable])
    monkeypatch.setenv("PYTHONPATH", str(Path(runs.__file__).parent.parent))
    return tmp_path / "train_dreambooth_delora.py"


BAR = "training:  {0}%|████      | {0}/300 [00:{1}<00:40,  4.85it/s, loss=0.1]"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            "sys.exit('error: memory ran out, while training; use a smaller --rank.')",
            "failed",
            "Memory ran out, while training; use a smaller --rank.",
        ),
        (
            "raise RuntimeError('<b>shapes</b> differ')",
            "failed",
            "Training failed (RuntimeError: <b>shapes</b> differ); the log says where; it has no checkpoint yet: "
            "resume to train from the beginning.",
        ),
        (
            "os.kill(os.getpid(), 9)",
            "lost",
            "The training process ended without a message before its first step; it has no checkpoint yet: resume to "
            "train from the beginning.",
        ),
        (
            "subprocess.run([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'], check=True)",  # as a launcher
            "lost",
            "The training process ended without a message before its first step; it has no checkpoint yet: resume to "
            "train from the beginning.",
        ),
        (
            f"print({BAR.format(40, 21)!r}, end=chr(13), flush=True); os.kill(os.getpid(), 9)",
            "lost",
            "The training process ended without a message at step 40; it has no checkpoint yet: resume to train from "
            "the beginning.",
        ),
    ],
)
def test_what_is_said_of_a_run_that_failed(workspace, script, body, status, message):
    script.write_text(f"import os, subprocess, sys\n{body}\n")
    runs.start(workspace, "dog", values())
    state = wait(workspace, "dog", has_ended)
    assert (state.status, state.message) == (status, message)
    assert state.log_tail.startswith("$ accelerate launch train_dreambooth_delora.py --instance_data_dir workspace/")
    assert state.command in state.log_tail.splitlines()[0]


@pytest.mark.integration
def test_stopping_twice_ends_a_run_that_does_not_react(workspace, script):
    """The script counts signals as training does."""
    script.write_text(
        "import signal, sys, time\nreceived = []\n"
        "signal.signal(15, lambda *_: sys.exit(143) if received else received.append(1))\n"
        f"print({BAR.format(40, 21)!r}, flush=True)\nwhile True: time.sleep(0.05)\n"
    )
    runs.start(workspace, "dog", values())
    state = wait(workspace, "dog", at_step(40))
    assert state.seconds_left == pytest.approx(21 * 260 / 40)
    assert runs.stop(workspace, "dog").status == "stopping"
    runs.stop(workspace, "dog")
    state = wait(workspace, "dog", has_ended)
    assert state.status == "stopped" and state.message.startswith("Stopped at step 40; it has no checkpoint yet")


@pytest.mark.integration
def test_a_training_process_is_found_when_its_launcher_is_killed(workspace, script):
    script.write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    runs.start(workspace, "dog", values())  # its process may not have begun to run yet
    launcher = wait(workspace, "dog", lambda state: state.pid is not None).pid
    wait(workspace, "dog", lambda _: psutil.Process(launcher).children())
    os.kill(launcher, signal.SIGKILL)
    state = wait(workspace, "dog", lambda state: state.pid != launcher)
    assert state.pid is not None and state.status == "starting"
    with pytest.raises(InputError, match="is running already"):
        runs.start(workspace, "dog", values())
    runs.stop(workspace, "dog")
    assert wait(workspace, "dog", has_ended).status == "stopped"


@pytest.mark.integration
def test_a_process_with_a_reused_number_is_not_the_run(workspace, script):
    script.write_text("")
    runs.start(workspace, "dog", values())
    wait(workspace, "dog", has_ended)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert has_ended(runs.state(workspace, "dog"))
        with pytest.raises(InputError, match="not running"):
            runs.stop(workspace, "dog")
        assert other.poll() is None
        other.kill()


def test_a_run_whose_process_is_about_to_appear_is_not_lost(workspace):
    run = workspace.run("dog")
    for seconds, status in ((0, "starting"), (5, "lost"), (-3600, "lost")):
        run_records.write_record(
            run, run_records.Record(values(), ["a"], "no process has this", time.time() - seconds, 0, 9, 0)
        )
        assert runs.state(workspace, "dog").status == status


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "../other", "a/b", ".studio", "", "a" * 300, "a\0b"])
def test_names_that_are_no_folder_are_refused(workspace, name):
    for function in (lambda: runs.start(workspace, name, values()), lambda: runs.resume(workspace, name)):
        with pytest.raises(InputError, match="cannot be used|is longer"):
            function()
    assert list(workspace.runs.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"photos": None}, "no photos were chosen"),
        ({"photos": "../../etc"}, "cannot be used"),
        ({"photos": "none"}, "is not a folder"),
        ({"mask_data_dir": "/etc"}, "/etc is outside the workspace"),
        ({"class_data_dir": "../x"}, "is outside the workspace"),
        ({"init_adapter": "/etc/passwd"}, "is outside the workspace"),
        ({"rank": "0"}, "--rank: 0 is less than 1"),
        ({"instance_prompt": ""}, "--instance_prompt"),
        ({"resolution": "100"}, "--resolution 100 is not a multiple of 8"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_anything_is_written(workspace, more, message):
    with pytest.raises(InputError, match=message):
        runs.start(workspace, "dog", values(**more))
    assert not workspace.run("dog").exists() and not list(workspace.runs.glob(".studio/*"))


@pytest.mark.integration
def test_a_prompt_that_no_command_can_have_starts_nothing(workspace):
    with pytest.raises(InputError, match="a prompt is too long to be part of a command; shorten it"):
        runs.start(workspace, "dog", values(instance_prompt="dog " * 100_000))
    assert runs.states(workspace) == [] and not workspace.run("dog").exists()


def test_links_that_leave_the_workspace_are_refused(workspace, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    link = workspace.photo_set("toy") / "link.png"
    link.symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"link\.png is outside the workspace"):
        runs.start(workspace, "dog", values())
    link.unlink()
    (workspace.runs / ".studio" / "dog").mkdir(parents=True)
    (workspace.runs / ".studio" / "dog" / "log.txt").symlink_to(tmp_path / "log.txt")
    with pytest.raises(InputError, match=r"log\.txt is a link"):
        runs.start(workspace, "dog", values())
    assert not (tmp_path / "log.txt").exists()


def test_a_broken_photo_is_named(workspace):
    (workspace.photo_set("toy") / "02.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"02\.png"):
        runs.start(workspace, "dog", values())


def test_unknown_and_foreign_runs(workspace):
    with pytest.raises(InputError, match="there is no run cat; choose another"):
        runs.state(workspace, "cat")
    folder = workspace.run("cat") / "checkpoint-20"
    folder.mkdir(parents=True)
    (folder / "sizes.json").write_text("{}")
    (state,) = runs.states(workspace)
    assert state.status == "stopped" and state.step == 20 and "not started on this page" in state.message
    with pytest.raises(InputError, match="was not started on this page"):
        runs.resume(workspace, "cat")
    (workspace.runs / ".studio" / "cat").mkdir(parents=True)
    for damaged in ("", "{", "[]", '{"token": 3}', '{"values": {}}'):
        (workspace.runs / ".studio" / "cat" / "run.json").write_text(damaged)
        assert runs.state(workspace, "cat").status == "stopped"


@pytest.mark.parametrize(
    ("line", "first", "expected"),
    [
        (BAR.format(40, 20), 0, 20 * 260 / 40),
        (BAR.format(40, 20), 20, 20 * 260 / 20),
        (BAR.format(40, "02"), 0, 260 / 4.85),
        ("training:   1%|▏         | 3/300 [00:04<10:00,  2.50s/it]", 0, 297 * 2.5),
        ("training:  50%|█████     | 150/300 [1:02:05<1:02:05, 24.8s/it, loss=1]", 0, 3725),
        ("training:   0%|          | 0/300 [00:00<?, ?it/s]", 0, None),
    ],
)
def test_the_time_left_follows_from_the_speed_so_far(line, first, expected):
    seconds = run_states._seconds_left(run_states.PROGRESS.search(line), first)
    assert seconds == (None if expected is None else pytest.approx(expected))


def test_the_log_shows_the_last_state_of_each_bar_and_nothing_that_changes_a_terminal(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(
        b"old\nencoding:   0%|  | 0/5\rencoding:  100%|##| 5/5\ntraining:  1%| | 1/9\rtraining: 20%|# | 2/9\n"
    )
    with log.open("ab") as file:
        file.write(b"\x1b[31mred <b>\xff\n")
    lines = run_states._lines(run_states._read_log(log, 4)).splitlines()
    assert lines == ["encoding:  100%|##| 5/5", "training: 20%|# | 2/9", "\\x1b[31mred <b>\N{REPLACEMENT CHARACTER}"]


def test_a_free_name_follows_the_names_of_runs(workspace):
    assert runs.free_name(workspace, "dog") == "dog"
    for name in ("dog", "dog-2", "cat-7"):
        workspace.run(name).mkdir()
    run_records.write_record(workspace.run("dog-3"), run_records.Record(values(), ["a"], "none", 0, 0, 9, 0))
    assert runs.free_name(workspace, "dog") == runs.free_name(workspace, "dog-2") == "dog-4"
    assert runs.free_name(workspace, "cat-7") == "cat-2" and runs.free_name(workspace, "cat") == "cat"


def test_the_launcher_s_defaults_are_left_out_of_the_log():
    warned = (
        "The following values were not passed to `accelerate launch` and had defaults used instead:\n"
        "\t`--num_processes` was set to a value of `0`\n\t`--dynamo_backend` was set to a value of `'no'`\n"
        "To avoid this warning pass in values for each of the problematic parameters or run `accelerate config`.\n"
    )
    assert run_states._lines(f"$ accelerate launch a\n{warned}training\n") == "$ accelerate launch a\ntraining"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("prompt", "message"), [("a sks toy", "Making the last samples and saving."), ("", "Saving the adapter.")]
)
def test_after_the_last_step_no_time_is_left_to_tell(workspace, script, prompt, message):
    script.write_text(f"import time\nprint({BAR.format(300, 21)!r}, flush=True)\ntime.sleep(600)\n")
    runs.start(workspace, "dog", values(validation_prompt=prompt, max_train_steps=300))
    state = wait(workspace, "dog", at_step(300))
    assert (state.status, state.message, state.seconds_left) == ("training", message, None)


@pytest.mark.integration
def test_memory_is_estimated_for_the_flags(workspace, tiny_sd, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, "It fits.\n", "warning\nerror: no such model.\n")

    monkeypatch.setattr(runs.subprocess, "run", run)
    given = {"pretrained_model_name_or_path": str(tiny_sd), "resolution": 64, "rank": 2}
    assert runs.estimate(workspace, {}) == "The miniature fits any GPU, and it trains on a CPU." and not commands
    assert runs.estimate(workspace, given) == "It fits."
    with pytest.raises(InputError, match=r"the memory could not be estimated: no such model\."):
        runs.estimate(workspace, given)
    assert commands[0][1:3] == ["-m", "studio.estimate"]
    from studio.estimate import estimate

    text = estimate(commands[0][3:])
    assert text.startswith("A training step needs about 0.0 GiB (weights ") and "\n\n| 64 pixels" in text
