"""`manylora train --find-lr`: several rates for a few steps, then the run with the best of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

import manylora as library
from manylora.config import load_config
from manylora.errors import ConfigError
from manylora.sweeps.find_rate import CLOSE, choose, find_rate, grid, short, short_steps

FOLDER = "run-find-lr"


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def test_a_run_is_trained_with_the_rate_that_was_found(manylora, config) -> None:
    done = manylora("train", config, "--find-lr", "--json")
    assert done.code == 0, done.err
    run, found = config.parent / "run", done.result["find_lr"]
    tried = {one["learning_rate"]: one["eval_loss"] for one in found["tried"]}
    assert list(tried) == sorted(tried)
    assert found["learning_rate"] in tried
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["learning_rate"] == found["learning_rate"]
    assert {name: value for name, value in done.result.items() if name != "find_lr"} == summary_of(run)
    told = json.loads((config.parent / FOLDER / "sweep.json").read_text(encoding="utf-8"))
    assert {entry["values"]["train.learning_rate"]: entry["loss"] for entry in told["entries"]} == tried
    alone = manylora(
        "train", config, "--set", f"train.learning_rate={found['learning_rate']}", "--set",
        f"output={config.parent / 'alone'}", "--json",
    )  # fmt: skip
    assert alone.result["eval"] == done.result["eval"], "as if the number had been written"


def test_people_see_every_rate_its_loss_the_choice_and_the_reason(manylora, config) -> None:
    done = manylora("train", config, "--find-lr")
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line.endswith("chosen")]
    assert len(table) == 1
    assert f"learning rate {table[0].split()[0]}: eval loss" in done.out
    assert "the rule of LoRA Without Regret" in done.err


def test_an_occupied_folder_is_refused_before_anything_is_trained(manylora, config) -> None:
    (config.parent / FOLDER).mkdir()
    manylora("train", config, "--find-lr").refused("OutputExists", FOLDER, "--resume")
    assert not (config.parent / "run").exists()
    (config.parent / "run").mkdir()
    (config.parent / "run" / "mine").write_text("x")
    (config.parent / FOLDER).rmdir()
    manylora("train", config, "--find-lr").refused("OutputExists", "run already holds")
    assert not (config.parent / FOLDER).exists()


def test_resuming_reads_what_was_found_and_goes_on_with_the_run(manylora, config) -> None:
    first = manylora("train", config, "--find-lr", "--json")
    assert first.code == 0, first.err
    again = manylora("train", config, "--find-lr", "--resume", "--json")
    assert again.code == 0, again.err
    assert again.result == first.result
    repeated = manylora("train", config.parent / "run" / "config.yaml", "--find-lr", "--resume", "--json")
    assert repeated.result["find_lr"] == first.result["find_lr"]


def test_a_sweep_has_no_rate_to_find(manylora, config) -> None:
    done = manylora("train", config, "--find-lr", "--set", "sweep.space.adapter.rank=[1, 2]")
    done.refused("ConfigError", "--find-lr", "sweep.space")


def test_without_held_out_rows_some_training_rows_are_held_out_for_the_search_alone(manylora, config) -> None:
    done = manylora("train", config, "--find-lr", "--set", "data.eval=null")
    assert done.code == 0, done.err
    search = yaml.safe_load((config.parent / FOLDER / "config.yaml").read_text())
    assert search["data"]["eval_fraction"] == 0.05
    run = yaml.safe_load((config.parent / "run" / "config.yaml").read_text())
    assert run["data"]["eval_fraction"] is None
    assert run["data"]["eval"] == []


def test_a_folders_own_valid_split_is_what_rates_are_compared_on(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = load_config({"base": "x", "data": {"train": str(tmp_path)}, "output": "y"})
    assert short(config, Path("z"), [1e-3], 20, 0).data.eval_fraction is None


def test_a_trial_is_the_runs_own_with_few_steps_at_a_constant_rate(tmp_path: Path) -> None:
    given = {
        "base": "x",
        "data": {"train": "a.jsonl", "eval": "b.jsonl"},
        "adapter": {"rank": 5},
        "train": {"tokens": 5000, "rows_per_step": 3, "learning_rate": "auto", "weight_decay": 0.1, "stop_after": 9},
        "evaluate": {"every_steps": 2, "max_examples": 1000, "at_tokens": [5]},
        "checkpoint": {"early_stop_patience": 2},
        "output": str(tmp_path / "run"),
    }
    found = short(load_config(given), tmp_path / "search", [1e-4, 1e-3], 25, 4)
    assert (found.train.steps, found.train.tokens, found.train.stop_after) == (25, None, None)
    assert (found.train.schedule, found.train.warmup_steps) == ("constant", 4)
    assert (found.train.rows_per_step, found.train.weight_decay, found.adapter.rank) == (3, 0.1, 5)
    assert (found.evaluate.every_steps, found.evaluate.at_tokens, found.evaluate.max_examples) == (25, (), 256)
    assert found.checkpoint.early_stop_patience is None
    assert found.sweep is not None
    assert found.sweep.space == {"train.learning_rate": [1e-4, 1e-3]}
    assert found.output == tmp_path / "search"


@pytest.mark.parametrize(("of_run", "tried"), [(5, 5), (20, 20), (100, 20), (201, 21), (400, 40), (5000, 60)])
def test_a_rate_is_tried_for_a_tenth_of_the_run_within_bounds(of_run: int, tried: int) -> None:
    assert short_steps(of_run) == tried


def test_the_grid_goes_from_a_thirtieth_of_the_rules_rate_to_ten_times_it() -> None:
    rates = grid(3e-4)
    assert (len(rates), rates[0], rates[-1]) == (9, 1e-5, 3e-3)
    assert all(1.9 < high / low < 2.2 for low, high in itertools.pairwise(rates))
    assert grid(None) == [1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]


def test_sgd_is_searched_where_its_rates_lie(manylora, config) -> None:
    done = manylora("train", config, "--find-lr", "--set", "train.optimizer=sgd", "--json")
    assert done.code == 0, done.err
    assert [one["learning_rate"] for one in done.result["find_lr"]["tried"]] == grid(None, "sgd")
    assert (grid(None, "sgd")[0], grid(None, "sgd")[-1]) == (1e-2, 10.0)
    assert "its rule holds for adamw" in done.err


def test_of_rates_that_losses_do_not_tell_apart_the_smallest_is_chosen() -> None:
    near = 2.0 * (1 + CLOSE / 2)
    assert choose({1e-4: 2.5, 1e-3: near, 1e-2: 2.0, 1e-1: 9.0})[0] == 1e-3
    assert choose({1e-4: 2.5, 1e-3: 2.03, 1e-2: 2.0, 1e-1: 9.0})[0] == 1e-2
    rate, reason = choose({1e-4: 2.5, 1e-3: near, 1e-2: 2.0, 1e-1: None})
    assert rate == 1e-3
    assert "2.0000 at 0.01" in reason


def test_a_rate_at_the_edge_of_the_grid_is_told_to_be_there() -> None:
    assert "smallest that was tried" in choose({1e-4: 2.0, 1e-3: 3.0})[1]
    assert "largest that was tried" in choose({1e-4: 3.0, 1e-3: 2.0})[1]
    assert "was tried" not in choose({1e-4: 3.0, 1e-3: 2.0, 1e-2: None})[1]


def test_rates_that_all_diverge_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no learning rate from 0\.001 to 0\.1"):
        choose({1e-3: None, 1e-1: None})


def test_a_module_without_a_hidden_size_is_searched_over_three_decades(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = torch.randn(80, 8)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    objects = {
        "python:base": library.FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 8)}),
        "python:train": TensorDataset(features, features[:, :3].argmax(dim=1)),
    }
    config = load_config(
        {
            "base": "python:base",
            "task": "module",
            "data": {"train": "python:train", "eval_fraction": 0.25},
            "adapter": {"rank": 2},
            "train": {"steps": 30, "rows_per_step": 16},
            "output": str(tmp_path / "run"),
        }
    )
    made, found = find_rate(config, objects=objects)
    assert list(found.losses) == grid(None)
    assert made.train.learning_rate == found.rate
    assert made.model_copy(update={"train": config.train}) == config
