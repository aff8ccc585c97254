"""Late, exchanged and popped parameters where a network acts on the whole group: there all move together."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lodo
from tests.helpers.habits import assert_finite, noisy
from tests.helpers.late import (
    WHOLE,
    always,
    each_whole,
    give,
    go_on,
    made,
    now_and_then,
    twins,
)
from tests.helpers.parts import flat
from tests.helpers.states import assert_same, through_file


@pytest.mark.parametrize("name", ["paper", "paper, SGD inside", "residual", "diagonal"])
@pytest.mark.parametrize(("late", "place"), [(0, 0), (1, 2), (30, 0), (30, 2)])
def test_before_its_first_gradient_a_parameter_counts_as_one_of_zeros(name, late, place, where):
    """It is not moved meanwhile, and all others take the steps that they take with such gradients."""
    params = made()
    others, start = twins(params), params[place].detach().clone()
    optimizer, other = lodo.LODO(params, **WHOLE[name]), lodo.LODO(others, **WHOLE[name])
    for step in range(late + 30):
        give(params, step, lambda key, step: key != place or step >= late)
        give(others, step, always)
        if step < late:
            others[place].grad.zero_()
        optimizer.step(), other.step()
        if step < late:
            others[place].data.copy_(start)
        assert torch.equal(flat(params), flat(others))
    for key, (p, q) in enumerate(zip(params, others, strict=True)):
        assert int(optimizer.state[p]["step"]) == (30 if key == place else late + 30)
        assert_same({**optimizer.state[p], "step": 0}, {**other.state[q], "step": 0})


@each_whole
def test_after_its_first_gradient_one_that_is_missing_counts_as_zero_and_as_a_step(options, where):
    params = made()
    others = twins(params)
    optimizer, other = lodo.LODO(params, **options), lodo.LODO(others, **options)
    for step in range(40):
        give(params, step, lambda key, step: step == 0 or now_and_then(key, step)), give(others, step, always)
        if all(p.grad is None for p in params):
            continue
        kept = [q.detach().clone() for q in others]
        for p, q in zip(params, others, strict=True):
            if p.grad is None:
                q.grad.zero_()
        before = flat(params)
        optimizer.step(), other.step()
        if "base" not in options and "scale_lr" not in options:  # whose record sees what is taken back
            for p, q, x in zip(params, others, kept, strict=True):
                if p.grad is None:
                    q.data.copy_(x)
            assert torch.equal(flat(params), flat(others))
        for p, x in zip(params, before.split([p.numel() for p in params]), strict=True):
            assert (p.grad is not None) or torch.equal(p.detach().flatten(), x)
    assert len({int(optimizer.state[p]["step"]) for p in params}) == 1
    assert_finite(optimizer)


@each_whole
def test_a_late_parameter_of_a_network_of_the_whole_group_trains(options, where):
    params = made()
    optimizer = lodo.LODO(params, **options)
    start = [p.detach().clone() for p in params]
    for step in range(120):
        give(params, step, lambda key, step: key != 1 or step >= 40)
        optimizer.step()
        assert torch.equal(params[1].detach(), start[1]) == (step < 40)
    assert [int(optimizer.state[p]["step"]) for p in params] == [120, 80, 120, 120]
    targets = [noisy(p.shape, 20 + key) + 2 for key, p in enumerate(params)]
    for keys in (range(4), [1]):
        before, after = (sum((own[key] - targets[key]).square().sum() for key in keys) for own in (start, params))
        assert after < 0.8 * before
    assert_finite(optimizer)


@each_whole
@pytest.mark.parametrize("place", [1, 3])
def test_an_exchanged_parameter_of_the_same_size_keeps_the_network(place, options, kernel):
    params = made()
    optimizer = lodo.LODO(params, **options)
    go_on(params, optimizer, 0, 20)
    network = getattr(optimizer.preconditioners[0], "network", optimizer.preconditioners[0])
    theta = network.theta.clone()
    others = [copy.deepcopy(optimizer.state[p]) for p in params]
    optimizer.state.pop(params[place])
    params[place] = nn.Parameter(noisy(params[place].shape, 77))
    optimizer.param_groups[0]["params"][place] = params[place]
    network = getattr(optimizer.preconditioners[0], "network", optimizer.preconditioners[0])
    assert torch.equal(network.theta, theta)
    assert int(optimizer.state[params[0]]["meta_step"]) == 20
    for key, (p, entry) in enumerate(zip(params, others, strict=True)):
        assert int(optimizer.state[p]["step"]) == (0 if key == place else 20)
        assert key == place or torch.equal(optimizer.state[p]["momentum"], entry["momentum"])
    go_on(params, optimizer, 20, 40)
    assert [int(optimizer.state[p]["step"]) for p in params] == [20 if key == place else 40 for key in range(4)]
    assert_finite(optimizer)


LOST = "LODO loaded momentum without the network"


@each_whole
def test_popping_the_first_parameter_takes_the_network_away(options, kernel):
    """Which is said, once. The others keep what is theirs alone."""
    params = made()
    optimizer = lodo.LODO(params, **options)
    go_on(params, optimizer, 0, 20)
    others = [copy.deepcopy(optimizer.state[p]) for p in params]
    optimizer.state.pop(params[0])
    with pytest.warns(UserWarning, match=LOST):
        network = optimizer.preconditioners[0]
    fresh = lodo.LODO(twins(params), **options)
    give(fresh.param_groups[0]["params"], 0, always)
    fresh.param_groups[0].update(lr=0.0, meta_lr=0.0)
    fresh.step()
    expected = fresh.preconditioners[0]
    assert torch.equal(network.theta, expected.theta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20, 40):
            give(params, step, always)
            optimizer.step()
            if step == 20:
                assert [int(optimizer.state[p]["step"]) for p in params] == [1, 21, 21, 21]
                assert int(optimizer.state[params[0]]["meta_step"]) == 1
    for p, entry in zip(params[1:], others[1:], strict=True):
        assert int(entry["step"]) == 20
        assert int(optimizer.state[p]["step"]) == 40
    assert_finite(optimizer)


@each_whole
@pytest.mark.parametrize("place", [1, 3])
def test_popping_another_one_leaves_the_network(place, options, kernel):
    params = made()
    optimizer = lodo.LODO(params, **options)
    go_on(params, optimizer, 0, 20)
    theta = optimizer.preconditioners[0].theta.clone()
    optimizer.state.pop(params[place])
    assert torch.equal(optimizer.preconditioners[0].theta, theta)
    go_on(params, optimizer, 20, 40)
    assert [int(optimizer.state[p]["step"]) for p in params] == [20 if key == place else 40 for key in range(4)]
    assert int(optimizer.state[params[0]]["meta_step"]) == 40
    assert_finite(optimizer)


@each_whole
@pytest.mark.parametrize("place", [1, 3])
def test_an_exchanged_parameter_of_another_size_is_refused_by_the_sizes(place, options, kernel):
    params = made()
    optimizer = lodo.LODO(params, **options)
    go_on(params, optimizer, 0, 5)
    theta = optimizer.state[params[0]]["theta"].clone()
    params[place] = nn.Parameter(noisy((7, 9), 77))
    optimizer.param_groups[0]["params"][place] = params[place]
    give(params, 5, always)
    before = flat(params)
    size = sum(p.numel() for p in params)
    shape = str(tuple(theta.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RuntimeError, match=rf"theta of shape {shape}.* for the {size} elements .*add_param_group"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    assert torch.equal(optimizer.state[params[0]]["theta"], theta)


@each_whole
def test_a_frozen_first_parameter_of_the_whole_group_may_be_unfrozen(options, kernel):
    """The network then lies with it, and a run that was saved before and behind goes on bit for bit."""
    params = made()
    params[0].requires_grad_(False)
    optimizer = lodo.LODO(params, **options)
    start = params[0].detach().clone()

    def takes(key, step):
        return params[key].requires_grad

    for step in range(60):
        if step == 30:
            params[0].requires_grad_(True)
        if step in (29, 30, 45):
            others = twins(params)
            others[0].requires_grad_(params[0].requires_grad)
            other = lodo.LODO(others, **options)
            other.load_state_dict(through_file(optimizer.state_dict()))
        give(params, step, takes)
        optimizer.step()
        assert torch.equal(params[0].detach(), start) == (step < 30)
        assert "theta" in optimizer.state[params[step < 30]]
        if step >= 29:
            others[0].requires_grad_(params[0].requires_grad)
            give(others, step, takes)
            other.step()
            assert torch.equal(flat(params), flat(others)), step
    assert_same(other.state_dict(), optimizer.state_dict())
    assert int(optimizer.state[params[0]]["step"]) == 30
