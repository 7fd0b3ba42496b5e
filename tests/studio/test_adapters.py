"""The adapters of a workspace, and the commands that use them."""

import json

import pytest

from delora_diffusers.errors import InputError
from delora_diffusers.names import CONFIG_NAME, WEIGHTS_NAME
from studio import adapters, comparison, jobs
from studio.workspace import Workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    for part in ("dog", "dog/best", "dog/checkpoint-20", "dog/checkpoint-100", "dog/checkpoint-7.part", "started"):
        folder = workspace.runs / part
        folder.mkdir()
        (folder / WEIGHTS_NAME).write_bytes(part.encode())
    (workspace.runs / "started" / WEIGHTS_NAME).unlink()
    (workspace.runs / "dog" / CONFIG_NAME).write_text(json.dumps({"arguments": {"rank": 8}}))
    return workspace


def test_the_finished_adapter_comes_first_and_late_checkpoints_before_early_ones(workspace):
    assert adapters.adapters(workspace) == ["dog", "dog/best", "dog/checkpoint-100", "dog/checkpoint-20"]
    assert adapters.settings_of(workspace.run("dog")) == {"rank": 8}
    assert adapters.settings_of(workspace.run("started")) == {}


def test_photos_and_prompts_are_those_of_the_run(workspace):
    settings = {"instance_prompt": "a sks dog", "instance_data_dir": str(workspace.photo_set("My dog"))}
    (workspace.runs / "dog" / CONFIG_NAME).write_text(json.dumps({"arguments": settings}))
    assert adapters.photos_of(workspace, "dog/best") == "My dog"
    assert adapters.prompt_of(workspace, "dog/best") == "a sks dog"
    assert comparison.default_prompts(workspace, "dog").startswith("a sks dog on the beach\n")
    assert comparison.other_subject(workspace, ["dog", "started"], "My dog") == ""
    assert "dog was trained on My dog, not on toy" in comparison.other_subject(workspace, ["started", "dog"], "toy")
    for elsewhere in ("/etc", "../../..", str(workspace.photos), 3, None):
        (workspace.runs / "dog" / CONFIG_NAME).write_text(json.dumps({"arguments": {"instance_data_dir": elsewhere}}))
        assert adapters.photos_of(workspace, "dog") is None


@pytest.mark.parametrize("label", ["dog/..", "../dog", "dog/../../..", "cat", "started", "", "dog/checkpoint-7.part"])
def test_only_adapters_of_the_list_are_used(workspace, label):
    with pytest.raises(InputError):
        adapters.adapter(workspace, label)


def test_adapters_of_similar_names_do_not_share_a_folder(workspace):
    names = ["dog 1", "dog-1", "base-model", "base model", "dog-best"]
    for name in names:
        (workspace.runs / name).mkdir()
        (workspace.runs / name / WEIGHTS_NAME).write_bytes(b"")
    labels = [*names, "dog/best"]
    folder = comparison.requests(workspace, labels, ["a dog"], [])
    records = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert len({record["output_dir"] for record in records}) == len(labels) + 1
    scores = [
        comparison.scores_file(folder, label, workspace.photo_set(name), "toybox")
        for label in [comparison.BASE, *labels]
        for name in ("toy", "best", "1-toy")
    ]
    assert len(set(scores)) == len(scores)


def test_equal_requests_have_one_folder_and_others_another(workspace):
    def folder(strength="1", weight=1.0, prompts=("a dog",), seed=0):
        return adapters.generate_words(workspace, [("dog", weight)], prompts, [strength], {"seed": seed})[1]

    first = folder()
    assert folder() == first and first.parent == workspace.outputs
    assert len({first, folder("0.5"), folder(weight=0.5), folder(prompts=["a", "dog"]), folder(seed=1)}) == 5
    (workspace.runs / "dog" / WEIGHTS_NAME).write_bytes(b"trained further")
    assert folder() != first


def test_a_request_is_the_command_that_a_person_would_type(workspace):
    settings = {"seed": 3, "negative_prompt": "", "scheduler": None, "num_images": 2}
    words, output = adapters.generate_words(workspace, [("dog", 1.0)], ["a dog", "two dogs"], ["1"], settings)
    expected = ["--adapter", str(workspace.run("dog")), "--prompt", "a dog", "two dogs", "--seed", "3"]
    assert words == [*expected, "--num_images", "2", "--output_dir", str(output)]
    words, _ = adapters.generate_words(workspace, [("dog", 0.4), ("dog/best", 1)], ["a dog"], ["0", "0.5"], {})
    assert words[words.index("--adapter_weights") + 1 :][:2] == ["0.4", "1"]
    assert words[words.index("--strength") + 1 :][:2] == ["0", "0.5"]
    words, _ = adapters.generate_words(workspace, [], ["a dog"], ["0.5"], {})
    assert words[:-1] == ["--prompt", "a dog", "--output_dir"], "the base model has no strength"
    with pytest.raises(InputError, match="no prompt"):
        adapters.generate_words(workspace, [], [], ["1"], {})


def test_a_failed_command_gives_its_own_sentence():
    output = "warning: x\nusage: generate ...\ngenerate.py: error: --rank is 0; give at least 1.\n"
    assert jobs.reason_in(output, 1) == "--rank is 0; give at least 1."
    assert jobs.reason_in("a\r\nlast line\n", 1) == "last line"
    assert jobs.reason_in("", 3) == "the command ended with code 3."


@pytest.mark.integration
def test_a_command_ends_with_the_page_that_started_it():
    import os

    running = jobs.run(["python", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
    output = ""
    while not output.strip():
        output = next(running)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(output), 0)
    with pytest.raises(InputError, match="too small"):
        list(jobs.run(["python", "-c", "import sys; sys.exit('error: it is too small')"]))
