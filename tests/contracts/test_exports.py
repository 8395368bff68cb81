"""What every exporter owes: the same map in the other engine's file, and a refusal of what has no place in it.

An engine that joins the table must bring a reader, written apart from what writes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.export.exported import export
from manylora.adapters.export.exporters import EXPORTS
from manylora.errors import AdapterBroken, OutputExists
from manylora.methods import METHODS
from manylora.spec import AdapterSpec

SPECS = {
    "plain": AdapterSpec(rank=4, alpha=8.0),
    "rank-stabilised, patterns": AdapterSpec(
        rank=4, scale_rule="alpha/sqrt(rank)", rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 3.0}
    ),
    "anchored": AdapterSpec(rank=4, alpha=8.0, init="pissa"),
    "on a grid": AdapterSpec(rank=4, alpha=8.0, quantize="int8"),
}


def from_peft(folder: Path, site: str) -> Tensor:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{site}.lora_{letter}.weight"] for letter in "AB")
    assert config["use_rslora"] is False
    alpha = next((v for k, v in config["alpha_pattern"].items() if site.endswith(k.replace("\\", ""))), None)
    return (alpha or config["lora_alpha"]) / a.shape[0] * b @ a


def from_mlx(folder: Path, site: str) -> Tensor:
    tensors = load_file(folder / "adapters.safetensors")
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    return scale * (tensors[f"{site}.lora_a"] @ tensors[f"{site}.lora_b"]).t()


def from_gguf(folder: Path, site: str) -> Tensor:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layer = site.split(".")[2]
    a, b = (tensors[f"blk.{layer}.ffn_up.weight.lora_{letter}"] for letter in "ab")
    return reader.get_field("adapter.lora.alpha").contents() / b.shape[1] * b @ a


READERS = {"peft": from_peft, "mlx": from_mlx, "gguf": from_gguf}


def test_every_engine_has_a_reader() -> None:
    assert set(READERS) == set(EXPORTS)


@pytest.fixture(scope="module")
def base(tiny_base_folder):
    return manylora.load_base(str(tiny_base_folder), dtype="float32")


def moved(adapter: Adapter) -> Adapter:
    draw = torch.Generator().manual_seed(1)
    factors = {
        name: replace(own, tensors={k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in own.tensors.items()})
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("engine", list(EXPORTS))
def test_the_file_holds_the_same_change(engine: str, kind: str, base, tmp_path: Path) -> None:
    adapter = moved(Adapter.new(base, SPECS[kind]))
    lines = export(adapter, engine, tmp_path / "out")
    assert lines
    for layer in (0, 1):
        site = f"model.layers.{layer}.mlp.up_proj"
        own = adapter.factors[site]
        want = METHODS.get(own.method).delta(base.sites[site], own, adapter.spec)["weight"]
        torch.testing.assert_close(READERS[engine](tmp_path / "out", site), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [name for name in EXPORTS if name != "peft"])
@pytest.mark.parametrize("spec", [AdapterSpec(rank=2, full_sites=("*norm",)), AdapterSpec(method="dora", rank=2)])
def test_what_has_no_place_in_the_file_is_named_and_nothing_is_left(engine: str, spec, base, tmp_path: Path) -> None:
    with pytest.raises(AdapterBroken, match="has no place for") as caught:
        export(moved(Adapter.new(base, spec)), engine, tmp_path / "out")
    assert "manylora merge" in str(caught.value.next_step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", list(EXPORTS))
def test_a_folder_in_use_is_left_alone(engine: str, base, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        export(Adapter.new(base, SPECS["plain"]), engine, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
