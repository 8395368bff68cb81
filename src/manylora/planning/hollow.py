"""A base without its weights: the model of its configuration, probed on numbers that take no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manylora.base.fingerprint import weight_files
from manylora.base.language import LanguageBase
from manylora.base.layers import repeated_layers
from manylora.base.load import check_auto, check_quantize, choose_dtype, find_base, load_base, load_tokenizer
from manylora.base.skeleton import NotOneToOne, Skeleton
from manylora.forwards import Level, StandIn, place_stand_in
from manylora.memory.hollow import HollowBase

PROBED_LAYERS = 2
"""Layers that the probes run through, beside one of each further kind; what a model does with rows shows in these."""


def hollow_base(
    name: str, *, auto: str, dtype: str, device_type: str = "cpu", quantize: str | None = None,
    trust_remote_code: bool = False, chat_template: str | Path | None = None,
) -> HollowBase:  # fmt: skip
    """A base as it would be on a device of a type, without its weights; the arguments are those of `load_base`.

    Raises:
        UserError: nothing is there, or the format that is asked for is not the one that the folder is packed in.
    """
    check_auto(auto)
    folder = find_base(name, weights=False)
    stored = check_quantize(name, folder, quantize)
    chosen, why = choose_dtype(dtype, torch.device("cpu") if device_type == "cpu" else torch.device("meta"))
    form = quantize if stored is None else stored.format
    files = sum(path.stat().st_size for path in weight_files(folder)) if any(folder.glob("*.safetensors")) else 0
    try:
        skeleton = Skeleton(folder, auto, chosen, trust_remote_code)
    except NotOneToOne as error:
        base = load_base(
            name, dtype=dtype, device="cpu", auto=auto, trust_remote_code=trust_remote_code, chat_template=chat_template
        )
        return HollowBase(base, lambda name: False, form, files, [why, f"the weights were read: {error}"])
    for key in skeleton.names():
        if skeleton.aliases(key)[0] == key:
            skeleton.put(key, _thin(skeleton.shape(key), key, chosen), torch.device("cpu"))
    tokenizer, _ = load_tokenizer(name, chat_template, trust_remote_code=trust_remote_code)
    base = LanguageBase(skeleton.model, tokenizer=tokenizer, name=name, folder=folder, fingerprint="planned")
    with _few_layers(skeleton.model):
        base.take(base.probe())
    return HollowBase(base, skeleton.in_float32, form, files, [why])


def _thin(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor:
    """Numbers of a weight's shape of which few exist: each row is the one before it, moved by one."""
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    scale = shape[-1] ** -0.5
    drawn = torch.randn(sum(shape), generator=generator).mul_(scale).to(dtype)
    return drawn.as_strided(shape, (1,) * len(shape))


@contextmanager
def _few_layers(model: nn.Module) -> Iterator[None]:
    """Within it most of the repeated layers hand their input on, so that a probe costs little whatever the depth."""
    sites = [name for name, module in model.named_modules() if module._parameters]
    seen: set[Any] = set()
    passing: list[StandIn] = []
    kinds: dict[type, bool] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        kinds[type(module)] = isinstance(output, tuple)

    handles = []
    for place, layer in enumerate(repeated_layers(model, sites)):
        kind = type(layer.module), getattr(layer.module, "attention_type", None)
        if place < PROBED_LAYERS or kind not in seen:
            seen.add(kind)
            handles.append(layer.module.register_forward_hook(note))
            continue
        passing.append(place_stand_in(layer.module, _Pass(type(layer.module), kinds), Level.LAYER))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stand_in in passing:
            stand_in.remove()


class _Pass:
    """The forward of a layer that hands its first argument on, in the form in which its kind returns."""

    def __init__(self, kind: type, kinds: dict[type, bool]):
        self.kind = kind
        self.kinds = kinds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self.kinds.get(self.kind) else hidden
