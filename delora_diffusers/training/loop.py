"""The training loop of both scripts: one call from the prepared pieces to the trained adapters."""

import argparse
import logging
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.names import checkpoint_step
from delora_diffusers.training import checkpoints, gradients
from delora_diffusers.training.cuda_graph import Batch, MicroBatches, can_capture
from delora_diffusers.training.loss_monitor import LossMonitor
from delora_diffusers.training.optimizers import build_lr_scheduler, build_optimizer

logger = logging.getLogger(__name__)


def train(
    accelerator: Accelerator,
    adapters: Mapping[str, Adapter],
    batch_of: Callable[[int], Batch],
    losses_of: Callable[..., Tensor],
    args: argparse.Namespace,
    validate: Callable[[int], None] | None = None,
    control: torch.nn.Module | None = None,
) -> dict[int, int]:
    """Train until ``args.max_train_steps``, from the start or from a checkpoint.

    Args:
        accelerator: made with ``args.gradient_accumulation_steps``.
        adapters: what trains, by component (``"unet"``, ``"text_encoder"``); attached, on the device.
        batch_of: the tensors of micro-batch number i.
        losses_of: their loss for each subject, (subjects,); see ``MicroBatches``.
        args: the flags of ``add_training_arguments``.
        validate: called on every process after each ``args.validation_steps``-th step with the number of steps done.
        control: a control encoder that trains too, at ``args.control_learning_rate``.

    Returns:
        The subjects whose loss was not finite, and the step at which it first was not. Others trained beside them are
        as if alone.

    Raises:
        InputError: no subject's loss is finite (the last checkpoint stays), or the disk is full.
    """
    trained = [*adapters.values(), *([] if control is None else [control])]
    subjects = max(adapter.subjects for adapter in adapters.values())
    optimizer = build_optimizer(list(adapters.values()), args, control)
    schedule = build_lr_scheduler(optimizer, args)
    accelerator.register_for_checkpointing(schedule)
    for module in trained:  # for checkpoints and precision; gradients are averaged here, by no wrapper
        accelerator.prepare_model(module, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    parameters = [p for module in trained for p in module.parameters()]
    gradients.broadcast_parameters(accelerator, parameters)
    start = _resume(accelerator, args)
    monitor = LossMonitor(accelerator.device, subjects)
    capture = can_capture(accelerator, list(adapters.values())) if args.cuda_graph is None else args.cuda_graph
    add_gradients_of = MicroBatches(accelerator, list(adapters.values()), losses_of, capture)
    shown = accelerator.is_local_main_process
    with tqdm(total=args.max_train_steps, initial=start, desc="training", disable=not shown) as progress:
        for step in range(start, args.max_train_steps):
            for part in range(args.gradient_accumulation_steps):
                number = (step * args.gradient_accumulation_steps + part) * accelerator.num_processes
                number += accelerator.process_index
                with accelerator.accumulate(*trained):
                    monitor.add(add_gradients_of(batch_of(number)), step)
                    if accelerator.sync_gradients:
                        gradients.average_gradients(accelerator, parameters)
                        if args.max_grad_norm:
                            gradients.clip_gradients(accelerator, parameters, args.max_grad_norm, subjects)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=not capture)
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            done = step + 1
            progress.update()
            last = done == args.max_train_steps
            if done % args.logging_steps == 0 or last:
                values = {"loss": monitor.mean_loss(accelerator, args.output_dir), **_readings(adapters, optimizer)}
                accelerator.log(values, step=done)
                progress.set_postfix(loss=f"{values['loss']:.4f}", distance=f"{values['distance/mean']:.3g}")
            if done % args.checkpointing_steps == 0 or last:
                monitor.check(accelerator, args.output_dir)
                checkpoints.save_checkpoint(accelerator, args.output_dir, done, args.checkpoints_total_limit)
            if validate is not None and (done % args.validation_steps == 0 or last):
                validate(done)
    return monitor.check(accelerator, args.output_dir)


def _resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    checkpoint = checkpoints.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is None:
        if args.resume_from_checkpoint is not None:
            logger.warning("no checkpoint in %s yet; starting from the beginning", args.output_dir)
        return 0
    accelerator.load_state(str(checkpoint))
    return checkpoint_step(checkpoint)


def _readings(adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates, lambda and distance ``|W' - W|_F`` over all adapted matrices of all subjects."""
    rates = [group["lr"] for group in optimizer.param_groups]
    values = {"learning_rate": rates[0]}
    if len(rates) > 1:
        values["lambda_learning_rate"] = rates[1]
    for adapter in adapters.values():
        for name, numbers in (("lambda", adapter.all_lambdas()), ("distance", adapter.all_distances())):
            if numbers is not None:
                well = numbers.isfinite().all(dim=1)
                numbers = numbers[well] if well.any() else numbers
                three = {"mean": numbers.mean(), "min": numbers.min(), "max": numbers.max()}
                values |= {f"{name}/{key}": value.item() for key, value in three.items()}
    return values
