"""Stopping rules: who goes on, who waits and who is stopped, against theory, a plain reference and each other."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import ConfigError, UnknownName
from manylora.sweeps.stopping import RULES, Rule, StopSettings, Verdict, settings_of

PROMOTING = ["successive-halving", "asha"]
JUDGING = ["median", *PROMOTING]
Losses = Callable[[int, int], float]


def make(name: str, num_trials: int, **given: object) -> Rule:
    return RULES.get(name)(num_trials, settings_of(name, given))


@dataclass
class Sweep:
    """A pretended sweep over a rule: a number of places, and in each tick a few of the running trials report."""

    rule: Rule
    num_trials: int
    loss: Losses
    concurrent: int
    draw: random.Random
    shuffle: bool = False
    """Reports of a tick in another order; nothing else changes."""
    passed: dict[int, int] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    groups: list[tuple[list[tuple[int, int, float]], dict[int, Verdict], str]] = field(default_factory=list)

    def run(self) -> Sweep:
        queue = list(range(self.num_trials))
        running: list[int] = []
        ready: list[int] = []
        while True:
            while len(running) < self.concurrent and (ready or queue):
                running.append(ready.pop(0) if ready else queue.pop(0))
            ended = [trial for trial in running if self.passed.get(trial, 0) == len(self.rule.shares)]
            running = [trial for trial in running if trial not in ended]
            if ended:
                continue
            if running:
                chosen = self.draw.sample(running, self.draw.randint(1, len(running)))
                reports = [(t, self.passed.get(t, 0), self.loss(t, self.passed.get(t, 0))) for t in chosen]
                if self.shuffle:
                    random.Random(1).shuffle(reports)
                for report in reports:
                    self.rule.report(*report)
                verdicts, asked = self.rule.verdicts(), "verdicts"
                running = [trial for trial in running if trial not in chosen]
            elif queue or ready:
                continue
            else:
                reports, verdicts, asked = [], self.rule.finish(), "finish"
            self.groups.append((sorted(reports), verdicts, asked))
            for trial, verdict in sorted(verdicts.items()):
                if verdict == "go":
                    assert trial not in self.stopped
                    self.passed[trial] = self.passed.get(trial, 0) + 1
                    ready.append(trial)
                elif verdict == "stop":
                    assert trial not in self.stopped
                    self.stopped.add(trial)
            if asked == "finish" and not ready:
                return self

    @property
    def finalists(self) -> set[int]:
        return set(range(self.num_trials)) - self.stopped


def synchronous(rule: Rule, num_trials: int, loss: Losses) -> dict[int, int]:
    """How many levels each trial passes when all of a level report together."""
    passed = dict.fromkeys(range(num_trials), 0)
    running = list(passed)
    while running:
        for trial in running:
            if passed[trial] < len(rule.shares):
                rule.report(trial, passed[trial], loss(trial, passed[trial]))
        verdicts = rule.verdicts()
        if "go" not in verdicts.values():
            verdicts |= rule.finish()
        assert "wait" not in verdicts.values() or "go" in verdicts.values()
        running = [trial for trial, verdict in verdicts.items() if verdict == "go"]
        for trial in running:
            passed[trial] += 1
    return passed


def table_of(losses: Sequence[Sequence[float]]) -> Losses:
    return lambda trial, level: losses[trial][level % len(losses[trial])]


any_loss = st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5, math.inf, math.nan]) | st.floats(0, 10)
loss_tables = st.integers(1, 24).flatmap(
    lambda n: st.lists(st.lists(any_loss, min_size=5, max_size=5), min_size=n, max_size=n)
)
# Losses, reduction, places, seed of the order, and how many trials are expected that never come.
sweeps = st.tuples(
    loss_tables, st.integers(2, 4), st.integers(1, 24), st.integers(0, 10**6), st.sampled_from([0, 0, 5])
)


def sweep_of(name: str, drawn: tuple[list[list[float]], int, int, int, int], *, shuffle: bool = False) -> Sweep:
    losses, reduction, concurrent, seed, missing = drawn
    given = {"reduction": reduction} if name in PROMOTING else {"min_reports": reduction}
    rule = make(name, len(losses) + missing, **given)
    return Sweep(rule, len(losses), table_of(losses), concurrent, random.Random(seed), shuffle)


# Levels


@pytest.mark.parametrize("name", PROMOTING)
@pytest.mark.parametrize(
    ("num_trials", "given", "shares"),
    [
        (27, {"first_share": 1 / 27}, [1 / 27, 1 / 9, 1 / 3]),
        (243, {}, [1 / 9, 1 / 3]),
        (9, {}, [1 / 9, 1 / 3]),
        (8, {}, [1 / 3]),
        (64, {"reduction": 4}, [1 / 4]),
        (64, {"reduction": 2}, [1 / 8, 1 / 4, 1 / 2]),
        (12, {"reduction": 12}, [1 / 12]),
        (2, {}, []),
        (1, {}, []),
        (2, {"first_share": 0.05}, [0.05, 0.15, 0.45]),
        (2, {"first_share": 1 / 3}, [1 / 3]),
        (2, {"first_share": 0.5}, [0.5]),
    ],
)
def test_levels_lie_a_reduction_apart_and_leave_a_trial_for_each(
    name: str, num_trials: int, given: dict, shares: list[float]
) -> None:
    assert make(name, num_trials, **given).shares == pytest.approx(shares)


@given(st.integers(1, 500), st.integers(2, 9), st.none() | st.floats(1e-4, 0.999))
def test_shares_rise_and_lie_inside_the_budget(num_trials: int, reduction: int, first: float | None) -> None:
    setting = StopSettings(reduction=reduction, first_share=first)
    for name in RULES:
        shares = RULES.get(name)(num_trials, setting).shares
        assert all(0 < share < 1 for share in shares)
        assert list(shares) == sorted(set(shares))


def test_the_median_rule_judges_each_tenth_after_its_grace() -> None:
    assert make("median", 5).shares == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert make("median", 5, first_share=0.75).shares == pytest.approx([0.75, 0.85, 0.95])


def test_none_has_no_level_and_stops_nobody() -> None:
    rule = make("none", 5)
    assert (rule.shares, rule.verdicts(), rule.finish()) == ((), {}, {})
    with pytest.raises(ValueError, match="trial 2 reports at level 0, and this rule has none"):
        rule.report(2, 0, 1.0)


# Successive halving


@pytest.mark.parametrize(
    ("num_trials", "reduction", "kept"),
    [(27, 3, [9, 3, 1]), (81, 3, [27, 9, 3, 1]), (20, 3, [6, 2]), (16, 4, [4, 1]), (7, 2, [3, 1])],
)
def test_halving_keeps_the_floor_of_each_level(num_trials: int, reduction: int, kept: list[int]) -> None:
    rule = make("successive-halving", num_trials, reduction=reduction, first_share=reduction ** -len(kept))
    passed = synchronous(rule, num_trials, lambda trial, level: (trial * 7) % num_trials)
    assert [sum(count > level for count in passed.values()) for level in range(len(kept))] == kept
    assert len(rule.shares) == len(kept)


def test_halving_of_27_trains_three_full_budgets() -> None:
    rule = make("successive-halving", 27, first_share=1 / 27)
    passed = synchronous(rule, 27, lambda trial, level: -trial)
    spent = sum([*rule.shares, 1.0][count] for count in passed.values())
    assert spent == pytest.approx(81 / 27)


def test_a_level_is_judged_only_when_all_that_entered_have_reported() -> None:
    rule = make("successive-halving", 9)
    for trial in range(8):
        rule.report(trial, 0, trial)
        assert rule.verdicts() == dict.fromkeys(range(trial + 1), "wait")
    rule.report(8, 0, 8)
    assert rule.verdicts() == {trial: "go" if trial < 3 else "stop" for trial in range(9)}
    assert rule.verdicts() == {}
    rule.report(1, 1, 1.0)
    assert rule.verdicts() == {1: "wait"}


def survival(num: int, kept: int, gap: float) -> float:
    """Chance that the best of `num` is among the `kept` least, its reading N(0, 1), the others' N(gap, 1) each."""
    x = np.linspace(-9, 9, 4001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * (1 + math.erf((value - gap) / math.sqrt(2))) for value in x])
    chance = sum(math.comb(num - 1, j) * below**j * (1 - below) ** (num - 1 - j) for j in range(kept))
    return float(np.trapezoid(density * chance, x))


@pytest.mark.parametrize("name", PROMOTING)
@pytest.mark.parametrize("gap", [0.0, 1.0, 2.0])
def test_the_best_survives_noise_as_often_as_theory_says(name: str, gap: float) -> None:
    """Independent noise at each level: the others are alike, so the chances of the levels multiply."""
    expected = math.prod(survival(n, k, gap) for n, k in ((27, 9), (9, 3), (3, 1)))
    if gap == 0:
        assert expected == pytest.approx(1 / 27)
    rounds, draw = 1500, np.random.default_rng(7)
    survived = 0
    for _ in range(rounds):
        noise = draw.standard_normal((27, 3))
        best = int(draw.integers(27))
        loss = noise + gap * (np.arange(27) != best)[:, None]
        rule = make(name, 27, first_share=1 / 27)
        passed = synchronous(rule, 27, lambda trial, level, loss=loss: float(loss[trial, level]))
        survived += passed[best] == 3
    deviation = math.sqrt(expected * (1 - expected) / rounds)
    assert abs(survived / rounds - expected) < 3.5 * deviation


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 30), st.integers(2, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_the_best_of_curves_that_never_cross_always_survives(
    num_trials: int, reduction: int, concurrent: int, seed: int
) -> None:
    draw = random.Random(seed)
    final = draw.sample(range(100), num_trials)
    for name in PROMOTING:
        rule = make(name, num_trials, reduction=reduction)
        loss = lambda trial, level, final=final: final[trial] + 5 * math.exp(-level)  # noqa: E731
        sweep = Sweep(rule, num_trials, loss, concurrent, draw).run()
        assert final.index(min(final)) in sweep.finalists


def test_equal_losses_go_by_trial_number() -> None:
    for name in PROMOTING:
        passed = synchronous(make(name, 9), 9, lambda trial, level: 1.0)
        assert [trial for trial, count in passed.items() if count] == [0, 1, 2]
        assert passed[0] == 2


def test_too_few_trials_for_a_level_still_keep_one() -> None:
    for name in PROMOTING:
        passed = synchronous(make(name, 2, first_share=0.1), 2, lambda trial, level: -trial)
        assert passed == {0: 0, 1: 3}


def test_finish_judges_a_level_by_those_that_came() -> None:
    rule = make("successive-halving", 27)
    for trial in range(7):
        rule.report(trial, 0, trial)
    assert set(rule.verdicts().values()) == {"wait"}
    assert rule.finish() == {0: "go", 1: "go"} | dict.fromkeys(range(2, 7), "stop")
    rule.report(0, 1, 2.0)
    rule.report(1, 1, 1.0)
    assert rule.verdicts() == {1: "go", 0: "stop"}
    rule.report(26, 0, 0.0)
    assert rule.verdicts() == {26: "stop"}, "its level is judged; it must not wait for ever"


def test_finish_after_a_replay_without_it_first_lets_go_and_only_then_judges_the_next_level() -> None:
    rule = make("successive-halving", 27)
    for trial in range(9):
        rule.report(trial, 0, trial)
    rule.report(0, 1, 0.0)  # it was let go by a `finish` that the replay leaves out, and so were 1 and 2
    assert rule.finish() == {1: "go", 2: "go"} | dict.fromkeys(range(3, 9), "stop")
    rule.report(1, 1, 1.0)
    assert rule.verdicts() == {0: "wait", 1: "wait"}
    rule.report(2, 1, 2.0)
    assert rule.verdicts() == {0: "go", 1: "stop", 2: "stop"}


@pytest.mark.parametrize("name", JUDGING)
def test_what_a_stopped_trial_reports_is_not_counted(name: str) -> None:
    rule, plain = make(name, 9), make(name, 9)
    for each in (rule, plain):
        for trial in range(9):
            each.report(trial, 0, trial)
        assert each.verdicts()[8] == "stop"
    rule.report(8, 1, -1.0)
    for each in (rule, plain):
        each.report(0, 1, 1.0)
        each.report(1, 1, 1.0)
    assert rule.verdicts() == plain.verdicts()
    assert rule.finish() == plain.finish()


# ASHA


def test_asha_promotes_as_soon_as_a_trial_is_in_the_top() -> None:
    rule = make("asha", 9)
    seen = []
    for trial, loss in enumerate([5.0, 4.0, 6.0, 3.0, 2.0, 7.0]):
        rule.report(trial, 0, loss)
        seen.append(rule.verdicts())
    assert seen[0] == {0: "wait"}
    assert seen[1] == {0: "wait", 1: "wait"}
    assert seen[2] == {0: "wait", 1: "go", 2: "wait"}
    assert seen[3][3] == "go", "first of four"
    assert seen[4][4] == "go"
    assert seen[5] == {5: "stop"}, "2, 3, 4 and 5 are better, and of nine three go on at most"


def test_asha_stops_at_once_whom_no_later_report_can_promote() -> None:
    rule = make("asha", 9)
    for trial in range(4):
        rule.report(trial, 0, trial)
    assert rule.verdicts() == {0: "go", 1: "wait", 2: "wait", 3: "stop"}
    rule.report(0, 1, 0.0)
    assert rule.verdicts() == {0: "wait", 1: "wait", 2: "wait"}


def test_asha_at_its_end_promotes_the_best_of_a_level_that_promoted_nobody() -> None:
    rule = make("asha", 8, first_share=1 / 9)
    for trial in range(8):
        rule.report(trial, 0, trial)
    assert [trial for trial, verdict in rule.verdicts().items() if verdict == "go"] == [0, 1]
    rule.report(0, 1, 2.0)
    rule.report(1, 1, 1.0)
    assert rule.verdicts() == {1: "wait", 0: "stop"}
    assert rule.finish() == {1: "go"}
    assert rule.finish() == {}


def test_asha_at_its_end_judges_no_level_that_others_were_just_let_into() -> None:
    rule = make("asha", 8, reduction=2)
    rule.report(0, 0, 1.0)
    rule.report(1, 0, 2.0)
    assert rule.verdicts() == {0: "go", 1: "wait"}
    rule.report(0, 1, 1.0)
    assert rule.verdicts() == {0: "wait", 1: "wait"}
    rule.report(2, 0, 0.5)
    rule.report(3, 0, 0.4)
    assert rule.finish() == {2: "go", 3: "go"}


@settings(max_examples=examples(150), deadline=None)
@given(loss_tables, st.integers(2, 4), st.none() | st.floats(0.01, 0.9))
def test_asha_equals_halving_when_each_level_reports_together(
    losses: list[list[float]], reduction: int, first: float | None
) -> None:
    given = {"reduction": reduction, "first_share": first}
    rules = [make(name, len(losses), **given) for name in PROMOTING]
    assert synchronous(rules[0], len(losses), table_of(losses)) == synchronous(rules[1], len(losses), table_of(losses))


class PlainAsha:
    """Algorithm 2 of the paper, and the house's word at the end; nobody is stopped before it."""

    def __init__(self, num_levels: int, reduction: int):
        self.shares = (0.5,) * num_levels
        self.reduction = reduction
        self.losses: list[dict[int, float]] = [{} for _ in range(num_levels)]
        self.promoted: list[set[int]] = [set() for _ in range(num_levels)]

    def report(self, trial: int, level: int, loss: float) -> None:
        self.losses[level][trial] = loss if math.isfinite(loss) else math.inf

    def top(self, level: int, count: int) -> list[int]:
        ranked = sorted(self.losses[level], key=lambda trial: (self.losses[level][trial], trial))[:count]
        return [t for t in ranked if t not in self.promoted[level] and self.losses[level][t] < math.inf]

    def promote(self, level: int, trials: list[int]) -> dict[int, Verdict]:
        self.promoted[level] |= set(trials)
        return dict.fromkeys(trials, "go")

    def verdicts(self) -> dict[int, Verdict]:
        made: dict[int, Verdict] = {}
        for level, losses in enumerate(self.losses):
            made |= self.promote(level, self.top(level, len(losses) // self.reduction))
        return made

    def finish(self) -> dict[int, Verdict]:
        made: dict[int, Verdict] = {}
        for level, promoted in enumerate(self.promoted):
            made |= self.promote(level, self.top(level, 0 if promoted else 1))
        return made


@settings(max_examples=examples(200), deadline=None)
@given(sweeps)
def test_asha_promotes_whom_the_paper_promotes_and_no_other(drawn: tuple) -> None:
    losses, reduction, concurrent, seed, _ = drawn
    ours = sweep_of("asha", drawn).run()
    plain = PlainAsha(len(ours.rule.shares), reduction)
    theirs = Sweep(plain, len(losses), table_of(losses), concurrent, random.Random(seed)).run()  # type: ignore[arg-type]
    assert ours.passed == theirs.passed
    goes = [
        [sorted(t for t, v in verdicts.items() if v == "go") for _, verdicts, _ in s.groups] for s in (ours, theirs)
    ]
    assert goes[0] == goes[1]


# Median


def test_the_median_rule_stops_who_is_worse_than_half_of_the_others() -> None:
    rule = make("median", 6, min_reports=2)
    for trial, loss in enumerate([1.0, 2.0, 3.0, 4.0, 2.5]):
        rule.report(trial, 0, loss)
    # The others of trial 4 have the median 2.5, which is its own loss: a tie goes on.
    assert rule.verdicts() == {0: "go", 1: "go", 2: "stop", 3: "stop", 4: "go"}
    assert rule.verdicts() == {}


def test_the_median_rule_compares_the_best_so_far_with_the_others_now() -> None:
    rule = make("median", 2, min_reports=1)
    for level, (first, second) in enumerate([(1.0, 1.0), (5.0, 2.0)]):
        rule.report(0, level, first)
        rule.report(1, level, second)
        # At the second level trial 0 has 1.0 behind it, and trial 1 is at 2.0 now.
        assert rule.verdicts() == {0: "go", 1: "go"}
    rule = make("median", 2, min_reports=1)
    for level, (first, second, verdict) in enumerate([(1.5, 1.5, "go"), (1.4, 1.6, "stop")]):
        rule.report(0, level, first)
        rule.report(1, level, second)
        assert rule.verdicts() == {0: "go", 1: verdict}


def test_the_median_rule_waits_for_enough_others_at_the_level() -> None:
    rule = make("median", 9)
    for trial in range(4):
        rule.report(trial, 0, 1.0)
    assert set(rule.verdicts().values()) == {"go"}
    rule.report(4, 0, 2.0)
    assert rule.verdicts() == {4: "stop"}, "four others are enough"


def test_the_median_rule_never_lets_anyone_wait() -> None:
    rule = make("median", 4)
    rule.report(0, 0, 9.0)
    assert rule.verdicts() == {0: "go"}
    assert rule.finish() == {}


# All rules


@pytest.mark.parametrize("name", JUDGING)
@settings(max_examples=examples(60), deadline=None)
@given(drawn=sweeps)
def test_the_order_of_reports_inside_a_tick_does_not_matter(name: str, drawn: tuple) -> None:
    assert sweep_of(name, drawn).run().groups == sweep_of(name, drawn, shuffle=True).run().groups


@pytest.mark.parametrize("name", JUDGING)
@settings(max_examples=examples(60), deadline=None)
@given(drawn=sweeps, cut=st.integers(0, 200))
def test_a_replay_gives_the_same_verdicts(name: str, drawn: tuple, cut: int) -> None:
    sweep = sweep_of(name, drawn).run()
    again = sweep_of(name, drawn)
    for reports, verdicts, asked in sweep.groups:
        for report in reports:
            again.rule.report(*report)
        assert getattr(again.rule, asked)() == verdicts
    # Reports alone, without any call of `finish` up to the cut, and from there as it was: the same trials go on.
    resumed = sweep_of(name, drawn)
    told: dict[int, Verdict] = {}
    for index, (reports, _, asked) in enumerate(sweep.groups):
        for report in reports:
            resumed.rule.report(*report)
        if asked == "verdicts" or index >= cut or index == len(sweep.groups) - 1:
            told |= getattr(resumed.rule, asked)()
    assert {trial for trial, verdict in told.items() if verdict == "stop"} == sweep.stopped


@pytest.mark.parametrize("name", JUDGING)
@settings(max_examples=examples(60), deadline=None)
@given(drawn=sweeps)
def test_every_trial_ends_with_a_word_and_the_dead_never_go_on(name: str, drawn: tuple) -> None:
    sweep = sweep_of(name, drawn).run()
    losses, levels = table_of(drawn[0]), len(sweep.rule.shares)
    for trial in range(sweep.num_trials):
        assert (trial in sweep.stopped) != (sweep.passed.get(trial, 0) == levels)
        assert all(math.isfinite(losses(trial, level)) for level in range(sweep.passed.get(trial, 0)))


@pytest.mark.parametrize("name", JUDGING)
@pytest.mark.parametrize("dead", [math.nan, math.inf, -math.inf])
def test_a_dead_trial_is_stopped_at_once_and_counts_among_those_that_came(name: str, dead: float) -> None:
    rule = make(name, 6, first_share=0.3)
    rule.report(5, 0, dead)
    assert rule.verdicts() == {5: "stop"}
    rule.report(5, 0, 0.0)
    assert rule.verdicts() == {}
    if name in PROMOTING:
        for trial in range(5):
            rule.report(trial, 0, trial)
        assert [t for t, v in rule.verdicts().items() if v == "go"] == [0, 1], "two of six, not one of five"


@pytest.mark.parametrize("name", PROMOTING)
def test_where_all_are_dead_nobody_goes_on(name: str) -> None:
    assert set(synchronous(make(name, 9), 9, lambda trial, level: math.nan).values()) == {0}


@pytest.mark.parametrize("name", PROMOTING)
def test_a_trial_that_finished_early_competes_with_its_final_loss(name: str) -> None:
    """Trial 3 ended before the first level; it is reported again at each that it is let into."""
    rule = make(name, 9)
    curve = {3: [0.5, 0.5]}
    passed = synchronous(rule, 9, lambda trial, level: curve.get(trial, [1.0 + trial, 0.1 + trial])[level])
    assert passed[3] == 1, "first at the first level, behind trial 0 at the second"
    assert passed[0] == 2


@pytest.mark.parametrize("name", JUDGING)
def test_the_first_report_at_a_level_counts(name: str) -> None:
    rule = make(name, 3)
    rule.report(0, 0, 1.0)
    rule.report(0, 0, math.nan)
    assert rule.verdicts()[0] != "stop"


@pytest.mark.parametrize("name", JUDGING)
def test_what_cannot_have_been_is_refused(name: str) -> None:
    rule = make(name, 9)
    with pytest.raises(ValueError, match="trial 9 is reported, and the sweep has 9, counted from 0"):
        rule.report(9, 0, 1.0)
    with pytest.raises(ValueError, match=r"trial 0 reports at level 99, and there are \d, counted from 0"):
        rule.report(0, 99, 1.0)
    with pytest.raises(ValueError, match="trial 0 reports at level 1 without a report at level 0"):
        rule.report(0, 1, 1.0)


# Settings

CHANGED = {"reduction": 2, "first_share": 0.4, "min_reports": 1}


def test_every_setting_is_read_by_a_rule() -> None:
    assert set(CHANGED) == {field.name for field in fields(StopSettings)}
    assert {name for rule in RULES for name in RULES.get(rule).reads} == set(CHANGED)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in RULES for key in sorted(RULES.get(name).reads)])
def test_every_setting_that_a_rule_reads_changes_what_it_does(name: str, key: str) -> None:
    def seen(**given: object) -> object:
        rule = make(name, 9, **given)
        for trial in range(3):
            rule.report(trial, 0, trial)
        return rule.shares, rule.verdicts(), rule.finish()

    assert seen() != seen(**{key: CHANGED[key]})


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_setting_that_a_rule_does_not_read_is_refused(name: str) -> None:
    for key in set(CHANGED) - RULES.get(name).reads:
        with pytest.raises(ConfigError, match=rf"sweep\.stop\.{key} is .*, and the rule '{name}' does not read it"):
            settings_of(name, {key: CHANGED[key]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reduktion": 3}, "unknown key 'sweep.stop.reduktion' (its value is 3)\n  nearest: reduction\n"),
        ({"reduction": 1}, "sweep.stop.reduction is 1\n  allowed: a whole number of at least 2"),
        ({"reduction": 2.5}, "sweep.stop.reduction is 2.5\n  allowed: a whole number of at least 2"),
        ({"reduction": True}, "sweep.stop.reduction is True\n  allowed: a whole number of at least 2"),
        (
            {"first_share": 0},
            "sweep.stop.first_share is 0\n  allowed: a share of the token budget, above 0 and below 1",
        ),
        ({"first_share": 1.0}, "sweep.stop.first_share is 1.0\n  allowed: a share"),
        ({"first_share": True}, "sweep.stop.first_share is True\n  allowed: a share"),
        ({"first_share": "half"}, "sweep.stop.first_share is 'half'\n  allowed: a share"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of("asha", given)
    assert str(caught.value).startswith(message)


def test_other_refusals_say_what_is_allowed() -> None:
    with pytest.raises(
        ConfigError, match=r"allowed: nothing beside rule: none\n  next: leave sweep\.stop\.reduction out"
    ):
        settings_of("none", {"reduction": 3})
    with pytest.raises(ConfigError, match=r"sweep\.stop\.min_reports is 0\n  allowed: a whole number of at least 1"):
        settings_of("median", {"min_reports": 0})
    with pytest.raises(UnknownName, match="no stopping rule is called 'ahsa'\n  nearest: asha"):
        settings_of("ahsa", {})
