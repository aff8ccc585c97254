"""Warnings of LODO point at the user's line, however many of torch's decorators and hooks lie in between."""

import pytest
import torch
from torch import nn

import lodo


def stepped():
    x = nn.Parameter(torch.ones(4))
    optimizer = lodo.LODO([x], lr=0.1)
    x.grad = torch.ones(4)
    optimizer.step()
    return x, optimizer


def skipped_step(hooks):
    x, optimizer = stepped()
    if hooks:
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.register_step_post_hook(lambda *_: None)
    x.grad = torch.full((4,), torch.nan)
    return optimizer.step


def scheduled_step():
    step = skipped_step(False)
    scheduler = torch.optim.lr_scheduler.StepLR(step.__self__, 1)  # wraps `step` once more, while it lives
    return lambda: (scheduler.optimizer.step(), scheduler)


def load_of_momentum_alone():
    _, optimizer = stepped()
    saved = optimizer.state_dict()
    for name in ("network_step", "meta_step", "last_lr"):
        saved["state"][0][name] = torch.zeros_like(saved["state"][0][name])
    return lambda: optimizer.load_state_dict(saved)


def state_of_a_broken_step():
    def interrupted(_):
        raise KeyboardInterrupt

    _, optimizer = stepped()
    optimizer.preconditioners[0].apply = interrupted
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    return optimizer.state_dict


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: skipped_step(False), "LODO skipped a step"),
        (lambda: skipped_step(True), "LODO skipped a step"),
        (scheduled_step, "LODO skipped a step"),
        (load_of_momentum_alone, "LODO loaded momentum without the network"),
        (state_of_a_broken_step, "The state is not worth keeping"),
    ],
    ids=["step", "hooks", "scheduler", "load", "state dict"],
)
def test_a_warning_points_at_the_line_that_called(make, message):
    call = make()
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    assert [warning.filename for warning in caught] == [__file__]
