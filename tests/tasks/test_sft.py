from __future__ import annotations

import pytest

from manylora.errors import UnknownName
from manylora.tasks import TASKS, Sample
from manylora.tasks.text_metrics import bleu, exact_match

SAMPLES = [
    Sample(
        "p", ("The Eagle is a cheap coffee shop .", "A cheap coffee shop is The Eagle ."), "The Eagle is a cheap shop ."
    ),
    Sample("q", ("Aromi serves Chinese food by the river .",), "  Aromi serves Chinese food  by the river .\n"),
]


def test_bleu_is_sacrebleus_corpus_score_with_every_reference():
    import sacrebleu

    score, signature = bleu(SAMPLES)
    first = [sample.references[0] for sample in SAMPLES]
    second = [SAMPLES[0].references[1], SAMPLES[1].references[0]]  # a repeated reference changes nothing
    wanted = sacrebleu.corpus_bleu([sample.text for sample in SAMPLES], [first, second], force=True)
    assert score == wanted.score
    assert "tok:13a" in signature
    assert "nrefs:var" in signature


def test_bleu_of_the_references_themselves_is_100():
    assert bleu([Sample("p", s.references, s.references[-1]) for s in SAMPLES])[0] == pytest.approx(100.0)


def test_exact_match_forgives_white_space_only():
    assert exact_match(SAMPLES) == 0.5
    assert exact_match([Sample("p", ("Yes",), "yes")]) == 0.0


def test_the_task_scores_text_and_says_how():
    task = TASKS.get("sft")
    assert set(task.metrics(SAMPLES)) == set(task.footnotes(SAMPLES)) == {"bleu", "exact_match"}
    assert task.metrics([]) == task.footnotes([]) == {}


def test_empty_answers_score_zero():
    assert TASKS.get("sft").metrics([Sample("p", ("Yes it is so .",), "")]) == {"bleu": 0.0, "exact_match": 0.0}


def test_every_task_names_an_objective_and_an_auto_class():
    import transformers

    from manylora.objectives import OBJECTIVES

    for name in TASKS:
        task = TASKS.get(name)
        assert task.name == name
        assert task.objective in OBJECTIVES
        assert not task.auto or hasattr(transformers, task.auto)  # a module is given, not loaded


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownName, match="sft"):
        TASKS.get("stf")
