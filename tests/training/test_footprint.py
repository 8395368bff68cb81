from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers import KINDS, optimizer
from torch import nn
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.data.batches import Epochs
from manylora.data.collate import batch_of
from manylora.data.example import Example
from manylora.data.tensors import TensorExamples
from manylora.errors import RouteError
from manylora.memory import device as device_memory
from manylora.memory.device import SAFETY_SHARE, free_bytes
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.objectives.classification import CLASSIFICATION
from manylora.spec import AdapterSpec
from manylora.training import footprint
from manylora.training.footprint import (
    BACKWARD_FACTOR,
    ENOUGH_TOKENS,
    ActivationModel,
    choose_concurrency,
    member_bytes,
    saved_bytes,
    token_bytes,
)
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import SlotUpdate, StackedOptimizer, gradient_norms
from manylora.types import Batch

SPECS = {
    "padded rank": AdapterSpec(rank=5),
    "ranks by site": AdapterSpec(rank=3, rank_pattern={"q_proj": 9}),
    "anchors": AdapterSpec(rank=4, init="pissa"),
    "a whole head": AdapterSpec(rank=4, full_sites=("lm_head",)),
    "whole copies": AdapterSpec(method="full", sites=("everything",)),
}


def example(length: int, draw: np.random.Generator, trained_from: int = 1) -> Example:
    tokens = draw.integers(0, 200, length).astype(np.int32)
    return Example(tokens, np.arange(length) >= trained_from, trained_from, "", "", "", "made", 1)


def epochs_of(base: LanguageBase, lengths: list[int], row_tokens: int = 96) -> Epochs:
    draw = np.random.default_rng(0)
    examples = [example(length, draw) for length in lengths]
    return Epochs(examples, row_tokens=row_tokens, seed=0, packs=base.packs)


def language_batch(base: LanguageBase, rows: list[list[int]]) -> Batch:
    draw = np.random.default_rng(1)
    made = [[example(length, draw) for length in row] for row in rows]
    return batch_of(made, base, width=96, slots=[0] * len(rows), streams=range(len(rows)))


def counted(base: FrozenModel, adapter: Adapter, batch: Batch, objective=CAUSAL_LM) -> int:
    """What the hooks see in a forward of this batch."""
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        with bank.route(batch.slots, batch.streams):
            return saved_bytes(base, lambda: objective(base.outputs(batch), batch).total)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(SPECS))
def test_a_member_holds_what_its_stacks_gradients_and_states_hold(base, name, kind):
    of, own = KINDS[kind]
    settings = optimizer(of, own=own)
    adapter = Adapter.new(base, SPECS[name], seed=0)
    with Bank(base, num_slots=2) as bank:
        for members in (1, 2):
            bank.put(adapter, slot=members - 1)
            rule = StackedOptimizer(bank, OPTIMIZERS.get(settings.name))
            batch = language_batch(base, [[20]] * members)
            slots = list(range(members))
            with bank.route(slots):
                CAUSAL_LM(base.outputs(batch), batch).total.sum().backward()
            rule.step({slot: SlotUpdate(rate=1e-3, step=1, optimizer=settings) for slot in slots}, gradient_norms(bank))
            factors = [tensor for stack in bank.stacks.values() for tensor in stack.tensors.values()]
            anchors = [tensor for stack in bank.stacks.values() for tensor in stack.anchors.values()]
            gradients = [tensor.grad for tensor in factors if tensor.grad is not None]
            states = [tensor for slot in slots for tensor in rule.slot_state(slot, settings).values()]
            held = sum(tensor.nbytes for tensor in (*factors, *anchors, *gradients, *states))
            assert len(gradients) == len(factors)
            assert held == members * member_bytes(base, adapter, settings)
            for tensor in factors:
                tensor.grad = None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows", [[[40, 40]], [[10, 14]] * 7, [[60, 20]] * 3, [[6, 90]] * 2])
def test_a_packed_forward_keeps_what_was_predicted(base, rows, dropout):
    adapter = Adapter.new(base, AdapterSpec(rank=4, dropout=dropout), seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, [48, 48, 30, 50]))
    batch = language_batch(base, rows)
    held = counted(base, adapter, batch)
    assert model.saved(*batch.targets["labels"].shape) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("lengths", [[96], [95], [24, 24, 48], [9] * 20])
def test_a_padded_row_is_predicted_whatever_rows_the_data_give(base, lengths):
    adapter = Adapter.new(base, AdapterSpec(rank=4), seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, lengths))
    batch = language_batch(base, [[50], [70], [20, 9]])
    assert model.saved(*batch.targets["labels"].shape) == pytest.approx(counted(base, adapter, batch), rel=0.02)


def test_a_base_that_takes_one_sequence_a_row_is_predicted(base):
    base.findings = replace(base.found, rules=replace(base.rules, packing="none"))
    adapter = Adapter.new(base, AdapterSpec(rank=4), seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, [90, 80, 20]))
    batch = language_batch(base, [[50], [70], [20]])
    assert model.saved(*batch.targets["labels"].shape) == pytest.approx(counted(base, adapter, batch), rel=0.02)


def test_rows_beyond_the_positions_of_the_base_are_measured_within_them():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=0
    )
    base = LanguageBase(GPT2LMHeadModel(config), name="learned positions").probed()
    adapter = Adapter.new(base, AdapterSpec(rank=4), seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, [60] * 8, row_tokens=800))
    batch = language_batch(base, [[50, 20]] * 2)
    assert model.saved(*batch.targets["labels"].shape) == pytest.approx(counted(base, adapter, batch), rel=0.02)


def test_a_forward_of_a_packed_base_is_predicted(tiny_base_folder):
    base = load_base(str(tiny_base_folder), dtype="float32", device="cpu", quantize="nf4")
    adapter = Adapter.new(base, AdapterSpec(rank=4), seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, [48, 48]))
    batch = language_batch(base, [[50, 20]] * 2)
    assert model.saved(*batch.targets["labels"].shape) == pytest.approx(counted(base, adapter, batch), rel=0.02)


def test_rows_wider_than_any_that_was_measured_are_predicted(base, monkeypatch):
    monkeypatch.setattr(footprint, "PROBE_TOKENS", 32)
    adapter = Adapter.new(base, AdapterSpec(rank=4), seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, [48, 48]))
    batch = language_batch(base, [[48, 48]] * 2)
    assert model.saved(2, 96) == pytest.approx(counted(base, adapter, batch), rel=0.02)


def test_a_larger_rank_and_whole_copies_keep_more(base):
    epochs = epochs_of(base, [48, 48])
    sizes = [
        token_bytes(base, Adapter.new(base, AdapterSpec(rank=rank), seed=0), CAUSAL_LM, epochs).linear
        for rank in (1, 16)
    ]
    assert sizes[0] < sizes[1]


def test_what_bfloat16_copies_of_trained_weights_take_counts_once_a_member(base):
    base.model.to(torch.bfloat16)
    adapter = Adapter.new(base, SPECS["whole copies"], seed=0)
    model = token_bytes(base, adapter, CAUSAL_LM, epochs_of(base, [48, 48]))
    linears = sum(p.nbytes for name, p in base.model.named_parameters() if "proj" in name)
    assert model.fixed >= linears
    assert model.saved(0, 96, members=3) == 3 * model.saved(0, 96, members=1)


def test_a_chunk_of_the_loss_holds_tiles_behind_a_frozen_head_and_logits_behind_a_trained_one(base):
    epochs, logits = epochs_of(base, [48, 48]), 4 * base.vocabulary
    frozen, trained = (
        token_bytes(base, Adapter.new(base, spec, seed=0), CAUSAL_LM, epochs)
        for spec in (AdapterSpec(rank=4), SPECS["a whole head"])
    )
    assert 0 < frozen.chunk < logits
    assert 3 * logits <= trained.chunk
    for model in (frozen, trained):
        assert model.total(2, 96) == pytest.approx(BACKWARD_FACTOR * model.saved(2, 96) + 192 * model.chunk, abs=1)
        most = BACKWARD_FACTOR * model.saved(999, 96) + model.chunk_tokens * model.chunk
        assert model.total(999, 96) == pytest.approx(most, abs=1)


def test_rows_of_a_module_are_measured_too():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3))
    base = FrozenModel(module)
    data = TensorExamples(TensorDataset(torch.randn(9, 12), torch.randint(0, 3, (9,))), ["input"])
    adapter = Adapter.new(base, AdapterSpec(rank=2), seed=0)
    model = token_bytes(base, adapter, CLASSIFICATION, Epochs(data, row_tokens=512, seed=0, packs=False))
    batch = batch_of([[data[index]] for index in range(7)], base, width=8, slots=[0] * 7, streams=range(7))
    assert model.saved(7, 8) == pytest.approx(counted(base, adapter, batch, CLASSIFICATION), rel=0.02)
    assert (model.quadratic, model.chunk) == (0.0, 0.0)


def test_a_storage_counts_once_and_what_the_base_owns_not_at_all():
    module = nn.Linear(10, 10)
    base = FrozenModel(module)
    x = torch.randn(10, requires_grad=True)
    weight = module.weight

    def forward() -> torch.Tensor:
        grown = x.exp()  # saves what it gives
        return grown * x * weight  # and saves exp(x) again, x, and a weight, which is the base's

    assert saved_bytes(base, forward) == 2 * x.nbytes


def test_the_base_is_as_it_was_after_the_measurement(base):
    adapter = Adapter.new(base, AdapterSpec(rank=4), seed=0)
    epochs = epochs_of(base, [48, 48])
    token_bytes(base, adapter, CAUSAL_LM, epochs)
    assert base.bank is None
    assert all(parameter.grad is None for parameter in base.model.parameters())
    with Bank(base), pytest.raises(RouteError, match="already carries a bank"):
        token_bytes(base, adapter, CAUSAL_LM, epochs)


# -- free memory -------------------------------------------------------------------------------------------------------


def test_a_share_of_the_free_memory_is_planned_with(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_bytes(torch.device("cpu")) == int(SAFETY_SHARE * 1000)


def test_a_container_s_limit_bounds_what_is_free(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 600\n")
    assert device_memory._left_in_container(tmp_path) == 1600
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(device_memory, "_left_in_container", lambda folder: 1600)
    assert free_bytes(torch.device("cpu")) == int(SAFETY_SHARE * 1600)


@pytest.mark.parametrize("limit", [None, "max\n", "nonsense"])
def test_a_container_without_a_limit_bounds_nothing(tmp_path, limit):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("4000\n")
        (tmp_path / "memory.stat").write_text("inactive_file 600\n")
    assert device_memory._left_in_container(tmp_path) == math.inf


# -- how many ----------------------------------------------------------------------------------------------------------

MIB = 2**20
MODEL = ActivationModel(fixed=100.0, linear=1000.0, quadratic=1.0, chunk=50.0, chunk_tokens=256)


def chosen(free: int, **more) -> tuple[int, int, str]:
    settings = {
        "num_trials": 16, "bytes_per_member": MIB, "activations": MODEL, "row_tokens": 64, "step_tokens": 256, **more
    }  # fmt: skip
    return choose_concurrency(free=free, **settings)


def test_all_members_train_at_once_where_memory_holds_them():
    slots, budget, reason = chosen(1000 * MIB)
    assert (slots, budget) == (16, ENOUGH_TOKENS["cpu"])
    assert reason.startswith("16 of 16 members train at once: all of them fit (1.0 MiB a member and 1.5 KiB a token")


def test_memory_bounds_the_members_and_the_reason_says_so():
    slots, budget, reason = chosen(8 * MIB)
    assert 1 < slots < 16
    assert "memory holds no more" in reason
    assert slots * MIB + MODEL.total(budget // 64, 64, slots) <= 8 * MIB
    assert "\n" not in reason


def test_a_search_that_learns_has_a_quarter_of_its_trials_under_way():
    slots, _, reason = chosen(1000 * MIB, search="tpe", members_per_trial=3)
    assert slots == 12
    assert "quarter of its 16 trials" in reason
    assert chosen(1000 * MIB, search="tpe", num_trials=3)[0] == 1


def test_the_number_that_was_asked_for_is_kept_and_doubted():
    assert chosen(1000 * MIB, asked=5)[0] == 5
    assert chosen(1000 * MIB, asked=50)[0] == 16
    slots, budget, reason = chosen(2 * MIB, asked=8)
    assert (slots, budget) == (8, 64)
    assert "sweep.concurrent, and the memory that is free may not hold them" in reason


def test_a_forward_may_always_hold_the_widest_row():
    slots, budget, reason = chosen(0)
    assert (slots, budget) == (1, 64)
    assert "may not hold them" in reason
    assert chosen(10**5 * MIB, row_tokens=4096)[1] == 4096


def test_an_accelerator_gets_larger_forwards():
    assert chosen(1000 * MIB, device_type="cuda")[1] > chosen(1000 * MIB)[1]


@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 64 * MIB),
    st.integers(1, 4 * MIB),
    st.sampled_from([8, 64, 512]),
    st.integers(1, 8),
)
def test_what_is_chosen_fits_and_more_memory_never_means_fewer(trials, per_trial, free, held, width, rows):
    def choose(free: int) -> tuple[int, int]:
        return chosen(
            free, num_trials=trials, members_per_trial=per_trial, bytes_per_member=held, row_tokens=width,
            step_tokens=rows * width,
        )[:2]  # fmt: skip

    slots, budget = choose(free)
    assert 1 <= slots <= trials * per_trial
    assert budget >= width
    if slots > 1:
        assert slots * held + MODEL.total(budget // width, width, slots) <= free
    assert choose(2 * free)[0] >= slots


@given(st.integers(0, 10**8), st.integers(1, 512), st.integers(1, 9), st.sampled_from([0.0, 1e6]))
def test_the_tokens_within_a_number_of_bytes_take_no_more(held, width, members, fixed):
    model = replace(MODEL, fixed=fixed)
    rows = model.tokens_within(held, width, members) // width
    assert rows == 0 or model.total(rows, width, members) <= held + 2  # rounding
