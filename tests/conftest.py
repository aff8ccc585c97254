"""Fixtures shared by the tests."""

import os
from importlib.util import find_spec

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, here and in the processes that tests start: threads of several workers would mostly wait
    # for each other. Tests of what threads do set their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from lodo import scalars
from lodo.kernels import native

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on CPU tensors. It reads this when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("tests.helpers")  # so that their asserts say what they found

# What the extra `dev` brings, where a file of tests needs it: a GPU machine may have torch and pytest alone.
NEEDS = {
    "lodo/test_call_orders.py": ("hypothesis",),
    "lodo/test_faults.py": ("matplotlib", "tqdm"),
    "examples/test_image_tasks.py": ("matplotlib", "tqdm"),
    "examples/test_paper_report.py": ("matplotlib", "optuna", "tqdm"),
    "examples/test_paper_runs.py": ("matplotlib", "tqdm"),
    "examples/test_paper_search.py": ("matplotlib", "optuna"),
    "lodo/test_properties.py": ("hypothesis",),
    "examples/test_seeing_inside.py": ("matplotlib", "tqdm"),
    "examples/test_train_classifier.py": ("matplotlib", "tqdm"),
    "lodo/test_users_sequences.py": ("hypothesis",),
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
