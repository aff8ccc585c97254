"""The optimizers of the paper's comparisons against formulas written out, scipy, and themselves after a reload."""

import io
import math

import numpy as np
import pytest
import torch

from examples.paper.baselines.learned_lstm import LearnedOptimizer, LSTMRule, _Run, meta_train, preprocess, trained_rule
from examples.paper.baselines.levenberg_marquardt import LevenbergMarquardt, gradient_and_hessian
from examples.paper.baselines.quasi_newton import BFGS, FlatOptimizer, OnlineLBFGS, _bfgs_
from examples.paper.tasks.base import Task
from tests.helpers.oracle import quadratic

SIZE = 6


@pytest.fixture(autouse=True)
def _one_thread():
    """These matrices are so small that a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Quadratic(Task):
    """(x - c)^T H (x - c) / 2 in two parameters, with a small random c for each sample unless noise is 0."""

    def __init__(self, seed=0, size=SIZE, noise=0.1, dtype=torch.float64):
        self.h, self.center = quadratic(size, dtype=dtype)
        self.noise, self.generator = noise, torch.Generator().manual_seed(seed)
        self.params = [
            torch.zeros(2, 1, dtype=dtype, requires_grad=True),
            torch.zeros(size - 2, dtype=dtype, requires_grad=True),
        ]
        self.draw()

    def draw(self):
        noise = torch.randn(len(self.center), generator=self.generator, dtype=torch.float64)
        self.now = self.center + self.noise * noise.to(self.center.dtype)

    def loss(self, params):
        offset = flat(params) - self.now
        return 0.5 * (offset @ (self.h @ offset))


def flat(params):
    return torch.cat([p.reshape(-1) for p in params])


def gradient(task):
    return flat([p.grad for p in task.params])


def plain(task, optimizer):
    task.backward()
    optimizer.step()


def with_closure(task, optimizer):
    return optimizer.step(task.backward)


def with_loss(task, optimizer):
    return optimizer.step(lambda: task.loss(task.params))


CASES = {
    "online_lbfgs": (lambda params: OnlineLBFGS(params, epsilon=0.1, history=3), with_closure),
    "lbfgs": (lambda params: OnlineLBFGS(params, epsilon=0.1, history=3, scaling="last"), with_closure),
    "bfgs": (lambda params: BFGS(params, lr=0.1), plain),
    "levenberg_marquardt": (LevenbergMarquardt, with_loss),
    "learned": (lambda params: LearnedOptimizer(params, LSTMRule(dtype=params[0].dtype)), plain),
}


def two_loops(g, pairs, scaling):
    """Nocedal's recursion, as it is printed."""
    alphas = []
    for s, y in reversed(pairs):
        alphas.append((s @ g) / (s @ y))
        g = g - alphas[-1] * y
    quotients = [(s @ y) / (y @ y) for s, y in pairs]
    g = g * (quotients[-1] if scaling == "last" else sum(quotients) / len(quotients))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        g = g + (alpha - (y @ g) / (s @ y)) * s
    return g


@pytest.mark.parametrize("scaling", ["average", "last"])
@pytest.mark.parametrize("history", [1, 3, 20])
def test_online_lbfgs_is_the_two_loop_recursion(scaling, history):
    task, lr, tau, epsilon = Quadratic(), 0.3, 7.0, 0.2
    optimizer = OnlineLBFGS(task.params, lr=lr, tau=tau, epsilon=epsilon, history=history, scaling=scaling)
    pairs = []
    for t in range(11):
        task.draw()
        x = flat(task.params).detach().clone()
        loss = task.backward()
        g = gradient(task)
        direction = two_loops(g, pairs[-history:], scaling) if pairs else epsilon * g
        s = -lr * tau / (tau + t) * direction
        assert optimizer.step(task.backward) == loss
        assert torch.allclose(flat(task.params), x + s, rtol=1e-10, atol=1e-12)
        pairs.append((s, task.h @ s))


def test_online_lbfgs_direction_is_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    task = Quadratic()
    optimizer = OnlineLBFGS(task.params, epsilon=0.1, history=3)
    optimizer.step(task.backward)
    rng = np.random.default_rng(0)
    pairs = []
    for count in range(1, 8):
        # scipy's operator starts from the identity: pairs of which the quotient s^T y / y^T y is 1
        y = rng.standard_normal(SIZE)
        across = rng.standard_normal(SIZE)
        pairs.append((y + across - y * (across @ y) / (y @ y), y))
        optimizer._store(*map(torch.from_numpy, pairs[-1]))
        g = rng.standard_normal(SIZE)
        if count < 3:
            continue  # the pair of the step is still there
        reference = optimize.LbfgsInvHessProduct(*map(np.array, zip(*pairs[-3:], strict=True)))
        np.testing.assert_allclose(optimizer._direction(torch.from_numpy(g)), reference.matvec(g), rtol=1e-9)


@pytest.mark.parametrize("name", ["online_lbfgs", "bfgs"])
def test_pairs_without_positive_curvature_are_left_out(name):
    build, advance = CASES[name]
    task = Quadratic(noise=0)
    optimizer = build(task.params)
    for _ in range(4):
        advance(task, optimizer)
    kept = optimizer.state[task.params[0]]["inverse"].clone()
    for bad in (1.0, 0.0, math.nan, math.inf, 1e-320):
        s = torch.ones(SIZE, dtype=torch.float64)
        y = torch.zeros_like(s)
        y[0] = -bad if bad == 1 else bad
        if name == "bfgs":
            state = optimizer.state[task.params[0]]
            state["move"], state["gradient"] = s, torch.zeros_like(s)
            for p, part in zip(task.params, y.split([2, SIZE - 2]), strict=True):
                p.grad = part.view(p.shape)
            optimizer.step()
        else:
            optimizer._store(s, y)
        assert torch.equal(optimizer.state[task.params[0]]["inverse"], kept)


def test_bfgs_is_the_dense_formula():
    task, lr, scale = Quadratic(), 0.3, 0.5
    optimizer = BFGS(task.params, lr=lr, initial_scale=scale)
    identity = torch.eye(SIZE, dtype=torch.float64)
    inverse, s, before, updates = scale * identity, None, None, 0
    for _ in range(10):
        task.draw()
        x = flat(task.params).detach().clone()
        task.backward()
        g = gradient(task)
        if s is not None and s @ (g - before) > 0:
            y = g - before
            rho = 1 / (s @ y)
            left = identity - rho * torch.outer(s, y)
            inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
            updates += 1
        s, before = -lr * (inverse @ g), g
        optimizer.step()
        assert torch.allclose(flat(task.params), x + s, rtol=1e-9, atol=1e-12)
    assert updates > 3


def test_bfgs_update_is_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    task = Quadratic(noise=0)
    optimizer = BFGS(task.params, lr=0.2)
    reference = optimize.BFGS(init_scale=1.0)
    reference.initialize(SIZE, "inv_hess")
    x, g = None, None
    for _ in range(8):
        last_x, x = x, flat(task.params).detach().numpy().copy()
        task.backward()
        last_g, g = g, gradient(task).numpy().copy()
        optimizer.step()
        if last_x is not None:
            reference.update(x - last_x, g - last_g)
    np.testing.assert_allclose(
        optimizer.state[task.params[0]]["inverse"], reference.get_matrix(), rtol=1e-8, atol=1e-10
    )


def test_bfgs_update_finds_the_inverse_hessian_with_exact_line_steps():
    h, center = quadratic(SIZE)
    inverse, x = torch.eye(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(SIZE):
        g = h @ (x - center)
        direction = inverse @ g
        s = -(g @ direction) / (direction @ h @ direction) * direction
        x = x + s
        _bfgs_(inverse, s, h @ s)
    assert torch.allclose(x, center, rtol=1e-8)
    assert torch.allclose(inverse @ h, torch.eye(SIZE, dtype=torch.float64), atol=1e-8)


class Quartic(Quadratic):
    def loss(self, params):
        x = flat(params) - self.now
        return super().loss(params) + (x**4).sum() + x[0] * x[1] ** 2


def test_levenberg_marquardt_is_its_formula():
    task, damping = Quartic(), 0.3
    optimizer = LevenbergMarquardt(task.params, damping)
    for _ in range(4):
        task.draw()
        x = flat(task.params).detach()
        hessian = torch.autograd.functional.hessian(lambda v, t=task: t.loss([v]), x)
        loss = task.backward()
        square = hessian @ hessian
        inverse = torch.linalg.inv(square + damping * torch.diag(square.diagonal()))
        expected = x - inverse @ hessian @ gradient(task)
        assert optimizer.step(lambda: task.loss(task.params)) == pytest.approx(loss, rel=1e-12)
        assert torch.allclose(flat(task.params), expected, rtol=1e-9)


def test_levenberg_marquardt_without_damping_is_newtons_method():
    task = Quadratic()
    LevenbergMarquardt(task.params, damping=0.0).step(lambda: task.loss(task.params))
    assert torch.allclose(flat(task.params), task.now, rtol=1e-10)


class Cube(torch.autograd.Function):
    """x^3, with a backward that reads its argument, which vmap cannot batch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return Slope.apply(x, grad)


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(x, grad)
        return 3 * x**2 * grad

    @staticmethod
    def backward(ctx, outer):
        x, grad = ctx.saved_tensors
        assert outer.abs().max().item() < math.inf
        return 6 * x * grad * outer, 3 * x**2 * outer


def test_hessian_where_vmap_cannot_help():
    x = torch.tensor([1.0, 2.0, -0.5], requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    g, h = gradient_and_hessian(Cube.apply(x).sum(), [x, unused])
    assert torch.allclose(g, torch.cat([3 * x**2, unused]))
    assert torch.allclose(h, torch.diag(torch.cat([6 * x, unused])))
    assert not g.requires_grad
    assert not h.requires_grad


def test_preprocessing_is_the_published_one():
    p = 10.0
    values = [3.0, -3.0, 1e-2, -1e-4, math.exp(-p) * 1.001, math.exp(-p) * 0.999, 1e-7, -1e-7, 0.0]
    expected = [
        (math.log(abs(g)) / p, math.copysign(1.0, g)) if abs(g) >= math.exp(-p) else (-1.0, math.exp(p) * g)
        for g in values
    ]
    found = preprocess(torch.tensor(values, dtype=torch.float64))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64).T, rtol=1e-12)


def test_rule_is_the_lstm_of_torch():
    rule, size = LSTMRule(hidden=4), 5
    reference = torch.nn.LSTM(2, 4, 2).double()
    order = torch.tensor([0, 1, 3, 2])  # torch has the candidate before the output gate
    halves = torch.tensor([1, 1, 0.5, 1], dtype=torch.float64).view(4, 1, 1)
    with torch.no_grad():
        for layer, weight, bias in ((0, rule.weight_1, rule.bias_1), (1, rule.weight_2, rule.bias_2)):
            for name, value in zip(
                (f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}"),
                (*weight.split([weight.shape[1] - 4, 4], dim=1), bias),
                strict=True,
            ):
                moved = value.view(4, 4, -1)[order] * halves
                getattr(reference, name).copy_(moved.reshape(getattr(reference, name).shape))
            getattr(reference, f"bias_hh_l{layer}").zero_()
        memory, state = rule.start(size), None
        for _ in range(3):
            g = torch.randn(size, dtype=torch.float64)
            step, memory = rule(g, memory)
            output, state = reference(preprocess(g).T[None], state)
            assert torch.allclose(step, 0.1 * (rule.weight_out @ output[0].T)[0], rtol=1e-9)


def test_rule_treats_coordinates_alike():
    rule, size = LSTMRule(), 7
    order = torch.randperm(size)
    one, other = rule.start(size), rule.start(size)
    for _ in range(3):
        g = torch.randn(size, dtype=torch.float64)
        step, one = rule(g, one)
        permuted, other = rule(g[order], other)
        assert torch.allclose(permuted, step[order], rtol=1e-12)


def test_meta_gradient_is_that_of_the_unrolled_run():
    rule, steps = LSTMRule(hidden=3), 6
    run = _Run(Quartic(), rule)
    run.unroll(4)  # what came before is a constant
    plainly, memory, x = Quartic(), rule.start(SIZE), torch.zeros(SIZE, dtype=torch.float64)
    total = 0.0
    for step in range(4 + steps):
        plainly.draw()
        x = x if step > 4 else x.detach().requires_grad_()
        memory = memory if step > 4 else tuple(part.detach() for part in memory)
        loss = plainly.loss([x])
        (g,) = torch.autograd.grad(loss, x, retain_graph=True)
        total = total + loss if step >= 4 else 0.0
        move, memory = rule(g, memory)
        x = x + move
    expected = torch.autograd.grad(total, list(rule.parameters()))
    losses, meta_loss = run.unroll(steps)
    assert sum(losses) == pytest.approx(float(total.detach()), rel=1e-12)
    for found, exact in zip(torch.autograd.grad(meta_loss, list(rule.parameters())), expected, strict=True):
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-12)


def test_meta_training_lowers_the_loss():
    history = meta_train(lambda number: Quadratic(number), LSTMRule(hidden=8), episodes=20, steps=40, lr=2e-2)
    assert len(history) == 20
    assert sum(history[-3:]) < 0.5 * sum(history[:3])


def test_meta_training_leaves_bad_episodes_out():
    class Bad(Quadratic):
        def backward(self):
            super().backward()
            return math.nan

    rule = LSTMRule(hidden=3)
    before = [weight.clone() for weight in rule.parameters()]
    history = meta_train(lambda number: Bad(), rule, episodes=2, steps=40)
    assert len(history) == 2
    assert all(math.isnan(loss) for loss in history)
    assert all(torch.equal(now, then) for now, then in zip(rule.parameters(), before, strict=True))
    history = meta_train(lambda number: Bad() if number == 1 else Quadratic(), rule, episodes=3, steps=20)
    assert [math.isnan(loss) for loss in history] == [False, True, False]


def test_learned_optimizer_applies_the_rule_and_leaves_it():
    rule = trained_rule(lambda number: Quadratic(number, dtype=torch.float32), seed=3, episodes=1, steps=4)
    assert rule.weight_1.dtype == torch.float32
    task = Quadratic(dtype=torch.float32)
    optimizer = LearnedOptimizer(task.params, rule)
    memory = rule.start(SIZE)
    for _ in range(3):
        task.draw()
        task.backward()
        x = flat(task.params).detach().clone()
        step, memory = rule(gradient(task), memory)
        optimizer.step()
        assert torch.allclose(flat(task.params), x + step, rtol=1e-6)
    with torch.no_grad():
        rule.weight_1.zero_()  # the optimizer has its own
    assert optimizer.state[task.params[0]]["weight_1"].abs().max() > 0


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_exact(name, dtype):
    build, advance = CASES[name]
    task = Quadratic(dtype=dtype)
    optimizer = build(task.params)
    for step in range(10):
        if step == 5:
            saved = through_file({"task": task.state_dict(), "optimizer": optimizer.state_dict()})
        task.draw()
        advance(task, optimizer)
    other = Quadratic(seed=9, dtype=dtype)
    other.load_state_dict(saved["task"])
    resumed = build(other.params)
    if name == "learned":
        resumed = LearnedOptimizer(other.params, LSTMRule(dtype=dtype, seed=9))
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(5):
        other.draw()
        advance(other, resumed)
    assert torch.equal(flat(other.params), flat(task.params))
    expected, found = optimizer.state_dict()["state"][0], resumed.state_dict()["state"][0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, key


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_cuda_takes_the_same_steps(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    build, advance = CASES[name]
    ends = []
    for device in ("cpu", "cuda"):
        task = Quadratic(noise=0)
        task.h, task.now = task.h.to(device), task.now.to(device)
        task.params = [p.detach().to(device).requires_grad_() for p in task.params]
        optimizer = build(task.params)
        for _ in range(8):
            advance(task, optimizer)
        ends.append(flat(task.params).detach().cpu())
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-9)


def test_parameters_without_gradient_count_as_zero():
    x, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = BFGS([x, unused], lr=0.1)
    for _ in range(3):
        x.grad = None
        x.square().sum().backward()
        optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3))
    assert x.max() < 1


BAD = {
    OnlineLBFGS: [
        {"lr": -1.0},
        {"lr": math.nan},
        {"tau": 0.0},
        {"epsilon": 0.0},
        {"history": 0},
        {"history": 2.5},
        {"scaling": "first"},
    ],
    BFGS: [{"lr": -1.0}, {"initial_scale": 0.0}],
    LevenbergMarquardt: [{"damping": -0.1}, {"damping": math.nan}],
}


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind, options in BAD.items() for option in options])
def test_bad_options(kind, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value!r}"):
        kind([torch.zeros(2, requires_grad=True)], **option)


@pytest.mark.parametrize(
    "params",
    [
        [torch.zeros(2), torch.zeros(2, dtype=torch.float64)],
        [torch.zeros(2, dtype=torch.float16)],
        [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2)]}],
    ],
    ids=["mixed", "half", "groups"],
)
def test_bad_parameters(params):
    with pytest.raises(ValueError, match="params must"):
        FlatOptimizer(params, {})


def test_bad_rules_and_meta_training():
    for option in ({"hidden": 0}, {"output_scale": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
            LSTMRule(**option)
    for name, value in {"episodes": 0, "steps": 1, "unroll": 1, "lr": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            meta_train(lambda number: Quadratic(), LSTMRule(), **{name: value})
    with pytest.raises(ValueError, match=r"rule must be .*float32, got .*float64"):
        LearnedOptimizer([torch.zeros(2)], LSTMRule())
