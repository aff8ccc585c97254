"""What a record says of where it was made: versions, the code, the machine."""

import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lodo
from benchmarks.measuring import device_name

PACKAGES = ("torch", "numpy", "optuna", "pytorch-optimizer", "scikit-learn")


@cache
def source_hash() -> str:
    """Of the code of the installed lodo, which changes faster than its version."""
    root = Path(lodo.__file__).parent
    paths = sorted(path for path in root.rglob("*") if path.suffix in {".py", ".cpp"})
    found = hashlib.sha256()
    for path in paths:
        found.update(str(path.relative_to(root).as_posix()).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Versions and machine behind a record; the load is that at the run's end."""
    versions: dict[str, Any] = {"lodo": lodo.__version__, "lodo_source": source_hash()}
    versions["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    machine = {"system": platform.system(), "machine": platform.machine(), "processor": device_name("cpu")}
    return versions | machine | {"cores": os.cpu_count(), "load": load, "threads": torch.get_num_threads()}
