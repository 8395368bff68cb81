"""A fleet: members of all kinds come and go, and none can tell that it has neighbours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fleets import Running, killed_after, member, spoilt
from optimizers import optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.adapters.adapter import Adapter
from manylora.base.language import LanguageBase
from manylora.objectives.objective import Stateless
from manylora.spec import AdapterSpec
from manylora.training.checkpoint import Checkpoints, flatten
from manylora.training.footprint import member_bytes
from manylora.training.member import Member, steps_for, tokens_of
from manylora.training.orders import Ending, Given, Order, Report, Verdict
from manylora.types import IGNORED, Batch, Beside, Outputs, RowTotals

STEPS = 100
KINDS: dict[str, dict[str, Any]] = {
    "small": {"spec": AdapterSpec(rank=2, dropout=0.1), "total_steps": STEPS, "learning_rate": 3e-3},
    "middle": {
        "spec": AdapterSpec(rank=8, dropout=0.1, scale_rule="alpha/sqrt(rank)"), "total_steps": 60,
        "learning_rate": 3e-3, "rows_per_step": 2, "schedule": "wsd", "optimizer": "sgd", "clip_norm": 0.3,
    },
    "large": {
        "spec": AdapterSpec(rank=64, alpha=64.0, dropout=0.1, sites=("q_proj", "down_proj")), "total_steps": 80,
        "learning_rate": 2e-3, "weight_decay": 0.0,
    },
    "broken": {"spec": AdapterSpec(rank=4, dropout=0.1), "total_steps": STEPS},
    "late": {
        "spec": AdapterSpec(rank=2, dropout=0.1, full_sites=("norm",)), "total_steps": 30, "rows_per_step": 3,
        "accumulate": 2,
    },
    "anchored": {"spec": AdapterSpec(rank=4, dropout=0.1, init="pissa"), "total_steps": 40, "rows_per_step": 1},
}  # fmt: skip


class Nats(Stateless):
    """The causal objective's loss, twice: an objective of its own."""

    def weight(self, batch: Batch) -> torch.Tensor:
        return batch.targets["labels"].ne(IGNORED).sum(dim=1).to(torch.float64)

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        def twice(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"nats": 2 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")}

        return RowTotals(outputs.map_supervised(batch.targets["labels"], twice)["nats"])


def wide_base(dtype: torch.dtype) -> LanguageBase:
    """A base whose sites hold a rank of 64; the same weights at every call.

    Its norms stay in the base's dtype: transformers' own narrow to float32, where a difference of 1e-16 that crosses a
    rounding boundary becomes one of 1e-7.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(64, eps=module.variance_epsilon, dtype=dtype)
            model.set_submodule(name, norm)
    return LanguageBase(model, name="random").probed()


def made(name: str, make_examples: Callable[..., list]) -> Member:
    place = list(KINDS).index(name)
    own = member(name, make_examples(14 + 5 * place, seed=place), seed=place, **KINDS[name])
    if name == "late":
        own.objective = Nats()
    return own


_ALONE: dict[tuple[str, torch.dtype], tuple[list[float], dict[str, torch.Tensor]]] = {}


def alone(
    name: str, dtype: torch.dtype, make_examples: Callable[..., list]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and factors of a member trained alone; once for each dtype."""
    if (name, dtype) not in _ALONE:
        run = Running(wide_base(dtype), [made(name, make_examples)], dtype).run()
        _ALONE[name, dtype] = run.recorder.losses(name), run.final(name)
    return _ALONE[name, dtype]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "budget_tokens"),
    [
        (torch.float64, 1e-9, 96),
        (torch.float32, 1e-4, None),
        pytest.param(torch.float64, 1e-9, None, marks=pytest.mark.slow),
        pytest.param(torch.float32, 1e-4, 96, marks=pytest.mark.slow),
    ],
)
def test_every_member_equals_itself_alone_over_a_hundred_steps(dtype, tolerance, budget_tokens, make_examples) -> None:
    """Mixed ranks, dropout, lengths, rates, objectives; one goes NaN and its slot is given to one that comes late."""
    spoil = spoilt("broken", float("nan"))
    members = [made(name, make_examples) for name in KINDS]
    settings = {"budget_tokens": budget_tokens}
    base = wide_base(dtype)
    together = Running(base, members, dtype, num_slots=4, spoil=spoil, settings=settings).run()
    admitted = {e["member"]: (e["tick"], e["slot"]) for e in together.recorder.events if e["event"] == "admitted"}
    assert admitted["late"] == (1, admitted["broken"][1])  # the freed slot is taken in the same tick
    assert admitted["anchored"][0] > 20
    assert {m.name: m.state for m in members} == dict.fromkeys(KINDS, "done") | {"broken": "retired"}
    for name in KINDS:
        if name == "broken":
            continue
        losses, final = alone(name, dtype, make_examples)
        assert len(losses) == KINDS[name]["total_steps"]
        assert together.recorder.losses(name) == pytest.approx(losses, rel=tolerance)
        for key, value in final.items():
            assert (together.final(name)[key] - value).norm() <= tolerance * value.norm(), (name, key)


def test_the_tokens_of_a_member_are_known_before_it_begins(make_base, make_examples) -> None:
    own = made("late", make_examples)
    recipe = own.recipe
    run = Running(make_base(), [own], torch.float32).run()
    trained = [event["tokens"] for event in run.recorder.events if event["event"] == "step"]
    for step in (1, 2, 7, 30):
        found = tokens_of(own.epochs, steps=step, rows_per_step=recipe.rows_per_step)
        assert found == trained[step - 1]
        assert steps_for(own.epochs, tokens=found, rows_per_step=recipe.rows_per_step) == step
        assert steps_for(own.epochs, tokens=found + 1, rows_per_step=recipe.rows_per_step) == step + 1
    admitted = next(event for event in run.recorder.events if event["event"] == "admitted")
    assert admitted["full_tokens"] == trained[-1]


class Halves(Given):
    """Judges at every level: all wait until all have come, then the better half goes on; a source with opinions."""

    def __init__(self, names: Sequence[str]):
        super().__init__(names)
        self.losses: dict[int, dict[str, float]] = {}
        self.orders: list[Order] = []
        self.endings: list[Ending] = []
        self.alive = list(names)

    def next(self, *, free: bool, idle: bool) -> Order | None:
        for order in self.orders:
            if free or order.action == "dismiss":
                self.orders.remove(order)
                return order
        return super().next(free=free, idle=idle)

    def judge(self, reports: Sequence[Report]) -> Mapping[str, Verdict]:
        for report in reports:
            here = self.losses.setdefault(report.level, {})
            here[report.member] = report.loss
            if len(here) == len(self.alive):
                self.alive = sorted(here, key=lambda name: here[name])[: max(1, len(here) // 2)]
                self.orders += [
                    Order("continue", name) if name in self.alive else Order("dismiss", name, "the worse half")
                    for name in here
                ]
        return {report.member: Verdict("wait") for report in reports}

    def ended(self, ending: Ending) -> None:
        self.endings.append(ending)

    def state(self) -> dict[str, Any]:
        return {
            "begun": self._begun, "alive": self.alive, "losses": {str(k): v for k, v in self.losses.items()},
            "orders": [[order.action, order.member, order.reason] for order in self.orders],
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.alive = list(state["alive"])
        self.losses = {int(level): dict(found) for level, found in state["losses"].items()}
        self.orders = [Order(*order) for order in state["orders"]]


RATES = {"m0": 1e-3, "m1": 1e-2, "m2": 2e-2, "m3": 3e-2, "m4": 3e-3}


def judged(make_examples) -> list[Member]:
    held_out = make_examples(6, seed=99)
    examples = make_examples(24, seed=1)
    return [
        member(
            name, examples, spec=AdapterSpec(rank=2 + place, dropout=0.1), held_out=held_out, learning_rate=rate,
            total_steps=16, evaluate_at=(120, 300), evaluate_every=100, rows_per_step=2 + place % 2, schedule="wsd",
        )
        for place, (name, rate) in enumerate(RATES.items())
    ]  # fmt: skip


def fresh(folder, make_base, make_examples, num_slots: int = 2) -> Running:
    return Running(
        make_base(), judged(make_examples), torch.float32, num_slots=num_slots, source=Halves(list(RATES)),
        checkpoints=Checkpoints(folder, keep=2), settings={"checkpoint_every": 1},
    )  # fmt: skip


def test_members_that_wait_leave_their_slot_and_go_on_as_if_they_had_not(tmp_path, make_base, make_examples) -> None:
    run = fresh(tmp_path, make_base, make_examples).run()
    states = {m.name: m.state for m in run.members}
    assert sorted(states.values()) == ["done", "stopped", "stopped", "stopped", "stopped"]
    endings = {ending.member: ending for ending in run.loop.source.endings}
    assert set(endings) == set(RATES) == set(run.adapters)
    (winner,) = [m for m in run.members if m.state == "done"]
    assert endings[winner.name].loss == winner.best_loss
    losers = [ending for ending in endings.values() if ending.state == "stopped"]
    assert all(ending.reason == "the worse half" for ending in losers)
    for own in run.members:  # with and without waits on the way, as far as each came
        alone = replace_source(own.name, make_base, make_examples)
        assert run.recorder.losses(own.name) == pytest.approx(alone.recorder.losses(own.name)[: own.step], rel=1e-4)
        assert own.tokens >= (300 if own.step > 8 else 120)


def replace_source(name: str, make_base, make_examples) -> Running:
    """The member alone, whom nobody judges."""
    (own,) = [m for m in judged(make_examples) if m.name == name]
    return Running(make_base(), [own], torch.float32).run()


@pytest.mark.parametrize("stop", [1, 4, 9, 14, 20])
def test_a_killed_fleet_resumes_to_the_same_bytes(stop, tmp_path, make_base, make_examples) -> None:
    """With members in slots, waiting, ended and not yet begun."""
    whole = fresh(tmp_path / "whole", make_base, make_examples).run()
    killed = fresh(tmp_path / "killed", make_base, make_examples)
    killed_after(stop, killed)
    resumed = fresh(tmp_path / "killed", make_base, make_examples)
    assert resumed.loop.resume() == stop
    resumed.run()
    assert whole.loop.ended == resumed.loop.ended
    found = {**killed.adapters, **resumed.adapters}
    resumed.adapters = found
    for name in RATES:
        for key, value in whole.final(name).items():
            assert torch.equal(value, resumed.final(name)[key]), (name, key)
    steps = [e for e in whole.recorder.events if e["event"] == "step" and e["tick"] > stop]
    again = [e for e in resumed.recorder.events if e["event"] == "step"]
    assert [(e["member"], e["step"], e["loss"]) for e in steps] == [(e["member"], e["step"], e["loss"]) for e in again]


@pytest.mark.parametrize("ranks", [(4, 4), (2, 8)])
def test_in_float64_too_a_killed_fleet_resumes_to_the_same_bytes(ranks, tmp_path, make_base, make_examples) -> None:
    """No later rounding hides that norms are added in another order."""

    def pair(name: str) -> Running:
        ones = [
            member(f"m{n}", make_examples(12), spec=AdapterSpec(rank=rank, dropout=0.1), seed=n, clip_norm=0.1)
            for n, rank in enumerate(ranks)
        ]
        kept = Checkpoints(tmp_path / name, keep=2)
        base = make_base(dtype=torch.float64)
        return Running(base, ones, torch.float64, settings={"checkpoint_every": 1}, checkpoints=kept)

    whole = pair("whole").run()
    killed_after(2, pair("killed"))
    resumed = pair("killed")
    assert resumed.loop.resume() == 2
    resumed.run()
    for name in ("m0", "m1"):
        assert all(torch.equal(value, resumed.final(name)[key]) for key, value in whole.final(name).items())


def test_a_member_with_no_room_waits_at_the_door_and_is_not_overtaken(tmp_path, make_base, make_examples) -> None:
    def ones() -> list[Member]:
        ranks = {"a": 2, "b": 2, "large": 16, "d": 2}
        return [
            member(name, make_examples(12), spec=AdapterSpec(rank=rank), total_steps=3 + place)
            for place, (name, rank) in enumerate(ranks.items())
        ]

    base = make_base()
    small = member_bytes(base, Adapter.new(base, AdapterSpec(rank=2)), optimizer("adamw"))
    settings = {"resident_bytes": 3 * small, "checkpoint_every": 1}

    def fresh() -> Running:
        return Running(make_base(), ones(), torch.float32, settings=settings, checkpoints=Checkpoints(tmp_path, keep=2))

    run = fresh().run()
    admitted = {e["member"]: e["tick"] for e in run.recorder.events if e["event"] == "admitted"}
    # "large" takes eight times as much: it begins when the fleet is empty, and "d" behind it when it has ended
    assert admitted == {"a": 0, "b": 0, "large": 4, "d": 9}
    assert {stack.shape_class for stack in run.bank.stacks.values()} == {2}  # what has left holds nothing
    shutil.rmtree(tmp_path)
    killed_after(2, fresh())  # while "large" waits
    resumed = fresh()
    assert resumed.loop.resume() == 2
    resumed.run()
    assert {e["member"]: e["tick"] for e in resumed.recorder.events if e["event"] == "admitted"} == {"large": 4, "d": 9}
    assert set(resumed.adapters) == {"a", "b", "large", "d"}


def test_who_shares_the_fleet_changes_nothing_of_a_verdict(tmp_path, make_base, make_examples) -> None:
    """The same members in two slots and in five end in the same states at the same steps."""
    few = fresh(tmp_path / "few", make_base, make_examples, num_slots=2).run()
    many = fresh(tmp_path / "many", make_base, make_examples, num_slots=5).run()
    assert {m.name: (m.state, m.step, m.tokens) for m in few.members} == {
        m.name: (m.state, m.step, m.tokens) for m in many.members
    }


def test_a_member_cut_short_keeps_its_full_schedule(make_base, make_examples) -> None:
    def rates(**changes: Any) -> list[float]:
        own = member("m", make_examples(20), spec=AdapterSpec(rank=2), total_steps=12, **changes)
        run = Running(make_base(), [own], torch.float32).run()
        assert own.state == ("stopped" if changes else "done")
        return [event["learning_rate"] for event in run.recorder.events if event["event"] == "step"]

    assert rates(stop_after=5) == rates()[:5]


def test_a_loss_that_is_no_number_on_the_held_out_rows_is_reported_as_the_worst(make_base, make_examples) -> None:
    seen: list[Report] = []

    class Looks(Given):
        def judge(self, reports: Sequence[Report]) -> Mapping[str, Verdict]:
            seen.extend(reports)
            return {report.member: Verdict("stop", "seen") for report in reports}

    own = replace(judged(make_examples)[1])
    own.recipe = replace(own.recipe, evaluate_at=(1, 2, 300))
    run = Running(make_base(), [own], torch.float32, source=Looks([own.name])).run()
    # the first step passes two levels at once and is judged at the higher
    assert [(report.level, report.member) for report in seen] == [(1, "m1")]
    assert own.state == "stopped"
    assert own.step == 1
    assert run.adapters.keys() == {"m1"}


def test_a_slot_that_is_given_back_holds_nothing_and_its_neighbours_keep_their_bytes(make_base, make_examples) -> None:
    """A sweep over ranks must not come to hold every rank times its most places ever."""
    base = make_base()
    members = [
        member(f"m{place}", make_examples(10), spec=AdapterSpec(rank=rank), total_steps=2)
        for place, rank in enumerate((2, 8, 2, 16))
    ]
    run = Running(base, members, torch.float32).run()
    bank, stacked = run.bank, run.loop.optimizers["adamw"]

    def held() -> int:
        tensors = [t for s in bank.stacks.values() for t in (*s.tensors.values(), *s.states.values())]
        return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())  # marks of places are not

    def numbers(rank: int) -> int:
        return 3 * sum(f.num_parameters() for f in Adapter.new(base, AdapterSpec(rank=rank)).factors.values())

    def of(slot: int) -> dict[str, torch.Tensor]:
        return {**flatten(bank.get(slot).factors), **stacked.slot_state(slot, members[slot].recipe.optimizer)}

    assert held() == numbers(2) + numbers(8) + numbers(2) + numbers(16)
    before = {slot: of(slot) for slot in (1, 2)}
    bank.clear(0)
    bank.clear(3)
    assert held() == numbers(8) + numbers(2)
    assert {stack.shape_class for stack in bank.stacks.values()} == {2, 8}
    for slot, wanted in before.items():
        assert all(torch.equal(value, wanted[name]) for name, value in of(slot).items())
    bank.put(run.adapters["m3"], slot=0)
    assert all(torch.equal(value, wanted) for name, wanted in before[2].items() for value in (of(2)[name],))
    assert not any(state.any() for state in stacked.slot_state(0, members[3].recipe.optimizer).values())
