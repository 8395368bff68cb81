"""A run as one value: what is trained, on what, and how; read from YAML, checked, and written back complete.

Every mistake is one `ConfigError` that names the key in full, the value seen, what is allowed and the nearest name.
Relative paths in a file are relative to that file; those in overrides, to the current directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from manylora import config_text
from manylora.config_errors import as_config_error, unknown_key
from manylora.config_short import DataPlace, ObjectiveConfig, OptimizerConfig, Section, StopConfig
from manylora.config_values import (
    Names,
    Number,
    Whole,
    alone,
    as_temperature,
    count_or_auto,
    device_name,
    dtype_name,
    fold_part,
    folder_name,
    in_table,
    or_none,
    rate_or_auto,
    several,
)
from manylora.errors import ConfigError
from manylora.spec import AdapterSpec

Places = Annotated[tuple[DataPlace, ...], BeforeValidator(alone)]


class DataConfig(Section):
    """`data`: what is learned from, and how it is read."""

    train: Places = Field(
        min_length=1,
        description="training rows: a file, a folder, hub:owner/name, a list of these, or [{path, weight, split}]",
    )
    eval: Annotated[Places, BeforeValidator(or_none)] = Field(
        default=(),
        description="held-out rows; or give eval_fraction; a folder's own valid split is taken unasked",
        validate_default=True,
    )
    eval_fraction: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of the training rows held out; rows that share a prompt stay together"
    )
    fold: Annotated[str, AfterValidator(fold_part)] | None = Field(
        default=None, description="2/5: of five parts of the training rows the second is held out; instead of eval"
    )
    split_seed: Annotated[Whole, Field(ge=0)] | None = Field(
        default=None, description="decides which rows eval_fraction and fold hold out; null: train.seed"
    )
    format: Annotated[str, in_table("format", besides=("auto",))] = Field(
        default="auto", description="how a row is read"
    )
    columns: dict[str, str] = Field(default={}, description="renames columns: {prompt: question, completion: answer}")
    overflow: Literal["error", "split", "right"] | None = Field(
        default=None,
        description="rows above row_tokens: error, split or cut on the right; default split for text, else error",
    )
    turns: Literal["all", "last"] = Field(
        default="all", description="which assistant turns of a conversation are learned"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="a row that cannot be learned from stops the run, or is skipped and counted"
    )
    chat_template: Path | None = Field(default=None, description="a file with a chat template, where the base has none")

    @model_validator(mode="after")
    def _one_eval(self) -> Self:
        asked = {"eval": bool(self.eval), "eval_fraction": self.eval_fraction is not None, "fold": bool(self.fold)}
        given = [f"data.{name}" for name, here in asked.items() if here]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given[:2])} are both given", allowed="one of them")
        return self

    @property
    def held_out(self) -> bool:
        """Whether the configuration says which rows are held out."""
        return bool(self.eval or self.eval_fraction or self.fold)


class AdapterConfig(Section):
    """`adapter`: what is trained."""

    method: Annotated[str, in_table("method")] = Field(default="lora", description="how a site is changed")
    rank: Whole = Field(
        default=16, description="rank of the low-rank change, at least 1; capped where a site is smaller"
    )
    alpha: Number = Field(default=32.0, description="scale of the change, above 0; see scale_rule")
    sites: Names = Field(
        default=("all-linear",), description="sites: endings of names, globs, re:..., all-linear, everything"
    )
    exclude: Names = Field(default=(), description="sites to leave out, by the same patterns")
    layers: Annotated[tuple[Whole, ...], BeforeValidator(alone)] | None = Field(
        default=None, description="only these layers, by index from 0"
    )
    full_sites: Names = Field(default=(), description="sites trained as whole copies: heads")
    rank_pattern: dict[str, Whole] = Field(default={}, description="ranks by the end of a site's name")
    alpha_pattern: dict[str, Number] = Field(default={}, description="alphas by the end of a site's name")
    dropout: Number = Field(default=0.0, description="dropout of the low-rank branch's input, from 0 to below 1")
    init: Annotated[str, in_table("init")] = Field(default="default", description="where the factors start")
    scale_rule: Literal["alpha/rank", "alpha/sqrt(rank)"] = Field(
        default="alpha/rank", description="the scale at a site"
    )
    quantize: Literal["int8", "int4"] | None = Field(
        default=None, description="train the factors on the grid that `manylora compress` stores them on: int8, int4"
    )
    from_: Path | None = Field(default=None, alias="from", description="an adapter folder to continue")

    def spec(self) -> AdapterSpec:
        """The adapter that is asked for.

        Raises:
            SpecError: a value out of range.
        """
        return AdapterSpec(**{name: getattr(self, name) for name in type(self).model_fields if name != "from_"})

    @model_serializer(mode="wrap")
    def _continues_as_it_is(self, inner: SerializerFunctionWrapHandler) -> Any:
        """Beside `from` only what was given with it: written out, the defaults would read as asked for."""
        values = inner(self)
        kept = {"from", "from_", "dropout"} | self.model_fields_set
        return values if self.from_ is None else {name: value for name, value in values.items() if name in kept}

    @model_validator(mode="after")
    def _is_a_spec(self) -> Self:
        try:
            self.spec()
        except ConfigError as error:
            raise type(error)(
                f"adapter.{error.what}", nearest=error.nearest, allowed=error.allowed, next_step=error.next_step
            ) from error
        return self


class TrainConfig(Section):
    """`train`: the optimiser and its steps."""

    learning_rate: Annotated[float | Literal["auto"], BeforeValidator(rate_or_auto)] = Field(
        default=2e-4, description="peak learning rate; auto: the field's rule for the base and method, with its reason"
    )
    rate_ratio: Annotated[Number, Field(gt=0)] = Field(
        default=1.0, description="learning rate of factors b over that of factors a (LoRA+ takes 16)"
    )
    rate_pattern: dict[str, Annotated[Number, Field(ge=0)]] = Field(
        default={}, description="factors of the learning rate by the end of a site's name; 0: it stays as it is"
    )
    schedule: Annotated[str, in_table("schedule")] = Field(default="cosine", description="course of the learning rate")
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.03, description="share of the steps spent warming up"
    )
    warmup_steps: Annotated[Whole, Field(ge=0)] | None = Field(
        default=None, description="steps of warmup; replaces warmup_ratio"
    )
    min_rate_ratio: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.0, description="last rate as a share of the peak"
    )
    epochs: Annotated[Number, Field(gt=0)] = Field(
        default=3.0, description="passes over the training data; may be a fraction"
    )
    steps: Annotated[Whole, Field(ge=1)] | None = Field(default=None, description="optimiser steps; replaces epochs")
    tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="trained tokens: as many steps as reach them; replaces epochs"
    )
    stop_after: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="stop after so many steps of the schedule, which keeps its full length"
    )
    row_tokens: Annotated[Whole, Field(ge=8)] = Field(
        default=512, description="tokens of a packed row, the longest sequence"
    )
    rows_per_step: Annotated[Whole, Field(ge=1)] = Field(default=4, description="rows of one optimiser step")
    accumulate: Annotated[Whole, Field(ge=1)] = Field(
        default=1, description="micro-batches that a step is computed in; changes memory, not the result"
    )
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="the optimiser: its name, or {name: sgd, its own settings}"
    )
    weight_decay: Annotated[Number, Field(ge=0)] = Field(default=0.0, description="how much weights decay; see decay")
    decay: Literal["decoupled", "l2"] = Field(
        default="decoupled", description="how: decoupled by the rate times weight_decay, l2: through the gradient"
    )
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="decay of the optimiser's two averages"
    )
    epsilon: Annotated[Number, Field(gt=0)] = Field(default=1e-8, description="the optimiser's epsilon")
    clip_norm: Annotated[Number, Field(gt=0)] | None = Field(
        default=1.0, description="gradient norm to clip at; null: off"
    )
    seed: Annotated[Whole, Field(ge=0)] = Field(default=0, description="decides data order, init and dropout")
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        default="auto",
        description="what layers compute again: none, selective (all but products), full; auto: as memory asks",
    )
    compile: Literal["auto", "off", "layers"] = Field(
        default="auto", description="torch.compile of the layers; auto: in long runs, where a try shows them faster"
    )

    @field_validator("rate_pattern")
    @classmethod
    def _regular_expressions(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"regular expressions; {pattern!r} is none: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _micro_batches_hold_rows(self) -> Self:
        if self.accumulate > self.rows_per_step:
            raise ConfigError(
                f"train.accumulate is {self.accumulate} and train.rows_per_step is {self.rows_per_step}",
                allowed="at most as many micro-batches as rows",
            )
        if self.steps is not None and self.tokens is not None:
            raise ConfigError("train.steps and train.tokens are both given", allowed="one of them")
        if self.compile == "layers" and self.checkpointing == "selective":
            raise ConfigError(
                "train.checkpointing is selective, which watches products that train.compile: layers hides from it",
                allowed="train.checkpointing none, full or auto, or train.compile off",
            )
        return self


class EvaluateConfig(Section):
    """`evaluate`: how the held-out rows are used."""

    every_steps: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="steps between evaluations; null: each epoch"
    )
    at_tokens: Annotated[tuple[Annotated[Whole, Field(ge=1)], ...], BeforeValidator(or_none)] = Field(
        default=(), description="evaluate also once so many tokens are trained; rising"
    )
    max_new_tokens: Annotated[Whole, Field(ge=1)] = Field(default=128, description="length limit of a generated answer")
    temperature: Annotated[float, BeforeValidator(as_temperature)] = Field(
        default=0.0, description="sampling temperature; 0: greedy"
    )
    samples: Annotated[Whole, Field(ge=0)] = Field(default=5, description="answers shown before and after")
    max_examples: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="evaluate at most so many examples"
    )

    @field_validator("at_tokens")
    @classmethod
    def _rising(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if list(tokens) != sorted(set(tokens)):
            raise ValueError("counts of tokens that rise")
        return tokens


class CheckpointConfig(Section):
    """`checkpoint`: what is kept on disk, and which state is the result."""

    every_steps: Annotated[Whole, Field(ge=1)] | None = Field(
        default=100, description="steps between checkpoints; null: only the last"
    )
    keep: Annotated[Whole, Field(ge=1)] = Field(default=2, description="checkpoints kept")
    select: Literal["eval_loss", "last"] = Field(default="eval_loss", description="which state is saved as the adapter")
    early_stop_patience: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="stop after so many evaluations without a better loss"
    )


class SweepConfig(Section):
    """`sweep`: a search over keys of the configuration, all of its members trained over one base."""

    space: dict[str, Any] = Field(
        min_length=1,
        description="what varies, by key: {adapter.rank: [4, 16], train.learning_rate: {low: 1e-5, high: 1e-2}}",
    )
    search: Annotated[str, in_table("search")] = Field(default="random", description="grid, random, tpe")
    trials: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="configurations that are tried; null: the whole grid, else 16"
    )
    stop: StopConfig = Field(default_factory=StopConfig, description="which trials are not trained to their end")
    concurrent: Annotated[int | Literal["auto"], BeforeValidator(count_or_auto)] = Field(
        default="auto", description="members that train at once; auto: as many as memory holds"
    )
    repeats: Annotated[Whole, Field(ge=1)] = Field(default=1, description="seeds of each configuration")
    folds: Annotated[Whole, Field(ge=2)] | None = Field(
        default=None, description="parts of the training rows, each held out once; instead of data.eval"
    )
    seed: Annotated[Whole, Field(ge=0)] = Field(default=0, description="decides what the search proposes")
    engine: Annotated[str, in_table("engine")] = Field(default="local", description="local, or ray: several machines")
    workers: Annotated[Whole, Field(ge=1)] = Field(default=2, description="processes of the ray engine")


class Config(Section):
    """A run: everything but `base`, `data.train` and `output` has a default."""

    base: str = Field(min_length=1, description="builtin:tiny-en, a Hugging Face folder, or a hub id")
    dtype: Annotated[Literal["bfloat16", "float16", "float32", "float64"], BeforeValidator(dtype_name)] = Field(
        default="bfloat16", description="of the frozen base"
    )
    device: Annotated[str, AfterValidator(device_name)] = Field(
        default="auto", description="auto, cpu, cuda, cuda:1 or mps"
    )
    quantize: Annotated[str, in_table("packing")] | None = Field(
        default=None, description="pack the base's linear weights as it is read: nf4, fp4, int8, int4"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the base; never remembered")
    task: Annotated[str, in_table("task")] = Field(default="sft", description="what is learned and how it is scored")
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig, description="what is minimised: null, a name, or {name: ..., its own settings}"
    )
    data: DataConfig = Field(description="what is learned from")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="what is trained")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the optimiser and its steps")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="how held-out rows are used")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="what is kept on disk")
    track: Annotated[
        tuple[Annotated[str, in_table("track")], ...], BeforeValidator(several), BeforeValidator(or_none)
    ] = Field(
        default=("tensorboard",),
        description="where curves go besides events.jsonl: tensorboard, wandb, mlflow, trackio",
    )
    output: Annotated[Path, BeforeValidator(folder_name)] = Field(description="the run's folder; never reused silently")
    sweep: SweepConfig | None = Field(default=None, description="a search over keys; manylora sweep runs it")

    @model_validator(mode="after")
    def _early_stop_can_judge(self) -> Self:
        folds = self.sweep is not None and self.sweep.folds is not None
        if self.checkpoint.early_stop_patience is not None and not self.data.held_out and not folds:
            raise ConfigError(
                "checkpoint.early_stop_patience is given and there is no held-out data",
                next_step="give data.eval or data.eval_fraction",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as text, numbers, lists and mappings."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The whole configuration; `load_config` of it gives an equal one."""
        return config_text.dump(self.to_dict())


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """A checked configuration from a YAML file or a mapping, with `a.b=v` texts or `{"a.b": v}` laid over it.

    Raises:
        ConfigError: the file is missing or is not YAML; a key is unknown; a value is not allowed.
    """
    where, values = _read(source)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(config_text.parse_override, overrides)
    for key, value in pairs:
        names = ["sweep", "space", key.removeprefix(_SPACE)] if key.startswith(_SPACE) else key.split(".")
        values = _laid_over(values, names, _with_full_paths(key, value, Path.cwd()), key)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        inner = [f"data.{side}.0.{name}" for side in ("train", "eval") for name in DataPlace.model_fields]
        raise as_config_error(error, [*known_keys(), *inner], where) from error


def known_keys() -> list[str]:
    """Every key that holds a value, dotted, in the order of a written configuration."""
    return [key for key, _, _ in describe_keys()]


def describe_keys() -> list[tuple[str, str, str]]:
    """(dotted key, default as YAML or "required", description) of every key."""
    return list(Config.describe(""))


# Places of data, which may also be named by a prefix.
_DATA_KEYS = frozenset({"data.train", "data.eval", "data.train.path", "data.eval.path"})
# What a sweep varies: its keys have dots of their own, and each of its choices is a value of that key.
_SPACE = "sweep.space."
# Sections that may be written as one text, and the key that the text is.
_SHORT = {"sweep.stop": StopConfig.short, "train.optimizer": OptimizerConfig.short,
          "objective": ObjectiveConfig.short}  # fmt: skip
# Values that are paths, and so are read relative to the place where they are written.
_PATH_KEYS = frozenset({"base", "output", "data.chat_template", "adapter.from"} | _DATA_KEYS)


def _with_full_paths(key: str, value: Any, folder: Path) -> Any:
    """The value at a key with the paths in it made absolute; anything else is left to the checks."""
    if key.startswith(_SPACE) and isinstance(value, list | tuple):
        return [_with_full_paths(key.removeprefix(_SPACE), choice, folder) for choice in value]
    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return {name: _with_full_paths(f"{prefix}{name}", part, folder) for name, part in value.items()}
    may_be_word = key.startswith("objective.") and key in ObjectiveConfig.path_keys()
    if key not in _PATH_KEYS and not may_be_word:
        return value
    if isinstance(value, list | tuple):
        return [_with_full_paths(key, part, folder) for part in value]
    if not isinstance(value, str | Path) or not str(value).strip():
        return value
    if key in _DATA_KEYS and str(value).startswith(("hub:", "python:")):
        return str(value)
    full = (folder / Path(value).expanduser()).resolve()
    if (key == "base" or may_be_word) and not full.exists() and not str(value).startswith((".", "/", "~")):
        return str(value)  # builtin:..., or a hub id; a word that a setting knows
    return str(full)


def _laid_over(values: Mapping[str, Any], names: Sequence[str], value: Any, key: str) -> dict[str, Any]:
    """A copy of nested mappings with the value at a key replaced."""
    name, *rest = names
    if not rest:
        return {**values, name: value}
    inner = values.get(name)
    short = _SHORT.get(key.removesuffix("." + ".".join(rest)))
    if short and isinstance(inner, str):
        inner = {short: inner}
    if inner is not None and not isinstance(inner, Mapping):
        raise unknown_key(key, value, known_keys())
    return {**values, name: _laid_over(inner or {}, rest, value, key)}


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a configuration is called in errors, and its values with full paths."""
    if isinstance(source, Mapping):
        return "the configuration", _with_full_paths("", source, Path.cwd())
    path = Path(source).expanduser()
    if (path / "config.yaml").is_file():
        path = path / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"no configuration at {str(path)!r}", next_step="give a YAML file; `manylora demo` writes one to start from"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as text: {error}", allowed="a YAML file") from error
    values = config_text.parse(text, str(path))
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{str(path)!r} is {kind}", allowed="a mapping with at least base, data.train and output")
    return str(path), _with_full_paths("", values, path.resolve().parent)
