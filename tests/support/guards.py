"""A guard over the whole suite: no number is read that was never written. That over sockets is in `network.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

UNWRITTEN = ("empty", "empty_like", "empty_strided")
"""Functions of torch whose result nobody has written yet; `Tensor.new_empty` besides."""


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within it, memory that torch hands out unwritten holds NaN: whoever reads it before writing gets NaN.

    Left out are tensors without numbers (meta, fake), what a dispatch mode watches, and what torch's compiler looks at.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._device import _device_constructors
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    # torch keeps its list of constructors from the first time it is asked; it must name the real ones.
    _device_constructors()

    def filled(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def make(*args: Any, **kwargs: Any) -> Any:
            made = real(*args, **kwargs)
            if torch.compiler.is_compiling() or not isinstance(made, torch.Tensor) or isinstance(made, FakeTensor):
                return made
            if made.device.type == "meta" or not (made.is_floating_point() or made.is_complex()) or not made.numel():
                return made
            if not _get_current_dispatch_mode_stack():
                with torch.no_grad():
                    torch.Tensor.fill_(made.detach(), float("nan"))
            return made

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in UNWRITTEN:
            patch.setattr(torch, name, filled(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
        yield
