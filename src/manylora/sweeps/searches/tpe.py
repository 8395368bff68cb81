"""TPE: proposes where trials that did well lie close and those that did badly do not.

Source: Bergstra et al., NeurIPS 2011, section 4; optuna's sampler, multivariate (BOHB, arXiv 1807.01774, section 3).
Trials that still run count as bad ones, so that a fleet of trials is not proposed at one spot.
"""

from __future__ import annotations

import math
from typing import Any

from manylora.sweeps.searches import Question

MOST_RANDOM = 10
"""Trials that must have ended before the first is proposed from what they taught; until then they are drawn at random.
optuna's default; a quarter of the trials where that is fewer, so that a small sweep learns too."""


def num_random(num_trials: int) -> int:
    """How many trials must have ended before proposals follow their results."""
    return max(1, min(MOST_RANDOM, num_trials // 4))


def propose(question: Question) -> dict[str, Any]:
    import optuna
    from optuna.trial import TrialState, create_trial

    sampler = optuna.samplers.TPESampler(
        seed=question.draw,
        n_startup_trials=num_random(question.num_trials),
        multivariate=True,
        constant_liar=True,
    )
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for trial in question.trials:
        if trial.state == TrialState.FAIL:
            # optuna learns nothing from a failed trial and would propose the same learning rate again.
            trial = create_trial(value=math.inf, params=trial.params, distributions=trial.distributions)
        study.add_trial(trial)
    return study.ask(question.space.distributions()).params
