"""Parameters that join late, that have a gradient at some steps only, and whose state is taken away or exchanged: each
takes the steps that it would take alone."""

import copy

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.habits import assert_finite, noisy
from tests.helpers.late import (
    ELEMENTWISE,
    Alone,
    all_in_ways,
    always,
    each_elementwise,
    each_recipe,
    elementwise_in_ways,
    give,
    made,
    now_and_then,
    twins,
    without,
)
from tests.helpers.parts import POWERS, flat
from tests.helpers.states import assert_same, through_file

# ---- elementwise networks: each parameter for itself -----------------------------------------------------------------


@elementwise_in_ways
@pytest.mark.parametrize(("late", "order"), [(0, -1), (1, 1), (45, 1), (45, -1)])
def test_a_late_parameter_takes_the_steps_that_it_would_take_from_the_start(late, order, options, where):
    """And the others do not notice."""
    params = made()
    alone, optimizer = Alone(params, options), lodo.LODO(params[::order], **options)

    def takes(key, step):
        return key != 1 or step >= late

    for step in range(late + 40):
        give(params, step, takes)
        optimizer.step()
        alone.step(step, takes)
    alone.assert_same(params, optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params] == [late + 40, 40, late + 40, late + 40]


@pytest.mark.parametrize("name", ["recommended", "over adam", "one momentum", "no parts"])
def test_that_holds_a_thousand_steps_later(name, kernel):
    params = made()[:2]
    options = {**ELEMENTWISE[name], "lr": 1e-3}
    alone, optimizer = Alone(params, options), lodo.LODO(params, **options)

    def takes(key, step):
        return key == 0 or step >= 1000

    for step in range(1030):
        give(params, step, takes)
        optimizer.step()
        alone.step(step, takes)
    alone.assert_same(params, optimizer)
    assert not torch.equal(params[1].detach(), made()[1].detach())


@elementwise_in_ways
def test_a_parameter_without_a_gradient_is_left_alone_and_the_others_go_their_way(options, where):
    """Each is what it would be in an optimizer that is called at its own steps only, schedules of lr included."""
    params = made()
    start, alone, optimizer = flat(params), Alone(params, options), lodo.LODO(params, **options)
    for step in range(80):
        lr = options["lr"] * (0.3 if step % 20 < 7 else 1.0)
        optimizer.param_groups[0]["lr"] = lr
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))) for p in params]
        give(params, step, now_and_then)
        optimizer.step()
        alone.step(step, now_and_then, lr)
        for p, (x, entry) in zip(params, before, strict=True):
            if p.grad is None:
                assert torch.equal(p.detach(), x)
                assert not entry or assert_same(without(optimizer.state[p]), without(entry)) is None
    alone.assert_same(params, optimizer)
    counts = [int(optimizer.state[p]["step"]) for p in params]
    assert counts == [sum(now_and_then(key, step) for step in range(80)) for key in range(len(params))]
    assert len(set(counts)) > 2
    assert (flat(params) - start).abs().min() > 0


@pytest.mark.parametrize("name", ["recommended", "over adam", "no base", "scales alone"])
def test_so_do_parameters_at_bounds_and_with_gradients_of_zero(name, where):
    options = ELEMENTWISE[name]
    params = made()
    alone, optimizer = Alone(params, options), lodo.LODO(params, **options)
    for step in range(80):
        for own, keys in ((params, None), (alone.params, None)):
            give(own, step, now_and_then, keys)
            for key, p in enumerate(own):
                if p.grad is not None and (step + key) % 4 == 0:
                    p.grad.zero_()
        optimizer.step()
        for p, one in zip(alone.params, alone.optimizers, strict=True):
            if p.grad is not None:
                one.step()
        for own in (params, alone.params):
            own[0].data.clamp_(-0.5, 0.5)
            own[1].data.mul_(0.99 if step % 7 == 0 else 1)
    alone.assert_same(params, optimizer)
    assert (params[0].detach().abs() == 0.5).any()


@each_elementwise
def test_counts_are_those_of_adam(options):
    params, others = made(), made()
    optimizer, adam = lodo.LODO(params, **options), torch.optim.Adam(others)
    for step in range(40):
        give(params, step, now_and_then), give(others, step, now_and_then)
        optimizer.step(), adam.step()
        for p, q in zip(params, others, strict=True):
            assert optimizer.state.get(p, {}).get("step", 0) == adam.state.get(q, {}).get("step", 0)


# ---- state that is taken away, exchanged, or comes late --------------------------------------------------------------


def follow(params, optimizer, alone, begin, end, takes=always):
    for step in range(begin, end):
        give(params, step, takes)
        optimizer.step()
        alone.step(step, takes)
    alone.assert_same(params, optimizer)


@each_elementwise
@pytest.mark.parametrize("place", [0, 2])
def test_a_parameter_whose_state_was_popped_starts_anew_and_the_others_go_on(place, options, kernel):
    params = made()
    alone, optimizer = Alone(params, options), lodo.LODO(params, **options)
    follow(params, optimizer, alone, 0, 25)
    optimizer.state.pop(params[place])
    alone.start_anew(place, params[place], options)
    follow(params, optimizer, alone, 25, 60, now_and_then)
    assert int(optimizer.state[params[place]]["step"]) == sum(now_and_then(place, step) for step in range(25, 60))


@each_elementwise
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("shape", [None, (5, 7)], ids=["same", "another"])
def test_an_exchanged_parameter_starts_anew_and_the_others_go_on(shape, place, options, kernel):
    params = made()
    alone, optimizer = Alone(params, options), lodo.LODO(params, **options)
    follow(params, optimizer, alone, 0, 25)
    optimizer.state.pop(params[place])
    params[place] = nn.Parameter(noisy(params[place].shape if shape is None else shape, 77))
    optimizer.param_groups[0]["params"][place] = params[place]
    alone.start_anew(place, params[place], options)
    follow(params, optimizer, alone, 25, 50)
    assert int(optimizer.state[params[place]]["step"]) == 25


@each_recipe
@pytest.mark.parametrize("place", [0, 3])
def test_an_exchanged_parameter_that_takes_its_state_along_goes_on(place, options):
    params = made()
    optimizer = lodo.LODO(params, **options)
    others, other = copy.deepcopy((params, optimizer))
    for step in range(50):
        if step == 25:
            gone, others[place] = others[place], nn.Parameter(others[place].detach().clone())
            other.param_groups[0]["params"][place] = others[place]
            other.state[others[place]] = other.state.pop(gone)
        give(params, step, always), give(others, step, always)
        optimizer.step(), other.step()
    assert torch.equal(flat(params), flat(others))
    assert_same(other.state_dict(), optimizer.state_dict())


@each_elementwise
@pytest.mark.parametrize("place", [0, 2])
def test_a_parameter_that_a_saved_state_lacks_starts_anew_and_the_others_go_on(place, options, kernel):
    params = made()
    alone, optimizer = Alone(params, options), lodo.LODO(params, **options)
    follow(params, optimizer, alone, 0, 25)
    saved = through_file(optimizer.state_dict())
    del saved["state"][place]
    optimizer = lodo.LODO(params, **options)
    optimizer.load_state_dict(saved)
    alone.start_anew(place, params[place], options)
    follow(params, optimizer, alone, 25, 50)


@each_elementwise
def test_a_frozen_parameter_that_is_unfrozen_is_a_late_one(options, kernel):
    params = made()
    alone, optimizer = Alone(params, options), lodo.LODO(params, **options)
    for p in params[:2]:
        p.requires_grad_(False)

    def takes(key, step):
        return params[key].requires_grad

    follow(params, optimizer, alone, 0, 25, takes)
    params[0].requires_grad_(True)
    follow(params, optimizer, alone, 25, 50, takes)
    params[2].requires_grad_(False)
    params[1].requires_grad_(True)
    follow(params, optimizer, alone, 50, 75, takes)
    assert [int(optimizer.state[p]["step"]) for p in params] == [50, 25, 50, 75]


@each_recipe
def test_a_group_that_is_added_late_is_an_optimizer_of_its_own(options, kernel):
    params, shapes = made(), made(((2, 3), (4, 4)))
    others, late, own = twins(params), shapes, twins(shapes)
    optimizer, without_it = lodo.LODO(params, **options), lodo.LODO(others, **options)
    for step in range(50):
        if step == 20:
            optimizer.add_param_group({"params": late})
            alone = lodo.LODO(own, **options)
        for each, keys in ((params, None), (others, None), (late, (5, 6)), (own, (5, 6))):
            give(each, step, always, keys)
        optimizer.step(), without_it.step()
        if step >= 20:
            alone.step()
    for each, twin, one in ((params, others, without_it), (late, own, alone)):
        assert torch.equal(flat(each), flat(twin))
        for p, q in zip(each, twin, strict=True):
            assert_same(optimizer.state[p], one.state[q])


@pytest.mark.parametrize("base", ["adam", "soap"])
@pytest.mark.parametrize("unit", [2.0**30, 2.0**-30])
def test_what_comes_from_elsewhere_is_brought_into_the_unit_of_the_others(unit, base, kernel):
    """By powers of two, which change no bit."""
    options = {**lodo.RECOMMENDED, "base": base}
    params = made(((4, 5), (3, 6)))
    optimizer, others = lodo.LODO(params, **options), twins(params)
    elsewhere = [lodo.LODO([p], **options) for p in others]
    for step in range(25):
        give(params, step, always), give(others, step, always)
        others[1].grad.mul_(unit / others[1].grad.norm() if step == 0 else unit)
        for one in (optimizer, *elsewhere):
            one.step()
    found = elsewhere[1].state[others[1]]
    assert found["unit"] == unit
    assert optimizer.state[params[0]]["unit"] == 1
    for p in params:
        optimizer.state[p].clear()
    optimizer.state[params[0]].update(copy.deepcopy(elsewhere[0].state[others[0]]))
    optimizer.state[params[1]].update(copy.deepcopy(found))
    assert optimizer.preconditioners[0] is not None  # asking for it binds the state
    for name, value in optimizer.state[params[1]].items():
        if name in POWERS:
            powers = torch.tensor([unit**power for power in POWERS[name]], dtype=torch.float64)
            scaled = found[name] * powers.view(-1, *[1] * (found[name].dim() - (len(powers) > 1))).squeeze(0)
            assert torch.equal(value, scaled), name
    assert optimizer.state[params[1]]["unit"] == 1
    for name, value in elsewhere[0].state[others[0]].items():
        assert torch.equal(optimizer.state[params[0]][name], value), name


# ---- a mixture of experts --------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A layer before and one behind of several experts, of which an input meets two."""

    def __init__(self, experts=6):
        super().__init__()
        self.before, self.behind = nn.Linear(5, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x, chosen):
        h = self.before(x).tanh()
        return self.behind(h + sum(self.experts[index](h).tanh() for index in chosen))


def batch(step):
    """Inputs, targets, and the experts that are met: the last ones only later."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 5, generator=generator)
    chosen = torch.randperm(3 if step < 15 else 6, generator=generator)[:2].tolist()
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2], x.mean(1)], 1), chosen


def train(model, optimizer, begin, end):
    for step in range(begin, end):
        x, y, chosen = batch(step)
        optimizer.zero_grad()
        (model(x, chosen) - y).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def loss_of(model):
    """Over many batches that it is not trained on."""
    losses = [(model(x, chosen) - y).square().mean() for x, y, chosen in map(batch, range(1000, 1100))]
    return float(torch.stack(losses).mean())


@all_in_ways
def test_experts_train_and_their_run_is_resumed_bit_for_bit(options, where):
    model = Experts()
    optimizer, before = lodo.LODO(model.parameters(), **{**options, "lr": options["lr"] * 3}), loss_of(model)
    train(model, optimizer, 0, 70)
    counts = {int(entry["step"]) for entry in optimizer.state.values()}
    assert len(counts) > 3
    saved, other = through_file([model.state_dict(), optimizer.state_dict()]), Experts()
    other.load_state_dict(saved[0])
    resumed = lodo.LODO(other.parameters(), **options)
    resumed.load_state_dict(saved[1])
    v = torch.randn(resumed.preconditioners[0].size)
    assert torch.equal(resumed.preconditioners[0].matvec(v), optimizer.preconditioners[0].matvec(v))
    copied, again = copy.deepcopy((model, optimizer))
    train(model, optimizer, 70, 140)
    for each, one in ((other, resumed), (copied, again)):
        train(each, one, 70, 140)
        assert_same(each.state_dict(), model.state_dict())
        assert_same(one.state_dict(), optimizer.state_dict())
    assert_finite(optimizer)
    assert optimizer.skipped_steps == 0
    assert loss_of(model) < 0.75 * before
    assert optimizer.diagnostics()[0]["steps"] == 140


@all_in_ways
@pytest.mark.filterwarnings("ignore:LODO skipped a step")
def test_a_bad_gradient_of_one_expert_leaves_all_of_them(options, where):
    model = Experts()
    optimizer = lodo.LODO(model.parameters(), **options)
    train(model, optimizer, 0, 30)
    twin, other = copy.deepcopy((model, optimizer))
    for step in (100, 101):
        x, y, chosen = batch(step)
        optimizer.zero_grad()
        (model(x, chosen) - y).square().mean().backward()
        model.experts[chosen[0]].weight.grad[0, 0] = float("nan")
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert_same(model.state_dict(), twin.state_dict())
    train(model, optimizer, 30, 45), train(twin, other, 30, 45)
    assert_same(model.state_dict(), twin.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(without(optimizer.state[p]), without(other.state[q]))
