"""What commands write: never over something else, never half, never somewhere else, and the same bytes after a stop."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from delora_diffusers import AdapterConfig, InputError, attach, save_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.files.reading import METADATA_KEY
from delora_diffusers.maps import find_maps, map_key
from delora_diffusers.methods.functions import method_functions
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import METADATA_NAME, WEIGHTS_NAME
from tests.helpers import randomize, run_in_child, start_in_child

TARGET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def write_adapter(tiny_sd, folder, method="delora", **config):
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    targets = ("*",) if method == "full" else (TARGET,)
    adapter = attach(unet, AdapterConfig(method=method, rank=2, targets=targets, **config))
    randomize(adapter)
    return save_adapter(adapter, folder, base_model=str(tiny_sd), pipeline="StableDiffusionPipeline")


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("weight", [(64, 32), (32, 64)])
def test_the_shapes_of_a_method_are_those_of_its_initialization(method, weight):
    for config in (
        AdapterConfig(method=method, rank=3, targets=("*",) if method == "full" else ("x",)),
        AdapterConfig(method=method, rank=3, targets=("*",) if method == "full" else ("x",), blocks=8),
        AdapterConfig(method=method, rank=3, targets=("*",) if method == "full" else ("x",), start="zero"),
    ):
        functions = method_functions(method)
        starts = functions.initialize(torch.randn(1, *weight), config, torch.Generator())
        actual = {key: tuple(tensor.shape[1:]) for tensors in starts for key, tensor in tensors.items()}
        assert actual == functions.shapes(weight, config)


def reshaped(file, change, output):
    """A copy of an adapter file in which every tensor that ``change`` accepts has another shape."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, output, metadata=metadata)
    assert METADATA_KEY in metadata
    return output


SHAPES = {
    "a leading dimension": lambda tensor: tensor[None],
    "one row": lambda tensor: tensor[:1] if tensor.ndim else tensor[None],
    "one value": lambda tensor: tensor.reshape(-1)[:1],
    "a scalar": lambda tensor: tensor.reshape(-1)[0],
    "transposed": lambda tensor: tensor.mT if tensor.ndim == 2 else tensor[None],
    "repeated": lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(3),
}


@pytest.mark.integration
@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_no_odd_shape_of_any_tensor_is_merged(tiny_sd, tmp_path, method, capsys):
    """Broadcasting would change other weights and end with success."""
    file = write_adapter(tiny_sd, tmp_path / "a", method)
    for name, tensor in load_file(file).items():
        for kind, reshape in SHAPES.items():
            if reshape(tensor).shape == tensor.shape:
                continue

            def change(other, t, name=name, reshape=reshape):
                return reshape(t) if other == name else t

            bad = reshaped(file, change, tmp_path / "x.safetensors")
            with pytest.raises(SystemExit) as raised:
                main(["merge", "--adapter", str(bad), "--output_dir", str(tmp_path / "out")])
            assert str(raised.value).startswith("error: ") and "x.safetensors" in str(raised.value), (name, kind)
            assert not (tmp_path / "out").exists()
    main(["merge", "--adapter", str(file), "--output_dir", str(tmp_path / "out")])


@pytest.mark.integration
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_neither_merged_nor_exported(tiny_sd, tmp_path, value):
    file = write_adapter(tiny_sd, tmp_path / "a")

    def spoil(name, tensor):
        if name.endswith("delora_B"):
            tensor[0, 0] = value
        return tensor

    bad = str(reshaped(file, spoil, tmp_path / "x.safetensors"))
    for command in (
        ["merge", "--adapter", bad, "--output_dir", str(tmp_path / "o")],
        ["export", "--adapter", bad, "--format", "diffusers", "--output", str(tmp_path / "o")],
        ["info", bad],
    ):
        with pytest.raises(SystemExit, match="contains values that are not finite in unet"):
            main(command)
        assert not (tmp_path / "o").exists()


@pytest.mark.integration
def test_an_adapter_merges_into_the_model_it_fits_only(tiny_sd, tmp_path):
    file = write_adapter(tiny_sd, tmp_path / "a", "etherplus")
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[f"{TARGET}.weight"] = tensors[f"{TARGET}.weight"][:, :32].contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"u of shape \(1, 64\), not \(1, 32\); give the adapter's base"):
        words = ["--adapter", file, "--pretrained_model_name_or_path", other, "--output_dir", tmp_path / "o"]
        main(["merge", *map(str, words)])


@pytest.mark.integration
def test_what_a_killed_command_left_does_not_refuse_the_retry(tiny_sd, tmp_path):
    """A folder appears together with its file, so an interrupted export or import leaves no folder of that name."""
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    file = write_adapter(tiny_sd, tmp_path / "a")
    base = ["--pretrained_model_name_or_path", str(tiny_sd)]
    for name, command in {
        "d": ["export", "--adapter", str(file), "--format", "diffusers", "--output"],
        "k": ["export", "--adapter", str(file), "--format", "kohya", "--output"],
        "p": ["export", "--adapter", str(file), "--format", "peft-delora", "--output"],
        "i": ["import", "--peft_dir", str(tmp_path / "p"), *base, "--output_dir"],
        "m": ["merge", "--adapter", str(file), "--output_dir"],
    }.items():
        leftover = tmp_path / f".{name}.{process}.part"
        leftover.mkdir()
        (leftover / "half").write_text("half")
        main([*command, str(tmp_path / name)])
        assert not leftover.exists() and (tmp_path / name).is_dir()
    assert not list(tmp_path.rglob("*.part"))


def generate(folder, tiny_sd, *more) -> list[str]:
    flags = ["generate", "--pretrained_model_name_or_path", str(tiny_sd), "--output_dir", str(folder)]
    flags += ["--num_inference_steps", "2", "--resolution", "32", "--prompt", "a sks dog", *map(str, more)]
    return flags


@pytest.mark.integration
def test_a_restarted_generate_gives_the_same_bytes(tiny_sd, tmp_path):
    """An image's last bits depend on its batch, so a batch is the same wherever the first run stopped."""
    flags = ["--num_images", 7, "--batch_size", 3]
    main(generate(tmp_path / "whole", tiny_sd, *flags))
    names = sorted(path.name for path in (tmp_path / "whole").glob("0*.png"))
    for missing in ([1], [0, 3, 4], [6], [2, 5, 6]):
        stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped", dirs_exist_ok=True)
        for number in missing:
            (stopped / names[number]).unlink()
        main(generate(stopped, tiny_sd, *flags))
        for name in names:
            assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (missing, name)


@pytest.mark.integration
def test_generate_keeps_the_images_of_another_run(tiny_sd, tmp_path):
    main(generate(tmp_path / "g", tiny_sd, "--num_images", 2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()}
    for more, message in (
        (["--guidance_scale", 3], "was generated with other settings"),
        (["--num_images", 1], "contains other images, such as"),
        (["--prompt", "a cat"], "contains other images, such as"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(generate(tmp_path / "g", tiny_sd, "--num_images", 2, *more))
        assert {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()} == before
    main(generate(tmp_path / "g", tiny_sd, "--num_images", 3))


@pytest.mark.integration
def test_two_generates_at_once(tiny_sd, tmp_path):
    """The folder holds the images of one of them, whole, and the other is refused."""
    children = [start_in_child(main, generate(tmp_path / "g", tiny_sd, "--guidance_scale", s)) for s in (2, 3)]
    (refused,) = (error for child in children if (error := child.error()) is not None)
    assert refused.startswith("SystemExit: error: ")
    assert "another run is writing to" in refused or "was generated with other settings" in refused
    records = [json.loads(line) for line in (tmp_path / "g" / METADATA_NAME).read_text().splitlines()]
    assert len({record["guidance_scale"] for record in records}) == 1
    run_in_child(main, generate(tmp_path / "g", tiny_sd, "--guidance_scale", records[0]["guidance_scale"]))


def write_listed_maps(folder):
    """Maps of one name in two folders, with captions of their own."""
    lines = []
    for number, part in enumerate(("a", "b", "a/b")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32), number, np.uint8)).save(folder / part / "seg.png")
        Image.new("RGB", (32, 32)).save(folder / part / "rgb.png")
        lines.append({"file_name": f"{part}/rgb.png", "map": f"{part}/seg.png", "text": f"scene {part}"})
    (folder / METADATA_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_maps_of_one_name_in_two_folders_are_two(tmp_path):
    from data.maps import find_pairs
    from delora_diffusers.files.records import Request, plan

    folder = write_listed_maps(tmp_path / "maps")
    maps = find_maps(folder, None)
    assert [(m.key, m.caption) for m in maps] == [("a/seg", "scene a"), ("b/seg", "scene b"), ("a/b/seg", "scene a/b")]
    import argparse

    options = argparse.Namespace(num_inference_steps=1, guidance_scale=1.0, negative_prompt="", scheduler=None)
    more = {
        "max_prompt_chunks": 1,
        "resolution": None,
        "width": None,
        "height": None,
        "map_dir": folder,
        "default_caption": None,
        "max_maps": None,
        "num_images": 2,
    }
    options = argparse.Namespace(**vars(options) | more)
    records = plan(Request((), (), tmp_path / "out", 0), options, None)
    assert len({r["file_name"] for r in records}) == 6 and len({r["map"] for r in records}) == 3
    assert len({r["seed"] for r in records}) == 6
    assert [map_key(r["map"]) for r in records[::2]] == [m.key for m in maps]
    assert len({pair.name for pair in find_pairs(folder)}) == 3


@pytest.mark.parametrize("where", ["maps", "images"])
def test_files_that_differ_only_in_their_ending_are_refused(tmp_path, where):
    from data.maps import find_pairs

    for part in ("maps", "images"):
        (tmp_path / part).mkdir()
        Image.new("L", (32, 32)).save(tmp_path / part / "x.png")
    Image.new("L", (32, 32)).save(tmp_path / where / "x.bmp")
    with pytest.raises(InputError, match=r"contains both x\.bmp and x\.png; rename or remove one"):
        find_pairs(tmp_path)
    if where == "maps":
        with pytest.raises(InputError, match=r"contains both maps/x\.bmp and maps/x\.png"):
            find_maps(tmp_path, "x")


@pytest.mark.parametrize("key", ["file_name", "map"])
def test_a_listed_file_must_be_in_the_folder(tmp_path, key):
    from data.maps import find_pairs
    from eval.metrics.generated import read_generated

    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    folder = write_listed_maps(tmp_path / "data")
    line = {"file_name": "a/rgb.png", "map": "a/seg.png", "text": "x", "prompt": "x"} | {key: "../secret.png"}
    (folder / METADATA_NAME).write_text(json.dumps(line))
    for read in (find_pairs, lambda f: find_maps(f, "x"), read_generated)[: 3 if key == "file_name" else 2]:
        with pytest.raises(InputError, match=f"its {key} is"):
            read(folder)


def test_the_adapter_file_has_usual_permissions(tiny_sd, tmp_path):
    before = os.umask(0o022)
    try:
        file = write_adapter(tiny_sd, tmp_path / "a")
    finally:
        os.umask(before)
    assert file.name == WEIGHTS_NAME and file.stat().st_mode & 0o777 == 0o644
