"""Parts of an op that a plan counts once: what they do follows from the shapes of what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Counter = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_counter: ContextVar[Counter | None] = ContextVar("manylora_repeated", default=None)


def repeated(part: Callable[P, R]) -> Callable[P, R]:
    """Mark a function whose work is decided by its arguments' shapes and plain values; it runs as it is.

    It may write into tensors that it is given and give tensors back, and keeps nothing else.
    """

    @wraps(part)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        counter = _counter.get()
        return part(*args, **kwargs) if counter is None else counter(part, args, kwargs)

    return run


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Within it, every marked function is called through `counter(part, args, kwargs)`."""
    token = _counter.set(counter)
    try:
        yield
    finally:
        _counter.reset(token)
