"""One clear sentence for each thing that can be wrong with a training command, and nothing left behind."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import ROOT, training_flags, write_photos


def remove_unet(model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    shutil.rmtree(broken / "unet")
    return ["--pretrained_model_name_or_path", broken]


def spoil(photographs: Path, content: bytes):
    def change(model, tmp_path):
        folder = write_photos(tmp_path / "photos", 3)
        (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:60] if content == b"cut" else content)
        return ["--instance_data_dir", folder]

    return change


def another_run(model, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    return ["--output_dir", tmp_path / "other"]


def empty_folder(model, tmp_path):
    (tmp_path / "empty").mkdir()
    return ["--instance_data_dir", tmp_path / "empty"]


def config_with(text: str):
    def change(model, tmp_path):
        (tmp_path / "config.yaml").write_text(text)
        return ["--config", tmp_path / "config.yaml"]

    return change


def flags(*words):
    return lambda model, tmp_path: list(words)


CASES = {
    "missing photographs": (flags("--instance_data_dir", "/no/such/folder"), "/no/such/folder is not a folder"),
    "no photographs": (empty_folder, "empty holds no picture"),
    "zero bytes": (spoil(Path(), b""), r"01\.png is not a readable picture"),
    "half a picture": (spoil(Path(), b"cut"), r"01\.png is not a readable picture"),
    "not a picture": (spoil(Path(), b"hello"), r"01\.png is not a readable picture"),
    "no prompt": (flags("--instance_prompt", ""), r"00\.png has no caption; give --instance_prompt"),
    "no class prompt": (flags("--with_prior_preservation"), "needs --class_prompt"),
    "resolution": (flags("--resolution", 100), "--resolution 100 is not a multiple of 8; use 96"),
    "seed": (flags("--seed", -1), "--seed -1 is negative"),
    "another run": (another_run, "other holds another run; name a new folder"),
    "rank": (flags("--rank", 500), "rank is 500, but .* is 32 x 32; choose a rank of at most 32"),
    "target": (flags("--targets", "to_q", "to_z"), "target to_z matches no module of UNet2DConditionModel"),
    "lambda": (flags("--delora_lambda", -2), r"delora_lambda is -2\.0; give a positive number"),
    "no model": (flags("--pretrained_model_name_or_path", ""), "pretrained_model_name_or_path is empty"),
    "model not there": (flags("--pretrained_model_name_or_path", "/no/model"), "/no/model does not exist"),
    "unknown hub id": (flags("--pretrained_model_name_or_path", "no/model"), "base model no/model could not be loaded"),
    "model without a unet": (remove_unet, "broken has no unet; give a whole Stable Diffusion pipeline folder"),
    "no such config": (flags("--config", "/no/config.yaml"), "/no/config.yaml is not a file"),
    "config key": (config_with("rnak: 4\n"), r"config\.yaml sets 'rnak', which is no flag"),
    "config syntax": (config_with("rank: [4\n"), r"config\.yaml is not valid YAML"),
    "step rules": (flags("--lr_scheduler", "piecewise_constant"), "needs --lr_step_rules"),
    "tracker": (flags("--report_to", "wandb"), "--report_to wandb needs wandb, which is not installed"),
    "8-bit": (flags("--use_8bit_adam"), "needs bitsandbytes, which is not installed"),
    "resume": (flags("--resume_from_checkpoint", "checkpoint-9"), "there is no checkpoint checkpoint-9"),
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case, tiny_sd, photographs, tmp_path):
    import train_dreambooth_delora as script

    change, message = CASES[case]
    package = {"8-bit": "bitsandbytes", "tracker": "wandb"}.get(case)
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    typed = training_flags(tiny_sd, photographs, tmp_path / "out", *change(tiny_sd, tmp_path))
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises((script.InputError, script.DataError), match=message) as refusal:
        script.main(typed)
    sentence = str(refusal.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert sorted(p for p in tmp_path.rglob("*")) == before, "a refused run writes nothing"


def test_no_disk_space(tiny_sd, photographs, tmp_path, monkeypatch):
    import train_dreambooth_delora as script

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5 * 2**20))
    with pytest.raises(script.InputError, match="on a disk with 5 MiB free; a run needs"):
        script.main(training_flags(tiny_sd, photographs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_sentence_and_nothing_else(tiny_sd, tmp_path):
    command = [
        sys.executable,
        "train_dreambooth_delora.py",
        *training_flags(tiny_sd, tmp_path / "none", tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'none'} is not a folder; name the folder that holds the photographs."
    )


def test_generate_refuses(tiny_sd, tmp_path):
    from delora_diffusers.__main__ import main

    def refused(message, *typed):
        with pytest.raises(SystemExit, match=message):
            main(["generate", "--output_dir", str(tmp_path / "g"), *map(str, typed)])
        assert not (tmp_path / "g").exists()

    refused("no adapter at", "--adapter", tmp_path / "none", "--prompt", "x")
    refused("--num_images is 0", "--prompt", "x", "--num_images", 0)
    refused("multiple of 8", "--prompt", "x", "--resolution", 33)
    refused("is not a file", "--prompts_file", tmp_path / "none")
    (tmp_path / "prompts.txt").write_text("\n \n")
    refused("holds no prompt", "--prompts_file", tmp_path / "prompts.txt")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.safetensors", format="PNG")
    refused("is not a safetensors file", "--adapter", tmp_path / "picture.safetensors", "--prompt", "x")


@pytest.mark.parametrize("module", ["train_dreambooth_delora", "train_controlnet_map2img", "delora_diffusers.__main__"])
def test_checks_answer_before_torch_is_imported(module):
    """A refused argument and --help take a third of a second, not the seconds that torch takes to import."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
