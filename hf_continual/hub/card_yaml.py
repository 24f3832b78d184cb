"""A card's metadata as YAML: the author's values are written back unchanged.

The Hub reads YAML 1.2, but PyYAML reads 1.1, where ``no`` and ``on`` are booleans and ``12:30`` is 750. Here they stay the
strings that they are on the Hub, and are written in quotes, which every parser reads as strings. Numbers and dates keep the
author's digits: ``1.10`` stays ``1.10``.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_FLOAT, _INT, _BOOL, _DATE = (f"{_TAG}{kind}" for kind in ("float", "int", "bool", "timestamp"))
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")  # a number on the Hub, a string to PyYAML


class _Float(float):
    """A number with its digits."""

    text: str


class _Int(int):
    """A whole number with its digits."""

    text: str


class _Plain(str):
    """A word that needs no quotes, such as a date."""


class _Reader(yaml.SafeLoader):
    """SafeLoader with the Hub's booleans that refuses duplicate keys, as the Hub does."""


class _Writer(yaml.SafeDumper):
    """SafeDumper that writes values back unchanged, and quotes words that some parser does not read as strings."""


def _unique(loader: _Reader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    if twice := [k for k in keys if keys.count(k) > 1]:
        raise yaml.YAMLError(f"the key {twice[0]!r} is given twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _float(loader: _Reader, node: yaml.ScalarNode) -> float | str:
    if ":" in node.value:
        return _Plain(node.value)
    made = _Float(yaml.SafeLoader.construct_yaml_float(loader, node))
    made.text = node.value
    return made


def _int(loader: _Reader, node: yaml.ScalarNode) -> int | str:
    if ":" in node.value:
        return _Plain(node.value)
    made = _Int(yaml.SafeLoader.construct_yaml_int(loader, node))
    made.text = node.value
    return made


def _as_it_was(writer: _Writer, word: _Plain) -> yaml.ScalarNode:
    tag = writer.resolve(yaml.ScalarNode, str(word), (True, False))
    return writer.represent_scalar(tag, str(word))


_Reader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != _BOOL]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Reader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _class in (_Reader, _Writer):
    _class.add_implicit_resolver(_FLOAT, re.compile(rf"^{_EXPONENT.pattern}$"), list("-+.0123456789"))
_Reader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)
_Reader.add_constructor(_FLOAT, _float)
_Reader.add_constructor(_INT, _int)
_Reader.add_constructor(_DATE, lambda loader, node: _Plain(node.value))
_Writer.add_representer(_Float, lambda writer, number: writer.represent_scalar(_FLOAT, number.text))
_Writer.add_representer(_Int, lambda writer, number: writer.represent_scalar(_INT, number.text))
_Writer.add_representer(_Plain, _as_it_was)


def load_metadata(head: str) -> Any:
    """Read a card's metadata.

    Args:
        head: The text between the two lines of dashes.

    Returns:
        Plain data; `dump_metadata` writes its numbers and dates back unchanged.

    Raises:
        ValueError: If it is not valid YAML, or a key is given twice.
    """
    try:
        return yaml.load(head, Loader=_Reader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"the metadata cannot be read: {error}") from error


def dump_metadata(data: Any) -> str:
    """Write a card's metadata.

    Args:
        data: Plain data.

    Returns:
        YAML that versions 1.1 and 1.2 read alike, except for values that the author wrote without quotes.
    """
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=1000)
