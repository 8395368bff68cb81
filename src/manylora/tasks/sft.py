"""Supervised fine-tuning: a causal language model that learns to answer prompts as the examples do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manylora.tasks.text import TextTask
from manylora.tasks.text_metrics import bleu, exact_match

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.evaluation.sample import Metrics, Sample


class SupervisedFineTuning(TextTask):
    """`bleu` (0 to 100, sacrebleu's corpus score) and `exact_match` (0 to 1) of the answers."""

    name = "sft"

    def metrics(self, samples: Sequence[Sample]) -> Metrics:
        """Scores of answers, by name; empty without samples."""
        return {"bleu": bleu(samples)[0], "exact_match": exact_match(samples)} if samples else {}

    def footnotes(self, samples: Sequence[Sample]) -> dict[str, str]:
        """sacrebleu's signature, and what counts as a match."""
        if not samples:
            return {}
        return {"bleu": bleu(samples)[1], "exact_match": "equal to a reference but for white space"}


SFT = SupervisedFineTuning()
