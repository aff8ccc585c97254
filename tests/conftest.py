"""Fixtures shared by the tests."""

import os
from importlib.util import find_spec

import pytest
import torch

from lodo import scalars
from lodo.kernels import native

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on CPU tensors. It reads this when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

# What the extra `dev` brings, where a file of tests needs it: a GPU machine may have torch and pytest alone.
NEEDS = {
    "test_call_orders.py": ("hypothesis",),
    "test_faults.py": ("matplotlib", "tqdm"),
    "test_image_tasks.py": ("matplotlib", "tqdm"),
    "test_paper_report.py": ("matplotlib", "optuna", "tqdm"),
    "test_paper_runs.py": ("matplotlib", "tqdm"),
    "test_paper_search.py": ("matplotlib", "optuna"),
    "test_properties.py": ("hypothesis",),
    "test_seeing_inside.py": ("matplotlib", "tqdm"),
    "test_train_classifier.py": ("matplotlib", "tqdm"),
    "test_users_sequences.py": ("hypothesis",),
}
collect_ignore = [name for name, packages in NEEDS.items() if not all(map(find_spec, packages))]


def pytest_report_header() -> str | None:
    return f"left out, for packages that are missing: {', '.join(collect_ignore)}" if collect_ignore else None


@pytest.fixture(params=["native", "reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the compiled CPU kernels and on plain torch."""
    if request.param == "reference":
        monkeypatch.setenv("LODO_NATIVE", "0")
    elif native.library() is None:
        pytest.skip("no C++ compiler on this machine")
    return str(request.param)


@pytest.fixture(params=["native", "reference", "scalars on the device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the compiled CPU kernels, on plain torch, and there with scalars as on an accelerator."""
    if request.param != "native":
        monkeypatch.setenv("LODO_NATIVE", "0")
    elif native.library() is None:
        pytest.skip("no C++ compiler on this machine")
    if request.param == "scalars on the device":
        monkeypatch.setattr(scalars, "is_readable", lambda tensor: False)
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
