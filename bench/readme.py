"""Write the README's figures from the committed results.

    python bench/readme.py

A test holds README.md to what this script writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def demo_block() -> str:
    """What the demo showed, with machine and command."""
    result = json.loads((ROOT / "bench" / "results" / "demo.json").read_text(encoding="utf-8"))
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


def with_figures(readme: str) -> str:
    """The README's text with its marked blocks written anew."""
    block = f"<!-- demo:begin -->\n{demo_block()}<!-- demo:end -->"
    return re.sub(r"<!-- demo:begin -->.*<!-- demo:end -->", lambda _: block, readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
