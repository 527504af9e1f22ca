from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.yaml_tree import parse_yaml, write_yaml
from moetrain.errors import ConfigError

# Characters that mean something to YAML somewhere, and a few beyond ASCII.
_TEXT = st.text(" :#-?'\"{}[],&*!|>%@`\n\t\\yesnotrufal0189.E_~é漢\u2028\u0085", max_size=8)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT
_NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
_LISTS = st.lists(_SCALARS, max_size=3)
_TREES = st.dictionaries(_NAMES, _SCALARS | _LISTS | st.dictionaries(_NAMES, _SCALARS | _LISTS, max_size=3), max_size=4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("5e8", 500_000_000),
        ("2.0", 2.0),
        ("50_000_000", 50_000_000),
        ("010", 10),
        ("-3", -3),
        (".5", 0.5),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
        (".inf", ".inf"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "x").plain()
    assert parsed == value and type(parsed) is type(value)


@given(_TREES)
def test_what_is_written_reads_back_equal(tree: dict[str, Any]) -> None:
    assert parse_yaml(write_yaml(tree), "x").plain() == tree


@given(
    st.sampled_from(
        ["yes", "no", "on", "1e-4", "5e8", "010", "1_0", "0o7", "1:30", "null", "true", "2024-01-01", "", "=", "<<"]
    )
)
def test_strings_that_look_like_something_else_stay_strings(text: str) -> None:
    written = write_yaml({"key": text})
    assert parse_yaml(written, "x").plain() == {"key": text}
    assert yaml.safe_load(written) == {"key": text}  # for readers other than ours, too


def test_nodes_know_line_and_column() -> None:
    root = parse_yaml("a: 1\nb:\n  c: [x,\n      y]\n", "f.yaml")
    section = root.child("b")
    assert section is not None and section.where == "f.yaml:2:1"
    items = section.child("c")
    assert items is not None and items.where == "f.yaml:3:3"
    second = items.child(1)
    assert second is not None and second.where == "f.yaml:4:7"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", ["f:3:1", "'a' appears twice", "first at f:1:1"]),
        ("a: {x: 1, x: 1}", ["f:1:11", "appears twice"]),
        ("a: &n 1\nb: *n", ["f:1:4", "anchors and aliases are refused"]),
        ("a: !!python/object/apply:os.system [ls]", ["f:1:4", "tag", "refused"]),
        ("a: !!python/name:os.system ''", ["tag", "refused"]),
        ("a: [1", ["f:", "not valid YAML"]),
        ("a: 1\n---\nb: 2", ["not valid YAML"]),
        ("? [a, b]\n: 1", ["key must be a single word"]),
        ("a: 1e999", ["too large"]),
        ("[" * 1500, ["f: not valid YAML"]),
        ("a: \x07", ["f: not valid YAML"]),
    ],
)
def test_unsafe_or_ambiguous_yaml_is_refused_with_its_place(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f")
    assert all(word in str(error.value) for word in words), str(error.value)
