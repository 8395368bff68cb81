"""Bad input gets one clear block and exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


def set_to(config: Path, **values) -> Path:
    """The configuration with top-level keys replaced."""
    found = json.loads(config.read_text())
    for key, value in values.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    config.write_text(json.dumps(found))
    return config


def nothing_was_written(config: Path) -> bool:
    return not (config.parent / "run").exists()


def test_a_missing_data_file_is_named(manylora, config):
    done = manylora("train", config, "--set", f"data.train={config.parent / 'trian.jsonl'}")
    done.refused("DataNotFound", "trian.jsonl", "train.jsonl")
    assert nothing_was_written(config)


def test_an_empty_data_file_is_named(manylora, config):
    (config.parent / "train.jsonl").write_text("")
    manylora("train", config).refused("DataError", "train.jsonl", "no rows")
    assert nothing_was_written(config)


def test_a_broken_json_line_is_named_with_file_line_and_column(manylora, config):
    path = config.parent / "train.jsonl"
    path.write_text(path.read_text().splitlines()[0] + '\n{"prompt": "a", "completion" "b"}\n')
    manylora("train", config).refused("DataError", "train.jsonl:2:")
    assert nothing_was_written(config)


def test_an_unknown_column_is_named_with_those_that_exist(manylora, config):
    done = manylora("train", config, "--set", "data.columns={prompt: promt}")
    done.refused("DataError", "promt", "prompt")
    assert nothing_was_written(config)


def test_an_unknown_key_is_named_with_the_nearest(manylora, config):
    done = manylora("train", config, "--set", "train.lerning_rate=1e-3")
    done.refused("ConfigError", "train.lerning_rate", "nearest: train.learning_rate")
    assert nothing_was_written(config)


def test_an_unknown_base_is_named_with_the_nearest(manylora, config):
    manylora("train", config, "--set", "base=builtin:tiny-em").refused("BaseNotFound", "builtin:tiny-en")
    manylora("train", config, "--set", "base=nobody/no-such-model").refused("BaseNotFound", "nobody/no-such-model")
    assert nothing_was_written(config)


def copy_of(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder / "copy"))


def test_a_folder_without_weights_is_refused(manylora, config, tiny_base_folder, tmp_path):
    base = copy_of(tiny_base_folder, tmp_path)
    (base / "model.safetensors").unlink()
    manylora("train", set_to(config, base=str(base))).refused("BaseBroken", str(base))
    assert nothing_was_written(config)


def test_a_truncated_weight_file_is_refused(manylora, config, tiny_base_folder, tmp_path):
    base = copy_of(tiny_base_folder, tmp_path)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    manylora("train", set_to(config, base=str(base))).refused("BaseBroken", "model.safetensors")
    assert nothing_was_written(config)


def test_a_pattern_that_matches_no_site_is_refused_with_near_names(manylora, config):
    done = manylora("train", config, "--set", "adapter.sites=q_porj")
    done.refused("SiteNotFound", "'q_porj'", "nearest: q_proj", "inspect")
    assert nothing_was_written(config)


@pytest.mark.parametrize(("rank", "words"), [(0, "adapter.rank is 0"), (10_000, "allowed: 1 to")])
def test_a_rank_that_no_site_allows_is_refused(manylora, config, rank, words):
    manylora("train", config, "--set", f"adapter.rank={rank}").refused("SpecError", words)
    assert nothing_was_written(config)


def test_an_occupied_output_folder_stays_as_it_is(manylora, trained):
    before = (trained / "summary.json").read_bytes()
    done = manylora("train", trained.parent / "config.yaml")
    done.refused("OutputExists", "--resume", "output=")
    assert (trained / "summary.json").read_bytes() == before


def test_a_row_longer_than_the_limit_is_named(manylora, config):
    manylora("train", config, "--set", "train.row_tokens=8").refused("train.jsonl:1", "row_tokens")


def test_a_configuration_that_is_missing_is_named(manylora, tmp_path):
    manylora("train", tmp_path / "none.yaml").refused("ConfigError", "none.yaml")


def test_a_truncated_adapter_is_refused(manylora, trained, tmp_path):
    (adapter,) = (trained / "adapters").iterdir()
    copy = copy_of(adapter, tmp_path)
    tensors = copy / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    manylora("generate", "--adapter", copy, "--prompt", "x").refused("AdapterBroken")


def test_an_adapter_of_another_base_is_refused(manylora, trained, tiny_base_folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    other = copy_of(tiny_base_folder, tmp_path)
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + torch.ones(()) for name, tensor in tensors.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    manylora("generate", "--base", other, "--adapter", trained, "--prompt", "x").refused("BaseMismatch", "receipt.json")


def test_verbs_without_what_they_need_say_what_to_give(manylora, tiny_base_folder, tmp_path):
    manylora("generate", "--base", tiny_base_folder).refused("--prompt")
    manylora("generate", "--prompt", "x").refused("--base")
    manylora("evaluate", tiny_base_folder).refused("--data")
    manylora("train").refused("CONFIG.yaml")
    manylora("generate", "--adapter", tmp_path, "--prompt", "x").refused("AdapterBroken", str(tmp_path))
    (tmp_path / "file.bin").write_text("x")
    manylora("inspect", tmp_path / "file.bin").refused("is a file")
