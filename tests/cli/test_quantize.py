"""`manylora quantize`: the folder, the table, the JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manylora.base.load import load_base
from manylora.cli.quantize import quantize
from manylora.errors import ConfigError, OutputExists, UnknownName


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_folder_loads_and_the_table_tells_error_and_bytes(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(str(tiny_base_folder), tmp_path / "nf4")
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].split("  ")[0] == "sites ending in"
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"}
    assert {line.split()[0] for line in lines[1:9]} == kinds
    assert "packed as nf4: 14 linear weights" in told.err
    base = load_base(str(tmp_path / "nf4"))
    assert base.model(torch.arange(8)[None]).logits.isfinite().all()


def test_json_holds_every_figure(tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(str(tiny_base_folder), tmp_path / "out", "int4", block=16, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "int4"
    assert result["options"] == {"block": 16}
    assert result["fingerprint"] == load_base(str(tiny_base_folder)).fingerprint
    assert 0 < result["sites"]["all"]["relative_error"] < 0.2
    assert result["bytes_after"] < result["bytes_before"]
    parts = [row for name, row in result["sites"].items() if name != "all"]
    assert sum(row["weights"] for row in parts) == result["sites"]["all"]["weights"]


def test_double_quantisation_can_be_left_out(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = {}
    for flag in (True, False):
        quantize(str(tiny_base_folder), tmp_path / str(flag), double_quant=flag, as_json=True)
        bits[flag] = json.loads(capsys.readouterr().out)["sites"]["gate_proj"]
        config = json.loads((tmp_path / str(flag) / "config.json").read_text())
        settings = config["quantization_config"]["sites"]["model.layers.0.mlp.gate_proj"]
        assert settings["double_quant"] is flag
    assert bits[True]["relative_error"] != bits[False]["relative_error"]


def test_mistakes_are_told_and_leave_nothing_behind(tiny_base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nf5"):
        quantize(str(tiny_base_folder), tmp_path / "out", "nf5")
    with pytest.raises(UnknownName, match="double_quant"):
        quantize(str(tiny_base_folder), tmp_path / "out", "int8", double_quant=True)
    with pytest.raises(ConfigError, match="block of nf4 is 7"):
        quantize(str(tiny_base_folder), tmp_path / "out", block=7)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
    quantize(str(tiny_base_folder), tmp_path / "out")
    with pytest.raises(OutputExists):
        quantize(str(tiny_base_folder), tmp_path / "out")


def test_a_base_fitted_to_an_adapter_is_nearer_to_the_original_and_a_base_of_its_own(tmp_path, capsys):
    import torch

    import manylora
    from manylora.cli.app import run
    from manylora.errors import BaseMismatch

    for name, words in (("plain", []), ("fitted", ["--loftq-rank", "8"])):
        assert run(["quantize", "builtin:tiny-en", "--format", "nf4", "--output", str(tmp_path / name), *words]) == 0
    assert "fitted-start" in capsys.readouterr().out
    tokens = torch.arange(40)[None] * 97 % 8000

    def logits(base, adapter=None):
        with torch.no_grad():
            if adapter is None:
                return base.model(input_ids=tokens).logits.float()
            with manylora.Bank(base) as bank:
                bank.put(adapter, slot=0)
                with bank.route([0]):
                    return base.model(input_ids=tokens).logits.float()

    plain, fitted = (manylora.load_base(str(tmp_path / name), dtype="float32") for name in ("plain", "fitted"))
    start = manylora.Adapter.load(tmp_path / "fitted-start")
    wanted = logits(manylora.load_base("builtin:tiny-en", dtype="float32"))
    off = [(found - wanted).norm().item() for found in (logits(plain), logits(fitted), logits(fitted, start))]
    assert off[2] < off[0] < off[1]
    assert plain.fingerprint != fitted.fingerprint
    with pytest.raises(BaseMismatch):
        logits(plain, start)
    assert run(["quantize", "builtin:tiny-en", "--output", str(tmp_path / "fitted2"), "--loftq-rank", "4"]) == 0
    (tmp_path / "again-start").mkdir()
    assert run(["quantize", "builtin:tiny-en", "--output", str(tmp_path / "again"), "--loftq-rank", "4"]) == 2
    assert not (tmp_path / "again").exists()


def test_training_goes_on_from_the_adapter_that_a_base_was_fitted_to(tiny_base_folder, tmp_path, capsys):
    import manylora
    from manylora.cli.app import run

    done = run(["quantize", str(tiny_base_folder), "--output", str(tmp_path / "packed"), "--loftq-rank", "4"])
    assert done == 0, capsys.readouterr().err
    rows = [{"prompt": f"name : {word}", "completion": f" {word} it is"} for word in "abcd"]
    result = manylora.train(
        {"base": str(tmp_path / "packed"), "adapter": {"from": str(tmp_path / "packed-start")}, "track": [],
         "train": {"steps": 3, "row_tokens": 64, "learning_rate": 1e-2}, "evaluate": {"max_new_tokens": 2},
         "output": str(tmp_path / "run")},
        train_data=rows, eval_data=rows,
    )  # fmt: skip
    assert result.summary["eval"]["loss"] < result.summary["base_eval"]["loss"]
