"""A whole DreamBooth run, from command to saved adapter: this toolkit against a plain loop, both timed as a user waits.

    python -m benchmarks.end_to_end OUT_DIR [--steps 1000] [--script train_dreambooth_lora.py] [--output table.md]

Trains on a pipeline of Stable Diffusion 1.5's shape with random weights (2 GB, written to OUT_DIR) and five made
photographs of 512 pixels, batch 1, bf16. The plain loop does what diffusers' script does: PEFT LoRA with float32
adapters under autocast, and every step decodes a photograph and runs the autoencoder and the text encoder. With
``--script`` diffusers' own script is run too; fetch the one of the installed diffusers' tag.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = "a photo of sks toy"


def write_inputs(folder: Path, shape: str) -> tuple[Path, Path]:
    """A pipeline and five photographs, once."""
    import numpy as np
    from PIL import Image

    from data.tiny_sd import write

    model, photographs = folder / f"model-{shape}", folder / "photographs"
    if not model.exists():
        write(model, true_shapes=shape == "sd15")
    photographs.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((1024, 1024), Image.Resampling.BICUBIC).save(photographs / f"{number}.jpg")
    return model, photographs


def seconds_of(command: list[str], log: Path) -> tuple[float, float | None]:
    """Seconds that a command takes from start to end, and those between its first and last reported step."""
    begun = time.perf_counter()
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    whole = time.perf_counter() - begun
    if code:
        raise SystemExit(f"error: {' '.join(command[:6])} failed with {code}; see {log}.")
    looped = re.findall(r"loop: ([\d.]+) s", log.read_text())
    return whole, float(looped[-1]) if looped else None


def plain_loop(model: Path, photographs: Path, output_dir: Path, steps: int, resolution: int) -> None:
    """Train PEFT's LoRA as diffusers' script does, nothing cached."""
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

    class Pictures(Dataset):
        files = sorted(photographs.iterdir())
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

    unet, optimizer, loader = accelerator.prepare(unet, optimizer, DataLoader(Pictures(), 1, shuffle=True))
    unet.train()
    step, begun = 0, time.perf_counter()
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
    print(f"loop: {time.perf_counter() - begun:.1f} s")
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(accelerator.unwrap_model(unet)))
    StableDiffusionPipeline.save_lora_weights(output_dir, unet_lora_layers=state)


def commands(options: argparse.Namespace, model: Path, photographs: Path) -> dict[str, list[str]]:
    """What each contender runs, by name; each with a folder of its own."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--dynamo_backend", "no"]
    precision = "bf16" if torch.cuda.is_available() else "no"
    top = Path(__file__).parent.parent

    def flags(name: str) -> list[str]:
        return [
            *("--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photographs)),
            *("--instance_prompt", PROMPT, "--output_dir", str(options.out_dir / f"{name}-{time.time():.0f}")),
            *("--resolution", str(options.resolution), "--train_batch_size", "1", "--rank", "16"),
            *("--max_train_steps", str(options.steps), "--mixed_precision", precision),
        ]

    ours = [*launch, "--mixed_precision", precision, str(top / "train_dreambooth_delora.py"), *flags("ours")]
    eager = [*launch, "--mixed_precision", precision, str(top / "train_dreambooth_delora.py"), *flags("eager")]
    plain = [sys.executable, "-m", "benchmarks.end_to_end", str(options.out_dir), "--plain", "--shape", options.shape]
    plain += ["--steps", str(options.steps), "--resolution", str(options.resolution)]
    found = {
        "ours, DeLoRA": ours,
        "ours, without CUDA graph": [*eager, "--no-cuda_graph"],
        "plain loop, PEFT LoRA": plain,
    }
    if options.script:
        script = [*launch, "--mixed_precision", precision, str(options.script), *flags("script")]
        found["diffusers' train_dreambooth_lora.py"] = [*script, "--report_to", "tensorboard"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--script", type=Path, help="diffusers' examples/dreambooth/train_dreambooth_lora.py")
    parser.add_argument(
        "--shape", choices=("sd15", "tiny"), default="sd15", help="tiny is for trying this out on a CPU"
    )
    parser.add_argument("--only", nargs="+", help="contenders whose name holds one of these")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resolution", type=int, default=512)
    options = parser.parse_args()
    options.out_dir.mkdir(parents=True, exist_ok=True)
    model, photographs = write_inputs(options.out_dir, options.shape)
    if options.plain:
        plain_loop(model, photographs, options.out_dir / f"plain-{time.time():.0f}", options.steps, options.resolution)
        return
    lines = [f"| {options.steps:,} steps, batch 1 | seconds, command to file | / plain loop |", "| --- | ---: | ---: |"]
    found: dict[str, float] = {}
    for name, command in commands(options, model, photographs).items():
        if options.only and not any(part in name for part in options.only):
            continue
        found[name], looped = seconds_of(command, options.out_dir / f"{re.sub(r'[^a-zA-Z]+', '-', name)}.log")
        print(f"{name}: {found[name]:.1f} s" + (f", of which the loop {looped:.1f} s" if looped else ""), flush=True)
    base = found.get("plain loop, PEFT LoRA", float("nan"))
    lines += [f"| {name} | {seconds:.1f} | {seconds / base:.2f} |" for name, seconds in found.items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines += ["", f"{device}, torch {torch.__version__}; {options.shape}, rank 16, {options.resolution} pixels."]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
