"""Training, generating and scoring with hub ids, as a user runs them, against a local hub."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_in_child, training_flags
from tests.hub_server import connect, serve_hub


def use_hub(endpoint: str, cache: Path, module: str, words: list[str], output: Path) -> None:
    """Run a module's command line with a hub; what it prints goes to a file."""
    connect(endpoint, cache)
    with output.open("w") as file, contextlib.redirect_stdout(file):
        importlib.import_module(module).main(words)


@pytest.mark.integration
def test_train_generate_and_score_by_hub_id(tiny_sd, tiny_scorers, photographs, tmp_path):
    repositories = {
        "tiny/stable-diffusion": tiny_sd,
        "tiny/dino": tiny_scorers / "dino",
        "tiny/clip": tiny_scorers / "clip",
    }
    out, images, scores = tmp_path / "out", tmp_path / "images", tmp_path / "scores.json"
    with serve_hub(repositories) as (endpoint, requests):
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

        def run(module: str, *words: object) -> None:
            run_in_child(use_hub, endpoint, tmp_path / "cache" / "hub", module, list(map(str, words)), tmp_path / "log")

        run("delora_diffusers.__main__", "info", "--memory", "tiny/stable-diffusion")
        assert "| weights | adapter |" in (tmp_path / "log").read_text()
        assert requests and not any(".safetensors" in request or ".bin" in request for request in requests)

        flags = training_flags(Path("tiny/stable-diffusion"), photographs, out, "--max_train_steps", 2)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        command = [*launch, "train_dreambooth_delora.py", *flags]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]

        generate = ["--adapter", out, "--prompt", "a sks toy", "--num_images", 2, "--num_inference_steps", 2]
        run("delora_diffusers.__main__", "generate", *generate, "--output_dir", images)
        score = ["--generated_dir", images, "--reference_dir", photographs, "--output", scores]
        run("eval.__main__", "dreambooth", *score, "--dino", "hf-hub:tiny/dino", "--clip", "hf-hub:tiny/clip")
        printed = (tmp_path / "log").read_text()
    assert "DINO" in printed and "CLIP-T" in printed
    result = json.loads(scores.read_text())
    assert result["counts"] == {"generated": 2, "reference": 5, "prompts": 1}
    assert result["models"]["clip"] == "hf-hub:tiny/clip"
    downloaded = {request.split("/resolve/")[0] for request in requests if "/resolve/" in request}
    assert downloaded == set(repositories)


@pytest.mark.integration
def test_push_to_hub_and_use_by_id(tiny_sd, photographs, tmp_path):
    """The uploaded repository has a model card that the hub can read, and every command accepts its id."""
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    with serve_hub({"tiny/stable-diffusion": tiny_sd, "me/toy": pushed}) as (endpoint, _):

        def run(module: str, *words: object) -> str:
            run_in_child(use_hub, endpoint, tmp_path / "cache", module, list(map(str, words)), tmp_path / "log")
            return (tmp_path / "log").read_text()

        flags = training_flags(Path("tiny/stable-diffusion"), photographs, tmp_path / "out", "--max_train_steps", 2)
        flags += ["--validation_prompt", "a sks toy", "a toy", "--validation_inference_steps", "1"]
        flags += ["--num_validation_images", "1", "--push_to_hub", "--hub_model_id", "me/toy", "--hub_token", "hf_x"]
        assert "pushed to me/toy" in run("train_dreambooth_delora", *flags)
        printed = run("delora_diffusers.__main__", "info", "me/toy")
        assert "base model: tiny/stable-diffusion" in printed
        assert "max_train_steps 2, prompt a photo of sks toy" in printed
        generate = ["--prompt", "a sks toy", "--num_images", 1, "--num_inference_steps", 1]
        generate += ["--output_dir", tmp_path / "p"]
        run("delora_diffusers.__main__", "generate", "--adapter", "me/toy", *generate)
        run("delora_diffusers.__main__", "merge", "--adapter", "me/toy", "--output_dir", tmp_path / "merged")
        with pytest.raises(AssertionError, match="error: no adapter at me/nothing: it is not a local folder"):
            run("delora_diffusers.__main__", "info", "me/nothing")
    names = {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "pytorch_delora_weights.safetensors", "samples/01.png"} <= names
    assert not any(name.startswith(("checkpoint", "logs")) for name in names)
    assert "hf_x" not in "".join((pushed / name).read_text() for name in ("README.md", "config.json"))
    published = "".join((pushed / name).read_text() for name in ("README.md", "config.json"))
    assert str(tmp_path) not in published and json.loads((pushed / "config.json").read_text())["arguments"]["rank"]
    assert str(photographs) in (tmp_path / "out" / "config.json").read_text(), "a resumed run needs it"
    from huggingface_hub import ModelCard

    card = ModelCard.load(pushed / "README.md").data
    fields = (card.library_name, card.base_model, card.license)
    assert fields == ("diffusers", "tiny/stable-diffusion", "creativeml-openrail-m")
    assert {"delora", "text-to-image", "stable-diffusion"} <= set(card.tags)
    samples = [(sample["text"], sample["output"]["url"]) for sample in card.widget]
    assert samples == [("a sks toy", "samples/00.png"), ("a toy", "samples/01.png")]
