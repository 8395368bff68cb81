"""What shows runs and data is light: whoever reads a run's folder waits for no torch."""

import pkgutil
import subprocess
import sys

import pytest

import manylora.look
import manylora.pages
import manylora.runs

LIGHT = [
    f"{room.__name__}.{module.name}"
    for room in (manylora.runs, manylora.pages, manylora.look)
    for module in pkgutil.iter_modules(room.__path__)
]


@pytest.mark.parametrize("name", LIGHT)
def test_a_module_that_shows_runs_or_data_imports_no_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
