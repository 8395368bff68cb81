"""A key-value cache with room for the tokens to come: a new token is written in its place, and nothing is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """`keys` and `values` (rows, heads, tokens, D) are the begun part of tensors with room for `room` tokens."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self._length = 0
        self._held: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        new = (key_states, value_states)
        if not self._held or self._length > self._held[0].shape[-2]:
            room = max(self.room, self._length)
            held = tuple(one.new_empty(*one.shape[:2], room, one.shape[-1]) for one in new)
            for into, before in zip(held, self._held, strict=False):
                into[:, :, :start] = before[:, :, :start]
            self._held = held
        for into, one in zip(self._held, new, strict=True):
            into[:, :, start : self._length] = one
        return self._shown()

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._held:
            self._held = tuple(one.index_select(0, indices) for one in self._held)
            self._shown()

    def skip(self, count: int) -> None:
        """Hold so many tokens more, of no meaning."""
        self._length += count
        self._shown()

    def _shown(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (one[:, :, : self._length] for one in self._held)
        return self.keys, self.values


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """transformers' cache for a model of this configuration, whose layers that hold all tokens have room for `room`."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
