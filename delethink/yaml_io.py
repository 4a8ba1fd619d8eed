"""YAML of recipes: numbers as in YAML 1.2, and limits against texts that expand.

A recipe may come from anyone: long texts, deep nesting, aliases of aliases, repeated keys and
numbers of many digits are refused by line.
"""

from __future__ import annotations

import re
from typing import Any

from delethink.errors import MissingExtraError
from delethink.json_io import MAX_DEPTH

try:
    import yaml
except ImportError:
    raise MissingExtraError("yaml", "eval") from None

YAML_ERRORS = (yaml.YAMLError, ValueError)  # raised by ``load_yaml``
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE_TAG = "tag:yaml.org,2002:merge"
_CONSTANTS = {"true": True, "false": False, "null": None}
_MAX_LENGTH = 2**20  # characters of a recipe; the reader takes seconds for each MB
_MAX_NODES = 100_000
_MAX_NUMBER_LENGTH = 100  # characters


class YamlLimitError(ValueError):
    """A YAML text is too large, or says something twice."""


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: 1e-3 is one, 010 is ten, and 1:30 is a text."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would read as numbers."""


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        YamlLimitError: a key stands there twice, or the text is long, deep, or has repeated
            aliases that make it so, or numbers of many digits.
        yaml.YAMLError, ValueError: the text is not YAML, or a date or number does not exist.
    """
    if len(text) > _MAX_LENGTH:
        raise YamlLimitError(f"it has more than {_MAX_LENGTH:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, 1)
        return loader.construct_document(node)
    except RecursionError:
        raise YamlLimitError(f"it has more than {MAX_DEPTH} levels") from None
    finally:
        loader.dispose()


def _count_nodes(node: Any, counted: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Return the numbers of nodes and of levels below a node, with every alias written out."""
    line = node.start_mark.line + 1
    if id(node) not in counted:
        counted[id(node)] = (_MAX_NODES, 0)  # for an alias of itself
        parts: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            _refuse_repeated_keys(node)
        elif node.tag in _NUMBER_TAGS and len(node.value) > _MAX_NUMBER_LENGTH:
            raise YamlLimitError(f"line {line} has a number of {len(node.value)} characters")
        if depth > MAX_DEPTH:
            raise RecursionError
        below = [_count_nodes(part, counted, depth + 1) for part in parts]
        total = 1 + sum(size for size, _ in below)
        counted[id(node)] = (total, 1 + max((levels for _, levels in below), default=0))
    size, levels = counted[id(node)]
    if size >= _MAX_NODES:
        raise YamlLimitError(
            f"line {line} has more than {_MAX_NODES:,} values, with each alias written out"
        )
    if depth + levels > MAX_DEPTH + 1:
        raise RecursionError
    return size, levels


def _refuse_repeated_keys(node: Any) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
            continue
        if (key.tag, key.value) in seen:
            raise YamlLimitError(
                f"line {key.start_mark.line + 1} has the key {key.value!r:.60} a second time"
            )
        seen.add((key.tag, key.value))


def parse_scalar(text: str) -> Any:
    """Return a number, true, false or null as a recipe would read it, or the text itself."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        value = load_yaml(text)
    except YAML_ERRORS:
        return text
    return value if type(value) in (int, float) else text


def dump_yaml(values: Any) -> str:
    """Return a text that ``load_yaml`` reads as ``values``."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False))


def _set_number_forms() -> None:
    """Replace the forms of numbers of YAML 1.1, in which 1e-3 is a text and 1:30 is 90."""
    digits = r"[0-9](?:_?[0-9])*"
    whole = re.compile(rf"[-+]?(?:{digits}|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$")
    decimal = re.compile(
        rf"(?:[-+]?(?:{digits}(?:\.(?:{digits})?)?|\.{digits})(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    for reader in (_Loader, _Dumper):
        reader.yaml_implicit_resolvers = {
            first: [form for form in forms if form[0] not in _NUMBER_TAGS]
            for first, forms in reader.yaml_implicit_resolvers.items()
        }
        for tag, form in zip(_NUMBER_TAGS, (whole, decimal), strict=True):
            reader.add_implicit_resolver(tag, form, list("-+.0123456789"))
    _Loader.add_constructor(_NUMBER_TAGS[0], _whole_number)


def _whole_number(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "").lower()
    is_decimal = text.lstrip("+-").isdecimal()  # also with leading zeros
    return int(text, 10 if is_decimal else 0)


_set_number_forms()
