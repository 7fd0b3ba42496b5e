"""The commands generate, merge and info."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from delora_diffusers.__main__ import main
from tests.helpers import randomize, run_in_child, run_in_two_processes, start_two_processes, wait_for_both


@pytest.fixture(scope="module")
def adapter(tiny_sd, tmp_path_factory):
    """Folder with an adapter of the tiny pipeline whose parameters differ from their initial values."""
    from diffusers import UNet2DConditionModel

    from delora_diffusers import AdapterConfig, attach, save_adapter

    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    attached = attach(unet, AdapterConfig(rank=4))
    randomize(attached, 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(attached, folder, base_model=str(tiny_sd))
    return folder


def generate(adapter, out, *more: object) -> None:
    flags = ["--adapter", adapter, "--output_dir", out, "--num_inference_steps", 3, "--num_images", 3, *more]
    main(["generate", *map(str, flags)])


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_images_metadata_and_contact_sheet(adapter, tiny_sd, tmp_path, capsys):
    out = tmp_path / "g"
    generate(adapter, out, "--prompt", "a sks dog", "a 🐶 in the snow", "--seed", 5, "--batch_size", 2)
    records = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["prompt"], r["seed"]) for r in records] == [
        (prompt, seed) for prompt in ("a sks dog", "a 🐶 in the snow") for seed in (5, 6, 7)
    ]
    assert all((out / r["file_name"]).is_file() for r in records)
    assert records[0]["base_model"] == str(tiny_sd) and records[0]["guidance_scale"] == 7.5
    assert Image.open(out / "contact_sheet.png").width > 3 * 64
    assert "6 images" in capsys.readouterr().out


def test_an_image_does_not_depend_on_its_batch_and_equals_that_of_plain_diffusers(adapter, tiny_sd, tmp_path):
    for size in (1, 4):
        generate(adapter, tmp_path / str(size), "--prompt", "a sks dog", "--batch_size", size)
    names = sorted(p.name for p in (tmp_path / "1").glob("0*.png"))
    for name in names:
        assert np.abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / "4" / name)).max() <= 1

    from diffusers import StableDiffusionPipeline

    from delora_diffusers import load_adapter

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    load_adapter(pipeline.unet, adapter)
    generator = torch.Generator().manual_seed(1)
    image = pipeline("a sks dog", num_inference_steps=3, generator=generator).images[0]
    assert np.abs(pixels(tmp_path / "1" / names[1]) - np.asarray(image).astype(int)).max() <= 1


def test_strength_zero_is_the_base_model(adapter, tiny_sd, tmp_path):
    generate(adapter, tmp_path / "zero", "--prompt", "a dog", "--strength", 0)
    generate(adapter, tmp_path / "one", "--prompt", "a dog")
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--num_inference_steps", 3, "--num_images", 3]
    main(["generate", *map(str, flags), "--prompt", "a dog", "--output_dir", str(tmp_path / "base")])
    for name in sorted(p.name for p in (tmp_path / "base").glob("0*.png")):
        assert np.array_equal(pixels(tmp_path / "zero" / name), pixels(tmp_path / "base" / name))
        assert not np.array_equal(pixels(tmp_path / "one" / name), pixels(tmp_path / "base" / name))


def generate_and_die(adapter, out) -> None:
    """Stop like ``kill -9`` while the second batch is being generated."""
    import delora_diffusers.pipelines.sampling as sampling

    original, calls = sampling.sample_images, []

    def dying(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **settings)

    sampling.sample_images = dying
    generate(adapter, out, "--prompt", "a sks dog", "--batch_size", 1)


@pytest.mark.integration
def test_continues_where_it_was_stopped(adapter, tmp_path, capsys):
    out = tmp_path / "g"
    assert run_in_child(generate_and_die, adapter, out) == -signal.SIGKILL
    (first,) = out.glob("0*.png")
    modified = first.stat().st_mtime_ns
    generate(adapter, out, "--prompt", "a sks dog", "--batch_size", 1)
    assert first.stat().st_mtime_ns == modified
    assert "3 images" in (output := capsys.readouterr().out) and "(2 new)" in output
    generate(adapter, out, "--prompt", "a sks dog", "--batch_size", 1)
    assert "(0 new)" in capsys.readouterr().out
    content = first.read_bytes()
    for length in (0, 60, len(content) - 20):  # before, in and after the record
        first.write_bytes(content[:length])
        generate(adapter, out, "--prompt", "a sks dog", "--batch_size", 1)
        assert "(1 new)" in capsys.readouterr().out and first.read_bytes() == content
    with pytest.raises(SystemExit, match="was generated with other settings; pass a new --output_dir"):
        generate(adapter, out, "--prompt", "a sks dog", "--guidance_scale", 3)
    first.write_text("a note")
    with pytest.raises(SystemExit, match="was generated with other settings; pass a new --output_dir"):
        generate(adapter, out, "--prompt", "a sks dog", "--batch_size", 1)


def scaled_copy(adapter, folder, scale: float):
    """Copy an adapter to a folder with every lambda multiplied by ``scale``."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = adapter / "pytorch_delora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {n: t * scale if n.endswith("_lambda") else t for n, t in load_file(file).items()}
    folder.mkdir()
    save_file(tensors, folder / file.name, metadata=metadata)
    return folder


@pytest.mark.integration
def test_many_adapters_from_one_command(adapter, tmp_path):
    """One command generates the same images as separate commands per adapter, for the base model and at a strength."""
    further = scaled_copy(adapter, tmp_path / "further", 2.0)
    lines = [
        {"adapter": str(path), "prompts": ["a", "b"], "seed": seed, "output_dir": str(tmp_path / f"all-{seed}")}
        for seed, path in enumerate((adapter, further))
    ]
    lines.append({"prompts": ["a", "b"], "output_dir": str(tmp_path / "all-2"), "seed": 2})
    lines.append(lines[0] | {"output_dir": str(tmp_path / "all-3"), "seed": 3, "strength": 0.5})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--num_inference_steps", 2, "--num_images", 2]
    main(["generate", "--requests_file", str(tmp_path / "requests.jsonl"), *map(str, common)])
    for seed, path in enumerate((adapter, further, None, adapter)):
        flags = ["--prompt", "a", "b", "--seed", seed, "--output_dir", tmp_path / f"one-{seed}", *common]
        model = json.loads((tmp_path / "all-0" / "metadata.jsonl").read_text().splitlines()[0])["base_model"]
        flags += ["--pretrained_model_name_or_path", model] if path is None else ["--adapter", path]
        flags += ["--strength", 0.5] if seed == 3 else []
        main(["generate", *map(str, flags)])
        names = sorted(p.name for p in (tmp_path / f"one-{seed}").glob("0*.png"))
        assert len(names) == 4
        for name in names:
            assert np.array_equal(pixels(tmp_path / f"all-{seed}" / name), pixels(tmp_path / f"one-{seed}" / name))


@pytest.mark.integration
def test_a_sheet_of_strengths_and_a_sum_of_adapters(adapter, tiny_sd, tmp_path):
    further = scaled_copy(adapter, tmp_path / "further", 2.0)
    generate(adapter, tmp_path / "sheet", "--prompt", "a", "b", "--strength", 0, 0.5, 1, "--num_images", 1)
    names = sorted(p.name for p in (tmp_path / "sheet").glob("0*.png"))
    assert names == sorted(f"00{n}-{p}-00-s{s}.png" for n, p in enumerate("ab") for s in ("0", "0.5", "1"))
    with Image.open(tmp_path / "sheet" / "contact_sheet.png") as sheet:
        assert 3 * 256 < sheet.width < 4 * 256
    generate(adapter, tmp_path / "half", "--prompt", "a", "--strength", 0.5, "--num_images", 1)
    half = pixels(tmp_path / "half" / "000-a-00.png")
    assert np.abs(half - pixels(tmp_path / "sheet" / "000-a-00-s0.5.png")).max() <= 1
    # The copy's update is 2x the original's, so both with weight 1 equal the original at strength 3.
    flags = ["--prompt", "a", "--num_images", "1", "--num_inference_steps", "3"]
    for order in ([adapter, further], [further, adapter]):
        both = ["--adapter", *map(str, order), "--adapter_weights", "1", "1", *flags, "--output_dir"]
        main(["generate", *both, str(tmp_path / f"both-{order[0].name}")])
    generate(adapter, tmp_path / "one", "--prompt", "a", "--strength", 3, "--num_images", 1)
    mixed = [pixels(tmp_path / f"both-{first.name}" / "000-a-00.png") for first in (adapter, further)]
    assert np.abs(mixed[0] - mixed[1]).max() <= 1
    assert np.abs(mixed[0] - pixels(tmp_path / "one" / "000-a-00.png")).max() <= 1
    assert np.abs(mixed[0] - half).max() > 5
    with pytest.raises(SystemExit, match="--adapter_weights: 1 for 2 --adapter; give one for each"):
        main(["generate", "--adapter", "x", "y", "--adapter_weights", "1", *flags, "--output_dir", str(tmp_path / "n")])


@pytest.mark.integration
def test_two_processes_share_the_work(adapter, tmp_path):
    command = ["generate", "--adapter", str(adapter), "--prompt", "a", "b", "--num_images", "2"]
    command += ["--num_inference_steps", "2", "--batch_size", "1", "--output_dir"]
    printed = run_in_two_processes(main, [*command, str(tmp_path / "two")])
    assert printed.count("4 images in") == 1, printed[-2000:]
    main([*command, str(tmp_path / "one")])
    for path in (tmp_path / "one").iterdir():
        if path.name != "contact_sheet.png":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_merged_pipeline_generates_the_same_images(adapter, tmp_path):
    main(["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")])
    generate(adapter, tmp_path / "adapter", "--prompt", "a dog")
    flags = ["--pretrained_model_name_or_path", tmp_path / "merged", "--num_inference_steps", 3, "--num_images", 3]
    main(["generate", *map(str, flags), "--prompt", "a dog", "--output_dir", str(tmp_path / "plain")])
    for name in sorted(p.name for p in (tmp_path / "plain").glob("0*.png")):
        assert np.abs(pixels(tmp_path / "adapter" / name) - pixels(tmp_path / "plain" / name)).max() <= 1
    with pytest.raises(SystemExit, match="already exists"):
        main(["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")])


def test_info(adapter, tiny_sd, capsys):
    main(["info", str(adapter)])
    output = capsys.readouterr().out
    assert f"base model: {tiny_sd}" in output and "56 modules" in output and "rank: 4" in output


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++", "euler", "euler-a", "lms", "pndm", "unipc"])
def test_schedulers(adapter, tmp_path, scheduler):
    if scheduler == "lms":
        pytest.importorskip("scipy")
    generate(
        adapter, tmp_path, "--prompt", "a dog", "--scheduler", scheduler, "--num_images", 1, "--num_inference_steps", 5
    )
    assert len(list(tmp_path.glob("0*.png"))) == 1


@pytest.mark.integration
def test_killing_one_of_two_processes_loses_no_finished_image(adapter, tmp_path):
    """After ``kill -9`` of one process, finished images stay and the same command generates the remaining ones."""
    words = ["generate", "--adapter", str(adapter), "--prompt", "a", "b", "--num_images", "20"]
    words += ["--num_inference_steps", "10", "--batch_size", "1", "--output_dir", str(tmp_path / "two")]
    children = start_two_processes(tmp_path / "log", main, words)
    while len(list(tmp_path.glob("two/0*.png"))) < 6:
        assert all(child.process.is_alive() for child in children), (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.05)
    children[1].process.kill()
    with pytest.raises(AssertionError, match="a process was killed"):
        wait_for_both(children)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("two/0*.png")}
    assert 6 <= len(kept) < 40
    printed = run_in_two_processes(main, words)
    assert not list(tmp_path.glob("two/.*.part"))  # nor what the killed process was writing
    assert f"({40 - len(kept)} new)" in printed, printed[-2000:]
    assert all((tmp_path / "two" / name).stat().st_mtime_ns == modified for name, modified in kept.items())

    main([*words[:-1], str(tmp_path / "one")])
    for path in (tmp_path / "one").glob("0*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
