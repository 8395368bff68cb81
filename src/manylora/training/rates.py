"""`train.learning_rate: auto`: the field's rule for a base and a method, with its reason."""

from __future__ import annotations

import math
from typing import Any

from manylora.base.frozen import FrozenModel
from manylora.errors import ConfigError
from manylora.methods import METHODS

FULL_RATE = 5e-5
"""The rate of full fine-tuning at `REFERENCE_WIDTH`."""

ADAPTER_FACTOR = 10.0
"""An adapter's best rate over that of full fine-tuning, whatever its rank, with alpha 32 and the scale alpha / rank."""

SHORT_FACTOR, SHORT_STEPS = 1.5, 100
"""An adapter's best rate is about 15 times that of full fine-tuning, not 10, where steps are fewer than about 100."""

REFERENCE_WIDTH = 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""How the best rate falls with the hidden size, by the beginning of the model's type."""

REFERENCE_ROWS = 128
"""Sequences of a step for which the rule was fitted."""

LOWEST, HIGHEST = 1e-6, 5e-3
"""What the rule may give: far from the sizes that it was fitted on, a power law promises too much or too little."""


def auto_rate(
    base: FrozenModel, *, method: str, rows_per_step: int, total_steps: int, optimizer: str = "adamw"
) -> tuple[float, str]:
    """The peak learning rate of a member, and one line for the log that says how it came about.

    Source: 5e-5 x 10 x (2000 / hidden size)^p, p 0.781 for Llama and 0.0775 for Qwen, is the rule of the Tinker
    cookbook (`hyperparam_utils.get_lr`), fitted on steps of 128 sequences; the 10 (9.8 over 14 models), the 15 below
    about 100 steps, and that rank does not matter are from LoRA Without Regret (Schulman et al., 2025). Other families
    take Llama's exponent. The same documentation lets the rate grow with the root of the batch, which is applied above
    128 rows only, because below them the best rate does not fall so: on builtin:tiny-en (hidden size 256, rank 16, the
    bundled data, cosine schedule) the rule is 2.5e-3, and the root would make it 2.2e-4 for 1 row a step and 4.4e-4 for
    4. Measured held-out losses (2026-11-21) at 3e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2: 2.33, 1.59, 1.35, 1.31, 1.61, 5.0
    with 1 row and 150 steps; 2.37, 1.50, 1.27, 1.17, 1.20, 5.4 with 4 rows and 100 steps.

    Raises:
        ConfigError: a base without a hidden size, or an optimiser that the rule does not hold for.
    """
    if optimizer != "adamw":
        raise ConfigError(
            f"train.learning_rate is auto, and its rule holds for adamw; train.optimizer is {optimizer}",
            next_step="set train.learning_rate to a number, or find one with --find-lr",
        )
    config: Any = getattr(base.model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(hidden, int) or hidden < 1:
        raise ConfigError(
            f"train.learning_rate is auto, and its rule needs a hidden size, which a {type(base.model).__name__} "
            "does not state",
            next_step="set train.learning_rate to a number, or find one with --find-lr",
        )
    kind = str(getattr(text, "model_type", None) or "unknown")
    family = next((name for name in EXPONENTS if kind.startswith(name)), None)
    exponent = EXPONENTS[family or "llama"]
    rate = FULL_RATE * (REFERENCE_WIDTH / hidden) ** exponent
    terms = [
        f"{FULL_RATE:g}",
        f"({REFERENCE_WIDTH} / hidden size {hidden})^{exponent} "
        + (f"for {kind}" if family else f"as for llama, which {kind} is not"),
    ]
    if not METHODS.get(method).replaces:
        rate *= ADAPTER_FACTOR
        terms.append(f"{ADAPTER_FACTOR:g} for an adapter")
        if total_steps < SHORT_STEPS:
            rate *= SHORT_FACTOR
            terms.append(f"{SHORT_FACTOR:g} for {total_steps} steps, fewer than {SHORT_STEPS}")
    if rows_per_step > REFERENCE_ROWS:
        rate *= math.sqrt(rows_per_step / REFERENCE_ROWS)
        terms.append(f"the root of {rows_per_step} / {REFERENCE_ROWS} rows")
    held = min(max(rate, LOWEST), HIGHEST)
    bound = "" if held == rate else f" = {rate:.2g}, held within {LOWEST:g} to {HIGHEST:g}"
    return held, f"learning rate {held:.2g}: {' x '.join(terms)}{bound} (the rule of LoRA Without Regret)"
