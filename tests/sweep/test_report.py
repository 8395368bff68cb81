from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.pages import run as plain_report
from manylora.pages.charts import BOTTOM, LEFT, RIGHT, TOP
from manylora.runs.events import EventLog
from manylora.sweeps.leaderboard import Entry, ranked
from manylora.sweeps.pages.charts import HEIGHT, WIDTH, MemberCurve, importance_bars, member_curves, spread_chart
from manylora.sweeps.pages.parallel import axis_of, parallel_coordinates
from manylora.sweeps.pages.report import write_report
from manylora.sweeps.pages.shades import fence, mark

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "link", "br"}
ATTACK = '</svg></pre><script>alert("x")</script><b>&'


class Page(HTMLParser):
    """Checks that every tag is closed in order; gathers tags and the text of each section."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {"": ""}
        self.title = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.title = data
            self.sections[data] = ""
        elif "style" not in self.open:
            self.sections[self.title] = self.sections.get(self.title, "") + data + "\n"

    @property
    def text(self) -> str:
        return "\n".join(self.sections.values())

    def count(self, tag: str) -> int:
        return sum(seen == tag for seen, _ in self.seen)

    def lines(self, kind: str) -> int:
        return sum(tag == "path" and attrs.get("class") == kind for tag, attrs in self.seen)


def entry(trial: int, loss: float | None = None, *, repeats: int = 1, **fields) -> Entry:
    name = f"trial-{trial:03d}"
    members = (name,) if repeats == 1 else tuple(f"{name}.seed-{seed}" for seed in range(repeats))
    base = {"member": members[0], "state": "done", "tokens": 1200, "full_tokens": 1200, "members": members}
    return Entry(**{**base, **fields, "trial": trial, "loss": loss})


def make_sweep(folder: Path, entries: list[Entry], *, steps: int = 12, **sweep: Any) -> Path:
    run = folder / "search"
    run.mkdir(parents=True)
    lines = []
    for e in entries:
        for member in e.members:
            for step in range(1, steps * e.tokens // 1200 // len(e.members) + 1):
                record = {"member": member, "step": step, "time": float(step)}
                lines.append({"event": "step", **record, "loss": 5.0 / step + e.trial / 64, "tokens": 100 * step})
                if step % 3 == 0:
                    # the tokens of an evaluation may be the held-out ones: they are no place on the axis
                    lines.append({"event": "eval", **record, "loss": 4.0 / step + e.trial / 64, "tokens": 7_777_777})
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text("base: /models/tiny\nadapter:\n  method: lora\n")
    content = {
        "search": "random",
        "stop": "none",
        "trials": len(entries),
        "seed": 0,
        "entries": [e.to_dict() for e in entries],
        "importances": {},
        "winner": None,
        "tokens": sum(e.tokens for e in entries),
        "full_tokens": sum(e.full_tokens for e in entries),
        "levels": [],
    }
    (run / "sweep.json").write_text(json.dumps(content | sweep))
    return run


def halving(num: int) -> list[Entry]:
    """Trials of which two thirds stop at 300 tokens and two thirds of the rest at 600."""
    entries = []
    for trial in range(num):
        values = {"train.learning_rate": 1e-5 * 1.3**trial, "adapter.rank": 2 ** (trial % 5), "adapter.init": "default"}
        tokens = 1200 if trial % 9 == 0 else 600 if trial % 3 == 0 else 300
        state = "done" if tokens == 1200 else "stopped"
        reason = "" if state == "done" else "not in the best third"
        entries.append(entry(trial, 1.0 + trial / 64, state=state, tokens=tokens, values=values, reason=reason))
    return entries


def finish(run: Path, members: list[str]) -> None:
    summary = {
        "adapters": {member: f"/runs/{member}" for member in members},
        "eval": {member: {"loss": 1.0 + index, "bleu": 40.5 + index} for index, member in enumerate(members)},
        "base_eval": {"loss": 5.0, "bleu": 0.5},
        "tokens_per_s": 4321.0,
        "wall_s": 185.0,
        "peak_bytes": 2**30,
    }
    (run / "summary.json").write_text(json.dumps(summary))


def test_a_finished_sweep_shows_winner_leaderboard_search_curves_importance_and_savings(tmp_path):
    entries = halving(18)
    run = make_sweep(
        tmp_path,
        entries,
        stop={"rule": "successive-halving", "reduction": 3},
        importances={"train.learning_rate": 0.75, "adapter.rank": 0.25},
        winner={"trial": 9},
        levels=[300, 600],
    )
    finish(run, ["trial-009", "trial-000"])
    page = Page(write_report(run))
    head = page.sections[""]
    for text in ("random search of 18 trials with successive-halving, finished", "1.1406", "trial 9, base 5", "3m 05s"):
        assert text in head, text
    assert list(page.sections)[1:] == [
        "Leaderboard",
        "Searched values",
        "Curves of all members",
        "What the searched keys explain",
        "What early stop saved",
        "Results of trial-009",
        "Use the adapter",
        "Settings",
    ]
    assert page.sections["Leaderboard"].split()[:9] == [
        *("place", "trial", "state", "tokens", "eval", "loss", "learning_rate", "rank", "init")
    ]
    assert "40.5" in page.sections["Results of trial-009"]
    assert "41.5" not in page.text
    assert "/runs/trial-009" in page.sections["Use the adapter"]
    assert page.lines("won") == 1 + 3  # its key, then once in each drawing
    assert page.lines("hit") == 3 * 18
    assert "75%" in page.sections["What the searched keys explain"]
    assert page.count("script") == 0
    assert [v for _, a in page.seen for k, v in a.items() if k in ("src", "href", "action")] == ["data:,"]


def test_savings_are_counted_by_level_and_add_up(tmp_path):
    run = make_sweep(tmp_path, halving(18), stop="asha", levels=[600, 300])
    text = Page(write_report(run)).sections["What early stop saved"]
    # 12 stopped at 300 of 1200 tokens, 4 at 600, 2 trained to their end
    assert "16 of 18 trials were stopped. Trained: 8,400 tokens; all trials to their end: 21,600." in text
    assert "did not train: 13,200 (61%)" in text
    cells = text.split("went on\n")[1].splitlines()
    assert cells[:5] == ["300 tokens", "18", "12", "0", "6"]
    assert cells[5:10] == ["600 tokens", "6", "4", "0", "2"]


def test_trials_that_wait_at_a_level_are_neither_stopped_nor_gone_on(tmp_path):
    entries = [entry(0, 1.0, state="waiting", tokens=300), entry(1, 2.0, state="running", tokens=400)]
    entries.append(entry(2, 3.0, state="waiting", tokens=300))
    text = Page(write_report(make_sweep(tmp_path, entries, stop="asha", levels=[300]))).sections
    assert text["What early stop saved"].split("went on\n")[1].splitlines()[:5] == ["300 tokens", "3", "0", "2", "1"]


def test_the_leaderboard_holds_every_trial_once_and_marks_the_winner_alone(tmp_path):
    entries = [entry(trial, 1.0 + trial / 64) for trial in range(45)]
    page = Page(write_report(make_sweep(tmp_path / "first", entries, winner={"trial": 0})))
    rows = page.sections["Leaderboard"].split("1,200\n")
    assert len(rows) == 46
    assert "25 more trials" in page.sections["Leaderboard"]
    kinds = [attrs["class"] for tag, attrs in page.seen if tag == "table"]
    assert kinds[:2] == ["ranks led", "ranks"]
    # a winner that is not in front is not the first row
    other = Page(write_report(make_sweep(tmp_path / "other", entries, winner={"trial": 3})))
    assert [attrs["class"] for tag, attrs in other.seen if tag == "table"][:2] == ["ranks", "ranks"]


def test_training_loss_is_smoothed_and_levels_are_drawn_only_where_a_rule_judges(tmp_path):
    noisy = [
        {"event": "step", "member": "trial-000", "step": n, "loss": 5.0 - n / 100 + n % 2, "tokens": 10 * n}
        for n in range(1, 401)
    ]
    run = make_sweep(tmp_path, [entry(0, 1.0)], levels=[300])
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in noisy))
    html = write_report(run).read_text(encoding="utf-8")
    assert "judged at" not in html
    ((kind, points, _),) = lines(svg(html.split("<figcaption>Training loss")[1]))
    assert kind == "won"
    # unsmoothed, neighbours are a fifth of the chart apart
    jumps = [abs(y - before) for (_, before), (_, y) in itertools.pairwise(points)][20:]
    assert max(jumps) < (HEIGHT - TOP - BOTTOM) / 40


def test_members_of_a_trial_reach_a_level_by_their_own_tokens(tmp_path):
    two = entry(0, 1.0, repeats=2, tokens=800, full_tokens=2400, state="stopped")
    text = Page(write_report(make_sweep(tmp_path, [two], stop="median", levels=[300, 600]))).sections
    cells = text["What early stop saved"].split("went on\n")[1].splitlines()
    assert cells[1:5] == ["1", "1", "0", "0"]
    assert cells[6:10] == ["0", "0", "0", "0"]


def test_without_early_stop_nothing_is_said_about_it(tmp_path):
    page = Page(write_report(make_sweep(tmp_path, [entry(0, 1.0), entry(1, 2.0)])))
    assert "What early stop saved" not in page.sections
    assert "Saved by early stop" not in page.text


def test_a_half_done_sweep_says_how_far_it_is_and_draws_what_there_is(tmp_path):
    entries = [
        entry(0, 1.5, state="done", values={"a.b": 1}),
        entry(1, 1.2, state="running", tokens=600, values={"a.b": 2}),
        entry(2, None, state="running", tokens=100, values={"a.b": 4}),
        entry(3, None, state="waiting", tokens=0, values={"a.b": 8}),
        entry(4, math.nan, state="retired", tokens=200, values={"a.b": 16}, reason="loss nan at step 2"),
    ]
    page = Page(write_report(make_sweep(tmp_path, entries, trials=9, stop="asha", levels=[300, 600])))
    assert "unfinished, 2 of 9 trials have ended" in page.sections[""]
    assert "1.2000" in page.sections[""]
    assert "Use the adapter" not in page.sections
    assert "loss nan at step 2" in page.sections["Leaderboard"]
    assert "stopped so far" in page.sections["What early stop saved"]
    assert "Saved by early stop" not in page.text
    assert page.lines("no") == 1 + 3 + 2  # the key, three trials without a loss, two of them with a training curve
    assert "trial 3, waiting: no eval loss; b 8" in page.text


@pytest.mark.parametrize("content", ["{}", '{"entries": [], "winner": {}}'])
def test_a_sweep_that_has_just_begun_makes_a_page(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    page = Page(write_report(tmp_path))
    assert "0 of 0 trials have ended" in page.text
    assert page.count("figure") == 0


def test_a_run_that_is_no_sweep_gets_the_page_of_a_plain_run(tmp_path):
    with EventLog(tmp_path) as log:
        log.write("step", member="default", step=1, loss=1.0, tokens=9, learning_rate=1e-3)
    ours = write_report(tmp_path).read_bytes()
    assert ours == plain_report.write_report(tmp_path).read_bytes()
    assert b"ranks" not in ours


def test_text_of_the_user_cannot_become_markup(tmp_path):
    values = [{ATTACK: ATTACK, "list": [ATTACK]}, {ATTACK: 1, "list": None}]
    entries = [
        entry(t, 1.0 + t, repeats=2, member=ATTACK, members=(ATTACK, f"{t}"), values=v, reason=ATTACK, spread=0.1,
              metrics={ATTACK: 1.0}, state="stopped")
        for t, v in enumerate(values)
    ]  # fmt: skip
    run = make_sweep(tmp_path, entries, search=ATTACK, stop=ATTACK, importances={ATTACK: 0.5}, levels=[100])
    finish(run, [ATTACK])
    page = Page(write_report(run))
    assert page.count("script") == page.count("b") == 0
    assert page.text.count('alert("x")') > 20


def test_importances_from_few_trials_are_warned_of_and_those_from_many_are_not(tmp_path):
    few = [entry(trial, 1.0 + trial) for trial in range(19)]
    warned = Page(write_report(make_sweep(tmp_path / "few", few, importances={"a.b": 0.9, "c": math.nan}))).sections
    assert "Only 19 trials were trained to their end" in warned["What the searched keys explain"]
    assert "c\n" not in warned["What the searched keys explain"]
    many = [entry(trial, 1.0 + trial) for trial in range(20)]
    calm = Page(write_report(make_sweep(tmp_path / "many", many, importances={"a.b": 0.9}))).sections
    assert "Only" not in calm["What the searched keys explain"]
    assert "Stopped trials do not count" not in calm["What the searched keys explain"]
    none = Page(write_report(make_sweep(tmp_path / "none", many))).sections
    assert "What the searched keys explain" not in none


def test_a_lead_within_two_standard_errors_is_called_chance(tmp_path):
    def page(gap: float) -> str:
        entries = [entry(t, 1.0 + gap * t, repeats=4, spread=0.1, tokens=4800) for t in range(3)]
        return Page(write_report(make_sweep(tmp_path / str(gap), entries))).sections["Spread over members"]

    # the standard error of the difference is sqrt(2 * 0.01 / 4) = 0.0707
    assert "over every other trial is more than two standard errors" in page(0.1415)
    assert "over 1 trials is within two standard errors, so it may be chance: 1." in page(0.1413)
    assert "may be chance: 1, 2." in page(0.07)


def test_trials_of_one_member_have_no_spread_and_the_page_says_what_that_means(tmp_path):
    page = Page(write_report(make_sweep(tmp_path, [entry(0, 1.0), entry(1, 2.0)])))
    assert "Spread over members" not in page.sections
    assert "sweep.repeats" in page.sections["Leaderboard"]


def test_evaluations_stand_at_the_tokens_that_their_member_had_trained(tmp_path):
    run = make_sweep(tmp_path, [entry(0, 1.0, values={"a": 1})])
    with EventLog(run) as log:
        log.write("eval", member="trial-000", step=99, loss=9.0, tokens=1)
    page = Page(write_report(run))
    assert "trial-000: eval loss 0.33333 after 1,200 tokens; a 1" in page.text
    assert "7.778M" not in page.sections["Curves of all members"]


def test_sixty_four_long_members_make_a_page_of_less_than_half_a_megabyte(tmp_path):
    entries = [entry(t, 1.0 + t / 64, tokens=1200, values={"a.x": 1.1**t, "a.y": t % 7}) for t in range(64)]
    run = make_sweep(tmp_path, entries, steps=1000)
    assert write_report(run).stat().st_size < 500_000


def svg(figure: str) -> ElementTree.Element:
    found = re.search(r"<svg.*?</svg>", figure)
    assert found is not None
    return ElementTree.fromstring(found.group())


def corners(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def lines(root: ElementTree.Element) -> list[tuple[str, list[tuple[float, float]], str]]:
    """Class, corners and tooltip of each trial's line, in the order of drawing."""
    return [
        (line.attrib["class"], corners(line.attrib["d"]), str(group.findtext("title")))
        for group in root.iter("g")
        if group.attrib.get("class") == "trial"
        for line in [group.findall("path")[0]]
    ]


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(-1e6, 1e6),
    st.text(max_size=5),
    st.just("a & <b>"),
)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(0.01, 1e4), st.just(math.nan)),
            st.dictionaries(st.sampled_from(["a.k", "b.k", "c"]), scalars, min_size=1),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_every_line_of_the_parallel_coordinates_is_well_formed_and_inside(found):
    order = ranked(entry(t, loss, values=values) for t, (loss, values) in enumerate(found))
    root = svg(parallel_coordinates(order, order[0].trial))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    drawn = lines(root)
    assert len(drawn) == len(order)
    for _, points, _ in drawn:
        assert points
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_the_winner_is_drawn_last_and_the_others_from_the_worst_on():
    order = ranked(entry(t, 1.0 + t, values={"a": t}) for t in range(16))
    drawn = lines(svg(parallel_coordinates(order, 5)))
    assert [int(text.split(",")[0].removeprefix("trial ")) for _, _, text in drawn] == [
        *range(15, 5, -1), *range(4, -1, -1), 5
    ]  # fmt: skip
    assert [kind for kind, _, _ in drawn][:3] == ["s7", "s7", "s6"]
    assert [kind for kind, _, _ in drawn][-2:] == ["s0", "won"]
    assert drawn[-1][2] == "trial 5, done: eval loss 6, place 6; a 5"


def test_a_line_passes_each_axis_at_its_value_and_skips_what_it_has_not():
    order = ranked(
        [
            entry(0, 1.0, values={"a": 1, "b": "x"}),
            entry(1, 2.0, values={"a": 3}),
            entry(2, None, values={"a": 2, "b": "y"}),
        ]
    )
    points = {text.split(",")[0]: corners for _, corners, text in lines(svg(parallel_coordinates(order, 0)))}
    low, high = points["trial 0"][0][1], points["trial 1"][0][1]
    assert points["trial 2"][0][1] == pytest.approx((low + high) / 2)
    assert low > high
    axes = [x for x, _ in points["trial 0"]]
    assert len(axes) == 3
    assert [x for x, _ in points["trial 1"]] == [axes[0], axes[2]]
    assert [x for x, _ in points["trial 2"]] == axes[:2]
    root = svg(parallel_coordinates(order, 0))
    starts = [group.findall("path")[0].attrib["d"].count("M") for group in root.iter("g")]
    assert sorted(starts) == [1, 1, 2]


def test_without_a_searched_key_there_is_no_drawing():
    assert parallel_coordinates([entry(0, 1.0)], 0) == ""


def test_numbers_over_decades_stand_on_a_log_axis_and_evenly_searched_ones_do_not():
    rates = [10 ** (-5 + 3 * index / 20) for index in range(21)]
    axis = axis_of(rates)
    assert axis.kind == "log"
    assert [axis.place(rate) for rate in rates] == pytest.approx([index / 20 for index in range(21)])
    assert [text for _, text in axis.labels] == ["1e-5", "1e-4", "0.001", "0.01"]
    assert axis_of([4, 8, 16, 64]).kind == "log"
    assert [text for _, text in axis_of([4, 8, 16, 64]).labels] == ["4", "8", "16", "64"]
    assert axis_of([0.01 * index for index in range(1, 30)]).kind == "linear"
    assert axis_of([0.0, 0.05, 0.1]).kind == "linear"
    assert axis_of([8, 16]).kind == "linear"


def test_categories_stand_evenly_numbers_first_and_nothing_is_mistaken_for_a_number():
    axis = axis_of(["b", 16, None, 2, True, [1, 2], "b"])
    assert axis.kind == "category"
    assert [text for _, text in axis.labels] == ["2", "16", "[1, 2]", "b", "null", "true"]
    assert [share for share, _ in axis.labels] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert axis.place([1, 2]) == pytest.approx(0.4)
    assert axis_of(["only"]).place("only") == 0.5
    assert axis_of([3, 3]).place(3) == 0.5


def test_an_outlier_does_not_press_the_others_flat():
    losses = [1.0 + index / 100 for index in range(20)] + [50.0]
    most = fence(losses)
    assert most == pytest.approx(1.19)
    axis = axis_of(losses, most=most)
    assert axis.place(1.19) - axis.place(1.0) > 0.9
    assert axis.place(50.0) == 1.0
    assert axis.labels[-1][1].endswith("or more")
    assert fence([1.0, 2.0, 3.0, 4.0]) == 4.0
    assert fence([7.0]) == 7.0


def test_colours_go_by_place_in_eighths():
    assert [mark(index, 64) for index in (0, 7, 8, 63)] == ["s0", "s0", "s1", "s7"]
    assert [mark(index, 3) for index in range(4)] == ["s0", "s2", "s5", "no"]
    assert mark(0, 1, won=True) == "won"


def test_curves_stand_at_their_tokens_and_diverged_ones_run_along_the_top():
    curves = [MemberCurve(f"m{place}", [(0.0, 2.0), (1000.0, 1.0 + place / 40)], place) for place in range(20)]
    curves.append(MemberCurve("lost <b>", [(0.0, 90.0), (500.0, 99.0)], 20))
    figure = member_curves("Eval loss", curves, num_ranked=21, levels=[250.0, 5000.0])
    assert "what is higher runs along the top" in figure
    root = svg(figure)
    drawn = {text: points for _, points, text in lines(root)}
    assert drawn["m0"][1][0] == pytest.approx(WIDTH - RIGHT)
    assert drawn["lost <b>"] == [(LEFT, TOP), (pytest.approx((LEFT + WIDTH - RIGHT) / 2), TOP)]
    assert drawn["m0"][1][1] - drawn["m19"][1][1] > (HEIGHT - TOP - BOTTOM) / 4
    levels = [p.attrib["d"] for p in root.iter("path") if p.attrib.get("class") == "level"]
    assert [float(d[1:].split(" ")[0]) for d in levels] == pytest.approx([LEFT + (WIDTH - LEFT - RIGHT) / 4], abs=0.1)


def test_a_chart_of_very_many_members_leaves_out_the_worst_and_says_so():
    curves = [MemberCurve(f"m{place}", [(1.0, 1.0 + place)], place) for place in range(260)][::-1]
    figure = member_curves("Eval loss", curves, num_ranked=260)
    names = [text for _, _, text in lines(svg(figure))]
    assert len(names) == 200
    assert "60 worse members left out" in figure
    assert names[-1] == "m0"
    assert 'd="M' in figure
    assert "h0" in figure  # a single point is a dot
    assert member_curves("Eval loss", [MemberCurve("m", [], 0)], num_ranked=1) == ""


def test_bars_are_in_order_and_as_long_as_their_share_of_the_largest():
    html = importance_bars({"b": 0.2, "a<": 0.8, "c": 0.0})
    assert re.findall(r"width:([\d.]+)%", html) == ["100.0", "25.0", "0.0"]
    assert re.findall(r'scope="row">(.*?)</th>', html) == ["a&lt;", "b", "c"]
    assert importance_bars({}) == ""
    assert "width:0.0%" in importance_bars({"a": 0.0})


def test_spread_is_drawn_from_one_deviation_below_the_mean_to_one_above():
    entries = [entry(0, 1.0, repeats=3, spread=0.25), entry(1, 2.0, repeats=3, spread=0.5), entry(2, 9.0)]
    root = svg(spread_chart(entries))
    ends = [tuple(map(float, re.findall(r"M([\d.]+) .*H([\d.]+)", p.attrib["d"])[0]))
            for p in root.iter("path") if p.attrib["class"] == "spread"]  # fmt: skip
    means = [float(circle.attrib["cx"]) for circle in root.iter("circle")]
    assert len(means) == 2
    for (left, right), mean in zip(ends, means, strict=True):
        assert mean == pytest.approx((left + right) / 2, abs=0.1)
    assert ends[1][1] - ends[1][0] == pytest.approx(2 * (ends[0][1] - ends[0][0]), abs=0.3)
    assert spread_chart([entry(0, 1.0)]) == ""
