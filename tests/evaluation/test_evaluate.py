from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from manylora.adapters.bank import Bank
from manylora.adapters.route import route_rows
from manylora.data.examples import Reading, encode
from manylora.data.rows import Row
from manylora.errors import DataError, OutOfMemory, RouteError
from manylora.evaluation import evaluate_loss, evaluate_losses, evaluate_text
from manylora.generation import encode_prompt, generate, render_conversation
from manylora.objectives import OBJECTIVES
from manylora.objectives.forward import Aim
from manylora.tasks import TASKS, Sample

OBJECTIVE = OBJECTIVES.get("causal-lm")
SFT = TASKS.get("sft")


def by_hand(base, examples, slot: int) -> tuple[float, int]:
    """Mean loss and number of trained tokens, one example at a time, from the model's own logits."""
    total, count = 0.0, 0
    for example in examples:
        tokens = torch.tensor(example.tokens, dtype=torch.long)[None]
        with torch.no_grad(), route_rows(base, [slot]):
            losses = functional.cross_entropy(
                base.model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
            )
        trained = torch.tensor(example.trained[1:])
        total, count = total + losses[trained].double().sum().item(), count + int(trained.sum())
    return total / count, count


@pytest.mark.parametrize(("packs", "rows_per_batch", "row_tokens"), [(True, 8, 64), (True, 1, 128), (False, 2, 64)])
def test_the_loss_is_the_mean_over_trained_tokens_however_rows_are_made(
    base, examples, packs, rows_per_batch, row_tokens
):
    base.findings = replace(base.found, rules=replace(base.rules, packing="positions" if packs else "none"))
    found = evaluate_loss(
        base, examples, slot=-1, row_tokens=row_tokens, rows_per_batch=rows_per_batch, objective=OBJECTIVE
    )
    loss, count = by_hand(base, examples, -1)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["tokens"] == count


def test_base_and_adapter_in_one_go_equal_each_alone(base, examples, adapter):
    options = {"row_tokens": 64, "objective": OBJECTIVE, "rows_per_batch": 2}
    without_bank = evaluate_loss(base, examples, slot=-1, **options)
    with Bank(base, num_slots=2) as bank:
        bank.put(adapter, slot=1)
        alone = [evaluate_loss(base, examples, slot=slot, **options) for slot in (1, -1)]
        objective = options.pop("objective")
        together = evaluate_losses(base, examples, {slot: Aim.fresh(objective) for slot in (1, -1)}, **options)
        wanted = by_hand(base, examples, 1)[0]
    assert [one["loss"] for one in together] == pytest.approx([one["loss"] for one in alone], rel=1e-6)
    assert alone[1] == without_bank
    assert alone[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert abs(alone[0]["loss"] - alone[1]["loss"]) > 1e-2


def test_evaluation_leaves_no_gradient_and_no_mode_behind(base, examples, adapter):
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        evaluate_loss(base, examples, slot=0, row_tokens=64, objective=OBJECTIVE)
        assert all(tensor.grad is None for stack, _ in bank.places(0) for tensor in stack.tensors.values())
    assert not base.model.training
    assert torch.is_grad_enabled()


def test_a_perplexity_above_the_largest_float_is_infinite(base, examples):
    class Huge(type(OBJECTIVE)):
        def __call__(self, outputs, batch, beside):
            totals = OBJECTIVE(outputs, batch)
            return replace(totals, total=totals.total * 1e6)

    assert evaluate_loss(base, examples, slot=-1, row_tokens=64, objective=Huge())["perplexity"] == math.inf


def test_examples_without_a_trained_token_are_refused(base, examples):
    silent = [replace(example, trained=np.zeros_like(example.trained)) for example in examples]
    with pytest.raises(DataError, match="none of the 5 examples has a trained token"):
        evaluate_loss(base, silent, slot=-1, row_tokens=64, objective=OBJECTIVE)
    with pytest.raises(DataError, match="none of the 0 examples"):
        evaluate_loss(base, [], slot=-1, row_tokens=64, objective=OBJECTIVE)


def test_an_adapters_slot_needs_a_bank(base, examples):
    with pytest.raises(RouteError, match="carries no bank"):
        evaluate_loss(base, examples, slot=0, row_tokens=64, objective=OBJECTIVE)
    with pytest.raises(RouteError, match="carries no bank"):
        evaluate_text(base, examples, slot=0, max_new_tokens=2, task=SFT)


def test_examples_that_share_a_prompt_are_one_input_with_several_references(base, examples):
    metrics, samples = evaluate_text(base, examples, slot=-1, max_new_tokens=6, task=SFT)
    assert [sample.prompt for sample in samples] == ["name : The Eagle", "name : The Mill", "a", "food : Thai"]
    assert samples[0].references == (" The Eagle is here .", " This is The Eagle .")
    assert metrics == SFT.metrics(samples)
    assert set(metrics) == {"bleu", "exact_match"}


def test_answers_are_those_of_generation_at_the_same_slot(base, examples, adapter):
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        _, samples = evaluate_text(base, examples, slot=0, max_new_tokens=6, task=SFT)
        found = generate(
            base, [encode_prompt(base, sample.prompt) for sample in samples], slots=[0] * 4, max_new_tokens=6
        )
    assert [sample.text for sample in samples] == [one.text for one in found]
    _, plain = evaluate_text(base, examples, slot=-1, max_new_tokens=6, task=SFT)
    assert plain != samples


def test_max_inputs_takes_the_first_inputs_with_all_their_references(base, examples):
    _, samples = evaluate_text(base, examples, slot=-1, max_new_tokens=2, task=SFT, max_inputs=1)
    assert [len(sample.references) for sample in samples] == [2]


def test_a_seed_repeats_drawn_answers(base, examples):
    options = {"slot": -1, "max_new_tokens": 6, "task": SFT, "temperature": 1.0}
    first, again = (evaluate_text(base, examples, seed=3, **options) for _ in range(2))
    assert first == again
    assert first[1] != evaluate_text(base, examples, seed=4, **options)[1]


def test_plain_text_has_nothing_to_answer(base):
    rows = [Row({"text": "some text"}, "a.txt", 1)]
    examples = encode(rows, base.tokenizer, Reading(max_length=64), eos_id=base.eos_ids).examples
    assert evaluate_text(base, examples, slot=-1, max_new_tokens=2, task=SFT) == ({}, [])
    assert evaluate_loss(base, examples, slot=-1, row_tokens=64, objective=OBJECTIVE)["tokens"] == 9


def test_a_conversation_is_generated_from_what_training_showed(base):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (example,) = encode(
        [Row({"messages": messages}, "a.jsonl", 1)], base.tokenizer, Reading(max_length=64), eos_id=base.eos_ids
    ).examples
    assert render_conversation(base.tokenizer, messages[:1]) == example.tokens[: example.prompt_length].tolist()
    _, (sample,) = evaluate_text(base, [example], slot=-1, max_new_tokens=2, task=SFT)
    assert sample.references == ("ho",)


def test_a_perfect_answer_scores_full_marks():
    perfect = [Sample("p", ("The Eagle is a coffee shop .",), "The Eagle is a coffee shop .")]
    assert SFT.metrics(perfect) == {"bleu": pytest.approx(100.0), "exact_match": 1.0}


def refusing(base, monkeypatch, most: int) -> list[int]:
    """A base whose memory holds forwards of at most so many rows; the rows of all that were asked for."""
    asked: list[int] = []
    real = base.model.forward

    def forward(*args, **kwargs):
        rows = kwargs["input_ids"].shape[0]
        asked.append(rows)
        if rows > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(*args, **kwargs)

    outputs = base.outputs

    def limited(batch):
        asked.append(batch.num_rows)
        if batch.num_rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return outputs(batch)

    monkeypatch.setattr(base.model, "forward", forward)
    monkeypatch.setattr(base, "outputs", limited)
    return asked


def test_what_memory_does_not_hold_is_evaluated_in_smaller_batches(base, adapters, examples, monkeypatch):
    with Bank(base, num_slots=2) as bank:
        for slot, adapter in enumerate(adapters):
            bank.put(adapter, slot=slot)
        aims = {slot: Aim.fresh(OBJECTIVE) for slot in (1, -1, 0)}
        whole = evaluate_losses(base, examples, aims, row_tokens=64, rows_per_batch=4)
        texts = {"slot": 1, "max_new_tokens": 5, "task": TASKS.get("sft")}
        metrics, answers = evaluate_text(base, examples, **texts)
        asked = refusing(base, monkeypatch, most=2)
        again = evaluate_losses(base, examples, aims, row_tokens=64, rows_per_batch=4)
        assert max(asked) > 2
        for one, two in zip(whole, again, strict=True):
            assert two == pytest.approx(one, rel=1e-5)
        del asked[:]
        assert evaluate_text(base, examples, **texts)[1] == answers
        assert max(asked) > 2
        refusing(base, monkeypatch, most=0)
        with pytest.raises(OutOfMemory, match="does not hold the forward of one row"):
            evaluate_losses(base, examples, aims, row_tokens=64)
        with pytest.raises(OutOfMemory, match="does not hold the forward of one row"):
            evaluate_text(base, examples, **texts)
    assert metrics
