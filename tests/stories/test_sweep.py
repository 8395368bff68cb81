"""A search as a user runs it: what it leaves, that it resumes to the byte, and what it says of a mistake."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import manylora as library
from manylora.cli.app import run

DEMO = Path(library.__file__).parent / "data" / "demo" / "e2e"
RATES = {"train.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}}


def write_rows(path: Path, count: int, first: int = 0) -> Path:
    rows = [{"prompt": f"name : place {n}\n", "completion": f"the dog {n}"} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_sweep(folder: Path, base: Path, space: dict[str, Any], **changed: Any) -> Path:
    """A sweep of a few short trials; a section that is given is laid over the one here, `sweep` too."""
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "other.jsonl", 16, first=50)
    write_rows(folder / "eval.jsonl", 4, first=90)
    values: dict[str, Any] = {
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "adapter": {"rank": 2},
        "train": {"tokens": 250, "row_tokens": 64, "rows_per_step": 2, "learning_rate": 1e-2},
        "evaluate": {"max_new_tokens": 1, "samples": 1},
        "track": [],
        "output": "run",
        "sweep": {"space": space, "trials": 3, "concurrent": 8},
    }
    for name, value in changed.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def leaderboard(run_folder: Path) -> list[dict[str, str]]:
    with (run_folder / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_trial(run_folder: Path) -> dict[int, dict[str, str]]:
    return {int(row["trial"]): row for row in leaderboard(run_folder)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def retrained_loss(manylora, member: Path, output: Path) -> tuple[float, dict[str, Any]]:
    """The loss on the held-out rows of a member that was trained alone, from the configuration beside its adapter."""
    done = manylora("train", member / "config.yaml", "--set", f"output={output}", "--json")
    assert done.code == 0, done.err
    return done.result["eval"]["loss"], done.result


@pytest.fixture(scope="module")
def halved(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of nine trials, most of them stopped early; tests must not change it."""
    folder = tmp_path_factory.mktemp("halved")
    space = {"adapter.rank": [1, 4], **RATES}
    path = write_sweep(folder, tiny_base_folder, space, sweep={"trials": 9, "stop": "successive-halving"})
    assert run(["sweep", str(path)]) == 0
    return folder / "run"


# -- what it leaves ----------------------------------------------------------------------------------------------------


def test_a_sweep_on_the_builtin_base_leaves_leaderboard_report_and_winner(manylora, tmp_path: Path) -> None:
    config = {
        "base": "builtin:tiny-en",
        "data": {"train": str(DEMO / "train.jsonl"), "eval": str(DEMO / "eval.jsonl")},
        "train": {"tokens": 300, "row_tokens": 256, "rows_per_step": 2},
        "evaluate": {"max_examples": 4, "max_new_tokens": 2},
        "sweep": {"trials": 3, "space": {"adapter.rank": [2, 8], "train.learning_rate": [1e-3, 5e-3]}},
        "output": "run",
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    for words in ("best: trial", "leaderboard.csv", "report.html", "adapters/best", "eval loss"):
        assert words in done.out
    folder = tmp_path / "run"
    for name in ("config.yaml", "manifest.json", "events.jsonl", "summary.json", "sweep.json", "report.html"):
        assert (folder / name).is_file(), name
    assert (folder / "optuna.log").is_file()
    winner = leaderboard(folder)[0]
    assert files_of(folder / "adapters" / "best") == files_of(folder / "adapters" / winner["member"])
    loss, _ = retrained_loss(manylora, folder / "adapters" / "best", tmp_path / "again")
    assert loss == pytest.approx(float(winner["eval_loss"]), rel=1e-3)


def test_the_folder_says_the_same_everywhere(halved: Path) -> None:
    told = json.loads((halved / "sweep.json").read_text(encoding="utf-8"))
    summary = json.loads((halved / "summary.json").read_text(encoding="utf-8"))
    rows = leaderboard(halved)
    assert [int(row["place"]) for row in rows] == list(range(1, 10))
    assert [float(row["eval_loss"]) for row in rows] == sorted(float(row["eval_loss"]) for row in rows)
    assert told["winner"] == summary["winner"]
    assert told["winner"]["member"] == rows[0]["member"]
    assert summary["eval"]["loss"] == pytest.approx(float(rows[0]["eval_loss"]), rel=1e-5)
    assert sum(int(row["tokens"]) for row in rows) == told["tokens"] == summary["tokens"] < told["full_tokens"]
    assert set(summary["adapters"]) == {"best", *(row["member"] for row in rows)}
    assert not (halved / "checkpoints").exists()


def test_halving_keeps_a_third_at_each_level_and_stops_the_others_there(halved: Path) -> None:
    told = json.loads((halved / "sweep.json").read_text(encoding="utf-8"))
    assert len(told["levels"]) == 2
    tokens = sorted(int(row["tokens"]) for row in leaderboard(halved))
    states = [row["state"] for row in leaderboard(halved)]
    assert (states.count("done"), states.count("stopped")) == (1, 8)
    assert len(set(tokens[:6])) == 1
    assert told["levels"][0] <= tokens[0] < told["levels"][1] <= tokens[6] == tokens[7] < tokens[8]


def test_a_step_that_spans_several_levels_is_judged_at_each(manylora, tiny_base_folder, tmp_path) -> None:
    path = write_sweep(
        tmp_path, tiny_base_folder, {**RATES, "train.rows_per_step": [8]},
        sweep={"trials": 9, "stop": "successive-halving", "concurrent": 9}, train={"tokens": 390, "rows_per_step": 1},
    )  # fmt: skip
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    rows = leaderboard(tmp_path / "run")
    assert [row["state"] for row in rows].count("done") == 1
    assert len({row["tokens"] for row in rows if row["state"] == "stopped"}) == 1, "all were judged after one step"


def test_optuna_opens_the_file_beside_it(halved: Path) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(halved / "optuna.log")))
    study = optuna.load_study(study_name="run", storage=storage)
    rows = by_trial(halved)
    states = {"COMPLETE": "done", "PRUNED": "stopped"}
    assert {trial.number: states[trial.state.name] for trial in study.trials} == {n: rows[n]["state"] for n in rows}
    assert {trial.number: trial.value for trial in study.trials} == {n: float(rows[n]["eval_loss"]) for n in rows}


def test_the_winner_and_a_stopped_trial_trained_alone_reach_the_same_loss(manylora, halved, tmp_path) -> None:
    rows = leaderboard(halved)
    stopped = next(row for row in rows if row["state"] == "stopped")
    for row in (rows[0], stopped):
        loss, summary = retrained_loss(manylora, halved / "adapters" / row["member"], tmp_path / row["member"])
        assert loss == pytest.approx(float(row["eval_loss"]), rel=1e-4)
        assert summary["tokens"] == int(row["tokens"]), "it stops where it was stopped"
        assert summary["state"] == row["state"]


def test_the_folder_of_a_sweep_stands_for_its_winner(manylora, halved) -> None:
    summary = json.loads((halved / "summary.json").read_text(encoding="utf-8"))
    shown = manylora("inspect", halved, "--json")
    assert shown.code == 0, shown.err
    assert shown.result["state"] == "finished"
    scored = manylora("evaluate", halved, "--no-text", "--json")
    assert scored.code == 0, scored.err
    assert list(scored.result["eval"].values())[-1]["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-5)
    assert len(scored.result["eval"]) == 2
    written = manylora("generate", "--adapter", halved, "--prompt", "name : x\n", "--max-new-tokens", 2, "--json")
    assert written.code == 0, written.err


def test_json_gives_the_summary_and_nothing_else_on_stdout(manylora, tiny_base_folder, tmp_path) -> None:
    path = write_sweep(tmp_path, tiny_base_folder, RATES, sweep={"trials": 2})
    done = manylora("sweep", path, "--json")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    assert done.result == json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert {"winner", "adapters", "eval", "base_eval", "tokens", "full_tokens", "trials"} <= done.result.keys()


def test_in_a_pipe_every_trial_is_told_of_when_it_ends(manylora, tiny_base_folder, tmp_path) -> None:
    done = manylora("sweep", write_sweep(tmp_path, tiny_base_folder, RATES))
    assert [int(n) for n in re.findall(r"^trial (\d+) done", done.err, re.MULTILINE)] == [0, 1, 2]


# -- what may vary -----------------------------------------------------------------------------------------------------


def test_methods_starts_optimizers_and_step_sizes_vary_in_one_sweep(manylora, tiny_base_folder, tmp_path) -> None:
    space = {
        "adapter.method": ["lora", "full"],
        "adapter.init": ["default", "pissa", "gaussian"],
        "train.optimizer": ["adamw", "sgd"],
        "train.rows_per_step": [1, 4],
        "train.row_tokens": [32, 64],
        "train.accumulate": [1, 2],
    }
    path = write_sweep(tmp_path, tiny_base_folder, space, sweep={"trials": 10}, train={"tokens": 80})
    done = manylora("sweep", path, "--json")
    assert done.code == 0, done.err
    rows = leaderboard(tmp_path / "run")
    for key, values in space.items():
        assert {row[key] for row in rows if row["state"] == "done"} == {str(value) for value in values}, key
    for row in rows:
        possible = row["train.accumulate"] == "1" or row["train.rows_per_step"] == "4"
        assert row["state"] == ("done" if possible else "retired"), row


def test_the_training_rows_may_vary_as_mixtures(manylora, tiny_base_folder, tmp_path) -> None:
    mixtures = ["train.jsonl", ["train.jsonl", "other.jsonl"], [{"path": "train.jsonl", "weight": 0.5}]]
    space = {"data.train": mixtures}
    path = write_sweep(tmp_path, tiny_base_folder, space, sweep={"search": "grid", "trials": None})
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    rows = leaderboard(tmp_path / "run")
    assert len({row["eval_loss"] for row in rows}) == 3
    for row in rows:
        config = yaml.safe_load((tmp_path / "run" / "adapters" / row["member"] / "config.yaml").read_text())
        assert config["data"]["eval"] == [str(tmp_path / "eval.jsonl")]
        assert str(tmp_path / "train.jsonl") in str(config["data"]["train"][0])


def test_values_that_do_not_go_together_are_out_and_the_sweep_goes_on(manylora, tiny_base_folder, tmp_path) -> None:
    space = {"train.accumulate": [1, 4], "train.rows_per_step": [1, 4]}
    path = write_sweep(
        tmp_path, tiny_base_folder, space, sweep={"search": "grid", "trials": None}, train={"rows_per_step": 4}
    )
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    rows = leaderboard(tmp_path / "run")
    out = [row for row in rows if row["state"] == "retired"]
    assert [(row["train.accumulate"], row["train.rows_per_step"]) for row in out] == [("4", "1")]
    assert sum(row["state"] == "done" for row in rows) == 3
    assert "train.accumulate is 4 and train.rows_per_step is 1" in done.err


def test_values_that_the_base_refuses_together_cost_their_trials_alone(manylora, tiny_base_folder, tmp_path) -> None:
    space = {"adapter.rank": [2, 32], "adapter.sites": [["all-linear"], ["k_proj"]]}
    path = write_sweep(tmp_path, tiny_base_folder, space, sweep={"search": "grid", "trials": None})
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    assert sorted(row["state"] for row in leaderboard(tmp_path / "run")) == ["done", "done", "done", "retired"]
    assert re.search(r"trial-00\d cannot be trained: .*rank 32 is above", done.err)


def test_a_sweep_may_continue_different_adapters(manylora, tiny_base_folder, halved, tmp_path) -> None:
    first, second = (str(halved / "adapters" / row["member"]) for row in (leaderboard(halved)[n] for n in (0, -1)))
    path = write_sweep(tmp_path, tiny_base_folder, {"adapter.from": [first, second]}, sweep={"trials": 2})
    done = manylora("sweep", path, "--set", "adapter=null")
    assert done.code == 0, done.err
    rows = leaderboard(tmp_path / "run")
    assert [row["state"] for row in rows] == ["done", "done"]
    loss, _ = retrained_loss(manylora, tmp_path / "run" / "adapters" / "best", tmp_path / "again")
    assert loss == pytest.approx(float(rows[0]["eval_loss"]), rel=1e-4)


# -- repeats and folds -------------------------------------------------------------------------------------------------


def test_repeats_give_mean_and_spread_over_seeds_on_the_same_held_out_rows(manylora, tiny_base_folder, tmp_path):
    path = write_sweep(
        tmp_path,
        tiny_base_folder,
        {"adapter.rank": [2, 4]},
        sweep={"repeats": 3, "trials": 2},
        data={"eval": None, "eval_fraction": 0.25},
    )
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    folder = tmp_path / "run"
    told = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    for entry in told["entries"]:
        losses = [last_loss(folder, member) for member in entry["members"]]
        assert len(set(losses)) == 3
        mean = sum(losses) / 3
        assert entry["loss"] == pytest.approx(mean)
        assert entry["spread"] == pytest.approx((sum((loss - mean) ** 2 for loss in losses) / 2) ** 0.5)
        assert entry["tokens"] == sum(last_tokens(folder, member) for member in entry["members"])
        configs = [member_config(folder, member) for member in entry["members"]]
        assert [config["train"]["seed"] for config in configs] == [0, 1, 2]
        assert {config["data"]["split_seed"] for config in configs} == {0}
    member = told["entries"][0]["members"][2]
    loss, _ = retrained_loss(manylora, folder / "adapters" / member, tmp_path / "again")
    assert loss == pytest.approx(last_loss(folder, member), rel=1e-4), "the held-out rows are those of the sweep"


def test_members_of_folds_may_stop_early(manylora, tiny_base_folder, tmp_path) -> None:
    path = write_sweep(
        tmp_path,
        tiny_base_folder,
        {"train.learning_rate": [1e-3, 0.3]},
        sweep={"folds": 2, "trials": 2},
        data={"eval": None},
        evaluate={"every_steps": 1},
        checkpoint={"early_stop_patience": 2},
    )
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    states = {row["train.learning_rate"]: row["state"] for row in leaderboard(tmp_path / "run")}
    assert states == {"0.001": "done", "0.3": "stopped"}


def test_folds_hold_out_each_part_once(manylora, tiny_base_folder, tmp_path) -> None:
    from manylora.config import load_config
    from manylora.training.prepare import Stock

    path = write_sweep(tmp_path, tiny_base_folder, RATES, sweep={"folds": 3, "trials": 2}, data={"eval": None})
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    folder = tmp_path / "run"
    told = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    held_out = []
    for entry in told["entries"]:
        assert [member.rpartition(".")[2] for member in entry["members"]] == ["fold-1", "fold-2", "fold-3"]
        assert entry["spread"] > 0
        parts = []
        for member in entry["members"]:
            config = load_config(folder / "adapters" / member / "config.yaml")
            data = Stock(config).data(config)
            parts.append([tuple(example.tokens.tolist()) for example in data.held_out])
            assert not set(parts[-1]) & {tuple(example.tokens.tolist()) for example in data.train}
        held_out.append(parts)
        assert sum(map(len, parts)) == len({row for part in parts for row in part}) == 24
    assert held_out[0] == held_out[1], "all trials have the same folds"


def last_event(folder: Path, member: str, kind: str) -> dict[str, Any]:
    lines = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in lines if event["event"] == kind and event["member"] == member][-1]


def last_loss(folder: Path, member: str) -> float:
    lines = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return min(event["loss"] for event in lines if event["event"] == "eval" and event["member"] == member)


def last_tokens(folder: Path, member: str) -> int:
    return last_event(folder, member, "step")["tokens"]


def member_config(folder: Path, member: str) -> dict[str, Any]:
    return yaml.safe_load((folder / "adapters" / member / "config.yaml").read_text(encoding="utf-8"))


# -- interrupted and resumed -------------------------------------------------------------------------------------------


def started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "manylora", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(run_folder: Path, count: int, child: subprocess.Popen[str], *, what: str = '"event": "step"') -> None:
    events = run_folder / "events.jsonl"
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if events.is_file() and events.read_text(encoding="utf-8").count(what) >= count:
            return
        time.sleep(0.005)


def long_sweep(folder: Path, base: Path, **sweep: Any) -> Path:
    """One whose trials come and go while it is killed: half as many slots as trials, and a rule that lets them wait."""
    space = {"adapter.rank": [1, 2, 4], **RATES}
    settings = {"trials": 9, "concurrent": 4, "stop": "successive-halving", **sweep}
    return write_sweep(
        folder, base, space, sweep=settings, train={"tokens": 1500}, checkpoint={"every_steps": 3, "keep": 2}
    )


def test_a_sweep_killed_in_the_middle_resumes_to_the_same_leaderboard(manylora, tiny_base_folder, tmp_path) -> None:
    path = long_sweep(tmp_path, tiny_base_folder, search="tpe")
    whole = manylora("sweep", path, "--set", f"output={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    killed = tmp_path / "killed"
    steps = (tmp_path / "whole" / "events.jsonl").read_text(encoding="utf-8").count('"event": "step"')
    at = random.randrange(int(0.2 * steps), int(0.8 * steps))
    child = started("sweep", path, "--set", f"output={killed}")
    wait_for(killed, at, child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it ended before it was killed"
    resumed = manylora("sweep", path, "--set", f"output={killed}", "--resume")
    assert resumed.code == 0, resumed.err
    assert "resumes at step" in resumed.err or "begins at step 0" in resumed.err
    for name in ("leaderboard.csv", "adapters/best/adapter_model.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"{name}, killed after {at}"


def test_ctrl_c_leaves_a_checkpoint_exits_130_and_the_sweep_goes_on(manylora, tiny_base_folder, tmp_path) -> None:
    path = long_sweep(tmp_path, tiny_base_folder)
    with started("sweep", path, "--set", "checkpoint.every_steps=null") as child:
        try:
            wait_for(tmp_path / "run", 20, child)
            child.send_signal(signal.SIGINT)
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, error
    assert "Traceback" not in error
    assert "--resume goes on" in error
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    done = manylora("sweep", path, "--set", "checkpoint.every_steps=null", "--resume")
    assert done.code == 0, done.err
    assert len(leaderboard(tmp_path / "run")) == 9


def test_resuming_a_finished_sweep_prints_its_summary_again(manylora, halved) -> None:
    before = files_of(halved)
    done = manylora("sweep", halved / "config.yaml", "--resume", "--json")
    assert done.code == 0, done.err
    assert done.result == json.loads((halved / "summary.json").read_text(encoding="utf-8"))
    shown = manylora("sweep", halved / "config.yaml", "--resume")
    assert shown.code == 0
    assert "best: trial" in shown.out
    assert files_of(halved) == before


def test_an_occupied_folder_is_refused_and_stays_as_it_is(manylora, halved) -> None:
    before = files_of(halved)
    manylora("sweep", halved / "config.yaml").refused("OutputExists", "--resume", "output=")
    assert files_of(halved) == before


def test_another_search_in_the_same_folder_is_refused(manylora, halved) -> None:
    done = manylora("sweep", halved / "config.yaml", "--resume", "--set", "sweep.seed=5")
    done.refused("CheckpointBroken", "sweep.seed was 0 and is 5")


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "a key that does not exist": ({"adapter.rnk": [1, 2]}, {}, ("adapter.rnk", "nearest: adapter.rank")),
    "a value out of range": ({"adapter.rank": [2, 0]}, {}, ("sweep.space.adapter.rank, value 0", "at least 1")),
    "a word that no table has": ({"adapter.method": ["lora", "lroa"]}, {}, ("value 'lroa'", "nearest: lora")),
    "the end of a range": ({"train.learning_rate": {"low": -1, "high": 1}}, {}, ("value -1", "above 0")),
    "a range upside down": ({"train.learning_rate": {"low": 1, "high": 0.1}}, {}, ("low below high",)),
    "the storage of the base": ({"quantize": ["nf4", None]}, {}, ("varies quantize", "one base")),
    "the dtype of the base": ({"dtype": ["float32", "bfloat16"]}, {}, ("varies dtype", "one base")),
    "the held-out rows": ({"data.eval": ["a", "b"]}, {}, ("varies data.eval", "same held-out rows")),
    "how rows are read": ({"data.turns": ["all", "last"]}, {}, ("varies data.turns", "same held-out rows")),
    "rows that held-out ones are cut from": (
        {"data.train": ["train.jsonl", "other.jsonl"]},
        {"data": {"eval": None, "eval_fraction": 0.2}},
        ("varies data.train", "data.eval"),
    ),
    "the sweep itself": ({"sweep.seed": [1, 2]}, {}, ("varies sweep.seed", "cannot vary itself")),
    "a key in two pieces": ({"adapter": {"rank": [1, 2]}}, {}, ("sweep.space.adapter.rank", "in one piece")),
    "the same choice twice": ({"adapter.rank": [2, 2.0]}, {}, ("twice", "sweep.repeats")),
    "nothing that varies": ({}, {}, ("sweep.space",)),
    "no held-out rows": (RATES, {"data": {"eval": None}}, ("held-out", "data.eval_fraction", "sweep.folds")),
    "folds beside held-out rows": (RATES, {"sweep": {"folds": 3}}, ("sweep.folds", "data.eval")),
    "a rule that does not exist": (RATES, {"sweep": {"stop": "medain"}}, ("medain", "nearest: median")),
    "a setting of another rule": (
        RATES,
        {"sweep": {"stop": {"rule": "median", "reduction": 4}}},
        ("sweep.stop.reduction", "does not read it"),
    ),
    "a budget too small to be judged": (
        RATES,
        {"sweep": {"stop": "successive-halving", "trials": 729}, "train": {"tokens": 5}},
        ("too few to be judged", "sweep.stop: none"),
    ),
    "a search that does not exist": (RATES, {"sweep": {"search": "tep"}}, ("tep", "grid, random, tpe")),
    "a grid over a range": (RATES, {"sweep": {"search": "grid"}}, ("sweep.space.train.learning_rate", "num")),
    "levels of one's own": (RATES, {"evaluate": {"at_tokens": [20]}}, ("evaluate.at_tokens", "sweep.stop")),
    "a length of one's own": (RATES, {"train": {"stop_after": 2}}, ("train.stop_after", "sweep.stop")),
    "a site that the base does not have": (
        {"adapter.sites": [["q_proj"], ["v_prj"]]},
        {},
        ("sweep.space.adapter.sites, value ['v_prj']", "nearest: v_proj"),
    ),
    "a rank that no site holds": ({"adapter.rank": [2, 1000]}, {}, ("value 1000: rank 1000 is above",)),
    "rows too short for the data": ({"train.row_tokens": [64, 16]}, {}, ("value 16", "the limit is 16")),
    "nothing but impossible values": ({"train.row_tokens": [8, 9]}, {}, ("row_tokens",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(manylora, tiny_base_folder, tmp_path, mistake) -> None:
    space, changed, words = MISTAKES[mistake]
    path = write_sweep(tmp_path, tiny_base_folder, space, **changed)
    manylora("sweep", path).refused(*words)
    assert not (tmp_path / "run").exists()


def test_train_and_sweep_name_each_other_where_the_wrong_one_is_used(manylora, tiny_base_folder, tmp_path) -> None:
    path = write_sweep(tmp_path, tiny_base_folder, RATES)
    manylora("train", path).refused("ConfigError", "manylora sweep", "sweep=null")
    manylora("sweep", path, "--set", "sweep=null").refused("ConfigError", "no section sweep", "space")
    assert not (tmp_path / "run").exists()


def test_a_value_that_only_another_value_makes_possible_is_none(manylora, tiny_base_folder, tmp_path) -> None:
    space = {"train.rows_per_step": [1, 8], "train.accumulate": [1, 8]}
    path = write_sweep(tmp_path, tiny_base_folder, space, sweep={"search": "grid", "trials": None})
    done = manylora("sweep", path)
    assert done.code == 0, done.err
    assert sorted(row["state"] for row in leaderboard(tmp_path / "run")) == ["done", "done", "done", "retired"]


# -- from Python -------------------------------------------------------------------------------------------------------


def test_a_sweep_from_python_takes_objects(tiny_base_folder, tmp_path) -> None:
    path = write_sweep(tmp_path, tiny_base_folder, {"adapter.rank": [1, 2]}, sweep={"trials": 2})
    base = library.load_base(str(tiny_base_folder), dtype="float32")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    result = library.sweep(
        path, overrides={"output": str(tmp_path / "objects")}, base=base, train_data=rows, eval_data=rows[:4]
    )
    assert result.run == tmp_path / "objects"
    assert result.summary["winner"]["loss"] == pytest.approx(result.summary["eval"]["loss"], rel=1e-5)
    shutil.rmtree(tmp_path / "objects")
