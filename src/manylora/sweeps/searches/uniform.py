"""Random search: each value drawn uniformly from its choices or its range, whatever was told before."""

from __future__ import annotations

from typing import Any

from manylora.sweeps.searches import Question


def propose(question: Question) -> dict[str, Any]:
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=question.draw))
    return study.ask(question.space.distributions()).params
