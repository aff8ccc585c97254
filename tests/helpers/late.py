"""Parameters that join late or have a gradient at some steps only, and optimizers that hold each of them alone."""

import os

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.habits import noisy
from tests.helpers.states import assert_same

PAPER = {"lr": 0.05, "depth": 3, "block_size": 3}
ELEMENTWISE = {
    "recommended": lodo.RECOMMENDED,
    "over adam": {**lodo.RECOMMENDED, "base": "adam"},
    "one momentum": {**lodo.RECOMMENDED, "momentum_decays": None},
    "no base": {**lodo.RECOMMENDED, "base": None},
    "no parts": {"preconditioner": "log_diagonal", "lr": 0.05, "meta_lr": 0.01},
    "scales alone": {"preconditioner": "identity", "lr": 0.01, "scale_lr": 0.05},
    "adam": {"preconditioner": "identity", "lr": 0.01, "base": "adam", "weight_decay": 0.1},
    "SGD inside, decay": {**lodo.RECOMMENDED, "meta_optimizer": "sgd", "weight_decay": 0.1, "base": "adam"},
}
WHOLE = {
    "paper": PAPER,
    "paper, SGD inside": {**PAPER, "meta_optimizer": "sgd"},
    "residual": {"lr": 0.05, "preconditioner": "residual", "depth": 3},
    "diagonal": {"lr": 0.05, "preconditioner": "diagonal"},
    "over adam": {**PAPER, "base": "adam", "lr": 0.01},
    "with all parts": {**lodo.RECOMMENDED, "preconditioner": "block_permutation", "depth": 3},
}
SHAPES = ((4, 5), (3, 6), (2, 3, 2), ())  # all of which have the same eigenbases in any group
WAYS = ("native", "reference", "scalars on the device")
ON_ALL_WAYS = ("recommended", "over adam", "network with all parts")  # the others by the kernels alone: it is slow


def in_ways(recipes):
    """Parametrizes a test by `options` and by the fixture `where`."""
    cases = [
        pytest.param(options, way, id=f"{name}, {way}")
        for name, options in recipes
        for way in (WAYS if name in ON_ALL_WAYS else WAYS[:1])
    ]
    return pytest.mark.parametrize(("options", "where"), cases, indirect=["where"])


elementwise_in_ways = in_ways(ELEMENTWISE.items())
all_in_ways = in_ways([*ELEMENTWISE.items(), *((f"network {name}", each) for name, each in WHOLE.items())])
each_elementwise = pytest.mark.parametrize("options", ELEMENTWISE.values(), ids=ELEMENTWISE)
each_whole = pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)


each_recipe = pytest.mark.parametrize("options", [*ELEMENTWISE.values(), *WHOLE.values()], ids=[*ELEMENTWISE, *WHOLE])


def made(shapes=SHAPES):
    return [nn.Parameter(noisy(shape, 10 + key)) for key, shape in enumerate(shapes)]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradient(p, key, step):
    """Of ordinary size, whatever is trained beside."""
    target = noisy(p.shape, 20 + key) + 2
    return 0.5 * (p.detach() - target) + 0.2 * noisy(p.shape, 1000 * (key + 1) + step)


def give(params, step, takes, keys=None):
    """Gives the parameters that take the step their gradients, and the others none."""
    for key, p in zip(keys or range(len(params)), params, strict=True):
        p.grad = gradient(p, key, step) if takes(key, step) else None


def go_on(params, optimizer, begin, end):
    """Steps at which every parameter has its gradient."""
    for step in range(begin, end):
        give(params, step, always)
        optimizer.step()


def without(entry, *names):
    """What is kept of a parameter that is its own: of a group there are counts of skips, and a mark."""
    return {name: value for name, value in entry.items() if name not in ("skipped_steps", "shards", *names)}


def always(key, step):
    return True


def now_and_then(key, step):
    """Each parameter its own steps; at some there is one, at some there are several, at some none."""
    return bool(torch.rand((), generator=torch.Generator().manual_seed(7919 * key + step)) < 0.4)


class Alone:
    """Optimizers that hold a parameter each, and are called only at the steps that it takes.

    Of these everything is the same bit for bit, but over eigenbases, and where torch sums in place of the kernels: by
    where things lie in memory products of matrices and vectors are rounded differently.
    """

    def __init__(self, params, options):
        self.params, has_sums = twins(params), "scale_lr" in options and os.environ.get("LODO_NATIVE") == "0"
        self.is_exact = options.get("base") != "soap" and not has_sums
        self.optimizers = [lodo.LODO([p], **options) for p in self.params]

    def start_anew(self, key, p, options):
        self.params[key] = nn.Parameter(p.detach().clone())
        self.optimizers[key] = lodo.LODO([self.params[key]], **options)

    def step(self, step, takes, lr=None):
        give(self.params, step, takes)
        for p, optimizer in zip(self.params, self.optimizers, strict=True):
            if p.grad is not None:
                optimizer.param_groups[0]["lr"] = lr or optimizer.param_groups[0]["lr"]
                optimizer.step()

    def assert_same(self, params, optimizer):
        for p, own, one in zip(params, self.params, self.optimizers, strict=True):
            entry = without(one.state.get(own, {}))
            found = without(optimizer.state[p]) if entry else {}
            assert found.keys() == entry.keys()
            assert found.get("unit", 1) == 1  # or nothing here could be expected to be the same
            for name, value in {"parameter": own.detach(), **entry}.items():
                given = p.detach() if name == "parameter" else found[name]
                if self.is_exact or not value.is_floating_point():
                    assert_same(given, value, name)
                else:
                    torch.testing.assert_close(
                        given, value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text
                    )
