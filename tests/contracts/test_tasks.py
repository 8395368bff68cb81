"""What every task owes: kinds of rows that exist, answers of the data itself that score best, a recipe that runs.

A task that joins the table is held to all of it, and must bring a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from measure_task import MEASURE
from torch import nn
from torch.utils.data import TensorDataset

import manylora
from manylora.adapters.adapter import Adapter
from manylora.config import load_config
from manylora.data.formats import FORMATS
from manylora.data.formats.format import Kind
from manylora.errors import ConfigError
from manylora.evaluation.sample import Sample
from manylora.objectives import OBJECTIVES
from manylora.tasks import TASKS
from manylora.tasks.text import TextTask
from manylora.training.prepare import Stock

OWN = "measure_task:MEASURE"
NAMES = [*TASKS, OWN]


def sft_recipe(folder: Path) -> dict[str, Any]:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"config": {"base": "builtin:tiny-en", "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.25}}}


def module_recipe(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(40, 4)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    base = manylora.FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 4)})
    return {"config": {"data": {"eval_fraction": 0.25}}, "base": base, "train_data": data}


def own_recipe(folder: Path) -> dict[str, Any]:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=4096, **small)).save_pretrained(folder / "base")
    manylora.load_base("builtin:tiny-en").tokenizer.save_pretrained(folder / "base")
    rows = [{"text": "good " * (1 + n % 5), "many": n % 5} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "config": {"base": str(folder / "base"), "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.2}}
    }


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {"sft": sft_recipe, "module": module_recipe, OWN: own_recipe}


def test_every_task_has_a_recipe() -> None:
    assert set(RECIPES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_names_what_exists(name: str) -> None:
    task = TASKS.get(name)
    assert task.name == name or name == OWN
    assert task.objective in OBJECTIVES or OBJECTIVES.check(task.objective)
    assert not task.auto or hasattr(transformers, task.auto)
    if isinstance(task, TextTask):
        assert set(task.kinds) <= set(get_args(Kind))
        assert {FORMATS.get(one).kind for one in FORMATS} >= set(task.kinds)


@pytest.mark.parametrize("name", [name for name in TASKS if isinstance(TASKS.get(name), TextTask)])
def test_the_datas_own_answers_score_best(name: str) -> None:
    task = TASKS.get(name)
    assert isinstance(task, TextTask)
    asked = [("a", ("The first of them all.", "The first one of all.")), ("b", ("And here comes the second one.",))]
    gold = [Sample(prompt, answers, answers[0]) for prompt, answers in asked]
    wrong = [Sample(prompt, answers, f"nothing but {prompt}") for prompt, answers in asked]
    best, worse = task.metrics(gold), task.metrics(wrong)
    assert best
    assert set(task.footnotes(gold)) == set(best)
    for metric, value in best.items():
        assert value == pytest.approx(100.0 if metric == "bleu" else 1.0), metric
        assert worse[metric] < value
    assert task.metrics([]) == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_from_the_data_to_an_adapter_that_says_its_task(name: str, tmp_path: Path) -> None:
    given = RECIPES[name](tmp_path)
    config = {
        "dtype": "float32", "task": name, "adapter": {"rank": 2}, "track": [], "output": str(tmp_path / "run"),
        "train": {"steps": 2, "row_tokens": 64, "rows_per_step": 2}, "evaluate": {"samples": 1, "max_new_tokens": 2},
        **given.pop("config"),
    }  # fmt: skip
    result = manylora.train(config, **given)
    task = TASKS.get(name)
    assert result.summary["eval"]["loss"] > 0
    assert set(result.summary["footnotes"]) <= set(result.summary["eval"])
    adapter = Adapter.load(result.summary["adapters"]["main"])
    assert adapter.record["name"] == name
    if task.auto:
        read = load_config(tmp_path / "run")
        base = task.open(read, {})
        assert set(adapter.factors) <= set(base.sites)
    assert MEASURE is TASKS.get(OWN)


@pytest.mark.parametrize("name", [name for name in TASKS if isinstance(TASKS.get(name), TextTask)])
@pytest.mark.parametrize("format", list(FORMATS))
def test_a_format_set_by_hand_is_one_that_the_task_learns_from(name: str, format: str, tmp_path: Path) -> None:  # noqa: A002
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": "e", "text": "f"}) + "\n"
    )
    config = {"base": "builtin:tiny-en", "task": name, "output": str(tmp_path / "run"), "dtype": "float32",
              "data": {"train": str(tmp_path / "rows.jsonl"), "format": format}}  # fmt: skip
    kinds = TASKS.get(name).kinds
    if FORMATS.get(format).kind in kinds:
        return
    with pytest.raises(ConfigError, match=f"data.format is '{format}', whose rows are of the kind"):
        Stock(load_config(config), use_cache=False)
