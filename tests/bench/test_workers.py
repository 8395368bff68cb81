"""Workers take turns on command, say what their steps cost, and hand over what goes wrong in them."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

SCRIPT = """
import sys, time
from pathlib import Path
from workers import Way, serve

def count(settings, gate):
    print("a library that prints to standard output")
    held = []
    gate.facts = {"told": settings["told"]}
    try:
        for number in range(1000):
            time.sleep(settings.get("pause", 0.0))
            held.append(bytearray(b"x" * settings.get("bytes", 0)))
            gate.step(float(number), 10)
    finally:
        Path(settings["left"]).write_text("unwound")

def two(settings, gate):
    gate.step(1.0, 1)
    gate.step(2.0, 1)

def broken(settings, gate):
    gate.step(1.0, 1)
    print("the last words", file=sys.stderr)
    raise ValueError("of the way itself")

def found(settings, gate):
    return {"sum": sum(settings["numbers"])}

def silent(settings, gate):
    import os
    os._exit(3)

serve({"count": Way(("json",), count), "two": Way((), two), "broken": Way((), broken), "found": Way((), found),
       "silent": Way((), silent), "missing": Way(("no_such_module",), found)})
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("workers")
    sys.modules.pop("workers", None)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "ways.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def settings(tmp_path: Path, name: str = "left", **more: object) -> dict[str, object]:
    return {"told": name, "left": str(tmp_path / name), **more}


def test_the_first_step_opens_and_further_ones_are_taken_on_command(workers, script: Path, tmp_path: Path) -> None:
    with workers.Worker(script, "count", settings(tmp_path)) as worker:
        assert worker.opened["losses"] == [0.0]
        answer = worker.steps(3)
        assert (answer["losses"], answer["targets"]) == ([1.0, 2.0, 3.0], 30)
        assert answer["facts"] == {"told": "left"}
        assert worker.steps(1)["losses"] == [4.0]
    assert (tmp_path / "left").read_text(encoding="utf-8") == "unwound"


def test_a_step_counts_its_own_time_and_not_the_wait_for_its_turn(workers, script: Path, tmp_path: Path) -> None:
    with workers.Worker(script, "count", settings(tmp_path, pause=0.05)) as worker:
        time.sleep(0.5)
        assert 0.1 <= worker.steps(2)["seconds"] < 0.5


@pytest.mark.alone
def test_the_peak_is_what_the_way_took_and_not_its_imports(workers, script: Path, tmp_path: Path) -> None:
    with workers.Worker(script, "count", settings(tmp_path, bytes=32 << 20)) as worker:
        first = worker.opened["peak_bytes"]
        assert 32 << 20 <= first < 80 << 20
        more = worker.steps(2)
        assert 60 << 20 <= more["peak_bytes"] - first < 80 << 20
        assert more["held_bytes"] <= more["peak_bytes"]
        assert more["idle_bytes"] > 1 << 20


def test_workers_take_turns_and_are_compared_by_round(workers, script: Path, tmp_path: Path) -> None:
    with (
        workers.Worker(script, "count", settings(tmp_path, "quick", pause=0.02)) as quick,
        workers.Worker(script, "count", settings(tmp_path, "slow", pause=0.08, bytes=1 << 20)) as slow,
    ):
        answers = workers.take_turns({"ours": quick, "other": slow}, rounds=3, steps=2)
    assert [one["losses"] for one in answers["ours"]] == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    found = workers.speeds(answers, "ours")
    assert len(found["ratios"]["other"]) == 3
    assert found["times"]["other"] > 1.5
    assert found["targets_per_second"]["ours"] > found["targets_per_second"]["other"]
    shares = workers.memory(answers, "ours")
    assert shares["memory_ratio"]["other"] == shares["peak_bytes"]["ours"] / shares["peak_bytes"]["other"]


def test_speeds_are_medians_of_the_rounds(workers) -> None:
    def rounds(*seconds: float) -> list[dict[str, float]]:
        return [{"targets": 10, "seconds": one, "cpu_seconds": 2 * one} for one in seconds]

    found = workers.speeds({"ours": rounds(1.0, 2.0, 1.0), "other": rounds(3.0, 2.0, 4.0)}, "ours")
    assert found["ratios"]["other"] == [3.0, 1.0, 4.0]
    assert found["times"] == {"other": 3.0}
    assert found["cpu_times"] == {"other": 9.0 / 4.0}
    assert found["targets_per_second"] == {"ours": 10.0, "other": 3.3}


def test_a_way_that_takes_no_steps_answers_with_what_it_found(workers, script: Path) -> None:
    def start(way: str, told: dict[str, object], threads: int = 2):
        return workers.Worker(script, way, told, threads=threads)

    assert workers.ask(start, "found", {"numbers": [1, 2, 3]}) == {"sum": 6}


def test_what_goes_wrong_in_a_worker_is_told_with_its_log(workers, script: Path) -> None:
    with workers.Worker(script, "broken", {}) as worker:
        with pytest.raises(workers.WorkerFailed, match="of the way itself") as told:
            worker.steps(1)
        assert "the last words" in str(told.value)


@pytest.mark.parametrize(("way", "message"), [("missing", "no_such_module"), ("silent", "without an answer")])
def test_a_worker_that_does_not_open_is_an_error(workers, script: Path, way: str, message: str) -> None:
    with pytest.raises(workers.WorkerFailed, match=message):
        workers.Worker(script, way, {})


def test_a_way_that_ends_by_itself_is_an_error(workers, script: Path) -> None:
    with workers.Worker(script, "two", {}) as worker:
        assert worker.steps(1)["losses"] == [2.0]
        with pytest.raises(workers.WorkerFailed, match="ended by itself"):
            worker.steps(1)


def test_peers_that_are_not_there_are_named_with_the_way_to_get_them(workers, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "PEERS", tmp_path / "nothing")
    with pytest.raises(workers.WorkerFailed, match=r"scripts/peers\.sh"):
        workers.peers("plain", {})
