"""Settings that objectives declare for themselves. No torch: a configuration is checked against them."""

from __future__ import annotations

from dataclasses import dataclass

from manylora.settings import number, word_or_path


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """What distillation alone can be told."""

    temperature: float = number(2.0, "both distributions are those of the logits over it", above=0)
    weight: float = number(
        0.5, "share of the teacher's divergence; the labels' loss has the rest", at_least=0, at_most=1,
        elsewhere=("alpha", "kd_ratio"),
    )  # fmt: skip
    teacher: str = word_or_path(
        "base", ("base", "start"), "who is followed: base, start (what it starts from), or an adapter's folder",
        elsewhere=("teacher_model", "teacher_model_name_or_path"),
    )  # fmt: skip
