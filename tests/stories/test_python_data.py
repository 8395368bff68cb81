"""Data that a program holds: rows of text, and tensors for any torch module."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import manylora
from manylora.errors import ConfigError, DataError, DataNotFound

ROWS = [{"prompt": f"name : {word} | food : Thai", "completion": f" {word} has Thai food ."} for word in "abcdefgh"]


@pytest.fixture
def settings(tiny_base_folder, tmp_path):
    return {
        "base": str(tiny_base_folder), "dtype": "float32", "output": str(tmp_path / "run"), "track": [],
        "train": {"steps": 3, "row_tokens": 64}, "adapter": {"rank": 2}, "evaluate": {"max_new_tokens": 2},
    }  # fmt: skip


class Rows(Dataset):
    def __init__(self, rows, length=None):
        self.rows, self.length = rows, length

    def __len__(self):
        return len(self.rows) if self.length is None else self.length

    def __getitem__(self, place):
        return self.rows[place]


@pytest.mark.parametrize("kind", ["list", "torch", "generator", "datasets"])
def test_rows_of_any_kind_train_as_a_file_does(settings, kind, tmp_path):
    import datasets

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = {
        "list": lambda: ROWS, "torch": lambda: Rows(ROWS), "generator": lambda: iter(ROWS),
        "datasets": lambda: datasets.Dataset.from_list(ROWS),
    }[kind]  # fmt: skip
    result = manylora.train(settings, train_data=made(), eval_data=ROWS[:2])
    from_file = manylora.train(
        settings | {"data": {"train": str(tmp_path / "rows.jsonl")}}, overrides={"output": str(tmp_path / "file")},
        eval_data=ROWS[:2],
    )  # fmt: skip
    assert result.summary["eval"] == from_file.summary["eval"]
    facts = json.loads((result.run / "manifest.json").read_text())["data"]
    assert facts["train"][0]["rows"] == len(ROWS)
    assert facts["train"][0]["format"] == "prompt-completion"


def test_a_length_that_is_not_kept_is_refused(settings):
    with pytest.raises(DataError, match="says that it has 9 items and gives 8"):
        manylora.train(settings, train_data=Rows([*ROWS], length=9))


def test_a_run_that_learned_from_an_object_cannot_be_repeated_from_its_file_alone(settings, tmp_path):
    result = manylora.train(settings, train_data=ROWS)
    with pytest.raises(DataNotFound, match=r"'python:train' was an object in Python"):
        manylora.train(result.run / "config.yaml", overrides={"output": str(tmp_path / "again")})
    again = manylora.train(result.run / "config.yaml", overrides={"output": str(tmp_path / "again")}, train_data=ROWS)
    assert again.summary["tokens"] == result.summary["tokens"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))


def points(count: int, seed: int) -> TensorDataset:
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(features, features[:, :3].argmax(dim=1))


@pytest.fixture
def module_settings(tmp_path):
    return {
        "task": "module", "output": str(tmp_path / "run"), "track": [], "adapter": {"rank": 4, "sites": "all-linear"},
        "train": {"epochs": 8, "rows_per_step": 32, "learning_rate": 1e-2, "seed": 3},
    }  # fmt: skip


def test_a_module_learns_from_a_tensor_dataset(module_settings):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = manylora.FrozenModel(model, name="net")
    result = manylora.train(module_settings, base=base, train_data=points(320, 1), eval_data=points(100, 2))
    assert result.summary["base_eval"]["accuracy"] < 0.6
    assert result.summary["eval"]["accuracy"] > 0.9
    assert result.summary["eval"]["tokens"] == 100
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    log = (result.run / "manifest.json").read_text()
    assert json.loads(log)["data"]["train"] == [{"name": "TensorDataset", "rows": 320}]

    features, labels = points(100, 2).tensors
    with manylora.Bank(base, num_slots=1) as bank:
        bank.put(manylora.Adapter.load(result.summary["adapters"]["main"]), slot=0)
        with bank.route([0] * 100):
            right = base.model(features).argmax(dim=1).eq(labels).float().mean().item()
    assert right == pytest.approx(result.summary["eval"]["accuracy"], abs=1e-6)


def test_a_module_is_killed_and_resumed_to_the_same_factors(module_settings, tmp_path, monkeypatch):
    from manylora.training import at_once

    whole = manylora.train(module_settings, base=manylora.FrozenModel(net()), train_data=points(320, 1))
    steps = {"output": str(tmp_path / "cut"), "checkpoint.every_steps": 7}
    ran = at_once.train_step
    calls = iter(range(100))

    def dies(*args, **more):
        if next(calls) == 30:
            raise SystemExit
        return ran(*args, **more)

    monkeypatch.setattr(at_once, "train_step", dies)
    with pytest.raises(SystemExit):
        manylora.train(module_settings, overrides=steps, base=manylora.FrozenModel(net()), train_data=points(320, 1))
    monkeypatch.undo()
    again = manylora.train(
        module_settings, overrides=steps, resume=True, base=manylora.FrozenModel(net()), train_data=points(320, 1)
    )
    steps_before, per_step = 28, again.summary["tokens"] / again.summary["steps"]
    trained = again.summary["tokens_per_s"] * again.summary["wall_s"]  # by this process
    assert trained == pytest.approx(again.summary["tokens"] - steps_before * per_step, rel=0.1)
    first, second = (
        (run.run / "adapters" / "main" / "adapter_model.safetensors").read_bytes() for run in (whole, again)
    )
    assert first == second


def test_a_part_of_a_tensor_dataset_can_be_held_out(module_settings):
    result = manylora.train(
        module_settings | {"data": {"train": "python:train", "eval_fraction": 0.25}},
        base=manylora.FrozenModel(net()),
        train_data=points(320, 1),
    )
    assert result.summary["eval"]["tokens"] == 80


class Named(nn.Module):
    """Two inputs by name, and an output with `.logits`."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, wide, narrow):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.left(wide) + self.right(narrow))


def test_mappings_and_several_inputs_find_their_arguments(module_settings):
    torch.manual_seed(1)
    rows = [
        {"narrow": torch.randn(2), "wide": torch.randn(4, dtype=torch.float64), "label": place % 3}
        for place in range(12)
    ]
    pairs = TensorDataset(
        torch.stack([row["wide"] for row in rows]), torch.stack([row["narrow"] for row in rows]), torch.arange(12) % 3
    )
    runs = [
        manylora.train(
            module_settings, overrides={"output": f"{module_settings['output']}-{name}", "adapter.rank": 2},
            base=manylora.FrozenModel(_seeded()), train_data=data, eval_data=data,
        ).summary["eval"]
        for name, data in (("rows", Rows(rows)), ("pairs", pairs))
    ]  # fmt: skip
    assert runs[0] == runs[1]


def _seeded() -> nn.Module:
    torch.manual_seed(0)
    return Named()


X, Y = torch.randn(6, 4), torch.arange(6) % 3
WRONG = {
    "floating labels": (TensorDataset(X, Y.float()), "the target is torch.float32"),
    "one-hot labels": (TensorDataset(X, nn.functional.one_hot(Y)), "shape \\(3,\\)"),
    "no labels": (TensorDataset(X), "allowed: \\(input, target\\)"),
    "too many inputs": (TensorDataset(X, X, Y), "a tuple of 3 values"),
    "no length": (iter([(X[0], Y[0])]), "without a length"),
    "empty": (TensorDataset(X[:0], Y[:0]), "holds no rows"),
    "a length not kept": (Rows([(X[0], Y[0])], length=40), "says that it has 40 items"),
    "ragged": (Rows([(torch.ones(place % 2 + 4), Y[place]) for place in range(6)]), "other shapes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_cannot_be_learned_from_are_refused(module_settings, name):
    data, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        manylora.train(module_settings, base=manylora.FrozenModel(net()), train_data=data)


def test_text_and_tensors_are_not_mixed_up(settings, module_settings):
    with pytest.raises(ConfigError, match="learns from data sets of torch"):
        manylora.train(module_settings | {"data": {"train": "rows.jsonl"}}, base=manylora.FrozenModel(net()))
    with pytest.raises(ConfigError, match="adapts a torch module"):
        manylora.train(settings | {"task": "module"}, train_data=points(8, 0))
    with pytest.raises(ConfigError, match="without a tokenizer"):
        manylora.train(settings, base=manylora.FrozenModel(net()), train_data=ROWS)
    with pytest.raises(DataError, match="a tuple where a row is expected"):
        manylora.train(settings, train_data=points(8, 0))


def test_a_base_that_sees_the_next_token_is_not_trained_to_predict_it(settings, tiny_base_folder):
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    from manylora.base.language import LanguageBase

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    base = LanguageBase(BertForMaskedLM(config), tokenizer=tokenizer, name="bert").probed()
    with pytest.raises(ConfigError, match="in bert a token sees the next"):
        manylora.train(settings, base=base, train_data=ROWS)


def test_several_data_sets_of_torch_are_not_taken_for_the_first(module_settings):
    from manylora.config import load_config
    from manylora.errors import ConfigError
    from manylora.tasks.data import tensor_data

    places = {"base": "b", "task": "module", "output": "o", "data": {"train": ["python:one", "python:two"]}}
    objects = {"python:one": points(8, 1), "python:two": points(8, 2)}
    with pytest.raises(ConfigError, match="names 2 data sets of torch") as caught:
        tensor_data(load_config(places), manylora.FrozenModel(net()), objects)
    assert "ConcatDataset" in str(caught.value.next_step)
