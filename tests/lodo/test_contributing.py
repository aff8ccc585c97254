"""The worked example of CONTRIBUTING: a part is one file, one registration and one row of tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED = "Mixture, Average)"


def replaced(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, path
    path.write_text(text.replace(old, new))


def test_a_part_is_one_file_one_registration_and_one_row(tmp_path):
    part, row = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    for folder in ("lodo", "tests/helpers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests/lodo").mkdir()
    for name in ("tests/__init__.py", "tests/conftest.py", "tests/lodo/__init__.py", "tests/lodo/test_every_part.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "lodo/parts/caution.py").write_text(part)
    registry = tmp_path / "lodo/parts/__init__.py"
    replaced(registry, LISTED, LISTED[:-1] + ", Caution)")
    replaced(
        registry, "from lodo.parts.eigenbasis", "from lodo.parts.caution import Caution\nfrom lodo.parts.eigenbasis"
    )
    replaced(tmp_path / "tests/lodo/test_every_part.py", "ROWS = {\n", "ROWS = {\n" + row)
    command = [sys.executable, "-m", "pytest", "tests/lodo/test_every_part.py", "-p", "no:cacheprovider", "-k"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "caution or row or signature"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30, done.stdout
