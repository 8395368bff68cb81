"""Which implementation makes four-bit weights dense, and how it says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manylora import quant
from manylora.quant import kernels


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    kernels._backend.cache_clear()
    yield
    kernels._backend.cache_clear()


@pytest.fixture
def _avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(kernels.metadata, "version", lambda _: "0.50.2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


def test_the_choice_is_made_once_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    first = quant.backend("cpu")
    assert first[0] in ("bitsandbytes", "torch")
    assert first[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert quant.backend(torch.device("cpu")) == first


def test_a_device_without_kernels_uses_torch() -> None:
    assert quant.backend("mps") == ("torch", "bitsandbytes' kernels are used on cpu and cuda, not on mps")


def test_a_processor_without_avx512_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    name, why = quant.backend("cpu")
    assert name == "torch"
    assert "has AVX2" in why


@pytest.mark.usefixtures("_avx512")
def test_weights_are_packed_and_made_dense_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert quant.backend("cpu") == ("torch", "bitsandbytes is not installed")
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    assert (quant.pack(weight, "nf4").dense(torch.float32) - weight).abs().max() < 0.5


@pytest.mark.usefixtures("_avx512")
@pytest.mark.parametrize("error", [ImportError("no module"), OSError("libfoo\nmore"), RuntimeError("")])
def test_an_import_that_fails_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise error

    monkeypatch.setattr(kernels, "_import", fails)
    reason = str(error).split("\n", 1)[0] or "RuntimeError"
    assert quant.backend("cpu") == ("torch", f"bitsandbytes cannot be imported: {reason}")


@pytest.mark.usefixtures("_avx512")
def test_a_release_without_a_native_library_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = type("ErrorHandlerMockBNBNativeLibrary", (), {})
    monkeypatch.setattr(kernels, "_import", missing)
    assert quant.backend("cpu")[1] == "bitsandbytes 0.50.2 found no native library for this machine"


@pytest.mark.usefixtures("_avx512")
def test_a_kernel_with_other_values_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_import", SimpleNamespace)

    def wrong(codes: torch.Tensor, absmax: torch.Tensor, block: int, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(absmax), block, dtype=dtype)

    monkeypatch.setattr(kernels, "dequantise", wrong)
    name, why = quant.backend("cpu")
    assert name == "torch"
    assert "its kernel gives other values than the reference (nf4, torch.float32)" in why
    assert not kernels.runs(torch.device("cpu"), torch.float32, 64)


@pytest.mark.usefixtures("_avx512")
def test_a_kernel_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_import", SimpleNamespace)

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(kernels, "dequantise", fails)
    assert quant.backend("cpu")[1].endswith("its kernel fails: no such operator")
