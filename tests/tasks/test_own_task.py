"""A task of one's own, from YAML to a loaded adapter; and members whose heads have other widths over one base."""

from __future__ import annotations

import json
import random
from pathlib import Path

import peft
import pytest
import torch
import transformers
from fleets import Memory
from measure_task import MEASURE, predicted
from safetensors.torch import load_file, save_file

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.headless import load_headless
from manylora.config import load_config
from manylora.errors import BaseBroken, ConfigError, DataError, RouteError, SpecError, UnknownName
from manylora.spec import AdapterSpec
from manylora.training.loop import Loop
from manylora.training.orders import Given
from manylora.training.prepare import Stock

AUTO = "AutoModelForSequenceClassification"
HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
}


def encoder(kind: str, folder):
    """A small encoder without a head, in a folder."""
    torch.manual_seed(0)
    small = {"vocab_size": 4096, "max_position_embeddings": 80, "pad_token_id": 0, "initializer_range": 0.2}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind == "distilbert":
        config = transformers.DistilBertConfig(**small, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
        model = transformers.DistilBertModel(config)
    elif kind == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**small, **usual), add_pooling_layer=False)
    else:
        model = transformers.BertModel(transformers.BertConfig(**small, **usual))
    model.save_pretrained(folder)
    builtin = manylora.load_base("builtin:tiny-en")
    builtin.tokenizer.save_pretrained(folder)
    return folder


def rows(path, count: int, names: tuple[str, ...], seed: int = 0):
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        many, few = draw.randint(0, 6), draw.randint(0, 3)
        words = ["good"] * many + ["bad"] * few
        draw.shuffle(words)
        told = {"good": many / 3 - 1, "bad": few / 2 - 1, "both": (many + few) / 4 - 1}
        lines.append({"text": " ".join(words) or "nothing", **{name: told[name] for name in names}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


YAML = """
base: {base}
dtype: float32
task: measure_task:MEASURE
data: {{train: {train}, eval: {held}}}
adapter: {{rank: 8}}
train: {{steps: {steps}, row_tokens: 40, rows_per_step: 16, learning_rate: 1e-2}}
evaluate: {{samples: 3, every_steps: 100}}
track: []
output: {output}
"""


def written(tmp_path, kind: str = "bert", names=("good", "bad"), steps: int = 300, name: str = "run") -> str:
    base = tmp_path / kind
    if not base.exists():
        encoder(kind, base)
    path = tmp_path / f"{name}.yaml"
    train, held = rows(tmp_path / f"{name}.jsonl", 600, names), rows(tmp_path / f"{name}-held.jsonl", 40, names, seed=1)
    path.write_text(YAML.format(base=base, train=train, held=held, steps=steps, output=tmp_path / name))
    return str(path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_from_yaml_to_a_loaded_adapter(tmp_path) -> None:
    config = load_config(written(tmp_path))
    result = manylora.train(config)
    assert result.summary["eval"]["r2"] > 0.8
    assert result.summary["eval"]["missed"] < 0.3
    assert "perplexity" not in result.summary["eval"]
    assert result.summary["base_eval"] == {}, "a base without a head answers nothing"
    assert result.summary["footnotes"] == {"r2": "of all numbers together"}
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == 3
    assert set(shown[0]) == {"text", "numbers", "adapter", "member"}

    folder = tmp_path / "run" / "adapters" / "main"
    adapter = Adapter.load(folder)
    assert adapter.record == {"name": "measure_task:MEASURE", "unit": "as in the file"}
    base = MEASURE.open(config, {})
    examples = MEASURE.read(config, base, MEASURE.find(config, {}), {}, use_cache=False).held_out
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        given = predicted(base, examples, slot=0, width=40)
        with pytest.raises(RouteError, match=r"the base has no 'classifier'.*belongs to no adapter"):
            predicted(base, examples, slot=-1, width=40)
    assert [row["adapter"] for row in shown] == [pytest.approx(row.tolist(), abs=1e-5) for row in given[:3]]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    opened = peft.PeftModel.from_pretrained(model, folder).eval()
    tokens = base.tokenizer([one.text for one in examples[:4]], return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = opened(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
    torch.testing.assert_close(theirs, given[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_drawn_from_the_members_seed_and_no_part_of_the_fingerprint(kind: str, tmp_path) -> None:
    folder = encoder(kind, tmp_path / kind)
    torch.manual_seed(1)
    base = load_headless(str(folder), auto=AUTO, dtype="float32")
    torch.manual_seed(2)  # what transformers draws for the missing tensors is another thing
    again = load_headless(str(folder), auto=AUTO, dtype="float32")
    assert base.fingerprint == again.fingerprint
    assert {site.name for site in base.lacking} >= HEADS[kind]
    one, same, other = (
        Adapter.new(on, AdapterSpec(rank=2, outputs=5), seed=seed) for on, seed in ((base, 3), (again, 3), (base, 4))
    )
    for name in HEADS[kind]:
        for key, value in one.factors[name].tensors.items():
            assert torch.equal(value, same.factors[name].tensors[key])
        assert not torch.equal(one.factors[name].tensors["weight"], other.factors[name].tensors["weight"])
    widest = max(one.factors[name].tensors["weight"].shape[0] for name in HEADS[kind])
    assert 5 in {one.factors[name].tensors["weight"].shape[0] for name in HEADS[kind]}, widest


def test_members_with_heads_of_other_widths_train_as_they_would_alone(tmp_path) -> None:
    texts = {
        "two": load_config(written(tmp_path, names=("good", "bad"), steps=6, name="two")),
        "three": load_config(
            written(tmp_path, names=("good", "bad", "both"), steps=6, name="three"), {"train.seed": 1}
        ),
    }

    def trained(names) -> dict[str, dict[str, torch.Tensor]]:
        stock = Stock(texts[names[0]], use_cache=False)
        ended: dict[str, dict[str, torch.Tensor]] = {}

        def keep(member, adapter) -> None:
            ended[member.name] = {
                f"{site} {key}": value for site, own in adapter.factors.items() for key, value in own.tensors.items()
            }

        with Bank(stock.base, num_slots=len(names)) as bank:
            make = {name: stock.member(texts[name], name) for name in names}
            Loop(bank, range(len(names)), Given(list(names)), lambda name, shape: make[name], Memory(), hand=keep).run()
        return ended

    together = trained(("two", "three"))
    assert together["two"]["classifier weight"].shape[0] == 2
    assert together["three"]["classifier weight"].shape[0] == 3
    for name in texts:
        for key, value in trained((name,))[name].items():
            torch.testing.assert_close(together[name][key], value, rtol=1e-4, atol=1e-5)


def test_a_head_whose_width_nobody_says_is_refused(tmp_path) -> None:
    base = load_headless(str(encoder("bert", tmp_path / "bert")), auto=AUTO, dtype="float32")
    with pytest.raises(SpecError, match="not said how many outputs"):
        Adapter.new(base, AdapterSpec(rank=2))


def test_a_checkpoint_that_lacks_more_than_a_head_is_broken(tmp_path) -> None:
    folder = encoder("bert", tmp_path / "bert")
    held = {key: value for key, value in load_file(folder / "model.safetensors").items() if "LayerNorm" in key}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseBroken, match="more than a head"):
        load_headless(str(folder), auto=AUTO, dtype="float32")


@pytest.mark.parametrize(
    ("name", "says"),
    [("measure_tosk:MEASURE", "no module 'measure_tosk'"), ("measure_task:MESURE", "has no 'MESURE'")],
)
def test_a_mistyped_task_of_ones_own_is_named(name: str, says: str, tmp_path) -> None:
    with pytest.raises((UnknownName, ConfigError), match=says):
        load_config(written(tmp_path), {"task": name})


def test_an_example_of_no_tokens_is_refused_before_anything_is_written(tmp_path) -> None:
    config = load_config(written(tmp_path, names=("good", "bad"), steps=2, name="empty"))
    path = Path(config.data.train[0].path)
    path.write_text(path.read_text() + json.dumps({"text": "", "good": 0, "bad": 0}) + "\n")
    with pytest.raises(DataError, match="an example of no tokens, number"):
        manylora.train(config)
    assert not config.output.exists()
