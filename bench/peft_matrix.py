"""Which adapters that PEFT makes open here and compute the same: a matrix of models and settings of PEFT's LoRA.

    python bench/peft_matrix.py                           # prints the matrix, writes bench/results/peft_matrix.json
    python bench/peft_matrix.py --against OTHER_CHECKOUT  # and what the other one opens of the same folders

Every model is tiny and random, every tensor of an adapter random and large. "opens" means: read by `Adapter.load`, put
into a bank, and its outputs differ from PEFT's by less than 1e-4 where the adapter changes them by much more. Anything
else is refused (with the error's first line) or wrong; there must be none of the latter. Needs peft.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

NEAR = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True}, "lora_bias": {"lora_bias": True},
    "bias: lora_only": {"bias": "lora_only"}, "bias: all": {"bias": "all"},
}  # fmt: skip


class Pictures(nn.Module):
    """Convolutions of two kinds, a norm and a linear head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 8, (1, 3), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))


class Sound(nn.Module):
    """A one-dimensional convolution, then recurrent-free linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 5, padding=2)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(torch.tanh(self.conv(x)).mean(2))))


def models() -> dict[str, tuple[Any, dict[str, torch.Tensor], dict[str, dict[str, Any]]]]:
    """By name: what makes the model, its inputs, and PEFT's settings of what is adapted."""
    import transformers

    draw = torch.Generator().manual_seed(11)
    small = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    tokens = {"input_ids": torch.randint(0, 61, (3, 9), generator=draw)}
    llama = transformers.LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2)
    qwen = transformers.Qwen2Config(**small, intermediate_size=48, num_key_value_heads=2)
    gpt2 = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    bert = transformers.BertConfig(**small, intermediate_size=48, max_position_embeddings=32, num_labels=3)
    return {
        "llama": (lambda: transformers.LlamaForCausalLM(llama), tokens, {
            "all-linear": {"target_modules": "all-linear"},
            "q and v, ranks by pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 7}},
            "linear with copies": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "norm"]},
            "linear and embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        }),
        "qwen2 (biases)": (lambda: transformers.Qwen2ForCausalLM(qwen), tokens, {
            "all-linear": {"target_modules": "all-linear"},
            "q and v, alphas by pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}},
        }),
        "gpt2 (Conv1D)": (lambda: transformers.GPT2LMHeadModel(gpt2), tokens, {
            "c_attn and c_proj": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        }),
        "bert (classifier)": (lambda: transformers.BertForSequenceClassification(bert), tokens, {
            "all-linear": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
            "query, a copied head": {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]},
        }),
        "pictures (Conv2d)": (Pictures, {"x": torch.randn(3, 3, 9, 9, generator=draw)}, {
            "convolutions": {"target_modules": ["conv1", "conv2"]},
            "mixed": {"target_modules": ["conv1", "fc"]},
            "mixed, a copied norm": {"target_modules": ["conv2", "fc"], "modules_to_save": ["norm"]},
        }),
        "sound (Conv1d)": (Sound, {"x": torch.randn(3, 2, 12, generator=draw)}, {
            "convolution": {"target_modules": ["conv"]},
            "mixed": {"target_modules": ["conv", "up", "down"], "rank_pattern": {"up": 2}},
        }),
    }  # fmt: skip


def outputs(module: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        made = module(**given)
    return made if isinstance(made, torch.Tensor) else made.logits


def fresh(make: Any) -> nn.Module:
    torch.manual_seed(7)
    return make().eval()


def cases() -> Iterator[tuple[str, Any, dict[str, torch.Tensor], dict[str, Any]]]:
    for model, (make, given, targets) in models().items():
        for target, chosen in targets.items():
            for setting, more in SETTINGS.items():
                yield f"{model}: {target}: {setting}", make, given, {**chosen, **more}


def written(place: Path) -> dict[str, str]:
    """PEFT's folders, one a case, each with what PEFT computes; why PEFT itself refuses the others."""
    import peft

    refused = {}
    for number, (name, make, given, settings) in enumerate(cases()):
        try:
            config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=True, **settings)
            wrapped = peft.get_peft_model(copy.deepcopy(fresh(make)), config).eval()
        except (ValueError, NotImplementedError, TypeError) as error:
            refused[name] = str(error).splitlines()[0]
            continue
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = 0.2 * torch.randn(parameter.shape, generator=draw)
                    parameter.copy_(noise if "lora_" in key and "magnitude" not in key else parameter + noise)
        wrapped.save_pretrained(place / str(number))
        torch.save({"made": outputs(wrapped, given)}, place / str(number) / "made.pt")
    return refused


def opened(place: Path) -> dict[str, str]:
    """What this checkout makes of the folders."""
    from manylora.adapters.adapter import Adapter
    from manylora.adapters.bank import Bank
    from manylora.base.frozen import FrozenModel
    from manylora.errors import UserError

    told = {}
    for number, (name, make, given, _) in enumerate(cases()):
        if not (place / str(number)).is_dir():
            continue
        want = torch.load(place / str(number) / "made.pt")["made"]
        module = fresh(make)
        bare, head = outputs(module, given), getattr(module, "get_output_embeddings", lambda: None)()
        try:
            base = FrozenModel(module, name="tiny", head=head)
            adapter = Adapter.load(place / str(number))
            with Bank(base) as bank:
                bank.put(adapter, slot=0)
                with bank.route((0, 0, 0)):
                    made = outputs(base.model, given)
        except UserError as error:
            told[name] = f"refused: {error.what.replace(str(place / str(number)), 'FOLDER')}"
            continue
        far, changed = (made - want).abs().max().item(), (want - bare).abs().max().item()
        told[name] = "opens" if far < NEAR < 0.05 * changed else f"wrong by {far:.1e}"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, to count what it opens")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.place:
        print(json.dumps(opened(asked.place)))
        return
    with tempfile.TemporaryDirectory() as folder:
        by_peft = written(Path(folder))
        found = {"this": opened(Path(folder))}
        if asked.against:
            command = [sys.executable, __file__, "--place", folder]
            path = {**os.environ, "PYTHONPATH": str(asked.against / "src")}
            done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
            found["other"] = json.loads(done.stdout.splitlines()[-1])
    counts = {who: count(told) for who, told in found.items()}
    result = {"cases": len(found["this"]), "peft refuses": by_peft, "counts": counts, "this": found["this"]}
    if "other" in found:
        newly = [name for name, told in found["this"].items() if told == "opens" != found["other"][name]]
        result |= {"opens now and was refused": newly, "number of them": len(newly)}
        lost = [name for name, told in found["other"].items() if told == "opens" != found["this"][name]]
        result["opened before and no more"] = lost
    print(json.dumps({name: value for name, value in result.items() if name != "this"}, indent=1))
    wrong = [name for name, told in found["this"].items() if told.startswith("wrong")]
    if wrong:
        raise SystemExit(f"Error: {len(wrong)} adapters open and compute something else: {wrong[0]}")
    from results import write_result

    write_result("peft_matrix", result)


def count(told: dict[str, str]) -> dict[str, int]:
    kinds = [text.partition(":")[0].partition(" ")[0] for text in told.values()]
    return {kind: kinds.count(kind) for kind in ("opens", "refused", "wrong")}


if __name__ == "__main__":
    main()
