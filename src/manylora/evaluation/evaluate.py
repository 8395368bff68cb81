"""Loss and text of slots on examples. The bare base is slot -1 of the same calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from manylora.data.batches import Epochs
from manylora.data.collate import batch_of
from manylora.errors import ConfigError, DataError
from manylora.evaluation.sample import Metrics, Sample
from manylora.generation.decode import generate
from manylora.memory.refused import as_many_as_fit
from manylora.objectives.forward import Aim, SlotSums, forward_batch
from manylora.ops.dropout import mix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manylora.base.frozen import FrozenModel
    from manylora.base.language import LanguageBase
    from manylora.data.example import Example
    from manylora.types import Objective


class ScoresText(Protocol):
    """What scores the answers of `evaluate_text`."""

    def metrics(self, samples: Sequence[Sample]) -> Metrics:
        """Scores of answers, by name; empty without samples."""
        ...


def evaluate_loss(
    base: FrozenModel,
    examples: Sequence[Any],
    *,
    slot: int,
    row_tokens: int,
    objective: Objective,
    rows_per_batch: int = 8,
) -> Metrics:
    """`loss` and `tokens` (the weight that it is the mean of: trained tokens, rows), with what the objective adds.

    Followers that the objective asks for are the bare base.

    Raises:
        DataError: no example, or none with a trained token. RouteError: an adapter's slot and no bank.
        OutOfMemory: the memory does not hold one row.
    """
    aims = {slot: Aim.fresh(objective)}
    (found,) = evaluate_losses(base, examples, aims, row_tokens=row_tokens, rows_per_batch=rows_per_batch)
    return found


@torch.no_grad()
def evaluate_losses(
    base: FrozenModel,
    examples: Sequence[Any],
    aims: Mapping[int, Aim],
    *,
    row_tokens: int,
    rows_per_batch: int = 8,
) -> list[Metrics]:
    """`evaluate_loss` of several slots, in the order of `aims`; each batch holds the same rows once for every slot.

    Semantics: loss = sum over examples of the objective's totals / sum of its weights, in float64; neither the rows
    that examples were packed into nor the batches change it. Batches that memory refuses are computed in smaller ones.

    Raises:
        DataError: no example, or none with a trained token. OutOfMemory: the memory does not hold one row.
        RouteError: an adapter's slot and no bank; several slots on a bank that is not proven (`bank.prove()`).
    """
    if rows_per_batch < 1:
        raise ConfigError(f"rows_per_batch is {rows_per_batch}", allowed="at least 1")
    rows = Epochs(examples, row_tokens=row_tokens, seed=0, packs=base.packs).rows(0) if examples else []

    def run(at_once: int) -> SlotSums:
        sums = SlotSums(aims, base.device)
        for start in range(0, len(rows), rows_per_batch):
            # Slot by slot, so that each slot's update runs over one block of rows.
            pairs = [(slot, row) for slot in aims for row in rows[start : start + rows_per_batch]]
            for begin in range(0, len(pairs), at_once):
                chosen = pairs[begin : begin + at_once]
                batch = batch_of(
                    [[examples[index] for index in row] for _, row in chosen],
                    base,
                    width=row_tokens,
                    slots=[slot for slot, _ in chosen],
                )
                sums.weigh(batch)
                sums.add(batch, forward_batch(base, batch, aims))
        return sums

    sums = as_many_as_fit(run, rows_per_batch * len(aims), base.device)
    return [_metrics(sums, slot, len(examples), aim.objective) for slot, aim in aims.items()]


def evaluate_text(
    base: LanguageBase,
    examples: Sequence[Example],
    *,
    slot: int,
    max_new_tokens: int,
    task: ScoresText,
    temperature: float = 0.0,
    seed: int = 0,
    max_inputs: int | None = None,
    batch_rows: int = 128,
) -> tuple[Metrics, list[Sample]]:
    """The task's scores of one slot's answers, and the answers, in the order in which their inputs first come.

    Examples that share a prompt are one input with several references. Examples without a prompt (plain text) have
    nothing to answer and are left out; where all are, both results are empty. `max_inputs` takes the first inputs only.
    At a temperature above 0, `seed` and the input's place seed each answer. Where memory refuses `batch_rows` prompts
    at once, fewer are answered together.

    Raises:
        DataError: a prompt that leaves no position for an answer. RouteError: an adapter's slot and no bank.
        OutOfMemory: the memory does not hold one prompt.
    """
    inputs = _inputs(examples)[:max_inputs]
    answers = as_many_as_fit(
        lambda at_once: generate(
            base,
            [prompt for prompt, _ in inputs],
            slots=[slot] * len(inputs),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[mix(seed, place) for place in range(len(inputs))],
            batch_rows=at_once,
        ),
        batch_rows,
        base.device,
    )
    samples = [
        Sample(together[0].prompt, tuple(example.reference for example in together), answer.text)
        for (_, together), answer in zip(inputs, answers, strict=True)
    ]
    return task.metrics(samples), samples


def _inputs(examples: Sequence[Example]) -> list[tuple[tuple[int, ...], list[Example]]]:
    """Prompts as generation sees them, and the examples that share each, in the order in which they first come."""
    found: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        if example.prompt:
            prompt = tuple(int(token) for token in example.tokens[: example.prompt_length])
            found.setdefault(prompt, []).append(example)
    return list(found.items())


def _metrics(sums: SlotSums, slot: int, num_examples: int, objective: Objective) -> Metrics:
    weight = sums.weight(slot)
    if weight == 0:
        raise DataError(
            f"none of the {num_examples} examples has a trained token, so there is no loss to measure",
            next_step="give rows with a completion or an assistant turn",
        )
    loss, metrics = sums.loss(slot), sums.metrics(slot)
    return {"loss": loss, **objective.summary(loss, metrics), **metrics, "tokens": weight}
