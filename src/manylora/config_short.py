"""Sections of a configuration, and those that may be written as one text where they say no more than that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from manylora import config_text
from manylora.config_errors import unknown_setting
from manylora.config_values import Number, Whole, in_table, table_of
from manylora.errors import ConfigError
from manylora.settings import NoSettings, declared, read_settings


class Section(BaseModel):
    """A part of a configuration: no unknown keys, no change after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_written(cls, values: Any) -> Any:
        """A section whose lines are all commented out has its defaults."""
        return {} if values is None else values

    @classmethod
    def describe(cls, prefix: str) -> Iterator[tuple[str, str, str]]:
        """(dotted key, default as YAML or "required", description) of every key, each after `prefix`."""
        for name, field in cls.model_fields.items():
            key = prefix + (field.alias or name)
            held = get_args(field.annotation) if type(None) in get_args(field.annotation) else (field.annotation,)
            if isinstance(held[0], type) and issubclass(held[0], Section):
                yield from held[0].describe(key + ".")
            elif field.is_required():
                yield key, "required", field.description or ""
            else:
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                yield key, config_text.dump_inline(default), field.description or ""


class ShortSection(Section):
    """A section that may be written as the text of its key `short`, and is where all its other keys are defaults."""

    short: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _just_a_text(cls, value: Any) -> Any:
        return {cls.short: str(value)} if isinstance(value, str | Path) else value

    @model_serializer(mode="wrap")
    def _short(self, inner: SerializerFunctionWrapHandler) -> Any:
        values = inner(self)
        text = getattr(self, self.short)
        return text if self == type(self).model_validate(text) else values


class DataPlace(ShortSection):
    """Where rows come from: in a file just the path, or a mapping that says more."""

    short = "path"

    path: str = Field(min_length=1, description="a file, a folder with splits, or hub:owner/name")
    split: str | None = Field(default=None, description="train, valid, test, ... of a folder or hub data set")
    subset: str | None = Field(default=None, description="the configuration of a hub data set")
    weight: Annotated[Number, Field(gt=0)] = Field(
        default=1.0, description="how often each epoch shows these rows; 0.5: half of them"
    )


class StopConfig(ShortSection):
    """`sweep.stop`: which trials are not trained to their end; in a file just the rule, or a mapping that says more."""

    short = "rule"

    rule: Annotated[str, in_table("stopping rule")] = Field(
        default="none", description="none, median, successive-halving, asha"
    )
    reduction: Annotated[Whole, Field(ge=2)] = Field(
        default=3, description="of so many trials at a level one goes on (successive-halving, asha)"
    )
    first_share: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of a trial's tokens at which it is first judged; null: the rule's own"
    )
    min_reports: Annotated[Whole, Field(ge=1)] = Field(
        default=4, description="others that must have been judged at a level before one is stopped there (median)"
    )


class ChosenConfig(ShortSection):
    """A thing chosen by its name from a table: in a file just that, or a mapping that also gives settings of its own.

    Which settings there are, and what is allowed of them, each entry declares for itself (`manylora.settings`).
    """

    model_config = ConfigDict(extra="allow")
    short = "name"
    kind: ClassVar[str]
    """The kind of table, of `config_values.TABLES`."""
    where: ClassVar[str]
    """The key of the section."""

    name: Any

    @classmethod
    def settings_of(cls) -> Mapping[str, type]:
        """The settings that each entry declares for itself, by its name."""
        table = table_of(cls.kind)
        return {name: table.get(name).settings for name in table}

    @model_validator(mode="before")
    @classmethod
    def _settings_are_its_own(cls, value: Any) -> Any:
        given = {"name": value} if isinstance(value, str) else value
        default = cls.model_fields["name"].default
        name = given.get("name") or default if isinstance(given, Mapping) else None
        own = {key: one for key, one in given.items() if key != "name"} if isinstance(given, Mapping) else {}
        if name is None and own:
            raise ConfigError(
                f"{cls.where}.{next(iter(own))} is given without {cls.where}.name",
                allowed=", ".join(table_of(cls.kind)),
            )
        if not isinstance(name, str):
            return value
        known = cls.settings_of()
        settings = known.get(table_of(cls.kind).check(name), NoSettings)
        for key, one in own.items():
            if key not in declared(settings):
                owners = [other for other, has in known.items() if key in declared(has)]
                raise unknown_setting(f"{cls.where}.{key}", one, name, declared(settings), owners)
        read = read_settings(settings, own, cls.where)
        return {"name": name} | {key: getattr(read, key) for key in declared(settings)}

    def own(self) -> Any:
        """The settings of this entry alone, as it takes them; None where it has none."""
        settings = self.settings_of().get(self.name)
        return None if settings is None else settings(**(self.model_extra or {}))

    @classmethod
    def describe(cls, prefix: str) -> Iterator[tuple[str, str, str]]:
        field, names = cls.model_fields["name"], cls.settings_of()
        listed = ", ".join(table_of(cls.kind))
        yield prefix.removesuffix("."), config_text.dump_inline(field.default), f"{field.description}: {listed}"
        for key in dict.fromkeys(key for settings in names.values() for key in declared(settings)):
            owners = {name: settings for name, settings in names.items() if key in declared(settings)}
            defaults = {name: config_text.dump_inline(getattr(has(), key)) for name, has in owners.items()}
            told = {name: declared(has)[key].description for name, has in owners.items()}
            yield prefix + key, _by_owner(defaults, "{text} ({names})"), _by_owner(told, "{names}: {text}")


class OptimizerConfig(ChosenConfig):
    """`train.optimizer`; what is declared: `training.optim.rule.Rule`."""

    kind = "optimizer"
    where = "train.optimizer"

    name: str = Field(default="adamw", description="the optimiser")


class ObjectiveConfig(ChosenConfig):
    """`objective`; what is declared: `objectives.SETTINGS`."""

    kind = "objective"
    where = "objective"

    name: str | None = Field(default=None, description="what is minimised; null: what the task does")

    @classmethod
    def settings_of(cls) -> Mapping[str, type]:
        table = table_of("objective with settings")
        return {name: table.get(name) for name in table}

    @classmethod
    def path_keys(cls) -> frozenset[str]:
        """The keys of settings that may name a path."""
        settings = cls.settings_of().values()
        return frozenset(f"{cls.where}.{key}" for has in settings for key, one in declared(has).items() if one.is_path)


def _by_owner(texts: Mapping[str, str], form: str) -> str:
    """Different texts one after another, each with the names that it belongs to."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    return "; ".join(form.format(names=", ".join(names), text=text) for text, names in groups.items())
