"""A model without its weights: parameters on the meta device, buffers real, and where each tensor of a file goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class NotOneToOne(Exception):
    """Why a checkpoint cannot be read tensor by tensor into a model; the ordinary load takes it then."""


class Skeleton:
    """The model that `auto` makes of a folder's configuration, and the way its tensors go in.

    `dtype` None keeps each tensor in the dtype of its file.

    Raises:
        NotOneToOne: the model cannot be built without its weights.
    """

    def __init__(self, folder: Path, auto: str, dtype: torch.dtype | None, trust_remote_code: bool):
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")  # of what is stored, not of what is computed
        given = {} if dtype is None else {"dtype": dtype}
        try:
            with _meta_parameters():
                model = getattr(transformers, auto).from_config(config, trust_remote_code=trust_remote_code, **given)
        except Exception as error:
            raise NotOneToOne(f"it cannot be built without its weights ({type(error).__name__})") from error
        if any(buffer.is_meta for buffer in model.buffers()):
            raise NotOneToOne("a buffer of it has no value before its weights are read")
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        self.model: Any = model.eval().requires_grad_(False)
        self.dtype = dtype
        self._state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._float32 = [] if dtype is None else _kept_in_float32(model, dtype)
        self._aliases: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            self._aliases.setdefault(id(tensor), []).append(name)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def names(self) -> list[str]:
        """Parameters and persistent buffers, by the names of the model's state dict."""
        return list(self._state)

    def aliases(self, name: str) -> list[str]:
        """All names of one tensor: more than one where weights are tied."""
        return self._aliases[id(self._state[name])]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def in_float32(self, name: str) -> bool:
        """Whether the model's class asks for this tensor in float32 whatever the dtype of the rest."""
        return any(re.search(pattern, name) for pattern in self._float32)

    def put(self, name: str, value: Tensor, device: torch.device) -> None:
        """Give a tensor of the model its value, under all its names, in the dtype that the model wants."""
        value = value.to(device) if self.dtype is None else value.to(device, self._wanted(name))
        made = nn.Parameter(value, requires_grad=False)
        for alias in self.aliases(name):
            parent, _, leaf = alias.rpartition(".")
            module = self.model.get_submodule(parent)
            if leaf in module._parameters:
                module._parameters[leaf] = made
            else:
                module._buffers[leaf] = value

    def cast(self, model: nn.Module) -> None:
        """Give the tensors of another copy of the model the dtypes of this one; those it has packed are left alone."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in self and tensor.dtype != self._wanted(name):
                tensor.data = tensor.data.to(self._wanted(name))
        own = dict(self.model.named_buffers())
        for name, buffer in model.named_buffers():
            if name in own:
                buffer.data = buffer.data.to(own[name].dtype)

    def _wanted(self, name: str) -> torch.dtype:
        return torch.float32 if self.in_float32(name) else self._state[name].dtype

    def renamer(self) -> Callable[[str], str]:
        """From a name in the checkpoint to the model's, as transformers itself goes; unknown names stay.

        Raises:
            NotOneToOne: (by the function too) tensors are merged, split or turned on their way in.
        """
        model, prefix = self.model, f"{self.model.base_model_prefix}."
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError:  # these moved between versions; the names that need none of it still work
            return lambda name: _prefixed(name, prefix, self)
        try:
            rules = get_model_conversion_mapping(model)
            rename_source_key("", [], [], model.base_model_prefix, self._state)
        except (TypeError, AttributeError) as error:  # neither is part of its public interface
            raise NotOneToOne("this transformers names tensors in a way that is not known here") from error
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

        def rename(name: str) -> str:
            found, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, self._state)
            if found not in self and name in self:
                return name
            if converter is not None and found in self:
                raise NotOneToOne(f"transformers converts {name!r} into other tensors when it loads them")
            return found

        return rename

    def missing(self, found: set[str]) -> list[str]:
        """Names that have got no value, those left out that the model's class lets be absent and whose value stands."""
        model = self.model
        may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
        lacking = [name for name in self._state if not any(alias in found for alias in self.aliases(name))]
        return [
            name
            for name in lacking
            if self._state[name].is_meta or not any(re.search(pattern, name) for pattern in may_lack)
        ]


def _prefixed(name: str, prefix: str, skeleton: Skeleton) -> str:
    if name.startswith(prefix) and name.removeprefix(prefix) in skeleton:
        return name.removeprefix(prefix)
    return prefix + name if prefix + name in skeleton and name not in skeleton else name


def _kept_in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Patterns of the tensors that a class keeps in float32: some below float16 only, some below bfloat16 too."""
    patterns: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [pattern.replace("*", ".*") for pattern in sorted(patterns)]


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Within it a parameter goes to the meta device as a module registers it: it is never written, so it takes no room.

    Buffers are left alone: tables of positions are computed in a module's `__init__` and are in no checkpoint.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original
