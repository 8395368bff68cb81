"""Every accepted configuration key changes something a user can see: the adapter, a file, an event or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import manylora
from manylora.config import known_keys
from manylora.errors import UserError

# A value that differs from the baseline's, and further keys that the difference shows under.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "base": ("{other_base}", {}),
    "dtype": ("float32", {}),
    "device": ("cuda:7", {}),
    "quantize": ("nf4", {}),
    "trust_remote_code": (True, {"base": "{custom_base}"}),
    "task": ("module", {}),
    "data.train": ("{other}", {}),
    "data.eval": ("{other}", {}),
    "data.eval_fraction": (0.25, {"data.eval": None}),
    "data.fold": ("1/3", {"data.fold": "2/3", "data.eval": None}),
    "data.split_seed": (7, {"data.eval": None, "data.eval_fraction": 0.25}),
    "data.format": ("text", {}),
    "data.columns": ({"prompt": "note"}, {}),
    "data.overflow": ("right", {"train.row_tokens": 16}),
    "data.turns": ("last", {"data.train": "{talks}", "data.eval": "{talks}"}),
    "data.on_bad_row": ("skip", {"data.train": "{bad}"}),
    "data.chat_template": ("{template}", {"data.train": "{chat}", "data.eval": "{chat}"}),
    "adapter.method": ("full", {}),
    "adapter.rank": (2, {}),
    "adapter.alpha": (3, {}),
    "adapter.sites": ("q_proj", {}),
    "adapter.exclude": ("q_proj", {}),
    "adapter.layers": ([0], {}),
    "adapter.full_sites": ("norm", {}),
    "adapter.rank_pattern": ({"q_proj": 2}, {}),
    "adapter.alpha_pattern": ({"q_proj": 2}, {}),
    "adapter.dropout": (0.5, {}),
    "adapter.init": ("gaussian", {}),
    "adapter.quantize": ("int4", {}),
    "adapter.scale_rule": ("alpha/sqrt(rank)", {}),
    "adapter.from": ("{adapter}", {}),
    "train.learning_rate": (1e-3, {}),
    "train.rate_ratio": (4.0, {}),
    "train.rate_pattern": ({"q_proj": 0}, {}),
    "train.schedule": ("constant", {}),
    "train.warmup_ratio": (0.9, {}),
    "train.warmup_steps": (3, {}),
    "train.min_rate_ratio": (0.5, {}),
    "train.epochs": (1, {"train.steps": None}),
    "train.steps": (3, {}),
    "train.tokens": (40, {"train.steps": None}),
    "train.stop_after": (2, {}),
    "train.row_tokens": (64, {}),
    "train.rows_per_step": (1, {}),
    "train.accumulate": (2, {}),
    "train.optimizer": ("sgd", {}),
    "train.optimizer.momentum": (0.5, {"train.optimizer": "sgd"}),
    "train.optimizer.nesterov": (True, {"train.optimizer": "sgd"}),
    "train.optimizer.smoothing": (0.5, {"train.optimizer": "rmsprop"}),
    "train.optimizer.centered": (True, {"train.optimizer": "rmsprop"}),
    "train.optimizer.rate_decay": (0.5, {"train.optimizer": "adagrad"}),
    "train.optimizer.initial_accumulator": (0.5, {"train.optimizer": "adagrad"}),
    "train.weight_decay": (0.5, {}),
    "train.decay": ("l2", {"train.weight_decay": 0.5}),
    "train.betas": ([0.5, 0.9], {}),
    "train.epsilon": (1e-2, {}),
    "train.clip_norm": (1e-4, {}),
    "train.seed": (5, {}),
    "train.checkpointing": ("full", {}),
    "train.compile": ("layers", {}),
    "objective": ("distill", {}),
    "objective.temperature": (5.0, {"objective": "distill", "train.optimizer": "sgd"}),
    "objective.weight": (0.25, {"objective": "distill"}),
    "objective.teacher": ("{adapter}", {"objective": "distill"}),
    "evaluate.every_steps": (1, {}),
    "evaluate.at_tokens": ([20], {"evaluate.every_steps": 100}),
    "evaluate.max_new_tokens": (2, {}),
    "evaluate.temperature": (1.5, {}),
    "evaluate.samples": (1, {}),
    "evaluate.max_examples": (1, {}),
    "checkpoint.every_steps": (1, {}),
    "checkpoint.keep": (1, {"checkpoint.every_steps": 1}),
    "checkpoint.select": ("last", {"train.learning_rate": 3.0, "evaluate.every_steps": 1}),
    "checkpoint.early_stop_patience": (1, {"train.learning_rate": 3.0, "evaluate.every_steps": 1, "train.steps": 16}),
    "track": ([], {}),
    "output": (None, {}),
    "sweep.space": ({"adapter.rank": [2, 4]}, {}),
    "sweep.search": ("tpe", {}),
    "sweep.trials": (2, {}),
    "sweep.stop.rule": ("successive-halving", {}),
    "sweep.stop.reduction": (2, {"sweep.stop.rule": "successive-halving"}),
    "sweep.stop.first_share": (0.75, {"sweep.stop.rule": "successive-halving"}),
    "sweep.stop.min_reports": (1, {"sweep.stop.rule": "median", "train.steps": 24}),
    "sweep.concurrent": (1, {}),
    "sweep.repeats": (2, {}),
    "sweep.folds": (3, {"sweep.folds": 2, "data.eval": None}),
    "sweep.seed": (5, {}),
    "sweep.engine": ("ray", {}),
    "sweep.workers": (1, {}),
}
# Keys whose difference is that a run is refused with or without them.
SHOWN_BY_REFUSAL = {"device", "task", "data.overflow", "data.on_bad_row", "trust_remote_code"}
# Everything of a run lies there; every other key is compared between two of them.
WHERE = {"output"}
# Processes of their own, which the tests of that engine start.
OF_RAY = {"sweep.engine", "sweep.workers"}


def test_every_key_is_listed_here() -> None:
    assert set(OTHER) == set(known_keys())


@pytest.fixture(scope="module")
def places(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that the values above name."""
    folder = tmp_path_factory.mktemp("keys")
    rows = [{"prompt": f"name : place {n}\n", "completion": f"the dog {n}", "note": "the fox\n"} for n in range(12)]
    for name, chosen in (("train", rows), ("other", rows[::-1][:9])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row | {"text": row["prompt"]}) + "\n" for row in chosen)
        )
    chat = [
        [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": f"the dog {n}"}] for n in range(6)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chat))
    talks = [[*turns, {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}] for turns in chat]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    (folder / "bad.jsonl").write_text((folder / "train.jsonl").read_text() + "not json\n")
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>#' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>#' }}{% endif %}"
    )
    other = folder / "other-base"
    shutil.copytree(tiny_base_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    custom = folder / "custom-base"
    shutil.copytree(tiny_base_folder, custom)
    (custom / "config.json").write_text(
        json.dumps(
            config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.M"}}
        )
    )
    (custom / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = Own\n"
    )
    base = manylora.load_base(str(tiny_base_folder), dtype="float64")
    adapter = manylora.Adapter.new(base, manylora.AdapterSpec(rank=4), seed=77)
    for own in adapter.factors.values():
        own.tensors["b"].fill_(0.5)  # another map than the base's: a teacher, too
    return {
        "other_base": other,
        "custom_base": custom,
        "train": folder / "train.jsonl",
        "other": folder / "other.jsonl",
        "chat": folder / "chat.jsonl",
        "talks": folder / "talks.jsonl",
        "bad": folder / "bad.jsonl",
        "template": folder / "template.jinja",
        "adapter": adapter.save(folder / "adapter", base),
        "tiny": tiny_base_folder,
    }


def seen_of(
    overrides: dict[str, Any], places: dict[str, Path], output: Path, *, sweeps: bool = False
) -> dict[str, Any]:
    """All that a user can see of a run, or the refusal."""
    config: dict[str, Any] = {
        "base": str(places["tiny"]),
        "dtype": "float64",
        "data": {"train": str(places["train"]), "eval": str(places["train"])},
        "adapter": {"rank": 4},
        "train": {"learning_rate": 2e-2, "steps": 4, "row_tokens": 32, "rows_per_step": 2},
        "evaluate": {"max_new_tokens": 4, "every_steps": 2},
        "output": str(output),
    }
    if "adapter.from" in overrides:
        del config["adapter"]
    if sweeps:
        rates = {"low": 1e-3, "high": 1e-1, "log": True}
        config["sweep"] = {"space": {"train.learning_rate": rates}, "trials": 5, "concurrent": 3}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in overrides.items()}
    try:
        result = (manylora.sweep if sweeps else manylora.train)(config, overrides=filled)
    except UserError as error:
        return {"refused": str(error)}
    events = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
    volatile = ("time", "tokens_per_s", "memory_bytes")
    adapter = result.run / "adapters" / ("best" if sweeps else "main")
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        "adapter": {name: value.double().sum().item() for name, value in tensors.items()},
        "scales": json.loads((adapter / "receipt.json").read_text())["sites"],
        "events": [{k: v for k, v in event.items() if k not in volatile} for event in events],
        "samples": (result.run / "samples.jsonl").read_text(),
        "files": sorted(str(p.relative_to(result.run).parent) for p in result.run.rglob("*")),
        "dtype": json.loads((result.run / "manifest.json").read_text())["machine"]["dtype"],
        "scores": (result.summary["eval"], result.summary["base_eval"]),
    }


@pytest.fixture(scope="module")
def baseline(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What is seen of a run or a sweep without the key; keys that show under the same further ones share it."""
    seen: dict[str, dict[str, Any]] = {}

    def of(beside: dict[str, Any], *, sweeps: bool) -> dict[str, Any]:
        name = json.dumps([beside, sweeps])
        if name not in seen:
            folder = tmp_path_factory.mktemp("baseline")
            seen[name] = seen_of(beside, places, folder / "without", sweeps=sweeps)
        return seen[name]

    return of


# To compile takes minutes; tests/training/test_compiling.py shows in every run of the suite that it changes something.
KEYS = [
    pytest.param(key, marks=[pytest.mark.slow] if key == "train.compile" else [])
    for key in sorted(set(OTHER) - WHERE - OF_RAY)
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_something(
    key: str, places: dict[str, Path], baseline: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    value, beside = OTHER[key]
    sweeps = key.startswith("sweep.")
    without = baseline(beside, sweeps=sweeps)
    with_it = seen_of(beside | {key: value}, places, tmp_path / "with", sweeps=sweeps)
    assert key in SHOWN_BY_REFUSAL or not {"refused"} & (with_it.keys() | without.keys()), (with_it, without)
    if key in ("train.accumulate", "train.checkpointing", "train.compile"):
        # Keys whose promise is that the result stays as it is: what they change is how much is held at once.
        assert with_it["adapter"] == pytest.approx(without["adapter"], rel=1e-6, abs=1e-5)
        assert key == "train.accumulate" or with_it["events"] != without["events"]
        return
    assert with_it != without


def test_an_automatic_learning_rate_is_another_than_the_default(places: dict[str, Path], tmp_path: Path) -> None:
    default = seen_of({"train.learning_rate": 2e-4}, places, tmp_path / "default")
    found = seen_of({"train.learning_rate": "auto"}, places, tmp_path / "auto")
    assert "refused" not in found
    assert found["adapter"] != default["adapter"]
