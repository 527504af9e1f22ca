"""From YAML files and `a.b=c` overrides to one frozen `RunConfig`, or to one error that names everything wrong.

Files are layers, merged left to right: mappings merge key by key, everything else is replaced. A file may begin with
`base: other.yaml` (or a list of files), relative to itself, which is merged below it. Overrides come last; an override
replaces what stands at its path. Where a section comes in several kinds (`model.moe.router`), a layer that names
another `type` replaces the section, because the settings of one kind mean nothing to another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moetrain.config.deepspeed import deepspeed_problems
from moetrain.config.problems import located, validation_problems
from moetrain.config.registry import variant_paths
from moetrain.config.schema import RunConfig
from moetrain.config.section import Section
from moetrain.config.yaml_tree import Node, kind_of, parse_yaml, read_yaml, write_yaml
from moetrain.errors import ConfigError

# The settings in which ${VAR} is expanded. Elsewhere it is refused: a run should not change its mathematics with the
# shell that started it.
PATH_SETTINGS = frozenset(
    {
        "run.dir",
        "data.tokenizer.path",
        "data.train.*.path",
        "data.valid.*.path",
        "data.cache_dir",
        "checkpoint.load",
    }
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load_config(paths: Sequence[Path | str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that these files and overrides describe. Raises one `ConfigError` that lists every problem found."""
    root, problems = Node({}, ""), []
    for path in paths:
        try:
            root = _merge(root, _read_layers(Path(path)))
        except ConfigError as error:
            problems.append(str(error))
    for text in overrides:
        try:
            root = _override(root, text)
        except ConfigError as error:
            problems.append(str(error))
    # Unreadable input makes every later complaint a guess, so it is reported alone.
    _refuse(problems)
    root, problems = _expand(root)
    return _validate(root, problems)


def config_from_dict(tree: dict[str, Any], where: str) -> RunConfig:
    """The run that `config_to_dict` wrote, say into a checkpoint's manifest; `where` names that place in errors."""
    return _validate(_node_of(tree, where), [])


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as JSON types, defaults included."""
    return config.model_dump(mode="json")


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return write_yaml(config_to_dict(config))


def fingerprint(section: Section) -> str:
    """SHA-256 over the canonical JSON (sorted keys, defaults resolved) of a whole config or of one of its sections.

    `fingerprint(config)` answers "is this the same run, paths and all?"; `fingerprint(config.model)` answers "is this
    the same model?". Key order, number notation and whether a default was written out do not matter.
    """
    canonical = json.dumps(section.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a complete config, for editors."""
    return RunConfig.model_json_schema()


def _read_layers(path: Path, inside: tuple[Path, ...] = ()) -> Node:
    """A file merged over its bases. `inside` holds the files whose `base` led here."""
    here = path.resolve()
    if here in inside:
        chain = " -> ".join(str(step) for step in (*inside, here))
        raise ConfigError(f"{path}: base files form a cycle: {chain}")
    root = read_yaml(path)
    settings = {key: node for key, node in root.value.items() if key != "base"}
    layers = Node({}, root.where)
    for name in _base_names(root):
        layers = _merge(layers, _read_layers(path.parent / name, (*inside, here)))
    return _merge(layers, Node(settings, root.where))


def _base_names(root: Node) -> list[str]:
    base = root.child("base")
    if base is None:
        return []
    names = base.plain() if isinstance(base.value, list) else [base.value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{base.where}: base: must be a file name or a list of file names, relative to this file")
    return names


def _merge(lower: Node, upper: Node, path: tuple[str, ...] = ()) -> Node:
    """`upper` over `lower`."""
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)) or _changes_kind(lower, upper, path):
        return upper
    merged = dict(lower.value)
    for key, node in upper.value.items():
        merged[key] = _merge(merged[key], node, (*path, key)) if key in merged else node
    return Node(merged, upper.where)


def _changes_kind(lower: Node, upper: Node, path: tuple[str, ...]) -> bool:
    """Whether `upper` names another `type` for a section whose types have different settings."""
    old, new = lower.child("type"), upper.child("type")
    return path in variant_paths() and old is not None and new is not None and old.value != new.value


def _override(root: Node, text: str) -> Node:
    """`root` with one `a.b=c` applied."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r}: must read path.to.setting=value")
    where = f"override {text!r}"
    return _assign(root, keys, parse_yaml(value, where), where, ())


def _assign(node: Node | None, keys: list[str], value: Node, where: str, path: tuple[str, ...]) -> Node:
    """`node` (None: nothing there yet) with `value` in the place that `keys` lead to. `path` leads to `node`."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if node is not None and isinstance(node.value, list):
        index = _index(key, node, where, path)
        items = list(node.value)
        items[index] = _assign(items[index], rest, value, where, (*path, "*"))
        return Node(items, node.where)
    if node is None or node.value is None:
        node = Node({}, where)
    if not isinstance(node.value, dict):
        raise ConfigError(
            f"{where}: {'.'.join(path)} is {kind_of(node.value)} (set at {node.where}), so {key!r} cannot be set in it"
        )
    child = _assign(node.child(key), rest, value, where, (*path, key))
    if key == "type" and _changes_kind(node, Node({"type": child}, where), path):
        return Node({"type": child}, where)
    return Node({**node.value, key: child}, node.where)


def _index(key: str, node: Node, where: str, path: tuple[str, ...]) -> int:
    if not key.isdecimal() or int(key) >= len(node.value):
        legal = f"0..{len(node.value) - 1}" if node.value else "none, it is empty"
        raise ConfigError(
            f"{where}: {'.'.join(path)} is a list (set at {node.where}); {key!r} is no index of it; legal: {legal}"
        )
    return int(key)


def _expand(node: Node, path: tuple[str, ...] = ()) -> tuple[Node, list[str]]:
    """The tree with ${VAR} replaced in path settings, and what went wrong."""
    if isinstance(node.value, str) and "${" in node.value:
        return _expand_text(node, path)
    if isinstance(node.value, dict):
        done = {key: _expand(child, (*path, key)) for key, child in node.value.items()}
        return Node({key: child for key, (child, _) in done.items()}, node.where), _flatten(done.values())
    if isinstance(node.value, list):
        done = [_expand(child, (*path, str(index))) for index, child in enumerate(node.value)]
        return Node([child for child, _ in done], node.where), _flatten(done)
    return node, []


def _flatten(done: Iterable[tuple[Node, list[str]]]) -> list[str]:
    return [problem for _, problems in done for problem in problems]


def _expand_text(node: Node, path: tuple[str, ...]) -> tuple[Node, list[str]]:
    name = ".".join(path)
    pattern = ".".join("*" if key.isdecimal() else key for key in path)
    if pattern not in PATH_SETTINGS:
        rule = f"environment variables are expanded only in paths; legal: {', '.join(sorted(PATH_SETTINGS))}"
        return node, [located(f"{name}: {node.value!r}: {rule}", node.where)]
    missing = [variable for variable in _VARIABLE.findall(node.value) if variable not in os.environ]
    problems = [
        located(f"{name}: {node.value!r} needs the environment variable {variable}, which is not set", node.where)
        for variable in missing
    ]
    text = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), node.value)
    if not missing and "${" in text:
        problems.append(located(f"{name}: {node.value!r} must name variables as ${{NAME}}", node.where))
    return Node(text, node.where), problems


def _validate(root: Node, problems: list[str]) -> RunConfig:
    try:
        # JSON mode, so that a YAML list may fill a tuple while strictness still refuses `tensor: true` and `seed: "1"`.
        config = RunConfig.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        problems = problems + validation_problems(error, root)
        config = None
    if config is not None:
        problems = problems + _swallowed_booleans(root, config_to_dict(config))
        problems += [located(text, _where(root, path)) for path, text in deepspeed_problems(config)]
    _refuse(problems)
    assert config is not None
    return config


def _swallowed_booleans(node: Node, resolved: Any, path: tuple[str, ...] = ()) -> list[str]:
    """`zero.stage: true` would pass as 1 even in strict mode, because Python holds True == 1."""
    if isinstance(node.value, dict):
        pairs = [(key, child, resolved[key]) for key, child in node.value.items()]
    elif isinstance(node.value, list):
        pairs = [(str(i), child, resolved[i]) for i, child in enumerate(node.value)]
    else:
        swallowed = isinstance(node.value, bool) and not isinstance(resolved, bool)
        return (
            [located(f"{'.'.join(path)}: {json.dumps(node.value)} must be a number", node.where)] if swallowed else []
        )
    return [problem for key, child, below in pairs for problem in _swallowed_booleans(child, below, (*path, key))]


def _where(root: Node, path: tuple[str, ...]) -> str:
    node = root
    for key in path:
        node = node.child(key) or node
    return node.where


def _refuse(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{count} in the configuration:", *(f"  {line}" for line in problems)]))


def _node_of(value: Any, where: str) -> Node:
    if isinstance(value, dict):
        return Node({str(key): _node_of(child, where) for key, child in value.items()}, where)
    if isinstance(value, list):
        return Node([_node_of(child, where) for child in value], where)
    return Node(value, where)
