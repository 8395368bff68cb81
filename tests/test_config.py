"""A configuration is checked whole, says what is wrong with it, and survives being written."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.config import describe_keys, known_keys, load_config
from manylora.config_errors import ELSEWHERE
from manylora.errors import ConfigError, SpecError, UnknownName
from manylora.settings import flag, number
from manylora.training.optim import OPTIMIZERS

SMALLEST = {"base": "builtin:tiny-en", "data": {"train": "/data/train.jsonl"}, "output": "/runs/first"}

text = st.text(max_size=12)
rate = st.floats(min_value=1e-12, max_value=10, allow_nan=False)
share = st.floats(min_value=0, max_value=0.999)
count = st.integers(min_value=1, max_value=10**9)
names = st.lists(st.text(min_size=1, max_size=8).map(lambda name: "re:" + name), max_size=3)
VALUES = st.fixed_dictionaries(
    {
        "base": st.just("builtin:tiny-en"),
        "output": st.text(min_size=1, max_size=20)
        .filter(lambda name: "\0" not in name and name.strip())
        .map(lambda n: "/r/" + n),
        "data": st.fixed_dictionaries(
            {"train": st.just(["/a.jsonl", "/b.csv"])},
            optional={
                "eval_fraction": st.floats(min_value=0.01, max_value=0.5),
                "columns": st.dictionaries(text, text, max_size=3),
                "overflow": st.sampled_from(["error", "split", "right", None]),
            },
        ),
    },
    optional={
        "dtype": st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
        "device": st.sampled_from(["auto", "cpu", "cuda:3", "mps"]),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "rank": count,
                "alpha": rate,
                "sites": names,
                "layers": st.lists(st.integers(0, 99), max_size=4) | st.none(),
                "rank_pattern": st.dictionaries(st.from_regex(r"[a-z_.]{1,9}", fullmatch=True), count, max_size=3),
                "dropout": share,
                "scale_rule": st.sampled_from(["alpha/rank", "alpha/sqrt(rank)"]),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": rate,
                "schedule": st.sampled_from(["linear", "cosine", "constant", "polynomial", "wsd"]),
                "epochs": rate,
                "steps": count | st.none(),
                "betas": st.tuples(share, share),
                "clip_norm": rate | st.none(),
            },
        ),
        "track": st.sampled_from([[], None, "tensorboard", ["tensorboard", "mlflow"]]),
    },
)


@settings(max_examples=examples(60), deadline=None)
@given(VALUES)
def test_a_written_configuration_loads_as_the_same_value(tmp_path_factory, values):
    config = load_config(values)
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(config.to_yaml()) == config.to_dict(), "another reader sees other values"


def test_what_is_written_is_complete_and_absolute(tmp_path):
    (tmp_path / "base").mkdir()
    path = write(
        tmp_path, "base: base\ndata: {train: a.jsonl, eval: [b.csv]}\noutput: runs/first\nadapter: {from: old}\n"
    )
    written = load_config(path).to_dict()
    assert written["base"] == str(tmp_path / "base")
    assert written["data"]["train"] == [str(tmp_path / "a.jsonl")]
    assert written["data"]["eval"] == [str(tmp_path / "b.csv")]
    assert written["output"] == str(tmp_path / "runs" / "first")
    assert written["adapter"]["from"] == str(tmp_path / "old")
    assert written["sweep"] is None
    path.write_text(path.read_text() + "sweep: {space: {adapter.rank: [1, 2]}, stop: {rule: asha, reduction: 4}}\n")
    written = load_config(path, {"adapter.from": None}).to_dict()
    for key in known_keys():
        if key.startswith(("train.optimizer.", "objective.")):
            continue  # a setting of something else that could be named there
        value = written
        for name in key.split("."):
            value = value[name]


def test_beside_an_adapter_that_is_continued_only_what_was_given_is_written(tmp_path):
    # The rest is that adapter's own; the defaults, written out, would read as asked for, and be refused beside it.
    path = write(tmp_path, "base: b\ndata: {train: a}\noutput: o\nadapter: {from: old}\n")
    written = load_config(path).to_dict()["adapter"]
    assert written == {"from": str(tmp_path / "old"), "dropout": 0.0}
    assert load_config(load_config(path).to_dict()) == load_config(path)
    written = load_config(path, {"adapter.rank": 16}).to_dict()["adapter"]
    assert written == {"from": str(tmp_path / "old"), "dropout": 0.0, "rank": 16}


def test_a_base_that_is_no_folder_keeps_its_name(tmp_path):
    for name in ("builtin:tiny-en", "owner/model"):
        assert load_config(write(tmp_path, f"base: {name}\ndata: {{train: a}}\noutput: o\n")).base == name


def test_paths_in_overrides_are_relative_to_the_current_directory(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write(tmp_path, "base: builtin:tiny-en\ndata: {train: a}\noutput: o\n")
    monkeypatch.chdir(elsewhere)
    config = load_config(path, ["output=p", "data.train=[x, y]"])
    assert config.output == elsewhere / "p"
    assert [place.path for place in config.data.train] == [str(elsewhere / "x"), str(elsewhere / "y")]


def test_a_run_folder_stands_for_its_configuration(tmp_path):
    write(tmp_path, load_config(SMALLEST).to_yaml())
    assert load_config(tmp_path) == load_config(SMALLEST)


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "0.001", "+1e-3", ".001", "1_0e-4", "'1e-3'"])
def test_numbers_mean_what_they_look_like(tmp_path, written):
    path = write(tmp_path, f"base: b\ndata: {{train: a}}\noutput: o\ntrain: {{learning_rate: {written}}}\n")
    assert load_config(path).train.learning_rate == pytest.approx(1e-3)
    assert load_config(SMALLEST, [f"train.learning_rate={written}"]).train.learning_rate == pytest.approx(1e-3)


def test_whole_numbers_may_be_written_as_floats_and_nothing_else_may():
    assert load_config(SMALLEST, ["train.steps=1e3"]).train.steps == 1000
    for value in (4.5, True, "four"):
        with pytest.raises(ConfigError, match=r"train\.steps"):
            load_config(SMALLEST, {"train.steps": value})


def test_words_that_yaml_1_1_reads_as_booleans_stay_words():
    config = load_config(SMALLEST, ["data.columns={prompt: no, completion: on}"])
    assert config.data.columns == {"prompt": "no", "completion": "on"}


def test_a_section_without_lines_has_its_defaults(tmp_path):
    path = write(tmp_path, "base: b\ndata: {train: a}\noutput: o\ntrain:\n  # steps: 3\n")
    assert load_config(path).train == load_config(SMALLEST).train


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.lerning_rate", 1, ["train.lerning_rate", "nearest: train.learning_rate"]),
        ("learning_rate", 1, ["'learning_rate'", "nearest: train.learning_rate"]),
        ("num_train_epochs", 3, ["nearest: train.epochs"]),
        ("adapter.lora_alpha", 3, ["'adapter.lora_alpha'", "nearest: adapter.alpha"]),
        ("learning-rate", 1, ["'learning-rate'", "train.learning_rate"]),
        ("quantise", "nf4", ["unknown key 'quantise'", "nearest: quantize", "--keys"]),
        ("quantize", "nf5", ["quantize", "nearest: nf4"]),
        ("base.folder", "x", ["'base.folder'", "nearest: base"]),
        ("dtype", "bfloat", ["dtype is 'bfloat'", "nearest: bfloat16", "float32"]),
        ("device", "gpu", ["device is 'gpu'", "cuda:1"]),
        ("adapter.method", "lroa", ["adapter.method", "'lroa'", "nearest: lora"]),
        ("adapter.init", "gausian", ["adapter.init", "nearest: gaussian"]),
        ("train.schedule", "cosin", ["train.schedule", "nearest: cosine"]),
        ("train.optimizer", "adam", ["train.optimizer", "adamw"]),
        ("task", "stf", ["task", "nearest: sft"]),
        ("track", "tensorbord", ["track", "nearest: tensorboard"]),
        ("data.format", "mesages", ["data.format", "nearest: messages"]),
        ("adapter.rank", 0, ["adapter.rank is 0", "at least 1"]),
        ("adapter.alpha", -1, ["adapter.alpha is -1", "above 0"]),
        ("adapter.dropout", 1, ["adapter.dropout is 1", "below 1"]),
        ("train.learning_rate", "quick", ["train.learning_rate is 'quick'", "a number"]),
        ("train.learning_rate", 0, ["train.learning_rate is 0", "above 0"]),
        ("train.learning_rate", 1e-320, ["train.learning_rate is 1e-320", "at least 1e-20"]),
        ("evaluate.temperature", 1e-40, ["evaluate.temperature is 1e-40", "at least 1e-20"]),
        ("output", "", ["output is ''", "the name of a folder"]),
        ("train.rate_ratio", 0, ["train.rate_ratio is 0", "above 0"]),
        ("train.rate_pattern", {"q_proj": -1}, ["train.rate_pattern.q_proj is -1", "at least 0"]),
        ("train.rate_pattern", {"q_(": 1}, ["train.rate_pattern is", "'q_(' is none"]),
        ("train.decay", "L2", ["train.decay is 'L2'", "nearest: l2"]),
        ("train.betas", [0.9], ["train.betas", "at least 2"]),
        ("train.accumulate", 9, ["train.accumulate is 9", "rows_per_step is 4"]),
        ("data.eval_fraction", 1.5, ["data.eval_fraction is 1.5", "below 1"]),
        ("data.train", [], ["data.train", "at least 1"]),
        ("data.columns", {"prompt": 3}, ["data.columns.prompt is 3", "text"]),
        ("adapter", 3, ["adapter is 3", "mapping"]),
        ("checkpoint.select", "best", ["checkpoint.select is 'best'", "eval_loss"]),
        ("checkpoint.early_stop_patience", 2, ["early_stop_patience", "held-out"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_allowed(key, value, words):
    with pytest.raises(ConfigError) as caught:
        load_config(SMALLEST, {key: value})
    for word in words:
        assert word in str(caught.value)


def test_errors_keep_the_class_that_says_what_they_are():
    with pytest.raises(UnknownName):
        load_config(SMALLEST, {"adapter.method": "lroa"})
    with pytest.raises(SpecError):
        load_config(SMALLEST, {"adapter.rank": 0})


def test_all_mistakes_are_pointed_at_and_unknown_keys_come_first():
    with pytest.raises(ConfigError) as caught:
        load_config({"base": "b", "outptu": "o", "data": {"train": "a"}})
    assert "unknown key 'outptu'" in str(caught.value)
    assert "nearest: output" in str(caught.value)
    assert "then look at output" in str(caught.value)


def test_an_optimizer_is_a_name_or_a_mapping_with_settings_of_its_own(own_settings):
    plain = load_config(SMALLEST, {"train.optimizer": "sgd"})
    assert plain == load_config(SMALLEST, {"train.optimizer": {"name": "sgd"}})
    assert plain.to_dict()["train"]["optimizer"] == "sgd"
    told = load_config(SMALLEST, {"train.optimizer": {"name": "own", "share": "1e-1"}})
    assert told.to_dict()["train"]["optimizer"] == {"name": "own", "share": 0.1, "ahead": False}
    assert (
        told
        == load_config(told.to_dict())
        == load_config(SMALLEST, ["train.optimizer=own", "train.optimizer.share=.1"])
    )
    assert told.train.optimizer.own() == own_settings(share=0.1)
    assert (
        load_config(SMALLEST, {"train.optimizer": {"name": "own", "ahead": False}}).to_dict()["train"]["optimizer"]
        == "own"
    )
    keys = {key: (default, text) for key, default, text in describe_keys()}
    assert keys["train.optimizer.share"] == ("null (own)", "own: a share")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"name": "own", "shara": 1},
            ["train.optimizer.shara is 1, and own has no such", "nearest: share", "share, ahead"],
        ),
        ({"name": "own", "part": 1}, ["train.optimizer.part is 1", "nearest: share"]),
        ({"name": "adamw", "share": 1}, ["adamw has no such setting", "adamw has no settings", "a setting of own"]),
        ({"share": 1}, ["train.optimizer.share is 1, and adamw has no such setting"]),
        ({"name": "own", "share": 1}, ["train.optimizer.share is 1\n", "at least 0 and below 1, or null"]),
        ({"name": "own", "share": True}, ["train.optimizer.share is True", "or null"]),
        ({"name": "own", "share": float("nan")}, ["train.optimizer.share is nan"]),
        ({"name": "own", "ahead": 1}, ["train.optimizer.ahead is 1", "true or false"]),
        ({"name": "own", "ahead": None}, ["train.optimizer.ahead is None", "true or false"]),
        ({"name": "owm"}, ["train.optimizer: no optimizer is called 'owm'", "nearest: own"]),
        ({"name": 3}, ["train.optimizer.name is 3", "text"]),
        (3, ["train.optimizer is 3"]),
    ],
)
def test_a_mistaken_setting_of_an_optimizer_names_what_it_takes(own_settings, given, words):
    with pytest.raises(ConfigError) as caught:
        load_config(SMALLEST, {"train.optimizer": given})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def own_settings(monkeypatch):
    """The settings of an optimiser `own` that is in the table beside the others."""

    @dataclass(frozen=True, slots=True)
    class Own:
        share: float | None = number(None, "a share", at_least=0, below=1, elsewhere=("part",))
        ahead: bool = flag(False, "look ahead")

    module = SimpleNamespace(RULE=SimpleNamespace(settings=Own))
    monkeypatch.setitem(sys.modules, "made_up_optimizer", module)
    monkeypatch.setitem(OPTIMIZERS._entries, "own", "made_up_optimizer:RULE")
    return Own


@pytest.mark.parametrize("missing", ["base", "data", "output"])
def test_what_has_no_default_must_be_given(missing):
    with pytest.raises(ConfigError, match=f"'{missing}' is not given"):
        load_config({key: value for key, value in SMALLEST.items() if key != missing})


def test_two_kinds_of_held_out_rows_contradict_each_other():
    with pytest.raises(ConfigError, match="both given"):
        load_config(SMALLEST, {"data.eval": "e.jsonl", "data.eval_fraction": 0.1})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("- base\n", "is a list"),
        ("base: [a\noutput: b\n", "line 2, column"),
        ("base: a\nbase: b\n", "the key 'base' is given twice"),
        ("base: !!python/object:os.system x\n", "line 1"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_its_place(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_configuration_errors(tmp_path):
    with pytest.raises(ConfigError, match="no configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[1"])
def test_an_override_that_cannot_be_read_is_refused(override):
    with pytest.raises(ConfigError, match=r"override|--set"):
        load_config(SMALLEST, [override])


def test_a_configuration_does_not_change():
    config = load_config(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        config.base = "other"


def test_the_names_of_other_tools_point_at_keys_that_exist():
    assert set(ELSEWHERE.values()) <= set(known_keys())
    assert not set(ELSEWHERE) & {key for key in known_keys() if "." not in key}


def test_every_key_says_what_it_is():
    assert all(description and default for _, default, description in describe_keys())


def test_the_spec_holds_what_the_configuration_asks_for():
    overrides = [
        "adapter.sites=q_proj,v_proj",
        "adapter.rank=3",
        "adapter.rank_pattern={v_proj: 5}",
        "adapter.layers=1",
    ]
    spec = load_config(SMALLEST, overrides).adapter.spec()
    assert spec.sites == ("q_proj", "v_proj")
    assert spec.rank_at("layers.0.v_proj") == 5
    assert spec.layers == (1,)


def write(folder: Path, content: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def test_a_place_of_data_is_a_path_or_says_more():
    given = {"train": ["a.jsonl", {"path": "hub:owner/name", "split": "train[:10%]", "weight": 2}], "eval": "b.csv"}
    config = load_config(SMALLEST | {"data": given})
    first, second = config.data.train
    assert (first.path, first.weight) == (str(Path.cwd() / "a.jsonl"), 1.0)
    assert (second.path, second.split, second.subset, second.weight) == ("hub:owner/name", "train[:10%]", None, 2.0)
    assert config.to_dict()["data"]["eval"] == [str(Path.cwd() / "b.csv")]
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"pth": "a"}, ["unknown key 'data.train.0.pth'", "nearest: data.train.0.path"]),
        ({"path": "a", "weight": 0}, ["data.train.0.weight is 0", "above 0"]),
        ({"weight": 1}, ["'data.train.0.path' is not given"]),
        (3, ["data.train.0 is 3"]),
    ],
)
def test_a_place_that_is_mistaken_is_refused_with_its_key(place, says):
    with pytest.raises(ConfigError) as caught:
        load_config(SMALLEST | {"data": {"train": [place]}})
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_a_section_in_short_takes_further_keys(tmp_path):
    path = write(
        tmp_path, "base: b\ndata: {train: a}\noutput: o\nsweep: {space: {adapter.rank: [1, 2]}, stop: median}\n"
    )
    stop = load_config(path, ["sweep.stop.first_share=0.5"]).sweep.stop
    assert (stop.rule, stop.first_share) == ("median", 0.5)
    stop = load_config(path, ["sweep.stop=asha", "sweep.stop.reduction=4"]).sweep.stop
    assert (stop.rule, stop.reduction) == ("asha", 4)
    with pytest.raises(ConfigError, match=r"unknown key 'base\.folder'"):
        load_config(path, ["base.folder=x"])


@pytest.mark.parametrize(("typed", "meant"), [("bf16", "bfloat16"), ("fp16", "float16"), ("torch.float32", "float32")])
def test_a_dtype_is_understood_as_people_type_it(typed: str, meant: str) -> None:
    config = load_config({"base": "b", "data": {"train": "x"}, "output": "y", "dtype": typed})
    assert config.dtype == meant
