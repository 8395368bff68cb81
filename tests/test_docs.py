"""Every snippet of the README and the docs runs as it stands."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from manylora.cli.app import run
from manylora.config import load_config
from manylora.sweeps.search import Search
from manylora.sweeps.space import parse_space
from manylora.sweeps.trials import Trials

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = ["--set", "train.steps=2", "--set", "evaluate.max_examples=4", "--set", "evaluate.max_new_tokens=4"]
FEW_TRIALS = ["--set", "sweep.trials=3", "--set", "train.row_tokens=64", *SMALL[2:]]


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def manylora(arguments: list[str], folder: Path) -> Done:
    """A command as it is typed in a folder, run in this process: most of the time of each would be its imports."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        code = run(arguments)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's configuration and a data file of the README's shape."""
    folder = tmp_path_factory.mktemp("newcomer")
    sample = json.loads(blocks(ROOT / "README.md", "json")[0])
    rows = [{**sample, "prompt": f"Place {number}, Italian:"} for number in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in zip(("first", "sweep"), blocks(ROOT / "README.md", "yaml"), strict=True):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_the_readmes_commands_do_what_it_says(newcomer: Path) -> None:
    for block in blocks(ROOT / "README.md", "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "manylora" or words[1] == "demo":  # which tests/stories/test_demo.py runs
                continue
            trains = words[1] == "train" and "--keys" not in words and "--resume" not in words
            added = SMALL if trains else FEW_TRIALS if words[1] == "sweep" else []
            done = manylora(words[1:] + added, newcomer)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (newcomer / "runs" / "first" / "report.html").is_file()


def test_the_data_pages_commands_run(tmp_path: Path) -> None:
    page = ROOT / "docs" / "data.md"
    rows, held_out = blocks(page, "json")[:2]
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text(held_out, encoding="utf-8")
    (tmp_path / "first.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    for line in "".join(blocks(page, "sh")).splitlines():
        done = manylora(shlex.split(line)[1:], tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_quantisation_pages_commands_run(newcomer: Path, tmp_path: Path) -> None:
    for name in ("train.jsonl", "first.yaml"):
        (tmp_path / name).write_text((newcomer / name).read_text(encoding="utf-8"), encoding="utf-8")
    for line in "".join(blocks(ROOT / "docs" / "quantisation.md", "sh")).splitlines():
        words = shlex.split(line)[1:]
        done = manylora(words + (SMALL if words[0] == "train" else []), tmp_path)
        # What a few steps learn may be too little for four bits: then the merge is refused, as the page says.
        refused = words[0] == "merge" and "nf4" in words and done.returncode == 2
        assert done.returncode == 0 or refused, f"{line}\n{done.stderr}"


def test_the_memory_pages_commands_run(newcomer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train.jsonl", "first.yaml"):
        (tmp_path / name).write_text((newcomer / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks(ROOT / "docs" / "memory.md", "sh")).splitlines()
    assert lines
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, line


def test_the_sweep_pages_commands_run(newcomer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "sweeps.md"
    (tmp_path / "train.jsonl").write_text((newcomer / "train.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "sweep.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line)[1:]
        added = FEW_TRIALS if words[0] == "sweep" else SMALL if "--find-lr" in words else []
        added = ["--max-new-tokens", "4"] if words[0] == "generate" else added
        assert run(words + added) == 0, line
    for name in ("adapters/best", "leaderboard.csv", "report.html", "sweep.json", "events.jsonl", "optuna.log"):
        assert (tmp_path / "runs" / "sweep" / name).exists(), name


@pytest.mark.parametrize("page", ["data.md", "formats.md", "quantisation.md", "inits.md", "methods.md", "sweeps.md"])
def test_every_yaml_block_of_the_data_pages_is_a_configuration(page: str) -> None:
    for text in blocks(ROOT / "docs" / page, "yaml"):
        given = yaml.safe_load(text)
        made = load_config({"base": "builtin:tiny-en", "output": "x", "data": {"train": "x", "eval": "y"}, **given})
        if made.sweep is not None:
            space = parse_space(made.sweep.space)
            Trials(made, space)
            trials = made.sweep.trials or (None if made.sweep.search == "grid" else 16)
            Search(made.sweep.search, space, seed=0, num_trials=trials, storage=None, study_name=page)


def test_every_command_named_exists() -> None:
    done = manylora(["--help"], ROOT)
    for page in PAGES:
        for verb in set(re.findall(r"`manylora (\w+)", page.read_text(encoding="utf-8"))):
            assert re.search(rf"\b{verb}\b", done.stdout), f"{page.name}: {verb}"


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_python_snippets_run(page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manylora.base.frozen import FrozenModel

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippet"}
    exec(compile(blocks(page, "python")[number], str(page), "exec"), names)
    for value in names.values():
        if isinstance(value, FrozenModel) and value.bank is not None:
            value.bank.close()


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_figures_are_those_of_the_committed_results() -> None:
    found = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.with_figures(text) == text
