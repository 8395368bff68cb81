"""What an earlier version wrote is taken up by this one: runs resume, adapters and packed bases load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_curves import ROWS, read_curve
from make_fixtures import ADAPTERS, INTERRUPTED_AT, PLACE, logits_of, tiny_model

import manylora
from manylora.base.language import LanguageBase

FIXTURES = Path(__file__).with_name("fixtures")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _laid_out(name: str, folder: Path) -> Path:
    """A copy of an interrupted run that may go on in a folder, its data beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    run = folder / name
    shutil.copytree(FIXTURES / name, run)
    for path in run.rglob("*"):
        if path.is_file() and PLACE.encode() in (content := path.read_bytes()):
            path.write_bytes(content.replace(PLACE.encode(), str(folder).encode()))
    return run


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_an_interrupted_run_of_an_earlier_version_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    run = _laid_out(name, tmp_path)
    begun = read_curve(run)
    start = manylora.train if name == "run" else manylora.sweep
    result = start(run / "config.yaml", resume=True)
    whole = json.loads((FIXTURES / f"{name}-whole.json").read_text(encoding="utf-8"))
    curve = read_curve(run)
    assert curve.keys() == whole.keys()
    for key, values in curve.items():
        assert values == pytest.approx(whole[key], rel=1e-4 if key.endswith("norm") else 1e-5), key
    steps = sum(len(values) for key, values in begun.items() if key.endswith(".loss"))
    assert 0 < steps < sum(len(values) for key, values in whole.items() if key.endswith(".loss"))
    assert result.summary["adapters"]
    if name == "run":
        assert steps == INTERRUPTED_AT
    else:
        assert list((FIXTURES / name / "checkpoints" / "waiting").iterdir()), "some trials wait in the fixture"


def _expected() -> dict[str, list[float]]:
    return json.loads((FIXTURES / "logits.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_an_earlier_version_says_what_it_said(name: str) -> None:
    base = LanguageBase(tiny_model(), name="random").probed()
    expected = _expected()
    assert logits_of(base) == pytest.approx(expected["base"], rel=1e-4, abs=1e-5), "the base is another"
    adapter = manylora.Adapter.load(FIXTURES / "adapters" / name)
    logits = logits_of(base, adapter)
    assert logits == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
    assert logits != pytest.approx(expected["base"], rel=1e-2, abs=1e-2)


def test_a_packed_base_of_an_earlier_version_says_what_it_said() -> None:
    base = manylora.load_base(str(FIXTURES / "packed-base"), dtype="float32", device="cpu")
    assert logits_of(base) == pytest.approx(_expected()["packed-base"], rel=1e-4, abs=1e-5)
