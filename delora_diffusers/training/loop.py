"""The training loop of both scripts."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.families.quantization import PACKAGES
from delora_diffusers.launching import has_bf16
from delora_diffusers.memory import explain_out_of_memory
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import checkpoint_step, list_checkpoints
from delora_diffusers.training import checkpoints, gradients
from delora_diffusers.training.adapter_files import AdapterFiles
from delora_diffusers.training.cuda_graph import Batch, MicroBatches, can_capture
from delora_diffusers.training.ema import WeightAverage
from delora_diffusers.training.loss_monitor import LossMonitor
from delora_diffusers.training.optimizers import build_lr_scheduler, build_optimizer, set_rates
from delora_diffusers.training.setup import RAGGED
from delora_diffusers.training.stopping import end_stopped, stop_on_signals
from delora_diffusers.training.validation import Validation

logger = logging.getLogger(__name__)


def train(
    accelerator: Accelerator,
    adapters: Mapping[str, Adapter],
    batch_of: Callable[[int], Batch],
    losses_of: Callable[..., Tensor],
    args: argparse.Namespace,
    validate: Validation | None = None,
    control: torch.nn.Module | None = None,
    files: AdapterFiles | None = None,
    same_length: bool = True,
    examples: Sequence[int] = (),
) -> dict[int, int]:
    """Train until ``args.max_train_steps``, from the start or from a checkpoint.

    SIGTERM or SIGINT ends training after the current step, with a checkpoint; several processes end at the next step
    that is logged. A second signal, at least two seconds later, ends the process at once.

    Args:
        accelerator: created with ``args.gradient_accumulation_steps``.
        adapters: the adapters to train, by component, that of the denoiser first; attached, on the device.
        batch_of: returns the tensors of micro-batch i.
        losses_of: returns each subject's loss for these tensors, (subjects,); see ``MicroBatches``.
        args: the flags of ``add_training_arguments``.
        validate: called on every process every ``args.validation_steps`` steps with the number of finished steps.
        control: a control encoder to train as well, at ``args.control_learning_rate``.
        files: writes the adapter files of each checkpoint.
        same_length: whether the prompts of all micro-batches have the same number of tokens; otherwise no CUDA graph is
            recorded.
        examples: a micro-batch of each size of images, if there are several; a graph is recorded for each.

    Returns:
        The subjects whose loss was not finite, each with the first such step. Subjects trained beside them are not
        affected.

    Raises:
        InputError: no subject's loss is finite (the last checkpoint is kept), or the disk is full.
        SystemExit: a signal ended training; see ``stopping.end_stopped``.
    """
    trained = [*adapters.values(), *([] if control is None else [control])]
    subjects = max(adapter.subjects for adapter in adapters.values())
    optimizer = build_optimizer(list(adapters.values()), args, control)
    schedule = build_lr_scheduler(optimizer, args)
    accelerator.register_for_checkpointing(schedule)
    for module in trained:  # for checkpoints and mixed precision; the loop averages gradients itself, without DDP
        accelerator.prepare_model(module, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    parameters = [p for module in trained for p in module.parameters()]
    gradients.broadcast_parameters(accelerator, parameters)
    average = WeightAverage(parameters, list(adapters.values()), optimizer, args.ema_decay)
    if average.ema is not None:
        accelerator.register_for_checkpointing(average.ema)
    checkpoint = _resume(accelerator, args)
    start = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if checkpoint is not None:
        set_rates(schedule)
    if average.ema is not None:
        average.ema.to(accelerator.device)
    if validate is not None:
        validate.resume(checkpoint)
    monitor = LossMonitor(accelerator.device, subjects)
    capture = _captures(accelerator, list(adapters.values()), same_length, args)
    accumulate_gradients = MicroBatches(accelerator, list(adapters.values()), parameters, losses_of, capture)
    # A run may have been killed between this checkpoint and its validation images.
    overdue = validate is not None and start > 0 and _is_validated(start, args) and not validate.is_done(start)
    accelerator.wait_for_everyone()  # all processes have checked before the first one writes
    if validate is not None and overdue:
        with average.applied():
            validate(start)
    quiet = not accelerator.is_local_main_process
    size = f"batches of {args.train_batch_size} at {args.resolution} x {args.resolution} pixels"
    out_of_memory = explain_out_of_memory(
        f"training on {size}",
        memory_savings(accelerator, args),
        lambda: (list_checkpoints(args.output_dir) or [None])[-1],
    )
    progress_bar = tqdm(total=args.max_train_steps, initial=start, desc="training", disable=quiet)
    finished, stopped_by = start, 0
    with stop_on_signals() as stop, out_of_memory, progress_bar as progress:
        if capture and examples:
            accumulate_gradients.record_each([batch_of(microbatch) for microbatch in examples])
        for step in range(start, args.max_train_steps):
            for accumulation in range(args.gradient_accumulation_steps):
                microbatch = (step * args.gradient_accumulation_steps + accumulation) * accelerator.num_processes
                microbatch += accelerator.process_index
                with accelerator.accumulate(*trained):
                    monitor.add(accumulate_gradients(batch_of(microbatch)), step)
                    if accelerator.sync_gradients:
                        gradients.average_gradients(accelerator, parameters)
                        if args.max_grad_norm:
                            gradients.clip_gradients(accelerator, parameters, args.max_grad_norm, subjects)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=not capture)
            for adapter in adapters.values():
                adapter.constrain()
            average.update()
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            finished = step + 1
            progress.update()
            last = finished == args.max_train_steps
            logged = finished % args.logging_steps == 0 or last
            if logged:
                values = {"loss": monitor.mean_loss(accelerator, args.output_dir)}
                with average.applied():
                    values |= _readings(adapters, optimizer)
                accelerator.log(values, step=finished)
                progress.set_postfix(loss=f"{values['loss']:.4f}", distance=f"{values['distance/mean']:.3g}")
            stopped_by = 0 if last else stop.agreed(accelerator, logged)
            if finished % args.checkpointing_steps == 0 or last or stopped_by:
                monitor.check(accelerator, args.output_dir)
                limits = (args.checkpoints_total_limit, args.keep_checkpoint_adapters)
                checkpoints.save_checkpoint(
                    accelerator, args.output_dir, finished, files, *limits, saved_weights=average.applied
                )
            if stopped_by:
                break
            if validate is not None and _is_validated(finished, args):
                with average.applied():
                    validate(finished)
    if stopped_by:
        end_stopped(accelerator, finished, stopped_by)
    average.apply()
    return monitor.check(accelerator, args.output_dir)


def _captures(accelerator: Accelerator, adapters: list[Adapter], same_length: bool, args: argparse.Namespace) -> bool:
    """Whether to record the training step as a CUDA graph."""
    if not same_length:
        if accelerator.device.type == "cuda" and accelerator.is_main_process and args.cuda_graph is not False:
            print(f"no CUDA graph is recorded: {RAGGED}", flush=True)
        return False
    capturable = can_capture(accelerator, adapters) and not args.offload
    return capturable if args.cuda_graph is None else args.cuda_graph


def memory_savings(accelerator: Accelerator, args: argparse.Namespace) -> list[str]:
    """The flags that save memory in training and are not yet used, the largest saving first."""
    precision = "bf16" if torch.cuda.is_available() and has_bf16() else "fp16"
    low_rank = METHODS[args.method].has_factors
    savings = {
        "--gradient_checkpointing": not args.gradient_checkpointing,
        f"--mixed_precision {precision}": accelerator.mixed_precision == "no",
        "--train_batch_size 1 with --gradient_accumulation_steps": args.train_batch_size > 1,
        "--base_precision nf4": low_rank and args.base_precision not in PACKAGES and not args.offload,
        "--offload": low_rank and args.base_precision not in PACKAGES and not args.offload,
        "--path lean": low_rank and args.path == "fast",
        "a smaller --resolution": True,
        "--no-cuda_graph": args.cuda_graph is not False,
        "a smaller --rank": True,
    }
    return [flag for flag, helps in savings.items() if helps]


def _is_validated(step: int, args: argparse.Namespace) -> bool:
    """Whether validation images are generated after this step."""
    return step % args.validation_steps == 0 or step == args.max_train_steps


def _resume(accelerator: Accelerator, args: argparse.Namespace) -> Path | None:
    """Load the checkpoint to continue from; returns it, or None at the start of a run."""
    checkpoint = checkpoints.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is None:
        if args.resume_from_checkpoint is not None:
            logger.warning("%s has no checkpoint yet; training starts from the beginning", args.output_dir)
        return None
    checkpoints.load_checkpoint(accelerator, checkpoint)
    return checkpoint


def _readings(adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Values to log: learning rates; lambda and the distance ``|W' - W|_F`` over all adapted matrices and subjects."""

    rates = [group["lr"] * group.get("d", 1.0) for group in optimizer.param_groups]  # d: Prodigy's estimate
    values = {"learning_rate": rates[0]}
    if len(rates) > 1:
        values["lambda_learning_rate"] = rates[1]
    for adapter in adapters.values():
        for name, readings in (("lambda", adapter.all_lambdas()), ("distance", adapter.all_distances())):
            if readings is not None:
                finite = readings.isfinite().all(dim=1)
                readings = readings[finite] if finite.any() else readings
                summary = {"mean": readings.mean(), "min": readings.min(), "max": readings.max()}
                values |= {f"{name}/{key}": value.item() for key, value in summary.items()}
    return values
