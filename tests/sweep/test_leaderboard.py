from __future__ import annotations

import csv
import io
import itertools
import json
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from manylora.config_text import dump_inline
from manylora.sweeps.leaderboard import (
    Entry,
    ended_lines,
    ranked,
    searched_keys,
    short,
    short_names,
    table_lines,
    write_csv,
)


def entry(trial: int, loss: float | None = None, **fields) -> Entry:
    name = f"trial-{trial:03d}"
    base = {"member": name, "state": "done", "tokens": 1000, "full_tokens": 1000, "members": (name,)}
    return Entry(**{**base, **fields, "trial": trial, "loss": loss})


losses = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([1.0, 2.0, -0.0, 0.0]))


@given(st.lists(losses, max_size=20).flatmap(lambda found: st.permutations(list(enumerate(found)))))
def test_ranking_is_by_finite_loss_then_by_trial_whatever_the_order_of_the_entries(found):
    order = ranked(entry(trial, loss) for trial, loss in found)
    assert sorted(e.trial for e in order) == sorted(trial for trial, _ in found)
    known = [e for e in order if e.loss is not None and math.isfinite(e.loss)]
    assert order[: len(known)] == known
    for left, right in itertools.pairwise(known):
        assert (left.loss, left.trial) < (right.loss, right.trial)
    rest = [e.trial for e in order[len(known) :]]
    assert rest == sorted(rest)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=("Cc", "Cs", "Co", "Cn"), include_characters="\n\t"), max_size=12),
        st.sampled_from(["1e-3", "null", "yes", "a,b", 'say "x"', "=1+1", "", "- x", "a: b", "#", "a\n b", "\u2028"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b c"]), inner, max_size=2),
    max_leaves=5,
)


@given(values)
@example("a\nb")
@example(["a\nb", {"c": 1e-5}])
def test_a_value_of_any_kind_is_one_line_of_yaml_that_reads_back_as_itself(value):
    text = dump_inline(value)
    assert "\n" not in text
    assert yaml.safe_load(text) == value


def test_the_file_read_back_gives_every_value_best_first(tmp_path):
    searched = [
        {"adapter.rank": 8, "adapter.sites": ["q_proj", "v_proj"], "train.learning_rate": 1e-5},
        {"adapter.rank": None, "adapter.sites": 'all, "linear"\nx', "train.learning_rate": 0.000123456789},
        {"adapter.rank": {"a": [1, 2.5]}, "adapter.sites": "1e-3"},
    ]
    entries = [
        entry(0, 1.25, spread=0.5, metrics={"bleu": 3.5, "perplexity": 3.49, "loss": 9.0, "tokens": 7}),
        entry(1, math.nan, state="retired"),
        entry(2, 0.123456789012345, metrics={"perplexity": math.inf}, tokens=123456),
    ]
    entries = [Entry(**{**e.to_dict(), "loss": e.loss, "values": v}) for e, v in zip(entries, searched, strict=True)]
    path = tmp_path / "leaderboard.csv"
    write_csv(entries, path)
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("place", "trial", "member", "state", "tokens", "eval_loss", "spread", "perplexity", "bleu"),
        *("adapter.rank", "adapter.sites", "train.learning_rate"),
    ]
    assert [row["place"] for row in rows] == ["1", "2", "3"]
    assert [row["trial"] for row in rows] == ["2", "0", "1"]
    assert float(rows[0]["eval_loss"]) == 0.123456789012345
    assert (rows[0]["perplexity"], rows[0]["spread"], rows[2]["eval_loss"]) == ("", "", "")
    assert (rows[1]["bleu"], rows[1]["spread"], rows[0]["tokens"]) == ("3.5", "0.5", "123456")
    for row in rows:
        for key, value in searched[int(row["trial"])].items():
            assert yaml.safe_load(row[key]) == value
    assert rows[0]["train.learning_rate"] == ""


def test_an_empty_leaderboard_is_a_line_of_names(tmp_path):
    write_csv([], tmp_path / "leaderboard.csv")
    found = list(csv.reader(io.StringIO((tmp_path / "leaderboard.csv").read_text())))
    assert found == [["place", "trial", "member", "state", "tokens", "eval_loss", "spread"]]
    assert len(table_lines([])) == 1


def test_an_entry_goes_through_json_and_back():
    first = entry(3, 1.5, spread=0.25, metrics={"bleu": 2.0}, values={"adapter.rank": [1, None]}, reason="x")
    assert Entry.from_dict(json.loads(json.dumps(first.to_dict(), allow_nan=False))) == first
    broken = entry(3, math.nan, spread=math.inf, metrics={"bleu": math.nan})
    plain = json.loads(json.dumps(broken.to_dict(), allow_nan=False))
    assert (plain["loss"], plain["spread"], plain["metrics"]) == (None, None, {"bleu": None})
    assert Entry.from_dict(plain).metrics["bleu"] is None


def test_the_terminal_table_has_equal_columns_the_best_on_top_and_counts_the_rest():
    entries = [entry(trial, 2.0 - trial / 10, values={"adapter.rank": 4, "a.text": "x" * 99}) for trial in range(12)]
    entries[11] = entry(11, 0.5, spread=0.125, values={"adapter.rank": 16, "a.text": "one\ntwo"})
    lines = table_lines(entries, top=10)
    assert len(lines) == 12
    assert lines[0].split() == ["trial", "state", "tokens", "eval", "loss", "rank", "text"]
    assert lines[1].split()[:7] == ["1", "11", "done", "1,000", "0.5000", "sd", "0.1250"]
    assert lines[2].endswith("x...")
    column = lines[0].index("eval loss")
    assert [line[column : column + 6] for line in lines[1:3]] == ["0.5000", "1.0000"]
    assert lines[-1] == "2 more, 2 done"


def test_keys_are_shortened_only_where_that_tells_them_apart():
    assert short_names(["adapter.rank", "train.seed", "sweep.seed"]) == ["rank", "train.seed", "sweep.seed"]
    assert searched_keys([entry(0, values={"b": 1}), entry(1, values={"a": 1, "b": 2})]) == ["b", "a"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (0.25, "0.25"), (16384, "16384"), (None, "null"), (True, "true"), (["a", 1], "[a, 1]")],
)
def test_searched_values_read_at_a_glance(value, text):
    assert short(value) == text


def test_a_trial_that_ends_is_told_once_with_place_values_and_reason_on_one_line():
    entries = [
        entry(0, 2.0, values={"adapter.rank": 8}),
        entry(1, 1.5, state="stopped", tokens=12_000, values={"adapter.rank": 4}, reason="worse\nthan half"),
        entry(2, state="retired", reason="loss nan"),
        entry(3, 1.0, state="running"),
        entry(4, 3.0, state="waiting"),
    ]
    lines = list(ended_lines({0: "running", 1: "waiting"}, entries))
    assert lines == [
        "trial 0 done  1,000 tokens  eval loss 2.0000, place 3 of 5  rank 8",
        "trial 1 stopped  12,000 tokens  eval loss 1.5000, place 2 of 5  rank 4  (worse than half)",
        "trial 2 retired  1,000 tokens  (loss nan)",
    ]
    assert list(ended_lines({0: "done", 1: "stopped", 2: "retired"}, entries)) == []


def test_leaderboard_board_and_report_do_not_import_torch():
    program = (
        "import sys, manylora.sweeps.leaderboard, manylora.sweeps.board, manylora.sweeps.pages.report\n"
        "print([name for name in ('torch', 'optuna', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
