"""Time of a complete DreamBooth run, from the command to the saved adapter: this toolkit against a plain loop.

    python -m benchmarks.end_to_end OUT_DIR [--steps 1000] [--script train_dreambooth_lora.py] [--output table.md]

Trains a pipeline of Stable Diffusion 1.5's shape with random weights (2 GB, written to OUT_DIR) on five synthetic
photos at 512 pixels, batch 1, bf16. The plain loop works like diffusers' script: PEFT LoRA with float32 adapters under
autocast, and every step decodes a photo and runs the autoencoder and the text encoder. ``--script`` also times
diffusers' own script; download the version that matches the installed diffusers.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import print_and_save
from delora_diffusers.dispatch import exit_on_bad_input

PROMPT = "a photo of sks toy"


def write_inputs(folder: Path, shape: str) -> tuple[Path, Path]:
    """Write a pipeline and five photos, unless the pipeline exists; returns their folders."""
    import numpy as np
    from PIL import Image

    from data.tiny_sd import write

    model, photos = folder / f"model-{shape}", folder / "photographs"
    if not model.exists():
        write(model, true_shapes=shape == "sd15")
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((1024, 1024), Image.Resampling.BICUBIC).save(photos / f"{number}.jpg")
    return model, photos


def time_command(command: list[str], log: Path) -> tuple[float, float | None]:
    """Seconds that a command takes, and of these the seconds in its training loop, if it prints them."""
    start = time.perf_counter()
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"error: {' '.join(command[:6])} failed with exit code {code}; see {log}.")
    loop_seconds = re.findall(r"loop: ([\d.]+) s", log.read_text())
    return seconds, float(loop_seconds[-1]) if loop_seconds else None


def plain_loop(model: Path, photos: Path, output_dir: Path, steps: int, resolution: int) -> None:
    """Train PEFT's LoRA as diffusers' script does, without any caching."""
    import peft
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    text_encoder.to(device, dtype)
    vae.to(device, dtype)
    unet.to(device, dtype)
    unet.add_adapter(
        peft.LoraConfig(
            r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    class Photos(Dataset):
        files = sorted(photos.iterdir())
        transform = transforms.Compose(
            [
                transforms.Resize(resolution),
                transforms.RandomCrop(resolution),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> dict[str, Any]:
            pixels = self.transform(Image.open(self.files[index]).convert("RGB"))
            ids = tokenizer(PROMPT, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            return {"pixels": pixels, "ids": ids[0]}

    unet, optimizer, loader = accelerator.prepare(unet, optimizer, DataLoader(Photos(), 1, shuffle=True))
    unet.train()
    step, start = 0, time.perf_counter()
    while step < steps:
        for batch in loader:
            latents = vae.encode(batch["pixels"].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps: Any = torch.randint(0, 1000, (len(latents),), device=device)
            hidden = text_encoder(batch["ids"], return_dict=False)[0]
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden, return_dict=False)[0]
            accelerator.backward(torch.nn.functional.mse_loss(prediction.float(), noise.float()))
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"loop: {time.perf_counter() - start:.1f} s")
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(accelerator.unwrap_model(unet)))
    StableDiffusionPipeline.save_lora_weights(output_dir, unet_lora_layers=state)


def commands(options: argparse.Namespace, model: Path, photos: Path) -> dict[str, list[str]]:
    """The command of each contender, by name; each writes to its own folder."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--dynamo_backend", "no"]
    precision = "bf16" if torch.cuda.is_available() else "no"
    script = str(Path(__file__).parent.parent / "train_dreambooth_delora.py")

    def flags(name: str) -> list[str]:
        return [
            *("--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photos)),
            *("--instance_prompt", PROMPT, "--output_dir", str(options.out_dir / f"{name}-{time.time():.0f}")),
            *("--resolution", str(options.resolution), "--train_batch_size", "1", "--rank", "16"),
            *("--max_train_steps", str(options.steps), "--mixed_precision", precision),
        ]

    launch += ["--mixed_precision", precision]
    plain = [sys.executable, "-m", "benchmarks.end_to_end", str(options.out_dir), "--plain", "--shape", options.shape]
    plain += ["--steps", str(options.steps), "--resolution", str(options.resolution)]
    contenders = {
        "ours, DeLoRA": [*launch, script, *flags("ours")],
        "ours, without CUDA graph": [*launch, script, *flags("eager"), "--no-cuda_graph"],
        "plain loop, PEFT LoRA": plain,
    }
    if options.script:
        stock = [*launch, str(options.script), *flags("script"), "--report_to", "tensorboard"]
        contenders["diffusers' train_dreambooth_lora.py"] = stock
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--script", type=Path, help="diffusers' examples/dreambooth/train_dreambooth_lora.py")
    parser.add_argument("--shape", choices=("sd15", "tiny"), default="sd15", help="tiny is for a quick try on a CPU")
    parser.add_argument("--only", nargs="+", help="run only the contenders whose name contains one of these")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resolution", type=int, default=512)
    options = parser.parse_args()
    options.out_dir.mkdir(parents=True, exist_ok=True)
    model, photos = write_inputs(options.out_dir, options.shape)
    if options.plain:
        plain_loop(model, photos, options.out_dir / f"plain-{time.time():.0f}", options.steps, options.resolution)
        return
    lines = [f"| {options.steps:,} steps, batch 1 | seconds, command to file | / plain loop |", "| --- | ---: | ---: |"]
    seconds: dict[str, float] = {}
    for name, command in commands(options, model, photos).items():
        if options.only and not any(part in name for part in options.only):
            continue
        log = options.out_dir / f"{re.sub(r'[^a-zA-Z]+', '-', name)}.log"
        seconds[name], loop_seconds = time_command(command, log)
        details = f", {loop_seconds:.1f} s of it in the loop" if loop_seconds else ""
        print(f"{name}: {seconds[name]:.1f} s{details}", flush=True)
    base = seconds.get("plain loop, PEFT LoRA", float("nan"))
    lines += [f"| {name} | {value:.1f} | {value / base:.2f} |" for name, value in seconds.items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines += ["", f"{device}, torch {torch.__version__}; {options.shape}, rank 16, {options.resolution} pixels."]
    print_and_save("\n".join(lines), options.output)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
