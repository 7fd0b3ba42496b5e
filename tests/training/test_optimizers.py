"""The optimizers: their arguments and defaults, stacked tensors, several optimizers side by side, exact resuming."""

import argparse
import copy
import importlib.util
import math

import pytest
import torch
from torch import nn

from delora_diffusers import AdapterConfig, InputError, attach
from delora_diffusers.methods.table import METHODS
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.training.memory_estimate import optimizer_bytes
from delora_diffusers.training.optimizer_flags import OPTIMIZERS, RELATIVE_STEP
from delora_diffusers.training.optimizers import (
    SideBySide,
    build_lr_scheduler,
    build_optimizer,
    optimizer_options,
    set_rates,
)
from tests.helpers import run_in_child, run_in_two_processes, train, training_flags

INSTALLED = [name for name, kind in OPTIMIZERS.items() if importlib.util.find_spec(kind.constructor.split(":")[0][:12])]
FACTORED = ("adafactor", "came")


def parsed(tmp_path, *flags: object) -> argparse.Namespace:
    """Parsed and checked flags of a run on Stable Diffusion."""
    import train_dreambooth_delora as script

    more = ("--pretrained_model_name_or_path", "x/y", "--instance_data_dir", tmp_path, "--output_dir", tmp_path / "out")
    args = script.parse_arguments([str(flag) for flag in (*more, *flags)])
    script.check_arguments(args)
    return args


class Parameters:
    """What ``build_optimizer`` needs of an adapter."""

    def __init__(self, *matrices: nn.Parameter, boundary: nn.Parameter | None = None):
        self.matrices, self.boundary = list(matrices), boundary

    def parameter_groups(self, rate: float, lambda_rate: float, decay: float) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = [{"params": self.matrices, "lr": rate, "weight_decay": decay}]
        if self.boundary is not None:
            groups.append({"params": [self.boundary], "lr": lambda_rate, "weight_decay": 0.0})
        return groups


def step_all(optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    """Steps with random gradients, the same for the same shapes and seed."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        if "train_mode" in group:
            group["train_mode"] = True
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def only(name: str, tmp_path, *parameters: nn.Parameter, flags: tuple = ()) -> torch.optim.Optimizer:
    return build_optimizer([Parameters(*parameters)], parsed(tmp_path, "--optimizer", name, *flags))  # type: ignore


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--optimizer", "prodigy", "--optimizer_args", "d_coeff=2"],
            "d_coeff is not an argument of prodigy; use betas",
        ),
        (
            ["--optimizer", "prodigy", "--optimizer_args", "d_coef=big"],
            "d_coef=big does not fit prodigy; give a number",
        ),
        (["--optimizer", "prodigy", "--optimizer_args", "decouple=1"], "decouple=1 .*; give true or false"),
        (["--optimizer", "prodigy", "--optimizer_args", "slice_p=1.5"], "slice_p=1.5 .*; give an integer"),
        (["--optimizer", "prodigy", "--optimizer_args", "d0=-1"], r"prodigy refuses its arguments \(Invalid d0 value"),
        (["--optimizer", "prodigy", "--optimizer_args", "d0=nan"], "d0=nan .*; give a number"),
        (["--optimizer", "lion", "--optimizer_args", "betas=0.9"], "betas=0.9 .* 2 numbers with commas, .* 0.9,0.99"),
        (["--optimizer", "lion", "--optimizer_args", "betas=0.9,2"], "lion refuses its arguments"),
        (["--optimizer", "lion", "--optimizer_args", "lr=1"], "lr is a flag; give --learning_rate instead"),
        (["--optimizer", "lion", "--optimizer_args", "maximize=true"], "maximize is not an argument of lion"),
        (["--optimizer", "lion", "--optimizer_args", "cautious"], "'cautious' is not of the form KEY=VALUE"),
        (["--optimizer", "lion", "--optimizer_args", "a=1", "a=2"], "gives a twice"),
        (["--optimizer", "lion", "--adam_beta1", "0.95"], "--adam_beta1 belongs to Adam, which lion is not"),
        (["--optimizer", "came", "--adam_epsilon", "1e-6"], "--adam_epsilon belongs to Adam, which came is not"),
        (["--adam_beta2", "0.99", "--optimizer_args", "betas=0.9,0.99"], "--adam_beta2 and --optimizer_args betas are"),
        (["--optimizer_args", "amsgrad=yes"], "amsgrad=yes does not fit adamw; give true or false"),
        (["--optimizer", "prodigy", "--use_8bit_adam"], "--use_8bit_adam is --optimizer adamw8bit, but --optimizer is"),
        (["--optimizer", "adamw_schedulefree", "--lr_scheduler", "cosine"], "cosine is not for adamw_schedulefree"),
        (["--optimizer", "adamw_schedulefree", "--use_ema"], "--use_ema averages the weights, which"),
        (["--optimizer", "adamw_schedulefree", "--adam_beta1", "0"], "needs a first beta above 0"),
        (
            ["--optimizer", "adafactor", "--optimizer_args", "relative_step=true", "--learning_rate", "1"],
            "sets the lear",
        ),
        (["--optimizer", "adafactor", "--optimizer_args", "relative_step=1"], "relative_step=1 .*; give true or false"),
        (["--optimizer", "adafactor", "--optimizer_args", "warmup_init=true"], "`warmup_init=True` requires"),
        (["--ema_decay", "0.9"], "--ema_decay belongs to --use_ema"),
        (["--use_ema", "--ema_decay", "1"], "--ema_decay 1.0 is not between 0 and"),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as error:
        parsed(tmp_path, *flags)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.package])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    package = OPTIMIZERS[name].package
    with pytest.raises(InputError, match=f"{name} needs {package}, .*; run `pip install {package}`"):
        parsed(tmp_path, "--optimizer", name)


@pytest.mark.parametrize("name", ["prodigy", *FACTORED])
def test_optimizers_that_measure_all_subjects_together_are_refused(tmp_path, name):
    import train_dreambooth_delora as script

    args = script.parse_arguments(["--subjects_file", "x", "--optimizer", name, "--output_dir", str(tmp_path / "o")])
    with pytest.raises(InputError, match=f"{name} measures all subjects of --subjects_file together"):
        script.check_arguments(args)


@pytest.mark.parametrize("name", sorted({*INSTALLED} - {"adamw8bit"}))
def test_subjects_affect_each_other_exactly_where_the_table_says(tmp_path, name):
    first, second = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).unbind()
    together, alone = nn.Parameter(torch.cat((first, 30 * second))), nn.Parameter(first.clone())
    flags = ("--optimizer_args", "d0=1e-3") if name == "prodigy" else ()
    optimizers = [only(name, tmp_path, parameter, flags=flags) for parameter in (together, alone)]
    for _ in range(40):  # towards 0, so that Prodigy increases its rate
        together.grad, alone.grad = together.detach().clone(), alone.detach().clone()
        together.grad[3:] *= 100
        for optimizer in optimizers:
            optimizer.param_groups[0]["train_mode"] = True
            optimizer.step()
    same = torch.allclose(together[:3], alone, rtol=1e-5, atol=1e-6)  # up to the rounding of vectorized loops
    assert same == OPTIMIZERS[name].separates_subjects


@pytest.mark.parametrize("method", ["delora", "lora"])
def test_the_default_rates(tmp_path, method):
    rate = METHODS[method].learning_rate
    expected = {"adamw": rate, "prodigy": 1.0, "lion": rate / 10, "came": rate / 10, "adafactor": rate}
    for name, learning_rate in expected.items():
        args = parsed(tmp_path, "--method", method, "--optimizer", name)
        assert args.learning_rate == pytest.approx(learning_rate) and args.lambda_learning_rate == 1e-3
    args = parsed(tmp_path, "--optimizer", "adafactor", "--optimizer_args", "relative_step=true")
    assert args.learning_rate == RELATIVE_STEP
    assert optimizer_options(args) == {"relative_step": True, "scale_parameter": True}


def test_the_default_is_the_fused_adamw_it_was(tmp_path):
    args = parsed(tmp_path)
    optimizer = build_optimizer([Parameters(nn.Parameter(torch.zeros(2)))], args)  # type: ignore
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 1e-8, 1e-2, 2e-2)


def test_arguments_from_flags_and_from_a_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("optimizer: prodigy\noptimizer_args: [betas=0.9,0.99, d_coef=2, beta3=none]\n")
    options = optimizer_options(parsed(tmp_path, "--config", config))
    assert options["betas"] == (0.9, 0.99) and options["d_coef"] == 2 and options["beta3"] is None
    assert options["safeguard_warmup"] and options["use_bias_correction"] and options["eps"] == 1e-8
    args = parsed(tmp_path, "--optimizer", "adamw_schedulefree", "--lr_warmup_steps", 7, "--adam_beta2", 0.95)
    assert optimizer_options(args) == {"betas": (0.9, 0.95), "eps": 1e-8, "warmup_steps": 7}


@pytest.mark.parametrize("name", FACTORED)
def test_stacked_matrices_are_factored_one_by_one(tmp_path, name):
    """The second moment of each matrix is factored on its own; only the clipping is of the stack."""
    stack = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    gradients = (
        torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 9, 70.0])[:, None, None]
    )
    results = []
    for parameters in ([nn.Parameter(stack.clone())], [nn.Parameter(matrix.clone()) for matrix in stack]):
        optimizer = only(name, tmp_path, *parameters, flags=("--optimizer_args", "clip_threshold=1e9"))
        for gradient in gradients:
            for parameter, part in zip(parameters, [gradient] if len(parameters) == 1 else gradient):
                parameter.grad = part.clone()
            optimizer.step()
        results.append(torch.stack(list(parameters)).view(3, 4, 5))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], stack)


@pytest.mark.parametrize("name", [*FACTORED, "prodigy", "lion", "adamw_schedulefree"])
def test_the_memory_of_the_states_is_what_is_allocated(tmp_path, name):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4, 50), (3, 60, 4), (7,), (5, 6), ())]
    optimizer = only(name, tmp_path, *parameters)
    step_all(optimizer, 1)
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    allocated = sum(value.nbytes for value in states) - sum(value.nbytes for value in states if value.ndim == 0)
    assert optimizer_bytes(parameters, name) == pytest.approx(allocated, abs=16)


@pytest.mark.parametrize("name", ["prodigy", "lion", *FACTORED])
def test_lambda_and_a_control_encoder_stay_with_adamw(tmp_path, name, unet):
    """At their own rates, with the same schedule, and in the order of the adapter's groups."""
    args = parsed(tmp_path, "--optimizer", name, "--lr_scheduler", "linear", "--max_train_steps", 10)
    args.control_learning_rate = 1e-4
    adapter, control = attach(unet, AdapterConfig(rank=4)), nn.Linear(3, 2)
    boundaries = [stack.trainable["lambda"] for stack in adapter.stacks]
    reference = [nn.Parameter(p.detach().clone()) for p in (*boundaries, *control.parameters())]
    optimizer = build_optimizer([adapter], args, control)
    assert isinstance(optimizer, SideBySide)
    assert [group["lr"] for group in optimizer.param_groups] == [args.learning_rate, 1e-3, 1e-4]
    rates = [{"params": reference[:-2], "lr": 1e-3, "weight_decay": 0.0}, {"params": reference[-2:], "lr": 1e-4}]
    adamw = torch.optim.AdamW(rates)
    before = [p.detach().clone() for p in adapter.parameters()]
    schedules = [build_lr_scheduler(o, args) for o in (optimizer, adamw)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for parameter, twin in zip((*boundaries, *control.parameters()), reference):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            twin.grad = parameter.grad.clone()
        for each in (optimizer, adamw, *schedules):
            each.step()
    for parameter, twin in zip((*boundaries, *control.parameters()), reference):
        torch.testing.assert_close(parameter, twin)
    assert all(not torch.equal(p, old) for p, old in zip(adapter.parameters(), before))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.7 * args.learning_rate, 7e-4, 7e-5])


def test_side_by_side_continues_from_its_state(tmp_path):
    def new() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
        args = parsed(tmp_path, "--optimizer", "prodigy")
        adapter = Parameters(parameters[0], boundary=parameters[1])
        return parameters, build_optimizer([adapter], args)  # type: ignore

    (parameters, optimizer), (copies, continued) = new(), new()
    step_all(optimizer, seed=1)
    with torch.no_grad():
        for other, parameter in zip(copies, parameters):
            other.copy_(parameter)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert continued.param_groups[0]["d"] == optimizer.param_groups[0]["d"]
    for each in (optimizer, continued):
        each.param_groups[1]["lr"] = 0.5  # as a scheduler sets it
        step_all(each, seed=2)
    assert all(torch.equal(other, parameter) for other, parameter in zip(copies, parameters))
    assert not math.isclose(parameters[1][0].item(), 1.0, abs_tol=0.05)


RUNS = {
    "prodigy": ("--optimizer", "prodigy"),
    "schedule-free": ("--optimizer", "adamw_schedulefree", "--lr_warmup_steps", 2),
    "adafactor": ("--optimizer", "adafactor", "--optimizer_args", "relative_step=true"),
    "lion": ("--optimizer", "lion"),
    "came": ("--optimizer", "came"),
    "average of OFT": ("--method", "oft", "--coft_eps", 6e-5, "--use_ema", "--ema_decay", 0.6),
}


@pytest.mark.integration
@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_has_the_same_bytes(tiny_sd, photographs, tmp_path, run):
    """Whether or not it has generated validation images and written logs and adapters along the way."""
    every = ("--checkpointing_steps", 1, "--logging_steps", 1, "--validation_steps", 1, "--validation_prompt", "a toy")
    once = ("--checkpointing_steps", 4, "--logging_steps", 4)
    images = ("--validation_inference_steps", 1, "--num_validation_images", 1)
    flags = (*RUNS[run], "--max_train_steps", 4, *images)
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "a", *flags, *every))
    resume = ("--resume_from_checkpoint", tmp_path / "a" / "checkpoint-2")
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "b", *flags, *once, *resume))
    files = [tmp_path / name / WEIGHTS_NAME for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.integration
def test_two_processes_take_the_same_steps(tiny_sd, photographs, tmp_path):
    from safetensors.torch import load_file

    more = ("--optimizer", "prodigy", "--optimizer_args", "d0=1e-3", "--use_ema", "--max_train_steps", 3)
    run_in_two_processes(train, training_flags(tiny_sd, photographs, tmp_path / "two", *more))
    single = ("--gradient_accumulation_steps", 2)
    run_in_child(train, training_flags(tiny_sd, photographs, tmp_path / "one", *more, *single))
    two, one = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_the_rates_of_a_prolonged_run_are_those_of_its_new_length():
    parameter = torch.nn.Parameter(torch.ones(1))
    args = argparse.Namespace(lr_scheduler="cosine", lr_warmup_steps=0, lr_num_cycles=1, lr_power=1, lr_step_rules=None)

    def built(steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        return optimizer, build_lr_scheduler(optimizer, argparse.Namespace(**vars(args), max_train_steps=steps))

    short, schedule = built(2)
    for _ in range(2):
        schedule.step()
    assert short.param_groups[0]["lr"] == 0
    longer, resumed = built(4)
    longer.load_state_dict(short.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    set_rates(resumed)
    assert longer.param_groups[0]["lr"] == pytest.approx(0.25), "half of the way of four steps"
