"""Fixtures shared by the tests."""

import os

import pytest
import torch

from lodo.kernels import native

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on CPU tensors. It reads this when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["native", "reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the compiled CPU kernels and on plain torch."""
    if request.param == "reference":
        monkeypatch.setenv("LODO_NATIVE", "0")
    elif native.library() is None:
        pytest.skip("no C++ compiler on this machine")
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device(request.param)
