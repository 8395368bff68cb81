from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.pages.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Curve,
    Frame,
    axes,
    line_chart,
    round_ticks,
    running_mean,
    short_number,
    thin,
)
from manylora.pages.run import Overview, read_run, write_page, write_report
from manylora.runs.events import EventLog

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "link", "br"}
ATTACK = '</pre><script>alert("x")</script><b>&'


class Page(HTMLParser):
    """Checks that every tag is closed in order; gathers tags, attributes and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
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
        if "style" not in self.open:
            self.text += data + "\n"

    def count(self, tag: str) -> int:
        return sum(seen == tag for seen, _ in self.seen)


def make_run(folder: Path, members: tuple[str, ...] = ("default",), *, steps: int = 6, finished: bool = True) -> Path:
    run = folder / "first run"
    with EventLog(run) as log:
        for step in range(1, steps + 1):
            for member in members:
                log.write(
                    "step",
                    member=member,
                    step=step,
                    loss=math.nan if step == 2 else 5.0 / step,
                    learning_rate=1e-3 / step,
                    tokens=100 * step,
                    tokens_per_s=4000.0,
                    gradient_norm=1.0,
                    memory_bytes=2**30,
                )
                if step % 3 == 0:
                    log.write("eval", member=member, step=step, loss=4.0 / step, perplexity=20.0, bleu=step, tokens=9)
    (run / "config.yaml").write_text("base: /models/tiny\nadapter:\n  method: lora\n  rank: 8\n")
    (run / "manifest.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "devices": ["cpu", 0]}))
    samples = [{"prompt": "in", "reference": "ref", "base": "old", "adapter": "new", "member": m} for m in members]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if finished:
        summary = {
            "run": str(run),
            "adapters": {member: str(run / "adapters" / member) for member in members},
            "eval": {"loss": 1.25, "perplexity": 3.49, "bleu": 48.25, "tokens": 9},
            "base_eval": {"loss": 5.0, "perplexity": 148.4, "bleu": 0.25, "tokens": 9},
            "tokens": 600,
            "tokens_per_s": 4321.0,
            "wall_s": 185.0,
            "peak_bytes": 2**30,
            "trainable_parameters": 150_000,
            "base_parameters": 6_000_000,
        }
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_a_finished_run_shows_results_curves_samples_settings_and_what_to_do_next(tmp_path):
    run = make_run(tmp_path)
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert page.count("figure") == 7
    for text in (
        "lora of rank 8 on tiny, finished",
        "48.25",
        "-3.75 (-75%)",
        "base 5",
        "3m 05s",
        "1 GiB",
        "2.50% of the base's",
        "rank: 8",
        "versions.torch",
        "cpu, 0",
        f"generate --adapter '{run}/adapters/default' --with-base --prompt in",
        f"train '{run}/config.yaml'",
    ):
        assert text in page.text, text
    for title in ("Training loss", "Eval loss", "Eval perplexity", "Eval BLEU", "Learning rate", "Gradient norm"):
        assert title in page.text


def test_the_page_needs_no_network_and_no_script(tmp_path):
    page = Page(write_report(make_run(tmp_path)))
    assert page.count("script") == 0
    addresses = [v for _, attrs in page.seen for k, v in attrs.items() if k in ("src", "href", "action", "xlink:href")]
    assert addresses == ["data:,"]
    style = write_report(make_run(tmp_path / "b")).read_text(encoding="utf-8").split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme:dark" in style


def test_text_of_the_user_cannot_become_markup(tmp_path):
    run = make_run(tmp_path, members=(ATTACK,))
    (run / "config.yaml").write_text(json.dumps({"base": ATTACK, "adapter": {"method": ATTACK}}))
    (run / "manifest.json").write_text(json.dumps({ATTACK: ATTACK}))
    sample = dict.fromkeys(("prompt", "reference", "base", "adapter", "member"), ATTACK)
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with EventLog(run) as log:
        log.write("eval", member=ATTACK, step=9, **{ATTACK: 1.0})
        log.write("retired", member=ATTACK, step=9, reason=ATTACK)
    page = Page(write_report(run))
    assert page.count("script") == page.count("b") == 0
    assert page.text.count('alert("x")') > 8


def test_a_run_without_summary_says_how_far_it_is(tmp_path):
    page = Page(write_report(make_run(tmp_path, finished=False)))
    assert "unfinished, 6 steps so far" in page.text
    assert "Results" not in page.text
    assert "Use the adapter" not in page.text
    assert page.count("figure") == 7


def test_an_empty_folder_makes_a_page(tmp_path):
    page = Page(write_report(tmp_path))
    assert "unfinished, 0 steps so far" in page.text
    assert page.count("figure") == 0


def test_a_sample_that_is_still_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path, finished=False)
    with (run / "samples.jsonl").open("a") as stream:
        stream.write('{"prompt": "ha')
    assert Page(write_report(run)).count("article") == 1


def test_many_members_get_a_curve_each_and_one_legend(tmp_path):
    members = tuple(f"m{index}" for index in range(8))
    page = Page(write_report(make_run(tmp_path, members)))
    assert page.count("li") == 8
    keys = [attrs for tag, attrs in page.seen if tag == "path" and attrs.get("d") == "M0 4H24"]
    assert len({(key["class"], key.get("stroke-dasharray")) for key in keys}) == 8
    assert "m7, step 1: 5" in page.text


def test_several_members_with_scores_of_their_own_get_rows_of_their_own(tmp_path):
    run = make_run(tmp_path, ("a", "b"))
    summary = json.loads((run / "summary.json").read_text())
    summary["eval"] = {"a": {"loss": 1.5}, "b": {"loss": 2.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    assert "a: Loss" in page.text
    assert "-3 (-60%)" in page.text


def test_members_that_ended_early_are_named_with_the_reason(tmp_path):
    run = make_run(tmp_path)
    with EventLog(run) as log:
        log.write("retired", member="a", step=4, reason="loss nan")
        log.write("done", member="b", step=5, reason="no gain in 3 evaluations")
        log.write("done", member="c", step=6)
    text = Page(write_report(run)).text
    assert "a was retired after step 4: loss nan" in text
    assert "b stopped early after step 5: no gain" in text
    assert "c stopped" not in text


def test_a_long_run_makes_a_small_page(tmp_path):
    run = make_run(tmp_path, steps=20_000)
    assert write_report(run).stat().st_size < 400_000


def test_a_report_replaces_the_one_before(tmp_path):
    run = make_run(tmp_path)
    before = write_report(run).read_text(encoding="utf-8")
    (run / "summary.json").unlink()
    assert write_report(run).read_text(encoding="utf-8") != before


finite = st.floats(-1e9, 1e9, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(finite, finite)
def test_ticks_are_round_enclose_the_values_and_are_few(one, other):
    low, high = sorted((one, other))
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return  # closer than the digits that a label shows
    ticks = round_ticks(low, high)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    digits = f"{ticks[1] - ticks[0]:.6e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "2.5", "5")


@given(st.lists(st.tuples(st.integers(0, 10**6), finite), min_size=1, max_size=60, unique_by=lambda point: point[0]))
def test_every_chart_is_well_formed_and_stays_inside_its_frame(points):
    svg = re.search(r"<svg.*</svg>", line_chart("t", [Curve("a&b", sorted(points))], level=("<base>", 3.0)))
    assert svg is not None
    root = ElementTree.fromstring(svg.group())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for circle in root.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height


def test_a_thinned_curve_keeps_its_ends_and_its_peaks():
    points = [(float(x), 9.0 if x == 5001 else math.sin(x)) for x in range(10_000)]
    kept = thin(points)
    assert len(kept) <= 404
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(y for _, y in kept) == 9.0
    assert thin(points[:50]) == points[:50]


def test_the_running_mean_of_a_constant_is_that_constant_from_the_first_point():
    points = [(float(x), 2.5) for x in range(1000)]
    assert [y for _, y in running_mean(points)] == pytest.approx([2.5] * 1000)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e-4, "2e-4"), (1.25e-5, "1.25e-5"), (0.25, "0.25"), (1500, "1500"), (12000, "12k"), (2.5e6, "2.5M")],
)
def test_numbers_on_axes_are_short(value, text):
    assert short_number(value) == text


def test_an_overview_takes_the_place_of_state_numbers_and_curves_and_adds_its_style(tmp_path):
    run = make_run(tmp_path, ("a", "b"))
    with EventLog(run) as log:
        log.write("retired", member="a", step=4, reason="loss nan")
    summary = json.loads((run / "summary.json").read_text())
    summary["eval"] = {"a": {"loss": 1.5}, "b": {"loss": 2.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    overview = Overview(
        kind="sweep", state="2 of 3", facts=[("Best", "1.5", "")], html=["<p>board</p>"], style=".x{}", member="b"
    )
    path = write_page(read_run(run), overview)
    page = Page(path)
    for text in ("manylora sweep", "2 of 3", "Best", "board", "Results of b", "-3 (-60%)"):
        assert text in page.text, text
    for text in ("was retired", "finished", "3m 05s", "Training loss", "1.5 (", "a: Loss"):
        assert text not in page.text, text
    assert path.read_text(encoding="utf-8").count(".x{}") == 1
    assert page.text.index("board") < page.text.index("Results of b")


def test_the_count_of_ticks_is_no_metric(tmp_path):
    run = make_run(tmp_path)
    with EventLog(run) as log:
        log.write("eval", member="default", step=6, loss=1.0, tick=6)
    assert "Eval tick" not in Page(write_report(run)).text


def test_a_frame_of_another_size_keeps_the_same_margins():
    frame = Frame(10.0, [0.0, 1.0], 800, 500)
    assert (frame.x(0), frame.x(10)) == (LEFT, 800 - RIGHT)
    assert (frame.y(1), frame.y(0)) == (TOP, 500 - BOTTOM)
    drawn = ElementTree.fromstring(f"<svg>{axes(frame)}</svg>")
    places = [float(text.attrib["x"]) for text in drawn.iter("text")]
    assert max(places) > 700
