"""One place runs a batch and totals it: for objectives that ask for more than the outputs of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fleets import Running, killed_after, member, ragged
from random_bases import fill, language_base, ragged_batch
from torch import Tensor
from torch.nn import functional

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.errors import RouteError
from manylora.evaluation.evaluate import evaluate_losses
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.objectives.forward import Aim, SlotSums, forward_batch
from manylora.objectives.objective import Stateless
from manylora.spec import AdapterSpec
from manylora.training.checkpoint import Checkpoints
from manylora.training.member import Member
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import StackedOptimizer, drop_gradients
from manylora.training.step import backward, micro_batches, train_step
from manylora.types import IGNORED, Batch, Beside, Follower, Outputs, RowTotals

SPECS = (AdapterSpec(rank=4, dropout=0.1), AdapterSpec(rank=2, dropout=0.1), AdapterSpec(rank=8, dropout=0.1))


class ByTarget(Stateless):
    """What objectives here share: each supervised token counts one."""

    def weight(self, batch: Batch) -> Tensor:
        return batch.targets["labels"].ne(IGNORED).sum(dim=1).double()


class NearStart(ByTarget):
    """Nats, and the divergence from where the adapter began: a frozen copy of the start as reference."""

    followers: Mapping[str, Follower] = {"start": Follower()}

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        def fn(logits: Tensor, labels: Tensor, others: Tensor) -> dict[str, Tensor]:
            assert not others.requires_grad
            mine, theirs = logits.log_softmax(-1), others.log_softmax(-1)
            apart = (mine.exp() * (mine - theirs)).sum(-1)
            return {"total": functional.nll_loss(mine, labels, reduction="none") + 0.5 * apart}

        start = beside.outputs(batch, "start")
        return RowTotals(outputs.map_supervised(batch.targets["labels"], fn, beside=start)["total"])


class SlowTeacher(NearStart):
    """The same with a slow average of the member in the start's place."""

    followers: Mapping[str, Follower] = {"start": Follower(decay=0.8)}


class BySequence(Stateless):
    """The mean nats of each sequence: a short one counts as much as a long one beside it in a row."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor([len(_lengths(batch, row)) for row in range(batch.num_rows)]).double()

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        sums = outputs.map_supervised(batch.targets["labels"], _nats_and_ones, sequences=batch.targets["sequences"])
        return RowTotals((sums["nats"] / sums["one"].clamp(min=1)).sum(dim=1))


class WholeRows(ByTarget):
    """Nats of every supervised token, from the logits of whole rows."""

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        logits, labels = outputs.whole_rows(), batch.targets["labels"]
        flat = logits.flatten(0, 1)
        values = functional.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED)
        return RowTotals(values.view(labels.shape).sum(dim=1))


class Twice(ByTarget):
    """Nats of the rows and of the same rows backwards: a second batch, through which gradients flow too."""

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        second = backwards(batch)
        one = outputs.map_supervised(batch.targets["labels"], _nats_and_ones)["nats"]
        two = beside.outputs(second, "own").map_supervised(second.targets["labels"], _nats_and_ones)["nats"]
        return RowTotals(one + two)


class Tempered(ByTarget):
    """Nats weighed by a running mean of the member's own nats, which is learned once a step."""

    def begin(self) -> Mapping[str, Tensor]:
        return {"mean": torch.tensor(4.0, dtype=torch.float64)}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        now = (observed["nats"] / observed["tokens"]).cpu()
        return {"mean": 0.7 * state["mean"] + 0.3 * now}

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        sums = outputs.map_supervised(batch.targets["labels"], _nats_and_ones)
        observed = {"nats": sums["nats"].detach(), "tokens": sums["one"]}
        return RowTotals(sums["nats"] * beside.state["mean"].to(sums["nats"]), observed=observed)


OBJECTIVES: list[Any] = [NearStart(), BySequence(), WholeRows(), Twice(), Tempered()]


def _nats_and_ones(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    nats = functional.cross_entropy(logits, labels, reduction="none")
    return {"nats": nats, "one": torch.ones_like(nats)}


def _lengths(batch: Batch, row: int) -> list[int]:
    """Supervised tokens of each sequence of a row that has any."""
    chosen = batch.targets["labels"][row].ne(IGNORED)
    return torch.unique(batch.targets["sequences"][row][chosen], return_counts=True)[1].tolist()


def backwards(batch: Batch) -> Batch:
    """The same rows with their tokens in another order; labels stay where they were."""
    inputs = {**batch.inputs, "input_ids": batch.inputs["input_ids"].flip(1)}
    return Batch(inputs=inputs, targets=batch.targets, slots=batch.slots, streams=batch.streams, costs=batch.costs,
                 num_trained=batch.num_trained)  # fmt: skip


def plain_total(base: Any, objective: Any, batch: Batch, row: int, aims: Mapping[int, Aim]) -> Tensor:
    """A row's total from the model's own logits in plain autograd, the row alone in its forward."""
    one = batch.take([row])
    labels, slot = one.targets["labels"][0], one.slots[0]
    chosen = labels.ne(IGNORED)

    def logs(rows: Batch, slots: Sequence[int], streams: Any) -> Tensor:
        given = {name: value for name, value in rows.inputs.items() if name != "attention_mask"}
        with base.bank.route(slots, streams):
            return base.model(**given, use_cache=False).logits[0].log_softmax(-1)[chosen]

    mine = logs(one, one.slots, one.streams)
    nats = -mine.gather(1, labels[chosen][:, None])[:, 0]
    if isinstance(objective, NearStart):
        with torch.no_grad():
            theirs = logs(one, [aims[slot].followers["start"]], None)
        return (nats + 0.5 * (mine.exp() * (mine - theirs)).sum(-1)).sum()
    if isinstance(objective, BySequence):
        return torch.stack([part.mean() for part in nats.split(_lengths(one, 0))]).sum()
    if isinstance(objective, Twice):
        again = logs(backwards(one), one.slots, one.streams)
        return nats.sum() - again.gather(1, labels[chosen][:, None]).sum()
    return nats.sum() * (4.0 if isinstance(objective, Tempered) else 1.0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("head", [False, True], ids=["frozen head", "adapted head"])
def test_gradients_are_those_of_plain_autograd(objective: Any, head: bool) -> None:
    """Packed rows of three adapters and the bare base, ragged, dropout on, beside rows of another objective."""
    base = language_base()
    # A chunked head draws masks of its own for each chunk, so there is no dropout where the head is adapted.
    specs = [AdapterSpec(rank=spec.rank, sites=("all-linear", "lm_head")) for spec in SPECS]
    batch = ragged_batch(base, slots=(0, 2, -1, 1, 0, 2))
    with Bank(base, num_slots=4, dtype=torch.float64) as bank:
        fill(bank, tuple(specs) if head else SPECS)
        bank.put(Adapter.new(base, SPECS[0], seed=9), slot=3)
        followers = dict.fromkeys(objective.followers, 3)
        aims = {slot: Aim(objective, followers, objective.begin()) for slot in (0, 2, -1)}
        aims[1] = Aim.fresh(CAUSAL_LM)
        losses = backward(base, aims, [batch]).losses()
        gradients = _taken(bank)
        weights = {slot: float(aims[slot].objective.weight(batch.only([slot])).sum()) for slot in aims}
        totals = [plain_total(base, aims[slot].objective, batch, row, aims) for row, slot in enumerate(batch.slots)]
        torch.stack([total / weights[slot] for total, slot in zip(totals, batch.slots, strict=True)]).sum().backward()
        for key, value in _taken(bank).items():
            assert (gradients[key] - value).norm() <= 1e-10 * (1 + value.norm()), key
        for slot in aims:
            total = sum(total.item() for total, owner in zip(totals, batch.slots, strict=True) if owner == slot)
            assert losses[slot] == pytest.approx(total / weights[slot], rel=1e-10)


def _taken(bank: Bank) -> dict[str, Tensor]:
    tensors = {f"{key} {name}": tensor for key, stack in bank.stacks.items() for name, tensor in stack.tensors.items()}
    gradients = {key: torch.zeros_like(own) if own.grad is None else own.grad for key, own in tensors.items()}
    drop_gradients(bank)
    return gradients


def _member(name: str, objective: Any, *, spec: AdapterSpec = SPECS[0], seed: int = 0, **more: Any) -> Member:
    made = member(name, ragged(30, seed=seed), spec=spec, seed=seed, held_out=ragged(6, seed=77), **more)
    made.objective = objective
    return made


def _run(objectives: Mapping[str, Any], folder: Path | None = None, **more: Any) -> Running:
    accumulate, stop = more.pop("accumulate", 1), more.pop("stop", None)
    members = [
        _member(name, objective, spec=SPECS[place], seed=place, rows_per_step=5, accumulate=accumulate, total_steps=6)
        for place, (name, objective) in enumerate(objectives.items())
    ]
    slots = sum(one.num_slots for one in members)
    if folder is not None:
        more["checkpoints"] = Checkpoints(folder, 2)
        more["settings"] = {"checkpoint_every": 1}
    run = Running(language_base(), members, torch.float64, num_slots=slots, **more)
    if stop is not None:
        killed_after(stop, run)
        run.bank.close()
        return run
    if folder is not None and any(folder.glob("step-*")):
        run.loop.resume()
    run.run()
    run.bank.close()
    return run


MIXED: dict[str, Any] = {"near": NearStart(), "slow": SlowTeacher(), "tempered": Tempered()}


@pytest.mark.parametrize("accumulate", [2, 5])
def test_a_step_split_in_parts_learns_the_same(accumulate: int) -> None:
    whole, split = _run(MIXED), _run(MIXED, accumulate=accumulate)
    for name in MIXED:
        assert split.recorder.losses(name) == pytest.approx(whole.recorder.losses(name), rel=1e-10)
        for key, value in whole.final(name).items():
            torch.testing.assert_close(split.final(name)[key], value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("objective", [*OBJECTIVES, SlowTeacher()], ids=lambda one: type(one).__name__)
def test_a_member_cannot_tell_that_it_has_neighbours_with_other_objectives(objective: Any) -> None:
    fleet = _run({"own": objective, "near": NearStart(), "tempered": Tempered()})
    alone = _run({"own": objective})
    assert fleet.recorder.losses("own") == pytest.approx(alone.recorder.losses("own"), rel=1e-9)
    for key, value in alone.final("own").items():
        torch.testing.assert_close(fleet.final("own")[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("stop", [2, 4])
def test_followers_and_what_was_learned_survive_a_kill_to_the_same_bytes(stop: int, tmp_path: Path) -> None:
    whole = _run(MIXED)
    _run(MIXED, tmp_path, stop=stop)
    resumed = _run(MIXED, tmp_path)
    for name in MIXED:
        assert resumed.recorder.losses(name) == whole.recorder.losses(name)[stop:]
        for key, value in whole.final(name).items():
            assert torch.equal(resumed.final(name)[key], value), key


def test_what_an_objective_learns_moves_what_comes_after() -> None:
    class Forgetful(Tempered):
        def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return state

    learned, fixed = _run({"own": Tempered()}), _run({"own": Forgetful()})
    assert learned.recorder.losses("own")[0] == fixed.recorder.losses("own")[0]
    assert learned.recorder.losses("own")[1] != pytest.approx(fixed.recorder.losses("own")[1], rel=1e-3)
    expected = 4.0
    for loss in learned.recorder.losses("own"):
        expected = 0.7 * expected + 0.3 * (loss / expected)
    state = learned.members[0].objective_state
    assert state is not None
    assert float(state["mean"]) == pytest.approx(expected, rel=1e-9)


def test_a_frozen_start_stays_and_an_average_follows() -> None:
    base = language_base()
    with Bank(base, num_slots=4, dtype=torch.float64) as bank:
        members = [_member("near", NearStart()), _member("slow", SlowTeacher(), spec=SPECS[1], seed=1)]
        for place, one in enumerate(members):
            one.sit([2 * place, 2 * place + 1])
            for slot in (2 * place, 2 * place + 1):
                bank.put(Adapter.new(base, one.spec, seed=one.seed), slot=slot)
        starts = [_factors(bank, slot) for slot in (0, 2)]
        optimizers = {"adamw": StackedOptimizer(bank, OPTIMIZERS.get("adamw"))}
        average = {key: value.clone() for key, value in starts[1].items()}
        for _ in range(3):
            train_step(base, optimizers, members)
            for one in members:
                one.step += 1
            for key, value in _factors(bank, 2).items():
                average[key] = 0.8 * average[key] + 0.2 * value
        assert all(torch.equal(value, starts[0][key]) for key, value in _factors(bank, 1).items())
        assert any(not torch.equal(value, starts[0][key]) for key, value in _factors(bank, 0).items())
        for key, value in _factors(bank, 3).items():
            torch.testing.assert_close(value, average[key], rtol=1e-12, atol=1e-14)


def _factors(bank: Bank, slot: int) -> dict[str, Tensor]:
    held = bank.get(slot).factors
    return {f"{site} {name}": tensor for site, own in held.items() for name, tensor in own.tensors.items()}


def test_a_loop_leaves_the_slots_that_are_not_its_own_alone() -> None:
    base = language_base()
    stranger = Adapter.new(base, SPECS[2], seed=5)
    own = _member("own", NearStart(), total_steps=3)
    run = Running(base, [own], torch.float64, num_slots=4, slots=(1, 3))
    run.bank.put(stranger, slot=0)
    run.bank.put(stranger, slot=2)
    before = _factors(run.bank, 0)
    run.run()
    assert own.slot in (1, 3)
    for slot in (0, 2):
        assert all(torch.equal(value, before[key]) for key, value in _factors(run.bank, slot).items())


def test_members_wait_until_there_are_slots_for_their_followers_too() -> None:
    base = language_base()
    members = [_member(name, NearStart(), seed=seed, total_steps=2) for seed, name in enumerate(("one", "two"))]
    run = Running(base, members, torch.float64, num_slots=3).run()
    admitted = {event["member"]: event["tick"] for event in run.recorder.events if event["event"] == "admitted"}
    assert admitted == {"one": 0, "two": 2}
    assert all(one.state == "done" for one in members)


def test_a_member_that_no_number_of_free_slots_would_hold_is_an_error() -> None:
    run = Running(language_base(), [_member("own", NearStart())], torch.float64, num_slots=1)
    with pytest.raises(RouteError, match="takes 2 slots"):
        run.run()


def test_gradients_are_added_up_once_a_step_between_the_last_backward_and_the_norms() -> None:
    seen: list[float] = []

    def double(bank: Bank) -> None:
        for stack in bank.stacks.values():
            for tensor in stack.tensors.values():
                assert tensor.grad is not None
                tensor.grad.mul_(2)
        seen.append(1.0)

    settings: dict[str, Any] = {"rows_per_step": 5, "accumulate": 3, "total_steps": 4, "clip_norm": None}
    norms = []
    for more in ({}, {"add_up": double}):
        run = Running(language_base(), [_member("own", CAUSAL_LM, **settings)], torch.float64, **more).run()
        norms.append([event["gradient_norm"] for event in run.recorder.events if event["event"] == "step"])
    assert len(seen) == 4
    assert norms[1][0] == pytest.approx(2 * norms[0][0], rel=1e-12)


def test_evaluation_sees_what_training_sees() -> None:
    """The held-out loss of a member in training is that of its objective with its own followers and state."""
    base = language_base()
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        own = _member("own", Tempered())
        own.sit([0])
        bank.put(Adapter.new(base, own.spec, seed=0), slot=0)
        own.objective_state = {"mean": torch.tensor(2.5, dtype=torch.float64)}
        (weighed,) = evaluate_losses(base, own.eval_examples, {0: own.aim()}, row_tokens=32)
        (plain,) = evaluate_losses(base, own.eval_examples, {0: Aim.fresh(CAUSAL_LM)}, row_tokens=32)
        assert weighed["loss"] == pytest.approx(2.5 * plain["loss"], rel=1e-12)


def test_an_objective_that_asks_for_a_follower_it_did_not_name_is_told_so() -> None:
    class Careless(ByTarget):
        def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
            beside.outputs(batch, "teacher")
            raise AssertionError

    base = language_base()
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, SPECS[:1])
        with pytest.raises(RouteError, match="asks for the follower 'teacher'"):
            forward_batch(base, ragged_batch(base, slots=(0, 0)), {0: Aim.fresh(Careless())})


def test_a_module_has_whole_rows_and_a_reference_too() -> None:
    class Distance(Stateless):
        def weight(self, batch: Batch) -> Tensor:
            return torch.ones(batch.num_rows).double()

        def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
            return RowTotals((outputs.whole_rows() - beside.outputs(batch).whole_rows()).square().sum(dim=1))

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    base = FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 6, dtype=torch.float64)})
    x = torch.randn(5, 6, dtype=torch.float64)
    batch = Batch(inputs={"input": x}, targets={"labels": torch.zeros(5, dtype=torch.int64)}, slots=(0, -1, 0, 1, 1))
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=2, sites=("0",)), AdapterSpec(rank=3, sites=("0", "2"))))
        aims = {slot: Aim.fresh(Distance()) for slot in (0, 1, -1)}
        sums = SlotSums(aims, base.device)
        sums.weigh(batch)
        sums.add(batch, forward_batch(base, batch, aims))
        with bank.route(batch.slots):
            adapted = net(x).detach()
        with bank.route((-1,) * 5):
            plain = net(x)
    apart = (adapted - plain).square().sum(dim=1)
    assert sums.losses() == pytest.approx({0: float(apart[[0, 2]].mean()), 1: float(apart[[3, 4]].mean()), -1: 0.0})
    assert sums.losses()[0] > 0


def test_batches_own_their_counts() -> None:
    base = language_base()
    own = _member("own", CAUSAL_LM, rows_per_step=4)
    own.slot = 0
    for batch in micro_batches([own], base):
        labels = batch.targets["labels"]
        assert batch.num_trained == tuple(labels.ne(IGNORED).sum(dim=1).tolist())
        assert batch.costs == (labels.shape[1],) * batch.num_rows
        part = batch.take([2, 0])
        assert torch.equal(part.inputs["input_ids"], batch.inputs["input_ids"][[2, 0]])
        assert part.streams == (batch.streams[2], batch.streams[0])  # pyright: ignore[reportOptionalSubscript]
        assert part.num_trained == (batch.num_trained[2], batch.num_trained[0])
        assert batch.only([0]) is batch
        assert batch.only([1]).num_rows == 0
