"""State dicts and saved states: compared, sent through a file, edited."""

import copy
import io

import torch

import lodo


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(found, expected, where="state"):
    """Bit for bit, through dicts, lists and tuples."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, list | tuple):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert found == expected, where


def edit(saved, **changes):
    """A state dict with entries of its first parameter replaced, or removed where the new value is None."""
    saved["state"][0].update(changes)
    for name in [name for name, value in saved["state"][0].items() if value is None]:
        del saved["state"][0][name]
    return saved


def fresh_pair(model, **options):
    copied = copy.deepcopy(model)
    return copied, lodo.LODO(copied.parameters(), lr=0.1, meta_lr=1e-2, weight_decay=0.01, **options)


def snapshot(optimizer):
    """Copies of the parameters, and of the state without its count of skipped steps."""
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for entry in state.values():
        entry.pop("skipped_steps", None)
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]], state


def assert_same_snapshot(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    for key, entry in expected[1].items():
        assert entry.keys() == found[1][key].keys()
        for name, value in entry.items():
            same = torch.equal(found[1][key][name], value) if isinstance(value, torch.Tensor) else True
            assert same, f"{name} has changed"
