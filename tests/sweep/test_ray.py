"""Sweeps over several workers: whoever dies and whenever, every trial ends as it would have in one process."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.config import Config, load_config
from manylora.errors import ConfigError
from manylora.runs.events import EventLog, read_events
from manylora.sweeps.board import Board
from manylora.sweeps.director import Director
from manylora.sweeps.engines import ray as engine
from manylora.sweeps.engines.ray_hub import Answer, Handout, Hub, Journal, State
from manylora.sweeps.engines.ray_shelf import DiskShelf
from manylora.sweeps.engines.ray_worker import Post, Proxy
from manylora.sweeps.run import sweep
from manylora.sweeps.search import Search
from manylora.sweeps.space import parse_space
from manylora.sweeps.stopping import RULES, StopSettings
from manylora.sweeps.trials import Trials, levels_of
from manylora.training.checkpoint import Checkpoints, Kept
from manylora.training.orders import Ending, Order, Report
from manylora.types import Factors

FULL_STEPS = 18
TOKENS = 50
RATES = [0.001 * 2**place for place in range(9)]


def direct(stop: str, repeats: int = 1) -> Director:
    space = {"train.learning_rate": RATES}
    values = {"base": "b", "data": {"train": "t", "eval": "e"}, "output": "o",
              "sweep": {"space": space, "search": "grid", "stop": stop, "repeats": repeats}}  # fmt: skip
    parsed = parse_space(space)
    trials = Trials(load_config(values), parsed)
    search = Search("grid", parsed, seed=0, num_trials=None, storage=None, study_name="s")
    rule = RULES.get(stop)(search.num_trials, StopSettings())
    trials.levels = levels_of(rule.shares, FULL_STEPS * TOKENS, FULL_STEPS)
    return Director(trials, search, rule)


def loss_of(director: Director, member: str, tokens: int) -> float:
    rate = director.trials[director.members[member].trial].values["train.learning_rate"]
    return 1.0 + abs(math.log2(rate / RATES[4])) + 100.0 / tokens


@dataclass
class Disk:
    """What survives every process: checkpoints, members that wait, and the log."""

    waiting: dict[str, dict[int, State]] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, State]] = field(default_factory=dict)
    steps: list[tuple[str, int]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def rescue(self, member: str, workers: Sequence[str] | None) -> State | None:
        states = list(self.waiting.get(member, {}).values())
        for worker in list(self.checkpoints) if workers is None else workers:
            states += [state for name, state in self.checkpoints.get(worker, {}).items() if name == member]
        best = max(states, key=lambda state: state.step, default=None)
        if best is not None:
            self.waiting.setdefault(member, {})[best.step] = best
        return best

    def drop(self, member: str) -> None:
        self.waiting.pop(member, None)

    def drop_after(self, steps: Mapping[str, int]) -> int:
        before = len(self.steps)
        self.steps = [(name, step) for name, step in self.steps if step <= steps.get(name, math.inf)]
        return before - len(self.steps)

    def event(self, name: str, **fields: Any) -> None:
        if name == "step":
            self.steps.append((fields["member"], fields["step"]))

    def note(self, text: str) -> None:
        pass

    def stage(self, text: str) -> None:
        pass


class Simulated:
    """A worker: members make one step a tick in its slots. `life` stops wherever others may act, or it may die."""

    def __init__(self, name: str, hub: Hub, director: Director, disk: Disk):
        self.name, self.hub, self.director, self.disk = name, hub, director, disk
        self.running: dict[str, State] = {}
        self.unsaid: list[tuple[Any, ...]] = []
        self.life = self.live()

    def say(self) -> None:
        for said in self.unsaid:
            self.hub.take(self.name, *said)
            if said[0] == "ended":
                self.disk.finished.append(said[1].member)
        self.unsaid = []

    def ask(self, *item: Any) -> Answer | None:
        self.say()
        return self.hub.take(self.name, *item)

    def live(self) -> Iterator[None]:
        yield from self.take_orders()
        ticks = 0
        while self.running:
            yield from self.tick()
            yield from self.take_orders()
            ticks += 1
            if ticks % 3 == 0:
                self.ask("flush")
                yield
                self.disk.checkpoints[self.name] = dict(self.running)
            yield

    def tick(self) -> Iterator[None]:
        levels = self.director._trials.levels
        reports = []
        for name, state in self.running.items():
            step = state.step + 1
            passed = sum(level <= step * TOKENS for level in levels)
            self.running[name] = State(step, passed)
            self.unsaid.append(("event", "step", {"member": name, "step": step}))
            if passed > state.level and step < FULL_STEPS:
                tokens = step * TOKENS
                reports.append(Report(name, passed - 1, tokens, loss_of(self.director, name, tokens)))
        if reports:
            yield
            answer = self.ask("judge", reports)
            assert answer is not None
            yield
            for name, verdict in answer.value.items():
                if verdict.judgement == "wait":
                    state = self.running.pop(name)
                    self.disk.waiting.setdefault(name, {})[state.step] = state
                    yield
                    self.unsaid.append(("event", "waiting", {"member": name, "step": state.step}))
                elif verdict.judgement == "stop":
                    self.end(name, self.running.pop(name), "stopped")
        for name, state in list(self.running.items()):
            if state.step == FULL_STEPS:
                self.end(name, self.running.pop(name), "done")
        yield

    def end(self, name: str, state: State, how: str) -> None:
        tokens = state.step * TOKENS
        loss = loss_of(self.director, name, tokens)
        self.unsaid.append(("ended", Ending(name, how, "", tokens, loss, {})))

    def take_orders(self) -> Iterator[None]:
        while True:
            answer = self.ask("next", len(self.running) < 2, not self.running)
            while answer is None:
                yield
                answer = self.hub.poll(self.name)
            if answer.value is None:
                return
            yield
            handout: Handout = answer.value
            name = handout.order.member
            assert name not in self.disk.finished
            if handout.order.action == "start":
                self.running[name] = State(0, 0)
                self.unsaid.append(("started", name, FULL_STEPS * TOKENS))
                continue
            assert handout.step is not None
            state = self.disk.waiting[name][handout.step]  # written before anybody hears of it
            if handout.order.action == "dismiss":
                self.end(name, state, "stopped")
            else:
                self.running[name] = state


class Simulation:
    """Workers that take turns at random; killed ones are replaced, and now and then the driver dies with all."""

    def __init__(self, folder: Path, stop: str, repeats: int, seed: int, danger: float, driver_danger: float):
        self.folder, self.stop, self.repeats = folder, stop, repeats
        self.dice, self.danger, self.driver_danger = random.Random(seed), danger, driver_danger
        self.disk = Disk()
        self.count = self.deaths = 0
        self.begin(resume=False)

    def begin(self, resume: bool) -> None:
        self.director = direct(self.stop, self.repeats)
        journal = Journal(self.folder / "director.jsonl")
        self.hub = Hub(self.director, self.disk, journal, self.disk, self.disk)
        if resume:
            self.hub.resume()
        self.workers: dict[str, Simulated] = {}
        for _ in range(3):
            self.hire()

    def hire(self) -> None:
        name = f"worker-{self.count}"
        self.count += 1
        self.hub.join(name)
        self.workers[name] = Simulated(name, self.hub, self.director, self.disk)

    def run(self) -> Simulation:
        for _ in range(50_000):
            if self.hub.over:
                return self
            name = self.dice.choice(list(self.workers))
            worker = self.workers[name]
            next(worker.life, None)
            if self.dice.random() < 0.2:
                worker.say()
            held = [member for each in self.hub._workers.values() for member in each.members]
            assert len(held) == len(set(held))  # nobody trains in two places
            if self.dice.random() < self.danger:
                self.deaths += 1
                del self.workers[name]
                self.hub.lose(name)
                self.hire()
            if self.dice.random() < self.driver_danger:
                self.begin(resume=True)
        raise AssertionError("the sweep does not come to an end")


@cache
def undisturbed(stop: str, repeats: int) -> set[tuple[Any, ...]]:
    """How every trial ends where nobody dies."""
    with TemporaryDirectory() as folder:
        return outcomes(Simulation(Path(folder), stop, repeats, 0, 0.0, 0.0).run())


def outcomes(simulation: Simulation) -> set[tuple[Any, ...]]:
    return {(entry.trial, entry.state, entry.tokens, entry.loss) for entry in simulation.director.entries()}


@settings(max_examples=examples(40), deadline=None)
@given(
    stop=st.sampled_from(sorted(RULES)),
    repeats=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32),
    danger=st.sampled_from([0.0, 0.01, 0.05]),
    driver_danger=st.sampled_from([0.0, 0.005, 0.02]),
)
def test_whoever_dies_every_trial_ends_where_it_ends_in_one_process(
    tmp_path_factory: pytest.TempPathFactory, stop: str, repeats: int, seed: int, danger: float, driver_danger: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # no machine loses its power here
        found = Simulation(tmp_path_factory.mktemp("s"), stop, repeats, seed, danger, driver_danger).run()
    entries = found.director.entries()
    assert len(entries) == len(RATES)
    assert all(entry.ended for entry in entries)
    if stop in ("none", "successive-halving"):  # the others judge by who came first
        assert outcomes(found) == undisturbed(stop, repeats)
    for name, member in found.director.members.items():
        # the log holds every step of the way once, in order, whatever was lived through twice
        assert [step for who, step in found.disk.steps if who == name] == list(range(1, member.tokens // TOKENS + 1))
    assert not found.disk.waiting
    assert sorted(found.disk.finished) == sorted(found.director.members)  # no finished trial was trained again


def test_a_director_answers_who_reports_again_as_before_and_notes_it_once() -> None:
    director = direct("successive-halving")
    names = [f"trial-{number:03d}" for number in range(9)]
    for name in names:
        assert director.next(free=True, idle=False) == Order("start", name)
        director.started(name, 900)
    reports = [Report(name, 0, 100, float(place)) for place, name in enumerate(names)]
    assert {verdict.judgement for verdict in director.judge(reports[1:]).values()} == {"wait"}
    journal = json.dumps(director.journal)
    assert director.judge(reports[1:2])["trial-001"].judgement == "wait"
    director.started("trial-003", 900)
    assert json.dumps(director.journal) == journal
    assert director.judge(reports[:1])["trial-000"].judgement == "go"
    entries = len(director.journal)
    # let go and stopped, and not told so yet: they wait for their orders
    assert [director.judge([reports[place]])[names[place]].judgement for place in (0, 1, 8)] == ["go", "wait", "wait"]
    orders = {}
    while (order := director.next(free=True, idle=False)) is not None:
        orders[order.member] = order.action
    assert [director.judge([reports[place]])[names[place]].judgement for place in (0, 1, 8)] == ["go", "go", "stop"]
    assert orders == {name: "continue" if place < 3 else "dismiss" for place, name in enumerate(names) if place}
    ending = Ending("trial-008", "stopped", "", 100, 8.0, {})
    director.ended(ending)
    told = len(director.journal)
    director.ended(ending)
    assert told == len(director.journal) == entries + len(orders) + 1
    assert set(director.under_way()) == set(names) - {"trial-008"}


def test_an_order_for_a_member_waits_until_it_is_written_down_and_dies_with_its_worker(tmp_path: Path) -> None:
    director, disk = direct("successive-halving"), Disk()
    hub = Hub(director, disk, journal := Journal(tmp_path / "director.jsonl"), disk, disk)
    hub.join("a")
    hub.join("b")

    def asked(worker: str, idle: bool = False) -> Order | None:
        answer = hub.take(worker, "next", True, idle)
        return None if answer is None or answer.value is None else answer.value.order

    def judged(worker: str, level: int, *places: int) -> list[str]:
        reports = [Report(names[place], level, 100 if level == 0 else 300, float(place)) for place in places]
        answer = hub.take(worker, "judge", reports)
        assert answer is not None
        assert Journal(journal.path).read() == director.journal  # on disk before anybody hears of it
        return [verdict.judgement for verdict in answer.value.values()]

    names = [f"trial-{number:03d}" for number in range(9)]
    for name in names:
        assert asked("a") == Order("start", name)
        assert Journal(journal.path).read() == director.journal
    assert judged("a", 0, *range(8)) == ["wait"] * 8
    assert judged("a", 0, 8) == ["stop"]
    assert asked("b", idle=True) is None  # all are let go or stopped, and none is on disk for sure
    assert hub.poll("b") is None
    hub.take("a", "event", "waiting", {"member": names[1], "step": 2})
    answer = hub.poll("b")
    assert answer is not None
    assert (answer.value.order, answer.value.step) == (Order("continue", names[1]), 2)
    disk.waiting[names[2]] = {2: State(2, 1)}  # written, and not said
    disk.waiting[names[7]] = {2: State(2, 1)}
    assert set(hub.lose("a")) == set(names) - {names[1]}
    given = [asked("b") for _ in range(8)]
    assert [order.action for order in given if order] == ["start", "continue", *["start"] * 4, "dismiss", "start"]
    assert judged("b", 0, 0, 3) == ["go", "stop"]
    assert judged("b", 1, 2, 0) == ["wait", "wait"]
    for place in (2, 0):
        hub.take("b", "event", "waiting", {"member": names[place], "step": 6})
    assert asked("b") is None  # the first level's orders are of the past


def test_members_are_spread_over_the_workers_that_are_there(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, "none", 1, 0, 0.0, 0.0)
    hub = simulation.hub
    one, two, three = simulation.workers.values()
    for _ in range(4):
        next(one.life)
    assert len(one.running) == 2  # nobody else has asked yet
    assert hub.take(two.name, "next", True, True) is not None
    held = {name: len(worker.members) for name, worker in hub._workers.items()}
    assert list(held.values()) == [2, 1, 0]
    hub._workers[three.name].free = True  # it asked, and there was nothing then
    answer = hub.take(two.name, "next", True, False)
    assert answer == Answer(None)
    answer = hub.take(three.name, "next", True, True)
    assert answer is not None
    assert answer.value.order.action == "start"


def test_a_journal_forgets_the_line_that_its_writer_did_not_finish(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "director.jsonl")
    assert journal.read() == []
    journal.write([["finish"], ["started", "a", 3]])
    journal.write([["finish"], ["started", "a", 3], ["finish"]])
    with journal.path.open("a") as stream:
        stream.write('["ended", {"mem')
    again = Journal(journal.path)
    assert again.read() == [["finish"], ["started", "a", 3], ["finish"]]
    again.write([["finish"], ["started", "a", 3], ["finish"], ["finish"]])
    assert Journal(journal.path).read() == [["finish"], ["started", "a", 3], ["finish"], ["finish"]]


def kept(value: float) -> Kept:
    import torch

    tensors = {name: torch.full((2, 2), value) for name in ("a", "b")}
    return Kept({"s": Factors("lora", tensors)}, {"m": torch.full((3,), value)})


def test_a_shelf_gives_the_state_with_the_most_steps_wherever_it_lies(tmp_path: Path) -> None:
    shelf = DiskShelf(tmp_path, keep=2)
    assert [shelf.add(), shelf.add()] == ["worker-0", "worker-1"]
    shared = tmp_path / "waiting"
    first = Checkpoints(tmp_path / "worker-0", 2, waiting=shared)
    second = Checkpoints(tmp_path / "worker-1", 2, waiting=shared)
    first.save(5, {"x": ({"step": 5, "level": 1}, kept(5.0)), "y": ({"step": 3, "level": 0}, kept(3.0))}, {}, {}, {})
    second.save(9, {"x": ({"step": 2, "level": 0}, kept(2.0))}, {}, {}, {})
    first.park("y", {"step": 4, "level": 1}, kept(4.0))
    assert shelf.rescue("z", None) is None
    assert shelf.rescue("x", ["worker-1"]) == State(2, 0)
    assert shelf.rescue("x", None) == State(5, 1)
    assert shelf.rescue("y", None) == State(4, 1)
    progress, found = shared_state(first, "x")
    assert progress == {"step": 5, "level": 1}
    assert found.moments["m"].tolist() == [5.0] * 3
    assert found.now["s"].tensors["a"].tolist() == [[5.0] * 2] * 2
    shelf.clear()
    assert shelf.rescue("x", None) == State(5, 1)  # it was put where members wait
    shelf.drop("x")
    assert shelf.rescue("x", None) is None
    assert shelf.add() == "worker-2"  # a late writer of a dead worker meets nobody


def shared_state(checkpoints: Checkpoints, member: str) -> tuple[dict[str, Any], Kept]:
    return checkpoints.unpark(member)


def test_events_go_back_by_member(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        for step in (1, 2, 3):
            for name in ("x", "y", "z"):
                log.write("step", member=name, step=step)
        log.write("checkpoint", step=3)
        assert log.drop_after({"x": 1, "z": -1}) == 5
        log.write("step", member="x", step=2)
    found = [(event.get("member"), event["step"]) for event in read_events(tmp_path)]
    assert found == [("x", 1), ("y", 1), ("y", 2), ("y", 3), (None, 3), ("x", 2)]


def test_what_is_said_travels_together_and_a_question_at_once() -> None:
    post = Post()
    proxy = Proxy(post)
    proxy.event("step", member="x", step=1)
    proxy.note("hello")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(proxy.next(free=True, idle=True)))
    thread.start()
    items: list[Any] = []
    while len(items) < 3:
        items += post.exchange(None, stop=False)
    assert [item[0] for item in items] == ["event", "note", "next"]
    config = load_config({"base": "b", "data": {"train": "t"}, "output": "o"})
    assert post.exchange(Answer(Handout(Order("continue", "x"), config, 7)), stop=False) == []
    thread.join(10)
    assert found == [Order("continue", "x")]
    assert proxy.config("x") is config
    assert proxy.steps == {"x": 7}
    assert not post.stop.is_set()
    post.exchange(None, stop=True)
    assert post.stop.is_set()


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = load_config({"base": "b", "data": {"train": "t", "eval": "e"}, "output": "o"})
    with pytest.raises(ConfigError, match=r"pip install manylora\[ray\]"):
        engine.check(config)


def test_objects_of_this_process_are_refused() -> None:
    for changes in ({"base": "python:x"}, {"data": {"train": "python:rows", "eval": "e"}}):
        config = load_config({"base": "b", "data": {"train": "t", "eval": "e"}, "output": "o", **changes})
        with pytest.raises(ConfigError, match="an object of this process"):
            engine.check(config)


def test_no_cluster_at_the_address_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**settings: Any) -> None:
        assert settings["address"] == "10.0.0.1:6379"
        raise ConnectionError("nobody there")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is 10\.0\.0\.1:6379"), engine.cluster(2, "cpu", "auto"):
        pass


def test_the_hub_needs_no_torch() -> None:
    code = "import sys, manylora.sweeps.engines.ray_hub; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# -- with Ray itself ---------------------------------------------------------------------------------------------------

SWEEP = {
    "space": {"train.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2, 1e-4, 3e-4]}, "search": "grid",
    "stop": "successive-halving", "concurrent": 4, "workers": 2,
}  # fmt: skip


def configuration(folder: Path, base: Path, name: str, which: str) -> Config:
    rows = [{"prompt": f"name : place {i}\n", "completion": f"the dog {i * 7 % 13}"} for i in range(60)]
    for part, own in {"train": rows[:48], "eval": rows[48:]}.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    values = {
        "base": str(base), "dtype": "float32", "device": "cpu", "track": None, "output": str(folder / name),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "train": {"schedule": "wsd", "steps": 90, "rows_per_step": 4, "row_tokens": 128},
        "adapter": {"rank": 4, "dropout": 0.1}, "checkpoint": {"every_steps": 4},
        "sweep": {**SWEEP, "engine": which},
    }  # fmt: skip
    return load_config(values)


def endings(run: Path) -> dict[str, tuple[Any, ...]]:
    """State, tokens, loss and steps of every trial."""
    told = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
    return {one["member"]: (one["state"], one["tokens"], one["loss"]) for one in told["entries"]}


def same_as(run: Path, whole: Path) -> None:
    from safetensors.torch import load_file

    found, before = endings(run), endings(whole)
    assert {name: value[:2] for name, value in found.items()} == {name: value[:2] for name, value in before.items()}
    for name, (_, _, loss) in before.items():
        assert found[name][2] == pytest.approx(loss, rel=1e-4)
        for path in (whole / "adapters" / name).glob("*.safetensors"):
            own = load_file(run / "adapters" / name / path.name)
            for key, value in load_file(path).items():
                assert (own[key] - value).norm() <= 1e-4 * value.norm() + 1e-7, (name, key)
        steps = [event["step"] for event in read_events(run) if event["event"] == "step" and event["member"] == name]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == sum(e["event"] == "step" and e["member"] == name for e in read_events(whole))


class Watching(Board):
    """Kills worker after worker, each at a count of trained tokens, and keeps what was said."""

    def __init__(self, *kill_at: int):
        super().__init__(quiet=True)
        self.kill_at = list(kill_at)
        self.pids: list[int] = []
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
        found = re.match(r"worker-\d+ is process (\d+)", text)
        if found:
            self.pids.append(int(found[1]))

    def members(self, done_tokens: int, total_tokens: int, running: int, tokens_per_s: float | None) -> None:
        if self.kill_at and self.pids and done_tokens >= self.kill_at[0]:
            self.kill_at.pop(0)
            os.kill(self.pids.pop(0), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """The run folder of the sweep in one process."""
    folder = tmp_path_factory.mktemp("whole")
    return sweep(configuration(folder, tiny_base_folder, "run", "local")).run


@pytest.mark.slow
def test_a_sweep_that_loses_a_worker_equals_the_one_in_one_process(
    tmp_path: Path, tiny_base_folder: Path, whole: Path
) -> None:
    pytest.importorskip("ray")
    board = Watching(3000, 9000)
    run = sweep(configuration(tmp_path, tiny_base_folder, "run", "ray"), board=board).run
    deaths = [text for text in board.said if " died; " in text]
    assert len(deaths) == 2
    assert any("trial-" in text for text in deaths)
    same_as(run, whole)
    assert {event["worker"] for event in read_events(run)} >= {"worker-0", "worker-1"}
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_was_killed_or_interrupted_resumes(
    how: signal.Signals, tmp_path: Path, tiny_base_folder: Path, whole: Path
) -> None:
    pytest.importorskip("ray")
    config = configuration(tmp_path, tiny_base_folder, "run", "ray")
    file, run = tmp_path / "c.yaml", tmp_path / "run"
    file.write_text(config.to_yaml(), encoding="utf-8")
    words = [sys.executable, "-m", "manylora", "sweep", str(file)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            deadline = time.monotonic() + 120
            while steps_in(run) < 60 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            os.killpg(child.pid, how) if how == signal.SIGINT else child.kill()  # Ctrl-C reaches the whole group
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == (130 if how == signal.SIGINT else -9), error
    assert "Traceback" not in error
    assert steps_in(run) >= 60
    assert not (run / "summary.json").exists()
    board = Watching()
    sweep(config, resume=True, board=board)
    assert any(re.match(r"resumes with [1-9]\d* members under way", text) for text in board.said)
    same_as(run, whole)


def steps_in(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_text(encoding="utf-8").count('"event": "step"') if events.is_file() else 0
