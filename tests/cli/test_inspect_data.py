"""`manylora inspect DATA`, run in this process with the builtin tokenizer or that of the tiny base."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from manylora.cli import app

ROWS = [
    {"prompt": "Where is it?\n", "completion": "By the river."},
    {"prompt": "Who is it?", "completion": " Ann."},
    {"prompt": "Who is it?", "completion": " Ann."},
    {"prompt": "Who is it?", "completion": " Bob \N{GRINNING FACE}"},
]


@pytest.fixture
def inspect(capsys, monkeypatch, tmp_path):
    """Runs `manylora inspect` and returns its code, its lines and, with --json, its object."""
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def command(*words):
        capsys.readouterr()
        code = app.run(["inspect", *map(str, words)])
        shown = capsys.readouterr()
        result = json.loads(shown.out) if "--json" in words and code != 1 and shown.out else None
        return SimpleNamespace(code=code, out=shown.out, err=shown.err, result=result)

    return command


@pytest.fixture
def data(tmp_path):
    """Writes rows into the folder in which the command runs."""

    def write(name="train.jsonl", rows=ROWS):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return name

    return write


def test_what_is_learned_stands_in_brackets_with_line_ends_and_the_end_token(inspect, data):
    done = inspect(data())
    assert done.code == 0
    assert "Where is it?\N{RETURN SYMBOL}\n[[By the river.<|endoftext|>]]" in done.out
    assert "Who is it?[[ Ann.<|endoftext|>]]" in done.out
    assert "what stands in [[ ]] is learned" in done.out
    assert "builtin:tiny-en (as none is named" in done.out
    assert done.out.rstrip().endswith("all 4 rows can be learned from")


def test_rows_and_row_choose_what_is_shown(inspect, data):
    name = data()
    assert len(re.findall(r"train.jsonl:\d  \(", inspect(name).out)) == 3
    only = inspect(name, "--row", 4)
    assert " Bob \N{GRINNING FACE}<|endoftext|>]]" in only.out
    assert "Where is it" not in only.out
    both = inspect(name, "--row", 4, "--row", 2, "--rows", 1)
    assert re.findall(r"train.jsonl:(\d)  \(", both.out) == ["1", "4", "2"]
    assert "train.jsonl:1  (" not in inspect(name, "--rows", 0).out


def test_bad_rows_are_all_told_and_leave_with_0_unless_strict(inspect, data):
    rows = [*ROWS, '{"prompt": "a" "b"}', {"prompt": "x"}, {"prompt": "", "completion": ""}, {"prompt": "y"}]
    name = data(rows=rows)
    done = inspect(name, "--json")
    assert done.code == 0
    assert done.result["bad_rows"] == 4
    reasons = done.result["sources"][0]["skipped"]
    assert sum(reason["count"] for reason in reasons) == 4
    assert {reason["where"] for reason in reasons} == {"train.jsonl:5", "train.jsonl:6", "train.jsonl:7"}
    text = inspect(name, "--strict")
    assert text.code == 2
    for reason in reasons:
        assert reason["kind"] in text.out
        assert reason["what"] in text.out
    assert "4 of 8 rows cannot be learned from: training refuses the data unless data.on_bad_row is skip" in text.out
    strict = inspect(name, "--strict", "--json")
    assert (strict.code, strict.result["bad_rows"]) == (2, 4)
    assert inspect(data("good.jsonl"), "--strict").code == 0


def test_a_row_that_is_asked_for_and_bad_is_told_in_full(inspect, data):
    done = inspect(data(rows=[*ROWS, {"prompt": "x", "completion": ""}]), "--row", 5)
    assert "no example: train.jsonl:5: completion is empty" in done.out
    none = inspect("train.jsonl", "--row", 9)
    assert none.code == 2
    assert "no row begins at line 9; the row before it begins at line 5" in none.err


def test_repeats_answers_and_leakage_are_in_the_json_and_the_text(inspect, data):
    held_out = data("eval.jsonl", [{"prompt": "who is it", "completion": " Eve"}, {"prompt": "b", "completion": "c"}])
    done = inspect(data(), "--eval", held_out, "--json").result
    assert done["repeats"]["exact"]["num_repeats"] == 1
    assert done["repeats"]["exact"]["groups"][0]["places"] == ["train.jsonl:2", "train.jsonl:3"]
    assert done["repeats"]["answers"]["num_examples"] == 3
    assert (done["leakage"]["num_prompt"], done["leakage"]["num_prompt_alike"]) == (0, 1)
    text = inspect("train.jsonl", "--eval", held_out).out
    assert "1 of 2 (50.0%) have a prompt alike" in text
    assert "eval.jsonl:1 is like train.jsonl:2" in text


def test_a_folder_is_held_against_its_own_valid_split(inspect, data):
    data("set/train.jsonl")
    data("set/valid.jsonl", ROWS[:1])
    leakage = inspect("set", "--json").result["leakage"]
    assert (leakage["num_examples"], leakage["num_prompt"]) == (1, 1)
    assert inspect("set", "--split", "valid", "--json").result["rows"] == 1
    assert inspect("set", "--split", "valid", "--json").result["leakage"] is None


def test_columns_and_format_are_taken_and_refused_in_words(inspect, data):
    name = data(rows=[{"question": "a?", "answer": " b"}])
    done = inspect(name, "--columns", "prompt=question, completion=answer", "--json")
    assert done.result["sources"][0]["format"] == "prompt-completion"
    bad = inspect(name, "--columns", "prompt")
    assert bad.code == 2
    assert "prompt=question" in bad.err
    assert inspect(name, "--format", "alpca").code == 2


def test_labels_are_counted_by_class(inspect, data):
    rows = [{"text": f"text {n}", "label": "yes" if n % 3 else "no"} for n in range(9)]
    done = inspect(data(rows=rows))
    assert "train.jsonl:1  label no  (" in done.out
    assert "classes: 2, 9 in all; the most frequent comes 2.0 times as often as the rarest" in done.out
    assert re.search(r"yes +6 +66.7%\n +no +3 +33.3%", done.out)
    assert "none: the class of each text is learned" in done.out


def test_tagged_words_show_their_class_at_their_first_token(inspect, data):
    done = inspect(data(rows=[{"tokens": ["The", "Eagle"], "tags": ["O", "B-PLACE"]}]))
    assert re.search(r"\[\[The\|O\]\]\[\[ E\w*\|B-PLACE\]\]", done.out)
    assert re.search(r"entities: 1.*\n +class.*\n +PLACE +1", done.out)


def test_both_answers_of_a_preference_are_shown_and_compared(inspect, data):
    done = inspect(data(rows=[{"prompt": "Q: ", "chosen": "a b c", "rejected": "d"}]), "--rows", 1)
    assert "train.jsonl:1  chosen" in done.out
    assert "Q: [[d<|endoftext|>]]" in done.out
    assert "the chosen one is longer in 100.0% of the rows" in done.out


def test_lengths_are_those_of_whole_rows_where_some_are_too_long(inspect, data):
    rows = [*ROWS, {"prompt": "x", "completion": " word" * 50}]
    done = inspect(data(rows=rows), "--row-tokens", 16, "--json").result
    assert done["lengths"]["above"] == 1
    assert done["lengths"]["longest"] > 50
    assert done["totals"]["longest"] <= 16
    cut = inspect(data("t.jsonl", [{"text": "word " * 50}]), "--row-tokens", 16, "--json").result
    assert (cut["lengths"]["above"], sum(cut["lengths"]["counts"])) == (1, 1)
    assert cut["totals"]["num_examples"] > 1


def test_what_the_data_say_is_not_obeyed_by_the_terminal(inspect, data):
    rows = [{"prompt": "\x1b[2J\x07", "completion": " \x9b31m"}]
    out = inspect(data(rows=rows)).out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\x9b" not in out
    assert "\\x1b[2J\\x07[[ \\x9b31m" in out


class Terminal(io.TextIOWrapper):
    """Standard output of another kind than a pipe."""

    is_terminal = True

    def isatty(self):
        return self.is_terminal

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def test_an_output_that_knows_ascii_only_is_served(inspect, data, monkeypatch):
    stream = Terminal(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert app.run(["inspect", data(), "--row", "4", "--row", "1"]) == 0
    assert "Where is it?\\n\n[[By" in stream.shown()
    assert "[[ Bob \\U0001f600" in stream.shown()
    assert "###" in stream.shown()


@pytest.mark.parametrize(("is_terminal", "no_color"), [(True, ""), (True, "1"), (False, "")])
def test_colours_are_for_terminals_that_want_them(is_terminal, no_color, inspect, data, monkeypatch):
    stream = Terminal(io.BytesIO(), encoding="utf-8")
    stream.is_terminal = is_terminal
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert app.run(["inspect", data(rows=[{"prompt": "[red]Q ", "completion": "\x1b[1m"}])]) == 0
    coloured = is_terminal and not no_color
    assert ("\x1b[30;42m" in stream.shown()) == coloured
    assert ("[[" not in stream.shown()) == coloured
    assert "[red]Q" in re.sub(r"\x1b\[[\d;]*m", "", stream.shown())
    assert "\x1b[1m" not in stream.shown()


class Page(HTMLParser):
    """What stands in a page: its tags, and the text of its samples."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.titles, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_escaped_and_never_overwritten(inspect, data, tmp_path):
    name = data(rows=[*ROWS, {"prompt": "<script>alert(1)</script>", "completion": ' <b title="x">'}])
    assert inspect(name, "--html", "page.html").code == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1
    assert page.tags.count("article") == 5
    assert "b" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "http" not in re.sub(r"<article.*", "", text)
    assert text.count('class="t') > 5
    assert all(re.fullmatch(r"\d+( \d+)*", title) for title in page.titles)
    again = inspect(name, "--html", "page.html")
    assert again.code == 2
    assert "OutputExists" in again.err
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text


def write_config(tmp_path, base, **data):
    values = {
        "base": str(base),
        "data": {"train": "train.jsonl"} | data,
        "train": {"row_tokens": 64},
        "output": "run",
    }
    (tmp_path / "c.yaml").write_text(json.dumps(values), encoding="utf-8")
    return "c.yaml"


def test_a_configuration_says_how_its_data_are_read(inspect, data, tmp_path, tiny_base_folder):
    data(rows=[{"q": f"what {n} ", "completion": "yes"} for n in range(20)])
    config = write_config(tmp_path, tiny_base_folder, columns={"prompt": "q"}, eval_fraction=0.2)
    done = inspect(config, "--json").result
    assert (done["base"], done["row_tokens"], done["rows"]) == (str(tiny_base_folder), 64, 20)
    assert (done["totals"]["num_examples"], done["held_out"]["num_examples"]) == (16, 4)
    over = inspect(config, "--base", "builtin:tiny-en", "--row-tokens", 32, "--json").result
    assert (over["base"], over["row_tokens"]) == ("builtin:tiny-en", 32)
    assert inspect(config, "--split", "train").code == 2


def test_a_configuration_that_skips_bad_rows_is_told_so(inspect, data, tmp_path, tiny_base_folder):
    data(rows=[*ROWS, {"prompt": "x", "completion": ""}])
    config = write_config(tmp_path, tiny_base_folder, on_bad_row="skip")
    assert "1 of 5 rows cannot be learned from: training leaves them out" in inspect(config).out


def test_a_configurations_task_decides_which_rows_fit(inspect, data, tmp_path, tiny_base_folder):
    data(rows=[{"prompt": "Q: ", "chosen": "a", "rejected": "d"}])
    assert inspect("train.jsonl").code == 0
    assert inspect(write_config(tmp_path, tiny_base_folder)).code == 2


def test_a_run_shows_its_data_on_demand(inspect, data, tmp_path, tiny_base_folder):
    data()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    write_config(tmp_path, tiny_base_folder, train=str(tmp_path / "train.jsonl"))
    (tmp_path / "c.yaml").replace(run / "config.yaml")
    assert inspect("run", "--data", "--json").result["rows"] == 4
    assert inspect("run/config.yaml", "--json").result["kind"] == "data"
    refused = inspect("run", "--html", "page.html")
    assert refused.code == 2
    assert "--data" in refused.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.jsonl", "--sites"], "--sites says nothing about 'train.jsonl'"),
        (["builtin:tiny-en", "--rows", "2"], "--rows says nothing about 'builtin:tiny-en'"),
        (["trian.jsonl"], "nearest: train.jsonl"),
        (["trian"], "nearest: train.jsonl"),
        (["model.exe"], "does not say what it holds"),
        (["train.jsonl", "--overflow", "left"], "overflow"),
        (["train.jsonl", "--turns", "first"], "--turns"),
        (["train.jsonl", "--base", "builtin:tiny-em"], "nearest: builtin:tiny-en"),
        (["train.jsonl", "--chat-template", "none.jinja"], "no chat template"),
        (["conf.yaml"], "no configuration at"),
    ],
)
def test_what_cannot_be_inspected_is_the_users_mistake(words, told, inspect, data, tmp_path):
    data()
    (tmp_path / "model.exe").write_text("x")
    done = inspect(*words)
    assert done.code == 2, done.out
    assert told in done.err


def test_models_are_not_mistaken_for_data(tiny_base_folder, tmp_path):
    from manylora.cli.inspect import KINDS
    from manylora.errors import AdapterBroken, UserError
    from manylora.runs.places import adapter_folder, recognise

    assert recognise(str(tiny_base_folder), KINDS).kind == "base"
    assert recognise("owner/model", KINDS).kind == "base"
    assert recognise("hub:owner/data", KINDS).kind == "data"
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert recognise(str(tmp_path), KINDS).kind == "data"
    with pytest.raises(UserError, match="is data"):
        recognise(str(tmp_path / "train.jsonl"))
    with pytest.raises(AdapterBroken):
        adapter_folder(str(tmp_path))
    (tmp_path / "events.jsonl").write_text("")
    assert recognise(str(tmp_path), KINDS).kind == "run"


@pytest.mark.parametrize("with_generation", [True, False])
def test_the_tokenizer_alone_is_that_of_the_whole_base(with_generation, tiny_base_folder, tmp_path):
    import shutil

    from manylora.base.load import load_base, load_tokenizer

    folder = shutil.copytree(tiny_base_folder, tmp_path / "base")
    if not with_generation:
        (folder / "generation_config.json").unlink()
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    base = load_base(str(folder), dtype="float32", device="cpu", chat_template=template)
    tokenizer, eos_ids = load_tokenizer(str(folder), template)
    assert eos_ids == base.eos_ids
    assert len(eos_ids) == 1 + with_generation
    assert tokenizer.chat_template == base.tokenizer.chat_template
    assert tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_the_histogram_begins_at_the_shortest_and_marks_what_lies_in_a_bin():
    from manylora.data.survey import Lengths
    from manylora.look.lines import histogram

    lengths = Lengths((0, 5, 10, 15), (0, 80, 1), {50: 7, 90: 8, 99: 11}, 12, limit=12, above=0)
    assert histogram(lengths, fancy=False) == [
        f"   6 to 10  80  {'#' * 40}  < p50, p90",
        f"  11 to 15   1  #{' ' * 39}  < p99, row_tokens 12",
    ]
    assert histogram(lengths, fancy=True)[0].count("\N{FULL BLOCK}") == 40
    assert "\N{LEFT HALF BLOCK}" in histogram(lengths, fancy=True)[1]


def test_a_base_that_was_an_object_in_python_has_to_be_named(inspect, data, tmp_path):
    data()
    config = write_config(tmp_path, "python:base")
    assert "--base" in inspect(config).err
    assert inspect(config, "--base", "builtin:tiny-en").code == 0
