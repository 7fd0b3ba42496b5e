"""How much a wrong learning rate costs: DeLoRA with both starts, and LoRA, at 1/8x to 32x the default learning rate.

    python -m benchmarks.learning_rates --pretrained_model_name_or_path MODEL --instance_data_dir PHOTOS \\
        --output_dir OUT [--resolution 64] [--max_train_steps 200]

Each point is one DreamBooth run of the training script, measured by its denoising loss over fixed noise and timesteps
relative to that of the base model. Writes OUT/learning_rates.json and OUT/learning_rates.png.
"""

import argparse
import json
from pathlib import Path

import torch

import train_dreambooth_delora
from data.photographs import find_photographs
from delora_diffusers import detach, load_adapter
from delora_diffusers.crops import views_of
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.families.loading import load_pipeline
from delora_diffusers.families.table import family_of
from delora_diffusers.methods.table import METHODS
from delora_diffusers.pipelines.conditions import encode_prompts
from delora_diffusers.pipelines.noise_schedule import ddpm_schedule
from delora_diffusers.training.encoding import encode_images
from delora_diffusers.training.noising import Diffusion
from delora_diffusers.training.objective import denoising_losses

PROMPT = "a photo of sks subject"
CURVES = {
    "LoRA": ("lora", "frozen", "#d1495b"),
    "DeLoRA": ("delora", "frozen", "#00798c"),
    "DeLoRA from B = 0": ("delora", "zero", "#7fb7be"),
}
"""Method, start and colour of each curve."""
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32)
"""Multiples of the default learning rate."""


class FixedLoss:
    """The denoising loss of a pipeline's UNet on a folder of photos, with the same noise and timesteps in every call.

    Args:
        model: the base model. folder: the photos. resolution: side length in pixels. samples: of noise and timestep per
            photo.
    """

    def __init__(self, model: str, folder: Path, resolution: int, samples: int = 12):
        self.pipeline = load_pipeline(model)
        self.family = family_of(type(self.pipeline).__name__)
        self.noising = Diffusion(ddpm_schedule(self.pipeline.scheduler, model))
        views = [views_of(photo.load(), (resolution, resolution), None, False) for photo in find_photographs(folder)]
        self.latents = encode_images(self.family, self.pipeline.vae, views, len(views), torch.device("cpu"))
        self.samples = samples

    @torch.no_grad()
    def __call__(self, adapter: Path | None) -> float:
        """The mean loss with an adapter, or of the base model."""
        if adapter is not None:
            load_adapter(self.pipeline.unet, adapter)
        count, total = len(self.latents), 0.0
        conditions = encode_prompts(self.pipeline, [PROMPT] * count, "cpu")
        for seed in range(self.samples):
            generator = torch.Generator().manual_seed(seed)
            latents = self.latents.sample(range(count), generator, seed)
            batch = self.noising(latents, generator)
            batch |= conditions
            total += denoising_losses(self.family, self.pipeline.unet, **batch, subjects=1, loss_type="l2").item()
        if adapter is not None:
            detach(self.pipeline.unet)
        return total / self.samples


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Draw a curve of relative losses per method and start, by multiple of the default learning rate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for label, (method, _, colour) in CURVES.items():
        factors = [float(factor) for factor in results[label]]
        losses = list(results[label].values())
        default = METHODS[method].learning_rate
        axes.plot(factors, losses, "o-", color=colour, label=f"{label}, default rate {default:g}")
    axes.axhline(1, color="#888", linewidth=1, linestyle="--")
    axes.text(FACTORS[0], 1.005, "base model", color="#666", fontsize=8, va="bottom")
    axes.margins(y=0.08)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FACTORS, [f"1/{round(1 / f)}" if f < 1 else f"{f:g}" for f in FACTORS])
    axes.set_xlabel("learning rate / default learning rate")
    axes.set_ylabel("denoising loss / base model's loss")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--instance_data_dir", type=Path, required=True, help="photos of the subject")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=200)
    options = parser.parse_args()
    fixed_loss = FixedLoss(options.pretrained_model_name_or_path, options.instance_data_dir, options.resolution)
    base = fixed_loss(None)
    results: dict[str, dict[str, float]] = {label: {} for label in CURVES}
    for label, losses in results.items():
        method, start, _ = CURVES[label]
        for factor in FACTORS:
            run = options.output_dir / f"{method}-{start}-{factor:g}"
            rate = METHODS[method].learning_rate * factor
            flags = ["--pretrained_model_name_or_path", options.pretrained_model_name_or_path]
            flags += ["--instance_data_dir", options.instance_data_dir, "--instance_prompt", PROMPT]
            flags += ["--output_dir", run, "--method", method, "--start", start, "--learning_rate", rate, "--rank", 8]
            flags += ["--recipe", "paper"]
            flags += ["--resolution", options.resolution, "--max_train_steps", options.max_train_steps]
            train_dreambooth_delora.main([str(f) for f in [*flags, "--train_batch_size", 4, "--report_to", "none"]])
            losses[f"{factor:g}"] = fixed_loss(run) / base
            print(f"{label:18} x {factor:<6g} {losses[f'{factor:g}']:.3f} of the base model's loss", flush=True)
    record = {"base_loss": base, "share_of_base_loss": results, "steps": options.max_train_steps}
    (options.output_dir / "learning_rates.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(results, options.output_dir / "learning_rates.png")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
