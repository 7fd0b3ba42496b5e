"""The training loop of both scripts: one call from the prepared pieces to the trained adapters."""

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.adapter import Adapter
from delora_diffusers.errors import InputError
from delora_diffusers.training import checkpoints, order
from delora_diffusers.training.captured import Batch, MicroBatches, can_capture
from delora_diffusers.training.optimizers import build_lr_scheduler, build_optimizer

logger = logging.getLogger(__name__)


def train(
    accelerator: Accelerator,
    adapters: Mapping[str, Adapter],
    batch_of: Callable[[int, torch.Generator], Batch],
    loss_of: Callable[..., Tensor],
    args: argparse.Namespace,
    validate: Callable[[int], None] | None = None,
    control: torch.nn.Module | None = None,
) -> int:
    """Train until ``args.max_train_steps``, from the start or from a checkpoint.

    Args:
        accelerator: made with ``args.gradient_accumulation_steps``.
        adapters: what trains, by component (``"unet"``, ``"text_encoder"``); attached, on the device.
        batch_of: the tensors of micro-batch number i, given its source of randomness on the device.
        loss_of: their scalar loss; see ``MicroBatches``.
        args: the flags of ``add_training_arguments``.
        validate: called on every process after each ``args.validation_steps``-th step with the number of steps done.
        control: a control encoder that trains too, prepared already since ``loss_of`` calls it; at
            ``args.control_learning_rate``.

    Returns:
        The number of steps done.

    Raises:
        InputError: the loss is not finite (the last checkpoint stays), or the disk is full.
    """
    plain = list(adapters.values())
    optimizer = build_optimizer(plain, args, control)
    schedule = build_lr_scheduler(optimizer, args)
    accelerator.register_for_checkpointing(schedule)
    # Each adapter is prepared and called by itself; the frozen models around them stay as they are.
    *wrapped, optimizer = accelerator.prepare(*plain, optimizer)
    start = _resume(accelerator, args)
    health = Health(accelerator.device)
    trained = plain if control is None else [*plain, control]
    parameters = [p for module in trained for p in module.parameters()]
    accumulated = wrapped if control is None else [*wrapped, control]
    capture = can_capture(accelerator) if args.cuda_graph is None else args.cuda_graph
    add_gradients_of = MicroBatches(accelerator, wrapped, loss_of, capture)
    shown = accelerator.is_local_main_process
    with tqdm(total=args.max_train_steps, initial=start, desc="training", disable=not shown) as progress:
        for step in range(start, args.max_train_steps):
            for part in range(args.gradient_accumulation_steps):
                number = (step * args.gradient_accumulation_steps + part) * accelerator.num_processes
                number += accelerator.process_index
                with accelerator.accumulate(*accumulated):
                    batch = batch_of(number, order.generator(args.seed, number, accelerator.device))
                    health.add(add_gradients_of(batch), step)
                    if accelerator.sync_gradients and args.max_grad_norm:
                        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=not capture)
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            done = step + 1
            progress.update()
            last = done == args.max_train_steps
            if done % args.logging_steps == 0 or last:
                values = {"loss": health.mean_loss(accelerator, args.output_dir), **_readings(adapters, optimizer)}
                accelerator.log(values, step=done)
                progress.set_postfix(loss=f"{values['loss']:.4f}", distance=f"{values['distance/mean']:.3g}")
            if done % args.checkpointing_steps == 0 or last:
                health.check(accelerator, args.output_dir)
                checkpoints.save_checkpoint(accelerator, args.output_dir, done, args.checkpoints_total_limit)
            if validate is not None and (done % args.validation_steps == 0 or last):
                validate(done)
    return args.max_train_steps


def _resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    checkpoint = checkpoints.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is None:
        if args.resume_from_checkpoint is not None:
            logger.warning("no checkpoint in %s yet; starting from the beginning", args.output_dir)
        return 0
    accelerator.load_state(str(checkpoint))
    return checkpoints.step_of(checkpoint)


def _readings(adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates, lambda and distance ``|W' - W|_F`` over all adapted matrices."""
    rates = [group["lr"] for group in optimizer.param_groups]
    values = {"learning_rate": rates[0]}
    if len(rates) > 1:
        values["lambda_learning_rate"] = rates[1]
    for name, numbers in (
        ("lambda", [v for adapter in adapters.values() for v in adapter.lambdas().values()]),
        ("distance", [v for adapter in adapters.values() for v in adapter.distances().values()]),
    ):
        if numbers:
            values |= {
                f"{name}/mean": sum(numbers) / len(numbers),
                f"{name}/min": min(numbers),
                f"{name}/max": max(numbers),
            }
    return values


class Health:
    """The running loss, and the first step at which it was not finite, kept on the device to spare the loop a wait."""

    def __init__(self, device: torch.device):
        self.sum = torch.zeros((), device=device)
        self.count = 0
        self.first_bad = torch.full((), -1, device=device, dtype=torch.long)

    def add(self, loss: Tensor, step: int) -> None:
        self.sum += loss
        self.count += 1
        bad = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step + 1, self.first_bad)

    def check(self, accelerator: Accelerator, output_dir: Path) -> None:
        """Stop all processes where the loss of one was not finite.

        Raises:
            InputError: naming the step and the checkpoint to continue from.
        """
        first = int(accelerator.gather(self.first_bad).max())
        if first < 0:
            return
        kept = checkpoints.checkpoints(output_dir)
        remedy = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been saved yet"
        raise InputError(f"the loss was not finite at step {first}; {remedy}; lower --learning_rate or use bf16.")

    def mean_loss(self, accelerator: Accelerator, output_dir: Path) -> float:
        """Mean since the last call, over all processes."""
        self.check(accelerator, output_dir)
        mean = float(accelerator.gather(self.sum / max(self.count, 1)).mean())
        self.sum.zero_()
        self.count = 0
        return mean
