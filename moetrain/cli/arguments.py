"""The words behind a verb: YAML files, then `key=value` overrides."""

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
