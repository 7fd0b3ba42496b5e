"""The adapter file of each checkpoint: what it contains, what is kept of old checkpoints, generating with it."""

import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file

from delora_diffusers.files.reading import read_header
from delora_diffusers.names import CHECKPOINT_SIZES, WEIGHTS_NAME, list_checkpoints
from tests.helpers import run_in_child, train, training_flags, write_photos


def generate(words: list[str]) -> None:
    from delora_diffusers.__main__ import main

    main(words)


@pytest.fixture(scope="module")
def run(tiny_sd, tmp_path_factory):
    """A run of four steps that keeps the training state of its last checkpoint only, and the adapters of all."""
    folder = tmp_path_factory.mktemp("checkpoints")
    photos = write_photos(folder / "photos", 3)
    more = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    flags = training_flags(tiny_sd, photos, folder / "out", *more, "--keep_checkpoint_adapters")
    run_in_child(train, flags)
    return folder / "out", photos, flags


@pytest.mark.integration
def test_a_checkpoint_has_the_adapter_of_a_run_that_ends_there(run, tiny_sd, tmp_path):
    out, photos, _ = run
    run_in_child(train, training_flags(tiny_sd, photos, tmp_path / "two", "--max_train_steps", 2))
    shorter, checkpoint = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path / "two", out / "checkpoint-2"))
    assert shorter.keys() == checkpoint.keys()
    assert all(shorter[name].equal(checkpoint[name]) for name in shorter)
    final = load_file(out / WEIGHTS_NAME)
    assert any(not final[name].equal(checkpoint[name]) for name in final)
    assert read_header(out / "checkpoint-2" / WEIGHTS_NAME)["training"]["step"] == 2


@pytest.mark.integration
def test_only_the_newest_checkpoint_keeps_its_training_state(run, tmp_path):
    folder, _, flags = run
    out = shutil.copytree(folder, tmp_path / "copy")
    flags = [str(out) if word == str(folder) else word for word in flags]
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4"]
    for step in (1, 2, 3):
        assert [path.name for path in (out / f"checkpoint-{step}").iterdir()] == [WEIGHTS_NAME]
    assert {WEIGHTS_NAME, CHECKPOINT_SIZES} <= {path.name for path in (out / "checkpoint-4").iterdir()}
    expected = "checkpoint-2 contains the adapter but no training state, .* use another checkpoint .checkpoint-4"
    with pytest.raises(AssertionError, match=expected):
        run_in_child(train, [*flags, "--resume_from_checkpoint", "checkpoint-2"])
    before = (out / "checkpoint-2" / WEIGHTS_NAME).read_bytes()
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(AssertionError, match="checkpoint-3 contains the adapter but no training state"):
        run_in_child(train, [*flags, "--resume_from_checkpoint", "latest"])
    assert (out / "checkpoint-2" / WEIGHTS_NAME).read_bytes() == before


@pytest.mark.integration
def test_images_are_generated_from_a_checkpoint(run, tmp_path):
    out, _, _ = run
    shared = ["--prompt", "a sks toy", "--num_images", "1", "--num_inference_steps", "2", "--resolution", "32"]
    images = []
    for name, adapter in (("early", out / "checkpoint-1"), ("last", out / "checkpoint-4"), ("final", out)):
        words = ["generate", "--adapter", str(adapter), *shared, "--output_dir", str(tmp_path / name)]
        run_in_child(generate, words)
        images.append(Image.open(tmp_path / name / "000-a-sks-toy-00.png").tobytes())
        record = json.loads((tmp_path / name / "metadata.jsonl").read_text())
        assert record["adapter"] == str(adapter)
    assert images[1] == images[2] != images[0]


@pytest.mark.integration
def test_subjects_trained_together_each_have_their_checkpoints(tiny_sd, tmp_path):
    lines = []
    for number, name in enumerate("ab"):
        photos = write_photos(tmp_path / f"photos-{name}", 3)
        line = {"instance_data_dir": str(photos), "instance_prompt": f"a sks {name}", "seed": number}
        lines.append(line | {"output_dir": str(tmp_path / name)})
    (tmp_path / "subjects.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--subjects_file", tmp_path / "subjects.jsonl", "--rank", 2]
    flags += ["--output_dir", tmp_path / "shared", "--resolution", 32, "--max_train_steps", 3, "--report_to", "none"]
    flags += ["--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    run_in_child(train, list(map(str, flags)))
    for name in "ab":
        steps = sorted(path.parent.name for path in (tmp_path / name).glob(f"checkpoint-*/{WEIGHTS_NAME}"))
        assert steps == ["checkpoint-2", "checkpoint-3"]
        last, final = (load_file(tmp_path / name / part / WEIGHTS_NAME) for part in ("checkpoint-3", "."))
        assert all(last[key].equal(final[key]) for key in final)
    assert not (tmp_path / "shared" / "checkpoint-3" / WEIGHTS_NAME).exists()
    assert sorted(path.name for path in (tmp_path / "shared").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
