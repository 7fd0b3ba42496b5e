"""The notebooks: valid, without outputs, and their cells run on the miniature."""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import ROOT, run_in_child

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = ROOT / "notebooks" / "stable_diffusion_on_colab.ipynb"


def code_cells(notebook: Path) -> dict[str, str]:
    """The source of each code cell, by its id."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def settings_of(notebook: Path) -> dict[str, Any]:
    """The values that its first code cell assigns."""
    settings: dict[str, Any] = {}
    exec(next(iter(code_cells(notebook).values())), settings)
    return {name: value for name, value in settings.items() if name.isupper()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_without_outputs(path):
    """What nbformat 4.5 requires of a notebook of code and Markdown (nbformat.v4.5.schema.json)."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert {"cells", "metadata", "nbformat", "nbformat_minor"} == set(notebook)
    assert {"name", "display_name"} <= set(notebook["metadata"]["kernelspec"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        more = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | more and cell["cell_type"] in (
            "code",
            "markdown",
        )
        assert not cell.get("outputs") and cell.get("execution_count") is None
    title = "".join(notebook["cells"][0]["source"])
    assert title.startswith("# ") and path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    links = re.findall(r"\]\((\.\.?/[^)#\s]+)(?:#([\w-]+))?\)", path.read_text(encoding="utf-8"))
    assert links
    for target, anchor in links:
        file = path.parent / target
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor


def test_its_estimate_rests_on_numbers_of_the_documentation():
    notebook = json.loads(COLAB.read_text(encoding="utf-8"))
    text = " ".join("".join(notebook["cells"][0]["source"]).split())
    memory, performance = (
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("memory", "performance")
    )
    assert "| SD 1.5, 512 pixels, fp16 | 4 GB | yes | 2.72 / 2.56 | 3.36 / 3.15 |" in memory
    assert "| 1 | ours, DeLoRA | 95.4 | 21.9 | 2,513 | 21.8 |" in performance
    assert "| **ours, written into the weights (`generate`)** | 29.55 |" in performance
    assert "792 TFLOP/s" in performance and "3.02 TB/s" in performance
    for number in ("2.72 GiB", "3.36", "21.8 ms", "30 ms", "792 TFLOP/s", "3.02 TB/s", "65 TFLOP/s", "320 GB/s"):
        assert number in text
    settings = settings_of(COLAB)
    images = 2 * 2 * len(settings["PROMPTS"])
    training, generating = settings["STEPS"] * 12 * 21.8e-3 / 60, images * 25 * 12 * 30e-3 / 60
    assert f"| {settings['STEPS']} training steps of {12 * 21.8e-3:.2f} s | {training:.1f} |" in text
    assert f"| {images} images of 25 steps of {12 * 30e-3:.2f} s | {generating:.1f} |" in text
    assert f"| **in all** | **{2.5 + 2 + 2.5 + training + generating:.0f}** |" in text
    assert f"add {training + generating:.0f} minutes" in text


def test_the_settings_for_the_t4_are_flags_of_the_commands():
    from delora_diffusers.commands.generate import add_arguments
    from train_dreambooth_delora import parse_arguments

    settings = settings_of(COLAB)
    model = ["--pretrained_model_name_or_path", settings["MODEL"], *settings["MODEL_FLAGS"]]
    args = parse_arguments([*model, "--instance_data_dir", "dog", *settings["TRAINING_FLAGS"]])
    assert (args.mixed_precision, args.variant) == ("fp16", "fp16")
    assert (args.resolutions, args.bucket_step) == ([settings["RESOLUTION"]], settings["BUCKET_STEP"])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    prompts = ["--prompt", *settings["PROMPTS"], "--output_dir", "x"]
    options = parser.parse_args([*model, *prompts, *settings["GENERATE_FLAGS"]])
    assert (options.num_images, options.num_inference_steps, options.mixed_precision) == (2, 25, "fp16")
    assert all(settings["SUBJECT"] in prompt for prompt in settings["PROMPTS"])


def execute(arguments: list[str], folder: Path) -> None:
    """What the interpreter does with these arguments."""
    os.chdir(folder)
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")


def run_quickly(*words: object) -> None:
    """What ``run`` of the notebook does, in a process that has everything imported."""
    executable, *arguments = map(str, words)
    assert executable == sys.executable
    run_in_child(execute, arguments, Path.cwd())


def check_run(run: Any) -> None:
    """``run`` prints what a command prints on both streams, and stops the notebook if it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(sys.executable, "-c", "import sys; print('näh'); sys.stdout.flush(); print(2, file=sys.stderr)")
        with pytest.raises(SystemExit, match="failed; its last line"):
            run(sys.executable, "-c", "raise SystemExit('no such photo')")
    assert printed.getvalue() == "näh\n2\nno such photo\n"


def run_cells(notebook: Path, values: dict[str, Any], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute the code cells in order, with other settings, beside a stand-in for what Colab and Jupyter provide."""
    shown: list[Image.Image] = []
    downloaded: list[str] = []
    colab: Any = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(
        upload=lambda: {path.name: path.read_bytes() for path in sorted(photos.iterdir())}, download=downloaded.append
    )
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"__name__": "__main__", "display": shown.append}
    cells = code_cells(notebook)
    for number, (name, source) in enumerate(cells.items()):
        exec(compile(source, f"cell {name}", "exec"), namespace)
        if number == 0:
            namespace |= values
        if "def run(" in source:
            check_run(namespace["run"])
            namespace["run"] = run_quickly
    assert len(shown) == 5 + 1 and min(shown[-1].size) > 300
    assert [Path(name).name for name in downloaded] == ["pytorch_delora_weights.safetensors", "my_dog.safetensors"]


@pytest.mark.integration
def test_the_cells_run_on_the_miniature(tmp_path, monkeypatch):
    """As on Colab, from photos to the exported adapter, on a CPU and with a few steps."""
    from data.toybox.write import write_unseen_subject

    write_unseen_subject(tmp_path / "photos", count=5)
    subject = "sks toy"
    values = {
        "MODEL": "mini-sd",
        "MODEL_FLAGS": [],
        "SUBJECT": subject,
        "PROMPTS": [f"a photo of {subject} on the beach", f"a photo of {subject} in the snow"],
        "STEPS": 2,
        "TRAINING_FLAGS": ["--mixed_precision", "no", "--train_batch_size", "1", "--rank", "4"],
        "GENERATE_FLAGS": ["--mixed_precision", "no", "--num_images", "1", "--num_inference_steps", "2"],
        "SCORE_FLAGS": ["--protocol", "toybox"],
        "RESOLUTION": 64,
        "BUCKET_STEP": 16,
        "WORK": str(tmp_path / "work"),
    }
    assert values.keys() <= settings_of(COLAB).keys()
    run_cells(COLAB, values, tmp_path / "photos", monkeypatch)
    work = tmp_path / "work"
    assert (work / "runs" / "my_dog" / "pytorch_delora_weights.safetensors").is_file()
    assert (work / "outputs" / "my_dog-lora" / "my_dog.safetensors").is_file()
    assert "DINO" in (work / "outputs" / "my_dog-page" / "index.html").read_text(encoding="utf-8")
    for folder in ("my_dog-before", "my_dog-after"):
        assert len(list((work / "outputs" / folder).glob("[0-9]*.png"))) == 2
