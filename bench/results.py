"""Where benchmarks leave their figures: one JSON file a claim, with machine, versions and command."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("manylora", "torch", "transformers", "tokenizers")


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write `bench/results/NAME.json` and print it."""
    path = ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {
        "command": " ".join([Path(sys.executable).name, *[Path(word).name for word in sys.argv]]),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "figures": figures,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    return path


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
