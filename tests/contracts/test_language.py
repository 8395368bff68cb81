"""Outputs of a base: supervised positions only, in chunks, packed as well as padded."""

from __future__ import annotations

import pytest
import torch

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base import language
from manylora.base.language import chunks
from manylora.data.collate import collate
from manylora.objectives import OBJECTIVES
from manylora.spec import AdapterSpec
from manylora.types import IGNORED

KINDS = ("llama", "gpt2", "gemma2")


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_finds_the_map_after_the_head(kind, make_base) -> None:
    assert make_base(kind).post_head == {"llama": "none", "gpt2": "none", "gemma2": "softcap"}[kind]


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_a_model_whose_head_does_more_than_a_map_gives_its_own_logits(kind, make_base, make_examples) -> None:
    base = make_base(kind)
    assert base.post_head is None
    assert any("own logits" in note for note in base.notes)
    batch = collate([[e] for e in make_examples(3)], width=32, pad_id=0, packing="none", causal=False, slots=[-1] * 3)
    labels = batch.targets["labels"]
    got = base.outputs(batch).map_supervised(
        labels, lambda logits, wanted: {"logit": logits.gather(1, wanted[:, None])[:, 0]}
    )
    own = base.model(**batch.inputs).logits.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(got["logit"], torch.where(labels.ne(IGNORED), own, 0).sum(1))


def test_states_in_float32_meet_a_head_of_another_dtype(make_base, make_examples) -> None:
    """Mamba's last norm ends in float32 whatever the dtype of the weights, and its model narrows that for the head."""
    base = make_base("mamba", torch.bfloat16)
    assert base.post_head == "none"
    batch = collate([[e] for e in make_examples(3)], width=32, pad_id=0, packing="none", causal=True, slots=[-1] * 3)
    assert base.outputs(batch).hidden.dtype == torch.float32
    total = OBJECTIVES.get("causal-lm")(base.outputs(batch), batch).total
    own = base.model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
    labels = batch.targets["labels"]
    want = torch.nn.functional.cross_entropy(own.float().transpose(1, 2), labels, reduction="none").sum(1)
    torch.testing.assert_close(total, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_loss_equals_cross_entropy_of_the_models_own_logits(
    kind, make_base, make_examples, monkeypatch
) -> None:
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 97 * 5)
    base = make_base(kind, torch.float64)
    examples = make_examples(6)
    batch = collate([[e] for e in examples], width=32, pad_id=0, packing="none", causal=True, slots=[-1] * 6)
    logits = base.model(**batch.inputs).logits
    labels = batch.targets["labels"]
    want = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    ).sum(1)
    got = OBJECTIVES.get("causal-lm")(base.outputs(batch), batch)
    torch.testing.assert_close(got.total, want)
    assert OBJECTIVES.get("causal-lm").weight(batch).tolist() == labels.ne(IGNORED).sum(1).tolist()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_adapted_head_has_the_gradients_of_plain_autograd(method, make_base, make_examples, monkeypatch) -> None:
    """The head sees a selection of positions in chunks; mixed slots must still reach their own factors."""
    base = make_base("llama", torch.float64)
    bank = Bank(base, num_slots=3, dtype=torch.float64)
    for slot in range(3):
        spec = AdapterSpec(method=method, rank=3, dropout=0.1, sites=("lm_head", "q_proj"))
        bank.put(Adapter.new(base, spec, seed=slot), slot=slot)
    with torch.no_grad():
        for stack in bank.stacks.values():
            for tensor in stack.tensors.values():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    examples = make_examples(5)
    slots = [2, 0, -1, 0, 1]
    batch = collate([[e] for e in examples], width=32, pad_id=0, packing="positions", causal=True, slots=slots,
                    streams=[1, 2, 3, 4, 5])  # fmt: skip

    def run(elements: int) -> list[torch.Tensor]:
        monkeypatch.setattr(language, "CHUNK_ELEMENTS", elements)
        with bank.route(batch.slots, None):
            OBJECTIVES.get("causal-lm")(base.outputs(batch), batch).total.sum().backward()
        grads = [t.grad.clone() for s in bank.stacks.values() for t in s.tensors.values()]
        for stack in bank.stacks.values():
            for tensor in stack.tensors.values():
                tensor.grad = None
        return grads

    def plain() -> list[torch.Tensor]:
        with bank.route(batch.slots, None):
            logits = base.model(**batch.inputs, use_cache=False).logits
        labels = batch.targets["labels"]
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").backward()
        grads = [t.grad.clone() for s in bank.stacks.values() for t in s.tensors.values()]
        for stack in bank.stacks.values():
            for tensor in stack.tensors.values():
                tensor.grad = None
        return grads

    truth = plain()
    for elements in (97 * 3, 97 * 1000):
        for got, want in zip(run(elements), truth, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_dropout_at_the_head_does_not_depend_on_neighbours(make_base, make_examples, monkeypatch) -> None:
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 97 * 4)
    base = make_base("llama", torch.float64)
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    for slot in range(2):
        spec = AdapterSpec(rank=3, dropout=0.5, sites=("lm_head",))
        bank.put(Adapter.new(base, spec, seed=slot), slot=slot)
    with torch.no_grad():
        for stack in bank.stacks.values():
            stack.tensors["b"].normal_()
    examples = make_examples(3)

    def totals(rows: list[int]) -> torch.Tensor:
        batch = collate([[examples[r]] for r in rows], width=32, pad_id=0, packing="positions", causal=True,
                        slots=[r % 2 for r in rows], streams=[50 + r for r in rows])  # fmt: skip
        with bank.route(batch.slots, batch.streams):
            return OBJECTIVES.get("causal-lm")(base.outputs(batch), batch).total

    together = totals([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(totals([row])[0], together[row])


def test_chunks_cut_rows_at_their_own_multiples() -> None:
    assert chunks([3, 0, 9, 2], 4) == [[(0, 0, 3)], [(2, 0, 4)], [(2, 4, 8)], [(2, 8, 9), (3, 0, 2)]]
    assert chunks([], 4) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_to_the_bit(kind, dtype, make_base) -> None:
    base = make_base(kind, dtype)
    inputs = base.example(3)
    want = base.model(**inputs, use_cache=False).logits
    bank = Bank(base, num_slots=3)
    bank.put(Adapter.new(base, AdapterSpec(rank=5, dropout=0.1), seed=1), slot=0)
    bank.put(Adapter.new(base, AdapterSpec(rank=8, sites=("everything",), method="full"), seed=1), slot=1)
    for slots in ([0, 0, 0], [1, 1, 1], [0, 1, -1], [-1, -1, -1]):
        with bank.route(slots, [1, 2, 3]):
            assert torch.equal(base.model(**inputs, use_cache=False).logits, want)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_lead_at_every_linear_site(kind, make_base) -> None:
    base = make_base(kind)
    bank = Bank(base, num_slots=2)
    linear = {site.name for site in base.sites.values() if site.kind in ("linear", "conv1d")}
    assert linear <= bank._proven
