"""Drawn orders of calls on an optimizer, compared bit for bit after each call with `replay.Replay`.

Saving, loading, copying, reading, skipped steps and refused calls do nothing to a replay, so whatever they change in
the optimizer shows.
"""

import copy
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import lodo
from lodo import scalars
from tests.helpers import strategies as draw
from tests.helpers.replay import Replay, step_all
from tests.helpers.states import through_file

KERNELS = (*draw.KERNELS, "scalars on the device")
ARCHITECTURE = ("preconditioner", "depth", "block_size", "expansion", "permutation", "base", "momentum_decays", "seed")
REPLACED = (
    *(
        "theta",
        "permutations",
        "theta_exp_avg",
        "theta_exp_avg_sq",
        "meta_step",
        "last_lr",
        "step",
        "skipped_steps",
        "network_step",
    ),
    *("momentum", "momentum_trace", "exp_avg_sq", "unit", "factors", "eigenbasis", "seen"),
    *("scale", "scale_peak", "trace_peak", "step_trace", "momenta", "mixture", "written", "scheduled_lr", "reset_at"),
    *("progress", "recent_energy", "average", "averaged"),
)
COUNTS: Counter[str] = Counter()

which = st.integers(0, 3)
changes = st.sampled_from(sorted(draw.RATES)).flatmap(lambda name: st.tuples(st.just(name), draw.RATES[name]))
groups = st.fixed_dictionaries(
    {
        "plans": st.lists(draw.plans, min_size=1, max_size=3),
        "options": draw.options(),
        "lr": draw.learning_rates(),
        "is_learned": st.booleans(),
    }
)
gradients = st.fixed_dictionaries(
    {
        "seed": draw.seeds,
        "scale": st.sampled_from((0.0, 1e-6, 0.1, 1.0)),
        "missing": st.sets(st.integers(0, 8), max_size=3),
        "layout": st.sampled_from((*draw.LAYOUTS, "expanded")),
    }
)


@pytest.fixture(scope="module", autouse=True)
def _report(request: pytest.FixtureRequest) -> Iterator[None]:
    """With a profile chosen, prints how much was run."""
    yield
    if "HYPOTHESIS_PROFILE" in os.environ:
        reporter = request.config.pluginmanager.getplugin("terminalreporter")
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            reporter.write_line(f"\ncall orders: {', '.join(f'{n:,} {what}' for what, n in COUNTS.most_common())}")


def assert_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal in dtype, shape and every bit, but for the signs of zeros and the bits of NaNs."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert bool(same.all()), what


def leaves(value: Any) -> Iterator[Any]:
    """What lies in nested dicts and lists."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def tensors_in(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def as_on_a_device(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.bool if isinstance(number, bool) else torch.float64)


def memory(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


class CallOrders(RuleBasedStateMachine):
    """`params`, `optimizer`: what the user has. `groups`: what it must be."""

    @initialize(kernel=st.sampled_from(KERNELS), first=groups, others=st.lists(groups, max_size=1))
    def start(self, kernel: str, first: dict[str, Any], others: list[dict[str, Any]]) -> None:
        COUNTS["runs"] += 1
        self.patch = pytest.MonkeyPatch()
        self.quiet = warnings.catch_warnings()
        self.quiet.__enter__()
        warnings.filterwarnings("ignore", "LODO skipped a step|LODO loaded momentum without the network")
        if kernel != "native":
            self.patch.setenv("LODO_NATIVE", "0")
        if kernel == "scalars on the device":
            self.patch.setattr(scalars, "is_readable", lambda tensor: False)
        self.number = as_on_a_device if kernel == "scalars on the device" else lambda number: number
        self.params: list[list[torch.nn.Parameter]] = []
        self.groups: list[Replay] = []
        self.scheduler: torch.optim.lr_scheduler.ExponentialLR | None = None
        self.snapshot: tuple[Any, ...] | None = None
        self.others: list[tuple[Any, Any]] = []  # what must stay as it is, with a copy of it
        self.optimizer = lodo.LODO([self.make(spec) for spec in (first, *others)], lr=0.25)

    def make(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A new param group for the optimizer; its replay and parameters are added to those there are."""
        params = [plan.make() for plan in spec["plans"]]
        options = {**spec["options"], "lr": spec["lr"]}
        size, learned = sum(p.numel() for p in params), None
        if spec["is_learned"] and size:
            learned = draw.network(options["preconditioner"], size, options, seed=1, dtype=torch.float32)
            self.keep(learned.theta)
            options["preconditioner"] = learned
        defaults = lodo.LODO([torch.nn.Parameter(torch.zeros(1))]).defaults
        expected = {**defaults, **options, **(learned.options if learned else {}), "lr": float(spec["lr"])}
        self.params.append(params)
        self.groups.append(Replay(params, expected, learned))
        return {"params": params, **options}

    def keep(self, value: Any) -> None:
        self.others.append((value, copy.deepcopy(value)))

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
            self.quiet.__exit__(None, None, None)
            for found, expected in self.others:
                for leaf, wanted in zip(leaves(found), leaves(expected), strict=True):
                    if isinstance(wanted, Tensor):
                        assert_bits(leaf, wanted, "what was loaded, given or left behind")
                    else:
                        assert leaf == wanted

    # ---- steps -------------------------------------------------------------------------------------------------------

    def give(self, seed: int, scale: float, missing: set[int], layout: str) -> None:
        params = [p for own in self.params for p in own]
        for i, p in enumerate(params):
            gradient = draw.numbers(tuple(p.shape), seed + i, p.dtype, scale)
            if layout == "expanded":
                gradient = draw.numbers((), seed + i, p.dtype, scale).expand(p.shape)
            else:
                gradient = draw.laid_out(gradient, layout)
            p.grad = None if i in missing else gradient

    def call(self) -> None:
        """One `step`, on the optimizer and its replay."""
        given = [[None if p.grad is None else p.grad.clone() for p in own] for own in self.params]
        COUNTS["calls of step"] += 1
        COUNTS["of them skipped"] += step_all(self.groups, given, self.number)
        assert self.optimizer.step() is None
        for own, gradients in zip(self.params, given, strict=True):
            for p, gradient in zip(own, gradients, strict=True):
                assert (p.grad is None) == (gradient is None)
                if gradient is not None:
                    assert_bits(p.grad, gradient, "gradient")

    @rule(given=gradients)
    def step(self, given: dict[str, Any]) -> None:
        self.give(**given)
        self.call()

    @rule(given=gradients, steps=st.integers(2, 6))
    def train(self, given: dict[str, Any], steps: int) -> None:
        for i in range(steps):
            self.give(**{**given, "seed": given["seed"] + 20 * i})
            self.call()
            self.agrees()

    @rule()
    def step_on_the_gradients_that_are_there(self) -> None:
        self.call()

    @rule(given=gradients, bad=st.sampled_from((float("nan"), float("inf"), -float("inf"))), at=st.integers(0, 59))
    def bad_step(self, given: dict[str, Any], bad: float, at: int) -> None:
        self.give(**{**given, "layout": "plain"})
        if found := [p.grad for own in self.params for p in own if p.grad is not None and p.numel()]:
            found[at % len(found)].view(-1)[at % found[at % len(found)].numel()] = bad
        self.call()

    @rule(given=gradients)
    def step_with_a_closure(self, given: dict[str, Any]) -> None:
        def closure() -> str:
            assert torch.is_grad_enabled()
            self.give(**given)
            return "loss"

        closure()
        COUNTS["calls of step"] += 1
        step_all(self.groups, [[p.grad for p in own] for own in self.params], self.number)
        self.optimizer.zero_grad()
        assert self.optimizer.step(closure) == "loss"

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for p in (p for own in self.params for p in own if p.grad is not None):
            p.grad = p.grad.clone()  # an expanded one cannot be written
        self.optimizer.zero_grad(set_to_none)

    # ---- options -----------------------------------------------------------------------------------------------------

    @rule(index=which, lr=draw.learning_rates())
    def set_lr(self, index: int, lr: Any) -> None:
        index %= len(self.groups)
        self.optimizer.param_groups[index]["lr"] = lr
        self.groups[index].options["lr"] = float(lr)

    @rule(index=which, change=changes)
    def set_option(self, index: int, change: tuple[str, Any]) -> None:
        index %= len(self.groups)
        if change[0] in draw.possible({**self.groups[index].options, **dict([change])}):
            self.optimizer.param_groups[index].update([change])
            self.groups[index].options.update([change])

    @rule()
    def schedule(self) -> None:
        if self.scheduler is None:
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        for group in self.groups:
            group.options["lr"] *= 0.5

    @precondition(lambda self: len(self.groups) < 4)
    @rule(spec=groups)
    def add_group(self, spec: dict[str, Any]) -> None:
        self.optimizer.add_param_group(self.make(spec))
        self.scheduler = None

    @rule(spec=groups, bad=st.sampled_from((("lr", -1.0), ("depth", 1.5), ("meta_every", 0), ("maximize", None))))
    def add_group_with_a_wrong_option(self, spec: dict[str, Any], bad: tuple[str, Any]) -> None:
        params = [plan.make() for plan in spec["plans"]]
        with pytest.raises(ValueError, match=bad[0]):
            self.optimizer.add_param_group({"params": params, **spec["options"], **dict([bad])})

    @rule(index=st.none() | which)
    def reset(self, index: int | None) -> None:
        index = None if index is None else index % len(self.groups)
        for group in self.groups if index is None else [self.groups[index]]:
            if group.has_state:
                group.prepare()
                group.reset()
        self.optimizer.reset(index)

    # ---- parameters that come and go ---------------------------------------------------------------------------------

    @rule(index=which, at=which)
    def forget(self, index: int, at: int) -> None:
        """A parameter starts anew, the others go on."""
        COUNTS["parameters that start anew"] += 1
        group, own = self.chosen(index)
        at %= len(own)
        self.optimizer.state.pop(own[at], None)
        group.forget(at)

    @rule(index=which, at=which, plan=draw.plans)
    def exchange(self, index: int, at: int, plan: draw.Plan) -> None:
        """A parameter for another, of another shape too where nothing hangs on all shapes of a group."""
        COUNTS["exchanged parameters"] += 1
        group, own = self.chosen(index)
        at %= len(own)
        if not self.is_free(group, without=at):
            plan = replace(plan, shape=tuple(own[at].shape))
        self.optimizer.state.pop(own[at], None)
        own[at] = self.optimizer.param_groups[index % len(self.groups)]["params"][at] = plan.make()
        group.forget(at)
        group.values[at] = own[at].detach().clone(memory_format=torch.contiguous_format)

    @rule(index=which, plan=draw.plans)
    def join(self, index: int, plan: draw.Plan) -> None:
        group, own = self.chosen(index)
        if self.is_free(group) and len(own) < 5:
            COUNTS["parameters that join"] += 1
            own.append(plan.make())
            self.optimizer.param_groups[index % len(self.groups)]["params"].append(own[-1])
            group.values.append(own[-1].detach().clone(memory_format=torch.contiguous_format))
            group.own.append({})

    @rule(index=which, at=which)
    def leave(self, index: int, at: int) -> None:
        group, own = self.chosen(index)
        at %= len(own)
        if self.is_free(group, without=at) and len(own) > 1:
            COUNTS["parameters that leave"] += 1
            self.optimizer.state.pop(own.pop(at), None)
            self.optimizer.param_groups[index % len(self.groups)]["params"].pop(at)
            group.forget(at)
            del group.values[at], group.own[at]

    def chosen(self, index: int) -> tuple[Replay, list[torch.nn.Parameter]]:
        return self.groups[index % len(self.groups)], self.params[index % len(self.groups)]

    def is_free(self, group: Replay, without: int | None = None) -> bool:
        """Whether shapes and number of a group's parameters may change: not those that a network of all of them is
        made for, and only groups without a matrix have full eigenbases of their vectors."""
        others = [value for place, value in enumerate(group.values) if place != without]
        has_matrix = any(value.dim() > 1 for value in others)
        return not group.has_state or (group.kind.is_elementwise and (group.options["base"] != "soap" or has_matrix))

    @rule(index=which, only=which, dtype=draw.dtypes)
    def cast(self, index: int, only: int, dtype: torch.dtype) -> None:
        """All parameters of a group, or one."""
        index %= len(self.groups)
        own, values = self.params[index], self.groups[index].values
        for i, p in enumerate(own):
            if only in (i, len(own)):
                p.data, p.grad = p.data.to(dtype), None
                values[i] = values[i].to(dtype)

    # ---- reading, saving, copying ------------------------------------------------------------------------------------

    @rule()
    def read(self) -> None:
        """Which may bring the state into the dtypes that are wanted now."""
        found = self.optimizer.preconditioners
        for g, group in zip(found, self.groups, strict=True):
            assert (g is None) == (not group.has_state)
            if group.has_state:
                group.prepare()
                assert repr(g) == group.described()
        assert self.optimizer.skipped_steps == max(group.skipped for group in self.groups)
        assert "LODO" in repr(self.optimizer)

    @rule()
    def look_at_averages(self) -> None:
        """And go back. Nobody may step in between."""
        for group in self.groups:
            if group.has_state and group.options["average_share"] is not None:
                group.prepare()
                COUNTS["looks at averages"] += 1
        self.optimizer.eval()
        for own, group in zip(self.params, self.groups, strict=True):
            for p, shown in zip(own, group.averages(), strict=True):
                assert_bits(p, shown, "average")
        if any("iterate" in entry for entry in self.optimizer.state.values()):
            with pytest.raises(RuntimeError, match="at their averages"):
                self.optimizer.step()
        self.optimizer.train()

    def saved(self) -> dict[str, Any]:
        """The state dict. To save is to start what options ask for and is not there yet."""
        for group in self.groups:
            if group.has_state:
                group.prepare()
        return self.optimizer.state_dict()

    @rule(is_file=st.booleans(), lost=st.none() | st.tuples(which, which))
    def resume(self, is_file: bool, lost: tuple[int, int] | None) -> None:
        """In another optimizer, on copies of the parameters. Those it came from must not change any more. What is saved
        may lack a parameter."""
        COUNTS["resumes"] += 1
        saved = self.saved()
        if lost is not None:
            group, own = self.chosen(lost[0])
            at = lost[1] % len(own)
            if group.kind.is_elementwise or at > 0:
                COUNTS["parameters that start anew"] += 1
                saved["state"].pop(saved["param_groups"][lost[0] % len(self.groups)]["params"][at], None)
                group.forget(at)
        self.keep([[p.detach() for p in own] for own in self.params])
        self.keep(saved)
        if is_file:
            saved = through_file(saved)
            self.keep(saved)
        architectures = [{name: group[name] for name in ARCHITECTURE} for group in self.optimizer.param_groups]
        for own in self.params:
            gradients = [p.grad for p in own]
            own[:] = [torch.nn.Parameter(p.detach().clone()) for p in own]
            for p, gradient in zip(own, gradients, strict=True):
                p.grad = None if gradient is None else gradient.clone()
        options = zip(self.params, architectures, strict=True)
        self.optimizer = lodo.LODO([{"params": own, **architecture} for own, architecture in options], lr=7.0)
        self.optimizer.load_state_dict(saved)
        self.scheduler = None

    @rule(how=st.sampled_from((copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)))))
    def copy_all(self, how: Any) -> None:
        COUNTS["copies"] += 1
        self.keep([[p.detach() for p in own] for own in self.params])
        self.keep(self.saved())
        self.params, self.optimizer = how((self.params, self.optimizer))
        self.scheduler = None

    @rule(name=st.sampled_from(REPLACED), only=st.none() | which)
    def replace_state(self, name: str, only: int | None) -> None:
        """By copies, as whoever moves it elsewhere and back does; that of all parameters, or of one."""
        for place, entry in enumerate(self.optimizer.state.values()):
            if name in entry and only in (None, place):
                entry[name] = entry[name].clone()

    @rule()
    def remember(self) -> None:
        state = copy.deepcopy(self.saved())
        self.keep(state)
        self.snapshot = (state, copy.deepcopy(self.groups))

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def rewind(self) -> None:
        """Loads an earlier state into the optimizer it came from, or into one that has got more groups since."""
        state, groups = self.snapshot
        sizes = [[len(group.values) for group in each] for each in (groups, self.groups)]
        if sizes[0] != sizes[1]:
            with pytest.raises(ValueError, match=r"parameter groups|size of optimizer's group"):
                self.optimizer.load_state_dict(state)
            return
        COUNTS["rewinds"] += 1
        self.groups = copy.deepcopy(groups)
        for own, group in zip(self.params, self.groups, strict=True):
            for p, value in zip(own, group.values, strict=True):
                p.data, p.grad = value.clone(), None
        self.optimizer.load_state_dict(state)

    # ---- what must hold after each call ------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        assert len(self.optimizer.param_groups) == len(self.groups)
        for own, group, found in zip(self.params, self.groups, self.optimizer.param_groups, strict=True):
            assert {name: found[name] for name in group.options if name != "lr"} == {
                name: value for name, value in group.options.items() if name != "lr"
            }
            assert float(found["lr"]) == group.options["lr"]
            for p, value in zip(own, group.values, strict=True):
                assert_bits(p.detach(), value, "parameter")
            self.state_agrees(own, group)

    def state_agrees(self, params: list[torch.nn.Parameter], group: Replay) -> None:
        for place, (p, own) in enumerate(zip(params, group.own, strict=True)):
            entry = dict(self.optimizer.state.get(p, {}))
            assert entry.pop("shards", torch.tensor([1, 0])).tolist() == [1, 0]
            expected = {**own, **group.shared} if place == 0 else own
            assert entry.keys() == expected.keys()
            for name, tensor in expected.items():
                assert_bits(entry[name], tensor, name)

    @invariant()
    def state_has_its_own_memory(self) -> None:
        own = memory(tensors_in(list(self.optimizer.state.values())))
        users = [p for params in self.params for p in params]
        users += [p.grad for p in users if p.grad is not None]
        users += list(tensors_in([group["lr"] for group in self.optimizer.param_groups]))
        users += list(tensors_in([value for value, _ in self.others]))
        assert not own & memory(users)


TestCallOrders = CallOrders.TestCase
