"""What the element-wise ops owe: autograd's numbers, no error of their own, few bytes kept, and only what is proven."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.fast import forms as elementwise_forms
from manylora.base.fast.elementwise import FORM, use_elementwise
from manylora.base.fast.forms import find_norm
from manylora.base.frozen import FrozenModel
from manylora.ops import elementwise, elementwise_norm
from manylora.ops.elementwise import (
    ACTIVATIONS,
    gated,
    gated_halves,
    gated_reference,
    rotate,
    rotate_reference,
)
from manylora.ops.elementwise_norm import rms_norm, rms_norm_reference
from manylora.spec import AdapterSpec

NORMS = {
    "weighted": {},
    "rounded once": {"round_once": True},
    "one is added": {"add_one": True},
}


def drawn(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values(form: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result and the gradient of every input that wants one."""
    inputs = [part.detach().requires_grad_(part.requires_grad) for part in inputs]
    out = form(*inputs)
    wanted = [part for part in inputs if part.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def distances(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    assert [part.shape for part in found] == [part.shape for part in exact]
    return [float((left.double() - right).norm() / right.norm()) for left, right in zip(found, exact, strict=True)]


def assert_exact_and_no_worse(fast: Callable, reference: Callable, inputs: list[Tensor], grad: Tensor) -> None:
    """In float64 the reference's numbers; in bfloat16 and float32 no farther from them than the reference there."""
    exact = values(reference, inputs, grad)
    assert max(distances(values(fast, inputs, grad), exact)) < 1e-13
    # Of few numbers, either form may be the one that is luckier in how they round.
    luck = 1.03 if grad.numel() > 10_000 else 1.5
    for dtype, share, rounding in ((torch.bfloat16, luck, 1e-5), (torch.float32, 2.0, 1e-7)):
        narrow = [part.detach().to(dtype).requires_grad_(part.requires_grad) for part in inputs]
        upstream = grad.to(dtype)
        truth = values(reference, [part.detach().double().requires_grad_(part.requires_grad) for part in narrow],
                       upstream.double())  # fmt: skip
        ours, plain = (distances(values(form, narrow, upstream), truth) for form in (fast, reference))
        assert all(own <= share * other + rounding for own, other in zip(ours, plain, strict=True)), (ours, plain)
        assert max(ours) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


# -- RMS norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1), (7, 1), (2, 3, 4, 33), (17,), (300, 576)], ids=str)
def test_a_norm_and_its_gradients_are_the_references_in_few_roundings(kind, shape):
    width = shape[-1]
    x, weight = drawn(*shape).requires_grad_(), (0.3 * drawn(width, seed=1) + 1).requires_grad_()
    for eps in (1e-6, 0.5):
        fast, plain = (partial(form, eps=eps, **NORMS[kind]) for form in (rms_norm, rms_norm_reference))
        if width == 1 and eps < 0.1:  # the gradient of a sign: what rounding leaves of nothing
            continue
        assert_exact_and_no_worse(fast, plain, [x, weight], drawn(*shape, seed=2))


def test_a_norm_without_a_weight_is_the_references_too():
    assert_exact_and_no_worse(
        lambda x: rms_norm(x, None, 1e-5), lambda x: rms_norm_reference(x, None, 1e-5),
        [drawn(9, 5, 12).requires_grad_()], drawn(9, 5, 12, seed=1),
    )  # fmt: skip


def test_a_norm_in_blocks_of_rows_is_the_whole(monkeypatch):
    x, weight, grad = drawn(13, 8).bfloat16(), drawn(8, seed=1).bfloat16(), drawn(13, 8, seed=2).bfloat16()
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    whole = values(partial(rms_norm, eps=1e-5, add_one=True), inputs, grad)
    monkeypatch.setattr(elementwise_norm, "ELEMENTS_AT_ONCE", 40)
    for left, right in zip(values(partial(rms_norm, eps=1e-5, add_one=True), inputs, grad), whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_rows_of_zeros_and_huge_rows_stay_finite(dtype):
    x = drawn(4, 16, dtype=dtype)
    x[1], x[2] = 0, x[2] * 1e15
    out = values(partial(rms_norm, eps=1e-6), [x.requires_grad_(), torch.ones(16, dtype=dtype)], torch.ones_like(x))
    exact = values(
        partial(rms_norm_reference, eps=1e-6),
        [x.detach().double().requires_grad_(), torch.ones(16, dtype=torch.float64)], torch.ones(4, 16).double(),
    )  # fmt: skip
    for left, right in zip(out, exact, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=2e-2, atol=1e-12)


def test_what_lies_in_another_order_is_not_copied_and_keeps_its_order():
    x = drawn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    weight = drawn(8, seed=1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = rms_norm(x, weight, 1e-5)
    assert out.stride() == x.stride()
    assert kept[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    grad = drawn(2, 3, 5, 8, seed=3)
    for upstream in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2), grad[:, :, :1].expand(2, 3, 5, 8)):
        exact = values(partial(rms_norm_reference, eps=1e-5), [x, weight], upstream)
        assert max(distances(values(partial(rms_norm, eps=1e-5), [x, weight], upstream), exact)) < 1e-13


@pytest.mark.parametrize("form", [lambda x: x[:, ::2], lambda x: x[:, :, 2:10], lambda x: x[:, :1].expand(4, 6, 16)])
def test_slices_and_repeated_rows_are_normalised_too(form):
    x = form(drawn(4, 6, 16))
    torch.testing.assert_close(rms_norm(x, None, 1e-5), rms_norm_reference(x, None, 1e-5))


# -- rotation and gated product ----------------------------------------------------------------------------------------


def turning(rows: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines whose two halves differ, as no model's do, so that none stands for the other."""
    angles = drawn(rows, 1, tokens, width, seed=5)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_rotation_and_its_gradient_are_the_references(width, rows):
    cos, sin = turning(rows, 5, width)
    x = drawn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    assert_exact_and_no_worse(rotate, rotate_reference, [x, cos, sin], drawn(2, 3, 5, 8, seed=2))
    assert rotate(x, cos, sin).stride() == x.stride()
    part = drawn(2, 5, 3, 12).transpose(1, 2)[..., 4:].requires_grad_()
    assert_exact_and_no_worse(rotate, rotate_reference, [part, cos, sin], drawn(2, 3, 5, 8, seed=2))


@pytest.mark.parametrize("at_once", [1, 40, 100])
def test_a_rotation_in_pieces_is_the_whole(monkeypatch, at_once):
    monkeypatch.setattr(elementwise, "ELEMENTS_IN_CACHE", at_once)
    for rows in (1, 2):
        cos, sin = turning(rows, 5, 4)
        x = drawn(2, 5, 3, 8).transpose(1, 2)
        torch.testing.assert_close(rotate(x, cos, sin), rotate_reference(x, cos, sin), rtol=1e-13, atol=1e-13)


def test_cosines_that_want_a_gradient_get_one():
    cos, sin = (part.requires_grad_() for part in turning(1, 5, 8))
    inputs = [drawn(2, 3, 5, 8).requires_grad_(), cos, sin]
    exact = values(rotate_reference, inputs, drawn(2, 3, 5, 8, seed=2))
    assert max(distances(values(rotate, inputs, drawn(2, 3, 5, 8, seed=2)), exact)) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_product_and_its_gradients_are_the_references(activation):
    gate, up, grad = (2 * drawn(3, 7, 11, seed=seed) for seed in range(3))
    fast, plain = partial(gated, activation=activation), partial(gated_reference, activation=activation)
    assert_exact_and_no_worse(fast, plain, [gate.requires_grad_(), up.requires_grad_()], grad)
    for gate_first in (True, False):
        assert_exact_and_no_worse(
            partial(gated_halves, activation=activation, gate_first=gate_first),
            lambda both, first=gate_first: gated_reference(*elementwise._halves(both, first), activation),
            [torch.cat([gate, up], dim=-1).detach().requires_grad_()],
            grad,
        )


def kept_bytes(run: Callable[[], Tensor], *known: Tensor) -> int:
    """Bytes of the storages that a forward keeps for its backward, but for those of what is known."""
    seen = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    given = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in given)


@pytest.mark.parametrize("kind", NORMS)
def test_no_more_than_the_inputs_and_a_number_a_row_is_kept(kind):
    x, weight = drawn(6, 10, 32, dtype=torch.bfloat16).requires_grad_(), torch.ones(32).bfloat16()
    assert kept_bytes(lambda: rms_norm(x, weight, 1e-5, **NORMS[kind]), x, weight) == 4 * 60
    cos, sin = (part.bfloat16() for part in turning(1, 10, 32))
    assert kept_bytes(lambda: rotate(x, cos[0], sin[0]), cos, sin) == 0
    assert kept_bytes(lambda: gated(x, 2 * x.detach(), "silu"), x) == x.nbytes  # up, which is new here
    assert kept_bytes(lambda: gated_halves(x, "gelu"), x) == 0


@pytest.mark.parametrize("rows", [0, 3])
def test_empty_rows_and_half_precision_take_the_reference(rows):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = drawn(rows, 8, dtype=dtype).requires_grad_()
        weight = drawn(8, seed=1, dtype=dtype).requires_grad_()
        out = rms_norm(x, weight, 1e-5) + gated(x, x, "silu") + rotate(x, x.detach(), x.detach())
        out.sum().backward()
        assert out.dtype == dtype
        assert x.grad is not None
        assert weight.grad is not None
        assert x.grad.shape == x.shape
        assert weight.grad.shape == (8,)


# -- in models ---------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
HEADS = {"head_dim": 8}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "2 gated products, 5 norms, 2 rotations"),
    "mistral": ({}, "2 gated products, 5 norms, 2 rotations"),
    "qwen3": (HEADS, "2 gated products, 9 norms, 2 rotations"),
    "gemma2": (HEADS, "2 gated products, 9 norms, 2 rotations"),
    "gemma3_text": (HEADS, "2 gated products, 13 norms, 2 rotations"),
    "phi3": ({}, "2 gated products, 5 norms, 2 rotations"),
    "olmo2": ({}, "2 gated products, 9 norms, 2 rotations"),
    "granite": ({}, "2 gated products, 5 norms, 2 rotations"),
    "stablelm": ({}, "2 gated products, 2 rotations"),
    "mixtral": ({"num_local_experts": 4}, "5 norms, 2 rotations"),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, ""),
}
"""Settings, and what is recognised; a mixture's experts are one tensor."""


def small(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    more = FAMILIES[kind][0]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more)).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # ones as they come: their weight would not be seen
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids() -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def states(model: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return model(input_ids=ids(), use_cache=False).logits.double()

    return run


def switched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if FORM in vars(module)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_computes_the_same_by_the_ops_that_are_recognised(kind):
    model = small(kind)
    classes = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        before = states(model)()
    note = use_elementwise(model, states(model))
    found = FAMILIES[kind][1]
    assert note.startswith(f"computed in few passes over memory: {found}" if found else "element-wise parts are")
    assert bool(switched(model)) == bool(found)
    with torch.profiler.profile() as seen:
        after = states(model)().detach()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    names = [event.name for event in seen.events()]
    for op, word in (("_RmsNorm", "norm"), ("_Rotate", "rotation"), ("_Gated", "gated")):
        assert any(name.startswith(op) for name in names) == (word in found), op
    for name, module in model.named_modules():
        assert isinstance(module, classes[name])
        assert type(module).__name__ == classes[name].__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])
def test_a_model_of_another_dtype_stays_within_its_rounding(kind, dtype):
    model = small(kind, dtype)
    exact = states(copy.deepcopy(model).double())
    with torch.no_grad():
        truth, before = exact(), states(model)()
        note = use_elementwise(model, states(model))
        after = states(model)()
    assert note.startswith("computed in few passes")
    assert after.dtype == torch.float64
    own = (before - truth).norm()
    assert (after - truth).norm() <= 1.3 * own + 1e-6 * truth.norm()


def factors_of(model: Any, *, again: bool) -> dict[str, Tensor]:
    """The gradients of an adapter's factors, of a norm's trained copy too, after a forward and backward."""
    base = FrozenModel(model, example=lambda rows: {"input_ids": ids()[:1].expand(rows, 9).clone()})
    norm = next(name for name in base.sites if name.endswith(("input_layernorm", "post_attention_layernorm")))
    with Bank(base, num_slots=2) as bank:
        for slot in range(2):
            adapter = Adapter.new(base, AdapterSpec(rank=4, full_sites=(norm,)), seed=slot)
            for factors in adapter.factors.values():
                for tensor in factors.tensors.values():
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(slot)) * 0.05)
            bank.put(adapter, slot=slot)
        layers = model.model.layers
        for layer in layers if again else ():
            layer.forward = partial(checkpoint, partial(type(layer).forward, layer), use_reentrant=False)
        with bank.route([0, 1]):
            model(input_ids=ids(), use_cache=False).logits.float().square().mean().backward()
        for layer in layers if again else ():
            del layer.forward
        return {
            f"{key[0]}.{name}": tensor.grad.clone()
            for key, stack in bank.stacks.items() for name, tensor in stack.tensors.items()
            if tensor.grad is not None
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "olmo2"])
def test_gradients_of_factors_and_of_a_trained_norm_are_the_models_own_checkpointed_too(kind):
    model = small(kind)
    before = factors_of(model, again=False)
    assert any("norm" in name for name in before)
    use_elementwise(model, states(model))
    for again in (False, True):
        after = factors_of(model, again=again)
        assert after.keys() == before.keys()
        for name, gradient in before.items():
            assert gradient.norm() > 0, name
            assert (after[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_trained_copy_of_a_norm_is_computed_by_the_op():
    model = small("llama")
    use_elementwise(model, states(model))
    base = FrozenModel(model)
    with Bank(base) as bank:
        bank.put(Adapter.new(base, AdapterSpec(sites=("norm",), method="full"), seed=0), slot=0)
        with bank.route([0, 0]), torch.profiler.profile() as seen:
            model(input_ids=ids(), use_cache=False).logits.sum().backward()
    names = [event.name for event in seen.events()]
    assert names.count("_RmsNorm") == 5
    assert "_RmsNormBackward" in names


def test_other_models_of_the_process_and_copies_stay_as_they_were():
    model, other = small("llama"), small("llama")
    keys, signature = list(model.state_dict()), inspect.signature(type(model.model.norm).forward)
    use_elementwise(model, states(model))
    assert switched(model)
    assert not switched(other)
    assert type(other.model.norm).forward is not type(model.model.norm).forward
    assert inspect.signature(type(model.model.norm).forward) == signature
    assert list(model.state_dict()) == keys
    assert FORM in vars(copy.copy(model.model.norm))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - made on this line
        assert not switched(twin)
        assert {type(module) for module in twin.modules()} == {type(module) for module in other.modules()}
        torch.testing.assert_close(states(twin)(), states(model)(), rtol=1e-4, atol=1e-5)


def test_a_model_that_was_switched_before_is_not_switched_again():
    model = small("llama")
    use_elementwise(model, states(model))
    classes = [type(module) for module in model.modules()]
    assert use_elementwise(model, states(model)).startswith(
        "computed in few passes over memory: 2 gated products, 5 norms, 2"
    )
    assert [type(module) for module in model.modules()] == classes


def test_a_compiled_call_takes_the_models_own_code():
    model = small("llama")
    use_elementwise(model, states(model))
    graphs = []

    def seen(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    x = torch.randn(2, 5, 32)
    for part in (model.model.norm, model.model.layers[0].mlp):
        made = torch.compile(part, backend=seen, fullgraph=True)(x)
        torch.testing.assert_close(made, part(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    assert not any("autograd" in graph for graph in graphs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_never_called_as_it_was_tried_is_not_counted(dtype):
    """Olmo turns with cosines in float32, whatever the dtype of its heads."""
    model = small("olmo2", dtype)
    note = use_elementwise(model, states(model))
    used = dtype == torch.float32
    assert ("2 rotations" in note) == used
    assert note.endswith("the model's own rotation is kept: ours is never called as it was tried") == (not used)
    assert any("Attention" in type(module).__name__ for module in switched(model)) == used


@pytest.mark.parametrize("broken", ["rms_norm", "gated", "rotate"])
def test_a_kind_of_op_that_gives_other_states_is_left_and_the_others_are_used(broken, monkeypatch):
    model = small("llama")
    with torch.no_grad():
        before = states(model)()
    good = getattr(elementwise_forms, broken)
    wrong = []
    monkeypatch.setattr(elementwise_forms, broken, lambda *given, **more: good(*given, **more) * (2 if wrong else 1))

    def run() -> Tensor:
        wrong.append(1)  # it is found to be right, and is wrong in the model
        return states(model)()

    kind = {"rms_norm": "norm", "gated": "gated product", "rotate": "rotation"}[broken]
    note = use_elementwise(model, run)
    assert note.endswith(f"the model's own {kind} is kept: ours gives other states")
    assert note.startswith("computed in few passes over memory: ")
    with torch.no_grad():
        torch.testing.assert_close(states(model)(), before, rtol=1e-4, atol=1e-5)


def test_a_kind_of_op_that_fails_is_left_with_the_reason(monkeypatch):
    model = small("llama")
    good, runs = elementwise_forms.gated, []

    def fails(*given: Any) -> Tensor:
        if runs:
            raise TypeError("no such product")
        return good(*given)

    monkeypatch.setattr(elementwise_forms, "gated", fails)
    note = use_elementwise(model, lambda: runs.append(1) or states(model)())
    assert note == (
        "computed in few passes over memory: 5 norms, 2 rotations; "
        "the model's own gated product is kept: ours failed with TypeError: no such product"
    )
    assert not any("MLP" in type(module).__name__ for module in switched(model))


class Norm(nn.Module):
    """What looks like an RMS norm, by name and by what it holds."""

    def __init__(self, kind: str):
        super().__init__()
        self.weight = nn.Parameter(drawn(16, dtype=torch.bfloat16) * 0.3 + 1)
        self.eps = 1e-5
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-3 if self.kind == "another eps" else self.eps
        wide = x.float() if self.kind != "in bfloat16" else x
        if self.kind == "a mean":
            wide = wide - wide.mean(dim=-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        if self.kind == "another dtype":
            return wide * self.weight
        if self.kind == "rounded once":
            return (wide * self.weight.float()).to(x.dtype)
        return wide.to(x.dtype) * self.weight


@pytest.mark.parametrize("kind", ["another eps", "a mean", "another dtype"])
def test_what_is_no_rms_norm_is_not_taken_for_one(kind):
    assert find_norm(Norm(kind)) is None


def test_a_norm_is_rounded_as_often_as_the_module_rounds_it():
    plain, once = find_norm(Norm("plain")), find_norm(Norm("rounded once"))
    assert plain is not None
    assert once is not None
    assert (plain.round_once, once.round_once) == (False, True)
    assert find_norm(nn.LayerNorm(16)) is None
    assert find_norm(nn.RMSNorm(16, eps=1e-6)) is not None
