"""The contracts that torch's own battery (test/test_optim.py) holds every optimizer to, held against LODO.

`CONFIGS` (battery.py) is what torch calls an `optim_inputs_func`; `info` puts it into torch's `OptimizerInfo`. Only the
tests that ask torch's database for something need it to be importable (it wants the package expecttest); the others
always run.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lodo import LODO
from tests.helpers.battery import CONFIGS, Problem, every_config, plain

NOT_APPLICABLE = {
    "foreach": "a group is one flat vector: there is no loop over its tensors to replace",
    "fused": "the kernel is chosen by the device of the parameters; there is no second implementation to ask for",
    "differentiable": "a step writes parameters and state in place, without autograd",
    "sparse": "G mixes all coordinates of a group, so a step is dense even where a gradient is sparse",
    "complex": "G is a real operator",
    "closure needed": "the gradients in .grad are enough; a closure is optional and called once (LBFGS only)",
    "several devices in a group": "a group is one vector on one device; groups may lie on different ones",
    "momentum cycled by a scheduler": "schedulers look for an option `momentum` or `betas`; LODO's is `beta`",
    "step count as a number": "`step` is a tensor of integers, and no state from before tensor counts exists",
    "peak memory, tensors of 2**32 elements": "torch measures these on its foreach and fused implementations",
    "found_inf inside a fused step": "GradScaler leaves out the call of step itself",
}

REFUSED = {
    "params": (lambda: [], {}, ValueError, "empty parameter list"),
    "complex": (lambda: [torch.ones(2, dtype=torch.complex64)], {}, ValueError, "complex64"),
    "sparse": (lambda: [torch.ones(2).to_sparse()], {}, ValueError, "sparse"),
    "integer": (lambda: [torch.ones(2), torch.ones(2, dtype=torch.int64)], {}, ValueError, "int64"),
    "devices": (lambda: [torch.ones(2), torch.ones(2, device="meta")], {}, ValueError, "on one device"),
    "lr": (None, {"lr": -1.0}, ValueError, r"lr must be a number >= 0 and finite, got -1.0"),
    "beta": (None, {"beta": 1.0}, ValueError, r"beta must be a number >= 0 and < 1, got 1.0"),
    "decay": (None, {"weight_decay": float("nan")}, ValueError, r"weight_decay must be a number >= 0 and .*, got nan"),
    "block_size": (None, {"block_size": 0}, ValueError, r"block_size must be an int >= 1, got 0"),
    "maximize": (None, {"maximize": 1}, ValueError, r"maximize must be a bool, got 1"),
    **{flag: (None, {flag: True}, TypeError, flag) for flag in ("foreach", "fused", "differentiable")},
    "capturable": (None, {"capturable": 1}, ValueError, r"capturable must be a bool, got 1"),
    "meta_every": (None, {"meta_every": 0}, ValueError, r"meta_every must be an int >= 1, got 0"),
    "momentum_dtype": (
        None,
        {"momentum_dtype": "half"},
        ValueError,
        "momentum_dtype must be one of None, 'bfloat16', got",
    ),
    "meta_state_dtype": (
        None,
        {"meta_state_dtype": torch.float16},
        ValueError,
        "meta_state_dtype must be one of None, 'bfloat16', got 'float16'",
    ),
}

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.95),
    "StepLR": lambda opt: StepLR(opt, step_size=5, gamma=0.9),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, milestones=[3, 8], gamma=0.7),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.4, total_iters=4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4),
    "ExponentialLR": lambda opt: ExponentialLR(opt, gamma=0.95),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=30, power=0.9),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=10),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=5, T_mult=2),
    "ReduceLROnPlateau": lambda opt: ReduceLROnPlateau(opt, factor=0.9, patience=0, threshold=0.9),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 0.8, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=30, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(opt, [StepLR(opt, 2, 0.9), ExponentialLR(opt, 0.9)], [5]),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler([StepLR(opt, 2, 0.9), ExponentialLR(opt, 0.95)]),
}


@pytest.fixture(scope="module")
def database():
    """torch's database of optimizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # it would hold for the whole process
        reason = "torch's database of optimizers cannot be imported (it needs the package expecttest)"
        return pytest.importorskip("torch.testing._internal.common_optimizers", reason=reason)


@pytest.fixture
def info(database):
    """LODO's entry, as it would stand in torch's database."""

    def errors(device: str, dtype: torch.dtype) -> list[Any]:
        found = database.get_error_inputs_for_all_optims(device, dtype)
        for name, (params, kwargs, error, message) in REFUSED.items():
            sample = database.OptimizerInput(params() if params else None, kwargs, name)
            found.append(database.ErrorOptimizerInput(sample, error_type=error, error_regex=message))
        return found

    return database.OptimizerInfo(
        LODO,
        optim_inputs_func=lambda device, dtype=None: [
            database.OptimizerInput(None, copy.deepcopy(kwargs), name) for name, kwargs in CONFIGS.items()
        ],
        optim_error_inputs_func=errors,
        scheduler_inputs=[[build] for build in SCHEDULERS.values()],
        supported_impls=(),
        has_capturable_arg=True,
        not_og_supported_flags=tuple(LODO([torch.zeros(1)]).defaults),  # a state dict may lack any option
        supports_complex=False,
        supports_multiple_devices=False,
    )


def test_info_and_table_agree(database, info):
    offered = {flag: flag in info.supported_impls for flag in ("foreach", "fused", "differentiable")}
    offered["capturable"] = info.has_capturable_arg
    offered["sparse"] = info.supports_sparse or info.only_supports_sparse_grads
    offered["complex"] = info.supports_complex
    offered["closure needed"] = info.step_requires_closure
    offered["several devices in a group"] = info.supports_multiple_devices
    assert {name for name, is_offered in offered.items() if not is_offered} == set(offered) & set(NOT_APPLICABLE)
    assert info.supports_param_groups
    # torch's expansion of the configurations adds no implementation.
    expanded = database._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
    assert [sample.desc for sample in expanded] == list(CONFIGS)


@pytest.mark.filterwarnings("default")
def test_errors_of_torchs_database(info):
    inputs = info.optim_error_inputs_func("cpu", torch.float32)
    assert len(inputs) > len(REFUSED)
    for error in inputs:
        sample = error.optimizer_error_input
        expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expect(error.error_type, match=error.error_regex):
            LODO(sample.params, **sample.kwargs)


@pytest.mark.parametrize(("params", "kwargs", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(params, kwargs, error, message):
    with pytest.raises(error, match=message):
        LODO(params() if params else [Parameter(torch.ones(2))], **kwargs)


def test_sparse_gradients_are_refused_and_nothing_changes():
    problem = Problem({}, groups=({}, {})).run(2)
    problem.closure()
    problem.bias.grad = problem.bias.grad.to_sparse()
    before = problem.values(), problem.saved()
    with pytest.raises(RuntimeError, match="LODO does not support sparse gradients"):
        problem.optimizer.step()
    assert (problem.values(), problem.saved()) == before


@every_config
def test_goes_in_the_right_direction(kwargs):
    problem = Problem(kwargs)
    start = problem.closure()
    assert problem.run(20).went_right(start)
    # Parameters and gradients with gaps in memory give the very same numbers.
    strided = Problem(kwargs, contiguous=False).run(20)
    assert not any(p.is_contiguous() or p.grad.is_contiguous() for p in strided.params)
    assert strided.values() == problem.values()


@pytest.mark.parametrize("enabled", [True, False])
@every_config
def test_closures_and_grad_mode(kwargs, enabled):
    problem, modes = Problem(kwargs), []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        return problem.closure()

    with torch.set_grad_enabled(enabled):
        losses = [problem.optimizer.step(closure) for _ in range(3)]
        gradients = plain([p.grad for p in problem.params])
        with pytest.raises(ZeroDivisionError):
            problem.optimizer.step(lambda: 1 / 0)
        assert torch.is_grad_enabled() == enabled
    assert modes == [True] * 3
    assert problem.values() == Problem(kwargs).run(3).values()
    assert problem.optimizer.step() is None
    assert plain([p.grad for p in problem.params]) == gradients  # a step does not write them
    assert all(x.requires_grad for x in (*losses, *problem.params))


@every_config
def test_missing_and_zero_gradients_move_nothing(kwargs):
    problem = Problem({**kwargs, "weight_decay": 0.0})
    before, optimizer = problem.values(), problem.optimizer
    optimizer.step()
    assert optimizer.step(lambda: 1.5) == 1.5
    assert not optimizer.state
    problem.closure()
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in problem.params)
    optimizer.step()
    assert problem.values() == before
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.params)
    # A parameter without a gradient stays where it is among others that move, weight decay or not.
    problem = Problem({**kwargs, "weight_decay": 0.1}).run(2)
    before, kept = problem.values(), problem.saved()["state"][0]
    problem.closure()
    problem.weight.grad = None
    problem.optimizer.step()
    assert [now == old for now, old in zip(problem.values(), before, strict=True)] == [True, False]
    # So does what is kept for it, unless the network acts on the group as a whole.
    is_elementwise = kwargs.get("preconditioner") in ("log_diagonal", "identity")
    assert (problem.saved()["state"][0] == kept) is is_elementwise
    assert [int(problem.optimizer.state[p]["step"]) for p in problem.params] == [2 if is_elementwise else 3, 3]


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@every_config
def test_tensor_lr_equals_number(kwargs, shape):
    problem = Problem({**kwargs, "lr": torch.full(shape, 0.3)})
    lr = problem.optimizer.param_groups[0]["lr"]
    version = lr._version
    assert problem.run(5).values() == Problem({**kwargs, "lr": float(lr)}).run(5).values()
    assert problem.optimizer.param_groups[0]["lr"] is lr
    assert lr._version == version  # never written to


@every_config
def test_default_dtype_and_device_have_no_influence(kwargs):
    problem, usual = Problem(kwargs), torch.get_default_dtype()
    for _ in range(3):
        problem.closure()
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device("meta"):  # stands for an accelerator where the parameters are not
                problem.optimizer.step()
        finally:
            torch.set_default_dtype(usual)
    expected = Problem(kwargs).run(3)
    assert (problem.values(), problem.saved()) == (expected.values(), expected.saved())


def test_dtypes_can_be_mixed():
    start = torch.linspace(-1, 1, 5)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    params = [Parameter(start.to(dtype, copy=True)) for dtype in dtypes]
    optimizer = LODO(params)
    for _ in range(40):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    assert all(p.norm() < 0.3 * start.norm() for p in params)
    assert {optimizer.state[p]["momentum"].dtype for p in params} == {torch.float64}


@pytest.mark.parametrize("lr", [0.8, torch.tensor(0.8)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", sorted(set(lr_scheduler.__all__) - {"LRScheduler"}))
def test_schedulers_steer_every_group(name, lr):
    problem = Problem({"lr": lr}, groups=({}, {"lr": copy.deepcopy(lr) / 2}))
    start, scheduler, seen = problem.closure(), SCHEDULERS[name](problem.optimizer), []
    for _ in range(20):
        seen.append([float(group["lr"]) for group in problem.optimizer.param_groups])
        loss = problem.optimizer.step(problem.closure)
        scheduler.step(*([loss.item()] if name == "ReduceLROnPlateau" else []))
    assert problem.went_right(start)
    assert all(len(set(lrs)) > 1 for lrs in zip(*seen, strict=True))
    used = [float(problem.optimizer.state[p]["last_lr"]) for p in problem.params]
    assert used == pytest.approx(seen[-1], rel=1e-6)


@every_config
def test_scheduler_combinations_of_torchs_database(database, kwargs):
    for builders in next(entry for entry in database.optim_db if entry.name == "SGD").scheduler_inputs:
        problem = Problem(kwargs)
        start, schedulers = problem.closure(), [build(problem.optimizer) for build in builders]
        for _ in range(10):
            loss = problem.optimizer.step(problem.closure)
            for scheduler in schedulers:
                scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert problem.went_right(start)


@pytest.mark.parametrize("build", [lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR])
def test_momentum_cannot_be_cycled(build):
    with pytest.raises(ValueError, match="momentum"):
        build(Problem({}).optimizer, 0.1, 10, cycle_momentum=True)


def test_averaged_models_and_swalr():
    model = torch.nn.Linear(3, 2, bias=False)
    swa = swa_utils.AveragedModel(model)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = LODO(model.parameters(), lr=0.5)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    iterates = []
    for _ in range(3):
        model(torch.eye(3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
        iterates.append(model.weight.detach().clone())
    a, b, c = iterates
    assert not torch.equal(a, c)
    torch.testing.assert_close(swa.module.weight.detach(), (a + b + c) / 3)
    torch.testing.assert_close(ema.module.weight.detach(), 0.81 * a + 0.09 * b + 0.1 * c)
    assert float(optimizer.state[model.weight]["last_lr"]) == pytest.approx(0.05)


@every_config
def test_groups_equal_as_many_optimizers(kwargs):
    together, apart = Problem(kwargs, groups=({}, {})), Problem(kwargs)
    optimizers = [LODO([p], **copy.deepcopy(kwargs)) for p in apart.params]
    for _ in range(5):
        apart.closure()
        for optimizer in optimizers:
            optimizer.step()
        assert together.run(1).values() == apart.values()


@every_config
def test_groups_have_their_own_options(kwargs):
    problem = Problem(kwargs, groups=({}, {"lr": 0.0}))
    start, before = problem.closure(), problem.values()
    assert problem.run(20).went_right(start)
    assert problem.values()[1] == before[1]
    problem = Problem(kwargs, groups=({"weight_decay": 0.25, "lr": 0.5}, {"weight_decay": 0.0}))
    weight, bias = (p.detach().clone() for p in problem.params)
    problem.closure()
    problem.optimizer.zero_grad(set_to_none=False)
    problem.optimizer.step()
    torch.testing.assert_close(problem.weight.detach(), (1 - 0.5 * 0.25) * weight)
    assert torch.equal(problem.bias, bias)


def test_options_can_be_changed_between_steps():
    problem = Problem({"depth": 0, "meta_lr": 0.0, "beta": 0.0})  # G = lr * I: plain SGD
    for lr, weight_decay, maximize in [(0.5, 0.0, False), (0.25, 0.0, False), (0.25, 0.1, False), (0.1, 0.1, True)]:
        problem.optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay, maximize=maximize)
        problem.closure()
        gradient = -problem.weight.grad if maximize else problem.weight.grad
        expected = problem.weight.detach() * (1 - lr * weight_decay) - lr * gradient
        problem.optimizer.step()
        torch.testing.assert_close(problem.weight.detach(), expected)


@every_config
def test_add_param_group(kwargs):
    problem, late = Problem(kwargs).run(3), Parameter(torch.ones(3))
    optimizer, state = problem.optimizer, problem.saved()["state"]
    for group, error, message in [
        ([late], TypeError, "must be a dict"),
        ({"params": {late}}, TypeError, "ordered collections"),
        ({"params": [problem.bias]}, ValueError, "more than one parameter group"),
        ({"params": [("late", late)]}, ValueError, "with/without names"),
        ({"params": [late], "beta": 2.0}, ValueError, "beta"),
        ({"params": [late.detach().to_sparse()]}, ValueError, "sparse"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
    optimizer.add_param_group({"params": late, "lr": 0.125})
    optimizer.add_param_group({"params": []})
    assert optimizer.param_groups[1:2] == [{**optimizer.defaults, "params": [late], "lr": 0.125}]
    assert problem.saved()["state"] == state
    problem.closure()
    late.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert not torch.equal(late, torch.ones(3))
    assert problem.values() == Problem(kwargs).run(4).values()


def test_step_hooks_and_profile():
    problem, order = Problem({}).run(1), []
    before, optimizer = problem.values(), problem.optimizer
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: order.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: order.append(("pre", problem.values() == before))),
        optimizer.register_step_post_hook(lambda *_: order.append(("post", problem.values() == before))),
    ]
    with torch.autograd.profiler.profile() as profile:
        problem.run(1)
    for handle in handles:
        handle.remove()
    problem.run(1)
    assert order == ["global pre", ("pre", True), ("post", False), "global post"]
    assert LODO.step.hooked
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#LODO.step", "Optimizer.zero_grad#LODO.zero_grad"} <= names
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


@every_config
def test_repr_and_defaults_show_the_options(kwargs):
    optimizer = Problem(kwargs, groups=({}, {"lr": 0.125})).optimizer
    assert repr(optimizer).startswith("LODO (")
    for name, value in {**kwargs, "lr": optimizer.defaults["lr"]}.items():
        assert f"{name}: {value}" in repr(optimizer)
        assert optimizer.defaults[name] == optimizer.param_groups[0][name] == value
    assert optimizer.param_groups[1]["lr"] == 0.125
