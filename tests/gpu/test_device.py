"""The contracts on an accelerator: the same numbers as on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.language import LanguageBase
from manylora.data.collate import collate
from manylora.objectives import OBJECTIVES
from manylora.ops.low_rank import low_rank, reference
from manylora.spec import AdapterSpec

if TYPE_CHECKING:
    from manylora.data.example import Example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def base_on(device: str, dtype: torch.dtype = torch.float64) -> LanguageBase:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LanguageBase(AutoModelForCausalLM.from_config(config).to(dtype).to(device), name="random llama").probed()


def filled(base: LanguageBase, dropout: float = 0.0) -> Bank:
    bank = Bank(base, num_slots=3, dtype=base.dtype)
    for slot, rank in enumerate((3, 8, 5)):
        bank.put(Adapter.new(base, AdapterSpec(rank=rank, dropout=dropout), seed=slot), slot=slot)
    with torch.no_grad():
        for stack in bank.stacks.values():
            draw = torch.Generator().manual_seed(5)
            stack.tensors["b"].copy_(torch.randn(stack.tensors["b"].shape, generator=draw, dtype=torch.float64) * 0.3)
    return bank


@pytest.mark.parametrize("rows", [(0, 0, 0), (0, 1, 2), (2, -1, 0, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fused_gradients_equal_float64_autograd(rows: tuple[int, ...], dropout: float) -> None:
    base = base_on("cuda")
    bank = filled(base, dropout)
    site = base.sites["model.layers.0.mlp.up_proj"]
    x = torch.randn(len(rows), 6, 32, dtype=torch.float64, device="cuda")
    found = []
    for fast in (True, False):
        leaf = x.clone().requires_grad_()
        with bank.route(rows, range(len(rows))):
            uses = [use for _, uses in bank.uses(site, leaf) for use in uses]
            y = low_rank(leaf, site, uses, with_base=True) if fast else reference(leaf, site, uses, site.map)
        tensors = [leaf, *(tensor for use in uses for tensor in use.stack.tensors.values())]
        found.append(torch.autograd.grad(y.square().sum(), tensors))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def losses_on(device: str, examples: list[Example], packed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = base_on(device)
    bank = filled(base)
    rows = [examples[:3], examples[3:5], examples[5:]] if packed else [[e] for e in examples]
    slots = [0, 1, -1] if packed else [0, 0, 0, 1, 1, -1]
    packing = "positions" if packed else "none"
    batch = collate(rows, width=64, pad_id=0, packing=packing, causal=True, slots=slots).to(base.device)
    with bank.route(slots):
        totals = OBJECTIVES.get("causal-lm")(base.outputs(batch), batch).total
    totals.sum().backward()
    return totals.sum().detach().cpu(), [t.grad.cpu() for s in bank.stacks.values() for t in s.tensors.values()]


@pytest.mark.parametrize("packed", [True, False])
def test_losses_and_gradients_equal_the_cpus(packed: bool, ragged_examples: list[Example]) -> None:
    (total, grads), (want_total, want_grads) = (losses_on(d, ragged_examples, packed) for d in ("cuda", "cpu"))
    torch.testing.assert_close(total, want_total, rtol=1e-9, atol=1e-9)
    for got, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    base = base_on("cuda", dtype)
    inputs = dict(base.example(3))
    want = base.model(**inputs, use_cache=False).logits
    bank = Bank(base, num_slots=2)
    bank.put(Adapter.new(base, AdapterSpec(rank=5, dropout=0.1), seed=1), slot=0)
    bank.put(Adapter.new(base, AdapterSpec(method="full", sites=("everything",)), seed=1), slot=1)
    for slots in ([0, 0, 0], [1, 1, 1], [0, 1, -1]):
        with bank.route(slots, [1, 2, 3]):
            assert torch.equal(base.model(**inputs, use_cache=False).logits, want)
