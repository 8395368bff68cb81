"""Make the bundled demo data, or the full experiment, from the development file of the E2E NLG Challenge.

    python tools/make_demo_data.py dev.txt
        writes train.jsonl (1,500 references), eval.jsonl, ATTRIBUTION.md and LICENSE to src/manylora/data/demo/e2e
    python tools/make_demo_data.py dev.txt --full DIR
        writes train.jsonl and eval.jsonl with every reference to DIR

Both split by attribute set, 90 to 10, with the same seed: their eval.jsonl are the same file, and no input is in both
of train and eval. The demo's train side holds fewer references of the same inputs. Each line of the source is
`attributes||sentence`; attributes and sentence keep the source's own tokenisation (BLEU is compared on it).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DEMO = Path(__file__).parent.parent / "src" / "manylora" / "data" / "demo" / "e2e"
EVAL_SHARE = 0.1
DEMO_REFERENCES = 1500
SEED = 0
ATTRIBUTION = """\
# Where this data comes from

`train.jsonl` and `eval.jsonl` are a sample of the development set of the E2E NLG Challenge:

> Jekaterina Novikova, Ondrej Dusek, Verena Rieser (2017). The E2E Dataset: New Challenges For End-to-End Generation.
> Proceedings of the 18th Annual SIGDIAL Meeting on Discourse and Dialogue. https://arxiv.org/abs/1706.09254
> http://www.macs.hw.ac.uk/InteractionLab/E2E/

Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0), see `LICENSE` beside this file. The
licence of manylora's code does not extend to these files, nor theirs to the code.

## What was changed

Made by `tools/make_demo_data.py` from a copy of the set in which each line is `attributes||sentence` and punctuation is
set apart by spaces (that form was given; nothing was re-tokenised here):

- each line became `{"prompt": attributes + line end, "completion": sentence}`, space at both ends removed;
- a tenth of the attribute sets was held out: %(eval_inputs)d inputs, all %(eval_rows)d references, are `eval.jsonl`;
- of the other %(train_inputs)d inputs %(train_rows)d references were drawn, about as many for each: `train.jsonl`.
"""
LICENSE = """\
train.jsonl and eval.jsonl in this folder are licensed under the
Creative Commons Attribution-ShareAlike 4.0 International License (CC BY-SA 4.0).

    https://creativecommons.org/licenses/by-sa/4.0/
    https://creativecommons.org/licenses/by-sa/4.0/legalcode

You may share and adapt them, also commercially, if you give credit (ATTRIBUTION.md), say what you changed, and
distribute what you made of them under the same licence. They come without warranty.
"""

References = dict[str, list[str]]


def read_references(path: Path) -> References:
    """The sentences of each attribute set, both in the order of the file."""
    references: References = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        attributes, found, sentence = line.partition("||")
        if not found or not attributes.strip() or not sentence.strip():
            raise SystemExit(f"{path}:{number}: not `attributes||sentence`: {line!r:.80}")
        references.setdefault(attributes.strip(), []).append(sentence.strip())
    return references


def split(references: References) -> tuple[References, References]:
    """(train, eval): a tenth of the attribute sets, drawn, is eval."""
    drawn = list(references)
    random.Random(SEED).shuffle(drawn)
    held_out = set(drawn[: round(EVAL_SHARE * len(drawn))])
    train = {inputs: texts for inputs, texts in references.items() if inputs not in held_out}
    return train, {inputs: texts for inputs, texts in references.items() if inputs in held_out}


def thin(references: References, count: int) -> References:
    """`count` references in all, taken in turn from each attribute set, so that every one keeps some."""
    rng = random.Random(SEED)
    piles = {inputs: rng.sample(texts, len(texts)) for inputs, texts in references.items()}
    deepest = max(map(len, piles.values()))
    rounds = [(inputs, turn) for turn in range(deepest) for inputs in rng.sample(list(piles), len(piles))]
    taken = [(inputs, turn) for inputs, turn in rounds if turn < len(piles[inputs])][:count]
    kept: References = {inputs: [] for inputs in references}
    for inputs, turn in taken:
        kept[inputs].append(piles[inputs][turn])
    return {inputs: texts for inputs, texts in kept.items() if texts}


def write_rows(path: Path, references: References, order: random.Random | None = None) -> int:
    """How many rows were written; `order` shuffles them, without it the references of an input stand together."""
    rows = [{"prompt": inputs + "\n", "completion": text} for inputs, texts in references.items() for text in texts]
    if order is not None:
        order.shuffle(rows)
    path.write_text("".join(_lines(rows)), encoding="utf-8", newline="\n")
    return len(rows)


def _lines(rows: Iterable[dict[str, str]]) -> Iterable[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the development file, one `attributes||sentence` a line")
    parser.add_argument("--full", type=Path, metavar="DIR", help="write every reference to DIR, not the demo's sample")
    args = parser.parse_args()
    train, held_out = split(read_references(args.source))
    folder: Path = args.full or DEMO
    folder.mkdir(parents=True, exist_ok=True)
    train = train if args.full else thin(train, DEMO_REFERENCES)
    counts = {
        "train_inputs": len(train),
        "train_rows": write_rows(folder / "train.jsonl", train, random.Random(SEED)),
        "eval_inputs": len(held_out),
        "eval_rows": write_rows(folder / "eval.jsonl", held_out),
    }
    if not args.full:
        (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION % counts, encoding="utf-8")
        (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")
    print(f"{folder}: {json.dumps(counts)}")


if __name__ == "__main__":
    main()
