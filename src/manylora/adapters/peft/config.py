"""PEFT's `adapter_config.json` and our spec, one from the other; what cannot be honoured is an error, never ignored."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from manylora.base.kinds import KINDS
from manylora.errors import AdapterBroken, SpecError
from manylora.methods import METHODS, WHOLE_COPY
from manylora.spec import AdapterSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor, nn

    from manylora.adapters.adapter import Adapter

PEFT_VERSION = "0.21.2"
"""The release of PEFT whose fields and matching rules this file follows."""

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

NO_TARGETS = "dummy-target-modules"
"""What PEFT writes as `target_modules` where nothing but `modules_to_save` is meant; an empty list it refuses."""

# What changes the map or the base, and the only values that this package computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "ensure_weight_tying": (False, None),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
}

# What is read, and what says only how the adapter was found, started or trained.
_READ = {
    "base_model_name_or_path", "fan_in_fan_out", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "alpha_pattern", "init_lora_weights", "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "velora_config",
}  # fmt: skip

# Starts that move part of the base's weight into the factors: the factors alone then mean nothing on the plain base.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# The heads that PEFT adds to `modules_to_save` by itself, and by what ending of a class it is recognised.
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
ADDED_HEADS = ("classifier", "score", "qa_outputs")


def task_type_of(model: nn.Module, names: Iterable[str], trained: Collection[str]) -> str | None:
    """PEFT's word for what a base computes, or None where it has none or would ask for a head that is not trained.

    `names` are the base's sites and `trained` those with a copy of their own: PEFT refuses to open a classification
    adapter that lacks the head's tensors, and opens the same folder without a task type.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if type(model).__name__.endswith("ForConditionalGeneration") else None
    for ending, (task, heads) in _TASKS.items():
        if type(model).__name__.endswith(ending):
            needed = [name for name in names if under_any(name, heads)]
            return task if all(name in trained for name in needed) else None
    return None


def under_any(path: str, entries: Iterable[str]) -> bool:
    """Whether a module or one of its parents is named by `modules_to_save`, by PEFT's rule: the end of the name."""
    parts = path.split(".")
    parents = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(parent.endswith(entry) for entry in entries for parent in parents)


def config_of(adapter: Adapter) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig`, as JSON holds them; names of sites are spelled out."""
    spec = adapter.spec
    low_rank = low_rank_sites(adapter)
    marks = [METHODS.get(method).peft or {} for method in {adapter.factors[name].method for name in low_rank}]
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {key: _number(value) for key, value in spec.alpha_pattern.items()},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base_name or None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": any(kind.transposed and kind.product for kind in map(KINDS.get, adapter.kinds.values())),
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": _number(spec.alpha),
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": list(spec.full_sites) or None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": spec.rank,
        # The first pattern that matches wins, so the order of these two must survive: the file is not sorted by key.
        "rank_pattern": dict(spec.rank_pattern),
        "revision": None,
        "target_modules": low_rank or NO_TARGETS,
        "target_parameters": None,
        "task_type": adapter.task_type,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": spec.scale_rule == "alpha/sqrt(rank)",
        "velora_config": None,
    } | {key: value for mark in marks for key, value in mark.items()}


def low_rank_sites(adapter: Adapter) -> list[str]:
    """The sites that have factors, in the adapter's order."""
    return [name for name, own in adapter.factors.items() if METHODS.get(own.method).factored]


def method_of(config: Mapping[str, Any]) -> str:
    """The name of the method by which a folder's factors are meant: the one most of whose settings its config has."""
    marks = {name: mark for name in METHODS if (mark := METHODS.get(name).peft) is not None}
    fitting = [name for name, mark in marks.items() if all(config.get(key) == value for key, value in mark.items())]
    return max(fitting, key=lambda name: len(marks[name]))


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """Pass a config of which every setting is one that this package computes.

    Raises:
        AdapterBroken: another kind of adapter, or a setting that changes the result; names setting and value.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterBroken(
            f"{where} is an adapter of peft_type {kind!r}",
            allowed="LORA",
            next_step="load it with PEFT; its kind is not read here",
        )
    marks = (METHODS.get(method_of(config)).peft or {}).items()
    for key, value in config.items():
        if key in _FIXED and value not in _FIXED[key] and (key, value) not in marks:
            raise AdapterBroken(
                f"{where} sets {key} to {value!r}, which changes what the adapter computes and is not done here",
                allowed=f"{key}: {_FIXED[key][0]!r}",
            )
        unknown = key not in _FIXED and key not in _READ and key not in _HARMLESS
        if unknown and value not in (None, False, "", [], {}):
            raise AdapterBroken(
                f"{where} sets {key} to {value!r}, a setting that PEFT {PEFT_VERSION} does not have",
                next_step="where it does not change what the adapter computes, take it out of the file",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
        raise AdapterBroken(
            f"{where} sets init_lora_weights to {start!r}: its factors stand on a base that this start has changed",
            next_step="save it from PEFT with path_initial_model_for_weight_conversion, as a plain LoRA",
        )


def spec_of(config: Mapping[str, Any], sites: tuple[str, ...], full_sites: tuple[str, ...], where: str) -> AdapterSpec:
    """The spec that a checked config and the sites found in the file amount to.

    Raises:
        AdapterBroken: a number or pattern that no adapter can have.
    """
    try:
        return AdapterSpec(
            method=method_of(config) if sites else WHOLE_COPY,
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            scale_rule="alpha/sqrt(rank)" if config.get("use_rslora") else "alpha/rank",
            dropout=float(config.get("lora_dropout") or 0.0),
            sites=sites,
            full_sites=full_sites,
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        )
    except SpecError as error:
        raise AdapterBroken(f"{where}: {error.what}", allowed=error.allowed) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterBroken(f"{where} holds a number or pattern that cannot be read: {error}") from error


def spelled_out(config: Mapping[str, Any]) -> list[str]:
    """The entries of `target_modules` that name one module of one layer, so that its tensors must be there."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return []  # PEFT writes the names down before it takes away what these leave out
    saved = config.get("modules_to_save") or []
    return [name for name in targets if re.search(r"\.\d+\.", str(name)) and not under_any(name, saved)]


def targets_of(config: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    """What `target_modules` says of any base; None where other settings leave some of it out again."""
    targets = config.get("target_modules")
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None or targets == NO_TARGETS:
        return None
    if isinstance(targets, str):
        return None if targets == "all-linear" else targets
    return tuple(map(str, targets)) if isinstance(targets, list) else None


def is_targeted(name: str, targets: tuple[str, ...] | str) -> bool:
    """Whether PEFT takes a module of this name for one that is meant."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def master(value: Tensor) -> Tensor:
    """A contiguous CPU copy in float32, or wider where it was; whole numbers stay what they are."""
    dtype = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def _number(value: float) -> int | float:
    """Whole numbers as JSON integers: other readers of the folder expect them so."""
    return int(value) if float(value).is_integer() else float(value)
