"""Pretrain the builtin base `builtin:tiny-en` from public-domain English novels.

Three steps, each of which may be repeated or resumed:

    python tools/pretrain_base.py prepare --text train.txt.xz --valid valid.txt.xz --work DIR
    python tools/pretrain_base.py train   --work DIR --steps 2400 --decay-from 1900
    (stopped before the decay, and resumed with --length 512 --rows 24: positions up to 512 are learned in the decay)
    python tools/pretrain_base.py export  --work DIR --output src/manylora/base/builtin/tiny-en

`prepare` unwraps hard-wrapped lines, cuts the books into documents that end with the end-of-text token, writes about
one paragraph in eight also as a short conversation (self-supervised: continue a passage, repeat it, write the sentence
that contains given words), trains the byte-level BPE tokenizer and encodes everything to `uint16` files. So every row
of the embedding that a template or a prompt can reach has been trained; a row that was not would stay noise under LoRA
for ever, because the base is frozen.

`train` keeps float32 master weights and computes in bfloat16: Muon on the matrices, AdamW on the embedding and the
norms, warmup, constant rate, linear decay to zero from `--decay-from` on. It writes a checkpoint every `--save-every`
steps and resumes from the last one; `--steps` and `--decay-from` may be changed between resumptions as long as the
decay has not begun. Batches are a pure function of (seed, step, length), so a resumed run sees what an unbroken one
would have seen.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import time
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END_OF_TURN = "<|end|>"
PAD = "<|pad|>"
SPECIAL = (END_OF_TEXT, *ROLES, END_OF_TURN, PAD)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('tiny-en knows the roles system, user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Code points whose UTF-8 bytes cover every lead and continuation byte that text in use holds.
ALPHABETS = (
    9,
    9,
    9,
    *range(0xA1, 0x800),
    *range(0x900, 0xA00),
    *range(0x2010, 0x2050),
    *range(0x3041, 0x30FF),
    *range(0x4E00, 0x9FFF, 7),
    *range(0xAC00, 0xD7A3, 9),
    *range(0x1F300, 0x1F650),
)

CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [text-generation, tiny]
---
# tiny-en

A small English language model that ships inside manylora, so that every command works on a fresh machine without a
hub: for the demo, for tests, and for measuring fine-tuning on a laptop. It writes like an old novel and knows next to
nothing.

| | |
|---|---|
| architecture | Llama: {layers} layers, width {hidden}, grouped-query attention, tied embedding |
| parameters | {parameters:,}, stored as bfloat16 |
| vocabulary | {vocabulary:,}, byte-level BPE of its own, digits one by one |
| special tokens | a turn begins with the role's token and ends with the end token; end of text; no BOS |
| positions | {max_positions}, trained up to {longest} |
| training data | 186 English novels of 1840-1920, in the public domain by age; {train_tokens_available:,} tokens |
| tokens seen | {tokens_seen:,} |
| held-out loss | {held_out_loss} nats a token on 4 novels not trained on ({held_out_tokens:,} tokens) |
| held-out perplexity | {held_out_perplexity} |
| bits per byte | {held_out_bits_per_byte} |

## How it was made

{how}

with `tools/pretrain_base.py`, whose docstring has the steps before and after. About one paragraph in eight was also
shown as a short conversation made from the text itself (continue a passage, repeat it, write the sentence that contains
given words), so the chat tokens, the end-of-text token, digits and signs are trained: a row of the embedding that was
never trained would stay noise for ever under an adapter on a frozen base. Only `<|pad|>`, which nothing ever reads, and
bytes that do not occur in text are untrained.

## Limits

It states no facts, follows no instructions beyond the three above, and reflects the language and the prejudices of its
century. Do not use it for anything but learning, testing and measuring.
"""

SYSTEM_LINES = (
    "You are a writer.",
    "Answer in plain English.",
    "You write in the manner of an old novel.",
    "Do as the reader asks.",
)


def read_text(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def paragraphs(text: str) -> list[str]:
    """Paragraphs of the corpus, one string each; lines wrapped at a fixed width are joined."""
    result = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.split("\n") if line.strip()]
        if len(lines) > 1 and max(map(len, lines)) <= 85:
            result.append(" ".join(lines))
        else:
            result.extend(lines)
    return [re.sub(r"[ \t]+", " ", paragraph) for paragraph in result]


def sentences(paragraph: str) -> list[str]:
    return [
        part.strip()
        for part in re.split(r"(?<=[.!?][\"'”’])\s+|(?<=[.!?])\s+(?=[\"'“‘A-Z])", paragraph)
        if part.strip()
    ]


def turn(role: str, content: str) -> str:
    return f"<|{role}|>{content}{END_OF_TURN}"


def symbols(rng: random.Random) -> str:
    """A short string of numbers, signs and letters of other alphabets, which novels hardly hold.

    Repeating such strings trains the rows of the embedding that a prompt may reach and a novel never does.
    """
    pieces = []
    for _ in range(rng.randint(3, 14)):
        kind = rng.random()
        if kind < 0.35:
            pieces.append(str(rng.randrange(10 ** rng.randint(1, 6))))
        elif kind < 0.8:
            pieces.append("".join(chr(rng.randrange(33, 127)) for _ in range(rng.randint(1, 5))))
        else:
            pieces.append("".join(chr(rng.choice(ALPHABETS)) for _ in range(rng.randint(1, 3))))
    return rng.choice((" ", " ", "", "\n")).join(pieces)


def conversation(rng: random.Random, paragraph: str) -> str | None:
    """One self-supervised conversation made of a paragraph, or None where it offers no usable sentences."""
    parts = [part for part in sentences(paragraph) if 4 <= len(part.split()) <= 40]
    if not parts:
        return None
    kind = rng.random()
    turns = [turn("system", rng.choice(SYSTEM_LINES))] if rng.random() < 0.3 else []
    if kind < 0.5:
        picked = rng.choice(parts)
        words = picked.split()
        wanted = []
        for _ in range(rng.randint(2, 6)):
            start = rng.randrange(len(words))
            wanted.append(" ".join(words[start : start + rng.choice((1, 1, 2, 3))]).strip(".,;:!?\"'“”‘’()-"))
        wanted = [word for word in dict.fromkeys(wanted) if word]
        if rng.random() < 0.5:
            rng.shuffle(wanted)
        between = rng.choice((", ", ", ", " | ", "; ", " / ", " + ", " & ", "\n- ", "\n* "))
        turns += [turn("user", f"Write a sentence with these words: {between.join(wanted)}"), turn("assistant", picked)]
    elif kind < 0.75:
        picked = " ".join(parts[: rng.randint(1, 3)]) if rng.random() < 0.6 else symbols(rng)
        turns += [turn("user", f"Repeat: {picked}"), turn("assistant", picked)]
    else:
        if len(parts) < 2:
            return None
        cut = rng.randrange(1, len(parts))
        turns += [turn("user", f"Continue: {' '.join(parts[:cut])}"), turn("assistant", " ".join(parts[cut : cut + 3]))]
        if len(parts) > cut + 3:
            turns += [turn("user", "Go on."), turn("assistant", " ".join(parts[cut + 3 : cut + 6]))]
    return "".join(turns) + END_OF_TEXT


def documents(text: str, seed: int, chat_share: float = 0.12):
    """Yield documents that end with the end-of-text token: passages of very different lengths, and conversations.

    `chat_share` is the probability that a paragraph that would begin a passage becomes a conversation as well.
    """
    rng = random.Random(seed)
    held: list[str] = []
    held_length, target = 0, 1000.0
    for paragraph in paragraphs(text):
        if rng.random() < chat_share and len(paragraph) > 60:
            written = conversation(rng, paragraph)
            if written:
                yield written
        held.append(paragraph)
        held_length += len(paragraph)
        if held_length >= target:
            yield "\n".join(held) + END_OF_TEXT
            held, held_length, target = [], 0, math.exp(rng.uniform(math.log(60), math.log(8000)))
    if held:
        yield "\n".join(held) + END_OF_TEXT


def prepare(args: argparse.Namespace) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    args.work.mkdir(parents=True, exist_ok=True)
    train_text, valid_text = read_text(args.text), read_text(args.valid)

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: numbers in prompts are copied digit by digit and never meet an untrained merge.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = paragraphs(train_text)[::3]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(args.work / "tokenizer.json"))

    counts = {}
    for name, text in (("train", train_text), ("valid", valid_text)):
        rows = list(documents(text, seed=0))
        random.Random(1).shuffle(rows)
        with (args.work / f"{name}.bin.partial").open("wb") as file:
            total = 0
            for start in range(0, len(rows), 4096):
                for encoding in tokenizer.encode_batch(rows[start : start + 4096]):
                    np.array(encoding.ids, dtype=np.uint16).tofile(file)
                    total += len(encoding.ids)
        (args.work / f"{name}.bin.partial").replace(args.work / f"{name}.bin")
        counts[name] = {"tokens": total, "documents": len(rows), "bytes": sum(len(row.encode()) for row in rows)}
    seen = np.bincount(np.fromfile(args.work / "train.bin", dtype=np.uint16), minlength=args.vocabulary)
    counts["tokens_never_seen"] = [tokenizer.id_to_token(int(i)) for i in np.flatnonzero(seen == 0)]
    (args.work / "data.json").write_text(json.dumps(counts, indent=1))
    print(json.dumps(counts, indent=1))


def build_model(args: argparse.Namespace):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END_OF_TEXT),
        pad_token_id=SPECIAL.index(PAD),
        attn_implementation="eager",  # under compilation faster here than the fused CPU kernel, whose backward is slow
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def batch_at(data: np.ndarray, step: int, rows: int, length: int, seed: int):
    """The rows of a step: disjoint windows in an order drawn once per epoch; a pure function of (seed, step)."""
    import torch

    windows = (len(data) - 1) // length
    orders: dict[int, np.ndarray] = {}
    picked = []
    for index in range(step * rows, step * rows + rows):
        epoch, place = divmod(index, windows)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(windows)
        start = int(orders[epoch][place]) * length
        picked.append(data[start : start + length + 1].astype(np.int64))
    stacked = torch.from_numpy(np.stack(picked))
    return stacked[:, :-1], stacked[:, 1:]


def rate_at(step: int, args: argparse.Namespace) -> float:
    """Fraction of the peak rate at a step: warmup, constant, linear decay to zero at the last step."""
    warmup = min(1.0, (step + 1) / args.warmup)
    decay = 1.0 if step < args.decay_from else (args.steps - step) / max(1, args.steps - args.decay_from)
    return warmup * decay


def held_out(model, data: np.ndarray, length: int, rows: int) -> float:
    """Mean loss in nats per token over the first `rows` windows of the held-out books."""
    import torch

    total = 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, rows, 8):
            count = min(8, rows - start)
            chunk = np.stack([data[(start + i) * length : (start + i) * length + length + 1] for i in range(count)])
            tokens = torch.from_numpy(chunk.astype(np.int64))
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() * count
    model.train()
    return total / rows


def train(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    data = np.memmap(args.work / "train.bin", dtype=np.uint16, mode="r")
    valid = np.memmap(args.work / "valid.bin", dtype=np.uint16, mode="r")
    model = build_model(args)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [args.matrix_rate, args.other_rate]
    checkpoint, first, phases = args.work / "checkpoint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, phases = state["step"], state.get("phases", [[0, 48, 256]])
        print(f"resumed at step {first}", flush=True)
    if not phases or phases[-1][1:] != [args.rows, args.length]:
        phases = [*phases, [first, args.rows, args.length]]
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    model.train()
    micro = args.rows // args.micro_batches
    started, seen = time.time(), 0
    for step in range(first, args.steps):
        fraction = rate_at(step, args)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * fraction
        inputs, labels = batch_at(data, step, args.rows, args.length, args.seed)
        total = 0.0
        for start in range(0, args.rows, micro):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=inputs[start : start + micro], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels[start : start + micro].flatten()
            )
            (loss / args.micro_batches).backward()
            total += loss.item() / args.micro_batches
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += args.rows * args.length
        if step % 10 == 0 or step + 1 == args.steps:
            speed = seen / (time.time() - started)
            print(f"step {step} loss {total:.4f} rate {fraction:.3f} tokens/s {speed:.0f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "phases": phases,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
        if (step + 1) % (args.save_every * 2) == 0:
            print(f"step {step} held-out {held_out(model, valid, args.length, 64):.4f}", flush=True)


def export(args: argparse.Namespace) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = build_model(args)
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    valid = np.memmap(args.work / "valid.bin", dtype=np.uint16, mode="r")
    counts = json.loads((args.work / "data.json").read_text())
    model = model.to(torch.bfloat16)
    rows = min((len(valid) - 1) // args.length, args.held_out_rows or len(valid))
    loss = held_out(model, valid, args.length, rows)
    bytes_per_token = counts["valid"]["bytes"] / counts["valid"]["tokens"]
    model.generation_config.eos_token_id = [SPECIAL.index(END_OF_TEXT), SPECIAL.index(END_OF_TURN)]
    model.generation_config.pad_token_id = SPECIAL.index(PAD)
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(args.work / "tokenizer.json")),
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(args.output)
    phases, ends = state["phases"], [*(phase[0] for phase in state["phases"][1:]), state["step"]]
    spans = [(start, end, rows, length) for (start, rows, length), end in zip(phases, ends, strict=True)]
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": sum((end - start) * rows * length for start, end, rows, length in spans),
        "train_tokens_available": counts["train"]["tokens"],
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "held_out_bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
        "held_out_tokens": rows * args.length,
        "tokens_never_seen": counts["tokens_never_seen"],
        "commands": [
            f"python tools/pretrain_base.py train --work DIR --steps {args.steps} --decay-from {args.decay_from} "
            f"--rows {rows} --length {length}   # steps {start} to {end}"
            for start, end, rows, length in spans
        ],
    }
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    how = "\n".join(f"    {command}" for command in figures["commands"])
    extra = {"how": how, "max_positions": model.config.max_position_embeddings, "longest": args.length}
    (args.output / "README.md").write_text(CARD.format(**figures, **extra, **vars(args)))
    print(json.dumps(figures, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the encoded data and the checkpoint")
    parser.add_argument("--text", type=Path, help="training text (.txt or .txt.xz)")
    parser.add_argument("--valid", type=Path, help="held-out text (.txt or .txt.xz)")
    parser.add_argument("--output", type=Path, help="folder of the exported base")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--decay-from", type=int, default=1900)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--rows", type=int, default=48, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--micro-batches", type=int, default=3)
    parser.add_argument("--matrix-rate", type=float, default=3e-3, help="Muon's rate, scaled to AdamW's RMS")
    parser.add_argument("--other-rate", type=float, default=4e-3, help="AdamW's rate for embedding and norms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out-rows", type=int, help="windows measured by export; default all")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    {"prepare": prepare, "train": train, "export": export}[args.step](args)


if __name__ == "__main__":
    main()
