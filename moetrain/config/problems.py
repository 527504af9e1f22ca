"""Pydantic's complaints in the user's words: dotted path, value given, rule, legal values, and where it was set."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from moetrain.config.registry import children_of, nearest_setting, setting_paths, variant_paths, variant_types
from moetrain.config.yaml_tree import Node

Path = tuple[str | int, ...]

_AFTER_VALIDATION = re.compile(r" after validation, not \d+$")
_SUBJECT = re.compile(r"^(?:Input|List|Tuple|String|Dictionary|Value) should ")
_NAME_IN_TEXT = re.compile(r"[a-z_]+(?:\.[a-z_]+)*")


def located(text: str, where: str) -> str:
    """`text` with the place it is about."""
    return f"{text} [{where}]" if where else text


def validation_problems(error: ValidationError, root: Node) -> list[str]:
    """One line per broken rule, in the schema's order."""
    found: dict[Path, list[tuple[bool, dict[str, Any]]]] = {}
    for detail in error.errors(include_url=False):
        path, through_union = _setting_path(detail["loc"], root, detail["type"] == "extra_forbidden")
        found.setdefault(path, []).append((through_union, dict(detail)))
    lines: list[str] = []
    for path, details in found.items():
        # `a whole number, or a list of 0 and 1`: when the list's third item is wrong, only that is worth saying.
        deeper = any(other[: len(path)] == path and len(other) > len(path) for other in found)
        kept = [detail for through_union, detail in details if not (through_union and deeper)]
        lines += _lines(path, kept, root)
    return list(dict.fromkeys(lines))


def _setting_path(loc: tuple[str | int, ...], root: Node, is_unknown_key: bool) -> tuple[Path, bool]:
    """`loc` without the names that pydantic gives to members of a union; and whether one of a plain value was in it."""
    path: Path = ()
    tag_due, through_union = True, False
    for position, part in enumerate(loc):
        if tag_due and path in variant_paths():
            tag_due = False  # the tag of a discriminated union stands exactly once, right behind the section's path
            continue
        is_last = position == len(loc) - 1
        if (
            isinstance(part, str)
            and _pattern((*path, part)) not in setting_paths()
            and not (is_last and is_unknown_key)
        ):
            through_union = True
            continue
        if isinstance(part, int) and not isinstance(_node_at(root, path, Node(None, "")).value, list):
            continue
        path, tag_due = (*path, part), True
    return path, through_union


def _lines(path: Path, details: list[dict[str, Any]], root: Node) -> list[str]:
    """What to say about one setting."""
    name = ".".join(map(str, path))
    node = _node_at(root, path, None)
    plain: list[dict[str, Any]] = []
    lines: list[str] = []
    for detail in details:
        match detail["type"]:
            case "extra_forbidden":
                lines.append(located(_unknown(path), node.where if node else ""))
            case "missing":
                lines.append(_missing(path, root))
            case "union_tag_not_found":
                legal = ", ".join(variant_types(tuple(map(str, path))))
                lines.append(
                    located(f"{name}.type: required in this section; legal: {legal}", node.where if node else "")
                )
            case "union_tag_invalid":
                kind = node.child("type") if node else None
                legal = ", ".join(variant_types(tuple(map(str, path))))
                lines.append(
                    located(
                        f"{name}.type: {_show(detail['ctx']['tag'])} must be one of {legal}", kind.where if kind else ""
                    )
                )
            case "value_error" if node is None or isinstance(node.value, dict):
                lines += _section_rules(path, detail, root)
            case _:
                plain.append(detail)
    if plain:
        first, *others = dict.fromkeys(_rule(detail) for detail in plain)
        rules = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
        hint = "; write it in quotes" if all(_wants_quotes(detail) for detail in plain) else ""
        where = node.where if node else "default"
        lines.append(located(f"{name}: {_show(plain[0]['input'])} {rules}{hint}", where))
    return lines


def _rule(detail: dict[str, Any]) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of settings"
    message = message.replace("a valid array", "a list").replace("a valid integer", "a whole number")
    return _AFTER_VALIDATION.sub("", _SUBJECT.sub("must ", message))


def _wants_quotes(detail: dict[str, Any]) -> bool:
    return detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float)


def _unknown(path: Path) -> str:
    name = ".".join(map(str, path))
    near = nearest_setting(_pattern(path))
    if near is not None:
        indices = [str(part) for part in path if isinstance(part, int)]
        for index in indices:
            near = near.replace("*", index, 1)
        return f"{name}: unknown setting; did you mean {near}?"
    siblings = ", ".join(children_of(_pattern(path[:-1])))
    return f"{name}: unknown setting; known here: {siblings}"


def _missing(path: Path, root: Node) -> str:
    name, section = ".".join(map(str, path)), ".".join(map(str, path[:-1]))
    parent = _node_at(root, path[:-1], None)
    inner = children_of(_pattern(path))
    what = f"required section (settings: {', '.join(inner)})" if inner else "required"
    place = f"in section {section} of a YAML file" if section else "at the top of a YAML file"
    how = f"{name}.{inner[0]}=..." if inner else f"{name}=..."
    return located(
        f"{name}: {what}, but set nowhere; set it {place} or as override {how}", parent.where if parent else ""
    )


def _section_rules(path: Path, detail: dict[str, Any], root: Node) -> list[str]:
    """A rule between several settings: its sentences, each with the places of the settings that it names."""
    name = ".".join(map(str, path))
    lines = []
    for sentence in detail["msg"].removeprefix("Value error, ").split("\n"):
        places = []
        for mentioned in dict.fromkeys(_NAME_IN_TEXT.findall(sentence)):
            full = next((p for p in ((*path, *mentioned.split(".")), tuple(mentioned.split("."))) if _is_leaf(p)), None)
            if full is not None:
                node = _node_at(root, full, None)
                places.append(f"{mentioned}: {node.where if node else 'default'}")
        lines.append(located(f"{name}: {sentence}" if name else sentence, "; ".join(places)))
    return lines


def _is_leaf(path: Path) -> bool:
    return _pattern(path) in setting_paths() and not children_of(_pattern(path))


def _node_at(root: Node, path: Path, default: Any) -> Any:
    node: Node | None = root
    for key in path:
        node = node.child(key) if node else None
    return node or default


def _pattern(path: Path) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
