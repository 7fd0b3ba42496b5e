"""A complete benchmark as a user runs it: two processes, a subject that fails, a damaged image, and continuing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from delora_diffusers import InputError
from eval.__main__ import main
from eval.benchmark.run import run_on_all, start_accelerator
from eval.benchmark.tasks import Step, Task
from tests.helpers import run_eval, run_in_two_processes, write_photos


def times(folder: Path) -> dict[str, int]:
    """When each adapter and each image was written."""
    files = [*folder.glob("seed-0/*/adapter/*.safetensors"), *folder.glob("seed-0/*/pictures/0*.png")]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def small_benchmark(tiny_sd, tiny_scorers, folder: Path) -> list[str]:
    """Flags of a run with two subjects that writes to ``folder / "run"``."""
    content = {"images_per_prompt": 2, "prompts": {"thing": ["a {identifier} {class} in the snow"]}}
    content |= {"drift_prompts": ["a {class}", "a tree"]}
    content["subjects"] = {n: {"class": c, "kind": "thing"} for n, c in (("one", "toy"), ("two", "mug"))}
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    for name, count in (("one", 4), ("two", 5)):
        write_photos(folder / "photographs" / name, count)
    flags: list[object] = [folder / "small.yaml", "--photographs", folder / "photographs", "--output_dir"]
    flags += [folder / "run", "--pretrained_model_name_or_path", tiny_sd, "--lpips", "none"]
    flags += ["--train", "max_train_steps=3", "resolution=32", "rank=2", "report_to=none"]
    flags += ["--generate", "num_inference_steps=2", "resolution=32", "--dino", f"local-dir:{tiny_scorers / 'dino'}"]
    return [str(flag) for flag in [*flags, "--clip", f"local-dir:{tiny_scorers / 'clip'}"]]


@pytest.mark.integration
def test_two_processes_write_the_same_files_as_one(tiny_sd, tiny_scorers, tmp_path):
    flags, output = small_benchmark(tiny_sd, tiny_scorers, tmp_path), tmp_path / "run"
    run_in_two_processes(main, ["benchmark", *flags])
    output.rename(tmp_path / "two-processes")  # the next run needs the same folder: images record their adapter's path
    # Two jobs, so that each command has as many threads as before: on a CPU their number changes the sums.
    result = run_eval("benchmark", *flags, "--jobs", 2)
    assert result.returncode == 0, result.stderr[-2000:]
    files = [*times(output), "subjects.csv"]
    assert len(files) == 2 + 2 * 6 + 6 + 1  # includes the drift images of the subjects and of the base model
    for name in files:
        assert (output / name).read_bytes() == (tmp_path / "two-processes" / name).read_bytes(), name


def run_failing_tasks(folder: Path) -> None:
    """Run three tasks, of which the first succeeds, and write the failures that this process reports."""

    def task(number: int) -> Task:
        def command() -> None:
            (folder / f"started-{number}").touch(exist_ok=False)
            if number:
                raise InputError(f"number {number} failed")

        result: Any = SimpleNamespace(folder=folder / str(number), is_done=lambda: number == 0)
        return Task(result.folder, [result], [Step(command, result.is_done)])

    accelerator = start_accelerator()
    failed = run_on_all(accelerator, [task(number) for number in range(3)], jobs=1)
    (folder / f"failed-{accelerator.process_index}").write_text(json.dumps(failed))


@pytest.mark.integration
def test_each_process_reports_the_failures_of_both(tmp_path):
    run_in_two_processes(run_failing_tasks, tmp_path)
    expected = {str(tmp_path / str(number)): f"number {number} failed" for number in (1, 2)}
    for rank in range(2):
        assert json.loads((tmp_path / f"failed-{rank}").read_text()) == expected
    assert len(list(tmp_path.glob("started-*"))) == 2


@pytest.mark.integration
def test_a_run_continues_past_a_failure_and_after_it(tiny_sd, tiny_scorers, tmp_path):
    flags, output = small_benchmark(tiny_sd, tiny_scorers, tmp_path), tmp_path / "run"
    flags += ["--jobs", "2"]  # one thread per command: more of them wait for other tests
    single = run_eval("benchmark", *flags, "--subjects", "one")
    assert single.returncode == 0, single.stderr[-2000:]
    first = times(output)
    # Then both subjects. The folder of the second contains a different training.
    blocked = output / "seed-0" / "two" / "adapter"
    blocked.mkdir(parents=True)
    (blocked / "config.json").write_text(json.dumps({"arguments": {"recipe": "default", "rank": 64}}))
    failing = run_eval("benchmark", *flags, "--subjects", "one", "two")
    assert failing.returncode != 0 and "1 failed and are excluded from all means" in failing.stderr
    summary = json.loads((output / "summary.json").read_text())
    ((folder, problem),) = summary["failed"].items()
    assert folder.endswith("seed-0/two") and "rank" in problem and "log.txt" in problem
    assert summary["protocols"]["delora"]["counts"]["subjects"] == 1
    assert first.items() <= times(output).items()

    # Without the obstacle, and with a truncated image of the finished subject: both are generated, the rest is kept.
    shutil.rmtree(blocked)
    damaged = sorted((output / "seed-0" / "one" / "pictures").glob("0*.png"))[1]
    content, before = damaged.read_bytes(), np.asarray(Image.open(damaged), dtype=int)
    damaged.write_bytes(content[: len(content) * 2 // 3])
    result = run_eval("benchmark", *flags, "--subjects", "one", "two")
    assert result.returncode == 0, result.stderr[-2000:]
    # Generated alone instead of in a batch, so its sums may round differently.
    assert np.abs(np.asarray(Image.open(damaged), dtype=int) - before).max() <= 2
    after = times(output)
    changed = {name for name in first if after[name] != first[name]}
    assert changed == {str(damaged.relative_to(output))}
    summary = json.loads((output / "summary.json").read_text())
    assert not summary["failed"] and summary["protocols"]["delora"]["counts"]["pictures"] == 4
    subjects = pd.read_csv(output / "subjects.csv")
    assert list(subjects["references"]) == [4, 5] and (subjects["drift"] > 0).all()
    assert len(json.loads((output / "settings.json").read_text())["starts"]) == 3
    assert (output / "index.html").read_text().count("<details") == 2
