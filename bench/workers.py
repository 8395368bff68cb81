"""Ways of doing one job, each in a process of its own, that take turns on command.

Libraries that are compared stand in environments of their own, so they cannot share a process; and memory is read
cleanly only where a process does one thing. A worker is a script that calls `serve` with a table of ways. It reads
commands and answers over its standard streams, one JSON object a line; what libraries print goes to its log. A way that
takes steps calls `gate.step` after each, and waits there until it is told to go on: so a training loop is measured as
it is, and the parent lets two of them take turns. This module imports neither manylora nor a peer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

BENCH = Path(__file__).resolve().parent
PEERS = BENCH.parent / ".venv-peers" / "bin" / "python"
OURS_SCRIPT, PEERS_SCRIPT = BENCH / "ways_ours.py", BENCH / "ways_peers.py"


class WorkerFailed(RuntimeError):
    """A worker raised or ended; holds what it said."""


# -- in the worker -----------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """The parent wants no more steps: unwinds a training loop."""


@dataclass(frozen=True, slots=True)
class Way:
    """A job: modules that are loaded before memory is first read, and the function that does it.

    `run(settings, gate)` either takes steps until it is unwound, or returns what it found.
    """

    imports: tuple[str, ...]
    run: Callable[[dict[str, Any], Gate], dict[str, Any] | None]


class Gate:
    """Where a way stops between two steps. The first step belongs to the opening: it warms up."""

    def __init__(self, reply: Callable[[dict[str, Any]], None], commands: IO[str], idle: int):
        self._reply, self._commands, self._idle = reply, commands, idle
        self._left = 1
        self._losses: list[float] = []
        self._targets = 0
        self.facts: dict[str, Any] = {}
        """What a way wants to be known of itself; sent with each answer."""
        self._begun, self._cpu = time.perf_counter(), time.process_time()

    def step(self, loss: float, targets: int) -> None:
        """One step is done: its mean loss, and how many tokens it learned from."""
        now = time.perf_counter()
        self._losses.append(loss)
        self._targets += targets
        self._left -= 1
        if self._left:
            return
        self._reply({
            "seconds": now - self._begun, "cpu_seconds": time.process_time() - self._cpu,
            "losses": self._losses, "targets": self._targets,
            "peak_bytes": status("VmHWM") - self._idle, "held_bytes": status("VmRSS") - self._idle,
            "idle_bytes": self._idle, "facts": self.facts,
        })  # fmt: skip
        command = json.loads(self._commands.readline() or "{}")
        if "steps" not in command:
            raise Ended
        self._left, self._losses, self._targets = command["steps"], [], 0
        self._begun, self._cpu = time.perf_counter(), time.process_time()


def serve(ways: Mapping[str, Way]) -> None:
    """Do the way that the command line names, with the settings that the first line holds."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print where they like; answers have a stream of their own

    def reply(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    way = ways[sys.argv[1]]
    settings = json.loads(sys.stdin.readline())
    try:
        for name in way.imports:
            importlib.import_module(name)
        found = way.run(settings, Gate(reply, sys.stdin, start_of_peak()))
        reply({"found": found} if found is not None else {"error": "the way ended by itself"})
    except Ended:
        pass
    except BaseException:
        reply({"error": traceback.format_exc()})
        raise


def start_of_peak() -> int:
    """The resident bytes of this process; from now on `VmHWM` holds the highest."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes, such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


# -- in the parent -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that does one way. `opened` is its answer after the first step, where it takes steps.

    Raises:
        WorkerFailed: whatever goes wrong in it, with its traceback.
    """

    def __init__(
        self, script: Path, way: str, settings: Mapping[str, Any], *, python: Path | str = sys.executable,
        threads: int = 2,
    ):  # fmt: skip
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 closed with the worker
        # How threads wait is left as it comes: told to sleep at once, those of small products would be slowed.
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(BENCH),
        }
        self._process = subprocess.Popen(
            [str(python), str(script), way], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self.name = f"{script.stem}:{way}"
        try:
            self.opened = self._ask(settings)
        except BaseException:
            self.close()
            raise

    def steps(self, count: int) -> dict[str, Any]:
        """Let it take so many steps: seconds, losses, targets, and the memory so far over that of its imports."""
        return self._ask({"steps": count})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.poll() is None:
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        """The end of what it has printed, once it has ended. It writes where this file stands, so that is not moved."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        number = self._log.fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode("utf-8", errors="replace")[-2000:]

    def _ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "it ended without an answer"}
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}\n{self._last_words()}")
        return answer


def ours(way: str, settings: Mapping[str, Any], threads: int = 2) -> Worker:
    """A worker of `ways_ours.py`, in the environment of the parent."""
    return Worker(OURS_SCRIPT, way, settings, threads=threads)


def peers(way: str, settings: Mapping[str, Any], threads: int = 2) -> Worker:
    """A worker of `ways_peers.py`, in the peers' environment.

    Raises:
        WorkerFailed: that environment is not there.
    """
    if not PEERS.exists():
        raise WorkerFailed("the peers are not installed: run scripts/peers.sh (make bench does)")
    return Worker(PEERS_SCRIPT, way, settings, python=PEERS, threads=threads)


def ask(start: Callable[..., Worker], way: str, settings: Mapping[str, Any], threads: int = 2) -> dict[str, Any]:
    """What a way that takes no steps has found."""
    with start(way, settings, threads) as worker:
        return worker.opened["found"]


def take_turns(workers: Mapping[str, Worker], rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Answers of each worker to `rounds` times `steps` steps, one worker after the other in every round."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.steps(steps))
    return answers


def speeds(answers: Mapping[str, Sequence[Mapping[str, Any]]], own: str) -> dict[str, Any]:
    """Targets a second of each worker, and how many times that of each other one `own` reaches, by round.

    `cpu_times` is the same of the processors' seconds, which other work on the machine disturbs less; no bound asks it.
    """
    rates = {name: [one["targets"] / one["seconds"] for one in found] for name, found in answers.items()}
    ratios = {
        name: [round(mine / other, 3) for mine, other in zip(rates[own], found, strict=True)]
        for name, found in rates.items()
        if name != own
    }
    return {
        "targets_per_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "seconds_a_round": {name: [round(one["seconds"], 3) for one in found] for name, found in answers.items()},
        "ratios": ratios,
        "times": {name: statistics.median(found) for name, found in ratios.items()},
        "cpu_times": {
            name: _cpu_rate(answers[own]) / _cpu_rate(found) for name, found in answers.items() if name != own
        },
    }


def _cpu_rate(answers: Sequence[Mapping[str, Any]]) -> float:
    return sum(one["targets"] for one in answers) / sum(one["cpu_seconds"] for one in answers)


def memory(answers: Mapping[str, Sequence[Mapping[str, Any]]], own: str) -> dict[str, Any]:
    """The peak of each worker over its memory after imports, and the share of each other one's that `own` takes."""
    peaks = {name: found[-1]["peak_bytes"] for name, found in answers.items()}
    shares = {name: peaks[own] / peak for name, peak in peaks.items() if name != own}
    return {"peak_bytes": peaks, "memory_ratio": shares}
