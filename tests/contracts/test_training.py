"""What training owes: exact accumulation, members that do not know their neighbours, and resuming to the same bytes."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fleets import Running, killed_after, member, spoilt
from optimizers import KINDS, SHARED

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.errors import CheckpointBroken, DiskFull, NonFiniteLoss, OutOfMemory
from manylora.spec import AdapterSpec
from manylora.training import checkpoint as checkpoint_module
from manylora.training import step as step_module
from manylora.training.checkpoint import Checkpoints
from manylora.training.member import Member
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import OptimizerSettings, SlotUpdate, StackedOptimizer, gradient_norms

SPEC = AdapterSpec(rank=4, dropout=0.1, sites=("all-linear",))


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulating_micro_batches_equals_one_big_batch(accumulate, make_base, make_examples) -> None:
    examples = make_examples(30)
    found = []
    for parts in (1, accumulate):
        own = member("m", examples, spec=SPEC, accumulate=parts)
        run = Running(make_base(dtype=torch.float64), [own], torch.float64).run()
        found.append((run.final("m"), run.recorder.losses("m")))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-9, atol=1e-12)


def test_within_two_steps_every_factor_gets_a_gradient(make_base, make_examples) -> None:
    base = make_base()
    run = Running(base, [member("m", make_examples(30), spec=SPEC, total_steps=2)], torch.float32).run()
    assert not run.recorder.notes
    before = checkpoint_module.flatten(Adapter.new(base, SPEC, seed=0).factors)
    for name, value in run.final("m").items():
        assert not torch.equal(value, before[name]), name


def test_sites_that_no_gradient_reaches_are_named(make_base, make_examples) -> None:
    base = make_base()
    base.model.unused = torch.nn.Linear(8, 8)
    from manylora.base.language import LanguageBase

    base = LanguageBase(base.model).probed()
    run = Running(base, [member("m", make_examples(30), spec=SPEC, total_steps=3)], torch.float32).run()
    assert any("1 of 15 sites got no gradient in two steps: unused" in note for note in run.recorder.notes)


FLEET = (
    {"spec": AdapterSpec(rank=2, dropout=0.1), "seed": 1, "total_steps": 8},
    {
        "spec": AdapterSpec(rank=8, sites=("q_proj", "down_proj"), full_sites=("norm",)),
        "seed": 2,
        "learning_rate": 3e-3,
    },
    {"spec": AdapterSpec(rank=16, dropout=0.2, scale_rule="alpha/sqrt(rank)"), "seed": 3, "rows_per_step": 2},
)


def fleet(make_examples, order=(0, 1, 2), **changes) -> list[Member]:
    return [
        member(f"m{which}", make_examples(20 + 7 * which, seed=which), **{**FLEET[which], **changes}) for which in order
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_member_in_a_fleet_equals_the_member_alone(dtype, tolerance, order, make_base, make_examples) -> None:
    together = Running(make_base(dtype=dtype), fleet(make_examples, order), dtype).run()
    for which in range(3):
        alone = Running(make_base(dtype=dtype), [fleet(make_examples)[which]], dtype).run()
        assert together.recorder.losses(f"m{which}") == pytest.approx(alone.recorder.losses(f"m{which}"), rel=tolerance)
        for name, value in alone.final(f"m{which}").items():
            got = together.final(f"m{which}")[name]
            assert (got - value).norm() <= tolerance * (1 + value.norm()), name


def test_a_nan_retires_one_member_only(make_base, make_examples) -> None:
    members = fleet(make_examples)
    base = make_base(dtype=torch.float64)
    run = Running(base, members, torch.float64, spoil=spoilt("m1", float("nan"))).run()
    assert [m.state for m in members] == ["done", "retired", "done"]
    assert "nan" in members[1].reason
    alone = Running(make_base(dtype=torch.float64), [fleet(make_examples)[0]], torch.float64).run()
    assert run.recorder.losses("m0") == pytest.approx(alone.recorder.losses("m0"), rel=1e-9)


def test_a_run_whose_only_member_goes_nan_is_an_error(make_base, make_examples) -> None:
    own = member("m", make_examples(20), spec=SPEC)
    run = Running(make_base(), [own], torch.float32, spoil=spoilt("m", float("inf")))
    with pytest.raises(NonFiniteLoss, match="m: loss"):
        run.run()


@pytest.mark.parametrize(
    ("optimizer", "shared"),
    [*((kind, {}) for kind in KINDS), *((kind, shared) for kind in OPTIMIZERS for shared in SHARED)],
)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_is_killed_resumes_to_the_same_bytes(
    optimizer, shared, stop, tmp_path, make_base, make_examples
) -> None:
    held_out = make_examples(5, seed=9)

    def fresh(folder: Path) -> Running:
        changes = {"optimizer": optimizer, "held_out": held_out, "evaluate_every": 2, **shared}
        own = member("m", make_examples(30), spec=SPEC, **changes)
        checkpoints, settings = Checkpoints(folder, keep=2), {"checkpoint_every": 1}
        return Running(make_base(), [own], torch.float32, checkpoints=checkpoints, settings=settings)

    whole = fresh(tmp_path / "whole").run()
    killed_after(stop, fresh(tmp_path / "killed"))
    resumed = fresh(tmp_path / "killed")
    assert resumed.loop.resume() == stop
    resumed.run()
    for name, value in whole.final("m").items():
        assert torch.equal(value, resumed.final("m")[name]), name
    assert whole.members[0].progress() == resumed.members[0].progress()


def test_an_interrupted_run_writes_a_checkpoint_first(tmp_path, make_base, make_examples) -> None:
    own = member("m", make_examples(30), spec=SPEC)
    run = Running(make_base(), [own], torch.float32, checkpoints=Checkpoints(tmp_path, keep=2))
    with pytest.raises(KeyboardInterrupt):
        run.run(lambda: own.step == 3)
    assert Checkpoints(tmp_path, keep=2).steps() == [3]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]
)
def test_out_of_memory_names_what_to_change(error, make_base, make_examples, monkeypatch) -> None:
    def out_of_memory(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(step_module, "add_gradients", out_of_memory)
    run = Running(make_base(), [member("m", make_examples(30), spec=SPEC)], torch.float32)
    with pytest.raises(OutOfMemory, match=r"does not hold 1 row of \d+ tokens at once") as caught:
        run.run()
    assert "train.row_tokens" in (caught.value.next_step or "")
    assert [event["rows"] for event in run.recorder.events if event["event"] == "out_of_memory"] == [4, 2]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, make_base, make_examples, monkeypatch) -> None:
    def fresh(own: Member) -> Running:
        checkpoints, settings = Checkpoints(tmp_path, keep=1), {"checkpoint_every": 1}
        return Running(make_base(), [own], torch.float32, checkpoints=checkpoints, settings=settings)

    own = member("m", make_examples(30), spec=SPEC)
    real = checkpoint_module.save_file

    def full(tensors, path) -> None:
        if own.step == 3:
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(DiskFull):
        fresh(own).run()
    assert Checkpoints(tmp_path, keep=1).steps() == [2]
    assert fresh(member("m", make_examples(30), spec=SPEC)).loop.resume() == 2


def test_a_damaged_checkpoint_is_named(tmp_path, make_base, make_examples) -> None:
    def fresh() -> Running:
        own = member("m", make_examples(30), spec=SPEC)
        checkpoints, settings = Checkpoints(tmp_path, 2), {"checkpoint_every": 4}
        return Running(make_base(), [own], torch.float32, checkpoints=checkpoints, settings=settings)

    fresh().run()
    shutil.rmtree(tmp_path / "step-6")
    path = tmp_path / "step-4" / "m.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointBroken, match="step-4"):
        fresh().loop.resume()
    (tmp_path / "step-4" / "state.json").write_text("{")
    with pytest.raises(CheckpointBroken, match="step-4"):
        fresh().loop.resume()


def test_early_stop_and_the_best_state(make_base, make_examples) -> None:
    changes = {"learning_rate": 0.5, "total_steps": 40, "schedule": "constant", "evaluate_every": 1, "patience": 3}
    spec, held_out = replace(SPEC, dropout=0.0), make_examples(6, seed=5)
    own = member("m", make_examples(8), spec=spec, held_out=held_out, **changes)
    run = Running(make_base(), [own], torch.float32).run()
    assert own.state == "stopped"
    assert own.step == own.best_step + 3
    evals = [e["loss"] for e in run.recorder.events if e["event"] == "eval"]
    assert own.best_loss == min(evals)
    run.bank.put(run.adapters["m"], slot=0)
    from manylora.evaluation.evaluate import evaluate_loss

    again = evaluate_loss(
        run.loop.base, own.eval_examples, slot=0, row_tokens=32, rows_per_batch=4, objective=own.objective
    )
    assert again["loss"] == pytest.approx(own.best_loss)


def updates(**changes) -> SlotUpdate:
    now = {key: changes.pop(key) for key in ("rate", "step") if key in changes}
    return SlotUpdate(**{"rate": 1e-2, "step": 1, **now}, optimizer=OptimizerSettings(weight_decay=0.1, **changes))


def test_adamw_equals_torchs(make_base) -> None:
    base = make_base(dtype=torch.float64)
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    for slot, rank in enumerate((4, 3)):
        bank.put(Adapter.new(base, AdapterSpec(rank=rank, sites=("q_proj",)), seed=slot), slot=slot)
    stack = next(iter(bank.stacks.values()))
    twins = [torch.nn.Parameter(t.detach()[0].clone()) for s in bank.stacks.values() for t in s.tensors.values()]
    truth = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    own = StackedOptimizer(bank, OPTIMIZERS.get("adamw"))
    tensors = [t for s in bank.stacks.values() for t in s.tensors.values()]
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 8):
        for tensor, twin in zip(tensors, twins, strict=True):
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            twin.grad = tensor.grad[0].clone()
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        truth.step()
        own.step({0: updates(step=step, betas=(0.9, 0.99), clip_norm=1.0)}, gradient_norms(bank))
        for tensor, twin in zip(tensors, twins, strict=True):
            torch.testing.assert_close(tensor.detach()[0], twin.detach(), rtol=1e-13, atol=1e-15)
    assert stack.slots == [0, 1]


def test_adamw_decays_before_the_step_by_the_rate() -> None:
    """One step from 1 with gradient 0.1, rate 0.1, decay 0.1: 0.890, where L2 gives 0.900 and decay last 0.891."""
    base = copy.deepcopy(torch.nn.Linear(1, 1, bias=False))
    from manylora.base.frozen import FrozenModel

    bank = Bank(FrozenModel(base), num_slots=1, dtype=torch.float64)
    bank.put(Adapter.new(bank.base, AdapterSpec(method="full", sites=("everything",)), seed=0), slot=0)
    tensor = next(iter(bank.stacks.values())).tensors["weight"]
    with torch.no_grad():
        tensor.fill_(1.0)
    tensor.grad = torch.full_like(tensor, 0.1)
    StackedOptimizer(bank, OPTIMIZERS.get("adamw")).step({0: updates(rate=0.1)}, gradient_norms(bank))
    assert tensor.item() == pytest.approx(0.890, abs=1e-6)


def test_padding_stays_zero_under_every_optimizer(make_base, make_examples) -> None:
    for name, shared in ((name, shared) for name in KINDS for shared in ({}, *SHARED)):
        spec = AdapterSpec(rank=5, dropout=0.1)
        own = member("m", make_examples(20), spec=spec, optimizer=name, **shared)
        run = Running(make_base(), [own], torch.float32).run()
        for stack in run.bank.stacks.values():
            assert stack.shape_class == 8
            assert not stack.tensors["a"][0, 5:].any()
            assert not stack.tensors["b"][0, :, 5:].any()


def test_slots_that_are_not_stepped_keep_their_bytes(make_base, make_examples) -> None:
    base, members = make_base(), fleet(make_examples, total_steps=1)
    members[0].recipe = replace(members[0].recipe, total_steps=6)
    run = Running(base, members, torch.float32)
    seen = []

    def look() -> bool:
        seen.append(checkpoint_module.flatten(run.bank.get(1).factors))
        return False

    run.run(look)
    assert len(seen) == 6
    for name, value in seen[0].items():
        assert torch.equal(value, seen[-1][name])


@pytest.mark.parametrize("optimizer", list(KINDS))
def test_a_slot_that_is_reset_forgets_its_state_and_no_others(optimizer, make_base, make_examples) -> None:
    members = [member(f"m{slot}", make_examples(20), spec=SPEC, optimizer=optimizer) for slot in range(2)]
    run = Running(make_base(), members, torch.float32).run()
    settings = members[0].recipe.optimizer
    own = run.loop.optimizers[settings.name]
    before = own.slot_state(1, settings)
    own.reset(0, settings)
    assert not any(tensor.any() for tensor in own.slot_state(0, settings).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.slot_state(1, settings).items())
