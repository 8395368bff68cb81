"""What memory does not hold is computed in smaller forwards, with the same result, and a run that resumes knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fleets import RECIPE, Running, killed_after, member, ragged
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.language import LanguageBase
from manylora.config import load_config
from manylora.data.example import Example
from manylora.errors import OutOfMemory
from manylora.runs.events import read_events
from manylora.spec import AdapterSpec
from manylora.training import fitting, run
from manylora.training.checkpoint import Checkpoints
from manylora.training.checkpointing import Mode, checkpointed
from manylora.training.fitting import Fit, fit
from manylora.training.member import Member
from manylora.training.step import backward, micro_batches, probe_step, widest_batch

SPEC = AdapterSpec(rank=4, dropout=0.1)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    "python": MemoryError,
}


def small_base(dtype: torch.dtype = torch.float64) -> LanguageBase:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LanguageBase(LlamaForCausalLM(config).to(dtype), name="random llama").probed()


class Limit:
    """An allocator that holds forwards of so many tokens; those that keep less inside hold `factor` times as many."""

    def __init__(self, base: LanguageBase, tokens: int, error: str = "cpu", *, late: bool = False, after: int = 0):
        self.base = base
        self.tokens = tokens
        self.error = ERRORS[error]
        self.late = late
        self.after = after
        self.factor = {"none": 1, "selective": 2, "full": 4}
        self.mode: Callable[[], Mode] = lambda: "none"
        self.seen: list[int] = []
        self.real = base.outputs
        base.outputs = self.outputs  # pyright: ignore[reportAttributeAccessIssue]

    def outputs(self, batch: Any) -> Any:
        count = batch.targets["labels"].numel()
        self.seen.append(count)
        fits = len(self.seen) <= self.after or count <= self.tokens * self.factor[self.mode()]
        if fits or not torch.is_grad_enabled():
            return self.real(batch)
        if not self.late:
            raise self.error()
        found = self.real(batch)
        found.hidden.register_hook(self.fail)
        return found

    def fail(self, gradient: Tensor) -> None:
        raise self.error()


def members(count: int = 1, **more: Any) -> list[Member]:
    specs = (SPEC, AdapterSpec(rank=2), AdapterSpec(rank=8, dropout=0.2))
    return [
        member(f"m{which}", ragged(24 + 5 * which, seed=which), spec=specs[which], seed=which, **more)
        for which in range(count)
    ]


def trained(count: int, limit: int | None = None, **more: Any) -> tuple[Running, Limit | None]:
    base = small_base()
    held = None if limit is None else Limit(base, limit, **more)
    return Running(base, members(count), torch.float64).run(), held


@pytest.mark.parametrize(
    ("count", "late", "error"),
    [(1, False, "cpu"), (1, True, "cuda"), (1, False, "python"), (3, True, "cpu")]
    + [
        pytest.param(count, late, error, marks=pytest.mark.slow)
        for count in (1, 3)
        for late in (False, True)
        for error in ERRORS
        if (count, late, error) not in [(1, False, "cpu"), (1, True, "cuda"), (1, False, "python"), (3, True, "cpu")]
    ],
)
def test_a_step_that_is_too_large_goes_on_in_smaller_forwards(count: int, late: bool, error: str) -> None:
    plain, _ = trained(count)
    limited, limit = trained(count, 40, error=error, late=late)
    assert limit is not None
    assert max(limit.seen) > 40
    for which in range(count):
        name = f"m{which}"
        assert limited.recorder.losses(name) == pytest.approx(plain.recorder.losses(name), rel=1e-12)
        for key, value in plain.final(name).items():
            torch.testing.assert_close(limited.final(name)[key], value, rtol=1e-8, atol=1e-12)
    told = [event for event in limited.recorder.events if event["event"] == "out_of_memory"]
    assert told
    assert [event["budget_tokens"] for event in told] == sorted((e["budget_tokens"] for e in told), reverse=True)
    assert len(limited.recorder.notes) == len(told)
    assert "from now on steps are computed" in limited.recorder.notes[0]
    # Once found, the budget is kept: no later step fails again.
    after = limit.seen[max(place for place, size in enumerate(limit.seen) if size > 40) + 1 :]
    assert len(after) > len(told)


@pytest.mark.parametrize("late", [False, True])
def test_gradients_after_a_failure_are_those_of_one_forward(late: bool) -> None:
    base = small_base()
    (own,) = members()
    own.slot = 0
    with Bank(base, dtype=torch.float64) as bank:
        bank.put(Adapter.new(base, SPEC, seed=0), slot=0)
        for stack in bank.stacks.values():
            stack.tensors["b"].data.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        tensors = [tensor for stack in bank.stacks.values() for tensor in stack.tensors.values()]
        batches = micro_batches([own], base)
        backward(base, {0: own.aim()}, batches)
        whole = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None
        parts = micro_batches([own], base, 40)
        assert len(parts) > 1
        # The first fits and has added its gradients when the next one fails.
        Limit(base, 0, late=late, after=1)
        with pytest.raises(OutOfMemory):
            backward(base, {0: own.aim()}, parts)
        assert all(tensor.grad is None for tensor in tensors)
        del base.outputs
        backward(base, {0: own.aim()}, parts)
        for tensor, value in zip(tensors, whole, strict=True):
            assert tensor.grad is not None
            assert value is not None
            assert (tensor.grad - value).norm() <= 1e-12 * value.norm()


def limited_loop(
    folder: Path | None, limit: int, *, strengthens: bool = True, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Running, Limit]]:
    base = small_base(dtype)
    held = Limit(base, limit)
    with checkpointed(base) as found:
        held.mode = lambda: found.mode
        more: dict[str, Any] = {"settings": {"strengthens": strengthens, "checkpoint_every": 3}}
        if folder is not None:
            more["checkpoints"] = Checkpoints(folder, keep=9)
        running = Running(base, members(2), base.dtype, checkpointing=found, **more)
        yield running, held
        running.bank.close()


def test_where_one_row_is_too_much_its_layers_are_computed_again() -> None:
    plain, _ = trained(2)
    for running, limit in limited_loop(None, 8):
        limit.factor = {"none": 1, "selective": 2, "full": 8}
        running.run()
        modes = [e["checkpointing"] for e in running.recorder.events if e["event"] == "out_of_memory"]
        assert modes[0] == "none"
        assert modes[-2:] == ["selective", "full"]
        assert running.recorder.notes[-1].endswith("checkpointing is full; the result stays as it is")
        for name in ("m0", "m1"):
            assert running.recorder.losses(name) == pytest.approx(plain.recorder.losses(name), rel=1e-12)


@pytest.mark.parametrize("strengthens", [False, True])
def test_where_nothing_is_left_the_error_says_what_to_change(strengthens: bool) -> None:
    for running, _ in limited_loop(None, 2, strengthens=strengthens):
        with pytest.raises(OutOfMemory, match=r"does not hold 1 row of \d+ tokens at once: .*can't allocate") as caught:
            running.run()
        advice = str(caught.value.next_step)
        assert "train.row_tokens" in advice
        assert "quantize" in advice
        assert ("train.checkpointing" in advice) == (not strengthens)
        assert all(tensor.grad is None for stack in running.bank.stacks.values() for tensor in stack.tensors.values())


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_was_limited_resumes_to_the_same_bytes_without_failing_again(stop: int, tmp_path: Path) -> None:
    more: dict[str, Any] = {"dtype": torch.float32}
    for running, _ in limited_loop(tmp_path / "whole", 24, **more):
        whole = running.run()
    for running, _ in limited_loop(tmp_path / "killed", 24, **more):
        killed_after(stop, running)
    for running, limit in limited_loop(tmp_path / "killed", 24, **more):
        assert running.loop.resume() is not None
        running.run()
        assert max(limit.seen) <= 24 * limit.factor[limit.mode()]
        assert not [event for event in running.recorder.events if event["event"] == "out_of_memory"]
        for name in ("m0", "m1"):
            for key, value in whole.final(name).items():
                assert torch.equal(running.final(name)[key], value), key


# -- the probe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_the_same_to_the_bit_with_and_without_a_probe(dtype: torch.dtype) -> None:
    found = []
    for probes in (False, True):
        running = Running(small_base(dtype), members(2), torch.float32, settings={"probes": probes}).run()
        found.append((running.final("m0"), running.final("m1"), running.recorder.losses("m0")))
    assert found[0][2] == found[1][2]
    for which in (0, 1):
        assert all(torch.equal(value, found[1][which][name]) for name, value in found[0][which].items())


def test_the_probe_finds_at_once_what_a_later_step_would_need() -> None:
    """One row of many is long: without the probe the run fails when its step comes."""
    examples = [*ragged(40, longest=8), *ragged(1, seed=7, longest=30)]
    examples[-1] = Example(np.arange(30, dtype=np.int32), np.arange(30) >= 2, 2, "", "", "", "made", 99)
    ticks = []
    for probes in (False, True):
        base = small_base()
        own = member("m", examples, spec=SPEC, rows_per_step=1, total_steps=60)
        own.epochs.packs = False
        Limit(base, 16)
        running = Running(base, [own], torch.float64, settings={"probes": probes})
        with pytest.raises(OutOfMemory):
            running.run()
        ticks.append(running.loop.tick)
    assert ticks[1] == 0 < ticks[0]


def test_the_probe_is_no_smaller_than_any_batch_of_the_run() -> None:
    base = small_base()
    own = members(2)
    for slot, one in enumerate(own):
        one.slot = slot
    for budget in (None, 64, 40):
        probe = widest_batch(own, base, budget).targets["labels"].numel()
        for step in range(RECIPE.total_steps):
            for one in own:
                one.step = step
            assert max(batch.targets["labels"].numel() for batch in micro_batches(own, base, budget)) <= probe


def test_a_probe_leaves_no_gradient() -> None:
    base = small_base()
    (own,) = members()
    own.slot = 0
    with Bank(base) as bank:
        bank.put(Adapter.new(base, SPEC, seed=0), slot=0)
        probe_step(base, [own])
        assert all(tensor.grad is None for stack in bank.stacks.values() for tensor in stack.tensors.values())


# -- what a run chooses ------------------------------------------------------------------------------------------------


def fitted(free: int, mode: str = "auto") -> Fit:
    base = small_base()
    (own,) = members()
    return fit(base, own, Adapter.new(base, SPEC, seed=0), mode, device_free=free)


def test_what_a_run_chooses_follows_the_memory_that_is_free() -> None:
    found = [fitted(free) for free in (10**9, 1_200_000, 800_000, 350_000)]
    order = [one.mode for one in found]
    assert order[0] == "none"
    assert order[-1] == "full"
    assert sorted(order, key=["none", "selective", "full"].index) == order
    assert [one.probes for one in (found[0], found[-1])] == [False, True]
    assert found[0].budget_tokens is None
    assert found[-1].budget_tokens is not None
    assert all(one.may_change for one in found)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_is_asked_for_is_what_a_run_does(mode: str) -> None:
    found = fitted(10**9, mode)
    assert (found.mode, found.may_change) == (mode, False)
    assert "train.checkpointing" in found.reason


def test_a_run_keeps_its_choice_and_resumes_with_it(tiny_base_folder: Path, tmp_path: Path, monkeypatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "name : {n}", "completion": "the dog {n}"}}\n' for n in range(12)))
    config = load_config({
        "base": str(tiny_base_folder), "data": {"train": str(rows)}, "output": str(tmp_path / "run"), "track": [],
        "train": {"steps": 4, "row_tokens": 32, "rows_per_step": 2}, "checkpoint": {"every_steps": 1},
    })  # fmt: skip
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 400_000)
    kept = run.Loop.run

    def dies(self: Any, interrupted: Any) -> None:
        kept(self, lambda: self.tick == 2)

    monkeypatch.setattr(run.Loop, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        run.train(config)
    monkeypatch.setattr(run.Loop, "run", kept)
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 10**12)  # now there is room, and it is not used
    seen = []
    monkeypatch.setattr(
        run, "checkpointed", lambda base, mode, *rest: seen.append(mode) or checkpointed(base, mode, *rest)
    )
    run.train(config, resume=True)
    assert seen == ["full"]
    events = read_events(tmp_path / "run")
    assert [event["mode"] for event in events if event["event"] == "checkpointing"] == ["full"]
