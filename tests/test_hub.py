"""The three commands by hub id, against a hub on this machine, exactly as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, training_flags
from tests.hub_server import serve_hub


def test_the_three_commands_by_hub_id(tiny_sd, tiny_scorers, photographs, tmp_path):
    repositories = {
        "tiny/stable-diffusion": tiny_sd,
        "tiny/dino": tiny_scorers / "dino",
        "tiny/clip": tiny_scorers / "clip",
    }
    out, pictures, scores = tmp_path / "out", tmp_path / "pictures", tmp_path / "scores.json"
    with serve_hub(repositories) as (endpoint, requests):
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

        def run(*command: object) -> str:
            words = [sys.executable, *map(str, command)]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        flags = training_flags(Path("tiny/stable-diffusion"), photographs, out, "--max_train_steps", 2)
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        run(*launch, "train_dreambooth_delora.py", *flags)
        generate = ["--adapter", out, "--prompt", "a sks toy", "--num_images", 2, "--num_inference_steps", 2]
        run("-m", "delora_diffusers", "generate", *generate, "--output_dir", pictures)
        score = ["--generated_dir", pictures, "--reference_dir", photographs, "--output", scores]
        printed = run(*("-m", "eval", "dreambooth", *score, "--dino", "hf-hub:tiny/dino", "--clip", "hf-hub:tiny/clip"))
    assert "DINO" in printed and "CLIP-T" in printed
    result = json.loads(scores.read_text())
    assert result["counts"] == {"generated": 2, "reference": 5, "prompts": 1}
    assert result["models"]["clip"] == "hf-hub:tiny/clip"
    asked = {request.split("/resolve/")[0] for request in requests if "/resolve/" in request}
    assert asked == set(repositories)
