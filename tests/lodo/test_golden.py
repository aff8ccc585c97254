"""The trajectories of the paper's authors' own code (float64), recorded in tests/data/authors_code.npz."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lodo
from tests.helpers.oracle import learned

CASES = (
    "lodo_rosenbrock",
    "lodo_quadratic",
    "sgd_quadratic",
    "residual_quadratic",
    "diagonal_quadratic",
    "global_quadratic",
)
TOLERANCE = 1e-6  # their inner Adam keeps its hyperparameters in float32


def load(case: str) -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parents[1] / "data" / "authors_code.npz") as archive:
        return {
            name.split("/")[1]: torch.as_tensor(archive[name]) for name in archive.files if name.split("/")[0] == case
        }


def preconditioner(data: dict[str, torch.Tensor], when: str):
    size = len(data["x0"])
    if "blocks0" in data:
        return lodo.BlockPermutation(data["blocks" + when], data["permutations"], size)
    if "diagonals0" in data:
        return lodo.Residual(data["diagonals" + when], data["permutations"], size)
    weight = data["weight" + when]
    return lodo.Diagonal(weight) if weight.dim() else lodo.Scalar(weight, size)


@pytest.mark.parametrize("case", CASES)
def test_iterates_losses_and_network_follow_the_authors(case: str, kernel: str) -> None:
    data = load(case)
    x = torch.nn.Parameter(data["x0"].clone())
    optimizer = lodo.LODO(
        [x],
        lr=float(data["hp_initial_lr"]),
        meta_lr=float(data["hp_meta_lr"]),
        beta=float(data["hp_beta"]),
        preconditioner=preconditioner(data, "0"),
        meta_optimizer="sgd" if case.startswith("sgd") else "adam",
    )

    def loss() -> torch.Tensor:
        if "H" in data:
            return 0.5 * (x - data["c"]) @ data["H"] @ (x - data["c"])
        return 0.01 * (1 - x[0]) ** 2 + (x[1] - x[0] ** 2) ** 2

    for iterate, expected in zip(data["xs"], data["losses"], strict=True):
        torch.testing.assert_close(x.detach(), iterate, rtol=0, atol=TOLERANCE)
        optimizer.zero_grad()
        value = loss()
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=TOLERANCE)
        value.backward()
        optimizer.step()
    found = learned(optimizer.preconditioners[0])
    torch.testing.assert_close(found, learned(preconditioner(data, "1")), rtol=0, atol=TOLERANCE)
    assert not torch.allclose(found, learned(preconditioner(data, "0")), rtol=0, atol=100 * TOLERANCE)
