"""How fast rows become packed examples, beside the bare tokenizer on the same texts.

    python bench/data.py gsm8k/train.jsonl --columns prompt=question,completion=answer

A is `tokenizers`' own batch encoding of all prompts and completions; B reads the file, shows each row, encodes it,
checks it, writes the examples to disk and packs an epoch. The same rows as conversations are timed beside them. Both
ways must give the same tokens, or no time is printed. Writes bench/results/data.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results import write_result

ROUNDS = 9
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, help="rows with a prompt and a completion")
    parser.add_argument("--columns", default="", help="prompt=question,completion=answer")
    parser.add_argument("--row-tokens", type=int, default=1024)
    asked = parser.parse_args()
    from transformers import AutoTokenizer

    from manylora.base.load import find_base
    from manylora.data.batches import Epochs
    from manylora.data.examples import Encoded, Reading, encode
    from manylora.data.sources import open_source

    columns = dict(part.split("=") for part in asked.columns.split(",") if part)
    tokenizer = AutoTokenizer.from_pretrained(find_base("builtin:tiny-en"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    reading = Reading(max_length=asked.row_tokens, format="prompt-completion")
    rows = [row.values for row in open_source(asked.file, columns=columns).rows()]
    texts = [row[side] for row in rows for side in ("prompt", "completion")]
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    talks = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]

    def packed(file: Path, renamed: dict[str, str], how: Reading) -> Encoded:
        source = open_source(file, columns=renamed)
        encoded = encode(source.rows(), tokenizer, how, eos_id=tokenizer.eos_token_id)
        Epochs(encoded.examples, row_tokens=how.max_length, seed=0, packs=True).rows(0)
        return encoded

    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
        chat_reading = Reading(max_length=asked.row_tokens, format="messages")
        backend = tokenizer.backend_tokenizer
        ways: dict[str, Callable[[], object]] = {
            "tokenizers, prompts and completions": lambda: backend.encode_batch(texts, add_special_tokens=False),
            "prompt-completion, from file to packed rows": lambda: packed(asked.file, columns, reading),
            "tokenizers, whole conversations": lambda: backend.encode_batch(talks, add_special_tokens=False),
            "messages, from file to packed rows": lambda: packed(chats, {}, chat_reading),
        }
        check(packed(asked.file, columns, reading), packed(chats, {}, chat_reading), tokenizer, texts, talks)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    bare, ours, bare_chat, ours_chat = seconds.values()
    pairs = [a / b for a, b in zip(bare, ours, strict=True)]
    chat_pairs = [a / b for a, b in zip(bare_chat, ours_chat, strict=True)]
    write_result(
        "data",
        {
            "rows": len(rows),
            "characters": sum(map(len, texts)),
            "rounds": ROUNDS,
            "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
            "prompt-completion: share of the tokenizers' speed": quartiles(pairs),
            "messages: share of the tokenizers' speed on the same conversations": quartiles(chat_pairs),
            "rows a second": {
                "prompt-completion": round(len(rows) / statistics.median(ours)),
                "messages": round(len(rows) / statistics.median(ours_chat)),
            },
        },
    )


def check(pairs, chats, tokenizer, texts: list[str], talks: list[str]) -> None:
    """Stop unless the examples hold exactly the tokens that the tokenizer itself gives, and learn the right ones."""
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    whole = tokenizer(talks, add_special_tokens=False)["input_ids"]
    for place, (example, chat) in enumerate(zip(pairs.examples, chats.examples, strict=True)):
        prompt, completion = plain[2 * place], plain[2 * place + 1]
        right = example.tokens.tolist() == [*prompt, *completion, tokenizer.eos_token_id]
        right &= example.trained.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
        right &= chat.tokens.tolist() == whole[place][: len(chat)]
        right &= tokenizer.decode(chat.tokens[chat.trained]) == texts[2 * place + 1] + "<|im_end|>"
        if not right:
            raise SystemExit(f"row {place + 1} has other tokens than the tokenizer gives")


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


if __name__ == "__main__":
    main()
