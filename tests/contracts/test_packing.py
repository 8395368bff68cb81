"""Packed equals padded: what the probes find for each architecture, and losses and gradients to the last digits."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, ModernBertConfig

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.language import LanguageBase
from manylora.data.collate import collate
from manylora.data.examples import Reading, encode
from manylora.data.packing import pack
from manylora.data.rows import Row
from manylora.objectives import OBJECTIVES
from manylora.spec import AdapterSpec
from manylora.types import IGNORED

FOUND = {  # packing, causal
    "llama": ("positions", True),
    "gpt2": ("positions", True),
    "gemma2": ("positions", True),
    "gemma3": ("positions", True),
    "qwen3": ("positions", True),
    "gpt_neox": ("positions", True),
    "mixtral": ("positions", True),
    "opt": ("mask", True),
    "bloom": ("none", True),
    "mamba": ("none", True),
    "lfm2": ("none", True),
    "bert": ("mask", False),
    "roberta": ("mask", False),
    "electra": ("mask", False),
    "distilbert": ("mask", False),
    "modernbert": ("none", False),
}
LABELS = {"positions": "packed: positions", "mask": "packed and given a mask", "none": "padded: with"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("kind", FOUND)
def test_the_probes_find_how_each_architecture_is_packed(kind, attention, dtype, make_base) -> None:
    base = make_base(kind, dtype, attention=attention)
    assert (base.packing, base.causal) == FOUND[kind]
    assert base.packs == (base.packing != "none")
    assert sum(LABELS[base.packing] in note for note in base.notes) == 1


def test_positions_begin_where_the_model_begins_them(make_base) -> None:
    roberta, bert = make_base("roberta"), make_base("bert")
    assert (roberta.rules.first_position, roberta.max_positions) == (2, 62)
    assert (bert.rules.first_position, bert.max_positions) == (0, 64)


@pytest.mark.parametrize("kind", FOUND)
def test_a_padded_row_has_the_logits_of_its_sequence_alone(kind, make_base, make_examples) -> None:
    base = make_base(kind)
    padding = base.config.pad_token_id  # of which RoBERTa thinks that it takes up no position
    examples = [replace(one, tokens=np.where(one.tokens == padding, 5, one.tokens)) for one in make_examples(4)]
    batch = batch_of(base, [[one] for one in examples], "none")
    with torch.no_grad():
        found = base.logits(base.outputs(batch).hidden)
        for row, one in enumerate(examples):
            alone = base.model(input_ids=torch.tensor(one.tokens, dtype=torch.long)[None]).logits[0]
            torch.testing.assert_close(found[row, : len(one)], alone, rtol=1e-4, atol=1e-4)


def batch_of(base, rows, packing=None, *, width=768):
    """The rows as the base wants them. Where tokens see later ones, the labels are tokens in their own places."""
    batch = collate(rows, width=width, pad_id=base.pad_id, packing=packing or base.packing, causal=base.causal,
                    slots=[0] * len(rows))  # fmt: skip
    if base.causal:
        return batch
    labels = torch.full_like(batch.targets["labels"], IGNORED)
    for row, examples in enumerate(rows):
        chosen = torch.tensor(np.concatenate([one.trained for one in examples]))
        labels[row, : len(chosen)] = torch.where(chosen, batch.inputs["input_ids"][row, : len(chosen)], IGNORED)
    return replace(batch, targets={"labels": labels})


def adapted(base) -> Bank:
    """A bank with one LoRA of rank 8 on every linear site, its b not zero and no dropout."""
    bank = Bank(base, num_slots=1, dtype=torch.float64 if base.dtype == torch.float64 else torch.float32)
    bank.put(Adapter.new(base, AdapterSpec(rank=8, dropout=0.0, sites=("all-linear",)), seed=1), slot=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for stack in bank.stacks.values():
            stack.tensors["b"].normal_(std=0.05, generator=generator)
    return bank


def totals_of(base, bank, batch) -> Tensor:
    with bank.route(batch.slots):
        return OBJECTIVES.get("causal-lm")(base.outputs(batch), batch).total


def learned(base, bank, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each row, and the gradient of each factor of the rows' mean loss a token."""
    totals = totals_of(base, bank, batch)
    (totals.sum() / batch.targets["labels"].ne(IGNORED).sum()).backward()
    grads = {}
    for (site, *_), stack in bank.stacks.items():
        for name, tensor in stack.tensors.items():
            grads[f"{site}.{name}"], tensor.grad = tensor.grad.clone(), None
    return totals.detach(), grads


SOURCES = {
    "gsm8k": ("gsm8k/train.jsonl", "question", "answer"),
    "instruct": ("instruct/instruction-data.json", "instruction", "output"),
    "alpaca": ("formats/alpaca_en_demo.json", "instruction", "output"),
}


@pytest.fixture(params=["made", *(pytest.param(name, marks=pytest.mark.needs_data) for name in SOURCES)])
def ragged(request, make_examples, base):
    """Examples of 4 to 300 tokens: random ones, or rows of a real data set by the tests' byte tokenizer."""
    if request.param == "made":
        return make_examples(16, longest=60)
    name, prompt, completion = SOURCES[request.param]
    text = (request.getfixturevalue("shared_data") / name).read_text(encoding="utf-8")
    values = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()[:200]]
    rows = [
        Row({"prompt": one[prompt], "completion": one[completion]}, name, line)
        for line, one in enumerate(values[:200], start=1)
    ]
    # Long rows are left out: what is shown here does not depend on length, and the time of padded rows does.
    reading = Reading(max_length=300, format="prompt-completion", on_bad_row="skip")
    examples = list(encode(rows, base.tokenizer, reading, eos_id=base.eos_ids).examples[:10])
    assert len({len(one) for one in examples}) > 5
    return examples


def packed_rows(examples, row_tokens):
    rows = pack([len(one) for one in examples], row_tokens)
    assert len(rows) < len(examples)
    return [[examples[index] for index in row] for row in rows]


PROVEN = [("llama", None), ("llama", "eager"), ("gpt2", None), ("gemma2", "eager"), ("gemma3", None), ("opt", None),
          ("opt", "eager"), ("bert", None), ("bert", "eager"), ("roberta", None)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("kind", "attention"), PROVEN)
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(
    kind, attention, dtype, tolerance, make_base, ragged
) -> None:
    # Rows are longer than the positions of the base: only its sequences must fit.
    base = make_base(kind, dtype, vocabulary=261, positions=320, attention=attention)
    if attention == "eager":
        # transformers' eager attention narrows scores to float32: where a difference of 1e-16 crosses a rounding
        # boundary, it is 1e-7 of one score. On one thread some do, of two threads none did.
        tolerance = max(tolerance, 1e-8)
    bank = adapted(base)
    row_tokens = 2 * max(map(len, ragged))
    rows = packed_rows(ragged, row_tokens)
    totals, grads = learned(base, bank, batch_of(base, rows))
    ordered = [one for row in rows for one in row]
    wanted_totals, wanted_grads = learned(base, bank, batch_of(base, [[one] for one in ordered], "none"))
    parts = torch.stack([part.sum() for part in wanted_totals.split([len(row) for row in rows])])
    torch.testing.assert_close(totals, parts, rtol=tolerance, atol=0)
    assert grads.keys() == wanted_grads.keys()
    for name, wanted in wanted_grads.items():
        assert wanted.norm() > 0, name
        assert (grads[name] - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "bert"])
def test_each_sequence_of_a_row_has_the_loss_that_it_has_alone(kind, make_base, make_examples) -> None:
    base = make_base(kind, torch.float64)
    bank = adapted(base)
    examples = make_examples(3)
    batch = batch_of(base, [examples])
    start = 0
    for one in examples:
        labels = torch.full_like(batch.targets["labels"], IGNORED)
        place = slice(start, start + len(one))
        labels[:, place] = batch.targets["labels"][:, place]
        (alone,) = totals_of(base, bank, batch_of(base, [[one]], "none"))
        (packed,) = totals_of(base, bank, replace(batch, targets={"labels": labels}))
        torch.testing.assert_close(packed, alone, rtol=1e-10, atol=0)
        start += len(one)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_row_that_is_packed_in_a_way_the_base_does_not_know_has_another_loss(kind, make_base, make_examples) -> None:
    """So that the equalities above could fail: here are rows whose sequences see each other."""
    base = make_base(kind, torch.float64)
    bank = adapted(base)
    rows = [make_examples(3)]
    right = batch_of(base, rows)
    inputs = dict(right.inputs)
    if base.packing == "mask":
        del inputs["attention_mask"]
    else:
        inputs["position_ids"] = torch.arange(inputs["position_ids"].shape[1])[None]
    wrong = replace(right, inputs=inputs)
    (total,), (wanted,) = totals_of(base, bank, wrong), totals_of(base, bank, right)
    assert abs(total - wanted) > 1e-3 * wanted


@pytest.mark.parametrize("packing", ["positions", "mask"])
def test_nothing_predicts_the_first_token_of_a_packed_sequence(packing, make_base, make_examples) -> None:
    base = make_base("llama", torch.float64)
    # The first token of an example is never a target, and must not become one behind another example's last.
    first, second = (replace(one, trained=np.ones(len(one), bool)) for one in make_examples(2))
    batch = collate([[first, second]], width=64, pad_id=0, packing=packing, causal=True, slots=[0])
    labels = batch.targets["labels"][0]
    used = len(first) + len(second)
    assert labels[len(first) - 1] == labels[used - 1] == IGNORED
    assert labels.ne(IGNORED).sum() == used - 2
    changed = replace(second, tokens=np.concatenate([(second.tokens[:1] + 1) % 97, second.tokens[1:]]))
    bank = adapted(base)
    alone = [totals_of(base, bank, batch_of(base, [[one]], "none")) for one in (second, changed)]
    both = [
        totals_of(base, bank, collate([[first, one]], width=64, pad_id=0, packing=packing, causal=True, slots=[0]))
        for one in (second, changed)
    ]
    torch.testing.assert_close(both[1] - both[0], alone[1] - alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "bert"])
@pytest.mark.parametrize("packs", [True, False])
def test_long_padding_makes_no_nan(packs, kind, attention, dtype, make_base, make_examples) -> None:
    """A query that may attend to nothing is NaN, and its gradient reaches what is learned: windows slide past rows."""
    base = make_base(kind, dtype, attention=attention)
    bank = adapted(base)
    long, short = sorted(make_examples(30), key=len, reverse=True)[:3], min(make_examples(30), key=len)
    rows = [long, [short]] if packs else [[long[0]], [short]]
    totals, grads = learned(base, bank, batch_of(base, rows, None if packs else "none"))
    assert torch.isfinite(totals).all()
    assert all(torch.isfinite(grad).all() for grad in grads.values())


class Toy(nn.Module):
    """Each token sees the mean of its sequence up to itself, and `leak` of the token before it, whoever owns that."""

    def __init__(self, leak: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(vocab_size=97)
        self.embed = nn.Parameter(torch.randn(97, 16, generator=generator))
        self.out = nn.Parameter(torch.randn(16, 97, generator=generator))
        self.leak = leak

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> SimpleNamespace:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        states = self.embed[input_ids] + torch.sin(position_ids)[..., None].to(self.embed.dtype)
        sequence = position_ids.eq(0).cumsum(1)
        seen = (sequence[:, :, None] == sequence[:, None, :]).tril().to(states.dtype)
        means = seen @ states / seen.sum(-1, keepdim=True)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        return SimpleNamespace(logits=(means + self.leak * before) @ self.out)


class PositionsOfItsOwn(Toy):
    """Takes positions and counts its own all the same."""

    def forward(self, input_ids: Tensor, **ignored: Tensor) -> SimpleNamespace:
        return super().forward(input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("leak", "packing"), [(0.0, "positions"), (1e-2, "none"), (1.0, "none")])
def test_a_model_that_leaks_across_sequences_is_padded(leak, packing, dtype) -> None:
    base = LanguageBase(Toy(leak).to(dtype)).probed()
    assert base.packing == packing
    assert base.causal
    assert packing != "none" or "a change of one sequence changes the other" in base.notes[0]


def test_a_model_that_counts_its_own_positions_is_padded(make_base) -> None:
    assert LanguageBase(PositionsOfItsOwn(0.0)).probed().packing == "none"
    # Apart, but not where they would stand alone: a mask is not enough for a table of positions.
    bert = make_base("bert")
    inner = bert.model.bert.forward

    def forward(*arguments, position_ids=None, **more):
        return inner(*arguments, **more)

    bert.model.bert.forward = forward
    again = LanguageBase(bert.model).probed()
    assert again.packing == "none"
    assert "with a mask, a sequence of a packed row has other states than alone" in again.notes[0]


def test_outputs_that_are_not_one_a_token_are_not_packed() -> None:
    class Pooled(Toy):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids).logits.mean(1))

    base = LanguageBase(Pooled(0.0)).probed()
    assert base.packing == "none"
    assert "not one for each token" in base.notes[0]


@pytest.mark.parametrize(
    ("window", "reason"), [(128, "sequences of 300 tokens"), (800, "window of 800 tokens would be lost")]
)
def test_a_mask_does_not_take_a_models_attention_window_away(window, reason) -> None:
    """A model that takes a 4-D mask as it is uses it in its local layers too, which shows in long sequences only."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, local_attention=window, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    base = LanguageBase(AutoModelForMaskedLM.from_config(config)).probed()
    assert base.packing == "none"
    assert reason in base.notes[0]
