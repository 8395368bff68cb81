"""The search space: what is written comes back as the very same values, and every mistake is named."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import optuna
import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora import config_text
from manylora.errors import ConfigError
from manylora.sweeps.search import Search
from manylora.sweeps.space import Choices, Range, Space, parse_space


def values_of(space: Space, name: str, num_trials: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    search = Search(name, space, seed=seed, num_trials=num_trials, storage=None, study_name="s")
    return [search.propose(number) for number in range(search.num_trials)]


def same(left: Any, right: Any) -> bool:
    """Equal, of one type all the way down, NaN like NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right or (left != left and right != right)


def equal(left: Any, right: Any) -> bool:
    """Alike to a configuration: 8 and 8.0 are, 1 and true are not."""
    if isinstance(left, list | dict) and type(left) is type(right) and len(left) == len(right):
        if isinstance(left, list):
            return all(map(equal, left, right))
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    return left == right or (left != left and right != right)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(
    ["null", "~", "1", "1e-3", "true", "no", "[a, b]", "{a: 1}", " a ", "", "a\nb", "#", "'", "0x1"]
)
yaml_values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(yaml_values, min_size=1, max_size=6))
def test_choices_of_any_kind_come_back_as_the_very_same_values(written: list[Any]) -> None:
    different = [value for index, value in enumerate(written) if not any(equal(value, v) for v in written[:index])]
    if len(different) < len(written):
        with pytest.raises(ConfigError, match="has a choice twice"):
            parse_space({"key": written})
    written = different
    space = parse_space({"key": written})
    seen = [point["key"] for point in values_of(space, "grid")]
    assert len(seen) == len(written)
    assert all(any(same(value, found) for found in seen) for value in written)


def test_choices_of_every_yaml_kind_survive_each_search_and_its_file(tmp_path) -> None:
    written = [4, 4.5, "4", None, True, "null", ["q_proj", "v_proj"], {"q_proj": 8}, [], {}, "", -0.5, "1e-3", 10**20]
    space = parse_space({"key": written})
    for name in ("grid", "random", "tpe"):
        file = tmp_path / f"{name}.log"
        make = lambda name=name, file=file: Search(  # noqa: E731
            name, space, seed=3, num_trials=len(written), storage=file, study_name="s"
        )
        first = make()
        seen = [first.propose(number)["key"] for number in range(len(written))]
        again = make()
        assert all(same(again.propose(number)["key"], value) for number, value in enumerate(seen))
        assert all(any(same(value, found) for found in seen) for value in written)


def test_a_caller_who_changes_a_value_does_not_change_the_space() -> None:
    written = [["q_proj"]]
    space = parse_space({"adapter.sites": written})
    search = Search("grid", space, seed=0, num_trials=None, storage=None, study_name="s")
    search.propose(0)["adapter.sites"].append("v_proj")
    written[0].append("k_proj")
    assert search.propose(0) == {"adapter.sites": ["q_proj"]}


def test_labels_are_the_inline_yaml_of_the_choices() -> None:
    dimension = parse_space({"k": [8, "8", None, ["a", 1.5], {"b": True}]}).dimensions["k"]
    assert isinstance(dimension, Choices)
    assert dimension.labels == ("8", "'8'", "null", "[a, 1.5]", "{b: true}")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{low: 1, high: 9}", Range(1, 9, False, None, None, True)),
        ("{low: 1, high: 9, log: true}", Range(1, 9, True, None, None, True)),
        ("{low: 1, high: 9, step: 2}", Range(1, 9, False, 2, None, True)),
        ("{low: 1, high: 9, step: 0.5}", Range(1, 9, False, 0.5, None, False)),
        ("{low: 1, high: 9.0}", Range(1, 9.0, False, None, None, False)),
        ("{low: 1e1, high: 90}", Range(10.0, 90, False, None, None, False)),
        ("{low: 1e-5, high: 1e-2, log: true, num: 4}", Range(1e-5, 1e-2, True, None, 4, False)),
        ("{low: '1e-5', high: '1'}", Range(1e-5, 1, False, None, None, False)),
        ("{low: 1, high: 9, step: null, num: null, log: false}", Range(1, 9, False, None, None, True)),
    ],
)
def test_a_range_is_whole_where_all_its_numbers_are(written: str, expected: Range) -> None:
    space = parse_space({"k": config_text.parse(written, "test")})
    assert space.dimensions == {"k": expected}
    kind = optuna.distributions.IntDistribution if expected.whole else optuna.distributions.FloatDistribution
    assert type(space.distributions()["k"]) is kind
    drawn = [trial["k"] for trial in values_of(parse_space({"k": {**_given(expected)}}), "random", 5)]
    assert all(type(value) is (int if expected.whole else float) for value in drawn)
    assert all(expected.low <= value <= expected.high for value in drawn)


def _given(expected: Range) -> dict[str, Any]:
    names = ("low", "high", "log", "step")
    return {name: getattr(expected, name) for name in names if getattr(expected, name) is not None}


@pytest.mark.parametrize(
    ("written", "points"),
    [
        ({"low": 1e-4, "high": 1e-2, "log": True, "num": 3}, [1e-4, 1e-3, 1e-2]),
        ({"low": 0.0, "high": 0.3, "num": 4}, [0.0, 0.1, 0.2, 0.3]),
        ({"low": 0, "high": 1, "step": 0.1}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ({"low": 0.1, "high": 1, "step": 0.4}, [0.1, 0.5, 0.9]),
        ({"low": 4, "high": 64, "log": True, "num": 5}, [4, 8, 16, 32, 64]),
        ({"low": 1, "high": 3, "num": 9}, [1, 2, 3]),
        ({"low": 1, "high": 8, "step": 3}, [1, 4, 7]),
        ({"low": 3, "high": 7, "num": 2}, [3, 7]),
    ],
)
def test_a_grid_visits_the_points_of_a_range_with_both_ends(written: dict, points: list[float]) -> None:
    seen = sorted(trial["k"] for trial in values_of(parse_space({"k": written}), "grid"))
    assert seen == pytest.approx(points, rel=1e-12)
    assert (seen[0], seen[-1]) == (points[0], points[-1])
    if "step" in written:
        distribution = parse_space({"k": written}).distributions()["k"]
        assert distribution.high == points[-1], "where optuna would warn of a range that is no multiple of its step"
        assert seen == points, "0.3, and not 0.30000000000000004"
        assert sorted(trial["k"] for trial in values_of(parse_space({"k": written}), "random", 99)) == points


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ({"a": [1, 2, 3], "b": {"low": 1, "high": 4}}, 12),
        ({"a": {"low": 0.0, "high": 1.0, "step": 0.25}}, 5),
        ({"a": {"low": 0, "high": 10, "step": 4}}, 3),
        ({"a": [1], "b": {"low": 0.0, "high": 1.0}}, None),
    ],
)
def test_the_size_of_a_space_is_the_number_of_its_trials(written: dict, size: int | None) -> None:
    space = parse_space(written)
    assert space.size == size
    for dimension in space.dimensions.values():
        values = dimension.values()
        assert dimension.size == (None if values is None else len(values))


def test_a_log_range_is_drawn_evenly_in_the_logarithm() -> None:
    drawn = values_of(parse_space({"k": {"low": 1e-5, "high": 1e-1, "log": True}}), "random", 200)
    logs = [math.log10(trial["k"]) for trial in drawn]
    assert sum(logs) / 200 == pytest.approx(-3, abs=0.3)
    flat = [trial["k"] for trial in values_of(parse_space({"k": {"low": 0.0, "high": 1.0}}), "random", 200)]
    assert sum(flat) / 200 == pytest.approx(0.5, abs=0.08)


RANGE = {"low": 1.0, "high": 2.0}
WRONG: list[tuple[Any, str]] = [
    ({}, "sweep.space is {}\n  allowed: at least one key with its choices or its range\n  next: for example sweep."),
    (None, "sweep.space is None\n  allowed: at least one key"),
    ({3: [1]}, "sweep.space has the key 3\n  allowed: dotted keys, such as adapter.rank"),
    ({"": [1]}, "sweep.space has the key ''\n"),
    ({"adapter.rank": 8}, "sweep.space.adapter.rank is 8\n  allowed: a list of choices, or a range such as {low: "),
    ({"k": "8, 16"}, "sweep.space.k is '8, 16'\n  allowed: a list of choices"),
    ({"k": []}, "sweep.space.k is []\n  allowed: at least one choice\n  next: add choices or leave the key out"),
    ({"k": [8, 16, 8]}, "sweep.space.k has a choice twice: 8 and 8\n  allowed: different choices\n  next: to train"),
    ({"k": [8, 8.0]}, "sweep.space.k has a choice twice: 8 and 8.0\n"),
    ({"k": [float("nan"), float("nan")]}, "sweep.space.k has a choice twice: nan and nan\n"),
    ({"k": [{"a": 1, "b": [2]}, {"b": [2], "a": 1}]}, "sweep.space.k has a choice twice: {'a': 1, 'b': [2]} and"),
    ({"k": [object]}, "sweep.space.k has a choice that YAML cannot write: "),
    ({"k": {**RANGE, "lgo": True}}, "unknown key 'sweep.space.k.lgo' (its value is True)\n  nearest: low, log\n"),
    (
        {"adapter": {"rank": [4]}},
        "unknown key 'sweep.space.adapter.rank' (its value is [4])\n  allowed: low, high, log",
    ),
    ({"k": {"high": 2}}, "sweep.space.k has no low\n  allowed: a list of choices, or a range"),
    ({"k": {"low": 2}}, "sweep.space.k has no high\n"),
    ({"k": {}}, "sweep.space.k has no low\n"),
    ({"k": {"low": 2, "high": 2}}, "sweep.space.k.low is 2 and sweep.space.k.high is 2\n  allowed: low below high"),
    ({"k": {"low": 3, "high": 2}}, "sweep.space.k.low is 3 and sweep.space.k.high is 2\n  allowed: low below high"),
    ({"k": {"low": "few", "high": 2}}, "sweep.space.k.low is 'few'\n  allowed: a number"),
    ({"k": {"low": True, "high": 2}}, "sweep.space.k.low is True\n  allowed: a finite number"),
    ({"k": {"low": 0, "high": math.inf}}, "sweep.space.k.high is inf\n  allowed: a finite number"),
    ({"k": {"low": None, "high": 1}}, "sweep.space.k.low is None\n  allowed: a finite number"),
    ({"k": {"low": 0, "high": 1, "log": True}}, "sweep.space.k.low is 0 with log: true\n  allowed: above 0"),
    ({"k": {**RANGE, "log": "yes"}}, "sweep.space.k.log is 'yes'\n  allowed: true or false"),
    ({"k": {**RANGE, "log": None}}, "sweep.space.k.log is None\n  allowed: true or false"),
    ({"k": {**RANGE, "step": 0}}, "sweep.space.k.step is 0\n  allowed: above 0 and at most high - low, 1.0"),
    ({"k": {**RANGE, "step": 3}}, "sweep.space.k.step is 3\n  allowed: above 0 and at most high - low, 1.0"),
    ({"k": {**RANGE, "step": "x"}}, "sweep.space.k.step is 'x'\n  allowed: a number"),
    ({"k": {**RANGE, "num": 1}}, "sweep.space.k.num is 1\n  allowed: a whole number of at least 2"),
    ({"k": {**RANGE, "num": 2.0}}, "sweep.space.k.num is 2.0\n  allowed: a whole number of at least 2"),
    ({"k": {**RANGE, "num": True}}, "sweep.space.k.num is True\n  allowed: a whole number of at least 2"),
    ({"k": {**RANGE, "step": 0.5, "num": 3}}, "sweep.space.k has both step and num\n  allowed: one of them"),
    ({"k": {**RANGE, "step": 0.5, "log": True}}, "sweep.space.k has both step and log: true\n  allowed: one of them"),
]


@pytest.mark.parametrize(("written", "message"), WRONG)
def test_a_wrong_space_is_named_with_what_is_allowed(written: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_space(written)
    assert str(caught.value).startswith(message)


def test_one_and_true_are_different_choices() -> None:
    assert parse_space({"k": [1, True, "1", "true", 0, False, None]}).size == 7


def test_two_spaces_with_the_same_description_are_the_same() -> None:
    written = {"a": {"low": 0, "high": 5}, "b": {"low": -1.0, "high": 0.0, "step": 0.5}, "c": [1, "1"]}
    assert parse_space(written).described() == {
        "a": "{low: 0, high: 5}",
        "b": "{low: -1.0, high: 0.0, step: 0.5}",
        "c": "[1, '1']",
    }
    assert parse_space({"a": {"low": 1e-5, "high": 1, "log": True, "num": 3}}).described()["a"] == (
        "{low: 1.0e-05, high: 1, log: true, num: 3}"
    )


def test_spaces_and_rules_import_neither_torch_nor_optuna_and_searches_no_torch() -> None:
    code = (
        "import sys\n"
        "from manylora.sweeps import space, stopping, searches, search\n"
        "space.parse_space({'k': [1]}).size\n"
        "for name in stopping.RULES: stopping.RULES.get(name)\n"
        "assert not {'torch', 'optuna', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "k = space.parse_space({'k': [1, 2]})\n"
        "s = search.Search('tpe', k, seed=0, num_trials=2, storage=None, study_name='s')\n"
        "s.propose(0); s.tell(0, 1.0, 'done'); s.propose(1); s.importances()\n"
        "assert 'optuna' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
