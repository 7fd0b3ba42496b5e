"""Every invalid training command ends with one clear sentence and writes no file."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.helpers import ROOT, training_flags, write_photos


def remove_unet(model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    shutil.rmtree(broken / "unet")
    return ["--pretrained_model_name_or_path", broken]


def corrupt_photo(content: bytes):
    def change(model, tmp_path):
        folder = write_photos(tmp_path / "photos", 3)
        (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:60] if content == b"truncated" else content)
        return ["--instance_data_dir", folder]

    return change


def another_run(model, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "precious.txt").write_text("keep me")
    return ["--output_dir", tmp_path / "other"]


def other_files(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    return ["--output_dir", tmp_path / "photos"]


def other_files_resumed(model, tmp_path):
    return [*other_files(model, tmp_path), "--resume_from_checkpoint", "latest"]


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
    "missing folder": (flags("--instance_data_dir", "/no/such/folder"), "/no/such/folder is not a folder"),
    "no photos": (empty_folder, "empty contains no image"),
    "empty file": (corrupt_photo(b""), r"01\.png is not a readable image"),
    "truncated image": (corrupt_photo(b"truncated"), r"01\.png is not a readable image"),
    "not an image": (corrupt_photo(b"hello"), r"01\.png is not a readable image"),
    "no prompt": (flags("--instance_prompt", ""), r"00\.png has no caption; give --instance_prompt"),
    "no class prompt": (flags("--with_prior_preservation"), "needs --class_prompt"),
    "resolution": (flags("--resolution", 100), "--resolution 100 is not a multiple of 8; use 96"),
    "huge resolution": (flags("--resolution", 100_000), "--resolution 100000 is more than 8192 pixels; give for"),
    "no resolution": (flags("--resolution", 0), "--resolution 0 is less than 8 pixels; give for example 512"),
    "seed": (flags("--seed", -1), "--seed -1 is not between 0 and 4294967295"),
    "another run": (another_run, "other contains another run; give a new folder"),
    "photos as output": (other_files, "photos contains files that are not of a run; give a new folder"),
    "photos as a run": (other_files_resumed, "photos contains files that are not of a run; give a new folder"),
    "warm-up of a constant rate": (flags("--lr_warmup_steps", 5), "does nothing with --lr_scheduler constant; give"),
    "alpha of DeLoRA": (
        flags("--alpha", 3),
        "--alpha belongs to --method lora, dora, dora_fixed_magnitude, not delora",
    ),
    "blocks of LoRA": (flags("--method", "lora", "--blocks", 2), "--blocks belongs to --method ether, .*, not lora"),
    "cycles": (flags("--lr_num_cycles", 5), "--lr_num_cycles belongs to --lr_scheduler cosine_with_restarts"),
    "unused rules": (flags("--lr_step_rules", "1:5,0.1"), "--lr_step_rules belongs to --lr_scheduler piecewise"),
    "class prompt": (flags("--class_prompt", "a dog"), "--class_prompt belongs to --with_prior_preservation and"),
    "class images": (flags("--num_class_images", 7), "--num_class_images belongs to --with_prior_preservation, which"),
    "class folder": (flags("--class_data_dir", "x"), "--class_data_dir belongs to --with_prior_preservation, which"),
    "no rate": (flags("--learning_rate", 0), "--learning_rate 0 would leave the new adapter as it starts"),
    "no login": (flags("--push_to_hub", "--hub_token", "x"), "--push_to_hub cannot log in to the hub .*; run `hf auth"),
    "rank": (flags("--rank", 500), "rank is 500, but .* is 32 x 32; choose a rank of at most 32"),
    "target": (flags("--targets", "to_q", "to_z"), "target to_z matches no module of UNet2DConditionModel"),
    "lambda": (flags("--delora_lambda", -2), r"delora_lambda is -2\.0; give a positive number"),
    "two boundaries": (
        flags("--delora_lambda", 2, "--relative_bound", 0.1),
        "relative_bound and delora_lambda both set the boundary; give only one of them",
    ),
    "a boundary of LoRA": (
        flags("--method", "lora", "--relative_bound", 0.1),
        "relative_bound belongs to the method delora, not lora; leave it out",
    ),
    "no model": (flags("--pretrained_model_name_or_path", ""), "pretrained_model_name_or_path is empty"),
    "missing model": (flags("--pretrained_model_name_or_path", "/no/model"), "/no/model does not exist"),
    "unknown hub id": (flags("--pretrained_model_name_or_path", "no/model"), "base model no/model could not be loaded"),
    "model without a unet": (remove_unet, "broken has no unet; give a complete pipeline folder"),
    "missing config": (flags("--config", "/no/config.yaml"), "/no/config.yaml is not a file"),
    "config key": (config_with("rnak: 4\n"), r"config\.yaml sets 'rnak', which is not a flag"),
    "config syntax": (config_with("rank: [4\n"), r"config\.yaml is not valid YAML"),
    "step rules": (flags("--lr_scheduler", "piecewise_constant"), "needs --lr_step_rules"),
    "tracker": (flags("--report_to", "wandb"), "--report_to wandb needs wandb, which is not installed"),
    "8-bit": (flags("--use_8bit_adam"), "needs bitsandbytes, which is not installed"),
    "resume": (
        flags("--resume_from_checkpoint", "checkpoint-9"),
        "--resume_from_checkpoint checkpoint-9 does not exist",
    ),
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset accelerate's state, which otherwise lasts as long as the process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("case", CASES)
def test_invalid_commands_end_with_one_sentence(case, tiny_sd, photographs, tmp_path):
    import train_dreambooth_delora as script

    change, message = CASES[case]
    package = {"8-bit": "bitsandbytes", "tracker": "wandb"}.get(case)
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    argv = training_flags(tiny_sd, photographs, tmp_path / "out", *change(tiny_sd, tmp_path))
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(script.InputError, match=message) as error:
        script.main(argv)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert sorted(p for p in tmp_path.rglob("*")) == before, "a rejected run must not write anything"


def test_no_disk_space(tiny_sd, photographs, tmp_path, monkeypatch):
    import train_dreambooth_delora as script

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5 * 2**20))
    with pytest.raises(script.InputError, match="on a disk with 5 MiB free, but a run needs"):
        script.main(training_flags(tiny_sd, photographs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_the_script_prints_only_the_error_message(tiny_sd, tmp_path):
    command = [
        sys.executable,
        "train_dreambooth_delora.py",
        *training_flags(tiny_sd, tmp_path / "none", tmp_path / "o"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"error: {tmp_path / 'none'} is not a folder; give the folder that contains the photos."
    )


def test_generate_rejects_bad_flags(tiny_sd, tmp_path):
    from delora_diffusers.__main__ import main

    def refused(message, *flags):
        with pytest.raises(SystemExit, match=message):
            main(["generate", "--output_dir", str(tmp_path / "g"), *map(str, flags)])
        assert not (tmp_path / "g").exists()

    refused("no adapter at", "--adapter", tmp_path / "none", "--prompt", "x")
    refused("--num_images is 0", "--prompt", "x", "--num_images", 0)
    refused("multiple of 8", "--prompt", "x", "--resolution", 33)
    refused("is not a file", "--prompts_file", tmp_path / "none")
    (tmp_path / "prompts.txt").write_text("\n \n# only a comment\n")
    refused("contains no prompt", "--prompts_file", tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("# a tree\na dog -- sitting --well\na mug --n low quality --w 512\n")
    refused("prompts.txt, line 3: --n would be read as words", "--prompts_file", tmp_path / "prompts.txt")
    refused("--strength scales the update of an adapter, and none is given", "--prompt", "x", "--strength", 0.5, 1)
    Image.new("RGB", (4, 4)).save(tmp_path / "image.safetensors", format="PNG")
    refused("is not a safetensors file", "--adapter", tmp_path / "image.safetensors", "--prompt", "x")


@pytest.mark.integration
@pytest.mark.parametrize(
    "module", ["train_dreambooth_delora", "train_controlnet_map2img", "delora_diffusers.__main__", "eval.__main__"]
)
def test_command_line_modules_do_not_import_torch(module):
    """A rejected argument and --help take a third of a second instead of the seconds that importing torch takes."""

    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
