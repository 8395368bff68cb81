"""What a mistaken configuration is told: the key in full, the value seen, what is allowed, the nearest name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from manylora.errors import ConfigError, nearest_names

# What other tools call our keys. They are not accepted: a file that means something else must not seem to work.
ELSEWHERE = {
    "base_model": "base",
    "model": "base",
    "model_id": "base",
    "model_name": "base",
    "model_name_or_path": "base",
    "torch_dtype": "dtype",
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "bnb_4bit_quant_type": "quantize",
    "quantization": "quantize",
    "bf16": "dtype",
    "fp16": "dtype",
    "precision": "dtype",
    "output_dir": "output",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "dataset_path": "data.train",
    "eval_file": "data.eval",
    "validation_file": "data.eval",
    "val_set_size": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "dataset_format": "data.format",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.sites",
    "lora_target": "adapter.sites",
    "lora_target_modules": "adapter.sites",
    "lora_target_linear": "adapter.sites",
    "modules_to_save": "adapter.full_sites",
    "lora_modules_to_save": "adapter.full_sites",
    "exclude_modules": "adapter.exclude",
    "layers_to_transform": "adapter.layers",
    "use_rslora": "adapter.scale_rule",
    "use_dora": "adapter.method",
    "peft_type": "adapter.method",
    "init_lora_weights": "adapter.init",
    "adapter_name_or_path": "adapter.from",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_length": "train.row_tokens",
    "max_seq_len": "train.row_tokens",
    "max_seq_length": "train.row_tokens",
    "sequence_len": "train.row_tokens",
    "cutoff_len": "train.row_tokens",
    "block_size": "train.row_tokens",
    "batch_size": "train.rows_per_step",
    "micro_batch_size": "train.rows_per_step",
    "train_batch_size": "train.rows_per_step",
    "per_device_train_batch_size": "train.rows_per_step",
    "gradient_accumulation_steps": "train.accumulate",
    "optim": "train.optimizer",
    "optimizer_name": "train.optimizer",
    "optimizer_type": "train.optimizer",
    "optim_args": "train.optimizer",
    "sgd_momentum": "train.optimizer.momentum",
    "use_nesterov": "train.optimizer.nesterov",
    "rms_alpha": "train.optimizer.smoothing",
    "lr_decay": "train.optimizer.rate_decay",
    "initial_accumulator_value": "train.optimizer.initial_accumulator",
    "decoupled_weight_decay": "train.decay",
    "weight_decouple": "train.decay",
    "loraplus_lr_ratio": "train.rate_ratio",
    "loraplus_ratio": "train.rate_ratio",
    "lr_ratio": "train.rate_ratio",
    "lr_groups": "train.rate_pattern",
    "param_groups": "train.rate_pattern",
    "max_grad_norm": "train.clip_norm",
    "gradient_clipping": "train.clip_norm",
    "adam_epsilon": "train.epsilon",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "random_seed": "train.seed",
    "eval_steps": "evaluate.every_steps",
    "max_eval_samples": "evaluate.max_examples",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "metric_for_best_model": "checkpoint.select",
    "early_stopping_patience": "checkpoint.early_stop_patience",
    "report_to": "track",
}

# How a limit that pydantic reports reads in a message.
_LIMITS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "at most {}"),
    "too_short": ("min_length", "at least {} entries"),
    "too_long": ("max_length", "at most {} entries"),
    "string_too_short": ("min_length", "at least {} characters"),
}

# What a value of the wrong type should have been.
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "path": "a path",
    "tuple": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}


def unknown_key(path: str, value: Any, known: Sequence[str]) -> ConfigError:
    """The error for a key that does not exist, with the keys that were probably meant."""
    leaf = path.rpartition(".")[2]
    near = [ELSEWHERE[leaf]] if leaf in ELSEWHERE else [key for key in known if key.rpartition(".")[2] == leaf]
    if not near:
        by_leaf = {key.rpartition(".")[2]: key for key in known}
        above = path.rpartition(".")[0]
        near = [above] if above in known else []
        near += nearest_names(path, known) + [by_leaf[name] for name in nearest_names(leaf, by_leaf)]
    return ConfigError(
        f"unknown key {path!r} (its value is {_shown(value)})",
        nearest=list(dict.fromkeys(near))[:3],
        next_step="list them: manylora train --keys",
    )


def unknown_setting(
    path: str, value: Any, optimizer: str, known: Mapping[str, Any], owners: Sequence[str]
) -> ConfigError:
    """The error for a setting that an optimiser does not have: `known` are those it has, `owners` who has this one."""
    leaf = path.rpartition(".")[2]
    near = [name for name, setting in known.items() if leaf in setting.elsewhere] or nearest_names(
        leaf, ["name", *known]
    )
    near += [ELSEWHERE[leaf]] if leaf in ELSEWHERE else []
    return ConfigError(
        f"{path} is {_shown(value)}, and {optimizer} has no such setting",
        nearest=near,
        allowed=f"{', '.join(known)} for {optimizer}" if known else f"{optimizer} has no settings of its own",
        next_step=f"{leaf} is a setting of {', '.join(owners)}" if owners else "list them: manylora train --keys",
    )


def as_config_error(error: ValidationError, known: Sequence[str], where: str) -> ConfigError:
    """The first of pydantic's complaints as one error; unknown keys come first, since they often explain the others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    made = _one(detail, known, where)
    if len(details) == 1:
        return made
    others = ", ".join(dict.fromkeys(_path(other["loc"]) for other in details[1:4]))
    next_step = f"{made.next_step}; then look at {others}" if made.next_step else f"then look at {others}"
    return type(made)(made.what, nearest=made.nearest, allowed=made.allowed, next_step=next_step)


def _one(detail: Mapping[str, Any], known: Sequence[str], where: str) -> ConfigError:
    path, kind, value, context = _path(detail["loc"]), detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(path, value, known)
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        return ConfigError(
            f"{_path(detail['loc'][:-1])} is {_shown(value)}", allowed=f"at least {detail['loc'][-1] + 1} entries"
        )
    if kind == "missing":
        return ConfigError(f"{path!r} is not given in {where}", next_step=f"add it there, or --set {path}=...")
    own = context.get("error")
    if isinstance(own, ConfigError):
        # A part of the house refused the value: its own words, with the key in front.
        what = own.what if own.what.startswith(path) else f"{path}: {own.what}"
        return type(own)(what, nearest=own.nearest, allowed=own.allowed, next_step=own.next_step)
    what = f"{path} is {_shown(value)}" if path else f"{where} holds {_shown(value)}"
    if kind == "literal_error":
        names = [name for name in context["expected"].replace(" or ", ", ").replace("'", "").split(", ") if name]
        return ConfigError(what, nearest=nearest_names(str(value), names), allowed=", ".join(names))
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        return ConfigError(what, allowed=words.format(context[key]))
    if own is not None:
        return ConfigError(what, allowed=str(own))
    return ConfigError(what, allowed=_TYPES.get(kind.partition("_")[0], detail["msg"]))


def _path(location: tuple[int | str, ...]) -> str:
    """`data.train.0` of pydantic's location; `[key]` is its mark for the key of a mapping, not a name."""
    return ".".join(str(part) for part in location if part != "[key]")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
