"""Write the README's figures from the committed results.

    python bench/readme.py

Between `<!-- demo:begin -->` and `<!-- demo:end -->` goes what the demo showed, between `<!-- bench:begin -->` and
`<!-- bench:end -->` a table with one line a claim, of those whose result is there. A test holds README.md to what this
script writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Figures = Mapping[str, Any]


def demo_block() -> str:
    """What the demo showed, with machine and command."""
    result = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    figures = result["figures"]
    base, adapter, named = figures["base_eval"], figures["eval"], figures["named_values"]
    share = figures["trainable_parameters"] / figures["base_parameters"]
    return (
        "| `make demo`, on inputs it was not trained on | base | with its adapter |\n"
        "|---|---|---|\n"
        f"| loss (nats a token) | {base['loss']:.2f} | {adapter['loss']:.2f} |\n"
        f"| attribute values named in the generated sentences | {named['base']:.0%} | {named['adapter']:.0%} |\n"
        f"| BLEU | {base['bleu']:.1f} | {adapter['bleu']:.1f} |\n\n"
        f"It trains {figures['trainable_parameters']:,} parameters ({share:.1%} of the base) and takes "
        f"{figures['whole_s'] / 60:.1f} minutes on {result['machine']['cores']} cores "
        f"({result['machine']['processor']}); `python bench/demo.py` measures it.\n"
    )


# -- the table of claims -----------------------------------------------------------------------------------------------


def _step(figures: Figures) -> tuple[str, str]:
    compiled = f" ({figures['times_compiled']:.2f} with compiled layers)" if "times_compiled" in figures else ""
    return (
        f"{figures['times']:.2f} times the speed{compiled}, {figures['memory_ratio']:.0%} of the memory",
        _wanted(figures["bounds"], times="at least {:g} times", memory_ratio="at most {:.0%}"),
    )


def _sft(figures: Figures) -> tuple[str, str]:
    ways = ", ".join(f"{way} {found['times']:.2f}" for way, found in figures["ways"].items())
    wanted = _wanted(
        figures["bounds"], times="at least {:g} times the fastest", times_as_it_comes="{:g} times its defaults"
    )
    return f"{figures['times']:.2f} times the learned tokens a second ({ways})", wanted


def _fleet(figures: Figures) -> tuple[str, str]:
    one = figures["one row"]
    return (
        f"{one['times_peft']:.2f} times the speed; {one['times_solo']:.2f} times one after another here",
        _wanted(figures["bounds"], times_peft="at least {:g} times", times_solo="{:g} times"),
    )


def _loss(figures: Figures) -> tuple[str, str]:
    own = figures["large"]["ours"]
    said = f"{own['share']:.1%} of the logits' memory, {own['times_naive']:.2f} of the time"
    if "times_torch" in own:
        said += f"; {own['times_torch']:.2f} of `linear_cross_entropy`'s"
    return said, _wanted(figures["bounds"], share="at most {:.0%}", times_naive="{:g}")


def _packed_base(figures: Figures) -> tuple[str, str]:
    said = (
        f"{figures['memory_ratio']:.1%} of the linear weights' memory, {figures['step_ratio']:.2f} times a step's time"
    )
    return said, _wanted(figures["bounds"], memory_ratio="at most {:.0%}", step_ratio="{:g} times")


def _packing(figures: Figures) -> tuple[str, str]:
    padded, ordered = figures["times_padded"], figures["times_sorted"]
    said = f"{padded:.2f} times the speed of padded rows, {ordered:.2f} of rows sorted by length, the same gradients"
    return said, _wanted(figures["bounds"], times_padded="at least {:g} times", times_sorted="{:g} times")


def _start(figures: Figures) -> tuple[str, str]:
    seconds, first = figures["seconds"], figures["first step"]["seconds"]
    said = (
        f"{seconds['manylora --help']:.2f} s and {first['manylora train']:.1f} s; TRL's first step {first['trl']:.1f} s"
    )
    said += f", its imports {seconds['import peft, trl']:.1f} s"
    return said, _wanted(figures["bounds"], **{"manylora --help": "at most {:g} s"})


def _roofline(figures: Figures) -> tuple[str, str]:
    fastest = max(figures["gflops_by_shape"].values())
    said = f"{figures['share_of_best_rate']:.0%} of the fastest product's {fastest:.0f} GFLOP/s"
    return f"{said}; products are {figures['share_in_products']:.0%} of the time", ""


CLAIMS: dict[str, tuple[str, Callable[[Figures], tuple[str, str]]]] = {
    "lora_step": ("LoRA, against PEFT in a plain loop", _step),
    "sft": ("fine-tuning on gsm8k's lengths, against TRL's SFTTrainer", _sft),
    "qlora_peft": ("QLoRA, against PEFT with bitsandbytes", _step),
    "fleet": ("16 adapters at once, one row of 64 tokens a step each, against PEFT one after another", _fleet),
    "loss": ("loss behind a head of 128,256 tokens, against all logits at once", _loss),
    "packing": ("packed rows, E2E's lengths", _packing),
    "qlora_step": ("nf4 base against a bfloat16 one", _packed_base),
    "start": ("`manylora --help`, and a run up to its first step", _start),
    "roofline": ("a LoRA step's share of what the machine's products can do", _roofline),
}
"""What each result is about, and how its figures and its bounds are said; in the order of the table."""


def bench_block(results: Path = RESULTS) -> str:
    """One line for each claim whose result is there, with the machine and the versions; empty where there is none."""
    lines, made = [], []
    for name, (claim, said) in CLAIMS.items():
        path = results / f"{name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        found, wanted = said(result["figures"])
        lines.append(f"| {claim} | {found} | {wanted or 'none'} | `python bench/{name}.py` |")
        machine = result["machine"]
        made.append(f"{machine['cores']} cores ({machine['processor']}), torch {result['versions']['torch']}")
    if not lines:
        return ""
    return (
        "| what | measured | bound | command |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nMeasured on {'; '.join(dict.fromkeys(made))}. Every script first checks that what it compares computes "
        "the same, and prints no speed where it does not; `make bench` runs them all, the peers in an environment of "
        "their own (`bench/peers.txt`).\n"
    )


def _wanted(bounds: Figures, **said: str) -> str:
    return ", ".join(text.format(bounds[name]) for name, text in said.items() if name in bounds)


def with_figures(readme: str) -> str:
    """The README's text with its marked blocks written anew."""
    for name, block in (("demo", demo_block()), ("bench", bench_block())):
        marked = f"<!-- {name}:begin -->\n{block}<!-- {name}:end -->"
        readme = re.sub(
            f"<!-- {name}:begin -->.*<!-- {name}:end -->", lambda _, new=marked: new, readme, flags=re.DOTALL
        )
    return readme


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
