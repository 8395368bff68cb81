"""Scores of generated text against one or more references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sacrebleu.metrics.bleu import BLEU

    from manylora.evaluation.sample import Sample


def bleu(samples: Sequence[Sample]) -> tuple[float, str]:
    """Corpus BLEU, 0 to 100, and sacrebleu's signature of how it was computed.

    The number of references may vary from input to input; all of an input's references count.

    Source: BLEU (Papineni et al. 2002); sacrebleu (1804.08771).
    """
    metric, streams = _prepare(samples)
    score = metric.corpus_score([sample.text.strip() for sample in samples], streams)
    return float(score.score), str(metric.get_signature())


def exact_match(samples: Sequence[Sample]) -> float:
    """The share of inputs, 0 to 1, whose text equals one of their references but for white space."""
    hits = sum(_squeeze(sample.text) in {_squeeze(text) for text in sample.references} for sample in samples)
    return hits / len(samples)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _prepare(samples: Sequence[Sample]) -> tuple[BLEU, list[list[Any]]]:
    from sacrebleu.metrics.bleu import BLEU

    most = max(len(sample.references) for sample in samples)
    streams = [
        # sacrebleu takes one list per reference number, and None where an input has fewer.
        [sample.references[number].strip() if number < len(sample.references) else None for sample in samples]
        for number in range(most)
    ]
    # force: sacrebleu warns of text whose full stops stand alone; whether they do is the data's affair.
    return BLEU(force=True), streams
