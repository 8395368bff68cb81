"""Two checkouts of this project against each other: the time of a step, taken in turns, and that it computes the same.

    python bench/versions.py /path/to/other/checkout

Each checkout has a process of its own, with its own `src` and its own `bench/fleet.py`, on one random Llama of 135 M
parameters in bfloat16: one adapter of rank 16 on 4 rows of 512 tokens, and 16 of them on one row of 64 tokens each. The
two take turns; the losses of every step must be equal. The ratio is the median over rounds of this checkout's time to
the other's within a round; that of processor time says what neighbours on the machine cannot change. Prints, and writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
JOBS = {"one adapter, 4 x 512": ([0], 4, 512), "16 adapters, 1 x 64": (list(range(16)), 1, 64)}
"""Seeds, rows of each step and tokens of a row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker)
        return
    sys.path.insert(0, str(HERE / "bench"))
    from qlora_step import write_base

    with tempfile.TemporaryDirectory() as place:
        folder = write_base(Path(place) / "base", 30, 49152)
        for job in JOBS:
            print(json.dumps({"job": job} | in_turns(asked, str(folder), job)), flush=True)


def in_turns(asked: argparse.Namespace, folder: str, job: str) -> dict[str, Any]:
    """The seconds of a step of both, median over rounds, and their ratio."""
    workers = {
        name: Worker(root, folder, job, asked.threads) for name, root in (("this", HERE), ("other", asked.other))
    }
    taken: dict[str, list[float]] = {name: [] for name in workers}
    busy: dict[str, list[float]] = {name: [] for name in workers}
    try:
        for number in range(asked.rounds + 2):
            losses = {}
            order = list(workers) if number % 2 else list(workers)[::-1]
            for name in order:
                seconds, processor, losses[name] = workers[name].step()
                if number >= 2:  # the first two compile kernels and make states
                    taken[name].append(seconds)
                    busy[name].append(processor)
            if losses["this"] != losses["other"]:
                raise SystemExit(f"step {number} of {job}: losses {losses}")
    finally:
        for worker in workers.values():
            worker.process.kill()
    ratios, of_processor = (
        [one / two for one, two in zip(each["this"], each["other"], strict=True)] for each in (taken, busy)
    )
    return {
        "ratio": round(statistics.median(ratios), 4), "least": round(min(ratios), 3), "most": round(max(ratios), 3),
        "processor_ratio": round(statistics.median(of_processor), 4),
        **{f"{name}_s": round(statistics.median(times), 4) for name, times in taken.items()}, "rounds": asked.rounds,
    }  # fmt: skip


class Worker:
    """A process that steps when it is told to, by the code of one checkout."""

    def __init__(self, root: Path, folder: str, job: str, threads: int):
        environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": str(threads)}
        script = [sys.executable, __file__, str(root), "--worker", json.dumps([str(root), folder, job])]
        self.process = subprocess.Popen(
            script, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
        )
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker has died")
        return line

    def step(self) -> tuple[float, float, list[float]]:
        """The seconds of the next step, those of processors, and the losses of its members."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        seconds, processor, losses = json.loads(self.read())
        return seconds, processor, losses


def work(text: str) -> None:
    root, folder, job = json.loads(text)
    sys.path.insert(0, str(Path(root) / "bench"))
    from fleet import Fleet

    import manylora
    from manylora.base.load import load_base
    from manylora.memory.allocator import freed_memory_kept

    if not str(manylora.__file__).startswith(root):
        raise SystemExit(f"{manylora.__file__} is not of {root}")
    seeds, rows, tokens = JOBS[job]
    fleet = Fleet(load_base(folder, dtype="bfloat16", device="cpu"), seeds, rows=rows, row_tokens=tokens)
    print("ready", flush=True)
    with freed_memory_kept():  # as every run steps
        for _ in sys.stdin:
            began, busy = time.perf_counter(), time.process_time()
            losses = fleet.step()
            print(json.dumps([time.perf_counter() - began, time.process_time() - busy, losses]), flush=True)


if __name__ == "__main__":
    main()
