"""Writes the folders under `fixtures`: a run and a sweep that were interrupted, adapters, and a packed base.

They were made once, by the code of commit 07230db (version 0.1.0), and stay as they are: what was written then resumes
and loads for ever. A later kind of file gets a folder beside them and a maker here.

    PYTHONPATH=src python tests/golden/make_fixtures.py --output DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_curves import ROWS, read_curve

import manylora

INTERRUPTED_AT = 4
"""The tick after which the run and the sweep are interrupted."""
PLACE = "@FOLDER@"
"""Stands in files for the folder in which a run lies."""

RUN: dict[str, Any] = {
    "base": "builtin:tiny-en",
    "dtype": "float32",
    "device": "cpu",
    "data": {"train": "rows.jsonl", "eval_fraction": 0.2},
    "adapter": {"rank": 2, "layers": [6], "dropout": 0.1, "full_sites": ["model.norm"]},
    "train": {"learning_rate": 2e-3, "steps": 8, "row_tokens": 96, "rows_per_step": 2, "compile": "off"},
    "evaluate": {"every_steps": 2, "samples": 1, "max_new_tokens": 4},
    "checkpoint": {"every_steps": 2, "keep": 1},
    "track": [],
    "output": "run",
}
SWEEP: dict[str, Any] = RUN | {
    "adapter": {"rank": 2, "sites": ["q_proj"], "layers": [6]},
    "sweep": {
        "space": {"adapter.init": ["default", "pissa"], "train.learning_rate": [1e-3, 5e-3]},
        "search": "grid",
        "stop": "successive-halving",
        "concurrent": 2,
    },
    "output": "sweep",
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "low-rank": {"rank": 4, "alpha": 6.0, "sites": ("q_proj", "down_proj"), "rank_pattern": {"down_proj": 2}},
    "with-whole-copies": {"rank": 2, "sites": ("v_proj",), "full_sites": ("norm", "lm_head")},
    "rescaled": {"rank": 4, "scale_rule": "alpha/sqrt(rank)", "sites": ("embed_tokens", "o_proj")},
}


def tiny_model() -> Any:
    """A random Llama of two layers and a vocabulary of 64, the same at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM(config).eval()


def _tokenizer() -> Any:
    """A tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{place}": place for place in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w2", unk_token="w0")


def logits_of(base: Any, adapter: Any = None) -> list[float]:
    """What a base says, with an adapter or without, to a row of eight tokens: a few of the logits."""
    bank = manylora.Bank(base, num_slots=1)
    try:
        if adapter is not None:
            bank.put(adapter, slot=0)
        with torch.no_grad(), bank.route([-1 if adapter is None else 0]):
            logits = base.model(input_ids=torch.arange(3, 11)[None]).logits
    finally:
        bank.close()
    return logits[0, -2:, ::8].double().flatten().tolist()


@contextmanager
def interrupted_after(ticks: int) -> Iterator[None]:
    """Within it, a run is told to stop as by Ctrl-C once so many ticks are made."""
    import manylora.training.run as module

    @contextmanager
    def interruptible() -> Iterator[Callable[[], bool]]:
        asked = iter(range(1, 10**6))
        yield lambda: next(asked) >= ticks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "interruptible", interruptible)
        yield


def _make_run(config: dict[str, Any], output: Path, start: Callable[..., Any]) -> None:
    """A run folder as an interruption leaves it, and beside it the numbers that it would have written undisturbed."""
    name = config["output"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        (place / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        start(place / "config.yaml", overrides={"output": str(place / "whole")})
        with interrupted_after(INTERRUPTED_AT), pytest.raises(KeyboardInterrupt):
            start(place / "config.yaml")
        shutil.copytree(place / name, output / name)
        for path in (output / name).rglob("*"):
            if path.is_file() and place.name.encode() in (content := path.read_bytes()):
                path.write_bytes(content.replace(str(place).encode(), PLACE.encode()))
        curve = read_curve(place / "whole")
        (output / f"{name}-whole.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")


def _make_adapters(output: Path) -> None:
    from manylora.base.language import LanguageBase

    base = LanguageBase(tiny_model(), name="random").probed()
    expected = {"base": logits_of(base)}
    for name, settings in ADAPTERS.items():
        adapter = manylora.Adapter.new(base, manylora.AdapterSpec(**settings), seed=1)
        generator = torch.Generator().manual_seed(7)
        for factors in adapter.factors.values():
            for tensor in factors.tensors.values():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        adapter.save(output / "adapters" / name, base)
        expected[name] = logits_of(base, adapter)
    with tempfile.TemporaryDirectory() as folder:
        from manylora.base.packing.folder import quantise_folder

        tiny_model().save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        quantise_folder(folder, output / "packed-base", "nf4")
    expected["packed-base"] = logits_of(manylora.load_base(str(output / "packed-base"), dtype="float32", device="cpu"))
    (output / "logits.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write all of them into a folder that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True)
    torch.set_num_threads(1)
    _make_run(RUN, output, manylora.train)
    _make_run(SWEEP, output, manylora.sweep)
    _make_adapters(output)


if __name__ == "__main__":
    main()
