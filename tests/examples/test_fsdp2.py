"""The example with FSDP2, on real processes."""

import warnings

from examples.frameworks import fsdp2
from tests.helpers.ranks import run


def half(folder):
    model, optimizer = fsdp2.make()
    fsdp2.train(model, optimizer, 0, fsdp2.STEPS // 2)
    fsdp2.save(folder, model, optimizer)


def other_half(folder):
    model, optimizer = fsdp2.make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fsdp2.load(folder, model, optimizer)
    assert sum("another number of shards" in str(each.message) for each in caught) == 1
    fsdp2.train(model, optimizer, fsdp2.STEPS // 2, fsdp2.STEPS)
    return fsdp2.accuracy(model)


def test_fsdp2_goes_on_with_as_many_ranks_bit_for_bit_and_with_another_number(tmp_path):
    first, second = run(2, fsdp2.run, tmp_path / "two")
    assert first == second
    assert first["distance"] == 0
    assert first["accuracy"] == first["resumed"] > 0.85
    run(2, half, tmp_path / "half")
    (other,) = run(1, other_half, tmp_path / "half")
    assert other > 0.8
