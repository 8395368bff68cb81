"""Searches: pure proposals, a journal that survives a kill at any moment, and what optuna reads of it."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.errors import CheckpointBroken, ConfigError, UnknownName
from manylora.sweeps.search import Search
from manylora.sweeps.searches import SEARCHES
from manylora.sweeps.searches.grid import shuffled
from manylora.sweeps.searches.tpe import num_random
from manylora.sweeps.space import parse_space

SPACE: dict[str, Any] = {
    "adapter.rank": [4, 8, 16, 64],
    "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "adapter.sites": [["q_proj", "v_proj"], "all-linear", None],
    "train.steps": {"low": 10, "high": 50, "step": 10},
}
GRID_SPACE = {**SPACE, "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True, "num": 4}}
NUM_TRIALS = 18


def search_of(name: str, storage: Path | None = None, **other: Any) -> Search:
    space = parse_space(other.pop("space", GRID_SPACE if name == "grid" else SPACE))
    given = {"seed": 5, "num_trials": NUM_TRIALS, "storage": storage, "study_name": "s"} | other
    return Search(name, space, **given)


def loss_of(values: dict[str, Any]) -> float:
    return (math.log10(values["train.learning_rate"]) + 3) ** 2 + abs(values["adapter.rank"] - 16) / 64


def step(search: Search, tick: int) -> None:
    """Five trials run at a time; with each proposal the one five before ends, some of them badly."""
    values = search.propose(tick)
    search.report(tick, 100, loss_of(values) + 1)
    ending = tick - 4
    if ending >= 0:
        loss = loss_of(search.propose(ending))
        search.report(ending, 200, loss)
        state = ("done", "stopped", "done", "failed")[ending % 4]
        search.tell(ending, None if state == "failed" else loss, state)  # type: ignore[arg-type]


def proposals(search: Search, first: int = 0) -> list[dict[str, Any]]:
    for tick in range(first, search.num_trials):
        step(search, tick)
    return [search.propose(number) for number in range(search.num_trials)]


# Killed and resumed

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_search import search_of, step
from pathlib import Path
for name in {names!r}:
    search = search_of(name, Path({folder!r}) / (name + ".log"))
    for tick in range(11):
        step(search, tick)
    search.propose(11)
os.kill(os.getpid(), signal.SIGKILL)
"""
RESUMED = """
import json, sys
sys.path.insert(0, {tests!r})
from test_search import search_of, proposals
from pathlib import Path
found = {{name: proposals(search_of(name, Path({folder!r}) / (name + ".log")), 11) for name in {names!r}}}
print(json.dumps(found))
"""


def test_a_killed_search_resumed_in_a_fresh_process_proposes_what_it_would_have(tmp_path: Path) -> None:
    filled = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "names": list(SEARCHES)}
    killed = subprocess.run([sys.executable, "-c", KILLED.format(**filled)], timeout=60, check=False)
    assert killed.returncode == -9
    resumed = subprocess.run(
        [sys.executable, "-c", RESUMED.format(**filled)], timeout=60, check=True, capture_output=True, text=True
    )
    assert resumed.stderr == ""
    found = json.loads(resumed.stdout)
    for name in SEARCHES:
        assert found[name] == proposals(search_of(name)), name


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_a_journal_cut_at_any_byte_resumes_to_the_same_proposals(name: str, tmp_path: Path) -> None:
    file = tmp_path / "optuna.log"
    whole = proposals(search_of(name, file, num_trials=8))
    content = file.read_bytes()
    starts = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    cuts = {*range(0, 40, 7), *starts[::4], *(start + 1 for start in starts[1::5]), *(s - 1 for s in starts[2::4])}
    for cut in sorted(cuts):
        file.write_bytes(content[:cut])
        search = search_of(name, file, num_trials=8)
        assert proposals(search) == whole, cut
        again = search_of(name, file, num_trials=8)
        assert [again.propose(number) for number in range(8)] == whole


def test_a_lock_left_by_a_killed_process_does_not_hold_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("manylora.sweeps.search.LOCK_SECONDS", 3)
    search_of("random", Path("optuna.log")).propose(0)
    Path("optuna.log.lock").touch()
    began = time.monotonic()
    search_of("random", Path("optuna.log")).propose(1)
    assert time.monotonic() - began < 10
    assert not list(tmp_path.glob("*.lock*"))


def test_a_search_keeps_to_its_file_when_the_current_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    search = search_of("random", Path("optuna.log"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    values = search.propose(0)
    assert search_of("random", tmp_path / "optuna.log").propose(0) == values
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Proposals


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_proposals_follow_the_seed_and_nothing_else(name: str) -> None:
    first, again, other = (proposals(search_of(name, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_search_that_is_reopened_before_each_trial_does_not_draw_the_same_again(name: str, tmp_path: Path) -> None:
    """A sampler seeded alike in each process would; here each proposal has a seed of its own."""
    reopened = [search_of(name, tmp_path / "optuna.log").propose(number) for number in range(6)]
    assert len({values["train.learning_rate"] for values in reopened}) == 6
    search = search_of(name)
    assert [search.propose(number) for number in range(6)] == reopened


def test_only_tpe_learns_from_losses() -> None:
    for name in SEARCHES:
        told, untold = search_of(name), search_of(name)
        for number in range(NUM_TRIALS):
            told.propose(number)
            told.tell(number, loss_of(told.propose(number)), "done")
        same = [told.propose(n) for n in range(NUM_TRIALS)] == [untold.propose(n) for n in range(NUM_TRIALS)]
        assert same == (name != "tpe")


def test_tpe_is_random_until_enough_trials_have_ended() -> None:
    assert [num_random(count) for count in (1, 3, 8, 16, 40, 400)] == [1, 1, 2, 4, 10, 10]
    tpe, uniform = search_of("tpe"), search_of("random")
    for number in range(NUM_TRIALS):
        assert (tpe.propose(number) == uniform.propose(number)) == (number < num_random(NUM_TRIALS)), number
        tpe.tell(number, loss_of(tpe.propose(number)), "stopped" if number % 2 else "done")


def test_tpe_finds_better_trials_than_random_search() -> None:
    best = {}
    for name in ("random", "tpe"):
        losses = [min(map(loss_of, proposals(search_of(name, seed=seed, num_trials=40)))) for seed in range(6)]
        best[name] = sum(losses) / len(losses)
    assert best["tpe"] < 0.5 * best["random"]


@pytest.mark.parametrize("state", ["failed", "stopped", "done"])
def test_tpe_keeps_away_from_where_trials_failed(state: str) -> None:
    """Above 1e-3 every trial diverges, a quarter of the range."""
    space = {"train.learning_rate": {"low": 1e-6, "high": 1e-2, "log": True}}
    bad = 0
    for seed in range(4):
        search = search_of("tpe", space=space, num_trials=40, seed=seed)
        for number in range(40):
            rate = search.propose(number)["train.learning_rate"]
            bad += rate > 1e-3 and number >= 20
            if rate > 1e-3:
                search.tell(number, None if state == "failed" else math.inf, state)  # type: ignore[arg-type]
            else:
                search.tell(number, 1.0 + (math.log10(rate) + 4.5) ** 2, "done")
    assert bad <= 4, "of 80; 20 if they were drawn at random"


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_no_trial_repeats_another_until_the_space_is_used_up(name: str) -> None:
    space = {"a": [1, 2, 3], "b": {"low": 1, "high": 2}, "c": {"low": 0.0, "high": 0.4, "step": 0.1}}
    search = search_of(name, space=space, num_trials=1000)
    assert search.num_trials == 30
    seen = Counter()
    for number in range(30):
        values = search.propose(number)
        search.tell(number, values["a"] + values["b"], "done")
        seen[tuple(values.values())] += 1
    assert len(seen) == 30
    assert {values[2] for values in seen} == {0.0, 0.1, 0.2, 0.3, 0.4}


def test_a_grid_visits_every_point_once() -> None:
    search = search_of("grid", num_trials=None)
    assert search.num_trials == 4 * 4 * 3 * 5
    seen = [json.dumps(search.propose(number)) for number in range(search.num_trials)]
    assert len(set(seen)) == search.num_trials


def test_a_smaller_grid_is_the_beginning_of_the_whole_and_spread_over_it() -> None:
    search, whole = search_of("grid", num_trials=60), search_of("grid", num_trials=None)
    points = [search.propose(number) for number in range(60)]
    assert points == [whole.propose(number) for number in range(60)]
    ranks = Counter(point["adapter.rank"] for point in points)
    assert set(ranks) == {4, 8, 16, 64}
    assert min(ranks.values()) >= 8
    assert search_of("grid", num_trials=9999).num_trials == 240


@given(st.integers(1, 60), st.integers(0, 10**9))
def test_a_shuffle_is_a_permutation_and_its_beginning_does_not_depend_on_its_length(size: int, seed: int) -> None:
    whole = shuffled(size, size, seed)
    assert sorted(whole) == list(range(size))
    assert shuffled(size, size // 2, seed) == whole[: size // 2]


def test_a_shuffle_of_billions_costs_what_is_taken() -> None:
    assert len(set(shuffled(10**15, 100, 0))) == 100


def test_trials_are_proposed_in_order() -> None:
    search = search_of("random", num_trials=3)
    with pytest.raises(ValueError, match="trial 1 is asked for before trial 0"):
        search.propose(1)
    for number in (-1, 3):
        with pytest.raises(ValueError, match=rf"trial {number} is asked for, and the search has 3, counted from 0"):
            search.propose(number)
    with pytest.raises(ValueError, match="trial 0 was not proposed; the search has proposed 0"):
        search.report(0, 1, 1.0)
    with pytest.raises(ValueError, match="trial 0 was not proposed; the search has proposed 0"):
        search.tell(0, 1.0, "done")


# What is stored


def test_optuna_opens_the_file_and_sees_the_states_and_curves(tmp_path: Path) -> None:
    search = search_of("random", tmp_path / "optuna.log", study_name="first")
    for number in range(7):
        search.propose(number)
    search.report(0, 100, 2.0)
    search.report(0, 200, 1.0)
    search.report(0, 100, 9.0)
    search.tell(0, 1.0, "done")
    search.tell(0, 5.0, "failed")
    search.report(0, 300, 3.0)
    search.report(1, 100, math.nan)
    search.tell(1, math.nan, "done")
    search.tell(2, 3.0, "stopped")
    search.tell(3, None, "failed")
    search.tell(4, None, "done")
    search.tell(5, 2.5, "failed")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.log"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert study.study_name == "first"
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert [trial.state.name for trial in study.trials] == [
        "COMPLETE",
        "FAIL",
        "PRUNED",
        "FAIL",
        "FAIL",
        "FAIL",
        "RUNNING",
    ]
    assert [trial.value for trial in study.trials] == [1.0, None, 3.0, None, None, None, None]
    assert study.trials[0].intermediate_values == {100: 2.0, 200: 1.0}
    assert math.isnan(study.trials[1].intermediate_values[100])
    assert study.best_trial.params["adapter.sites"] in ("[q_proj, v_proj]", "all-linear", "null")


def test_what_is_repeated_is_not_written_again(tmp_path: Path) -> None:
    file = tmp_path / "optuna.log"
    search = search_of("tpe", file)
    for tick in range(8):
        step(search, tick)
    before = file.read_bytes()
    again = search_of("tpe", file)
    for tick in range(8):
        step(again, tick)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "random"}, "optuna.log holds another search: its search is 'tpe', here it is 'random'\n"),
        (
            {"seed": 6},
            "optuna.log holds another search: its seed is 5, here it is 6\n  allowed: the configuration that",
        ),
        ({"space": {"k": [1]}}, "optuna.log holds another search: its space is {'adapter.rank': '[4, 8, 16, 64]'"),
    ],
)
def test_a_file_of_another_search_is_refused(
    other: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    search_of("tpe", Path("optuna.log")).propose(0)
    with pytest.raises(ConfigError) as caught:
        search_of(**({"name": "tpe", "storage": Path("optuna.log")} | other))
    assert str(caught.value).startswith(message)
    assert "next: resume with that one, or set another output" in str(caught.value)


def test_more_trials_than_at_first_continue_the_same_search(tmp_path: Path) -> None:
    first = search_of("random", tmp_path / "optuna.log", num_trials=4)
    begun = [first.propose(number) for number in range(4)]
    more = search_of("random", tmp_path / "optuna.log", num_trials=9)
    assert [more.propose(number) for number in range(4)] == begun
    straight = search_of("random", num_trials=9)
    assert [more.propose(number) for number in range(9)] == [straight.propose(number) for number in range(9)]


@pytest.mark.parametrize("content", [b"hello\n", b'{"a": 1}\n', b"[1, 2]\n", b"just text", b'{"op": 1'])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "optuna.log"
    file.write_bytes(content)
    with pytest.raises(CheckpointBroken, match=r"optuna\.log is no journal of optuna: "):
        search_of("random", file)
    assert file.read_bytes() == content


# Importances


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_the_key_that_decides_has_the_largest_importance(name: str) -> None:
    space: dict[str, Any] = {
        "noise": [1, 2, 3],
        "rate": {"low": 1e-5, "high": 1e-1, "log": True, "num": 8},
        "flat": [0.1, 0.2],
    }
    if name != "grid":
        del space["rate"]["num"]
    search = search_of(name, space=space, num_trials=40)
    for number in range(search.num_trials):
        rate = search.propose(number)["rate"]
        search.tell(number, abs(math.log10(rate) + 3), "done" if number % 3 else "stopped")
    found = search.importances()
    assert next(iter(found)) == "rate"
    assert found["rate"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert set(found) == set(space)


def test_importances_of_too_few_trials_are_none() -> None:
    search = search_of("random")
    for number in range(5):
        search.propose(number)
    for number, loss in enumerate([1.0, 2.0, 3.0, math.inf]):
        search.tell(number, loss, "done")
    assert search.importances() == {}
    search.tell(4, 1.5, "stopped")
    assert set(search.importances()) == set(SPACE)


# Refusals and silence


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("random", {"num_trials": None}, "sweep.trials is not given, and search: random has no end of its own\n"),
        ("tpe", {"num_trials": None}, "sweep.trials is not given, and search: tpe has no end of its own\n"),
        ("grid", {"num_trials": 0}, "sweep.trials is 0\n  allowed: at least 1"),
        (
            "grid",
            {"space": SPACE},
            (
                "sweep.space.train.learning_rate is {low: 1.0e-05, high: 0.01, log: true}, and search: grid "
                "needs to know its points\n"
                "  allowed: num (how many, both ends included), step (how far apart), or a list of choices\n"
                "  next: for example sweep.space.train.learning_rate: {low: 1.0e-05, high: 0.01, log: true, num: 4}"
            ),
        ),
        (
            "tpe",
            {"space": GRID_SPACE},
            "sweep.space.train.learning_rate.num is 4, and sweep.search is tpe\n  allowed: num only with search: grid",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused(name: str, other: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search_of(name, **other)
    assert str(caught.value).startswith(message)


def test_an_unknown_search_is_refused_with_near_names() -> None:
    with pytest.raises(UnknownName, match="no search is called 'gird'\n  nearest: grid"):
        search_of("gird")


def test_optuna_says_nothing_and_its_settings_stay_as_they_were(tmp_path: Path) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logging.getLogger("optuna").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in SEARCHES:
                search = search_of(name, tmp_path / f"{name}.log")
                proposals(search)
                search.importances()
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        logging.getLogger("optuna").removeHandler(handler)
        optuna.logging.set_verbosity(before)
    assert caught == []
    assert said == []
