"""Every module imports and a run trains where POSIX alone has a module: wheels are declared for all systems."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import importlib, pkgutil
# What these need themselves is their affair.
import datasets, huggingface_hub.hf_file_system, optuna, psutil, tensorboard, torch, transformers
import torch.utils.tensorboard
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None  # an import of it raises ImportError from here on
import manylora
for module in pkgutil.walk_packages(manylora.__path__, "manylora."):
    if not module.name.endswith("__main__") and ".ray" not in module.name:
        importlib.import_module(module.name)
from types import SimpleNamespace
import psutil
from manylora.memory import device
device.sys = SimpleNamespace(platform="win32")
device.psutil = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7)))
assert device.peak_bytes(torch.device("cpu")) == 7
print("all")
"""


def test_every_module_imports_without_modules_of_posix() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("all"), done.stderr[-2000:]
