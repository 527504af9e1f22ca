"""YAML as a tree whose every node remembers where it was written.

Three departures from PyYAML's safe loader, each because it would otherwise change a setting in silence:
- numbers and booleans follow YAML 1.2: `1e-4` is a float, `no` and `on` are words, `010` is ten, `1:30` is no number;
  beyond 1.2, digits may be grouped (`50_000_000`), `5e8` is a whole number, and infinities are refused;
- a key that appears twice in one mapping is an error, not the last one's win;
- anchors, aliases, tags and several documents in one file are refused (layers of files are how settings are shared).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moetrain.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """A value and where it was set. `value` is a dict of nodes, a list of nodes, or a scalar."""

    value: Any
    where: str

    def plain(self) -> Any:
        """The tree without its marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The node under a key or an index, if there is one."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None


# Order matters: the first pattern that matches a plain scalar decides its type.
_SCALARS: list[tuple[str, re.Pattern[str], str]] = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        "-+0123456789.",
    ),
]


class _Composer(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no aliases. Used to compose nodes, never to construct objects."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            advice = "anchors and aliases are refused; put shared settings into a file and layer it"
            raise yaml.MarkedYAMLError(problem=advice, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or our own reader would take for something else."""


_Composer.yaml_implicit_resolvers = {}  # PyYAML's own are YAML 1.1; the dumper keeps them beside ours
for _tag, _pattern, _first in _SCALARS:
    _Composer.add_implicit_resolver(_tag, _pattern, ["" if char == "\0" else char for char in _first])
    _Dumper.add_implicit_resolver(_tag, _pattern, ["" if char == "\0" else char for char in _first])


def parse_yaml(text: str, name: str) -> Node:
    """`text` as a tree. `name` is the file's name, or `override 'a.b=c'`, for messages. Raises `ConfigError`."""
    try:
        root = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_where(name, mark)}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from error
    return Node(None, name) if root is None else _convert(root, name)


def read_yaml(path: Path) -> Node:
    """The tree in a file. Raises `ConfigError` when it cannot be read or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    node = parse_yaml(text, str(path))
    if node.value is None:
        return Node({}, node.where)
    if not isinstance(node.value, dict):
        raise ConfigError(f"{path}: must be a mapping of settings at the top, not {kind_of(node.value)}")
    return node


def write_yaml(tree: dict[str, Any]) -> str:
    """YAML text that `parse_yaml` reads back to an equal tree."""
    # ASCII with escapes: given Unicode, PyYAML folds some of its line breaks into spaces.
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def kind_of(value: Any) -> str:
    """What YAML calls a value."""
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "empty")


def _where(name: str, mark: Any) -> str:
    if mark is None or name.startswith("override "):
        return name
    return f"{name}:{mark.line + 1}:{mark.column + 1}"


def _convert(node: yaml.Node, name: str) -> Node:
    where = _where(name, node.start_mark)
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return Node(_convert_mapping(node, name), where)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return Node([_convert(child, name) for child in node.value], where)
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, where), where)
    raise ConfigError(f"{where}: the YAML tag {node.tag} is refused; settings are plain values, lists and mappings")


def _convert_mapping(node: yaml.MappingNode, name: str) -> dict[str, Node]:
    tree: dict[str, Node] = {}
    for key_node, value_node in node.value:
        where = _where(name, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be a single word")
        key = key_node.value
        if key in tree:
            raise ConfigError(f"{where}: the key {key!r} appears twice in this mapping; first at {tree[key].where}")
        # A key's own place, not its value's: for a mapping the value starts a line later.
        tree[key] = Node(_convert(value_node, name).value, where)
    return tree


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    text = node.value
    match node.tag:
        case "tag:yaml.org,2002:str":
            return text
        case "tag:yaml.org,2002:null":
            return None
        case "tag:yaml.org,2002:bool":
            return text.lower() == "true"
        case "tag:yaml.org,2002:int":
            return int(text)
        case "tag:yaml.org,2002:float":
            return _number(text, where)
    raise ConfigError(f"{where}: the YAML tag {node.tag} is refused; settings are plain values, lists and mappings")


def _number(text: str, where: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {text} is too large for a number")
    # `5e8` is how people write large counts; where a setting wants a fraction, a whole number does as well.
    return int(value) if value.is_integer() and "." not in text else value
