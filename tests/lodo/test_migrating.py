"""What docs/migrating.md says of the configurations of others."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lodo

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()


def test_the_code_runs():
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"torch": torch, "lodo": lodo, "model": nn.Linear(3, 2)}
    exec(first.replace("fused=True", "fused=False"), names)
    assert isinstance(names["optimizer"], torch.optim.AdamW)
    exec(second, names)
    assert isinstance(names["optimizer"], lodo.AutoLODO)


def test_what_is_to_be_deleted_is_refused_by_name():
    """All that a row says to delete, and that is a keyword of an optimizer."""
    rows = [line.split("|")[1:3] for line in PAGE.splitlines() if line.startswith("| ") and "delete" in line]
    names = {name for row, now in rows if now.strip().startswith("delete") for name in re.findall(r"`(\w+)`", row)}
    names -= {"lr", "fused", "foreach"}  # which AutoLODO takes
    assert names >= {"betas", "eps", "precondition_frequency", "d_coef", "ns_steps"}
    for name in names:
        with pytest.raises(TypeError, match=f"AutoLODO has no argument '{name}'"):
            lodo.AutoLODO([nn.Parameter(torch.ones(2))], **{name: 1})


def test_state_of_adamw_is_refused_and_nothing_changes():
    params = [nn.Parameter(torch.ones(2, 2))]
    adamw, optimizer = torch.optim.AdamW(params), lodo.AutoLODO(params)
    params[0].grad = torch.ones(2, 2)
    adamw.step()
    with pytest.raises(ValueError, match="not a state of LODO"):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.state
