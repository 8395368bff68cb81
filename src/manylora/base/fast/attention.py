"""The attention of `manylora.ops.attention` under a name that transformers models take.

How the sequences of a packed row reach it: transformers asks, once per forward, for the mask of the positions, the
padding and the window that it was given. `_mask` answers with a `Layout` where that mask is nothing but spans of tokens
that see themselves, and the model hands it on to every layer in the mask's place; otherwise with the mask of tokens x
tokens that torch's own attention takes. So nothing has to be told, and what a checkpointed layer computes again has the
layout with its other arguments. A mask of tokens x tokens that the caller made is read once for all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from manylora.ops.attention import attention
from manylora.ops.attention_layout import Layout, read_layout
from manylora.types import dtype_of

NAME = "manylora"
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
UNKNOWN = ("softcap", "position_bias", "s_aux", "cache", "output_attentions")
"""What a model may ask of attention that is not done here."""
FAR = {torch.bfloat16: 5e-2, torch.float32: 1e-3, torch.float64: 1e-6}
"""How far states may be from those under torch's attention, as a share of their norm: rounding through all layers."""

_fallbacks: ContextVar[Counter[str] | None] = ContextVar("manylora_attention_fallbacks", default=None)
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What masks that callers made were found to be: (the tensor's version, its layout or None)."""


def register() -> None:
    """Make `model.set_attn_implementation("manylora")` mean this attention. Needed once; again does no harm."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def use_attention(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """Have a transformers model attend through this op, if it then gives the same states; the note for the log.

    `run`: the states of some packed rows. It is called before and after. A model that attends otherwise than through
    torch's `scaled_dot_product_attention`, that fails or that gives other states is left as it was.
    """
    own = _implementation(model)
    if own != "sdpa":
        return f"attention is the model's own ({own})"
    chosen: Any = model
    with torch.no_grad():
        before = run()
        take_attention(model)
        try:
            with attention_fallbacks() as reasons:
                after = run()
            if not is_attended(model):
                why = "its code has no place for another"
            elif not (after - before).norm() <= FAR.get(dtype_of(model) or torch.float32, 0.0) * before.norm():
                why = "another gives other states"
            else:
                part = f", but for: {'; '.join(reasons)}" if reasons else ""
                return f"attention is computed within each sequence of a row{part}"
        except (TypeError, ValueError, RuntimeError, LookupError, AssertionError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            why = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        chosen.set_attn_implementation(own)
    return f"attention is torch's own: {why}"


def is_attended(model: nn.Module) -> bool:
    """Whether a model attends through this op."""
    return _implementation(model) == NAME


def take_attention(model: nn.Module) -> None:
    """Have a transformers model attend through this op, untried."""
    register()
    chosen: Any = model
    chosen.set_attn_implementation(NAME)


def _implementation(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


@contextmanager
def attention_fallbacks() -> Iterator[Counter[str]]:
    """While it is open, counts why calls went to torch's own attention, by reason; empty: none did."""
    reasons: Counter[str] = Counter()
    token = _fallbacks.set(reasons)
    try:
        yield reasons
    finally:
        _fallbacks.reset(token)


@contextmanager
def opaque_attention() -> Iterator[None]:
    """While it is open, a compiled model calls this attention as it is, and does not look into it."""
    from transformers import AttentionInterface

    register()
    AttentionInterface.register(NAME, torch.compiler.disable(_attend))
    try:
        yield
    finally:
        AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Layout | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' call of attention: (B, H, T, D) and (B, K, T, D) to (B, T, H, E), and no weights."""
    if query.shape[2] == 1 and not dropout and _asked_beyond(extra) is None:
        return _attend_last(query, key, value, attention_mask, scaling), None
    reason = _refusal(query, key, value, dropout, extra)
    layout: Layout | str | None = None
    if reason is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        layout = _layout_of(attention_mask, query, causal)
        reason = "a mask that is not made of sequences" if layout is None else None
    if layout is not None:
        return attention(query, key, value, layout, scaling).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    reasons = _fallbacks.get()
    if reasons is not None:
        reasons[str(reason)] += 1
    mask = attention_mask.mask(query.device) if isinstance(attention_mask, Layout) else attention_mask
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **extra
    )
    return out, None


def _asked_beyond(extra: dict[str, Any]) -> str | None:
    """What is asked of attention that only the model's own code knows; None: nothing."""
    return next((name for name in UNKNOWN if extra.get(name) not in (None, False)), None)


def _attend_last(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Layout | None, scaling: float | None
) -> Tensor:
    """The last token of each row, which sees all that its mask lets it: (B, H, 1, D) to (B, 1, H, E).

    The heads that share keys are the queries of one of them: keys and values are read where they lie.
    """
    if isinstance(mask, Layout):
        mask = mask.mask(query.device)
    rows, heads, _, width = query.shape
    shared = key.shape[1]
    if mask is not None and mask.shape[1] not in (1, shared):
        mask = mask.view(len(mask), shared, heads // shared, mask.shape[-1])
    made = functional.scaled_dot_product_attention(
        query.view(rows, shared, heads // shared, width), key, value, attn_mask=mask, scale=scaling
    )
    return made.reshape(rows, 1, heads, value.shape[-1])


def _refusal(query: Tensor, key: Tensor, value: Tensor, dropout: float, extra: dict[str, Any]) -> str | None:
    """Why torch's own attention must do this call; None where this one can."""
    asked = _asked_beyond(extra)
    if asked is not None:
        return f"{asked} is asked for"
    if dropout:
        return "dropout of attention weights"
    if query.device.type != "cpu":
        return f"tensors on {query.device.type}"
    if query.shape[2] != key.shape[2]:
        return "keys of other tokens than the queries (a cache, or another sequence)"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"{', '.join(dict.fromkeys(str(part.dtype) for part in (query, key, value)))} tensors"
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return "a traced call"
    return None


def _layout_of(mask: Tensor | Layout | None, query: Tensor, causal: bool) -> Layout | None:
    """What a layer's mask says, None where only a mask can say it."""
    rows, _, tokens, _ = query.shape
    if isinstance(mask, Layout):
        return mask
    if mask is None:
        return Layout.whole(rows, tokens, causal=causal)
    if mask.dtype != torch.bool or mask.shape != (rows, 1, tokens, tokens):
        return None
    version = None if mask.is_inference() else mask._version
    found: tuple[int, Layout | None] | None = _read.get(mask)
    if found is not None and found[0] == version:
        return found[1]
    layout = read_layout(lambda row, q, k: mask[row, 0, q, k], rows, tokens)
    if version is not None:
        _read[mask] = version, layout
    return layout


def _mask(**given: Any) -> Tensor | Layout | None:
    """transformers' call for a mask: the layout that it describes, else what torch's own attention is given."""
    from transformers.masking_utils import sdpa_mask

    layout = _asked_layout(**given)
    return sdpa_mask(**given) if layout is None else layout


def _asked_layout(
    *,
    batch_size: int = 0,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Layout | None:
    """The layout of the mask that is asked for; None where there is none, or where none is needed."""
    if attention_mask is None and (allow_is_causal_skip or allow_is_bidirectional_skip):
        return None
    known = mask_function is not None and not use_vmap and torch.device(device).type == "cpu"
    # Offsets may be tensors, of a cache whose size is fixed.
    square = q_length == kv_length and all(isinstance(part, int) and part == 0 for part in (q_offset, kv_offset))
    fits = attention_mask is None or attention_mask.shape == (batch_size, kv_length)
    if not (known and square and fits) or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return None
    real = None if attention_mask is None else attention_mask.bool()
    head = torch.zeros((), dtype=torch.long)

    def allowed(row: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = mask_function(row, head, q, k)  # pyright: ignore[reportOptionalCall] - known
        return seen if real is None else seen & real[row, k]

    return read_layout(allowed, batch_size, kv_length, real=real)
