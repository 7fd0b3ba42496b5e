"""Files and scores of an earlier commit against the current code: everything loads, and comes out the same.

``tests/fixtures/make_before.py`` wrote the files with the code of that commit, and says what they are.
"""

import importlib
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from delora_diffusers.training import run_folder
from tests.helpers import run_in_child

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "before"
COMMANDS: dict[str, str] = json.loads((FIXTURES / "commands.json").read_text())
ADAPTERS = sorted(path.stem for path in (FIXTURES / "adapters").iterdir())
EXPORTS = [name for name in COMMANDS if name.startswith("export")]
WEIGHTS = "pytorch_delora_weights.safetensors"
SCORE_TOLERANCE = 1e-5 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 1e-2
"""Without AVX images are resized with other roundings, and pixels at the edge of two classes change theirs."""
PROSE = {"source"}
"""Keys of scores whose values are sentences for people."""

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the scores were computed on a CPU")


@pytest.fixture
def before(tiny_sd, tmp_path, monkeypatch) -> Path:
    """A copy of the fixtures and the tiny pipeline, as the working directory."""
    folder = tmp_path / "before"
    shutil.copytree(FIXTURES, folder)
    (folder / "tiny-sd").symlink_to(tiny_sd)
    monkeypatch.chdir(folder)
    return folder


def repeat(name: str, output: str | None = None) -> None:
    """Run one of the recorded commands again in this process, into another output where one is given."""
    module, *words = shlex.split(COMMANDS[name])
    if output is not None:
        (flag,) = {"--output", "--output_dir"} & set(words)
        words[words.index(flag) + 1] = output
    importlib.import_module(f"{module}.__main__").main(words)


def read(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.metadata(), load_file(file)


def same_header(metadata: dict[str, str], earlier: dict[str, str]) -> bool:
    """Whether two headers are equal, except that a local base model is now recorded by its full path, and the path of
    computation, which was fast by default, only if it is not the default."""
    headers = [json.loads(entry["delora_diffusers"]) for entry in (metadata, earlier)]
    for config in headers[0]["config"].values():
        config.setdefault("path", "fast")
    name, earlier_name = (header.pop("base_model") for header in headers)
    return headers[0] == headers[1] and Path(name).is_absolute() and Path(name).name == Path(earlier_name).name


def list_files(path: Path) -> list[Path]:
    """The files of a folder relative to it, or a file itself."""
    return [file.relative_to(path) for file in sorted([path, *path.rglob("*")]) if file.is_file()]


def times(folder: Path, pattern: str) -> dict[str, int]:
    """When each file that matches was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def assert_same(current: Any, earlier: Any, key: str = "") -> None:
    """Nested JSON values are equal: floats within the tolerance, everything else exactly."""
    if isinstance(earlier, dict):
        assert list(current) == list(earlier), key
        for name in earlier:
            if name not in PROSE:
                assert_same(current[name], earlier[name], f"{key}.{name}")
    elif isinstance(earlier, list):
        assert len(current) == len(earlier), key
        for number, (one, other) in enumerate(zip(current, earlier)):
            assert_same(one, other, f"{key}[{number}]")
    elif isinstance(earlier, float):
        assert current == pytest.approx(earlier, abs=SCORE_TOLERANCE), key
    else:
        assert current == earlier, key


def load_component(tiny_sd: Path, component: str) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    kind = UNet2DConditionModel if component == "unet" else CLIPTextModel
    return kind.from_pretrained(tiny_sd, subfolder=component).eval()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_the_tiny_pipeline_is_the_one_of_the_fixtures(tiny_sd, component):
    """If this fails, so do the others, and for no fault of the adapters."""
    weights = [tensor.double() for tensor in load_component(tiny_sd, component).state_dict().values()]
    weights = [tensor for tensor in weights if tensor.is_floating_point()]
    expected = json.loads((FIXTURES / "model.json").read_text())[component]
    assert sum(float(w.square().sum()) for w in weights) ** 0.5 == pytest.approx(expected["norm"], rel=1e-6)
    assert sum(float(w.sum()) for w in weights) == pytest.approx(expected["sum"], rel=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_and_is_saved_as_the_same_bytes(tiny_sd, tmp_path, name):
    from delora_diffusers import load_adapter, load_control, save_adapter

    file, expected = FIXTURES / "adapters" / f"{name}.safetensors", load_file(FIXTURES / "expected.safetensors")
    metadata, saved = read(file)
    header = json.loads(metadata["delora_diffusers"])
    models = {component: load_component(tiny_sd, component) for component in header["config"]}
    adapters = {component: load_adapter(model, file, component) for component, model in models.items()}
    for component, adapter in adapters.items():
        loaded = {f"{component}.{key}": tensor for key, tensor in adapter.named_tensors()}
        assert loaded.keys() == {key for key in saved if key.startswith(f"{component}.")}
        assert all(torch.equal(tensor, saved[key]) for key, tensor in loaded.items())
        for module in (adapter.names[0], adapter.names[-1]):
            delta = expected[f"{name}.{component}.{module}"]
            assert delta.norm() > 1e-3
            # An element near zero is the difference of larger ones, and no more exact than they are.
            torch.testing.assert_close(
                adapter.delta_weight(module), delta, rtol=1e-6, atol=1e-6 * delta.abs().max().item()
            )
    again = save_adapter(
        adapters["unet"],
        tmp_path,
        text_encoders={component: adapter for component, adapter in adapters.items() if component != "unet"},
        control=load_control(models["unet"], file),
        **{key: header[key] for key in ("base_model", "pipeline", "training")},
    )
    assert again.name == WEIGHTS and again.read_bytes() == file.read_bytes()


@torch.no_grad()
def test_a_control_encoder_gives_the_same_features(tiny_sd):
    from delora_diffusers import load_control

    file, expected = FIXTURES / "adapters" / "delora_control.safetensors", load_file(FIXTURES / "expected.safetensors")
    control = load_control(load_component(tiny_sd, "unet"), file)
    assert control is not None and control.palette is not None
    palette = json.loads(read(file)[0]["delora_diffusers"])["control_encoder"]["palette"]
    assert control.palette.tolist() == palette and len(palette) == 5
    control.see(expected["map"])
    assert control.features is not None and control.features.std() > 0.01
    torch.testing.assert_close(control.features, expected["features"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_the_same(before, name):
    words = shlex.split(COMMANDS[name])
    earlier = Path(words[words.index("--output") + 1])
    current = Path("again") / earlier.name
    repeat(name, str(current))
    files = list_files(earlier)
    assert list_files(current) == files
    for file in files:
        if file.suffix == ".json":
            assert json.loads((current / file).read_text()) == json.loads((earlier / file).read_text())
            continue
        (metadata, tensors), (earlier_metadata, earlier_tensors) = read(current / file), read(earlier / file)
        assert metadata == earlier_metadata and tensors.keys() == earlier_tensors.keys()
        for key, tensor in earlier_tensors.items():
            rtol = 1e-3 if tensor.dtype == torch.float16 else 1e-6
            torch.testing.assert_close(tensors[key], tensor, rtol=rtol, atol=1e-6)


def test_an_import_is_the_same(before):
    repeat("import", "again")
    (metadata, tensors), (earlier_metadata, earlier) = (
        read(before / folder / WEIGHTS) for folder in ("again", "exports/imported")
    )
    assert same_header(metadata, earlier_metadata) and tensors.keys() == earlier.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in earlier.items())


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("generate", "generated/mug"),
        ("generate requests", "generated/hat"),
        ("generate maps", "generated_from_maps"),
        ("generate with adapters", "generated_with_adapters"),
    ],
)
def test_generate_finds_its_images_finished(before, name, folder):
    """Their records are equal, so no image is generated again."""
    images, metadata = times(before / folder, "0*.png"), (before / folder / "metadata.jsonl").read_bytes()
    repeat(name)
    assert len(images) >= 2 and times(before / folder, "0*.png") == images
    assert (before / folder / "metadata.jsonl").read_bytes() == metadata


def test_generate_samples_the_same_image(before):
    folder = before / "generated_with_adapters"
    images = sorted(folder.glob("0*.png"))
    for image in images:
        image.unlink()
    repeat("generate with adapters")
    assert sorted(folder.glob("0*.png")) == images
    for path in images:
        with Image.open(path) as image, Image.open(FIXTURES / folder.name / path.name) as earlier:
            assert image.info == earlier.info
            assert np.abs(np.asarray(image, dtype=int) - np.asarray(earlier, dtype=int)).max() <= 1


@on_cpu
@pytest.mark.integration
@pytest.mark.parametrize("name", ["dreambooth", "map2img"])
def test_scores_are_the_same(before, name):
    repeat(name, "again.json")
    current = (before / "again.json").read_text().replace(f"{ROOT}/", "")
    assert_same(json.loads(current), json.loads((before / "scores" / f"{name}.json").read_text()))


def read_results(folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """The summary and the tables of a results folder, with relative paths."""
    import pandas as pd

    summary = json.loads((folder / "summary.json").read_text().replace(f"{ROOT}/", ""))
    absolute = {name: [Path(folder, path).resolve() for path in paths] for name, paths in summary["references"].items()}
    summary["references"] = {n: [os.path.relpath(path, folder) for path in paths] for n, paths in absolute.items()}
    images = pd.read_parquet(folder / "scores.parquet")
    images["file"] = [os.path.relpath(Path(folder, path).resolve(), folder) for path in images["file"]]
    return summary, images, pd.read_csv(folder / "subjects.csv")


@on_cpu
@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "earlier", "output"),
    [
        ("benchmark", "results", "again"),
        ("benchmark", "results", None),
        ("benchmark with training", "trained_results", None),
    ],
    ids=["from the images", "in its folder", "after training"],
)
def test_a_benchmark_is_the_same(before, name, earlier, output):
    """Scored from the images, or continued in its own folder, where nothing is trained, generated or encoded again."""
    import pandas as pd

    expected = read_results(before / earlier)
    made = [times(before / earlier, pattern) for pattern in ("0*.png", "*.safetensors")]
    repeat(name, output)
    if output is None:
        assert [times(before / earlier, pattern) for pattern in ("0*.png", "*.safetensors")] == made
        settings = json.loads((before / earlier / "settings.json").read_text())
        assert len(settings["starts"]) == 2
        assert settings["made"] == json.loads((FIXTURES / earlier / "settings.json").read_text())["made"]
    summary, *tables = read_results(before / (output or earlier))
    assert_same(summary, expected[0])
    for table, expected_table in zip(tables, expected[1:]):
        pd.testing.assert_frame_equal(table, expected_table, rtol=0, atol=SCORE_TOLERANCE)


@on_cpu
def test_a_report_reads_the_results(before):
    importlib.import_module("eval.__main__").main(["report", "results", "trained_results", "--output", "report.html"])
    page, tables = (before / "report.html").read_text(), (before / "report.md").read_text()
    assert "mug" in page and "hat" in page
    for folder in ("results", "trained_results"):
        summary = json.loads((FIXTURES / folder / "summary.json").read_text())
        for score in summary["protocols"]["toybox"]["scores"].values():
            assert f"{score['mean']:.3f}" in tables


def _train(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    importlib.import_module("train_dreambooth_delora").main(words)


@on_cpu
@pytest.mark.integration
def test_a_training_run_is_continued(before, monkeypatch):
    """From the checkpoint after two steps to the adapter of three steps."""
    monkeypatch.chdir(ROOT)  # the server that forks the child imports from there
    _, *words = shlex.split(COMMANDS["train"])
    run_in_child(_train, before, [*words, "--max_train_steps", "3", "--resume_from_checkpoint", "latest"])
    (metadata, tensors), (expected_metadata, expected) = (
        read(before / file) for file in (f"training/{WEIGHTS}", "expected_training.safetensors")
    )
    assert same_header(metadata, expected_metadata) and tensors.keys() == expected.keys()
    two_steps = load_file(FIXTURES / "training" / WEIGHTS)
    assert not any(torch.equal(expected[key], two_steps[key]) for key in expected if key.endswith("_B"))
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-5, atol=1e-6)
    arguments, earlier = (
        json.loads((folder / "training" / "config.json").read_text())["arguments"] for folder in (before, FIXTURES)
    )
    # Flags that did not exist have their defaults, but for the crops, which were square.
    script = importlib.import_module("train_dreambooth_delora")
    defaults = run_folder.settings(script.parse_arguments([*words, "--recipe", "paper"])) | {"square": True}
    new = {name: value for name, value in defaults.items() if name not in earlier}
    assert arguments == earlier | new | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
