"""The director: who is begun, judged, continued and dismissed, whatever loops ask and wherever it was interrupted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.config import load_config
from manylora.errors import ConfigError
from manylora.sweeps.director import Director
from manylora.sweeps.search import Search
from manylora.sweeps.space import parse_space
from manylora.sweeps.stopping import RULES, StopSettings
from manylora.sweeps.trials import Trials, levels_of
from manylora.training.orders import Ending, Order, Report

FULL = 900
RATES = [0.001 * 2**place for place in range(9)]


def direct(stop: str = "successive-halving", storage: Any = None, **changes: Any) -> Director:
    """A director over nine rates; the storage of its search is memory unless given."""
    sweep = {"space": {"train.learning_rate": RATES}, "search": "grid", "stop": stop, **changes.pop("sweep", {})}
    values = {"base": "b", "data": {"train": "t", "eval": "e"}, "output": "o", "sweep": sweep, **changes}
    config = load_config(values)
    assert config.sweep is not None
    space = parse_space(config.sweep.space)
    trials = Trials(config, space)
    search = Search("grid", space, seed=0, num_trials=None, storage=storage, study_name="s")
    rule = RULES.get(stop)(search.num_trials, StopSettings())
    trials.levels = levels_of(rule.shares, FULL, FULL // 50)
    return Director(trials, search, rule)


def loss_of(director: Director, member: str, tokens: int) -> float:
    """Falls with tokens, least for the fifth rate; seeds differ a little."""
    rate = director.trials[director.members[member].trial].values.get("train.learning_rate", RATES[4])
    seed = int(member.partition(".seed-")[2].partition(".")[0] or 0)
    return 1.0 + abs(math.log2(rate / RATES[4])) + 100.0 / tokens + 0.01 * seed


class Machine:
    """Members that train 50 tokens a tick in so many slots, as a loop would; keeps what it did."""

    def __init__(self, director: Director, slots: int, bad: tuple[str, ...] = (), tokens: int = FULL):
        self.director, self.slots, self.bad, self.full = director, slots, bad, tokens
        self.tokens: dict[str, int] = {}
        self.running: list[str] = []
        self.orders: list[Order] = []
        self.ended: dict[str, tuple[str, int]] = {}

    def run(self, most_ticks: int = 10_000) -> Machine:
        self.take_orders()
        while self.running and most_ticks:
            self.tick()
            most_ticks -= 1
        return self

    def take_orders(self) -> None:
        while order := self.director.next(free=len(self.running) < self.slots, idle=not self.running):
            self.orders.append(order)
            if order.action == "dismiss":
                self.end(order.member, "stopped", order.reason)
                continue
            assert len(self.running) < self.slots
            assert order.member not in self.running
            if order.action == "start":
                assert order.member not in self.tokens
                self.tokens[order.member] = 0
                self.director.started(order.member, self.full)
            self.running.append(order.member)

    def tick(self) -> None:
        reports = []
        for member in list(self.running):
            before, self.tokens[member] = self.tokens[member], self.tokens[member] + 50
            if member in self.bad and self.tokens[member] >= 150:
                self.end(member, "retired", "loss nan")
                continue
            if self.tokens[member] >= self.full:
                self.end(member, "done")
                continue
            levels = self.director._trials.levels
            passed = [place for place, level in enumerate(levels) if before < level <= self.tokens[member]]
            if passed:
                loss = loss_of(self.director, member, self.tokens[member])
                reports.append(Report(member, passed[-1], self.tokens[member], loss))
        verdicts = self.director.judge(reports) if reports else {}
        for member, verdict in verdicts.items():
            if verdict.judgement == "wait":
                self.running.remove(member)
            elif verdict.judgement == "stop":
                self.end(member, "stopped", verdict.reason)
        self.take_orders()

    def end(self, member: str, state: str, reason: str = "") -> None:
        if member in self.running:
            self.running.remove(member)
        self.ended[member] = state, self.tokens[member]
        loss = None if state == "retired" else loss_of(self.director, member, self.tokens[member])
        self.director.ended(Ending(member, state, reason, self.tokens[member], loss, {"perplexity": 2.0}))


def states(director: Director) -> dict[int, str]:
    return {entry.trial: entry.state for entry in director.entries()}


def survivors(director: Director) -> dict[float, int]:
    """Tokens of each rate."""
    return {entry.values["train.learning_rate"]: entry.tokens for entry in director.entries()}


def test_an_optimizer_and_a_setting_of_its_own_vary_in_any_order() -> None:
    space = {"train.optimizer.momentum": [0.5, 0.9], "train.optimizer": ["sgd", {"name": "rmsprop", "centered": True}]}
    config = load_config({"base": "b", "data": {"train": "t"}, "output": "o", "sweep": {"space": space}})
    trials = Trials(config, parse_space(space))
    for optimizer, name in zip(space["train.optimizer"], ("sgd", "rmsprop"), strict=True):
        values = {"train.optimizer.momentum": 0.5, "train.optimizer": optimizer}
        for ordered in (values, dict(reversed(values.items()))):
            chosen = trials.config("trial-000", ordered).train.optimizer
            assert (chosen.name, chosen.own().momentum) == (name, 0.5)
    wrong = {"train.optimizer": ["adamw"], "train.optimizer.momentum": [0.5]}
    with pytest.raises(ConfigError, match="adamw has no such setting"):
        Trials(config, parse_space(wrong))


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
def test_halving_keeps_the_same_trials_however_many_slots_there_are(slots: int) -> None:
    director = direct()
    machine = Machine(director, slots).run()
    assert sorted(states(director).values()) == ["done"] + ["stopped"] * 8
    assert survivors(director) == survivors(Machine(direct(), 9).run().director)
    best = director.best()
    assert best is not None
    assert best.values == {"train.learning_rate": RATES[4]}
    assert best.state == "done"
    assert machine.ended[best.member] == ("done", FULL)
    stopped = [entry for entry in director.entries() if entry.state == "stopped"]
    assert {entry.tokens for entry in stopped} == {100, 300}
    assert all("judged at 100" in entry.reason or "judged at 300" in entry.reason for entry in stopped)
    # 9 members of 100 tokens, 3 that go on to 300, 1 that goes on to 900
    assert sum(entry.tokens for entry in director.entries()) == 9 * 100 + 3 * 200 + 600
    assert sum(entry.full_tokens for entry in director.entries()) == 9 * FULL


@pytest.mark.parametrize("stop", sorted(RULES))
@pytest.mark.parametrize("slots", [1, 3])
def test_every_rule_ends_every_trial_and_finds_the_best(stop: str, slots: int) -> None:
    director = direct(stop)
    Machine(director, slots).run()
    assert set(states(director).values()) <= {"done", "stopped"}
    assert len(director.trials) == 9
    best = director.best()
    assert best is not None
    if stop == "none":
        assert set(states(director).values()) == {"done"}
    if stop != "asha":  # with few slots it may drop the best before it has met it
        assert best.values == {"train.learning_rate": RATES[4]}


@settings(max_examples=examples(40), deadline=None)
@given(
    stop=st.sampled_from(sorted(RULES)),
    slots=st.integers(1, 5),
    ticks=st.integers(0, 120),
    bad=st.sets(st.integers(0, 8), max_size=4),
)
def test_a_director_made_again_from_its_journal_goes_on_as_if_nothing_had_happened(
    stop: str, slots: int, ticks: int, bad: set[int]
) -> None:
    names = tuple(f"trial-{number:03d}" for number in bad)
    whole = Machine(direct(stop), slots, names).run()
    first = Machine(direct(stop), slots, names).run(ticks)
    kept = json.loads(json.dumps(first.director.state()))
    again = Machine(direct(stop), slots, names)
    again.director.restore(kept)
    assert again.director.state() == kept
    assert again.director.entries() == first.director.entries()
    again.tokens, again.running, again.orders, again.ended = first.tokens, first.running, first.orders, first.ended
    again.run()
    assert again.orders == whole.orders
    assert again.ended == whole.ended
    assert again.director.entries() == whole.director.entries()


def test_a_member_that_is_retired_holds_nobody_up() -> None:
    director = direct()
    Machine(director, 3, bad=("trial-001", "trial-002")).run()
    found = states(director)
    assert [found[1], found[2]] in (["retired", "retired"], ["stopped", "retired"], ["retired", "stopped"],
                                    ["stopped", "stopped"])  # fmt: skip
    assert "done" in found.values()
    assert set(found.values()) <= {"done", "stopped", "retired"}


def test_trials_that_end_before_a_level_count_there_and_hold_nobody_up() -> None:
    director = direct()
    Machine(director, 4, tokens=200).run()  # the second level lies at 300
    assert "done" in states(director).values()
    assert set(states(director).values()) == {"done", "stopped"}


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_trial_of_several_members_is_judged_by_their_mean_once_all_have_come(slots: int) -> None:
    director = direct(sweep={"repeats": 2, "folds": 2}, data={"train": "t"})
    Machine(director, slots).run()
    best = director.best()
    assert best is not None
    assert best.values == {"train.learning_rate": RATES[4]}
    assert best.members == tuple(
        f"trial-{best.trial:03d}.seed-{seed}.fold-{fold}" for seed in (1, 2) for fold in (1, 2)
    )
    losses = [loss_of(director, member, FULL) for member in best.members]
    assert best.loss == pytest.approx(sum(losses) / 4)
    assert best.spread == pytest.approx(0.01 / math.sqrt(3))
    assert best.member == best.members[0]
    for entry in director.entries():
        own = {director.members[member].tokens for member in entry.members}
        assert len(own) == 1  # all members of a trial are stopped at the same level


def test_the_configurations_of_members_differ_in_seed_and_fold_and_hold_out_the_same_rows() -> None:
    director = direct(sweep={"repeats": 2, "folds": 3}, data={"train": "t"}, train={"seed": 7})
    director.next(free=True, idle=True)
    found = [director.config(member) for member in director.trials[0].members]
    assert [(one.train.seed, one.data.fold) for one in found] == [
        (seed, f"{fold}/3") for seed in (7, 8) for fold in (1, 2, 3)
    ]
    assert {one.data.split_seed for one in found} == {7}
    assert {one.sweep for one in found} == {None}
    assert {one.evaluate.at_tokens for one in found} == {(100, 300)}


def test_a_trial_whose_values_do_not_go_together_is_out_and_the_others_go_on() -> None:
    space = {"train.accumulate": [1, 4], "train.rows_per_step": [1, 4]}
    director = direct(sweep={"space": space})
    Machine(director, 2).run()
    out = [entry for entry in director.entries() if entry.state == "retired"]
    assert [entry.values for entry in out] == [{"train.accumulate": 4, "train.rows_per_step": 1}]
    assert "train.accumulate is 4" in out[0].reason
    assert out[0].tokens == 0
    assert sum(entry.state in ("done", "stopped") for entry in director.entries()) == 3


def test_a_member_that_cannot_be_made_is_out_too() -> None:
    director = direct()
    order = director.next(free=True, idle=True)
    assert order is not None
    assert director.failed(order.member, "no site matches")
    Machine(director, 2).run()
    assert states(director)[0] == "retired"
    assert director.entry(0).reason == "no site matches"
    assert "done" in states(director).values()


def test_what_onlookers_see_decides_nothing() -> None:
    director = direct()
    order = director.next(free=True, idle=True)
    assert order is not None
    journal = json.dumps(director.journal)
    director.seen(order.member, 42, 0.5)
    assert (director.entry(0).tokens, director.entry(0).loss) == (42, 0.5)
    assert json.dumps(director.journal) == journal


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"adapter.rnak": [1]}, ["adapter.rnak", "adapter.rank"]),
        ({"adapter.rank": [4, -1]}, ["sweep.space.adapter.rank, value -1", "at least 1"]),
        ({"quantize": ["nf4", None]}, ["sweep.space varies quantize", "one base"]),
        ({"data.eval": ["a", "b"]}, ["sweep.space varies data.eval", "same held-out rows"]),
        ({"train.learning_rate": {"low": -1.0, "high": 1.0}}, ["value -1.0", "above 0"]),
        ({"sweep.seed": [1, 2]}, ["sweep.space varies sweep.seed"]),
        ({"train.stop_after": [1, 2]}, ["sweep.stop says how long"]),
    ],
)
def test_a_space_that_no_sweep_could_have_is_refused_at_once(space: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        direct(sweep={"space": space})
    for word in words:
        assert word in str(caught.value)


def test_folds_and_held_out_rows_are_not_both_possible() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.folds"):
        direct(sweep={"folds": 2})


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_budget_too_small_for_the_levels_says_so(steps: int) -> None:
    with pytest.raises(ConfigError, match="too few to be judged at 2 levels"):
        levels_of((0.05, 0.1), 1000, steps)
    assert levels_of((0.05, 0.1), 1000, 11) == (50, 100)


def test_directing_needs_no_torch() -> None:
    code = "import sys, manylora.sweeps.director; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
