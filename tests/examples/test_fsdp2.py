"""The example with FSDP2, on real processes."""

import warnings

import pytest

from examples.frameworks import fsdp2
from tests.helpers.ranks import run


def half(folder, sharding):
    model, optimizer = fsdp2.make(sharding)
    fsdp2.train(model, optimizer, 0, fsdp2.STEPS // 2)
    fsdp2.save(folder, model, optimizer)


def other_half(folder, sharding):
    model, optimizer = fsdp2.make(sharding)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fsdp2.load(folder, model, optimizer)
    assert sum("another number of shards" in str(each.message) for each in caught) == (sharding == "local")
    fsdp2.train(model, optimizer, fsdp2.STEPS // 2, fsdp2.STEPS)
    return fsdp2.accuracy(model)


@pytest.mark.parametrize("sharding", ["local", "whole"])
def test_fsdp2_goes_on_with_as_many_ranks_bit_for_bit_and_with_another_number(tmp_path, sharding):
    first, second = run(2, fsdp2.run, tmp_path / "two", sharding)
    assert first == second
    assert first["distance"] == 0
    assert first["accuracy"] == first["resumed"] > 0.85
    run(2, half, tmp_path / "half", sharding)
    (other,) = run(1, other_half, tmp_path / "half", sharding)
    assert other > 0.8
    if sharding == "whole":
        assert abs(other - first["accuracy"]) < 0.01  # rounding apart the same training
