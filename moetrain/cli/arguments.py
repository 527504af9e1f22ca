"""The words behind a verb: YAML files, then `key=value` overrides; lists behind an option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moetrain.errors import ConfigError

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES... [KEY=VALUE...]",
        help="YAML files, merged left to right, then overrides such as zero.stage=2",
        show_default=False,
    ),
]


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(files, overrides). A word with "=" is an override unless a file of that name exists. Raises `ConfigError`."""
    files = [Path(word) for word in words if "=" not in word or Path(word).is_file()]
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    if not files:
        raise ConfigError("no configuration file given: name at least one YAML file, for example configs/demo.yaml")
    return files, overrides


def split_numbers(option: str, text: str) -> tuple[int, ...]:
    """`8,16` as numbers. Raises `ConfigError` for what is no whole number above 0."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) > 0):
            raise ConfigError(f'{option}: "{word}" in "{text}" must be a whole number of at least 1; example: 8,16')
    return tuple(int(word) for word in dict.fromkeys(words))


def split_choices(option: str, text: str, legal: Sequence[str]) -> tuple[str, ...]:
    """`bf16,fp32` as words, all of them legal. Raises `ConfigError`."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in legal:
            raise ConfigError(f'{option}: "{word}" is unknown; legal: {", ".join(legal)}')
    return tuple(dict.fromkeys(words))
