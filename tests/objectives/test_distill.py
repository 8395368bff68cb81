"""Distillation: its gradient, how much memory a tile takes, what a configuration may say, and a student that learns."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from fleets import Running, killed_after, member, ragged
from random_bases import language_base

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.config import load_config
from manylora.errors import ConfigError
from manylora.objectives.distill import DISTILL, distilled
from manylora.objectives.objective import objective_of
from manylora.objectives.settings import DistillSettings
from manylora.spec import AdapterSpec
from manylora.training.checkpoint import Checkpoints
from manylora.types import Batch


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_the_divergences_gradient_is_that_of_the_paper(temperature: float) -> None:
    """d/dz of T^2 KL is T (softmax(z / T) - softmax(v / T))."""
    own = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(4, 7, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.int64)
    distilled(own, labels, taught, temperature=temperature, share=1.0)["loss"].sum().backward()
    want = temperature * ((own / temperature).softmax(-1) - (taught / temperature).softmax(-1))
    torch.testing.assert_close(own.grad, want.detach(), rtol=1e-10, atol=1e-12)


def test_a_student_that_is_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(3, 5)
    found = distilled(logits, torch.tensor([0, 1, 2]), logits, temperature=2.0, share=0.5)
    assert found["kl"].abs().max() < 1e-6


def test_no_logits_outlive_a_tile(monkeypatch) -> None:
    """Neither the student's nor the teacher's: what is of the size positions x vocabulary exists for a chunk only."""
    from manylora.base import language

    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 97 * 8)
    base = language_base()
    tokens = torch.randint(1, 97, (2, 64))
    batch = Batch(
        inputs={"input_ids": tokens, "position_ids": torch.arange(64).expand(2, 64)},
        targets={"labels": tokens.roll(-1, 1)}, slots=(-1, -1),
    )  # fmt: skip
    live: list[int] = []
    most = 0
    whole = base.logits

    def counted(hidden):
        nonlocal most
        logits = whole(hidden)
        live.append(logits.numel())
        most = max(most, logits.numel())
        return logits

    monkeypatch.setattr(base, "logits", counted)
    with Bank(base) as bank, bank.route((-1, -1)):
        outputs = base.outputs(batch)
        outputs.hidden.requires_grad_()

        class Teacher:
            state: ClassVar[dict] = {}

            def outputs(self, batch, who="base"):
                return base.outputs(batch)

        held: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            totals = DISTILL(outputs, batch, Teacher())
        totals.total.sum().backward()
    assert most <= 97 * 8  # of the 128 positions
    assert len(live) >= 2 * 16
    assert max(held) <= outputs.hidden.numel()


def config(tmp_path, **changes):
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base": "builtin:tiny-en", "dtype": "float32",
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.2},
        "adapter": {"rank": 4}, "train": {"steps": 6, "row_tokens": 64, "learning_rate": 5e-3},
        "evaluate": {"samples": 0, "max_new_tokens": 2}, "track": [], "output": str(tmp_path / "run"),
    }  # fmt: skip
    return load_config(values, changes)


@pytest.mark.slow
def test_a_student_follows_a_teacher_in_another_slot(tmp_path) -> None:
    manylora.train(config(tmp_path, **{"train.steps": 30, "output": str(tmp_path / "teacher")}))
    folder = tmp_path / "teacher" / "adapters" / "main"
    assert folder.is_dir()
    settings = {"name": "distill", "teacher": str(folder), "weight": 1.0, "temperature": 1.0}
    result = manylora.train(config(tmp_path, objective=settings, **{"train.steps": 30}))
    student, bare = result.summary["eval"], result.summary["base_eval"]
    assert student["kl"] < 0.1 * bare["kl"]
    assert student["perplexity"] < bare["perplexity"]


def test_a_teacher_survives_a_kill_to_the_same_bytes(tmp_path) -> None:
    base = language_base()
    spec = AdapterSpec(rank=8, sites=("q_proj", "down_proj"))
    Adapter.new(base, spec, seed=7).save(tmp_path / "teacher", base)
    objective = objective_of("distill", DistillSettings(teacher=str(tmp_path / "teacher")))

    def running(folder=None) -> Running:
        one = member("own", ragged(30), spec=AdapterSpec(rank=4, dropout=0.1), total_steps=6)
        one.objective = objective
        more = {} if folder is None else {"checkpoints": Checkpoints(folder, 2), "settings": {"checkpoint_every": 1}}
        return Running(language_base(), [one], torch.float64, num_slots=2, **more)

    whole = running().run()
    killed = running(tmp_path / "run")
    killed_after(3, killed)
    killed.bank.close()
    resumed = running(tmp_path / "run")
    resumed.loop.resume()
    resumed.run()
    for key, value in whole.final("own").items():
        assert torch.equal(resumed.final("own")[key], value), key


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"name": "distil"}, "distill"),
        ({"name": "distill", "temperature": 0}, "above 0"),
        ({"name": "distill", "weight": 2}, "at most 1"),
        ({"name": "distill", "alpha": 0.5}, "weight"),
        ({"temperature": 2.0}, "without objective.name"),
        ({"name": "causal-lm", "temperature": 2.0}, "no settings of its own"),
        ("classification", "labels at positions"),
    ],
)
def test_what_a_configuration_may_not_say(value, says: str, tmp_path) -> None:
    from manylora.training.prepare import Stock

    with pytest.raises(ConfigError, match=says):
        Stock(config(tmp_path, objective=value)).member(config(tmp_path, objective=value), "main")


def test_a_teacher_that_is_not_there_is_an_error_before_training(tmp_path) -> None:
    asked = config(tmp_path, objective={"name": "distill", "teacher": "./nowhere"})
    with pytest.raises(manylora.errors.UserError, match="nowhere"):
        manylora.train(asked)
    assert not (tmp_path / "run").exists()


def test_equal_settings_are_one_objective_and_are_written_out(tmp_path) -> None:
    one, two = (objective_of("distill", DistillSettings(temperature=t)) for t in (2.0, 3.0))
    assert one == DISTILL
    assert one != two
    written = config(tmp_path, objective={"name": "distill", "teacher": "start"})
    assert written.to_dict()["objective"] == {"name": "distill", "temperature": 2.0, "weight": 0.5, "teacher": "start"}
    assert load_config(written.to_dict()) == written
    assert config(tmp_path).to_dict()["objective"] is None
