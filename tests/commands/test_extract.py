"""An adapter from two full models: the best approximation of every layer's difference, usable by every command."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from data.tiny_sd import write
from delora_diffusers import load_adapter
from delora_diffusers.__main__ import main
from delora_diffusers.files.reading import parse_config, read_header
from delora_diffusers.methods.config import UNET_TARGETS

pytestmark = pytest.mark.integration  # seconds a test


def tuned(model: Path, folder: Path, change: dict[str, Any]) -> Path:
    """A copy of a model with changed weights: by component, a function of (name, weight)."""
    shutil.copytree(model, folder)
    for component, changed in change.items():
        (file,) = (folder / component).glob("*.safetensors")
        tensors = load_file(file)
        save_file({name: changed(name, tensor) for name, tensor in tensors.items()}, file)
    return folder


def noise(name: str, weight: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(name))
    return weight + 0.1 * torch.randn(weight.shape, generator=g) if weight.is_floating_point() else weight


def is_target(name: str, targets=UNET_TARGETS) -> bool:
    return f".{name}".endswith(tuple(f".{target}.weight" for target in targets))


def attention_noise(name: str, weight: torch.Tensor) -> torch.Tensor:
    return noise(name, weight) if is_target(name, (*UNET_TARGETS, "q_proj", "fc1")) else weight


def words(base: Path, changed: Path, output: Path, *more: object) -> list[str]:
    shared = ["extract", "--pretrained_model_name_or_path", base, "--tuned_model", changed, "--output_dir", output]
    return [str(word) for word in (*shared, *more)]


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny XL and a version of it with other attention and an other second text encoder."""
    root = tmp_path_factory.mktemp("xl")
    base = write(root / "base", kind="sdxl")
    return base, tuned(base, root / "tuned", {"unet": attention_noise, "text_encoder_2": attention_noise})


@pytest.mark.parametrize("method", ["delora", "lora"])
def test_every_layer_is_the_best_approximation(xl, tmp_path, capsys, method):
    base, changed = xl
    main(words(base, changed, tmp_path / "out", "--method", method, "--rank", 5, "--text_encoders"))
    output = capsys.readouterr().out
    printed = dict(line.split()[::-1] for line in output.splitlines() if line.startswith("  "))
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    reference: Any = DiffusionPipeline.from_pretrained(changed)
    norms: dict[str, float] = {}
    for component in ("unet", "text_encoder_2"):
        model, other = getattr(pipeline, component), getattr(reference, component)
        adapter = load_adapter(model, tmp_path / "out", component)
        assert len(adapter.names) > 4
        for name in adapter.names:
            base_weight = adapter.weight(name) - adapter.delta_weight(name)
            difference = other.get_submodule(name).weight.detach() - base_weight
            u, s, vh = torch.linalg.svd(difference.double())
            best = (u[:, :5] * s[:5]) @ vh[:5]
            torch.testing.assert_close(adapter.delta_weight(name).double(), best, atol=1e-5, rtol=1e-4)
            if component == "unet":
                norms[f"unet.{name}"] = float(s.norm())
            error = float(s[5:].norm() / s.norm()) if s.norm() > 1e-6 else 0.0
            assert float(printed[f"{component}.{name}"]) == pytest.approx(error, rel=1e-2, abs=1e-6)
    squared = [(float(printed[name]), reference_norm) for name, reference_norm in norms.items()]
    together = (sum((e * n) ** 2 for e, n in squared) / sum(n**2 for _, n in squared)) ** 0.5
    summary = next(line for line in output.splitlines() if line.startswith("unet: "))
    assert float(summary.split()[-2]) == pytest.approx(together, rel=1e-2)
    assert "text_encoder: no difference; left out" in output
    assert "warning: 2 other modules of text_encoder_2 differ too" in output and "fc1.weight" in output
    header = read_header(tmp_path / "out")
    assert (header["base_model"], header["pipeline"]) == (str(base), "StableDiffusionXLPipeline")
    assert header["training"] == {"extracted_from": str(changed)}
    assert parse_config(tmp_path, header["config"]["unet"]).start == "zero"
    main(["info", str(tmp_path / "out")])
    main(
        ["export", "--adapter", str(tmp_path / "out"), "--format", "kohya", "--output", str(tmp_path / "k.safetensors")]
    )


def test_a_merged_adapter_is_found_again(tiny_sd, tmp_path, capsys):
    """Full rank changes of what an adapter can express are exact, from half-precision variants too."""
    changed = tuned(tiny_sd, tmp_path / "tuned", {"unet": attention_noise, "text_encoder": attention_noise})
    main(words(tiny_sd, changed, tmp_path / "out", "--rank", 32))
    output = capsys.readouterr().out
    assert "text_encoder differs too and is not in the adapter (see --text_encoders)" in output
    main(["merge", "--adapter", str(tmp_path / "out"), "--output_dir", str(tmp_path / "merged")])
    files = [folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in (changed, tmp_path / "merged")]
    before, after = map(load_file, files)
    for name in before:
        if min(before[name].shape[:2], default=0) == 32 and before[name].ndim == 2:
            torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-4)


def test_refusals_and_warnings(tiny_sd, xl, tmp_path, capsys):
    everything = tuned(tiny_sd, tmp_path / "tuned", {"unet": noise})
    feed_forward = tuned(
        tiny_sd, tmp_path / "ff", {"unet": lambda n, w: noise(n, w) if is_target(n, ("ff.net.2",)) else w}
    )
    out = tmp_path / "out"
    for flags, message in (
        (words(tiny_sd, tiny_sd, out), "have the same weights in unet; check the names, or give --text_encoders"),
        (
            words(tiny_sd, feed_forward, out),
            "no target of unet differs .*; other modules do, such as .*ff.net.2.weight",
        ),
        (words(tiny_sd, xl[1], out), "is not a fine-tuned .*of its unet is .* give models of one architecture"),
        (words(tiny_sd, everything, out, "--rank", 40), "rank is 40, but .* choose a rank of at most 32"),
        (words(tiny_sd, everything, out, "--rank", 0), "--rank is 0"),
        (words(tiny_sd, everything, out, "--targets", "foo"), "target foo matches no module"),
        (words(tiny_sd, everything, tiny_sd), "already exists"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(flags)
        assert not out.exists()
    main(words(tiny_sd, everything, out, "--rank", 2, "--targets", "to_q"))
    warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    base, changed = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (tiny_sd, everything))
    squared = {name: float((changed[name] - base[name]).square().sum()) for name in base}
    share = 1 - sum(v for n, v in squared.items() if is_target(n, ("to_q",))) / sum(squared.values())
    count = len([name for name in base if not is_target(name, ("to_q",))])
    assert f"{count} other modules of unet" in warning and f"they have {share:.1%} of the squared change" in warning


def test_files_of_a_variant_and_zero_columns(tiny_sd, tmp_path):
    half = tmp_path / "half"
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.to(torch.float16).save_pretrained(half, variant="fp16")
    changed = tuned(half, tmp_path / "tuned", {"unet": lambda n, w: w * 1.5 if is_target(n) else w})
    main(words(half, changed, tmp_path / "out", "--variant", "fp16", "--rank", 4))
    assert read_header(tmp_path / "out")["variant"] == "fp16"

    def emptied(name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros_like(weight[:, :1]), weight[:, 1:]), dim=1) if is_target(name) else weight

    base = tuned(tiny_sd, tmp_path / "zero", {"unet": emptied})
    with pytest.raises(SystemExit, match="changes column 0 of its weight, which is zero .* or --method lora"):
        main(words(base, tiny_sd, tmp_path / "a", "--rank", 4))
    main(words(base, tiny_sd, tmp_path / "a", "--rank", 4, "--method", "lora"))
    unet: Any = DiffusionPipeline.from_pretrained(base, safety_checker=None).unet
    assert max(load_adapter(unet, tmp_path / "a").distances().values()) > 0
