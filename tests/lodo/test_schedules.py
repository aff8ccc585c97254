"""The cooldown: its rates, what it refuses, and that what was learned does not undo it."""

import copy

import pytest
import torch

import lodo


def rates(total_steps, share, steps, **options):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [p]}], lr=4.0)
    scheduler, found = lodo.cooldown(optimizer, total_steps, share, **options), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        p.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_stays_and_then_falls_in_a_straight_line_to_zero():
    assert rates(10, 0.4, 13) == pytest.approx([4.0] * 7 + [3.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    assert rates(5, 1, 6) == pytest.approx([4.0, 3.2, 2.4, 1.6, 0.8, 0.0])
    assert rates(1, 0.2, 2) == [4.0, 0.0]


def test_a_resumed_schedule_goes_on_where_it_was():
    p = torch.nn.Parameter(torch.zeros(1))
    found = []
    optimizer = torch.optim.SGD([p], lr=1.0)
    scheduler = lodo.cooldown(optimizer, 6, 0.5)
    for step in range(6):
        if step == 4:
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer = torch.optim.SGD([p], lr=1.0)
            scheduler = lodo.cooldown(optimizer, 6, 0.5)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx([1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("name", "value"),
    [("total_steps", value) for value in (0, -1, 2.5, True, None, "9")]
    + [("share", value) for value in (0, 0.0, 1.01, -0.1, float("nan"), True, None, "a")],
)
def test_arguments_out_of_range_are_refused_by_name(name, value):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    before = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value!r}$"):
        lodo.cooldown(optimizer, **{"total_steps": 10, "share": 0.2, name: value})
    assert optimizer.param_groups == before


def test_scales_do_not_undo_it():
    """On a noisy quadratic the last steps are far shorter than at a constant rate, and the loss is lower."""
    found = {}
    for is_cooled in (False, True):
        generator = torch.Generator().manual_seed(0)
        x, steps = torch.nn.Parameter(torch.ones(64)), 1000
        optimizer = lodo.AutoLODO([x], base="adam")
        scheduler, losses = lodo.cooldown(optimizer, steps) if is_cooled else None, []
        for step in range(steps):
            x.grad = x.detach() + torch.randn(64, generator=generator)
            before = x.detach().clone()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(float(x.detach().square().mean()))
            if step == steps - 11:
                length = float((x.detach() - before).norm())
        found[is_cooled] = (sum(losses[-10:]), length)
    assert found[True][0] < 0.7 * found[False][0]
    assert found[True][1] < 0.25 * found[False][1]
