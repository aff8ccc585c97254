"""Bytes that ranks send: counted on real processes."""

import pytest
import torch

from benchmarks import communication


def test_what_a_ring_sends():
    part, whole = torch.zeros(6), torch.zeros(24)
    assert communication.sent_by("_allgather_base_", [whole, part], 4, 0) == 3 * 24
    assert communication.sent_by("allgather_", [[[part] * 4], [part]], 4, 0) == 3 * 24
    assert communication.sent_by("_reduce_scatter_base_", [part, whole], 4, 0) == 3 * 24
    assert communication.sent_by("allreduce_", [[whole]], 4, 0) == 2 * 3 * 24
    assert communication.sent_by("alltoall_base_", [part, whole, None, [], [5, 6, 7, 6]], 4, 2) == 4 * (5 + 6 + 6)
    with pytest.raises(ValueError, match="not counted: send"):
        communication.sent_by("send", [], 2, 0)


def test_the_report(tmp_path):
    out = tmp_path / "report.md"
    communication.main(["--ranks", "2", "--widths", "32", "--out", str(out)])
    (row,) = [line for line in out.read_text().splitlines() if line.startswith("| ") and "parameters" not in line]
    size, ranks, own, local, whole, ratio, work = (float(cell.replace(",", "")) for cell in row.strip("| ").split("|"))
    assert (ranks, local) == (2, 0)
    assert own == pytest.approx(3 * 4e-3 * size / 2, rel=0.1)
    assert whole < 0.75 * own
    assert ratio == pytest.approx(whole / own, abs=0.01)
    assert 1 <= work < 1.5
