"""Configurations as text: YAML whose scalars mean what they look like, and `key.path=value` overrides.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false, `1:30` is ninety and a repeated key silently wins.
Here scalars follow YAML 1.2, and a repeated key is an error.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from manylora.errors import ConfigError

HELP = "see every key and its default: manylora train --keys"

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_FLOAT_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 - PyYAML's own attribute, replaced for this class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?\d[\d_]*\Z|0x[0-9a-fA-F]+\Z"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), _FLOAT_STARTS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    # `int` and not YAML 1.1's reading, where a leading zero means octal.
    return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes strings which only YAML 1.2 reads as numbers, so that every reader agrees."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), _FLOAT_STARTS)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d[\d_]*\Z"), list("-+0123456789"))


class _OneLine(_Dumper):
    """A dumper that quotes what would otherwise be folded over several lines."""


def _one_line(dumper: _OneLine, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _one_line)


def parse(text: str, where: str) -> Any:
    """The value of a YAML document; `where` names it in errors.

    Raises:
        ConfigError: it is not YAML, or repeats a key; with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: {error.problem or 'this is not YAML'}", next_step=HELP) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML: {error}", next_step=HELP) from error


def dump(values: dict[str, Any]) -> str:
    """YAML that `parse` and any other reader turn back into the same values, keys in the given order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def dump_inline(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.dump(value, Dumper=_OneLine, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the value of `key.path=value`, the value read as YAML.

    Raises:
        ConfigError: there is no `=`, or nothing before it.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"the override {text!r} has no value" if key.strip() else f"the override {text!r} has no key",
            allowed="key.path=value",
            next_step="for example --set train.learning_rate=1e-3",
        )
    return key.strip(), parse(value, f"--set {key.strip()}")
