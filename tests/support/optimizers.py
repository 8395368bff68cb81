"""Every optimiser with its defaults and with settings of its own, for tests that hold for all of them."""

from __future__ import annotations

from typing import Any

from manylora.settings import read_settings
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import OptimizerSettings

OWN: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"momentum": 0.8, "nesterov": True}, {"nesterov": True}, {"momentum": 0.0}],
    "rmsprop": [{"smoothing": 0.9, "momentum": 0.8, "centered": True}, {"momentum": 0.5}, {"centered": True}],
    "adagrad": [{"rate_decay": 0.1, "initial_accumulator": 0.5}],
}
"""Settings other than the defaults, by optimiser."""

SHARED: list[dict[str, Any]] = [
    {"decay": "l2"},
    {"rate_ratio": 8.0},
    {"rate_pattern": {"q_proj": 0.0, "layers.0.*": 3.0}},
]
"""Settings other than the defaults that all optimisers have."""


def optimizer(name: str, *, own: dict[str, Any] | None = None, **shared: Any) -> OptimizerSettings:
    """An optimiser with settings of its own, and with those that all have."""
    return OptimizerSettings(name=name, own=read_settings(OPTIMIZERS.get(name).settings, own or {}, name), **shared)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    " ".join([name, *(f"{key}={value}" for key, value in own.items())]): (name, own)
    for name in OPTIMIZERS
    for own in ({}, *OWN.get(name, []))
}
"""(name, its own settings) by a label."""
