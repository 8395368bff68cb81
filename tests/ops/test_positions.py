"""What a loss by position owes: autograd's numbers, two products a position, no logits kept, positions kept apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base import language
from manylora.base.language import LanguageBase, LanguageOutputs
from manylora.ops import positions
from manylora.ops.positions import linear_nats, nats, reference, values_and_gradient
from manylora.spec import AdapterSpec
from manylora.types import IGNORED, Batch

VOCABULARY, WIDTH = 211, 16


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Several tiles in each direction, none of them of the others' size."""
    set_tiles(monkeypatch, 7, 8 * 40)


def set_tiles(patch: pytest.MonkeyPatch, most: int, elements: int) -> None:
    patch.setattr(positions, "TILE_POSITIONS", most)
    patch.setattr(positions, "TILE_ELEMENTS", elements)
    patch.setattr(positions, "TILE_STEP", 8)


def drawn(count: int, seed: int, dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY, sharp: float = 1.0):
    """States, labels, weight and bias; the larger `sharp`, the more certain each position of some token."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64)
    weight = sharp * torch.randn(vocabulary, WIDTH, generator=draw, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (count,), generator=draw)
    return hidden.to(dtype), labels, weight.to(dtype), bias.to(dtype)


def with_backward(fn, hidden: Tensor, upstream: Tensor, *given) -> tuple[Tensor, Tensor]:
    """The values of `fn` on states that need a gradient, and that gradient."""
    hidden = hidden.detach().requires_grad_()
    values = fn(hidden, *given)
    values.backward(upstream)
    assert hidden.grad is not None
    return values.detach(), hidden.grad


@settings(max_examples=examples(150), deadline=None)
@given(
    count=st.integers(0, 30),
    vocabulary=st.integers(1, 200),
    most=st.integers(1, 20),
    elements=st.integers(1, 2000),
    biased=st.booleans(),
    sharp=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_tiles_of_any_size_give_the_numbers_of_autograd(count, vocabulary, most, elements, biased, sharp, seed):
    hidden, labels, weight, bias = drawn(count, seed, vocabulary=vocabulary, sharp=sharp)
    upstream = torch.randn(count, dtype=torch.float64)
    given = (labels, weight, bias if biased else None)
    want = with_backward(reference, hidden, upstream, *given)
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, most, elements)
        got = with_backward(linear_nats, hidden, upstream, *given)
        with torch.no_grad():
            torch.testing.assert_close(linear_nats(hidden, *given), got[0], rtol=0, atol=0)
    scale = 1 + float(weight.abs().max())
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_all_logits_within_float32_rounding(dtype, small_tiles):
    hidden, labels, weight, bias = drawn(50, 1, dtype)
    values, gradient = with_backward(linear_nats, hidden, torch.ones(50), labels, weight, bias)
    want, want_gradient = with_backward(reference, hidden, torch.ones(50), labels, weight, bias)
    assert values.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(values, want, rtol=2e-6, atol=4e-6)
    exact = with_backward(reference, hidden.double(), torch.ones(50).double(), labels, weight.double(), bias.double())[
        1
    ]
    apart, naive = ((one.double() - exact).norm() / exact.norm() for one in (gradient, want_gradient))
    assert apart <= 1.5 * naive + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_nearly_certain_position_does_not_cancel(dtype):
    """p - 1 of the label's own token has no correct digit in float32 once 1 - p is below 1e-7."""
    hidden, labels, weight, _ = drawn(20, 2, dtype, sharp=0.05)
    bias = torch.zeros(VOCABULARY, dtype=dtype)
    hidden, labels = hidden[:1], labels[:1]
    bias[labels] = 32.0
    _, gradient = with_backward(linear_nats, hidden, torch.ones(1), labels, weight, bias)
    exact = with_backward(reference, hidden.double(), torch.ones(1).double(), labels, weight.double(), bias.double())[1]
    assert 0 < exact.norm() < 1e-10
    tolerance = 1e-4 if dtype == torch.float32 else 0.2  # bfloat16 logits near 32 are whole multiples of 1/8
    assert (gradient.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_position_reaches_no_other(broken, small_tiles):
    hidden, labels, weight, bias = drawn(20, 3, torch.float32)
    want, want_gradient = with_backward(linear_nats, hidden, torch.ones(20), labels, weight, bias)
    hidden[4] = broken
    got, gradient = with_backward(linear_nats, hidden, torch.ones(20), labels, weight, bias)
    others = torch.arange(20) != 4
    assert got[4].isnan()
    assert torch.equal(got[others], want[others])
    assert torch.equal(gradient[others], want_gradient[others])


def test_a_position_hardly_depends_on_who_shares_its_tile(small_tiles):
    hidden, labels, weight, bias = drawn(23, 4, torch.float32)
    together = with_backward(linear_nats, hidden, torch.ones(23), labels, weight, bias)
    for start in (0, 6, 22):
        part = slice(start, start + 5)
        size = len(labels[part])
        alone = with_backward(linear_nats, hidden[part], torch.ones(size), labels[part], weight, bias)
        torch.testing.assert_close(alone[0], together[0][part], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(alone[1], together[1][part], rtol=1e-5, atol=2e-6)


def test_tokens_that_a_bias_rules_out_have_no_weight(small_tiles):
    hidden, labels, weight, bias = drawn(20, 5)
    bias[:100] = -math.inf  # whole tiles, the first among them
    labels = labels.clamp(min=100)
    want = with_backward(reference, hidden, torch.ones(20).double(), labels, weight, bias)
    got = with_backward(linear_nats, hidden, torch.ones(20).double(), labels, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert linear_nats(hidden, torch.zeros_like(labels), weight, bias).isposinf().all()


def test_states_keep_their_dtype_behind_a_head_of_another():
    hidden, labels, weight, _ = drawn(9, 6, torch.bfloat16)
    values, gradient = with_backward(linear_nats, hidden.float(), torch.ones(9), labels, weight)
    assert (values.dtype, gradient.dtype) == (torch.float32, torch.float32)
    want = with_backward(reference, hidden.float(), torch.ones(9), labels, weight)
    torch.testing.assert_close(values, want[0], rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(gradient, want[1], rtol=3e-2, atol=3e-2)


def test_backward_can_be_run_twice_and_differentiated_not_at_all():
    hidden, labels, weight, _ = drawn(9, 7)
    hidden.requires_grad_()
    total = linear_nats(hidden, labels, weight).sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden, retain_graph=True)
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        third.sum().backward()


class Watch(TorchDispatchMode):
    """What is computed while it is open: the most elements of a tensor, and the products of (n, H) with (H, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.multiplications = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        outputs = [one for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, Tensor) and not func.is_view]
        self.numel = max([self.numel, *(one.numel() for one in outputs)])
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.multiplications += made.numel() * args[-1].shape[0]
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_products_a_position_and_never_more_logits_than_a_tile(dtype, small_tiles):
    hidden, labels, weight, bias = drawn(40, 8, dtype)
    product = 40 * VOCABULARY * WIDTH
    with Watch() as watch:
        with_backward(linear_nats, hidden, torch.ones(40), labels, weight, bias)
    assert watch.multiplications == 2 * product
    assert watch.numel <= max(positions.TILE_ELEMENTS, 40 * WIDTH) < 40 * VOCABULARY
    with Watch() as watch, torch.no_grad():
        assert not linear_nats(hidden.requires_grad_(), labels, weight, bias).requires_grad
    assert watch.multiplications == product


def test_what_is_kept_for_backward_is_of_the_size_of_the_states():
    hidden, labels, weight, _ = drawn(40, 9)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear_nats(hidden.requires_grad_(), labels, weight)
    assert [tensor.shape for tensor in kept] == [hidden.shape]


def test_values_come_with_the_gradient_of_the_one_output_that_has_one():
    hidden, labels, weight, _ = drawn(12, 10)

    def one(states: Tensor) -> dict[str, Tensor]:
        logits = states @ weight.t()
        return {"right": logits.argmax(1).eq(labels).double(), **nats(logits, labels)}

    with torch.no_grad():  # as inside a custom backward
        made = values_and_gradient(one, hidden)
    assert made is not None
    values, name, gradient = made
    assert name == "nats"
    assert not any(value.requires_grad for value in values.values())
    want = with_backward(reference, hidden, torch.ones(12).double(), labels, weight)
    torch.testing.assert_close((values["nats"], gradient), want)
    assert values_and_gradient(lambda states: {"a": states.sum(1), "b": states.sum(1)}, hidden) is None
    constant = values_and_gradient(lambda states: {"a": labels.double()}, hidden)
    assert constant is not None
    assert constant[1:] == (None, None)


def test_hooks_on_what_waits_for_backward_do_not_see_a_graph_that_is_gone():
    """They count what a step holds, or move it to another place."""
    hidden, labels, weight, _ = drawn(12, 12)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        values_and_gradient(lambda states: nats(states @ weight.t(), labels), hidden)
    assert seen == []


# -- behind a base -----------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 61, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}  # fmt: skip


@pytest.fixture(params=["llama", "gemma2"])
def base(request, monkeypatch) -> LanguageBase:
    """A float64 base whose logits are those of its head, and one that caps them; chunks of 5 positions."""
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 61 * 5)
    set_tiles(monkeypatch, 4, 4 * 16)
    torch.manual_seed(0)
    if request.param == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0))
    return LanguageBase(model.double()).probed()


def asked(base: LanguageBase, rows: int = 4) -> tuple[Batch, Tensor]:
    """A batch of rows of 9 tokens, of which one supervises nothing, and random states for it."""
    draw = torch.Generator().manual_seed(11)
    labels = torch.randint(0, base.vocabulary, (rows, 9), generator=draw)
    labels[torch.rand(rows, 9, generator=draw) < 0.3] = IGNORED
    labels[1] = IGNORED
    batch = Batch(inputs={"input_ids": labels.clamp(min=0)}, targets={"labels": labels}, slots=(0, 0, -1, 1)[:rows])
    return batch, torch.randn(rows, 9, WIDTH, generator=draw, dtype=torch.float64)


def nats_and_more(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"nats": functional.cross_entropy(logits, labels, reduction="none"),
            "right": logits.argmax(1).eq(labels).to(logits.dtype)}  # fmt: skip


def several(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"nats": functional.cross_entropy(logits, labels, reduction="none"), "square": logits.square().mean(1)}


def mapped(base: LanguageBase, batch: Batch, states: Tensor, fn) -> tuple[dict[str, Tensor], Tensor, int]:
    """Sums by row, the gradient of a weighted sum of all of them, and the multiplications of its products."""
    states = states.clone().requires_grad_()
    with Watch() as watch:
        sums = LanguageOutputs(base, states, batch).map_supervised(batch.targets["labels"], fn)
        weights = torch.arange(1.0, batch.num_rows + 1, dtype=torch.float64)
        total = torch.stack([value @ weights for value in sums.values() if value.requires_grad]).sum()
        total.backward()
    assert states.grad is not None
    return {name: value.detach() for name, value in sums.items()}, states.grad, watch.multiplications


def plain(base: LanguageBase, batch: Batch, states: Tensor, fn) -> tuple[dict[str, Tensor], Tensor]:
    """The same in plain autograd, all positions at once."""
    states = states.clone().requires_grad_()
    labels = batch.targets["labels"]
    chosen = labels.ne(IGNORED)
    rows = chosen.nonzero()[:, 0]
    values = fn(base.logits(states[chosen]), labels[chosen])
    sums = {name: torch.zeros(batch.num_rows).double().index_add(0, rows, value) for name, value in values.items()}
    total = sum((rows + 1).double() @ value for value in values.values() if value.requires_grad)
    return {name: value.detach() for name, value in sums.items()}, torch.autograd.grad(total, states)[0]


@pytest.mark.parametrize(("fn", "products"), [(nats, 2), (nats_and_more, 2), (several, 3)])
def test_sums_by_row_are_those_of_autograd_in_as_few_products(base, fn, products):
    batch, states = asked(base)
    want, want_gradient = plain(base, batch, states, fn)
    sums, gradient, multiplications = mapped(base, batch, states, fn)
    assert list(sums) == list(want)
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-12)
    count = int(batch.targets["labels"].ne(IGNORED).sum())
    # What has several gradients is known when the first chunk has been computed.
    positions_multiplied = products * count + (5 if fn is several else 0)
    assert multiplications == positions_multiplied * WIDTH * base.vocabulary


def test_what_else_a_function_trains_has_its_gradient(base):
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def cooled(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return nats(logits / temperature, labels)

    batch, states = asked(base)
    LanguageOutputs(base, states.requires_grad_(), batch).map_supervised(batch.targets["labels"], cooled)[
        "nats"
    ].sum().backward()
    chosen = batch.targets["labels"].ne(IGNORED)
    loss = cooled(base.logits(states[chosen]), batch.targets["labels"][chosen])["nats"].sum()
    torch.testing.assert_close((states.grad, temperature.grad), torch.autograd.grad(loss, (states, temperature)))


@pytest.mark.parametrize("slots", [(0, 0, -1, 1), (1, 1, -1, -1)])
def test_an_adapter_on_the_head_has_its_gradients_where_it_is_used(base, slots):
    """Slot 0 adapts the head and slot 1 does not: a batch without slot 0 takes the head as a constant."""
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    bank.put(Adapter.new(base, AdapterSpec(rank=2, sites=("lm_head", "q_proj")), seed=0), slot=0)
    bank.put(Adapter.new(base, AdapterSpec(rank=2, sites=("q_proj",)), seed=1), slot=1)
    (stack,) = [one for one in bank.stacks.values() if one.site.name == "lm_head"]
    torch.nn.init.normal_(stack.tensors["b"])
    batch, states = asked(base)
    batch = Batch(inputs=batch.inputs, targets=batch.targets, slots=slots)
    states.requires_grad_()
    with bank.route(slots):
        with Watch() as watch:
            LanguageOutputs(base, states, batch).map_supervised(batch.targets["labels"], nats)["nats"].sum().backward()
        count = int(batch.targets["labels"].ne(IGNORED).sum())
        constant = watch.multiplications == 2 * count * WIDTH * base.vocabulary
        assert constant == (0 not in slots)
        got = [states.grad, *(tensor.grad for tensor in stack.tensors.values())]
        logits = base.logits(states).flatten(0, 1)
    loss = functional.cross_entropy(logits, batch.targets["labels"].flatten(), reduction="sum", ignore_index=IGNORED)
    want = torch.autograd.grad(loss, [states, *stack.tensors.values()], allow_unused=True)
    assert (want[1] is None) == (0 not in slots)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_head_whose_own_weight_is_trained_has_its_gradient(base):
    weight = base.head.get_parameter("weight").requires_grad_()
    batch, states = asked(base)
    LanguageOutputs(base, states, batch).map_supervised(batch.targets["labels"], nats)["nats"].sum().backward()
    logits = base.logits(states).flatten(0, 1)
    loss = functional.cross_entropy(logits, batch.targets["labels"].flatten(), reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("fn", [nats, nats_and_more])
def test_a_broken_row_reaches_no_other_row(base, fn):
    batch, states = asked(base)
    want, want_gradient, _ = mapped(base, batch, states, fn)
    states[2] = math.nan
    sums, gradient, _ = mapped(base, batch, states, fn)
    others = torch.tensor([0, 1, 3])
    assert sums["nats"][2].isnan()
    assert torch.equal(sums["nats"][others], want["nats"][others])
    assert torch.equal(gradient[others], want_gradient[others])


@pytest.mark.parametrize("fn", [nats, several])
def test_a_batch_that_supervises_nothing_sums_to_zero(base, fn):
    batch, states = asked(base)
    labels = torch.full_like(batch.targets["labels"], IGNORED)
    sums = LanguageOutputs(base, states.requires_grad_(), batch).map_supervised(labels, fn)
    assert all(torch.equal(value, torch.zeros(4).double()) and not value.requires_grad for value in sums.values())


def test_a_linear_head_needs_no_chunk_of_logits(monkeypatch, base):
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 1 << 22)
    batch, states = asked(base)
    count = int(batch.targets["labels"].ne(IGNORED).sum())
    assert count * base.vocabulary > states.numel()
    with Watch() as watch:
        mapped(base, batch, states, nats)
    assert (watch.numel >= count * base.vocabulary) == (base.post_head == "softcap")


@pytest.mark.parametrize("fn", [nats, nats_and_more])
def test_a_model_whose_own_logits_are_taken_keeps_one_gradient_of_them(base, fn):
    base.take(replace(base.found, post_head=None))
    base.head.requires_grad_()  # it lies before the states
    batch, _ = asked(base)
    states = torch.randn(4, 9, base.vocabulary, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sums, gradient, _ = mapped(base, batch, states, fn)
    count = int(batch.targets["labels"].ne(IGNORED).sum())
    large = [tensor.shape for tensor in kept if tensor.numel() > base.vocabulary]
    assert large == [(count, base.vocabulary)]
    torch.testing.assert_close((sums, gradient), plain(base, batch, states, fn))
