"""The demo, timed as a user sees it (install apart): eval loss and named attribute values of base and adapter.

    python bench/demo.py

Writes bench/results/demo.json, from which the README's figures are taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import write_result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "manylora", "demo", "--output", str(Path(folder) / "demo"), "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall = time.perf_counter() - started
    shown = json.loads(done.stdout.splitlines()[-1])
    figures = {key: value for key, value in shown.items() if key not in ("run", "adapters")}
    if figures["eval"]["loss"] > figures["base_eval"]["loss"] / 2 or figures["named_values"]["adapter"] < 0.8:
        raise SystemExit(f"the demo falls short: {figures}")
    write_result("demo", {"whole_s": round(wall, 1), **figures})


if __name__ == "__main__":
    main()
