from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manylora.base.frozen import FrozenModel
from manylora.errors import ConfigError
from manylora.training.rates import HIGHEST, LOWEST, auto_rate


class Config:
    def __init__(self, hidden_size, model_type):
        self.hidden_size = hidden_size
        self.model_type = model_type


class Wrapped(Config):
    """A configuration that keeps the language model's apart, as those of models with images do."""

    def __init__(self, inner):
        super().__init__(None, "wrapper")
        self.inner = inner

    def get_text_config(self):
        return self.inner


def base_of(hidden: object, kind: str | None = "llama") -> FrozenModel:
    model = nn.Linear(2, 2)
    model.config = Config(hidden, kind)
    return FrozenModel(model)


def rate(hidden: int, kind: str = "llama", *, method="lora", rows=128, steps=1000) -> float:
    return auto_rate(base_of(hidden, kind), method=method, rows_per_step=rows, total_steps=steps)[0]


@pytest.mark.parametrize(
    ("hidden", "kind", "expected"),
    [
        (2000, "llama", 5e-4),
        (2048, "llama", 4.908e-4),  # Llama-3.2-1B
        (4096, "llama", 2.856e-4),  # Llama-3.1-8B
        (8192, "llama", 1.662e-4),  # Llama-3.1-70B
        (4096, "qwen3", 4.730e-4),  # Qwen3-8B
        (2048, "qwen3_moe", 4.991e-4),  # Qwen3-30B-A3B
    ],
)
def test_the_rule_gives_the_rates_of_known_models(hidden, kind, expected):
    assert rate(hidden, kind) == pytest.approx(expected, rel=1e-3)


def test_full_fine_tuning_takes_a_tenth():
    assert rate(2000, method="full") == pytest.approx(5e-5)
    assert rate(2000, method="full", steps=10) == pytest.approx(5e-5)


def test_a_short_run_of_an_adapter_takes_half_as_much_again():
    assert rate(2000, steps=99) == pytest.approx(7.5e-4)
    assert rate(2000, steps=100) == pytest.approx(5e-4)


def test_the_rate_grows_with_the_root_of_a_large_batch_and_stays_for_a_small_one():
    assert rate(2000, rows=512) == pytest.approx(1e-3)
    assert rate(2000, rows=1) == rate(2000, rows=128) == pytest.approx(5e-4)


def test_another_family_takes_the_exponent_of_llama_and_is_told_so():
    made, reason = auto_rate(base_of(4096, "gemma3"), method="lora", rows_per_step=4, total_steps=500)
    assert made == rate(4096, "llama")
    assert "as for llama, which gemma3 is not" in reason
    assert "unknown is not" in auto_rate(base_of(4096, None), method="lora", rows_per_step=4, total_steps=500)[1]


def test_the_reason_is_one_line_with_every_term():
    _, reason = auto_rate(base_of(2000), method="lora", rows_per_step=512, total_steps=50)
    assert reason == (
        "learning rate 0.0015: 5e-05 x (2000 / hidden size 2000)^0.781 for llama x 10 for an adapter "
        "x 1.5 for 50 steps, fewer than 100 x the root of 512 / 128 rows (the rule of LoRA Without Regret)"
    )


def test_a_rate_beyond_the_bounds_is_held_and_said():
    made, reason = auto_rate(base_of(32), method="lora", rows_per_step=4, total_steps=500)
    assert made == HIGHEST
    assert "= 0.013, held within 1e-06 to 0.005" in reason
    assert rate(10**7, method="full") == LOWEST


@given(
    st.integers(1, 10**6),
    st.sampled_from(["llama", "qwen2", "mistral"]),
    st.sampled_from(["lora", "full"]),
    st.integers(1, 10**4),
    st.integers(1, 10**6),
)
def test_the_rate_is_sane_and_falls_with_the_hidden_size(hidden, kind, method, rows, steps):
    made = rate(hidden, kind, method=method, rows=rows, steps=steps)
    assert LOWEST <= made <= HIGHEST
    assert math.isfinite(made)
    assert rate(2 * hidden, kind, method=method, rows=rows, steps=steps) <= made


def test_the_hidden_size_of_the_language_model_counts_where_it_stands_apart():
    base = base_of(1)
    base.model.config = Wrapped(Config(4096, "qwen3"))
    made, _ = auto_rate(base, method="lora", rows_per_step=4, total_steps=500)
    assert made == rate(4096, "qwen3")


def test_a_real_base_has_what_the_rule_needs(base):
    made, reason = auto_rate(base, method="lora", rows_per_step=4, total_steps=500)
    assert made == HIGHEST
    assert "hidden size 32" in reason


@pytest.mark.parametrize("hidden", [None, 0, "768"])
def test_a_base_without_a_hidden_size_is_refused_with_a_next_step(hidden):
    with pytest.raises(ConfigError, match="needs a hidden size, which a Linear does not state") as error:
        auto_rate(base_of(hidden), method="lora", rows_per_step=4, total_steps=500)
    assert "--find-lr" in str(error.value)


def test_any_torch_module_is_refused_with_a_next_step():
    base = FrozenModel(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="a Sequential does not state"):
        auto_rate(base, method="lora", rows_per_step=4, total_steps=500)


def test_the_rule_is_one_for_adamw():
    with pytest.raises(ConfigError, match=r"holds for adamw; train\.optimizer is sgd"):
        auto_rate(base_of(2000), method="lora", rows_per_step=4, total_steps=500, optimizer="sgd")
